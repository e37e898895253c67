"""A record of finished files that lets an export go on where it stopped.

ledger = Ledger(run / "export.json", inputs); ledger.make(path, lambda partial: partial.write_bytes(data))
"""

from collections.abc import Callable
from pathlib import Path

from toolkit.files import complete, describe, read_json, write_json, write_text


class Ledger:
    """What an export has finished, by checksum, for one set of inputs: a second run does only what is missing."""

    def __init__(self, path: Path, inputs: dict):
        self.path, self.root, self.inputs = path, path.parent, inputs
        old = read_json(path) if path.is_file() else {"inputs": inputs, "files": {}}
        self.files: dict[str, dict] = old["files"]
        if old["inputs"] != inputs:  # another adapter or base: nothing of what lies there may be taken for ours
            for name in self.files:
                (self.root / name).unlink(missing_ok=True)
            self.files = {}

    def has(self, path: Path) -> bool:
        known = self.files.get(path.relative_to(self.root).as_posix())
        return known is not None and path.is_file() and known == describe(path)

    def add(self, path: Path) -> None:
        self.files[path.relative_to(self.root).as_posix()] = describe(path)
        write_json(self.path, {"inputs": self.inputs, "files": self.files})

    def make(self, path: Path, write: Callable[[Path], object]) -> bool:
        """Writes `path` through `write(partial)` unless it is there already; True if it was written."""
        if self.has(path):
            return False
        with complete(path) as partial:
            write(partial)
        self.add(path)
        return True

    def make_text(self, path: Path, text: str) -> None:
        """The same for a small text, written again when it would differ."""
        if not (self.has(path) and path.read_text(encoding="utf-8") == text):
            write_text(path, text)
            self.add(path)
