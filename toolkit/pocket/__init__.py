"""The pocket Qwen3: both modes in a few million parameters, for work offline. `python -m toolkit.pocket.build`"""
