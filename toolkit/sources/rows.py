"""Files of rows: which files a path means, their fingerprint, their plain bytes; what a row that is refused says.

path = Path("data/chat"); files = data_files(path, split="train"); key = fingerprint_of(path, files)
"""

import gzip
import hashlib
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from toolkit.files import ToolkitError

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
NOT_ROWS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "configuration.json", "state.json"}
"""What data sets keep beside their rows."""
SPLITS = {"train", "validation", "valid", "val", "dev", "test", "eval"}
BLOCK = 1 << 22
"""Bytes read at a time while indexing: small enough that the newline mask stays in the processor's cache."""


class Rejected(ValueError):
    """A row that cannot be trained on: `reason` is a slug to count by, `detail` tells people what is wrong where."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Rows:
    """Raw rows of one source.

    `draw(seed)` yields every row once as (number from 1, row or Rejected), shuffled by the seed and read only when
    asked for. `where(number)` says file and line. `fields` are the keys of the first rows; `size` None is unknown.
    """

    size: int | None
    fields: list[str]
    fingerprint: str
    revision: str | None
    location: str
    draw: Callable[[int], Iterator[tuple[int, "dict | Rejected"]]]
    where: Callable[[int], str]


def kind_of(path: Path) -> str | None:
    """jsonl, json, csv or parquet by the file's name; None for other files."""
    name = path.name.lower()
    kind = KINDS.get(Path(name.removesuffix(".gz")).suffix)
    return None if kind == "parquet" and name.endswith(".gz") else kind


def data_files(path: Path, split: str = "train") -> list[Path]:
    """The data files of a path, sorted. In a folder with files named by split (`train-00000.parquet`) that split's.

    Raises ToolkitError for a path without any, and for links that loop or leave the folder.
    """
    if not path.is_dir():
        if kind_of(path) is None:
            raise ToolkitError(f"{path}: unknown kind of file: expected {', '.join(KINDS)}, the text kinds also as .gz")
        _resolved(path)
        return [path]
    files = sorted(f for f in _walk(path, path.resolve()) if kind_of(f) and f.name not in NOT_ROWS)
    first = {f: re.split(r"[-_.]", f.name, maxsplit=1)[0].lower() for f in files}
    chosen = [f for f in files if first[f] == split] or [f for f in files if first[f] not in SPLITS]
    if not chosen:
        found = f"found only {', '.join(f.name for f in files[:5])}" if files else "found none"
        raise ToolkitError(f"{path}: expected {', '.join(KINDS)} files of the split {split!r}: {found}")
    return chosen


def _walk(folder: Path, root: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        target = _resolved(entry)
        if entry.is_symlink() and (target.is_dir() or not target.is_relative_to(root)):
            kind = "a link to a folder" if target.is_dir() else "a link that leaves the folder"
            raise ToolkitError(f"{entry}: {kind}, which is not followed: put the files themselves there (cp -rL)")
        if target.is_dir():
            yield from _walk(entry, root)
        else:
            yield entry


def _resolved(path: Path) -> Path:
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: Python 3.11's word for a loop of links
        raise ToolkitError(f"{path}: cannot be opened: {error}") from error


def fingerprint_of(path: Path, files: list[Path]) -> str:
    """SHA-256 over the files' names, sizes and bytes.

    Of a file above 64 MiB only head, tail and 64 blocks of 64 KiB at seeded places are read, so that asking is quick:
    an edit in the middle of such a file that keeps its size may go unseen.
    """
    total = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        total.update(f"{file.relative_to(path).as_posix()}\0{size}\0".encode())
        with open(file, "rb") as handle:
            if size <= 64 << 20:
                total.update(hashlib.file_digest(handle, "sha256").digest())
                continue
            for place in _places(size):
                handle.seek(place)
                total.update(handle.read(1 << 16))
    return total.hexdigest()


def _places(size: int) -> list[int]:
    import numpy as np

    middle = np.random.default_rng(size).integers(0, size - (1 << 16), 64)
    return [0, *sorted(middle.tolist()), size - (1 << 16)]


def open_plain(path: Path):
    """The file's bytes, unpacked to a temporary file where gzipped. Raises ToolkitError for a gz bomb."""
    if path.stat().st_size == 0:
        raise ToolkitError(f"{path}: is empty: expected at least one row")
    if path.suffix.lower() != ".gz":
        return open(path, "rb", buffering=0)
    plain = tempfile.TemporaryFile()  # noqa: SIM115 (the caller reads it; it vanishes when closed)
    unpacked = 0
    # Text packs about 5 : 1, rarely 20 : 1; deflate's limit is 1,032 : 1, which only empty bytes reach.
    limit = max(100 << 20, 100 * path.stat().st_size)
    try:
        with gzip.open(path) as packed:
            while block := packed.read(BLOCK):
                unpacked += len(block)
                if unpacked > limit:
                    raise ToolkitError(f"{path}: unpacks to over {limit >> 20} MiB, more than text can: a gz bomb")
                plain.write(block)
    except (OSError, EOFError, zlib.error) as error:
        raise ToolkitError(f"{path}: not a whole gzip file: {error}") from error
    plain.flush()
    return plain


def decode(raw: bytes, path: Path, line: int) -> str:
    """UTF-8 bytes as text; `line` is the number of their first line. Raises ToolkitError that says how to convert."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        guess = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        fix = f"iconv -f {guess} -t utf-8 {path.name} > utf8-{path.name}"
        raise ToolkitError(f"{path} line {line}: not UTF-8, perhaps {guess}: convert it: {fix}") from error


def kind_name(value) -> str:
    """What a JSON value is, in words for an error."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
