"""The steps of a run, composed: what the command line and the notebooks both call.

folder = train(recipe.load("data_recipes/pocket.yaml")); result = evaluate(folder)
"""

import dataclasses
import json
import os
import time
from pathlib import Path

from toolkit import recipe as recipes
from toolkit import tracking
from toolkit.files import outputs, read_json, write_json
from toolkit.recipe import Recipe

HUB = "https://huggingface.co"


def default_console():
    """Where people read: colours on a terminal and in a notebook, plain wide text in a pipe."""
    from rich.console import Console

    console = Console(highlight=False)
    piped = not (console.is_terminal or console.is_jupyter)
    return Console(highlight=False, soft_wrap=True, width=160) if piped else console


def default_recipe() -> tuple[str, str]:
    """(recipe, why): `hybrid` where there is a CUDA card and the Hub answers, else `pocket`."""
    import torch

    if not torch.cuda.is_available():
        return "data_recipes/pocket.yaml", "no CUDA card here: the pocket Qwen3 that ships with the package, on the CPU"
    if not hub_answers():
        return "data_recipes/pocket.yaml", "the Hub does not answer: the pocket Qwen3 that ships with the package"
    return "data_recipes/hybrid.yaml", f"{torch.cuda.get_device_name(0)} and the Hub answers"


def hub_answers(seconds: float = 3.0) -> bool:
    """Whether huggingface.co answers; never asked when HF_HUB_OFFLINE is set."""
    import urllib.error
    import urllib.request

    if os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"}:
        return False
    try:
        with urllib.request.urlopen(os.environ.get("HF_ENDPOINT", HUB), timeout=seconds):
            return True
    except (urllib.error.URLError, OSError, ValueError):
        return False


def resolve(recipe: Recipe, console) -> Recipe:
    """`model_name: auto` becomes the largest Qwen3 that fits the card with this recipe, and says so."""
    if recipe.model.model_name != "auto":
        return recipe
    import torch

    from toolkit import fit

    if not torch.cuda.is_available():
        name = "pocket"
        console.print("model: pocket (no CUDA card for a larger one)")
    else:
        memory = torch.cuda.get_device_properties(0).total_memory
        name = fit.choose_model(memory, recipe)
        console.print(f"model: {name} (the largest Qwen3 that fits {memory / 2**30:.1f} GiB with this recipe)")
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, model_name=name))


def compile_mix(recipe: Recipe, console=None, *, fresh: bool = False, next_command: str = ""):
    """The recipe's mix, shown: a verdict, shares planned and achieved, drops by reason, warnings."""
    from toolkit import mix, show

    console = console or default_console()
    mixed = mix.compile_mix(recipe, fresh=fresh)
    console.print(show.verdict(mixed.report), style="bold")
    if next_command:
        console.print(f"next: {next_command}", markup=False)
    console.print(show.mix_table(mixed.report, console.width))
    for note in show.notes(mixed.report):
        console.print(f"· {note}", style="yellow" if note.startswith("warning") else None)
    return mixed


def train(recipe: Recipe, console=None, *, fresh: bool = False, score: bool = True, details: bool = False) -> Path:
    """Compile, load, train, evaluate; ends with before and after in both modes. Returns the run's folder.

    An unfinished run of the same recipe goes on where it stopped; a finished one is left as it is.
    """
    from toolkit import train as training

    console = console or default_console()
    if not training.is_main():
        console.quiet = True  # under accelerate every process runs this function; one of them talks
    recipe = resolve(recipe, console)
    if training.is_main():
        tracking.check(recipe.train, outputs() / recipe.name, console.print)
    with training.main_first():
        folder, state = training.claim(recipe, fresh=fresh and training.is_main())
        if state != "finished":
            mixed = compile_mix(recipe, console)
    if state == "finished" and (not score or (folder / "eval.json").is_file()):
        if score and training.is_main():
            log_evaluation(recipe, folder, console)  # a kill may have come between eval.json and wandb
        console.print(f"{folder} is finished already: `python -m toolkit evaluate {recipe.name}` scores it again")
        return folder
    loaded = None
    if state != "finished":
        from toolkit import model as models

        clock = {"mix": time.time()}
        console.print(f"loading {recipe.model.model_name} …")
        model, tokenizer = models.load_base(recipe.model)
        model = models.attach(model, recipe.lora, seed=recipe.data.seed)
        clock["model"] = time.time()
        training.train(recipe, mixed, model, tokenizer, folder, console, clock)
        loaded = model, tokenizer
    if training.is_main():
        report(folder, console)
        if score:
            evaluate(folder, console, loaded=loaded, details=details)
        else:
            console.print(f"the run: {folder}\nnext:    python -m toolkit evaluate {folder.name}")
    return folder


