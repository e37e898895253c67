"""A PeftModel in memory becomes a run's folder, once its base is known to be what lies under its name.

save_run(model, tokenizer, Path("my-model"))
"""

from pathlib import Path
from typing import Any

import torch

from toolkit.export.checkpoint import Checkpoint, find_base
from toolkit.export.merge import four_bit_round_trip
from toolkit.files import ToolkitError, hide_home, without_home, write_json
from toolkit.training.model import adapter_checksums

SAME_16_BIT, SAME_4_BIT = 0.002, 0.01
"""Relative difference that rounding to another 16-bit type, or quantizing on another device, makes in a weight."""


def save_run(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a PeftModel's adapter and tokenizer, and the manifest that `export` reads. Raises ToolkitError."""
    if not hasattr(model, "peft_config"):
        raise ToolkitError(
            "export_model takes a PeftModel: merged and GGUF files are made from its adapter and its base"
        )
    name = model.active_adapter
    base = model.get_base_model()
    loaded = {
        "name": without_home(model.peft_config[name].base_model_name_or_path or ""),
        "revision": vars(base.config).get("_commit_hash"),
        "load_in_4bit": bool(getattr(base, "is_loaded_in_4bit", False)),  # transformers sets it on 4-bit models only
    }
    # before anything is written
    check_base(base, loaded)
    # the layout of a trained run, which every other verb reads
    adapter = folder / "adapter"
    model.save_pretrained(str(adapter), selected_adapters=[name])
    if name != "default":  # PEFT puts it into a folder of that name
        for file in (adapter / name).iterdir():
            file.replace(adapter / file.name)
        (adapter / name).rmdir()
    tokenizer.save_pretrained(str(adapter))
    hide_home(adapter)
    write_json(folder / "manifest.json", {"model": loaded, "adapter": adapter_checksums(adapter)})


def check_base(base: torch.nn.Module, loaded: dict[str, Any]) -> None:
    """Raises ToolkitError where a model in memory, its adapter aside, is not what lies under its name: it was merged or trained
    before, and an export onto that name would be another model."""
    if not loaded["name"]:
        raise ToolkitError("the model has no name: save it with save_pretrained and load it from that folder")
    stored = Checkpoint(find_base(loaded, "4bit" if loaded["load_in_4bit"] else "16bit").folder)
    for path, module in base.named_modules():
        # PEFT wraps a trained layer and keeps the old one inside it as base_layer
        name = path.replace(".base_layer", "") + ".weight"
        if name in stored.weights and hasattr(module, "weight") and not hasattr(module, "base_layer"):
            _check_weight(name, module.weight, stored, loaded["name"])


def _check_weight(name: str, weight: Any, stored: Checkpoint, model: str) -> None:
    """Compare a weight in memory with the stored one, both dequantized."""
    from bitsandbytes.functional import dequantize_4bit

    expected, limit = stored.tensor(name), SAME_16_BIT
    if state := getattr(weight, "quant_state", None):
        weight, limit = dequantize_4bit(weight, state), SAME_4_BIT
        if name not in stored.packed:  # quantized when it was loaded
            expected = four_bit_round_trip(expected.to(weight.dtype), state.blocksize, state.nested, state.quant_type)
    elif not weight.is_floating_point():
        return  # 8-bit: what is merged onto is the 16-bit base
    if weight.shape != expected.shape:
        raise ToolkitError(f"{name}: resized in memory: save the model and load it before an adapter is trained on it")
    expected, weight = expected.float(), weight.detach().float().cpu()
    if not (weight - expected).norm() <= limit * expected.norm():  # NaN too
        raise ToolkitError(
            f"{name}: the model in memory is not {model} any more: it was merged or trained before this adapter. "
            "Save it with save_pretrained, load it from that folder, and train the adapter on that"
        )
