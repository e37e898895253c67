"""How much of a trained adapter to keep, chosen after training: from the base (scale 0) to a little beyond the run.

from toolkit.comparison import dial; dial.dial([Path("outputs/pocket")])

A LoRA layer adds `scaling` times its update to its weight. Multiplied by a scale, the model moves on the line from base to
tuned without training, and an export at that scale is `lora_alpha` times the scale. Every scale gets fast evidence
(held-out loss and KL, no generation); the few that may be recommended get replies too. The rule is that of `decide`.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from toolkit import recipe as recipes
from toolkit.comparison.decide import SCALE, Comparison, decide, usual_goal
from toolkit.comparison.points import point
from toolkit.comparison.report import conclude
from toolkit.comparison.runs import Run, changed_keys, run_of
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
WITH_REPLIES = 4
"""Scales that get replies, the run itself among them."""
WORTH = 0.5
"""Share of the largest gain in held-out loss from which a scale may be recommended, so that it gets replies."""
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


@dataclass
class Dialled:
    """One run and what was measured of it so far, kept in its dial.json."""

    folder: Path
    recipe: recipes.Recipe
    manifest: dict[str, Any]
    results: dict[str, Evaluation]
    """{`fast 0.5` or `quick 0.5`: the evaluation at that scale}."""

    def measure(self, level: str, scales: Sequence[float], console: Console) -> None:
        """Evaluate at each scale that was not measured before; every result is written at once."""
        missing = [scale for scale in scales if f"{level} {scale:g}" not in self.results]
        if not missing:
            return
        mixed = mix.of_run(self.recipe, self.manifest)
        questions, held_out = questions_of(self.recipe, mixed), from_mix(mixed)
        section = self.recipe.evaluate
        count = section.questions_per_mode or QUESTIONS["quick"]
        with models.loading(self.recipe.model, console):
            model, tokenizer = models.load_run(self.folder)
        with Progress(console, f"{self.folder.name}, {level} evidence, scales", len(missing)) as progress:
            for scale in missing:
                with scaled(model, scale):
                    self.results[f"{level} {scale:g}"] = evaluate(
                        model,
                        tokenizer,
                        *questions,
                        validation=held_out["validation"],
                        limits=held_out["limits"],
                        max_new_tokens=section.max_new_tokens,
                        level=level,
                        steps=self.manifest.get("steps"),
                        questions_per_mode=count if level == "quick" else None,
                        console=Console(quiet=True),
                    )
                kept = {"adapter": self.manifest.get("adapter"), "results": self.results}
                write_json(self.folder / "dial.json", kept)
                progress.advance(1)

    def at(self, scale: float) -> Run:
        """The run at a scale, by the most that was measured there."""
        result = self.results.get(f"quick {scale:g}") or self.results[f"fast {scale:g}"]
        values = recipes.read_values(self.folder / "recipe.yaml")
        run = run_of(self.folder.name, values, read_json(self.folder / "mix.json"), self.manifest, result)
        return replace(run, trained=run.trained | {SCALE: float(scale)})


def open_run(name: str | Path) -> Dialled:
    """A finished run's folder. Raises ToolkitError where there is none, or its adapter is damaged."""
    folder = models.run_folder(name).resolve()
    if not (folder / "recipe.yaml").is_file():
        raise ToolkitError(f"{folder}: a folder of export_model has no recipe, and so no questions to dial by")
    models.check_adapter(folder)
    manifest = read_json(folder / "manifest.json")
    kept: dict[str, Any] = {}
    with contextlib.suppress(ToolkitError):  # none yet, or damaged: then it is measured again
        kept = read_json(folder / "dial.json")
    # what was measured of another adapter says nothing of this one
    same = kept.get("adapter") == manifest.get("adapter")
    return Dialled(folder, recipes.of_run(folder), manifest, kept.get("results", {}) if same else {})


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
    scales = sorted({float(scale) for scale in scales if scale} | {1.0})
    for scale in scales:
        check_scale(scale)
    # the same run by two spellings is one training, not two seeds
    members = list({member.folder: member for member in map(open_run, runs)}.values())
    check_same_training(members)
    for member in members:
        member.measure("fast", scales, console)
        check_changed(member)
    chosen = scales_for_replies(members, scales)
    for member in members:
        member.measure("quick", chosen, console)
    comparison = compare_scales(members, scales)
    first = members[0].folder
    conclude(comparison, console, out or first / f"{first.name}-dial")
    return comparison


def check_same_training(members: Sequence[Dialled]) -> None:
    """Raises ToolkitError where runs differ in more than their seed: their scales cannot be averaged."""
    settings = [flat(recipes.to_dict(member.recipe)) for member in members]
    differing = [key for key in changed_keys(settings) if not MAY_DIFFER.match(key)]
    if differing:
        raise ToolkitError(f"dial averages over seeds of one recipe, but these runs differ in {', '.join(differing)}")


def check_changed(member: Dialled) -> None:
    """Raises ToolkitError for a run whose adapter does nothing, or breaks the model."""
    kl = member.results["fast 1"]["tuned"]["forgetting"]["kl"]["value"]
    name = member.folder.name
    if kl is None:
        raise ToolkitError(f"{name}: at scale 1 the model computes no numbers (NaN): its training diverged")
    if kl < NOTHING:
        raise ToolkitError(
            f"{name}: the adapter changes nothing (KL {kl:.1g} at scale 1), so there is nothing to dial. Train longer, or "
            "with a higher train.learning_rate"
        )


def scales_for_replies(members: Sequence[Dialled], scales: Sequence[float]) -> list[float]:
    """The run itself, and the smallest scales that keep WORTH of the largest gain in held-out loss: replies elsewhere
    would cost time and could not be recommended."""
    gains = dict.fromkeys(scales, 0.0)
    for member in members:
        for scale in scales:
            gains[scale] += held_out_gain(member.results[f"fast {scale:g}"])
    enough = [scale for scale in scales if gains[scale] >= WORTH * max(gains.values())]
    return sorted({1.0, *enough[: WITH_REPLIES - 1]})


def held_out_gain(result: Mapping[str, Any]) -> float:
    """By how much the loss on held-out rows fell, in nats per token, averaged over sources and modes; 0 without any."""
    fallen = [
        -change["value"]
        for metric, change in result["difference"]["forgetting"].items()
        if metric.startswith("loss/") and change["value"] is not None
    ]
    return sum(fallen) / len(fallen) if fallen else 0.0


def compare_scales(members: Sequence[Dialled], scales: Sequence[float]) -> Comparison:
    """The scales as points of one comparison; only those with replies can be recommended."""
    points = [point([member.at(scale) for member in members], SCALE) for scale in scales]
    goal = usual_goal([run for point in points for run in point.runs])
    silent = [point for point in points if goal not in point.values]
    if len(silent) == len(points):
        raise ToolkitError("no question was answered to the end at any scale: set evaluate.max_new_tokens higher")
    notes = ["One training: another seed may keep less or more at the same scale (dial RUN RUN RUN averages seeds)."]
    if len(members) > 1:
        names = ", ".join(member.folder.name for member in members)
        notes = [f"Means over {len(members)} trainings: {names}."]
    if silent:
        notes.append(f"Held-out loss and KL only, no replies: scale {', '.join(point.short for point in silent)}.")
    return decide(points, goal, SCALE, notes, {})
