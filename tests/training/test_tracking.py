"""Logging never stops a training, sends each evaluation once, uses few and stable names, and no file of it names the user."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.comparison.test_compare import make_run
from tests.support.wandb_service import RunService
from toolkit import recipe
from toolkit.comparison.decide import compare
from toolkit.comparison.dial import at_scale, compare_scales
from toolkit.comparison.report import conclude
from toolkit.data import mix
from toolkit.files import ROOT, ToolkitError, read_json, write_json
from toolkit.training import tracking
from toolkit.training.tracking import TRACKER
from toolkit.view import figures

SUMMARY = {"eval/tuned/thinking/accuracy": 0.5, "eval/tuned/thinking/accuracy.low": 0.4}
REPLIES = [{"mode": "thinking", "prompt": "17 + 25?", "base": "?", "tuned": "42"}]
SECRET = "planted-secret-0123456789"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """(recipe, mix, an empty run folder), logging offline."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    loaded = recipe.load("data_recipes/pocket.yaml", ["data.budget=3000"])
    mixed = mix.compile_mix(loaded)
    return loaded, mixed, evaluated(tmp_path / "outputs" / "one", mixed)


def evaluated(folder: Path, mixed) -> Path:
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text("{}")
    (folder / "mix.json").write_text(json.dumps(mixed.report))
    return folder


def quiet():
    return Console(file=io.StringIO(), width=200)


def said(console) -> str:
    return console.file.getvalue()


def synced(folder: Path) -> RunService:
    """What wandb's own `wandb sync` reads out of the offline runs of a folder."""
    runs = [str(path) for path in folder.glob("wandb/offline-run-*")]
    with RunService() as service:
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", "--yes", *runs],
            env=service.environment(),
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return service


def train_and_finish(loaded, mixed, folder, rows=(), console=None):
    TRACKER.begin(loaded, mixed, folder)
    for row in rows:
        TRACKER.log(row)
    TRACKER.log_table("samples", [{"step": 0, "prompt": "hello", "answer": "hi"}])
    TRACKER.finish(loaded, folder, SUMMARY, REPLIES, console or quiet())


# --- what is logged


def test_history_has_few_stable_names_and_the_losses_of_each_source(tiny):
    sources = {f"eval_source{i}/thinking_loss": 1.0 for i in range(40)}
    noise = {f"surprise_{i}": 1.0 for i in range(100)}
    speed = {"tokens_per_second": 9.0, "supervised_tokens_per_second": 3.0, "peak_memory_gib": 1.5}
    row = {"step": 1, "epoch": 0.1, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-4, "eval_loss": 1.0}
    figures.keep_mix_picture(*tiny[:2])  # as `run` does
    train_and_finish(*tiny, [row | speed | sources | noise, {"step": 2, "loss": 1.0}])
    found = synced(tiny[2])
    history = {key for line in found.history for key in line}
    assert {"train/loss", "speed/supervised_tokens_per_second", "memory/peak_gib", "validation/loss"} <= history
    assert {"validation/loss/source0/thinking", "samples", "mix/shares", "mix/picture", "eval/replies"} <= history
    assert len(history) <= 60 - 25  # evaluation adds up to 25 to the summary
    assert [line["train/loss"] for line in found.history if "train/loss" in line] == [2.0, 1.0]


def test_a_run_has_its_shares_group_type_and_tags_and_its_evaluation(tiny):
    train_and_finish(*tiny)
    found = synced(tiny[2])
    run = found.runs[0]
    assert (run["groupName"], run["jobType"]) == ("pocket", "train")
    assert run["tags"] == ["pocket", "75% reasoning"]
    config = {key: value["value"] for key, value in run["config"].items()}
    assert config["mix/reasoning_share_supervised_tokens"] == pytest.approx(0.75, abs=0.01)
    assert {"mix/reasoning_share_examples", "mix/reasoning_share_tokens"} <= config.keys()
    assert {key: found.summary[key] for key in SUMMARY} == SUMMARY
    assert {"columns": list(REPLIES[0]), "data": [list(REPLIES[0].values())]} in found.tables
    assert "WANDB_SERVICE" not in os.environ  # else a child that was killed could not resume its run


