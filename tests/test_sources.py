"""Rows come from any file, folder, hub or cache: each once, in the seed's order, only when they are drawn."""

import csv
import gzip
import json
import os
import re
import runpy
import shutil
import sys
import tracemalloc
import types
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from toolkit.files import ROOT, ToolkitError
from toolkit.recipe import Source
from toolkit.sources import conversations, detect, fingerprint, open_rows, stream_rows, tables
from toolkit.sources import rows as files
from toolkit.sources.rows import Rejected

ROWS = [{"query": f"What is loaf {i}, please?\nSay it.", "response": f'Loaf "{i}", 麦'} for i in range(40)]
JOBS = ROOT / "data_recipes" / "samples" / "jobs"


def write(path, rows=ROWS):
    """A file of rows in the convention its name asks for."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
        return path
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        elif kind == "json":
            json.dump(rows, file)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def drawn(path, seed=1, **source):
    return list(open_rows(Source(str(path), **source)).draw(seed))


KINDS = ["jsonl", "json", "csv", "parquet", "jsonl.gz", "json.gz", "csv.gz"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_every_row_once_in_the_seeds_order(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}")
    found = drawn(path)
    assert sorted(number for number, _ in found) == list(range(1, len(ROWS) + 1))
    assert all(row == ROWS[number - 1] for number, row in found)
    assert drawn(path) == found
    assert drawn(path, seed=2) != found
    assert open_rows(Source(str(path))).size == len(ROWS)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows_compile_to_equal_conversations_from_every_kind_of_file(tmp_path, kind):
    paths = write(tmp_path / "a.jsonl"), write(tmp_path / f"b.{kind}")
    first, second = (sorted(conversations(Source(str(p)), 1, {}), key=lambda item: item[0]) for p in paths)
    assert first == second
    assert not any(isinstance(conversation, Rejected) for _, conversation in first)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_folder_is_its_files_in_sorted_order(tmp_path, kind):
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / f"z.{kind}", ROWS[25:])
    write(tmp_path / f"a.{kind}", ROWS[:10])
    write(tmp_path / f"b.{kind}", ROWS[10:25])
    (tmp_path / "README.md").write_text("not rows")
    (tmp_path / "dataset_infos.json").write_text("{}")
    rows = open_rows(Source(str(tmp_path)))
    assert rows.size == len(ROWS)
    assert all(row == ROWS[number - 1] for number, row in rows.draw(1))
    assert "b." in rows.where(11)
    assert rows.where(11).endswith(" 1")


def test_a_folder_with_splits_gives_the_split_asked_for(tmp_path):
    for split, part in (("train", ROWS[:30]), ("test", ROWS[30:])):
        write(tmp_path / f"{split}-00000-of-00001.jsonl", part)
    assert [open_rows(Source(str(tmp_path), split=s)).size for s in ("train", "test")] == [30, 10]
    with pytest.raises(ToolkitError, match="'cot'.*found only test-00000"):
        open_rows(Source(str(tmp_path), split="cot"))


def test_held_out_files_never_join_the_training_split(tmp_path):
    write(tmp_path / "part1.jsonl", ROWS[:30])
    write(tmp_path / "test.jsonl", ROWS[30:])
    assert open_rows(Source(str(tmp_path))).size == 30


def test_few_rows_of_a_long_file_cost_little_memory(tmp_path):
    path = tmp_path / "long.jsonl"
    with open(path, "w") as file:
        for start in range(0, 300_000, 1000):
            file.write(
                "".join(f'{{"query": "{i} {"q" * 100}", "response": "r"}}\n' for i in range(start, start + 1000))
            )
    tracemalloc.start()
    found = list(islice(open_rows(Source(str(path))).draw(3), 500))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(row["query"].startswith(f"{number - 1} ") for number, row in found)
    assert peak < 25e6 < path.stat().st_size


def test_only_drawn_lines_are_read(tmp_path):
    path = write(tmp_path / "a.jsonl")
    rows = open_rows(Source(str(path)))
    draw = rows.draw(1)
    number, _ = next(draw)
    text = path.read_bytes()
    path.write_bytes(text.replace(b"loaf", b"roll"))  # in place: a row that is read only now shows it
    assert all("roll" in row["query"] for n, row in draw if n != number)


@pytest.mark.parametrize("pool", [300, 1500, 1 << 20])
def test_parquet_rows_come_once_whatever_fits_into_memory(tmp_path, monkeypatch, pool):
    monkeypatch.setattr(tables, "POOL", pool)
    path = write(tmp_path / "a.parquet")
    found = drawn(path)
    assert sorted(n for n, _ in found) == list(range(1, 41))
    assert all(row == ROWS[n - 1] for n, row in found)
    assert [n for n, _ in found] != sorted(n for n, _ in found)


def test_keys_that_arrow_filled_with_nulls_are_gone(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": {"x": 1}}]}]
    rows += [{"messages": [{"role": "user", "content": "q", "name": {"y": 2}}, {"role": "assistant", "content": "b"}]}]
    assert sorted(drawn(write(tmp_path / "a.parquet", rows))) == list(enumerate(rows, start=1))


def refused(path, **source):
    with pytest.raises(ToolkitError) as caught:
        list(conversations(Source(str(path), **source), 1, {}))
    return str(caught.value)


GOOD = b'{"query": "a", "response": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.csv", b"", "is empty"),
        ("a.json", b"[]", "is empty"),
        ("a.json", b'{"data": []}', "is empty"),
        ("a.json", b'{"rows": [1]}', "expected a list of rows"),
        ("a.json", b'[{"a": 1},', "broken JSON"),
        ("a.json", b"[" * 100_000, "broken JSON"),
        ("a.json", '[{"query": "Brötchen"}]'.encode("latin1"), "line 1: not UTF-8, perhaps latin1: convert it: iconv"),
        ("a.jsonl", GOOD + GOOD + b'{"query": "Br\xf6"}', "line 3: not UTF-8"),
        ("a.jsonl", GOOD.decode().encode("utf-16"), "not UTF-8, perhaps utf-16"),
        ("a.jsonl", b'[{"query": "a"}]', "a JSON array belongs in a .json file"),
        ("a.jsonl", b"{oops\n{again", "none of the first 2 rows can be read"),
        ("a.csv", b"query,response\n", "a header .* and no rows"),
        ("a.csv", b"query,query\na,b\n", "stand twice in the header: query"),
        ("a.csv", b'query,response\na,"open\nb,c\n', "is a quote left open"),
        ("a.csv", b"query;response\na;b\n", "expected commas, not ';'"),
        ("a.parquet", b"PAR1 but cut", "not a whole parquet file"),
        ("a.jsonl.gz", gzip.compress(GOOD * 99)[:-9], "not a whole gzip file"),
        ("a.jsonl.gz", GOOD, "not a whole gzip file"),
        ("a.txt", b"x", "unknown kind of file: expected .jsonl"),
        ("a.parquet.gz", b"x", "unknown kind of file"),
    ],
)
def test_broken_files_are_refused_with_their_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert re.search(message, refused(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"\xef\xbb\xbf" + GOOD.strip() + b"\r\n\r\n" + GOOD, [None, None]),
        ("a.json", b"\xef\xbb\xbf[" + GOOD + b"]", [None]),
        ("a.json", GOOD + GOOD, [None, None]),
        ("a.json", b'{"data": [' + GOOD + b', "text"]}', [None, "wrong_type"]),
        ("a.csv", b"\xef\xbb\xbfquery, response\r\na,b\r\n\r\nc,d\r\n", [None, None]),
        ("a.csv", b"query,response\na\na,b,c\nd,e\n", ["wrong_columns", "wrong_columns", None]),
        ("a.jsonl", GOOD + b"[1]\n3\nnull\n", [None, "wrong_type", "wrong_type", "wrong_type"]),
        ("a.jsonl", GOOD + b"[" * 100_000, [None, "broken_json"]),
        ("a.jsonl", GOOD + b'{"query": ' + b"9" * 5000 + b"}", [None, "broken_json"]),
        ("a.jsonl", GOOD + b'{"query": "' + b"x" * (17 << 20) + b'"}', [None, "row_too_long"]),
    ],
)
def test_broken_rows_do_not_stop_the_others(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    found = sorted(conversations(Source(str(tmp_path / name)), 1, {}), key=lambda item: item[0])
    assert [row.reason if isinstance(row, Rejected) else None for _, row in found] == expected


def test_numbers_are_line_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + GOOD + b"\n\n" + b"{cut")
    rejected = dict(conversations(Source(str(tmp_path / "a.jsonl")), 1, {}))
    assert rejected.keys() == {2, 5}
    assert "a.jsonl line 5:" in rejected[5].detail


def test_cells_with_windows_line_breaks_read_like_others(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'query,response\r\na,"b\r\nc"\r\n')
    assert drawn(tmp_path / "a.csv") == [(1, {"query": "a", "response": "b\nc"})]


def test_a_gz_bomb_is_refused(tmp_path):
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(30):
            file.write(bytes(4 << 20))
    assert "gz bomb" in refused(tmp_path / "bomb.jsonl.gz")


def test_links_that_loop_or_leave_the_folder_are_refused(tmp_path):
    write(tmp_path / "outside.jsonl")
    for name, target in {"loop": "loop.jsonl", "leaves": "../outside.jsonl", "up": "..", "gone": "nowhere"}.items():
        folder = tmp_path / name
        folder.mkdir()
        write(folder / "a.jsonl")
        os.symlink(target, folder / "loop.jsonl")
    assert "cannot be opened" in refused(tmp_path / "loop")
    assert "leaves the folder" in refused(tmp_path / "leaves")
    assert "a link to a folder" in refused(tmp_path / "up")
    assert "cannot be opened" in refused(tmp_path / "gone")


def test_links_inside_the_folder_are_fine(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "a.jsonl")
    os.symlink("a.jsonl", tmp_path / "data" / "b.jsonl")
    assert open_rows(Source(str(tmp_path / "data"))).size == 80


@pytest.mark.parametrize("column", [[b"\x89PNG"], [{"bytes": b"\x89PNG", "path": "a.png"}], [[b"x"]]])
def test_columns_of_images_are_refused(tmp_path, column):
    pq.write_table(pa.table({"query": ["a"], "response": ["b"], "image": column}), tmp_path / "a.parquet")
    assert "column 'image' holds bytes" in refused(tmp_path / "a.parquet")


def test_parquet_columns_must_be_one_each_and_the_same_in_all_files(tmp_path):
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["query", "query"])
    pq.write_table(twice, tmp_path / "a.parquet")
    assert "stand twice: query" in refused(tmp_path / "a.parquet")
    write(tmp_path / "a.parquet")
    pq.write_table(pa.table({"other": ["a"]}), tmp_path / "b.parquet")
    assert "b.parquet: columns other, but a.parquet has query, response" in refused(tmp_path)
    write(tmp_path / "b.parquet").rename(tmp_path / "b.jsonl")
    assert "holds parquet beside jsonl" in refused(tmp_path)


def test_row_limits_and_subsets_stand_in_the_path_as_swift_users_write_them(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a.jsonl")
    all_rows = drawn(tmp_path / "sub" / "a.jsonl")
    assert drawn(f"{tmp_path}/sub/a.jsonl#5") == all_rows[:5]
    assert drawn(f"{tmp_path}:sub#5") == drawn(f"{tmp_path}:sub", max_rows=5) == drawn(tmp_path, subset="sub")[:5]
    assert open_rows(Source(f"{tmp_path}:sub#5")).size == 5
    assert "from 1, found 0" in refused(f"{tmp_path}:sub#0")
    assert "expected a folder of that name" in refused(f"{tmp_path}:..")
    assert "expected a folder of that name" in refused(tmp_path, subset="../..")


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "chat.jsonl")
    assert "no such file" in refused("")
    assert "has chat.jsonl" in refused(tmp_path / "chats.jsonl")
    assert "A Hub name is owner/name" in refused("FineTome-100k")


def test_fingerprints_follow_the_content_and_nothing_else(tmp_path):
    first, second = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    assert (
        fingerprint(Source(str(first))) == fingerprint(Source(str(second))) == open_rows(Source(str(first))).fingerprint
    )
    before = fingerprint(Source(str(tmp_path)))
    write(second, ROWS[:-1])
    assert fingerprint(Source(str(first))) != fingerprint(Source(str(second)))
    assert fingerprint(Source(str(tmp_path))) != before


def test_fingerprints_of_long_files_see_head_tail_and_size(tmp_path):
    path, seen = tmp_path / "a.jsonl", set()
    for size, place in ((70 << 20, 0), (70 << 20, (70 << 20) - 1), (71 << 20, 5)):
        with open(path, "wb") as file:  # a sparse file: no bytes on the disk
            file.truncate(size)
            file.seek(place)
            file.write(b"x")
        seen.add(files.fingerprint_of(path, [path]))
    assert len(seen) == 3


def test_without_a_network_a_hub_source_says_what_to_do():
    message = refused("owner/bakery-100k#50")
    assert "owner/bakery-100k: the Hub is out of reach" in message
    assert "set `path` to that folder" in message


SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A dataset as the datasets library keeps it after a download."""
    import datasets

    folder = tmp_path / "owner___bakery" / "default" / "0.0.0" / SHA
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(folder / "bakery-train.arrow"), table.schema) as stream:
        stream.write_table(table)
    split = {"train": {"name": "train", "num_examples": len(ROWS), "dataset_name": "bakery"}}
    features = datasets.Features.from_arrow_schema(table.schema)
    info = datasets.DatasetInfo(
        features=features, splits=split, dataset_name="bakery", config_name="default", version="0.0.0"
    )
    info.write_to_directory(str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


@pytest.mark.usefixtures("cached")
def test_without_a_network_the_cached_copy_is_used_with_its_revision():
    rows = open_rows(Source("owner/bakery"))
    found = list(rows.draw(1))
    assert all(row == ROWS[number - 1] for number, row in found)
    assert (len(found), rows.size, rows.revision, rows.fingerprint) == (40, 40, SHA, SHA)
    assert "not revision abc" in refused("owner/bakery", revision="abc")


def test_a_stream_gives_every_row_once_in_the_seeds_order(tmp_path):
    import datasets

    path = str(write(tmp_path / "a.jsonl"))
    stream = datasets.load_dataset("json", data_files=path, split="train", streaming=True, cache_dir=str(tmp_path))
    rows = stream_rows(Source("owner/bakery"), stream, SHA)
    first, again, other = ([row["query"] for _, row in rows.draw(seed)] for seed in (1, 1, 2))
    assert sorted(first) == sorted(row["query"] for row in ROWS)
    assert first == again != other
    assert (rows.fields, rows.revision) == (["query", "response"], SHA)


def test_modelscope_without_its_client_names_the_line_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert "pip install modelscope==" in refused("modelscope://owner/bakery#5")


def test_modelscope_rows_are_read_from_the_downloaded_folder(tmp_path, monkeypatch):
    asked = []
    client = types.ModuleType("modelscope")
    client.dataset_snapshot_download = lambda name, revision: asked.append((name, revision)) or str(tmp_path)
    monkeypatch.setitem(sys.modules, "modelscope", client)
    write(tmp_path / "train.jsonl")
    assert len(drawn("modelscope://owner/bakery#5", revision="v1")) == 5
    assert asked == [("owner/bakery", "v1")]


NAMES = {"NAME": {"zh": "小麦", "en": "Wheat"}, "AUTHOR": {"zh": "面包房", "en": "the bakery"}}
SAMPLES = {
    "identity.jsonl": ("query_response", 60),
    "domain.json": ("alpaca", 80),
    "tools.jsonl": ("sharegpt", 60),
    "emoji.jsonl": ("columns", 60),
    "general.csv": ("alpaca", 80),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_rows_of_the_other_jobs_are_sound_and_distinct(name):
    columns = {"user": "question", "assistant": "answer_zh"} if name == "emoji.jsonl" else {}
    source = Source(str(JOBS / name), columns=columns)
    found = [conversation for _, conversation in conversations(source, 1, NAMES)]
    assert (detect(source, open_rows(source)), len(found)) == SAMPLES[name]
    assert not [c for c in found if isinstance(c, Rejected)]
    assert len({c["messages"][0]["content"] for c in found}) == len(found)


def test_sample_rows_are_what_their_script_writes(tmp_path):
    shutil.copy(JOBS / "make.py", tmp_path)
    runpy.run_path(str(tmp_path / "make.py"), run_name="__main__")
    for name in SAMPLES:
        assert (tmp_path / name).read_bytes() == (JOBS / name).read_bytes()
