"""Rows of local files, read when they are drawn: jsonl, json, csv and parquet, the text kinds also gzipped.

path = Path("data_recipes/samples/jobs/general.csv"); number, row = next(open_files(path, data_files(path)).draw(seed=1))
"""

import bisect
import csv
import gzip
import hashlib
import io
import json
import re
import shutil
import string
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from toolkit.files import ToolkitError, sha256

SPLITS = {"train", "validation", "valid", "val", "dev", "test", "eval"}
NOT_ROWS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "configuration.json", "state.json"}
"""What data sets keep beside their rows."""
BLOCK = 1 << 22
"""Bytes read at a time while lines are indexed: small enough that the comparison stays in the processor's cache."""
PEEK = 50
"""Rows looked at to learn a source's fields."""
BOM = b"\xef\xbb\xbf"
ENCODINGS = ("gb18030", "big5", "shift_jis", "cp1252")
JSON_TYPES = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
ADVICE = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as CSV (in Excel: Save As, CSV UTF-8)"),
    **dict.fromkeys((".txt", ".md"), 'write one object a line, {"prompt": …, "completion": …}, into a .jsonl'),
    **dict.fromkeys((".zip", ".tar", ".tgz"), "unpack it and name the folder"),
}


class Rejected(ValueError):
    """A row that cannot be trained on: `reason` is a slug to count by, `detail` tells people what is wrong where."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Rows:
    """Raw rows of one source.

    `draw(seed)` yields every row once as (number from 1, row or Rejected), shuffled by the seed and read only when
    asked for. `where(number)` says file and line. `fields` are the keys of the first rows; `size` None is unknown;
    `revision` is the Hub's commit.
    """

    size: int | None
    fields: list[str]
    location: str
    draw: Callable[[int], Iterator[tuple[int, dict | Rejected]]]
    where: Callable[[int], str]
    revision: str | None = None


@dataclass(frozen=True)
class Table:
    """One file whose rows are fetched by position from 0; `get` gives None for a blank line."""

    path: Path
    unit: str
    size: int
    get: Callable[[int], dict | Rejected | None]


def json_type(value) -> str:
    """What a JSON value is, in words for an error."""
    return JSON_TYPES.get(type(value), "a number")


def ending(path: Path) -> str:
    """The ending that says how a file is read (.jsonl, .csv, …), .gz taken off from text files; "" for other files."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in READERS and not name.endswith(".parquet.gz") else ""


def data_files(path: Path, split: str = "train") -> list[Path]:
    """The data files of a path, sorted. In a folder with files named by split (`train-00000.parquet`) that split's.

    Raises ToolkitError for a path without any.
    """
    known = ", ".join(READERS)
    if not path.is_dir():
        if not ending(path):
            advice = ADVICE.get(path.suffix.lower(), "the text kinds may also end in .gz")
            raise ToolkitError(f"{path}: unknown kind of file: expected {known}: {advice}")
        return [path]
    found = sorted(f for f in path.rglob("*") if "/." not in f"/{f.relative_to(path).as_posix()}" and not f.is_dir())
    files = {f: re.split(r"[-_.]", f.name)[0].lower() for f in found if ending(f) and f.name not in NOT_ROWS}
    chosen = [f for f in files if files[f] == split] or [f for f in files if files[f] not in SPLITS]
    if not chosen:
        names = ", ".join(f.name for f in found[:5]) or "no files"
        raise ToolkitError(f"{path}: expected {known} files of the split {split!r}: found only {names}")
    return chosen


def fingerprint_of(path: Path, files: list[Path]) -> str:
    """SHA-256 over the files' names below `path` and their bytes."""
    try:
        parts = [f"{f.relative_to(path).as_posix()}\0{sha256(f)}" for f in files]
    except OSError as error:
        raise ToolkitError(f"{path}: cannot be read: {error}") from error
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def open_files(path: Path, files: list[Path]) -> Rows:
    """Rows of files, one after the other as one. Raises ToolkitError."""
    try:
        tables = [READERS[ending(f)](f) for f in files]
    except OSError as error:
        raise ToolkitError(f"{path}: cannot be read: {error}") from error
    starts = [0, *accumulate(t.size for t in tables)]

    def locate(position: int) -> tuple[Table, int]:
        index = bisect.bisect_right(starts, position) - 1
        return tables[index], position - starts[index]

    def draw(seed: int) -> Iterator[tuple[int, dict | Rejected]]:
        for position in shuffled(starts[-1], seed):
            table, inside = locate(position)
            row = table.get(inside)
            if row is not None:
                yield position + 1, row

    def where(number: int) -> str:
        table, inside = locate(number - 1)
        return f"{table.path} {table.unit} {inside + 1}"

    first = [table.get(inside) for table, inside in map(locate, range(min(PEEK, starts[-1])))]
    return Rows(starts[-1], fields_of(first, path), str(path), draw, where)


