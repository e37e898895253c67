"""Recipe + model + mix → TRL SFTTrainer → a run folder.

folder, state = claim(recipe); train(recipe, mixed, model, tokenizer, folder, console)
"""

import contextlib
import dataclasses
import errno
import gc
import importlib.metadata
import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from toolkit import recipe as recipes
from toolkit.data.mix import Mix, check_data
from toolkit.files import (
    ROOT,
    ToolkitError,
    flat,
    outputs,
    read_json,
    read_text,
    write_error,
    write_json,
    write_jsonl,
    write_text,
)
from toolkit.machine import fit
from toolkit.recipe import Recipe
from toolkit.training import tracking
from toolkit.training.base import check_base, recorded_checksums
from toolkit.training.model import adapter_checksums, damaged, has_bf16, out_of_memory, quiet, unsloth

WRITE_ERRORS = {
    getattr(errno, name) for name in ("ENOSPC", "EFBIG", "EDQUOT", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EIO")
}
NO_SPACE = r"No space left|os error (27|28)|PytorchStreamWriter|unexpected pos|iostream error"
"""How torch.save and safetensors report a failed write: as a RuntimeError and a SafetensorError of their own."""
FROM_TOTALS = ("batch", "processes", "packing", "padding_free", "resumed_at", "skipped_steps", "peak_memory_bytes")
"""What the manifest takes from the record's totals as it is."""
PACKAGES = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "wandb")


def is_main() -> bool:
    """Whether this is the process that writes and talks: the only one, or the first that accelerate launched."""
    return os.environ.get("RANK", "0") == "0"


