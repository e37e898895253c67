"""Many runs, one decision: points with their intervals, what differs between them beyond chance, a recommendation.

comparison = compare(Path("outputs").glob("sweep_pocket-r*")); print(*comparison.verdict, sep="\\n")

The rule: points that lose more than 5 points against the base, beyond their 95% interval, in mode adherence or in chat
accuracy without thinking, or of which some replies never end, are left out of the choice. Of the rest, the highest accuracy leads; those closer to it than the
range that chance alone gives this many points (95%, bootstrap over questions, all pairs at once) tie with it. Of the tied
ones that are shown to beat the base, the lowest reasoning share is recommended, since direct rows are shorter and keep
more of the base; where something else than the reasoning share differs, the one with the lowest KL from the base.

An interval of several seeds holds their scatter beside that of the questions; an interval of one seed cannot.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from toolkit.comparison.runs import (
    METRICS,
    SHARE,
    Key,
    Run,
    Score,
    changed_keys,
    evaluated_differently,
    read_run,
    read_runs,
)
from toolkit.evaluation.stats import (
    RESAMPLES,
    Sample,
    is_rate,
    percentile_interval,
    resample_counts,
    resampled_ratios,
)
from toolkit.evaluation.words import WITH, amount, show, title
from toolkit.files import ToolkitError, flat

CHAT: Key = ("non_thinking", "accuracy/chat")
KL: Key = ("forgetting", "kl")
GOALS: tuple[Key, ...] = (
    ("thinking", "accuracy"),
    ("non_thinking", "accuracy"),
    CHAT,
    ("thinking", "accuracy/chat"),
)
"""By what runs are ranked: the first that most of them have. Reasoning questions come before chat questions, which runs
of the other kind of data are asked only."""
GUARDS: tuple[Key, ...] = (("thinking", "adherence"), ("non_thinking", "adherence"), CHAT)
MARGIN = 0.05
"""Loss against the base, as a share of replies, beyond which a point breaks a guard or fell below the base."""
SEED = 3407
"""Of the resamples: the same for every metric, so that all differences are paired."""
SEED_SPREAD = 0.69
"""Accuracy by which trainings differed that differed in nothing but seed or two steps more (31% and 100% of sums:
data_recipes/measured/seeds_pocket.json, which a test holds this number to)."""
SCALE = "scale"
"""The axis of a dial: points of one training."""
REMEDY = (
    "Runs of one base are comparable after `python -m toolkit evaluate NAME --level full` for each of them: a quick "
    "evaluation is sized by the run's steps, so quick runs of different length are not."
)
RECORDED = ("versions", "data", "gpu", "model", "commit")
"""Parts of manifest.json that say under what a run was made."""


@dataclass(frozen=True)
class Average(Score):
    """A number over the seeds of a point."""

    each: list[float] = field(default_factory=list)
    """One value per seed."""


@dataclass(frozen=True)
class Change:
    """A mean before and after, and the paired difference with its 95% interval."""

    before: float
    after: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Side:
    """Base or tuned of some runs, of which the mean is meant."""

    runs: Sequence[Run]
    model: str

    def scores(self, key: Key) -> list[Score]:
        """The number of each run; empty where one of them has none."""
        scores = [run.score(self.model, key) for run in self.runs]
        return [score for score in scores if score] if None not in scores else []

    def counted(self, key: Key) -> list[np.ndarray]:
        """(sums, counts) × questions of each run; empty where one of them has none."""
        tables = [run.counted[self.model].get(key) for run in self.runs]
        return [table for table in tables if table is not None] if all(t is not None for t in tables) else []


@dataclass(frozen=True)
class Point:
    """The base, or runs that differ only in their seed: one row of the table, one place in the picture."""

    label: str
    runs: list[Run]
    values: dict[Key, Average]
    changes: dict[Key, Change]
    """Tuned against base, where it can be paired (see `difference`)."""
    place: float = 0.0
    """Where it lies on the axis; 0 where the points are compared by name."""

    def lost(self, key: Key) -> bool:
        """Whether it is more than MARGIN below its base, beyond chance."""
        change = self.changes.get(key)
        return change is not None and change.value < -MARGIN and change.high < 0

    def cost(self, axis: str) -> float:
        """What decides between equals: the reasoning share where that differs, else the KL from the base."""
        if axis == "reasoning":
            return self.place
        return self.values[KL].value if KL in self.values else 0.0


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `report` shows it."""

    axis: str
    """What differs between the points: `reasoning` or a source's name (their shares), a recipe key, or `scale`; empty where
    it is more than one thing."""
    goal: Key
    base: Point
    points: list[Point]
    recommended: Point | None
    verdict: list[str]
    """Sentences, and the next command."""
    notes: list[str]
    left_out: dict[str, str]
    """Run → why."""

    def everyone(self) -> list[Point]:
        """The base, then the points."""
        return [self.base, *self.points]


