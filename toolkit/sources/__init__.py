"""Rows from the Hub, ModelScope or a local file, each turned into one canonical conversation.

for number, conversation in conversations(Source("data/chat.jsonl"), seed=3407, placeholders={}): ...
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from toolkit.files import ToolkitError, find
from toolkit.recipe import Source
from toolkit.sources.formats import canonical, recognise
from toolkit.sources.rows import Rejected, Rows, data_files, fingerprint_of, kind_of
from toolkit.sources.tables import holds_bytes, open_parquet, open_tables, shuffled, without_nulls

__all__ = ["Rejected", "Rows", "canonical", "conversations", "detect", "fingerprint", "open_rows"]

HUB_BUFFER = 2_000
"""Rows of a stream that are shuffled together, after its files are: so many come down before the first is drawn."""
PLACEHOLDERS = ("NAME", "AUTHOR")
OFFLINE = (
    "Without a network: download it elsewhere (hf download --repo-type dataset NAME --local-dir data/NAME), set `path` "
    "to that folder, or start from the rows that ship in data_recipes/samples/"
)


def conversations(source: Source, seed: int, placeholders: dict) -> Iterator[tuple[int, dict | Rejected]]:
    """(number, canonical conversation or Rejected) of every row, shuffled by the seed, read as they are asked for.

    Raises ToolkitError for trouble with the whole source and for an unfilled {{NAME}} or {{AUTHOR}}.
    """
    if unknown := placeholders.keys() - set(PLACEHOLDERS):
        raise ToolkitError(f"data.placeholders.{min(unknown)}: expected {' or '.join(PLACEHOLDERS)}")
    rows = open_rows(source)
    format = detect(source, rows)
    for number, row in rows.draw(seed):
        try:
            if isinstance(row, Rejected):
                raise row
            yield number, canonical(row, format, source.columns, placeholders)
        except Rejected as rejected:
            place = rows.where(number)
            if rejected.reason == "unfilled_placeholder":
                raise ToolkitError(f"{place}: {rejected.detail}") from rejected
            yield number, Rejected(rejected.reason, f"{place}: {rejected.detail}")


def detect(source: Source, rows: Rows) -> str:
    """The name of a source's format, given or found by its fields. Raises ToolkitError where it is not clear."""
    return recognise(rows.fields, source.format, source.columns, rows.location)


def open_rows(source: Source) -> Rows:
    """Raw rows of `path`, `path:subset` or `path#500`: local (from here or the project's root), ModelScope or Hub.

    `#500` and `max_rows` keep that many rows of the seed's order. Raises ToolkitError.
    """
    source, found = _located(source)
    if found:
        rows = _open_local(found, source)
    elif source.path.startswith("modelscope://"):
        rows = _open_local(_modelscope_folder(source), source)
    else:
        rows = _open_hub(source)
    return rows if source.max_rows is None else _limited(rows, source.max_rows)


def fingerprint(source: Source) -> str:
    """What `open_rows(source).fingerprint` will be, without reading rows: quick for local files of any size."""
    source, found = _located(source)
    return fingerprint_of(*_local_files(found, source)) if found else open_rows(source).fingerprint


def _located(source: Source) -> tuple[Source, Path | None]:
    """The source with `#N` and `:subset` taken off its path, and the local file or folder it means, if any."""
    path, found = source.path, find(source.path) if source.path.strip() else None
    if not found and (match := re.fullmatch(r"(.+)#(\d+)", path)):
        limit = int(match[2])
        source = replace(source, path=(path := match[1]), max_rows=min(limit, source.max_rows or limit))
        found = find(path)
    if not found and (match := re.fullmatch(r"(.+[^:/]):([\w.\-]+)", path)):
        source = replace(source, path=(path := match[1]), subset=match[2])
        found = find(path)
    if not found and _looks_local(path):
        raise ToolkitError(
            f"{path}: no such file or folder, from here or from the project's root{_beside(path)}. A Hub name is owner/name"
        )
    return source, found


def _looks_local(path: str) -> bool:
    if path.startswith("modelscope://"):
        return False
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or kind_of(Path(path)) is not None


def _beside(path: str) -> str:
    folder = find(Path(path).parent)
    names = sorted(f.name for f in folder.iterdir() if kind_of(f)) if folder and folder.is_dir() else []
    return f"; {folder} has {', '.join(names[:8])}" if names else ""


def _limited(rows: Rows, limit: int) -> Rows:
    if limit < 1:
        raise ToolkitError(f"{rows.location}: expected a number of rows from 1, found {limit}")
    size = limit if rows.size is None else min(limit, rows.size)
    return replace(rows, size=size, draw=lambda seed: islice(rows.draw(seed), limit))


