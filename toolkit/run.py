"""Read this first: the steps of a run, composed. What the command line and the notebooks both call.

folder = train(recipes.load("data_recipes/pocket.yaml")); result = evaluate(folder)

The way of a run: recipe → resolve (which model) → compile_mix → load, attach LoRA → train → report → evaluate.
"""

import contextlib
import dataclasses
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from toolkit import recipe as recipes
from toolkit.files import ToolkitError, lock, outputs, read_json, write_json, write_text
from toolkit.recipe import Recipe
from toolkit.training import tracking


def default_console():
    """Where people read: colours on a terminal and in a notebook, plain wide text in a pipe."""
    from rich.console import Console

    console = Console(highlight=False)
    piped = not (console.is_terminal or console.is_jupyter)
    return Console(highlight=False, soft_wrap=True, width=160) if piped else console


def train(recipe: Recipe, console=None, *, fresh: bool = False, score: bool = True, details: bool = False) -> Path:
    """Compile, load, train, evaluate; ends with before and after and the next command. Returns the run's folder.

    An unfinished run of the same recipe resumes from its last checkpoint; a finished one is left as it is.
    """
    from toolkit.machine import choose, doctor
    from toolkit.training import trainer as training
    from toolkit.view import trained

    console = console or default_console()
    console.file = console.file  # keep printing there while the libraries' output goes to the log
    # accelerate starts this function in every process; one of them talks
    console.quiet = console.quiet or not training.is_main()
    folder = outputs() / recipe.name
    if training.is_main():
        # before minutes of loading: a tracker's package that is missing, a network that is away
        tracking.check(recipe.train, folder, console.print)
        doctor.check_compiler(choose.has_card())
    recipe = resolve(recipe, console)
    # not at the export, after hours of training
    check_export(recipe, console)
    # only the first process takes the lock, since the others work in the same folder with it
    with lock(folder, "train") if training.is_main() else contextlib.nullcontext(), recorded(folder):
        with training.main_first():
            folder, state = training.claim(recipe, fresh=fresh and training.is_main())
            # the first process compiles the mix, the others then read it from the cache
            if state != "finished":
                mixed = compile_mix(recipe, console)
        if state == "finished" and (not score or scored(folder)):
            if score and training.is_main():  # a kill may have come right after eval.json was written
                write_card(folder)
                log_evaluation(recipe, folder, console)
            console.print(f"{folder} is finished already: `python -m toolkit evaluate {recipe.name}` scores it again")
            return folder
        loaded = _train(recipe, mixed, folder, console) if state != "finished" else None
        if training.is_main():
            trained.report(folder, console)
            if score:
                evaluate(folder, console, loaded=loaded, details=details)
            else:
                write_card(folder)
                console.print(f"the run: {folder}\nnext:    python -m toolkit evaluate {folder.name}")
    return folder


def _train(recipe: Recipe, mixed, folder: Path, console):
    """Load, attach LoRA, train; returns (model, tokenizer), ready to be scored."""
    from toolkit.machine import choose
    from toolkit.training import model as models
    from toolkit.training import trainer as training
    from toolkit.view.figures import keep_mix_picture

    planned = choose.say_hours(recipe, mixed, console.print) if training.is_main() else None
    with loading(recipe.model, console):
        model, tokenizer = models.load_base(recipe.model)
        model = models.attach(model, recipe.lora, seed=recipe.data.seed)
    if model.device.type != model.get_input_embeddings().weight.device.type:
        console.print("· GPU memory is tight: Unsloth keeps the input embedding in main memory")
    if training.is_main():
        keep_mix_picture(recipe, mixed, folder)
    training.train(recipe, mixed, model, tokenizer, folder, console)
    if planned:
        choose.record_hours(folder, planned)
    return model, tokenizer


