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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console

from toolkit import recipe as recipes
from toolkit.comparison.decide import KL, SCALE, Comparison, decide, noun, usual_goal
from toolkit.comparison.points import point
from toolkit.comparison.report import conclude
from toolkit.comparison.runs import Content, Run, changed_keys, run_of
from toolkit.comparison.sweep import QUESTIONS
from toolkit.data import mix
from toolkit.evaluation.measure import evaluate
from toolkit.evaluation.questions import from_mix, questions_of
from toolkit.evaluation.words import LOSS
from toolkit.export.checkpoint import check_scale
from toolkit.files import ToolkitError, flat, read_json, write_json
from toolkit.records import Evaluation, Json
from toolkit.run import pinned
from toolkit.training import model as models
from toolkit.view import page
from toolkit.view.progress import Progress

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)
"""Scale 0 is the base, which every evaluation measures beside."""
BENDS = 2
"""Scales that are added to these, one after the other, where fast evidence changes most."""
WITH_REPLIES = 4
"""Scales that get replies, the run itself among them."""
WORTH = 0.5
"""Share of the largest gain in held-out loss from which a scale may be recommended, so that it gets replies."""
NOTHING = 1e-6
"""Nats of KL below which an adapter changes nothing."""
MAY_DIFFER = re.compile(r"name$|data\.seed$|export\b|evaluate\.prompts\b|train\.(report_to|project|logging_steps)\b")
"""Recipe keys in which runs that are averaged may differ: the seed, and what changes neither training nor questions."""
Results = dict[str, Evaluation]
"""{`fast 0.5` or `quick 0.5`: the evaluation of a run at that scale}."""


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
    plan = Plan([1.0, *sorted({float(scale) for scale in coarse} - {0.0, 1.0})], 0 if scales else BENDS)
    # the same run by two spellings is one training, not two seeds
    folders = list(dict.fromkeys(map(finished_run, runs)))
    check_same_training([recipes.of_run(folder) for folder in folders])
    if len({str(read_json(folder / "manifest.json").get("weights")) for folder in folders}) > 1:
        raise ToolkitError("dial averages over seeds of one recipe, but these runs are sums with different weights")
    members = []
    for folder in folders:
        results, plan = measure(folder, plan, console)
        members.append({scale: at_scale(folder, scale, results) for scale in plan.scales})
    comparison = compare_scales(members, sorted(plan.scales))
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
    """What is measured. Means need the same scales of every run: those that the first one's fast evidence chose."""

    scales: list[float]
    bends: int = 0
    """How many more are still to be added where the curve bends."""
    with_replies: Sequence[float] = ()
    """The scales that get replies; none are chosen yet before the first run."""
    record: str = "dial.json"
    """The file in the run's folder that keeps what was measured."""
    at: Callable[[Any, float], contextlib.AbstractContextManager[None]] = scaled
    """The model at one of the scales; of a sum of runs at one of its ratios, which take the place of scales."""


def measure(folder: Path, plan: Plan, console: Console) -> tuple[Results, Plan]:
    """The run at each scale, and not again where that was done before; with the plan for the runs that follow."""
    manifest = read_json(folder / "manifest.json")
    results: Results = {}
    with contextlib.suppress(ToolkitError):  # none yet, or damaged: then all is measured again
        kept = read_json(folder / plan.record)
        # what was measured of another adapter says nothing of this one
        results = kept.get("scales", {}) if kept.get("adapter") == manifest.get("adapter") else {}
    # loaded once for both levels, and not at all where nothing is missing
    load = functools.cache(functools.partial(load_dialled, folder, console))
    evaluate_scales(folder, plan, "fast", results, load, console)
    for _ in range(plan.bends):
        plan = plan._replace(scales=[*plan.scales, bend(results, plan.scales)])
        evaluate_scales(folder, plan, "fast", results, load, console)
    # the record may hold scales of an earlier dial, which are not asked for
    evidence = {f"fast {scale:g}": results[f"fast {scale:g}"] for scale in plan.scales}
    plan = plan._replace(bends=0, with_replies=plan.with_replies or scales_for_replies(evidence))
    evaluate_scales(folder, plan, "quick", results, load, console)
    return results, plan