def test_a_run_of_a_sweep_that_is_evaluated_later_stays_in_its_group(tiny):
    loaded, _, folder = tiny
    write_json(folder / "manifest.json", {"sweep": "ratios-sweep"})
    TRACKER.finish(loaded, folder, SUMMARY, REPLIES, quiet())
    assert synced(folder).runs[0]["groupName"] == "ratios-sweep"


def test_ratios_stand_side_by_side_in_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    runs = [make_run(tmp_path / "runs", s, settings={"report_to": "wandb"}) for s in (0.25, 0.75)]
    folder = tmp_path / "ratios-sweep"
    conclude(compare(runs), quiet(), folder)
    found = synced(folder)
    assert (found.runs[0]["groupName"], found.runs[0]["jobType"]) == ("ratios-sweep", "comparison")
    assert found.summary["recommendation"]
    (table,) = (table for table in found.tables if "settings" in table["columns"])
    shown = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["settings"] for row in shown] == ["base", "25% reasoning", "75% reasoning"]
    accuracy = [row["reasoning questions with thinking"].partition(" ")[0] for row in shown]
    assert accuracy == ["40%", "50%", "50%"]
    assert len(table["columns"]) <= 15
    assert any("picture" in line for line in found.history)


def test_a_dial_is_a_curve_over_its_scales_in_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = make_run(tmp_path / "runs", 0.5, settings={"report_to": "wandb"})
    result = read_json(folder / "eval.json")
    members = {scale: at_scale(folder, scale, {("quick", scale): result}) for scale in (0.5, 1.0)}
    conclude(compare_scales([members], [0.5, 1.0]), quiet(), folder / "run-dial")
    lines = [line for line in synced(folder / "run-dial").history if "dial/scale" in line]
    assert [line["dial/scale"] for line in lines] == [0.0, 0.5, 1.0]
    tuned, base = (result[who]["thinking"]["accuracy"]["value"] for who in ("tuned", "base"))
    assert [line["dial/thinking/accuracy"] for line in lines] == [base, tuned, tuned]


def test_wandb_draws_the_measured_numbers_over_the_shares_without_a_chart_built_by_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    runs = [make_run(tmp_path / "runs", s, kl=s, settings={"report_to": "wandb"}) for s in (0.25, 0.75)]
    conclude(compare(runs), quiet(), tmp_path / "ratios-sweep")
    found = synced(tmp_path / "ratios-sweep")
    lines = [line for line in found.history if "sweep/reasoning" in line]
    assert [line["sweep/reasoning"] for line in lines] == [0.25, 0.75]
    assert [line["sweep/forgetting/kl"] for line in lines] == pytest.approx([0.25, 0.75])
    assert [line["sweep/thinking/accuracy"] for line in lines] == pytest.approx([0.5, 0.5])
    # with this wandb's workspace puts the share, and not a step, under every one of these lines
    written = b"".join(file.read_bytes() for file in (tmp_path / "ratios-sweep").rglob("*.wandb"))
    assert b"sweep/*" in written


