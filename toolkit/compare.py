"""Evaluated runs, read back from their folders: one table, the differences between them, and a recommendation.

comparison = compare(Path("outputs").glob("sweep_pocket-r*")); print(*comparison.verdict, sep="\\n")

Only the run folders are read (recipe.yaml, mix.json, eval.json, manifest.json): no GPU, no account.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from toolkit.evaluate import is_rate
from toolkit.evaluate.stats import RESAMPLES, draws, ratios, unanimous
from toolkit.family import MODES, mode_title
from toolkit.files import ToolkitError, flat, read_json

Key = tuple[str, str]
"""(section, metric) of eval.json."""
UNITS = ("examples", "tokens", "supervised_tokens")
CHAT, KL = ("non_thinking", "accuracy/chat"), ("forgetting", "kl")
GOALS = (("thinking", "accuracy"), ("non_thinking", "accuracy"), CHAT, ("thinking", "accuracy/chat"))
"""By what runs are ranked: the first that most of them have. Reasoning questions come before chat questions, which runs
of the other kind of data are asked only."""
GUARDS = (("thinking", "adherence"), ("non_thinking", "adherence"), CHAT)
TITLES = {
    "accuracy": "accuracy", "accuracy/chat": "chat accuracy", "adherence": "adherence",
    "reasoning_tokens": "reasoning tokens", "answer_tokens": "answer tokens", "cut": "cut by the token limit",
    "kl": "KL from the base", "nll": "loss on the base's answers",
}  # fmt: skip
METRICS = tuple((section, metric) for metric in TITLES for section in (*MODES, "forgetting"))
CONDITIONS = (
    "level", "seed", "unit", "fingerprints.questions", "fingerprints.probes", "budget.max_new_tokens", "budget.samples",
    "model.name", "model.revision", "model.load_in_4bit",
)  # fmt: skip
MARGIN = 0.05
"""Loss against the base, as a share of replies, beyond which a point breaks a guard or fell below the base."""
NOT_TRAINING = ("name", "evaluate", "export", "train.report_to", "train.logging_steps")
"""Parts of a recipe that do not change what is trained."""
PER_RATIO = ("data.seed", "train.per_device_train_batch_size", "train.gradient_accumulation_steps")
"""What a sweep sets for each ratio, so that all train on the same supervised tokens in the same number of steps."""
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
    mix: dict
    eval: dict
    manifest: dict

    def found(self, model: str, key: Key) -> dict | None:
        """{"value", "low", "high", "n"} of base or tuned; None where it was not measured."""
        found = self.eval[model].get(key[0], {}).get(key[1])
        return found if found and found["value"] is not None else None

    def settings(self) -> dict:
        """{dotted key: value} of what is trained."""
        keys = flat(self.recipe).items()
        return {key: value for key, value in keys if not f"{key}.".startswith(tuple(f"{s}." for s in NOT_TRAINING))}

    def planned(self) -> dict[str, float]:
        """Planned share of each source, and of all thinking rows as `reasoning`."""
        shares = {name: round(share, 3) for name, share in self.mix["planned"].items()}
        thinking = [share for name, share in shares.items() if self.mix["sources"][name]["mode"] == "thinking"]
        return {**shares, "reasoning": round(math.fsum(thinking), 3)}

    def achieved(self, name: str, unit: str) -> float:
        """Achieved share of a source or of `reasoning`."""
        shares = self.mix["achieved_modes" if name == "reasoning" else "achieved"][unit]
        return shares.get("thinking" if name == "reasoning" else name, 0.0)


@dataclass(frozen=True)
class Point:
    """The base, or runs that differ only in their seed: one row of the table, one place in the picture."""

    label: str
    runs: list[Run]
    values: dict[Key, dict]
    """{"value", "low", "high", "n", "each": one value per seed}."""
    place: float | None = None
    """Achieved share, in the mix's unit, of what differs between the points; None where more than a share differs."""

    def kl(self) -> float:
        """KL from the base: 0 for the base, and where it was not measured."""
        return self.values.get(KL, {"value": 0.0})["value"]

    def row(self) -> dict:
        """Its runs, achieved reasoning shares and every metric with its interval."""
        shares = {u: float(np.mean([run.achieved("reasoning", u) for run in self.runs])) for u in UNITS if self.runs}
        row = {"label": self.label, "runs": " ".join(run.name for run in self.runs)}
        row |= {f"reasoning_share_{unit}": share for unit, share in shares.items()}
        for key, found in self.values.items():
            row |= {f"{'/'.join(key)}.{end}": found[end] for end in ("value", "low", "high", "n")}
        return row


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `report` shows it."""

    unit: str
    axis: str
    """What the points' `place` is a share of: `reasoning` or a source's name; empty where runs are compared by name."""
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
        table.insert(2, "recommended", [int(point is self.recommended) for point in self.everyone()])
        table.insert(3, "frontier", [int(point.label in self.frontier()) for point in self.everyone()])
        return table.rename(columns=lambda name: name.removesuffix(".value"))

    def place_of(self, point: Point) -> tuple[float, float]:
        """(goal, what is left of the base): chat accuracy without thinking, or where that is the goal or was not asked
        minus the KL, which is 0 for the base itself."""
        kept = point.values[CHAT]["value"] if CHAT in point.values and self.goal != CHAT else -point.kl()
        return point.values[self.goal]["value"], kept

    def frontier(self) -> list[str]:
        """Labels, the base's among them, that no other beats in both (values; intervals overlap)."""
        places = {point.label: self.place_of(point) for point in self.everyone() if self.goal in point.values}
        return [
            label for label, (a, b) in places.items()
            if not any(x >= a and y >= b and (x, y) != (a, b) for x, y in places.values())
        ]  # fmt: skip


