"""Evaluated runs, read back from their folders: one table, the differences between them, and a recommendation.

comparison = compare(Path("outputs").glob("sweep_pocket-r*")); print(*comparison.verdict, sep="\\n")

Only the run folders are read (recipe.yaml, mix.json, eval.json, manifest.json): no GPU, no account.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from toolkit.evaluate import is_rate
from toolkit.evaluate.stats import RESAMPLES, difference, draws, ratios, unanimous
from toolkit.family import MODES, mode_title
from toolkit.files import ToolkitError, read_json

UNITS = ("examples", "tokens", "supervised_tokens")
GOALS = (("thinking", "accuracy"), ("non_thinking", "accuracy"),
         ("non_thinking", "accuracy/chat"), ("thinking", "accuracy/chat"))  # fmt: skip
"""(section, metric) of eval.json by which runs are ranked: the first that all of them have. Reasoning questions rank
before chat questions, which runs of the other kind of data are asked only."""
CHAT = ("non_thinking", "accuracy/chat")
GUARDS = (("thinking", "adherence"), ("non_thinking", "adherence"), CHAT)
KL = ("forgetting", "kl")
METRICS = (
    *((mode, metric) for metric in ("accuracy", "accuracy/chat", "adherence", "reasoning_tokens", "answer_tokens", "cut")
      for mode in MODES),
    KL, ("forgetting", "nll"),
)  # fmt: skip
TITLES = {
    "accuracy": "accuracy", "accuracy/chat": "chat accuracy", "adherence": "adherence",
    "reasoning_tokens": "reasoning tokens", "answer_tokens": "answer tokens", "cut": "cut by the token limit",
    "kl": "KL from the base, nats/token", "nll": "NLL, nats/token",
}  # fmt: skip
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
    "and keep more of the base; where the reasoning share is not what differs, the one with the lowest KL from the base."
)


@dataclass(frozen=True)
class Run:
    """One run folder, read."""

    name: str
    recipe: dict
    mix: dict
    eval: dict
    manifest: dict

    def share(self, unit: str) -> float:
        """Achieved share of thinking rows."""
        return thinking_share(self.mix, self.mix["achieved"][unit], unit)

    def modes(self) -> list[str]:
        """The modes in which it was evaluated."""
        return [mode for mode in MODES if mode in self.eval["tuned"]]

    def found(self, model: str, section: str, metric: str) -> dict | None:
        """{"value", "low", "high", "n"} of base or tuned; None where it was not measured."""
        found = self.eval[model].get(section, {}).get(metric)
        return found if found and found["value"] is not None else None


@dataclass(frozen=True)
class Point:
    """Runs that differ only in their seed: one row of the table, one place in the picture."""

    label: str
    runs: list[Run]
    shares: dict[str, float]
    """Achieved reasoning share by unit, mean over the runs."""
    values: dict[tuple[str, str], dict]
    """(section, metric) → {"value", "low", "high", "n", "each": one value per seed}."""
    place: float | None = None
    """Achieved share, in the mix's unit, of what differs between the points; None where more than a share differs."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `report` shows it."""

    unit: str
    axis: str
    """What the points' `place` is a share of: `reasoning` or a source's name; empty where runs are compared by name."""
    goal: tuple[str, str]
    points: list[Point]
    base: dict[tuple[str, str], dict]
    verdict: list[str]
    """Two sentences and the next command."""
    recommended: Point | None
    frontier: list[str]
    """Labels, `base` among them, that none beats in both the goal and what is kept of the base."""
    notes: list[str]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(run, why)."""

    def table(self) -> pd.DataFrame:
        """A row for the base and each point: its runs, achieved shares, and every metric with its interval."""
        rows = []
        for label, runs, shares, values in [
            ("base", [], {}, self.base),
            *((p.label, p.runs, p.shares, p.values) for p in self.points),
        ]:
            row = {"label": label, "runs": " ".join(run.name for run in runs)}
            row |= {f"reasoning_share_{unit}": shares.get(unit) for unit in UNITS}
            row["recommended"] = int(self.recommended is not None and label == self.recommended.label)
            row["frontier"] = int(label in self.frontier)
            for (section, metric), found in values.items():
                row[f"{section}/{metric}"] = found["value"]
                row |= {f"{section}/{metric}.{end}": found[end] for end in ("low", "high", "n")}
            rows.append(row)
        return pd.DataFrame(rows)


# --- reading and grouping runs ---------------------------------------------------------------------------------------


def compare(folders: Iterable[Path]) -> Comparison:
    """Compare evaluated runs. Those that are incomplete or were evaluated otherwise than most are left out and named.

    Raises ToolkitError when no run is left."""
    runs, left_out = [], []
    for folder in dict.fromkeys(Path(f).resolve() for f in folders):
        try:
            runs.append(read_run(folder))
        except ToolkitError as error:
            left_out.append((folder.name, str(error)))
    runs, otherwise = alike(runs)
    left_out += otherwise
    if not runs:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out) or "no folder was given"
        raise ToolkitError(f"no run to compare: {reasons}")
    unit = runs[0].mix["unit"]
    goal = max(GOALS, key=lambda goal: sum(run.found("tuned", *goal) is not None for run in runs))
    left_out += [
        (run.name, f"no {goal[1]} in {goal[0]} mode (every reply was cut)")
        for run in runs
        if not run.found("tuned", *goal)
    ]
    runs = [run for run in runs if run.found("tuned", *goal)]
    axis, differing = what_differs(runs)
    points = group(runs, axis, differing, unit)
    base = {key: found for key in METRICS if (found := runs[0].found("base", *key))}
    recommended, verdict, notes = decide(points, goal, axis)
    if not axis and len(points) > 1:
        notes.insert(0, f"Compared by name, since the runs differ in more than a share: {', '.join(differing)}.")
    return Comparison(
        unit, axis, goal, points, base, verdict, recommended, frontier(points, base, goal), notes, left_out
    )


def read_run(folder: Path) -> Run:
    """Read an evaluated run's folder. Raises ToolkitError saying what is missing and how to get it."""
    missing = [n for n in ("recipe.yaml", "mix.json", "manifest.json", "eval.json") if not (folder / n).is_file()]
    if missing == ["eval.json"]:
        raise ToolkitError(f"not evaluated: run `python -m toolkit evaluate {folder.name}`")
    if missing:
        raise ToolkitError(f"incomplete: no {', '.join(missing)}")
    mix, manifest, result = (read_json(folder / f"{name}.json") for name in ("mix", "manifest", "eval"))
    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        run = Run(folder.name, recipe, mix, result, manifest)
        settings_of(run.recipe)
        shares = [run.share(unit) for unit in UNITS]
        asked = [run.found("tuned", *goal) for goal in GOALS if run.eval["per_question"]]
    except (AttributeError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ToolkitError(f"unreadable: {type(error).__name__}: {error}") from error
    if not any(asked) or not shares:
        raise ToolkitError(
            "eval.json has no accuracy: either no question has an expected answer (evaluate.questions), or every "
            "reply was cut by evaluate.max_new_tokens"
        )
    return run


def thinking_share(mix: dict, shares: dict, unit: str) -> float:
    """Share of thinking rows, from {source: share}."""
    modes = {name: source["mode"] for name, source in mix["sources"].items()}
    drawn = {name: share for name, share in shares.items() if share}  # a source at 0% is planned, but not drawn
    if all(modes[name] in MODES for name in drawn):
        return math.fsum(share for name, share in drawn.items() if modes[name] == "thinking")
    return mix["achieved_modes"][unit].get("thinking", 0.0)  # `mode: auto`: rows of one source have different modes


def alike(runs: list[Run]) -> tuple[list[Run], list[tuple[str, str]]]:
    """The largest set of runs evaluated in the same way, and the others with what differs."""
    found = [conditions(run) for run in runs]
    keys = [json.dumps(condition, sort_keys=True) for condition in found]
    if not keys:
        return [], []
    usual = found[keys.index(Counter(keys).most_common(1)[0][0])]
    same, others = [], []
    for run, condition in zip(runs, found, strict=True):
        differs = [f"{n} {condition[n]} (the others: {usual[n]})" for n in usual if condition[n] != usual[n]]
        if differs:
            others.append((run.name, f"evaluated differently: {'; '.join(differs)}"))
        else:
            same.append(run)
    return same, others


def conditions(run: Run) -> dict:
    """What must be equal for two evaluations to be comparable; held-out rows may differ with the mix."""
    prints, budget = run.eval.get("fingerprints", {}), run.eval.get("budget", {})
    return {
        "level": run.eval.get("level"), "seed": run.eval.get("seed"), "questions": prints.get("questions"),
        "probes": prints.get("probes"), "max_new_tokens": budget.get("max_new_tokens"), "samples": budget.get("samples"),
        "base model": {k: run.manifest.get("model", {}).get(k) for k in ("name", "revision", "load_in_4bit")},
        "unit": run.mix["unit"],
    }  # fmt: skip


def settings_of(recipe: dict, skip: Sequence[str] = NOT_TRAINING) -> dict:
    """{dotted key: value} of a recipe, without the keys in `skip` and what lies under them."""
    flat: dict = {}

    def walk(node, path: str) -> None:
        children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in children:
            walk(child, f"{path}.{key}" if path else str(key))
        if not children and not any(path == s or path.startswith(f"{s}.") for s in skip):
            flat[path] = node

    walk(recipe, "")
    return flat


def changed_keys(settings: Sequence[dict]) -> list[str]:
    """Keys whose values are not the same in all of several flat recipes."""
    keys = sorted(set().union(*settings))
    return [key for key in keys if len({json.dumps(s.get(key), default=str) for s in settings}) > 1]


def what_differs(runs: list[Run]) -> tuple[str, list[str]]:
    """(axis, keys): the axis is `reasoning` or a source's name where runs differ in shares alone, else empty."""
    keys = changed_keys([settings_of(run.recipe) for run in runs])
    differing = [key for key in keys if key not in PER_RATIO and not key.endswith(".fraction")]
    planned = [run.mix["planned"] for run in runs]
    varying = [name for name in planned[0] if len({round(shares.get(name, 0), 3) for shares in planned}) > 1]
    if differing or not varying:
        return "", differing + [f"share of {name}" for name in varying]
    thinking = {round(thinking_share(run.mix, run.mix["planned"], run.mix["unit"]), 3) for run in runs}
    # where no thinking share varies, the source listed last: recipes name the rows to be learned first, general data last
    return "reasoning" if len(thinking) > 1 else varying[-1], []


def group(runs: list[Run], axis: str, differing: list[str], unit: str) -> list[Point]:
    """Points of runs that differ only in their seed: by share along the axis, or by name."""
    groups = defaultdict(list)
    for run in runs:
        settings = settings_of(run.recipe)
        planned = tuple(round(share, 3) for share in run.mix["planned"].values())
        groups[json.dumps([settings.get(key) for key in differing], default=str), planned].append(run)
    points = []
    for members in groups.values():
        members.sort(key=lambda run: run.name)
        first, others = members[0], len(members) - 1
        label = first.name + (f" (+{others} more seeds)" if others > 1 else " (+1 seed)" if others else "")
        place = None
        if axis == "reasoning":
            label = f"{100 * round(thinking_share(first.mix, first.mix['planned'], unit), 3):g}% reasoning"
            place = float(np.mean([run.share(unit) for run in members]))
        elif axis:
            label = f"{100 * round(first.mix['planned'][axis], 3):g}% {axis}"
            place = float(np.mean([run.mix["achieved"][unit].get(axis, 0.0) for run in members]))
        shares = {unit: float(np.mean([run.share(unit) for run in members])) for unit in UNITS}
        values = {key: average(key[1], [run.found("tuned", *key) for run in members]) for key in METRICS}
        points.append(Point(label, members, shares, {k: v for k, v in values.items() if v}, place))
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


def resampled(runs: list[Run], model: str, section: str, metric: str) -> np.ndarray:
    """RESAMPLES values of a metric's mean over runs, each as if other questions had been drawn; the draws are the same
    for all runs, so differences are paired."""
    seed, vectors = 3407, []
    for run in runs:
        sums, counts = np.array(run.eval["per_question"][section][model][metric], dtype=float)
        drawn = ratios(sums, counts, draws(len(sums), seed))
        vectors.append(np.where(np.isnan(drawn), run.found(model, section, metric)["value"], drawn))  # all replies cut
    scatter = seed_error([run.found(model, section, metric)["value"] for run in runs])
    noise = np.random.default_rng([seed, *"".join(run.name for run in runs).encode()])
    return np.mean(vectors, axis=0) + noise.normal(0, scatter, RESAMPLES)


def change(point: Point, key: tuple[str, str]) -> dict | None:
    """Tuned minus base as {"value", "low", "high"}, paired; None where either was not measured."""
    base = [run.found("base", *key) for run in point.runs]
    if key not in point.values or None in base:
        return None
    drawn = resampled(point.runs, "tuned", *key) - resampled(point.runs, "base", *key)
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = point.values[key]["value"] - float(np.mean([found["value"] for found in base]))
    if is_rate(key[1]) and value and math.isclose(low, high):  # all questions agree: no spread to resample, but a bound
        bound = unanimous(point.values[key]["n"])
        low, high = max(-1.0, low - bound), min(1.0, high + bound)
    return {"value": value, "low": float(low), "high": float(high)}


def simultaneous_margin(points: list[Point], goal: tuple[str, str]) -> float:
    """The range of the goal that equal points would show in 19 of 20 cases: the 95% quantile of the range of the centred
    resamples, which bounds all pairs at once (Tukey's range test, by bootstrap)."""
    vectors = np.stack([resampled(point.runs, "tuned", *goal) for point in points])
    centred = vectors - np.array([[point.values[goal]["value"]] for point in points])
    agreed = [
        p.values[goal] for p in points if p.values[goal]["value"] in (0.0, 1.0)
    ]  # of which resamples show no spread
    return max([float(np.quantile(np.ptp(centred, axis=0), 0.95)), *(found["high"] - found["low"] for found in agreed)])


def kept_of_base(values: dict, goal: tuple[str, str]) -> float:
    """How much of the base is left: chat accuracy without thinking, or where that is the goal or was not asked minus the
    KL, which is 0 for the base itself."""
    if CHAT in values and goal != CHAT:
        return values[CHAT]["value"]
    return -values[KL]["value"] if KL in values else 0.0


def frontier(points: list[Point], base: dict, goal: tuple[str, str]) -> list[str]:
    """Labels, the base's among them, that no other beats in both goal and what is kept (values; intervals overlap)."""
    everyone = {"base": base} | {point.label: point.values for point in points}
    places = {label: (values[goal]["value"], kept_of_base(values, goal)) for label, values in everyone.items()
              if goal in values}  # fmt: skip
    return [
        label for label, (a, b) in places.items()
        if not any(x >= a and y >= b and (x, y) != (a, b) for x, y in places.values())
    ]  # fmt: skip


# --- the recommendation ----------------------------------------------------------------------------------------------


def decide(points: list[Point], goal: tuple[str, str], axis: str) -> tuple[Point | None, list[str], list[str]]:
    """(recommended, verdict, notes) by RULE."""
    noun, notes = "ratio" if axis else "run", []
    if all(len(point.runs) == 1 for point in points):
        notes.append("One seed each: how much two trainings with other seeds would differ is not in the intervals.")
    guards = [guard for guard in GUARDS if guard != goal]
    broken = {p.label: why for p in points if (why := [change_text(p, guard) for guard in guards if lost(p, guard)])}
    notes += [f"{label} is left out of the choice: {'; '.join(why)}." for label, why in broken.items()]
    fell = {point.label: point for point in points if lost(point, goal)}
    notes += [f"{label} fell below the base: {change_text(point, goal)}." for label, point in fell.items()]
    below = f"Below the base: {', '.join(f'{label} ({points_text(change(p, goal))})' for label, p in fell.items())}."
    highest = max(points, key=lambda point: point.values[goal]["value"])
    state, name = f"{highest.label}: {change_text(highest, goal)}", highest.runs[0].name
    more = f"next: python -m toolkit evaluate {name} --level full   (each run; then compare again)"
    if len(points) == 1:
        return None, [f"Nothing to choose from: {state}.", "All runs differ in their seed alone.",
                      "next: python -m toolkit sweep --help"], notes  # fmt: skip
    whole = [point for point in points if point.label not in broken]
    if not whole:
        lead = f"No {noun} can be recommended: each breaks a mode or the chat."
        return None, [lead, "Try a lower train.learning_rate.", f"next: python -m toolkit chat {name}"], notes
    values = np.array([point.values[goal]["value"] for point in whole])
    margin = simultaneous_margin(whole, goal)
    tied = [point for point, value in zip(whole, values, strict=True) if values.max() - value <= margin]
    chance = f"up to {100 * margin:.0f} points between {len(whole)} {noun}s are chance (95%)"
    if len(tied) == len(points):
        lead = f"The differences are within noise: {100 * values.min():.0f}% to {100 * values.max():.0f}%; {chance}."
        ask = "More questions or seeds (sweep --seeds 3) show smaller differences."
        return None, [lead, below if fell else ask, more], notes
    better = [point for point in tied if (gain := change(point, goal)) and gain["low"] > 0]
    if not better:
        lead = f"No {noun} is shown to beat the base. Highest is {state}."
        return None, [lead, below if fell else f"Differences {chance}.", more], notes
    best = min(better, key=lambda p: (p.place if axis == "reasoning" else p.values.get(KL, {"value": 0})["value"],
                                      -p.values[goal]["value"]))  # fmt: skip
    others = ", ".join(point.label for point in tied if point is not best)
    second = f"It ties with {others}: {chance}." if others else f"It leads by more than chance: {chance}."
    if fell:
        notes.append(second)
    verdict = [f"Recommended: {best.label}: {change_text(best, goal)}.", below if fell else second]
    return best, [*verdict, f"next: python -m toolkit export {best.runs[0].name}"], notes


def lost(point: Point, key: tuple[str, str]) -> bool:
    """Whether a point is more than MARGIN below its base, beyond chance."""
    found = change(point, key)
    return bool(found and found["value"] < -MARGIN and found["high"] < 0)


def change_text(point: Point, key: tuple[str, str]) -> str:
    """`thinking accuracy 23% → 70% (+47 points [+33, +60])`, for a rate."""
    found, tuned = change(point, key), point.values[key]["value"]
    title = metric_title(key, point.runs[0])
    if found is None:
        return f"{title} {100 * tuned:.0f}% (base not measured)"
    return f"{title} {100 * (tuned - found['value']):.0f}% → {100 * tuned:.0f}% ({points_text(found)})"


def points_text(found: dict) -> str:
    """`+47 points [+33, +60]` for the change of a rate."""
    value, low, high = (f"{100 * found[end]:+.0f}" for end in ("value", "low", "high"))
    return f"{value} points [{low}, {high}]"


def metric_title(key: tuple[str, str], run: Run) -> str:
    """`thinking accuracy`; without the mode's name where the model has one mode, or the metric none."""
    section, metric = key
    return (
        TITLES[metric] if len(run.modes()) == 1 or section not in MODES else f"{mode_title(section)} {TITLES[metric]}"
    )


# --- two runs --------------------------------------------------------------------------------------------------------


def difference_report(first: Path, second: Path) -> list[str]:
    """What differed between two runs, and what it did to the scores, in words. Raises ToolkitError."""
    a, b = read_run(Path(first)), read_run(Path(second))
    lines = [f"{a.name} → {b.name}"]
    facts = [settings_of(run.recipe, ("name",)) for run in (a, b)]
    for keys in ("versions", "data", "gpu", "model", "commit"):
        for fact, run in zip(facts, (a, b), strict=True):
            fact |= settings_of({keys: run.manifest.get(keys)}, ())
    lines += [f"{key}: {facts[0].get(key, 'unset')} → {facts[1].get(key, 'unset')}" for key in changed_keys(facts)]
    unit = b.mix["unit"]
    shares = [run.mix["achieved"][unit] for run in (a, b)]
    for name in dict.fromkeys([*shares[0], *shares[1]]):
        old, new = (100 * share.get(name, 0.0) for share in shares)
        if abs(old - new) >= 0.05:
            lines.append(f"share of {name} in {unit.replace('_', ' ')}: {old:.1f}% → {new:.1f}%")
    if len(lines) == 1:
        lines.append("no recipe key, version, data fingerprint or share differs")
    lines.append("scores (difference with its 95% interval, paired over questions):")
    uneven = [key for key, value in conditions(a).items() if value != conditions(b)[key]]
    if uneven:
        return [*lines, f"not comparable: the evaluations differ in {', '.join(uneven)}"]
    for key in METRICS:
        old, new = (run.found("tuned", *key) for run in (a, b))
        if old and new:
            lines.append(f"{metric_title(key, b)}: {_score_change(a, b, key, old, new)}")
    return lines


def _score_change(a: Run, b: Run, key: tuple[str, str], old: dict, new: dict) -> str:
    scale, mark = (100, "%") if is_rate(key[1]) else (1, "")
    text = f"{scale * old['value']:.3g}{mark} → {scale * new['value']:.3g}{mark}"
    kept = [run.eval.get("per_question", {}).get(key[0], {}).get("tuned", {}).get(key[1]) for run in (a, b)]
    if not all(kept):
        return text
    found = difference(*kept, seed=3407, rate=is_rate(key[1]))
    if found["value"] is None:
        return f"{text} (no question that both finished)"
    low, high = (f"{scale * found[end]:+.3g}" for end in ("low", "high"))
    shown = "certain" if found["low"] > 0 or found["high"] < 0 else "no difference shown"
    return f"{text} ({scale * found['value']:+.3g} [{low}, {high}], {shown})"
