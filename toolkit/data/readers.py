"""Rows of local files, read when they are drawn: jsonl, json, csv and parquet.

path = Path("data_recipes/samples/jobs/general.csv"); number, row = next(open_files(path, data_files(path, "train")).draw(seed=1))
"""

import bisect
import bz2
import contextlib
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from toolkit.files import ToolkitError, read_json, sha256
from toolkit.records import Json, JsonObject

if TYPE_CHECKING:
    import pyarrow

SPLITS = "train|validation|valid|val|dev|test|testing|eval|evaluation"
# How `datasets` names the files of a split, whatever it is called: data/train_sft-00000-of-00003.parquet.
SHARD = re.compile(r"(?:data/)?(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
# The name of one of several files that are one table, and how many there are.
PART = re.compile(r"(.*)-\d{5}-of-(\d{5})")
# What data sets keep beside their rows.
NOT_ROWS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "configuration.json", "state.json"}
# Bytes read at a time while lines are indexed: small enough that the comparison stays in the processor's cache.
BLOCK = 1 << 22
# Bytes up to which a file of lines is held in memory.
IN_MEMORY = 1 << 24
# Rows looked at to learn a source's fields.
PEEK = 50
# What files that are not UTF-8 are tried in.
ENCODINGS = ("gb18030", "big5", "shift_jis", "cp1252")
# A quoted cell of a CSV header, which may hold other separators and line breaks.
QUOTED = re.compile(r'(?<![^,;\t])"(?:[^"]|"")*"')
NOT_ASCII = re.compile(r".{0,10}(?:[^\x00-\x7f].{0,30}|$)", re.DOTALL)
JSON_TYPES = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


# Ending of a packed file → what unpacks it, in memory.
UNPACKERS = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}


class Rejected(ValueError):
    """A row that cannot be trained on: `reason` is a slug to count by, `detail` tells people what is wrong where."""

    def __init__(self, reason: str, detail: str):
        self.reason = reason
        self.detail = detail[:500]
        super().__init__(f"{reason}: {self.detail}")


RawRow = JsonObject | Rejected
# Rows with their numbers, from 1.
Drawn = Iterator[tuple[int, RawRow]]
File = io.BytesIO | io.FileIO


@dataclass(frozen=True)
class Rows:
    """Raw rows of one source.

    `fields` are the keys of the first rows, `draw(seed)` yields every row once as (number from 1, row or Rejected),
    shuffled by the seed and read only when asked for, `where(number)` says file and line.
    """

    location: str
    fields: list[str]
    draw: Callable[[int], Drawn]
    where: Callable[[int], str]
    left_out: tuple[str, ...] = ()
    """Columns of kinds that nothing here reads (Arrow's maps)."""


@dataclass(frozen=True)
class Table:
    """One file whose rows are fetched by position from 0; `get` gives None for a blank line."""

    path: Path
    unit: str
    size: int
    get: Callable[[int], RawRow | None]
    left_out: tuple[str, ...] = ()


def json_type(value: Json) -> str:
    """What a JSON value is, in words for an error."""
    return JSON_TYPES.get(type(value), "a number")


def ending(path: Path) -> str:
    """The ending that says how a file is read (.jsonl, .csv, …), without that of a packed one; "" for other files."""
    name = path.with_suffix("") if path.suffix.lower() in UNPACKERS else path
    return name.suffix.lower() if name.suffix.lower() in READERS else ""


