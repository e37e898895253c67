"""The speed benchmark counts right, keeps what fails, and its tables are printed from raw results."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tools.bench import BRIEFLY, TOY, cards, speed, start, ways
from toolkit.files import POCKET, ROOT, ToolkitError
from toolkit.machine import fit

HYBRID = "data_recipes/hybrid.yaml"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(POCKET)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with the random model of the tiny shape."""
    folder = tmp_path_factory.mktemp("work")
    assert ways.run(ways.Job("weights", str(folder), TOY)) == {}
    return folder


@pytest.fixture
def here(monkeypatch, capsys):
    """The jobs of a test in this process: to import what they need would take each of them 7 seconds."""
    from toolkit.training.model import unsloth

    unsloth()  # before transformers, which it patches
    from transformers import trainer

    def run(job: ways.Job) -> dict:
        monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS])
        monkeypatch.setattr(sys, "argv", ["ways", json.dumps(dataclasses.asdict(job))])
        runpy.run_module(ways.__name__, run_name="__main__")
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(ways, "run", run)


def test_rows_are_a_hybrid_mix_the_longest_first_and_none_too_long(tokenizer):
    rows = ways.rows(tokenizer, 400, 2048)
    lengths = [len(row.ids) for row in rows]
    supervised = {m: sum(row.size("supervised_tokens") for row in rows if row.mode == m) for m in ways.LENGTHS}
    assert supervised["thinking"] / sum(supervised.values()) == pytest.approx(0.75, abs=0.01)
    assert max(lengths) == lengths[0] == lengths[1] == 2048
    assert min(lengths) < 200


def test_text_rows_are_the_same_tokens(tokenizer):
    rows = ways.rows(tokenizer, 20, 512)
    texts = tokenizer.batch_decode([row.ids for row in rows])
    assert tokenizer(texts)["input_ids"] == [row.ids.tolist() for row in rows]


def test_flops_equal_a_count_by_hand():
    shape = fit.shape(TOY)
    layer = 128 * 128 + 2 * 128 * 64 + 128 * 128 + 3 * 128 * 256  # q, k and v, o, MLP
    head = 2048 * 128
    forward = 2 * (2 * layer + head) * 10  # a multiplication and an addition a weight and token, 10 tokens
    scores = 2 * (2 * 128 * 10 * 10 / 2)  # QK^T: 2 layers, 4 heads of 32, half the square
    attention = 2 * scores  # and the same again with V
    frozen_backward, attention_backward = forward, 2 * attention
    assert ways.flops(shape, [10], lora=0) == forward + frozen_backward + attention + attention_backward
    assert ways.flops(shape, [10], lora=7) - ways.flops(shape, [10], lora=0) == 6 * 7 * 10


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_load_whole_and_weigh_what_fit_says(tmp_path, tied):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from tests.tools.bench import weights

    config = json.loads((ROOT / TOY).read_text()) | {"tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = weights.write(tmp_path / "model", config)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    stored = [t for file in folder.glob("*.safetensors") for t in load_file(file).values()]
    planned = fit.forecast(fit.Settings(), str(folder)).phases["load"]
    written = sum(t.numel() * t.element_size() for t in stored)
    assert written == pytest.approx(planned["weights"], rel=0.01)


@pytest.mark.usefixtures("here")
def test_ours_trains_and_counts_the_tokens_that_the_trainer_saw(work):
    result = ways.run(ways.Job("ours", str(work), TOY, **(BRIEFLY | {"warm_up": 0, "max_length": 256})))
    (manifest,) = work.glob("*/run/manifest.json")
    seen = json.loads(manifest.read_text())
    assert len(result["step_seconds"]) == 3
    assert (result["tokens"], result["supervised_tokens"]) == (seen["tokens"], seen["supervised_tokens"])
    assert result["tokens"] < 3 * 8 * 256


@pytest.mark.slow
def test_every_way_runs_on_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # TRL's loss is a Triton kernel: without a GPU, interpreted
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path))
    file = tmp_path / "record.json"
    record = speed.measure(HYBRID, [TOY], 1, file, print, **BRIEFLY)
    assert json.loads(file.read_text()) == record
    assert [run["way"] for run in record["runs"]] == list(ways.WAYS)
    assert not [run for run in record["runs"] if "failed" in run]
    assert (
        len({(run["tokens"], run["supervised_tokens"], tuple(sorted(run["batch"].items()))) for run in record["runs"]})
        == 1
    )
    assert not list(tmp_path.glob(".bench-*"))


