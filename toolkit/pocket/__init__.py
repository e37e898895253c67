"""The pocket Qwen3 that ships: weights, tokenizer, card. It is built by `python -m data_recipes.pocket.build`."""
