"""Are the values in an exported file those of the model? Compared tensor by tensor, and row by row.

errors = merged_errors(Checkpoint(run / "merged"), merged); errors.tensor, errors.row
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit.export.checkpoint import TYPES, Checkpoint
from toolkit.export.gguf import Planned, encode, in_parts
from toolkit.export.merge import Merged

MERGED = (1e-4, 1e-2)
"""Relative RMS error allowed in a merged tensor and in one of its rows: another processor rounds a few values to their
neighbour."""
ROUNDING = {
    "Q8_0": (0.01, 0.02),
    "Q6_K": (0.03, 0.08),
    "Q5_K": (0.06, 0.15),
    "Q5_1": (0.06, 0.15),
    "Q5_0": (0.08, 0.15),
    "Q4_K": (0.12, 0.3),
}
"""The same by GGML type. Normal numbers give about half of the first when they are quantized. A row, a word's row of the
embedding for one, is rounded worst where it has few large values among small ones: its block's range by the type's steps, √32
of which make its RMS. A row of zeros, or another word's, is off by 1 or more."""
SMALL_ROW = 0.01
"""Rows of a smaller share of the tensor's RMS, as those of unused tokens, are measured against this share."""


@dataclass
class Errors:
    """The worst errors among a file's tensors, in units of what is allowed: above 1 is too much."""

    tensor: float = 0.0
    row: float = 0.0
    missing: int = 0
    """Tensors that are missing, unknown, or of another type or shape."""

    def include(self, values: np.ndarray, stored: np.ndarray, allowed: tuple[float, float]) -> None:
        """Measure a tensor, or some of its rows, in float32; what is no number is infinitely bad."""
        errors = _squares(stored - values)
        powers = _squares(values)
        if not errors.any():
            return
        floor = SMALL_ROW**2 * powers.mean()
        with np.errstate(divide="ignore", invalid="ignore"):  # a tensor of zeros
            worst = np.sqrt([errors.sum() / powers.sum(), np.max(errors / np.maximum(powers, floor))])
        tensor, row = np.nan_to_num(worst, nan=math.inf, posinf=math.inf) / allowed
        self.tensor = max(self.tensor, float(tensor))
        self.row = max(self.row, float(row))


def _squares(values: np.ndarray) -> np.ndarray:
    """The sum of squares of each row."""
    return np.einsum("...j,...j->...", values, values).astype(np.float64)


def merged_errors(stored: Checkpoint, merged: Merged) -> Errors:
    """The tensors of a merged folder against base and adapter merged anew."""
    import torch

    errors = Errors()
    # every entry: a head that transformers would tie again is none of ours
    errors.missing = len(stored.entries.keys() - merged.weights.keys())
    for name, expected in merged.weights.items():
        entry = stored.entries.get(name)
        if entry is None or (entry.shape, entry.dtype) != (expected.shape, expected.dtype):
            errors.missing += 1
            continue
        ours = stored.tensor(name)
        theirs = merged.tensor(name)
        if not torch.equal(ours, theirs):  # NaN differs from itself
            errors.include(theirs.float().numpy(), ours.float().numpy(), MERGED)
    return errors


def gguf_errors(path: Path, header_bytes: int, plan: list[Planned]) -> Errors:
    """The tensors of a GGUF file, whose header says what the plan says, against what it should hold.

    Raises ValueError where the file ends before them."""
    from gguf import GGUF_DEFAULT_ALIGNMENT, dequantize

    errors = Errors()
    file = np.asarray(np.memmap(path, np.uint8, "r"))  # a slice of a memmap takes 13 µs, of an array 0.1
    place = header_bytes
    for planned in plan:
        place += -place % GGUF_DEFAULT_ALIGNMENT
        stored = file[place : place + planned.bytes].reshape(-1, planned.stored_shape[-1])
        place += planned.bytes
        rows = planned.rows()
        if len(stored) != len(rows):
            raise ValueError(f"it ends before {planned.name}")
        kind = planned.kind
        if kind.name in TYPES:
            if not np.array_equal(encode(rows, kind), stored):
                errors.tensor = math.inf  # nothing is rounded but by the type itself
            continue
        for part in in_parts(rows):
            errors.include(part.float().numpy(), dequantize(stored[: len(part)], kind), ROUNDING[kind.name])
            stored = stored[len(part) :]
    return errors
