"""Rows come from any file, folder, hub or cache: each once, in the seed's order, only when they are drawn."""

import csv
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tracemalloc
import types
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings

import toolkit.data.sources
from tests.support import hub_stand_in, row_strategies
from toolkit.data import readers
from toolkit.data.sources import Rejected, conversations, detect, fingerprint, open_rows, stream_rows
from toolkit.files import ROOT, ToolkitError
from toolkit.recipe import Source

ROWS = [{"query": f"What is loaf {i}, please?\nSay it.", "response": f'Loaf "{i}", 麦'} for i in range(40)]
JOBS = ROOT / "data_recipes" / "samples" / "jobs"


def write(path, rows=ROWS):
    """A file of rows in the convention its name asks for."""
    kind = path.suffix.removeprefix(".")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
        return path
    with open(path, "w", encoding="utf-8", newline="") as file:
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


KINDS = ["jsonl", "json", "csv", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_every_row_once_in_the_seeds_order(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}")
    found = drawn(path)
    assert sorted(number for number, _ in found) == list(range(1, len(ROWS) + 1))
    assert all(row == ROWS[number - 1] for number, row in found)
    assert drawn(path) == found
    assert drawn(path, seed=2) != found


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
    assert dict(rows.draw(1)) == dict(enumerate(ROWS, start=1))
    assert "b." in rows.where(11)
    assert rows.where(11).endswith(" 1")


def test_a_folder_with_splits_gives_the_split_asked_for(tmp_path):
    for split, part in (("train", ROWS[:30]), ("test", ROWS[30:])):
        write(tmp_path / f"{split}-00000-of-00001.jsonl", part)
    assert [len(drawn(tmp_path, split=s)) for s in ("train", "test")] == [30, 10]
    with pytest.raises(ToolkitError, match="split: cot`, found split test, split train"):
        open_rows(Source(str(tmp_path), split="cot"))


def test_held_out_files_never_join_the_training_split(tmp_path):
    write(tmp_path / "part1.jsonl", ROWS[:30])
    write(tmp_path / "test.jsonl", ROWS[30:])
    assert len(drawn(tmp_path)) == 30


def tree(folder, names):
    """A file of one row at every path; the row's question is the path."""
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, [{"query": name, "response": "r"}])


ULTRA = " ".join(
    f"data/{split}-0000{i}-of-00002-a1b2.parquet" for split in ("test_sft", "train_gen", "train_sft") for i in (0, 1)
)


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        ("train/0000.parquet test/0000.parquet", "train", "train/0000.parquet"),
        ("test/a.jsonl train/a.jsonl validation/a.jsonl", "train", "train/a.jsonl"),
        ("test/a.jsonl train/a.jsonl validation/a.jsonl", "validation", "validation/a.jsonl"),
        ("my_test.jsonl my_train.jsonl", "train", "my_train.jsonl"),
        ("my_test.jsonl my_train.jsonl", "test", "my_test.jsonl"),
        ("training_data/test.jsonl training_data/train.jsonl", "train", "training_data/train.jsonl"),
        ("eval/train-1.jsonl testing.jsonl training.jsonl", "train", "eval/train-1.jsonl"),
        ("testing.jsonl training.jsonl", "train", "training.jsonl"),
        ("latest/contest.jsonl retrain.jsonl", "train", "latest/contest.jsonl retrain.jsonl"),
        ("train-1/a.jsonl train-2/a.jsonl", "train", "train-1/a.jsonl train-2/a.jsonl"),
        ("test/part-00000-of-00001.jsonl train/part-00000-of-00001.jsonl", "train", "train/part-00000-of-00001.jsonl"),
        ("en/a.jsonl zh/a.jsonl", "train", "en/a.jsonl zh/a.jsonl"),
        ("cot.jsonl train.jsonl", "cot", "cot.jsonl"),
        (ULTRA, "train_sft", "data/train_sft-00000-of-00002-a1b2.parquet data/train_sft-00001-of-00002-a1b2.parquet"),
    ],
)
def test_folders_and_names_tell_the_splits_apart(tmp_path, names, split, expected):
    tree(tmp_path, names)
    assert sorted(row["query"] for _, row in drawn(tmp_path, split=split)) == expected.split()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (ULTRA, "split: train`, found split test_sft, split train_gen, split train_sft"),
        ("my_test.jsonl dev/a.jsonl", "found split dev, split test"),
        ("notes.md", "found notes.md"),
        ("main/train-0.jsonl socratic/train-0.jsonl", "main, socratic .*choose one by `subset:`"),
        ("main/train/a.jsonl socratic/train/a.jsonl main/test/a.jsonl", "main, socratic .*choose one by `subset:`"),
    ],
)
def test_a_folder_without_that_split_or_with_one_in_every_subset_says_what_it_has(tmp_path, names, message):
    tree(tmp_path, names)
    assert re.search(message, refused(tmp_path))
    if "subset" in message:
        assert len(drawn(tmp_path, subset="main")) == 1


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


