"""What happens while a run trains: counts and checks of every batch, metrics.jsonl, progress, sample replies, checkpoints.

counter, metrics = Counter(rows, weights), Metrics(folder)     # SFTTrainer's `callbacks`; then `counter.watch(trainer)`
"""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import transformers
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from toolkit import tracking
from toolkit.files import ToolkitError, finite, read_jsonl, sha256, write_json, write_jsonl
from toolkit.generate import generate, modes_of
from toolkit.progress import Progress

CHECKSUMS = "checksums.json"
SHARE = 0.05
"""Of the training time, what sample replies during it may take."""
UNCHANGED_STEPS = 3
"""Optimizer steps after warm-up (its first one has learning rate 0) within which the adapter must have changed."""


def restore(callback, state) -> None:
    """Give a callback back what the checkpoint holds of it. Transformers' own restoring replaces the object, and with it
    what cannot be saved (the console, the tokenizer)."""
    kept = state.stateful_callbacks.get(type(callback).__name__, {})
    vars(callback).update(kept.get("attributes", {}))


class EarlyStopping(transformers.EarlyStoppingCallback):
    """Transformers' callback, whose count of evaluations without improvement survives a resume."""

    def on_train_begin(self, args, state, control, **kwargs):
        restore(self, state)


class Counter(TrainerCallback, ExportableState):
    """Tokens, time and losses of a run across resumes; stops a run that has diverged or does not learn.

    `rows` are the mix's, to name those of a batch; `weights` is {validation set: share} for `eval_loss`."""

    def __init__(self, rows: Sequence, weights: dict[str, float]):
        self.rows, self.weights = rows, weights
        self.trainer, self.facts = None, {}
        self.totals = dict.fromkeys(
            ("tokens", "supervised_tokens", "steps", "train_seconds", "evaluation_seconds", "seconds", "loss",
             "skipped_steps", "peak_memory_bytes"), 0)  # fmt: skip
        """Sums over the whole run; every checkpoint holds them."""
        self.first_step: float | None = None
        """Clock time when the first step in this process ended."""
        self._losses: list[float] = []
        """Losses of the current step's batches, which add up to the step's."""
        self._validation, self._sets = [0.0, 0], {}
        self._adapter: float | None = None
        self._began = time.monotonic()

    def state(self) -> dict:
        return {"args": self.facts, "attributes": {"totals": self.summary()}}

    def summary(self) -> dict:
        """`totals` with the seconds and the memory of this process."""
        seconds = self.totals["seconds"] + time.monotonic() - self._began
        return self.totals | {
            "seconds": seconds,
            "peak_memory_bytes": max(self.totals["peak_memory_bytes"], peak_memory()),
        }

    def watch(self, trainer) -> None:
        """See every batch and its loss, and what is logged, before reporters and other callbacks do."""
        self.trainer, compute, log = trainer, trainer.compute_loss, trainer.log

        def compute_loss(model, inputs, *args, **kwargs):
            batch = dict(inputs)
            result = compute(model, inputs, *args, **kwargs)
            loss = (result[0] if isinstance(result, tuple) else result).item()
            (self._trained if model.training else self._validated)(batch, loss)
            return result

        def logged(logs, *args, **kwargs):
            log(self._completed(logs), *args, **kwargs)

        trainer.compute_loss, trainer.log = compute_loss, logged
        args = trainer.args
        batch = {k: vars(args)[k] for k in ("per_device_train_batch_size", "gradient_accumulation_steps")}
        self.facts = {
            "batch": batch,
            "processes": args.world_size,
            "packing": args.packing,
            "padding_free": args.padding_free,
        }

    def _trained(self, batch: dict, loss: float) -> None:
        labels = batch["labels"]
        self.totals["tokens"] += int(batch["attention_mask"].sum()) if "attention_mask" in batch else labels.numel()
        self.totals["supervised_tokens"] += int((labels != -100).sum())
        self._losses.append(loss)
        self._batch = batch
        if not math.isfinite(loss):
            self._stop(f"the loss is {loss}")

    def _validated(self, batch: dict, loss: float) -> None:
        # Transformers averages the batches' means, whatever their size; without padding a batch counts as one row
        tokens = int((batch["labels"] != -100).sum())
        self._validation = [self._validation[0] + loss * tokens, self._validation[1] + tokens]
        if not math.isfinite(loss):
            self._batch = batch
            self._stop(f"a validation loss is {loss}")

    def _stop(self, finding: str) -> None:
        step, totals = self.trainer.state.global_step + 1, self.totals
        if totals["steps"]:
            mean = totals["loss"] / totals["steps"]
            cause = f"the mean loss before was {mean:.3g}, so the weights have diverged: lower train.learning_rate"
        else:
            cause = "it is the first step, so look at these rows (`python -m toolkit mix --show`) and at train.learning_rate"
        raise ToolkitError(
            f"step {step}: {finding} (learning rate {self.trainer.args.learning_rate:g}). {cause[0].upper()}{cause[1:]}. "
            f"The batch holds {rows_of(self._batch, self.rows)}"
        )

    def _completed(self, logs: dict) -> dict:
        """Losses weighted by supervised tokens; with the last validation set, `eval_loss` of all as they are mixed."""
        import torch

        name = next((n for n in self.weights if f"eval_{n}_loss" in logs), None)
        if name:
            device = self.trainer.args.device
            total, tokens = self.trainer.accelerator.reduce(
                torch.tensor(self._validation, device=device), "sum"
            ).tolist()
            self._sets[f"eval_{name}_loss"] = logs[f"eval_{name}_loss"] = total / max(tokens, 1)
            self._validation = [0.0, 0]
            self.totals["evaluation_seconds"] += logs[f"eval_{name}_runtime"]
            if len(self._sets) == len(self.weights):
                logs |= self._sets
                mixed = sum(w * self._sets[f"eval_{n}_loss"] for n, w in self.weights.items())
                logs["eval_loss"] = mixed / sum(self.weights.values())
                self._sets = {}
        if "loss" in logs:
            logs |= progress_of(self.summary())
        if "train_loss" in logs:
            logs["train_loss"] = self.totals["loss"] / max(self.totals["steps"], 1)
        logs.update(finite(logs))  # a gradient that overflowed in fp16
        return logs

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        restore(self, state)
        if self.trainer:
            self.trainer._total_train_tokens = self.totals["tokens"]  # TRL's `num_tokens` would start again at 0
        self._adapter, self._from = adapter_sum(model), state.global_step

    def on_step_begin(self, args, state, control, **kwargs):
        self._step_began = time.monotonic()

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        loss, self._losses = sum(self._losses), []
        if loss == 0:
            self._stop("the loss is exactly 0")
        self.totals["loss"] += loss
        self.totals["steps"] += 1
        self.totals["train_seconds"] += (
            time.monotonic() - self._step_began
        )  # evaluation and saving are not training time
        self.totals["skipped_steps"] += bool(optimizer.step_was_skipped)
        self.first_step = self.first_step or time.time()
        self._check_adapter(args, state, model)

    def _check_adapter(self, args, state, model) -> None:
        if self._adapter is None or adapter_sum(model) != self._adapter:
            self._adapter = None  # it has changed once: never compared again
            return
        warm_up = args.get_warmup_steps(state.max_steps)
        patience = warm_up + UNCHANGED_STEPS + self.totals["skipped_steps"]
        if state.global_step - self._from >= min(patience, max(state.max_steps, warm_up + 1)):
            raise ToolkitError(
                f"step {state.global_step}: the adapter has not changed since training began (learning rate "
                f"{args.learning_rate:g}): raise train.learning_rate, e.g. to 2.0e-4"
            )


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
    pieces = []
    for i, ids in enumerate(batch["input_ids"].tolist()):
        if "position_ids" in batch:  # packed: positions start again with every row
            starts = [n for n, p in enumerate(batch["position_ids"][i].tolist()) if p == 0]
            pieces += [tuple(ids[a:b]) for a, b in itertools.pairwise([*starts, len(ids)])]
        else:
            kept = batch["attention_mask"][i].tolist() if "attention_mask" in batch else [1] * len(ids)
            pieces.append(tuple(itertools.compress(ids, kept)))
    wanted = set(pieces)
    found = [row for row in rows if tuple(row.ids.tolist()) in wanted]
    named: dict[str, list[str]] = {}
    for row in found:
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


