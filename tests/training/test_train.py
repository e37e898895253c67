"""A run is never lost, never overwritten and says why it stopped: interrupted and resumed, it ends bit for bit (on a CPU)
where an uninterrupted one does. Trainings run in this process and take a second or two; see tests/support/pocket_run.py."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models

from tests.support.pocket_run import Screen, make_run, trained
from tests.training.conftest import RISING
from toolkit import recipe
from toolkit.data import mix
from toolkit.data.mix import Row, dataset
from toolkit.export import preflight
from toolkit.files import POCKET, ROOT, ToolkitError, outputs, read_json, read_jsonl, write_json
from toolkit.training import checkpoints
from toolkit.training import trainer as train
from toolkit.training.base import base_checksums
from toolkit.training.folder import check_adapter_values, open_run, writing
from toolkit.training.model import check_adapter, load_run, run_folder

CLOCKS = re.compile("_(runtime|second|gib)$")
"""Keys of metrics.jsonl that hold times, and so differ from run to run."""


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def metrics(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not CLOCKS.search(k)} for row in read_jsonl(run / "metrics.jsonl")]


def unfinish(run: Path, steps: int | None = None) -> None:
    """Put a run back to where a kill between its last checkpoint and the end leaves it; with `steps`, a kill after that
    checkpoint."""
    manifest = read_json(run / "manifest.json")
    kept = {"recipe_sha256", "versions", "gpu", "model", "data", "mix", "seeds", "commit", "started"}
    (run / "manifest.json").write_text(json.dumps({k: manifest[k] for k in kept} | {"state": "running"}))
    shutil.rmtree(run / "adapter")
    for checkpoint in checkpoints.all_checkpoints(run):
        if steps and int(checkpoint.name.split("-")[1]) > steps:
            shutil.rmtree(checkpoint)


def same(run: Path, whole: Path) -> bool:
    """Whether a resumed run ended in the files of an uninterrupted one."""
    totals = ("steps", "tokens", "supervised_tokens", "train_loss", "best_step", "adapter_step", "batch")
    manifests = [{k: read_json(folder / "manifest.json")[k] for k in totals} for folder in (run, whole)]
    samples = [read_jsonl(folder / "samples.jsonl") for folder in (run, whole)]
    assert metrics(run) == metrics(whole)
    assert manifests[0] == manifests[1]
    assert samples[0] == samples[1]
    return weights(run) == weights(whole)


# --- interruption ----------------------------------------------------------------------------------------------------


def test_killed_and_resumed_ends_bit_for_bit_like_an_uninterrupted_run(copy, root):
    shutil.rmtree(copy / "run")
    env = os.environ | {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    command = [sys.executable, "-c", "from tests.support.pocket_run import trained; trained('run')"]
    process = subprocess.Popen(command, cwd=ROOT, env=env)
    deadline = time.monotonic() + 120
    while not (copy / "run" / "checkpoints" / "checkpoint-2" / "checksums.json").is_file():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert read_json(copy / "run" / "manifest.json")["state"] == "running"
    _, said = trained("run")
    assert "resuming from checkpoints/checkpoint-" in said
    assert same(copy / "run", root / "run")


@pytest.mark.parametrize("lost", ["nothing", "manifest", "damaged manifest"])
def test_a_resume_at_the_last_step_trains_nothing(copy, root, lost):
    run = copy / "run"
    unfinish(run)
    if lost == "manifest":
        (run / "manifest.json").unlink()
    elif lost == "damaged manifest":
        (run / "manifest.json").write_text("")
    _, said = trained("run")
    assert "resuming from checkpoints/checkpoint-4" in said
    assert "validation loss" not in said
    assert same(run, root / "run")
    assert read_json(run / "manifest.json")["state"] == "finished"


def test_a_resume_at_the_last_epoch_trains_nothing(elsewhere):
    epochs = ["train.max_steps=-1", "train.num_train_epochs=1", "data.unit=examples", "data.budget=12"]
    run, _ = trained("run", *epochs)
    shutil.copytree(run, elsewhere / "whole")
    unfinish(run)
    trained("run", *epochs)
    assert same(run, elsewhere / "whole")


def grown(path, rows: int) -> str:
    """An override that trains on a file of so many rows."""
    lines = [json.dumps({"query": f"What is {i} plus 1?", "response": f"It is {i + 1}."}) for i in range(rows)]
    path.write_text("\n".join(lines))
    source = {"name": "sums", "path": str(path), "mode": "non_thinking", "fraction": 1.0}
    return f"data.sources={json.dumps([source])}"


def test_data_that_changed_are_noticed_by_a_resume_and_by_an_evaluation(elsewhere, tmp_path):
    """Appended rows make another mix: its held-out rows may have trained, and its record would be of rows nobody saw."""
    own = grown(tmp_path / "own.jsonl", 300)
    folder, _ = trained("own", own, "data.budget=500")
    cache = elsewhere / ".mixes"
    held = json.loads((folder / "mix.json").read_text())["sources"]["sums"]["rows_held_out"]
    grown(tmp_path / "own.jsonl", 400)
    loaded, manifest = recipe.load(folder / "recipe.yaml"), read_json(folder / "manifest.json")
    assert len(mix.of_run(loaded, manifest).validation) == held  # as it was: the cache still has it
    shutil.rmtree(cache)
    with pytest.raises(ToolkitError, match="sums changed since this run began"):
        mix.of_run(loaded, manifest)
    unfinish(folder, 2)
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(ToolkitError, match="sums changed since this run began"):
        trained("own", own, "data.budget=500")
    assert json.loads((folder / "manifest.json").read_bytes())["data"] == json.loads(before)["data"]


def test_a_base_that_changed_is_noticed_by_a_resume(elsewhere):
    model = shutil.copytree(POCKET, elsewhere / "model")
    folder, _ = trained("own", f"model.model_name={model}")
    unfinish(folder, 2)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(ToolkitError, match=r"model.safetensors: not the file that this run was trained on"):
        trained("own", f"model.model_name={model}")


@pytest.mark.parametrize(
    ("strategy", "steps"), [("no", [4]), ("epoch", [4]), ("steps", [3, 4])], ids=lambda value: str(value)
)
def test_the_last_step_has_a_checkpoint_whatever_the_strategy(strategy, steps):
    run, _ = trained(
        "run", f"train.save_strategy={strategy}", "train.save_steps=3", "train.load_best_model_at_end=false"
    )
    assert [checkpoints.step_of(c) for c in checkpoints.all_checkpoints(run)] == steps


@pytest.mark.parametrize(
    ("stop", "reason", "last"),
    [
        (lambda: signal.raise_signal(signal.SIGINT), "interrupted by SIGINT", 3),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero", 2),
    ],
    ids=["Ctrl-C", "bug"],
)
def test_a_run_that_stops_early_says_why_keeps_its_checkpoints_and_resumes(copy, root, stop, reason, last):
    run = copy / "run"
    shutil.rmtree(run)
    with pytest.raises((KeyboardInterrupt, ZeroDivisionError)) as stopped:
        trained("run", screen=Screen("step 3/4", stop))
    manifest = read_json(run / "manifest.json")
    assert (manifest["state"], manifest["stopped"]) == ("stopped", reason)
    assert "Traceback" in (run / "run.log").read_text()
    assert f"log: {run / 'run.log'}" in stopped.value.__notes__
    _, said = trained("run")
    assert f"resuming from checkpoints/checkpoint-{last}" in said
    assert same(run, root / "run")
    assert "stopped" not in read_json(run / "manifest.json")


def test_what_the_libraries_print_is_in_the_log_and_not_on_the_screen(root):
    assert "Unsloth" in (root / "run" / "run.log").read_text()


def test_the_log_names_neither_the_home_folder_nor_a_token(elsewhere, monkeypatch):
    from toolkit.training.log import LOG

    monkeypatch.setenv("HOME", "/home/annamustermann")
    LOG.write(f"/home/annamustermann/models/mine: HF_TOKEN=abc, hf_{'a' * 30}\n")
    assert (elsewhere / "toolkit.log").read_text() == "~/models/mine: HF_TOKEN=…, hf_…\n"


# --- damage ----------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def test_the_card_that_is_written_again_with_the_scores_is_no_damage(copy):
    card = copy / "run" / "adapter" / "README.md"
    assert card.is_file()
    check_adapter(copy / "run")
    card.write_text("another")
    check_adapter(copy / "run")
    assert "finished already" in trained("run")[1]


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_small_files_that_were_cut_or_lost_are_computed_again(copy, root, damage):
    run = copy / "run"
    unfinish(run, steps=3)
    for file in ("metrics.jsonl", "samples.jsonl", "manifest.json"):
        damage(run / file)
    _, said = trained("run")
    assert "resuming from checkpoints/checkpoint-3" in said
    assert same(run, root / "run")


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_checkpoint_is_removed_and_the_one_before_is_used(copy, file, damage):
    damage(copy / "run" / "checkpoints" / "checkpoint-4" / file)
    said = []
    assert checkpoints.last_checkpoint(copy / "run", said.append).name == "checkpoint-3"
    assert said[0] == "checkpoints/checkpoint-4 is incomplete or damaged and is removed"


def test_the_best_checkpoint_is_the_adapter_and_where_it_is_damaged_the_next_best(rising, elsewhere):
    run = shutil.copytree(rising, elsewhere / "rising")
    losses = {row["step"]: row["eval_loss"] for row in metrics(run) if "eval_loss" in row}
    best, second = sorted(losses, key=losses.get)[:2]
    assert best < max(losses)  # or nothing is shown
    assert read_json(run / "manifest.json")["adapter_step"] == best
    assert weights(run) == (run / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors").read_bytes()
    unfinish(run)
    flip(run / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    _, said = trained("rising", *RISING)
    assert f"checkpoint-{best} is damaged" in said
    assert weights(run) == (run / "checkpoints" / f"checkpoint-{second}" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_adapter_is_never_used_and_train_writes_it_again_from_the_checkpoint(copy, root, damage):
    run = copy / "run"
    check_adapter(run)
    damage(run / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ToolkitError, match=r"adapter_model.safetensors: missing or damaged.*train"):
        load_run(run)
    trained("run")
    assert same(run, root / "run")


def test_an_evaluation_that_cannot_be_read_is_not_taken_for_one(tmp_path):
    from toolkit.evaluation.measure import scored

    assert not scored(tmp_path)
    (tmp_path / "eval.json").write_text('{"base": {')
    assert not scored(tmp_path)
    (tmp_path / "eval.json").write_text('{"base": {}, "tuned": {}, "difference": {}}')
    assert scored(tmp_path)


def test_a_full_disk_during_a_checkpoint_is_named_and_the_run_resumes(copy, root):
    shutil.rmtree(copy / "run")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        full = Screen("step 2/4", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard)))
        with pytest.raises(ToolkitError, match=r"checkpoints.*could not be written.*free some space"):
            trained("run", screen=full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "could not be written" in read_json(copy / "run" / "manifest.json")["stopped"]
    trained("run")
    assert same(copy / "run", root / "run")


def test_outputs_below_a_file_are_refused_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path / "file" / "outputs"))
    with pytest.raises(ToolkitError, match="file is a file, not a folder: choose another output folder"):
        trained("run")
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path))
    with pytest.raises(ToolkitError, match="file is a file, not a folder: remove it, or choose another name"):
        trained("file")


def test_a_full_disk_while_the_tokenizer_is_saved_is_named_too(tmp_path):
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    with (
        pytest.raises(ToolkitError, match="adapter: could not be written.*free some space"),
        writing(tmp_path / "adapter"),
    ):
        tokenizer.save("/dev/full")
    with pytest.raises(KeyError), writing(tmp_path / "adapter"):  # nothing else is taken for a failed write
        raise KeyError("No such key")


# --- learning --------------------------------------------------------------------------------------------------------


def test_early_stopping_stops_and_its_count_survives_a_resume(rising):
    losses = [row["eval_loss"] for row in metrics(rising) if "eval_loss" in row]
    best = min(range(len(losses)), key=losses.__getitem__) + 1
    patience = [*RISING, "evaluate.early_stopping_patience=2"]
    run, _ = trained("whole", *patience)
    assert read_json(run / "manifest.json")["steps"] < len(losses)
    assert read_json(run / "manifest.json")["adapter_step"] == best
    stopped_at = read_json(run / "manifest.json")["steps"]
    with pytest.raises(KeyboardInterrupt):  # between the first and the second evaluation without improvement
        trained("cut", *patience, screen=Screen(f"step {stopped_at}/", lambda: signal.raise_signal(signal.SIGINT)))
    again, said = trained("cut", *patience)
    assert "resuming" in said
    assert same(again, run)
    unfinish(again)  # an early stop is an end: a resume after it trains nothing either
    trained("cut", *patience)
    assert same(again, run)


def test_validation_loss_does_not_depend_on_the_evaluation_batch(root):
    run, _ = trained("single", "train.per_device_eval_batch_size=1")
    rows = [[row for row in metrics(folder) if "eval_loss" in row] for folder in (run, root / "run")]
    keys = [key for key in rows[0][0] if key.endswith("_loss")]
    assert len(keys) == 3  # two sources and all, as mixed
    for key in keys:
        # losses near 0 differ by the rounding of float32 logits, up to 1.3e-6 on some processors
        assert [row[key] for row in rows[0]] == pytest.approx([row[key] for row in rows[1]], rel=1e-5, abs=5e-6)


def test_a_learning_rate_at_which_the_loss_is_lost_stops_the_run_and_names_the_rows(elsewhere):
    with pytest.raises(ToolkitError, match=r"step \d: .*loss is (nan|inf).*1e\+30.*lower train.learning_rate.*row \d+"):
        trained("run", "train.learning_rate=1.0e+30", "train.warmup_steps=0", "train.max_steps=9")
    for file in elsewhere.glob("run/**/*.json*"):
        assert not re.search(r"\b(NaN|Infinity)\b", file.read_text()), file
    assert "lower train.learning_rate" in read_json(elsewhere / "run" / "manifest.json")["stopped"]


@pytest.mark.parametrize("steps", [2, 9])
def test_an_adapter_that_does_not_change_stops_the_run(steps):
    with pytest.raises(ToolkitError, match=r"step \d: the adapter has not changed.*raise train.learning_rate"):
        trained("run", "train.learning_rate=1.0e-30", f"train.max_steps={steps}", "train.warmup_steps=0")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["train.learning_rate=-1"], "learning_rate"),
        (["train.eval_steps=3", "train.save_steps=2"], "save_steps|save steps|saving steps"),
        (["train.lr_scheduler_type=warmup_stable_decay"], "TRL refuses these settings.*num_decay_steps"),
    ],
)
def test_settings_that_nobody_can_train_with_are_an_error_with_their_reason(settings, told):
    with pytest.raises(ToolkitError, match=told):
        trained("run", *settings)


@pytest.mark.parametrize("packed", [False, True])
def test_the_rows_of_a_batch_are_named_as_in_their_source(packed):
    import torch

    from toolkit.training.counts import Batch, rows_of

    # the last one begins with the text of the first, which is not in the batch
    texts, asked = ([5, 9], [5, 6, 9], [7, 6, 9], [5, 9, 7, 9]), (1, 2, 1, 3)
    rows = [Row(np.array(t), n, "sums", "thinking", 10 * i) for i, (t, n) in enumerate(zip(texts, asked, strict=True))]
    held = rows[1], rows[3]
    ids, labels = ([torch.tensor(getattr(row, name)) for row in held] for name in ("ids", "labels"))
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {"input_ids": pad(ids, True, 0), "labels": pad(labels, True, -100)}
    if packed:
        batch = {"input_ids": torch.cat(ids)[None], "labels": torch.cat(labels)[None]}
    seen = Batch(batch["input_ids"], batch["labels"], 0.0, 0, 0)
    assert rows_of([seen], rows) == "sums row 10, sums row 30"


def watched(losses: list[float], rows: list[Row], folder: Path):
    """(trainer, its recorder) of a trainer whose losses are given, and what it logs."""
    import torch

    from toolkit.training.record import RunRecorder, Watched

    class Plain:
        args = SimpleNamespace(learning_rate=1.0, device="cpu")
        state = SimpleNamespace(global_step=6)
        accelerator = SimpleNamespace(reduce=lambda value, _: value)
        model = SimpleNamespace(training=True)

        def compute_loss(self, model, inputs, return_outputs=False):  # noqa: ARG002 - a trainer's signature
            return torch.tensor(losses.pop(0))

        def log(self, logs):
            self.logged = logs

    report = {"achieved": {"supervised_tokens": {"sums": 1.0}}}
    mixed = SimpleNamespace(train=rows, validation=rows, report=report)
    plain = recipe.load("pocket", ["evaluate.forgetting_probes=0"])
    recorder = RunRecorder(plain, mixed, Console(file=Screen()), folder=folder)
    trainer = recorder.trainer = type("Trainer", (Watched, Plain), {"recorder": recorder})()
    return trainer, recorder


def test_a_loss_of_exactly_zero_stops_the_run(tmp_path):
    import torch

    row = Row(np.array([1, 2]), 1, "sums", "thinking", 3)
    trainer, recorder = watched([0.0], [row], tmp_path)
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[-100, 2]])}
    trainer.compute_loss(SimpleNamespace(training=True), batch)
    with pytest.raises(ToolkitError, match="step 7: the loss is exactly 0.*sums row 3"):
        recorder.on_pre_optimizer_step(trainer.args, trainer.state, None)


def test_a_validation_loss_is_weighted_by_supervised_tokens_not_by_batches(tmp_path):
    """Without padding a batch of a long and a batch of a short row would otherwise count the same."""
    import torch

    trainer, _ = watched([4.0, 0.0], [Row(np.array([1, 2]), 1, "sums", "thinking", 3)], tmp_path)
    for count in (1, 3):
        labels = torch.tensor([[-100] + [7] * count])
        trainer.compute_loss(SimpleNamespace(training=False), {"input_ids": labels, "labels": labels})
    trainer.log({"eval_sums/thinking_loss": 2.0, "eval_sums/thinking_runtime": 1.0})
    assert trainer.logged["eval_sums/thinking_loss"] == trainer.logged["eval_loss"] == 1.0


def test_a_model_that_is_nowhere_is_an_error_in_one_sentence():
    from toolkit.training.model import load_base

    with pytest.raises(ToolkitError, match="nobody/nothing: cannot be loaded: ") as error:
        load_base(recipe.load("pocket", ["model.model_name=nobody/nothing"]).model)
    assert "\n" not in str(error.value)


# --- a checkpoint as Unsloth's are ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_folder_laid_out_like_unsloths_dynamic_4bit_checkpoints_trains_and_exports_onto_both_bases(tmp_path):
    from tests.support.export_fixtures import base_model, dynamic_4bit
    from toolkit import run
    from toolkit.export import export
    from toolkit.training.model import load_base

    kept = "model.layers.1.mlp.down_proj"
    base = dynamic_4bit(base_model(tmp_path / "toy"), kept)
    plan = recipe.load("pocket", [f"model.model_name={base}", "model.max_seq_length=2048", "train.max_steps=2", "train.report_to=none",
                                  "evaluate.max_new_tokens=4", "data.budget=2000", "data.validation_size=4"])  # fmt: skip
    kinds = {name: type(module).__name__ for name, module in load_base(plan.model)[0].named_modules()}
    assert (kinds[kept], kinds["model.layers.0.mlp.down_proj"]) == ("Linear", "Linear4bit")
    folder = run.train(plan, Console(file=Screen()), score=False)
    for onto, label in (("16bit", "toy"), ("4bit", "toy-unsloth-bnb-4bit")):
        certificate = export(folder, quants=("q8_0",), onto=onto, console=Console(quiet=True))
        assert (certificate["passed"], certificate["inputs"]["base"]) == (True, label)


# --- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "precision"), [("T4", {"bf16": False, "fp16": True}), ("A100", {"bf16": True, "fp16": False})]
)
def test_a_card_that_only_emulates_bfloat16_trains_in_fp16(monkeypatch, card, precision):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    supported = lambda including_emulation=True: card == "A100" or including_emulation  # noqa: E731 - as torch answers
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    arguments = train.sft_arguments(recipe.load("pocket"), validates=True)
    assert {name: arguments[name] for name in precision} == precision


@pytest.mark.parametrize(
    ("cuda", "change", "expected"),
    [(False, [], False), (False, ["train.gradient_checkpointing=true"], True), (True, [], None)],
    ids=["CPU", "CPU, asked for", "CUDA keeps the libraries' default"],
)
def test_a_cpu_computes_every_layer_once(monkeypatch, cuda, change, expected):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    arguments = train.sft_arguments(recipe.load("pocket", change), validates=True)
    assert arguments.get("gradient_checkpointing") == expected


def test_recomputing_layers_changes_no_bit_of_the_adapter(root):
    run, _ = trained("run", "train.gradient_checkpointing=true")
    assert weights(run) == weights(root / "run")


def test_a_step_whose_gradients_overflow_in_fp16_is_counted_and_shown(tmp_path):
    import accelerate
    import torch
    from accelerate.optimizer import AcceleratedOptimizer

    from toolkit.training.record import RunRecorder
    from toolkit.view.trained import report

    accelerate.Accelerator(cpu=True)
    weight, scaler = torch.nn.Parameter(torch.ones(1)), torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(torch.optim.SGD([weight], lr=0.5), scaler=scaler)
    state = SimpleNamespace(global_step=1, max_steps=9)
    recorder = RunRecorder(small(), None, Console(file=Screen()), folder=tmp_path)
    recorder.trainer, recorder._first, recorder._warm_up = SimpleNamespace(optimizer=optimizer), 0, 10
    recorder._is_claimed = True
    for factor in (1e38, 1.0):  # 1e38 times the scaler's 65,536 is more than float32 holds
        optimizer.zero_grad()
        scaler.scale(weight.sum() * factor).backward()
        optimizer.step()
        recorder.on_step_begin(None, state, None)
        recorder.on_step_end(None, state, None)
    assert recorder.counts.totals["skipped_steps"] == 1
    write_json(tmp_path / "manifest.json", recorder.counts.summary())
    (tmp_path / "samples.jsonl").write_text("")
    console = Console(record=True, width=200, file=Screen())
    report(tmp_path, console)
    assert "1 of the steps were skipped: their fp16 gradients overflowed" in console.export_text()


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "accumulation", "smaller", "more"), [(8, 2, 4, 4), (3, 2, 1, 6), (6, 1, 3, 2), (5, 1, 1, 5), (2, 4, 1, 8)]
)
def test_out_of_memory_makes_the_batch_smaller_and_keeps_the_effective_one(batch, accumulation, smaller, more):
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    console = Console(record=True, width=200, file=Screen())
    found = train.smaller_batch(settings, 0, console)
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == (smaller, more)
    assert f"trying {smaller} × {more}" in console.export_text()


def test_out_of_memory_at_batch_one_or_after_a_step_says_what_to_do():
    for batch, steps in ((1, 0), (4, 3)):
        with pytest.raises(ToolkitError, match=f"out of GPU memory after {steps} steps.*toolkit fit.*resumes"):
            train.smaller_batch({"per_device_train_batch_size": batch, "gradient_accumulation_steps": 2}, steps, None)


@pytest.mark.parametrize("kind", ["torch", "cuda"])
def test_a_run_that_is_out_of_memory_in_its_first_step_trains_with_a_smaller_batch(monkeypatch, kind):
    import gc
    import weakref

    import torch
    import trl

    from toolkit.training.model import unsloth

    unsloth()
    compute, held = trl.SFTTrainer.compute_loss, []

    def full(trainer, model, inputs, *args, **kwargs):
        loss = compute(trainer, model, inputs, *args, **kwargs)
        if model.training and inputs["input_ids"].shape[0] > 2:
            held.append(weakref.ref(loss))
            raise torch.OutOfMemoryError("full") if kind == "torch" else RuntimeError("CUDA error: out of memory")
        assert held[0]() is None  # the graph of the failed step is gone before the next try
        return loss

    gc.disable()
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", full)
    run, said = trained("run")
    gc.enable()
    assert "out of memory at batch 4: trying 2 × 2, the same effective batch" in said
    assert read_json(run / "manifest.json")["batch"] == {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    losses = [row["loss"] for row in metrics(run) if "loss" in row]
    assert read_json(run / "manifest.json")["train_loss"] == pytest.approx(math.fsum(losses) / 4, rel=1e-4)


def test_the_longest_rows_are_those_of_the_data_set_that_is_trained_on():
    import trl

    rows = [Row(np.arange(1, n), 1, "s", "thinking", n) for n in (9, 4, 30, 12)]
    assert [len(r["input_ids"]) for r in train.longest_rows(dataset(rows), 2)] == [29, 11]
    packed = trl.pack_dataset(dataset(rows), seq_length=32, strategy="bfd")
    (longest,) = train.longest_rows(packed, 1)
    assert sum(longest["seq_lengths"]) == len(longest["input_ids"]) == max(map(len, packed["input_ids"]))


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_batch_has_the_same_loss_packed_and_padded():
    import torch
    import transformers
    import trl

    from toolkit.data.mix import compile_mix

    rows = compile_mix(small(overrides=["data.budget=3000"])).train[:6]
    model = transformers.AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(POCKET)
    padded = transformers.DataCollatorForSeq2Seq(tokenizer)(list(dataset(rows)))
    collate = trl.trainer.sft_trainer.DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True)
    packed_rows = trl.pack_dataset(dataset(rows), seq_length=512, strategy="bfd")
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
    (sign,) = {name for name in vars(dataset(rows)) if "unsloth" in name}
    assert f"_own.get('{sign}')" in source.read_text(encoding="utf-8")
    assert getattr(dataset(rows), sign) == 7


# --- the run folder --------------------------------------------------------------------------------------------------


def test_the_run_folder_explains_itself(root):
    run = root / "run"
    files = {p.name for p in run.iterdir()}
    assert {"recipe.yaml", "manifest.json", "mix.json", "metrics.jsonl", "samples.jsonl", "run.log", "adapter"} <= files
    manifest = read_json(run / "manifest.json")
    assert {"recipe_sha256", "versions", "gpu", "model", "data", "mix", "seeds", "commit"} <= set(manifest)
    assert manifest["model"] == {
        "name": "pocket", "revision": None, "load_in_4bit": True, "files": base_checksums(POCKET)
    }  # fmt: skip
    assert manifest["recipe_sha256"] == recipe.sha256(recipe.load(run / "recipe.yaml"))
    assert manifest["state"] == "finished"
    adapted = read_json(run / "adapter" / "adapter_config.json")["target_modules"]
    assert adapted == sorted(recipe.Lora().target_modules)  # the same file in every process
    mix = read_json(run / "mix.json")
    assert abs(mix["achieved"]["supervised_tokens"]["openmath_sample"] - 0.75) <= 0.01


def test_the_adapter_keeps_the_context_length_of_the_base(root):
    lengths = [read_json(f / "tokenizer_config.json")["model_max_length"] for f in (root / "run" / "adapter", POCKET)]
    assert lengths[0] == lengths[1] > 512  # 512 is the recipe's max_seq_length


def test_tokens_and_losses_of_the_manifest_are_those_of_the_log(root):
    manifest, rows = read_json(root / "run" / "manifest.json"), [r for r in metrics(root / "run") if "loss" in r]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert manifest["train_loss"] == pytest.approx(math.fsum(row["loss"] for row in rows) / 4)
    assert manifest["tokens"] == rows[-1]["tokens"] == rows[-1]["num_tokens"] > manifest["supervised_tokens"] > 0


def test_validation_loss_is_logged_per_source_and_mode(root):
    rows = [row for row in metrics(root / "run") if "eval_loss" in row]
    assert len(rows) == 4
    assert {"eval_openmath_sample/thinking_loss", "eval_finetome_sample/non_thinking_loss"} <= set(rows[0])


def test_fixed_prompts_are_answered_in_both_modes_before_and_after(root):
    rows = read_jsonl(root / "run" / "samples.jsonl")
    assert len(rows) == 2 * 2 * 2  # prompts
    assert len({(r["when"], r["mode"], r["prompt"]) for r in rows}) == len(rows)


def test_before_and_after_shows_the_answer_in_full_strength():
    from toolkit.view.trained import before_after

    row = {"prompt": "?", "mode": "thinking", "reasoning": "because", "answer": "42", "when": "before"}
    table = before_after([row, row | {"when": "after"}])
    console = Console(file=Screen(), width=80, force_terminal=True, color_system="standard")
    console.print(table)
    lines = console.file.getvalue().splitlines()
    grey = "\x1b[90m"
    assert any(f"{grey}because" in line for line in lines)
    assert not any(f"{grey}42" in line for line in lines)


def small(name="claimed", overrides=()):
    return recipe.load("data_recipes/pocket.yaml", [f"name={name}", *overrides])


def claimed(*overrides: str) -> Path:
    """The folder of a run that a training has begun."""
    loaded = small(overrides=overrides)
    folder, _ = open_run(loaded)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(loaded))
    return folder


def test_a_name_is_new_then_unfinished_then_finished(elsewhere):
    assert open_run(small()) == (elsewhere / "claimed", "new")
    assert open_run(small())[1] == "new"  # nothing was written
    folder = claimed()
    assert open_run(small())[1] == "unfinished"
    (folder / "manifest.json").write_text(json.dumps({"finished": "now"}))
    assert open_run(small())[1] == "finished"


def test_another_recipe_under_the_same_name_is_refused_with_the_two_ways_out():
    folder = claimed()
    with pytest.raises(ToolkitError, match=r"train.learning_rate: 0.004 there, 0.001 here.*another name.*--fresh"):
        open_run(small(overrides=["train.learning_rate=1e-3"]))
    assert (folder / "recipe.yaml").is_file()


def test_fresh_moves_the_old_run_aside_and_keeps_it(elsewhere):
    (claimed() / "precious").touch()
    assert open_run(small(overrides=["data.seed=1"]), fresh=True)[1] == "new"
    assert len(list((elsewhere / ".old").glob("claimed-*/precious"))) == 1


@pytest.mark.parametrize("options", [{}, {"fresh": True}])
def test_a_second_train_of_a_run_is_refused_and_told_who_has_it(elsewhere, options):
    code = "from toolkit.files import lock, outputs\nwith lock(outputs() / 'run', 'train'): print('held', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        (elsewhere / "run").mkdir()
        with pytest.raises(
            ToolkitError, match=rf"in use by `train` \(process {holder.pid}, since .*wait until it ends"
        ):
            trained("run", **options)
        assert (elsewhere / "run").is_dir()
        holder.communicate("\n")


def test_the_folder_of_a_run_can_be_given_by_name_and_a_wrong_one_suggests_the_nearest(elsewhere):
    make_run(elsewhere / "whole")
    assert run_folder("whole") == outputs() / "whole"
    with pytest.raises(ToolkitError, match="wohle: no such run .*whole"):
        run_folder("wohle")


def test_a_gguf_that_a_recipe_asks_for_and_its_model_cannot_become_is_refused_before_it_is_loaded(elsewhere):
    (elsewhere / "rwkv").mkdir()
    (elsewhere / "rwkv" / "config.json").write_text('{"model_type": "rwkv"}')
    asks = "export.quantization_method=[q4_k_m]"
    with pytest.raises(ToolkitError, match=r"no GGUF conversion: model type 'rwkv'.*quantization_method=\[\]"):
        trained("run", f"model.model_name={elsewhere / 'rwkv'}", asks)


def test_by_default_a_model_without_gguf_conversion_is_not_refused_and_the_run_says_so(elsewhere):
    (elsewhere / "rwkv").mkdir()
    (elsewhere / "rwkv" / "config.json").write_text('{"model_type": "rwkv"}')
    loaded = recipe.load("data_recipes/pocket.yaml", [f"model.model_name={elsewhere / 'rwkv'}"])
    assert "exported as merged weights" in preflight.findings(loaded)[0]


def test_a_tracker_that_is_not_installed_is_named_before_the_model_is_loaded():
    with pytest.raises(ToolkitError, match="pip install swanlab"):
        trained("run", "train.report_to=swanlab", "model.model_name=/nowhere")


def test_a_model_that_cannot_be_loaded_is_an_error_in_one_line():
    with pytest.raises(ToolkitError, match="nowhere/nothing"):
        trained("run", "model.model_name=nowhere/nothing")


def test_an_offline_wandb_run_lies_in_the_folder(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, _ = trained("run", "train.report_to=wandb", "train.max_steps=2")
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))


def test_the_pocket_model_lies_in_the_package():
    assert (POCKET / "model.safetensors").stat().st_size < 10_000_000


def test_a_run_that_is_not_evaluated_while_it_trains_has_its_checkpoints():
    run, _ = trained("run", "train.eval_strategy=no", "train.save_steps=2")
    assert [p.name for p in checkpoints.all_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]


def test_an_adapter_made_with_other_values_than_the_recipe_is_refused_by_name():
    asked = recipe.load("data_recipes/pocket.yaml")
    used = SimpleNamespace(r=asked.lora.r, lora_alpha=64, lora_dropout=0.0, use_rslora=False)
    model = SimpleNamespace(peft_config={"default": used}, active_adapter="default")
    with pytest.raises(ToolkitError, match=r"lora_alpha=64, the recipe lora.lora_alpha=32"):
        check_adapter_values(asked, model)


def test_what_cannot_be_exported_is_said_before_training():
    (finding,) = preflight.findings(recipe.load("data_recipes/pocket.yaml", ["lora.modules_to_save=[embed_tokens]"]))
    assert "cannot be exported here (modules_to_save = ['embed_tokens'])" in finding