class Dialled(NamedTuple):
    """A loaded run and what it is asked at every scale."""

    model: Any
    tokenizer: Any
    adapter: Json
    """The adapter's checksums, by which a later dial knows whether results are about it."""
    questions: dict[str, Any]


def load_dialled(folder: Path, console: Console) -> Dialled:
    """A run's model with its adapter, and its questions."""
    recipe = recipes.of_run(folder)
    manifest = read_json(folder / "manifest.json")
    questions = asked(recipe, manifest)
    with models.loading(recipe.model, console):
        model, tokenizer = models.load_run(folder)
    return Dialled(model, tokenizer, manifest.get("adapter"), questions)


def evaluate_scales(
    folder: Path,
    plan: Plan,
    level: str,
    results: Results,
    load: Callable[[], Dialled],
    console: Console,
) -> None:
    """Add what is missing at a level to the results; each is written at once."""
    scales = plan.scales if level == "fast" else plan.with_replies
    missing = [scale for scale in scales if f"{level} {scale:g}" not in results]
    if not missing:
        return
    run = load()
    questions = {**run.questions, "questions_per_mode": None} if level == "fast" else run.questions
    with Progress(console, f"{folder.name}, {level} evidence, scales", len(missing)) as progress:
        for scale in missing:
            with plan.at(run.model, scale):
                result = evaluate(run.model, run.tokenizer, level=level, console=Console(quiet=True), **questions)
            if scale == 1.0:
                check_changed(folder.name, result)
            results[f"{level} {scale:g}"] = result
            write_json(folder / plan.record, {"adapter": run.adapter, "scales": results})
            progress.advance(1)


def bend(results: Results, scales: Sequence[float]) -> float:
    """The middle of the interval, from the base up to the run itself, across which gain in held-out loss and KL change most,
    each as a share of all its change there. Beyond the run KL always grows fastest, and nothing is decided there."""
    places = [0.0, *sorted(scale for scale in scales if scale <= 1)]
    curve = [(0.0, 0.0)]
    for scale in places[1:]:
        result = results[f"fast {scale:g}"]
        curve.append((held_out_gain(result), result["tuned"]["forgetting"]["kl"]["value"] or 0.0))
    changes = np.abs(np.diff(curve, axis=0))
    shares = changes / np.maximum(changes.sum(axis=0), NOTHING)
    most = int(shares.sum(axis=1).argmax())
    return (places[most] + places[most + 1]) / 2


def scales_for_replies(results: Results) -> list[float]:
    """The run itself, and the smallest scales that keep WORTH of the largest gain in held-out loss: replies elsewhere would
    cost time and could not be recommended."""
    gains = {float(key.split()[1]): held_out_gain(result) for key, result in results.items() if key.startswith("fast")}
    worth = [scale for scale, gain in sorted(gains.items()) if gain >= WORTH * max(gains.values())]
    return sorted({1.0, *worth[: WITH_REPLIES - 1]})


def held_out_gain(result: Evaluation) -> float:
    """By how much the loss on held-out rows fell, in nats per token, averaged over sources and modes; 0 without any."""
    changes = result["difference"]["forgetting"].items()
    known = [-change["value"] for metric, change in changes if metric.startswith(LOSS) and change["value"] is not None]
    return sum(known) / len(known) if known else 0.0


def asked(recipe: recipes.Recipe, manifest: Content) -> dict[str, Any]:
    """What is asked at every scale: the run's own questions and held-out rows, as many as in a sweep."""
    mixed = mix.of_run(recipe, dict(manifest))
    reasoning, chat = questions_of(recipe, mixed)
    held_out = from_mix(mixed)
    return {
        "questions": reasoning,
        "chat_questions": chat,
        "validation": held_out["validation"],
        "limits": held_out["limits"],
        "max_new_tokens": recipe.evaluate.max_new_tokens,
        "steps": manifest.get("steps"),
        "questions_per_mode": recipe.evaluate.questions_per_mode or QUESTIONS["quick"],
    }


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
    result = results.get(f"quick {scale:g}") or results[f"fast {scale:g}"]
    recipe = recipes.read_values(folder / "recipe.yaml")
    mixed = read_json(folder / "mix.json")
    run = run_of(folder.name, recipe, mixed, read_json(folder / "manifest.json"), result)
    return replace(run, folder=folder, trained={**run.trained, axis: scale})


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
