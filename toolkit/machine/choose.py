"""The model that a machine trains where a recipe says `auto`.

name, why = auto_model(recipes.load("hybrid", ["model.model_name=auto"]))
"""

from toolkit.recipe import Recipe


def auto_model(recipe: Recipe) -> tuple[str, str]:
    """(model, why) for `model_name: auto`: the largest Qwen3 that fits the card with this recipe, or `pocket` without one."""
    import torch

    from toolkit.machine import fit

    if not torch.cuda.is_available():
        return "pocket", "no CUDA card for a larger one"
    # what is free now, since a display or another program may hold some of the card
    memory = fit.usable_vram()
    return fit.choose_model(memory, recipe), f"the largest Qwen3 that fits {memory / fit.GIB:.1f} GiB with this recipe"
