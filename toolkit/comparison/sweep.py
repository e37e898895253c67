"""Mix ratios at one budget, each in a process of its own, ending with a comparison and a recommendation.

    from toolkit.comparison import sweep; sweep.sweep("sweep_pocket", shares=[0, 0.25, 0.5, 0.75, 1], seeds=2)

Every run trains on the same number of supervised tokens in the same number of optimizer steps: rows per step are chosen
for each ratio (short chat rows: many; long traces: few), so that a step holds about budget / steps supervised tokens.

Kill it anywhere and run the same command again: finished runs are skipped, the unfinished one resumes from its checkpoint.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit import recipe as recipes
from toolkit.comparison.decide import compare
from toolkit.comparison.report import conclude
from toolkit.data.mix import compile_mix
from toolkit.evaluation.questions import SHIPPED, from_mix
from toolkit.files import ToolkitError, did_you_mean, lock, outputs, read_json, write_json, write_jsonl, write_text
from toolkit.recipe import Recipe, Source
from toolkit.run import default_console, resolve
from toolkit.view.figures import logged
from toolkit.view.progress import Progress
from toolkit.view.tables import rich_table

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
LOG_TAIL_LINES, POLL_SECONDS = 15, 1.0
"""Lines of a failed run's log that are shown; seconds between looks at a run."""


@dataclass(frozen=True)
class Planned:
    """One run of a sweep."""

    recipe: Recipe
    row: dict
    """Its line of the plan: name, achieved reasoning share, supervised tokens, steps, rows, rows per step and the
    supervised tokens it trains on, which are those of its mix but for the rounding of rows per step."""

    @property
    def folder(self) -> Path:
        return outputs() / self.recipe.name

    def finished(self) -> bool:
        """Trained and evaluated."""
        manifest = self.folder / "manifest.json"
        return (self.folder / "eval.json").is_file() and manifest.is_file() and "finished" in read_json(manifest)

    def steps_done(self) -> int:
        """Optimizer steps that its metrics.jsonl holds."""
        return max((line["step"] for line in logged(self.folder)), default=0)


def train_command(recipe_file: Path) -> list[str]:
    """What trains and evaluates one run."""
    return [sys.executable, "-m", "toolkit", "train", str(recipe_file)]


def sweep(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    shares: Sequence[float] = RATIOS,
    of: str = "reasoning",
    seeds: int = 1,
    console=None,
    command: Callable = train_command,
) -> Path:
    """Plan, run what is not finished, compare; returns the sweep's folder, outputs/<name>-sweep.

    `of` is whose share is swept: `reasoning`, which is all thinking sources together, or one source's name. `command` gives
    the words that train and evaluate a recipe file. Raises ToolkitError when the recipe cannot be swept, or at the end
    when runs failed.
    """
    console = console or default_console()
    base = recipes.load(path, overrides)
    folder = outputs() / f"{base.name}-sweep"
    with lock(folder, "sweep"):
        runs = plan(base, shares, seeds, console, of=of)
        write_plan(folder, runs)
        console.print(plan_table(runs))
        failed = work(runs, folder, command, console)
        if done := [run.folder for run in runs if run not in failed]:
            conclude(compare(done), folder, console)
    if failed:
        names = ", ".join(run.recipe.name for run in failed)
        raise ToolkitError(
            f"{len(failed)} of {len(runs)} runs failed: {names}. Logs: {folder / 'logs'}. The same command tries them "
            "again; finished runs stay as they are"
        )
    return folder


# --- the plan --------------------------------------------------------------------------------------------------------


def plan(base: Recipe, shares: Sequence[float], seeds: int, console, *, of: str = "reasoning") -> list[Planned]:
    """Every run, with one budget and one number of steps. Raises ToolkitError for a recipe that cannot give every ratio
    the same."""
    if base.data.unit != "supervised_tokens" or base.train.get("packing"):
        key = "data.unit=supervised_tokens" if base.data.unit != "supervised_tokens" else "train.packing=false"
        raise ToolkitError(f"a sweep gives every ratio the same supervised tokens, row by row: add {key}")
    if all(source.fraction is None for source in base.data.sources):
        raise ToolkitError(
            f"{base.name}: its mix is given in counts (path#500), so it has no share to sweep. Give every source a `fraction`"
        )
    if of == "reasoning" and not any(source.mode == "thinking" for source in base.data.sources):
        raise ToolkitError(
            f"{base.name}: no source has mode thinking: sweep the share of one source (--of {base.data.sources[-1].name})"
        )
    # the questions first, since every ratio must be asked the same
    base, numbers = _with_questions(resolve(base, console)), range(base.data.seed, base.data.seed + seeds)
    return _same_budget([_recipe(base, of, *chosen) for chosen in itertools.product(shares, numbers)], console)


