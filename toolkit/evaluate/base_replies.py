"""Replies of base models, kept between evaluations: one base asked one question set is asked once, in all runs and sweeps.

rows, found = remembered(outputs() / ".base_replies", {"weights": checksum(model), "seed": 3407}, lambda: [{"text": "42"}])
"""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from toolkit.files import ToolkitError, read_json, write_json
from toolkit.generate import sampling_values

SAMPLE = 4096
"""Bytes of each tensor that enter a checksum as they are, evenly spread, beside the sum of all its bytes."""


def remembered(folder: Path, key: dict, compute: Callable[[], list[dict]]) -> tuple[list[dict], bool]:
    """(rows, found): what an earlier call wrote under the same key, else `compute()`, which is then written.

    A file that is damaged, or whose content is not what its own checksum says, is computed again."""
    file = folder / f"{_digest(key)[:16]}.json"
    if file.is_file():
        try:
            stored = read_json(file)
            if _digest(stored["key"]) == _digest(key) and stored["sha256"] == _digest(stored["rows"]):
                return stored["rows"], True
        except (ToolkitError, KeyError):
            pass  # damaged: written anew below
    rows = compute()
    write_json(file, {"key": key, "sha256": _digest(rows), "rows": rows})
    return rows, False


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def base_key(model, mode: str, decides: dict) -> dict:
    """Everything that decides a base's replies: `decides`, and the model's positions, sampling, device and libraries.
    Not the batch size: that decides rounding alone."""
    import torch

    cuda = model.device.type == "cuda"
    return {
        **decides,
        "prompts": _digest(decides["prompts"]),
        "positions": model.config.get_text_config().to_dict().get("rope_parameters"),
        "mode": mode,
        "sampling": sampling_values(model, mode),
        "device": torch.cuda.get_device_name(model.device) if cuda else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def checksum(model) -> str:
    """Identity of the base's weights as they are loaded, quantization included, whatever adapter is on top.

    Every byte counts in a sum, and a spread sample as it is: reading 8 GB whole would take longer than the questions."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.get_base_model().named_parameters():
        if any(part in name for part in ("lora_", ".modules_to_save.", "trainable_tokens")):  # PEFT's own weights
            continue
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        some = raw[:: max(1, len(raw) // SAMPLE)][:SAMPLE].cpu().numpy().tobytes()
        digest.update(
            f"{plain} {tensor.dtype} {tuple(tensor.shape)} {int(raw.sum(dtype=torch.int64))} ".encode() + some
        )
    return digest.hexdigest()
