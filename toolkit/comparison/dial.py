"""How much of a trained adapter to keep, chosen after training: from the base (scale 0) to a little beyond the run.

from toolkit.comparison import dial; dial.dial([Path("outputs/pocket")])

A LoRA layer adds `scaling` times its update to its weight. Multiplied by a scale, the model moves on the line from base to
tuned without training, and an export at that scale is `lora_alpha` times the scale. The rule is that of `decide`.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from toolkit import recipe as recipes
from toolkit.comparison.decide import SCALE, Comparison, decide, usual_goal
from toolkit.comparison.points import point
from toolkit.comparison.report import conclude
from toolkit.comparison.runs import Content, Run, changed_keys, run_of
from toolkit.comparison.sweep import QUESTIONS
from toolkit.data import mix
from toolkit.evaluation.measure import evaluate
from toolkit.evaluation.questions import from_mix, questions_of
from toolkit.export.checkpoint import check_scale
from toolkit.files import ToolkitError, flat, read_json, write_json
from toolkit.records import Evaluation
from toolkit.run import default_console
from toolkit.training import model as models
from toolkit.view.progress import Progress

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)
"""Scale 0 is the base, which every evaluation measures beside."""
NOTHING = 1e-6
"""Nats of KL below which an adapter changes nothing."""
MAY_DIFFER = re.compile(r"name$|data\.seed$|export\b|evaluate\.prompts\b|train\.(report_to|logging_steps)\b")
"""Recipe keys in which runs that are averaged may differ: the seed, and what changes neither training nor questions."""


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
    beyond = ", ".join(map(str, config.modules_to_save or config.trainable_token_indices or ()))
    if config.bias != "none":
        beyond = f"bias={config.bias}"
    faults = {
        "the model has no LoRA layer: there is nothing to scale": not layers,
        "the adapter is merged into the base already: load the run again": any(layer.merged for layer in layers),
        "a DoRA adapter trains the length of each weight too, which no scale takes back": config.use_dora,
        f"the run trained more than its LoRA ({beyond}), which a scale does not reach": beyond,
    }
    for fault, found in faults.items():
        if found:
            raise ToolkitError(fault)
    return layers


# --- a run at every scale --------------------------------------------------------------------------------------------


def dial(
    runs: Sequence[str | Path],
    *,
    scales: Sequence[float] = SCALES,
    console: Console | None = None,
    out: Path | None = None,
) -> Comparison:
    """Measure a run at every scale and recommend one; several runs are one recipe with other seeds, and are averaged.

    Picture and numbers go to the folder NAME-dial in the run's own, or to `out`; what was measured is kept in dial.json, so
    that the same command resumes it. Raises ToolkitError for a run that changed nothing."""
    console = console or default_console()
    for scale in scales:
        check_scale(scale)
    # 1 first: a run that changed nothing stops before the other scales are measured
    scales = [1.0, *sorted({float(scale) for scale in scales} - {0.0, 1.0})]
    # the same run by two spellings is one training, not two seeds
    folders = list(dict.fromkeys(map(finished_run, runs)))
    check_same_training([recipes.of_run(folder) for folder in folders])
    members = [measure(folder, scales, console) for folder in folders]
    comparison = compare_scales(members, sorted(scales))
    first = folders[0]
    conclude(comparison, console, out or first / f"{first.name}-dial")
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


def measure(folder: Path, scales: Sequence[float], console: Console) -> dict[float, Run]:
    """The run at each scale: evaluated alike, and not again where that was done before."""
    manifest = read_json(folder / "manifest.json")
    results: dict[str, Any] = {}
    with contextlib.suppress(ToolkitError):  # none yet, or damaged: then all is measured again
        kept = read_json(folder / "dial.json")
        # what was measured of another adapter says nothing of this one
        results = kept.get("scales", {}) if kept.get("adapter") == manifest.get("adapter") else {}
    missing = [scale for scale in scales if f"{scale:g}" not in results]
    if missing:
        recipe = recipes.of_run(folder)
        questions = asked(recipe, manifest)
        with models.loading(recipe.model, console):
            model, tokenizer = models.load_run(folder)
        with Progress(console, f"{folder.name}, scales", len(missing)) as progress:
            for scale in missing:
                with scaled(model, scale):
                    result = evaluate(model, tokenizer, console=Console(quiet=True), **questions)
                if scale == 1.0:
                    check_changed(folder.name, result)
                results[f"{scale:g}"] = result
                write_json(folder / "dial.json", {"adapter": manifest.get("adapter"), "scales": results})
                progress.advance(1)
    return {scale: at_scale(folder, scale, results[f"{scale:g}"]) for scale in scales}


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


def at_scale(folder: Path, scale: float, result: Content) -> Run:
    """The run at a scale, of which the scale is a setting like those of its recipe."""
    recipe = recipes.read_values(folder / "recipe.yaml")
    mixed = read_json(folder / "mix.json")
    run = run_of(folder.name, recipe, mixed, read_json(folder / "manifest.json"), result)
    return replace(run, trained={**run.trained, SCALE: scale})


def compare_scales(members: Sequence[Mapping[float, Run]], scales: Sequence[float]) -> Comparison:
    """The scales as points of one comparison."""
    goal = usual_goal(list(members[0].values()))
    points = [point([member[scale] for member in members], SCALE) for scale in scales]
    if not any(goal in point.values for point in points):
        raise ToolkitError("no question was answered to the end at any scale: set evaluate.max_new_tokens higher")
    note = "One training: another seed may keep less or more at the same scale (dial RUN RUN RUN averages seeds)."
    if len(members) > 1:
        names = ", ".join(run.name for run in points[0].runs)
        note = f"Means over {len(members)} trainings: {names}."
    return decide(points, goal, SCALE, [note], {})
