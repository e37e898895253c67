"""Many runs at one budget, each in a process of its own, ending with a comparison and a recommendation.

    from toolkit import sweep; sweep.sweep("sweep_pocket", reasoning=[0, 0.25, 0.5, 0.75, 1], seeds=2)

Every run trains on the same number of supervised tokens in the same number of optimizer steps: rows per step are chosen
for each ratio (short chat rows: many; long traces: few), so that a step holds about budget / steps supervised tokens.

Kill it anywhere and run the same command again: finished runs are skipped, the unfinished one resumes from its
checkpoint. The same command in a second terminal, or on a second machine that shares outputs/, takes runs that nobody
holds. On machines that share nothing, copy the run folders together and `python -m toolkit compare` them.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit import recipe as recipes
from toolkit.compare import compare
from toolkit.files import ToolkitError, lock, outputs, read_json, read_jsonl, write_json, write_text
from toolkit.mix import compile_mix
from toolkit.progress import Progress
from toolkit.recipe import Recipe
from toolkit.report import conclude
from toolkit.run import default_console, resolve

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
BATCH_KEYS = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
FRACTION = re.compile(r"data\.sources\.(\d+)\.fraction")
LOG_TAIL_LINES, POLL_SECONDS = 15, 1.0
"""Lines of a failed run's log that are shown; seconds between looks at a run."""


@dataclass(frozen=True)
class Planned:
    """One run of a sweep."""

    recipe: Recipe
    rows: int
    tokens: int
    """Supervised tokens of its compiled mix."""
    share: float
    """Achieved reasoning share of them."""

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def steps(self) -> int:
        return self.recipe.train["max_steps"]

    @property
    def batch(self) -> int:
        """Rows per optimizer step."""
        return math.prod(self.recipe.train[key.removeprefix("train.")] for key in BATCH_KEYS)

    @property
    def trained(self) -> int:
        """Supervised tokens it sees: all of its mix, but for the rounding of rows per step."""
        return round(self.tokens * self.steps * self.batch / self.rows)

    def row(self) -> dict:
        """Its line of the plan."""
        row = {"name": self.name, "reasoning_share": self.share, "supervised_tokens": self.tokens}
        row |= {"steps": self.steps, "rows": self.rows, "rows_per_step": self.batch}
        return row | {"tokens_trained_on": self.trained}

    def finished(self) -> bool:
        """Trained and evaluated."""
        folder = outputs() / self.name
        manifest = folder / "manifest.json"
        return (folder / "eval.json").is_file() and manifest.is_file() and "finished" in read_json(manifest)

    def steps_done(self) -> int:
        """Optimizer steps that its metrics.jsonl holds."""
        if self.finished():
            return self.steps
        metrics = outputs() / self.name / "metrics.jsonl"
        try:
            rows = read_jsonl(metrics) if metrics.is_file() else []
        except ToolkitError:  # being rewritten just now
            rows = []
        return rows[-1].get("step", 0) if rows else 0


def train_command(recipe_file: Path) -> list[str]:
    """What trains and evaluates one run."""
    return [sys.executable, "-m", "toolkit", "train", str(recipe_file)]


def sweep(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    reasoning: Sequence[float] = RATIOS,
    seeds: int = 1,
    settings: Sequence[str] = (),
    console=None,
    command: Callable[[Path], list[str]] = train_command,
) -> Path:
    """Plan, run what is not finished, compare; returns the sweep's folder, outputs/<name>-sweep.

    Without `reasoning` the recipe keeps its own share. `settings` are `key=value,value` of any recipe key;
    `data.sources.N.fraction=0,0.5` sweeps one source's share, the others keep their proportions. Raises ToolkitError when
    the recipe cannot be swept, or at the end when runs failed.
    """
    console = console or default_console()
    base = recipes.load(path, overrides)
    runs = plan(base, reasoning, seeds, settings, console)
    folder = outputs() / f"{base.name}-sweep"
    _refuse_other_recipes(runs)
    write_plan(folder, runs)
    console.print(plan_table(runs))
    failed = work(runs, folder, command, console)
    if len(failed) < len(runs):
        done = [outputs() / run.name for run in runs if run.name not in failed]
        conclude(compare(done), folder, console)
    if failed:
        raise ToolkitError(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}. Logs: {folder / 'logs'}. The same command "
            "tries them again; finished runs stay as they are"
        )
    return folder


# --- the plan --------------------------------------------------------------------------------------------------------


def plan(base: Recipe, reasoning: Sequence[float], seeds: int, settings: Sequence[str], console) -> list[Planned]:
    """Every run, with one budget and one number of steps for all that differ only in ratio and seed."""
    ratios = {"data.reasoning": [f"{ratio:g}" for ratio in reasoning]} if reasoning else {}
    others = {}
    for setting in settings:
        key, _, values = setting.partition("=")
        (ratios if FRACTION.fullmatch(key) else others)[key] = values.split(",")
    _refuse_unfair(base, ratios, others)
    base = resolve(base, console)
    ratios["data.seed"] = [str(base.data.seed + n) for n in range(seeds)]
    runs = []
    for chosen in _grid(others):
        runs += _same_budget([_recipe(base, ratio | chosen) for ratio in _grid(ratios)], console)
    return runs


