"""Rows in every convention become the same conversation, or are rejected with their reason."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings

from tests.support import row_strategies
from toolkit.data.conversation import Placeholders
from toolkit.data.formats import FORMATS, canonical, reader_of, recognise
from toolkit.data.sources import Rejected, conversations
from toolkit.files import ToolkitError
from toolkit.recipe import Source

DATA = Path(__file__).parents[1] / "support" / "files" / "formats"
NAMES = {"NAME": {"zh": "小麦", "en": "Wheat"}, "AUTHOR": "the bakery"}
CANONICAL = [json.loads(line) for line in (DATA / "canonical.jsonl").read_text(encoding="utf-8").splitlines()]
PAIRS = [(place, row) for row in CANONICAL for place in row["formats"]]
ASK, TELL = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


def compiled(file, **source):
    """The conversations of a file, in the file's order."""
    found = sorted(conversations(Source(str(DATA / file), **source), 1, NAMES), key=lambda item: item[0])
    return [conversation for _, conversation in found]


def reason(row, format="messages", **kwargs):
    """Why a row is rejected."""
    with pytest.raises(Rejected) as caught:
        canonical(row, format, kwargs.get("columns", {}), kwargs.get("placeholders", {}))
    return caught.value.reason


def chat(*messages, **row):
    return canonical({"messages": list(messages), **row}, "messages", {}, {})


@pytest.mark.parametrize(("place", "row"), PAIRS, ids=[place for place, _ in PAIRS])
def test_every_format_compiles_to_its_canonical_line(place, row):
    file, index = place.split(":")
    found = compiled(file)[int(index)]
    found.pop("expected_answer", None)  # the canonical lines hold conversations only
    assert found == {key: row[key] for key in ("messages", "tools") if key in row}


def test_every_format_file_is_tried():
    tried = {place.split(":")[0] for place, _ in PAIRS} | {
        "query_response.jsonl",
        "question_answer.jsonl",
        "general.csv",
    }
    assert {f.name for f in DATA.iterdir() if f.is_file()} == tried | {"README.md", "canonical.jsonl"}


def test_placeholders_are_filled_in_the_language_of_the_row():
    answers = [c["messages"][-1]["content"] for c in compiled("query_response.jsonl")]
    assert answers == ["我叫小麦,是the bakery训练的助手。", "the bakery did; my name is Wheat."]


def test_any_two_columns_can_be_named():
    columns = {"user": "question", "assistant": "answer_en"}
    assert "blows bubbles" in compiled("question_answer.jsonl", columns=columns)[0]["messages"][1]["content"]


QA = {"user": "q", "assistant": "a"}


@pytest.mark.parametrize(
    ("format", "columns", "extra", "reasoning"),
    [
        ("columns", QA, {"reasoning": "Because of yeast.", "thinking": "on"}, None),
        ("columns", {**QA, "reasoning": "cot"}, {"cot": "Yeast.", "thinking": "Other."}, "Yeast."),
        ("columns", {**QA, "reasoning": "cot"}, {"cot": None, "thinking": "Because of yeast."}, None),
        ("query_response", {}, {"reasoning": "off", "thinking": True}, None),
        ("query_response", {}, {"reasoning": "/no_think", "thinking": "Because of yeast."}, "Because of yeast."),
        ("query_response", {}, {"thinking": "因为酵母产生二氧化碳。"}, "因为酵母产生二氧化碳。"),
        ("query_response", {}, {"reasoning": "2+4=6"}, "2+4=6"),
        ("query_response", {}, {"reasoning_content": "Yeast"}, "Yeast"),
        ("query_response", {}, {"reasoning_content": " \n "}, None),
    ],
)
def test_only_a_named_reasoning_column_or_one_that_is_no_switch_is_reasoning(format, columns, extra, reasoning):
    row = {"query": "Why?", "response": "So.", "q": "Why?", "a": "So.", **extra}
    assert canonical(row, format, columns, {})["messages"][1].get("reasoning_content") == reasoning