def _with_questions(base: Recipe) -> Recipe:
    """The recipe with questions that do not depend on the ratio: its own, else those among the rows that it holds out as it
    stands, kept in the sweep's folder, else those that ship."""
    if base.evaluate.questions:
        return base
    found, sets = from_mix(compile_mix(base))["questions"] or [], []
    if found and not base.data.decontaminate:
        raise ToolkitError(f"{base.name}: one ratio would train on what another holds out: add data.decontaminate=true")
    for source in base.data.sources:
        rows = [row for row in found if row["set"] == source.name]
        for row in rows:  # the format wants a reply, which nobody is asked
            row["messages"].append({"role": "assistant", "content": row["expected_answer"]})
        file = (outputs() / f"{base.name}-sweep" / f"questions-{_word(source.name)}.jsonl").resolve()
        if rows:
            write_jsonl(file, rows)
            sets.append(Source(str(file), name=source.name, format="messages", mode=source.mode))
    return dataclasses.replace(base, evaluate=dataclasses.replace(base.evaluate, questions=tuple(sets) or SHIPPED))


def _word(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^\w.\-]", "_", name)


def _recipe(base: Recipe, of: str, share: float, seed: int) -> Recipe:
    """The recipe of one run, named after what is swept: hybrid-r0.25-s3407."""
    name = _word(f"{base.name}-{'r' if of == 'reasoning' else of}{share:g}-s{seed}")
    changes = [f"data.reasoning={share}"] if of == "reasoning" else _share_of(of, share, base)
    return recipes.from_dict(
        recipes.to_dict(base), f"sweep of {base.name}", [f"name={name}", f"data.seed={seed}", *changes]
    )


def _share_of(name: str, share: float, base: Recipe) -> list[str]:
    """Overrides that give one source a share, and the others the rest in their old proportions."""
    fractions = {source.name: source.fraction for source in base.data.sources}
    if name not in fractions:
        raise ToolkitError(f"{name}: no such source{did_you_mean(name, [*fractions, 'reasoning'])}")
    rest = sum(fractions.values()) - fractions[name]
    if rest <= 0:
        raise ToolkitError(f"{name}: the sweep needs another source with a fraction above 0 beside it")
    new = [share if other == name else (1 - share) * old / rest for other, old in fractions.items()]
    return [f"data.sources.{i}.fraction={fraction}" for i, fraction in enumerate(new)]


def _same_budget(group: list[Recipe], console) -> list[Planned]:
    """The runs with the largest budget that every one of the mixes can reach, and with equal steps."""
    while True:  # a smaller budget can make another source the one that limits a mix
        reports = [compile_mix(recipe).report for recipe in group]
        limited = [(report, name) for report in reports if (name := report["limited_by"])]
        if not limited:
            return _same_steps(group, reports)
        # what the exhausted sources can fill; a mix's total may be a part of a row above that
        least = min(
            int(report["sources"][name]["supervised_tokens"] / report["planned"][name]) for report, name in limited
        )
        least = min(least, (group[0].data.budget or math.inf) - 1)  # lower at each turn, so that the turns end
        budget = least - least % 10 ** max(0, len(str(least)) - 3)  # three digits; rounding down makes it reachable
        names = " and ".join(sorted({name for _, name in limited}))
        if not budget:
            raise ToolkitError(f"{names}: no budget is left that every ratio can reach: add rows")
        wanted = f"{group[0].data.budget:,}" if group[0].data.budget else "an open budget"
        console.print(f"{names} cannot fill {wanted} at every ratio: each run gets {budget:,} supervised tokens")
        group = [dataclasses.replace(r, data=dataclasses.replace(r.data, budget=budget)) for r in group]


