"""Unsloth's CUDA trainer and model path on a machine without a card, each group of facts in a process of its own."""

LAYERS = 2
"""Of the pocket model's four: Triton's interpreter is slow."""
PROMPT = 3
"""Tokens at the beginning of every row that are not supervised."""
NEW_TOKENS = 8
"""Of each reply in `decoding`: Triton's interpreter takes seconds for one."""
