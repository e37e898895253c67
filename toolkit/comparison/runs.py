"""Evaluated runs, read back from their folders and checked, so that a damaged one is left out and stops nothing.

runs, left_out = read_runs(Path("outputs").glob("sweep_pocket-r*"))

Only the run folders are read (recipe.yaml, mix.json, eval.json, manifest.json): no GPU, no account.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.evaluation.words import TITLES, never_ends
from toolkit.family import MODES
from toolkit.files import ToolkitError, flat, read_json
from toolkit.recipe import read_values

Key = tuple[str, str]
"""(section, metric) of eval.json."""
Content = Mapping[str, Any]
"""What a JSON or YAML file holds, by key."""
FILES = ("recipe.yaml", "mix.json", "manifest.json", "eval.json")
SECTIONS = (*MODES, "forgetting")
METRICS: list[Key] = [(section, metric) for metric in TITLES for section in SECTIONS]
# What must be equal for two evaluations to be comparable, and how a difference is named; held-out rows may differ with
# the mix.
CONDITIONS = {
    "level": "level {} instead of {}",
    "seed": "evaluation seed {} instead of {}",
    "fingerprints.questions": "other questions",
    "fingerprints.probes": "other probes (the prompts that measure forgetting)",
    "per_question": "{} questions kept instead of {}",
    "budget.max_new_tokens": "a limit of {} tokens instead of {}",
    "budget.limits.thinking": "a limit of {} tokens with thinking instead of {}",
    "budget.limits.non_thinking": "a limit of {} tokens without thinking instead of {}",
    "budget.samples": "{} samples instead of {}",
    "model.name": "base model {} instead of {}",
    "model.revision": "revision {} of the base model instead of {}",
    "model.load_in_4bit": "load_in_4bit {} instead of {}",
}
# Recipe keys that do not tell runs apart: what does not change the training, the seed, and rows per step, which a sweep
# sets for each ratio so that all take the same number of steps. Fractions are compared as planned shares.
NOT_TRAINED = re.compile(
    r"(name|data\.seed|.*\.fraction|train\.(report_to|project|logging_steps|per_device_train_batch_size|gradient_accumulation_steps))$"
    r"|(evaluate|export)\b"
)
SHARE = "share of "
# What reading a file raises whose content is not what `evaluate` wrote.
DAMAGED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Score:
    """A number of an evaluation with its 95% interval."""

    value: float
    low: float
    high: float
    n: int
    counted: np.ndarray | None = None
    """(sums, counts) × questions, where it was kept question by question."""


@dataclass(frozen=True)
class Run:
    """One run, evaluated; or one scale of it."""

    name: str
    recipe: Content
    scores: dict[str, dict[Key, Score]]
    """{base or tuned: what was measured}."""
    sections: tuple[str, ...] = ()
    """Modes of the model, and forgetting."""
    conditions: dict[str, str] = field(default_factory=dict)
    """How it was evaluated."""
    trained: Content = field(default_factory=dict)
    """What was trained: {recipe key: value}, then the planned share of each source and of all thinking rows."""
    reasoning: dict[str, float] = field(default_factory=dict)
    """Achieved share of all thinking rows by unit."""
    endless: tuple[str, ...] = ()
    """Modes in which some of its replies never end."""
    rows_per_step: int = 0
    """Rows that each optimizer step averaged over; 0 where the recipe does not say."""
    folder: Path = Path()
    """Where its files are."""


def read_runs(folders: Iterable[Path]) -> tuple[list[Run], dict[str, str]]:
    """(runs by name, {folder that cannot be compared: why})."""
    runs = []
    left_out = {}
    for folder in dict.fromkeys(Path(folder).resolve() for folder in folders):
        try:
            runs.append(read_run(folder))
        except ToolkitError as error:
            left_out[folder.name] = str(error)
    return sorted(runs, key=lambda run: run.name), left_out


def read_run(folder: Path) -> Run:
    """Read an evaluated run's folder. Raises ToolkitError saying what is missing and how to get it."""
    evaluate = f"`python -m toolkit evaluate {folder.name}`"
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise ToolkitError(f"incomplete: no {', '.join(missing)}; {evaluate} scores a finished run")
    try:
        return run_of(folder)
    except ToolkitError:  # which names its file
        raise
    except DAMAGED as error:
        why = f"{type(error).__name__}: {error}"
        raise ToolkitError(f"unreadable: {why}; {evaluate} writes eval.json again") from error