@pytest.mark.parametrize("blank", [" ", "\n \n", "\t"])
def test_blank_reasoning_is_none(blank):
    assert chat(ASK, {**TELL, "reasoning_content": blank}) == chat(ASK, TELL)


def test_csv_cells_keep_commas_quotes_and_line_breaks():
    first = compiled("general.csv")[0]["messages"]
    assert [m["content"] for m in first] == ["Name a bread, please", 'Rye.\nOr "Roggenbrot", in German.']


def test_expected_answers_are_kept_as_text():
    assert compiled("openmath.jsonl")[0]["expected_answer"] == "9"
    assert chat(ASK, TELL, expected_answer=9)["expected_answer"] == "9"
    assert "expected_answer" not in chat(ASK, TELL, expected_answer=None)


BAD = {
    "cut.jsonl": [None, "broken_json"],
    "injected.jsonl": [None, "think_in_answer"],  # the first is refused by the tokenizers that read it as structure
    "nulls.jsonl": ["null_field", "null_field", "empty_content", "wrong_type"],
    "roles.jsonl": ["role_order", "role_order", "unknown_role", "no_assistant"],
    "think.jsonl": ["unclosed_think", None, "nested_think"],  # the second has no trace: wrong only in mode thinking
    "tools.jsonl": ["broken_tools"],
    "bom_crlf.jsonl": [None],
}
REFUSED = {
    "empty.jsonl": "is empty",
    "header_only.csv": "no rows",
    "latin1.jsonl": "line 1: not UTF-8.*Brötchen.*iconv -f",
}


@pytest.mark.parametrize("file", BAD)
def test_bad_rows_are_counted_with_their_reason_and_place(file):
    found = compiled(f"bad/{file}")
    assert [row.reason if isinstance(row, Rejected) else None for row in found] == BAD[file]
    places = [f"{file} line {i}:" in row.detail for i, row in enumerate(found, 1) if isinstance(row, Rejected)]
    assert all(places)


@pytest.mark.parametrize("file", REFUSED)
def test_bad_files_are_refused_with_what_to_do(file):
    with pytest.raises(ToolkitError, match=REFUSED[file]):
        compiled(f"bad/{file}")


def test_every_bad_file_is_tried():
    assert {f.name for f in (DATA / "bad").iterdir()} == BAD.keys() | REFUSED.keys()


@settings(max_examples=120, deadline=None)
@given(row_strategies.sound_rows())
def test_a_sound_row_of_any_format_compiles_to_the_conversation_it_was_made_from(case):
    row_strategies.assert_sound(case)


@settings(max_examples=120, deadline=None)
@given(row_strategies.broken_rows())
def test_a_broken_row_is_rejected_or_a_well_formed_conversation_of_its_own_text(case):
    row_strategies.assert_broken(case)


