"""Mix ratios, or values of any key, at one budget: each run in a process of its own, ending with a recommendation.

    from toolkit.comparison import sweep; sweep.sweep("sweep_pocket", shares=[0, 0.25, 0.5, 0.75, 1], seeds=3)

Every run trains on the same number of supervised tokens in the same number of optimizer steps: rows per step are chosen
for each ratio (short chat rows: many; long traces: few), so that a step holds about budget / steps supervised tokens.

Kill it anywhere and run the same command again: finished runs are skipped, the unfinished one resumes from its checkpoint.
"""

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TypedDict

from rich.console import Console
from rich.table import Table

from toolkit import recipe as recipes
from toolkit.comparison.decide import compare
from toolkit.comparison.report import conclude, write, write_page
from toolkit.comparison.runs import NOT_TRAINED, read_run
from toolkit.data.mix import compile_mix
from toolkit.evaluation.questions import SHIPPED, from_mix
from toolkit.files import ToolkitError, did_you_mean, lock, outputs, read_json, write_json, write_jsonl, write_text
from toolkit.recipe import Recipe, Source
from toolkit.records import MixReport, Question
from toolkit.run import default_console, resolve
from toolkit.training.model import check_adapter
from toolkit.view.figures import logged
from toolkit.view.progress import Progress, time_left
from toolkit.view.tables import rich_table

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Trainings of each setting, unless told otherwise: the spread between seeds can be larger than any interval over
# questions.
SEEDS = 3
# Minutes of a run, evaluation included, up to which the further seeds are trained without being asked for.
SHORT = 5.0
# Questions of each kind by level, asked whatever they take: runs that were asked differently cannot be compared.
QUESTIONS = {"fast": None, "quick": 32, "full": 500}
# Lines of a failed run's log that are shown; seconds between looks at a run.
LOG_TAIL_LINES, POLL_SECONDS = 15, 1.0
# Keys that decide how much is trained on, which is equal in all runs of a sweep.
SET_BY_SWEEP = re.compile(r"data\.(budget|unit|reasoning)$|train\.(max_steps|num_train_epochs|packing)$")


# What trains and evaluates one run, a recipe's file after it.
TRAIN = [sys.executable, "-m", "toolkit", "train"]


class PlanRow(TypedDict):
    name: str  # of the run
    reasoning_share: float  # achieved, of supervised tokens
    supervised_tokens: int  # of its mix
    steps: int  # the same in every run
    rows: int  # of its mix
    rows_per_step: int  # so that all runs take equal steps
    tokens_trained_on: int  # supervised; those of the mix but for the rounding of rows per step


@dataclass(frozen=True)
class Planned:
    """One run of a sweep."""

    recipe: Recipe
    row: PlanRow

    @property
    def folder(self) -> Path:
        return outputs() / self.recipe.name

    def finished(self) -> bool:
        """Trained and evaluated, with all files readable and the adapter as it was written. What is not so is left to
        `train`, which writes damaged files again."""
        try:
            check_adapter(self.folder)
            read_run(self.folder)
        except ToolkitError:
            return False
        return "finished" in read_json(self.folder / "manifest.json")

    def steps_done(self) -> int:
        """Optimizer steps that its metrics.jsonl holds; 0 while its last line is not whole."""
        try:
            return max((line["step"] for line in logged(self.folder)), default=0)
        except ToolkitError:
            return 0

    def seconds(self) -> float:
        """How long a finished run took, evaluation included."""
        training = read_json(self.folder / "manifest.json").get("train_seconds", 0)
        return float(training + read_json(self.folder / "eval.json").get("seconds", 0))


