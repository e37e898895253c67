"""Run a run again from its folder alone and compare: adapter, mix, metrics and evaluation.

from toolkit.reproduce import reproduce; print(*reproduce("pocket"), sep="\\n")
"""

from pathlib import Path

from toolkit import recipe as recipes
from toolkit.files import read_json, read_jsonl, sha256
from toolkit.model import run_folder

CLOCK = {"seconds", "started", "finished", "train_runtime", "eval_runtime", "peak_memory_gib"}
"""Keys that depend on the hour and the machine's speed, left out of the comparison, like all rates per second."""


def reproduce(run: str | Path, console=None) -> list[str]:
    """Train and evaluate the recipe in a run's folder as outputs/<name>-reproduced; the first line is the verdict.

    The new folder resumes and is skipped when finished, like any run. Raises ToolkitError where `train` does.
    """
    from toolkit.run import train

    folder = run_folder(run)
    recipe = recipes.load(folder / "recipe.yaml", [f"name={folder.name}-reproduced"])
    again = train(recipe, console, score=(folder / "eval.json").is_file())
    lines = [line for line in (check(folder, again) for check in (_adapter, _mix, _metrics, _evaluation)) if line]
    return lines or [f"equal bit for bit: {again} repeats {folder} (adapter, mix, metrics, evaluation)"]


def _adapter(old: Path, new: Path) -> str:
    sums = [sha256(folder / "adapter" / "adapter_model.safetensors")[:12] for folder in (old, new)]
    return "" if sums[0] == sums[1] else f"the adapters differ: sha256 {sums[0]}… there, {sums[1]}… now"


def _mix(old: Path, new: Path) -> str:
    return _difference("mix.json", *(read_json(folder / "mix.json") for folder in (old, new)))


def _metrics(old: Path, new: Path) -> str:
    return _difference("metrics.jsonl", *({str(i): row for i, row in enumerate(read_jsonl(folder / "metrics.jsonl"), 1)}
                                          for folder in (old, new)))  # fmt: skip


def _evaluation(old: Path, new: Path) -> str:
    if not (old / "eval.json").is_file():
        return ""
    return _difference("eval.json", *(read_json(folder / "eval.json") for folder in (old, new)))


def _difference(name: str, old, new, path: str = "") -> str:
    """The first place where two values differ, in words; empty where they are equal but for times."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if key not in CLOCK and not key.endswith(("_per_second", "_runtime"))]
        return next(filter(None, (_difference(name, old.get(k), new.get(k), f"{path}.{k}") for k in keys)), "")
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return next(filter(None, (_difference(name, a, b, f"{path}.{i}") for i, (a, b) in pairs)), "")
    return "" if old == new else f"{name} differs first at {path.lstrip('.')}: {old!r:.80} there, {new!r:.80} now"
