"""How much of a trained adapter to keep, chosen after training: from the base (scale 0) to a little beyond the run.

from toolkit.comparison import dial; dial.dial([Path("outputs/pocket")])

A LoRA layer adds `scaling` times its update to its weight. Multiplied by a scale, the model moves on the line from base to
tuned without training, and an export at that scale is `lora_alpha` times the scale. Every scale gets fast evidence (held-out
loss and KL, no generation), a few more where the curve bends; those that may be recommended get replies too. The rule is that of `decide`.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console

from toolkit import recipe as recipes
from toolkit.comparison.decide import KL, SCALE, Comparison, decide, noun, usual_goal
from toolkit.comparison.points import point
from toolkit.comparison.report import conclude
from toolkit.comparison.runs import Run, changed_keys, run_of
from toolkit.comparison.sweep import QUESTIONS
from toolkit.evaluation.measure import evaluate
from toolkit.evaluation.questions import asked_of
from toolkit.evaluation.words import LOSS
from toolkit.export.checkpoint import check_scale
from toolkit.files import ToolkitError, flat, read_if_whole, read_json, write_json
from toolkit.records import Evaluation, Json
from toolkit.run import pinned
from toolkit.training import model as models
from toolkit.view import page
from toolkit.view.progress import Progress

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

# Scale 0 is the base, which every evaluation measures beside.
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)
# Scales that are added to these, one after the other, where fast evidence changes most.
BENDS = 2
# Scales that get replies, the run itself among them.
WITH_REPLIES = 4
# Share of the largest gain in held-out loss from which a scale may be recommended, so that it gets replies.
WORTH = 0.5
# Nats of KL below which an adapter changes nothing.
NOTHING = 1e-6
# Recipe keys in which runs that are averaged may differ: the seed, and what changes neither training nor questions.
MAY_DIFFER = re.compile(r"name$|data\.seed$|export\b|evaluate\.prompts\b|train\.(report_to|project|logging_steps)\b")
Results = dict[tuple[str, float], Evaluation]
"""{(level, scale): the evaluation of a run at that scale}; the level is `fast` or `quick`."""


# --- one adapter at another scale ------------------------------------------------------------------------------------


@contextlib.contextmanager
def scaled(model: "PeftModel", scale: float) -> Iterator[None]:
    """The model with its adapter at a scale: 1 is the run, 0 its base. Afterwards it is as it was, to the last bit.

    Raises ToolkitError for a scale that means nothing and an adapter that cannot be scaled."""
    check_scale(scale)
    layers = lora_layers(model)
    # a rank pattern gives each layer a scaling of its own, rsLoRA another rule: both are factors here
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        for name, scaling in layer.scaling.items():
            layer.scaling[name] = scaling * scale
    try:
        yield
    finally:
        for layer, scalings in zip(layers, before, strict=True):
            layer.scaling.update(scalings)


def lora_layers(model: "PeftModel") -> "list[LoraLayer]":
    """The layers of the active adapter. Raises ToolkitError where a scale would not lead from the base to the run."""
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    config = model.peft_config[model.active_adapter]
    if not layers:
        raise ToolkitError("the model has no LoRA layer: there is nothing to scale")
    if any(layer.merged for layer in layers):
        raise ToolkitError("the adapter is merged into the base already: load the run again")
    if config.use_dora:
        raise ToolkitError("a DoRA adapter trains the length of each weight too, which no scale takes back")
    beyond = [*(config.modules_to_save or []), *(config.trainable_token_indices or [])]
    if config.bias != "none":
        beyond.append(f"bias={config.bias}")
    if beyond:
        raise ToolkitError(
            f"the run trained more than its LoRA ({', '.join(map(str, beyond))}), which a scale does not reach"
        )
    return layers


# --- a run at every scale --------------------------------------------------------------------------------------------


def dial(
    runs: Sequence[str | Path],
    *,
    scales: Sequence[float] | None = None,
    console: Console | None = None,
    out: Path | None = None,
) -> Comparison:
    """Measure a run at every scale and recommend one; several runs are one recipe with other seeds, and are averaged.

    Without `scales` at SCALES, and at BENDS more between them where the held-out loss and the KL of the first run change most.
    Picture and numbers go to the folder NAME-dial in the run's own, or to `out`; what was measured is kept in dial.json, so
    that the same command resumes it. Raises ToolkitError for a run that changed nothing."""
    console = pinned(console)  # loading sends what libraries print to the log
    coarse = scales or SCALES
    for scale in coarse:
        check_scale(scale)
    # 1 first: a run that changed nothing stops before the other scales are measured
    coarse = [1.0, *sorted({float(scale) for scale in coarse} - {0.0, 1.0})]
    # the same run by two spellings is one training, not two seeds
    folders = list(dict.fromkeys(map(finished_run, runs)))
    check_same_training([recipes.of_run(folder) for folder in folders])
    if len({str(read_json(folder / "manifest.json").get("weights")) for folder in folders}) > 1:
        raise ToolkitError("dial averages over seeds of one recipe, but these runs are sums with different weights")
    comparison = choose_scale([Evidence(folder, console) for folder in folders], coarse, 0 if scales else BENDS)
    first = folders[0]
    conclude(comparison, console, out or first / f"{first.name}-dial")
    page.write(first)  # which opens with the picture
    return comparison


def finished_run(name: str | Path) -> Path:
    """A finished run's folder. Raises ToolkitError where there is none, or its adapter is damaged."""
    folder = models.run_folder(name).resolve()
    if not (folder / "recipe.yaml").is_file():
        raise ToolkitError(f"{folder}: a folder of export_model has no recipe, and so no questions to dial by")
    models.check_adapter(folder)
    return folder