def _grid(values: dict[str, list[str]]) -> list[dict[str, str]]:
    """Every combination of one value for each key."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def _refuse_unfair(base: Recipe, ratios: dict, others: dict) -> None:
    """Raises ToolkitError for a recipe or setting with which runs would not get the same."""
    if base.data.unit != "supervised_tokens" or base.train.get("packing"):
        key = "data.unit=supervised_tokens" if base.data.unit != "supervised_tokens" else "train.packing=false"
        raise ToolkitError(f"a sweep gives every ratio the same supervised tokens, row by row: add {key}")
    if ratios and all(source.fraction is None for source in base.data.sources):
        raise ToolkitError(
            f"{base.name}: its mix is given in counts (path#500), so it has no share to sweep. Give every source a "
            "`fraction`, or sweep other keys with --set (e.g. --set train.learning_rate=1e-4,2e-4)"
        )
    for key, values in (ratios | others).items():
        if values == [""]:
            raise ToolkitError(f"--set {key}: expected key=value,value")
        if key == "name" or key in BATCH_KEYS:
            raise ToolkitError(
                f"--set {key}: runs are named after what is swept, and rows per step follow from budget and steps: sweep "
                "train.max_steps or data.budget"
            )


def _recipe(base: Recipe, swept: dict[str, str]) -> Recipe:
    """The recipe of one run, named after what is swept: hybrid-r0.25-s3407-learning_rate1e-4."""
    values, overrides, parts = recipes.to_dict(base), [], [base.name]
    for key, text in swept.items():
        word = {"data.reasoning": "r", "data.seed": "s"}.get(key, key.split(".")[-1])
        if found := FRACTION.fullmatch(key):
            word = _set_share(values["data"]["sources"], int(found[1]), text)
        else:
            overrides.append(f"{key}={text}")
        parts.append(word + text)
    name = re.sub(r"[^\w.\-]", "_", "-".join(parts))
    return recipes.from_dict(values, f"sweep of {base.name}", [f"name={name}", *overrides])


def _set_share(sources: list[dict], index: int, text: str) -> str:
    """Give one source a share and the others the rest in their old proportions; returns the source's name."""
    with contextlib.suppress(ValueError):
        share = float(text)
        if 0 <= share <= 1 and index < len(sources) > 1:
            rest = sum(source["fraction"] for i, source in enumerate(sources) if i != index)
            for i, source in enumerate(sources):
                old = source["fraction"] / rest if rest else 1
                source["fraction"] = share if i == index else (1 - share) * old
            return sources[index]["name"]
    raise ToolkitError(
        f"data.sources.{index}.fraction={text}: expected one of several sources, and a share from 0 to 1"
    )


def _same_budget(group: list[Recipe], console) -> list[Planned]:
    """The group with the largest budget that every one of its mixes can reach, and with equal steps."""
    while True:
        reports = [compile_mix(recipe).report for recipe in group]
        limits = {report["limited_by"] for report in reports} - {None}
        if not limits:
            return _same_steps(group, reports)
        least = min(report["total"]["supervised_tokens"] for report in reports)
        budget = least - least % 10 ** max(0, len(str(least)) - 3)  # three digits; rounding down makes it reachable
        wanted = f"{group[0].data.budget:,}" if group[0].data.budget else "an open budget"
        console.print(
            f"{' and '.join(sorted(limits))} cannot fill {wanted} at every ratio: each run gets {budget:,} supervised tokens"
        )
        group = [dataclasses.replace(r, data=dataclasses.replace(r.data, budget=budget)) for r in group]


def _same_steps(group: list[Recipe], reports: list[dict]) -> list[Planned]:
    """`train.max_steps` steps through each mix once, or num_train_epochs times in about as many steps as the recipe's own
    batch would take for the average mix."""
    train, totals = group[0].train, [report["total"] for report in reports]
    steps, device = train["max_steps"], train["per_device_train_batch_size"]
    passes = 1 if steps > 0 else train["num_train_epochs"]
    seen = [total["examples"] * passes for total in totals]
    if steps <= 0:
        steps = max(1, round(sum(seen) / len(seen) / (device * train["gradient_accumulation_steps"])))
    steps, planned = common_steps(seen, steps, device), []
    for recipe, report, total, rows in zip(group, reports, totals, seen, strict=True):
        per_device, accumulation = rows_per_step(rows / steps, device)
        sizes = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
        recipe = dataclasses.replace(recipe, train={**recipe.train, **sizes, "max_steps": steps})
        share = report["achieved_modes"]["supervised_tokens"].get("thinking", 0.0)
        planned.append(Planned(recipe, total["examples"], total["supervised_tokens"], share))
    return planned


