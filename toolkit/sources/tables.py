"""Rows of local files, read when they are drawn: jsonl, json, csv and parquet.

path = Path("data/chat.jsonl"); rows = open_tables(path, data_files(path)); number, row = next(rows.draw(seed=3407))
"""

import bisect
import csv
import io
import json
import os
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from toolkit.files import ToolkitError
from toolkit.sources.rows import BLOCK, Rejected, Rows, decode, fingerprint_of, kind_name, kind_of, open_plain

MAX_ROW = 16 << 20
"""Bytes of one jsonl line; a longer one cannot be a training row and is not read into memory."""
MAX_WHOLE = 512 << 20
"""Bytes of a json or csv file, which are read whole; jsonl and parquet have no limit."""
MAX_FILES = 500
"""Files of one folder, which stay open; systems allow about 1,000."""
PEEK = 50
"""Rows looked at to learn a source's fields."""
POOL = 128 << 20
"""Bytes of parquet row groups read and shuffled together."""


@dataclass(frozen=True)
class Table:
    """One file whose rows can be fetched by position from 0; None stands for a blank line."""

    path: Path
    unit: str
    size: int
    get: Callable[[int], "dict | Rejected | None"]


def open_tables(path: Path, files: list[Path]) -> Rows:
    """Rows of jsonl, json and csv files, one after the other as one. Raises ToolkitError."""
    if len(files) > MAX_FILES:
        raise ToolkitError(
            f"{path}: {len(files)} files, of which {MAX_FILES} can stay open: join them (cat *.jsonl > all)"
        )
    readers = {"jsonl": jsonl_table, "json": json_table, "csv": csv_table}
    tables = [readers[kind_of(f)](f) for f in files]
    starts = [0, *accumulate(t.size for t in tables)]

    def locate(position: int) -> tuple[Table, int]:
        index = bisect.bisect_right(starts, position) - 1
        return tables[index], position - starts[index]

    def draw(seed: int) -> Iterator[tuple[int, "dict | Rejected"]]:
        for position in shuffled(starts[-1], seed):
            table, inside = locate(position)
            row = table.get(inside)
            if row is not None:
                yield position + 1, row

    def where(number: int) -> str:
        table, inside = locate(number - 1)
        return f"{table.path} {table.unit} {inside + 1}"

    head = [tables[0].get(i) for i in range(min(PEEK, tables[0].size))]
    return Rows(starts[-1], fields_of(head, path), fingerprint_of(path, files), None, str(path), draw, where)


def fields_of(head: list, path) -> list[str]:
    """The keys of a source's first rows, in order of appearance. Raises ToolkitError where no row can be read."""
    rows = [row for row in head if isinstance(row, dict)]
    bad = [row for row in head if isinstance(row, Rejected)]
    if not rows and not bad:
        raise ToolkitError(f"{path}: is empty: expected at least one row")
    if not rows:
        raise ToolkitError(f"{path}: none of the first {len(head)} rows can be read: {bad[0]}")
    return list(dict.fromkeys(str(key) for row in rows for key in row))


def shuffled(size: int, seed: int) -> Iterator[int]:
    """0 … size-1 in the seed's order; 4 bytes a row."""
    order = np.random.default_rng(seed).permutation(np.arange(size, dtype=np.int32 if size < 2**31 else np.int64))
    for start in range(0, size, 4096):
        yield from order[start : start + 4096].tolist()


def jsonl_table(path: Path) -> Table:
    """One JSON object a line. Costs one pass for the newlines and 8 bytes a line; rows are read when drawn."""
    file = open_plain(path)
    starts = line_starts(file)

    def get(line: int) -> "dict | Rejected | None":
        start = int(starts[line])
        length = int(starts[line + 1]) - start
        if length > MAX_ROW:
            return Rejected("row_too_long", f"{length:,} bytes; the limit is {MAX_ROW:,}")
        file.seek(start)
        return parse_line(file.read(length), path, line + 1)

    table = Table(path, "line", len(starts) - 1, get)
    weakref.finalize(table, file.close)
    if isinstance(first := get(0), Rejected) and first.reason == "wrong_type":
        raise ToolkitError(f"{path} line 1: {first.detail} a line: a JSON array belongs in a .json file")
    return table


def line_starts(file):
    """Byte offsets of a file's lines and, last, of its end, as an int64 array of lines + 1."""
    file.seek(0)
    buffer, found, offset = np.empty(BLOCK, np.uint8), [np.zeros(1, np.int64)], 0
    while count := file.readinto(buffer):
        found.append(np.flatnonzero(buffer[:count] == 10) + (offset + 1))
        offset += count
    starts = np.concatenate(found)
    return starts if starts[-1] == offset else np.append(starts, offset)


def parse_line(raw: bytes, path: Path, line: int) -> "dict | Rejected | None":
    """One line's object. Raises ToolkitError for bytes that are not UTF-8: that is the whole file's trouble."""
    text = decode(raw, path, line).removeprefix("\ufeff" if line == 1 else "")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Rejected("broken_json", str(error)) if text.strip() else None
    return row if type(row) is dict else Rejected("wrong_type", f"{kind_name(row)}, expected an object")


def _whole(path: Path) -> str:
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_WHOLE:
            raise ToolkitError(
                f"{path}: {size >> 20} MiB; json and csv are read whole, up to {MAX_WHOLE >> 20} MiB: "
                "convert it to jsonl or parquet, which have no limit"
            )
        file.seek(0)
        return decode(file.read(), path, 1).removeprefix("\ufeff")


