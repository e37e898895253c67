"""What a notebook needs beside the pipeline: a choice by what is there, live curves, replies side by side.

path, *overrides = pick("data_recipes/quickstart.yaml", "data_recipes/pocket.yaml"); picture(figures.mix_figure(mixed))
"""

import contextlib
import functools
import gc
import os
import shlex
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import rich.jupyter

from toolkit import recipe as recipes
from toolkit.files import outputs, read_json
from toolkit.recipe import Recipe
from toolkit.view import figures
from toolkit.view.tables import ShownReply

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from toolkit.machine.fit import Forecast

REFRESH = 4.0
"""Seconds between two drawings of the live curves: one takes about a fifth of a second on a slow core."""
os.environ.setdefault("JUPYTER_COLUMNS", "100")  # what a cell shows of a window 1,280 pixels wide beside the file list
# JupyterLab sets every <pre> apart by a line or two, so a dozen printed lines would fill a screen; rich has no option
# for it. Below a line that can scroll something must be left, or its underscores are cut off
rich.jupyter.JUPYTER_HTML_FORMAT = rich.jupyter.JUPYTER_HTML_FORMAT.replace(
    'style="', 'style="margin:0;padding:0 0 3px;'
)


# --- what is there ---------------------------------------------------------------------------------------------------


@functools.cache
def place() -> tuple[bool, str]:
    """(whether full-size models can be trained here, why), asked once a session."""
    from toolkit.machine.doctor import default_recipe

    path, why = default_recipe()
    return not path.endswith("pocket.yaml"), why


def pick(gpu: str, cpu: str, changes: str = "") -> list[str]:
    """The words of `python -m toolkit train …` that suit this machine, said in one line: [recipe file, override, …].

    `gpu` and `cpu` are such words, `changes` the reader's own, which win. The run's name ends in a hash of what it does:
    running a notebook again finds the run it made, and changed parameters make a new one beside it."""
    full, why = place()
    path, *overrides = shlex.split(f"{gpu if full else cpu} {changes}")
    recipe = recipes.load(path, overrides)
    name = f"{recipe.name}-{recipes.sha256(recipe)[:4]}"
    print(f"{why} → {path}, run {name}")
    return [path, *overrides, f"name={name}"]


def choose(gpu: str, cpu: str, changes: str = "") -> Recipe:
    """The same, loaded."""
    path, *overrides = pick(gpu, cpu, changes)
    return recipes.load(path, overrides)


def vram(gigabytes: float = 0) -> int:
    """Usable bytes of a card sold as so many GB; at 0 of the card here, or of one of 8 GB where there is none."""
    from toolkit.machine import choose

    return choose.usable(gigabytes, print)


def forecast(recipe: Recipe, vram: int) -> "Forecast":
    """A recipe's memory on a card, as `python -m toolkit fit` prints it."""
    from toolkit.machine import fit

    return fit.forecast(recipe, vram=vram).as_trained(vram)


def memory(folder: Path) -> str:
    """What a run took, beside its forecast where it ran on a card."""
    from toolkit.machine import fit

    made = read_json(folder / "manifest.json")
    if "fit" not in made:
        return f"peak: {made['peak_memory_bytes'] / fit.GIB:.2f} GiB of main memory; a forecast is made for cards, and none is here"
    held = made["fit"]
    planned, measured = held["forecast"] / fit.GIB, held["measured"] / fit.GIB
    return f"peak: forecast {planned:.2f} GiB, measured {measured:.2f} GiB ({held['error']:+.1%})"


# --- pictures and tables that every front end shows ------------------------------------------------------------------


def picture(figure: "Figure") -> None:
    """Show a figure as an image, whatever matplotlib backend the front end has."""
    from IPython.display import Image, display

    display(Image(figures.png(figure)))


@contextlib.contextmanager
def live(recipe: Recipe) -> Iterator[None]:
    """While the block trains `recipe`, its curves grow below the cell; afterwards they stay. An interrupt ends both."""
    from IPython.display import HTML, Image, display

    folder, over = outputs() / recipe.name, threading.Event()
    handle = display(HTML("<i>the curves appear with the first logged steps</i>"), display_id=True)

    def draw() -> None:
        with contextlib.suppress(Exception):  # a picture that fails must hide neither the training nor its error
            if figures.logged(folder):
                handle.update(Image(figures.png(figures.curves(folder))))

    def follow() -> None:
        while not over.wait(REFRESH):
            draw()

    # daemon: a kernel that is shut down does not wait for it
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        print("stopped: the last checkpoint is kept, and running this cell again resumes from it")
        raise
    finally:
        over.set()
        thread.join()
        draw()


# --- questions to a run ----------------------------------------------------------------------------------------------


def ask(folder: Path, prompts: Sequence[str], *, max_new_tokens: int = 512, greedy: bool = False) -> list[dict]:
    """Every prompt in each mode of the model, to the base and to the tuned model: rows for `side_by_side`."""
    import torch

    from toolkit.evaluation.generate import base_and_tuned
    from toolkit.training.model import load_run

    gc.collect()  # models that nothing refers to any more: a card rarely holds two
    torch.cuda.empty_cache()
    seed = recipes.of_run(folder).data.seed
    model, tokenizer = load_run(folder)
    return base_and_tuned(model, tokenizer, prompts, max_new_tokens=max_new_tokens, seed=seed, greedy=greedy)


def ask_gguf(folder: Path, rows: Sequence[dict], *, max_new_tokens: int = 512) -> list[dict]:
    """The greedy replies of `ask` beside those of the run's GGUF file, answered by llama.cpp."""
    from toolkit.serving.engine import start

    engine = start([folder], source="merged-gguf")
    rows_of_both = []
    for row in rows:
        body = {
            "messages": [{"role": "user", "content": row["prompt"]}],
            "chat_template_kwargs": {"enable_thinking": row["mode"] == "thinking"},
            "max_tokens": max_new_tokens,
            "temperature": 0,
        }
        message = engine.call("/v1/chat/completions", body)["choices"][0]["message"]
        parts = [(message.get(name) or "").strip() for name in ("reasoning_content", "content")]
        reply = {"adapter": row["tuned"], "GGUF": ShownReply(*parts)}
        rows_of_both.append({"prompt": row["prompt"], "mode": row["mode"], **reply})
    return rows_of_both


def samples(result: dict) -> list[dict]:
    """The replies an evaluation kept, as rows for `side_by_side`."""
    from toolkit.evaluation.generate import split_reply

    return [
        {"prompt": row["prompt"], "mode": row["mode"]}
        | {name: ShownReply(*split_reply(row[name])[:2]) for name in ("base", "tuned")}
        for row in result["samples"]
    ]