def data_files(path: Path, split: str) -> list[Path]:
    """The data files of a path, sorted. In a folder whose files or folders are named by split, that split's.

    Raises ToolkitError for a path without any and for several folders that each hold the split.
    """
    known = ", ".join(READERS)
    if not path.is_dir():
        if ending(path):
            return [path]
        is_zst = path.suffix.lower() == ".zst"
        way_out = f"unpack it: zstd -d {path}" if is_zst else "save a spreadsheet as CSV UTF-8, unpack an archive"
        raise ToolkitError(f"{path}: unknown kind of file: expected {known}: {way_out}")
    splits = {}  # by the name of a file of rows below the folder
    others = []
    for file in sorted(path.rglob("[!.]*")):
        name = file.relative_to(path).as_posix()
        # what is hidden is a cache, among them half-finished downloads of the Hub's client
        if is_rows(file) and "/." not in f"/{name}":
            splits[name] = split_of(name, split)
        elif file.is_file():
            others.append(name)
    # a folder without files of that split has files of no split (data.jsonl); another split's are never taken for it
    chosen = [name for name in splits if splits[name] == split] or [name for name in splits if not splits[name]]
    if not chosen:
        there = sorted({f"split {other}" for other in splits.values()}) or others[:5] or ["no files"]
        raise ToolkitError(f"{path}: expected {known} files of `split: {split}`, found {', '.join(there)}")
    # several folders that each hold the split are subsets or languages, kept apart by their author
    tops = {name.partition("/")[0] for name in chosen}
    is_told_apart = "data" in tops or any(split_of(top, split) for top in tops)
    if splits[chosen[0]] and len(tops) > 1 and not is_told_apart:
        raise ToolkitError(f"{path}: {', '.join(sorted(tops))} each hold the split {split!r}: choose one by `subset:`")
    check_shards(path, chosen)
    return [path / name for name in chosen]


def check_shards(path: Path, names: list[str]) -> None:
    """Raises ToolkitError where some of the files of a table are not there, as after a download that was cut short."""
    parts = Counter(match.groups() for match in map(PART.match, names) if match)
    for (name, total), here in parts.items():
        if here < int(total):
            raise ToolkitError(
                f"{path}: {here} of the {int(total)} files {name}-…-of-{total} are there: fetch the others, or give `path` "
                "the file itself to train on it alone"
            )


def is_rows(file: Path) -> bool:
    """Whether a file of a folder holds rows: not what data sets keep beside them, nor a cache of `save_to_disk`'s folder."""
    state = file.with_name("state.json")
    if file.suffix == ".arrow" and state.is_file():
        return file.name in [shard["filename"] for shard in read_json(state)["_data_files"]]
    return bool(ending(file)) and file.name not in NOT_ROWS and not file.is_dir()


def split_of(name: str, split: str) -> str | None:
    """The split a path below its data set is of: a shard's name, else the last word that is `split` or a known one."""
    shard = SHARD.match(name)
    # save_to_disk calls every file data-00000-of-00001.arrow; the split is its folder's name
    if shard and not name.endswith(".arrow"):
        return shard[1]
    words = re.findall(rf"(?<![^\W\d_])({re.escape(split)}|{SPLITS})(?![^\W\d_])", name, re.IGNORECASE)
    return words[-1].lower() if words else None


def fingerprint_of(path: Path, files: list[Path]) -> str:
    """SHA-256 over the files' names below `path` and their bytes."""
    try:
        parts = [f"{f.relative_to(path)}\0{sha256(f)}" for f in files]
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

    def read(position: int) -> RawRow | None:
        table, inside = locate(position)
        return table.get(inside)

    def draw(seed: int) -> Drawn:
        for position in np.random.default_rng(seed).permutation(starts[-1]).tolist():
            if (row := read(position)) is not None:
                yield position + 1, row

    def where(number: int) -> str:
        table, inside = locate(number - 1)
        return f"{table.path} {table.unit} {inside + 1}"

    first = [read(position) for position in range(min(PEEK, starts[-1]))]
    fields = list(dict.fromkeys(key for row in first if isinstance(row, dict) for key in row))
    if not fields:
        bad = next((f"holds no row that can be read: {row}" for row in first if row), "is empty: no rows")
        raise ToolkitError(
            f"{path}: {bad}. Expected a JSON object on each line (jq -c . FILE > lines.jsonl makes lines of objects), an "
            "array of objects, or CSV with a header"
        )
    left_out = dict.fromkeys(column for table in tables for column in table.left_out)
    return Rows(str(path), fields, draw, where, tuple(left_out))