def evaluate(folder: str | Path, console=None, *, level: str | None = None, minutes: float | None = None, loaded=None,
             details: bool = False) -> dict:  # fmt: skip
    """Score a run against its own base; writes eval.json and the wandb summary, prints the verdict and the next command.

    `details` prints the table of all metrics too; `loaded` is (model, tokenizer) right after training,
    `minutes` the time for replies."""
    from toolkit.data import mix
    from toolkit.evaluation import measure as evaluation
    from toolkit.evaluation import words
    from toolkit.evaluation.questions import from_mix
    from toolkit.training import model as models
    from toolkit.view import tables

    console = console or default_console()
    console.file = console.file
    folder = models.run_folder(folder)
    with lock(folder, "evaluate"):
        recipe = recipes.of_run(folder)
        if loaded is None:
            with loading(recipe.model, console):
                loaded = models.load_run(folder)
        manifest = read_json(folder / "manifest.json")
        # the rows of the training itself: held-out rows of another mix may be among those it trained on
        mixed = mix.of_run(recipe, manifest)
        own = from_mix(mixed)
        result = evaluation.evaluate(
            *loaded,
            *questions(recipe, mixed),
            validation=own["validation"],
            own_rows=own["own_rows"],
            limits=own["limits"],
            # the questions depend on it, so it is written into the result and compared by `compare`
            level=level or recipe.evaluate.level,
            steps=manifest.get("steps"),
            minutes=minutes or recipe.evaluate.minutes,
            train_seconds=manifest.get("train_seconds"),
            # whoever names a level or a time at the command line asks for more than the recipe fixes
            questions_per_mode=None if level or minutes else recipe.evaluate.questions_per_mode,
            max_new_tokens=recipe.evaluate.max_new_tokens,
            console=console,
        )
        write_json(evaluation_file(folder, result), result)
        write_card(folder)
        log_evaluation(recipe, folder, console)
    if details:
        console.print(tables.score_table(result))
    for line in [*words.own_rows_text(result), *result["verdict"]]:
        console.print(line, markup=False)
    # a run that lost something is looked at before it is exported
    worse = result["verdict"][-1].startswith(("result: WORSE", "result: BROKEN"))
    following = "chat {0}   or   python -m toolkit export {0}"
    if worse:
        following = "evaluate {0} --level full" if details else "evaluate {0} --details"
    name = folder.name if folder.parent == outputs() else folder
    console.print(f"the run: {folder}\nnext:    python -m toolkit {following.format(name)}")
    return result


def evaluation_file(folder: Path, result: dict) -> Path:
    """Where an evaluation is written: eval.json, but fast evidence does not replace replies that were paid for."""
    paid = scored(folder) and read_json(folder / "eval.json").get("level") != "fast"
    return folder / ("eval-fast.json" if paid and result["level"] == "fast" else "eval.json")


def check_export(recipe: Recipe, console) -> None:
    """Say before training that the run cannot be merged, or not become a GGUF; refuse it when the recipe asks for one by itself."""
    from toolkit.export.checkpoint import unmergeable
    from toolkit.export.gguf_types import convertible
    from toolkit.training.model import checkpoint_file

    settings = {key: recipe.lora.extra.get(key) for key in ("bias", "target_parameters")}
    if setting := unmergeable(settings | {"modules_to_save": recipe.lora.trained_whole}):
        console.print(
            f"· this run cannot be exported here ({setting}): merge it with PEFT's merge_and_unload", markup=False
        )
        return
    # a few kB, before the weights are downloaded
    config = checkpoint_file(recipe.model, "config.json")
    asked = recipe.export.quantization_method
    if not config or not asked:
        return
    tokenizer = checkpoint_file(recipe.model, "tokenizer.json") or None
    reason = convertible(config, tokenizer, checkpoint_file(recipe.model, "tokenizer_config.json"))
    if reason and asked != recipes.Export().quantization_method:
        raise ToolkitError(
            f"{recipe.model.model_name}: no GGUF conversion: {reason} Set export.quantization_method=[] "
            "(the run can still be exported as merged weights: --to merged)"
        )
    if reason:
        console.print(f"· this run can be exported as merged weights (--to merged), not as GGUF: {reason}")


def write_card(folder: Path) -> None:
    """adapter/README.md: the filled model card, with scores once there are some."""
    from toolkit.export.card import adapter_card

    write_text(folder / "adapter" / "README.md", adapter_card(folder))


