"""A finished run without training it, nor torch, on the pocket model or another: `make_run(tmp_path / "one", seed=1)`."""

import json
import shutil
from pathlib import Path

import numpy as np

from toolkit import recipe
from toolkit.files import POCKET, ROOT

RANK = 8


def make_run(folder: Path, seed: int = 1, noise: float = 0.002, base: Path = POCKET) -> Path:
    """recipe.yaml, manifest.json and an adapter that changes `base` a little."""
    from safetensors.numpy import save_file

    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    random = np.random.default_rng(seed)
    shape = json.loads((base / "config.json").read_text(encoding="utf-8"))
    head = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    modules = {
        "self_attn.q_proj": (hidden, shape["num_attention_heads"] * head),
        "mlp.down_proj": (inner, hidden),
    }
    weights = {}
    for layer in range(shape["num_hidden_layers"]):
        for name, (into, out) in modules.items():
            place = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{place}.lora_A.weight"] = random.normal(0, into**-0.5, (RANK, into)).astype(np.float32)
            weights[f"{place}.lora_B.weight"] = random.normal(0, noise, (out, RANK)).astype(np.float32)
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "inference_mode": True}
    _write(adapter / "adapter_config.json", lora | {"target_modules": ["q_proj", "down_proj"]})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, adapter)
    name = "pocket" if base == POCKET else str(base)
    resolved = recipe.load(ROOT / "data_recipes" / "pocket.yaml", [f"name={folder.name}", f"model.model_name={name}"])
    (folder / "recipe.yaml").write_text(recipe.to_yaml(resolved), encoding="utf-8")
    _write(folder / "manifest.json", {"model": {"name": name, "revision": None, "load_in_4bit": True}})
    return folder


def make_gguf(folder: Path, quant: str = "q8_0") -> Path:
    """The pocket model itself as this run's GGUF: what is served is not at question here."""
    from toolkit.export.gguf_file import write_gguf
    from toolkit.export.merge import Checkpoint

    path = folder / "gguf" / f"{folder.name}.{quant}.gguf"
    path.parent.mkdir()
    write_gguf(Checkpoint(POCKET), path, quant, folder.name)
    return path


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
