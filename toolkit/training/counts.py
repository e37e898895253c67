"""What a training has done so far: tokens, losses and seconds, over all its resumes.

counts = Counts(); counts.see(inputs, loss); counts.add(counts.read())
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from toolkit.data.mix import Row

COUNTED = ("tokens", "supervised_tokens", "steps", "loss", "skipped_steps", "train_seconds", "evaluation_seconds", "seconds",
           "peak_memory_bytes")  # fmt: skip
# The sums of COUNTED, and how the batches were made; every checkpoint holds them.
Totals = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """A micro-batch and what it came to; its ids and labels stay on the device."""

    ids: torch.Tensor
    labels: torch.Tensor
    loss: float
    tokens: int
    supervised_tokens: int


class Counts:
    """The sums of a training. Micro-batches are read together at the end of a step, since every reading waits for the card."""

    def __init__(self) -> None:
        self.totals: Totals = dict.fromkeys(COUNTED, 0)
        self._seen: list[tuple[Mapping[str, Any], torch.Tensor]] = []
        self._began = time.monotonic()

    def see(self, inputs: Mapping[str, Any], loss: torch.Tensor) -> None:
        """Note a micro-batch and its loss without reading either."""
        self._seen.append((inputs, loss.detach()))

    def read(self) -> list[Batch]:
        """The batches noted since the last call, of a step or of a validation set, read at once."""
        seen = self._seen
        self._seen = []
        if not seen:
            return []
        numbers = torch.stack([_numbers(inputs, loss) for inputs, loss in seen]).tolist()
        return [
            Batch(inputs["input_ids"], inputs["labels"], loss, int(tokens), int(supervised))
            for (inputs, _), (loss, tokens, supervised) in zip(seen, numbers, strict=True)
        ]

    def add(self, batches: Sequence[Batch]) -> None:
        """Count the batches of a step, whose losses are each divided by the supervised tokens of them all."""
        self.totals["tokens"] += sum(batch.tokens for batch in batches)
        self.totals["supervised_tokens"] += sum(batch.supervised_tokens for batch in batches)
        self.totals["loss"] += sum(batch.loss for batch in batches)

    def summary(self) -> Totals:
        """The totals with the seconds and the memory of this process."""
        seconds = self.totals["seconds"] + time.monotonic() - self._began
        memory = max(self.totals["peak_memory_bytes"], peak_memory())
        return self.totals | {"seconds": seconds, "peak_memory_bytes": memory}


def _numbers(inputs: Mapping[str, Any], loss: torch.Tensor) -> torch.Tensor:
    """(loss, tokens, supervised tokens) on the device, in float64, which holds all three exactly."""
    labels, mask = inputs["labels"], inputs.get("attention_mask")
    tokens = torch.ones_like(labels) if mask is None else mask  # packed rows have none
    return torch.stack([loss.double(), tokens.sum().double(), (labels != -100).sum().double()])


def progress_of(totals: Totals) -> dict[str, float]:
    """What a line of metrics.jsonl says about work done so far, its speed and its memory."""
    seconds = max(totals["train_seconds"], 1e-9)
    return {
        "tokens": totals["tokens"],
        "supervised_tokens": totals["supervised_tokens"],
        "tokens_per_second": round(totals["tokens"] / seconds, 1),
        "supervised_tokens_per_second": round(totals["supervised_tokens"] / seconds, 1),
        "peak_memory_gib": round(totals["peak_memory_bytes"] / 2**30, 3),
    }


def speed(totals: Totals) -> str:
    """Tokens/s and peak memory in words."""
    now = progress_of(totals)
    return f"{now['tokens_per_second']:,.0f} tokens/s, peak {now['peak_memory_gib']:.2f} GiB"


def rows_of(batches: Sequence[Batch], rows: Sequence[Row]) -> str:
    """The rows of the mix in some batches, padded or packed: `sums row 3, sums row 17`, as numbered in their source."""
    # as bytes inside the batch, since packing joins rows and padding sets them apart
    contents = [_paired(batch.ids.cpu().numpy(), batch.labels.cpu().numpy()) for batch in batches]
    names = []
    for row in rows:
        pattern = _paired(row.ids, row.labels)
        if any(pattern in content for content in contents):
            names.append(f"{row.source} row {row.number}")
    return ", ".join(names) or "no row of the mix"


def _paired(ids: np.ndarray, labels: np.ndarray) -> bytes:
    """Ids and labels together, as a row's text may be the beginning of another's."""
    return np.stack([ids, labels], axis=-1).astype(np.int64).tobytes()


def adapter_sum(model: torch.nn.Module) -> float:
    """A number that changes when any trained weight does."""
    weights = [w.detach() for w in model.parameters() if w.requires_grad]
    return float(sum(w.abs().sum(dtype=torch.float64) for w in weights))


def peak_memory() -> int:
    """Bytes reserved on the GPU at the peak; without a GPU, those of this process now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    import psutil

    return psutil.Process().memory_info().rss