# --- which runs can be compared, and as what -------------------------------------------------------------------------


def compare(folders: Iterable[Path]) -> Comparison:
    """Compare the largest group of runs that were evaluated alike; of equally large ones that with the most questions, or
    else with the first name. All others are left out and named.

    Raises ToolkitError when no run is left."""
    runs, left_out = read_runs(folders)
    return compare_runs(runs, left_out)


def compare_runs(runs: Sequence[Run], left_out: dict[str, str] | None = None) -> Comparison:
    """The same for runs that are in memory; `left_out` says why others are not."""
    left_out = dict(left_out or {})
    goal = usual_goal(runs)
    # only what was asked the same way can be ranked
    alike: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        if run.score("tuned", goal):
            alike[tuple(run.conditions.values())].append(run)
        else:
            left_out[run.name] = f"no {' '.join(goal)}: no question has an expected answer, or every reply was cut"
    if not alike:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "no folder was given"
        raise ToolkitError(f"no run to compare: {reasons}")
    largest = max(alike.values(), key=lambda group: (len(group), _questions(group[0], goal)))
    differently = {}
    for run in (run for group in alike.values() for run in group):
        if difference_in_words := evaluated_differently(run, largest[0]):
            differently[run.name] = difference_in_words
    return conclusion(largest, goal, left_out | differently, [REMEDY] if differently else [])


def usual_goal(runs: Sequence[Run]) -> Key:
    """By what runs are ranked: the first of GOALS that most of them have."""
    return max(GOALS, key=lambda goal: sum(run.score("tuned", goal) is not None for run in runs))


def _questions(run: Run, goal: Key) -> int:
    score = run.score("tuned", goal)
    return score.n if score else 0


def conclusion(runs: list[Run], goal: Key, left_out: dict[str, str], remarks: list[str]) -> Comparison:
    """Points, recommendation and verdict of runs that were evaluated alike."""
    axis, points, notes = group(runs)
    base = Point("base", [], averages(Side(runs[:1], "base")), {})
    recommended, verdict, reasons = decide(points, goal, axis)
    notes += [*rows_per_step_note(points), *reasons, *remarks]
    return Comparison(axis, goal, base, points, recommended, verdict, notes, left_out)


def group(runs: Sequence[Run]) -> tuple[str, list[Point], list[str]]:
    """(axis, points, notes): runs that differ only in their seed are one point.

    Where runs differ in shares alone, the axis is the last share that varies and points are named after it: the reasoning
    share, or the source listed last, as recipes name the rows to be learned first and general data last. Where one key
    alone differs, it is the axis. Otherwise points are compared by name."""
    differing = changed_keys([run.trained for run in runs])
    shares_alone = all(key.startswith(SHARE) for key in differing)
    axis, notes = "", []
    if differing and (shares_alone or len(differing) == 1):
        axis = differing[-1].removeprefix(SHARE)
    elif differing:
        notes = [f"Compared by name, since the runs differ in more than a share: {', '.join(differing)}."]
    seeds: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        seeds[str(sorted(run.trained.items()))].append(run)
    points = [point(members, axis) for members in seeds.values()]
    return axis, sorted(points, key=lambda point: (point.place, point.label)), notes


