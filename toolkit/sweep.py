"""Many runs at one budget, each in a process of its own, ending with a comparison and a recommendation.

    from toolkit import sweep; sweep.sweep("sweep_pocket", reasoning=[0, 0.25, 0.5, 0.75, 1], seeds=2)

Every run trains on the same number of supervised tokens in the same number of optimizer steps: rows per step are chosen
for each ratio (short chat rows: many; long traces: few), so that a step holds about budget / steps supervised tokens.

Kill it anywhere and run the same command again: finished runs are skipped, the unfinished one resumes from its
checkpoint. The same command in a second terminal, or on a second machine that shares outputs/, takes runs that nobody
holds. On machines that share nothing, `wandb sweep outputs/<name>-sweep/sweep.yaml` prints an id and `wandb agent ID`
works through the grid; copy the run folders together and `python -m toolkit compare` them.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from toolkit import recipe as recipes
from toolkit.files import ToolkitError, lock, outputs, read_json, read_jsonl, write_json, write_text
from toolkit.mix import compile_mix
from toolkit.recipe import Recipe

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
BATCH_KEYS = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
FRACTION = re.compile(r"data\.sources\.(\d+)\.fraction")
MAX_ATTEMPTS, LOG_TAIL_LINES, POLL_SECONDS, PLAIN_SECONDS = 2, 15, 1.0, 30.0
"""Attempts at a run; lines of a failed run's log that are shown; seconds between looks at a run, and between lines in a pipe."""
EVALUATION_PART = 0.4
"""What evaluation takes at the end of a run, as a part of its training time, about."""


@dataclass(frozen=True)
class Planned:
    """One run of a sweep."""

    recipe: Recipe
    parameters: dict
    """What is swept, as dotted keys: {"data.reasoning": 0.25, "data.seed": 3407}."""
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
        train = self.recipe.train
        return train["per_device_train_batch_size"] * train["gradient_accumulation_steps"]

    @property
    def trained(self) -> int:
        """Supervised tokens it sees: all of its mix, but for the rounding of rows per step."""
        return round(self.tokens * self.steps * self.batch / self.rows)

    def finished(self) -> bool:
        """Trained and evaluated."""
        folder = outputs() / self.name
        manifest = folder / "manifest.json"
        return (folder / "eval.json").is_file() and manifest.is_file() and "finished" in read_json(manifest)


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
    only: Sequence[str] = (),
    console=None,
    command: Callable[[Path], list[str]] = train_command,
) -> Path:
    """Plan, run what is not finished, compare; returns the sweep's folder, outputs/<name>-sweep.

    Without `reasoning` the recipe keeps its own share. `settings` are `key=value,value` of any recipe key;
    `data.sources.N.fraction=0,0.5` sweeps one source's share, the others keep their proportions. `only` (`key=value` for
    every swept key) does just that run, for wandb's agents. Raises ToolkitError when the recipe cannot be swept, or at
    the end when runs failed twice.
    """
    from toolkit import compare, report
    from toolkit.run import default_console

    console = console or default_console()
    base = recipes.load(path, overrides)
    runs = plan(base, reasoning, seeds, settings, console)
    folder = outputs() / f"{base.name}-sweep"
    write_plan(folder, runs, [str(path), *overrides], reasoning, seeds, settings)
    console.print(plan_table(runs))
    _refuse_other_recipes(runs)
    runs = [_chosen(runs, only, base)] if only else runs
    failed = work(runs, folder, command, console)
    if not only and len(failed) < len(runs):
        report.conclude(
            compare.compare(outputs() / run.name for run in runs if run.name not in failed), folder, console
        )
    if failed:
        names = ", ".join(failed)
        raise ToolkitError(f"{len(failed)} of {len(runs)} runs failed: {names}. Logs: {folder / 'logs'}. The same "
                           "command tries them again; finished runs stay as they are")  # fmt: skip
    return folder


# --- the plan --------------------------------------------------------------------------------------------------------


