"""A finished run on the pocket model without training it: `folder = make_run(tmp_path / "one", seed=1)`."""

import json
from pathlib import Path

from toolkit import recipe
from toolkit.recipe import POCKET, ROOT


def make_run(folder: Path, seed: int = 1, noise: float = 0.002) -> Path:
    """recipe.yaml, manifest.json and an adapter that changes the base a little."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    torch.manual_seed(seed)
    model = get_peft_model(
        Qwen3ForCausalLM.from_pretrained(POCKET), LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"])
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data += torch.randn_like(weight) * noise
    model.save_pretrained(folder / "adapter")
    AutoTokenizer.from_pretrained(POCKET).save_pretrained(folder / "adapter")
    resolved = recipe.load(ROOT / "data_recipes" / "pocket.yaml", [f"name={folder.name}"])
    (folder / "recipe.yaml").write_text(recipe.to_yaml(resolved), encoding="utf-8")
    manifest = {"model": {"name": "pocket", "revision": None, "load_in_4bit": True}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def make_gguf(folder: Path, quant: str = "q8_0") -> Path:
    """The pocket model itself as this run's GGUF: what is served is not at question here."""
    from toolkit.gguf_file import Checkpoint, write_gguf

    path = folder / "gguf" / f"{folder.name}.{quant}.gguf"
    path.parent.mkdir()
    write_gguf(Checkpoint(POCKET), path, quant, folder.name)
    return path
