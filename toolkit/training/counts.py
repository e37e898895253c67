"""What a training has done so far: tokens, losses and seconds, over all its resumes.

counts = Counts(); counts.see(inputs, loss, training=True); counts.add(counts.read_step())
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolkit.data.mix import Row

COUNTED = ("tokens", "supervised_tokens", "steps", "loss", "skipped_steps", "train_seconds", "evaluation_seconds", "seconds",
           "peak_memory_bytes")  # fmt: skip
Totals = dict[str, Any]
"""The sums of COUNTED, and how the batches were made; every checkpoint holds them."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch whose loss was computed; its tensors stay where they are until somebody reads them."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None
    loss: torch.Tensor

    def numbers(self) -> torch.Tensor:
        """(loss, tokens, supervised tokens) on the device, in float64, which holds all three exactly."""
        tokens = torch.full_like(self.loss, self.labels.numel(), dtype=torch.float64)
        if self.attention_mask is not None:
            tokens = self.attention_mask.sum().double()
        return torch.stack([self.loss.double(), tokens, (self.labels != -100).sum().double()])


@dataclass(frozen=True)
class Read:
    """What a batch came to."""

    batch: Batch
    loss: float
    tokens: int
    supervised_tokens: int


class Counts:
    """The sums of a training; a batch is read with all others of its step, since every reading waits for the card."""

    def __init__(self) -> None:
        self.totals: Totals = dict.fromkeys(COUNTED, 0)
        self._training: list[Batch] = []
        self._validation: list[Batch] = []
        self._began = time.monotonic()

    def see(self, inputs: Mapping[str, Any], loss: torch.Tensor, *, training: bool) -> None:
        """Note a micro-batch and its loss without reading either."""
        batch = Batch(inputs["input_ids"], inputs["labels"], inputs.get("attention_mask"), loss.detach())
        (self._training if training else self._validation).append(batch)

    def read_step(self) -> list[Read]:
        """The batches of the step in work, read at once."""
        batches, self._training = self._training, []
        return _read(batches)

    def read_validation(self) -> list[Read]:
        """The batches of the validation set in work, read at once."""
        batches, self._validation = self._validation, []
        return _read(batches)

    def add(self, batches: Sequence[Read]) -> None:
        """Count the batches of a step, whose losses are each divided by the supervised tokens of them all."""
        loss = 0.0
        for batch in batches:
            loss += batch.loss
            self.totals["tokens"] += batch.tokens
            self.totals["supervised_tokens"] += batch.supervised_tokens
        self.totals["loss"] += loss

    def summary(self) -> Totals:
        """The totals with the seconds and the memory of this process."""
        seconds = self.totals["seconds"] + time.monotonic() - self._began
        memory = max(self.totals["peak_memory_bytes"], peak_memory())
        return self.totals | {"seconds": seconds, "peak_memory_bytes": memory}


def _read(batches: Sequence[Batch]) -> list[Read]:
    if not batches:
        return []
    rows = torch.stack([batch.numbers() for batch in batches]).tolist()
    return [Read(batch, loss, int(n), int(k)) for batch, (loss, n, k) in zip(batches, rows, strict=True)]


def progress_of(totals: Totals) -> dict[str, float]:
    """What a line of metrics.jsonl says about work done so far, its speed and its memory."""
    rate = 1 / max(totals["train_seconds"], 1e-9)
    return {
        "tokens": totals["tokens"],
        "supervised_tokens": totals["supervised_tokens"],
        "tokens_per_second": round(totals["tokens"] * rate, 1),
        "supervised_tokens_per_second": round(totals["supervised_tokens"] * rate, 1),
        "peak_memory_gib": round(totals["peak_memory_bytes"] / 2**30, 3),
    }


def speed(totals: Totals) -> str:
    """Tokens/s, supervised tokens/s and peak memory in words."""
    now = progress_of(totals)
    return (
        f"{now['tokens_per_second']:,.0f} tokens/s, {now['supervised_tokens_per_second']:,.0f} supervised/s, "
        f"peak {now['peak_memory_gib']:.2f} GiB"
    )


def first_not_finite(batches: Sequence[Read]) -> Read | None:
    """The first batch whose loss is NaN or infinite."""
    return next((batch for batch in batches if not math.isfinite(batch.loss)), None)


def rows_of(batches: Sequence[Batch], rows: Sequence[Row]) -> str:
    """The rows of the mix in some batches, padded or packed: `sums rows 3, 17`, as numbered in their source."""
    # as bytes inside the batch, since packing joins rows and padding sets them apart
    held = [_paired(batch.input_ids.cpu().numpy(), batch.labels.cpu().numpy()) for batch in batches]
    numbers: dict[str, list[str]] = {}
    for row in rows:
        pattern = _paired(row.ids, row.labels)
        if any(pattern in content for content in held):
            numbers[row.source] = [*numbers.get(row.source, []), str(row.number)]
    named = [f"{source} rows {', '.join(these)}" for source, these in numbers.items()]
    return "; ".join(named) or "no row of the mix"


def _paired(ids: np.ndarray, labels: np.ndarray) -> bytes:
    """Ids and labels together, as a row's text may be the beginning of another's."""
    return np.stack([ids, labels], axis=-1).astype(np.int64).tobytes()


def adapter_sum(model: torch.nn.Module) -> float:
    """A number that changes when any trained weight does."""
    weights = [w.detach() for w in model.parameters() if w.requires_grad]
    return float(sum(w.abs().sum(dtype=torch.float64) for w in weights))


def peak_memory() -> int:
    """Bytes reserved on the GPU at the peak; without a GPU, the peak resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    import psutil

    info = psutil.Process().memory_info()
    status = Path("/proc/self/status")  # Linux; Windows has peak_wset; elsewhere what is resident now
    lines = status.read_text().splitlines() if status.is_file() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return getattr(info, "peak_wset", max(peaks, default=info.rss))
