"""The record of a training: counts and checks of every batch, metrics.jsonl, progress, whole checkpoints.

record = Record(rows, weights, folder, console)     # one of SFTTrainer's `callbacks`; then `record.watch(trainer)`
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from toolkit.files import ToolkitError, finite, sha256, write_json, write_jsonl
from toolkit.training import tracking
from toolkit.view.progress import Progress

CHECKSUMS = "checksums.json"
TOTALS = ("tokens", "supervised_tokens", "steps", "loss", "skipped_steps", "train_seconds", "evaluation_seconds", "seconds",
          "peak_memory_bytes")  # fmt: skip
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
UNCHANGED_STEPS = 3
"""Optimizer steps after warm-up (its first one has learning rate 0) after which the adapter must have changed."""


class Record(TrainerCallback, ExportableState):
    """Tokens, time and losses of a run across resumes: in metrics.jsonl, in wandb, on the screen and in every checkpoint.

    Stops a run that has diverged, does not learn, or has not improved for `patience` evaluations. `rows` are the mix's, to
    name those of a batch; `weights` is {validation set: share} for `eval_loss`; `limit` is `save_total_limit`."""

    def __init__(self, rows: Sequence, weights: dict[str, float], folder: Path, console, *, limit=None, patience=None):
        self.rows, self.weights, self.file, self.console = rows, weights, folder / "metrics.jsonl", console
        self.limit, self.patience = limit, patience or math.inf
        self.totals = dict.fromkeys(TOTALS, 0)
        """Sums over the whole run, and how its batches were made; every checkpoint holds them."""
        self._step_loss = 0.0
        """Sum over the batches of the step in work, each of which is divided by the tokens of them all."""
        self._validation, self._sets = [0.0, 0], {}
        """Loss times supervised tokens, and those tokens, of the validation set in work; losses of those before it."""
        self._began = time.monotonic()
        self._progress: Progress | None = None
        self._saved = 0

    def state(self) -> dict:
        return {"args": {}, "attributes": {"totals": self.summary()}}

    def summary(self) -> dict:
        """`totals` with the seconds and the memory of this process."""
        seconds = self.totals["seconds"] + time.monotonic() - self._began
        memory = max(self.totals["peak_memory_bytes"], peak_memory())
        return self.totals | {"seconds": seconds, "peak_memory_bytes": memory}

    def watch(self, trainer) -> None:
        """See every batch and its loss, and what is logged, before reporters and other callbacks do."""
        self.trainer, compute, log = trainer, trainer.compute_loss, trainer.log

        def compute_loss(model, inputs, *args, **kwargs):
            self._batch = dict(inputs)
            result = compute(model, inputs, *args, **kwargs)
            self._count(model.training, (result[0] if isinstance(result, tuple) else result).item())
            return result

        def logged(logs, *args, **kwargs):
            log(self._completed(logs), *args, **kwargs)

        trainer.compute_loss, trainer.log = compute_loss, logged

    def _count(self, training: bool, loss: float) -> None:
        labels, mask = self._batch["labels"], self._batch.get("attention_mask")
        supervised = int((labels != -100).sum())
        if not math.isfinite(loss):
            self._stop(f"the {'' if training else 'validation '}loss is {loss}")
        if training:
            self.totals["tokens"] += labels.numel() if mask is None else int(mask.sum())
            self.totals["supervised_tokens"] += supervised
            self._step_loss += loss
        else:  # transformers averages the batches' means, whatever their size; without padding a batch counts as one row
            self._validation = [self._validation[0] + loss * supervised, self._validation[1] + supervised]

    def _stop(self, finding: str) -> None:
        step, totals = self.trainer.state.global_step + 1, self.totals
        cause = (
            "It is the first step: look at rows (`python -m toolkit mix RECIPE --show 3`) and at train.learning_rate"
        )
        if totals["steps"]:
            mean = totals["loss"] / totals["steps"]
            cause = f"The mean loss before was {mean:.3g}, so the weights have diverged: lower train.learning_rate"
        raise ToolkitError(
            f"step {step}: {finding} (learning rate {self.trainer.args.learning_rate:g}). {cause}. "
            f"The batch holds {rows_of(self._batch, self.rows)}"
        )

    def _completed(self, logs: dict) -> dict:
        """Losses weighted by supervised tokens; with the last validation set, `eval_loss` of all as they are mixed."""
        import torch

        # transformers logs each validation set by itself, never all of them together
        if name := next((n for n in self.weights if f"eval_{n}_loss" in logs), None):
            sums = torch.tensor(self._validation, device=self.trainer.args.device)
            loss, tokens = self.trainer.accelerator.reduce(sums, "sum").tolist()
            logs[f"eval_{name}_loss"] = self._sets[name] = loss / max(tokens, 1)
            self._validation = [0.0, 0]
            self.totals["evaluation_seconds"] += logs[f"eval_{name}_runtime"]
            if len(self._sets) == len(self.weights):
                logs |= {f"eval_{n}_loss": loss for n, loss in self._sets.items()}
                mixed = sum(weight * self._sets[n] for n, weight in self.weights.items())
                logs["eval_loss"], self._sets = mixed / sum(self.weights.values()), {}
        if "loss" in logs:
            logs |= progress_of(self.summary())
        logs.update(finite(logs))  # a gradient that overflowed in fp16
        return logs

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # transformers' own restoring would replace this object, and lose what cannot be saved
        self.totals |= state.stateful_callbacks.get("Record", {}).get("attributes", {}).get("totals", {})
        # as used now: the batch may have been lowered since the checkpoint
        self.totals |= {
            "batch": {name: vars(args)[name] for name in BATCH},
            "processes": args.world_size,
            "packing": args.packing,
            "padding_free": args.padding_free,
            "resumed_at": state.global_step,
        }
        self.trainer._total_train_tokens = self.totals["tokens"]  # TRL's `num_tokens` would start again at 0
        self._adapter, self._first = adapter_sum(model), state.global_step
        self._progress = Progress(self.console, "training", total=state.max_steps - self._first).__enter__()
        if state.is_world_process_zero:  # from the checkpoint: nothing after it stays, and nothing before it is lost
            write_metrics(self.file, state.log_history)

    def on_step_begin(self, args, state, control, **kwargs):
        self._step_began = time.monotonic()

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        # no token was supervised, or the adapter is cut off from the loss
        if self._step_loss == 0:
            self._stop("the loss is exactly 0")
        self.totals["loss"] += self._step_loss
        self._step_loss = 0.0
        self.totals["steps"] += 1
        self.totals["train_seconds"] += time.monotonic() - self._step_began  # without evaluation and saving
        self.totals["skipped_steps"] += bool(optimizer.step_was_skipped)
        taken, warm_up = state.global_step - self.totals["skipped_steps"], args.get_warmup_steps(state.max_steps)
        # a run that is over before; not one resumed for its last steps, whose learning rate may be too small to be seen
        at_the_end = state.global_step == state.max_steps and self._first == 0
        if (taken == warm_up + UNCHANGED_STEPS or at_the_end) and adapter_sum(model) == self._adapter:
            if taken <= warm_up:
                self.console.print(
                    f"· nothing was learned: all {taken} steps that counted were warm-up: train more, or with train.warmup_steps=0"
                )
                return
            raise ToolkitError(
                f"step {state.global_step}: the adapter has not changed since training began (learning rate "
                f"{args.learning_rate:g}): raise train.learning_rate, e.g. to 2.0e-4"
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "train_runtime" in logs:  # the end: the manifest holds those
            return
        if state.is_world_process_zero:
            row = {"step": state.global_step, **state.log_history[-1]}
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            tracking.log(row)
        if "loss" in logs:
            at = f"step {state.global_step}/{state.max_steps}"
            self._progress.title = f"{at}, loss {logs['loss']:.3f}, {speed(self.summary())}"
            self._progress.advance(state.global_step - self._first - self._progress.done)
        elif "eval_loss" in logs:
            parts = ", ".join(f"{name} {logs[f'eval_{name}_loss']:.3f}" for name in self.weights)
            self.console.print(f"step {state.global_step}: validation loss {logs['eval_loss']:.3f} ({parts})")

    def on_evaluate(self, args, state, control, **kwargs):
        losses = [line["eval_loss"] for line in state.log_history if "eval_loss" in line]
        if losses and len(losses) - 1 - losses.index(min(losses)) >= self.patience:
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):  # the end of training is one too
        if control.should_training_stop and self._saved != state.global_step:
            control.should_save = True  # a checkpoint at the last step, whatever the strategy

    def on_save(self, args, state, control, **kwargs):
        import torch

        self._saved = state.global_step
        if args.world_size > 1:
            torch.distributed.barrier()  # every process writes a random state of its own
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / CHECKSUMS, {p.name: sha256(p) for p in sorted(folder.iterdir())})  # now it is whole
            rotate_checkpoints(args.output_dir, self.limit, state.best_model_checkpoint)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Leave the progress bar as it stands; called too when training is interrupted."""
        if self._progress:
            self._progress.__exit__()