def sweep(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    shares: Sequence[float] = RATIOS,
    of: str = "reasoning",
    over: Sequence[str] = (),
    seeds: int | None = None,
    console: Console | None = None,
    ending: Callable[[Sequence[Path], Path, Console], object] | None = None,
) -> Path:
    """Train, evaluate and compare every setting; returns the sweep's folder. Raises ToolkitError when a run failed, after
    all others were done.

    `shares` are those of `of`: all thinking sources together, or one source. `over` is instead a recipe key, then its
    values. Without `seeds` a setting is trained three times where that is short, else once. `ending` is
    called instead of a comparison, with the runs' folders and the sweep's, once all are finished."""
    console = console or default_console()
    base = recipes.load(path, overrides)
    settings = settings_of_key(over, base) if over else settings_of_share(of, shares, base)
    folder = outputs() / f"{base.name}-sweep"
    with lock(folder, "sweep"):
        runs = plan(base, settings, seeds or SEEDS, console)
        write_plan(folder, runs)
        first = runs[: len(settings)]
        console.print(plan_table(first))
        failed = work(runs if seeds else first, folder, console)
        if not seeds and not failed and affordable(first, console):
            failed = work(runs[len(first) :], folder, console)
        # what an earlier command trained counts too
        done = [run.folder for run in runs if run not in failed and run.finished()]
        if done and not ending:
            conclude(compare(done), console, folder)
        if ending and not failed:
            ending(done, folder, console)
    if failed:
        names = ", ".join(run.recipe.name for run in failed)
        raise ToolkitError(
            f"{len(failed)} of {len(runs)} runs failed: {names}. Logs are in {folder}/logs; the same command tries them again"
        )
    return folder


def rebuild(folder: Path) -> Path:
    """Compare a sweep's scored runs again, write its files and its page, and return the page's file. Raises ToolkitError
    where no run is scored."""
    runs = [folder.parent / row["name"] for row in read_json(folder / "sweep.json")["runs"]]
    scored = [run for run in runs if (run / "eval.json").is_file()]
    # where none is scored, none can be compared, and why is said
    comparison = compare(scored or runs)
    write(comparison, folder)
    return write_page(comparison, folder)


def affordable(first: Sequence[Planned], console: Console) -> bool:
    """Whether more seeds are trained unasked: says what they cost, and how to ask for another number."""
    minutes = [run.seconds() / 60 for run in first]
    longest = max(minutes)
    more = (SEEDS - 1) * sum(minutes)
    if longest <= SHORT:
        console.print(
            f"two more seeds of each: about {more:.0f} min, since one training does not tell settings apart (--seeds 1 "
            "leaves them out)"
        )
        return True
    console.print(
        f"one seed: a run took {longest:.0f} min, so two more of each (about {more / 60:.1f} h) are trained only on request: "
        f"--seeds {SEEDS}"
    )
    return False


# --- the settings ----------------------------------------------------------------------------------------------------

Settings = dict[str, list[str]]
"""{part of a run's name: the overrides that make it}, one for each point of a sweep."""


def settings_of_share(of: str, shares: Sequence[float], base: Recipe) -> Settings:
    """One for each share. Raises ToolkitError for a recipe that has no such share."""
    if all(source.fraction is None for source in base.data.sources):
        raise ToolkitError(
            f"{base.name}: its mix is given in counts (path#500), so it has no share to sweep. Give every source a `fraction`"
        )
    if of != "reasoning":
        return {f"{of}{share:g}": share_of_source(of, share, base) for share in shares}
    if not any(source.mode == "thinking" for source in base.data.sources):
        raise ToolkitError(
            f"{base.name}: no source has mode thinking: sweep the share of one source (--of {base.data.sources[-1].name})"
        )
    return {f"r{share:g}": [f"data.reasoning={share}"] for share in shares}


def share_of_source(name: str, share: float, base: Recipe) -> list[str]:
    """Overrides that give one source a share, and the others the rest in their old proportions."""
    fractions = {source.name: source.fraction or 0.0 for source in base.data.sources}
    if name not in fractions:
        raise ToolkitError(f"{name}: no such source{did_you_mean(name, [*fractions, 'reasoning'])}")
    rest = sum(fractions.values()) - fractions[name]
    if rest <= 0:
        raise ToolkitError(f"{name}: the sweep needs another source with a fraction above 0 beside it")
    swept = {other: (1 - share) * old / rest for other, old in fractions.items()} | {name: share}
    return [f"data.sources.{number}.fraction={fraction}" for number, fraction in enumerate(swept.values())]


