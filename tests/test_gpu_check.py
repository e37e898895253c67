"""`doctor --gpu`: every step is tried whatever fails, and the file for a bug report says what happened and not who it was."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from toolkit import gpu_check
from toolkit.files import POCKET, ROOT


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

    monkeypatch.setattr(gpu_check, "STEPS", {"one": fails, "two": lambda: ("all well", {})})
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

    monkeypatch.setattr(gpu_check, "STEPS", {"one": lambda: ("all well", {}), "two": killed})
    with pytest.raises(KeyboardInterrupt):
        checked(rehearsal=True)
    [step] = json.loads((tmp_path / "doctor.json").read_text(encoding="utf-8"))["steps"]
    assert step["passed"]


def test_the_table_reads_at_80_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path))
    steps = {name: lambda: ("a sentence that is longer than its column " * 3, {}) for name in gpu_check.STEPS}
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    screen = io.StringIO()
    gpu_check.check(Console(file=screen, width=80), rehearsal=True)
    assert max(len(line) for line in screen.getvalue().splitlines() if "doctor.json" not in line) <= 80
    assert "…" not in screen.getvalue().partition("┏")[2]  # nothing is cut


def test_random_weights_on_a_card_take_less_than_four_gigabytes():
    from transformers import Qwen3Config

    from toolkit import fit

    config = json.loads((POCKET / "config.json").read_text(encoding="utf-8")) | gpu_check.SHAPE
    shape = fit.shape_of(Qwen3Config(**config), "random")
    planned = fit.forecast(fit.settings(gpu_check.plan(gpu_check.PACKED)), shape)
    assert planned.changed(generation_batch=1).peak < 4 * 10**9  # it asks one question at a time


@pytest.mark.slow
def test_every_step_passes_on_a_cpu_with_the_pocket_models_shape(tmp_path):
    command = [sys.executable, "-m", "toolkit", "doctor", "--gpu", "--cpu-rehearsal"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TOOLKIT_OUTPUTS": str(tmp_path)}, capture_output=True, text=True)  # fmt: skip
    steps = json.loads((tmp_path / "doctor.json").read_text(encoding="utf-8"))["steps"]
    assert [s["step"] for s in steps if not s["passed"]] == []
    assert [s["step"] for s in steps] == list(gpu_check.STEPS)
    assert next(s for s in steps if s["step"] == "resume")["facts"]["bit_for_bit"]
    assert done.returncode == 0


def test_the_script_for_a_card_can_be_read_by_bash_and_starts_only_what_is_there():
    import importlib.util
    import re

    script = ROOT / "tests" / "gpu" / "run.sh"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text(encoding="utf-8")
    assert all(importlib.util.find_spec(name) for name in re.findall(r"-m ([\w.]+)", text))
    assert all((ROOT / file).is_file() for file in re.findall(r" (tests/\S+\.(?:py|sh))", text))
