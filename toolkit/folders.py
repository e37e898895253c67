"""Evaluated runs, read back from their folders, checked for comparability and grouped by reasoning share.

runs, left_out = read_runs(Path("outputs").glob("sweep-*")); points = group(runs, unit="supervised_tokens")
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from toolkit.evaluate import is_rate

FILES = ("recipe.yaml", "mix.json", "eval.json", "manifest.json", "metrics.jsonl")
UNITS = ("examples", "tokens", "supervised_tokens")
GOAL = ("thinking", "accuracy")
KL = ("forgetting", "kl")
METRICS = (
    *((mode, metric) for metric in ("accuracy", "accuracy/chat", "adherence", "reasoning_tokens", "answer_tokens", "cut")
      for mode in ("thinking", "non_thinking")),
    ("forgetting", "kl"), ("forgetting", "nll"),
)  # fmt: skip
"""What tables show, as (section, metric) of eval.json."""


@dataclass(frozen=True)
class Run:
    """One run folder, read."""

    name: str
    recipe: dict
    mix: dict
    eval: dict
    manifest: dict
    metrics: list[dict]

    def share(self, unit: str) -> float:
        """Achieved share of thinking rows."""
        return _share(self.mix, self.mix["achieved"][unit], unit)

    def found(self, name: str, section: str, metric: str) -> dict | None:
        """{"value", "low", "high", "n"} of base or tuned; None where it was not measured."""
        found = self.eval[name].get(section, {}).get(metric)
        return found if found and found["value"] is not None else None


@dataclass(frozen=True)
class Point:
    """Runs that differ only in their seed: one place on the curve."""

    label: str
    variant: str
    """What else the recipes differ in, "learning_rate=0.0002"; empty when only the share does."""
    planned: float
    """Planned reasoning share in the mix's unit."""
    runs: list[Run]
    shares: dict[str, float]
    values: dict[tuple[str, str], dict]
    """(section, metric) → {"value", "low", "high", "n", "each": one value a seed}."""


def read_runs(folders: Iterable[Path]) -> tuple[list[Run], list[tuple[str, str]]]:
    """(runs, left out with the reason), each folder once."""
    read, left_out = [], []
    for folder in dict.fromkeys(Path(f).resolve() for f in folders):
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            left_out.append((folder.name, f"incomplete: no {', '.join(missing)}"))
            continue
        try:
            read.append(_read(folder))
        except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            left_out.append((folder.name, f"unreadable: {type(error).__name__}: {error}"))
    return read, left_out


def _read(folder: Path) -> Run:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    mix, result, manifest = (json.loads((folder / name).read_text(encoding="utf-8")) for name in FILES[1:4])
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    run = Run(folder.name, recipe, mix, result, manifest, [json.loads(line) for line in lines])
    for unit in UNITS:
        run.share(unit)  # a KeyError here is a reason to leave the run out
    for section, metric in (GOAL, KL):
        if run.found("tuned", section, metric) is None:
            raise ValueError(
                f"eval.json has no {section} {metric}: check the recipe's evaluate.questions, evaluate again"
            )
    return run


def _share(mix: dict, shares: dict, unit: str) -> float:
    modes = {name: source["mode"] for name, source in mix["sources"].items()}
    shares = {name: share for name, share in shares.items() if share}  # a source at 0% is planned, but not drawn
    if all(modes[name] in ("thinking", "non_thinking") for name in shares):
        return math.fsum(share for name, share in shares.items() if modes[name] == "thinking")
    return mix["achieved_modes"][unit].get("thinking", 0.0)  # `mode: auto`: rows of one source have different modes


def alike(runs: list[Run]) -> tuple[list[Run], list[tuple[str, str]]]:
    """The largest set of runs evaluated in the same way, and the others with what differs."""
    conditions = [_conditions(run) for run in runs]
    keys = [json.dumps(c, sort_keys=True) for c in conditions]
    if not keys:
        return [], []
    usual = conditions[keys.index(Counter(keys).most_common(1)[0][0])]
    alike, left_out = [], []
    for run, condition in zip(runs, conditions, strict=True):
        differs = [
            f"{name} {condition[name]} (the others: {usual[name]})" for name in usual if condition[name] != usual[name]
        ]
        if differs:
            left_out.append((run.name, f"evaluated differently: {'; '.join(differs)}"))
        else:
            alike.append(run)
    return alike, left_out