def settings_of_key(over: Sequence[str], base: Recipe) -> Settings:
    """One for each value of a key: `over` is the key, then its values. Raises ToolkitError for a key that a sweep sets
    itself, or that changes no training."""
    key, *values = over
    if len(set(values)) < 2:
        raise ToolkitError(f"--over {key}: name at least two values, e.g. --over train.learning_rate 1e-4 2e-4")
    if NOT_TRAINED.match(key) or SET_BY_SWEEP.match(key):
        raise ToolkitError(
            f"--over {key}: a sweep keeps it equal in all runs, or it changes no training. Sweep a key like "
            "train.learning_rate or lora.r"
        )
    settings = {f"{key.rpartition('.')[2]}{value}": [f"{key}={value}"] for value in values}
    for setting, overrides in settings.items():  # a mistyped key or value is an error before anything is compiled
        run_recipe(base, setting, overrides, base.data.seed)
    return settings


def run_recipe(base: Recipe, setting: str, overrides: Sequence[str], seed: int) -> Recipe:
    """The recipe of one run, named after what is swept: hybrid-r0.25-s3407."""
    name = file_name(f"{base.name}-{setting}-s{seed}")
    overrides = [f"name={name}", f"data.seed={seed}", *overrides]
    return recipes.from_dict(recipes.to_dict(base), f"sweep of {base.name}", overrides)


def file_name(text: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^\w.\-]", "_", text)


# --- the plan --------------------------------------------------------------------------------------------------------


def plan(base: Recipe, settings: Settings, seeds: int, console: Console) -> list[Planned]:
    """Every run, with one budget and one number of steps, all settings of a seed before the next seed. Raises ToolkitError
    for a recipe that cannot give every run the same."""
    if base.data.unit != "supervised_tokens" or base.train.get("packing"):
        raise ToolkitError(
            "a sweep gives every run the same supervised tokens, row by row: add data.unit=supervised_tokens "
            "train.packing=false"
        )
    base = asked_alike(resolve(base, console))
    group = []
    for seed in range(base.data.seed, base.data.seed + seeds):
        group += [run_recipe(base, name, overrides, seed) for name, overrides in settings.items()]
    return same_budget(group, console)


def asked_alike(base: Recipe) -> Recipe:
    """The recipe with what an evaluation would else decide by itself, from the run's own mix and the speed of the machine:
    which questions, how many, and how long a reply may be."""
    section = base.evaluate
    own = from_mix(compile_mix(base))
    evaluate = replace(
        section,
        questions=section.questions or tuple(held_out_questions(base, own["questions"] or [])) or SHIPPED,
        questions_per_mode=section.questions_per_mode or QUESTIONS[section.level],
        max_new_tokens=section.max_new_tokens or max(own["limits"].values(), default=None),
    )
    return replace(base, evaluate=evaluate)


def held_out_questions(base: Recipe, questions: Sequence[Question]) -> Iterator[Source]:
    """Those among the rows that the recipe holds out as it stands, kept in the sweep's folder: other shares hold out other
    rows."""
    if questions and not base.data.decontaminate:
        raise ToolkitError(f"{base.name}: one run would train on what another holds out: add data.decontaminate=true")
    folder = outputs().resolve() / f"{base.name}-sweep"
    for source in base.data.sources:
        rows = [row for row in questions if row["set"] == source.name]
        for row in rows:  # the format wants a reply, which nobody is asked
            row["messages"].append({"role": "assistant", "content": row["expected_answer"]})
        file = folder / f"questions-{file_name(source.name)}.jsonl"
        if rows:
            write_jsonl(file, rows)
            yield Source(str(file), name=source.name, format="messages", mode=source.mode)


