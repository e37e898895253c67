"""Rows from the Hub, ModelScope or a local file, each turned into one canonical conversation.

source = Source("data_recipes/samples/jobs/domain.json"); number, conversation = next(conversations(source, 3407, {}))
"""

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.data.conversation import Fillings, Placeholders
from toolkit.data.formats import canonical, reader_of, recognise
from toolkit.data.readers import (
    Drawn,
    Rejected,
    Rows,
    data_files,
    ending,
    fingerprint_of,
    open_files,
    refuse_bytes,
    without_nulls,
)
from toolkit.files import ToolkitError, check_regular, find
from toolkit.recipe import Source
from toolkit.records import Conversation, JsonObject

if TYPE_CHECKING:
    import datasets

__all__ = ["Rejected", "Rows", "canonical", "conversations", "detect", "fingerprint", "open_rows", "split_count"]

# Rows of a stream that are shuffled together, after its files are: so many come down before the first is drawn.
HUB_BUFFER = 2_000
MODELSCOPE = "modelscope://"
# owner/name; a longer path, and one that begins like a file's, is meant as a file's.
HUB_NAME = re.compile(r"(?!.{97})[^./~][^/]*/[^/]+")
# Subsets of swift/self-cognition that ms-swift computes while it loads: no file has them.
SWIFT_SUBSETS = {
    "empty_think": "leave `:empty_think` out and set `mode: non_thinking`: the empty think block is then in the prompt, "
    "where inference puts it",
    "qwen3": "leave `:qwen3` out and set `mode: non_thinking` and `soft_switch: 1.0`, which adds /no_think to the question",
}
OFFLINE = (
    "Without a network: download it elsewhere (hf download --repo-type dataset NAME --local-dir data/NAME), set `path` "
    "to that folder, or start from the rows that ship in data_recipes/samples/"
)


@dataclass(frozen=True)
class ReadRow:
    """One row of a source, read."""

    number: int
    """Its place in the source, from 1."""
    conversation: Conversation | Rejected
    not_read: list[str] = field(default_factory=list)
    """Keys that no rule reads: "row label", "turn loss"."""


def conversations(source: Source, seed: int, placeholders: Fillings) -> Iterator[tuple[int, Conversation | Rejected]]:
    """(number, canonical conversation or Rejected) of every row, shuffled by the seed, read as they are asked for.

    Raises ToolkitError for trouble with the whole source and for an unfilled {{NAME}} or {{AUTHOR}}.
    """
    return ((row.number, row.conversation) for row in read_rows(source, seed, placeholders))


def read_rows(source: Source, seed: int, placeholders: Fillings) -> Iterator[ReadRow]:
    """The same with the keys that nothing read."""
    rows = open_rows(source)
    # the source's own names go before the recipe's, and count in every spelling
    own = {name.replace("AUTHOER", "AUTHOR"): text for name, text in source.placeholders.items()}
    fill = Placeholders({**placeholders, **own}, tuple(own))
    reader = reader_of(detect(source, rows), source.columns, fill, source.system)
    left_out = [f"row {column}" for column in rows.left_out]
    for number, row in rows.draw(seed):
        try:
            if isinstance(row, Rejected):
                raise row
            conversation, not_read = reader.read(row)
            yield ReadRow(number, conversation, left_out + not_read)
            continue
        except RecursionError:
            rejected = Rejected("too_deep", "objects inside objects, about 1,000 levels")
        except Rejected as error:
            rejected = error
        detail = f"{rows.where(number)}: {rejected.detail}"
        # usually in every row, and one recipe key fixes them all
        if rejected.reason == "unfilled_placeholder":
            raise ToolkitError(detail) from rejected
        yield ReadRow(number, Rejected(rejected.reason, detail))


def detect(source: Source, rows: Rows) -> str:
    """The name of a source's format, given or found by its fields. Raises ToolkitError where it is not clear."""
    maps = f" (without {', '.join(rows.left_out)}: maps are not read)" if rows.left_out else ""
    return recognise(rows.fields, source.format, source.columns, rows.location + maps)


def open_rows(source: Source) -> Rows:
    """Raw rows of `path`, `path:subset` or `path#500`: local (from here), ModelScope or Hub.

    `#500` and `max_rows` keep that many rows of the seed's order. Raises ToolkitError.
    """
    source, limit = split_count(source)
    place, folder, files = locate(source)
    rows = open_files(folder, files) if folder else stream_rows(source, *_hub_stream(place))
    return rows if limit is None else replace(rows, draw=lambda seed: islice(rows.draw(seed), limit))


def split_count(source: Source) -> tuple[Source, int | None]:
    """A source without its limit, and the limit: N of `path#N` or `max_rows`."""
    path = source.path
    limit = source.max_rows
    # a file may really be called notes#1.jsonl
    if not find(path) and (match := re.fullmatch(r"(.+)#([1-9]\d*)", path)):
        path = match[1]
        count = int(match[2])
        limit = min(count, limit or count)
    return replace(source, path=path, max_rows=None), limit


