"""`doctor --gpu`: every step is tried whatever fails, and the file for a bug report says what happened and not who it was."""

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from toolkit.files import POCKET, ROOT
from toolkit.machine import gpu_check


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """checked(**options) → (exit code, what was printed, doctor.json)."""
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path))

    def run(**options):
        screen = io.StringIO()
        code = gpu_check.check(Console(file=screen, width=160), **options)
        return code, screen.getvalue(), json.loads((tmp_path / "doctor.json").read_text(encoding="utf-8"))

    return run


def test_without_a_card_it_says_so_and_tries_nothing(checked):
    code, said, record = checked()
    assert code == 1
    assert "nothing tried" in said
    assert record["steps"] == []
    assert record["versions"]["torch"]


def test_a_step_that_fails_stands_on_its_line_and_the_next_is_tried(checked, monkeypatch):
    def fails():
        raise RuntimeError(f"[red] {Path.home()}/secret {gpu_check.outputs()}/run")

    monkeypatch.setattr(gpu_check, "STEPS", {"one": fails, "two": lambda: {"all": "well"}})
    code, said, record = checked(rehearsal=True)
    assert code == 1
    assert [step["passed"] for step in record["steps"]] == [False, True]
    assert "FAILED" in said
    assert "RuntimeError: [red]" in said
    assert "in fails" in record["steps"][0]["traceback"]
    said = json.dumps(record)
    assert [str(folder) for folder in (Path.home(), ROOT, gpu_check.outputs()) if f"{folder}/" in said] == []


def test_what_kills_the_process_leaves_the_steps_before_it(checked, tmp_path, monkeypatch):
    def killed():
        raise KeyboardInterrupt  # like a signal: `attempt` does not hold it

    monkeypatch.setattr(gpu_check, "STEPS", {"one": lambda: {"all": "well"}, "two": killed})
    with pytest.raises(KeyboardInterrupt):
        checked(rehearsal=True)
    [step] = json.loads((tmp_path / "doctor.json").read_text(encoding="utf-8"))["steps"]
    assert step["passed"]


def test_what_is_printed_reads_at_80_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path))
    steps = {name: lambda: {"what": "a sentence that is longer than its column " * 3} for name in gpu_check.STEPS}
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    screen = io.StringIO()
    gpu_check.check(Console(file=screen, width=80), rehearsal=True)
    assert max(map(len, screen.getvalue().partition("1 of")[2].partition("bug report")[0].splitlines())) <= 80
    assert re.search(r"…\n   passed in [\d.]+ s: what a sentence", screen.getvalue())


def test_random_weights_on_a_card_take_less_than_four_gigabytes():
    from transformers import Qwen3Config

    from toolkit.machine import fit

    config = json.loads((POCKET / "config.json").read_text(encoding="utf-8")) | gpu_check.SHAPE
    shape = fit.shape_of(Qwen3Config(**config), "random")
    planned = fit.forecast(fit.settings(gpu_check.plan(gpu_check.PACKED)), shape)
    assert planned.peak < 4 * 10**9  # it asks one question at a time


# --- tests/gpu/run.sh ------------------------------------------------------------------------------------------------

STEPS = ["import", "doctor", "weights", "ours", "notebook", "decode", "ours_without_expandable_segments", "whole_run", "cards",
         "tests"]  # fmt: skip
FILES = {"summary.txt", "log.txt", "doctor.json", "speed.jsonl", "decode.json", "whole_run.json", "cards.json"}