def point(runs: list[Run], axis: str) -> Point:
    """Runs that differ only in their seed, named after their place on the axis, or after the first of them."""
    setting = runs[0].trained.get(SHARE + axis, runs[0].trained.get(axis, 0.0))
    # what is no number (a scheduler's name) has no place, only a name
    place = float(setting) if isinstance(setting, int | float) else 0.0
    if not axis:
        label = runs[0].name + (f" (+{len(runs) - 1} more seeds)" if len(runs) > 1 else "")
    elif SHARE + axis in runs[0].trained:
        label = f"{100 * place:g}% {axis}"
    else:
        label = f"{axis.rpartition('.')[2]} {setting:g}" if isinstance(setting, float) else f"{axis} {setting}"
    values = averages(Side(runs, "tuned"))
    changes = {key: difference(key, Side(runs, "base"), Side(runs, "tuned")) for key in METRICS}
    return Point(label, runs, values, {key: change for key, change in changes.items() if change}, place)


def rows_per_step_note(points: Sequence[Point]) -> list[str]:
    """`Rows per step: 8 (100% reasoning), 56 (0% reasoning) …`, where they differ: a mean over few rows is noisier."""
    rows = {point.label: point.runs[0].rows_per_step for point in points}
    if len(set(rows.values())) < 2:
        return []
    listed = ", ".join(f"{count} ({label})" for label, count in rows.items())
    return [f"Rows per step differ, since all take equal steps of equal supervised tokens: {listed}."]


# --- means over seeds ------------------------------------------------------------------------------------------------


def averages(side: Side) -> dict[Key, Average]:
    """Every metric that all runs of a side have, averaged over them."""
    scores = {key: side.scores(key) for key in METRICS}
    return {key: average(key[1], by_seed) for key, by_seed in scores.items() if by_seed}


def average(metric: str, scores: Sequence[Score]) -> Average:
    """Mean over seeds. All seeds answer the same questions, so their intervals do not shrink by averaging; the scatter
    between the seeds is added."""
    each = [score.value for score in scores]
    value, scatter = float(np.mean(each)), 1.96 * seed_error(each)
    # two independent errors, question and seed: their squares add up
    below = math.hypot(np.mean([abs(score.value - score.low) for score in scores]), scatter)
    above = math.hypot(np.mean([abs(score.value - score.high) for score in scores]), scatter)
    low, high = value - below, value + above
    if is_rate(metric):
        low, high = max(0.0, low), min(1.0, high)
    return Average(value, low, high, min(score.n for score in scores), each)


def seed_error(each: Sequence[float]) -> float:
    """Standard error of a mean over seeds; 0 for one seed, whose scatter is unknown."""
    return float(np.std(each, ddof=1) / math.sqrt(len(each))) if len(each) > 1 else 0.0


# --- what is chance and what is not ----------------------------------------------------------------------------------


def counted_by_any(sides: Sequence[Side], key: Key) -> np.ndarray | None:
    """Which questions count for at least one run: those of the other kind count for nobody, and without them the draws
    are those of `evaluate`. None where a run was not measured or not kept question by question."""
    for side in sides:
        if not side.scores(key) or not side.counted(key):
            return None
    counts = np.stack([table[1] for side in sides for table in side.counted(key)])
    return np.asarray(counts.any(axis=0))


def resampled(run: Run, model: str, key: Key, which: np.ndarray) -> np.ndarray:
    """RESAMPLES values of a run's metric, each as if other questions had been drawn, of those in `which`."""
    sums, counts = np.compress(which, run.counted[model][key], axis=1)
    values = resampled_ratios(Sample(sums, counts), resample_counts(int(which.sum()), SEED))
    # NaN: every reply that was drawn is cut
    return np.where(np.isnan(values), run.scores[model][key].value, values)


def resampled_mean(side: Side, key: Key, which: np.ndarray) -> np.ndarray:
    """The same of the mean over a side's runs, with the scatter of the seeds added."""
    over_runs = np.mean([resampled(run, side.model, key, which) for run in side.runs], axis=0)
    # seeded by the runs' names, so that two points get noise of their own, the same every time
    noise = np.random.default_rng([SEED, *"".join(run.name for run in side.runs).encode()])
    return over_runs + noise.normal(0, seed_error([score.value for score in side.scores(key)]), RESAMPLES)


