"""Experiment trackers: one wandb run per training with its evaluation, one per comparison; never a reason to stop.

tracking.check(recipe.train, folder); TRACKER.begin(recipe, mixed, folder); TRACKER.log({"step": 1, "loss": 2.0})

Callers and what they pass: `run.train` calls `check` before a model is loaded; `training.record.RunRecorder` calls `begin`
with the first step, passes every line of metrics.jsonl to `log` (KEYS says which of its values go to wandb, under which name)
and the fixed prompts' replies to `log_table`; `training.trainer.sft_arguments` gives transformers every tracker but wandb,
because its own wandb callback would add 400 keys and local paths; after eval.json is written, and again when a finished run is
opened, `finish` adds the evaluation. Config holds the recipe and `mix/reasoning_share_{examples,tokens,supervised_tokens}`; the summary holds
`evaluate.summary(result)`: `eval/{base,tuned,difference}/{thinking,non_thinking,forgetting}/METRIC`.

Ratios side by side in wandb: the run `<sweep>-comparison` holds the table and the picture. A curve over the share, in a
project filtered to the sweep's group: Add panel → Scatter plot, x = config `mix/reasoning_share_supervised_tokens`,
y = summary `eval/tuned/thinking/accuracy`.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import requests
from packaging import version
from rich.console import Console

from toolkit import recipe as recipes
from toolkit.data.mix import Mix
from toolkit.files import ToolkitError, read_json, sha256, write_text
from toolkit.recipe import Recipe
from toolkit.records import MixReport

PACKAGES = ("wandb", "tensorboard", "swanlab", "trackio", "mlflow")
"""Names for `report_to`, which are those of the Python packages they need."""
BELOW = {"swanlab": "0.8"}
"""Versions from which a tracker fails in the pinned transformers: swanlab's get_run() raises where its callback expects
None (tried: 0.7.20 works; 0.8.5, 0.9.8 and 0.10.3 raise)."""
SWANLAB_FOLDER = os.environ.get("SWANLAB_LOG_DIR")
"""Where a user wants swanlab's files; without it they go into the run folder."""
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
"""Key of a metrics.jsonl line → key in wandb's history. `eval_SOURCE/MODE_loss` becomes `validation/loss/SOURCE/MODE`."""
MAX_SOURCES = 12
"""Validation losses by source and mode that are logged, so that history and summary stay below 60 keys."""
REACH_SECONDS = 5
MIX_PICTURE = "mix.png"
"""In the run's folder; drawn before the training where wandb is asked for."""
FINISH_SECONDS = 60
"""How long a finished run waits for its upload; what is left stays in the folder for `wandb sync`."""

Row = Mapping[str, Any]


def trackers(train: Row) -> list[str]:
    """Names in a recipe's `train.report_to`, which is a name, a list of names or `none`."""
    to = train.get("report_to") or "none"
    return [name for name in (to if isinstance(to, list | tuple) else [to]) if name != "none"]


def check(train: Row, folder: Path, say: Callable[[str], None] = print) -> None:
    """Before a model is loaded: every tracker's package is installed, and wandb can upload or goes offline, saying why.

    Raises ToolkitError for an unknown tracker or a missing package. Takes at most about REACH_SECONDS.
    """
    for name in trackers(train):
        if name not in PACKAGES:
            raise ToolkitError(f"train.report_to: {name}: expected one of {', '.join(PACKAGES)} or none")
        wanted = f"{name}<{BELOW[name]}" if name in BELOW else name
        advice = f"`pip install '{wanted}'`, or set train.report_to=none"
        if importlib.util.find_spec(name) is None:
            raise ToolkitError(f"train.report_to: {name} needs a package that is not installed: {advice}")
        if name not in BELOW:
            continue
        installed = version.parse(importlib.metadata.version(name))
        if installed >= version.parse(BELOW[name]):
            raise ToolkitError(f"train.report_to: {name} {installed} is too new here: {advice}")
    os.environ["SWANLAB_LOG_DIR"] = SWANLAB_FOLDER or str(folder / "swanlog")
    reason = offline_reason() if "wandb" in trackers(train) else ""
    TRACKER.say, TRACKER.is_offline = say, bool(reason)
    if reason:
        say(f"wandb: {reason}; this run is kept offline in {folder / 'wandb'}, and training continues")


def has_account() -> bool:
    """Whether wandb could upload: a key in the environment or in ~/.netrc."""
    return bool(_api_key())


def _address() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _api_key() -> str:
    return os.environ.get("WANDB_API_KEY") or (requests.utils.get_netrc_auth(_address()) or ("", ""))[1]


def offline_reason() -> str:
    """Why an account cannot be used now; empty where it can, or where nobody asked for uploads."""
    key = _api_key()
    if not key or os.environ.get("WANDB_MODE", "online") != "online":
        return ""
    if len(key.rpartition("-")[2]) < 40:  # wandb's own rule for keys, which it only checks after a prompt
        return "the API key is malformed (expected 40 characters or more; `wandb login` stores a new one)"
    try:
        requests.head(_address(), timeout=REACH_SECONDS)
    except requests.RequestException as error:
        return f"{_address()} cannot be reached ({type(error).__name__})"
    return ""