def run_of(folder: Path, result: Content | None = None) -> Run:
    """The run in a folder, with its evaluation or the given one. Raises one of DAMAGED where a file is not as it was
    written."""
    mix = read_json(folder / "mix.json")
    manifest = read_json(folder / "manifest.json")
    result = result or read_json(folder / "eval.json")
    recipe = read_values(folder / "recipe.yaml")
    train = recipe["train"]
    scores = {model: scores_of(result, model) for model in ("base", "tuned")}
    lengths = result.get("lengths", {})
    return Run(
        folder.name,
        recipe,
        scores,
        sections=tuple(result["tuned"]),
        conditions=conditions_of(result, manifest, scores),
        # a sum of runs is told from a training, and from other sums
        trained={**trained_on(recipe, mix), "weights": manifest.get("weights")},
        reasoning={unit: shares.get("thinking", 0.0) for unit, shares in mix["achieved_modes"].items()},
        endless=tuple(mode for mode in lengths if never_ends(lengths[mode]["endless"])),
        rows_per_step=train.get("per_device_train_batch_size", 0) * train.get("gradient_accumulation_steps", 1),
        folder=folder,
    )


def scores_of(result: Content, model: str) -> dict[Key, Score]:
    """What was measured of base or tuned."""
    scores = {}
    for section, metric in METRICS:
        score = result[model].get(section, {}).get(metric)
        kept = result["per_question"].get(section, {}).get(model, {}).get(metric)
        # null: no question counted, or a diverged model computed no number
        if score and score["value"] is not None:
            counted = np.array(kept, dtype=float) if kept else None
            scores[section, metric] = Score(**score, counted=counted)
    return scores


def conditions_of(result: Content, manifest: Content, scores: Mapping[str, Mapping[Key, Score]]) -> dict[str, str]:
    """How a run was evaluated, by the keys of CONDITIONS."""
    all_scores = [score for by_key in scores.values() for score in by_key.values()]
    questions = {score.counted.shape[1] for score in all_scores if score.counted is not None}
    kept = " and ".join(map(str, sorted(questions)))
    known = flat({**result, "model": manifest["model"], "per_question": kept})
    return {key: str(known.get(key)) for key in CONDITIONS}


def trained_on(recipe: Content, mix: Content) -> Content:
    """What tells a training from another: recipe keys that matter, then planned shares; all thinking rows come last."""
    trained = {key: value for key, value in flat(recipe).items() if not NOT_TRAINED.match(key)}
    shares = {name: round(share, 3) for name, share in mix["planned"].items()}
    # a source of which nothing was wanted is planned but has no entry
    thinking = [shares[name] for name, source in mix["sources"].items() if source["mode"] == "thinking"]
    # fsum: the same number whatever the order of the sources
    shares["reasoning"] = round(math.fsum(thinking), 3)
    return trained | {SHARE + name: share for name, share in shares.items()}


def evaluated_differently(run: Run, usual: Run) -> str:
    """How the conditions of a run's evaluation differ from those of another, in words."""
    differences = [
        words.format(run.conditions[key], usual.conditions[key])
        for key, words in CONDITIONS.items()
        if run.conditions[key] != usual.conditions[key]
    ]
    return f"evaluated differently: {'; '.join(differences)}"


def changed_keys(settings: Sequence[Content]) -> list[str]:
    """Keys whose values are not the same in all of several dicts."""
    changed = []
    for key in dict.fromkeys(key for row in settings for key in row):
        if len({str(row.get(key)) for row in settings}) > 1:
            changed.append(key)
    return changed
