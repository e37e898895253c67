"""Paths, whole-file writes, JSON and JSONL, checksums, the lock on a run, and the error class.

with lock(run, "export"): write_json(run / "eval.json", result); read_json(run / "eval.json")
"""

import difflib
import errno
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
# What the package lies in: the project in a checkout, site-packages of an installed copy.
ROOT = PACKAGE.parent
POCKET = PACKAGE / "pocket"
# Recipes and sample rows; a package beside this one, installed with it.
RECIPES = ROOT / "data_recipes"
JsonObject = dict[str, Any]
JsonRow = Mapping[str, Any]


# Prints a line for people.
Say = Callable[[str], Any]


class ToolkitError(ValueError):
    """An error for the person at the keyboard: it names the file, row or key, what was expected and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message about a name nobody knows: the nearest known one, else all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    return f". Did you mean {near[0]!r}?" if near else f". Known: {', '.join(names[:40]) or 'none yet'}"


def command_line(words: Iterable[str]) -> str:
    """A command as it is typed here: quoted for a POSIX shell, on Windows for PowerShell."""
    if os.name != "nt":
        return shlex.join(words)
    quoted = ["'" + word.replace("'", "''") + "'" for word in words]
    return " ".join(re.sub(r"^'([\w=.:/\\-]+)'$", r"\1", word) for word in quoted)


def outputs() -> Path:
    """Where runs and caches lie: outputs/ in the current folder, or $TOOLKIT_OUTPUTS."""
    return Path(os.environ.get("TOOLKIT_OUTPUTS") or "outputs").expanduser().absolute()


def find(path: str | Path) -> Path | None:
    """A file or folder by its path from here; what starts with data_recipes/ also as it ships. None where there is none."""
    try:
        here = Path(path).expanduser()
        if here.exists():
            return here
        # nothing else beside the package: in site-packages lie other people's packages
        shipped = ROOT / path
        return shipped if here.parts[:1] == (RECIPES.name,) and shipped.exists() else None
    except (OSError, ValueError, RuntimeError):  # a name too long for a file, a null byte, an unknown ~user
        return None


def check_regular(path: Path) -> None:
    """Raises ToolkitError for a pipe, socket or device, which would be waited for, or read twice, in vain."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ToolkitError(f"{path}: is a pipe, a socket or a device: write it to a file first, and name that")


def download(
    name: str,
    revision: str | None,
    files: Iterable[str] = ("*.json", "*.safetensors", "*.jinja"),
    local_only: bool = False,
) -> Path:
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


@contextmanager
def complete(path: Path) -> Iterator[Path]:
    """Yields a temporary path; what is written there gets the name `path` only when it is whole and on the disk.

    The temporary name holds the process number, so that two processes never write to the same file.
    """
    check_in_place(path)
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
        with suppress(OSError):
            partial.unlink()


def write_error(path: Path, error: OSError) -> ToolkitError:
    """The message for a failed write, with the advice that fits its cause: full disk, no permission, path below a file."""
    existing = next((p for p in path.parents if p.exists()), Path("/"))
    if existing.is_file():
        advice = f"{existing} is a file, not a folder: choose another output folder (TOOLKIT_OUTPUTS)"
    elif isinstance(error, PermissionError) or error.errno == errno.EROFS or not os.access(existing, os.W_OK):
        advice = f"{existing} is not writable: change its permissions, or set TOOLKIT_OUTPUTS to another folder"
    else:
        free = shutil.disk_usage(existing).free / 1e9
        space = f"{free:.2f} GB are free there: free some space and run the same command again; finished steps are kept"
        advice = OTHER_CAUSES.get(error.errno or 0, space)
    return ToolkitError(f"{path}: could not be written ({error.strerror or error}). {advice}")


