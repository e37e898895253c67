"""Evaluated runs, read back from their folders: one table, the differences between them, and a recommendation.

comparison = compare(Path("outputs").glob("sweep_pocket-r*")); print(*comparison.verdict, sep="\\n")

Only the run folders are read (recipe.yaml, mix.json, eval.json, manifest.json): no GPU, no account.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from toolkit.evaluation.stats import (
    RESAMPLES,
    Sample,
    is_rate,
    percentile_interval,
    resample_counts,
    resampled_ratios,
)
from toolkit.evaluation.words import TITLES, amount, show, title
from toolkit.family import MODES
from toolkit.files import ToolkitError, flat, read_json

Key = tuple[str, str]
"""(section, metric) of eval.json."""
CHAT, KL = ("non_thinking", "accuracy/chat"), ("forgetting", "kl")
GOALS = (("thinking", "accuracy"), ("non_thinking", "accuracy"), CHAT, ("thinking", "accuracy/chat"))
"""By what runs are ranked: the first that most of them have. Reasoning questions come before chat questions, which runs
of the other kind of data are asked only."""
GUARDS = (("thinking", "adherence"), ("non_thinking", "adherence"), CHAT)
METRICS = tuple((section, metric) for metric in TITLES for section in (*MODES, "forgetting"))
CONDITIONS = {
    "level": "level {} instead of {}",
    "seed": "evaluation seed {} instead of {}",
    "fingerprints.questions": "other questions",
    "fingerprints.probes": "other probes",
    "budget.max_new_tokens": "a limit of {} tokens instead of {}",
    "budget.samples": "{} samples instead of {}",
    "model.name": "base model {} instead of {}",
    "model.revision": "revision {} of the base model instead of {}",
    "model.load_in_4bit": "load_in_4bit {} instead of {}",
}
"""What must be equal for two evaluations to be comparable, and how a difference is said; held-out rows may differ with
the mix."""
REMEDY = (
    "Runs of one base are comparable after `python -m toolkit evaluate NAME --level full` for each of them: a quick "
    "evaluation is sized by the run's steps, so quick runs of different length are not."
)
MARGIN = 0.05
"""Loss against the base, as a share of replies, beyond which a point breaks a guard or fell below the base."""
NOT_TRAINED = re.compile(
    r"(name|data\.seed|.*\.fraction|train\.(report_to|logging_steps|per_device_train_batch_size|gradient_accumulation_steps))$"
    r"|(evaluate|export)\b"
)
"""Recipe keys that do not tell runs apart: what does not change the training, the seed, and rows per step, which a sweep
sets for each ratio so that all take the same number of steps. Fractions are compared as planned shares."""
RECORDED = ("versions", "data", "gpu", "model", "commit")
"""Parts of manifest.json that say under what a run was made."""
SHARE = "share of "
RULE = (
    f"Runs that lose more than {100 * MARGIN:.0f} points against the base, beyond their 95% interval, in mode adherence or in "
    "chat accuracy without thinking are left out of the choice. Of the rest, the highest accuracy leads; those closer to it "
    "than the range that chance alone gives this many runs (95%, bootstrap over questions, all pairs at once) tie with it. Of "
    "the tied ones that are shown to beat the base, the lowest reasoning share is recommended, since direct rows are shorter "
    "and keep more of the base; where the reasoning share is not what differs, the one with the lowest KL from the base. "
    "With one seed each, how much two trainings with other seeds would differ is not in the intervals."
)


@dataclass(frozen=True)
class Run:
    """One run folder, read."""

    name: str
    recipe: dict
    manifest: dict
    eval: dict
    conditions: dict[str, str]
    """How it was evaluated."""
    trained: dict[str, object]
    """What was trained: {recipe key: value}, then the planned share of each source and of all thinking rows."""
    reasoning: dict[str, float]
    """Achieved share of all thinking rows by unit."""

    def found(self, model: str, key: Key) -> dict | None:
        """{"value", "low", "high", "n"} of base or tuned; None where it was not measured."""
        found = self.eval[model].get(key[0], {}).get(key[1])
        return found if found and found["value"] is not None else None


@dataclass(frozen=True)
class Point:
    """The base, or runs that differ only in their seed: one row of the table, one place in the picture."""

    label: str
    runs: list[Run]
    values: dict[Key, dict]
    """{"value", "low", "high", "n", "each": one value per seed}."""
    changes: dict[Key, dict]
    """Tuned against base, where it can be paired (see `difference`)."""
    place: float = 0.0
    """Share of what differs between the points; 0 where that is more than a share."""

    def lost(self, key: Key) -> bool:
        """Whether it is more than MARGIN below its base, beyond chance."""
        found = self.changes.get(key)
        return bool(found and found["value"] < -MARGIN and found["high"] < 0)

    def cost(self, axis: str) -> float:
        """What decides between equals: the reasoning share where that differs, else the KL from the base."""
        return self.place if axis == "reasoning" else self.values.get(KL, {"value": 0.0})["value"]

    def row(self) -> dict:
        """Its runs, achieved reasoning shares and every metric with its interval."""
        row = {"label": self.label, "runs": " ".join(run.name for run in self.runs)}
        for unit, share in pd.DataFrame([run.reasoning for run in self.runs]).mean().items():
            row[f"reasoning_share_{unit}"] = share
        for key, found in self.values.items():
            name = "/".join(key)
            row |= {name: found["value"]} | {f"{name}.{end}": found[end] for end in ("low", "high", "n")}
        return row


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `report` shows it."""

    axis: str
    """Whose share differs between the points: `reasoning` or a source's name; empty where more than a share does."""
    goal: Key
    base: Point
    points: list[Point]
    recommended: Point | None
    verdict: list[str]
    """Two sentences and the next command."""
    notes: list[str]
    left_out: dict[str, str]
    """Run → why."""

    def everyone(self) -> list[Point]:
        return [self.base, *self.points]

    def table(self) -> pd.DataFrame:
        """A row for the base and each point, with every number."""
        table = pd.DataFrame([point.row() for point in self.everyone()])
        return table.assign(recommended=[int(point is self.recommended) for point in self.everyone()])


