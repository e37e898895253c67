"""wandb: one run per training with its evaluation, one per comparison; never a reason to stop.

tracking.check(recipe.train); TRACKER.begin(recipe, mixed, folder); TRACKER.log({"step": 1, "loss": 2.0})

`run.preflight` calls `check` before a row is read. `training.record.RunRecorder` calls `begin` with the first step and passes
every line of metrics.jsonl to `log`; KEYS says which of its values go to wandb, under which name. `finish` adds the evaluation
once eval.json is written (its keys: `evaluation.words.summary`), `comparison.report` a comparison. Other trackers are
transformers' own (`training.trainer.sft_arguments`); wandb is not, because transformers' callback would add 400 keys and local
paths.

Ratios side by side: the run `<sweep>-comparison` holds the table, the picture and every number over the shares (`sweep/…`), which
its workspace draws as lines by itself. The project is the recipe's `train.project` (transformers' own name for it), else
$WANDB_PROJECT.
"""

import functools
import glob
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import requests
from rich.console import Console

from toolkit import recipe as recipes
from toolkit.data.mix import Mix
from toolkit.files import Say, ToolkitError, first_line, read_json, shareable
from toolkit.recipe import Recipe
from toolkit.records import MixReport
from toolkit.training.folder import read_manifest

# Names for `report_to`, which are those of the Python packages they need.
PACKAGES = ("wandb", "tensorboard", "swanlab", "trackio", "mlflow")
# Key of a metrics.jsonl line → key in wandb's history.
KEYS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "epoch": "train/epoch",
    "tokens": "train/tokens",
    "supervised_tokens": "train/supervised_tokens",
    "tokens_per_second": "speed/tokens_per_second",
    "supervised_tokens_per_second": "speed/supervised_tokens_per_second",
    "peak_memory_gib": "memory/peak_gib",
    "eval_loss": "validation/loss",
    "eval_forgetting_kl": "validation/forgetting/kl",
    "eval_token_accuracy": "validation/token_accuracy",
}
# Key of a validation loss by source and mode; it becomes `validation/loss/SOURCE/MODE`.
SOURCE_LOSS = re.compile("eval_(.+/.+)_loss")
# Validation losses by source and mode that are logged, so that history and summary stay below 60 keys.
MAX_SOURCES = 12
# In the mix's folder; drawn before the training where wandb is asked for.
MIX_PICTURE = "mix.png"
# How long wandb's address may take to answer before a run is kept offline.
REACH_SECONDS = 5
# How long a finished run waits for its upload; what is left stays in the folder for `wandb sync`.
FINISH_SECONDS = 60

Row = Mapping[str, Any]


def trackers(train: Row) -> list[str]:
    """Names in a recipe's `train.report_to`, which is a name, a list of names or `none`."""
    names = train.get("report_to") or []
    return [name for name in ([names] if isinstance(names, str) else names) if name != "none"]


def check(train: Row) -> None:
    """Before a model is loaded: raises ToolkitError for an unknown tracker, or one whose package is missing."""
    for name in trackers(train):
        if name not in PACKAGES:
            raise ToolkitError(f"train.report_to: {name}: expected one of {', '.join(PACKAGES)} or none")
        if importlib.util.find_spec(name) is None:
            raise ToolkitError(
                f"train.report_to: {name} is not installed: `pip install {name}`, or set train.report_to=none"
            )


def has_account() -> bool:
    """Whether wandb could upload: a key in the environment or in ~/.netrc."""
    return bool(os.environ.get("WANDB_API_KEY") or requests.utils.get_netrc_auth(_address()))


def _address() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


