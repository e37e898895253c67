"""Runs as points of a comparison: means over seeds, their intervals, and what differs from the base beyond chance.

from toolkit.comparison.runs import read_runs; axis, points, notes = points_of(read_runs(Path("outputs").glob("sweep_pocket-r*"))[0])

An interval of several seeds holds their scatter beside that of the questions; an interval of one seed cannot.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from toolkit.comparison.runs import METRICS, SHARE, Key, Run, Score, changed_keys
from toolkit.evaluation.stats import (
    RESAMPLES,
    Sample,
    is_rate,
    percentile_interval,
    resample_counts,
    resampled_ratios,
)

# Of the resamples: the same for every metric, so that all differences are paired.
SEED = 3407


@dataclass(frozen=True)
class Average:
    """A number over the seeds of a point, with its 95% interval."""

    value: float
    low: float
    high: float
    n: int
    each: list[float]
    """One value per seed."""


@dataclass(frozen=True)
class Change:
    """A mean of the base and of the tuned runs, and the paired difference with its 95% interval."""

    before: float
    after: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """The base, or runs that differ only in their seed: one row of the table, one place in the picture."""

    label: str
    runs: list[Run]
    values: dict[Key, Average]
    changes: dict[Key, Change] = field(default_factory=dict)
    """Tuned against base, where it can be paired (see `difference`)."""
    place: float = 0.0
    """Where it lies on the axis; its number where the points are compared by name."""
    short: str = ""
    """Its label in the picture."""


# --- which runs are one point ----------------------------------------------------------------------------------------


def points_of(runs: Sequence[Run]) -> tuple[str, list[Point], list[str]]:
    """(axis, points along it, notes): runs that differ only in their seed are one point.

    Where runs differ in shares alone, the axis is the last share that varies: the reasoning share, or the source listed
    last, as recipes name the rows to be learned first and general data last. Where one key alone differs, it is the axis.
    Otherwise it is empty, and points are compared by name."""
    differing = changed_keys([run.trained for run in runs])
    axis = ""
    notes = []
    if differing and (len(differing) == 1 or all(key.startswith(SHARE) for key in differing)):
        axis = differing[-1].removeprefix(SHARE)
    elif differing:
        notes = [f"Compared by name, since the runs differ in more than a share: {', '.join(differing)}."]
    settings: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        settings[str(sorted(run.trained.items()))].append(run)
    points = [point(members, axis, number) for number, members in enumerate(settings.values(), 1)]
    points.sort(key=lambda point: (point.place, point.label))
    return axis, points, notes + rows_per_step_note(points)


def point(runs: list[Run], axis: str, number: int = 0) -> Point:
    """Runs that differ only in their seed, named after their place on the axis, or after the first of them."""
    trained = runs[0].trained
    place = float(number)
    if not axis:
        short = str(number)
        label = runs[0].name
        if len(runs) > 1:
            label += f" (+{len(runs) - 1} more seeds)"
    elif SHARE + axis in trained:
        place = trained[SHARE + axis]
        short = f"{100 * place:g}%"
        label = f"{short} {axis}"
    else:
        setting = trained.get(axis)
        # what is no number (a scheduler's name) has no place, only a name
        if isinstance(setting, int | float):
            place = float(setting)
        short = f"{setting:g}" if isinstance(setting, float) else str(setting)
        label = f"{axis.rpartition('.')[2]} {short}"
    changes = {key: change for key in METRICS if (change := difference(runs, key))}
    return Point(label, runs, averages(runs, "tuned"), changes, place, short)


def rows_per_step_note(points: Sequence[Point]) -> list[str]:
    """`Rows per step: 8 to 56 …`, where they differ: a mean over few rows is noisier."""
    rows = [point.runs[0].rows_per_step for point in points]
    if min(rows) == max(rows):
        return []
    return [f"Rows per step: {min(rows)} to {max(rows)}, since all take equal steps of equal supervised tokens."]


# --- means over seeds ------------------------------------------------------------------------------------------------


def averages(runs: Sequence[Run], model: str) -> dict[Key, Average]:
    """Every metric of base or tuned that all runs have, averaged over them."""
    return {key: average(key[1], by_seed) for key in METRICS if (by_seed := scores(runs, model, key))}


def scores(runs: Sequence[Run], model: str, key: Key) -> list[Score]:
    """The number of each run; empty where one of them has none."""
    if not all(key in run.scores[model] for run in runs):
        return []
    return [run.scores[model][key] for run in runs]


def average(metric: str, by_seed: Sequence[Score]) -> Average:
    """Mean over seeds. All seeds answer the same questions, so their intervals do not shrink by averaging; the scatter
    between the seeds is added."""
    each = [score.value for score in by_seed]
    value = float(np.mean(each))
    scatter = 1.96 * seed_error(each)
    # two independent errors, question and seed: their squares add up
    below = [abs(score.value - score.low) for score in by_seed]
    above = [abs(score.value - score.high) for score in by_seed]
    low = value - math.hypot(np.mean(below), scatter)
    high = value + math.hypot(np.mean(above), scatter)
    if is_rate(metric):
        low = max(0.0, low)
        high = min(1.0, high)
    return Average(value, low, high, min(score.n for score in by_seed), each)


def seed_error(each: Sequence[float]) -> float:
    """Standard error of a mean over seeds; 0 for one seed, whose scatter is unknown."""
    if len(each) < 2:
        return 0.0
    return float(np.std(each, ddof=1) / math.sqrt(len(each)))


# --- what is chance and what is not ----------------------------------------------------------------------------------


def difference(runs: Sequence[Run], key: Key) -> Change | None:
    """Tuned against base in a metric's mean, paired over questions; None where it cannot be resampled."""
    which = counting_questions(runs, ("base", "tuned"), key)
    if which is None:
        return None
    before = average(key[1], scores(runs, "base", key))
    after = average(key[1], scores(runs, "tuned", key))
    gained = after.value - before.value
    # both sides draw the same questions
    changes = resampled_mean(runs, "tuned", key, which) - resampled_mean(runs, "base", key, which)
    # a difference of two rates is -1 or more
    lowest = -1.0 if is_rate(key[1]) else None
    ends: Any = percentile_interval(changes, gained, min(before.n, after.n), lowest)
    return Change(before.value, after.value, gained, ends["low"], ends["high"])