# --- reading and grouping runs ---------------------------------------------------------------------------------------


def compare(folders: Iterable[Path]) -> Comparison:
    """Compare the largest group of runs that were evaluated alike; of equally large ones that with the most questions, or
    else with the first name. All others are left out and named.

    Raises ToolkitError when no run is left."""
    # one run that cannot be read must not hide the others
    runs, left_out = [], {}
    for folder in dict.fromkeys(Path(f).resolve() for f in folders):
        try:
            runs.append(read_run(folder))
        except ToolkitError as error:
            left_out[folder.name] = str(error)
    goal = max(GOALS, key=lambda goal: sum(run.found("tuned", goal) is not None for run in runs))
    # only what was asked the same way can be ranked
    alike = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.name):
        if run.found("tuned", goal):
            alike[tuple(run.conditions.values())].append(run)
        else:
            left_out[run.name] = f"no {' '.join(goal)}: no question has an expected answer, or every reply was cut"
    if not alike:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "no folder was given"
        raise ToolkitError(f"no run to compare: {reasons}")
    runs = max(alike.values(), key=lambda same: (len(same), same[0].found("tuned", goal)["n"]))
    odd = {run.name: how for same in alike.values() for run in same if (how := otherwise(run, runs[0]))}
    axis, points, notes = group(runs)
    base = Point("base", [], {key: found for key in METRICS if (found := runs[0].found("base", key))}, {})
    recommended, verdict, reasons = decide(points, goal, axis)
    notes += [*reasons, *[REMEDY] * bool(odd)]
    return Comparison(axis, goal, base, points, recommended, verdict, notes, left_out | odd)


def otherwise(run: Run, usual: Run) -> str:
    """How a run was evaluated otherwise than another, in words; empty where it was not."""
    pairs = {key: (value, usual.conditions[key]) for key, value in run.conditions.items()}
    how = "; ".join(CONDITIONS[key].format(*pair) for key, pair in pairs.items() if pair[0] != pair[1])
    return how and f"evaluated differently: {how}"