@pytest.mark.parametrize("format", ["alpaca", "query_response", "messages"])
def test_a_column_without_a_name_is_not_read_as_a_part_that_the_format_lacks(format):
    row = {"query": "q", "response": "a", "instruction": "q", "output": "a", "": "x",
           "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}  # fmt: skip
    names = {"alpaca": ("instruction", "output"), "query_response": ("query", "response"), "messages": ("messages",)}
    conversation, not_read = reader_of(format, {}, Placeholders({})).read(
        {key: row[key] for key in (*names[format], "")}
    )
    assert [message["content"] for message in conversation["messages"]] == ["q", "a"]
    assert "expected_answer" not in conversation
    assert not_read == ["row "]


@pytest.mark.parametrize("format", ["alpaca", "query_response"])
def test_calls_in_the_text_of_an_answer_column_are_calls_too(format):
    names = FORMATS[format]
    found = canonical({names["user"]: "Left?", names["assistant"]: JSON_CALL}, format, {}, {})["messages"]
    assert found[1]["tool_calls"][0]["function"] == {"name": "oven", "arguments": {"side": "left"}}


def test_a_question_with_only_its_expected_answer_is_a_conversation_too():
    row = {"problem": "2 + 4?", "expected_answer": "6"}
    assert recognise(list(row), "auto", {}, "q.jsonl") == "question"
    assert recognise([*row, "generated_solution"], "auto", {}, "q.jsonl") == "openmath"
    found = canonical(row, "question", {}, {})
    assert found["expected_answer"] == "6"
    assert [m["content"] for m in found["messages"]] == ["2 + 4?", "6"]


CALL = {"function": {"name": "oven", "arguments": '{"side": "left"}'}}
RESULT = {"role": "tool", "content": "220"}


def test_parallel_calls_join_into_one_turn():
    turns = [("human", "Both?"), ("gpt", "I look."), ("function_call", '{"name": "a", "arguments": {}}')]
    turns += [("function_call", '[{"name": "b"}]'), ("observation", "1"), ("observation", "2"), ("gpt", "1, 2.")]
    found = canonical({"conversations": [{"from": f, "value": v} for f, v in turns]}, "sharegpt", {}, {})["messages"]
    assert [m["role"] for m in found] == ["user", "assistant", "tool", "tool", "assistant"]
    assert found[1]["content"] == "I look."
    assert [c["function"]["name"] for c in found[1]["tool_calls"]] == ["a", "b"]


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: [t], lambda t: json.dumps([t]), lambda t: json.dumps(t)])
@pytest.mark.parametrize("bare", [True, False])
def test_tools_come_as_json_text_or_objects_wrapped_or_bare(wrap, bare):
    function = {"name": "oven", "parameters": {"type": "object", "properties": {}}}
    tool = {"type": "function", "function": function}
    assert chat(ASK, TELL, tools=wrap(function if bare else tool))["tools"] == [tool]


@pytest.mark.parametrize("tools", [None, "", "[]", [], " "])
def test_no_tools_leave_no_key(tools):
    assert "tools" not in chat(ASK, TELL, tools=tools)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, TELL], "tools": "[{broken"},
        {"messages": [ASK, TELL], "tools": "3"},
        {"messages": [ASK, TELL], "tools": ["oven"]},
        {"messages": [ASK, TELL], "tools": [{"type": "function"}]},
        {"messages": [ASK, {"role": "assistant", "tool_calls": ["oven"]}]},
        {"messages": [ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}]},
        {"messages": [ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": [1]}}]}]},
        {"messages": [ASK, {"role": "function_call", "content": "[" * 100_000}]},
    ],
)
def test_broken_tools_are_rejected(row):
    assert reason(row) == "broken_tools"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([TELL], "role_order"),
        ([ASK, ASK, TELL], "role_order"),
        ([ASK, TELL, TELL], "role_order"),
        ([ASK, {"role": "system", "content": "x"}, TELL], "role_order"),
        ([ASK, RESULT, TELL], "role_order"),
        ([ASK, TELL, RESULT, TELL], "role_order"),
        ([ASK, {"role": "assistant", "tool_calls": [CALL]}, ASK, TELL], "role_order"),
        ([ASK, {"role": "assistant", "tool_calls": [CALL]}, RESULT], "no_answer"),
        ([ASK, TELL, ASK], "no_answer"),
        ([ASK], "no_assistant"),
        ([], "no_assistant"),
        ([{"role": "wizard", "content": "x"}, TELL], "unknown_role"),
        ([{"role": ["user"], "content": "x"}, TELL], "unknown_role"),
        ([{"content": "x"}, TELL], "missing_field"),
        ([{"role": "user"}, TELL], "missing_field"),
        ([{"role": "user", "content": None}, TELL], "null_field"),
        ([ASK, {"role": "assistant", "content": None}], "null_field"),
        ([{"role": "user", "content": 3}, TELL], "wrong_type"),
        ([ASK, {"role": "assistant", "content": "x", "thinking": 3}], "wrong_type"),
        ([ASK, {"role": "assistant", "tool_calls": "oven()"}], "wrong_type"),
        (["Why?", TELL], "wrong_type"),
        ('[{"role": "user", "content": "x"}]', "no_assistant"),
        ("[not JSON", "wrong_type"),
        ("2 turns", "wrong_type"),
        ({"role": "user"}, "wrong_type"),
        (None, "null_field"),
        ([{"role": "user", "content": " \n"}, TELL], "empty_content"),
        ([ASK, {"role": "assistant", "content": "\t"}], "empty_content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, TELL], "not_text"),
        ([ASK, TELL] * 100_000, "row_too_long"),
        ([{"role": "user", "content": "x" * 1_000_000}, TELL], "row_too_long"),
        ([{"role": "user", "content": "a\x00b"}, TELL], "control_character"),
        ([ASK, {"role": "assistant", "content": "\x1b[31mred"}], "control_character"),
        ([ASK, {"role": "assistant", "content": "half \ud83c"}], "broken_text"),
    ],
)
def test_malformed_turns_are_rejected(messages, expected):
    assert reason({"messages": messages}) == expected


