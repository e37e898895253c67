"""The pocket Qwen3: a few million parameters, both modes, trained from nothing in minutes. `python -m toolkit.pocket.build`"""
