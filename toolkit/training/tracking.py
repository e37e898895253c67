"""Experiment trackers: one wandb run per training with its evaluation, one per comparison; never a reason to stop.

tracking.check(recipe.train, folder)     # before the model is loaded; then `with tracking.training(recipe, mixed, folder):`

Callers and what they pass: `run.train` calls `check`, then `training` around the trainer; `callbacks.Record` passes every
line of metrics.jsonl to `log` (KEYS says which of its values go to wandb, under which name); `train.sample_replies` passes its
rows to `log_table`; `train.sft_arguments` gives transformers every tracker but wandb, because its own wandb callback
would add 400 keys and local paths; after eval.json is written, and again when a finished run is opened, `finish` adds the
evaluation. Config holds the recipe and `mix/reasoning_share_{examples,tokens,supervised_tokens}`; the summary holds
`evaluate.summary(result)`: `eval/{base,tuned,difference}/{thinking,non_thinking,forgetting}/METRIC`.

Ratios side by side in wandb: the run `<sweep>-comparison` holds the table and the picture. A curve over the share, in a
project filtered to the sweep's group: Add panel → Scatter plot, x = config `mix/reasoning_share_supervised_tokens`,
y = summary `eval/tuned/thinking/accuracy`.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import requests
from packaging import version

from toolkit import recipe as recipes
from toolkit.data.mix import Mix
from toolkit.files import ToolkitError, read_json, sha256, write_text
from toolkit.recipe import Recipe

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
}
"""Key of a metrics.jsonl line → key in wandb's history. `eval_SOURCE/MODE_loss` becomes `validation/loss/SOURCE/MODE`."""
MAX_SOURCES = 12
"""Validation losses by source and mode that are logged, so that history and summary stay below 60 keys."""
REACH_SECONDS = 5
MIX_PICTURE = "mix.png"
"""In the run's folder; drawn before the training where wandb is asked for."""
FINISH_SECONDS = 60
"""How long a finished run waits for its upload; what is left stays in the folder for `wandb sync`."""

_run = None
"""The open wandb run of this process."""
_offline = False
"""Whether `check` found that nothing can be uploaded now."""
_failed = False
"""Whether an error of the open run was said already."""
_say: Callable[[str], None] = print


def trackers(train: dict) -> list[str]:
    """Names in a recipe's `train.report_to`, which is a name, a list of names or `none`."""
    to = train.get("report_to") or "none"
    return [name for name in (to if isinstance(to, list | tuple) else [to]) if name != "none"]


def check(train: dict, folder: Path, say: Callable[[str], None] = print) -> None:
    """Before a model is loaded: every tracker's package is installed, and wandb can upload or goes offline, saying why.

    Raises ToolkitError for an unknown tracker or a missing package. Takes at most about REACH_SECONDS.
    """
    global _say
    _say = say
    for name in trackers(train):
        if name not in PACKAGES:
            raise ToolkitError(f"train.report_to: {name}: expected one of {', '.join(PACKAGES)} or none")
        wanted = f"{name}<{BELOW[name]}" if name in BELOW else name
        advice = f"`pip install '{wanted}'`, or set train.report_to=none"
        if importlib.util.find_spec(name) is None:
            raise ToolkitError(f"train.report_to: {name} needs a package that is not installed: {advice}")
        if name in BELOW and (found := version.parse(importlib.metadata.version(name))) >= version.parse(BELOW[name]):
            raise ToolkitError(f"train.report_to: {name} {found} is too new here: {advice}")
    os.environ["SWANLAB_LOG_DIR"] = SWANLAB_FOLDER or str(folder / "swanlog")
    global _offline
    _offline = False
    if reason := "wandb" in trackers(train) and _offline_reason():
        _offline = True
        say(f"wandb: {reason}; this run is kept offline in {folder / 'wandb'}, and training continues")


def has_account() -> bool:
    """Whether wandb could upload: a key in the environment or in ~/.netrc."""
    return bool(_api_key())


def _address() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _api_key() -> str:
    return os.environ.get("WANDB_API_KEY") or (requests.utils.get_netrc_auth(_address()) or ("", ""))[1]


def _offline_reason() -> str:
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


