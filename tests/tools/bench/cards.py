"""Do forecasts tell what fits? Runs under capped memory, standing for smaller cards: `python -m tests.tools.bench --measure cards`.

record = cards.measure("data_recipes/hybrid.yaml", ["8B"], [8, 12], Path("cards.json")); print(cards.markdown(record))

The cap is on what torch reserves (torch.cuda.set_per_process_memory_fraction): what the card shows less the CUDA context.
Every row is as long as the recipe allows; two steps train and validation runs once. Batches of replies are left out:
they shrink until they fit. What a library decides by the card's own size or name stays as on the card at hand.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.tools.bench import speed, start, ways
from toolkit.files import ROOT
from toolkit.machine import fit
from toolkit.recipe import load

RECORD = ROOT / "data_recipes" / "measured" / "cards_gpu.json"
CARDS = (6, 8, 12, 16, 24)
PHASES = ("load", "training", "validation")
OUT_OF_MEMORY = ("OutOfMemoryError", "out of GPU memory")


def measure(
    recipe: str, sizes: Sequence[str], cards: Sequence[float], file: Path, say: Callable[[str], None] = print, **plan
) -> dict:
    """What `fit` says and what happened, for every size and card up to the one here; `file` is written after each run."""
    record = speed.begin(recipe, cards=list(cards), runs=[])
    steps = {"steps": 2, "warm_up": 1, "max_length": load(recipe).model.max_seq_length} | plan
    for size in sizes:
        with speed.workplace(size) as work:
            record["hardware"] = speed.succeed(ways.Job("rate", work))["hardware"]
            memory = record["hardware"].get("memory_bytes", math.inf)
            for gigabytes in (gb for gb in cards if fit.usable_vram(gb) <= memory):
                job = ways.Job("ours", work, size, recipe, cap=fit.usable_vram(gigabytes) - fit.CONTEXT, **steps)
                run = {"size": size, "card": gigabytes} | tried(job, fit.usable_vram(gigabytes))
                record["runs"].append(run)
                start.keep(record, file)
                say(f"{size} on {gigabytes} GB: {_cell(run)}")
    return record


def tried(job: ways.Job, vram: int) -> dict:
    """The forecast's word, `says`, and the run's, `fits`: None when it failed for another reason than memory."""
    plan = ways.recipe(job, job.recipe)
    forecast = fit.forecast(plan)
    says = all(forecast.total(phase) <= vram for phase in PHASES)
    result = ways.run(job)
    if "failed" in result:
        fits = False if any(words in result["failed"] for words in OUT_OF_MEMORY) else None
    else:  # `toolkit.training.trainer` halves a batch that does not fit
        fits = result["batch"] == {name: plan.train[name] for name in ways.BATCH}
    return {"says": says, "fits": fits, "total": max(map(forecast.total, PHASES)), **result}


def markdown(record: dict | None) -> str:
    """Sizes against cards; a sentence where there is no record."""
    if record is None:
        return speed.NOT_YET
    cells = {(run["size"], run["card"]): _cell(run) for run in record["runs"]}
    right = sum(run["says"] == run["fits"] for run in record["runs"])
    sizes, cards = dict.fromkeys(size for size, _ in cells), record["cards"]
    return "\n".join([
        f"{speed.where(record)}, `{record['recipe']}`: {right} of {len(cells)} forecasts right",
        "",
        "| Qwen3 | " + " | ".join(f"{card} GB" for card in cards) + " |",
        "|---|" + "---|" * len(cards),
        *(f"| {size} | " + " | ".join(cells.get((size, card), "") for card in cards) + " |" for size in sizes),
    ])  # fmt: skip


def _cell(run: dict) -> str:
    if run["fits"] is None:
        return f"failed: {run['failed']}".replace("\n", " ")
    word = "fits" if run["fits"] else "does not fit"
    return word + ("" if run["says"] == run["fits"] else ", **forecast otherwise**")
