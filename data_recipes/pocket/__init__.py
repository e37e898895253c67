"""How the pocket Qwen3 and the sample rows were made: `python -m data_recipes.pocket.build`, `python -m data_recipes.pocket.samples`"""
