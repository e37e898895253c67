"""Which column is the answer, which answer won, and what came before it: never guessed wrong without a word."""

import json

import pytest

from tests.data.test_keys import ASK, TELL, chat, why
from tests.data.test_unread import not_read
from toolkit.data.formats import canonical, likely_columns
from toolkit.data.guess import understand
from toolkit.data.keys import meaning
from toolkit.files import ToolkitError
from toolkit.recipe import Source

BAD = {"role": "assistant", "content": "bad"}
LAST = {"role": "assistant", "content": "Fin."}
THEN, BRIEF = {"role": "user", "content": "Then?"}, {"role": "system", "content": "Be brief."}


# --- which column holds what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "user", "assistant"),
    [
        ("question_id question answer", "question", "answer"),
        ("prompt_id prompt response", "prompt", "response"),
        ("question answer_id answer", "question", "answer"),
        ("question answer_type answer", "question", "answer"),
        ("instruction response_model response", "instruction", "response"),
        ("question_source question answer", "question", "answer"),
        ("problem_type problem solution", "problem", "solution"),
        ("question_de Question answer", "Question", "answer"),
        ("question bad_answer good_answer", "question", "good_answer"),
        ("prompt unsafe_response safe_response", "prompt", "safe_response"),
        ("prompt false_response true_response", "prompt", "true_response"),
        ("prompt response_lose response_win", "prompt", "response_win"),
        ("prompt dispreferred_output preferred_output", "prompt", "preferred_output"),
        ("question original_answer corrected_answer", "question", "corrected_answer"),
        ("question hallucinated_answer right_answer", "question", "right_answer"),
        ("question close_answer", "question", "close_answer"),  # neither a loss nor a loser
    ],
)
def test_a_column_is_chosen_by_its_whole_name_and_never_the_answer_that_lost(fields, user, assistant):
    assert likely_columns(fields.split()) == {"user": user, "assistant": assistant}


@pytest.mark.parametrize("pair", ["response_0 response_1", "response1 response2", "answer_a answer_b"])
def test_of_two_answers_that_differ_in_a_number_or_letter_none_is_guessed(pair, tmp_path):
    path = tmp_path / "rows.jsonl"
    fields = ["prompt_text", *pair.split(), "better_response_id"]
    path.write_text(f"{json.dumps(dict.fromkeys(fields, 'x'))}\n" * 20, encoding="utf-8")
    with pytest.raises(ToolkitError, match=r"which of them holds what the assistant says.*data\.sources\.0\.columns"):
        understand(Source(str(path)))
    assert likely_columns(["question", "answer", "answer_2"])["assistant"] == "answer"


def test_a_column_whose_name_ends_in_words_for_thinking_is_reasoning():
    fields = ["question", "solution", "cot_type", "gemini_thinking_trajectory", "gemini_attempt"]
    assert likely_columns(fields) == {
        "user": "question",
        "assistant": "gemini_attempt",
        "reasoning": "gemini_thinking_trajectory",
    }


@pytest.mark.parametrize("key", ["better_response_id", "safer_response_id", "preferred_id", "winner_index"])
def test_a_key_that_says_which_answer_won_is_not_read_and_said(key):
    assert meaning(key) == ""


# --- which answer won, and what is trained on ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": [ASK, BAD], "chosen": [ASK, TELL], "rejected": [ASK, BAD]}, "messages"),
        ({"messages": [ASK, BAD], "chosen": TELL}, "messages"),
        ({"messages": [ASK, BAD], "chosen": json.dumps([ASK, TELL])}, "messages"),
        ({"messages": [ASK, BAD], "rejected_response": "bad"}, "messages"),
        ({"messages": [ASK, BAD], "rejected": " bad\n"}, "messages"),
        ({"query": "q", "response": "a", "chosen": "other text", "rejected": "a"}, "query_response"),
        ({"query": "q", "response": "a", "chosen": "other text"}, "query_response"),
        *[({"messages": [ASK, TELL], "chosen": mark}, "messages") for mark in (False, 0, "false", "False")],
        ({"prompt": "Why?", "completion": "So.", "chosen": False}, "prompt_completion"),
    ],
)
def test_an_answer_that_lost_beside_another_format_is_not_taught(row, format):
    assert why(row, format) == "marked_bad"