def plan(base: Recipe, reasoning: Sequence[float], seeds: int, settings: Sequence[str], console) -> list[Planned]:
    """Every run, with one budget and one number of steps for all that differ only in ratio and seed."""
    from toolkit.run import resolve

    if base.data.unit != "supervised_tokens" or base.train.get("packing"):
        key = "data.unit=supervised_tokens" if base.data.unit != "supervised_tokens" else "train.packing=false"
        raise ToolkitError(f"a sweep gives every ratio the same supervised tokens, row by row: add {key}")
    if all(source.fraction is None for source in base.data.sources) and (
        reasoning or any(map(FRACTION.match, settings))
    ):
        raise ToolkitError(
            f"{base.name}: its mix is given in counts (path#500), so it has no share to sweep. Give every source a "
            "`fraction`, or sweep other keys with --set (e.g. --set train.learning_rate=1e-4,2e-4)"
        )
    base = resolve(base, console)
    ratios = [[("data.reasoning", float(ratio)) for ratio in reasoning]] if reasoning else []
    ratios += [_values(setting, base) for setting in settings if FRACTION.match(setting)]
    others = [_values(setting, base) for setting in settings if not FRACTION.match(setting)]
    runs = []
    for chosen in itertools.product(*others):
        group = [{**dict(ratio), "data.seed": base.data.seed + n, **dict(chosen)}
                 for ratio in itertools.product(*ratios) for n in range(seeds)]  # fmt: skip
        runs += _same_budget([(_recipe(base, parameters), parameters) for parameters in group], console)
    return runs


def _values(setting: str, base: Recipe) -> list[tuple[str, object]]:
    """`key=a,b` as [(key, a), (key, b)], with the values' own types."""
    key, separator, values = setting.partition("=")
    if not separator or key in BATCH_KEYS or key == "name":
        why = {"": "expected key=value,value", "name": "runs are named after what is swept"}
        fixed = "rows per step follow from budget and steps: sweep train.max_steps or data.budget"
        raise ToolkitError(f"--set {setting}: {why.get(key if separator else '', fixed)}")
    return [(key, _typed(base, key, value)) for value in values.split(",")]


def _typed(base: Recipe, key: str, text: str):
    """The value that an override gives, as the recipe would hold it: 1e-4 is a number."""
    values = recipes.to_dict(base)
    recipes.apply_override(values, f"{key}={text}")
    for part in key.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return float(values) if key == "data.reasoning" or FRACTION.fullmatch(key) else values


def _recipe(base: Recipe, parameters: dict) -> Recipe:
    """The recipe of one run, named after what is swept: hybrid-r0.25-s3407-learning_rate0.0001."""
    values, overrides, parts = recipes.to_dict(base), [], [base.name]
    sources = values["data"]["sources"]
    for key, value in parameters.items():
        word = {"data.reasoning": "r", "data.seed": "s"}.get(key, key.split(".")[-1])
        if found := FRACTION.fullmatch(key):
            word = _set_share(sources, int(found[1]), value)
        else:
            overrides.append(f"{key}={_text(value)}")
        parts.append(word + _text(value))
    name = re.sub(r"[^\w.\-]", "_", "-".join(parts))
    return recipes.from_dict(values, f"sweep of {base.name}", [f"name={name}", *overrides])


def _set_share(sources: list[dict], index: int, share: float) -> str:
    """Give one source a share and the others the rest in their old proportions; returns the source's name."""
    if index >= len(sources) or not 0 <= share <= 1 or len(sources) < 2:
        raise ToolkitError(
            f"data.sources.{index}.fraction={share:g}: expected one of several sources, and a share from 0 to 1"
        )
    rest = sum(source["fraction"] for i, source in enumerate(sources) if i != index)
    for i, source in enumerate(sources):
        source["fraction"] = share if i == index else (1 - share) * (source["fraction"] / rest if rest else 1)
    return sources[index]["name"]