def _conditions(run: Run) -> dict:
    """What must be the same for two evaluations to be comparable; held-out rows may differ with the mix."""
    prints, budget = run.eval.get("fingerprints", {}), run.eval.get("budget", {})
    return {
        "level": run.eval.get("level"), "seed": run.eval.get("seed"), "questions": prints.get("questions"),
        "probes": prints.get("probes"), "max_new_tokens": budget.get("max_new_tokens"), "samples": budget.get("samples"),
        "base model": {k: run.manifest["model"].get(k) for k in ("name", "revision", "load_in_4bit")},
        "unit": run.mix["unit"],
    }  # fmt: skip


def group(runs: list[Run], unit: str) -> list[Point]:
    """Points by planned share and by whatever else the recipes differ in, in rising order of the share."""
    flat = [_settings(run.recipe) for run in runs]
    differing = sorted(k for k in set().union(*flat) if len({json.dumps(f.get(k)) for f in flat}) > 1)
    short = Counter(key.split(".")[-1] for key in differing)
    names = {key: key.split(".")[-1] if short[key.split(".")[-1]] == 1 else key for key in differing}
    groups = defaultdict(list)
    for run, settings in zip(runs, flat, strict=True):
        variant = ", ".join(f"{names[key]}={settings.get(key)}" for key in differing)
        groups[variant, round(_share(run.mix, run.mix["planned"], unit), 3)].append(run)
    several = len({share for _, share in groups}) > 1 or len(groups) == 1
    return [
        _point(_label(share if several else None, variant), variant, share, members)
        for (variant, share), members in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0]))
    ]


PER_RATIO = ("data.seed", "train.per_device_train_batch_size", "train.gradient_accumulation_steps")
"""What a sweep sets for each ratio, so that all take the same supervised tokens in the same number of steps."""


def _settings(recipe: dict) -> dict:
    """Dotted keys that make a difference to training, other than seed, shares and rows per step."""
    flat: dict = {}

    def walk(node, path: str) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            walk(value, f"{path}.{key}" if path else str(key))
        if not items:
            flat[path] = node

    walk({k: v for k, v in recipe.items() if k not in ("name", "evaluate", "export")}, "")
    return {k: v for k, v in flat.items() if k not in PER_RATIO and not k.endswith(".fraction")}


def _label(share: float | None, variant: str) -> str:
    return ", ".join(part for part in (f"{100 * share:g}% reasoning" if share is not None else "", variant) if part)


def _point(label: str, variant: str, planned: float, runs: list[Run]) -> Point:
    shares = {unit: float(np.mean([run.share(unit) for run in runs])) for unit in UNITS}
    values = {key: _average(key[1], [run.found("tuned", *key) for run in runs]) for key in METRICS}
    return Point(label, variant, planned, runs, shares, {key: found for key, found in values.items() if found})


def _average(metric: str, found: list[dict | None]) -> dict | None:
    """Mean over seeds. All seeds answer the same questions, so their intervals do not shrink by averaging; what the seeds
    themselves scatter is added."""
    if None in found:
        return None
    each = [f["value"] for f in found]
    value, scatter = float(np.mean(each)), 1.96 * seed_error(each)
    low, high = (math.hypot(np.mean([abs(f["value"] - f[end]) for f in found]), scatter) for end in ("low", "high"))
    low, high = (max(0.0, value - low), min(1.0, value + high)) if is_rate(metric) else (value - low, value + high)
    return {"value": value, "low": low, "high": high, "n": min(f["n"] for f in found), "each": each}


def seed_error(each: list[float]) -> float:
    return float(np.std(each, ddof=1) / math.sqrt(len(each))) if len(each) > 1 else 0.0