def main_first() -> contextlib.AbstractContextManager:
    """Under `accelerate launch` the first process goes ahead and the others follow; alone, nothing."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return contextlib.nullcontext()
    import accelerate
    import torch

    # unless told that it is on a CPU, PartialState knows of no other process there, and nobody waits
    return accelerate.PartialState(cpu=not torch.cuda.is_available()).main_process_first()


def claim(recipe: Recipe, *, fresh: bool = False) -> tuple[Path, str]:
    """The run's folder and its state: new, unfinished or finished. Runs are never overwritten.

    `fresh` moves an existing run aside to outputs/.old/. Raises ToolkitError when another recipe holds the name.
    """
    folder = outputs() / recipe.name
    written = folder / "recipe.yaml"
    # moved, not deleted: --fresh may have been typed too early
    if fresh and folder.exists():
        aside = outputs() / ".old" / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(aside)
    if not written.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(written, recipes.to_yaml(recipe))
        return folder, "new"
    if not holds_run_of(recipe, folder):
        raise ToolkitError(
            f"{folder} holds a run of another recipe ({_changes(recipes.load(written), recipe)}). "
            "Runs are never overwritten: choose another name (name=...), or pass --fresh to move the old run aside"
        )
    made = read_manifest(folder)
    # a damaged adapter is written again from its checkpoint, without training
    finished = "finished" in made and damaged(folder / "adapter", made.get("adapter", {})) is None
    return folder, "finished" if finished else "unfinished"


def holds_run_of(recipe: Recipe, folder: Path) -> bool:
    """Whether a folder's run is of this recipe, by its recipe.yaml; where an editor changed or damaged that, by the
    manifest, and the file is written anew."""
    written, text = folder / "recipe.yaml", recipes.to_yaml(recipe)
    with contextlib.suppress(ToolkitError):
        if read_text(written) == text:
            return True
    if read_manifest(folder).get("recipe_sha256") != recipes.sha256(recipe):
        return False
    write_text(written, text)
    return True


def _changes(old: Recipe, new: Recipe) -> str:
    """The first keys in which two recipes differ, for the error message."""
    a, b = flat(recipes.to_dict(old)), flat(recipes.to_dict(new))
    changed = [
        f"{k}: {a.get(k, 'unset')} there, {b.get(k, 'unset')} here" for k in sorted(a | b) if a.get(k) != b.get(k)
    ]
    return "; ".join(changed[:3]) + ("; …" if len(changed) > 3 else "")


def train(recipe: Recipe, mixed: Mix, model, tokenizer, folder: Path, console) -> dict:
    """Train the adapter on `model` and write it to `folder`; resumes from the newest whole checkpoint.

    A checkpoint of the last step leaves nothing to train: then only what follows training is done. Returns the manifest.
    """
    with main_first(), writing(folder):
        if is_main():
            begin(recipe, mixed, model, folder)
        checkpoint = last_checkpoint(folder, console)
    # wandb stays open for the evaluation that follows
    with tracking.training(recipe, mixed, folder) if is_main() else contextlib.nullcontext():
        if checkpoint is None or not ended(checkpoint):
            fit_adapter(recipe, mixed, model, tokenizer, folder, checkpoint, console)
        return finish(recipe, mixed, model, tokenizer, folder, console) if is_main() else {}


def begin(recipe: Recipe, mixed: Mix, model, folder: Path) -> None:
    """Start a run's record: what the mix holds, and manifest.json. Raises ToolkitError when checkpoints saw other data, or
    when the model's adapter is not the recipe's."""
    config = model.peft_config[model.active_adapter]
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora"):
        used, asked = getattr(config, name), getattr(recipe.lora, name)
        if used != asked:
            raise ToolkitError(
                f"the adapter has {name}={used}, the recipe lora.{name}={asked}: change it in the recipe, which names and "
                f"records the run (lora.{name}={used})"
            )
    if all_checkpoints(folder):
        before = read_manifest(folder)
        check_data(mixed, before)
        check_base(recipe.model, before.get("model", {}).get("files", {}))
    write_json(folder / "mix.json", mixed.report)
    write_jsonl(folder / "quarantine.jsonl", mixed.quarantine)
    write_json(folder / "manifest.json", describe(recipe, mixed, model, folder))


def fit_adapter(recipe: Recipe, mixed: Mix, model, tokenizer, folder: Path, checkpoint: Path | None, console):
    """Run the trainer to its last step. Where memory runs out before the first one, with a smaller batch. Returns its
    Record; the weights are in `model` and in the checkpoints."""
    if on_cuda():
        console.print("compiling kernels: about a minute, once")
    while True:
        trainer, record = build_trainer(recipe, mixed, model, tokenizer, folder, console)
        try:
            with quiet(), writing(folder / "checkpoints"):
                run_longest_batch(trainer)
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            return record
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        except (TypeError, ValueError) as error:
            if isinstance(error, ToolkitError) or trainer.state.global_step:
                raise
            # values that SFTConfig takes and the trainer cannot begin with: a scheduler without its arguments
            raise ToolkitError(f"train: TRL refuses these settings: {error}") from error
        finally:
            record.close()
            steps = trainer.state.global_step
            release(trainer)
        # outside `except`: there the traceback would hold the step's tensors
        del trainer, record
        recipe = dataclasses.replace(recipe, train=smaller_batch(recipe.train, steps, console))


def release(trainer) -> None:
    """Free what training held and evaluation does not need: optimizer state, gradients, the float32 wrapper of forward."""
    import torch

    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.model.zero_grad(set_to_none=True)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    gc.collect()
    torch.cuda.empty_cache()


def smaller_batch(settings: dict, steps_done: int, console) -> dict:
    """The next smaller batch size that divides the effective batch, which stays the same."""
    batch, accumulation = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    if batch == 1 or steps_done:
        raise ToolkitError(
            f"out of GPU memory after {steps_done} steps at batch size {batch}. `python -m toolkit fit RECIPE` shows the "
            "smallest changes that fit; the same command resumes from the last checkpoint"
        )
    smaller = max(n for n in range(1, batch // 2 + 1) if batch * accumulation % n == 0)
    more = batch * accumulation // smaller
    console.print(
        f"out of memory at batch {batch} × {accumulation}: trying {smaller} × {more}, the same effective batch"
    )
    return settings | {"per_device_train_batch_size": smaller, "gradient_accumulation_steps": more}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a write that failed below `path`, whoever reports it, into the error that says what to do."""
    try:
        yield
    except ToolkitError:
        raise
    except Exception as error:  # safetensors raises its own kind, tokenizers a plain Exception
        known = error.errno in WRITE_ERRORS if isinstance(error, OSError) else re.search(NO_SPACE, str(error))
        if not known:
            raise
        failed = error if isinstance(error, OSError) else OSError(str(error).splitlines()[0])
        raise write_error(path, failed) from error


def build_trainer(recipe: Recipe, mixed: Mix, model, tokenizer, folder: Path, console):
    """(SFTTrainer on the mix, its Record)."""
    import trl

    validation = mixed.validation_by_source
    record = record_of(recipe, mixed, folder, console)
    with quiet():
        try:
            arguments = trl.SFTConfig(**sft_arguments(recipe, folder, bool(validation)))
        except ValueError as error:  # two keys that contradict each other, e.g. save_steps and eval_steps
            raise ToolkitError(f"train: {error}") from error
        trainer = trl.SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=mixed.train_dataset,
            eval_dataset=validation,
            processing_class=tokenizer,
            callbacks=[record],
        )
    prepare(trainer, record)
    if trainer.args.packing or trainer.args.padding_free or recipe.train.get("packing"):
        console.print(f"packing {trainer.args.packing}, padding-free {trainer.args.padding_free}")
    return trainer, record


