"""A run is never lost and never overwritten: killed and resumed it ends bit for bit where an uninterrupted one does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from toolkit import recipe, train
from toolkit.files import POCKET, ROOT, ToolkitError, outputs
from toolkit.mix import Row

STEPS, SAVE = 8, 0.25
RECIPE = f"""
import sys
from toolkit import callbacks, recipe, run
callbacks.SHARE = 10  # so short a run could not afford its sample replies
overrides = ["name=" + sys.argv[1], "data.budget=3000", "data.validation_size=8", "train.max_steps={STEPS}",
             "train.eval_steps={SAVE}", "train.save_steps={SAVE}", "train.per_device_train_batch_size=4",
             "train.gradient_accumulation_steps=2", "evaluate.max_new_tokens=16", "train.save_total_limit=4"]
run.train(recipe.load("data_recipes/pocket.yaml", overrides), score=False)
"""


def start(folder, name):
    env = os.environ | {"TOOLKIT_OUTPUTS": str(folder), "WANDB_MODE": "offline"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, "-c", RECIPE, name], cwd=ROOT, env=env, text=True, **pipes)


def metrics(run):
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same recipe twice, side by side: `whole`, and `killed` (kill -9 after its step 5, then started again)."""
    folder = tmp_path_factory.mktemp("outputs")
    whole, killed = start(folder, "whole"), start(folder, "killed")
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not any(m["step"] >= 5 for m in metrics(folder / "killed")):
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    steps_before = max(m["step"] for m in metrics(folder / "killed"))
    again = start(folder, "killed")
    said = {"whole": whole.communicate(timeout=240)[0], "killed": again.communicate(timeout=240)[0]}
    assert whole.returncode == 0, said["whole"]
    assert again.returncode == 0, said["killed"]
    return folder, said, steps_before


def test_a_killed_run_goes_on_from_its_checkpoint(runs):
    _, said, steps_before = runs
    assert 5 <= steps_before < STEPS
    assert "going on from checkpoints/checkpoint-" in said["killed"]
    assert "going on" not in said["whole"]