def json_table(path: Path) -> Table:
    """An array of objects, or one object a line: the content decides, as people name them all."""
    # Rows are read from it as long as they are drawn. A small file from memory: every system call lets another thread take
    # the interpreter, and the tokenizers' threads then keep it for 5 ms
    in_memory = path.stat().st_size <= IN_MEMORY or path.suffix.lower() in UNPACKERS
    # a packed file has no places to go to
    file = io.BytesIO(read_bytes(path)) if in_memory else open(path, "rb", buffering=0)  # noqa: SIM115
    if ending(path) != ".json" and not file.read(BLOCK).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return line_table(path, file)
    file.seek(0)
    text = decode(file.read(), path, 1)
    try:
        rows = json.loads(text.strip() or "[]")
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):  # the first line is whole and more follow
            return line_table(path, file)
        raise ToolkitError(f"{path}: broken JSON: {error}") from error
    if not isinstance(rows, list):
        raise ToolkitError(f"{path}: expected a list of rows, found {json_type(rows)}")
    return Table(path, "row", len(rows), lambda i: as_row(rows[i]))


def read_bytes(path: Path) -> bytes:
    """A file's content, unpacked. Raises ToolkitError for a damaged archive."""
    try:
        return UNPACKERS.get(path.suffix.lower(), bytes)(path.read_bytes())
    except (EOFError, ValueError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ToolkitError(f"{path}: cannot be read or unpacked: {error}") from error


def line_table(path: Path, file: File) -> Table:
    """One object a line. Costs one pass for the newlines and 8 bytes a line; rows are read when drawn."""
    starts = line_starts(file)

    def get(line: int) -> RawRow | None:
        start, end = starts[line : line + 2].tolist()
        file.seek(start)
        text = decode(file.read(end - start), path, line + 1)
        try:
            return as_row(json.loads(text))
        except (ValueError, RecursionError) as error:
            return Rejected("broken_json", str(error)) if text.strip() else None

    return Table(path, "line", len(starts) - 1, get)


def line_starts(file: File) -> np.ndarray:
    """Byte offsets of a file's lines and, last, of its end."""
    file.seek(0)
    buffer = np.empty(BLOCK, np.uint8)
    blocks = [np.zeros(1, np.int64)]
    offset = 0
    while count := file.readinto(buffer.data):
        blocks.append(np.flatnonzero(buffer[:count] == 10) + (offset + 1))
        offset += count
    starts = np.concatenate(blocks)
    return starts if starts[-1] == offset else np.append(starts, offset)


def as_row(value: Json) -> RawRow:
    """A JSON value as a row."""
    return value if type(value) is dict else Rejected("wrong_type", f"{json_type(value)}, expected an object")


def csv_table(path: Path) -> Table:
    """Cells under a header, separated by what the header has most of outside quotes: , ; (Excel in Europe) or tabs.

    Quoted cells may hold separators and line breaks (CRLF becomes LF)."""
    # the reader would keep a carriage return inside a quoted cell
    text = decode(read_bytes(path), path, 1).replace("\r\n", "\n")
    csv.field_size_limit(1 << 30)  # the reader's own limit of 128 KiB is below a long reasoning trace
    first_line = QUOTED.sub("", text[: 1 << 16]).partition("\n")[0]
    # strict: otherwise a quote left open swallows all rows after it without an error
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first_line.count), strict=True)
    try:
        rows = [cells for cells in reader if cells]
    except csv.Error as error:
        raise ToolkitError(f"{path} line {reader.line_num}: broken CSV: {error}: is a quote left open?") from error
    header = [name.strip() for name in rows.pop(0)] if rows else []
    if len(set(header)) < len(header):
        raise ToolkitError(f"{path}: a name stands twice in the header: {', '.join(header)}")

    def get(i: int) -> RawRow:
        if len(rows[i]) != len(header):
            return Rejected("wrong_columns", f"expected {len(header)} cells, as in the header")
        return dict(zip(header, rows[i], strict=True))

    return Table(path, "row", len(rows), get)