def prepare(trainer, record) -> None:
    """Make a plain SFTTrainer keep the run's record: what `finish` expects, whoever built the trainer."""
    import transformers

    for printer in (transformers.ProgressCallback, transformers.PrinterCallback):
        trainer.remove_callback(printer)
    trainer.args.load_best_model_at_end = False  # `finish` loads it, after a resume with nothing left to train too
    trainer.args.save_total_limit = None  # the record deletes old ones, once the new one is whole
    for weight in trainer.model.parameters():
        # TRL makes LoRA bfloat16 on a 4-bit base; a resumed run loads float32 and would differ
        if weight.requires_grad:
            weight.data = weight.data.float()
    record.watch(trainer)


def record_of(recipe: Recipe, mixed: Mix, folder: Path, console):
    """The callbacks.Record of a run, for SFTTrainer's `callbacks`."""
    from toolkit.training.record import Record

    achieved = mixed.report["achieved"][recipe.data.unit]
    # above 0, since the mean of the losses divides by their sum
    weights = {f"{row.source}/{row.mode}": max(achieved[row.source], 1e-6) for row in mixed.validation}
    limit, patience = recipe.train.get("save_total_limit"), recipe.evaluate.early_stopping_patience
    return Record([*mixed.train, *mixed.validation], weights, folder, console, limit=limit, patience=patience)


def sft_arguments(recipe: Recipe, folder: Path, validates: bool) -> dict:
    """Arguments for TRL's SFTConfig from the recipe's `train:` section, for rows that already hold ids and labels."""
    settings, half = recipe.train, on_cuda()
    bf16 = half and has_bf16()
    packing = bool(settings.get("packing"))
    # the recipe may change these values, and none of those below
    saves = "steps" if settings["eval_strategy"] == "no" else settings["eval_strategy"]
    values = {"bf16": bf16, "fp16": half and not bf16, "save_strategy": saves}
    if not half:
        # its default is True, and would compute every layer twice; memory is short on a card, not here
        values["gradient_checkpointing"] = False
    values |= settings
    values |= {
        "report_to": [name for name in tracking.trackers(recipe.train) if name != "wandb"],  # that is ours
        "output_dir": str(folder / "checkpoints"),
        "run_name": recipe.name,
        "seed": recipe.data.seed,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it logs the mean loss where the loss is NaN
        "max_length": recipe.model.max_seq_length if packing else None,
        "dataset_kwargs": None if packing else {"skip_prepare_dataset": True},
    }
    if not validates or settings["eval_strategy"] == "no":
        values |= {"eval_strategy": "no", "load_best_model_at_end": False}
    elif values["load_best_model_at_end"]:
        values |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    return values


def on_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def longest_rows(rows, count: int) -> list[dict]:
    """The rows of a trainer's data set with the most tokens, as they are: packed rows stay packs."""
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_numpy()
    return [rows[int(i)] for i in np.argsort(-lengths, kind="stable")[:count]]


def run_longest_batch(trainer) -> None:
    """On a GPU, run the longest batch once, forward and backward: what will not fit fails now, not hours in."""
    import torch

    if not on_cuda():
        return
    batch = trainer.data_collator(longest_rows(trainer.train_dataset, trainer.args.per_device_train_batch_size))
    batch = {k: v.to(trainer.model.device) for k, v in batch.items() if hasattr(v, "to")}
    unsloth().for_training(trainer.model)  # its trainer's __init__ ends with checkpointing switched off
    with torch.random.fork_rng(devices=[0]):
        type(trainer).compute_loss(trainer, trainer.model, batch).backward()  # unwatched: this step does not count
    trainer.model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def last_checkpoint(folder: Path, console) -> Path | None:
    """The newest whole checkpoint; one that was cut short or damaged is removed, and said so."""
    for checkpoint in reversed(all_checkpoints(folder)):
        if whole(checkpoint):
            console.print(f"resuming from {checkpoint.relative_to(folder)}")
            return checkpoint
        console.print(f"{checkpoint.relative_to(folder)} is incomplete or damaged and is removed")
        shutil.rmtree(checkpoint)
    return None


