"""Read this first: the steps of a run, as the command line and the notebooks call them.

folder = train(recipes.load("data_recipes/pocket.yaml")); result = evaluate(folder)

preflight → compile_mix → load, attach LoRA → train → evaluate
"""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from toolkit import recipe as recipes
from toolkit.data import mix
from toolkit.evaluation import earlier, measure, watch
from toolkit.evaluation.questions import asked_of
from toolkit.export.preflight import findings
from toolkit.files import lock, outputs, read_json
from toolkit.machine import choose, doctor
from toolkit.recipe import Recipe
from toolkit.records import Evaluation
from toolkit.training import folder as folders
from toolkit.training import model as models
from toolkit.training import parent, tracking, trainer
from toolkit.view import figures, page, trained
from toolkit.view.progress import default_console, pinned, working

if TYPE_CHECKING:
    from toolkit.training.record import RunRecorder


def train(recipe: Recipe, console: Console | None = None, *, fresh: bool = False, score: bool = True,
          details: bool = False) -> Path:  # fmt: skip
    """Check, compile, load, train, evaluate; ends with before and after and the next command. Returns the run's folder.

    An unfinished run of the same recipe resumes from its last checkpoint; a finished one is left as it is."""
    console = pinned(console)
    # accelerate starts this function in every process; one of them talks
    console.quiet = console.quiet or not folders.is_main()
    with working(console, f"checking {recipe.name}"):
        recipe = preflight(recipe, console)
    loaded = None
    with folders.recorded(outputs() / recipe.name):
        with folders.main_first():
            folder, state = folders.open_run(recipe, fresh=fresh)
            if state == "finished" and (measure.scored(folder) or not score):
                again = f"`python -m toolkit evaluate {recipe.name}` scores it again"
                console.print(f"{folder} is finished already: {again}")
                return folder
            # the first process compiles the mix, the others then read it from the cache
            mixed = compile_mix(recipe, console) if state != "finished" else None
        if mixed:
            loaded = train_adapter(recipe, mixed, console)
        if folders.is_main():
            trained.report(folder, console)
            if score:
                evaluate(folder, console, loaded=loaded, details=details)
            else:
                console.print(f"the run: {folder}\nnext:    python -m toolkit evaluate {folder.name}")
    return folder


def preflight(recipe: Recipe, console: Console) -> Recipe:
    """All that can be known to fail before the first row is read: trackers, compiler, model, export.

    Returns the recipe with the model that is really loaded. Raises ToolkitError."""
    tracking.check(recipe.train)
    doctor.check_compiler(choose.has_card())
    recipe = resolve(recipe, console)
    parent.checked(recipe)
    # not at the export, after hours of training
    for finding in findings(recipe):
        console.print(f"· {finding}", markup=False)
    return recipe


def resolve(recipe: Recipe, console: Console) -> Recipe:
    """The recipe with the model that is really loaded, which is said where it differs: `auto` becomes the largest Qwen3
    that fits the card, a Hub name what Unsloth loads for it. The mix, the run and its export then agree on one name."""
    name = recipe.model.model_name
    if name == "auto":
        loaded, why = choose.auto_model(recipe)
    else:
        loaded, why = models.really_loaded(recipe.model), f"what Unsloth loads for {name}"
    if loaded != name:
        console.print(f"model: {loaded} ({why})")
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, model_name=loaded))


def compile_mix(
    recipe: Recipe, console: Console | None = None, *, fresh: bool = False, next_command: str = ""
) -> mix.Mix:
    """The recipe's mix, shown: a verdict, shares planned and achieved, drops by reason, warnings."""
    console = console or default_console()
    with working(console, "compiling the mix"):
        mixed = mix.compile_mix(recipe, fresh=fresh)
    trained.print_mix(mixed.report, console, next_command)
    return mixed


def train_adapter(recipe: Recipe, mixed: mix.Mix, console: Console) -> models.Loaded:
    """Load, attach LoRA, train; returns (model, tokenizer), ready to be scored."""
    with working(console, "measuring the speed of this machine"):
        planned = choose.say_hours(recipe, mixed, console.print) if folders.is_main() else None
    with models.loading(recipe.model, console):
        model, tokenizer = models.load_base(recipe.model)
        model = models.attach(model, recipe.lora, seed=recipe.data.seed)
    trainer.train(recipe, mixed, model, tokenizer, functools.partial(recorder, mixed=mixed, console=console), console)
    if planned:
        choose.record_hours(outputs() / recipe.name, planned)
    return model, tokenizer


def recorder(recipe: Recipe, mixed: mix.Mix, console: Console | None = None) -> "RunRecorder":
    """A callback for SFTTrainer that keeps the run of a recipe, with all that later stages add to it."""
    models.unsloth()  # before transformers, which it patches
    from toolkit.training.record import RunRecorder, Stages

    if folders.is_main():
        figures.keep_mix_picture(recipe, mixed)
    stages = Stages(
        replies=watch.replies(recipe),
        memory=functools.partial(choose.compared_memory, recipe, mixed),
        forgetting=watch.forgetting(recipe, mixed),
    )
    return RunRecorder(recipe, mixed, pinned(console), stages)


def evaluate(folder: str | Path, console: Console | None = None, *, level: str | None = None, minutes: float | None = None,
             loaded: models.Loaded | None = None, details: bool = False) -> Evaluation:  # fmt: skip
    """Score a run against its own base; writes eval.json, report.html and the wandb summary, prints verdict and next command.

    `loaded` is (model, tokenizer) right after training, `minutes` the time for replies; `details` prints every metric too."""
    console = pinned(console)
    folder = models.run_folder(folder)
    with lock(folder, "evaluate"), working(console, f"scoring {folder.name}"):
        recipe = recipes.of_run(folder)
        if loaded is None:
            with models.loading(recipe.model, console):
                loaded = models.load_run(folder)
        asked = asked_of(recipe, read_json(folder / "manifest.json"), level, minutes)
        result = measure.evaluate(*loaded, **asked, console=console)
        earlier.add_earlier(result, loaded, folder, asked["validation"], console)
        measure.write(folder, result)
        page.write(folder)
        tracking.TRACKER.finish(recipe, folder, measure.summary(result), result["samples"], console)
    trained.print_result(result, folder, console, details=details)
    return result