# Advice by error number, where more space would not help.
OTHER_CAUSES = {
    errno.EISDIR: "it is a folder: name a file",
    errno.EFBIG: "the file is larger than this file system or `ulimit -f` allows: set TOOLKIT_OUTPUTS to another disk",
    errno.ENOENT: "its folder was renamed or removed meanwhile: put it back and run the same command again",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "the disk reports an error: save what matters, then set TOOLKIT_OUTPUTS to another disk",
}


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises ToolkitError."""
    with complete(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: JsonRow) -> None:
    """Write a JSON file, whole or not at all; NaN and infinity become null, since JSON has neither."""
    # some parsers take NaN, browsers and jq do not
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[JsonRow]) -> None:
    """Write one JSON object per line, whole or not at all."""
    write_text(path, json_lines(rows))


def append_rows(path: Path, rows: Iterable[JsonRow]) -> None:
    """Add JSON objects to a JSONL file, one per line, flushed to the disk. Raises ToolkitError."""
    check_in_place(path)
    text = json_lines(rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, error) from error


def json_lines(rows: Iterable[JsonRow]) -> str:
    """One JSON object per line."""
    return "".join(json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def finite(value: Any) -> Any:
    """A copy of plain values in which NaN and infinity are None."""
    if isinstance(value, dict):
        return {key: finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(node: Any, path: str = "") -> JsonObject:
    """{dotted key: value} of nested dicts and lists: {"train.max_steps": 8, "data.sources.0.path": "a.jsonl"}."""
    children = dict(enumerate(node)) if isinstance(node, list) else node
    if not isinstance(children, dict) or not children:
        return {path: node}
    leaves: JsonObject = {}
    for key, child in children.items():
        leaves |= flat(child, f"{path}.{key}".lstrip("."))
    return leaves


# What writes a file of a run again.
AGAIN = {
    "recipe.yaml": "run the `train` command that began this run again",
    "manifest.json": "run the `train` command that began this run again; it does not train again",
    "mix.json": "`train --fresh`",
    "eval.json": "`python -m toolkit evaluate {run}`",
    "export.json": "`python -m toolkit export {run}`",
    "certificate.json": "`python -m toolkit export {run}`",
}


def remedy(path: Path) -> str:
    """The end of a message about a damaged file of a run: what to do; empty for other files."""
    run = path.absolute().parent.name
    return f". Damaged? To write it anew: {AGAIN[path.name].format(run=run)}" if path.name in AGAIN else ""


def read_text(path: Path) -> str:
    """A text file in UTF-8, as editors leave it: a byte order mark is skipped, CRLF becomes a line feed.

    Raises ToolkitError naming the file and, for a file of a run, the command that writes it again."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ToolkitError(f"{path}: expected a text file in UTF-8 ({error}){remedy(path)}") from error


def read_json(path: Path) -> JsonObject:
    """The object in a JSON file. Raises ToolkitError naming the file when it is missing or damaged, and its remedy."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ToolkitError(f"{path}: expected a JSON file ({error}){remedy(path)}") from error
    if not isinstance(value, dict):
        raise ToolkitError(f"{path}: expected a JSON object, found {type(value).__name__}{remedy(path)}")
    return value


def read_if_there(path: Path) -> JsonObject:
    """The object in a JSON file; {} where there is no such file. Raises ToolkitError where it is damaged."""
    return read_json(path) if path.is_file() else {}


def read_if_whole(path: Path) -> JsonObject:
    """The object in a JSON file; {} where it is missing or damaged."""
    try:
        return read_json(path)
    except ToolkitError:
        return {}


def read_jsonl(path: Path) -> list[JsonObject]:
    """The objects of a JSONL file, one per line; a last line cut short by a kill is left out.

    Raises ToolkitError naming file and line when any other line is damaged, or the file is missing."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
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


