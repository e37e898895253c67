"""Are the values in an exported file those of the model? Compared tensor by tensor, and row by row.

errors = merged_errors(Checkpoint(run / "merged"), merged); errors.tensor, errors.row
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from toolkit.export.checkpoint import Checkpoint
from toolkit.export.gguf import CHUNK, PLAIN, GgufFile, GgufTensor, Planned, encode
from toolkit.export.merge import Merged

if TYPE_CHECKING:
    import torch

EXACT = 1e-12
ROUNDING = {"F32": EXACT, "F16": EXACT, "BF16": EXACT, "Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.06, "Q5_1": 0.06,
            "Q5_0": 0.08, "Q4_K": 0.12}  # fmt: skip
"""Relative RMS error allowed in a tensor of a type; normal numbers give about half of it when they are quantized."""
ROW_ROUNDING = {"F32": EXACT, "F16": EXACT, "BF16": EXACT, "Q8_0": 0.02, "Q6_K": 0.08, "Q5_K": 0.15, "Q5_1": 0.15,
                "Q5_0": 0.15, "Q4_K": 0.3}  # fmt: skip
"""The same for one row, a word's row of the embedding for one. A row of few large values among small ones is rounded worst:
its block's range by the type's steps, √32 of which make its RMS. A row of zeros, or another word's, is off by 1 or more."""
SMALL_ROW = 0.01
"""Rows of a smaller share of the tensor's RMS, as those of unused tokens, are measured against this share."""


@dataclass
class Errors:
    """The worst relative RMS errors of a file's tensors; of a GGUF in units of what its types allow."""

    tensor: float = 0.0
    row: float = 0.0
    missing: int = 0
    """Tensors that are missing, unknown, or of another type or shape."""

    def include(self, tensor: float, row: float) -> None:
        """Keep the worse; what is no number is infinitely bad."""
        self.tensor = max(self.tensor, tensor if math.isfinite(tensor) else math.inf)
        self.row = max(self.row, row if math.isfinite(row) else math.inf)


def row_errors(errors: np.ndarray, powers: np.ndarray) -> tuple[float, float]:
    """(relative RMS error of a tensor, of its worst row) from the sums of squares of each row's differences and values."""
    power = float(powers.sum())
    if power == 0:
        return (0.0, 0.0) if not errors.any() else (math.inf, math.inf)
    floor = SMALL_ROW**2 * power / len(powers)
    worst = float(np.max(errors / np.maximum(powers, floor)))
    return math.sqrt(float(errors.sum()) / power), math.sqrt(worst)


def merged_errors(stored: Checkpoint, merged: Merged) -> Errors:
    """The tensors of a merged folder against base and adapter merged anew."""
    errors = Errors()
    # every entry: a head that transformers would tie again is none of ours
    errors.missing = len(stored.entries.keys() ^ merged.weights.keys())
    for name, expected in merged.weights.items():
        found = stored.entries.get(name)
        if found is None or found[1:] != expected[1:]:
            errors.missing += found is not None
            continue
        ours = stored.tensor(name)
        theirs = merged.tensor(name)
        if not _same_bits(ours, theirs):
            errors.include(*_difference(ours, theirs))
    return errors


def _same_bits(one: "torch.Tensor", other: "torch.Tensor") -> bool:
    import torch

    return bool(torch.equal(one, other))  # NaN differs from itself


def _difference(ours: "torch.Tensor", theirs: "torch.Tensor") -> tuple[float, float]:
    expected = theirs.float().reshape(-1, theirs.shape[-1])
    difference = ours.float().reshape(expected.shape) - expected
    return row_errors(_squares(difference.numpy()), _squares(expected.numpy()))


def gguf_errors(file: GgufFile, plan: list[Planned]) -> Errors:
    """The tensors of a GGUF file against what it should hold."""
    errors = Errors()
    errors.missing = len(file.tensors.keys() - {planned.name for planned in plan})
    for planned in plan:
        stored = file.tensors.get(planned.name)
        if stored is None or stored.kind != planned.kind or stored.shape != planned.shape:
            errors.missing += 1
            continue
        tensor, row = _rounding(planned.values(), stored)
        errors.include(tensor / ROUNDING[stored.kind], row / ROW_ROUNDING[stored.kind])
    return errors


def _rounding(expected: "torch.Tensor", stored: GgufTensor) -> tuple[float, float]:
    """(relative RMS error of a stored tensor, of its worst row)."""
    import gguf

    kind = gguf.GGMLQuantizationType[stored.kind]
    errors: list[np.ndarray] = []
    powers: list[np.ndarray] = []
    for rows, data in _in_chunks(expected, stored.data):
        if stored.kind in PLAIN and np.array_equal(encode(rows, stored.kind), data):
            errors.append(np.zeros(len(rows)))
            powers.append(np.ones(len(rows)))
            continue
        values = rows.float().numpy()
        errors.append(_squares(gguf.dequantize(data, kind) - values))
        powers.append(_squares(values))
    return row_errors(np.concatenate(errors), np.concatenate(powers))


def _in_chunks(tensor: "torch.Tensor", data: np.ndarray) -> "Iterator[tuple[torch.Tensor, np.ndarray]]":
    """Rows of a tensor beside the same rows of a file, so many that float32 copies of them take 16 MB."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    step = max(1, CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        yield rows[start : start + step], data[start : start + step]


def _squares(values: np.ndarray) -> np.ndarray:
    """The sum of squares of each row."""
    return np.einsum("ij,ij->i", values, values).astype(np.float64)
