"""Which ratio, from two trainings: at 10% and at 90% of a source, and for each ratio between them their weighted sum.

from toolkit.comparison.probe import probe; probe("sweep_pocket", seeds=3)

A run at 50% is predicted by half of what each of the two runs changed. The base is loaded once a seed, and the sums are
switched in memory: every ratio gets fast evidence, those of a usual sweep get replies. Where runs that were trained at
these ratios are at hand, the sums are compared with them. The recommended sum is then measured at the scales of a dial:
ratio and scale together are two weights.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from toolkit.comparison.blend import weighted, write_sum
from toolkit.comparison.decide import SUMMED, Comparison
from toolkit.comparison.dial import SCALES, Evidence, Plan, choose_scale, compare_scales, measure
from toolkit.comparison.report import conclude
from toolkit.comparison.runs import SHARE, Key, Run, read_runs
from toolkit.comparison.sweep import sweep
from toolkit.recipe import of_run

LOW, HIGH = 0.1, 0.9
"""Shares of the two runs that are trained: at 0 and 1 one of the sources would never be seen."""
WITH_REPLIES = (0.25, 0.5, 0.75, HIGH)
"""Shares that get replies: those of a usual sweep, whose runs may be at hand, and the last."""
SHARES = sorted({LOW, 0.2, 0.4, 0.6, 0.8, *WITH_REPLIES})


def probe(path: str | Path, overrides: Sequence[str] = (), *, of: str = "reasoning", **options: Any) -> Path:
    """Train two shares of `of`, score their sums for every ratio between, recommend one; returns the sweep's folder, where
    the comparison is in `probe`.

    `options` are those of `sweep`. Raises ToolkitError when a run failed."""
    return sweep(path, overrides, shares=(LOW, HIGH), of=of, ending=partial(predict, of=of), **options)


def predict(runs: Sequence[Path], folder: Path, console: Console, *, of: str) -> None:
    """Score the sums of each seed's two runs and print which to take."""
    # both runs of a seed stand beside each other in the plan, the lower share first
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    axis = SUMMED + of
    # of one recipe, so that all pairs have them
    ranks = [of_run(run).lora.r for run in pairs[0]]
    # both in one adapter, of which `weighted` takes what a ratio is made of
    sums = [write_sum(pair, [1, 1], folder / "probe", f"sums-{pair[0].name}") for pair in pairs]
    members = []
    for both in sums:
        run = Evidence(both, console, "probe.json", lambda model, share: weighted(model, weights_of(share), ranks))
        members.append(measure(run, Plan(SHARES, WITH_REPLIES), SHARE + axis))
    found = compare_scales(members, SHARES, axis)
    found.notes.append(error_note(found.goal, runs[::2], members))
    # the next command comes below, when the scale is known
    found.verdict.pop()
    conclude(found, console, folder / "probe")
    weights = weights_of(found.leading.place)
    dialled = scales_of(sums, weights, ranks, console)
    both_weights = " ".join(f"{dialled.leading.place * weight:.6g}" for weight in weights)
    low, high = pairs[0]
    dialled.verdict[-1] = f"next: python -m toolkit blend {low.name} {high.name} --weights {both_weights}"
    conclude(dialled, console, folder / "probe" / "scale")


def scales_of(sums: Sequence[Path], weights: Sequence[float], ranks: Sequence[int], console: Console) -> Comparison:
    """Each seed's two runs, added with these weights, at the scales of a dial."""
    # another ratio that is recommended later is measured beside this one
    record = f"scales-{weights[1]:.6g}.json"
    runs = [
        Evidence(both, console, record, lambda model, scale: weighted(model, [scale * w for w in weights], ranks))
        for both in sums
    ]
    return choose_scale(runs, SCALES, 0)


def weights_of(share: float) -> list[float]:
    """How much of the low and of the high run is a mixture with that share."""
    high = (share - LOW) / (HIGH - LOW)
    return [1 - high, high]


def error_note(goal: Key, lows: Sequence[Path], members: Sequence[Mapping[float, Run]]) -> str:
    """How far the sums are from runs that a sweep by this recipe trained at their ratio, with their seed, and asked alike."""
    errors = []
    for low, member in zip(lows, members, strict=True):
        for share in WITH_REPLIES[:-1]:
            trained, _ = read_runs([low.with_name(low.name.replace(f"{LOW:g}-s", f"{share:g}-s"))])
            summed = member[share]
            if trained and trained[0].conditions == summed.conditions:
                real = trained[0].scores["tuned"][goal].value
                errors.append(100 * abs(real - summed.scores["tuned"][goal].value))
    if not errors:
        return "How wrong the sums are is not known here: no run that was trained between these shares is at hand."
    return (
        f"Error against {len(errors)} trainings at these ratios: {fmean(errors):.0f} points, at most {max(errors):.0f}."
    )
