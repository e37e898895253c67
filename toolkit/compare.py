"""Many runs → one table, one picture, one recommendation.

    comparison = compare(sorted(Path("outputs").glob("sweep-*"))); print(comparison.sentence)

Only the run folders are read (recipe.yaml, mix.json, eval.json, manifest.json, metrics.jsonl): no GPU, no account.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from toolkit.evaluate.stats import RESAMPLES, draws, ratios
from toolkit.files import ToolkitError
from toolkit.folders import GOAL, KL, METRICS, Point, Run, alike, group, read_runs, seed_error

GUARDS = (("thinking", "adherence"), ("non_thinking", "adherence"), ("non_thinking", "accuracy/chat"))
MARGIN = 0.05
"""Loss against the base, in points of a rate, that a recommended ratio may have in a guard."""
RULE = (
    f"Ratios that lose more than {MARGIN} against the base, beyond their 95% interval, in thinking adherence, non-thinking "
    "adherence or non-thinking chat accuracy are left out: no gain in mathematics pays for a broken mode. Of the rest, the "
    "highest thinking accuracy on the reasoning questions leads; ratios closer to it than the range that chance alone "
    "gives this many ratios (95%, bootstrap over questions, all pairs at once) tie with it, and of the tied ones that are shown "
    "to beat the base the lowest reasoning share is recommended: direct rows are shorter, and hold more of what the base could "
    "do. If nothing is left out and all tie, the differences are within noise; if none is shown to beat the base, none is recommended."
)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `report` shows it."""

    unit: str
    points: list[Point]
    base: dict[tuple[str, str], dict]
    sentence: str
    recommended: Point | None
    frontier: list[Point]
    notes: list[str]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(run, why)."""


def compare(runs: Sequence[Path]) -> Comparison:
    """Compare evaluated runs. Those that are incomplete or were evaluated otherwise than most are named and left out.

    Raises ToolkitError when no run is left."""
    read, left_out = read_runs(runs)
    read, otherwise = alike(read)
    left_out += otherwise
    if not read:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out) or "no folder was given"
        raise ToolkitError(f"no run to compare: {reasons}")
    unit = read[0].mix["unit"]
    points = group(read, unit)
    base = {key: found for key in METRICS if (found := read[0].found("base", *key))}
    recommended, sentence, notes = decide(points, unit)
    return Comparison(unit, points, base, sentence, recommended, frontier(points), notes, left_out)


def resampled(runs: list[Run], name: str, section: str, metric: str) -> np.ndarray:
    """RESAMPLES values of a metric's mean over runs, each as if other questions had been drawn; the draws are the same
    for all runs, so differences are paired. An eval.json without values per question gives unpaired normal draws."""
    seed, vectors = 3407, []
    for run in runs:
        kept = run.eval.get("per_question", {}).get(section, {}).get(name, {}).get(metric)
        found = run.found(name, section, metric)
        if kept:
            sums, counts = np.array(kept)
            drawn = ratios(sums, counts, draws(len(sums), seed))
            vectors.append(np.where(np.isnan(drawn), found["value"], drawn))  # all its replies were cut
        else:
            noise = np.random.default_rng([seed, *run.name.encode(), *name.encode(), *metric.encode()])
            vectors.append(noise.normal(found["value"], (found["high"] - found["low"]) / 3.92, RESAMPLES))
    scatter = seed_error([run.found(name, section, metric)["value"] for run in runs])
    noise = np.random.default_rng([seed, *"".join(run.name for run in runs).encode()])
    return np.mean(vectors, axis=0) + noise.normal(0, scatter, RESAMPLES)


def decide(points: list[Point], unit: str) -> tuple[Point | None, str, list[str]]:
    """(recommended, sentence, notes) by RULE."""
    notes = []
    if all(len(point.runs) == 1 for point in points):
        notes.append("One run per ratio: how much two trainings with other seeds would differ is not in the intervals.")
    if len(points) < 2:
        only = points[0]
        return None, f"Nothing to choose from: all runs are at {only.label} ({_state(only, unit)}).", notes
    broken = {point.label: why for point in points if (why := _broken(point))}
    notes += [f"{label} is left out of the choice: {why}." for label, why in broken.items()]
    whole = [point for point in points if point.label not in broken]
    if not whole:
        return (
            None,
            f"None of the {len(points)} {noun(points)} can be recommended: each breaks a mode or the chat.",
            notes,
        )
    values = np.array([point.values[GOAL]["value"] for point in whole])
    near = reach(whole)
    tied = [point for point, value in zip(whole, values, strict=True) if values.max() - value <= near]
    gap = f"differences up to {near:.2f} between {len(whole)} {noun(points)} are chance, 95%"
    if len(tied) == len(points):
        span = f"{values.min():.2f} to {values.max():.2f}"
        return None, f"The differences are within noise: thinking accuracy runs from {span}, and {gap}.", notes
    better = [point for point in tied if np.quantile(_change(point, *GOAL), 0.025) > 0]
    if not better:
        highest = max(tied, key=lambda point: point.values[GOAL]["value"])
        state = _state(highest, unit)
        return None, f"No {noun(points)[:-1]} is shown to beat the base: {highest.label}, the highest, {state}.", notes
    best = min(better, key=lambda point: (point.shares[unit], -point.values[GOAL]["value"]))
    others = [point.label for point in tied if point is not best]
    tie = (
        f"tied with {' and '.join(others)}; {gap}"
        if others
        else gap
        if len(whole) > 1
        else "the only one that keeps all"
    )
    return best, f"Recommended: {best.label}, {_state(best, unit)} ({tie}).", notes


def noun(points: list[Point]) -> str:
    """What the points are: ratios, or settings at one ratio."""
    return (
        "settings" if len({point.label for point in points}) > 1 and len({p.planned for p in points}) == 1 else "ratios"
    )


def _state(point: Point, unit: str) -> str:
    low, high = np.quantile(_change(point, *GOAL), [0.025, 0.975])
    found, gain = point.values[GOAL], point.values[GOAL]["value"] - _base_value(point, *GOAL)
    return (
        f"measured as {100 * point.shares[unit]:.1f}% of {unit.replace('_', ' ')}: thinking accuracy {found['value']:.2f} "
        f"[{found['low']:.2f}, {found['high']:.2f}], {gain:+.2f} [{low:+.2f}, {high:+.2f}] against the base"
    )


def _broken(point: Point) -> str:
    """Which guards a ratio breaks, in words; empty when it keeps all."""
    reasons = []
    for section, metric in GUARDS:
        if (section, metric) not in point.values:
            continue
        loss = point.values[section, metric]["value"] - _base_value(point, section, metric)
        low, high = np.quantile(_change(point, section, metric), [0.025, 0.975])
        if loss < -MARGIN and high < 0:
            reasons.append(
                f"{section.replace('_', '-')} {metric} {loss:+.2f} [{low:+.2f}, {high:+.2f}] against the base"
            )
    return ", ".join(reasons)


def _base_value(point: Point, section: str, metric: str) -> float:
    return float(np.mean([run.found("base", section, metric)["value"] for run in point.runs]))


def _change(point: Point, section: str, metric: str) -> np.ndarray:
    return resampled(point.runs, "tuned", section, metric) - resampled(point.runs, "base", section, metric)


def reach(points: list[Point]) -> float:
    """The range of thinking accuracy that equal ratios would show in 19 of 20 cases: the 95% quantile of the range of the
    centred resamples, which bounds all pairs at once (Tukey's range test, by bootstrap)."""
    vectors = np.stack([resampled(point.runs, "tuned", *GOAL) for point in points])
    centred = vectors - np.array([[point.values[GOAL]["value"]] for point in points])
    return float(np.quantile(np.ptp(centred, axis=0), 0.95))


def retention(point: Point) -> float:
    """How much of the base is left: chat accuracy without thinking, or where no chat was asked, minus the KL."""
    chat = point.values.get(("non_thinking", "accuracy/chat"))
    return chat["value"] if chat else -point.values[KL]["value"]


def frontier(points: list[Point]) -> list[Point]:
    """Points that no other beats in both thinking accuracy and retention (by their values; intervals overlap)."""
    places = [(point.values[GOAL]["value"], retention(point)) for point in points]
    return [
        point for point, (a, b) in zip(points, places, strict=True)
        if not any(x >= a and y >= b and (x, y) != (a, b) for x, y in places)
    ]  # fmt: skip