def simultaneous_margin(points: Sequence[Point], goal: Key) -> float:
    """The range of the goal that equal points would show in 19 of 20 cases: the 95% quantile of the range of the centred
    resamples, which bounds all pairs at once (Tukey's range test, by bootstrap). It is not widened for few questions: two to
    five equal points of 8 to 60 questions go beyond it in 3 to 7 of 100 cases as it is (600 simulations each)."""
    which = counting_questions([run for point in points for run in point.runs], ("tuned",), goal)
    if which is None:
        return 1.0
    centred, widths = [], [0.0]
    for point in points:
        score = point.values[goal]
        centred.append(resampled_mean(point.runs, "tuned", goal, which) - score.value)
        # where all questions agree, resamples show no spread: the interval's width stands in
        if score.value in (0.0, 1.0):
            widths.append(score.high - score.low)
    return max(float(np.quantile(np.ptp(centred, axis=0), 0.95)), *widths)


def counting_questions(runs: Sequence[Run], models: Sequence[str], key: Key) -> np.ndarray | None:
    """Which questions count for at least one run: those of the other kind count for nobody, and without them the draws
    are those of `evaluate`. None where a run was not measured or not kept question by question."""
    counts = []
    for run in runs:
        for model in models:
            score = run.scores[model].get(key)
            if score is None or score.counted is None:
                return None
            counts.append(score.counted[1])
    return np.asarray(np.any(counts, axis=0))


def resampled_mean(runs: Sequence[Run], model: str, key: Key, which: np.ndarray) -> np.ndarray:
    """RESAMPLES values of the mean over runs, each as if other questions had been drawn of those in `which`, with the
    scatter of the seeds added."""
    drawn = resample_counts(int(which.sum()), SEED)
    by_seed = scores(runs, model, key)
    each = []
    for score in by_seed:
        sums, counts = np.compress(which, np.asarray(score.counted), axis=1)
        values = resampled_ratios(Sample(sums, counts), drawn)
        # NaN: every reply that was drawn is cut
        each.append(np.where(np.isnan(values), score.value, values))
    # seeded by the runs' names, so that two points get noise of their own, the same every time
    names = "".join(run.name for run in runs)
    noise = np.random.default_rng([SEED, *names.encode()])
    scatter = noise.normal(0, seed_error([score.value for score in by_seed]), RESAMPLES)
    return np.asarray(np.mean(each, axis=0) + scatter)