def same_budget(group: list[Recipe], console: Console) -> list[Planned]:
    """The runs with the largest budget that every one of the mixes can reach, in three digits, and with equal steps."""
    while True:  # a smaller budget can make another source the one that limits a mix
        reports = [compile_mix(recipe).report for recipe in group]
        limits = []
        for report in reports:
            if name := report["limited_by"]:
                tokens = report["sources"][name]["supervised_tokens"]
                limits.append((int(tokens / report["planned"][name]), name))
        if not limits:
            return list(same_steps(group, reports))
        budget, name = min(limits)
        wanted = group[0].data.budget
        if wanted:  # a mix may be a part of a row above its budget: lower at each turn, so that the turns end
            budget = min(budget, wanted - 1)
        budget -= budget % 10 ** max(0, len(str(budget)) - 3)
        if not budget:
            raise ToolkitError(f"{name}: no budget is left that every run can reach: add rows")
        asked = f"{wanted:,}" if wanted else "an open budget"
        console.print(f"{name} cannot fill {asked} in every run: each run gets {budget:,} supervised tokens")
        group = [replace(recipe, data=replace(recipe.data, budget=budget)) for recipe in group]


def same_steps(group: Sequence[Recipe], reports: Sequence[MixReport]) -> Iterator[Planned]:
    """`train.max_steps` steps through each mix once, or num_train_epochs times in about as many steps as the recipe's own
    batch would take for the average mix."""
    train = group[0].train
    steps = train["max_steps"]
    device = train["per_device_train_batch_size"]
    passes = 1 if steps > 0 else train["num_train_epochs"]
    rows = [report["total"]["examples"] * passes for report in reports]
    if steps <= 0:
        batch = device * train["gradient_accumulation_steps"]
        steps = max(1, round(fmean(rows) / batch))
    steps = common_steps(rows, steps, device)
    for recipe, report in zip(group, reports, strict=True):
        total = report["total"]
        per_device, accumulation = rows_per_step(total["examples"] * passes / steps, device)
        batch = per_device * accumulation
        row = PlanRow(
            name=recipe.name,
            reasoning_share=report["achieved_modes"]["supervised_tokens"].get("thinking", 0.0),
            supervised_tokens=total["supervised_tokens"],
            steps=steps,
            rows=total["examples"],
            rows_per_step=batch,
            tokens_trained_on=round(total["supervised_tokens"] * steps * batch / total["examples"]),
        )
        sizes = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
        yield Planned(replace(recipe, train={**recipe.train, **sizes, "max_steps": steps}), row)


def common_steps(rows: Sequence[float], wanted: int, device: int) -> int:
    """The number of steps within a fifth of `wanted` at which whole rows per step come nearest to each run's rows."""
    if min(rows) < wanted:
        raise ToolkitError(
            f"{wanted} steps are more than the {min(rows):.0f} rows of the smallest mix: set train.max_steps to at most "
            f"{min(rows) // 2:.0f}, or raise data.budget"
        )

    # rows per step are whole numbers: with few steps of many rows every mix comes near, with many steps of few it may not
    def error(steps: int) -> float:
        return max(abs(math.prod(rows_per_step(count / steps, device)) * steps / count - 1) for count in rows)

    near = range(math.ceil(wanted * 0.8), math.floor(wanted * 1.2) + 1)
    return min(near, key=lambda steps: (round(error(steps), 2), abs(steps - wanted)))


def rows_per_step(rows: float, device: int) -> tuple[int, int]:
    """(rows at a time, accumulation) nearest to `rows` a step with at most `device` rows at a time."""
    accumulation = max(1, math.ceil(rows / device - 0.5 / device))
    return max(1, min(device, round(rows / accumulation))), accumulation