def test_only_drawn_lines_of_a_large_file_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "IN_MEMORY", 0)
    path = write(tmp_path / "a.jsonl")
    rows = open_rows(Source(str(path)))
    draw = rows.draw(1)
    number, _ = next(draw)
    text = path.read_bytes()
    path.write_bytes(text.replace(b"loaf", b"roll"))  # in place: a row that is read only now shows it
    assert all("roll" in row["query"] for n, row in draw if n != number)


def test_keys_that_arrow_filled_with_nulls_are_gone(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": {"x": 1}}]}]
    rows += [{"messages": [{"role": "user", "content": "q", "name": {"y": 2}}, {"role": "assistant", "content": "b"}]}]
    assert sorted(drawn(write(tmp_path / "a.parquet", rows))) == list(enumerate(rows, start=1))


def test_a_parquet_file_replaced_within_the_same_second_gives_its_new_rows(tmp_path):
    for rows in (ROWS[:5], ROWS[5:]):
        path = write(tmp_path / "a.parquet", rows)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert sorted(row["query"] for _, row in drawn(path)) == sorted(row["query"] for row in rows)


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
        ("a.json", b'{"rows": [1]}', "expected a list of rows"),
        ("a.json", b'[{"a": 1},', "broken JSON"),
        ("a.json", b"[" * 100_000, "broken JSON"),
        (
            "a.json",
            '[{"query": "Brötchen"}]'.encode("latin1"),
            "line 1: not UTF-8. Its line reads .*as cp1252 '.*Brötchen",
        ),
        ("a.jsonl", GOOD + '{"query": "麦"}'.encode() + b'\n{"query": "\xff\x81"}', "line 3: not UTF-8.*in no common"),
        ("a.jsonl", GOOD + GOOD + b'{"query": "Br\xf6"}', "line 3: not UTF-8"),
        ("a.jsonl", GOOD.decode().encode("utf-16"), "line 1: not UTF-8. Its line reads as utf-16 "),
        (
            "a.jsonl",
            b'{\n  "query": "a",\n  "response": "b"\n}\n' * 2,
            "no row that can be read.*jq -c",
        ),
        ("a.jsonl", b'[{"query": "a"},\n', "broken JSON"),
        ("a.jsonl", b'{"text": "Bread is baked."}\n', "split it into `prompt` and `completion`"),
        ("a.jsonl", b"{oops\n{again", "no row that can be read: broken_json"),
        ("a.csv", b"query,response\n", "is empty"),
        ("a.csv", b"query,query\na,b\n", "stands twice in the header: query, query"),
        ("a.csv", b'query,response\na,"open\nb,c\n', "is a quote left open"),
        ("a.parquet", b"PAR1 but cut", "not readable as parquet"),
        ("a.txt", b"x", "expected .jsonl"),
        ("a.xlsx", b"PK", "save a spreadsheet as CSV"),
        ("a.zip", b"PK", "unpack an archive"),
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
        ("a.json", b"[" + GOOD + b', "text"]', [None, "wrong_type"]),
        ("a.jsonl", b'\n[\n {\n "query": "a", "response": "b"},' + GOOD + b"]", [None, None]),
        ("a.csv", b"\xef\xbb\xbfquery, response\r\na,b\r\n\r\nc,d\r\n", [None, None]),
        ("a.csv", b'query;response\na;b\n"c;d";"e, f"\n', [None, None]),
        ("a.tsv", b"query\tresponse\na\tb\n", [None]),
        ("a.csv", b"query,response\na\na,b,c\nd,e\n", ["wrong_columns", "wrong_columns", None]),
        ("a.jsonl", GOOD + b"[1]\n3\nnull\n", [None, "wrong_type", "wrong_type", "wrong_type"]),
        ("a.jsonl", GOOD + b"[" * 100_000, [None, "broken_json"]),
        ("a.jsonl", GOOD + b'{"query": ' + b"9" * 5000 + b"}", [None, "broken_json"]),
        ("a.jsonl", GOOD + b'{"query": "' + b"x" * (17 << 20) + b'", "response": "a"}', [None, "row_too_long"]),
    ],
)
def test_broken_rows_do_not_stop_the_others(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    found = sorted(conversations(Source(str(tmp_path / name)), 1, {}), key=lambda item: item[0])
    assert [row.reason if isinstance(row, Rejected) else None for _, row in found] == expected


CHINESE = '{"query": "面包为什么会发起来?", "response": "因为酵母产生二氧化碳。"}\n'
GERMAN = '{"query": "Was ist ein Brötchen?", "response": "Ein süßes Stück Brot."}\n'


@pytest.mark.parametrize(("text", "encoding"), [(CHINESE, "gb18030"), (CHINESE, "gbk"), (GERMAN, "cp1252")])
@pytest.mark.parametrize("name", ["a b.jsonl", "a.json"])
def test_a_file_of_another_encoding_is_shown_as_it_reads_in_the_one_to_convert_from(tmp_path, text, encoding, name):
    path = tmp_path / name
    path.write_bytes((f"[{' ' * 500}{text}]" if name == "a.json" else text).encode(encoding))
    read, word = encoding.replace("gbk", "gb18030"), re.search(r"\w*[^\x00-\x7f]\w*", text)[0][:6]
    assert re.search(f"as {read} '[^']*{word}.*iconv -f ENCODING -t utf-8", refused(path))


@pytest.mark.parametrize(
    "path", ["x" * 4000, "a/" * 2000, "owner/" + "x" * 4000, f"/{'x' * 4000}.jsonl", "\0", "~nobody/x"]
)
def test_a_path_that_no_system_has_is_an_error_of_readable_length(path):
    assert len(refused(path)) < 1000


def test_names_as_ms_swift_writes_them_are_understood(tmp_path, monkeypatch):
    asked = modelscope_client(monkeypatch, tmp_path)
    write(tmp_path / "train.jsonl")
    (tmp_path / "clean").mkdir()
    write(tmp_path / "clean" / "train.jsonl", ROWS[:7])
    assert len(drawn("modelscope://AI-ModelScope/alpaca-gpt4-data-zh#5")) == 5
    assert len(drawn("modelscope://AI-ModelScope/alpaca-gpt4-data-zh:clean#6")) == 6
    assert asked == [("AI-ModelScope/alpaca-gpt4-data-zh", "master")] * 2
    assert "AI-ModelScope/alpaca-gpt4-data-en: not readable from the Hub" in refused(
        "AI-ModelScope/alpaca-gpt4-data-en#500"
    )
    assert "owner/set:small" not in refused("owner/set:small#500")


@pytest.mark.parametrize(
    "path", ["swift/self-cognition:empty_think#600", "modelscope://swift/self-cognition:empty_think"]
)
def test_a_subset_that_only_ms_swift_has_names_the_way_out(path):
    assert "leave `:empty_think` out and set `mode: non_thinking`" in refused(path)
    assert "`soft_switch: 1.0`" in refused(path.replace("empty_think", "qwen3"))


def only(tmp_path, row, placeholders=None, **source):
    """The one conversation of a file with one row."""
    (tmp_path / "one.jsonl").write_text(json.dumps(row), encoding="utf-8")
    return next(conversations(Source(str(tmp_path / "one.jsonl"), **source), 1, placeholders or {}))[1]


def test_a_sources_system_prompt_is_the_default_of_rows_that_have_none(tmp_path):
    row, system = {"query": "Who?", "response": "I."}, {"role": "system", "content": "Be {{NAME}}."}
    found = [
        only(tmp_path, {**row, **more}, {"NAME": "kind"}, system="Be {{NAME}}.")["messages"]
        for more in ({}, {"system": " "}, {"system": "Own."})
    ]
    assert [m[0]["content"] for m in found] == ["Be kind.", "Be kind.", "Own."]
    listed = only(tmp_path, {"messages": [{**system, "content": "Own."}, *found[0][1:]]}, system="Be kind.")["messages"]
    assert [m["content"] for m in listed] == ["Own.", "Who?", "I."]


def test_numbers_are_line_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + GOOD + b"\n\n" + b"{cut")
    rejected = dict(conversations(Source(str(tmp_path / "a.jsonl")), 1, {}))
    assert rejected.keys() == {2, 5}
    assert "a.jsonl line 5:" in rejected[5].detail


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=row_strategies.files())
def test_a_file_of_any_bytes_gives_rows_or_an_error_that_names_it(case, tmp_path):
    row_strategies.assert_file(case, tmp_path)


