"""Every file in merged/ and gguf/ is accounted for: expected, a document, or one that does not belong there.

extra = inventory(run / "merged", {"config.json", "model.safetensors"}); extra.foreign, extra.documents
"""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

DOCUMENTS = (
    "*.md *.png *.pdf README* LICENSE* NOTICE* USE_POLICY* .gitattributes .gitignore .DS_Store .cache/* .git/*".split()
)
"""What no program reads that loads a model."""


@dataclass
class Inventory:
    """What a folder holds beside what it should hold; names are relative to it."""

    missing: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    """Not written by the export, and some program may read it with the model."""
    documents: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    """GGUF files of other origin, which are read only by their own name."""


def inventory(folder: Path, expected: Iterable[str]) -> Inventory:
    """Compare a folder with the names that it should hold."""
    known = set(expected)
    there = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    found = Inventory(missing=sorted(known - there))
    for name in sorted(there - known):
        if any(fnmatch.fnmatch(name, pattern) for pattern in DOCUMENTS):
            found.documents.append(name)
        elif name.endswith(".gguf") and "mmproj" not in name:  # LM Studio loads mmproj files by themselves
            found.unchecked.append(name)
        else:
            found.foreign.append(name)
    return found
