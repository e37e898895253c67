"""A run's folder while it trains: who holds the name, its manifest, and why it stopped.

folder, state = open_run(recipe)
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from toolkit import recipe as recipes
from toolkit.data.mix import Mix, check_data
from toolkit.files import (
    ROOT,
    ToolkitError,
    first_line,
    flat,
    lock,
    outputs,
    read_if_whole,
    read_text,
    write_error,
    write_json,
    write_jsonl,
    write_text,
)
from toolkit.recipe import Recipe
from toolkit.records import JsonObject, Manifest
from toolkit.training.base import check_base, recorded_checksums
from toolkit.training.checkpoints import all_checkpoints
from toolkit.training.log import LOG
from toolkit.training.model import damaged, on_cuda
from toolkit.training.parent import checked

State = Literal["new", "unfinished", "finished"]
# What an error of a write says: the system's words, and those of torch.save, safetensors and tokenizers.
FAILED_WRITE = (
    "No space left|File too large|quota exceeded|Permission denied|not permitted|Read-only|Not a directory|Input/output"
    "|os error (27|28)|PytorchStreamWriter|unexpected pos|iostream error"
)
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


def held(folder: Path) -> contextlib.AbstractContextManager[None]:
    """The lock on a run's folder, which the first process takes, since the others work in the same folder with it."""
    return lock(folder, "train") if is_main() else contextlib.nullcontext()


def open_run(recipe: Recipe, *, fresh: bool = False) -> tuple[Path, State]:
    """The run's folder and its state. Nothing is written: the name is taken by `claim`, once a step was trained.

    `fresh` moves an existing run aside to outputs/.old/. Raises ToolkitError when another recipe holds the name."""
    folder = outputs() / recipe.name
    # moved, not deleted: --fresh may have been typed too early
    if fresh and is_main() and folder.exists():
        aside = outputs() / ".old" / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(aside)
    if not (folder / "recipe.yaml").is_file() and not all_checkpoints(folder):
        return folder, "new"
    check_recipe(recipe, folder)
    manifest = read_manifest(folder)
    # a damaged adapter is written again from its checkpoint, without training
    is_finished = "finished" in manifest and damaged(folder / "adapter", manifest.get("adapter", {})) is None
    if "parents" in manifest and not is_finished:
        raise ToolkitError(
            f"{folder}: a damaged sum of runs, which no training writes again: give its `blend` command again"
        )
    return folder, "finished" if is_finished else "unfinished"


def check_recipe(recipe: Recipe, folder: Path) -> None:
    """Raises ToolkitError when a folder's run is of another recipe, by its recipe.yaml or, where an editor changed or
    damaged that, by its manifest; the file is then written anew."""
    file = folder / "recipe.yaml"
    text = recipes.to_yaml(recipe)
    with contextlib.suppress(ToolkitError):
        if read_text(file) == text:
            return
    if read_manifest(folder).get("recipe_sha256") == recipes.sha256(recipe):
        write_text(file, text)
        return
    changes = _changes(recipes.load(file), recipe) if file.is_file() else "its recipe.yaml is missing"
    raise ToolkitError(
        f"{folder} holds a run of another recipe ({changes}). "
        "Choose another name (name=...), or pass --fresh to move the old run aside"
    )


def _changes(old: Recipe, new: Recipe) -> str:
    """The first keys in which two recipes differ, for the error message."""
    before = flat(recipes.to_dict(old))
    after = flat(recipes.to_dict(new))
    keys = [key for key in before | after if before.get(key) != after.get(key)]
    return "; ".join(f"{key}: {before.get(key)} there, {after.get(key)} here" for key in keys[:3])


def check_adapter_values(recipe: Recipe, model: Any) -> None:
    """Raises ToolkitError when a model's adapter is not the recipe's, which names and records the run."""
    config = model.peft_config[model.active_adapter]
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora"):
        used = getattr(config, name)
        expected = getattr(recipe.lora, name)
        if used != expected:
            raise ToolkitError(
                f"the adapter has {name}={used}, the recipe lora.{name}={expected}: set lora.{name}={used} in the recipe"
            )


def check_resume(recipe: Recipe, mixed: Mix, folder: Path, console: Console) -> None:
    """Compare what a run with checkpoints began with to what is here now: packages that changed are named. Raises
    ToolkitError where the data or the base changed."""
    if not all_checkpoints(folder):
        return
    before = read_manifest(folder)
    check_data(mixed, before)
    continued = before.get("adapter_of")
    if continued and continued != checked(recipe):
        raise ToolkitError(
            f"model.adapter: {continued['run']}: its adapter is not the one that this run began with (SHA-256 "
            f"{continued['sha256']:.8} in manifest.json): put it back, or train anew under another name"
        )
    check_base(recipe.model, before.get("model", {}).get("files", {}))
    now = versions()
    changes = [f"{name} {old} → {now.get(name)}" for name, old in _changed_versions(before, now).items()]
    if changes:
        console.print(f"· resumed under other versions than it began with: {', '.join(changes)}", markup=False)


def _changed_versions(manifest: JsonObject, now: dict[str, str]) -> dict[str, str]:
    """{package: version} of what a manifest names and is of another version now."""
    return {name: old for name, old in manifest.get("versions", {}).items() if now.get(name) != old}


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
    if parent := checked(recipe):
        manifest["adapter_of"] = parent
    # a run that is resumed by hand stays in its sweep
    if sweep := os.environ.get("TOOLKIT_SWEEP") or before.get("sweep"):
        manifest["sweep"] = sweep
    earlier = before.get("earlier_versions", {}) | _changed_versions(before, now)
    if earlier:
        manifest["earlier_versions"] = earlier
    return manifest


def read_manifest(folder: Path) -> JsonObject:
    """A run's manifest.json; {} where it is missing or damaged, as training writes it again."""
    return read_if_whole(folder / "manifest.json")


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def commit() -> str | None:
    """The toolkit's git commit, with + when files differ from it; None outside a checkout or without git."""
    # an installed copy may lie in a checkout of something else
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    done = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a write that failed below `path`, whoever reports it, into the error that says what to do."""
    try:
        yield
    except Exception as error:  # safetensors raises its own kind, tokenizers a plain Exception
        if isinstance(error, ToolkitError) or not re.search(FAILED_WRITE, str(error)):
            raise
        failed = error if isinstance(error, OSError) else OSError(first_line(error))
        raise write_error(path, failed) from error


@contextlib.contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Hold a run's folder; libraries' output and tracebacks of the block go to its run.log, and a run that ends early says
    why in its manifest."""
    with held(folder):
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
        number = error.args[0] if error.args else signal.SIGINT
        reason = f"interrupted by {signal.Signals(number).name}"
    with contextlib.suppress(ToolkitError):  # on a full disk the reason is on the screen only
        write_json(folder / "manifest.json", manifest | {"state": "stopped", "stopped": reason})
