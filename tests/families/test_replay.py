"""Replay keeps what the base says and can be verified, in both modes, from prompts the run does not train on."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from rich.console import Console

from data_recipes.replay import replay, unused
from tests.comparison.test_sweep import write_rows
from tests.support import families
from toolkit import recipe as recipes
from toolkit.data.mix import compile_mix, prompt_key
from toolkit.data.render import examples, load_chat
from toolkit.data.sources import conversations
from toolkit.evaluation.generate import Reply, split_reply
from toolkit.files import ROOT, ToolkitError


@pytest.fixture
def recipe(tmp_path):
    write_rows(tmp_path / "maths.jsonl", 60, "Carry the one.")
    write_rows(tmp_path / "talk.jsonl", 200, "")
    sources = [
        {"path": str(tmp_path / "maths.jsonl"), "mode": "thinking", "fraction": 0.5},
        {"path": str(tmp_path / "talk.jsonl"), "mode": "non_thinking", "fraction": 0.5},
    ]
    data = {"sources": sources, "budget": 1600, "validation_size": 10, "duplicates": "exact"}
    values = {"name": "tiny", "data": data, "model": {"model_name": "pocket", "max_seq_length": 512}}
    return recipes.from_dict(values)


def said(text, finished=True):
    reasoning, answer, opened, closed = split_reply(text)
    return Reply(reasoning, answer, text, len(reasoning.split()), len(answer.split()), opened, closed, finished)


def well(prompts, mode, seed):  # noqa: ARG001 - every answerer has this signature
    return [said("<think>\nI see.\n</think>\n\nIt is 42." if mode == "thinking" else "It is 42.") for _ in prompts]


def questions(tmp_path, count, expected):
    file = tmp_path / "questions.jsonl"
    rows = [{"problem": f"What is {i} and {42 - i}?", "expected_answer": expected(i)} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def quiet():
    return Console(file=open(os.devnull, "w"), width=200, record=True)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_half_of_the_rows_think_and_half_do_not(recipe):
    rows = rows_of(replay(recipe, count=41, answer=well, console=quiet()))
    thinking = [row for row in rows if "reasoning_content" in row["messages"][-1]]
    assert (len(thinking), len(rows)) == (21, 41)


def test_only_right_whole_and_finished_replies_are_kept(recipe, tmp_path):
    spoiled = {
        "thinking": [
            ("<think>\nI see.\n</think>\n\nIt is \\boxed{41}.", True),
            ("<think>\nI see.\n</think>\n\nIt is 42.", False),
            ("<think>\n\n</think>\n\nIt is 42.", True),
            ("<think>\nIt is 42.", True),
            ("It is 42.", True),
        ],
        "non_thinking": [
            ("It is 41.", True),
            ("It is 42.", False),
            ("", True),
            ("Wait, let me check. It is 42.", True),
            ("<think>\nI see.\n</think>\n\nIt is 42.", True),
        ],
    }

    def answer(prompts, mode, seed):
        bad = [said(*reply) for reply in spoiled[mode]]
        return (bad + well(prompts, mode, seed))[: len(prompts)]

    file, console = questions(tmp_path, 12, lambda _: "42"), quiet()
    rows = rows_of(replay(recipe, prompts=file, count=100, answer=answer, console=console))
    assert len(rows) == 2 * (12 - 5)
    assert {row["messages"][-1]["content"] for row in rows} == {"It is 42."}
    assert {row["messages"][-1].get("reasoning_content") for row in rows} == {"I see.", None}
    shown = console.export_text()
    assert "wrong_answer 2" in shown
    assert "unfinished 2" in shown
    assert "no_whole_think_block 3" in shown
    assert "empty_or_leaking 3" in shown


def test_an_answer_that_is_always_wrong_leaves_nothing_and_says_so(recipe, tmp_path):
    file = questions(tmp_path, 12, lambda i: str(1000 + i))
    with pytest.raises(ToolkitError, match="no reply was kept; dropped: wrong_answer"):
        replay(recipe, prompts=file, count=10, answer=well, console=quiet())


def test_prompts_come_from_rows_that_neither_train_nor_are_held_out(recipe):
    rows = rows_of(replay(recipe, count=60, answer=well, console=quiet()))
    mixed = compile_mix(recipe)
    used = {(row.source, row.number) for row in (*mixed.train, *mixed.validation)}
    taken = {
        prompt_key(row)
        for source in recipe.data.sources
        for number, row in conversations(source, recipe.data.seed, {})
        if (source.name, number) in used
    }
    assert len(taken) == len(used) > 50
    assert len(list(unused(recipe.data.sources, recipe, mixed))) == 60 + 200 - len(used)
    assert not taken & {prompt_key(row) for row in rows}


def test_the_written_file_is_a_source_and_the_printed_line_mixes_it_in(recipe):
    console = quiet()
    path = replay(recipe, count=20, answer=well, console=console)
    line = next(text.strip() for text in console.export_text().splitlines() if text.strip().startswith("- {path"))
    added = yaml.safe_load(line)[0]
    assert added["path"] == str(path)
    values = recipes.to_dict(recipe)
    for source in values["data"]["sources"]:
        source["fraction"] *= 1 - added["fraction"]
    values["data"]["sources"].append(added)
    values["data"]["validation_size"] = 0
    mixed = compile_mix(recipes.from_dict(values))
    kept = [row for row in mixed.train if row.source == "tiny-replay"]
    assert {row.mode for row in kept} == {"thinking", "non_thinking"}
    assert len(kept) >= 18  # the fraction is rounded to a hundredth


def test_a_replayed_row_supervises_what_the_base_generated(recipe):
    rows = rows_of(replay(recipe, count=2, answer=well, console=quiet()))
    chat = load_chat("pocket")
    completions = {examples(row, "auto", chat)[0].completion for row in rows}
    assert completions == {"<think>\nI see.\n</think>\n\nIt is 42.<|im_end|>", "It is 42.<|im_end|>"}


def test_an_instruct_model_rehearses_its_one_mode(recipe, tmp_path):
    folder = families.build("qwen2.5", tmp_path / "instruct")
    overrides = ["data.sources.0.fraction=0", "data.sources.1.fraction=1", "data.budget=600"]
    values = recipes.to_dict(recipe) | {"model": {"model_name": str(folder), "max_seq_length": 512}}
    asked = []

    def answer(prompts, mode, seed):  # noqa: ARG001 - every answerer has this signature
        asked.append(mode)
        return [said("Wait, let me check. It is 42.") for _ in prompts]  # nothing leaks where there is one mode

    console = quiet()
    rows = rows_of(replay(recipes.from_dict(values, overrides=overrides), count=21, answer=answer, console=console))
    assert set(asked) == {"non_thinking"}
    assert len(rows) == 21
    assert "thinking," not in console.export_text().replace("non-thinking", "")


def test_a_second_replay_rewrites_the_file(recipe):
    for count in (4, 2):
        assert len(rows_of(replay(recipe, count=count, answer=well, console=quiet()))) == count


def test_two_replays_do_not_write_one_file_at_the_same_time(recipe, tmp_path):
    def answer(prompts, mode, seed):
        code = (
            "import sys, pathlib; from toolkit.files import lock, ToolkitError\n"
            "try: lock(pathlib.Path(sys.argv[1]), 'replay').__enter__()\n"
            "except ToolkitError as error: print(error)"
        )
        words = [sys.executable, "-c", code, str(tmp_path / "outputs/tiny-replay")]
        other.append(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        return well(prompts, mode, seed)

    other = []
    replay(recipe, count=2, answer=answer, console=quiet())
    assert "is in use by `replay`" in other[0]
