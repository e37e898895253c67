"""Try the CUDA path from loading to export, on random weights and without a download: three minutes, at most 4 GB.

python -m toolkit doctor --gpu
"""

import dataclasses
import functools
import gc
import json
import platform
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toolkit import recipe, run
from toolkit.files import POCKET, ROOT, ToolkitError, outputs, read_json, write_text
from toolkit.machine import doctor, install
from toolkit.training import model as models
from toolkit.training.checkpoints import all_checkpoints, step_of
from toolkit.training.folder import PACKAGES, commit
from toolkit.training.log import quiet

CAP = int(3.6 * 2**30)
"""Bytes that torch may reserve: with CUDA's own, less than a card of 4 GB has."""
SLACK = 150 * 2**20
"""Bytes that cuBLAS, Triton and RoPE's tables hold beside any forecast: it counts on a model this small."""
SHAPE = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 14, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32768, "layer_types": None}  # fmt: skip
"""Half the layers of Qwen3-0.6B and a fifth of its vocabulary; on a CPU the pocket model's own shape is used."""
WEIGHTS, PLAIN, PACKED = "gpu-check-weights", "gpu-check", "gpu-check-packed"
CHANGES = """data.budget=6000 data.validation_size=4 evaluate.max_new_tokens=8 train.report_to=none train.max_steps=5
train.save_steps=2 train.eval_steps=2 train.save_total_limit=5 train.load_best_model_at_end=false
train.per_device_train_batch_size=4 train.gradient_accumulation_steps=2 train.per_device_eval_batch_size=4""".split()


def plan(name: str) -> recipe.Recipe:
    """The pocket recipe on the random model: five steps, a checkpoint after every second."""
    own = f"name={name}", f"model.model_name={outputs() / WEIGHTS}", f"train.packing={name == PACKED}"
    return recipe.load("pocket", [*CHANGES, *own])


# --- the steps: each returns what to say and what to keep ------------------------------------------------------------

Result = tuple[str, dict[str, Any]]


def weights() -> Result:
    """A random model on the disk; on a card, no more memory than a card of 4 GB has."""
    models.unsloth()  # before transformers, which it patches
    import torch

    if has_card := torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / torch.cuda.get_device_properties(0).total_memory))
    return f"{random_model(outputs() / WEIGHTS, SHAPE if has_card else {}) / 1e6:.0f}M parameters", {}


