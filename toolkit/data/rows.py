"""A compiled mix and its rows, and the data sets that a trainer takes.

from toolkit.data.rows import Row, dataset; dataset([row])["labels"]
"""

import functools
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from toolkit.records import Conversation, DroppedRow, MixReport, Unit

if TYPE_CHECKING:
    import datasets

UNITS: tuple[Unit, ...] = ("examples", "tokens", "supervised_tokens")


@dataclass(eq=False)
class Row:
    """One training example: `ids` (prompt, then completion), of which the first `prompt_length` are not supervised."""

    ids: np.ndarray
    prompt_length: int
    source: str
    mode: str
    number: int
    conversation: Conversation = field(default_factory=lambda: Conversation(messages=[]), repr=False)
    """Up to the supervised turn. In a compiled mix only held-out rows have theirs: evaluation asks them again."""
    signature: np.ndarray | None = field(default=None, repr=False)
    """MinHash of the completion, by which near duplicates are found."""
    bands: list[bytes] = field(default_factory=list, repr=False)
    """The signature in parts, as keys of their index."""

    @property
    def place(self) -> str:
        """Where it is from, in words."""
        return f"row {self.number} of {self.source}"

    @property
    def prompt(self) -> np.ndarray:
        """Ids that the model is shown."""
        return self.ids[: self.prompt_length]

    @property
    def completion(self) -> np.ndarray:
        """Ids that the model is taught."""
        return self.ids[self.prompt_length :]

    @property
    def labels(self) -> np.ndarray:
        """Token ids with -100 (ignored by the loss) on the prompt."""
        return np.where(np.arange(len(self.ids)) < self.prompt_length, -100, self.ids)

    def size(self, unit: str) -> int:
        """This row counted in examples, tokens or supervised tokens."""
        if unit == "examples":
            return 1
        return len(self.ids) if unit == "tokens" else len(self.ids) - self.prompt_length


@dataclass(frozen=True)
class Mix:
    """A compiled mix: rows to train on, rows held out, `mix.json`'s content, and rejected rows with their reasons."""

    train: list[Row]
    validation: list[Row]
    report: MixReport
    quarantine: list[DroppedRow]
    folder: Path

    @functools.cached_property
    def train_dataset(self) -> "datasets.Dataset":
        """A datasets.Dataset with input_ids and labels, as SFTTrainer takes it (SFTConfig: max_length=None)."""
        return dataset(self.train)

    @functools.cached_property
    def validation_dataset(self) -> "datasets.Dataset | None":
        """The same of the held-out rows; None without any."""
        return dataset(self.validation) if self.validation else None

    @property
    def validation_by_source(self) -> "dict[str, datasets.Dataset] | None":
        """{"source/mode": data set} of the held-out rows: SFTTrainer then logs a loss for each. None without any."""
        groups = defaultdict(list)
        for row in self.validation:
            groups[f"{row.source}/{row.mode}"].append(row)
        return {name: dataset(groups[name]) for name in sorted(groups)} or None


def dataset(rows: list[Row]) -> "datasets.Dataset":
    """A datasets.Dataset of input_ids and labels (-100 on the prompt)."""
    import datasets  # takes half a second

    made = datasets.Dataset.from_dict({"input_ids": [r.ids for r in rows], "labels": [r.labels for r in rows]})
    # Unsloth's sign that no row needs cutting: without it, rows that hold ids are padded on a GPU
    made._unsloth_truncated_to = max(len(r.ids) for r in rows)
    return made
