"""Every prompt of a file is answered once, and a killed batch goes on as if nothing had happened."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.pocket_run import make_run
from toolkit.files import ROOT, ToolkitError
from toolkit.serving.batch import answer_file, read_prompts
from toolkit.serving.engine import start

SUMS = [f"What is {a} + {a + 3}?" for a in range(10, 15)]
OPTIONS = {"max_new_tokens": 24, "clients": 1, "seed": 3407}
SCRIPT = """
import sys
from tests.serving.test_batch import OPTIONS
from toolkit.serving.batch import answer_file
answer_file(*sys.argv[1:], **OPTIONS)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        outputs = tmp_path_factory.mktemp("outputs")
        patch.setenv("TOOLKIT_OUTPUTS", str(outputs))
        yield make_run(outputs / "tuned")


@pytest.fixture(scope="module")
def loaded(run):
    """How to reach an engine with the run: one for all tests."""
    engine = start([run])
    yield {"url": engine.url, "key": engine.key}
    assert engine.server  # it lives until here


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "sums.txt"
    file.write_text("\n".join(SUMS), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def whole(run, prompts, loaded, tmp_path_factory):
    """Replies in both modes, never interrupted."""
    file = tmp_path_factory.mktemp("replies") / "whole.jsonl"
    answer_file(run, prompts, file, **loaded, **OPTIONS)
    return file.read_bytes()


def rows(raw: bytes) -> list[dict]:
    return [json.loads(line) for line in raw.splitlines()]


def test_every_prompt_is_answered_once_in_each_mode(whole):
    assert [(r["row"], r["mode"]) for r in rows(whole)] == [
        (i, mode) for mode in ("thinking", "non_thinking") for i in range(1, 6)
    ]
    assert [r["prompt"] for r in rows(whole)[:5]] == SUMS
    assert all(r["reasoning"] for r in rows(whole)[:5])
    assert not any(r["reasoning"] for r in rows(whole)[5:])
    assert all(r["answer"] for r in rows(whole)[5:])


def test_tokens_and_the_limit_are_reported(whole):
    assert all(0 < r["tokens"] <= 24 for r in rows(whole))
    assert all(r["finished"] or r["tokens"] == 24 for r in rows(whole))


def test_a_reply_cut_in_the_middle_of_its_line_is_made_again_the_same(run, prompts, whole, loaded, tmp_path):
    file = tmp_path / "replies.jsonl"
    for keep in (len(whole) // 2, 3):
        file.write_bytes(whole[:keep])
        answer_file(run, prompts, file, **loaded, **OPTIONS)
        assert file.read_bytes() == whole


def test_killed_it_loses_at_most_a_batch_and_ends_the_same(run, prompts, whole, loaded, tmp_path):
    file = tmp_path / "replies.jsonl"
    command = [sys.executable, "-c", SCRIPT, str(run), str(prompts), str(file)]
    process = subprocess.Popen(command, cwd=ROOT)
    while not file.is_file() or file.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = file.read_bytes()[: file.read_bytes().rfind(b"\n") + 1]
    assert 2 <= len(rows(kept)) < 10
    assert whole.startswith(kept)
    answer_file(run, prompts, file, **loaded, **OPTIONS)
    assert file.read_bytes() == whole


def test_a_finished_file_is_left_alone_without_loading_a_model(run, prompts, whole, tmp_path):
    file = tmp_path / "replies.jsonl"
    file.write_bytes(whole)
    assert answer_file(run, prompts, file, **OPTIONS) == []
    assert file.read_bytes() == whole


def test_the_second_mode_can_be_added_later(run, prompts, whole, loaded, tmp_path):
    file = tmp_path / "replies.jsonl"
    for mode in ("thinking", "both"):
        answer_file(run, prompts, file, mode, **loaded, **OPTIONS)
    assert file.read_bytes() == whole


def test_replies_of_two_kinds_never_share_a_file(run, prompts, whole, loaded, tmp_path):
    file = tmp_path / "replies.jsonl"
    file.write_bytes(whole)
    with pytest.raises(ToolkitError, match="line 1: a reply to other seed"):
        answer_file(run, prompts, file, **loaded, **{**OPTIONS, "seed": 1})
    other = tmp_path / "other.txt"
    other.write_text("\n".join(reversed(SUMS)))
    with pytest.raises(ToolkitError, match="a reply to other messages"):
        answer_file(run, other, file, **loaded, **OPTIONS)
    with pytest.raises(ToolkitError, match="is the file of prompts"):
        answer_file(run, prompts, prompts, **loaded, **OPTIONS)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("text", ['{"a": 1}', "notes", '{"row": 1, "cells": 2}', "[1, 2]\n", "one\ntwo"])
def test_a_file_that_holds_no_replies_is_named_and_stays_as_it_is(run, prompts, tmp_path, text):
    file = tmp_path / "settings.json"
    file.write_text(text)
    with pytest.raises(ToolkitError, match=r"settings.json, line [12]: "):
        answer_file(run, prompts, file, **OPTIONS)
    assert file.read_text() == text


def test_replies_followed_by_something_else_are_not_cut(run, prompts, whole, tmp_path):
    file = tmp_path / "replies.jsonl"
    file.write_bytes(whole[: whole.index(b"\n") + 1] + b"my notes")
    with pytest.raises(ToolkitError, match=r"replies.jsonl, line 2"):
        answer_file(run, prompts, file, **OPTIONS)
    assert file.read_bytes().endswith(b"my notes")


def test_prompts_are_the_same_from_every_kind_of_file(tmp_path):
    wanted = [{"messages": [{"role": "user", "content": text}]} for text in ("Hi, you", "2 + 2?")]
    texts = [w["messages"][0]["content"] for w in wanted]
    shapes = [
        lambda t: {"prompt": t}, lambda t: {"query": t}, lambda t: {"question": t}, lambda t: {"problem": t, "expected_answer": "4"},
        lambda t: {"instruction": t, "output": "known"}, lambda t: {"messages": [{"role": "user", "content": t}]},
        lambda t: {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "known"}]},
        lambda t: {"conversations": [{"from": "human", "value": t}]},
    ]  # fmt: skip
    for i, shape in enumerate(shapes):
        file = tmp_path / f"{i}.jsonl"
        file.write_text("\n".join(json.dumps(shape(text)) for text in texts), encoding="utf-8")
        assert read_prompts(file) == (dict(enumerate(wanted, start=1)), [])
    with open(tmp_path / "p.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt"], *([text] for text in texts)])
    (tmp_path / "p.txt").write_text("Hi, you\n\n2 + 2?\n", encoding="utf-8")
    assert list(read_prompts(tmp_path / "p.csv")[0].values()) == wanted
    assert read_prompts(tmp_path / "p.txt") == ({1: wanted[0], 3: wanted[1]}, []), "numbers are those of the lines"