def test_calls_need_no_content_and_end_a_row_well():
    assert chat(ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]})["messages"][1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "oven", "arguments": {"side": "left"}}}],
    }


def test_the_function_call_of_older_openai_sets_is_a_call():
    call = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    older = chat(ASK, call, {"role": "function", "name": "oven", "content": "220"}, TELL)
    assert older == chat(ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT, TELL)
    assert chat(ASK, {**TELL, "function_call": None}) == chat(ASK, TELL)
    assert reason({"messages": [ASK, {**TELL, "function_call": "oven"}]}) == "wrong_type"


HERMES = "<tool_call>\n{'arguments': {'side': 'left'}, 'name': 'oven'}\n</tool_call>"
JSON_CALL = '<tool_call>{"name": "oven", "arguments": {"side": "left"}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (HERMES, "", 1),
        (JSON_CALL, "", 1),
        (JSON_CALL.replace("arguments", "parameters"), "", 1),
        (f"I look.\n{HERMES}\n{JSON_CALL}\n", "I look.", 2),
        (f"<think>\nWhich?\n</think>\n\n{JSON_CALL}", "", 1),
    ],
)
def test_calls_written_in_the_text_are_calls(text, content, calls):
    turns = [ASK, {"role": "assistant", "content": text}]
    found = chat(*turns, {"role": "tool", "content": "<tool_response>\n220\n</tool_response>"}, TELL)["messages"]
    assert (
        found[1]["tool_calls"]
        == [{"type": "function", "function": {"name": "oven", "arguments": {"side": "left"}}}] * calls
    )
    assert (found[1]["content"], found[1].get("reasoning_content")) == (content, "Which?" if "think" in text else None)
    assert found[2] == {"role": "tool", "content": "220"}
    assert chat(*turns, {"role": "user", "content": "<tool_response>220</tool_response>"}, TELL)["messages"] == found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<tool_call>{broken}</tool_call>", "broken_tools"),
        ("<tool_call>{1, 2}</tool_call>", "broken_tools"),
        ("<tool_call>[1]</tool_call>", "broken_tools"),
        (f"{JSON_CALL} and more", "control_token"),
        (f"<think>{JSON_CALL}</think>Hm.", "control_token"),
        ("<tool_call>", "control_token"),
    ],
)
def test_calls_that_do_not_end_the_text_or_are_no_calls_are_rejected(text, expected):
    assert reason({"messages": [ASK, {"role": "assistant", "content": text}]}) == expected


@pytest.mark.parametrize("instruction", ["", " "])
def test_an_empty_instruction_leaves_no_line_before_the_input(instruction):
    row = {"instruction": instruction, "input": "Name a bread.", "output": "Rye."}
    assert canonical(row, "alpaca", {}, {})["messages"][0]["content"] == "Name a bread."


