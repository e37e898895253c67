"""The callback that makes a run folder out of a training: its record, its checks, its checkpoints, its adapter.

trainer = trl.SFTTrainer(model=model, callbacks=[RunRecorder(recipe, mixed)]); trainer.train()

`trainer.train()` then resumes by itself, keeps the folder of the run (recipe, mix, manifest, metrics, checkpoints, adapter)
and leaves in the model the weights of the checkpoint that is kept.
"""

import functools
import gc
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
from toolkit.files import ToolkitError, append_rows, finite, read_json, sha256, write_json, write_jsonl
from toolkit.recipe import Recipe, adapter_folder
from toolkit.records import JsonObject, MemoryComparison, SampleLine
from toolkit.training import checkpoints
from toolkit.training import folder as folders
from toolkit.training.counts import Batch, Counts, Totals, adapter_sum, progress_of, rows_of, speed
from toolkit.training.interrupt import StopRequest
from toolkit.training.log import quiet
from toolkit.training.model import write_adapter
from toolkit.training.parent import load_weights
from toolkit.training.tracking import TRACKER
from toolkit.view.progress import Progress

# Optimizer steps after warm-up (its first one has learning rate 0) after which the adapter must have changed.
UNCHANGED_STEPS = 3
# Evaluations beyond `evaluate.forgetting_limit` after which training stops.
TIMES_BEYOND_LIMIT = 2
# Evaluations below which a limit is looked at too rarely: of SmolLM2 (measured/forgetting_limit.json) a twentieth of
# the steps took the KL from 0.2 to 0.4.
ENOUGH_LOOKS = 10


