"""Paths, whole-file writes, JSON and JSONL, checksums, the lock on a run, and the error class.

with lock(run, "export"): write_json(run / "eval.json", result); read_json(run / "eval.json")
"""

import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
POCKET = PACKAGE / "pocket"


class ToolkitError(ValueError):
    """An error for the person at the keyboard: it names the file, row or key, what was expected and what to do."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message about a name nobody knows: the nearest known one, else all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    return f". Did you mean {near[0]!r}?" if near else f". Known: {', '.join(names[:40]) or 'none yet'}"


def outputs() -> Path:
    """Where runs and caches lie: outputs/ in the project, or $TOOLKIT_OUTPUTS."""
    return Path(os.environ.get("TOOLKIT_OUTPUTS") or ROOT / "outputs")


def find(path: str | Path) -> Path | None:
    """A file or folder by its path from here, else from the project's root; None where neither has it."""
    try:
        return next((c for c in (Path(path).expanduser(), ROOT / path) if c.exists()), None)
    except (OSError, ValueError, RuntimeError):  # a name too long for a file, a null byte, an unknown ~user
        return None


def download(name: str, revision: str | None, files=("*.json", "*.safetensors", "*.jinja"), local_only=False) -> Path:
    """The folder of a Hub model's files; what its cache lacks is fetched, in a terminal with the Hub's own progress.

    Raises ToolkitError when they cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*files], local_files_only=local_only))
    except Exception as error:  # the Hub library raises many kinds; to the reader they are one
        raise ToolkitError(
            f"{name}: no such folder here, and the Hub did not give it ({type(error).__name__}). Check the name or the "
            "network, or set model.model_name to a local folder or to pocket"
        ) from error


@contextlib.contextmanager
def complete(path: Path) -> Iterator[Path]:
    """Yields a temporary path; what is written there gets the name `path` only when it is whole and on the disk.

    The temporary name holds the process number, so that two processes never write to the same file.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        # without fsync a power cut can leave the new name on an empty file
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_error(path: Path, error: OSError) -> ToolkitError:
    """The message for a failed write, with the advice that fits its cause: full disk, no permission, path below a file."""
    existing = next((p for p in path.parents if p.exists()), Path("/"))
    if existing.is_file():
        advice = f"{existing} is a file, not a folder: choose another output folder (TOOLKIT_OUTPUTS)"
    elif isinstance(error, PermissionError) or not os.access(existing, os.W_OK):
        advice = f"{existing} is not writable: change its permissions, or set TOOLKIT_OUTPUTS to another folder"
    elif isinstance(error, IsADirectoryError):
        advice = "it is a folder: name a file"
    else:
        free = shutil.disk_usage(existing).free / 1e9
        advice = (
            f"{free:.2f} GB are free there: free some space and run the same command again; finished steps are kept"
        )
    return ToolkitError(f"{path}: could not be written ({error.strerror or error}). {advice}")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises ToolkitError."""
    with complete(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file, whole or not at all; NaN and infinity become null, since JSON has neither."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object per line, whole or not at all."""
    lines = (json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_text(path, "".join(lines))


def append_rows(path: Path, rows: Iterable[dict]) -> None:
    """Add JSON objects to a JSONL file, one per line, flushed to the disk. Raises ToolkitError."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, error) from error


def finite(value):
    """A copy of plain values in which NaN and infinity are None."""
    if isinstance(value, dict):
        return {key: finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(node, path: str = "") -> dict:
    """{dotted key: value} of nested dicts and lists: {"train.max_steps": 8, "data.sources.0.path": "a.jsonl"}."""
    inner = dict(enumerate(node)) if isinstance(node, list) else node
    if not isinstance(inner, dict) or not inner:
        return {path: node}
    return {k: v for key, child in inner.items() for k, v in flat(child, f"{path}.{key}".lstrip(".")).items()}


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ToolkitError naming the file when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToolkitError(f"{path}: expected a JSON file ({error})") from error
    if not isinstance(value, dict):
        raise ToolkitError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSONL file, one per line; a last line cut short by a kill is left out.

    Raises ToolkitError naming file and line when any other line is damaged, or the file is missing."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ToolkitError(f"{path}: expected a JSONL file ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):  # no line break after it: the process was killed while it wrote
                break
            raise ToolkitError(f"{path}, line {number}: expected a JSON object ({error})") from error
    return rows


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path: Path) -> dict:
    """{"sha256", "bytes"} of a file, as manifests and certificates hold it."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


@contextlib.contextmanager
def lock(folder: Path, verb: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder while `verb` writes to it; re-entrant within a process.

    What a killed process left half-written in the folder is removed. The lock file lies beside the folder (`.locks/`),
    so that the folder itself can be renamed meanwhile. The operating system releases it when the process dies. Another
    process gets a ToolkitError that says who holds it and since when; with `wait` it waits instead.
    """
    import filelock

    file = folder.resolve().parent / ".locks" / f"{folder.name}.lock"
    if folder.is_file():
        raise ToolkitError(
            f"{folder} is a file, not a folder: remove it, or choose another name or output folder (TOOLKIT_OUTPUTS)"
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(file, is_singleton=True)
        held.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout as error:
        raise ToolkitError(
            f"{folder} is in use {_holder(file)}: wait until it ends, or stop it, then try again"
        ) from error
    except OSError as error:
        raise write_error(file, error) from error
    try:
        if held.lock_counter == 1:
            note = {"verb": verb, "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            with contextlib.suppress(OSError):  # a full disk; the lock holds without its note
                file.with_suffix(".json").write_text(json.dumps(note), encoding="utf-8")
            for partial in folder.rglob("*.partial"):
                if re.search(r"\.\d+\.partial$", partial.name):  # by `complete`, which was killed under this lock
                    partial.unlink()
        yield
    finally:
        held.release()


def _holder(lock_file: Path) -> str:
    try:
        note = json.loads(lock_file.with_suffix(".json").read_text(encoding="utf-8"))
        return f"by `{note['verb']}` (process {note['pid']}, since {note['since']})"
    except (OSError, ValueError, KeyError):  # the holder has not written its note yet
        return "by another process"


def safe_output() -> None:
    """Make printing never fail: a character that the terminal's encoding lacks is printed as `?`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # notebooks and tests replace the streams by objects without it
            stream.reconfigure(errors="replace")