class Tracker:
    """The wandb run of this process, of which wandb has one at a time. No method fails: training never stops for a log."""

    def __init__(self) -> None:
        self.run: Any = None
        """The open wandb run."""
        self.has_failed = False
        """Whether an error of the open run was said already; later ones are not."""
        self.say: Say = print

    def _attempt(self, what: str, action: Callable[..., Any], *args: Any, **values: Any) -> None:
        """Call wandb; its first error in a run is said."""
        try:
            action(*args, **values)
        except Exception as error:  # wandb raises its own errors, OSError, ValueError, protobuf's …
            if not self.has_failed:
                self.say(
                    f"wandb: {what} failed ({first_line(error)}); training continues, every number is in metrics.jsonl"
                )
            self.has_failed = True

    def begin(self, recipe: Recipe, mixed: Mix, folder: Path) -> None:
        """Open the wandb run of a training, if its recipe asks for one; it stays open for the evaluation that follows."""
        self.end()  # the run of a training that was not evaluated
        if "wandb" in trackers(recipe.train):
            self._attempt("starting a run", self._start, recipe, mixed.report, folder)
        if self.run:
            self._attempt("logging the mix", self._log_mix, mixed.report, mixed.folder / MIX_PICTURE)

    def end(self, exit_code: int = 0) -> None:
        """Close the open run, if there is one; with an exit code wandb shows it as crashed."""
        if self.run:
            self._attempt("closing the run", self.run.finish, exit_code=exit_code)
        self.run = None

    def log(self, row: Row) -> None:
        """Log a line of metrics.jsonl: the values that KEYS and the losses by source name, against `step`."""
        if self.run is None:
            return
        losses = [found for key in row if (found := SOURCE_LOSS.fullmatch(key))]
        names = KEYS | {loss[0]: f"validation/loss/{loss[1]}" for loss in losses[:MAX_SOURCES]}
        values = {name: row[key] for key, name in names.items() if row.get(key) is not None}
        if values:
            self._attempt("logging", self.run.log, {"step": row["step"], **values})

    def log_table(self, key: str, rows: Sequence[Row]) -> None:
        """Log rows with equal keys as a table, e.g. the replies to the fixed prompts under `samples`."""
        if self.run and rows:
            self._attempt(f"logging {key}", self._put_table, key, rows)

    def _put_table(self, key: str, rows: Sequence[Row]) -> None:
        import wandb

        table = wandb.Table(list(rows[0]), [scrub(list(row.values())) for row in rows])
        # Bound by hand, wandb keeps the table among the run's own files; else a second copy is staged under the home
        # folder, whose path would be written into the run.
        table.bind_to_run(self.run, key, self.run.step)
        self.run.log({key: table})

    def _put_picture(self, key: str, file: Path) -> None:
        import wandb

        self.run.log({key: wandb.Image(str(file))})

    def _log_mix(self, report: MixReport, picture: Path) -> None:
        """The mix as a table (one row per source), and its picture where `run` has drawn one."""
        rows = []
        for name, source in report["sources"].items():
            row = {"source": name, "planned": report["planned"][name]}
            row |= {"rows": source["rows_kept"], "tokens": source["tokens"]}
            rows.append(row | {unit: shares.get(name, 0.0) for unit, shares in report["achieved"].items()})
        self._put_table("mix/shares", rows)
        if picture.is_file():
            self._put_picture("mix/picture", picture)

    def finish(self, recipe: Recipe, folder: Path, summary: Row, replies: Sequence[Row], console: Console) -> None:
        """Add an evaluation to the run's wandb summary, some replies as a table, and close it."""
        self.say = functools.partial(console.print, soft_wrap=True)  # a command stays on one line
        if "wandb" not in trackers(recipe.train):
            return
        if self.run is None:  # evaluated in another process than trained: wandb continues the run by its id
            self._attempt("starting a run", self._start, recipe, read_json(folder / "mix.json"), folder)
        self._conclude([folder], summary, "eval/replies", replies)

    def comparison(
        self,
        folder: Path,
        compared: Sequence[Path],
        rows: Sequence[Row],
        curve: Sequence[Row],
        sentences: str,
        project: str | None,
        console: Console,
    ) -> None:
        """A wandb run that holds a comparison: its table, its picture (`folder`/comparison.png), its `curve` (every number over
        the axis, which comes first in a row) and what it recommends. Says the one command that uploads it and the runs in
        `compared`.

        The same runs compared again continue the same wandb run."""
        self.say = functools.partial(console.print, soft_wrap=True)
        runs = " ".join(sorted(row["runs"] for row in rows))
        name = f"{folder.name}-comparison"
        # a hash of the runs, so that the same comparison is one wandb run and another is another
        key = f"{name}-{hashlib.sha256(runs.encode()).hexdigest()[:8]}"
        values = {"name": name, "id": key, "group": folder.name, "job_type": "comparison", "project": project}
        self._attempt("starting a run", self._open, folder, **values)
        if self.run:
            self._attempt("logging the picture", self._put_picture, "picture", folder / "comparison.png")
            self._attempt("logging the curve", self._log_curve, curve)
        self._conclude([*compared, folder], {"recommendation": sentences}, "comparison", rows)

    def _log_curve(self, curve: Sequence[Row]) -> None:
        if not curve:
            return
        # `dial/scale` or `sweep/reasoning`: wandb draws a line for each other number of the rows over it
        axis = next(iter(curve[0]))
        self.run.define_metric(f"{axis.partition('/')[0]}/*", step_metric=axis)
        for row in curve:
            self.run.log(row)

    def _conclude(self, folders: Sequence[Path], summary: Row, key: str, rows: Sequence[Row]) -> None:
        """Add a summary and a table to the open run and close it."""
        if self.run:
            self._attempt("logging the summary", self.run.summary.update, scrub(summary))
            self.log_table(key, rows)
            self._attempt("closing the run", self._close, folders)
        self.run = None

    def _start(self, recipe: Recipe, report: MixReport, folder: Path) -> None:
        """Open the wandb run of a run folder; the same folder always continues the same one."""
        thinking = {unit: shares.get("thinking", 0.0) for unit, shares in report["achieved_modes"].items()}
        config = {"recipe": recipes.to_dict(recipe), "mix/achieved": report["achieved"]}
        config |= {f"mix/reasoning_share_{unit}": share for unit, share in thinking.items()}
        tags = [Path(recipe.model.model_name).name[:64], f"{thinking[report['unit']]:.0%} reasoning"]  # wandb's limit
        self._open(
            folder,
            name=recipe.name,
            id=f"{recipe.name}-{recipes.sha256(recipe)[:8]}",
            group=read_manifest(folder).get("sweep", recipe.name),
            job_type="train",
            project=recipe.train.get("project"),
            tags=tags,
            config=scrub(config),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def _open(self, folder: Path, **values: Any) -> None:
        """Open a wandb run in a folder; offline where there is no account, or wandb cannot be reached."""
        import wandb

        self.run = None
        self.has_failed = False
        os.environ.setdefault("WANDB_PROJECT", "toolkit")
        # its lines would break the progress display; ours says what matters
        os.environ.setdefault("WANDB_SILENT", "true")
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=20, finish_timeout=FINISH_SECONDS, disable_git=True,
            # what wandb records by itself names the machine, the user and the program's path
            disable_code=True, x_disable_meta=True, x_disable_machine_info=True, host="-", username="-", email="",
            program="toolkit", program_relpath="toolkit", program_abspath="toolkit", root_dir=str(folder),
        )  # fmt: skip
        values |= {"dir": str(folder), "settings": settings, "resume": "allow"}
        is_shared = "WANDB_SERVICE" in os.environ
        # in the call, as wandb reads the variable once and what is set there outlasts this run
        mode = os.environ.get("WANDB_MODE") or ("online" if has_account() else "offline")
        try:
            if mode == "online":
                # first: where nobody answers, wandb gives up late, and keeps the run's id in use
                requests.head(_address(), timeout=REACH_SECONDS)
            self.run = wandb.init(mode=mode, **values)
        except (requests.RequestException, wandb.errors.Error) as error:
            self.say(f"wandb: no connection ({first_line(error)}); this run is kept offline, and training continues")
            self.run = wandb.init(mode="offline", **values)
        if not is_shared:
            # or child processes would share this one's, where a run whose process was killed stays "in use"
            os.environ.pop("WANDB_SERVICE", None)

    def _close(self, folders: Sequence[Path]) -> None:
        """Finish the run and say where it can be seen, or which command uploads the offline runs of folders."""
        if not self.run.disabled:
            self.say(f"wandb: {self.run.url or f'kept offline; upload with `{upload_command(folders)}`'}")
        logs = Path(self.run.settings.sync_dir) / "logs"
        self.run.finish()
        shutil.rmtree(logs, ignore_errors=True)  # wandb's own debug logs hold absolute paths