@dataclass(frozen=True)
class Stages:
    """What a training asks of stages that it does not import; `toolkit.run.recorder` fills them in."""

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

    trainer: Trainer

    def __init__(self, recipe: Recipe, mixed: Mix, console: Console | None = None, stages: Stages | None = None,
                 folder: Path | None = None):  # fmt: skip
        self.recipe = recipe
        self.mixed = mixed
        self.console = console or Console(highlight=False)
        self.stages = stages or Stages()
        self.folder = folder or folders.open_run(recipe)[0]
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

    def state(self) -> JsonObject:
        """What every checkpoint holds."""
        return {"args": {}, "attributes": {"totals": self.counts.summary()}}

    # --- the trainer -------------------------------------------------------------------------------------------------

    def on_init_end(self, *_: Any, **kwargs: Any) -> None:
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
        if adapter := self.recipe.model.adapter:  # after the change of type, which would have rounded them
            load_weights(trainer.model, adapter_folder(adapter) or Path(adapter))

    def train(self, train: Callable[..., Any], checkpoint: Path | None) -> Any:
        """What `trainer.train` does: resume from the newest checkpoint, train what is left, write the adapter.

        A checkpoint of the last step leaves nothing to train: then only what follows training is done."""
        folders.check_adapter_values(self.recipe, self.trainer.model)
        with folders.main_first(), folders.writing(self.folder):
            folders.check_resume(self.recipe, self.mixed, self.folder, self.console)
            checkpoint = checkpoint or checkpoints.last_checkpoint(self.folder, self.console.print)
        output = None
        try:
            if checkpoint is None or not checkpoints.ended(checkpoint):
                output = self._train(train, checkpoint)
            if folders.is_main():
                self.finish()
        except BaseException as error:
            TRACKER.end(exit_code=1)
            if isinstance(error, KeyboardInterrupt) and not checkpoints.all_checkpoints(self.folder):
                self.console.print("stopped before the first checkpoint: nothing of this training is kept")
            raise
        return output

    def _train(self, train: Callable[..., Any], checkpoint: Path | None) -> Any:
        # a signal reaches several processes at different steps: they stop at once
        is_alone = self.trainer.args.world_size == 1
        try:
            with quiet(), folders.writing(self.folder / "checkpoints"), self.request if is_alone else nullcontext():
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

    def completed(self, logs: JsonObject) -> JsonObject:
        """What a trainer logs, with losses weighted by supervised tokens and, after the last validation set, `eval_loss` of
        all as they are mixed. In place: the trainer judges a checkpoint by the same dict."""
        # transformers logs each validation set by itself, never all of them together
        for name in self.weights:
            loss = f"eval_{name}_loss"
            if loss in logs:
                logs[loss] = self._losses[name] = self._validation_loss()
                self.counts.totals["evaluation_seconds"] += logs[f"eval_{name}_runtime"]
        if 0 < len(self._losses) == len(self.weights):
            logs |= self._whole_validation()
        if "loss" in logs:
            logs |= progress_of(self.counts.summary())
        logs.update(finite(logs))  # a gradient that overflowed in fp16
        return logs

    def _validation_loss(self) -> float:
        """Mean over the supervised tokens of a validation set; transformers averages the batches' means, whatever their
        size."""
        batches = self.counts.read()
        self._check_finite(batches, "validation loss")
        sums = [sum(b.loss * b.supervised_tokens for b in batches), sum(b.supervised_tokens for b in batches)]
        here = torch.tensor(sums, device=self.trainer.args.device)
        loss, tokens = self.trainer.accelerator.reduce(here, "sum").tolist()
        return loss / max(tokens, 1)

    def _whole_validation(self) -> dict[str, float]:
        """`eval_loss` of all validation sets, each set's beside it, and what was forgotten."""
        losses = self._losses
        self._losses = {}
        line = {f"eval_{name}_loss": loss for name, loss in losses.items()}
        total = sum(weight * losses[name] for name, weight in self.weights.items())
        line["eval_loss"] = total / sum(self.weights.values())
        if self.stages.forgetting:
            began = time.monotonic()
            distances = self.stages.forgetting(self.trainer.model, self.trainer.processing_class)
            line |= {f"eval_{name}": value for name, value in distances.items()}
            self.counts.totals["evaluation_seconds"] += time.monotonic() - began
        return line

    def _check_finite(self, batches: Sequence[Batch], what: str) -> None:
        wrong = [batch for batch in batches if not math.isfinite(batch.loss)]
        if wrong:
            self._refuse(f"the {what} is {wrong[0].loss}", wrong[:1])

    def _refuse(self, finding: str, batches: Sequence[Batch]) -> NoReturn:
        rows = rows_of(batches, [*self.mixed.train, *self.mixed.validation])
        raise ToolkitError(
            f"step {self.trainer.state.global_step + 1}: {finding} (learning rate {self.trainer.args.learning_rate:g}): "
            "lower train.learning_rate, or look at the rows (`python -m toolkit mix RECIPE --show 3`). The batch holds "
            f"{rows}"
        )

    # --- every step --------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # anew: in a notebook the same trainer may go on after an interrupt
        self.counts = Counts()
        self._losses = {}
        self._is_claimed = False
        totals = self.counts.totals
        # transformers' own restoring would replace this object, and lose what cannot be saved
        totals |= state.stateful_callbacks.get("RunRecorder", {}).get("attributes", {}).get("totals", {})
        totals |= {
            # as used now: it may have been lowered since the checkpoint
            "batch": {
                "per_device_train_batch_size": args.per_device_train_batch_size,
                "gradient_accumulation_steps": args.gradient_accumulation_steps,
            },
            "processes": args.world_size,
            "packing": args.packing,
            "padding_free": args.padding_free,
            "resumed_at": state.global_step,
        }
        self.trainer._total_train_tokens = totals["tokens"]  # TRL's `num_tokens` would start again at 0
        self._adapter = adapter_sum(self.trainer.model)
        self._first = state.global_step
        self._warm_up = args.get_warmup_steps(state.max_steps)
        if state.max_steps <= self._warm_up:
            self.console.print(
                f"· warning: all {state.max_steps} steps are warm-up ({self._warm_up} steps): the learning rate never "
                f"reaches {args.learning_rate:g}. Train more steps, or set train.warmup_steps=0",
                style="yellow",
            )
        rarely = args.eval_strategy == "steps" and state.max_steps < ENOUGH_LOOKS * state.eval_steps
        if self.recipe.evaluate.forgetting_limit and rarely:
            self.console.print(
                f"· warning: evaluate.forgetting_limit is looked at every {state.eval_steps} of {state.max_steps} steps, and "
                "what a run may keep are those. Look more often: train.eval_steps=0.05",
                style="yellow",
            )
        self._progress = Progress(self.console, "training", total=state.max_steps - self._first).__enter__()
        if self._first:
            self._claim(state)

    def _claim(self, state: TrainerState) -> None:
        """Take the run's name: now there is something to keep."""
        if self._is_claimed or not folders.is_main():
            return
        self._is_claimed = True
        folders.claim(self.recipe, self.mixed, self.trainer.model, self.folder)
        # from the checkpoint: nothing after it stays, and nothing before it is lost
        lines = [line for line in state.log_history if "train_runtime" not in line]
        write_jsonl(self.folder / "metrics.jsonl", lines)
        TRACKER.say = self.console.print
        TRACKER.begin(self.recipe, self.mixed, self.folder)

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
        self._step_began = time.monotonic()

    def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        batches = self.counts.read()
        self._check_finite(batches, "loss")
        # no token was supervised, or the adapter is cut off from the loss
        if all(batch.loss == 0 for batch in batches):
            self._refuse("the loss is exactly 0", batches)
        self.counts.add(batches)

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        totals = self.counts.totals
        totals["steps"] += 1
        totals["train_seconds"] += time.monotonic() - self._step_began  # without evaluation and saving
        totals["skipped_steps"] += bool(self.trainer.optimizer.step_was_skipped)
        self._check_learning(state)
        self._claim(state)
        if self.request.came:
            control.should_save = True

    def _check_learning(self, state: TrainerState) -> None:
        """Raises ToolkitError when the adapter is still as it began, a few steps after warm-up or at the end."""
        taken = state.global_step - self.counts.totals["skipped_steps"]
        is_due = taken == self._warm_up + UNCHANGED_STEPS or state.global_step == state.max_steps
        # not a run resumed for its last steps, whose learning rate may be too small to be seen
        if not is_due or self._first or taken <= self._warm_up:
            return
        if adapter_sum(self.trainer.model) == self._adapter:
            raise ToolkitError(
                f"step {state.global_step}: the adapter has not changed since training began (learning rate "
                f"{self.trainer.args.learning_rate:g}): raise train.learning_rate, e.g. to 2.0e-4"
            )

    def on_log(self, args: Arguments, state: TrainerState, control: TrainerControl, logs: JsonObject | None = None,
               **kwargs: Any) -> None:  # fmt: skip
        if not logs or "train_runtime" in logs:  # the end: the manifest holds those
            return
        if self._is_claimed:  # before, a line is in the trainer's history, which `_claim` writes
            append_rows(self.folder / "metrics.jsonl", state.log_history[-1:])
            TRACKER.log(state.log_history[-1])
        if "loss" in logs and self._progress:
            at = f"step {state.global_step}/{state.max_steps}"
            self._progress.title = f"{at}, loss {logs['loss']:.3f}, {speed(self.counts.summary())}"
            self._progress.advance(state.global_step - self._first - self._progress.done)
        elif "eval_loss" in logs:
            parts = [f"{name} {logs[f'eval_{name}_loss']:.3f}" for name in self.weights]
            if checkpoints.KL in logs:
                parts.append(f"forgetting {logs[checkpoints.KL]:.3f} nats")
            loss = f"validation loss {logs['eval_loss']:.3f}"
            self.console.print(f"step {state.global_step}: {loss} ({', '.join(parts)})")
        if self.request.came:
            control.should_save = True

    # --- evaluations and checkpoints ---------------------------------------------------------------------------------

    def on_evaluate(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        section = self.recipe.evaluate
        lines = checkpoints.evaluations(state.log_history)
        # transformers calls this after each validation set; the last one ends the line
        if not lines or lines[-1]["step"] != state.global_step:
            return
        ranks = [checkpoints.rank(line, section) for line in lines]
        since_best = len(ranks) - 1 - ranks.index(min(ranks))
        if since_best >= (section.early_stopping_patience or math.inf):
            control.should_training_stop = True
        beyond = [is_beyond for is_beyond, _ in ranks]
        if beyond[-1] and sum(beyond) >= TIMES_BEYOND_LIMIT:
            self.console.print(
                f"· stopped at step {state.global_step}: {sum(beyond)} evaluations are beyond the limit of forgetting "
                f"({section.forgetting_limit:g} nats per token)"
            )
            control.should_training_stop = True

    def on_epoch_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # the end of training is one too: a checkpoint at the last step, whatever the strategy
        if control.should_training_stop and self._saved != state.global_step:
            control.should_save = True

    def on_save(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved = state.global_step
        if args.world_size > 1:
            torch.distributed.barrier()  # every process writes a random state of its own
        if state.is_world_process_zero:
            folder = self.folder / "checkpoints" / f"checkpoint-{state.global_step}"
            files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
            write_json(folder / checkpoints.CHECKSUMS, files)  # now it is whole
            best = folder.with_name(f"checkpoint-{self._best_step(state)}")
            limit = self.recipe.train.get("save_total_limit")
            rotate_checkpoints(str(folder.parent), limit, str(best) if best.is_dir() else None)
        if self.request.came:
            self.console.print(f"stopped after step {state.global_step}; its checkpoint is kept")
            self.request.obey()

    def _best_step(self, state: TrainerState) -> int | None:
        """The step whose checkpoint is kept whatever comes after; None where the recipe keeps the last."""
        keeps_best = self.recipe.train["load_best_model_at_end"]
        return checkpoints.best_step(state.log_history, self.recipe.evaluate) if keeps_best else None

    # --- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """From the checkpoints: the adapter, the replies without it and with it, the last manifest. The same after an
        uninterrupted training and after a resume that had nothing left to train."""
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        # everything is read from the checkpoints, never from the trainer: a resume may have trained nothing
        last = checkpoints.all_checkpoints(self.folder)[-1]
        state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        self._claim(state)
        chosen = last
        if self.recipe.train["load_best_model_at_end"]:
            chosen = checkpoints.best_checkpoint(
                self.folder, state.log_history, self.recipe.evaluate, self.console.print
            )
        # the best checkpoint's weights, which the model does not hold when it is not the last
        with folders.writing(self.folder / "adapter"):
            checksums = write_adapter(chosen, model, tokenizer, self.folder / "adapter")
        if self.stages.replies:
            rows = self.stages.replies(model, tokenizer)
            write_jsonl(self.folder / "samples.jsonl", rows)
            TRACKER.log_table("samples", rows)
        totals = state.stateful_callbacks["RunRecorder"]["attributes"]["totals"]
        ended = results(totals) | {
            "best_step": self._best_step(state),
            "adapter_step": checkpoints.step_of(chosen),
            "adapter": checksums,
            "state": "finished",
            "finished": folders.utc_now(),
        }
        if self.stages.memory and (forecast := self.stages.memory(model, totals["peak_memory_bytes"])):
            ended["fit"] = forecast
        manifest = self.folder / "manifest.json"
        write_json(manifest, read_json(manifest) | ended)


class Watched:
    """What comes before the class of a trainer that keeps a run: its recorder sees every batch, log line and call."""

    recorder: RunRecorder

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        seen = dict(inputs)  # the trainer takes keys out of its own
        result = super().compute_loss(model, inputs, return_outputs, **kwargs)  # type: ignore[misc]  # of the trainer's class
        self.recorder.counts.see(seen, result[0] if return_outputs else result)
        return result

    def log(self, logs: JsonObject, *args: Any, **kwargs: Any) -> None:
        # before reporters and other callbacks see them
        super().log(self.recorder.completed(logs), *args, **kwargs)  # type: ignore[misc]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        train = functools.partial(super().train, **kwargs)  # type: ignore[misc]
        # True is what happens anyway: the newest one that is whole
        named = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        with folders.held(self.recorder.folder):
            return self.recorder.train(train, named)


def results(totals: Totals) -> JsonObject:
    """What a manifest says of a training that ended: its totals, under the names that `Manifest` has."""
    found = totals | progress_of(totals)
    found["train_loss"] = found.pop("loss") / totals["steps"]
    return found


def release(trainer: Trainer) -> None:
    """Free what training held and evaluation does not need: optimizer state, gradients, the float32 wrapper of forward."""
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.model.zero_grad(set_to_none=True)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    gc.collect()
    torch.cuda.empty_cache()