def test_cells_with_windows_line_breaks_read_like_others(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'query,response\r\na,"b\r\nc"\r\n')
    assert drawn(tmp_path / "a.csv") == [(1, {"query": "a", "response": "b\nc"})]


@pytest.mark.parametrize("name", ["question, long, or, short", 'a ""b, c, d"" e', "question\n(a, b, c)"])
def test_commas_inside_a_quoted_header_cell_do_not_separate(tmp_path, name):
    (tmp_path / "a.csv").write_text(f'id;"{name}";answer\n1;"a, b";c\n', encoding="utf-8")
    assert drawn(tmp_path / "a.csv") == [(1, {"id": "1", name.replace('""', '"'): "a, b", "answer": "c"})]


def test_links_inside_the_folder_are_fine(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "a.jsonl")
    os.symlink("a.jsonl", tmp_path / "data" / "b.jsonl")
    assert len(drawn(tmp_path / "data")) == 80


@pytest.mark.parametrize("column", [[b"\x89PNG"], [{"bytes": b"\x89PNG", "path": "a.png"}], [[b"x"]]])
def test_columns_of_images_are_refused(tmp_path, column):
    pq.write_table(pa.table({"query": ["a"], "response": ["b"], "image": column}), tmp_path / "a.parquet")
    assert "column 'image' holds bytes" in refused(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"query": pa.array([], pa.string())}, "is empty: no rows"),
        (
            {"query": ["a"], "m": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64()))},
            "(without m: maps are not read): no known format",
        ),
    ],
)
def test_parquet_without_rows_or_of_types_that_datasets_lacks_is_refused(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert message in refused(tmp_path)


def test_a_row_nested_to_the_limit_of_the_interpreter_is_a_row_or_rejected(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    good = json.dumps({"messages": turns})
    for depth in range(800, 1000):
        deep = '{"a":' * depth + "1" + "}" * depth
        row = f'{good[:-1]}, "tools": [{{"name": "f", "parameters": {deep}}}]}}'
        (tmp_path / "a.jsonl").write_text(f"{good}\n{row}\n", encoding="utf-8")
        found = dict(conversations(Source(str(tmp_path / "a.jsonl")), 1, {}))
        assert found[1] == {"messages": turns}
        assert "tools" in found[2] if isinstance(found[2], dict) else found[2].reason in ("too_deep", "broken_json")


def test_a_parquet_column_that_stands_twice_is_refused(tmp_path):
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["query", "query"])
    pq.write_table(twice, tmp_path / "a.parquet")
    assert "a.parquet: not readable as parquet: Multiple matches for FieldRef.Name(query)" in refused(tmp_path)


def test_row_limits_and_subsets_stand_in_the_path_as_swift_users_write_them(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a.jsonl")
    all_rows = drawn(tmp_path / "sub" / "a.jsonl")
    assert drawn(f"{tmp_path}/sub/a.jsonl#5") == all_rows[:5]
    assert drawn(f"{tmp_path}:sub#5") == drawn(f"{tmp_path}:sub", max_rows=5) == drawn(tmp_path, subset="sub")[:5]
    assert "#0: no such file or folder" in refused(f"{tmp_path}:sub#0")
    assert "the subset 'more' of a local path is a folder in it" in refused(f"{tmp_path}:more")


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "chat.jsonl")
    assert "no such file" in refused("")
    assert "has chat.jsonl" in refused(tmp_path / "chats.jsonl")
    assert "A Hub name is owner/name" in refused("FineTome-100k")


def test_fingerprints_follow_the_content_and_nothing_else(tmp_path):
    first, second = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    assert fingerprint(Source(str(first))) == fingerprint(Source(str(second)))
    before = fingerprint(Source(str(tmp_path)))
    write(second, ROWS[:-1])
    assert fingerprint(Source(str(first))) != fingerprint(Source(str(second)))
    assert fingerprint(Source(str(tmp_path))) != before


def test_without_a_network_a_hub_source_says_what_to_do():
    message = refused("owner/bakery-100k#50")
    assert "owner/bakery-100k: not readable from the Hub" in message
    assert "set `path` to that folder" in message


SHA = hub_stand_in.REVISION
STREAM = """
import json
from toolkit.files import ToolkitError
from toolkit.recipe import Source
from toolkit.data.sources import fingerprint, open_rows
def problem(*args, **kwargs):
    try:
        open_rows(Source(*args, **kwargs))
    except ToolkitError as error:
        return str(error)
rows = open_rows(Source("owner/bakery"))
problems = problem("owner/none"), problem("owner/bakery", split="cot"), problem("owner/bakery:small")
print(json.dumps([fingerprint(Source("owner/bakery#5")), list(rows.draw(1)), rows.where(3), problems]))
"""


def test_rows_are_streamed_from_the_hub_at_one_commit(tmp_path):
    files = {"README.md": b"# rows", "train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode()}
    with hub_stand_in.repository(files) as address:
        hub = hub_stand_in.ONLINE | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", STREAM]
        done = subprocess.run(command, env=os.environ | hub, cwd=ROOT, capture_output=True, text=True, check=True)
    commit, rows, where, (missing, split, subset) = json.loads(done.stdout)
    assert (commit, where) == (SHA, f"owner/bakery@{SHA[:12]} drawn row 3")
    assert sorted(row["query"] for _, row in rows) == sorted(row["query"] for row in ROWS)
    assert "If it is ModelScope's: modelscope://owner/none" in missing
    assert "Available splits: ['train']" in split
    assert "Available: ['default']" in subset


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
    toolkit.data.sources._hub_builder.cache_clear()


@pytest.mark.usefixtures("cached")
def test_without_a_network_the_cached_copy_is_used_with_its_revision():
    rows = open_rows(Source("owner/bakery"))
    found = list(rows.draw(1))
    assert sorted(row["query"] for _, row in found) == sorted(row["query"] for row in ROWS)
    assert fingerprint(Source("owner/bakery")) == SHA
    assert "Available splits: ['train']" in refused("owner/bakery", split="cot")
    assert "Available configs in the cache: ['default']" in refused("owner/bakery:small")
    assert "not revision abc" in refused("owner/bakery", revision="abc")


def test_a_stream_gives_every_row_once_in_the_seeds_order(tmp_path):
    import datasets

    path = str(write(tmp_path / "a.jsonl"))
    stream = datasets.load_dataset("json", data_files=path, split="train", streaming=True, cache_dir=str(tmp_path))
    rows = stream_rows(Source("owner/bakery"), stream, SHA)
    first, again, other = ([row["query"] for _, row in rows.draw(seed)] for seed in (1, 1, 2))
    assert sorted(first) == sorted(row["query"] for row in ROWS)
    assert first == again != other
    assert rows.fields == ["query", "response"]


def test_modelscope_without_its_client_names_the_line_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert "pip install modelscope==" in refused("modelscope://owner/bakery#5")


def modelscope_client(monkeypatch, folder) -> list:
    """Puts a stand-in for ModelScope's client, which is no requirement, in place; returns what it is asked for."""
    asked = []
    client = types.ModuleType("modelscope")
    client.dataset_snapshot_download = lambda name, revision: asked.append((name, revision)) or str(folder)
    monkeypatch.setitem(sys.modules, "modelscope", client)
    return asked


def test_modelscope_rows_are_read_from_the_downloaded_folder(tmp_path, monkeypatch):
    asked = modelscope_client(monkeypatch, tmp_path)
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