def _same_steps(group: list[Recipe], reports: list[dict]) -> list[Planned]:
    """`train.max_steps` steps through each mix once, or num_train_epochs times in about as many steps as the recipe's own
    batch would take for the average mix."""
    train, runs = group[0].train, []
    steps, device = train["max_steps"], train["per_device_train_batch_size"]
    passes = 1 if steps > 0 else train["num_train_epochs"]
    seen = [report["total"]["examples"] * passes for report in reports]
    if steps <= 0:
        steps = max(1, round(sum(seen) / len(seen) / (device * train["gradient_accumulation_steps"])))
    steps = common_steps(seen, steps, device)
    for recipe, report, rows in zip(group, reports, seen, strict=True):
        per_device, accumulation = rows_per_step(rows / steps, device)
        sizes = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
        total, batch = report["total"], per_device * accumulation
        row = {
            "name": recipe.name,
            "reasoning_share": report["achieved_modes"]["supervised_tokens"].get("thinking", 0.0),
            "supervised_tokens": total["supervised_tokens"],
            "steps": steps,
            "rows": total["examples"],
            "rows_per_step": batch,
            "tokens_trained_on": round(total["supervised_tokens"] * steps * batch / total["examples"]),
        }
        train_section = {**recipe.train, **sizes, "max_steps": steps}
        runs.append(Planned(dataclasses.replace(recipe, train=train_section), row))
    return runs


def common_steps(seen: Sequence[float], wanted: int, device: int) -> int:
    """The number of steps within a fifth of `wanted` at which whole rows per step come nearest to each run's rows."""
    if min(seen) < wanted:
        raise ToolkitError(
            f"{wanted} steps are more than the {min(seen):.0f} rows of the smallest mix: set train.max_steps to at most "
            f"{min(seen) // 2:.0f}, or raise data.budget"
        )

    # rows per step are whole numbers: with few steps of many rows every mix comes near, with many steps of few it may not
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
    return rich_table([run.row for run in runs], title=f"{len(runs)} runs: the same supervised tokens, the same steps")


def write_plan(folder: Path, runs: list[Planned]) -> None:
    """The plan (sweep.json) and a recipe for each run. Raises ToolkitError, before anything trains, where a run's folder
    holds a run of another recipe."""
    for run in runs:
        text, written = recipes.to_yaml(run.recipe), run.folder / "recipe.yaml"
        if written.is_file() and written.read_text(encoding="utf-8") != text:
            raise ToolkitError(
                f"{run.folder} holds a run of another recipe, and runs are never overwritten: give the sweep another name "
                "(name=...), or move that folder away"
            )
        write_text(folder / "recipes" / f"{run.recipe.name}.yaml", text)
    write_json(folder / "sweep.json", {"runs": [run.row for run in runs]})


# --- the work --------------------------------------------------------------------------------------------------------


def work(runs: Sequence[Planned], folder: Path, command: Callable, console) -> list[Planned]:
    """Do every run that is not finished, one after the other; returns those that failed."""
    failed = []
    with Progress(console, f"{folder.name}, steps", sum(run.row["steps"] for run in runs)) as progress:
        for run in runs:
            with lock(run.folder, "sweep", wait=True):  # the training of a killed sweep may go on by itself
                progress.skip(run.steps_done())
            if run.finished():
                console.print(f"{run.recipe.name}: finished before, left as it is")
            elif not _train(run, folder, command, console, progress):
                failed.append(run)
    return failed


def _train(run: Planned, folder: Path, command: Callable, console, progress: Progress) -> bool:
    """One run in its own process; the end of its log is shown when it fails."""
    name, log = run.recipe.name, folder / "logs" / f"{run.recipe.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"{name}: training (log: {log})")
    environment, done = os.environ | {"TOOLKIT_SWEEP": folder.name, "PYTHONUNBUFFERED": "1"}, run.steps_done()
    with open(log, "a", encoding="utf-8") as out:
        words = command(folder / "recipes" / f"{name}.yaml")
        # a process of its own: what Unsloth patches and what stays on the card ends with it
        process = subprocess.Popen(words, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
                if (more := run.steps_done() - done) > 0:
                    progress.advance(more)
                    done += more
        finally:  # an interrupt leaves no orphan training
            process.terminate()
            process.wait()
    progress.skip(run.row["steps"] - done)  # of a failed run, or of one that stopped early
    if process.returncode == 0 and run.finished():
        console.print(f"{name}: done")
        return True
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
    console.print(f"{name}: failed with exit code {process.returncode}; its log ends:", style="red")
    console.print("\n".join(f"    {line}" for line in tail), markup=False)
    return False