class Metrics(TrainerCallback):
    """Every logged step as a line of metrics.jsonl. A resumed run writes it anew from its checkpoint, which holds every
    line, so that nothing after the checkpoint stays and nothing before it is lost."""

    def __init__(self, folder: Path):
        self.file = folder / "metrics.jsonl"

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_metrics(self.file, state.log_history)

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero and "train_runtime" not in state.log_history[-1]:  # the manifest holds those
            row = {"step": state.global_step, **state.log_history[-1]}
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            tracking.log(row)


def write_metrics(file: Path, history: list[dict]) -> None:
    """metrics.jsonl from a trainer's log history."""
    write_jsonl(file, [{"step": line["step"], **line} for line in history if "train_runtime" not in line])


class ProgressLine(TrainerCallback):
    """Step, loss, speed, memory and time left; every validation loss on a line of its own."""

    def __init__(self, console, counter: Counter):
        self.console, self.counter = console, counter
        self.progress = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = state.global_step
        self.progress = Progress(self.console, "training", total=state.max_steps - self.start).__enter__()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            at = f"step {state.global_step}/{state.max_steps}"
            self.progress.title = f"{at}, loss {logs['loss']:.3f}, {speed(self.counter.summary())}"
            self.progress.advance(state.global_step - self.start - self.progress.done)
        elif "eval_loss" in logs:
            losses = {k[5:-5]: v for k, v in logs.items() if k.startswith("eval_") and k.endswith("_loss")}
            parts = ", ".join(f"{k} {v:.3f}" for k, v in losses.items() if k)
            self.console.print(f"step {state.global_step}: validation loss {logs['eval_loss']:.3f} ({parts})")

    def on_train_end(self, args, state, control, **kwargs):
        self.stop()

    def stop(self) -> None:
        """Leave the bar as it stands; called too when training is interrupted."""
        if self.progress:
            self.progress.__exit__()