# --- reading and grouping runs ---------------------------------------------------------------------------------------


def compare(folders: Iterable[Path]) -> Comparison:
    """Compare evaluated runs. Those that are incomplete or were evaluated otherwise than most are left out and named.

    Raises ToolkitError when no run is left."""
    runs, left_out = [], {}
    for folder in dict.fromkeys(Path(f).resolve() for f in folders):
        try:
            runs.append(read_run(folder))
        except ToolkitError as error:
            left_out[folder.name] = str(error)
    usual = json.loads(Counter(json.dumps(conditions(run)) for run in runs).most_common(1)[0][0]) if runs else {}
    goal = max(GOALS, key=lambda goal: sum(run.found("tuned", goal) is not None for run in runs))
    for run in runs:
        why = [
            f"{key} {value} (the others: {usual[key]})" for key, value in conditions(run).items() if value != usual[key]
        ]
        if why:
            left_out[run.name] = f"evaluated differently: {'; '.join(why)}"
        elif not run.found("tuned", goal):
            left_out[run.name] = f"no {' '.join(goal)}: no question has an expected answer, or every reply was cut"
    runs = [run for run in runs if run.name not in left_out]
    if not runs:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "no folder was given"
        raise ToolkitError(f"no run to compare: {reasons}")
    unit = runs[0].mix["unit"]
    axis, differing = what_differs(runs)
    points = group(runs, axis, differing, unit)
    base = Point("base", [], {key: found for key in METRICS if (found := runs[0].found("base", key))})
    recommended, verdict, notes = decide(points, goal, axis)
    if not axis and len(points) > 1:
        notes.insert(0, f"Compared by name, since the runs differ in more than a share: {', '.join(differing)}.")
    return Comparison(unit, axis, goal, base, points, recommended, verdict, notes, left_out)


