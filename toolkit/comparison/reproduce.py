"""Run a run again from its folder alone and compare: adapter, mix, metrics and evaluation.

from toolkit.comparison.reproduce import reproduce; print(*reproduce("pocket"), sep="\\n")
"""

from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import recipe as recipes
from toolkit.files import flat, read_json, read_jsonl, sha256
from toolkit.records import Json
from toolkit.training.model import run_folder

if TYPE_CHECKING:
    from rich.console import Console

CLOCK = ("seconds", "started", "finished", "peak_memory_gib", "runtime", "per_second")
"""Ends of keys that depend on the hour and on the machine's speed."""


def reproduce(run: str | Path, console: "Console | None" = None) -> list[str]:
    """Train and evaluate the recipe in a run's folder as outputs/<name>-reproduced; says what differs, or that nothing
    does. The new run resumes, and is not trained again when it is finished. Raises ToolkitError where `train` does."""
    from toolkit.run import train

    folder = run_folder(run)
    recipe = recipes.load(folder / "recipe.yaml", [f"name={folder.name}-reproduced"])
    # under another name, which nothing but paths depends on
    again = train(recipe, console, score=(folder / "eval.json").is_file())
    equal = f"equal bit for bit: {again} repeats {folder} in adapter, mix, metrics and evaluation"
    return differences(folder, again) or [equal]


def differences(old: Path, new: Path) -> list[str]:
    """For each part of two runs that is not equal, the first place where it differs."""
    sums = [sha256(folder / "adapter" / "adapter_model.safetensors")[:12] for folder in (old, new)]
    found = [f"the adapters differ: sha256 {sums[0]}… there, {sums[1]}… now"] if sums[0] != sums[1] else []
    for name in ("mix.json", "metrics.jsonl", "eval.json"):
        if (old / name).is_file():
            read = read_jsonl if name.endswith("l") else read_json
            if place := first_difference(*(read(folder / name) for folder in (old, new))):
                found.append(f"{name} differs first at {place}")
    return found


def first_difference(old: Json, new: Json) -> str:
    """`tuned.thinking.accuracy.value: 0.5 there, 0.6 now`; empty where values are equal but for times."""
    old, new = flat(old), flat(new)
    for key in {**old, **new}:
        if old.get(key) != new.get(key) and not key.endswith(CLOCK):
            return f"{key}: {old.get(key)!r:.80} there, {new.get(key)!r:.80} now"
    return ""
