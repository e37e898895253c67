"""Speed and memory of three ways to train the same rows (`ways.py`), on every size: `python -m tests.tools.bench` on a GPU.

record = speed.measure("data_recipes/hybrid.yaml", ["0.6B"], repeats=3, file=Path("speed.json")); print(speed.markdown(record))
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from tests.tools.bench import start, ways
from toolkit.files import ROOT, ToolkitError, outputs
from toolkit.machine import fit
from toolkit.recipe import load

RECORD = ROOT / "data_recipes" / "measured" / "speed_gpu.json"
NOT_YET = "not measured yet"


def measure(
    recipe: str, sizes: Sequence[str], repeats: int, file: Path, say: Callable[[str], None] = print, **plan
) -> dict:
    """Every way on every size, interleaved over the repeats; `file` is written anew after each run.

    `plan`: max_length, steps, warm_up of ways.Job. A way that fails is recorded with its reason.
    """
    record = begin(recipe, repeats=repeats, rates={}, runs=[])
    for size in sizes:
        with workplace(size) as work:
            rate = record["rates"][size] = succeed(ways.Job("rate", work))
            record["hardware"] = rate.pop("hardware")
            for repeat in range(repeats):
                for way in ways.WAYS:
                    job = ways.Job(way, work, size, recipe, **plan)
                    record["plan"] = {"max_length": job.max_length, "steps": job.steps, "warm_up": job.warm_up}
                    run = {"size": size, "way": way, "repeat": repeat} | ways.run(job)
                    record["runs"].append(run)
                    start.keep(record, file)
                    say(f"{size} {way} {repeat + 1}/{repeats}: {_outcome(run)}")
    return record


def begin(recipe: str, **more) -> dict:
    """The head of a record: recipe, batch, versions, date, commit. Raises ToolkitError on a recipe that cannot be timed."""
    import importlib.metadata

    from toolkit.training.folder import PACKAGES, commit

    train = load(recipe).train
    if train.get("packing"):
        raise ToolkitError(
            f"{recipe}: train.packing: a step's tokens are counted by its rows: take a recipe without it"
        )
    batch = {name: train[name] for name in ways.BATCH}
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"recipe": recipe, "batch": batch, "versions": versions, "date": time.strftime("%Y-%m-%d"),
            "commit": commit(), **more}  # fmt: skip


class workplace(tempfile.TemporaryDirectory):
    """A folder under outputs/ that holds the random model of a size, removed at the end (14B: 11 GB)."""

    def __init__(self, size: str):
        outputs().mkdir(parents=True, exist_ok=True)
        super().__init__(prefix=".bench-", dir=outputs())
        succeed(ways.Job("weights", self.name, size))


def succeed(job: ways.Job) -> dict:
    """A job without which there is nothing to measure. Raises ToolkitError."""
    result = ways.run(job)
    if "failed" in result:
        raise ToolkitError(f"bench: {job.way} {job.size}: {result['failed']}")
    return result


def _outcome(run: dict) -> str:
    return f"failed: {run['failed']}" if "failed" in run else f"{run['tokens'] / run['seconds']:,.0f} tokens/s"


def markdown(record: dict | None) -> str:
    """The README's table: medians of the repeats, reasons where a way failed; a sentence where there is no record."""
    if record is None:
        return NOT_YET
    plan, batch = record["plan"], record["batch"].values()
    lines = [
        f"{where(record)}: medians of {record['repeats']} runs, {' × '.join(map(str, batch))} rows a step, none longer than "
        f"{plan['max_length']} tokens, {plan['steps'] - plan['warm_up']} steps after {plan['warm_up']} of warm-up",
        "",
        "| Qwen3 | way | tokens/s | supervised tokens/s | peak memory, GiB | forecast's error | of the 16-bit matrix rate |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    groups: dict[tuple, list[dict]] = {}
    for run in record["runs"]:
        groups.setdefault((run["size"], run["way"]), []).append(run)
    return "\n".join(lines + [f"| {' | '.join(_row(record, *group))} |" for group in groups.items()])


def where(record: dict) -> str:
    """Hardware, date and commit."""
    memory = record["hardware"].get("memory_bytes")
    size = f", {memory / fit.GIB:.1f} GiB" if memory else ""
    return f"{record['hardware']['name']}{size}, {record['date']}, {record['commit']}"


def _row(record: dict, size_and_way: tuple[str, str], runs: list[dict]) -> list[str]:
    size, way = size_and_way
    good = [run for run in runs if "failed" not in run]
    if not good:
        return [size, way, _outcome(runs[0]).replace("\n", " "), "", "", "", ""]

    def middle(value: Callable[[dict], float]) -> float:
        return median(value(run) for run in good)

    def per_second(key: str) -> float:
        return middle(lambda run: run[key] / run["seconds"])

    some = f" ({len(good)} of {len(runs)} runs)" if len(good) < len(runs) else ""
    gpu = "memory_bytes" in record["hardware"]
    return [
        size,
        way + some,
        f"{per_second('tokens'):,.0f}",
        f"{per_second('supervised_tokens'):,.0f}",
        f"{middle(lambda run: run['peak_reserved']) / fit.GIB:.2f}",
        f"{middle(lambda run: run['forecast'] / run['peak_reserved'] - 1):+.1%}" if gpu else "",
        f"{per_second('flops') / record['rates'][size]['flops_per_second']:.1%}",
    ]