def evaluate(folder: str | Path, console=None, *, level: str | None = None, loaded=None, details: bool = False) -> dict:
    """Score a run against its own base; writes eval.json and the wandb summary, prints the verdict, with `details` after
    the whole table."""
    from toolkit import evaluate as evaluation
    from toolkit import mix
    from toolkit import model as models
    from toolkit.evaluate.questions import LEVELS, from_mix

    console = console or default_console()
    folder = models.run_folder(folder)
    recipe = recipes.load(folder / "recipe.yaml")
    model, tokenizer = loaded or models.load_run(folder)
    mixed = mix.compile_mix(recipe)
    level = level or recipe.evaluate.level
    reasoning, chat = questions(recipe, mixed)
    result = evaluation.evaluate(
        model,
        tokenizer,
        reasoning,
        chat,
        None,
        from_mix(mixed)["validation"],
        level=level,
        steps=read_json(folder / "manifest.json").get("steps"),
        max_new_tokens=min(recipe.evaluate.max_new_tokens, LEVELS[level].max_new_tokens),
        batch_size=generation_batch(recipe, mixed),
        console=console,
    )
    write_json(folder / "eval.json", result)
    if details:
        console.print(evaluation.table(result, console.width))
    log_evaluation(recipe, folder, console)
    for line in result["verdict"]:
        console.print(line)
    worse = result["verdict"][-1].startswith(("result: WORSE", "result: BROKEN"))
    following = "evaluate {0} --details" if worse else "chat {0}   or   python -m toolkit export {0}"
    console.print(f"the run: {folder}\nnext:    python -m toolkit {following.format(folder.name)}")
    return result


def log_evaluation(recipe: Recipe, folder: Path, console) -> None:
    """Send a run's eval.json to wandb, unless that was done before."""
    from toolkit import evaluate as evaluation

    result = read_json(folder / "eval.json")
    tracking.finish(recipe, folder, evaluation.summary(result), result.get("samples", []), console)


def generation_batch(recipe: Recipe, mixed) -> int:
    """How many replies fit on the card at once; 32 on a CPU."""
    import torch

    from toolkit import fit

    if not torch.cuda.is_available():
        return 32
    planned = fit.forecast(fit.settings(recipe, max(len(r.ids) for r in mixed.train)), recipe.model.model_name)
    return fit.generation_batch(planned, torch.cuda.get_device_properties(0).total_memory)


def questions(recipe: Recipe, mixed) -> tuple[list[dict] | None, list[dict] | None]:
    """(reasoning, chat) questions: the recipe's sets; without any, held-out rows that carry an expected answer; None for
    those that ship."""
    from toolkit.evaluate.questions import from_mix, read_questions

    if not recipe.evaluate.questions:
        return from_mix(mixed)["questions"], None
    found: tuple[list, list] = ([], [])
    for source in recipe.evaluate.questions:
        found[source.mode == "non_thinking"].extend(read_questions(source, recipe.data.seed, recipe.data.placeholders))
    return found


def report(folder: Path, console) -> None:
    """What a training ends with: the fixed prompts before and after, speed, memory."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    console.print(before_after(rows))
    console.print(
        f"{manifest['steps']} steps in {manifest['train_seconds']:.0f} s, {manifest['tokens_per_second']:,.0f} tokens/s, "
        f"{manifest['supervised_tokens_per_second']:,.0f} supervised tokens/s, "
        f"peak memory {manifest['peak_memory_bytes'] / 2**30:.2f} GiB"
    )


def before_after(rows: list[dict]):
    """A table of the fixed prompts' replies before and after training, in both modes."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="the same prompts before and after", title_justify="left", show_lines=True)
    for column in ("prompt", "mode", "before", "after"):
        table.add_column(column)
    asked = {(r["prompt"], r["mode"]): {} for r in rows}
    for row in rows:
        thought = row["reasoning"] + "\n" * bool(row["reasoning"])
        answer = row["answer"] or "(nothing)"
        asked[row["prompt"], row["mode"]][row["when"]] = Text.assemble((thought, "bright_black"), answer)
    for (prompt, mode), reply in asked.items():
        table.add_row(prompt, mode.replace("_", "-"), reply.get("before"), reply.get("after"))
    return table
