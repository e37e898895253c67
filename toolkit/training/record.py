"""The callback that makes a run folder out of a training: its record, its checks, its checkpoints, its adapter.

trainer = trl.SFTTrainer(model=model, callbacks=[RunRecorder(recipe, mixed)]); trainer.train()

`trainer.train()` then resumes by itself, keeps the folder of the run (recipe, mix, manifest, metrics, checkpoints, adapter)
and leaves in the model the weights of the checkpoint that is kept.
"""

import functools
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from toolkit.data.mix import Mix
from toolkit.files import ToolkitError, finite, read_json, sha256, write_json, write_jsonl
from toolkit.recipe import Recipe
from toolkit.records import MemoryComparison, MetricLine, SampleLine
from toolkit.training import checkpoints
from toolkit.training.counts import (
    Counts,
    Read,
    Totals,
    adapter_sum,
    first_not_finite,
    progress_of,
    rows_of,
    speed,
)
from toolkit.training.folder import (
    check_adapter_values,
    check_resume,
    claim,
    is_main,
    main_first,
    open_run,
    utc_now,
    writing,
)
from toolkit.training.interrupt import StopRequest
from toolkit.training.log import quiet
from toolkit.training.model import write_adapter
from toolkit.training.tracking import TRACKER
from toolkit.view.progress import Progress

UNCHANGED_STEPS = 3
"""Optimizer steps after warm-up (its first one has learning rate 0) after which the adapter must have changed."""
TIMES_BEYOND_LIMIT = 2
"""Evaluations beyond `evaluate.forgetting_limit` after which training stops."""
FROM_TOTALS = ("batch", "processes", "packing", "padding_free", "resumed_at", "skipped_steps", "peak_memory_bytes")
"""What the manifest takes from the totals as it is."""


@dataclass(frozen=True)
class Stages:
    """What a training asks of stages that it does not import; `toolkit.run.recorder` fills them in."""

    picture: Callable[[Path], None] | None = None
    """(folder) draws the mix into it."""
    replies: Callable[[Any, Any], list[SampleLine]] | None = None
    """(model, tokenizer) → the fixed prompts answered without the adapter and with it: samples.jsonl."""
    memory: Callable[[Any, int], MemoryComparison | None] | None = None
    """(model, bytes at the peak) → the memory forecast beside what was measured."""
    forgetting: Callable[[Any, Any], dict[str, float]] | None = None
    """(model, tokenizer) → {"forgetting_kl": nats per token, "token_accuracy": share}, at each evaluation."""


