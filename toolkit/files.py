"""Whole files or none: a file gets its name when all of it is on the disk; checksums.

write_json(run / "eval.json", result); read_json(run / "eval.json")
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
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


def describe(path: Path) -> dict:
    return {"sha256": sha256(path), "bytes": path.stat().st_size}