def _text(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _same_budget(group: list[tuple[Recipe, dict]], console) -> list[Planned]:
    """The group with the largest budget that every one of its mixes can reach, and with equal steps."""
    while True:
        reports = [compile_mix(recipe).report for recipe, _ in group]
        limits = {report["limited_by"] for report in reports} - {None}
        if not limits:
            return _same_steps(group, reports)
        least = min(report["total"]["supervised_tokens"] for report in reports)
        budget = least - least % 10 ** max(0, len(str(least)) - 3)  # three digits; rounding down makes it reachable
        wanted = group[0][0].data.budget
        console.print(
            f"{' and '.join(sorted(limits))} cannot fill {f'{wanted:,}' if wanted else 'an open budget'} at every ratio: "
            f"each run gets {budget:,} supervised tokens"
        )
        smaller = dataclasses.replace
        group = [(smaller(recipe, data=smaller(recipe.data, budget=budget)), chosen) for recipe, chosen in group]


def _same_steps(group: list[tuple[Recipe, dict]], reports: list[dict]) -> list[Planned]:
    """`train.max_steps` steps through each mix once, or num_train_epochs times in about as many steps as the recipe's own
    batch would take for the average mix."""
    train = group[0][0].train
    passes = 1 if train["max_steps"] > 0 else train["num_train_epochs"]
    seen = [report["total"]["examples"] * passes for report in reports]
    device = train["per_device_train_batch_size"]
    usual = sum(seen) / len(seen) / (device * train["gradient_accumulation_steps"])
    steps = common_steps(seen, train["max_steps"] if train["max_steps"] > 0 else max(1, round(usual)), device)
    planned = []
    for (recipe, parameters), report, rows in zip(group, reports, seen, strict=True):
        per_device, accumulation = rows_per_step(rows / steps, device)
        sizes = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
        recipe = dataclasses.replace(recipe, train={**recipe.train, **sizes, "max_steps": steps})
        share = report["achieved_modes"]["supervised_tokens"].get("thinking", 0.0)
        total = report["total"]
        planned.append(Planned(recipe, parameters, total["examples"], total["supervised_tokens"], share))
    return planned


def common_steps(seen: Sequence[float], wanted: int, device: int) -> int:
    """The number of steps within a fifth of `wanted` at which whole rows per step come nearest to each run's rows."""
    if min(seen) < wanted:
        raise ToolkitError(
            f"{wanted} steps are more than the {min(seen):.0f} rows of the smallest mix: set train.max_steps to at most "
            f"{min(seen) // 2:.0f}, or raise data.budget"
        )

    def off(steps: int) -> float:
        batches = [math.prod(rows_per_step(n / steps, device)) for n in seen]
        return max(abs(batch * steps / n - 1) for batch, n in zip(batches, seen, strict=True))

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
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("run", "reasoning", "supervised", "steps", "rows", "per step", "trained on"):
        grid.add_column(heading, justify="left" if heading == "run" else "right", overflow="fold")
    for run in runs:
        cells = f"{run.tokens:,}", str(run.steps), f"{run.rows:,}", str(run.batch), f"{run.trained:,}"
        grid.add_row(run.name, f"{100 * run.share:.1f}%", *cells)
    return grid


def write_plan(
    folder: Path, runs: list[Planned], words: list[str], reasoning, seeds: int, settings: Sequence[str]
) -> None:
    """The plan (sweep.json), a recipe for each run, and the grid for wandb (sweep.yaml)."""
    for run in runs:
        write_text(folder / "recipes" / f"{run.name}.yaml", recipes.to_yaml(run.recipe))
    rows = [{"name": r.name, "parameters": r.parameters, "budget": r.recipe.data.budget, "supervised_tokens": r.tokens,
             "reasoning_share": r.share, "rows": r.rows, "rows_per_step": r.batch, "steps": r.steps,
             "trained_supervised_tokens": r.trained} for r in runs]  # fmt: skip
    write_json(folder / "sweep.json", {"runs": rows})
    words = [*words, "--reasoning", *map(_text, reasoning), "--seeds", str(seeds)]
    words += ["--set", *settings] if settings else []
    write_text(folder / "sweep.yaml", yaml.safe_dump(wandb_grid(folder.name, runs, words), sort_keys=False))


def wandb_grid(name: str, runs: list[Planned], words: list[str]) -> dict:
    """A wandb sweep over the same runs. Its command plans the sweep again on the agent's machine and does one run of it:
    name and rows per step depend on the ratio, which a grid cannot say."""
    values = {key: list(dict.fromkeys(run.parameters[key] for run in runs)) for key in runs[0].parameters}
    return {
        "name": name,
        "project": os.environ.get("WANDB_PROJECT", "qwen3-both-modes"),
        "method": "grid",
        "metric": {"name": "eval/tuned/thinking/accuracy", "goal": "maximize"},
        "parameters": {key: {"values": found} for key, found in values.items()},
        "command": ["${interpreter}", "-m", "toolkit", "sweep", *words, "--only", "${args_no_hyphens}"],
    }


def _chosen(runs: list[Planned], only: Sequence[str], base: Recipe) -> Planned:
    wanted = {key: _typed(base, key, text) for key, _, text in (word.partition("=") for word in only)}
    for run in runs:
        if run.parameters == wanted:
            return run
    known = "; ".join(" ".join(f"{k}={_text(v)}" for k, v in run.parameters.items()) for run in runs)
    raise ToolkitError(f"--only {' '.join(only)}: no such run in this sweep. Its runs: {known}")


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
    failed: list[str] = []
    seconds: list[float] = []
    told = ""
    while waiting := [run for run in runs if run.name not in failed and not run.finished()]:
        for run in waiting:
            with contextlib.ExitStack() as held:
                try:
                    held.enter_context(lock(folder / run.name, "sweep"))
                except ToolkitError as error:
                    busy = str(error)
                    continue
                if not run.finished():  # another worker may have finished it between the look and the lock
                    began = time.monotonic()
                    left = sum(r.name not in failed and not r.finished() for r in runs)
                    if _attempts(run, folder, command, console, seconds, left):
                        seconds.append(time.monotonic() - began)
                    else:
                        failed.append(run.name)
                break
        else:
            if busy != told:
                console.print(f"waiting: {busy}", markup=False)
            told = busy
            time.sleep(POLL_SECONDS)
    return failed


def _attempts(run: Planned, folder: Path, command: Callable, console, seconds: list[float], left: int) -> bool:
    """One run in its own process, twice if it fails; the end of its log is shown when it does."""
    log = folder / "logs" / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        # a killed worker's run may train on by itself: it holds the run's own lock
        with lock(outputs() / run.name, "sweep", wait=True):
            pass
        if run.finished():
            return True
        console.print(f"{run.name}: {'training' if attempt == 1 else 'trying again'} (log: {log})")
        began = time.monotonic()
        with _started(command(folder / "recipes" / f"{run.name}.yaml"), log, folder.name) as process:
            _watch(process, run, log, console, seconds, left)
        took = time.monotonic() - began
        if process.returncode == 0 and run.finished():
            console.print(f"{run.name}: done in {took:.0f} s")
            return True
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        console.print(
            f"{run.name}: failed after {took:.0f} s with exit code {process.returncode}; its log ends:", style="red"
        )
        console.print("\n".join(f"    {line}" for line in tail), markup=False)
    return False


@contextlib.contextmanager
def _started(command: list[str], log: Path, group: str) -> Iterator[subprocess.Popen]:
    """A process whose output goes to `log`; ended with this block, so that an interrupt leaves no orphan training."""
    environment = os.environ | {"TOOLKIT_SWEEP": group, "PYTHONUNBUFFERED": "1"}
    with open(log, "a", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()


def _watch(process: subprocess.Popen, run: Planned, log: Path, console, seconds: list[float], left: int) -> None:
    """Show what the run's process says and the time left for it and for the sweep, until it ends."""
    began = printed = time.monotonic()
    first: tuple[float, float] | None = None  # when the first step was seen: what came before is loading
    with console.status(f"{run.name}: starting") as status:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
            elapsed, done = time.monotonic() - began, _steps_done(run) / run.steps
            first = first or ((elapsed, done) if done else None)
            each = sum(seconds) / len(seconds) if seconds else None
            if not each and first and done > first[1]:
                training = (elapsed - first[0]) / (done - first[1])
                each = elapsed + training * (1 - done + EVALUATION_PART)
            said = log.read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")[2]
            times = (
                f"{_clock(each - elapsed)} left for this run, {_clock(each * left - elapsed)} for all" if each else ""
            )
            text = "; ".join(filter(None, (f"{run.name} ({left} left)", times, said[:100])))
            status.update(text)
            if not console.is_terminal and time.monotonic() - printed >= PLAIN_SECONDS:
                printed = time.monotonic()
                console.print(text, markup=False)


def _steps_done(run: Planned) -> int:
    metrics = outputs() / run.name / "metrics.jsonl"
    try:
        rows = read_jsonl(metrics) if metrics.is_file() else []
    except ToolkitError:  # being rewritten just now
        return 0
    return rows[-1].get("step", 0) if rows else 0


def _clock(seconds: float) -> str:
    """`about 40 s`, `about 12 min`."""
    seconds = max(seconds, 1)
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"
