"""Recipe + model + mix → TRL SFTTrainer → a run folder.

folder = claim(recipe); train(recipe, compile_mix(recipe), model, tokenizer, folder)
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np

from toolkit import fit, tracking
from toolkit import recipe as recipes
from toolkit.files import ROOT, ToolkitError, outputs, write_json, write_text
from toolkit.mix import Mix, Row
from toolkit.model import has_bf16, quiet
from toolkit.recipe import Recipe

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
    if fresh and folder.exists():
        aside = outputs() / ".old" / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(aside)
    if not written.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(written, recipes.to_yaml(recipe))
        return folder, "new"
    if written.read_text(encoding="utf-8") != recipes.to_yaml(recipe):
        raise ToolkitError(
            f"{folder} holds a run of another recipe ({_changes(recipes.load(written), recipe)}). "
            "Runs are never overwritten: choose another name (name=...), or pass --fresh to move the old run aside"
        )
    finished = (folder / "manifest.json").is_file() and "finished" in json.loads((folder / "manifest.json").read_text())
    return folder, "finished" if finished else "unfinished"


def _changes(old: Recipe, new: Recipe) -> str:
    """The first keys in which two recipes differ, for the error message."""

    def flat(value, path=""):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if items is None:
            return {path[1:]: value}
        return {k: v for key, child in items for k, v in flat(child, f"{path}.{key}").items()}

    a, b = flat(recipes.to_dict(old)), flat(recipes.to_dict(new))
    changed = [
        f"{k}: {a.get(k, 'unset')} there, {b.get(k, 'unset')} here" for k in sorted(a | b) if a.get(k) != b.get(k)
    ]
    return "; ".join(changed[:3]) + ("; …" if len(changed) > 3 else "")


def train(recipe: Recipe, mixed: Mix, model, tokenizer, folder: Path, console, clock: dict | None = None) -> dict:
    """Train the adapter on `model` and leave it in `folder`; goes on from the last whole checkpoint if there is one.

    Halves the batch and doubles the accumulation when memory runs out before the first step. `clock` holds when earlier
    phases ended (time.time()). Returns the manifest.
    """
    import torch

    started = time.time()
    _need_space(folder, model)
    manifest = describe(recipe, mixed, model)
    with main_first():
        if is_main():
            for name in ("mix.json", "quarantine.jsonl"):
                shutil.copy(mixed.folder / name, folder / name)
            write_json(folder / "manifest.json", manifest)
        checkpoint = last_checkpoint(folder, console)
    settings = dict(recipe.train)
    with tracking.training(recipe, mixed, folder) if is_main() else contextlib.nullcontext():
        while True:
            trainer, counter, samples, progress = _trainer(recipe, settings, mixed, model, tokenizer, folder, console)
            try:
                _longest_batch_first(trainer, mixed.train, counter)
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                break
            except torch.OutOfMemoryError:
                settings = _halved(settings, trainer.state.global_step, console)
                del trainer
                torch.cuda.empty_cache()
            finally:
                progress.stop()
        if is_main():
            samples.answer(trainer.model, trainer.state.global_step, "after")
    if not is_main():
        return manifest
    with quiet():
        trainer.model.save_pretrained(str(folder / "adapter"))
        tokenizer.save_pretrained(str(folder / "adapter"))
    manifest |= {
        **counter.summary(),
        "reached_after": _since_start({**(clock or {}), "first_step": counter.first_step}),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "batch": {k: settings[k] for k in ("per_device_train_batch_size", "gradient_accumulation_steps")},
        "processes": trainer.args.world_size,
        "packing": trainer.args.packing,
        "padding_free": trainer.args.padding_free,
        "evaluation_seconds": round(trainer.evaluation_seconds, 2),
        "seconds": round(time.time() - started, 2),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if torch.cuda.is_available():
        planned = fit.forecast(fit.settings(recipe, max(len(r.ids) for r in mixed.train)), recipe.model.model_name)
        manifest["fit"] = fit.compare(planned, torch.cuda.max_memory_reserved())
        console.print(f"peak memory: {manifest['fit']['error']:+.1%} forecast against measured")
    write_json(folder / "manifest.json", manifest)
    return manifest


def _since_start(clock: dict) -> dict:
    """Seconds from the start of this process, imports included, to each of the times in `clock`."""
    import psutil

    began = psutil.Process().create_time()
    return {name: round(at - began, 2) for name, at in clock.items()}


def _halved(settings: dict, steps_done: int, console) -> dict:
    """Half the batch, twice the accumulation: the same effective batch in less memory."""
    batch, accumulation = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    if batch == 1 or steps_done:
        raise ToolkitError(
            f"out of GPU memory after {steps_done} steps at batch size {batch}. Run `python -m toolkit fit` for the "
            "smallest changes that fit; the last checkpoint is kept and the same command goes on from it"
        )
    console.print(f"out of memory at batch {batch} × {accumulation}: going on with {batch // 2} × {accumulation * 2}")
    return settings | {"per_device_train_batch_size": batch // 2, "gradient_accumulation_steps": accumulation * 2}


def _trainer(recipe: Recipe, settings: dict, mixed: Mix, model, tokenizer, folder: Path, console):
    import transformers
    import trl

    from toolkit.callbacks import Counter, Metrics, Progress, Samples

    class Trainer(trl.SFTTrainer):
        """SFTTrainer that counts supervised tokens, and one validation loss for all sources, weighted as they are mixed."""

        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training:
                counter.count(inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

        evaluation_seconds = 0.0
        """Validation losses and sample replies during training."""

        def evaluate(self, eval_dataset=None, **kwargs):
            started = time.monotonic()
            metrics = super().evaluate(eval_dataset, **kwargs)
            if eval_dataset is None and kwargs.get("metric_key_prefix", "eval") == "eval":
                losses = {k: metrics[f"eval_{k}_loss"] for k in weights}
                metrics["eval_loss"] = sum(weights[k] * losses[k] for k in losses) / sum(weights.values())
                self.log({"eval_loss": metrics["eval_loss"], **{f"eval_{k}_loss": v for k, v in losses.items()}})
                self.evaluation_seconds += time.monotonic() - started
            return metrics

    counter = Counter()
    validation = datasets_by_source(mixed.validation)
    achieved = mixed.report["achieved"][recipe.data.unit]
    weights = {k: max(achieved[k.split("/")[0]], 1e-6) for k in validation}
    samples = Samples(
        folder,
        tokenizer,
        recipe.evaluate.prompts,
        recipe.data.seed,
        max_new_tokens=min(256, recipe.evaluate.max_new_tokens),
    )
    progress = Progress(console, counter)
    callbacks = [counter, Metrics(folder), progress, samples]
    if recipe.evaluate.early_stopping_patience:
        callbacks.append(transformers.EarlyStoppingCallback(recipe.evaluate.early_stopping_patience))
    with quiet():
        trainer = Trainer(
            model=model,
            args=sft_config(recipe, settings, folder, bool(validation)),
            train_dataset=dataset(mixed.train),
            eval_dataset=validation or None,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    for weight in trainer.model.parameters():
        if (
            weight.requires_grad
        ):  # TRL makes LoRA bfloat16 on a 4-bit base; a resumed run loads float32 and would differ
            weight.data = weight.data.float()
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.remove_callback(transformers.PrinterCallback)
    if trainer.args.packing or trainer.args.padding_free:
        console.print(f"packing {trainer.args.packing}, padding-free {trainer.args.padding_free}")
    return trainer, counter, samples, progress


def sft_config(recipe: Recipe, settings: dict, folder: Path, validates: bool):
    """TRL's SFTConfig from the recipe's `train:` section, for rows that already hold ids and labels."""
    import torch
    import trl

    half = torch.cuda.is_available()
    bf16 = half and has_bf16()
    packing = bool(settings.get("packing"))
    values = {"bf16": bf16, "fp16": half and not bf16, "save_strategy": settings["eval_strategy"], **settings}
    values |= {
        "report_to": tracking.other_trackers(recipe.train) or "none",
        "output_dir": str(folder / "checkpoints"),
        "run_name": recipe.name,
        "seed": recipe.data.seed,
        "disable_tqdm": True,
        "max_length": recipe.model.max_seq_length if packing else None,
        "dataset_kwargs": None if packing else {"skip_prepare_dataset": True},
    }
    if not validates:
        values |= {"eval_strategy": "no", "load_best_model_at_end": False}
    elif values["load_best_model_at_end"]:
        values |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    with quiet():
        return trl.SFTConfig(**values)


def dataset(rows: list[Row]):
    """A datasets.Dataset of input_ids and labels, without a copy of the ids."""
    import datasets
    import pyarrow as pa

    lengths = np.array([len(r.ids) for r in rows])
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32() if lengths.sum() < 2**31 else pa.int64())
    kind = pa.ListArray if offsets.type == pa.int32() else pa.LargeListArray
    ids = np.concatenate([r.ids for r in rows]).astype(np.int32)
    labels = np.concatenate([r.labels for r in rows]).astype(np.int32)
    columns = {
        name: kind.from_arrays(offsets, pa.array(flat)) for name, flat in (("input_ids", ids), ("labels", labels))
    }
    made = datasets.Dataset(pa.table(columns))
    # Unsloth's sign that no row needs cutting: without it, rows that hold ids are padded on a GPU
    made._unsloth_truncated_to = int(lengths.max())
    return made


def datasets_by_source(rows: list[Row]) -> dict:
    """One dataset per source/mode among held-out rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.source}/{row.mode}", []).append(row)
    return {name: dataset(group) for name, group in sorted(groups.items())}