def check_same_training(members: Sequence[recipes.Recipe]) -> None:
    """Raises ToolkitError where runs differ in more than their seed: their scales cannot be averaged."""
    settings = [flat(recipes.to_dict(recipe)) for recipe in members]
    differing = [key for key in changed_keys(settings) if not MAY_DIFFER.match(key)]
    if differing:
        raise ToolkitError(f"dial averages over seeds of one recipe, but these runs differ in {', '.join(differing)}")


class Plan(NamedTuple):
    """What is measured of every run: all scales by fast evidence, some with replies."""

    scales: Sequence[float]
    with_replies: Sequence[float]


@dataclass
class Evidence:
    """What was measured of one run: the file `record` in its folder keeps it, and what is missing there is measured."""

    folder: Path
    console: Console
    record: str = "dial.json"
    at: Callable[[Any, float], contextlib.AbstractContextManager[None]] = scaled
    """The model at one of the scales; of a sum of runs at one of its ratios, which take the place of scales."""

    def __post_init__(self) -> None:
        self.manifest = read_json(self.folder / "manifest.json")
        self.results = kept_results(self.folder / self.record, self.manifest.get("adapter"))

    def measure(self, level: str, scales: Sequence[float]) -> dict[float, Evaluation]:
        """{scale: its evaluation at a level}, of which the missing ones are made first; each is written at once."""
        if missing := [scale for scale in scales if (level, scale) not in self.results]:
            self.evaluate_at(missing, level)
        return {scale: self.results[level, scale] for scale in scales}

    def evaluate_at(self, scales: Sequence[float], level: str) -> None:
        """Evaluate the run at scales. Raises ToolkitError for a run that changed nothing."""
        model, tokenizer, questions = self.loaded
        questions = {**questions, "level": level}
        if level == "fast":
            questions["questions_per_mode"] = None
        with Progress(self.console, f"{self.folder.name}, {level} evidence, scales", len(scales)) as progress:
            for scale in scales:
                with self.at(model, scale):
                    result = evaluate(model, tokenizer, console=Console(quiet=True), **questions)
                if scale == 1.0:
                    check_changed(self.folder.name, result)
                self.results[level, scale] = result
                self.write()
                progress.advance(1)

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any, dict[str, Any]]:
        """(model, tokenizer, what is asked at every scale): once for both levels, and never where nothing is missing."""
        recipe = recipes.of_run(self.folder)
        # as many as in a sweep; a person's own rows tell nothing between scales
        count = recipe.evaluate.questions_per_mode or QUESTIONS["quick"]
        questions = asked_of(recipe, self.manifest) | {"own_rows": (), "minutes": None, "questions_per_mode": count}
        with models.loading(recipe.model, self.console):
            return (*models.load_run(self.folder), questions)

    def write(self) -> None:
        """Write {`fast 0.5` or `quick 0.5`: the evaluation}, with the adapter's checksums, by which a later dial knows
        whether they are about it."""
        scales = {f"{level} {scale!r}".removesuffix(".0"): result for (level, scale), result in self.results.items()}
        write_json(self.folder / self.record, {"adapter": self.manifest.get("adapter"), "scales": scales})


def kept_results(file: Path, adapter: Json) -> Results:
    """What an earlier dial of this adapter wrote."""
    results: Results = {}
    # none yet, or damaged: then all is measured again
    kept = read_if_whole(file)
    # what was measured of another adapter says nothing of this one
    if kept and kept.get("adapter") == adapter:
        for key, result in kept["scales"].items():
            level, scale = key.split()
            results[level, float(scale)] = result
    return results


def choose_scale(runs: Sequence[Evidence], scales: Sequence[float], bends: int) -> Comparison:
    """Measure runs of one recipe at scales, and at `bends` more where the curve of the first run bends, and compare them."""
    # means need the same scales of every run: those that the first one chose
    plan = choose_plan(runs[0], scales, bends)
    return compare_scales([measure(run, plan) for run in runs], sorted(plan.scales))