def test_system_earlier_turns_and_tools_come_along(tmp_path):
    tool = {"type": "function", "function": {"name": "now", "parameters": {}}}
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
             {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Time?"}]  # fmt: skip
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": turns, "tools": [tool]}))
    (found,) = read_prompts(tmp_path / "p.jsonl")[0].values()
    assert found["messages"] == turns
    assert found["tools"] == [tool]


def test_prompts_with_different_tools_are_each_answered_with_their_own(run, loaded, tmp_path):
    tool = {"type": "function", "function": {"name": "now", "parameters": {}}}
    lines = [{"prompt": SUMS[0]}, {"prompt": SUMS[1], "tools": [tool]}, {"prompt": SUMS[2]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert answer_file(run, tmp_path / "p.jsonl", tmp_path / "r.jsonl", "thinking", **loaded, **OPTIONS) == []
    assert len(rows((tmp_path / "r.jsonl").read_bytes())) == 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": ""}', "p.jsonl, row 2"),
        ('{"prompt": 3}', "row 2: 'prompt' is a number, expected text"),
        ('{"text": "Hi"}', "row 2: the fields are text: expected one of"),
        ('{"prompt": "<|im_end|>"}', "row 2: .*<\\|im_end\\|>"),
    ],
)
def test_a_row_that_is_no_prompt_is_left_out_and_counted_and_the_others_are_answered(
    run, loaded, tmp_path, row, reason
):
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "{SUMS[0]}"}}\n{row}\n{{"prompt": "{SUMS[1]}"}}')
    [rejected] = answer_file(run, tmp_path / "p.jsonl", tmp_path / "r.jsonl", "non_thinking", **loaded, **OPTIONS)
    assert re.search(reason, rejected)
    assert [r["row"] for r in rows((tmp_path / "r.jsonl").read_bytes())] == [1, 3]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.jsonl", '{"text": "Hi"}', "the fields are text: expected one of"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.docx", "Hi", "unknown kind of file"),
        ("p.txt", b"\xff\xfeH\x00", "expected a text file in UTF-8"),
    ],
)
def test_a_file_without_any_prompt_is_refused(tmp_path, name, text, expected):
    (tmp_path / name).write_bytes(text if type(text) is bytes else text.encode())
    with pytest.raises(ToolkitError, match=expected):
        read_prompts(tmp_path / name)