def _attempt(what: str, action: Callable, *args, **values):
    """Call wandb; training never stops because of logging. The first error of a run is said, later ones are not."""
    global _failed
    try:
        return action(*args, **values)
    except Exception as error:  # wandb raises its own errors, OSError, ValueError, protobuf's …
        if not _failed:
            reason = str(error).strip() or type(error).__name__
            _say(
                f"wandb: {what} failed ({reason.splitlines()[0]}); training continues, every number is in metrics.jsonl"
            )
        _failed = True
        return None


@contextlib.contextmanager
def training(recipe: Recipe, mixed: Mix, folder: Path) -> Iterator[None]:
    """wandb around a training, left open for the evaluation that follows; closed as crashed on an error."""
    if _run:  # of a training that was not evaluated
        _attempt("closing the run before", _run.finish)
    if "wandb" in trackers(recipe.train):
        _attempt("starting a run", _start, recipe, mixed.report, folder)
    if _run:
        _attempt("logging the mix", _log_mix, mixed, folder)
    try:
        yield
    except BaseException:  # an interrupt too closes the run as crashed
        if _run:
            _attempt("closing the run", _run.finish, exit_code=1)
        raise


def log(row: dict) -> None:
    """Log a line of metrics.jsonl: the values that KEYS and the losses by source name, against `step`."""
    if _run is None:
        return
    named = {KEYS[key]: value for key, value in row.items() if key in KEYS and value is not None}
    sources = [key for key in row if key.startswith("eval_") and key.endswith("_loss") and "/" in key]
    for key in sources[:MAX_SOURCES]:
        named["validation/loss/" + key.removeprefix("eval_").removesuffix("_loss")] = row[key]
    if named:
        _attempt("logging", _run.log, {"step": row["step"], **named})


def log_table(key: str, rows: Sequence[dict]) -> None:
    """Log rows with equal keys as a table, e.g. the replies to the fixed prompts under `samples`."""
    if _run and rows:
        _attempt(f"logging {key}", _put_table, key, rows)


def _put_table(key: str, rows: Sequence[dict]) -> None:
    import wandb

    table = wandb.Table(list(rows[0]), [[scrub(value) for value in row.values()] for row in rows])
    # Bound by hand, wandb keeps the table among the run's own files; else a second copy is staged under the home
    # folder, whose path would be written into the run.
    table.bind_to_run(_run, key, _run.step)
    _run.log({key: table})


def _put_picture(key: str, file: Path) -> None:
    import wandb

    _run.log({key: wandb.Image(str(file))})


def _log_mix(mixed: Mix, folder: Path) -> None:
    """The mix as a table (one row per source), and its picture where `run` has drawn one."""
    report = mixed.report
    rows = [
        {"source": name, "planned": report["planned"][name], "rows": source["rows_kept"], "tokens": source["tokens"]}
        | {unit: shares.get(name, 0.0) for unit, shares in report["achieved"].items()}
        for name, source in report["sources"].items()
    ]
    _put_table("mix/shares", rows)
    if (folder / MIX_PICTURE).is_file():
        _put_picture("mix/picture", folder / MIX_PICTURE)


def finish(recipe: Recipe, folder: Path, summary: dict, replies: list[dict], console) -> None:
    """Add the evaluation in `folder`/eval.json to the run's wandb summary, some replies as a table, and close it.

    Does nothing when this eval.json has been logged already, so that it may be called whenever a run is opened.
    """
    global _say
    _say = console.print
    # a mark by content: an evaluation that is repeated at another level is sent again
    logged, digest = folder / "wandb" / "evaluation.sha256", sha256(folder / "eval.json")
    sent = _run is None and logged.is_file() and logged.read_text() == digest
    if sent or "wandb" not in trackers(recipe.train):
        return
    if _run is None:  # evaluated in another process than trained: wandb continues the run by its id
        _attempt("starting a run", _start, recipe, read_json(folder / "mix.json"), folder)
    if _conclude(folder, summary, "eval/replies", replies, console):
        _attempt("marking the evaluation as logged", write_text, logged, digest)


