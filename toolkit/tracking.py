"""Runs in wandb: one for each training with its evaluation, one for each comparison; offline where there is no account.

with training(recipe, mixed, folder): ...
finish(recipe, mixed, folder, evaluate.summary(result), result["samples"], console)

Names that stay: config `mix/reasoning_share_{examples,tokens,supervised_tokens}`; summary
`eval/{base,tuned,difference}/{thinking,non_thinking,forgetting}/METRIC`, with `.low` and `.high` beside each.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from toolkit import recipe as recipes
from toolkit.mix import Mix
from toolkit.recipe import Recipe


def wanted(train: dict) -> bool:
    """Whether a run reports to wandb, by its recipe's `train:` section; `report_to` is a name or a list of names."""
    to = train.get("report_to", "none")
    return "wandb" in (to if isinstance(to, list) else [to])


@contextlib.contextmanager
def training(recipe: Recipe, mixed: Mix, folder: Path) -> Iterator[None]:
    """wandb around a training, left open for the evaluation that follows; closed as crashed on an error."""
    if not wanted(recipe.train):
        yield
        return
    run = _start(recipe, mixed, folder)
    try:
        yield
    except BaseException:  # an interrupt too closes the run as crashed
        run.finish(exit_code=1)
        raise


def finish(recipe: Recipe, mixed: Mix, folder: Path, summary: dict, replies: list[dict], console) -> None:
    """Add evaluation to the run's wandb summary, some replies as a table, and close it."""
    if not wanted(recipe.train):
        return
    import wandb

    run = wandb.run or _start(recipe, mixed, folder)
    run.summary.update(summary)
    run.log({"eval/replies": wandb.Table(list(replies[0]), [list(row.values()) for row in replies])})
    _close(run, folder, console)


def comparison(folder: Path, share: str, points: list[dict], table: tuple[list, list], summary: dict, console) -> None:
    """A run that holds a comparison: `points` as curves over the key `share`, `table` (columns, rows) of all runs,
    comparison.png of `folder`, and `summary`. The same runs compared again go to the same wandb run."""
    import wandb

    columns, rows = table
    key = hashlib.sha256(" ".join(sorted(row[0] for row in rows)).encode()).hexdigest()[:8]
    name = f"{folder.name}-comparison"
    try:
        run = _open(folder, name=name, id=f"{name}-{key}", group=folder.name, job_type="comparison", resume="allow")
    except (
        Exception
    ) as error:  # wandb raises many kinds: no network, another worker logging it right now; the files are there
        console.print(f"wandb: the comparison was not logged ({error})")
        return
    run.define_metric(share)
    run.define_metric("eval/*", step_metric=share)
    for point in points:
        run.log(point)
    run.log({"comparison": wandb.Table(columns, rows), "picture": wandb.Image(str(folder / "comparison.png"))})
    run.summary.update(summary)
    _close(run, folder, console)


def _start(recipe: Recipe, mixed: Mix, folder: Path):
    """The wandb run of a run folder; the same folder always continues the same one."""
    mix = {f"mix/reasoning_share_{u}": s.get("thinking", 0.0) for u, s in mixed.report["achieved_modes"].items()}
    config = {"recipe": recipes.to_dict(recipe), **mix, "mix/achieved": mixed.report["achieved"]}
    key = recipes.sha256(recipe)[:8]
    group = os.environ.get("TOOLKIT_SWEEP")
    return _open(folder, name=recipe.name, id=f"{recipe.name}-{key}", group=group, config=config, resume="allow")


def _open(folder: Path, **values):
    import wandb

    os.environ.setdefault("WANDB_PROJECT", "qwen3-both-modes")
    os.environ.setdefault("WANDB_SILENT", "true")  # its lines would break the progress display; ours says what matters
    if not has_account():
        os.environ.setdefault("WANDB_MODE", "offline")
    joined = "WANDB_SERVICE" in os.environ
    run = wandb.init(dir=str(folder), settings=wandb.Settings(silent=True, console="off"), **values)
    if not joined:  # or child processes would share this one's, where a run whose process was killed stays "in use"
        os.environ.pop("WANDB_SERVICE", None)
    return run


def _close(run, folder: Path, console) -> None:
    """Finish the run and say where it can be seen, or which command brings it there."""
    offline = f"kept offline; upload with `wandb sync {folder / 'wandb'}/offline-run-*`"
    console.print(f"wandb: {run.url or offline}")
    run.finish()


def has_account() -> bool:
    """Whether wandb could upload: a key in the environment or in ~/.netrc."""
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
