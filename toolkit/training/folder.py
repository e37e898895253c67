"""A run's folder while it trains: who holds the name, its manifest, and why it stopped.

folder, state = open_run(recipe)
"""

import contextlib
import errno
import importlib.metadata
import os
import platform
import re
import signal
import subprocess
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from toolkit import recipe as recipes
from toolkit.data.mix import Mix, check_data
from toolkit.files import (
    ROOT,
    ToolkitError,
    flat,
    outputs,
    read_json,
    read_text,
    write_error,
    write_json,
    write_jsonl,
    write_text,
)
from toolkit.recipe import Recipe
from toolkit.records import Manifest
from toolkit.training.base import check_base, recorded_checksums
from toolkit.training.checkpoints import all_checkpoints
from toolkit.training.log import LOG
from toolkit.training.model import damaged, on_cuda

State = Literal["new", "unfinished", "finished"]
WRITE_ERRORS = {
    getattr(errno, name) for name in ("ENOSPC", "EFBIG", "EDQUOT", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EIO")
}
NO_SPACE = r"No space left|os error (27|28)|PytorchStreamWriter|unexpected pos|iostream error"
"""How torch.save and safetensors report a failed write: as a RuntimeError and a SafetensorError of their own."""
PACKAGES = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "wandb")


def is_main() -> bool:
    """Whether this is the process that writes and talks: the only one, or the first that accelerate launched."""
    return os.environ.get("RANK", "0") == "0"


def main_first() -> contextlib.AbstractContextManager[None]:
    """Under `accelerate launch` the first process goes ahead and the others follow; alone, nothing."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return contextlib.nullcontext()
    import accelerate

    # unless told that it is on a CPU, PartialState knows of no other process there, and nobody waits
    return accelerate.PartialState(cpu=not on_cuda()).main_process_first()


def open_run(recipe: Recipe, *, fresh: bool = False) -> tuple[Path, State]:
    """The run's folder and its state. Nothing is written: the name is taken by `claim`, once a step was trained.

    `fresh` moves an existing run aside to outputs/.old/. Raises ToolkitError when another recipe holds the name."""
    folder = outputs() / recipe.name
    # moved, not deleted: --fresh may have been typed too early
    if fresh and folder.exists():
        aside = outputs() / ".old" / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(aside)
    written = folder / "recipe.yaml"
    if not written.is_file() and not all_checkpoints(folder):
        return folder, "new"
    if not holds_run_of(recipe, folder):
        changes = _changes(recipes.load(written), recipe) if written.is_file() else "its recipe.yaml is missing"
        raise ToolkitError(
            f"{folder} holds a run of another recipe ({changes}). "
            "Runs are never overwritten: choose another name (name=...), or pass --fresh to move the old run aside"
        )
    manifest = read_manifest(folder)
    # a damaged adapter is written again from its checkpoint, without training
    is_finished = "finished" in manifest and damaged(folder / "adapter", manifest.get("adapter", {})) is None
    return folder, "finished" if is_finished else "unfinished"


def holds_run_of(recipe: Recipe, folder: Path) -> bool:
    """Whether a folder's run is of this recipe, by its recipe.yaml; where an editor changed or damaged that, by the
    manifest, and the file is written anew."""
    written, text = folder / "recipe.yaml", recipes.to_yaml(recipe)
    with contextlib.suppress(ToolkitError):
        if read_text(written) == text:
            return True
    if read_manifest(folder).get("recipe_sha256") != recipes.sha256(recipe):
        return False
    write_text(written, text)
    return True


def _changes(old: Recipe, new: Recipe) -> str:
    """The first keys in which two recipes differ, for the error message."""
    before, after = flat(recipes.to_dict(old)), flat(recipes.to_dict(new))
    keys = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
    changes = [f"{key}: {before.get(key, 'unset')} there, {after.get(key, 'unset')} here" for key in keys[:3]]
    return "; ".join(changes) + ("; …" if len(keys) > 3 else "")


def check_adapter_values(recipe: Recipe, model: Any) -> None:
    """Raises ToolkitError when a model's adapter is not the recipe's, which names and records the run."""
    config = model.peft_config[model.active_adapter]
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora"):
        used, expected = getattr(config, name), getattr(recipe.lora, name)
        if used != expected:
            raise ToolkitError(
                f"the adapter has {name}={used}, the recipe lora.{name}={expected}: change it in the recipe, which names "
                f"and records the run (lora.{name}={used})"
            )


def check_resume(recipe: Recipe, mixed: Mix, folder: Path) -> list[str]:
    """Compare what a run with checkpoints began with to what is here now. Raises ToolkitError where the data or the base
    changed; returns the packages that did, as `torch 2.12.0 → 2.13.0`."""
    if not all_checkpoints(folder):
        return []
    before = read_manifest(folder)
    check_data(mixed, before)
    check_base(recipe.model, before.get("model", {}).get("files", {}))
    now = versions()
    began = before.get("versions", now)
    return [f"{name} {began[name]} → {now[name]}" for name in now if began.get(name, now[name]) != now[name]]


def claim(recipe: Recipe, mixed: Mix, model: Any, folder: Path) -> None:
    """Take the run's name and begin its record: the recipe, what the mix holds, and manifest.json."""
    write_json(folder / "mix.json", mixed.report)
    write_jsonl(folder / "quarantine.jsonl", mixed.quarantine)
    write_json(folder / "manifest.json", describe(recipe, mixed, model, folder))
    # last: with it the folder is a run
    write_text(folder / "recipe.yaml", recipes.to_yaml(recipe))