def resolve(recipe: Recipe, console) -> Recipe:
    """The recipe with the model that is really loaded, which is said where it differs: `auto` becomes the largest Qwen3
    that fits the card, a Hub name what Unsloth loads for it. The mix, the run and its export then agree on one name."""
    asked = recipe.model.model_name
    if asked != "auto":
        from toolkit.training.model import really_loaded

        name = really_loaded(recipe.model)
        if name != asked:
            console.print(f"model: {name} (what Unsloth loads for {asked})")
        return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, model_name=name))
    from toolkit.machine.choose import auto_model

    name, why = auto_model(recipe)
    console.print(f"model: {name} ({why})")
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, model_name=name))


def scored(folder: Path) -> bool:
    """Whether a run has an evaluation that can be read."""
    try:
        return {"base", "tuned", "difference"} <= read_json(folder / "eval.json").keys()
    except ToolkitError:
        return False


@contextlib.contextmanager
def loading(section: recipes.Model, console) -> Iterator[None]:
    """Download what is missing, then say what is loaded while it lasts, and how long it took."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from toolkit.training.model import fetch

    fetch(section)
    name, began = section.model_name, time.monotonic()
    if not (console.is_terminal or console.is_jupyter):
        console.print(f"loading {name} …")
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    # sys.stderr stays what it is: `quiet` looks for it in the libraries' log handlers
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        bar.add_task(f"loading {name}")
        yield
    console.print(f"loaded {name} in {time.monotonic() - began:.0f} s")


@contextlib.contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Libraries' output and tracebacks of the block go to the run's run.log; a run that ends early says why in its
    manifest."""
    from toolkit.training.model import LOG

    LOG.folder = folder
    try:
        yield
    except BaseException as error:
        LOG.write("".join(traceback.format_exception(error)))
        error.add_note(f"log: {LOG.path}")
        _record_stop(folder, error)
        raise
    finally:
        LOG.folder = None


def _record_stop(folder: Path, error: BaseException) -> None:
    from toolkit.training.trainer import is_main, read_manifest

    made = read_manifest(folder)
    if not is_main() or made.get("state") != "running":
        return
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, KeyboardInterrupt):  # the command line passes SIGTERM and SIGHUP on as one with their number
        reason = f"interrupted by {signal.Signals(*error.args or [signal.SIGINT]).name}"
    with contextlib.suppress(ToolkitError):  # on a full disk the reason is on the screen only
        write_json(folder / "manifest.json", made | {"state": "stopped", "stopped": reason})


def compile_mix(recipe: Recipe, console=None, *, fresh: bool = False, next_command: str = ""):
    """The recipe's mix, shown: a verdict, shares planned and achieved, drops by reason, warnings."""
    from toolkit.data import mix
    from toolkit.view import tables

    console = console or default_console()
    mixed = mix.compile_mix(recipe, fresh=fresh)
    console.print(tables.verdict(mixed.report), style="bold", markup=False)
    if next_command:
        console.print(f"next: {next_command}", markup=False)
    console.print(tables.mix_table(mixed.report))
    for note in tables.notes(mixed.report):
        console.print(f"· {note}", style="yellow" if note.startswith("warning") else None, markup=False)
    return mixed


def log_evaluation(recipe: Recipe, folder: Path, console) -> None:
    """Send a run's eval.json to wandb, unless that was done before."""
    from toolkit.evaluation import measure as evaluation

    result = read_json(folder / "eval.json")
    tracking.finish(recipe, folder, evaluation.summary(result), result.get("samples", []), console)


def questions(recipe: Recipe, mixed) -> tuple[list[dict] | None, list[dict] | None]:
    """(reasoning, chat) questions: the recipe's sets; without any, held-out rows that carry an expected answer; None for
    those that ship."""
    from toolkit.evaluation.questions import from_mix, read_questions

    if not recipe.evaluate.questions:
        return from_mix(mixed)["questions"], None
    found: tuple[list, list] = ([], [])
    for source in recipe.evaluate.questions:
        found[source.mode == "non_thinking"].extend(read_questions(source, placeholders=recipe.data.placeholders))
    return found