def arrow_table(path: Path) -> Table:
    """Rows of a file of `Dataset.save_to_disk`, or of a parquet file, which `datasets` copies once to its cache; both are
    memory-mapped."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    left_out = []
    try:
        if ending(path) == ".arrow":
            data = datasets.Dataset.from_file(str(path))
            refuse_bytes(data.features.arrow_schema, path)
        else:
            meta = pyarrow.parquet.read_metadata(path)
            if not meta.num_rows:  # which `datasets` takes for a damaged file
                return Table(path, "row", 0, as_row)
            schema = meta.schema.to_arrow_schema()
            refuse_bytes(schema, path)
            left_out = [field.name for field in schema if "map<" in str(field.type)]  # which `datasets` lacks
            kept = pyarrow.schema([field for field in schema if field.name not in left_out])
            if not kept.names:
                raise ToolkitError(
                    f"{path}: the columns {', '.join(left_out)} hold maps, which are not read: write them as lists of objects, "
                    "or as JSON text"
                )
            options = {"features": datasets.Features.from_arrow_schema(kept), "columns": kept.names} if left_out else {}
            # the cache knows a file by path and time of change only, the configuration's name by its content too
            data = datasets.Dataset.from_parquet(str(path), config_name=sha256(path), **options)
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError, ValueError) as error:
        if isinstance(error, ToolkitError):
            raise
        raise ToolkitError(f"{path}: not readable as {path.suffix[1:]}: {error.__cause__ or error}") from error
    return Table(path, "row", len(data), lambda i: without_nulls(data[i]), tuple(left_out))


def refuse_bytes(schema: Iterable["pyarrow.Field"], where: Path | str) -> None:
    """Raises ToolkitError where a column of an Arrow schema holds images or other bytes."""
    for field in schema:
        if "binary" in str(field.type):
            raise ToolkitError(
                f"{where}: column {field.name!r} holds bytes (images, audio), only text is trained on: drop it"
            )


def without_nulls(row: JsonObject) -> JsonObject:
    """A row without the nulls inside its columns: Arrow fills in keys that a nested object never had."""

    return {name: _present(value) for name, value in row.items()}


def _present(value: Json) -> Json:
    if type(value) is dict:
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [*map(_present, value)] if type(value) is list else value


# Ending → how such a file is read.
READERS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), json_table),
    **dict.fromkeys((".csv", ".tsv"), csv_table),
    **dict.fromkeys((".parquet", ".arrow"), arrow_table),
}


def decode(raw: bytes, path: Path, line: int) -> str:
    """UTF-8 bytes as text; `line` is the number of their first line. Raises ToolkitError that says how to convert."""
    try:
        return raw.decode().removeprefix("\ufeff" if line == 1 else "")
    except UnicodeDecodeError as error:
        line += raw[: error.start].count(10)
        bad = raw[raw.rfind(b"\n", 0, error.start) + 1 :].partition(b"\n")[0]
    # only a person can tell which reading is right, so the line is shown in each encoding that fits
    readings = []
    for name in ("utf-16",) if bad.startswith((b"\xff\xfe", b"\xfe\xff")) else ENCODINGS:
        with contextlib.suppress(UnicodeDecodeError):
            readings.append(f"as {name} {NOT_ASCII.findall(bad.decode(name))[0]!r}")
    raise ToolkitError(
        f"{path} line {line}: not UTF-8. Its line reads {', '.join(readings) or 'in no common encoding: fix or delete it'}. "
        f"Save the file as UTF-8 from the encoding that reads right: iconv -f ENCODING -t utf-8 {path.name} > utf8-{path.name}"
    )