def comparison(folder: Path, rows: list[dict], sentences: str, console) -> None:
    """A wandb run that holds a comparison: its table, its picture (`folder`/comparison.png) and what it recommends.

    The same runs compared again continue the same wandb run."""
    global _say
    _say = console.print
    name, runs = f"{folder.name}-comparison", " ".join(sorted(row["runs"] for row in rows))
    # a hash of the runs, so that the same comparison is one wandb run and another is another
    key = f"{name}-{hashlib.sha256(runs.encode()).hexdigest()[:8]}"
    _attempt("starting a run", _open, folder, name=name, id=key, group=folder.name, job_type="comparison")
    if _run:
        _attempt("logging the picture", _put_picture, "picture", folder / "comparison.png")
    _conclude(folder, {"recommendation": sentences}, "comparison", rows, console)


def _conclude(folder: Path, summary: dict, key: str, rows: list[dict], console) -> bool:
    """Add a summary and a table to the open run and close it; whether they went anywhere."""
    global _run
    sent = _run is not None and not _run.disabled
    if _run:
        _attempt("logging the summary", _run.summary.update, scrub(summary))
        log_table(key, rows)
        _attempt("closing the run", _close, folder, console)
    _run = None
    return sent


def _start(recipe: Recipe, report: dict, folder: Path) -> None:
    """Open the wandb run of a run folder; the same folder always continues the same one."""
    thinking = {unit: shares.get("thinking", 0.0) for unit, shares in report["achieved_modes"].items()}
    shares = {f"mix/reasoning_share_{unit}": share for unit, share in thinking.items()}
    config = {"recipe": recipes.to_dict(recipe), **shares, "mix/achieved": report["achieved"]}
    # wandb refuses tags of more than 64 characters
    tags = [Path(recipe.model.model_name).name, f"{100 * thinking[report['unit']]:.0f}% reasoning"]
    name, group = recipe.name, os.environ.get("TOOLKIT_SWEEP") or recipe.name
    _open(folder, name=name, id=f"{name}-{recipes.sha256(recipe)[:8]}", group=group, job_type="train",
          tags=[tag[:64] for tag in tags], config=scrub(config))  # fmt: skip
    _run.define_metric("step")
    _run.define_metric("*", step_metric="step")


def _open(folder: Path, **values) -> None:
    global _run, _failed
    import wandb

    _run, _failed = None, False
    os.environ.setdefault("WANDB_PROJECT", "qwen3-both-modes")
    os.environ.setdefault("WANDB_SILENT", "true")  # its lines would break the progress display; ours says what matters
    # in the call, as wandb reads the variable once and what is set there outlasts this run; None is online
    wanted = os.environ.get("WANDB_MODE") or ("online" if has_account() else "offline")
    mode = "offline" if _offline else None if wanted == "online" else wanted
    settings = wandb.Settings(
        silent=True, console="off", init_timeout=20, finish_timeout=FINISH_SECONDS, disable_git=True, disable_code=True,
        # what wandb records by itself names the machine, the user and the program's path
        x_disable_meta=True, x_disable_machine_info=True, host="-", username="-", email="", program="toolkit",
        program_relpath="toolkit", program_abspath="toolkit", root_dir=str(folder),
    )  # fmt: skip
    joined = "WANDB_SERVICE" in os.environ
    try:
        _run = wandb.init(dir=str(folder), settings=settings, resume="allow", mode=mode, **values)
    except wandb.errors.CommError as error:
        _say(f"wandb: no connection ({str(error).splitlines()[0]}); this run is kept offline")
        _run = wandb.init(dir=str(folder), settings=settings, resume="allow", mode="offline", **values)
    if not joined:  # or child processes would share this one's, where a run whose process was killed stays "in use"
        os.environ.pop("WANDB_SERVICE", None)


def _close(folder: Path, console) -> None:
    """Finish the run and say where it can be seen, or which command uploads it."""
    offline = f"kept offline; upload with `wandb sync {folder / 'wandb'}/offline-run-*`"
    if not _run.disabled:
        console.print(f"wandb: {_run.url or offline}", soft_wrap=True)
    logs = Path(_run.settings.sync_dir) / "logs"
    _run.finish()
    shutil.rmtree(logs, ignore_errors=True)  # wandb's own debug logs hold absolute paths


def scrub(value):
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