def fields_of(first: list, path: Path) -> list[str]:
    """The keys of a source's first rows, in order of appearance. Raises ToolkitError where no row can be read."""
    keys = dict.fromkeys(key for row in first if isinstance(row, dict) for key in row)
    bad = next((row for row in first if isinstance(row, Rejected)), None)
    if bad and not keys:
        raise ToolkitError(
            f"{path}: none of the first {len(first)} rows can be read: {bad}. Expected one JSON object a line; "
            f"objects that stand over several lines become that with: jq -c . '{path}' > lines.jsonl"
        )
    if not keys:
        raise ToolkitError(f"{path}: is empty: expected at least one row")
    return list(keys)


def shuffled(size: int, seed: int) -> Iterator[int]:
    """0 … size-1 in the seed's order; 4 bytes a row."""
    order = np.random.default_rng(seed).permutation(np.arange(size, dtype=np.int32 if size < 2**31 else np.int64))
    for start in range(0, size, 4096):
        yield from order[start : start + 4096].tolist()


def plain(path: Path):
    """A file to read bytes from; a gzipped one is unpacked first, since rows are fetched by their offsets."""
    if path.suffix.lower() != ".gz":
        return open(path, "rb", buffering=0)
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (the caller reads it; it vanishes when closed)
    try:
        with gzip.open(path) as packed:
            shutil.copyfileobj(packed, unpacked, BLOCK)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ToolkitError(f"{path}: not a whole gzip file: {error}") from error
    unpacked.seek(0)
    return unpacked


def json_table(path: Path) -> Table:
    """An array of objects, {"data": [objects]}, or one object a line: the content decides, as people name them all."""
    file = plain(path)
    if ending(path) != ".json" and not file.read(BLOCK).removeprefix(BOM).lstrip().startswith(b"["):
        return line_table(path, file)
    text = whole_text(path)
    try:
        data = json.loads(text.strip() or "[]")
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):  # the first line is whole and more follow
            return line_table(path, file)
        raise ToolkitError(f"{path}: broken JSON: {error}") from error
    rows = data.get("data") if isinstance(data, dict) else data
    if not isinstance(rows, list):
        raise ToolkitError(f'{path}: expected a list of rows, or {{"data": [rows]}}, found {json_type(data)}')
    return Table(path, "row", len(rows), lambda i: as_row(rows[i]))


def line_table(path: Path, file) -> Table:
    """One object a line. Costs one pass for the newlines and 8 bytes a line; rows are read when drawn."""
    starts = line_starts(file)

    def get(line: int) -> dict | Rejected | None:
        start, end = starts[line : line + 2].tolist()
        file.seek(start)
        text = decode(file.read(end - start), path, line + 1)
        try:
            return as_row(json.loads(text))
        except (ValueError, RecursionError) as error:
            return Rejected("broken_json", str(error)) if text.strip() else None

    return Table(path, "line", len(starts) - 1, get)


def line_starts(file) -> np.ndarray:
    """Byte offsets of a file's lines and, last, of its end."""
    file.seek(0)
    buffer, found, offset = np.empty(BLOCK, np.uint8), [np.zeros(1, np.int64)], 0
    while count := file.readinto(buffer):
        found.append(np.flatnonzero(buffer[:count] == 10) + (offset + 1))
        offset += count
    starts = np.concatenate(found)
    return starts if starts[-1] == offset else np.append(starts, offset)


def as_row(value) -> dict | Rejected:
    """A JSON value as a row."""
    return value if type(value) is dict else Rejected("wrong_type", f"{json_type(value)}, expected an object")


