"""Whether the run of a recipe can be exported, asked before it trains and before its weights are downloaded.

for line in findings(recipes.load("hybrid")): print(line)
"""

from toolkit.export.checkpoint import unmergeable
from toolkit.export.gguf_types import convertible, template_names
from toolkit.export.tokenizer import tokens_beyond
from toolkit.files import ToolkitError, read_json
from toolkit.recipe import Export, Model, Recipe, adapter_folder
from toolkit.training.model import checkpoint_file


def findings(recipe: Recipe) -> list[str]:
    """What a run of this recipe cannot be exported as. Raises ToolkitError where the recipe asks for a GGUF by itself, or for
    an adapter that cannot be continued."""
    check_plain(recipe.model)
    settings = {key: recipe.lora.extra.get(key) for key in ("bias", "target_parameters")}
    setting = unmergeable(settings | {"modules_to_save": recipe.lora.trained_whole})
    if setting:
        return [f"this run cannot be exported here ({setting}): merge it with PEFT's merge_and_unload"]
    config = checkpoint_file(recipe.model, "config.json")
    if not config:
        return []
    tokenizer = checkpoint_file(recipe.model, "tokenizer.json")
    if tokenizer and (reason := tokens_beyond(tokenizer, config)):
        return [f"this run cannot be exported: {reason}"]
    quants = recipe.export.quantization_method
    templates = template_names(checkpoint_file(recipe.model, "tokenizer_config.json"))
    reason = convertible(config, tokenizer, templates) if quants else None
    if not reason:
        return []
    if quants != Export().quantization_method:
        raise ToolkitError(
            f"{recipe.model.model_name}: no GGUF conversion: {reason} Set export.quantization_method=[] "
            "(the run can still be exported as merged weights: --to merged)"
        )
    return [f"this run can be exported as merged weights (--to merged), not as GGUF: {reason}"]


def check_plain(section: Model) -> None:
    """Raises ToolkitError where `model.adapter` is more than a LoRA alike in all its layers."""
    folder = adapter_folder(section.adapter) if section.adapter else None
    if folder is None:
        return
    config = read_json(folder / "adapter_config.json")
    uneven = "rank_pattern alpha_pattern layers_to_transform exclude_modules".split()
    setting = unmergeable(config) or next((key for key in uneven if config.get(key)), None)
    if setting:
        raise ToolkitError(
            f"model.adapter: {section.adapter}: {setting}: only a plain LoRA is continued. Merge it with PEFT's "
            "merge_and_unload, save that with save_pretrained, and train it as model.model_name"
        )