def read_run(folder: Path) -> Run:
    """Read an evaluated run's folder. Raises ToolkitError saying what is missing and how to get it."""
    if missing := [n for n in ("recipe.yaml", "mix.json", "manifest.json", "eval.json") if not (folder / n).is_file()]:
        raise ToolkitError(
            f"incomplete: no {', '.join(missing)}; `python -m toolkit evaluate {folder.name}` scores a finished run"
        )
    mix, result, manifest = (read_json(folder / f"{name}.json") for name in ("mix", "eval", "manifest"))
    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        asked = flat({**result, "per_question": len(result["per_question"]), "model": manifest["model"]})
        settings = {key: value for key, value in flat(recipe).items() if not NOT_TRAINED.match(key)}
        shares = {name: round(share, 3) for name, share in mix["planned"].items()}
        # a source of which nothing was wanted is planned but has no entry
        thinking = [shares[name] for name, source in mix["sources"].items() if source["mode"] == "thinking"]
        # fsum: the same number whatever the order of the sources
        shares["reasoning"] = round(math.fsum(thinking), 3)
        return Run(
            folder.name,
            recipe,
            manifest,
            result,
            conditions={key: str(asked.get(key)) for key in CONDITIONS},
            trained=settings | {SHARE + name: share for name, share in shares.items()},
            reasoning={unit: shares.get("thinking", 0.0) for unit, shares in mix["achieved_modes"].items()},
        )
    except (AttributeError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ToolkitError(f"unreadable: {type(error).__name__}: {error}") from error


def group(runs: list[Run]) -> tuple[str, list[Point], list[str]]:
    """(axis, points, notes): runs that differ only in their seed are one point.

    Where runs differ in shares alone, the axis is the last share that varies and points are named after it: the reasoning
    share, or the source listed last, as recipes name the rows to be learned first and general data last. Otherwise they
    are compared by name."""
    # what does not differ between them cannot explain a difference in scores
    differing = changed([run.trained for run in runs])
    by_share = all(key.startswith(SHARE) for key in differing)
    axis = differing[-1].removeprefix(SHARE) if differing and by_share else ""
    groups = defaultdict(list)
    for run in runs:
        groups[str(sorted(run.trained.items()))].append(run)
    points = [point(members, axis) for members in groups.values()]
    note = f"Compared by name, since the runs differ in more than a share: {', '.join(differing)}."
    return axis, sorted(points, key=lambda point: (point.place, point.label)), [] if by_share else [note]


def point(runs: list[Run], axis: str) -> Point:
    """Runs that differ only in their seed, named after their share along the axis, or after the first of them."""
    place = runs[0].trained.get(SHARE + axis, 0.0)
    label = f"{100 * place:g}% {axis}" if axis else runs[0].name + f" (+{len(runs) - 1} more seeds)" * (len(runs) > 1)
    values = {key: average(key[1], [run.found("tuned", key) for run in runs]) for key in METRICS}
    changes = {key: difference(key, (runs, "base"), (runs, "tuned")) for key in METRICS}
    return Point(label, runs, *({key: found for key, found in of.items() if found} for of in (values, changes)), place)


def changed(rows: Sequence[dict]) -> list[str]:
    """Keys whose values are not the same in all of several dicts."""
    values = pd.DataFrame(rows, dtype=object).astype(str)
    return list(values.columns[values.nunique() > 1])


def average(metric: str, found: list[dict | None]) -> dict | None:
    """Mean over seeds. All seeds answer the same questions, so their intervals do not shrink by averaging; the scatter
    between the seeds is added."""
    if None in found:
        return None
    each = [f["value"] for f in found]
    value, scatter = float(np.mean(each)), 1.96 * seed_error(each)
    # two independent errors, question and seed: their squares add up
    low, high = (math.hypot(np.mean([abs(f["value"] - f[end]) for f in found]), scatter) for end in ("low", "high"))
    low, high = (max(0.0, value - low), min(1.0, value + high)) if is_rate(metric) else (value - low, value + high)
    return {"value": value, "low": low, "high": high, "n": min(f["n"] for f in found), "each": each}


def seed_error(each: list[float]) -> float:
    """Standard error of a mean over seeds; 0 for one seed, whose scatter is unknown."""
    return float(np.std(each, ddof=1) / math.sqrt(len(each))) if len(each) > 1 else 0.0


# --- what is chance and what is not ----------------------------------------------------------------------------------


def resampled(sides: Sequence[tuple[list[Run], str]], key: Key) -> list[np.ndarray] | None:
    """For each (runs, base or tuned) RESAMPLES values of a metric's mean over the runs, each as if other questions had been
    drawn; the draws are the same for all, so differences are paired. None where one was not measured or not kept for every
    question."""
    members = [(run, model) for runs, model in sides for run in runs]
    kept = [run.eval["per_question"].get(key[0], {}).get(model, {}).get(key[1]) for run, model in members]
    if None in kept or None in [run.found(model, key) for run, model in members]:
        return None
    table = np.array(kept, dtype=float)  # runs × (sums, counts) × questions
    # questions of the other kind count for nobody: without them the draws are those of `evaluate`
    table = np.compress(table[:, 1].any(axis=0), table, axis=2)
    seed, vectors = 3407, []
    drawn = (resampled_ratios(Sample(*counted), resample_counts(len(counted[0]), seed)) for counted in table)
    for runs, model in sides:
        each = [run.found(model, key)["value"] for run in runs]
        # NaN: every reply that was drawn is cut
        own = [np.where(np.isnan(d), value, d) for value, d in zip(each, islice(drawn, len(each)), strict=True)]
        # Seeds scatter as well. Seeded by the runs' names, so that two points get noise of their own, the same every time
        noise = np.random.default_rng([seed, *"".join(run.name for run in runs).encode()])
        vectors.append(np.mean(own, axis=0) + noise.normal(0, seed_error(each), RESAMPLES))
    return vectors


def difference(key: Key, before: tuple[list[Run], str], after: tuple[list[Run], str]) -> dict | None:
    """The change of a metric's mean from one (runs, base or tuned) to another, paired over questions: {"before", "after",
    "value", "low", "high"}; None where it cannot be resampled."""
    vectors = resampled([after, before], key)
    if not vectors:
        return None
    found = [[run.found(model, key) for run in runs] for runs, model in (before, after)]
    old, new = (float(np.mean([f["value"] for f in side])) for side in found)
    n, least = min(f["n"] for side in found for f in side), -1.0 if is_rate(key[1]) else None
    low, high = percentile_interval(np.subtract(*vectors), new - old, n, least)
    return {"before": old, "after": new, "value": new - old, "low": low, "high": high}


def simultaneous_margin(points: list[Point], goal: Key) -> float:
    """The range of the goal that equal points would show in 19 of 20 cases: the 95% quantile of the range of the centred
    resamples, which bounds all pairs at once (Tukey's range test, by bootstrap). It is not widened for few questions: two to
    five equal points of 8 to 60 questions go beyond it in 3 to 7 of 100 cases as it is (600 simulations each)."""
    found = [point.values[goal] for point in points]
    vectors = np.stack(resampled([(point.runs, "tuned") for point in points], goal))
    centred = vectors - np.array([[f["value"]] for f in found])
    agreed = [f["high"] - f["low"] for f in found if f["value"] in (0.0, 1.0)]  # of which resamples show no spread
    return max([float(np.quantile(np.ptp(centred, axis=0), 0.95)), *agreed])


# --- the recommendation ----------------------------------------------------------------------------------------------


def decide(points: list[Point], goal: Key, axis: str) -> tuple[Point | None, list[str], list[str]]:
    """(recommended, verdict, notes) by RULE."""
    ranked = sorted(points, key=lambda point: -point.values[goal]["value"])
    broken = {p.label: [change_text(p, key) for key in GUARDS if key != goal and p.lost(key)] for p in points}
    # if every point breaks something, the numbers are still shown
    whole = [point for point in ranked if not broken[point.label]] or ranked
    margin, highest = simultaneous_margin(whole, goal), whole[0].values[goal]["value"]
    tied = [point for point in whole if highest - point.values[goal]["value"] <= margin]
    better = [point for point in tied if goal in point.changes and point.changes[goal]["low"] > 0]
    why = _why_none(points, broken, tied, better)
    best = None if why else min(better, key=lambda point: point.cost(axis))  # at equal cost the highest
    top, noun = best or whole[0], "ratio" if axis else "run"
    lead = "Recommended:" if best else f"No {noun} is recommended: {why}. Highest is"
    command = f"export {top.runs[0].name}" if best else f"evaluate {top.runs[0].name} --level full"
    chance = f"There is no other {noun} to choose from"
    if len(whole) > 1:
        chance = f"Up to {100 * margin:.0f} points between {len(whole)} {noun}s are chance (95%)"
    if others := ", ".join(point.label for point in tied if point is not top):
        chance += f": it ties with {others}"
    fell = [f"{p.label} ({gain(goal, p.changes[goal])})" for p in points if p.lost(goal)]
    notes = [f"{label} is left out of the choice: {'; '.join(texts)}." for label, texts in broken.items() if texts]
    verdict = [f"{lead} {top.label}: {change_text(top, goal)}.", f"{chance}.", f"next: python -m toolkit {command}"]
    if fell:
        notes, verdict[1] = [*notes, verdict[1]], f"Below the base: {', '.join(fell)}."
    if not best and len(points) > 1:
        verdict[1] += " Evaluate each run at level full, then compare again."
    return best, verdict, notes


def _why_none(points: list[Point], broken: dict[str, list], tied: list[Point], better: list[Point]) -> str:
    """Why nothing is recommended; empty where something is."""
    if len(points) == 1:
        return "there is one setting only"
    if all(broken.values()):
        return "each breaks a mode or the chat"
    if len(tied) == len(points):
        return "the differences are within noise; more questions or seeds (sweep --seeds 3) show smaller ones"
    return "" if better else "none is shown to beat the base"


def change_text(point: Point, key: Key) -> str:
    """`reasoning questions with thinking 23% → 70% (+47 points [+33, +60])`."""
    name, found = title(*key, point.runs[0].eval["tuned"]), point.changes.get(key)
    if not found:
        return f"{name} {amount(key[1], point.values[key]['value'])}"
    before, after = (amount(key[1], found[side]) for side in ("before", "after"))
    return f"{name} {before} → {after} ({gain(key, found)})"


def gain(key: Key, found: dict) -> str:
    """`+47 points [+33, +60]`."""
    return show(key[1], found, sign="+", unit=" points")


# --- two runs --------------------------------------------------------------------------------------------------------


def difference_report(first: Path, second: Path) -> list[str]:
    """What differed between two runs, and what it did to the scores, in words. Raises ToolkitError."""
    a, b = runs = [read_run(Path(folder)) for folder in (first, second)]
    old, new = facts = [
        run.trained | flat({**run.recipe, "name": "", "manifest": {key: run.manifest.get(key) for key in RECORDED}})
        for run in runs
    ]
    lines = [f"{key}: {old.get(key, '-')} → {new.get(key, '-')}" for key in changed(facts)]
    lines = [f"{a.name} → {b.name}", *(lines or ["no recipe key, version, data fingerprint or share differs"])]
    if how := otherwise(b, a):
        return [*lines, f"not comparable: {b.name} was {how}", REMEDY]
    lines.append("scores (difference with its 95% interval, paired over questions):")
    for key in METRICS:
        if found := difference(key, ([a], "tuned"), ([b], "tuned")):
            sure = "certain" if found["low"] > 0 or found["high"] < 0 else "no difference shown"
            lines.append(f"{change_text(Point('', [b], {}, {key: found}), key)}: {sure}")
    return lines