def test_one_command_uploads_every_run_of_a_sweep_and_its_comparison_to_the_recipe_s_project(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.chdir(tmp_path)
    settings = {"report_to": "wandb", "project": "sums"}
    runs = [make_run(tmp_path / "outputs", s, settings=settings, name=f"ratios-r{s}") for s in (0.25, 0.75)]
    mixed = mix.compile_mix(recipe.load("pocket", ["data.budget=3000"]))
    for run in runs:
        loaded = recipe.load("pocket", ["data.budget=3000", f"name={run.name}", "train.project=sums"])
        TRACKER.begin(loaded, mixed, run)
        TRACKER.finish(loaded, run, SUMMARY, REPLIES, quiet())
    console = quiet()
    conclude(compare(runs), console, tmp_path / "outputs" / "ratios-sweep")
    (command,) = [line.split("`")[1] for line in said(console).splitlines() if "wandb sync" in line]
    assert command == "wandb sync outputs/ratios-*/wandb"
    with RunService() as service:
        words = command.replace("wandb sync", f"{sys.executable} -m wandb sync --yes")
        subprocess.run(words, shell=True, env=service.environment(), cwd=tmp_path, check=True)
    assert {run["name"].rpartition("-")[0] for run in service.runs} == {
        "ratios-r0.25", "ratios-r0.75", "ratios-sweep-comparison"}  # fmt: skip
    # as first announced: the stand-in answers that they are in project p
    first = {run["name"]: run["project"] for run in reversed(service.runs)}
    assert set(first.values()) == {"sums"}


def test_a_folder_beside_a_sweep_that_is_not_of_it_is_not_uploaded_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ratios-r0", "ratios-r1", "ratios-other"):
        (tmp_path / name / "wandb").mkdir(parents=True)
    found = tracking.upload_command([tmp_path / "ratios-r0", tmp_path / "ratios-r1"])
    assert found == "wandb sync ratios-r*/wandb"
    assert tracking.upload_command([tmp_path / "ratios-r0", tmp_path / "ratios-other"]) == (
        "wandb sync ratios-r0/wandb ratios-other/wandb")  # fmt: skip


# --- evaluated in another process than trained


def test_an_evaluation_in_another_process_than_the_training_continues_its_run(tiny):
    loaded, _, folder = tiny
    console = quiet()
    TRACKER.finish(loaded, folder, SUMMARY, REPLIES, console)
    assert said(console).count("wandb sync") == 1
    found = synced(folder)
    assert found.summary["eval/tuned/thinking/accuracy"] == 0.5
    assert found.runs[0]["name"] == f"pocket-{recipe.sha256(loaded)[:8]}"


# --- what can go wrong


@pytest.fixture
def online(tiny, monkeypatch):
    """online(key, address): begins a run of an account, and gives (its folder, what was said)."""

    def begin(key="0" * 40, address="http://127.0.0.1:9"):
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_API_KEY", key)
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setattr(tracking, "REACH_SECONDS", 0.2)
        lines = []
        monkeypatch.setattr(TRACKER, "say", lines.append)
        train_and_finish(*tiny, [{"step": 1, "loss": 1.0}])
        return tiny[2], " ".join(lines)

    return begin


def test_a_key_without_a_network_goes_offline_within_seconds_and_says_so(online):
    folder, lines = online()
    assert "refused" in lines
    assert "kept offline" in lines
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert os.environ["WANDB_MODE"] == "online"  # a variable would hold for the whole kernel


def test_an_address_that_never_answers_costs_seconds(online):
    import socket

    with socket.socket() as silent:  # accepts connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        _, lines = online(address=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "kept offline" in lines


def test_a_malformed_key_goes_offline_and_says_what_a_key_is(online):
    with RunService() as service:
        folder, lines = online("abc", service.environment()["WANDB_BASE_URL"])
    assert "API key must have 40+ characters" in lines
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


def test_a_folder_that_wandb_cannot_write_is_said_once_and_training_continues(tiny, monkeypatch):
    loaded, mixed, folder = tiny
    (folder / "wandb").write_text("a file where wandb wants a folder")
    lines = []
    monkeypatch.setattr(TRACKER, "say", lines.append)
    TRACKER.begin(loaded, mixed, folder)
    TRACKER.log({"step": 1, "loss": 1.0})
    TRACKER.log({"step": 2, "loss": 1.0})
    assert len(lines) == 1
    assert "starting a run failed" in lines[0]
    TRACKER.finish(loaded, folder, SUMMARY, REPLIES, quiet())


def test_without_a_home_folder_everything_is_logged_all_the_same(tiny, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/no-such-home")
    train_and_finish(*tiny, [{"step": 1, "loss": 1.0}])
    monkeypatch.undo()
    assert synced(tiny[2]).summary["eval/tuned/thinking/accuracy"] == 0.5


def test_an_error_inside_wandb_is_said_once_and_later_calls_do_nothing(tiny, monkeypatch):
    loaded, mixed, folder = tiny
    lines = []
    monkeypatch.setattr(TRACKER, "say", lines.append)
    TRACKER.begin(loaded, mixed, folder)
    TRACKER.run.finish()  # what is logged after this raises inside wandb
    for step in range(3):
        TRACKER.log({"step": step, "loss": 1.0})
    assert len(lines) == 1
    assert "logging failed" in lines[0]


def test_an_interrupted_training_closes_its_run(tiny):
    TRACKER.begin(*tiny)
    TRACKER.end(exit_code=1)
    assert TRACKER.run is None
    assert synced(tiny[2]).runs


# --- other trackers


@pytest.mark.parametrize("name", ["swanlab", "trackio", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(name):
    with pytest.raises(ToolkitError, match=f"report_to: {name} is not installed: `pip install {name}.*report_to=none"):
        tracking.check({"report_to": ["wandb", name]})


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ToolkitError, match="report_to: wanbd: expected one of wandb, tensorboard, swanlab"):
        tracking.check({"report_to": "wanbd"})


# --- privacy


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from rich.console import Console
from tests.training.test_tracking import train_and_finish, evaluated
from toolkit import recipe
from toolkit.data import mix
home = Path.home()
words = ["data.budget=3000", f"data.sources.0.path={home}/proj/sums.jsonl", "name=private"]
loaded = recipe.load("data_recipes/pocket.yaml", words)
loaded.train["report_to"] = ["wandb"]
mixed = mix.compile_mix(loaded)
folder = evaluated(home / "proj" / "outputs" / "private", mixed)
train_and_finish(loaded, mixed, folder, [{"step": 1, "loss": 1.0}])
"""


def test_no_file_of_an_offline_run_holds_the_name_of_the_home_folder_or_a_secret(tmp_path):
    home = tmp_path / "home" / "annamustermann"
    (home / "proj").mkdir(parents=True)
    sample = ROOT / "data_recipes/samples/openmath_sample.jsonl"
    (home / "proj" / "sums.jsonl").write_bytes(sample.read_bytes())
    (home / "proj" / "train.py").write_text(CHILD)
    planted = {"HOME": str(home), "TOOLKIT_OUTPUTS": str(home / "proj" / "outputs"), "HF_TOKEN": SECRET,
               "WANDB_MODE": "offline", "USER": "annamustermann", "LOGNAME": "annamustermann"}  # fmt: skip
    words = [sys.executable, str(home / "proj" / "train.py"), str(ROOT)]
    subprocess.run(words, env=os.environ | planted, cwd=home / "proj", check=True)
    files = [path for path in (home / "proj/outputs/private/wandb").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        assert b"annamustermann" not in content, path
        assert SECRET.encode() not in content, path
    assert not (home / ".local/share/wandb").exists()  # no copies of tables outside the run's folder


def test_scrubbing_keeps_words_that_only_look_like_the_home_folders_name(monkeypatch):
    monkeypatch.setenv("HOME", "/home/max")
    monkeypatch.setenv("MY_TOKEN", SECRET)
    values = {"max_steps": 3, "path": "/home/max/data/max_rows.csv", "other": ["/mnt/max/x", "maximum"]}
    values |= {"said": f"my secret is {SECRET}", "token": ["abc"], "model": "hf_" + "a" * 30}
    assert tracking.scrub(values) == {
        "max_steps": 3, "path": "~/data/max_rows.csv", "other": ["/mnt/~/x", "maximum"],
        "said": "my secret is ***", "token": ["abc"], "model": "hf_…",
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _closed():
    """No wandb run of one test is open in the next."""
    yield
    if TRACKER.run:
        with contextlib.suppress(Exception):  # a test may have broken it on purpose
            TRACKER.run.finish()
        TRACKER.run = None