def difference(key: Key, before: Side, after: Side) -> Change | None:
    """The change of a metric's mean from one side to another, paired over questions; None where it cannot be resampled."""
    which = counted_by_any([after, before], key)
    if which is None:
        return None
    old = float(np.mean([score.value for score in before.scores(key)]))
    new = float(np.mean([score.value for score in after.scores(key)]))
    n = min(score.n for score in before.scores(key) + after.scores(key))
    changes = resampled_mean(after, key, which) - resampled_mean(before, key, which)
    low, high = percentile_interval(changes, new - old, n, -1.0 if is_rate(key[1]) else None)
    return Change(old, new, new - old, low, high)


def simultaneous_margin(points: Sequence[Point], goal: Key) -> float:
    """The range of the goal that equal points would show in 19 of 20 cases: the 95% quantile of the range of the centred
    resamples, which bounds all pairs at once (Tukey's range test, by bootstrap). It is not widened for few questions: two to
    five equal points of 8 to 60 questions go beyond it in 3 to 7 of 100 cases as it is (600 simulations each)."""
    sides = [Side(point.runs, "tuned") for point in points]
    which = counted_by_any(sides, goal)
    if which is None:
        return 1.0
    values = [point.values[goal] for point in points]
    centred = np.stack([resampled_mean(side, goal, which) - v.value for side, v in zip(sides, values, strict=True)])
    # where all questions agree, resamples show no spread: the interval's width stands in
    unanimous = [score.high - score.low for score in values if score.value in (0.0, 1.0)]
    return max([float(np.quantile(np.ptp(centred, axis=0), 0.95)), *unanimous])


# --- the recommendation ----------------------------------------------------------------------------------------------


def decide(points: list[Point], goal: Key, axis: str) -> tuple[Point | None, list[str], list[str]]:
    """(recommended, verdict, notes) by the rule at the head of this file."""
    ranked = sorted(points, key=lambda point: -point.values[goal].value)
    broken = {point.label: broken_guards(point, goal) for point in points}
    # if every point breaks something, the numbers are still shown
    eligible = [point for point in ranked if not broken[point.label]] or ranked
    margin, highest = simultaneous_margin(eligible, goal), eligible[0].values[goal].value
    tied = [point for point in eligible if highest - point.values[goal].value <= margin]
    better = [point for point in tied if goal in point.changes and point.changes[goal].low > 0]
    reason = why_none(points, broken, tied, better, axis)
    # at equal cost the highest
    best = None if reason else min(better, key=lambda point: point.cost(axis))
    top = best or eligible[0]
    verdict = [lead(top, goal, axis, reason, points), chance(top, tied, eligible, margin, axis)]
    notes = [f"{label} is left out of the choice: {'; '.join(texts)}." for label, texts in broken.items() if texts]
    fell = [f"{p.label} ({gain(goal, p.changes[goal])})" for p in points if p.lost(goal)]
    if fell:
        notes.append(verdict[1])
        verdict[1] = f"Below the base: {', '.join(fell)}."
    if not best and len(points) > 1 and axis != SCALE:
        verdict[1] += " Evaluate each run at level full, then compare again."
    return best, [*verdict, *one_seed(points, axis), next_command(top, best, axis)], notes


def noun(axis: str) -> str:
    """What a point of an axis is called."""
    if axis in ("", SCALE):
        return axis or "run"
    return "value" if "." in axis else "ratio"


def broken_guards(point: Point, goal: Key) -> list[str]:
    """What a point lost that no recommendation may cost, in words."""
    endless = sorted({mode for run in point.runs for mode in run.endless})
    lost = [change_text(point, key) for key in GUARDS if key != goal and point.lost(key)]
    return lost + [f"replies {WITH[mode]} never end" for mode in endless]


def why_none(
    points: list[Point], broken: dict[str, list[str]], tied: list[Point], better: list[Point], axis: str
) -> str:
    """Why nothing is recommended; empty where something is. Of equal scales the lowest KL is always the better one, while
    between trainings a difference in KL may be chance too."""
    if len(points) == 1 and axis != SCALE:
        return "there is one setting only"
    if all(broken.values()):
        return "each breaks a mode or the chat"
    if len(tied) == len(points) and axis != SCALE:
        return "the differences are within noise; more questions or seeds (sweep --seeds 3) show smaller ones"
    return "" if better else "none is shown to beat the base"