class Samples(TrainerCallback):
    """The recipe's fixed prompts answered in the model's modes, before, during and after: samples.jsonl, and a wandb Table.

    Answers during training are left out where they would take more than SHARE of it."""

    def __init__(self, folder: Path, tokenizer, prompts: Sequence[str], seed: int, max_new_tokens: int):
        self.file = folder / "samples.jsonl"
        self.tokenizer, self.prompts, self.seed, self.max_new_tokens = tokenizer, prompts, seed, max_new_tokens
        self._rows: list[dict] = []
        self._begun = self._from = 0.0
        """Clock time and step at which training starts in this process."""
        self._last = self._spent = 0.0
        """Seconds of one round of answers, and of all during training."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            self.begin(model, state.global_step)
        self._begun, self._from = time.monotonic(), state.global_step

    def begin(self, model, step: int) -> None:
        """Keep the answers up to `step`; ask the base where its answers ("before") are missing or damaged."""
        rows = []
        with contextlib.suppress(ToolkitError):  # missing or damaged: what can be computed again is
            rows = read_jsonl(self.file) if step else []
        kept = [r for r in rows if r["step"] <= step and r["when"] != "after"]
        self._rows = [r for r in kept if r["when"] == "before"]
        if not step or len(self._rows) < len(self.prompts) * len(modes_of(self.tokenizer)):
            self._rows = []
            with model.disable_adapter() if step else contextlib.nullcontext():  # a fresh adapter changes nothing
                self.answer(model, 0, "before")
        self._rows += [r for r in kept if r["when"] == "during"]

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        answered = any(r["step"] == state.global_step for r in self._rows)  # each validation set reports on its own
        last = state.global_step >= state.max_steps  # "after" follows at once
        if state.is_world_process_zero and not answered and not last and self._affordable(state):
            self.answer(model, state.global_step, "during")
            self._spent += self._last

    def _affordable(self, state) -> bool:
        """Whether one more round keeps within SHARE of the time that all of training will take, as far as is known."""
        done = (state.global_step - self._from) / (state.max_steps - self._from)
        return self._spent + self._last <= SHARE * (time.monotonic() - self._begun) / done

    def answer(self, model, step: int, when: str) -> None:
        """Ask all prompts now and write the file."""
        started = time.monotonic()
        found = answers(model, self.tokenizer, self.prompts, self.seed, self.max_new_tokens)
        self._rows += [{"step": step, "when": when, **row} for row in found]
        write_jsonl(self.file, self._rows)
        tracking.log_table("samples", self._rows)
        self._last = time.monotonic() - started


def answers(model, tokenizer, prompts: Sequence[str], seed: int, max_new_tokens: int) -> list[dict]:
    """Each prompt answered in each of the model's modes: [{prompt, mode, reasoning, answer, finished}]."""
    asked = [[{"role": "user", "content": p}] for p in prompts]
    return [
        {"prompt": p, "mode": mode, "reasoning": r.reasoning, "answer": r.answer, "finished": r.finished}
        for mode in modes_of(tokenizer)
        for p, r in zip(
            prompts,
            generate(model, tokenizer, asked, mode, max_new_tokens=max_new_tokens, seed=seed),
            strict=True,
        )
    ]


class Checkpoints(TrainerCallback):
    """A checkpoint at the last step, whatever the strategy; checksums.json, written last, marks a checkpoint as whole.

    Older checkpoints are deleted only after that, so that a kill never leaves none. Stands last in the list of callbacks."""

    def __init__(self, limit: int | None):
        self.limit, self.saved = limit, None

    def on_epoch_end(self, args, state, control, **kwargs):  # the end of training is one too
        if control.should_training_stop and self.saved != state.global_step:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        import torch

        self.saved = state.global_step
        if args.world_size > 1:
            torch.distributed.barrier()  # every process writes a random state of its own
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / CHECKSUMS, {p.name: sha256(p) for p in sorted(folder.iterdir())})
            rotate_checkpoints(args.output_dir, self.limit, state.best_model_checkpoint)
