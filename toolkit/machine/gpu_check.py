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

from toolkit import recipe, run
from toolkit.export import export
from toolkit.files import POCKET, ROOT, ToolkitError, outputs, read_json, write_text
from toolkit.machine import doctor, install
from toolkit.training import model as models
from toolkit.training.base import ADAPTER_WEIGHTS
from toolkit.training.checkpoints import all_checkpoints, step_of
from toolkit.training.folder import commit, versions
from toolkit.training.log import quiet

# Bytes that torch may reserve: with CUDA's own, less than a card of 4 GB has.
CAP = int(3.6 * 2**30)
# Half the layers of Qwen3-0.6B and a fifth of its vocabulary; on a CPU the pocket model's own shape is used.
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
    "layer_types": None,
}
WEIGHTS, PLAIN, PACKED = "gpu-check-weights", "gpu-check", "gpu-check-packed"
CHANGES = """data.budget=6000 data.validation_size=4 evaluate.max_new_tokens=8 train.report_to=none train.max_steps=5
train.save_steps=2 train.eval_steps=2 train.save_total_limit=5 train.load_best_model_at_end=false
train.per_device_train_batch_size=4 train.gradient_accumulation_steps=2 train.per_device_eval_batch_size=4""".split()


def plan(name: str) -> recipe.Recipe:
    """The pocket recipe on the random model: five steps, a checkpoint after every second."""
    names = f"name={name}", f"model.model_name={outputs() / WEIGHTS}", f"train.packing={name == PACKED}"
    return recipe.load("pocket", [*CHANGES, *names])


# --- the steps: each returns what is known after it -------------------------------------------------------------------

Facts = dict[str, Any]


def expect(holds: object, message: str) -> None:
    """Raises ToolkitError where something does not hold."""
    if not holds:
        raise ToolkitError(message)


def weights() -> Facts:
    """A random model on the disk; on a card, no more memory than a card of 4 GB has."""
    models.unsloth()  # before transformers, which it patches
    import torch

    has_card = torch.cuda.is_available()
    if has_card:
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / torch.cuda.get_device_properties(0).total_memory))
    return {"parameters": random_model(outputs() / WEIGHTS, SHAPE if has_card else {})}


