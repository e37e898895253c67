"""Many runs at one budget, each in a process of its own, ending with a comparison and a sentence.

    sweep("data_recipes/sweep_pocket.yaml", reasoning=[0, 0.25, 0.5, 0.75, 1], seeds=2)

Every run trains on the same number of supervised tokens in the same number of optimizer steps: rows per step are chosen
for each ratio (short chat rows: many; long traces: few), so that a step holds about budget / steps supervised tokens.

Kill it anywhere and give the same command again: finished runs are skipped, the cut one goes on from its checkpoint. The
same command in a second terminal, or on a second machine that shares outputs/, takes runs that nobody has claimed.

Machines that share nothing: `wandb sweep outputs/<name>-sweep/sweep.yaml` prints an id, `wandb agent ID` on each machine
(in the project's folder, `pip install -r requirements.txt` done) works through the grid with this same runner. Then copy the
run folders together and `python -m toolkit compare` them.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from toolkit import recipe as recipes
from toolkit.files import ToolkitError, outputs
from toolkit.mix import compile_mix
from toolkit.recipe import Recipe
from toolkit.sweep.workers import work

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
OURS = {
    "name": "runs are named after what is swept",
    "train.per_device_train_batch_size": "rows per step follow from budget and steps: sweep train.max_steps or data.budget",
    "train.gradient_accumulation_steps": "rows per step follow from budget and steps: sweep train.max_steps or data.budget",
}


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


def train_command(recipe_file: Path) -> list[str]:
    """What trains and scores one run."""
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

    No `reasoning` keeps the recipe's own share; `settings` are `key=value,value` of any recipe key; `only` (`key=value` for every swept key) does just that run, for
    wandb's agents. Raises ToolkitError when the recipe cannot be swept, or at the end when runs failed twice.
    """
    from toolkit import compare, report
    from toolkit.run import default_console

    console = console or default_console()
    base = recipes.load(path, overrides)
    runs = plan(base, reasoning, seeds, settings, console)
    folder = outputs() / f"{base.name}-sweep"
    write(folder, runs, [str(path), *overrides], reasoning, seeds, settings)
    console.print(table(runs))
    _refuse_other_recipes(runs)
    if only:
        runs = [_chosen(runs, only, base)]
    failed = work([run.name for run in runs], folder, command, console)
    if not only:
        done = [outputs() / run.name for run in runs if run.name not in failed]
        report.conclude(compare.compare(done), folder, console)
    if failed:
        names = ", ".join(failed)
        raise ToolkitError(f"{len(failed)} of {len(runs)} runs failed: {names}. Logs: {folder / 'logs'}. "
                           "The same command tries them again; finished runs stay as they are")  # fmt: skip
    return folder


def plan(base: Recipe, reasoning: Sequence[float], seeds: int, settings: Sequence[str], console) -> list[Planned]:
    """Every run, with one budget and one number of steps for all that differ only in ratio and seed."""
    from toolkit.run import resolve

    if base.data.unit != "supervised_tokens" or base.train.get("packing"):
        key = "data.unit=supervised_tokens" if base.data.unit != "supervised_tokens" else "train.packing=false"
        raise ToolkitError(f"a sweep gives every ratio the same supervised tokens, row by row: add {key}")
    base = resolve(base, console)
    runs = []
    for chosen in itertools.product(*(_values(setting, base) for setting in settings)):
        swept = [{"data.reasoning": float(ratio)} for ratio in reasoning] or [{}]
        several = [{**r, "data.seed": base.data.seed + n, **dict(chosen)} for r in swept for n in range(seeds)]
        runs += _same_budget([(_recipe(base, parameters), parameters) for parameters in several], console)
    return runs


def _values(setting: str, base: Recipe) -> list[tuple[str, object]]:
    """`key=a,b` as [(key, a), (key, b)], with the values' own types."""
    key, sep, values = setting.partition("=")
    if not sep or key in OURS:
        raise ToolkitError(f"--set {setting}: {OURS.get(key, 'expected key=value,value')}")
    return [(key, _read(base, f"{key}={value}")) for value in values.split(",")]


def _read(base: Recipe, override: str):
    """The value an override gives, as the recipe holds it: 1e-4 is a number."""
    key, _, text = override.partition("=")
    changed = recipes.from_dict(recipes.to_dict(base), "sweep", [override])
    if key == "data.reasoning":  # not kept in a recipe: it rescales the sources' fractions
        return float(text)
    node = recipes.to_dict(changed)
    for part in key.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def _recipe(base: Recipe, parameters: dict) -> Recipe:
    """The recipe of one run, named after what is swept: hybrid-r0.25-s3407-learning_rate0.0001."""
    words = {"data.reasoning": "r", "data.seed": "s"}
    parts = [words.get(key, key.split(".")[-1]) + _text(value) for key, value in parameters.items()]
    name = re.sub(r"[^\w.\-]", "_", "-".join([base.name, *parts]))
    overrides = [f"{key}={_text(value)}" for key, value in parameters.items()]
    return recipes.from_dict(recipes.to_dict(base), f"sweep of {base.name}", [f"name={name}", *overrides])


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
        group = [(_with_budget(recipe, budget), parameters) for recipe, parameters in group]


def _with_budget(recipe: Recipe, budget: int) -> Recipe:
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, budget=budget))


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


def table(runs: list[Planned]):
    """What will be trained on, side by side: one budget, one number of steps."""
    from rich.table import Table

    grid = Table(title=f"{len(runs)} runs: the same supervised tokens, the same optimizer steps", title_justify="left")
    for heading in ("run", "reasoning share", "supervised tokens", "steps", "rows", "rows per step", "trained on"):
        grid.add_column(heading, justify="left" if heading == "run" else "right")
    for run in runs:
        cells = f"{run.tokens:,}", str(run.steps), f"{run.rows:,}", str(run.batch), f"{run.trained:,}"
        grid.add_row(run.name, f"{100 * run.share:.1f}%", *cells)
    return grid


def write(folder: Path, runs: list[Planned], words: list[str], reasoning, seeds: int, settings: Sequence[str]) -> None:
    """The plan (sweep.json), a recipe for each run, and the grid for wandb (sweep.yaml)."""
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    for run in runs:
        _put(folder / "recipes" / f"{run.name}.yaml", recipes.to_yaml(run.recipe))
    rows = [{"name": r.name, "parameters": r.parameters, "budget": r.recipe.data.budget, "supervised_tokens": r.tokens,
             "reasoning_share": r.share, "rows": r.rows, "rows_per_step": r.batch, "steps": r.steps,
             "trained_supervised_tokens": r.trained} for r in runs]  # fmt: skip
    _put(folder / "sweep.json", json.dumps({"runs": rows}, indent=1))
    words = [*words, "--reasoning", *map(_text, reasoning), "--seeds", str(seeds)]
    words += ["--set", *settings] if settings else []
    grid = wandb_grid(folder.name, runs, words)
    _put(folder / "sweep.yaml", yaml.safe_dump(grid, sort_keys=False))


def _put(file: Path, text: str) -> None:
    """Whole or not at all, and under a name of our own until then: other workers write and read the same files."""
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)


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
    wanted = {word.partition("=")[0]: _read(base, word) for word in only}
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