def all_checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted((folder / "checkpoints").glob("checkpoint-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def whole(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is as its checksums.json, written last, says."""
    try:
        return damaged(checkpoint, read_json(checkpoint / "checksums.json")) is None
    except ToolkitError:
        return False


def ended(checkpoint: Path) -> bool:
    """Whether training ended at this checkpoint: at the last step, or stopped early."""
    state = read_json(checkpoint / "trainer_state.json")
    stopped = state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
    return stopped or state["global_step"] >= state["max_steps"]


def best_checkpoint(folder: Path, history: list[dict], console) -> Path:
    """Of the whole checkpoints, the one with the lowest validation loss; without any loss, the newest."""
    losses = {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line}
    newest_first = all_checkpoints(folder)[::-1]
    for checkpoint in sorted(newest_first, key=lambda p: losses.get(step_of(p), math.inf)):
        if whole(checkpoint):
            return checkpoint
        console.print(f"{checkpoint.relative_to(folder)} is damaged: the next best checkpoint is used")
    raise ToolkitError(f"{folder}: no whole checkpoint left: train again with --fresh")


def finish(recipe: Recipe, mixed: Mix, model, tokenizer, folder: Path, console) -> dict:
    """From the checkpoints: the adapter, the replies without it and with it, the last manifest. The same after an
    uninterrupted training and after a resume that had nothing left to train."""
    from toolkit.training.record import progress_of, write_metrics

    # everything is read from the checkpoints, never from the trainer: a resume may have none
    last = all_checkpoints(folder)[-1]
    state = read_json(last / "trainer_state.json")
    best = recipe.train["load_best_model_at_end"]
    chosen = best_checkpoint(folder, state["log_history"], console) if best else last
    totals = state["stateful_callbacks"]["Record"]["attributes"]["totals"]
    write_metrics(folder / "metrics.jsonl", state["log_history"])
    # the best checkpoint's weights, which the model does not hold when it is not the last
    checksums = write_adapter(chosen, model, tokenizer, folder / "adapter")
    sample_replies(recipe, model, tokenizer, folder)
    manifest = read_json(folder / "manifest.json") | {
        **{name: totals[name] for name in FROM_TOTALS},
        **{name: round(totals[name], 2) for name in ("train_seconds", "evaluation_seconds", "seconds")},
        **progress_of(totals),
        "train_loss": totals["loss"] / totals["steps"],
        "steps": state["global_step"],
        "best_step": state["best_global_step"],
        "adapter_step": step_of(chosen),
        "adapter": checksums,
        "state": "finished",
        "finished": _now(),
    }
    write_json(folder / "manifest.json", manifest)  # before the comparison: what fit does not know never stops a run
    if on_cuda():
        try:
            planned = fit.forecast(recipe, model.config, longest=max(len(r.ids) for r in mixed.train))
        except ToolkitError as error:
            console.print(f"no memory forecast: {error}")
            return manifest
        manifest["fit"] = fit.compare(planned, totals["peak_memory_bytes"])
        write_json(folder / "manifest.json", manifest)
    return manifest


def sample_replies(recipe: Recipe, model, tokenizer, folder: Path) -> None:
    """The recipe's fixed prompts answered without the adapter and with it, in each mode: samples.jsonl, and a wandb table."""
    from toolkit.evaluation.generate import base_and_tuned

    options = {"max_new_tokens": min(256, recipe.evaluate.max_new_tokens or 256), "seed": recipe.data.seed}
    asked = base_and_tuned(model, tokenizer, recipe.evaluate.prompts, **options)
    rows = [
        {"when": when, "prompt": row["prompt"], "mode": row["mode"], "reasoning": row[name].reasoning,
         "answer": row[name].answer, "finished": row[name].finished}
        for name, when in (("base", "before"), ("tuned", "after"))
        for row in asked
    ]  # fmt: skip
    write_jsonl(folder / "samples.jsonl", rows)
    tracking.log_table("samples", rows)


def write_adapter(checkpoint: Path, model, tokenizer, folder: Path) -> dict[str, str]:
    """Load a checkpoint's weights into `model` and write them as the run's adapter. Returns {file: SHA-256}, but for the card."""
    import peft
    from safetensors.torch import load_file

    with quiet(), writing(folder):
        peft.set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    return adapter_checksums(folder)


def describe(recipe: Recipe, mixed: Mix, model, folder: Path) -> dict:
    """manifest.json as a run begins: what it would take to repeat it. A resumed run keeps when it began."""
    import torch

    gpu = torch.cuda.get_device_properties(0) if on_cuda() else None
    return {
        "recipe_sha256": recipes.sha256(recipe),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "gpu": {"name": gpu.name, "memory_bytes": gpu.total_memory} if gpu else None,
        "model": {
            "name": recipe.model.model_name,
            "revision": recipe.model.revision or vars(model.config).get("_commit_hash"),
            "load_in_4bit": recipe.model.load_in_4bit,
            "files": recorded_checksums(recipe.model),
        },
        "data": mixed.report["fingerprints"],
        "mix": mixed.folder.name,
        "seeds": {"data": recipe.data.seed, "train": recipe.data.seed},
        "commit": commit(),
        "started": read_manifest(folder).get("started") or _now(),
        "state": "running",
    }


def read_manifest(folder: Path) -> dict:
    """A run's manifest.json; {} where it is missing or damaged, as training writes it again."""
    try:
        return read_json(folder / "manifest.json")
    except ToolkitError:
        return {}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def commit() -> str | None:
    """The toolkit's git commit, with + when files differ from it; None outside a checkout."""
    if not (ROOT / ".git").exists():  # an installed copy may lie in a checkout of something else
        return None
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None