def _longest_batch_first(trainer, rows: list[Row], counter) -> None:
    """Run the longest batch of the mix once, forward and backward: what will not fit fails now, not hours in."""
    import torch

    if not torch.cuda.is_available():
        return
    longest = sorted(rows, key=lambda r: -len(r.ids))[: trainer.args.per_device_train_batch_size]
    batch = trainer.data_collator([dict(trainer.train_dataset[0]) | _columns(r) for r in longest])
    batch = {k: v.to(trainer.model.device) for k, v in batch.items() if hasattr(v, "to")}
    trainer.model.train()
    with torch.random.fork_rng(devices=[0]), trainer.autocast_smart_context_manager():
        trainer.compute_loss(trainer.model, batch).backward()
    trainer.model.zero_grad(set_to_none=True)
    counter.tokens = counter.supervised = 0


def _columns(row: Row) -> dict:
    return {"input_ids": row.ids.tolist(), "labels": row.labels.tolist()}


def last_checkpoint(folder: Path, console) -> Path | None:
    """The newest whole checkpoint; one that a kill cut short is removed, and said so."""
    found = sorted((folder / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for checkpoint in reversed(found):
        if _whole(checkpoint):
            console.print(f"going on from {checkpoint.relative_to(folder)}")
            return checkpoint
        console.print(f"{checkpoint.relative_to(folder)} was cut short and is removed")
        shutil.rmtree(checkpoint)
    return None


def _whole(checkpoint: Path) -> bool:
    """Transformers writes trainer_state.json last; the tensors before it must open too."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        with safe_open(checkpoint / "adapter_model.safetensors", "pt") as tensors:
            tensors.keys()
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, weights_only=True, map_location="meta")
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError):
        return False
    return True


def _need_space(folder: Path, model) -> None:
    """Adapter, best and last checkpoint (weights and two optimizer moments each) must fit on the disk."""
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    need, free = trainable * (1 + 3 * 3) + 50 * 2**20, shutil.disk_usage(folder).free
    if free < need:
        raise ToolkitError(
            f"{folder}: {free / 2**20:,.0f} MiB free, this run needs {need / 2**20:,.0f} MiB for its checkpoints: "
            "free some space, or lower lora.r"
        )


def describe(recipe: Recipe, mixed: Mix, model) -> dict:
    """manifest.json as a run begins: what it would take to repeat it."""
    import torch

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "recipe_sha256": recipes.sha256(recipe),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "gpu": {"name": gpu.name, "memory_bytes": gpu.total_memory} if gpu else None,
        "model": {
            "name": recipe.model.model_name,
            "revision": recipe.model.revision or vars(model.config).get("_commit_hash"),
            "load_in_4bit": recipe.model.load_in_4bit,
        },
        "data": mixed.report["fingerprints"],
        "seeds": {"data": recipe.data.seed, "train": recipe.data.seed},
        "commit": commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> str | None:
    """The toolkit's git commit, with + when files differ from it; None outside a checkout."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None
