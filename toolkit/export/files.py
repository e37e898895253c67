"""Whole files or none: atomic writing, checksums, and a record that lets an export go on where it stopped.

ledger = Ledger(run / "export.json", inputs); ledger.make(path, lambda partial: partial.write_bytes(data))
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from toolkit.recipe import ToolkitError


@contextlib.contextmanager
def complete(path: Path) -> Iterator[Path]:
    """Hands out `path`.partial; what is written there gets its name only when it is whole and on the disk."""
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free / 1e9
        raise ToolkitError(
            f"{path}: could not be written ({error}). {free:.2f} GB are free there. Nothing half-written was left; "
            "make room and run the same command again: it goes on where it stopped"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    with complete(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToolkitError(f"{path}: expected a JSON file ({error})") from error


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def describe(path: Path) -> dict:
    return {"sha256": sha256(path), "bytes": path.stat().st_size}
