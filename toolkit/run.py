"""Read this first: the steps of a run, composed. What the command line and the notebooks both call.

folder = train(recipes.load("data_recipes/pocket.yaml")); result = evaluate(folder)

The way of a run: preflight → compile_mix → load, attach LoRA → train → evaluate.
"""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from toolkit import recipe as recipes
from toolkit.files import ToolkitError, lock, outputs, read_json, write_json
from toolkit.recipe import Recipe
from toolkit.training import tracking
from toolkit.view.progress import working

if TYPE_CHECKING:
    from toolkit.data.mix import Mix
    from toolkit.training.record import RunRecorder


def default_console() -> Console:
    """Where people read: colours on a terminal and in a notebook, plain wide text in a pipe."""
    console = Console(highlight=False)
    piped = not (console.is_terminal or console.is_jupyter)
    return Console(highlight=False, soft_wrap=True, width=160) if piped else console


def pinned(console: Console | None) -> Console:
    """A console, or the default one, that keeps printing where it does now while the libraries' output goes to the log."""
    console = console or default_console()
    console.file = console.file
    return console


def train(recipe: Recipe, console: Console | None = None, *, fresh: bool = False, score: bool = True,
          details: bool = False) -> Path:  # fmt: skip
    """Check, compile, load, train, evaluate; ends with before and after and the next command. Returns the run's folder.

    An unfinished run of the same recipe resumes from its last checkpoint; a finished one is left as it is.
    """
    from toolkit.training import folder as folders

    console = pinned(console)
    # accelerate starts this function in every process; one of them talks
    is_main = folders.is_main()
    console.quiet = console.quiet or not is_main
    with working(console, f"checking {recipe.name}"):
        recipe = preflight(recipe, console)
    folder = outputs() / recipe.name
    # only the first process takes the lock, since the others work in the same folder with it
    held = lock(folder, "train") if is_main else contextlib.nullcontext()
    with held, folders.recorded(folder):
        with folders.main_first():
            folder, state = folders.open_run(recipe, fresh=fresh and is_main)
            is_trained = state == "finished"
            if is_trained and (scored(folder) or not score):
                console.print(
                    f"{folder} is finished already: `python -m toolkit evaluate {recipe.name}` scores it again"
                )
                return folder
            # the first process compiles the mix, the others then read it from the cache
            mixed = None if is_trained else compile_mix(recipe, console)
        loaded = train_adapter(recipe, mixed, console) if mixed else None
        if is_main:
            conclude(folder, console, loaded, score=score, details=details)
    return folder


def conclude(folder: Path, console: Console, loaded: tuple[Any, Any] | None, *, score: bool, details: bool) -> None:
    """What is said of a trained run, with its evaluation where `score`."""
    from toolkit.view import trained

    trained.report(folder, console)
    if score:
        evaluate(folder, console, loaded=loaded, details=details)
    else:
        console.print(f"the run: {folder}\nnext:    python -m toolkit evaluate {folder.name}")


def preflight(recipe: Recipe, console: Console) -> Recipe:
    """All that can be known to fail before the first row is read: trackers, compiler, model, export.

    Returns the recipe with the model that is really loaded. Raises ToolkitError."""
    from toolkit.export.preflight import findings
    from toolkit.machine import choose, doctor
    from toolkit.training import parent

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
    from toolkit.machine.choose import auto_model
    from toolkit.training.model import really_loaded

    name = recipe.model.model_name
    if name == "auto":
        loaded, why = auto_model(recipe)
    else:
        loaded, why = really_loaded(recipe.model), f"what Unsloth loads for {name}"
    if loaded != name:
        console.print(f"model: {loaded} ({why})")
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, model_name=loaded))


def compile_mix(
    recipe: Recipe, console: Console | None = None, *, fresh: bool = False, next_command: str = ""
) -> "Mix":
    """The recipe's mix, shown: a verdict, shares planned and achieved, drops by reason, warnings."""
    from toolkit.data import mix
    from toolkit.view import trained

    console = console or default_console()
    with working(console, "compiling the mix"):
        mixed = mix.compile_mix(recipe, fresh=fresh)
    trained.print_mix(mixed.report, console, next_command)
    return mixed


def train_adapter(recipe: Recipe, mixed: "Mix", console: Console) -> tuple[Any, Any]:
    """Load, attach LoRA, train; returns (model, tokenizer), ready to be scored."""
    from toolkit.machine import choose
    from toolkit.training import model as models
    from toolkit.training import trainer
    from toolkit.training.folder import is_main

    with working(console, "measuring the speed of this machine"):
        planned = choose.say_hours(recipe, mixed, console.print) if is_main() else None
    with models.loading(recipe.model, console):
        model, tokenizer = models.load_base(recipe.model)
        model = models.attach(model, recipe.lora, seed=recipe.data.seed)
    if model.device.type != model.get_input_embeddings().weight.device.type:
        console.print("· GPU memory is tight: Unsloth keeps the input embedding in main memory")
    trainer.train(recipe, mixed, model, tokenizer, functools.partial(recorder, mixed=mixed, console=console), console)
    if planned:
        choose.record_hours(outputs() / recipe.name, planned)
    return model, tokenizer


