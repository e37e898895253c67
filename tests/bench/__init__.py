"""`python -m tests.bench`: `start` times a cold start; on a GPU `speed` compares three ways and `cards` tries the forecasts."""