def test_expected_answers_are_text_that_a_file_can_hold():
    assert reason({"messages": [ASK, TELL], "expected_answer": "\ud83c"}) == "broken_text"


def test_an_empty_system_turn_is_no_turn_and_a_system_column_is_one():
    assert chat({"role": "system", "content": ""}, ASK, TELL) == chat(ASK, TELL)
    assert chat(ASK, TELL, system="Be brief.") == chat({"role": "system", "content": "Be brief."}, ASK, TELL)


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    assert chat({"role": "user", "content": parts}, TELL) == chat(ASK, TELL)


@pytest.mark.parametrize(
    ("content", "reasoning", "answer"),
    [
        ("<think>\na\nb\n</think>\n\nc", "a\nb", "c"),
        ("\n<think>a</think>c", "a", "c"),
        ("<think>\n\n</think>\n\nc", None, "c"),
        ("no tags, 1 < 2", None, "no tags, 1 < 2"),
        ("I rethink> that", None, "I rethink> that"),
    ],
)
def test_a_leading_think_block_becomes_reasoning(content, reasoning, answer):
    found = chat(ASK, {"role": "assistant", "content": content})["messages"][1]
    assert (found.get("reasoning_content"), found["content"]) == (reasoning, answer)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<think>a", "unclosed_think"),
        ("<think>a<think>b</think>c</think>d", "nested_think"),
        ("<think>a</think>b</think>c", "nested_think"),
        ("<think>a</think>b<think>c</think>", "nested_think"),
        ("a</think>b", "think_in_answer"),
        ("Well. <think>a</think>b", "think_in_answer"),
        ("<think>a</think>\n", "empty_content"),
        ("<think></think>", "empty_content"),
    ],
)
def test_malformed_think_tags_are_rejected(content, expected):
    assert reason({"messages": [ASK, {"role": "assistant", "content": content}]}) == expected


def test_reasoning_comes_once():
    both = {"role": "assistant", "content": "<think>a</think>b", "reasoning_content": "a"}
    inside = {"role": "assistant", "content": "b", "reasoning_content": "a</think>"}
    assert [reason({"messages": [ASK, m]}) for m in (both, inside)] == ["nested_think", "control_token"]


@pytest.mark.parametrize(
    "text",
    ["a <| b |> c", "x <|> y", "List<|", "<im_start>", "1 < 2 | 3 > 2", "<thinking>", "<b>", "<s>", "[INST]", "<unk>"],
)
def test_ordinary_angle_brackets_are_no_tokens(text):
    assert chat({"role": "user", "content": text}, TELL)["messages"][0]["content"] == text


@pytest.mark.parametrize("name", ["images", "image", "videos", "audios"])
def test_rows_with_pictures_or_sound_are_rejected(name):
    assert reason({"messages": [ASK, TELL], name: ["bread.png"]}) == "not_text"
    assert chat(ASK, TELL, **{name: []}) == chat(ASK, TELL)


def filled(text, placeholders, **row):
    return canonical({"query": "q", "response": text, **row}, "query_response", {}, placeholders)["messages"][1][
        "content"
    ]


def test_the_recipes_placeholders_fill_one_spelling_each():
    assert filled("I am {{NAME}} by {{AUTHOER}}.", {"NAME": "Wheat", "AUTHOR": "us"}) == "I am Wheat by us."


@pytest.mark.parametrize(
    "text", ["{{name}}", "{{ NAME }}", "{{Name}}", "{{{NAME}}}", "{{{author}}}", "{name}", "{{author}}"]
)
def test_other_braces_are_text_of_their_own(text):
    assert filled(text, {"NAME": "Wheat", "AUTHOR": "us"}) == filled(text, {}) == text