def common_steps(seen: Sequence[float], wanted: int, device: int) -> int:
    """The number of steps within a fifth of `wanted` at which whole rows per step come nearest to each run's rows."""
    if min(seen) < wanted:
        raise ToolkitError(
            f"{wanted} steps are more than the {min(seen):.0f} rows of the smallest mix: set train.max_steps to at most "
            f"{min(seen) // 2:.0f}, or raise data.budget"
        )

    def off(steps: int) -> float:
        return max(abs(math.prod(rows_per_step(n / steps, device)) * steps / n - 1) for n in seen)

    near = range(math.ceil(wanted * 0.8), math.floor(wanted * 1.2) + 1)
    return min(near, key=lambda steps: (round(off(steps), 2), abs(steps - wanted)))


def rows_per_step(rows: float, device: int) -> tuple[int, int]:
    """(rows at a time, accumulation) nearest to `rows` a step with at most `device` rows at a time."""
    accumulation = max(1, math.ceil(rows / device - 0.5 / device))
    return max(1, min(device, round(rows / accumulation))), accumulation


def plan_table(runs: list[Planned]):
    """What will be trained on, side by side: one budget, one number of steps; 80 columns wide."""
    from rich import box
    from rich.table import Table

    title = f"{len(runs)} runs: the same supervised tokens, the same optimizer steps"
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), show_edge=False)
    for heading in runs[0].row():
        justify = "left" if heading == "name" else "right"
        grid.add_column(heading.replace("_", "\n"), justify=justify, overflow="fold")
    for run in runs:
        name, *numbers = run.row().values()
        grid.add_row(name, *(f"{n:.1%}" if isinstance(n, float) else f"{n:,}" for n in numbers))
    return grid


def write_plan(folder: Path, runs: list[Planned]) -> None:
    """The plan (sweep.json) and a recipe for each run."""
    for run in runs:
        write_text(folder / "recipes" / f"{run.name}.yaml", recipes.to_yaml(run.recipe))
    write_json(folder / "sweep.json", {"runs": [run.row() for run in runs]})


def _refuse_other_recipes(runs: list[Planned]) -> None:
    """Before anything trains: a folder with a run's name that holds another recipe's run."""
    for run in runs:
        written = outputs() / run.name / "recipe.yaml"
        if written.is_file() and written.read_text(encoding="utf-8") != recipes.to_yaml(run.recipe):
            raise ToolkitError(
                f"{written.parent} holds a run of another recipe, and runs are never overwritten: give the sweep another "
                "name (name=...), or move that folder away"
            )


# --- the work --------------------------------------------------------------------------------------------------------


def work(runs: Sequence[Planned], folder: Path, command: Callable[[Path], list[str]], console) -> list[str]:
    """Do every run that no other worker does, then wait for theirs; returns the names of those that failed here.

    `command` gives the words that train and evaluate a recipe file. A worker holds a run by an operating system's lock,
    which ends with the worker."""
    for run in runs:
        if run.finished():
            console.print(f"{run.name}: finished before, left as it is")
    before, failed, told = sum(run.steps_done() for run in runs), [], ""
    with Progress(console, f"{folder.name}, steps", sum(run.steps for run in runs) - before) as progress:

        def update() -> None:
            """Steps of all runs, other workers' too; those that a failed run lost stay counted."""
            if (more := sum(run.steps_done() for run in runs) - before - progress.done) > 0:
                progress.advance(more)

        while waiting := [run for run in runs if run.name not in failed and not run.finished()]:
            with contextlib.ExitStack() as held:
                run, busy = _hold(waiting, folder, held)
                if run and not run.finished() and not _train(run, folder, command, console, update):
                    failed.append(run.name)
            if not run:
                if busy != told:
                    console.print(f"waiting: {busy}", markup=False)
                told = busy
                time.sleep(POLL_SECONDS)
                update()
    return failed


def _hold(waiting: list[Planned], folder: Path, held: contextlib.ExitStack) -> tuple[Planned | None, str]:
    """The first run that no other worker holds, now held by this one; else none and who holds the last."""
    busy = ""
    for run in waiting:
        try:
            held.enter_context(lock(folder / run.name, "sweep"))
        except ToolkitError as error:
            busy = str(error)
        else:
            return run, ""
    return None, busy


def _train(run: Planned, folder: Path, command: Callable, console, update: Callable[[], None]) -> bool:
    """One run in its own process; the end of its log is shown when it fails."""
    with lock(outputs() / run.name, "sweep", wait=True):  # a killed worker's run may train on by itself
        pass
    if run.finished():
        return True
    log = folder / "logs" / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"{run.name}: training (log: {log})")
    environment, began = os.environ | {"TOOLKIT_SWEEP": folder.name, "PYTHONUNBUFFERED": "1"}, time.monotonic()
    words = command(folder / "recipes" / f"{run.name}.yaml")
    with open(log, "a", encoding="utf-8") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
                update()
        finally:  # an interrupt leaves no orphan training
            process.terminate()
            process.wait()
    took = f"{time.monotonic() - began:.0f} s"
    if process.returncode == 0 and run.finished():
        console.print(f"{run.name}: done in {took}")
        return True
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
    console.print(f"{run.name}: failed after {took} with exit code {process.returncode}; its log ends:", style="red")
    console.print("\n".join(f"    {line}" for line in tail), markup=False)
    return False