def describe(path: Path) -> JsonObject:
    """{"sha256", "bytes"} of a file, as manifests and certificates hold it."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


@dataclass
class Held:
    """A folder that this process has locked."""

    verb: str
    inode: int | None = None
    """Of the folder at the first write under the lock; `train --fresh` moves an old one aside before that."""


# By the folder's real path.
HELD: dict[Path, Held] = {}


@contextmanager
def lock(folder: Path, verb: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder while `verb` writes to it; re-entrant within a process.

    The lock belongs to the real folder, however its path is spelled. Its file lies beside the folder (`.locks/`), so that the
    folder itself can be moved aside meanwhile. What a killed process left half-written in the folder is removed. The
    operating system releases the lock when the process dies. Another process gets a ToolkitError that says who holds it
    and since when; with `wait` it waits instead.
    """
    import filelock

    if folder.is_file():
        raise ToolkitError(
            f"{folder} is a file, not a folder: remove it, or choose another name or output folder (TOOLKIT_OUTPUTS)"
        )
    real = folder.resolve()
    file = real.parent / ".locks" / f"{real.name}.lock"
    note = file.with_suffix(".txt")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # one object for a file in a process, so that a verb may call another that locks the same folder
        held = filelock.FileLock(file, is_singleton=True)
        held.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout as error:
        # the holder may not have written its note yet
        holder = note.read_text(encoding="utf-8") if note.is_file() else "another process"
        raise ToolkitError(f"{folder} is in use by {holder}: wait until it ends, or stop it, then try again") from error
    except OSError as error:
        raise write_error(file, error) from error
    is_first = held.lock_counter == 1
    try:
        if is_first:
            HELD[real] = Held(verb)
            with suppress(OSError):  # a full disk; the lock holds without its note
                note.write_text(
                    f"`{verb}` (process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')})", encoding="utf-8"
                )
            remove_partials(real)
        yield
    finally:
        if is_first:
            HELD.pop(real, None)
        held.release()


def remove_partials(folder: Path) -> None:
    """Remove what `complete` was writing below a folder when its process was killed."""
    import psutil

    for partial in folder.rglob("*.partial"):
        writer = re.search(r"\.(\d+)\.partial$", partial.name)
        # a run inside this folder has a lock of its own, and its process may be writing
        if writer and (int(writer[1]) == os.getpid() or not psutil.pid_exists(int(writer[1]))):
            partial.unlink(missing_ok=True)


def displaced(path: Path) -> Path | None:
    """The locked folder that a path lies in, when it is not the folder it was: renamed, removed or replaced; else None."""
    for folder, held in HELD.items():
        if path.absolute().is_relative_to(folder):
            inode = folder.stat().st_ino if folder.exists() else None
            held.inode = held.inode or inode
            if inode != held.inode:
                return folder
    return None


def check_in_place(path: Path) -> None:
    """Raises ToolkitError when a locked folder that `path` lies in was renamed: a write would begin a second one."""
    if folder := displaced(path):
        # libraries write their files by themselves, and may have begun the folder again
        raise ToolkitError(
            f"{folder}: was renamed or removed while `{HELD[folder].verb}` writes to it: rename it back, in place of what a "
            "library may have begun there, then run the same command again; finished steps are kept"
        )


# What tokens and keys look like; of each only its group is shown.
SECRETS = (
    r"\b(hf_|gh[pousr]_|sk-)[\w-]{16,}",
    r"(?i)(\bbearer )\S+",
    r"(//)[^\s/@]+:[^\s/@]+(?=@)",
    r"(?i)(--api-key[= ])\S+",
    # not eos_token: <eos>
    r"(?i)(\b\w*(?:token|secret|passw(?:or)?d|api[_-]?key)[\"']?\s*[=:]\s*[\"']?)[^\s\"',<]+",
)


def shareable(text: str) -> str:
    """A text without tokens, keys and the home folder, for logs and files that people pass on."""
    for pattern in SECRETS:
        text = re.sub(pattern, r"\1…", text)
    return without_home(text)


def without_home(text: str) -> str:
    """A text in which the home folder is written `~`; a path works as before, and names nobody."""
    return re.sub(r"(?<![\w/\\])" + re.escape(str(Path.home())) + r"(?=[/\\]|$)", "~", text)


def hide_home(folder: Path) -> None:
    """Write the home folder as `~` in what PEFT leaves beside an adapter, which people upload.

    Not in the tokenizer's files: a vocabulary may hold `/root/`."""
    for name in ("adapter_config.json", "README.md"):
        file = folder / name
        text = read_text(file) if file.is_file() else ""
        if (shown := without_home(text)) != text:
            write_text(file, shown)


def safe_output() -> None:
    """Make printing never fail: a character that the terminal's encoding lacks is printed as `?`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # notebooks and tests replace the streams by objects without it
            stream.reconfigure(errors="replace")