class Tracker:
    """The wandb run of this process, of which wandb has one at a time. No method fails: training never stops for a log."""

    def __init__(self) -> None:
        self.run: Any = None
        """The open wandb run."""
        self.is_offline = False
        """Whether `check` saw that nothing can be uploaded now."""
        self.has_failed = False
        """Whether an error of the open run was said already; later ones are not."""
        self.say: Callable[[str], None] = print

    def _attempt(self, what: str, action: Callable[..., Any], *args: Any, **values: Any) -> None:
        """Call wandb; its first error in a run is said."""
        try:
            action(*args, **values)
        except Exception as error:  # wandb raises its own errors, OSError, ValueError, protobuf's …
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if not self.has_failed:
                self.say(f"wandb: {what} failed ({reason}); training continues, every number is in metrics.jsonl")
            self.has_failed = True

    def begin(self, recipe: Recipe, mixed: Mix, folder: Path) -> None:
        """Open the wandb run of a training, if its recipe asks for one; it stays open for the evaluation that follows."""
        if self.run:  # of a training that was not evaluated
            self._attempt("closing the run before", self.run.finish)
            self.run = None
        if "wandb" in trackers(recipe.train):
            self._attempt("starting a run", self._start, recipe, mixed.report, folder)
        if self.run:
            self._attempt("logging the mix", self._log_mix, mixed.report, folder)

    def crash(self) -> None:
        """Close the run of a training that ended early; wandb shows it as crashed."""
        if self.run:
            self._attempt("closing the run", self.run.finish, exit_code=1)
        self.run = None

    def log(self, row: Row) -> None:
        """Log a line of metrics.jsonl: the values that KEYS and the losses by source name, against `step`."""
        if self.run is None:
            return
        named = {KEYS[key]: value for key, value in row.items() if key in KEYS and value is not None}
        sources = [key for key in row if key.startswith("eval_") and key.endswith("_loss") and "/" in key]
        for key in sources[:MAX_SOURCES]:
            named["validation/loss/" + key.removeprefix("eval_").removesuffix("_loss")] = row[key]
        if named:
            self._attempt("logging", self.run.log, {"step": row["step"], **named})

    def log_table(self, key: str, rows: Sequence[Row]) -> None:
        """Log rows with equal keys as a table, e.g. the replies to the fixed prompts under `samples`."""
        if self.run and rows:
            self._attempt(f"logging {key}", self._put_table, key, rows)

    def _put_table(self, key: str, rows: Sequence[Row]) -> None:
        import wandb

        table = wandb.Table(list(rows[0]), [[scrub(value) for value in row.values()] for row in rows])
        # Bound by hand, wandb keeps the table among the run's own files; else a second copy is staged under the home
        # folder, whose path would be written into the run.
        table.bind_to_run(self.run, key, self.run.step)
        self.run.log({key: table})

    def _put_picture(self, key: str, file: Path) -> None:
        import wandb

        self.run.log({key: wandb.Image(str(file))})

    def _log_mix(self, report: MixReport, folder: Path) -> None:
        """The mix as a table (one row per source), and its picture where `run` has drawn one."""
        rows = []
        for name, source in report["sources"].items():
            shares = {unit: achieved.get(name, 0.0) for unit, achieved in report["achieved"].items()}
            sizes = {"rows": source["rows_kept"], "tokens": source["tokens"]}
            rows.append({"source": name, "planned": report["planned"][name], **sizes, **shares})
        self._put_table("mix/shares", rows)
        if (folder / MIX_PICTURE).is_file():
            self._put_picture("mix/picture", folder / MIX_PICTURE)

    def finish(self, recipe: Recipe, folder: Path, summary: Row, replies: Sequence[Row], console: Console) -> None:
        """Add the evaluation in `folder`/eval.json to the run's wandb summary, some replies as a table, and close it.

        Does nothing when this eval.json has been logged already, so that it may be called whenever a run is opened.
        """
        self.say = console.print
        # a mark by content: an evaluation that is repeated at another level is sent again
        logged, digest = folder / "wandb" / "evaluation.sha256", sha256(folder / "eval.json")
        was_sent = self.run is None and logged.is_file() and logged.read_text() == digest
        if was_sent or "wandb" not in trackers(recipe.train):
            return
        if self.run is None:  # evaluated in another process than trained: wandb continues the run by its id
            self._attempt("starting a run", self._start, recipe, read_json(folder / "mix.json"), folder)
        if self._conclude(folder, summary, "eval/replies", replies, console):
            self._attempt("marking the evaluation as logged", write_text, logged, digest)

    def comparison(self, folder: Path, rows: Sequence[Row], sentences: str, console: Console) -> None:
        """A wandb run that holds a comparison: its table, its picture (`folder`/comparison.png) and what it recommends.

        The same runs compared again continue the same wandb run."""
        self.say = console.print
        name, runs = f"{folder.name}-comparison", " ".join(sorted(row["runs"] for row in rows))
        # a hash of the runs, so that the same comparison is one wandb run and another is another
        key = f"{name}-{hashlib.sha256(runs.encode()).hexdigest()[:8]}"
        values = {"name": name, "id": key, "group": folder.name, "job_type": "comparison"}
        self._attempt("starting a run", self._open, folder, **values)
        if self.run:
            self._attempt("logging the picture", self._put_picture, "picture", folder / "comparison.png")
        self._conclude(folder, {"recommendation": sentences}, "comparison", rows, console)

    def _conclude(self, folder: Path, summary: Row, key: str, rows: Sequence[Row], console: Console) -> bool:
        """Add a summary and a table to the open run and close it; whether they went anywhere."""
        is_kept = self.run is not None and not self.run.disabled
        if self.run:
            self._attempt("logging the summary", self.run.summary.update, scrub(summary))
            self.log_table(key, rows)
            self._attempt("closing the run", self._close, folder, console)
        self.run = None
        return is_kept

    def _start(self, recipe: Recipe, report: MixReport, folder: Path) -> None:
        """Open the wandb run of a run folder; the same folder always continues the same one."""
        thinking = {unit: shares.get("thinking", 0.0) for unit, shares in report["achieved_modes"].items()}
        shares = {f"mix/reasoning_share_{unit}": share for unit, share in thinking.items()}
        config = {"recipe": recipes.to_dict(recipe), **shares, "mix/achieved": report["achieved"]}
        # wandb refuses tags of more than 64 characters
        tags = [Path(recipe.model.model_name).name, f"{100 * thinking[report['unit']]:.0f}% reasoning"]
        name, group = recipe.name, os.environ.get("TOOLKIT_SWEEP") or recipe.name
        self._open(folder, name=name, id=f"{name}-{recipes.sha256(recipe)[:8]}", group=group, job_type="train",
                   tags=[tag[:64] for tag in tags], config=scrub(config))  # fmt: skip
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def _open(self, folder: Path, **values: Any) -> None:
        import wandb

        self.run, self.has_failed = None, False
        os.environ.setdefault("WANDB_PROJECT", "qwen3-both-modes")
        # its lines would break the progress display; ours says what matters
        os.environ.setdefault("WANDB_SILENT", "true")
        # in the call, as wandb reads the variable once and what is set there outlasts this run; None is online
        wanted = os.environ.get("WANDB_MODE") or ("online" if has_account() else "offline")
        mode = "offline" if self.is_offline else None if wanted == "online" else wanted
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=20, finish_timeout=FINISH_SECONDS, disable_git=True, disable_code=True,
            # what wandb records by itself names the machine, the user and the program's path
            x_disable_meta=True, x_disable_machine_info=True, host="-", username="-", email="", program="toolkit",
            program_relpath="toolkit", program_abspath="toolkit", root_dir=str(folder),
        )  # fmt: skip
        values |= {"dir": str(folder), "settings": settings, "resume": "allow"}
        was_shared = "WANDB_SERVICE" in os.environ
        try:
            self.run = wandb.init(mode=mode, **values)
        except wandb.errors.CommError as error:
            self.say(f"wandb: no connection ({str(error).splitlines()[0]}); this run is kept offline")
            self.run = wandb.init(mode="offline", **values)
        if (
            not was_shared
        ):  # or child processes would share this one's, where a run whose process was killed stays "in use"
            os.environ.pop("WANDB_SERVICE", None)

    def _close(self, folder: Path, console: Console) -> None:
        """Finish the run and say where it can be seen, or which command uploads it."""
        offline = f"kept offline; upload with `wandb sync {folder / 'wandb'}/offline-run-*`"
        if not self.run.disabled:
            console.print(f"wandb: {self.run.url or offline}", soft_wrap=True)
        logs = Path(self.run.settings.sync_dir) / "logs"
        self.run.finish()
        shutil.rmtree(logs, ignore_errors=True)  # wandb's own debug logs hold absolute paths


TRACKER = Tracker()
"""The one of this process: training opens a run, and the evaluation after it closes it."""


def scrub(value: Any) -> Any:
    """A copy of plain values in which the home folder is `~`, its name is gone from paths, and secrets are `***`."""
    if isinstance(value, dict):
        hidden = {"token", "hf_token", "hub_token", "api_key", "password"}
        return {key: "***" if key in hidden and child else scrub(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(child) for child in value]
    if not isinstance(value, str):
        return value
    home = str(Path("~").expanduser())
    value = re.sub(rf"{re.escape(home)}(?=[/\\]|$)", "~", value) if len(home) > 1 else value
    if len(Path(home).name) > 2:  # the same name in another path: /mnt/NAME/data, /scratch/NAME
        value = re.sub(rf"(?<=[/\\]){re.escape(Path(home).name)}(?=[/\\]|$)", "~", value)
    for name, secret in os.environ.items():
        if re.search("KEY|TOKEN|SECRET|PASSWORD", name) and len(secret) >= 8:
            value = value.replace(secret, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}\b", "***", value)