def json_table(path: Path) -> Table:
    """A JSON array of objects, {"data": [objects]}, or, as many keep it, one object a line under the name .json."""
    text = _whole(path)
    first, _, rest = text.lstrip().partition("\n")
    if rest.strip() and _is_object(first):
        return jsonl_table(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ToolkitError(f"{path}: broken JSON: {error}") from error
    rows = data.get("data") if isinstance(data, dict) else data
    if not isinstance(rows, list):
        raise ToolkitError(f'{path}: expected a list of rows, or {{"data": [rows]}}, found {kind_name(data)}')

    def get(i: int) -> "dict | Rejected":
        row = rows[i]
        return row if type(row) is dict else Rejected("wrong_type", f"{kind_name(row)}, expected an object")

    return Table(path, "row", len(rows), get)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def csv_table(path: Path) -> Table:
    """Comma-separated cells under a header; quoted cells may hold commas and line breaks (CRLF becomes LF)."""
    csv.field_size_limit(MAX_WHOLE)  # the reader's own limit of 128 KiB is below a long reasoning trace
    text = _whole(path).replace("\r\n", "\n")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        cells = [row for row in reader if row]
    except csv.Error as error:
        raise ToolkitError(f"{path} line {reader.line_num}: broken CSV: {error}: is a quote left open?") from error
    header = [name.strip() for name in cells[0]] if cells else []
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise ToolkitError(f"{path}: column names stand twice in the header: {', '.join(sorted(twice))}")
    if len(cells) < 2:
        raise ToolkitError(f"{path}: is empty: a header ({', '.join(header)}) and no rows")
    if len(header) == 1 and (other := re.search(r"[;\t|]", header[0])):
        raise ToolkitError(f"{path}: the header has one column, {header[0]!r}: expected commas, not {other.group()!r}")

    def get(i: int) -> "dict | Rejected":
        row = cells[i + 1]
        if len(row) != len(header):
            return Rejected("wrong_columns", f"{len(row)} cells, the header has {len(header)}")
        return dict(zip(header, row, strict=True))

    return Table(path, "row", len(cells) - 1, get)


def open_parquet(path: Path, files: list[Path]) -> Rows:
    """Rows of parquet files. Row groups come in the seed's order, about 128 MiB together, shuffled within that.

    A larger row group is read in several passes, each keeping a random part of it: memory stays flat.
    Raises ToolkitError, also for columns of images or other bytes.
    """
    groups, fields = [], None
    for file in files:
        meta, names = _parquet_meta(file)
        if fields not in (None, names):
            raise ToolkitError(f"{file}: columns {', '.join(names)}, but {files[0].name} has {', '.join(fields)}")
        fields = names
        groups += [(file, i, meta.row_group(i)) for i in range(meta.num_row_groups)]
    starts = [0, *accumulate(group.num_rows for _, _, group in groups)]
    if not starts[-1]:
        raise ToolkitError(f"{path}: is empty: expected at least one row")

    def draw(seed: int) -> Iterator[tuple[int, dict]]:
        rng = np.random.default_rng(seed)
        for pool, passes in _pools(groups, rng):
            numbers = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in pool])
            for part in np.array_split(rng.permutation(len(numbers)), passes):
                order = np.sort(part)
                kept = _kept_rows([groups[i][:2] for i in pool], order)
                for some in np.array_split(part, range(256, len(part), 256)):
                    rows = kept.take(np.searchsorted(order, some)).to_pylist()
                    yield from zip((numbers[some] + 1).tolist(), map(without_nulls, rows), strict=True)

    def where(number: int) -> str:
        index = bisect.bisect_right(starts, number - 1) - 1
        first = next(i for i, group in enumerate(groups) if group[0] == groups[index][0])
        return f"{groups[index][0]} row {number - starts[first]}"

    return Rows(starts[-1], fields, fingerprint_of(path, files), None, str(path), draw, where)


def _parquet_meta(file: Path):
    """A parquet file's metadata and column names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        meta = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise ToolkitError(f"{file}: not a whole parquet file: {error}") from error
    schema = meta.schema.to_arrow_schema()
    twice = {name for name in schema.names if schema.names.count(name) > 1}
    if twice:
        raise ToolkitError(f"{file}: column names stand twice: {', '.join(sorted(twice))}")
    if held := [field.name for field in schema if holds_bytes(field.type)]:
        raise ToolkitError(f"{file}: column {held[0]!r} holds bytes (images, audio), only text is trained on: drop it")
    return meta, schema.names


def holds_bytes(kind) -> bool:
    """Whether an Arrow type has bytes in it, as columns of images and audio do."""
    import pyarrow as pa

    if pa.types.is_nested(kind):
        return any(holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _pools(groups: list, rng) -> Iterator[tuple[list[int], int]]:
    """(indices of row groups read together, passes over them), all groups in random order."""
    pool, size = [], 0
    for index in rng.permutation(len(groups)).tolist():
        added = groups[index][2].total_byte_size
        if pool and size + added > POOL:
            yield pool, -(-size // POOL)
            pool, size = [], 0
        pool, size = [*pool, index], size + added
    yield pool, max(1, -(-size // POOL))


def _kept_rows(groups: list, order: np.ndarray):
    """The rows at the ascending positions `order`, counted over all the groups, as one Arrow table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kept, offset = [], 0
    for file, index in groups:
        # Without pre_buffer a row group is read page by page, not as a whole.
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as parquet:
            for batch in parquet.iter_batches(4096, row_groups=[index]):
                first, last = np.searchsorted(order, (offset, offset + len(batch)))
                kept.append(pa.Table.from_batches([batch.take(pa.array(order[first:last] - offset))]))
                offset += len(batch)
    return pa.concat_tables(kept, promote_options="permissive").combine_chunks()


def without_nulls(row: dict) -> dict:
    """A row without the nulls inside its columns: Arrow fills in keys that a nested object never had."""
    return {name: _present(value) for name, value in row.items()}


def _present(value):
    if type(value) is dict:
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if type(value) is list else value