def progress_of(totals: dict) -> dict:
    """What a line of metrics.jsonl says about work done so far, its speed and its memory."""
    rate = 1 / max(totals["train_seconds"], 1e-9)
    return {
        "tokens": totals["tokens"],
        "supervised_tokens": totals["supervised_tokens"],
        "tokens_per_second": round(totals["tokens"] * rate, 1),
        "supervised_tokens_per_second": round(totals["supervised_tokens"] * rate, 1),
        "peak_memory_gib": round(totals["peak_memory_bytes"] / 2**30, 3),
    }


def speed(totals: dict) -> str:
    """Tokens/s, supervised tokens/s and peak memory in words."""
    now = progress_of(totals)
    return (
        f"{now['tokens_per_second']:,.0f} tokens/s, {now['supervised_tokens_per_second']:,.0f} supervised/s, "
        f"peak {now['peak_memory_gib']:.2f} GiB"
    )


def adapter_sum(model) -> float:
    """A number that changes when any trained weight does."""
    import torch

    weights = (w.detach() for w in model.parameters() if w.requires_grad)
    return float(sum(w.abs().sum(dtype=torch.float64) for w in weights))


def rows_of(batch: dict, rows: Sequence) -> str:
    """The rows of the mix in a batch, padded or packed: `sums rows 3, 17`, as numbered in their source."""

    def paired(ids, labels) -> bytes:  # both, as a row's text may be the beginning of another's
        return np.stack([ids, labels], axis=-1).astype(np.int64).tobytes()

    # found as bytes inside the batch, since packing joins rows and padding sets them apart
    held, named = paired(batch["input_ids"].cpu(), batch["labels"].cpu()), {}
    for row in rows:
        if paired(row.ids, row.labels) in held:
            named.setdefault(row.source, []).append(str(row.number))
    return "; ".join(f"{source} rows {', '.join(numbers)}" for source, numbers in named.items()) or "no row of the mix"


def peak_memory() -> int:
    """Bytes reserved on the GPU at the peak; without a GPU, the peak resident set of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    import psutil

    info = psutil.Process().memory_info()
    status = Path("/proc/self/status")  # Linux; Windows has peak_wset; elsewhere what is resident now
    lines = status.read_text().splitlines() if status.is_file() else []
    peak = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), info.rss)
    return getattr(info, "peak_wset", peak)


def write_metrics(file: Path, history: list[dict]) -> None:
    """metrics.jsonl from a trainer's log history."""
    write_jsonl(file, [{"step": line["step"], **line} for line in history if "train_runtime" not in line])