def recorder(recipe: Recipe, mixed: "Mix", console: Console | None = None) -> "RunRecorder":
    """A callback for SFTTrainer that keeps the run of a recipe, with all that later stages add to it."""
    from toolkit.evaluation.questions import from_mix
    from toolkit.evaluation.watch import Forgetting, answer_prompts
    from toolkit.machine.choose import compared_memory
    from toolkit.training.folder import is_main
    from toolkit.training.model import unsloth
    from toolkit.training.record import RunRecorder, Stages
    from toolkit.view.figures import keep_mix_picture

    unsloth()  # before transformers, which it patches
    if is_main():
        keep_mix_picture(recipe, mixed)
    section = recipe.evaluate
    forgetting = None
    if section.forgetting_probes:
        rows = from_mix(mixed)["validation"] if section.keep_best_by == "accuracy" else []
        forgetting = Forgetting(section.forgetting_probes, rows, outputs() / ".base_replies")
    limit = min(256, section.max_new_tokens or 256)
    stages = Stages(
        replies=functools.partial(answer_prompts, prompts=section.prompts, max_new_tokens=limit, seed=recipe.data.seed),
        memory=functools.partial(compared_memory, recipe, max(len(row.ids) for row in mixed.train)),
        forgetting=forgetting,
    )
    return RunRecorder(recipe, mixed, pinned(console), stages)


def evaluate(folder: str | Path, console: Console | None = None, *, level: str | None = None, minutes: float | None = None,
             loaded: tuple[Any, Any] | None = None, details: bool = False) -> dict[str, Any]:  # fmt: skip
    """Score a run against its own base; writes eval.json, report.html and the wandb summary, prints verdict and next command.

    `details` prints the table of all metrics too; `loaded` is (model, tokenizer) right after training,
    `minutes` the time for replies."""
    from toolkit.data import mix
    from toolkit.evaluation import earlier, measure
    from toolkit.evaluation.questions import from_mix, questions_of
    from toolkit.training import model as models
    from toolkit.view import page, trained

    console = pinned(console)
    folder = models.run_folder(folder)
    with lock(folder, "evaluate"), working(console, f"scoring {folder.name}"):
        recipe = recipes.of_run(folder)
        section = recipe.evaluate
        if loaded is None:
            with models.loading(recipe.model, console):
                loaded = models.load_run(folder)
        manifest = read_json(folder / "manifest.json")
        # the rows of the training itself: held-out rows of another mix may be among those it trained on
        mixed = mix.of_run(recipe, manifest)
        held_out = from_mix(mixed)
        questions, chat_questions = questions_of(recipe, mixed)
        model, tokenizer = loaded
        result = measure.evaluate(
            model,
            tokenizer,
            questions=questions,
            chat_questions=chat_questions,
            validation=held_out["validation"],
            own_rows=held_out["own_rows"],
            limits=held_out["limits"],
            # the questions depend on it, so it is written into the result and compared by `compare`
            level=level or section.level,
            steps=manifest.get("steps"),
            minutes=minutes or section.minutes,
            train_seconds=manifest.get("train_seconds"),
            # whoever names a level or a time at the command line asks for more than the recipe fixes
            questions_per_mode=None if level or minutes else section.questions_per_mode,
            max_new_tokens=section.max_new_tokens,
            console=console,
        )
        earlier.add_earlier(result, loaded, folder, held_out["validation"], console)
        write_json(result_file(folder, result), result)
        page.write(folder)
        tracking.TRACKER.finish(recipe, folder, measure.summary(result), result.get("samples", []), console)
    trained.print_result(result, folder, console, details=details)
    return result


def result_file(folder: Path, result: dict[str, Any]) -> Path:
    """eval.json; a file beside it for fast evidence of a run with replies, which it does not replace: they were paid for."""
    is_fast = result["level"] == "fast"
    has_replies = scored(folder) and read_json(folder / "eval.json").get("level") != "fast"
    return folder / ("eval-fast.json" if is_fast and has_replies else "eval.json")


def scored(folder: Path) -> bool:
    """Whether a run has an evaluation that can be read."""
    try:
        return {"base", "tuned", "difference"} <= read_json(folder / "eval.json").keys()
    except ToolkitError:
        return False