def _local_files(path: Path, source: Source) -> tuple[Path, list[Path]]:
    if source.subset:
        folder = path / source.subset
        if not folder.is_dir() or not folder.resolve().is_relative_to(path.resolve()):
            raise ToolkitError(f"{path}: subset {source.subset!r}: expected a folder of that name in it")
        path = folder
    return path, data_files(path, source.split)


def _open_local(path: Path, source: Source) -> Rows:
    path, files = _local_files(path, source)
    kinds = {kind_of(f) for f in files}
    if "parquet" not in kinds:
        return open_tables(path, files)
    if len(kinds) > 1:
        raise ToolkitError(f"{path}: holds parquet beside {', '.join(sorted(kinds - {'parquet'}))}: name one file")
    return open_parquet(path, files)


def _modelscope_folder(source: Source) -> Path:
    """ModelScope has no stream that stands still between versions: the data set is downloaded, once."""
    try:
        from modelscope import dataset_snapshot_download
    except ModuleNotFoundError as error:
        raise ToolkitError(f"{source.path}: needs ModelScope's client: pip install modelscope==1.40.2") from error
    name = source.path.removeprefix("modelscope://")
    try:
        return Path(dataset_snapshot_download(name, revision=source.revision or "master"))
    except Exception as error:  # the client has its own kinds for network, names and rights
        raise ToolkitError(f"{source.path}: not reachable: {error}. {OFFLINE}") from error


def _open_hub(source: Source) -> Rows:
    """A stream of the Hub's rows at one commit, or the copy in the local cache where the Hub is out of reach."""
    import datasets
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        sha = huggingface_hub.HfApi().dataset_info(source.path, revision=source.revision).sha
        stream = datasets.load_dataset(source.path, source.subset, split=source.split, revision=sha, streaming=True)
        return stream_rows(source, stream, sha)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ToolkitError(
            f"{source.path}: no such dataset or revision on the Hub, or not yours to see (hf auth login). "
            f"For a local file, give its path with the ending. {error}"
        ) from error
    except (OSError, httpx.HTTPError) as error:
        return _cached_rows(source, error)
    except ToolkitError:
        raise
    except ValueError as error:  # unknown subset or split: the message lists the known ones
        raise ToolkitError(f"{source.path}: {error}") from error


def stream_rows(source: Source, stream, revision: str) -> Rows:
    """Rows of a datasets.IterableDataset; numbers count the rows drawn, as a stream has no other."""
    import httpx

    _refuse_bytes(source, stream.features)
    fields = list(stream.column_names or next(iter(stream)))
    known = (stream.info.splits or {}).get(source.split)

    def draw(seed: int) -> Iterator[tuple[int, dict]]:
        try:
            for number, row in enumerate(stream.shuffle(seed=seed, buffer_size=HUB_BUFFER), start=1):
                yield number, without_nulls(row)
        except (OSError, httpx.HTTPError) as error:
            raise ToolkitError(f"{source.path}: the stream broke off: {error}. {OFFLINE}") from error

    where = f"{source.path}@{revision[:12]}"
    size = known.num_examples if known else None
    return Rows(size, fields, revision, revision, where, draw, lambda number: f"{where} drawn row {number}")


def _cached_rows(source: Source, cause: Exception) -> Rows:
    """Rows of a dataset that the datasets library has kept on this machine."""
    from datasets.packaged_modules.cache.cache import Cache

    try:
        builder = Cache(
            repo_id=source.path,
            config_name=source.subset,
            version="auto",
            hash="auto",
            dataset_name=source.path.split("/")[-1],
        )
        dataset = builder.as_dataset(source.split)
    except ValueError as error:
        raise ToolkitError(
            f"{source.path}: the Hub is out of reach ({cause}) and no cached copy fits ({error}). {OFFLINE}"
        ) from error
    if source.revision and not builder.hash.startswith(source.revision):
        raise ToolkitError(
            f"{source.path}: the Hub is out of reach and the cached copy is {builder.hash}, "
            f"not revision {source.revision}"
        )
    _refuse_bytes(source, dataset.features)

    def draw(seed: int) -> Iterator[tuple[int, dict]]:
        order = shuffled(len(dataset), seed)
        while some := list(islice(order, 256)):
            columns = dataset[some]
            for number, *values in zip(some, *columns.values(), strict=True):
                yield number + 1, without_nulls(dict(zip(columns, values, strict=True)))

    where = f"{source.path}@{builder.hash[:12]}"
    return Rows(
        len(dataset),
        dataset.column_names,
        builder.hash,
        builder.hash,
        where,
        draw,
        lambda number: f"{where} row {number}",
    )


def _refuse_bytes(source: Source, features) -> None:
    held = [field.name for field in features.arrow_schema if holds_bytes(field.type)] if features else []
    if held:
        raise ToolkitError(f"{source.path}: column {held[0]!r} holds bytes (images, audio), only text is trained on")
