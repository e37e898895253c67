"""What only a GPU can show: the CUDA path trains and exports, and a memory forecast is right at the cap and below it."""

import shutil

import pytest

from tests.bench import cards, ways
from toolkit import fit, recipe

pytestmark = pytest.mark.skipif(  # a look at the driver, as importing torch would cost every collection two seconds
    shutil.which("nvidia-smi") is None, reason="needs a CUDA card: nvidia-smi is not found"
)
ROWS = {"max_length": 2048, "steps": 2, "warm_up": 1}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with random 4-bit weights of Qwen3-0.6B."""
    folder = tmp_path_factory.mktemp("work")
    assert ways.run(ways.Job("weights", str(folder), "0.6B")) == {}
    return folder


def test_a_random_qwen3_trains_and_its_export_is_the_run(tmp_path, monkeypatch):
    from tests.export_fixtures import base_model
    from toolkit import run
    from toolkit.export import export

    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path / "outputs"))
    base = base_model(tmp_path / "base")
    changes = [f"model.model_name={base}", "train.max_steps=4", "train.report_to=none", "evaluate.max_new_tokens=16"]
    folder = run.train(recipe.load("data_recipes/pocket.yaml", changes), score=False)
    assert export(folder, quants=("f16",), ollama=False)["passed"]


@pytest.mark.parametrize("way", ["ours", "notebook"])
def test_the_forecast_is_within_five_percent_of_the_peak(work, way):
    result = ways.run(ways.Job(way, str(work), "0.6B", **ROWS))
    assert result["forecast"] == pytest.approx(result["peak_reserved"], rel=0.05)


@pytest.mark.parametrize(("share", "fits"), [(1.05, True), (0.85, False)])
def test_a_run_fits_a_card_a_little_larger_than_its_forecast_and_not_a_smaller_one(work, share, fits):
    job = ways.Job("ours", str(work), "0.6B", cap=1, **ROWS)
    needs = fit.forecast(ways.recipe(job, job.recipe))
    vram = int(share * max(map(needs.total, cards.PHASES)))
    tried = cards.tried(ways.Job("ours", str(work), "0.6B", cap=vram - fit.CONTEXT, **ROWS), vram)
    assert (tried["says"], tried["fits"]) == (fits, fits), tried