# The one of this process: training opens a run, and the evaluation after it closes it.
TRACKER = Tracker()


def upload_command(folders: Sequence[Path]) -> str:
    """What uploads the offline runs of folders: one pattern where it names no other folder, else each by its name."""
    names = [os.path.relpath(folder) for folder in folders]
    shared = os.path.commonprefix(names)  # noqa: RUF071 - of names, `ratios-`, not of folders
    pattern = f"{glob.escape(shared)}*/wandb"
    if len(names) > 1 and set(glob.glob(pattern)) == {f"{name}/wandb" for name in names}:
        return f"wandb sync {shlex.quote(shared)}*/wandb"
    return shlex.join(["wandb", "sync", *(f"{name}/wandb" for name in names)])


def scrub(value: Any) -> Any:
    """A copy of plain values without the home folder, its name in other paths (/mnt/NAME) and secrets of the environment."""
    if isinstance(value, dict):
        return {key: scrub(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(child) for child in value]
    if not isinstance(value, str):
        return value
    for name, secret in os.environ.items():
        if re.search("KEY|TOKEN|SECRET|PASSWORD", name) and len(secret) >= 8:
            value = value.replace(secret, "***")
    value = shareable(value)
    user = Path.home().name
    return re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\]|$)", "~", value) if len(user) > 2 else value