def versions() -> dict[str, str]:
    """{package: version} of what decides a training, Python included."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def describe(recipe: Recipe, mixed: Mix, model: Any, folder: Path) -> Manifest:
    """manifest.json as a run begins: what it would take to repeat it. A resumed run keeps when it began, and the versions
    it began with beside those of now."""
    import torch

    gpu = torch.cuda.get_device_properties(0) if on_cuda() else None
    before = read_manifest(folder) if all_checkpoints(folder) else {}
    now = versions()
    earlier = {name: v for name, v in before.get("versions", {}).items() if now.get(name) != v}
    manifest: Manifest = {
        "recipe_sha256": recipes.sha256(recipe),
        "versions": now,
        "gpu": {"name": gpu.name, "memory_bytes": gpu.total_memory} if gpu else None,
        "model": {
            "name": recipe.model.model_name,
            "revision": recipe.model.revision or vars(model.config).get("_commit_hash"),
            "load_in_4bit": recipe.model.load_in_4bit,
            "files": recorded_checksums(recipe.model),
        },
        "data": mixed.report["fingerprints"],
        "mix": mixed.folder.name,
        "seeds": {"data": recipe.data.seed, "train": recipe.data.seed},
        "commit": commit(),
        "started": before.get("started") or utc_now(),
        "state": "running",
    }
    if earlier := before.get("earlier_versions", {}) | earlier:
        manifest["earlier_versions"] = earlier
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """A run's manifest.json; {} where it is missing or damaged, as training writes it again."""
    try:
        return read_json(folder / "manifest.json")
    except ToolkitError:
        return {}


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def commit() -> str | None:
    """The toolkit's git commit, with + when files differ from it; None outside a checkout."""
    if not (ROOT / ".git").exists():  # an installed copy may lie in a checkout of something else
        return None
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a write that failed below `path`, whoever reports it, into the error that says what to do."""
    try:
        yield
    except ToolkitError:
        raise
    except Exception as error:  # safetensors raises its own kind, tokenizers a plain Exception
        is_known = error.errno in WRITE_ERRORS if isinstance(error, OSError) else re.search(NO_SPACE, str(error))
        if not is_known:
            raise
        failed = error if isinstance(error, OSError) else OSError(str(error).splitlines()[0])
        raise write_error(path, failed) from error


@contextlib.contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Libraries' output and tracebacks of the block go to the run's run.log; a run that ends early says why in its
    manifest."""
    LOG.folder = folder
    try:
        yield
    except BaseException as error:
        LOG.write("".join(traceback.format_exception(error)))
        error.add_note(f"log: {LOG.path}")
        if is_main():
            record_stop(folder, error)
        raise
    finally:
        LOG.folder = None


def record_stop(folder: Path, error: BaseException) -> None:
    """Say in a running run's manifest why it ended early."""
    manifest = read_manifest(folder)
    if manifest.get("state") != "running":
        return
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, KeyboardInterrupt):  # the command line passes SIGTERM and SIGHUP on as one with their number
        reason = f"interrupted by {signal.Signals(*error.args or [signal.SIGINT]).name}"
    with contextlib.suppress(ToolkitError):  # on a full disk the reason is on the screen only
        write_json(folder / "manifest.json", manifest | {"state": "stopped", "stopped": reason})