def random_model(folder: Path, shape: dict[str, Any]) -> int:
    """A Qwen3 of that shape with random 16-bit weights and the pocket model's tokenizer. Returns its parameters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(3407)
    model = Qwen3ForCausalLM(Qwen3Config(**read_json(POCKET / "config.json") | shape)).to(torch.bfloat16)
    shutil.copytree(POCKET, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with quiet():
        model.save_pretrained(folder)
    return model.num_parameters()


def train(name: str = PLAIN) -> Facts:
    """Five steps; packed, where that is asked for, on a card."""
    run.train(plan(name), Console(quiet=True), score=False)
    manifest = read_json(outputs() / name / "manifest.json")
    rows = "packed" if manifest["packing"] else "padding-free" if manifest["padding_free"] else "padded"
    if name == PACKED and not manifest["gpu"]:
        rows += ", as packing needs a card: not tried"
    else:
        expect(name != PACKED or manifest["packing"], f"train.packing=true trained {rows}")
    shown = {key: manifest.get(key) for key in ("steps", "train_loss", "train_seconds", "resumed_at", "fit")}
    return {"rows": rows, **shown}


def resume() -> Facts:
    """As after a kill: without its adapter and all checkpoints but the first, a run goes on from there and ends alike."""
    folder = outputs() / PLAIN
    before = read_json(folder / "manifest.json")
    # a kill leaves checkpoints and no adapter; later ones are taken away so that there is something left to train
    first, *later = all_checkpoints(folder)
    for lost in (folder / "adapter", *later):
        shutil.rmtree(lost)
    train()
    after = read_json(folder / "manifest.json")
    # from the beginning it would end alike, too
    at, checkpoint = after["resumed_at"], step_of(first)
    expect(at == checkpoint, f"it trained from step {at}, and not from its checkpoint at {checkpoint}")
    losses = before["train_loss"], after["train_loss"]
    expect(abs(losses[1] / losses[0] - 1) < 0.01, f"resumed, it ended with another loss: {losses}")
    exact = before["adapter"][ADAPTER_WEIGHTS] == after["adapter"][ADAPTER_WEIGHTS]
    return {"resumed_at": at, "train_loss": losses[1], "bit_for_bit": exact}


def evaluate() -> Facts:
    """Base and tuned scored by a few short replies: adapter off and on, divergence, the held-out loss."""
    return {"verdict": run.evaluate(outputs() / PLAIN, Console(quiet=True), level="quick")["verdict"][-1]}


def export_gguf() -> Facts:
    """Merged weights and a GGUF with their certificate."""
    passed = export(outputs() / PLAIN, quants=("q8_0",), console=Console(quiet=True))["passed"]
    expect(passed, "the certificate did not pass")
    return {"certificate": "passed"}


# In the order of what is most likely to fail first.
STEPS: dict[str, Callable[[], Facts]] = {
    "random weights": weights,
    "train": train,
    "train, packed": lambda: train(PACKED),
    "resume": resume,
    "evaluate": evaluate,
    "export a GGUF": export_gguf,
}


def check(console: Console, *, rehearsal: bool = False) -> int:
    """Try every step, whatever fails; print a line for each, write outputs/doctor.json. 0 when all passed, else 1.

    `rehearsal`: on the CPU, where there is no card; otherwise the reason why none can be used is all there is to say.
    """
    machine = doctor.look()
    say = functools.partial(console.print, markup=False)
    doctor.show([*doctor.gpu(machine)], say)
    # left over from an earlier check, they would count as finished
    for name in (WEIGHTS, PLAIN, PACKED):
        shutil.rmtree(outputs() / name, ignore_errors=True)
    results: list[Facts] = []
    write(machine, results)
    for name, step in STEPS.items() if machine.seen or rehearsal else ():
        say(f"{len(results) + 1} of {len(STEPS)}: {name} …")
        result = {"step": name, **attempt(step)}
        results.append(result)
        write(machine, results)  # after every step: what kills this process leaves those before it
        facts = "; ".join(f"{key} {value}" for key, value in result["facts"].items())
        say(f"   {'passed' if result['passed'] else 'FAILED'} in {result['seconds']} s: {result['error'] or facts}")
    if not results:
        say("nothing tried, as there is no card to use (--cpu-rehearsal: on the CPU)")
    say(f"for a bug report: {outputs() / 'doctor.json'}")
    return 0 if results and all(result["passed"] for result in results) else 1


def attempt(step: Callable[[], Facts]) -> Facts:
    """{"passed", "facts", "error", "traceback", "seconds"} of one step."""
    began = time.monotonic()
    result: Facts = {"passed": True, "facts": {}, "error": "", "traceback": ""}
    try:
        result["facts"] = step()
    except Exception as error:  # whatever a library raises is this step's result, and the next one is tried
        result |= {
            "passed": False,
            "error": f"{type(error).__name__}: {error}"[:300],
            "traceback": traceback.format_exc(),
        }
    gc.collect()
    return result | {"seconds": round(time.monotonic() - began)}


def write(machine: doctor.Machine, steps: list[Facts]) -> None:
    """outputs/doctor.json, which strangers will read: without the paths of this machine."""
    record = {
        "commit": commit(),
        "system": platform.platform(),
        "versions": versions() | {"triton": install.installed("triton")},
        "on_cpu": not machine.seen,
        "machine": dataclasses.asdict(machine),
        "steps": steps,
    }
    text = json.dumps(record, indent=1)
    for folder, short in ((outputs(), "outputs"), (ROOT, "."), (Path.home(), "~")):
        text = text.replace(f"{folder}/", f"{short}/")
    write_text(outputs() / "doctor.json", text)
