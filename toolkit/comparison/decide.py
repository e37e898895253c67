"""Many runs, one decision: what to recommend of several points, or why nothing, in two sentences and a command.

comparison = compare(Path("outputs").glob("sweep_pocket-r*")); print(*comparison.verdict, sep="\\n")

The rule: points that lose more than 5 points against the base, beyond their 95% interval, in mode adherence or in chat
accuracy without thinking, or of which some replies never end, are left out of the choice. Of the rest, the highest
accuracy leads; those closer to it than the range that chance alone gives this many points (95%, bootstrap over questions,
all pairs at once) tie with it. Of the tied ones that are shown to beat the base, the one with the lowest KL from the base is
recommended: what the model forgot beyond what was asked is least there. Shares, values of a key and scales have one rule.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.comparison.points import Average, Change, Point, averages, points_of, simultaneous_margin
from toolkit.comparison.runs import Key, Run, evaluated_differently, read_runs
from toolkit.evaluation.words import WITH, amount, show, title
from toolkit.files import ToolkitError
from toolkit.records import Interval

CHAT: Key = ("non_thinking", "accuracy/chat")
KL: Key = ("forgetting", "kl")
# By what runs are ranked: the first that most of them have. Reasoning questions come before chat questions, which runs
# of the other kind of data are asked only.
GOALS: tuple[Key, ...] = (
    ("thinking", "accuracy"),
    ("non_thinking", "accuracy"),
    CHAT,
    ("thinking", "accuracy/chat"),
)
GUARDS: tuple[Key, ...] = (("thinking", "adherence"), ("non_thinking", "adherence"), CHAT)
# Loss against the base, as a share of replies, beyond which a point breaks a guard or fell below the base.
MARGIN = 0.05
# Accuracy by which trainings differed that differed in nothing but seed or two steps more (31% and 100% of sums:
# data_recipes/measured/seeds_pocket.json, which a test holds this number to).
SEED_SPREAD = 0.69
# The axis of a dial: points of one training.
SCALE = "scale"
# How the axis of sums of the same trainings begins; the source follows of which they have different shares.
SUMMED = "summed "
ONE_SEED = (
    f"One seed: differences between runs this size came from the seed alone (up to {100 * SEED_SPREAD:.0f} points on the "
    "pocket model); `sweep --seeds 3` shows them."
)
WITHIN_NOISE = (
    "the differences are within noise; more questions (`evaluate --level full` for each run) or seeds (`sweep --seeds 3`) "
    "show smaller ones"
)
REMEDY = (
    "Runs of one base are comparable after `python -m toolkit evaluate NAME --level full` for each of them: a quick "
    "evaluation is sized by the run's steps, so quick runs of different length are not."
)


@dataclass(frozen=True)
class Comparison:
    """What `compare` or a dial found; `report` shows it."""

    axis: str
    """What differs between the points: `reasoning` or a source's name (their shares), a recipe key, or `scale`; empty where
    it is more than one thing."""
    goal: Key
    base: Point
    points: list[Point]
    leading: Point
    """The recommended one, or else the highest."""
    recommended: Point | None
    verdict: list[str]
    """Sentences, and the next command."""
    notes: list[str]
    left_out: dict[str, str]
    """Run → why."""

    def everyone(self) -> list[Point]:
        """The base, then the points."""
        return [self.base, *self.points]


def compare(folders: Iterable[Path]) -> Comparison:
    """Compare the largest group of runs that were evaluated alike; of equally large ones that with the most questions, or
    else with the first name. All others are left out and named.

    Raises ToolkitError when no run is left."""
    runs, left_out = read_runs(folders)
    goal = usual_goal(runs)
    groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        if goal in run.scores["tuned"]:
            groups[tuple(run.conditions.values())].append(run)
        else:
            left_out[run.name] = f"no {' '.join(goal)}: no question has an expected answer, or every reply was cut"
    if not groups:
        reasons = [f"{name}: {why}" for name, why in left_out.items()]
        raise ToolkitError(f"no run to compare: {'; '.join(reasons) or 'no folder was given'}")

    # only what was asked the same way can be ranked
    alike = max(groups.values(), key=lambda group: (len(group), group[0].scores["tuned"][goal].n))
    axis, points, notes = points_of(alike)
    for others in groups.values():
        if others is not alike:
            left_out |= {run.name: evaluated_differently(run, alike[0]) for run in others}
    if len(groups) > 1:
        notes.append(REMEDY)
    return decide(points, goal, axis, notes, left_out)


def usual_goal(runs: Sequence[Run]) -> Key:
    """By what runs are ranked: the first of GOALS that most of them have."""
    return max(GOALS, key=lambda goal: sum(goal in run.scores["tuned"] for run in runs))


# --- the recommendation ----------------------------------------------------------------------------------------------


def decide(
    points: list[Point],
    goal: Key,
    axis: str,
    notes: list[str],
    left_out: dict[str, str],
) -> Comparison:
    """Recommend one of the points by the rule, or none; points that were asked no question are only shown."""
    asked = [point for point in points if goal in point.values]
    top, reason, chance = choose(asked, goal, axis)
    # the scales of a dial are one training, so that seeds tell nothing between them; sums of other trainings may differ
    one_seed = axis != SCALE and len(asked) > 1 and {len(point.runs) for point in asked} == {1}
    opening = "Best so far, with one seed each:" if one_seed else "Recommended:"
    if reason:
        opening = f"No {noun(axis)} is recommended: {reason}. Highest is"
    verdict = [f"{opening} {top.label}: {change_text(top, goal)}.", chance]
    if fell := [f"{point.label} ({gain(goal, point.changes[goal])})" for point in asked if lost(point, goal)]:
        verdict.append(f"Below the base: {', '.join(fell)}.")
    if one_seed:
        verdict.append(ONE_SEED)
    verdict.append(f"next: python -m toolkit {next_command(top, axis, reason)}")
    for point in asked:
        if broken := broken_guards(point, goal):
            notes.append(f"{point.label} is left out of the choice: {'; '.join(broken)}.")
    base = Point("scale 0 (base)" if axis == SCALE else "base", [], averages(top.runs[:1], "base"), short="base")
    return Comparison(axis, goal, base, points, top, None if reason else top, verdict, notes, left_out)


def choose(points: list[Point], goal: Key, axis: str) -> tuple[Point, str, str]:
    """(the leading point, why it is not recommended or nothing, which differences are chance)."""
    ranked = sorted(points, key=lambda point: -point.values[goal].value)
    # if every point breaks something, the numbers are still shown
    eligible = [point for point in ranked if not broken_guards(point, goal)]
    all_broken = not eligible
    eligible = eligible or ranked
    margin = simultaneous_margin(eligible, goal)
    highest = eligible[0].values[goal].value
    tied = [point for point in eligible if highest - point.values[goal].value <= margin]
    better = [point for point in tied if goal in point.changes and point.changes[goal].low > 0]
    reason = why_none(all_broken, points, tied, better, of_one_training(axis))
    top = eligible[0] if reason else min(better, key=cost)
    others = [point.label for point in tied if point is not top]
    return top, reason, chance_in_words(margin, len(eligible), noun(axis), others)


def why_none(all_broken: bool, points: list[Point], tied: list[Point], better: list[Point], one_training: bool) -> str:
    """Why none of the points is recommended; empty where one is."""
    # of equal scales (or sums) the lowest KL is always the better one; between trainings a difference in KL may be chance too
    if not one_training and len(points) == 1:
        return "there is one setting only"
    if all_broken:
        return "each breaks a mode or the chat"
    if not one_training and len(points) == len(tied):
        return WITHIN_NOISE
    if not better:
        return "none is shown to beat the base"
    return ""


def of_one_training(axis: str) -> bool:
    """Whether the points of an axis are made of the same trainings: the scales of a dial, sums of the same runs."""
    return axis == SCALE or axis.startswith(SUMMED)


def noun(axis: str) -> str:
    """What a point is called; an axis is a recipe key, or else a source of which the share differs."""
    if axis in ("", SCALE):
        return axis or "run"
    return "value" if "." in axis else "ratio"


def broken_guards(point: Point, goal: Key) -> list[str]:
    """What a point lost that no recommendation may cost, in words."""
    broken = [change_text(point, key) for key in GUARDS if key != goal and lost(point, key)]
    for mode in sorted({mode for run in point.runs for mode in run.endless}):
        broken.append(f"replies {WITH[mode]} never end")
    return broken


def lost(point: Point, key: Key) -> bool:
    """Whether a point is more than MARGIN below its base, beyond chance."""
    change = point.changes.get(key)
    return change is not None and change.value < -MARGIN and change.high < 0


def cost(point: Point) -> tuple[float, float]:
    """What decides between equals: the KL from the base, then the lower share, value or scale."""
    kl = point.values[KL].value if KL in point.values else 0.0
    return kl, point.place


# --- in words --------------------------------------------------------------------------------------------------------


def chance_in_words(margin: float, count: int, noun: str, others: list[str]) -> str:
    """Which differences are chance, and what the leading point ties with."""
    if count < 2:
        return f"There is no other {noun} to choose from."
    ties = f": it ties with {', '.join(others)}" if others else ""
    return f"Up to {100 * margin:.0f} points between {count} {noun}s are chance (95%){ties}."


def next_command(top: Point, axis: str, reason: str) -> str:
    """What to type next."""
    run = top.runs[0].name
    if axis == SCALE:
        return f"export {run} --scale {top.place:g}"
    return f"evaluate {run} --level full" if reason else f"export {run}"


def change_text(point: Point, key: Key) -> str:
    """`reasoning questions with thinking 23% → 70% (+47 points [+33, +60])`."""
    name = title(*key, point.runs[0].sections)
    metric = key[1]
    change = point.changes.get(key)
    if not change:  # the base was not measured, so that nothing can be paired
        return f"{name} {amount(metric, point.values[key].value)}"
    return f"{name} {amount(metric, change.before)} → {amount(metric, change.after)} ({gain(key, change)})"


def gain(key: Key, change: Change) -> str:
    """`+47 points [+33, +60]`."""
    return score_text(key, change, sign="+", unit=" points")


def score_text(key: Key, score: Average | Change | None, sign: str = "", unit: str = "%") -> str:
    """`70% [59, 81]`; a dash where it was not measured."""
    if score is None:
        return "-"
    return show(key[1], Interval(value=score.value, low=score.low, high=score.high, n=1), sign, unit)
