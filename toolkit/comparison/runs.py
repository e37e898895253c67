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
FILES = ("recipe.yaml", "mix.json", "manifest.json", "eval.json")
METRICS: tuple[Key, ...] = tuple((section, metric) for metric in TITLES for section in (*MODES, "forgetting"))
MODELS = ("base", "tuned")
CONDITIONS = {
    "level": "level {} instead of {}",
    "seed": "evaluation seed {} instead of {}",
    "fingerprints.questions": "other questions",
    "fingerprints.probes": "other probes",
    "per_question": "{} questions kept instead of {}",
    "budget.max_new_tokens": "a limit of {} tokens instead of {}",
    "budget.limits.thinking": "a limit of {} tokens with thinking instead of {}",
    "budget.limits.non_thinking": "a limit of {} tokens without thinking instead of {}",
    "budget.samples": "{} samples instead of {}",
    "model.name": "base model {} instead of {}",
    "model.revision": "revision {} of the base model instead of {}",
    "model.load_in_4bit": "load_in_4bit {} instead of {}",
}
"""What must be equal for two evaluations to be comparable, and how a difference is named; held-out rows may differ with
the mix."""
NOT_TRAINED = re.compile(
    r"(name|data\.seed|.*\.fraction|train\.(report_to|logging_steps|per_device_train_batch_size|gradient_accumulation_steps))$"
    r"|(evaluate|export)\b"
)
"""Recipe keys that do not tell runs apart: what does not change the training, the seed, and rows per step, which a sweep
sets for each ratio so that all take the same number of steps. Fractions are compared as planned shares."""
SHARE = "share of "
DAMAGED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What reading a file raises whose content is not what `evaluate` wrote."""


@dataclass(frozen=True)
class Score:
    """A number of an evaluation with its 95% interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Run:
    """One run, evaluated; or one scale of it."""

    name: str
    recipe: dict[str, Any]
    sections: tuple[str, ...] = ()
    """Modes of the model, and forgetting."""
    scores: dict[str, dict[Key, Score]] = field(default_factory=dict)
    """{base or tuned: what was measured}."""
    counted: dict[str, dict[Key, np.ndarray]] = field(default_factory=dict)
    """{base or tuned: (sums, counts) × questions of what can be paired}."""
    conditions: dict[str, str] = field(default_factory=dict)
    """How it was evaluated."""
    trained: dict[str, Any] = field(default_factory=dict)
    """What was trained: {recipe key: value}, then the planned share of each source and of all thinking rows."""
    reasoning: dict[str, float] = field(default_factory=dict)
    """Achieved share of all thinking rows by unit."""
    endless: tuple[str, ...] = ()
    """Modes in which some of its replies never end."""
    rows_per_step: int = 0
    """Rows that each optimizer step averaged over; 0 where the recipe does not say."""


def read_runs(folders: Iterable[Path]) -> tuple[list[Run], dict[str, str]]:
    """(runs by name, {folder that cannot be compared: why})."""
    runs: list[Run] = []
    left_out = {}
    for folder in dict.fromkeys(Path(folder).resolve() for folder in folders):
        try:
            runs.append(read_run(folder))
        except ToolkitError as error:
            left_out[folder.name] = str(error)
    runs.sort(key=lambda run: run.name)
    return runs, left_out


def read_run(folder: Path) -> Run:
    """Read an evaluated run's folder. Raises ToolkitError saying what is missing and how to get it."""
    evaluate = f"`python -m toolkit evaluate {folder.name}`"
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ToolkitError(f"incomplete: no {', '.join(missing)}; {evaluate} scores a finished run")
    mix, manifest, result = (read_json(folder / name) for name in FILES[1:])
    recipe = read_values(folder / "recipe.yaml")
    try:
        return run_of(folder.name, recipe, mix, manifest, result)
    except DAMAGED as error:
        why = f"{type(error).__name__}: {error}"
        raise ToolkitError(f"unreadable: {why}; {evaluate} writes eval.json again") from error


def run_of(
    name: str, recipe: dict[str, Any], mix: Mapping[str, Any], manifest: Mapping[str, Any], result: Mapping[str, Any]
) -> Run:
    """A Run from the content of its four files. Raises one of DAMAGED where they are not as they were written."""
    train = recipe["train"]
    counted = {model: counts_of(result["per_question"], model) for model in MODELS}
    return Run(
        name,
        recipe,
        sections=tuple(result["tuned"]),
        scores={model: scores_of(result[model]) for model in MODELS},
        counted=counted,
        conditions=conditions_of(result, manifest, counted),
        trained=trained_on(recipe, mix),
        reasoning={unit: float(shares.get("thinking", 0.0)) for unit, shares in mix["achieved_modes"].items()},
        endless=tuple(mode for mode, lengths in result.get("lengths", {}).items() if never_ends(lengths["endless"])),
        rows_per_step=int(train.get("per_device_train_batch_size", 0) * train.get("gradient_accumulation_steps", 1)),
    )


def scores_of(sections: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[Key, Score]:
    """What was measured of one model, as numbers."""
    scores = {}
    for section, metric in METRICS:
        score = sections.get(section, {}).get(metric)
        # null: no question counted, or a diverged model computed no number
        if score and score["value"] is not None:
            ends = float(score["low"]), float(score["high"])
            scores[section, metric] = Score(float(score["value"]), *ends, int(score["n"]))
    return scores


def counts_of(per_question: Mapping[str, Any], model: str) -> dict[Key, np.ndarray]:
    """(sums, counts) × questions of each metric that was kept question by question. Raises ValueError."""
    tables = {}
    for section, models in per_question.items():
        for metric, rows in models.get(model, {}).items():
            sums, counts = rows
            tables[section, metric] = np.array([sums, counts], dtype=float)
    return tables


def conditions_of(
    result: Mapping[str, Any], manifest: Mapping[str, Any], counted: Mapping[str, Mapping[Key, np.ndarray]]
) -> dict[str, str]:
    """How a run was evaluated, by the keys of CONDITIONS."""
    questions = {counts.shape[1] for tables in counted.values() for counts in tables.values()}
    kept = " and ".join(map(str, sorted(questions)))
    known = flat({**result, "model": manifest["model"], "per_question": kept})
    return {key: str(known.get(key)) for key in CONDITIONS}


def trained_on(recipe: Mapping[str, Any], mix: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a training from another: recipe keys that matter, then planned shares; all thinking rows come last."""
    trained = {key: value for key, value in flat(recipe).items() if not NOT_TRAINED.match(key)}
    shares = {name: round(share, 3) for name, share in mix["planned"].items()}
    # a source of which nothing was wanted is planned but has no entry
    thinking = [shares[name] for name, source in mix["sources"].items() if source["mode"] == "thinking"]
    # fsum: the same number whatever the order of the sources
    shares["reasoning"] = round(math.fsum(thinking), 3)
    for name, share in shares.items():
        trained[SHARE + name] = share
    return trained


def evaluated_differently(run: Run, usual: Run) -> str:
    """How the conditions of a run's evaluation differ from those of another, in words."""
    differences = []
    for key, words in CONDITIONS.items():
        value, expected = run.conditions[key], usual.conditions[key]
        if value != expected:
            differences.append(words.format(value, expected))
    return f"evaluated differently: {'; '.join(differences)}"


def changed_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values are not the same in all of several dicts."""
    keys = dict.fromkeys(key for row in settings for key in row)
    return [key for key in keys if len({str(row.get(key)) for row in settings}) > 1]