def plan_table(runs: Sequence[Planned]) -> Table:
    """What will be trained on, side by side: one budget, one number of steps; 80 columns wide."""
    return rich_table([run.row for run in runs], title=f"{len(runs)} runs: the same supervised tokens, the same steps")


def write_plan(folder: Path, runs: Sequence[Planned]) -> None:
    """The plan (sweep.json) and a recipe for each run. Raises ToolkitError, before anything trains, where a run's folder
    holds a run of another recipe."""
    for run in runs:
        text = recipes.to_yaml(run.recipe)
        written = run.folder / "recipe.yaml"
        if written.is_file() and written.read_text(encoding="utf-8-sig", errors="replace") != text:
            raise ToolkitError(
                f"{run.folder} holds a run of another recipe, and runs are never overwritten: give the sweep another name "
                "(name=...), or move that folder away"
            )
        write_text(folder / "recipes" / f"{run.recipe.name}.yaml", text)
    write_json(folder / "sweep.json", {"runs": [run.row for run in runs]})


# --- the work --------------------------------------------------------------------------------------------------------


def work(runs: Sequence[Planned], folder: Path, console: Console) -> list[Planned]:
    """Do every run that is not finished, one after the other; returns those that failed."""
    failed = []
    with Progress(console, "whole sweep", sum(run.row["steps"] for run in runs)) as progress:
        for number, run in enumerate(runs, 1):
            title = f"run {number} of {len(runs)} ({setting_of(run, folder)})"
            with lock(run.folder, "sweep", wait=True):  # the training of a killed sweep may go on by itself
                progress.skip(run.steps_done())
            if run.finished():
                console.print(f"{run.recipe.name}: finished before, left as it is")
            elif not train_run(run, title, folder, console, progress):
                failed.append(run)
    return failed


def setting_of(run: Planned, folder: Path) -> str:
    """`50% reasoning, seed 3408`, or the setting as the run's name has it."""
    setting = run.recipe.name.removeprefix(folder.name.removesuffix("sweep")).rpartition("-s")[0]
    data = run.recipe.data
    share = sum(source.fraction or 0 for source in data.sources if source.mode == "thinking")
    # lora.r=8 is named r8 too
    shown = f"{share:.0%} reasoning" if setting == f"r{share:g}" else setting
    return f"{shown}, seed {data.seed}"


def train_run(run: Planned, title: str, folder: Path, console: Console, progress: Progress) -> bool:
    """One run in its own process; the end of its log is shown when it fails."""
    name = run.recipe.name
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"{name}: training (log: {log})")
    words = [*TRAIN, str(folder / "recipes" / f"{name}.yaml")]
    environment = os.environ | {"TOOLKIT_SWEEP": folder.name, "PYTHONUNBUFFERED": "1"}
    first = done = run.steps_done()
    steps = run.row["steps"]
    began = moved = time.monotonic()
    with open(log, "a", encoding="utf-8") as out:
        # a process of its own: what Unsloth patches and what stays on the card ends with it
        process = subprocess.Popen(words, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment)
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                before, done = done, max(done, run.steps_done())
                now = time.monotonic()
                if done > before:
                    moved = now
                pace = (now - began) / max(1, done - first)
                left = time_left(pace * (steps - done))
                # a clock, since no step ends while a model loads or answers
                if done == first:
                    left = f"begun {now - moved:.0f} s ago"
                if done == steps:
                    left = f"evaluating for {now - moved:.0f} s"
                progress.title = f"{title}: step {done} of {steps}, {left}; whole sweep"
                progress.advance(done - before)
        finally:  # an interrupt leaves no orphan training
            process.terminate()
            process.wait()
    progress.skip(steps - done)  # of a failed run, or of one that stopped early
    if process.returncode == 0 and run.finished():
        console.print(f"{name}: done")
        return True
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
    console.print(f"{name}: failed with exit code {process.returncode}; its log ends:", style="red")
    console.print("\n".join(tail), markup=False)
    return False
