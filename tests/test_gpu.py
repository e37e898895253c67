"""What only a GPU can show: the CUDA path trains and exports, and a memory forecast is right at the cap and below it.

These run when they are named, as other tests hide the card: `python -m pytest tests/test_gpu.py`.
"""

import json
import os

import pytest

from tests.tools.bench import cards, ways
from toolkit import recipe
from toolkit.machine import fit

ROWS = {"max_length": 2048, "steps": 2, "warm_up": 1}
SLACK = 150 * 2**20
"""Bytes that cuBLAS's workspaces, RoPE's tables and Triton's checks hold beside the forecast: 5% of a 0.6B run is less."""


@pytest.fixture(scope="module", autouse=True)
def card():
    """Skips where torch cannot use a card, and says why."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        pytest.skip("the card is hidden: name this file alone, python -m pytest tests/test_gpu.py")
    from toolkit.machine import doctor

    machine = doctor.look()
    if not machine.seen:
        pytest.skip(f"needs a CUDA card: {next(doctor.gpu(machine)).state}")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with random 4-bit weights of Qwen3-0.6B."""
    folder = tmp_path_factory.mktemp("work")
    assert ways.run(ways.Job("weights", str(folder), "0.6B")) == {}
    return folder


def test_a_random_qwen3_trains_and_its_export_is_the_run(tmp_path, monkeypatch):
    from tests.support.export_fixtures import base_model
    from toolkit import run
    from toolkit.export import export

    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path / "outputs"))
    base = base_model(tmp_path / "base")
    changes = [f"model.model_name={base}", "train.max_steps=4", "train.report_to=none", "evaluate.max_new_tokens=16"]
    folder = run.train(recipe.load("data_recipes/pocket.yaml", changes), score=False)
    assert export(folder, quants=("f16",))["passed"]


def test_doctor_passes_every_step_within_four_gigabytes(tmp_path, monkeypatch):
    from toolkit import run
    from toolkit.machine import gpu_check

    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path))
    assert gpu_check.check(run.default_console()) == 0
    steps = json.loads((tmp_path / "doctor.json").read_text())["steps"]
    assert all(step["passed"] for step in steps)


@pytest.mark.parametrize("way", ["ours", "notebook"])
def test_the_forecast_is_within_five_percent_of_the_peak(work, way):
    result = ways.run(ways.Job(way, str(work), "0.6B", **ROWS))
    assert result["forecast"] == pytest.approx(result["peak_reserved"], rel=0.05, abs=SLACK)


@pytest.mark.parametrize(("share", "fits"), [(1.05, True), (0.85, False)])
def test_a_run_fits_a_card_a_little_larger_than_its_forecast_and_not_a_smaller_one(work, share, fits):
    job = ways.Job("ours", str(work), "0.6B", cap=1, **ROWS)
    needs = fit.forecast(ways.recipe(job, job.recipe))
    worst = max(map(needs.total, cards.PHASES))
    vram = int(share * worst) + (SLACK if fits else -SLACK)
    tried = cards.tried(ways.Job("ours", str(work), "0.6B", cap=vram - fit.CONTEXT, **ROWS), vram)
    assert (tried["says"], tried["fits"]) == (fits, fits), tried