def test_killed_and_resumed_ends_bit_for_bit_like_an_uninterrupted_run(runs):
    folder, _, _ = runs
    adapters = [(folder / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert adapters[0] == adapters[1]


def test_same_recipe_same_losses_at_every_step(runs):
    folder, _, _ = runs
    losses = [[(m["step"], m["loss"]) for m in metrics(folder / n) if "loss" in m] for n in ("whole", "killed")]
    assert [step for step, _ in losses[0]] == list(range(1, STEPS + 1))
    assert losses[0] == losses[1]


def test_the_run_folder_explains_itself(runs):
    folder, _, _ = runs
    run = folder / "whole"
    assert {"recipe.yaml", "manifest.json", "mix.json", "metrics.jsonl", "samples.jsonl", "adapter"} <= {
        p.name for p in run.iterdir()
    }
    manifest = json.loads((run / "manifest.json").read_text())
    assert {"recipe_sha256", "versions", "gpu", "model", "data", "seeds", "commit"} <= set(manifest)
    assert {"name", "revision"} <= set(manifest["model"])
    assert manifest["recipe_sha256"] == recipe.sha256(recipe.load(run / "recipe.yaml"))
    assert manifest["supervised_tokens"] > 0
    mix = json.loads((run / "mix.json").read_text())
    assert abs(mix["achieved"]["supervised_tokens"]["openmath_sample"] - 0.75) <= 0.01


def test_validation_loss_is_logged_per_source_and_mode(runs):
    folder, _, _ = runs
    evaluations = [
        m for m in metrics(folder / "whole") if "eval_openmath_sample/thinking_loss" in m and "eval_loss" in m
    ]
    assert len(evaluations) == 1 / SAVE
    assert "eval_finetome_sample/non_thinking_loss" in evaluations[0]


def test_fixed_prompts_are_answered_in_both_modes_before_during_and_after(runs):
    folder, _, _ = runs
    rows = [json.loads(line) for line in (folder / "killed" / "samples.jsonl").read_text().splitlines()]
    assert {(r["when"], r["mode"]) for r in rows} == {
        (w, m) for w in ("before", "during", "after") for m in ("thinking", "non_thinking")
    }
    assert len({(r["step"], r["when"], r["mode"], r["prompt"]) for r in rows}) == len(rows)


@pytest.mark.parametrize(("share", "steps"), [(0.05, [30]), (1, [10, 20, 30, 40, 50, 60, 70, 80, 90]), (0, [])])
def test_sample_replies_never_take_more_than_their_share_of_training(share, steps, tmp_path, monkeypatch):
    from transformers import TrainerControl, TrainerState

    from toolkit import callbacks

    clock = [0.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(callbacks, "SHARE", share)

    def answers(*_):
        clock[0] += 2.0
        return [{"prompt": "?", "mode": "thinking", "reasoning": "", "answer": "", "finished": True}]

    monkeypatch.setattr(callbacks, "answers", answers)
    samples = callbacks.Samples(tmp_path, None, ("?",), 1, max_new_tokens=8)
    state, control = TrainerState(max_steps=100), TrainerControl()
    samples.on_train_begin(None, state, control)
    for state.global_step in range(1, 101):
        clock[0] += 0.9 if state.global_step > 20 else 0.3  # it turns out slower than it began
        if state.global_step % 10 == 0:
            samples.on_evaluate(None, state, control)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["when"] == "during"] == steps


def test_an_offline_wandb_run_lies_in_the_folder(runs):
    folder, _, _ = runs
    assert list((folder / "whole" / "wandb").glob("offline-run-*/*.wandb"))


def test_a_checkpoint_cut_short_is_removed_and_the_one_before_is_used(runs, tmp_path):
    folder, _, _ = runs
    shutil.copytree(folder / "whole" / "checkpoints", tmp_path / "checkpoints")
    last = tmp_path / "checkpoints" / f"checkpoint-{STEPS}"
    for name in ("trainer_state.json", "optimizer.pt", "adapter_model.safetensors"):
        whole = (folder / "whole" / "checkpoints" / last.name / name).read_bytes()
        shutil.copytree(folder / "whole" / "checkpoints" / last.name, last, dirs_exist_ok=True)
        (last / name).write_bytes(whole[: len(whole) // 2])
        console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115 - a test's void
        found = train.last_checkpoint(tmp_path, console)
        assert found.name == f"checkpoint-{round(STEPS * (1 - SAVE))}"
        assert f"{last.name} was cut short and is removed" in console.export_text()
        assert not last.exists()


def test_a_batch_has_the_same_loss_packed_and_padded():
    import torch
    import transformers
    import trl

    from toolkit.mix import compile_mix

    rows = compile_mix(small(overrides=["data.budget=3000"])).train[:6]
    model = transformers.AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(POCKET)
    padded = transformers.DataCollatorForSeq2Seq(tokenizer)(list(train.dataset(rows)))
    collate = trl.trainer.sft_trainer.DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True)
    packed_rows = trl.pack_dataset(train.dataset(rows), seq_length=512, strategy="bfd")
    packed = collate(list(packed_rows))
    assert len(packed_rows) < len(rows)
    assert sorted(packed["labels"][packed["labels"] != -100].tolist()) == sorted(
        padded["labels"][padded["labels"] != -100].tolist()
    )
    with torch.no_grad():
        losses = [model(**batch, use_cache=False).loss.item() for batch in (padded, packed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_unsloth_still_reads_the_sign_that_lets_rows_with_labels_go_without_padding():
    from importlib.util import find_spec

    source = Path(find_spec("unsloth").origin).parent / "models" / "rl.py"
    rows = [Row(np.arange(n), 1, "s", "thinking", n) for n in (3, 7)]
    (sign,) = {name for name in vars(train.dataset(rows)) if "unsloth" in name}
    assert f"_own.get('{sign}')" in source.read_text(encoding="utf-8")
    assert getattr(train.dataset(rows), sign) == 7


def small(name="claimed", overrides=()):
    return recipe.load("data_recipes/pocket.yaml", [f"name={name}", *overrides])


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path))
    return tmp_path


def test_a_name_is_new_then_unfinished_then_finished(elsewhere):
    assert train.claim(small()) == (elsewhere / "claimed", "new")
    assert train.claim(small())[1] == "unfinished"
    (elsewhere / "claimed" / "manifest.json").write_text(json.dumps({"finished": "now"}))
    assert train.claim(small())[1] == "finished"


def test_another_recipe_under_the_same_name_is_refused_with_the_two_ways_out(elsewhere):
    train.claim(small())
    with pytest.raises(ToolkitError, match=r"train.learning_rate: 0.004 there, 0.001 here.*another name.*--fresh"):
        train.claim(small(overrides=["train.learning_rate=1e-3"]))
    assert (elsewhere / "claimed" / "recipe.yaml").is_file()


def test_fresh_moves_the_old_run_aside_and_keeps_it(elsewhere):
    train.claim(small())
    (elsewhere / "claimed" / "precious").touch()
    assert train.claim(small(overrides=["data.seed=1"]), fresh=True)[1] == "new"
    assert len(list((elsewhere / ".old").glob("claimed-*/precious"))) == 1


def test_a_full_disk_is_named_before_anything_is_lost(elsewhere, monkeypatch):
    usage = shutil.disk_usage(elsewhere)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))

    class Model:
        def parameters(self):
            return []

    with pytest.raises(ToolkitError, match="0 MiB free, this run needs 50 MiB"):
        train._need_space(elsewhere, Model())


def test_out_of_memory_halves_the_batch_and_keeps_the_effective_one():
    said = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115 - a test's void
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    halved = train._halved(settings, 0, said)
    assert (halved["per_device_train_batch_size"], halved["gradient_accumulation_steps"]) == (4, 4)
    assert "out of memory at batch 8 × 2: going on with 4 × 4" in said.export_text()
    with pytest.raises(ToolkitError, match="out of GPU memory.*toolkit fit"):
        train._halved({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}, 0, said)


def test_the_folder_of_a_run_can_be_given_by_name_and_a_wrong_one_lists_those_there_are(runs, monkeypatch):
    from toolkit.model import run_folder

    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(runs[0]))
    assert run_folder("whole") == outputs() / "whole"
    with pytest.raises(ToolkitError, match="wohle: no such run.*Did you mean 'whole'"):
        run_folder("wohle")


def test_the_pocket_model_lies_in_the_package():
    assert (POCKET / "model.safetensors").stat().st_size < 10_000_000