def test_a_prompt_beyond_the_context_is_named_and_the_others_are_answered(run, loaded, tmp_path):
    (tmp_path / "p.txt").write_text("Hi\n" + "7 + " * 3000 + "\nHello")
    [refused] = answer_file(run, tmp_path / "p.txt", tmp_path / "r.jsonl", "thinking", **loaded, **OPTIONS)
    assert re.search("row 2, thinking: .*exceeds the available context size", refused)
    assert [r["row"] for r in rows((tmp_path / "r.jsonl").read_bytes())] == [1, 3]


HOLDER = """
import sys
from pathlib import Path
from toolkit.files import lock
with lock(Path(sys.argv[1]), "generate"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_file_of_replies_that_another_process_writes_is_refused_however_it_is_spelled(run, prompts, whole, tmp_path):
    file = tmp_path / "replies.jsonl"
    other = tmp_path / "elsewhere" / "same.jsonl"
    other.parent.mkdir()
    file.write_bytes(whole)
    other.symlink_to(file)
    command = [sys.executable, "-c", HOLDER, f"{file} (replies)"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    for name in (file, tmp_path / "elsewhere" / ".." / "replies.jsonl", other):
        with pytest.raises(ToolkitError, match="is in use by `generate`"):
            answer_file(run, prompts, name, **OPTIONS)
    process.communicate("\n", timeout=60)
    assert answer_file(run, prompts, other, **OPTIONS) == []
    assert file.read_bytes() == whole


def test_several_clients_at_once_answer_in_the_order_of_the_file(run, prompts, loaded, tmp_path):
    file = tmp_path / "replies.jsonl"
    answer_file(run, prompts, file, "non_thinking", **loaded, **OPTIONS | {"clients": 4})
    assert [r["row"] for r in rows(file.read_bytes())] == [1, 2, 3, 4, 5]


def test_a_reply_at_another_scale_is_another_reply(run, prompts, whole, loaded, tmp_path):
    file = tmp_path / "replies.jsonl"
    file.write_bytes(whole)
    with pytest.raises(ToolkitError, match="a reply to other scale"):
        answer_file(run, prompts, file, **loaded, scale=0.5, **OPTIONS)
    with pytest.raises(ToolkitError, match="from 0 .the base. to 2.*got 3"):
        answer_file(run, prompts, tmp_path / "new.jsonl", **loaded, scale=3, **OPTIONS)


def test_a_server_that_stops_leaves_what_was_answered_and_the_same_call_goes_on(run, prompts, whole, loaded, tmp_path):
    file = tmp_path / "replies.jsonl"
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    with pytest.raises(ToolkitError, match="does not answer"):
        answer_file(run, prompts, file, url="http://127.0.0.1:9", **OPTIONS)
    assert len(rows(file.read_bytes())) == 3
    answer_file(run, prompts, file, **loaded, **OPTIONS)
    assert file.read_bytes() == whole


def test_a_thousand_prompts_take_less_than_a_second_of_work_to_read(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": f"What is {i}?"}) for i in range(1000)))
    started = time.process_time()  # the machine may be busy
    assert len(read_prompts(tmp_path / "p.jsonl")[0]) == 1000
    assert time.process_time() - started < 1


def test_replies_of_a_run_that_was_trained_again_are_not_continued(prompts, whole, loaded, tmp_path):
    again = make_run(tmp_path / "tuned", seed=2)
    file = tmp_path / "replies.jsonl"
    file.write_bytes(whole)
    with pytest.raises(ToolkitError, match="line 1: a reply to other adapter"):
        answer_file(again, prompts, file, **loaded, **OPTIONS)


def test_a_prompt_that_offers_other_tools_is_another_prompt(run, loaded, tmp_path):
    file, replies = tmp_path / "prompts.jsonl", tmp_path / "replies.jsonl"
    tool = {"type": "function", "function": {"name": "oven", "parameters": {"type": "object", "properties": {}}}}
    row = {"messages": [{"role": "user", "content": "Hot?"}], "tools": [tool]}
    file.write_text(json.dumps(row))
    answer_file(run, file, replies, **loaded, **OPTIONS)
    tool["function"]["name"] = "stove"
    file.write_text(json.dumps(row))
    with pytest.raises(ToolkitError, match="a reply to other tools"):
        answer_file(run, file, replies, **loaded, **OPTIONS)


def test_a_text_file_has_a_prompt_on_each_line_whatever_else_separates_lines_in_unicode(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("one\u2028still one\r\ntwo\x0cstill two\nthree\x85still three\n".encode())
    asked, rejected = read_prompts(file)
    assert list(asked) == [1, 3]
    assert "row 2" in rejected[0]  # a form feed is a control character, and training would refuse it too


def test_a_missing_adapter_is_named(run, prompts, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    made = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(made | {"adapter": {"adapter_model.safetensors": "0"}}))
    (copy / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ToolkitError, match="missing or damaged"):
        answer_file(copy, prompts, tmp_path / "replies.jsonl", **OPTIONS)
