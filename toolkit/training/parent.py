"""The adapter that a run continues: `model.adapter` of a recipe, found, checked, and loaded into a fresh one.

parent = checked(recipe); parent["run"], parent["sha256"]
"""

from pathlib import Path
from typing import Any

from toolkit.files import ToolkitError, outputs, read_if_there, read_json, sha256
from toolkit.recipe import Model, Recipe, adapter_folder, adapter_settings
from toolkit.records import AdapterOf, JsonObject
from toolkit.training.base import ADAPTER_WEIGHTS, base_folder, check_base
from toolkit.training.log import quiet
from toolkit.training.model import check_adapter, run_folder


def checked(recipe: Recipe) -> AdapterOf | None:
    """What the manifest keeps of the adapter that a recipe continues; None where it begins anew.

    Raises ToolkitError where there is none by that name, where it is damaged, of another base, or of other LoRA settings."""
    name = recipe.model.adapter
    if name is None:
        return None
    folder = adapter_folder(name) or run_folder(name) / "adapter"  # which says what is missing
    run = folder.parent
    if run == outputs() / recipe.name:
        raise ToolkitError(f"model.adapter: {name}: this run would continue itself: choose another name (name=...)")
    manifest = read_if_there(run / "manifest.json")
    if manifest:
        check_adapter(run)
    check_same_base(recipe.model, folder, manifest)
    for key, theirs in adapter_settings(folder).items():
        ours = getattr(recipe.lora, key)
        if ours != theirs and (key != "target_modules" or {*ours} != {*theirs}):
            raise ToolkitError(
                f"lora.{key}: {name} has {theirs}, the recipe {ours}: leave lora.{key} out of the recipe"
            )
    return {"run": name, "sha256": sha256(folder / ADAPTER_WEIGHTS), "data": manifest.get("data", {})}


def check_same_base(section: Model, folder: Path, manifest: JsonObject) -> None:
    """Raises ToolkitError where an adapter was trained on another base than a recipe's, or the base has changed since."""
    base = manifest.get("model") or {"name": read_json(folder / "adapter_config.json")["base_model_name_or_path"]}
    name = base["name"]
    # folders by where they are, however they are spelled
    if (base_folder(section.model_name) or section.model_name) != (base_folder(name) or name):
        raise ToolkitError(f"model.adapter: {section.adapter} was trained on {name}: set model.model_name to {name}")
    check_base(section, base.get("files") or {})


def load_weights(model: Any, folder: Path) -> None:
    """Give a PeftModel's adapter the weights of one in a folder, bit for bit. Raises ToolkitError where they are not of the
    same layers."""
    import peft
    from safetensors.torch import load_file

    theirs = load_file(folder / ADAPTER_WEIGHTS)
    if stray := sorted(theirs.keys() ^ peft.get_peft_model_state_dict(model).keys()):
        raise ToolkitError(
            f"{folder / ADAPTER_WEIGHTS}: {stray[0]} ({len(stray)} such): it was trained on other layers"
        )
    with quiet():
        peft.set_peft_model_state_dict(model, theirs)