@pytest.mark.parametrize("text", ["{{NAME}}", "{{name}}", "{{ NAME }}", "{{Name}}", "{{ name }}"])
def test_a_sources_own_placeholders_fill_every_spelling_in_that_source_alone(text, tmp_path):
    (tmp_path / "me.jsonl").write_text(json.dumps({"query": "Who?", "response": f"I am {text}."}), encoding="utf-8")
    path = str(tmp_path / "me.jsonl")
    ((_, own),) = conversations(Source(path, placeholders={"NAME": "Wheat"}), 1, {"NAME": "Rye"})
    ((_, other),) = conversations(Source(path), 1, {"NAME": "Rye"})
    assert own["messages"][1]["content"] == "I am Wheat."
    assert other["messages"][1]["content"] == f"I am {'Rye' if text == '{{NAME}}' else text}."


def test_the_characters_of_a_row_decide_its_language():
    assert [filled(t, NAMES) for t in ("我叫{{NAME}}", "I am {{NAME}}")] == ["我叫小麦", "I am Wheat"]


def test_ordinary_template_text_is_left_alone():
    code = "<p>{{ name }} {{title}} {{ user.name }} {{names}}</p>"
    assert filled(code, {}) == code


@pytest.mark.parametrize(
    ("text", "placeholders", "key"),
    [
        ("I am {{NAME}}", {}, "NAME"),
        ("by {{AUTHOER}}", {"NAME": "x"}, "AUTHOR"),
        ("我{{NAME}}", {"NAME": {"en": "x"}}, "NAME.zh"),
    ],
)
def test_an_unfilled_placeholder_stops_the_run_and_names_row_and_key(tmp_path, text, placeholders, key):
    file = tmp_path / "me.jsonl"
    file.write_text(json.dumps({"query": "Who?", "response": text}), encoding="utf-8")
    with pytest.raises(ToolkitError, match=rf"me.jsonl line 1: .*data\.placeholders\.{key}$"):
        list(conversations(Source(str(file)), 1, placeholders))


def test_placeholders_in_tools_and_calls_count_too():
    tools = [{"name": "f", "description": "asks {{NAME}}"}]
    assert reason({"messages": [ASK, TELL], "tools": tools}) == "unfilled_placeholder"
    found = canonical({"messages": [ASK, TELL], "tools": tools}, "messages", {}, {"NAME": "Wheat"})
    assert found["tools"][0]["function"]["description"] == "asks Wheat"


def test_formats_are_recognised_by_their_fields():
    for name, columns in FORMATS.items():
        assert recognise([*columns.values(), "score", "id"], "auto", {}, "x") == name


@pytest.mark.parametrize(
    ("fields", "source", "message"),
    [
        (
            ["question", "answer_zh"],
            {},
            r"fields are question, answer_zh.*columns: \{user: question, assistant: answer_zh\}",
        ),
        (["Instruction", "Output"], {}, "user: Instruction, assistant: Output"),
        (["messages", "prompt", "completion"], {}, "fits several formats.*messages, prompt_completion"),
        (["query", "response"], {"format": "alpaca"}, "not alpaca, which needs instruction and output"),
        (["query", "response"], {"format": "alpacca"}, "unknown format 'alpacca'"),
        (["a", "b"], {"format": "columns"}, "needs `user` and `assistant`"),
        (["a", "b"], {"columns": {"user": "a"}}, "needs `user` and `assistant`"),
        (["question", "b"], {"columns": {"user": "qestion", "assistant": "b"}}, "Did you mean 'question'"),
        (
            ["a", "b"],
            {"columns": {"user": "a", "assistent": "b"}},
            r"columns\.assistent: expected one of user, assistant",
        ),
        (
            ["query", "response"],
            {"format": "alpaca", "columns": {"user": "query", "assistant": "response"}},
            "goes with",
        ),
    ],
)
def test_what_is_not_recognised_is_explained(fields, source, message):
    with pytest.raises(ToolkitError, match=message):
        recognise(fields, source.get("format", "auto"), source.get("columns", {}), "x.jsonl")
