"""What happens while a run trains: metrics.jsonl, a progress line, sample replies, speed and memory.

SFTTrainer(..., callbacks=[Metrics(folder), Progress(console), Samples(folder, tokenizer, prompts, seed, tokens)])
"""

import json
import time
from pathlib import Path

from transformers import TrainerCallback

from toolkit import tracking
from toolkit.generate import generate

MODES = ("thinking", "non_thinking")
SHARE = 0.05
"""Of the training time, what sample replies during it may take."""


class Metrics(TrainerCallback):
    """Every logged step as a line of metrics.jsonl; a resumed run first forgets what lies after its checkpoint."""

    def __init__(self, folder: Path):
        self.file = folder / "metrics.jsonl"

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002 - the signature is transformers'
        if not state.is_world_process_zero:
            return
        lines = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.is_file() else []
        kept = [line for line in lines if line["step"] <= state.global_step and state.global_step > 0]
        self.file.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002 - as above
        if not state.is_world_process_zero:
            return
        row = {"step": state.global_step, "epoch": state.epoch, **logs}
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\n")
        tracking.log(row)


class Progress(TrainerCallback):
    """Loss, tokens/s, supervised tokens/s, peak memory and time left: a live line on a terminal, plain lines in a pipe."""

    PLAIN_EVERY = 10  # seconds between plain lines

    def __init__(self, console, counter: "Counter"):
        self.console, self.counter = console, counter
        self.bar = self.task = None
        self.printed = 0.0

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002 - as above
        if self.console.is_terminal or self.console.is_jupyter:
            from rich import progress

            columns = progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn()
            self.bar = progress.Progress(*columns, progress.TimeRemainingColumn(), console=self.console)
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002 - as above
        if "loss" in logs:
            self._show(state, f"loss {logs['loss']:.3f}  {self.counter.line()}")
        elif "eval_loss" in logs:
            losses = {k[5:-5]: v for k, v in logs.items() if k.startswith("eval_") and k.endswith("_loss")}
            parts = ", ".join(f"{k} {v:.3f}" for k, v in losses.items() if k)
            self.console.print(f"step {state.global_step}: validation loss {logs['eval_loss']:.3f} ({parts})")

    def on_train_end(self, args, state, control, **kwargs):  # noqa: ARG002 - as above
        self.stop()

    def stop(self) -> None:
        """Leave the bar as it stands; called too when training is interrupted."""
        if self.bar:
            self.bar.stop()

    def _show(self, state, text: str) -> None:
        if self.bar:
            self.bar.update(self.task, completed=state.global_step, description=text)
        elif time.monotonic() - self.printed > self.PLAIN_EVERY or state.global_step == state.max_steps:
            self.printed = time.monotonic()
            left = self.counter.seconds / self.counter.steps * (state.max_steps - state.global_step)
            self.console.print(f"step {state.global_step}/{state.max_steps}  {text}  {left:.0f} s left")


class Counter(TrainerCallback):
    """Tokens and supervised tokens seen since training began in this process, with the seconds and memory they took."""

    def __init__(self):
        self.tokens = self.supervised = self.steps = 0
        self.seconds = 0.0
        self.first_step: float | None = None
        """Clock time when the first step ended."""
        self._since = None

    def count(self, inputs) -> None:
        """Add one training batch."""
        labels = inputs["labels"]
        self.tokens += int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else labels.numel()
        self.supervised += int((labels != -100).sum())

    def on_step_begin(self, args, state, control, **kwargs):  # noqa: ARG002 - as above
        self._since = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002 - as above
        self.seconds += time.monotonic() - self._since  # evaluation and saving are not training time
        self.steps += 1
        self.first_step = self.first_step or time.time()

    def line(self) -> str:
        rate = 1 / max(self.seconds, 1e-9)
        speed = f"{self.tokens * rate:,.0f} tokens/s  {self.supervised * rate:,.0f} supervised/s"
        return f"{speed}  peak {peak_memory() / 2**30:.2f} GiB"

    def summary(self) -> dict:
        """What the manifest keeps."""
        rate = 1 / max(self.seconds, 1e-9)
        return {
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "train_seconds": round(self.seconds, 2),
            "tokens_per_second": round(self.tokens * rate, 1),
            "supervised_tokens_per_second": round(self.supervised * rate, 1),
            "peak_memory_bytes": peak_memory(),
        }


def peak_memory() -> int:
    """Bytes reserved on the GPU at the peak; without a GPU, the peak resident set of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    import psutil

    info = psutil.Process().memory_info()
    return getattr(info, "peak_wset", None) or _peak_rss(info.rss)


def _peak_rss(now: int) -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), now)


class Samples(TrainerCallback):
    """The recipe's fixed prompts answered in both modes, before, during and after: samples.jsonl, and a wandb Table.

    Answers during training are left out where they would take more than SHARE of it."""

    def __init__(self, folder: Path, tokenizer, prompts: tuple[str, ...], seed: int, max_new_tokens: int):
        self.file = folder / "samples.jsonl"
        self.tokenizer, self.prompts, self.seed, self.max_new_tokens = tokenizer, prompts, seed, max_new_tokens
        self._rows: list[dict] = []
        self._begun = self._from = 0.0
        """Clock time and step from which training goes on here."""
        self._last = self._spent = 0.0
        """Seconds of one round of answers, and of all during training."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):  # noqa: ARG002 - as above
        if not state.is_world_process_zero:
            return
        if state.global_step == 0:
            self._rows = []
            self.answer(model, 0, "before")  # a fresh adapter changes nothing: these are the base's answers
        else:
            rows = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
            self._rows = [r for r in rows if r["step"] <= state.global_step and r["when"] != "after"]
        self._begun, self._from = time.monotonic(), state.global_step

    def on_evaluate(self, args, state, control, model=None, **kwargs):  # noqa: ARG002 - as above
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
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows]
        self.file.write_text("".join(lines), encoding="utf-8")
        tracking.log_table("samples", self._rows)
        self._last = time.monotonic() - started


def answers(model, tokenizer, prompts, seed: int, max_new_tokens: int) -> list[dict]:
    """Each prompt answered in both modes: [{prompt, mode, reasoning, answer, finished}]."""
    asked = [[{"role": "user", "content": p}] for p in prompts]
    return [
        {"prompt": p, "mode": mode, "reasoning": r.reasoning, "answer": r.answer, "finished": r.finished}
        for mode in MODES
        for p, r in zip(
            prompts,
            generate(model, tokenizer, asked, mode, max_new_tokens=max_new_tokens, seed=seed),
            strict=True,
        )
    ]