def lead(top: Point, goal: Key, axis: str, reason: str, points: Sequence[Point]) -> str:
    """The first sentence: what is recommended, or why nothing is; and what it does."""
    opening = "Recommended:" if not one_seed(points, axis) else "Best so far, with one seed each:"
    if reason:
        opening = f"No {noun(axis)} is recommended: {reason}. Highest is"
    return f"{opening} {top.label}: {change_text(top, goal)}."


def chance(top: Point, tied: Sequence[Point], eligible: Sequence[Point], margin: float, axis: str) -> str:
    """The second sentence: which differences are chance, and what it ties with."""
    if len(eligible) < 2:
        return f"There is no other {noun(axis)} to choose from."
    sentence = f"Up to {100 * margin:.0f} points between {len(eligible)} {noun(axis)}s are chance (95%)"
    others = ", ".join(point.label for point in tied if point is not top)
    return f"{sentence}: it ties with {others}." if others else f"{sentence}."


def one_seed(points: Sequence[Point], axis: str) -> list[str]:
    """What a comparison of trainings with one seed each cannot show; the scales of a dial are one training."""
    if axis == SCALE or len(points) < 2 or any(len(point.runs) > 1 for point in points):
        return []
    return [
        f"One seed: differences between runs this size came from the seed alone (up to {100 * SEED_SPREAD:.0f} points on the "
        "pocket model); `sweep --seeds 3` shows them."
    ]


def next_command(top: Point, best: Point | None, axis: str) -> str:
    """What to type next."""
    run = top.runs[0].name
    if axis == SCALE:
        return f"next: python -m toolkit export {run} --scale {top.place:g}"
    return f"next: python -m toolkit {f'export {run}' if best else f'evaluate {run} --level full'}"


def change_text(point: Point, key: Key) -> str:
    """`reasoning questions with thinking 23% → 70% (+47 points [+33, +60])`."""
    name, change = title(*key, point.runs[0].sections), point.changes.get(key)
    if not change:
        return f"{name} {amount(key[1], point.values[key].value)}"
    return f"{name} {amount(key[1], change.before)} → {amount(key[1], change.after)} ({gain(key, change)})"


def gain(key: Key, change: Change) -> str:
    """`+47 points [+33, +60]`."""
    return score_text(key, change, sign="+", unit=" points")


def score_text(key: Key, score: Score | Change | None, sign: str = "", unit: str = "%") -> str:
    """`70% [59, 81]`; a dash where it was not measured."""
    if score is None:
        return "-"
    return show(key[1], {"value": score.value, "low": score.low, "high": score.high, "n": 1}, sign=sign, unit=unit)


# --- two runs --------------------------------------------------------------------------------------------------------


def difference_report(first: Path, second: Path) -> list[str]:
    """What differed between two runs, and what it did to the scores, in words. Raises ToolkitError."""
    old, new = read_run(Path(first)), read_run(Path(second))
    old_facts, new_facts = facts(old), facts(new)
    changed = changed_keys([old_facts, new_facts])
    lines = [f"{key}: {old_facts.get(key, '-')} → {new_facts.get(key, '-')}" for key in changed]
    lines = [f"{old.name} → {new.name}", *(lines or ["no recipe key, version, data fingerprint or share differs"])]
    if how := evaluated_differently(new, old):
        return [*lines, f"not comparable: {new.name} was {how}", REMEDY]
    lines.append("scores (difference with its 95% interval, paired over questions):")
    for key in METRICS:
        change = difference(key, Side([old], "tuned"), Side([new], "tuned"))
        if change:
            certain = "certain" if change.low > 0 or change.high < 0 else "no difference shown"
            lines.append(f"{change_text(Point('', [new], {}, {key: change}), key)}: {certain}")
    return lines


def facts(run: Run) -> dict[str, object]:
    """All that is recorded of how a run was made, by dotted key."""
    recorded = {key: run.manifest.get(key) for key in RECORDED}
    return run.trained | flat({**run.recipe, "name": "", "manifest": recorded})