@pytest.mark.usefixtures("here")
def test_a_way_that_fails_is_kept_with_its_reason(tmp_path):
    result = ways.run(ways.Job("trl", str(tmp_path), TOY, **BRIEFLY))
    assert "config.json" in result["failed"] or "model" in result["failed"]
    assert list(result) == ["failed"]


@pytest.mark.usefixtures("here")
def test_a_failure_that_is_not_of_memory_says_nothing_about_a_forecast(work):
    # without CUDA the cap itself fails
    run = cards.tried(ways.Job("ours", str(work), TOY, cap=2**30, **BRIEFLY), fit.usable_vram(8))
    assert run["says"] is True
    assert run["fits"] is None
    assert run["failed"]


def test_the_table_holds_medians_of_the_raw_runs():
    record = start.recorded(ROOT / "tests/support/files/bench_speed.json")
    runs = [run for run in record["runs"] if run["way"] == "ours"]
    assert len(runs) == 2
    line = next(line for line in speed.markdown(record).splitlines() if "| ours |" in line)
    cells = [cell.strip() for cell in line.split("|")][1:-1]
    rate = np.mean([run["tokens"] / run["seconds"] for run in runs])
    share = np.mean([run["flops"] / run["seconds"] for run in runs]) / record["rates"][TOY]["flops_per_second"]
    assert cells[2] == f"{rate:,.0f}"
    assert cells[-1] == f"{share:.1%}"
    assert cells[5] == ""  # a forecast is of GPU memory, this run had none


def test_the_table_shows_failed_runs_and_on_a_gpu_the_forecasts_error():
    record = start.recorded(ROOT / "tests/support/files/bench_speed.json")
    record["hardware"]["memory_bytes"] = 24 * fit.GIB
    for run in record["runs"]:
        run |= {"forecast": 103, "peak_reserved": 100}
        if run["way"] == "trl" or (run["way"], run["repeat"]) == ("notebook", 1):
            run["failed"] = "OutOfMemoryError: CUDA out of memory.\nTried to allocate 2 GiB"
    ours, notebook, trl = speed.markdown(record).splitlines()[-3:]
    assert "+3.0%" in ours
    assert "notebook (1 of 2 runs)" in notebook
    assert "trl | failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB |" in trl


def test_cards_say_where_a_forecast_was_wrong():
    runs = [
        {"size": "8B", "card": 8, "says": False, "fits": False},
        {"size": "8B", "card": 12, "says": True, "fits": False},
        {"size": "14B", "card": 8, "says": False, "fits": None, "failed": "ImportError: no triton"},
    ]
    record = {"hardware": {"name": "X"}, "date": "d", "commit": "c", "recipe": HYBRID, "cards": [8, 12], "runs": runs}
    lines = cards.markdown(record).splitlines()
    assert "1 of 3 forecasts right" in lines[0]
    assert lines[-2] == "| 8B | does not fit | does not fit, **forecast otherwise** |"
    assert lines[-1] == "| 14B | failed: ImportError: no triton |  |"


@pytest.mark.parametrize("module", [speed, cards])
def test_readme_shows_what_was_recorded_or_that_nothing_was(module):
    assert module.markdown(None) == "not measured yet"
    assert module.markdown(start.recorded(module.RECORD)) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_recipe_that_packs_is_refused_as_its_steps_would_be_counted_wrong(tmp_path):
    packs = tmp_path / "packs.yaml"
    packs.write_text((ROOT / HYBRID).read_text() + "  packing: true\n")
    with pytest.raises(ToolkitError, match="packing"):
        speed.measure(str(packs), [TOY], 1, Path("never.json"))
