"""`python -m tests.tools.bench`: `start` times a cold start; on a GPU `speed` compares three ways and `cards` tries the forecasts."""

TOY = "tests/support/files/bench_shape.json"
"""A Qwen3 so small that every way runs on a CPU: tries the path, measures nothing."""
BRIEFLY = {"max_length": 64, "steps": 3, "warm_up": 1}