@pytest.mark.parametrize(
    "more",
    [
        {"chosen": True},
        {"chosen": "So.", "rejected": "No."},
        {"chosen": "<think>I add.</think>So.", "rejected": [ASK, BAD]},
        {"chosen": [ASK, TELL], "rejected": [ASK, TELL]},  # equal: there is nothing to tell apart
        {"chosen": json.dumps([ASK, TELL])},
        {"chosen": float("nan"), "rejected": "None"},
        {"rejected_response": "No."},
    ],
)
def test_an_answer_that_won_is_taught_beside_another_format(more):
    assert chat(ASK, TELL, **more) == chat(ASK, TELL)


def test_a_turn_that_was_not_chosen_is_not_trained_on():
    assert chat(ASK, {**TELL, "chosen": False})["messages"][1]["train"] is False


@pytest.mark.parametrize(
    "marks",
    [
        {"loss_mask": [1, 1], "train": False},
        {"train": True, "loss_mask": [1, 1], "masked": True},
        {"weights": [1, 1], "masked": True},
    ],
)
def test_of_several_marks_of_a_row_one_no_is_enough(marks):
    assert why({"messages": [ASK, TELL], **marks}) == "untrained_row"


def test_of_several_lists_of_marks_one_no_is_enough_for_a_turn():
    turns = chat(ASK, TELL, loss_mask=[1, 1], train_mask=[0, 0])["messages"]
    assert turns[1]["train"] is False


# --- what came before the answer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "format", "turns"),
    [
        ({"prompt": [BRIEF, ASK], "chosen": [ASK, TELL]}, "preference", [BRIEF, ASK, TELL]),
        ({"prompt": [ASK, TELL, THEN], "completion": [THEN, LAST]}, "prompt_completion", [ASK, TELL, THEN, LAST]),
        ({"prompt": "Why?", "chosen": [BRIEF, ASK, TELL]}, "preference", [BRIEF, ASK, TELL]),
        (
            {"prompt": "Why?", "chosen": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
            "preference",
            [ASK, TELL],
        ),
        ({"query": "Then?", "response": [THEN, LAST], "history": [["Why?", "So."]]}, "query_response", [ASK, TELL, THEN, LAST]),
    ],
)  # fmt: skip
def test_turns_that_prompt_and_answer_share_are_said_once_and_none_is_lost(row, format, turns):
    assert canonical(row, format, {}, {})["messages"] == turns


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"prompt": "IMPORTANT CONTEXT", "chosen": [ASK, TELL]}, "preference"),
        ({"instruction": "Why?", "input": "doc", "output": [ASK, TELL]}, "alpaca"),
    ],
)
def test_a_prompt_that_the_answer_s_turns_leave_out_rejects_its_row(row, format):
    assert why(row, format) == "role_order"
    # a text beside a question of turns would be a second question
    assert why({"instruction": [ASK], "input": "doc", "output": "So."}, "alpaca") == "role_order"


def test_a_history_beside_turns_is_counted(tmp_path):
    assert not_read(tmp_path, ASK, TELL, history=[["a", "b"]])["row"] == {"history": 1}


@pytest.mark.parametrize("cell", ["nan", "NaN", "<NA>", " nan "])
def test_how_pandas_writes_an_empty_cell_is_no_answer(cell):
    assert why({"instruction": "Why?", "output": cell}, "alpaca") == "empty_content"
    assert chat(ASK, {**TELL, "content": cell})["messages"][1]["content"] == cell


@pytest.mark.parametrize("answer", ["[]", "none", "None", "null", "N/A"])
def test_a_class_called_none_is_an_answer(answer):
    assert (
        canonical({"query": "Why?", "response": answer}, "query_response", {}, {})["messages"][1]["content"] == answer
    )
