"""Recipe + model + mix → TRL SFTTrainer → a run folder.

train(recipe, mixed, model, tokenizer, recorder, console)     # RunRecorder(recipe, mixed) of toolkit.training.record
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console

from toolkit.data.mix import Mix
from toolkit.files import ToolkitError, outputs
from toolkit.recipe import Recipe
from toolkit.training import tracking
from toolkit.training.log import quiet
from toolkit.training.model import has_bf16, on_cuda, out_of_memory, unsloth


def train(recipe: Recipe, mixed: Mix, model: Any, tokenizer: Any, make_recorder: Callable[[Recipe], Any],
          console: Console) -> None:  # fmt: skip
    """Train the adapter on `model`; where memory runs out before the first step, with a smaller batch.

    `make_recorder` gives the RunRecorder of a recipe. The weights are then in `model` and in the run's folder."""
    from toolkit.training.record import release

    if model.device.type != model.get_input_embeddings().weight.device.type:
        console.print("· GPU memory is tight: Unsloth keeps the input embedding in main memory")
    if on_cuda():
        console.print("compiling kernels: about a minute, once")
    while True:
        trainer = build_trainer(recipe, mixed, model, tokenizer, make_recorder(recipe))
        try:
            run_longest_batch(trainer)
            trainer.train()
            return
        except (RuntimeError, TypeError, ValueError) as error:
            refused = not isinstance(error, RuntimeError | ToolkitError) and trainer.state.global_step == 0
            if refused:
                # values that SFTConfig takes and the trainer cannot begin with: a scheduler without its arguments
                raise ToolkitError(f"train: TRL refuses these settings: {error}") from error
            if not out_of_memory(error):
                raise
        # outside `except`: there the traceback would hold the step's tensors
        steps = trainer.state.global_step
        release(trainer)
        del trainer
        recipe = dataclasses.replace(recipe, train=smaller_batch(recipe.train, steps, console))


def smaller_batch(settings: dict[str, Any], steps_done: int, console: Console) -> dict[str, Any]:
    """The next smaller batch size that divides the effective batch, which stays the same."""
    batch = settings["per_device_train_batch_size"]
    if batch == 1 or steps_done:
        raise ToolkitError(
            f"out of GPU memory after {steps_done} steps at batch size {batch}. `python -m toolkit fit RECIPE` shows the "
            "smallest changes that fit; the same command resumes from the last checkpoint"
        )
    effective = batch * settings["gradient_accumulation_steps"]
    smaller = max(n for n in range(1, batch // 2 + 1) if effective % n == 0)
    console.print(
        f"out of memory at batch {batch}: trying {smaller} × {effective // smaller}, the same effective batch"
    )
    return settings | {
        "per_device_train_batch_size": smaller,
        "gradient_accumulation_steps": effective // smaller,
    }


def build_trainer(recipe: Recipe, mixed: Mix, model: Any, tokenizer: Any, recorder: Any) -> Any:
    """TRL's SFTTrainer on the mix, with a RunRecorder."""
    import trl

    validation = mixed.validation_by_source
    with quiet():
        try:
            arguments = trl.SFTConfig(**sft_arguments(recipe, validates=bool(validation)))
        except ValueError as error:  # two keys that contradict each other, e.g. save_steps and eval_steps
            raise ToolkitError(f"train: {error}") from error
        return trl.SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=mixed.train_dataset,
            eval_dataset=validation,
            processing_class=tokenizer,
            callbacks=[recorder],
        )


def sft_arguments(recipe: Recipe, *, validates: bool) -> dict[str, Any]:
    """Arguments for TRL's SFTConfig from the recipe's `train:` section, for rows that already hold ids and labels."""
    settings = recipe.train
    bf16 = on_cuda() and has_bf16()
    packing = bool(settings.get("packing"))
    saves = "steps" if settings["eval_strategy"] == "no" else settings["eval_strategy"]
    # the recipe may change these values, and none of those below
    values = {"bf16": bf16, "fp16": on_cuda() and not bf16, "save_strategy": saves}
    if not on_cuda():
        # its default is True, and would compute every layer twice; memory is short on a card, not here
        values["gradient_checkpointing"] = False
    values |= settings
    values |= {
        "report_to": [name for name in tracking.trackers(recipe.train) if name != "wandb"],  # that is ours
        "output_dir": str(outputs() / recipe.name / "checkpoints"),
        "run_name": recipe.name,
        "seed": recipe.data.seed,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it logs the mean loss where the loss is NaN
        "max_length": recipe.model.max_seq_length if packing else None,
        "dataset_kwargs": None if packing else {"skip_prepare_dataset": True},
    }
    if not validates:
        values["eval_strategy"] = "no"
    if values["eval_strategy"] == "no":
        values["load_best_model_at_end"] = False
    return values


def longest_rows(rows: Any, count: int) -> list[dict[str, Any]]:
    """The rows of a trainer's data set with the most tokens, as they are: packed rows stay packs."""
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_numpy()
    return [rows[int(i)] for i in np.argsort(-lengths, kind="stable")[:count]]


def run_longest_batch(trainer: Any) -> None:
    """On a GPU, run the longest batch once, forward and backward: what will not fit fails now, not hours in."""
    import torch

    from toolkit.training.record import Watched

    if not on_cuda():
        return
    batch = trainer.data_collator(longest_rows(trainer.train_dataset, trainer.args.per_device_train_batch_size))
    batch = {k: v.to(trainer.model.device) for k, v in batch.items() if hasattr(v, "to")}
    with quiet(), torch.random.fork_rng(devices=[0]):
        unsloth().for_training(trainer.model)  # its trainer's __init__ ends with checkpointing switched off
        # past the recorder: this step does not count
        super(Watched, trainer).compute_loss(trainer.model, batch).backward()
    trainer.model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