def choose_plan(run: Evidence, scales: Sequence[float], bends: int) -> Plan:
    """The scales, `bends` more where the curve of this run bends, and which of them get replies."""
    fast = run.measure("fast", scales)
    for _ in range(bends):
        fast = run.measure("fast", [*fast, bend(fast)])
    return Plan(list(fast), scales_for_replies(fast))


def measure(run: Evidence, plan: Plan, axis: str = SCALE) -> dict[float, Run]:
    """{scale (or place on another axis): the run there}, measured where that was not done before."""
    run.measure("fast", plan.scales)
    run.measure("quick", plan.with_replies)
    # of several seeds one model at a time is in memory
    vars(run).pop("loaded", None)
    return {scale: at_scale(run.folder, scale, run.results, axis) for scale in plan.scales}


def bend(fast: Mapping[float, Evaluation]) -> float:
    """The middle of the interval, from the base up to the run itself, across which gain in held-out loss and KL change most,
    each as a share of all its change there. Beyond the run KL always grows fastest, and nothing is decided there."""
    places = [0.0, *sorted(scale for scale in fast if scale <= 1)]
    curve = [(0.0, 0.0)]
    for scale in places[1:]:
        kl = fast[scale]["tuned"]["forgetting"]["kl"]["value"]
        curve.append((held_out_gain(fast[scale]), kl or 0.0))
    changes = np.abs(np.diff(curve, axis=0))
    shares = changes / np.maximum(changes.sum(axis=0), NOTHING)
    most = int(shares.sum(axis=1).argmax())
    return (places[most] + places[most + 1]) / 2


def scales_for_replies(fast: Mapping[float, Evaluation]) -> list[float]:
    """The run itself, and scales that keep WORTH of the largest gain in held-out loss: replies elsewhere would cost time and
    could not be recommended. Of those below the run the ends and what lies between, since skill may come late; one beyond it
    where few are below."""
    gains = {scale: held_out_gain(result) for scale, result in fast.items()}
    worth = [scale for scale, gain in sorted(gains.items()) if gain >= WORTH * max(gains.values())]
    below = [scale for scale in worth if scale < 1]
    places = np.linspace(0, len(below) - 1, min(len(below), WITH_REPLIES - 1)).round()
    beyond = [scale for scale in worth if scale > 1][:1] if len(below) < WITH_REPLIES - 1 else []
    return sorted({1.0, *(below[int(place)] for place in places), *beyond})


def held_out_gain(result: Evaluation) -> float:
    """By how much the loss on held-out rows fell, in nats per token, averaged over sources and modes; 0 without any."""
    changes = result["difference"]["forgetting"].items()
    known = [-change["value"] for metric, change in changes if metric.startswith(LOSS) and change["value"] is not None]
    return sum(known) / len(known) if known else 0.0


def check_changed(name: str, result: Evaluation) -> None:
    """Raises ToolkitError for a run whose adapter does nothing, or breaks the model."""
    kl = result["tuned"]["forgetting"]["kl"]["value"]
    if kl is None:
        raise ToolkitError(f"{name}: at scale 1 the model computes no numbers (NaN): its training diverged")
    if kl < NOTHING:
        raise ToolkitError(
            f"{name}: the adapter changes nothing (KL {kl:.1g} at scale 1), so there is nothing to dial. Train longer, or "
            "with a higher train.learning_rate"
        )


def at_scale(folder: Path, scale: float, results: Results, axis: str = SCALE) -> Run:
    """The run at a scale (or elsewhere on an axis) by the most that was measured there, which is a setting like those of its
    recipe."""
    run = run_of(folder, results.get(("quick", scale)) or results["fast", scale])
    return replace(run, trained={**run.trained, axis: scale})


def compare_scales(members: Sequence[Mapping[float, Run]], scales: Sequence[float], axis: str = SCALE) -> Comparison:
    """The scales as points of one comparison; only those with replies can be recommended."""
    points = [point([member[scale] for member in members], axis) for scale in scales]
    goal = usual_goal([run for p in points for run in p.runs])
    with_replies = [p for p in points if goal in p.values]
    if not with_replies:
        raise ToolkitError("no question was answered to the end: set evaluate.max_new_tokens higher")
    note = f"One seed: another may keep less or more at the same {noun(axis)}; several are averaged."
    if len(members) > 1:
        note = f"Means over {len(members)} trainings: {', '.join(run.name for run in points[0].runs)}."
    silent = ", ".join(f"{p.short} (KL {p.values[KL].value:.2f})" for p in points if p not in with_replies)
    silent_note = [f"Held-out loss and KL only, no replies: {noun(axis)} {silent}."] if silent else []
    return decide(points, goal, axis, [*silent_note, note], {})