def read_run(folder: Path) -> Run:
    """Read an evaluated run's folder. Raises ToolkitError saying what is missing and how to get it."""
    missing = [n for n in ("recipe.yaml", "mix.json", "manifest.json", "eval.json") if not (folder / n).is_file()]
    if missing == ["eval.json"]:
        raise ToolkitError(f"not evaluated: run `python -m toolkit evaluate {folder.name}`")
    if missing:
        raise ToolkitError(f"incomplete: no {', '.join(missing)}")
    mix, result, manifest = (read_json(folder / f"{name}.json") for name in ("mix", "eval", "manifest"))
    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        run = Run(folder.name, recipe, mix, result, manifest)
        asked = [run.found("tuned", goal) for goal in GOALS if run.eval["per_question"]]
        _ = (
            run.planned(),
            [run.achieved("reasoning", unit) for unit in UNITS],
            conditions(run),
        )  # whether they are there
    except (AttributeError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ToolkitError(f"unreadable: {type(error).__name__}: {error}") from error
    if not any(asked):
        raise ToolkitError(
            "eval.json has no accuracy: either no question has an expected answer (evaluate.questions), or every "
            "reply was cut by evaluate.max_new_tokens"
        )
    return run


def conditions(run: Run) -> dict:
    """What must be equal for two evaluations to be comparable; held-out rows may differ with the mix."""
    found = flat({**run.eval, "per_question": None, "unit": run.mix["unit"], "model": run.manifest["model"]})
    return {key: found.get(key) for key in CONDITIONS}


def what_differs(runs: list[Run]) -> tuple[str, list[str]]:
    """(axis, keys): the axis is `reasoning` or a source's name where runs differ in shares alone, else empty."""
    keys = changed([run.settings() for run in runs])
    differing = [key for key in keys if key not in PER_RATIO and not key.endswith(".fraction")]
    varying = changed([run.planned() for run in runs])
    if differing or not varying:
        return "", differing + [f"share of {name}" for name in varying if name != "reasoning"]
    # where no thinking share varies, the source listed last: recipes name the rows to be learned first, general data last
    return varying[-1], []


def changed(rows: Sequence[dict]) -> list[str]:
    """Keys whose values are not the same in all of several dicts."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [key for key in keys if len({json.dumps(row.get(key), default=str) for row in rows}) > 1]


def group(runs: list[Run], axis: str, differing: list[str], unit: str) -> list[Point]:
    """Points of runs that differ only in their seed: by share along the axis, or by name."""

    def kind(run: Run) -> str:
        settings = run.settings()
        return json.dumps([run.planned(), *(settings.get(key) for key in differing)], default=str)

    points = []
    for _, members in groupby(sorted(runs, key=lambda run: (kind(run), run.name)), kind):
        members = list(members)
        seeds = f" (+{len(members) - 1} more seeds)" if len(members) > 1 else ""
        label, place = members[0].name + seeds, None
        if axis:
            label = f"{100 * members[0].planned()[axis]:g}% {axis}"
            place = float(np.mean([run.achieved(axis, unit) for run in members]))
        values = {key: average(key[1], [run.found("tuned", key) for run in members]) for key in METRICS}
        points.append(Point(label, members, {k: v for k, v in values.items() if v}, place))
    return sorted(points, key=lambda point: (point.place or 0.0, point.label))


def average(metric: str, found: list[dict | None]) -> dict | None:
    """Mean over seeds. All seeds answer the same questions, so their intervals do not shrink by averaging; the scatter
    between the seeds is added."""
    if None in found:
        return None
    each = [f["value"] for f in found]
    value, scatter = float(np.mean(each)), 1.96 * seed_error(each)
    low, high = (math.hypot(np.mean([abs(f["value"] - f[end]) for f in found]), scatter) for end in ("low", "high"))
    low, high = (max(0.0, value - low), min(1.0, value + high)) if is_rate(metric) else (value - low, value + high)
    return {"value": value, "low": low, "high": high, "n": min(f["n"] for f in found), "each": each}


def seed_error(each: list[float]) -> float:
    """Standard error of a mean over seeds; 0 for one seed, whose scatter is unknown."""
    return float(np.std(each, ddof=1) / math.sqrt(len(each))) if len(each) > 1 else 0.0


# --- what is chance and what is not ----------------------------------------------------------------------------------


def resampled(runs: list[Run], model: str, key: Key) -> np.ndarray:
    """RESAMPLES values of a metric's mean over runs, each as if other questions had been drawn; the draws are the same
    for all runs, so differences are paired."""
    seed, vectors, each = 3407, [], [run.found(model, key)["value"] for run in runs]
    for run, value in zip(runs, each, strict=True):
        sums, counts = np.array(run.eval["per_question"][key[0]][model][key[1]], dtype=float)
        drawn = ratios(sums, counts, draws(len(sums), seed))
        vectors.append(np.where(np.isnan(drawn), value, drawn))  # NaN: every reply that was drawn is cut
    noise = np.random.default_rng([seed, *"".join(run.name for run in runs).encode()])
    return np.mean(vectors, axis=0) + noise.normal(0, seed_error(each), RESAMPLES)


def difference(key: Key, before: tuple[list[Run], str], after: tuple[list[Run], str]) -> dict | None:
    """The change of a metric's mean from one (runs, base or tuned) to another: {"before", "value", "low", "high"}, paired
    over questions; None where it was not measured or not kept for every question."""
    found = [[run.found(model, key) for run in runs] for runs, model in (before, after)]
    kept = [run.eval["per_question"].get(key[0], {}).get(m, {}).get(key[1]) for rs, m in (before, after) for run in rs]
    if None in [*found[0], *found[1], *kept]:
        return None
    old, new = (float(np.mean([f["value"] for f in side])) for side in found)
    low, high = np.quantile(resampled(*after, key) - resampled(*before, key), [0.025, 0.975])
    if (
        is_rate(key[1]) and new != old and math.isclose(low, high)
    ):  # all questions agree: no spread to resample, a bound
        bound = unanimous(min(f["n"] for f in found[1]))
        low, high = max(-1.0, low - bound), min(1.0, high + bound)
    return {"before": old, "value": new - old, "low": float(low), "high": float(high)}


def change(point: Point, key: Key) -> dict | None:
    """Tuned against base."""
    return difference(key, (point.runs, "base"), (point.runs, "tuned"))


def simultaneous_margin(points: list[Point], goal: Key) -> float:
    """The range of the goal that equal points would show in 19 of 20 cases: the 95% quantile of the range of the centred
    resamples, which bounds all pairs at once (Tukey's range test, by bootstrap)."""
    found = [point.values[goal] for point in points]
    vectors = np.stack([resampled(point.runs, "tuned", goal) for point in points])
    centred = vectors - np.array([[f["value"]] for f in found])
    agreed = [f["high"] - f["low"] for f in found if f["value"] in (0.0, 1.0)]  # of which resamples show no spread
    return max([float(np.quantile(np.ptp(centred, axis=0), 0.95)), *agreed])


# --- the recommendation ----------------------------------------------------------------------------------------------


def decide(points: list[Point], goal: Key, axis: str) -> tuple[Point | None, list[str], list[str]]:
    """(recommended, verdict, notes) by RULE."""
    notes, whole = [], []
    for point in points:
        if broken := [change_text(point, guard) for guard in GUARDS if guard != goal and lost(point, guard)]:
            notes.append(f"{point.label} is left out of the choice: {'; '.join(broken)}.")
        else:
            whole.append(point)
    best, first, second = choose(points, whole, goal, axis)
    if fell := [f"{p.label} ({amounts(goal, change(p, goal))})" for p in points if lost(p, goal)]:
        notes.append(second)
        second = f"Below the base: {', '.join(fell)}."
    name = max(whole or points, key=lambda point: point.values[goal]["value"]).runs[0].name
    command = (
        f"export {best.runs[0].name}" if best else f"evaluate {name} --level full   (each run; then compare again)"
    )
    return best, [first, second, f"next: python -m toolkit {command}"], notes


def choose(points: list[Point], whole: list[Point], goal: Key, axis: str) -> tuple[Point | None, str, str]:
    """(recommended, two sentences); `whole` are those of `points` that break no guard."""
    noun = "ratio" if axis else "run"
    if len(points) == 1:
        return None, f"Nothing to choose from: {points[0].label}: {change_text(points[0], goal)}.", "One setting only."
    if not whole:
        lead = f"No {noun} can be recommended: each breaks a mode or the chat."
        return None, lead, "Try a lower train.learning_rate."
    values = {point.label: point.values[goal]["value"] for point in whole}
    margin, highest = simultaneous_margin(whole, goal), max(whole, key=lambda point: values[point.label])
    tied = [point for point in whole if values[highest.label] - values[point.label] <= margin]
    chance = f"up to {100 * margin:.0f} points between {len(whole)} {noun}s are chance (95%)"
    if len(tied) == len(points):
        low, high = min(values.values()), max(values.values())
        lead = f"The differences are within noise: {100 * low:.0f}% to {100 * high:.0f}%; {chance}."
        return None, lead, "More questions or seeds (sweep --seeds 3) show smaller differences."
    better = [point for point in tied if (gain := change(point, goal)) and gain["low"] > 0]
    if not better:
        lead = f"No {noun} is shown to beat the base. Highest is {highest.label}: {change_text(highest, goal)}."
        return None, lead, f"Differences {chance}."
    best = min(better, key=lambda p: (p.place if axis == "reasoning" else p.kl(), -values[p.label]))
    others = ", ".join(point.label for point in tied if point is not best)
    second = f"It ties with {others}: {chance}." if others else f"It leads by more than chance: {chance}."
    return best, f"Recommended: {best.label}: {change_text(best, goal)}.", second


def lost(point: Point, key: Key) -> bool:
    """Whether a point is more than MARGIN below its base, beyond chance."""
    found = change(point, key)
    return bool(found and found["value"] < -MARGIN and found["high"] < 0)


def change_text(point: Point, key: Key) -> str:
    """`thinking accuracy 23% → 70% (+47 points [+33, +60])`."""
    found, tuned = change(point, key), amount(key, point.values[key]["value"])
    title = metric_title(key, point.runs[0])
    return f"{title} {amount(key, found['before'])} → {tuned} ({amounts(key, found)})" if found else f"{title} {tuned}"


def amount(key: Key, value: float) -> str:
    """`70%` for a rate, `0.22` for others."""
    return f"{100 * value:.0f}%" if is_rate(key[1]) else f"{value:.3g}"


def amounts(key: Key, found: dict) -> str:
    """`+47 points [+33, +60]` for the change of a rate, `+0.22 [+0.1, +0.3]` for others."""
    points, form = (100, "+.0f") if is_rate(key[1]) else (1, "+.3g")
    value, low, high = (f"{points * found[end]:{form}}" for end in ("value", "low", "high"))
    return f"{value}{' points' if is_rate(key[1]) else ''} [{low}, {high}]"


def metric_title(key: Key, run: Run) -> str:
    """`thinking accuracy`; without the mode's name where the model has one mode, or the metric none."""
    named = key[0] in MODES and all(mode in run.eval["tuned"] for mode in MODES)
    return f"{mode_title(key[0])} {TITLES[key[1]]}" if named else TITLES[key[1]]


# --- two runs --------------------------------------------------------------------------------------------------------


def difference_report(first: Path, second: Path) -> list[str]:
    """What differed between two runs, and what it did to the scores, in words. Raises ToolkitError."""
    a, b = runs = [read_run(Path(folder)) for folder in (first, second)]
    old, new = facts = [
        {key: value for key, value in flat(run.recipe).items() if key != "name"}
        | flat({key: run.manifest.get(key) for key in ("versions", "data", "gpu", "model", "commit")}, "manifest")
        | {f"share of {name} in {unit.replace('_', ' ')}": f"{100 * share:.1f}%"
           for unit, shares in run.mix["achieved"].items() for name, share in shares.items()}
        for run in runs
    ]  # fmt: skip
    lines = [f"{key}: {old.get(key, '-')} → {new.get(key, '-')}" for key in changed(facts)]
    lines = [f"{a.name} → {b.name}", *(lines or ["no recipe key, version, data fingerprint or share differs"])]
    if uneven := changed([conditions(run) for run in runs]):
        return [*lines, f"not comparable: the evaluations differ in {', '.join(uneven)}"]
    lines.append("scores (difference with its 95% interval, paired over questions):")
    for key in METRICS:
        if all(found := [run.found("tuned", key) for run in runs]):
            text = f"{metric_title(key, b)}: {' → '.join(amount(key, f['value']) for f in found)}"
            if measured := difference(key, ([a], "tuned"), ([b], "tuned")):
                sure = measured["low"] > 0 or measured["high"] < 0
                text += f" ({amounts(key, measured)}, {'certain' if sure else 'no difference shown'})"
            lines.append(text)
    return lines
