"""Finished runs: made without training, nor torch, on the pocket model or another; or really trained, in seconds, here.

folder = make_run(tmp_path / "one", seed=1); folder, said = trained("two", "train.max_steps=4")
"""

import io
import json
import shutil
from pathlib import Path

import numpy as np

from tests.support.collector import pass_over_imports
from toolkit import recipe
from toolkit.files import POCKET, ROOT, describe, read_json

RANK = 8
SMALL = ["data.budget=3000", "data.validation_size=8", "train.per_device_train_batch_size=4", "train.max_steps=4",
         "train.eval_steps=1", "train.save_steps=1", "train.save_total_limit=9", "evaluate.max_new_tokens=8",
         "train.report_to=none", "evaluate.forgetting_probes=0"]  # fmt: skip


class Screen(io.StringIO):
    """A console's file that calls `action` once, when `trigger` is printed: a fault at a known place of a run."""

    def __init__(self, trigger: str = "", action=None):
        super().__init__()
        self.trigger, self.action = trigger, action

    def write(self, text: str) -> int:
        done = super().write(text)
        if self.action and self.trigger in text:
            action, self.action = self.action, None
            action()
        return done


def trained(name: str, *changes: str, screen: Screen | None = None, **options) -> tuple[Path, str]:
    """(run folder, what was printed) of a small training under $TOOLKIT_OUTPUTS, without evaluation unless `score=True`."""
    from rich.console import Console

    from toolkit.training.model import unsloth

    unsloth()  # before transformers, which it patches
    pass_over_imports()
    from toolkit import run
    from toolkit.view import progress

    progress.Progress.PLAIN_EVERY = 0  # every step is printed
    screen = screen or Screen()
    console = Console(file=screen, width=200)
    small = recipe.load(ROOT / "data_recipes" / "pocket.yaml", [f"name={name}", *SMALL, *changes])
    return run.train(small, console, **{"score": False} | options), screen.getvalue()


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
    base_record = {"name": name, "revision": None, "load_in_4bit": True}
    _write(folder / "manifest.json", {"recipe_sha256": recipe.sha256(resolved), "model": base_record})
    return folder


def make_gguf(folder: Path, quant: str = "q8_0") -> Path:
    """The pocket model itself as this run's GGUF, with a certificate about it: what is served is not at question here."""
    from toolkit.export.checkpoint import Checkpoint
    from toolkit.export.gguf import write_gguf

    path = folder / "gguf" / f"{folder.name}.{quant}.gguf"
    path.parent.mkdir()
    write_gguf(Checkpoint(POCKET), path, quant, folder.name)
    files = {path.relative_to(folder).as_posix(): describe(path)}
    _write(
        folder / "certificate.json",
        {"passed": True, "checks": [], "files": files, "model": read_json(POCKET / "config.json")},
    )
    return path


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