def script(tmp_path, *arguments, python=sys.executable, **environment):
    """tests/gpu/run.sh with its results in tmp_path/out."""
    env = os.environ | {"OUT": str(tmp_path / "out"), "PYTHON": str(python)} | environment
    command = ["bash", str(ROOT / "tests" / "gpu" / "run.sh"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def stand_in(tmp_path, commands: str) -> Path:
    """Takes the interpreter's place: notes how it was called, then runs these shell commands."""
    file = tmp_path / "python"
    file.write_text(f'#!/bin/sh\necho "$@" | head -1 >> {tmp_path}/calls\n{commands}\n')
    file.chmod(0o755)
    return file


def summary(tmp_path) -> list[str]:
    """What the script says of each step, without seconds."""
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    return [line.partition(" after")[0] for line in lines]


def test_the_script_for_a_card_stops_for_nothing_but_an_import_and_says_what_failed(tmp_path):
    fails = stand_in(tmp_path, 'case "$1" in -c) exit 0;; esac; exit 3')
    done = script(tmp_path, "--cpu-rehearsal", python=fails)
    assert done.returncode == 1
    assert done.stderr == ""
    assert summary(tmp_path) == ["import: passed", *(f"{name}: FAILED (3)" for name in STEPS[1:])]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all(importlib.util.find_spec(call.split()[1]) for call in calls if call.startswith("-m "))
    assert {file.name for file in (tmp_path / "out").iterdir()} <= FILES


def test_where_unsloth_cannot_be_imported_nothing_else_is_tried(tmp_path):
    done = script(tmp_path, python=stand_in(tmp_path, "echo no module named unsloth; exit 1"))
    assert done.returncode == 1
    assert summary(tmp_path) == ["import: FAILED (1)"]
    assert "no module named unsloth" in done.stdout


def test_without_a_card_the_script_measures_nothing_and_says_how_to_rehearse(tmp_path):
    no_card = """case "$1" in -c) exit 0;; esac
mkdir -p $TOOLKIT_OUTPUTS; echo '"on_cpu": true' > $TOOLKIT_OUTPUTS/doctor.json; echo 'gpu: none'; exit 1"""
    done = script(tmp_path, python=stand_in(tmp_path, no_card))
    assert done.returncode == 1
    assert "gpu: none" in done.stdout
    assert "--cpu-rehearsal" in done.stdout
    assert (tmp_path / "calls").read_text().splitlines()[1:] == ["-m toolkit doctor --gpu"]


def test_what_the_time_does_not_reach_is_said(tmp_path):
    script(tmp_path, python=stand_in(tmp_path, "exit 0"), LIMIT="10")
    assert summary(tmp_path) == ["import: skipped, no time left"]


def test_the_most_valuable_steps_end_within_five_hundred_seconds():
    text = (ROOT / "tests" / "gpu" / "run.sh").read_text()
    limits = {name: int(seconds) for name, seconds in re.findall(r"(?m)^step (\w+) (\d+)", text)}
    assert limits["import"] + limits["doctor"] + limits["weights"] + 90 + limits["decode"] <= 510
    assert "LIMIT:-500" in text


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The results of the whole script on a CPU, with a toy model: about four minutes of one core."""
    folder = tmp_path_factory.mktemp("rehearsed")
    script(folder, "--cpu-rehearsal")
    return folder


@pytest.mark.slow
def test_every_step_of_the_script_passes_on_a_cpu_and_leaves_seven_files(rehearsed):
    assert summary(rehearsed) == [f"{name}: passed" for name in STEPS]
    assert {file.name for file in (rehearsed / "out").iterdir()} == FILES
    lines = [json.loads(line) for line in (rehearsed / "out" / "speed.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert all(line["tokens"] for line in lines)
    decoded = json.loads((rehearsed / "out" / "decode.json").read_text())["batches"]
    assert all(batch["same_tokens"] for batch in decoded)


@pytest.mark.slow
def test_every_step_of_the_doctor_passes_on_a_cpu_with_the_pocket_models_shape(rehearsed):
    record = json.loads((rehearsed / "out" / "doctor.json").read_text(encoding="utf-8"))
    assert [s["step"] for s in record["steps"] if not s["passed"]] == []
    assert [s["step"] for s in record["steps"]] == list(gpu_check.STEPS)
    resumed = next(s for s in record["steps"] if s["step"] == "resume")["facts"]
    assert resumed["bit_for_bit"]
    assert resumed["resumed_at"] == 2
    assert record["on_cpu"]
    assert str(rehearsed) not in json.dumps(record)


def manifests(file: Path, loss: float, resumed_at: int):
    """Stands in for a second training, which ended with this loss after it had begun at this step."""
    files = {"adapter_model.safetensors": "same"}
    return lambda: file.write_text(json.dumps({"train_loss": loss, "resumed_at": resumed_at, "adapter": files}))


@pytest.mark.parametrize(
    ("loss", "step", "passes"), [(6.5, 2, True), (6.5, 0, False), (6.5, 4, False), (7.5, 2, False)]
)
def test_a_resume_that_begins_anew_or_ends_otherwise_fails(tmp_path, monkeypatch, loss, step, passes):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path))
    folder = tmp_path / gpu_check.PLAIN
    for name in ("adapter", "checkpoints/checkpoint-2", "checkpoints/checkpoint-4"):
        (folder / name).mkdir(parents=True)
    before = {"train_loss": 6.5, "adapter": {"adapter_model.safetensors": "same"}}
    (folder / "manifest.json").write_text(json.dumps(before))
    monkeypatch.setattr(gpu_check, "train", manifests(folder / "manifest.json", loss, step))
    assert gpu_check.attempt(gpu_check.resume)["passed"] == passes


FROM_THE_BEGINNING = """
from toolkit.machine import gpu_check
from toolkit.training import checkpoints
gpu_check.weights()
gpu_check.train()
checkpoints.last_checkpoint = lambda *_: None
print(gpu_check.attempt(gpu_check.resume)["error"])
"""


@pytest.mark.slow
def test_a_trainer_that_ignores_its_checkpoint_is_noticed(tmp_path):
    env = os.environ | {"TOOLKIT_OUTPUTS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FROM_THE_BEGINNING], cwd=ROOT, env=env, capture_output=True, text=True)
    assert "it trained from step 0, and not from its checkpoint at 2" in done.stdout, done.stderr[-2000:]