def csv_table(path: Path) -> Table:
    """Cells under a header, separated by what the header has most of: commas, semicolons (Excel in Europe), tabs.

    Quoted cells may hold separators and line breaks (CRLF becomes LF)."""
    text = whole_text(path).replace("\r\n", "\n")
    csv.field_size_limit(1 << 30)  # the reader's own limit of 128 KiB is below a long reasoning trace
    delimiter = max(",;\t|", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header, *cells = [row for row in reader if row] or [[]]
    except csv.Error as error:
        raise ToolkitError(f"{path} line {reader.line_num}: broken CSV: {error}: is a quote left open?") from error
    header = [name.strip() for name in header]
    if not cells or len(set(header)) < len(header):
        problem = "is empty: no rows under the header" if not cells else "a name stands twice in the header:"
        raise ToolkitError(f"{path}: {problem} {', '.join(header)}")

    def get(i: int) -> dict | Rejected:
        if len(cells[i]) != len(header):
            return Rejected("wrong_columns", f"{len(cells[i])} cells, the header has {len(header)}")
        return dict(zip(header, cells[i], strict=True))

    return Table(path, "row", len(cells), get)


def parquet_table(path: Path) -> Table:
    """Rows of a parquet file, which `datasets` copies once to a memory-mapped file in its cache."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        refuse_bytes(pyarrow.parquet.read_schema(path), path)
        data = datasets.Dataset.from_parquet(str(path))
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise ToolkitError(f"{path}: not readable as parquet: {error.__cause__ or error}") from error
    return Table(path, "row", len(data), lambda i: without_nulls(data[i]))


def refuse_bytes(schema, where) -> None:
    """Raises ToolkitError where a column of an Arrow schema holds images or other bytes."""
    if held := [field.name for field in schema if "binary" in str(field.type)]:
        raise ToolkitError(f"{where}: column {held[0]!r} holds bytes (images, audio), only text is trained on: drop it")


def without_nulls(row: dict) -> dict:
    """A row without the nulls inside its columns: Arrow fills in keys that a nested object never had."""

    def present(value):
        if type(value) is dict:
            return {key: present(item) for key, item in value.items() if item is not None}
        return [present(item) for item in value] if type(value) is list else value

    return {name: present(value) for name, value in row.items()}


READERS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), json_table),
    **dict.fromkeys((".csv", ".tsv"), csv_table),
    ".parquet": parquet_table,
}
"""Ending → how such a file is read."""


def whole_text(path: Path) -> str:
    """The text of a file."""
    with plain(path) as file:
        return decode(file.read(), path, 1)


def decode(raw: bytes, path: Path, line: int) -> str:
    """UTF-8 bytes as text; `line` is the number of their first line. Raises ToolkitError that says how to convert."""
    try:
        return raw.decode().removeprefix("\ufeff" if line == 1 else "")
    except UnicodeDecodeError as error:
        bad = raw[raw.rfind(b"\n", 0, error.start) + 1 :].partition(b"\n")[0]
        line += raw.count(b"\n", 0, error.start)
    found = readings(path, bad)
    if not found:
        raise ToolkitError(
            f"{path} line {line}: not UTF-8, and no common encoding reads the whole file: fix or delete that line"
        )
    encoding, copy = next(iter(found)), path.with_name(f"utf8-{path.name}")
    shown = ", ".join(f"as {name} {text!r}" for name, text in found.items())
    unpack = "gunzip the file, and " if path.suffix == ".gz" else ""
    raise ToolkitError(
        f"{path} line {line}: not UTF-8. It reads {shown}. {unpack}convert it with the encoding that reads right: "
        f"iconv -f {encoding} -t utf-8 '{path}' > '{copy}' (without iconv: python -c \"from pathlib import Path; "
        f"Path(r'{copy}').write_text(Path(r'{path}').read_text('{encoding}'), 'utf-8')\")"
    )


def readings(path: Path, line: bytes) -> dict[str, str]:
    """Encoding → how it reads a line, for the encodings that decode the whole file, the likeliest first."""
    with plain(path) as file:
        raw = file.read()
    found = {}
    for name in ("utf-16",) if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else ENCODINGS:
        try:
            raw.decode(name)
        except UnicodeDecodeError:
            continue
        text = line.decode(name, errors="ignore")
        if not re.search("[\ue000-\uf8ff]", text):  # private use: only a wrong reading has it
            begin = max(0, len(text) - len(text.lstrip(string.printable)) - 10)  # shortly before what is not ASCII
            found[name] = text[begin:].strip()[:24] or text[:24]
    # Western text read as double bytes has single Chinese characters among letters, a Chinese text has words of them.
    words = {name: bool(re.search("[\u3040-\u30ff\u4e00-\u9fff]{2}", text)) for name, text in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: (not words[name], name != "cp1252"))}
