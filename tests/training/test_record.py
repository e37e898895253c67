"""The callback that keeps a run: a name is taken by the first step, a signal leaves a checkpoint, and what changed is said."""

import pickle
import shutil
import signal
from pathlib import Path

import pytest

from tests.support.pocket_run import SMALL, Screen, trained
from tests.training.test_train import metrics, same, unfinish, weights
from toolkit import recipe
from toolkit.files import ToolkitError, read_json, read_jsonl, sha256, write_json
from toolkit.recipe import Evaluate
from toolkit.training import checkpoints
from toolkit.training.folder import open_run

LATE = ["train.eval_strategy=no", "train.save_steps=4", "train.load_best_model_at_end=false"]
"""No checkpoint before the last step."""


# --- a name is taken by the first step -------------------------------------------------------------------------------

WRONG = {
    "path": ["data.sources.0.path=nowhere.jsonl"],
    "model": ["model.model_name=nowhere/nothing"],
    "columns": ["data.sources.0.columns={user: nothing, assistant: here}"],
    "too few rows": ["data.validation_size=100000"],
    "scheduler": ["train.lr_scheduler_type=polynomial", "train.lr_scheduler_kwargs={nothing: 1}"],
    "optimizer": ["train.optim=nothing"],
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_train_that_fails_before_its_first_step_leaves_its_name_free(change):
    with pytest.raises(ToolkitError):
        trained("run", *change)
    assert open_run(recipe.load("pocket", ["name=run", "train.learning_rate=1e-3"]))[1] == "new"


def test_the_corrected_command_trains_after_a_failed_one(elsewhere):
    with pytest.raises(ToolkitError, match="nowhere"):
        trained("run", "model.model_name=nowhere/nothing")
    trained("run", "train.max_steps=2")
    assert read_json(elsewhere / "run" / "manifest.json")["state"] == "finished"


def test_the_first_trained_step_takes_the_name(elsewhere):
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trained("run", screen=Screen("step 1/4", fail))
    assert (elsewhere / "run" / "recipe.yaml").is_file()
    with pytest.raises(ToolkitError, match="holds a run of another recipe"):
        trained("run", "train.learning_rate=1e-3")


def test_a_run_that_lost_its_recipe_file_is_known_by_its_manifest(copy):
    (copy / "run" / "recipe.yaml").unlink()
    with pytest.raises(ToolkitError, match="holds a run of another recipe"):
        open_run(recipe.load("pocket", ["name=run", *SMALL, "train.learning_rate=1e-3"]))
    assert open_run(recipe.load("pocket", ["name=run", *SMALL]))[1] == "finished"
    assert (copy / "run" / "recipe.yaml").is_file()


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_before_the_first_checkpoint_leaves_one(root, name):
    class Stopped(KeyboardInterrupt):
        pass

    def stop(number, _frame):
        raise Stopped(number)

    number = getattr(signal, name)
    before = signal.signal(number, stop)
    try:
        with pytest.raises(Stopped):
            trained("cut", *LATE, screen=Screen("step 2/4", lambda: signal.raise_signal(number)))
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    cut, said = trained("cut", *LATE)
    assert "resuming from checkpoints/checkpoint-2" in said
    assert weights(cut) == (root / "run/checkpoints/checkpoint-4/adapter_model.safetensors").read_bytes()


def test_a_second_signal_stops_at_once_and_says_that_nothing_is_kept(elsewhere):
    screen = Screen("step 1/4", lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        trained("run", *LATE, screen=screen)
    assert not list((elsewhere / "run" / "checkpoints").glob("checkpoint-*"))
    assert "nothing of this training is kept" in screen.getvalue()


# --- what changed, what is damaged -----------------------------------------------------------------------------------


def test_a_resume_under_other_versions_says_which(copy):
    unfinish(copy / "run", 2)
    manifest = read_json(copy / "run" / "manifest.json")
    manifest["versions"] |= {"torch": "2.0.0", "unsloth": "2025.1.1"}
    write_json(copy / "run" / "manifest.json", manifest)
    _, said = trained("run")
    assert "resumed under other versions than it began with: unsloth 2025.1.1 → " in said
    assert "torch 2.0.0 → " in said
    earlier = read_json(copy / "run" / "manifest.json")["earlier_versions"]
    assert earlier == {"torch": "2.0.0", "unsloth": "2025.1.1"}


class Harmful:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_not_run_and_an_older_checkpoint_is_used(copy, name):
    newest = copy / "run" / "checkpoints" / "checkpoint-4"
    (newest / name).write_bytes(pickle.dumps(Harmful(copy / "was_run")))
    write_json(newest / "checksums.json", read_json(newest / "checksums.json") | {name: sha256(newest / name)})
    lines = []
    assert checkpoints.last_checkpoint(copy / "run", lines.append).name == "checkpoint-3"
    assert f"checkpoint-4 cannot be loaded ({name}: " in lines[0]
    assert not (copy / "was_run").exists()


# --- warm-up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warm_up"), [(1, 0.05), (3, 10), (2, 2)])
def test_a_run_whose_every_step_is_warm_up_says_so_before_it_trains(steps, warm_up):
    def stop():
        raise ZeroDivisionError

    screen = Screen("are warm-up", stop)
    with pytest.raises(ZeroDivisionError):
        trained("run", f"train.max_steps={steps}", f"train.warmup_steps={warm_up}", screen=screen)
    assert f"all {steps} steps are warm-up" in screen.getvalue()


def test_a_run_that_was_nothing_but_warm_up_is_finished_all_the_same():
    run, _ = trained("run", "train.max_steps=1", "train.warmup_steps=1")
    assert read_json(run / "manifest.json")["state"] == "finished"


# --- one read of the device a step -----------------------------------------------------------------------------------


def test_micro_batches_are_counted_with_one_read_a_step():
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from toolkit.training.counts import Counts

    class Reads(TorchDispatchMode):
        """Counts what waits for a card: a scalar that is asked for."""

        count = 0

        def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
            self.count += "local_scalar" in str(function)
            return function(*args, **(kwargs or {}))

    counts, labels = Counts(), torch.tensor([[-100, 4, 5], [-100, -100, 6]])
    with Reads() as reads:
        for loss in (1.5, 0.25, 3.0):
            inputs = {"input_ids": labels, "labels": labels, "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
            counts.see(inputs, torch.tensor(loss))
    assert reads.count == 0
    counts.add(counts.read())
    assert (counts.totals["tokens"], counts.totals["supervised_tokens"], counts.totals["loss"]) == (15, 9, 4.75)


# --- one callback ----------------------------------------------------------------------------------------------------


def test_one_callback_in_a_plain_sfttrainer_leaves_the_folder_that_train_leaves(elsewhere, root):
    from toolkit.training import model as models

    models.unsloth()
    import trl

    import toolkit
    from toolkit.training.trainer import sft_arguments

    loaded = recipe.load("pocket", ["name=run", *SMALL])
    base, tokenizer = models.load_base(loaded.model)
    model = models.attach(base, loaded.lora, seed=loaded.data.seed)
    mixed = toolkit.compile_mix(loaded)
    trainer = trl.SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=mixed.train_dataset,
        eval_dataset=mixed.validation_by_source,
        args=trl.SFTConfig(**sft_arguments(loaded, validates=True)),
        callbacks=[toolkit.RunRecorder(loaded, mixed)],
    )
    trainer.train()
    made = elsewhere / "run"
    assert same(made, root / "run")
    files = {p.name for p in (root / "run").iterdir()} - {"run.log"}
    assert files <= {p.name for p in made.iterdir()}
    trainer.train()  # nothing is left to train
    assert weights(made) == weights(root / "run")


# --- forgetting ------------------------------------------------------------------------------------------------------

FORGETTING = ["train.learning_rate=0.03", "train.lr_scheduler_type=constant", "train.warmup_steps=0", "train.max_steps=6",
              "evaluate.forgetting_probes=2"]  # fmt: skip


def test_training_stops_at_the_second_evaluation_beyond_the_limit_and_keeps_one_within(elsewhere):
    whole, _ = trained("whole", *FORGETTING)
    distances = {row["step"]: row["eval_forgetting_kl"] for row in metrics(whole) if "eval_loss" in row}
    assert len(distances) == 6
    limit = sorted(distances.values())[2]  # three of six are within
    within = [step for step, distance in distances.items() if distance <= limit]
    second = [step for step, distance in distances.items() if distance > limit][1]
    run, said = trained("run", *FORGETTING, f"evaluate.forgetting_limit={limit}")
    manifest = read_json(run / "manifest.json")
    assert manifest["steps"] == second
    assert "beyond the limit of forgetting" in said
    seen = {row["step"]: row for row in metrics(run) if "eval_loss" in row}
    losses = {step: seen[step]["eval_loss"] for step in seen if step in within}
    assert manifest["adapter_step"] == manifest["best_step"] == min(losses, key=losses.get)
    # cut before its first evaluation beyond the limit, it ends where it would have
    shutil.copytree(run, elsewhere / "uncut")
    unfinish(run, 1)
    trained("run", *FORGETTING, f"evaluate.forgetting_limit={limit}")
    assert same(run, elsewhere / "uncut")


@pytest.mark.usefixtures("elsewhere")
def test_a_limit_that_is_rarely_looked_at_is_warned_of_before_the_first_step():
    limit = "evaluate.forgetting_limit=9"
    _, said = trained("rarely", *FORGETTING, "train.eval_steps=0.5", limit)
    assert "evaluate.forgetting_limit is looked at every 3 of 6 steps" in said
    _, said = trained("often", *FORGETTING, "train.max_steps=10", limit)
    assert "is looked at" not in said


@pytest.mark.usefixtures("elsewhere")
def test_a_run_of_which_no_evaluation_is_within_the_limit_says_what_is_kept_and_what_to_do():
    run, said = trained("run", *FORGETTING, "evaluate.forgetting_limit=1e-6")
    seen = {row["step"]: row["eval_forgetting_kl"] for row in metrics(run) if "eval_loss" in row}
    assert read_json(run / "manifest.json")["adapter_step"] == min(seen, key=seen.get)
    said = " ".join(said.split())
    assert "no evaluation is within evaluate.forgetting_limit=1e-06. Evaluate earlier (train.eval_steps=0.05)" in said
    assert f"with a KL of {min(seen.values()):.2f}" in said


def test_measuring_the_distance_changes_no_bit_of_the_adapter(root):
    run, _ = trained("run", "evaluate.forgetting_probes=2", "evaluate.keep_best_by=accuracy")
    assert {"eval_forgetting_kl", "eval_token_accuracy"} <= set(metrics(run)[-1])
    last = "checkpoints/checkpoint-4/adapter_model.safetensors"
    assert (run / last).read_bytes() == (root / "run" / last).read_bytes()


def test_the_distance_is_the_divergence_of_the_two_models_on_the_bases_own_answers(elsewhere):
    """Against plain transformers and PEFT."""
    import peft
    import torch
    import transformers

    from toolkit.files import POCKET

    # not quantized, since plain transformers loads it so
    plain_base = ["model.load_in_4bit=false", "train.max_steps=2", "train.load_best_model_at_end=false"]
    run, _ = trained("run", *FORGETTING, *plain_base)
    logged = [row["eval_forgetting_kl"] for row in read_jsonl(run / "metrics.jsonl") if "eval_loss" in row][-1]
    from toolkit.evaluation.watch import Forgetting
    from toolkit.training.model import load_run

    model, tokenizer = load_run(run)
    measure = Forgetting(2, [], elsewhere / ".base_replies")
    assert measure(model, tokenizer)["forgetting_kl"] == pytest.approx(logged, rel=1e-3)
    plain = transformers.AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(plain, str(run / "adapter"))
    total = tokens = 0.0
    for row in measure.answers:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            q = tuned(input_ids=ids).logits[0].log_softmax(-1)
            with tuned.disable_adapter():
                p = tuned(input_ids=ids).logits[0].log_softmax(-1)
        part = slice(row["prompt_length"] - 1, len(row["input_ids"]) - 1)
        total += float((p.exp() * (p - q)).sum(-1)[part].sum())
        tokens += len(row["input_ids"]) - row["prompt_length"]
    assert logged == pytest.approx(total / tokens, rel=2e-2)


@pytest.mark.parametrize(
    ("section", "best"),
    [
        (Evaluate(), 30),
        (Evaluate(forgetting_limit=0.3), 20),
        (Evaluate(keep_best_by="kl"), 10),
        (Evaluate(keep_best_by="accuracy"), 20),
        (Evaluate(keep_best_by="accuracy", forgetting_limit=0.2), 10),
        (Evaluate(forgetting_limit=0.01), 10),
    ],
    ids=["loss", "loss within the limit", "kl", "accuracy", "accuracy within the limit", "none within: the nearest"],
)
def test_the_step_that_is_kept_is_the_best_within_the_limit(section, best):
    rows = [(10, 0.9, 0.1, 0.5), (20, 0.7, 0.25, 0.8), (30, 0.5, 0.9, 0.7)]
    history = [
        {"step": step, "eval_loss": loss, "eval_forgetting_kl": kl, "eval_token_accuracy": accuracy}
        for step, loss, kl, accuracy in rows
    ]
    assert checkpoints.best_step([{"step": 5, "loss": 1.0}, *history], section) == best


def test_a_limit_needs_probes_to_be_measured():
    with pytest.raises(ToolkitError, match=r"forgetting_probes: expected 1 or more"):
        recipe.load("pocket", ["evaluate.forgetting_limit=0.3", "evaluate.forgetting_probes=0"])