def random_model(folder: Path, shape: dict[str, Any]) -> int:
    """A Qwen3 of that shape with random 16-bit weights and the pocket model's tokenizer. Returns its parameters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(3407)
    built = Qwen3ForCausalLM(Qwen3Config(**read_json(POCKET / "config.json") | shape)).to(torch.bfloat16)
    shutil.copytree(POCKET, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with quiet():
        built.save_pretrained(folder)
    return built.num_parameters()


def load() -> Result:
    """The model in 4-bit."""
    model, _ = models.load_base(plan(PLAIN).model)
    count = sum(type(module).__name__ == "Linear4bit" for module in model.modules())
    if model.device.type == "cuda" and not count:
        raise ToolkitError("no layer is in 4-bit")
    return f"{count} layers in 4-bit on {model.device}, {model.dtype}", {"linear_4bit": count}


def train(name: str = PLAIN) -> Result:
    """Five steps; packed, where that is asked for, on a card."""
    run.train(plan(name), Console(quiet=True), score=False)
    manifest = read_json(outputs() / name / "manifest.json")
    way = "packed" if manifest["packing"] else "padding-free" if manifest["padding_free"] else "padded"
    if manifest["gpu"] and name == PACKED and way != "packed":
        raise ToolkitError(f"train.packing=true trained {way}")
    if name == PACKED and way != "packed":
        way = f"{way}, as packing needs a card: not tried"
    return (
        f"{manifest['steps']} steps, {way}, loss {manifest['train_loss']:.3f} in {manifest['train_seconds']:.0f} s",
        manifest,
    )


def resume() -> Result:
    """As after a kill: without its adapter and all checkpoints but the first, a run goes on from there and ends alike."""
    folder = outputs() / PLAIN
    before = read_json(folder / "manifest.json")
    first, *later = all_checkpoints(folder)
    for lost in (folder / "adapter", *later):
        shutil.rmtree(lost)
    _, after = train()
    # from the beginning it would end alike, too
    if after["resumed_at"] != step_of(first):
        raise ToolkitError(
            f"it trained from step {after['resumed_at']}, and not from its checkpoint at {step_of(first)}"
        )
    loss = {"before": before["train_loss"], "after": after["train_loss"]}
    if not abs(loss["after"] / loss["before"] - 1) < 0.01:
        raise ToolkitError(f"resumed, it ended with another loss: {loss}")
    exact = before["adapter"]["adapter_model.safetensors"] == after["adapter"]["adapter_model.safetensors"]
    said = f"from step {after['resumed_at']} to the same loss, {'bit for bit' if exact else 'to 1%'}"
    return said, loss | {"bit_for_bit": exact, "resumed_at": after["resumed_at"]}


def evaluate() -> Result:
    """Base and tuned scored by a few short replies: adapter off and on, divergence, the held-out loss."""
    result = run.evaluate(outputs() / PLAIN, Console(quiet=True), level="quick")
    return f"scored: {result['verdict'][-1]}"[:200], {"verdict": result["verdict"]}


def export() -> Result:
    """Merged weights and a GGUF with their certificate."""
    from toolkit.export import export

    certificate = export(outputs() / PLAIN, quants=("q8_0",), console=Console(quiet=True))
    if not certificate["passed"]:
        raise ToolkitError("the certificate did not pass")
    return "merged and q8_0, certificate passed", {}


def forecast() -> Result:
    """Memory as it was forecast and as it was measured."""
    manifests = [read_json(outputs() / name / "manifest.json") for name in (PLAIN, PACKED)]
    memory = [manifest["fit"] for manifest in manifests if "fit" in manifest]
    if not memory:
        return "not measured: no card", {}
    said = "; ".join(f"{m['forecast'] / 2**20:.0f} MiB, measured {m['measured'] / 2**20:.0f}" for m in memory)
    if any(abs(m["forecast"] - m["measured"]) > max(SLACK, 0.05 * m["measured"]) for m in memory):
        raise ToolkitError(f"wrong by more than 5% and {SLACK / 2**20:.0f} MiB: {said}")
    return said, {"memory": memory}


STEPS: dict[str, Callable[[], Result]] = {
    "random weights": weights,
    "load in 4-bit": load,
    "train": train,
    "train, packed": lambda: train(PACKED),
    "resume": resume,
    "evaluate": evaluate,
    "export a GGUF": export,
    "memory forecast": forecast,
}
"""In the order of what is most likely to fail first."""


def check(console: Console, *, rehearsal: bool = False) -> int:
    """Try every step, whatever fails; print a table, write outputs/doctor.json. 0 when all passed, else 1.

    `rehearsal`: on the CPU, where there is no card; otherwise the reason why none can be used is all there is to say.
    """
    machine = doctor.look()
    done: list[dict[str, Any]] = []
    doctor.show([*doctor.gpu(machine)], functools.partial(console.print, markup=False))
    table = Table("step", "", "seconds", "what", title="the CUDA path on random weights", title_justify="left")
    # left over from an earlier check, they would count as finished
    for name in (WEIGHTS, PLAIN, PACKED):
        shutil.rmtree(outputs() / name, ignore_errors=True)
    write(machine, done)
    for name, step in STEPS.items() if machine.seen or rehearsal else ():
        console.print(f"step {len(done) + 1} of {len(STEPS)}: {name} …")
        found = attempt(step)
        done.append({"step": name} | found)
        write(machine, done)  # after every step: what kills this process leaves those before it
        table.add_row(name, "passed" if found["passed"] else "FAILED", f"{found['seconds']:.0f}", escape(found["said"]))
    console.print(table if done else "nothing tried, as there is no card to use (--cpu-rehearsal: on the CPU)")
    console.print(f"for a bug report: {outputs() / 'doctor.json'}")
    return 0 if done and all(step["passed"] for step in done) else 1


def write(machine: doctor.Machine, steps: list[dict[str, Any]]) -> None:
    """outputs/doctor.json, which strangers will read: without the paths of this machine."""
    versions = {"python": platform.python_version()} | {p: install.installed(p) for p in (*PACKAGES, "triton")}
    record = {"commit": commit(), "system": platform.platform(), "versions": versions, "on_cpu": not machine.seen,
              "machine": dataclasses.asdict(machine), "steps": steps}  # fmt: skip
    text = json.dumps(record, indent=1)
    for folder, short in ((outputs(), "outputs"), (ROOT, "."), (Path.home(), "~")):
        text = text.replace(f"{folder}/", f"{short}/")
    write_text(outputs() / "doctor.json", text)


def attempt(step: Callable[[], Result]) -> dict[str, Any]:
    """{"passed", "said", "facts" or "traceback", "seconds"} of one step."""
    began = time.monotonic()
    try:
        said, facts = step()
        found = {"passed": True, "said": said, "facts": facts}
    except Exception as error:  # whatever a library raises is this step's result, and the next one is tried
        said = f"{type(error).__name__}: {error}"[:300]
        found = {"passed": False, "said": said, "traceback": traceback.format_exc()}
    gc.collect()
    return found | {"seconds": round(time.monotonic() - began, 1)}