def fingerprint(source: Source) -> str:
    """SHA-256 of a local source's files, or the commit of one on the Hub; no rows are read."""
    source, folder, files = locate(split_count(source)[0])
    return fingerprint_of(folder, files) if folder else _hub_stream(source)[1]


def locate(source: Source) -> tuple[Source, Path | None, list[Path]]:
    """(the source with `:subset` taken off its path, its file or folder here, the files of its split); None and no file for
    a data set on the Hub. Raises ToolkitError for a path that is neither here nor a name of the Hub's form."""
    path = source.path
    # a path that exists is taken as it is, a colon in it too (C:\data)
    if not find(path) and (match := re.fullmatch(r"(.+[^:/]):([\w.\-]+)", path)):
        path = match[1]
        source = replace(source, path=path, subset=match[2])
    folder = find(path) if path.strip() else None
    if not folder and source.subset in SWIFT_SUBSETS:
        raise ToolkitError(f"{path}:{source.subset}: only ms-swift has this subset: {SWIFT_SUBSETS[source.subset]}")
    if path.startswith(MODELSCOPE):
        folder = _modelscope_folder(path, source.revision)
    if not folder and (not HUB_NAME.fullmatch(path) or ending(Path(path))):
        near = find(Path(path).parent) or Path()
        names = sorted(file.name for file in near.glob("*") if ending(file))[:8]
        beside = f"; {near} has {', '.join(names)}" if names else ""
        raise ToolkitError(f"{path[:200]}: no such file or folder here{beside}. A Hub name is owner/name")
    if folder and source.subset:
        folder /= source.subset
        if not folder.is_dir():
            raise ToolkitError(
                f"{folder}: no such folder: the subset {source.subset!r} of a local path is a folder in it"
            )
    files = data_files(folder, source.split) if folder else []
    for file in files:
        check_regular(file)
    return source, folder, files


def _modelscope_folder(path: str, revision: str | None) -> Path:
    """ModelScope has no stream that stands still between versions: the data set is downloaded, once."""
    try:
        from modelscope import dataset_snapshot_download

        return Path(dataset_snapshot_download(path.removeprefix(MODELSCOPE), revision=revision or "master"))
    except ModuleNotFoundError as error:
        raise ToolkitError(f"{path}: needs ModelScope's client: pip install modelscope==1.40.2") from error
    except Exception as error:  # the client has its own kinds for network, names and rights
        raise ToolkitError(f"{path}: not reachable: {error}. {OFFLINE}") from error


@functools.lru_cache  # one look at the Hub per process: fingerprint and rows are of the same commit
def _hub_builder(path: str, subset: str | None, revision: str | None) -> "datasets.DatasetBuilder":
    """The `datasets` builder of a Hub data set; of the copy in its cache where the Hub is out of reach."""
    import datasets

    return datasets.load_dataset_builder(path, subset, revision=revision)


def _hub_stream(source: Source) -> tuple["datasets.IterableDataset", str]:
    """(stream of a Hub data set, or of the copy in the cache of `datasets`, its commit). Raises ToolkitError."""
    from datasets.packaged_modules.cache.cache import Cache

    try:
        builder = _hub_builder(source.path, source.subset, source.revision)
        stream = builder.as_streaming_dataset(source.split)
    except ValueError as error:  # an unknown subset or split, of which the message lists the known ones; a broken name
        raise ToolkitError(f"{source.path}: {error}") from error
    except OSError as error:
        raise ToolkitError(
            f"{source.path}: not readable from the Hub, and not in its cache here ({error}). If it is private: hf auth "
            f"login. If it is ModelScope's: {MODELSCOPE}{source.path}. {OFFLINE}"
        ) from error
    commit = str(builder.hash)
    if isinstance(builder, Cache) and not commit.startswith(source.revision or ""):
        raise ToolkitError(
            f"{source.path}: the Hub is out of reach and the cached copy is {commit}, not revision {source.revision}"
        )
    return stream, commit


def stream_rows(source: Source, stream: "datasets.IterableDataset", revision: str) -> Rows:
    """Rows of a datasets.IterableDataset; numbers count the rows drawn, as a stream has no other."""
    import httpx

    where = f"{source.path}@{revision[:12]}"

    def rows(some: Iterable[JsonObject]) -> Iterator[JsonObject]:
        try:
            yield from map(without_nulls, some)
        except (OSError, ValueError, httpx.HTTPError) as error:
            raise ToolkitError(f"{where}: the stream broke off: {error.__cause__ or error}. {OFFLINE}") from error

    if stream.features:
        refuse_bytes(stream.features.arrow_schema, where)
    first = list(rows(stream.take(1)))  # a stream has no length
    if not first:
        raise ToolkitError(f"{where}: is empty: expected at least one row")

    def draw(seed: int) -> Drawn:
        return enumerate(rows(stream.shuffle(seed=seed, buffer_size=HUB_BUFFER)), start=1)

    fields = list(stream.column_names or first[0])
    return Rows(where, fields, draw, lambda number: f"{where} drawn row {number}")