class RunRecorder(TrainerCallback, ExportableState):
    """One of SFTTrainer's `callbacks`: keeps the folder of a run while any trainer trains it.

    Raises ToolkitError when another recipe's run holds the name. Stops a run that has diverged, does not learn, has not
    improved for `evaluate.early_stopping_patience` evaluations, or forgets more than `evaluate.forgetting_limit` allows."""

    def __init__(self, recipe: Recipe, mixed: Mix, console: Console | None = None, stages: Stages | None = None,
                 folder: Path | None = None):  # fmt: skip
        self.recipe, self.mixed = recipe, mixed
        self.console = console or Console(highlight=False)
        self.stages = stages or Stages()
        self.folder = folder or open_run(recipe)[0]
        self.counts = Counts()
        self.request = StopRequest(self.console.print)
        self._is_claimed = False
        self._losses: dict[str, float] = {}
        """Losses of the validation sets that were scored, until all are."""
        self._progress: Progress | None = None
        self._saved = 0

    @functools.cached_property
    def weights(self) -> dict[str, float]:
        """{validation set: its share in the mix}, by which `eval_loss` is weighted."""
        achieved = self.mixed.report["achieved"][self.recipe.data.unit]
        # above 0, since the mean of the losses divides by their sum
        return {f"{row.source}/{row.mode}": max(achieved[row.source], 1e-6) for row in self.mixed.validation}

    def state(self) -> dict[str, Any]:
        """What every checkpoint holds."""
        return {"args": {}, "attributes": {"totals": self.counts.summary()}}

    # --- the trainer -------------------------------------------------------------------------------------------------

    def on_init_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # transformers hands a callback everything but the trainer, whose constructor is what calls this
        frame = sys._getframe()
        while not isinstance(frame.f_locals.get("self"), Trainer):
            assert frame.f_back
            frame = frame.f_back
        self.watch(frame.f_locals["self"])

    def watch(self, trainer: Trainer) -> None:
        """Make a plain SFTTrainer keep the run: it computes, logs and trains through this recorder."""
        self.trainer = trainer
        # a class, since Unsloth's constructor sets `train` from the class after this
        trainer.__class__ = type(type(trainer).__name__, (Watched, type(trainer)), {"recorder": self})
        for printer in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(printer)
        trainer.args.output_dir = str(self.folder / "checkpoints")
        trainer.args.load_best_model_at_end = False  # `finish` loads it, after a resume with nothing left to train too
        trainer.args.save_total_limit = None  # `on_save` deletes old ones, once the new one is whole
        for weight in trainer.model.parameters():
            # TRL makes LoRA bfloat16 on a 4-bit base; a resumed run loads float32 and would differ
            if weight.requires_grad:
                weight.data = weight.data.float()

    def train(self, train: Callable[..., Any], checkpoint: Path | None) -> Any:
        """What `trainer.train` does: resume from the newest checkpoint, train what is left, write the adapter.

        A checkpoint of the last step leaves nothing to train: then only what follows training is done."""
        check_adapter_values(self.recipe, self.trainer.model)
        with main_first(), writing(self.folder):
            changed = check_resume(self.recipe, self.mixed, self.folder)
            checkpoint = checkpoint or checkpoints.last_checkpoint(self.folder, self.console.print)
        if checkpoint and changed:
            self.console.print(f"· resumed under other versions than it began with: {', '.join(changed)}", markup=False)
        output = None
        try:
            if checkpoint is None or not checkpoints.ended(checkpoint):
                output = self._train(train, checkpoint)
            if is_main():
                self.finish()
        except BaseException as error:
            TRACKER.crash()
            if isinstance(error, KeyboardInterrupt) and not checkpoints.all_checkpoints(self.folder):
                self.console.print("stopped before the first checkpoint: nothing of this training is kept")
            raise
        return output

    def _train(self, train: Callable[..., Any], checkpoint: Path | None) -> Any:
        # a signal reaches several processes at different steps: they stop at once
        is_alone = self.trainer.args.world_size == 1
        try:
            with quiet(), writing(self.folder / "checkpoints"), self.request if is_alone else nullcontext():
                output = train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            self.request.obey()
            return output
        finally:
            self.close()
            release(self.trainer)

    def close(self) -> None:
        """Leave the progress bar as it stands; called too when training is interrupted."""
        if self._progress:
            self._progress.__exit__()
        self._progress = None

    # --- every batch -------------------------------------------------------------------------------------------------

    def completed(self, logs: dict[str, Any]) -> dict[str, Any]:
        """What a trainer logs, with losses weighted by supervised tokens and, after the last validation set, `eval_loss` of
        all as they are mixed. In place: the trainer judges a checkpoint by the same dict."""
        # transformers logs each validation set by itself, never all of them together
        name = next((n for n in self.weights if f"eval_{n}_loss" in logs), None)
        if name:
            logs[f"eval_{name}_loss"] = self._losses[name] = self._validation_loss()
            self.counts.totals["evaluation_seconds"] += logs[f"eval_{name}_runtime"]
        if name and len(self._losses) == len(self.weights):
            logs |= self._whole_validation()
        if "loss" in logs:
            logs |= progress_of(self.counts.summary())
        logs.update(finite(logs))  # a gradient that overflowed in fp16
        return logs

    def _validation_loss(self) -> float:
        """Mean over the supervised tokens of a validation set; transformers averages the batches' means, whatever their
        size."""
        batches = self.counts.read_validation()
        self._check_finite(batches, "validation loss")
        sums = [sum(b.loss * b.supervised_tokens for b in batches), sum(b.supervised_tokens for b in batches)]
        everywhere = self.trainer.accelerator.reduce(torch.tensor(sums, device=self.trainer.args.device), "sum")
        loss, tokens = everywhere.tolist()
        return loss / max(tokens, 1)

    def _whole_validation(self) -> dict[str, float]:
        """`eval_loss` of all validation sets, each set's beside it, and what was forgotten."""
        losses, self._losses = self._losses, {}
        mean = sum(weight * losses[name] for name, weight in self.weights.items()) / sum(self.weights.values())
        line = {f"eval_{name}_loss": loss for name, loss in losses.items()} | {"eval_loss": mean}
        if self.stages.forgetting:
            began = time.monotonic()
            found = self.stages.forgetting(self.trainer.model, self.trainer.processing_class)
            line |= {f"eval_{name}": value for name, value in found.items()}
            self.counts.totals["evaluation_seconds"] += time.monotonic() - began
        return line

    def _check_finite(self, batches: Sequence[Read], what: str) -> None:
        wrong = first_not_finite(batches)
        if wrong:
            self._refuse(f"the {what} is {wrong.loss}", [wrong])

    def _refuse(self, finding: str, batches: Sequence[Read]) -> NoReturn:
        totals = self.counts.totals
        cause = (
            "It is the first step: look at rows (`python -m toolkit mix RECIPE --show 3`) and at train.learning_rate"
        )
        if totals["steps"]:
            mean = totals["loss"] / totals["steps"]
            cause = f"The mean loss before was {mean:.3g}, so the weights have diverged: lower train.learning_rate"
        rows = rows_of([read.batch for read in batches], [*self.mixed.train, *self.mixed.validation])
        raise ToolkitError(
            f"step {self.trainer.state.global_step + 1}: {finding} (learning rate {self.trainer.args.learning_rate:g}). "
            f"{cause}. The batch holds {rows}"
        )

    # --- every step --------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # anew: in a notebook the same trainer may go on after an interrupt
        self.counts, self._losses, self._is_claimed = Counts(), {}, False
        totals = self.counts.totals
        # transformers' own restoring would replace this object, and lose what cannot be saved
        totals |= state.stateful_callbacks.get("RunRecorder", {}).get("attributes", {}).get("totals", {})
        totals |= {  # as used now: the batch may have been lowered since the checkpoint
            "batch": {
                "per_device_train_batch_size": args.per_device_train_batch_size,
                "gradient_accumulation_steps": args.gradient_accumulation_steps,
            },
            "processes": args.world_size,
            "packing": self.trainer.args.packing,
            "padding_free": self.trainer.args.padding_free,
            "resumed_at": state.global_step,
        }
        self.trainer._total_train_tokens = totals["tokens"]  # TRL's `num_tokens` would start again at 0
        self._adapter = adapter_sum(self.trainer.model)
        self._first = state.global_step
        warm_up = args.get_warmup_steps(state.max_steps)
        if state.max_steps <= warm_up:
            self.console.print(
                f"· warning: all {state.max_steps} steps are warm-up ({warm_up} steps): the learning rate never reaches "
                f"{args.learning_rate:g}. Train more steps, or set train.warmup_steps=0",
                style="yellow",
            )
        self._progress = Progress(self.console, "training", total=state.max_steps - self._first).__enter__()
        if self._first:
            self._claim(state)

    def _claim(self, state: TrainerState) -> None:
        """Take the run's name: now there is something to keep."""
        if self._is_claimed or not is_main():
            return
        self._is_claimed = True
        claim(self.recipe, self.mixed, self.trainer.model, self.folder)
        self._inode = self.folder.stat().st_ino
        # from the checkpoint: nothing after it stays, and nothing before it is lost
        write_metrics(self.folder / "metrics.jsonl", state.log_history)
        if self.stages.picture:
            self.stages.picture(self.folder)
        TRACKER.say = self.console.print
        TRACKER.begin(self.recipe, self.mixed, self.folder)

    def on_step_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step_began = time.monotonic()

    def on_pre_optimizer_step(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        batches = self.counts.read_step()
        self._check_finite(batches, "loss")
        # no token was supervised, or the adapter is cut off from the loss
        if math.fsum(batch.loss for batch in batches) == 0:
            self._refuse("the loss is exactly 0", batches)
        self.counts.add(batches)

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        totals = self.counts.totals
        totals["steps"] += 1
        totals["train_seconds"] += time.monotonic() - self._step_began  # without evaluation and saving
        totals["skipped_steps"] += bool(self.trainer.optimizer.step_was_skipped)
        self._check_learning(args, state)
        self._claim(state)
        self._check_place()
        self._save_if_asked(control)

    def _save_if_asked(self, control: TrainerControl) -> None:
        """Write a checkpoint of this step where a signal asked for one."""
        if self.request.number is not None:
            control.should_save = True

    def _check_learning(self, args: Arguments, state: TrainerState) -> None:
        """Raises ToolkitError when the adapter is still as it began, a few steps after warm-up or at the end."""
        taken, warm_up = state.global_step - self.counts.totals["skipped_steps"], args.get_warmup_steps(state.max_steps)
        # a run that is over before; not one resumed for its last steps, whose learning rate may be too small to be seen
        is_at_the_end = state.global_step == state.max_steps and self._first == 0
        is_due = taken == warm_up + UNCHANGED_STEPS or is_at_the_end
        if not is_due or adapter_sum(self.trainer.model) != self._adapter:
            return
        if taken <= warm_up:
            self.console.print(
                f"· nothing was learned: all {taken} steps that counted were warm-up: train more, or with train.warmup_steps=0"
            )
            return
        raise ToolkitError(
            f"step {state.global_step}: the adapter has not changed since training began (learning rate "
            f"{args.learning_rate:g}): raise train.learning_rate, e.g. to 2.0e-4"
        )

    def _check_place(self) -> None:
        """Raises ToolkitError when the folder was moved or removed: the rest of the run would lie in another."""
        if self._is_claimed and (not self.folder.is_dir() or self.folder.stat().st_ino != self._inode):
            raise ToolkitError(
                f"{self.folder} was moved or removed while it trained. Move it back and run the same command again: it "
                "resumes from the last checkpoint"
            )

    def on_log(self, args: Arguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None,
               **kwargs: Any) -> None:  # fmt: skip
        if not logs or "train_runtime" in logs:  # the end: the manifest holds those
            return
        if self._is_claimed:  # before, a line is in the trainer's history, which `_claim` writes
            self._check_place()
            row = {"step": state.global_step, **state.log_history[-1]}
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            TRACKER.log(row)
        if "loss" in logs and self._progress:
            at = f"step {state.global_step}/{state.max_steps}"
            self._progress.title = f"{at}, loss {logs['loss']:.3f}, {speed(self.counts.summary())}"
            self._progress.advance(state.global_step - self._first - self._progress.done)
        elif "eval_loss" in logs:
            parts = [f"{name} {logs[f'eval_{name}_loss']:.3f}" for name in self.weights]
            if checkpoints.KL in logs:
                parts.append(f"forgetting {logs[checkpoints.KL]:.3f} nats")
            self.console.print(
                f"step {state.global_step}: validation loss {logs['eval_loss']:.3f} ({', '.join(parts)})"
            )
        self._save_if_asked(control)

    # --- evaluations and checkpoints ---------------------------------------------------------------------------------

    def on_evaluate(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        section = self.recipe.evaluate
        lines = checkpoints.evaluations(state.log_history)
        ranks = [checkpoints.rank(line, section) for line in lines]
        patience = section.early_stopping_patience or math.inf
        if ranks and len(ranks) - 1 - ranks.index(min(ranks)) >= patience:
            control.should_training_stop = True
        beyond = [line["step"] for line, (is_beyond, _) in zip(lines, ranks, strict=True) if is_beyond]
        if len(beyond) >= TIMES_BEYOND_LIMIT and beyond[-1] == state.global_step:
            self.console.print(
                f"· stopped at step {state.global_step}: {len(beyond)} evaluations are beyond the limit of forgetting "
                f"({section.forgetting_limit:g} nats per token)"
            )
            control.should_training_stop = True
        self._save_if_asked(control)

    def on_epoch_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # the end of training is one too: a checkpoint at the last step, whatever the strategy
        if control.should_training_stop and self._saved != state.global_step:
            control.should_save = True

    def on_save(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved = state.global_step
        if args.world_size > 1:
            torch.distributed.barrier()  # every process writes a random state of its own
        if state.is_world_process_zero:
            folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
            files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
            write_json(folder / checkpoints.CHECKSUMS, files)  # now it is whole
            best = folder.with_name(f"checkpoint-{self._best_step(state)}")
            limit = self.recipe.train.get("save_total_limit")
            rotate_checkpoints(args.output_dir, limit, str(best) if best.is_dir() else None)
        if self.request.number is not None:
            self.console.print(f"stopped after step {state.global_step}; its checkpoint is kept")
            self.request.obey()

    def _best_step(self, state: TrainerState) -> int | None:
        """The step whose checkpoint is kept whatever comes after; None where the recipe keeps the last."""
        keeps_best = self.recipe.train["load_best_model_at_end"]
        return checkpoints.best_step(state.log_history, self.recipe.evaluate) if keeps_best else None

    def on_train_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()

    # --- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """From the checkpoints: the adapter, the replies without it and with it, the last manifest. The same after an
        uninterrupted training and after a resume that had nothing left to train."""
        section, model, tokenizer = self.recipe.evaluate, self.trainer.model, self.trainer.processing_class
        # everything is read from the checkpoints, never from the trainer: a resume may have trained nothing
        chosen = last = checkpoints.all_checkpoints(self.folder)[-1]
        state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        self._claim(state)
        if self.recipe.train["load_best_model_at_end"]:
            chosen = checkpoints.best_checkpoint(self.folder, state.log_history, section, self.console.print)
        write_metrics(self.folder / "metrics.jsonl", state.log_history)
        # the best checkpoint's weights, which the model does not hold when it is not the last
        with writing(self.folder / "adapter"):
            checksums = write_adapter(chosen, model, tokenizer, self.folder / "adapter")
        if self.stages.replies:
            rows = self.stages.replies(model, tokenizer)
            write_jsonl(self.folder / "samples.jsonl", rows)
            TRACKER.log_table("samples", rows)
        totals = state.stateful_callbacks["RunRecorder"]["attributes"]["totals"]
        manifest = read_json(self.folder / "manifest.json") | results(totals, state) | {
            "best_step": self._best_step(state),
            "adapter_step": checkpoints.step_of(chosen),
            "adapter": checksums,
            "state": "finished",
            "finished": utc_now(),
        }  # fmt: skip
        write_json(self.folder / "manifest.json", manifest)
        comparison = self.stages.memory and self.stages.memory(model, totals["peak_memory_bytes"])
        if comparison:
            write_json(self.folder / "manifest.json", manifest | {"fit": comparison})


class Watched:
    """What comes before the class of a trainer that keeps a run: its recorder sees every batch, log line and call."""

    recorder: RunRecorder

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        seen = dict(inputs)  # the trainer takes keys out of its own
        result = super().compute_loss(model, inputs, return_outputs, **kwargs)  # type: ignore[misc]  # of the trainer's class
        self.recorder.counts.see(seen, result[0] if return_outputs else result, training=model.training)
        return result

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        # before reporters and other callbacks see them
        super().log(self.recorder.completed(logs), *args, **kwargs)  # type: ignore[misc]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        train = functools.partial(super().train, **kwargs)  # type: ignore[misc]
        # True is what happens anyway: the newest one that is whole
        named = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        return self.recorder.train(train, named)


def results(totals: Totals, state: TrainerState) -> dict[str, Any]:
    """What a manifest says of a training that ended."""
    return {
        **{name: totals[name] for name in FROM_TOTALS},
        **{name: round(totals[name], 2) for name in ("train_seconds", "evaluation_seconds", "seconds")},
        **progress_of(totals),
        "train_loss": totals["loss"] / totals["steps"],
        "steps": state.global_step,
    }


def release(trainer: Trainer) -> None:
    """Free what training held and evaluation does not need: optimizer state, gradients, the float32 wrapper of forward."""
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.model.zero_grad(set_to_none=True)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    gc.collect()
    torch.cuda.empty_cache()


def write_metrics(file: Path, history: Sequence[MetricLine]) -> None:
    """metrics.jsonl from a trainer's log history."""
    write_jsonl(file, [{"step": line["step"], **line} for line in history if "train_runtime" not in line])
