"""No key is dropped without a word: it is read, it rejects its row, or the mix says that nothing reads it."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from toolkit import recipe
from toolkit.data import mix
from toolkit.data.formats import FORMATS, advice, canonical, recognise
from toolkit.data.render import load_chat
from toolkit.data.sources import Rejected, conversations
from toolkit.files import ToolkitError
from toolkit.recipe import Source

CASES = Path(__file__).parents[1] / "support" / "files" / "cases"
ASK, TELL = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


@pytest.fixture(autouse=True)
def outputs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path / "outputs"))


def case(name, placeholders=None, **source):
    """The conversations of a file of cases, in its order."""
    found = conversations(Source(str(CASES / f"{name}.jsonl"), **source), 1, placeholders or {})
    return [conversation for _, conversation in sorted(found, key=lambda item: item[0])]


def chat(*messages, format="messages", **row):
    return canonical({FORMATS[format]["messages"]: list(messages), **row}, format, {}, {})


def pair(**row):
    return canonical({"query": "Why?", "response": "So.", **row}, "query_response", {}, {})["messages"]


def why(row, format="messages", columns=None):
    with pytest.raises(Rejected) as caught:
        canonical(row, format, columns or {}, {})
    return caught.value.reason


def compiled(tmp_path, rows, source=None, **data):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"validation_size": 0, "duplicates": "exact", **data, "sources": [{"path": str(path), **(source or {})}]}
    return mix.compile_mix(recipe.from_dict({"name": "t", "data": data, "model": {"model_name": "pocket"}}))


def replies(mixed):
    decode = load_chat("pocket").decode
    return sorted(decode(row.completion).removesuffix("<|im_end|>") for row in mixed.train)


def rows_of(count, **more):
    return [{"query": f"question {i}", "response": f"answer {i}", **more} for i in range(count)]


# --- keys that nothing reads -------------------------------------------------------------------------------------------


def test_keys_that_nothing_reads_are_counted_and_said_in_one_line(tmp_path):
    turns = [{"role": "user", "content": "q", "mood": "calm"}, {"role": "assistant", "content": "a", "mood": "calm"}]
    rows = [{"messages": [turns[0] | {"content": f"q {i}"}, turns[1]], "tone": "warm"} for i in range(20)]
    mixed = compiled(tmp_path, rows)
    assert mixed.report["sources"]["rows"]["not_read"] == {"row": {"tone": 20}, "turn": {"mood": 40}}
    assert "rows: not read: tone (row, 20 of 20), mood (turn, 40)" in mixed.report["warnings"]
    assert json.loads((mixed.folder / "mix.json").read_text())["sources"]["rows"]["not_read"]["row"] == {"tone": 20}


def test_where_a_row_is_from_and_empty_values_are_nothing_to_say(tmp_path):
    told = {"id": 3, "conversation_id": "x", "source": "web", "score": 0.5, "lang": "en", "num_turns": 2, "model": "m"}
    mixed = compiled(tmp_path, rows_of(5, **told, tone=None, mood="", notes=[], extra={}))
    assert mixed.report["sources"]["rows"]["not_read"] == {"row": {}, "turn": {}}


def test_a_column_beside_named_ones_is_not_read_and_said(tmp_path):
    columns = {"user": "query", "assistant": "response"}
    mixed = compiled(tmp_path, rows_of(5, cot="I add.", system_prompt="Be brief."), {"columns": columns})
    assert mixed.report["sources"]["rows"]["not_read"]["row"] == {"cot": 5, "system_prompt": 5}


def test_metadata_as_text_is_said_not_to_be_read(tmp_path):
    mixed = compiled(tmp_path, rows_of(5, metadata='{"label": false}'))
    assert mixed.report["sources"]["rows"]["not_read"]["row"] == {"metadata": 5}


def test_keys_inside_metadata_are_said_too(tmp_path):
    mixed = compiled(tmp_path, rows_of(5, metadata={"id": 1, "tone": "warm", "system_prompt": "x"}))
    assert mixed.report["sources"]["rows"]["not_read"]["row"] == {"metadata.tone": 5, "metadata.system_prompt": 5}


# --- rows that their set calls bad -------------------------------------------------------------------------------------


BAD = [{"label": False}, {"label": "false"}, {"label": "False"}, {"label": 0}, {"label": "0"}, {"label": 0.0},
       {"label": "undesirable"}, {"kto_tag": False}, {"kto_tag": "false"}, {"kto_tag": 0}, {"desirable": False},
       {"rejected": True}, {"metadata": {"label": False}}, {"is_chosen": "no"}]  # fmt: skip
GOOD = [{"label": True}, {"label": "true"}, {"label": 1}, {"kto_tag": True}, {"rejected": False}, {"label": None},
        {"label": "positive"}, {"label": 7}, {"rejected": "No."}, {"rejected": "yes"}, {"label": "no"}]  # fmt: skip


@pytest.mark.parametrize("mark", BAD, ids=str)
def test_an_answer_that_is_marked_bad_is_not_taught_in_any_format(mark):
    alpaca = {"instruction": "Why?", "output": "So.", **mark}
    sharegpt = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], **mark}
    completion = {"prompt": [ASK], "completion": [TELL], **mark}
    rows = [({"messages": [ASK, TELL], **mark}, "messages"), (alpaca, "alpaca"), (sharegpt, "sharegpt")]
    for row, format in [*rows, (completion, "prompt_completion")]:
        assert why(row, format) == "marked_bad"


@pytest.mark.parametrize("mark", GOOD, ids=str)
def test_other_labels_are_no_verdict_on_an_answer(mark):
    assert chat(ASK, TELL, **mark) == chat(ASK, TELL)


def test_under_named_columns_a_number_called_label_is_a_class():
    columns = {"user": "q", "assistant": "a"}
    assert canonical({"q": "Why?", "a": "So.", "label": 0}, "columns", columns, {})
    assert why({"q": "Why?", "a": "So.", "label": False}, "columns", columns) == "marked_bad"


def test_kto_rows_train_on_the_good_half_and_the_bad_half_is_counted(tmp_path):
    rows = [{"prompt": f"{i}+1?", "completion": str(i), "label": i % 2 == 0} for i in range(40)]
    mixed = compiled(tmp_path, rows)
    assert mixed.report["sources"]["rows"]["dropped"] == {"marked_bad": 20}
    assert replies(mixed) == sorted(str(i) for i in range(0, 40, 2))
    assert [row.reason if isinstance(row, Rejected) else None for row in case("kto")] == ["marked_bad", None]


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, "preference"),
        ({"prompt": "Why?", "chosen": [TELL], "rejected": [TELL]}, "preference"),
        ({"prompt": [ASK], "chosen": [TELL], "rejected": [TELL]}, "preference"),
        ({"prompt": "Why?", "chosen": [ASK, TELL], "rejected": [ASK, TELL]}, "preference"),
        ({"chosen": [ASK, TELL], "rejected": [ASK, TELL]}, "chosen"),
        ({"instruction": "Why?", "input": "", "chosen": "So.", "rejected": "No."}, "preference_alpaca"),
        ({"question": "Why?", "chosen": "So.", "rejected": "No."}, "preference_question"),
        (
            {
                "conversations": [{"from": "human", "value": "Why?"}],
                "chosen": {"from": "gpt", "value": "So."},
                "rejected": {"from": "gpt", "value": "No."},
            },
            "sharegpt",
        ),
        ({"prompt": "Why?", "chosen": [ASK, TELL], "messages": [ASK, TELL]}, "messages"),
        ({"messages": [ASK, TELL], "rejected_response": "No."}, "messages"),
        ({"messages": [ASK, TELL], "rejected_messages": [ASK, TELL]}, "messages"),
    ],
)
def test_of_preference_data_the_preferred_answer_is_taught(row, format):
    assert recognise(list(row), "auto", {}, "x") == format
    assert canonical(row, format, {}, {})["messages"] == [ASK, TELL]


def test_a_rejected_answer_is_neither_advised_nor_taken():
    assert "rejected" not in advice(["question", "rejected_response"]).split("columns:")[1]
    with pytest.raises(ToolkitError, match="'rejected' holds the answers that must not be learned"):
        recognise(["prompt", "rejected"], "auto", {"user": "prompt", "assistant": "rejected"}, "x")


# --- turns that are not to be trained on -------------------------------------------------------------------------------


UNTRAINED = [{"weight": 0}, {"weight": 0.0}, {"weight": "0"}, {"train": False}, {"train": "false"}, {"train": 0},
             {"loss": False}, {"loss": 0}, {"loss": "False"}, {"training": False}, {"trainable": "no"}, {"masked": True},
             {"masked": 1}, {"loss_mask": 0}, {"loss_weight": 0}, {"ignore": "true"}, {"train_detail": [{"train": False}]},
             {"training": "0"}, {"metadata": {"train": False}}, {"label": False}, {"Loss": False}]  # fmt: skip
TRAINED = [{"weight": 1}, {"weight": "1"}, {"weight": 1.0}, {"train": True}, {"loss": True}, {"loss": None}, {"masked": False},
           {"training": "true"}, {"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": True}]}]  # fmt: skip
UNCLEAR = [{"weight": 0.5}, {"loss": 2.31}, {"train": "maybe"}, {"mask": True}, {"mask": 0}, {"loss": {"a": 1}},
           {"train_detail": [{"train": True}, {"train": False}]}]  # fmt: skip


@pytest.mark.parametrize("mark", UNTRAINED, ids=str)
def test_a_turn_marked_as_not_to_be_trained_on_never_is_and_the_others_are(mark, tmp_path):
    rows = [
        {"messages": [ASK | {"content": f"a {i}"}, {**TELL, "content": f"bad {i}", **mark},
                      ASK, {**TELL, "content": f"good {i}"}]}
        for i in range(3)
    ]  # fmt: skip
    each = compiled(tmp_path, rows, {"turns": "each"})
    assert replies(each) == ["good 0", "good 1", "good 2"]
    assert each.report["sources"]["rows"]["dropped"] == {"untrained_turn": 3}
    assert replies(compiled(tmp_path, rows)) == ["good 0", "good 1", "good 2"]
    last = [{"messages": row["messages"][2:] + row["messages"][:2]} for row in rows]
    assert replies(compiled(tmp_path, [*last, {"messages": [ASK, TELL]}])) == ["So."]


@pytest.mark.parametrize("mark", TRAINED, ids=str)
def test_a_turn_marked_as_trained_is(mark):
    assert chat(ASK, {**TELL, **mark}) == chat(ASK, TELL)


@pytest.mark.parametrize("mark", UNCLEAR, ids=str)
def test_a_mark_that_can_be_read_in_two_ways_rejects_its_row(mark):
    assert why({"messages": [ASK, {**TELL, **mark}]}) == "unclear_mark"
    assert chat({**ASK, **mark}, TELL) == chat(ASK, TELL)  # nothing trains on a question


@pytest.mark.parametrize("mask", [[0, 0, 0, 1], "[0, 0, 0, 1]", [False, False, False, True], ["0", "0", "0", "1"]])
def test_a_rows_own_marks_count_turn_by_turn(mask, tmp_path):
    row = {"messages": [ASK, {**TELL, "content": "bad"}, ASK | {"content": "And?"}, TELL], "loss_mask": mask}
    assert replies(compiled(tmp_path, [row], {"turns": "each"})) == ["So."]
    assert why({**row, "loss_mask": [0, 1]}) == "unclear_mark"


@pytest.mark.parametrize("mark", [{"train": False}, {"loss": 0}, {"weight": "0"}, {"skip": True}, {"loss_mask": 0}])
def test_a_row_marked_as_not_to_be_trained_on_is_not(mark):
    assert why({"messages": [ASK, TELL], **mark}) == "untrained_row"
    assert why({"instruction": "Why?", "output": "So.", **mark}, "alpaca") == "untrained_row"


def test_a_rows_loss_or_weight_that_is_a_number_is_said_not_to_be_read(tmp_path):
    mixed = compiled(tmp_path, rows_of(4, loss=2.31, weight=0.7))
    assert mixed.report["sources"]["rows"]["not_read"]["row"] == {"loss": 4, "weight": 4}


def test_ms_swifts_loss_is_obeyed(tmp_path):
    rows = [json.loads(line) for line in (CASES / "loss.jsonl").read_text().splitlines()]
    assert replies(compiled(tmp_path, rows)) == ["good one"]
    assert replies(compiled(tmp_path, rows, {"turns": "each"})) == ["good", "good one"]


# --- tools -------------------------------------------------------------------------------------------------------------

TIDE = {"name": "tide", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": TIDE}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "tide", "arguments": "{}"}}]}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: t[0], json.dumps], ids=["list", "one", "text"])
@pytest.mark.parametrize("tool", [TIDE, WRAPPED], ids=["bare", "wrapped"])
@pytest.mark.parametrize("key", ["tools", "functions", "Functions", "available_tools"])
def test_tools_are_read_wherever_they_are_kept(key, tool, wrap):
    value = wrap([tool])
    assert chat(ASK, TELL, **{key: value})["tools"] == [WRAPPED]
    assert chat({**SYSTEM, key: value}, ASK, TELL)["tools"] == [WRAPPED]
    assert chat({**ASK, key: value}, TELL, tools=[TIDE])["tools"] == [WRAPPED]


def test_tools_of_an_empty_system_turn_are_kept():
    assert chat({"role": "system", "content": "", "tools": [TIDE]}, ASK, TELL) == chat(ASK, TELL, tools=[TIDE])


def test_openais_functions_and_function_call_are_tools_and_calls():
    (row,) = case("functions")
    assert row["tools"][0]["function"]["name"] == row["messages"][1]["tool_calls"][0]["function"]["name"] == "tide"


def test_a_call_of_a_tool_that_the_row_does_not_have_is_rejected():
    other = {"name": "wind", "parameters": {}}
    assert why({"messages": [ASK, CALL], "tools": [other]}) == "unknown_tool"
    assert why({"messages": [{**SYSTEM, "tools": [other]}, ASK, CALL]}) == "unknown_tool"
    assert chat(ASK, CALL, tools=[other, TIDE])
    assert chat(ASK, CALL)  # without a schema the system prompt may describe it


def test_calls_as_json_text_are_calls():
    assert chat(ASK, {**CALL, "tool_calls": json.dumps(CALL["tool_calls"])}) == chat(ASK, CALL)
    legacy = {"role": "assistant", "content": None, "function_call": json.dumps({"name": "tide", "arguments": "{}"})}
    assert chat(ASK, legacy) == chat(ASK, CALL)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_numbers_that_json_does_not_have_are_rejected_in_calls_and_tools(number):
    value = json.loads(number)
    called = {"function": {"name": "f", "arguments": {"limit": [value]}}}
    assert why({"messages": [ASK, {"role": "assistant", "tool_calls": [called]}]}) == "not_finite"
    text = {"function": {"name": "f", "arguments": f'{{"limit": {number}}}'}}
    assert why({"messages": [ASK, {"role": "assistant", "tool_calls": [text]}]}) == "not_finite"
    assert why({"messages": [ASK, TELL], "tools": [{"name": "f", "parameters": {"default": value}}]}) == "not_finite"
    assert why({"messages": [ASK, TELL], "expected_answer": value}) == "wrong_type"
    assert [row.reason for row in case("nan")] == ["not_finite"]


# --- system prompts and reasoning --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["system", "system_prompt", "system_message", "System Prompt", "systemPrompt", "系统提示"]
)
def test_a_system_prompt_is_read_under_every_name(key):
    told = chat(SYSTEM, ASK, TELL)
    assert chat(ASK, TELL, **{key: "Be brief."}) == told
    assert pair(**{key: "Be brief."}) == told["messages"]
    alpaca = {"instruction": "Why?", "output": "So.", key: "Be brief."}
    assert canonical(alpaca, "alpaca", {}, {}) == told
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    assert canonical({"conversations": turns, key: "Be brief."}, "sharegpt", {}, {}) == told
    assert case("system_prompt")[0]["messages"][0] == {"role": "system", "content": "Answer in one word."}


def test_two_different_system_prompts_are_rejected_and_equal_ones_are_one():
    assert chat(SYSTEM, ASK, TELL, system_prompt="Be brief. ") == chat(SYSTEM, ASK, TELL)
    assert why({"messages": [SYSTEM, ASK, TELL], "system_prompt": "Be long."}) == "two_system_prompts"


REASONED = {**TELL, "reasoning_content": "I add."}


@pytest.mark.parametrize(
    "key",
    ["thought", "thoughts", "cot", "rationale", "Complex_CoT", "chain_of_thought", "reasoning", "思考", "scratchpad"],
)
def test_reasoning_is_read_under_every_name_of_a_turn_or_a_column(key):
    assert chat(ASK, {**TELL, key: "I add."})["messages"] == [ASK, REASONED]
    assert pair(**{key: "I add."}) == [ASK, REASONED]
    assert chat(ASK, TELL, **{key: "I add."})["messages"] == [ASK, REASONED]


def test_a_column_beside_turns_that_have_their_reasoning_changes_nothing(tmp_path):
    assert chat(ASK, REASONED, cot="I add.")["messages"] == [ASK, REASONED]
    tagged = {"role": "assistant", "content": "<think>I add.</think>So."}
    assert chat(ASK, tagged, reasoning="I add.")["messages"] == [ASK, REASONED]
    mixed = compiled(tmp_path, [{"messages": [ASK, REASONED], "cot": "Another."}])
    assert mixed.report["sources"]["rows"]["not_read"]["row"] == {"cot": 1}


@pytest.mark.parametrize("setting", ["on", "off", "/no_think", "high", True, False])
def test_a_setting_is_no_reasoning(setting):
    assert chat(ASK, TELL, reasoning=setting, thinking=setting) == chat(ASK, TELL)


def test_the_cases_with_columns_of_reasoning_are_thinking_rows():
    assert case("cot")[0]["messages"][1]["reasoning_content"] == "I add two and two."
    columns = {"user": "Question", "assistant": "Response", "reasoning": "Complex_CoT"}
    assert case("medical", columns=columns)[0]["messages"][1]["reasoning_content"] == "I add."
    with pytest.raises(ToolkitError, match="user: Question, assistant: Response, reasoning: Complex_CoT"):
        case("medical")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (["system_prompt", "question", "response"], "user: question, assistant: response, system: system_prompt"),
        (["instruction", "context", "response"], "user: instruction, assistant: response, input: context"),
        (["问题", "思考", "回答"], "user: 问题, assistant: 回答, reasoning: 思考"),
        (["Frage", "Antwort"], "user: Frage, assistant: Antwort"),
        (["pregunta", "respuesta"], "user: pregunta, assistant: respuesta"),
        (["вопрос", "ответ", "rationale"], "user: вопрос, assistant: ответ, reasoning: rationale"),
        (["question", "rejected_response", "response"], "user: question, assistant: response"),
    ],
)
def test_the_advice_for_unknown_columns_names_all_that_matter(fields, named):
    assert f"columns: {{{named}}}" in advice(fields)


def test_rows_without_an_answer_are_told_so():
    with pytest.raises(ToolkitError, match="have 'prompt' and no answer"):
        case("prompt_only")


# --- content parts and media -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "reasoning", "text": "I add."}, {"type": "text", "text": "So."}],
        [{"type": "thinking", "thinking": "I add.", "signature": "x"}, {"type": "text", "text": "So."}],
        [{"type": "thinking", "thinking": [{"type": "text", "text": "I add."}]}, {"type": "text", "text": "So."}],
        [{"text": "I add.", "thought": True}, {"text": "So."}],
        [{"type": "reasoning", "content": "I add."}, {"type": "output_text", "text": "So."}],
        [{"type": "thinking", "text": "I add."}, "So."],
    ],
)
def test_parts_of_reasoning_are_reasoning(parts):
    assert chat(ASK, {"role": "assistant", "content": parts})["messages"] == [ASK, REASONED]
    assert case("reasoning_parts")[0]["messages"][1] == {
        "role": "assistant",
        "content": "4.",
        "reasoning_content": "I add.",
    }


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([{"type": "text", "text": "So."}, {"type": "thinking", "thinking": "Hm."}], "reasoning_out_of_place"),
        ([{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "So."}], "not_text"),
        ([{"type": "image", "text": ""}, {"type": "text", "text": "So."}], "not_text"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "not_text"),
        ([{"type": "text", "text": "So.", "image_url": "x"}], "not_text"),
        ([{"type": "input_audio", "input_audio": {}}, {"type": "text", "text": "So."}], "not_text"),
        ([{"type": "video", "video": "x.mp4", "text": "So."}], "not_text"),
        ([{"type": "file", "file": {}}], "not_text"),
        ([{"image": "x.png", "text": ""}], "not_text"),
        ([3], "not_text"),
        ([None], "not_text"),
    ],
)
def test_parts_that_are_no_text_reject_their_row(parts, reason):
    assert why({"messages": [ASK, {"role": "assistant", "content": parts}]}) == reason


def test_calls_in_parts_are_calls():
    parts = [
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "1", "name": "tide", "input": {"port": "Kiel"}},
    ]
    called = chat(ASK, {"role": "assistant", "content": parts})["messages"][1]
    assert (called["content"], called["tool_calls"][0]["function"]) == (
        "I look.",
        {"name": "tide", "arguments": {"port": "Kiel"}},
    )


@pytest.mark.parametrize(
    "key", ["image", "images", "video", "videos", "audio", "audios", "image_url", "image_path", "attachments"]
)
def test_pictures_sound_and_film_reject_a_row_wherever_they_are_named(key):
    assert why({"messages": [ASK, TELL], key: "x.bin"}) == "not_text"
    assert why({"messages": [{**ASK, key: ["x.bin"]}, TELL]}) == "not_text"
    assert why({"messages": [ASK, TELL, ASK, {**TELL, key: {"url": "x"}}]}) == "not_text"
    assert why({"instruction": "Why?", "output": "So.", key: ["x.bin"]}, "alpaca") == "not_text"
    assert chat({**ASK, key: None}, {**TELL, key: []}, **{key: ""}) == chat(ASK, TELL)


def test_the_cases_with_media_are_rejected():
    assert [row.reason for row in case("media")] == ["not_text", "not_text"]


# --- text --------------------------------------------------------------------------------------------------------------


def test_code_with_braces_is_text_and_the_identity_set_is_filled():
    names = {"NAME": "Wheat", "AUTHOR": "us"}
    assert case("code_with_braces", names)[0]["messages"][1]["content"] == "<h1>Hello {{name}}!</h1>"
    assert case("code_with_braces")[0]["messages"][1]["content"] == "<h1>Hello {{name}}!</h1>"
    assert case("identity", names)[0]["messages"][1]["content"] == "I am Wheat by us."
    with pytest.raises(ToolkitError, match=r"set data\.placeholders\.NAME"):
        case("identity")


def test_replies_that_still_hold_a_placeholder_are_counted_and_warned_of(tmp_path):
    mixed = compiled(tmp_path, [{"query": "Who?", "response": "I am {{name}}."}, *rows_of(3)])
    assert mixed.report["sources"]["rows"]["looks_like"] == {"placeholder": 1}
    assert [w for w in mixed.report["warnings"] if "1 replies hold {{name}}" in w and "in this source" in w]


def test_html_with_s_tags_is_taught_to_a_model_that_reads_it_as_text(tmp_path):
    rows = [json.loads(line) for line in (CASES / "html.jsonl").read_text().splitlines()]
    assert replies(compiled(tmp_path, rows)) == ["<s>old</s> new", "<speak><p><s>Hello.</s></p></speak>"]


@pytest.mark.parametrize("margin", ["\r\n\r\n", "\n\n", " ", "\t", "\n \r\n ", "\u00a0\n"])
def test_no_white_space_after_the_reasoning_opens_a_reply(margin):
    assert (
        chat(ASK, {"role": "assistant", "content": f"<think>\r\nI add.\r\n</think>{margin}So."})["messages"][1]
        == REASONED
    )
    assert chat(ASK, {**REASONED, "content": f"{margin}So."})["messages"][1] == REASONED
    assert chat(ASK, {"role": "assistant", "content": f"<think>\n\n</think>{margin}So."})["messages"][1] == TELL
    assert case("crlf")[0]["messages"][1] == {"role": "assistant", "content": "Answer", "reasoning_content": "hm"}


LOUD = ["Okay, so the user wants tea. I think so.", "Let me think about it. Tea.", "Hmm, first I look. Tea.",
        "It is 4. Wait, no, it is 5. Tea.", "<reasoning>I add.</reasoning>Tea.", "Alright, let me see. Tea."]  # fmt: skip


def test_replies_that_think_aloud_in_non_thinking_rows_are_counted_per_source(tmp_path):
    rows = [{"query": f"q {i}", "response": text} for i, text in enumerate(LOUD)]
    mixed = compiled(tmp_path, [*rows, *rows_of(10)])
    assert mixed.report["sources"]["rows"]["looks_like"] == {"reasoning": 6}
    assert any("6 of 16 non-thinking replies read like reasoning" in w for w in mixed.report["warnings"])
    quiet = compiled(tmp_path, [*rows_of(10), {"query": "x", "response": "<think>Hmm, wait, no</think>\n\nTea."}])
    assert quiet.report["sources"]["rows"]["looks_like"] == {}


# --- hold-out ----------------------------------------------------------------------------------------------------------


def test_rows_with_other_documents_or_earlier_turns_ask_something_else(tmp_path):
    rows = [json.loads(line) for line in (CASES / "system_documents.jsonl").read_text().splitlines()]
    report = compiled(tmp_path, rows, validation_size=4).report["sources"]["rows"]
    assert (report["rows_kept"], report["rows_held_out"], report["dropped"]) == (36, 4, {})
    turns = [
        {"messages": [ASK | {"content": f"My name is {i}."}, TELL, ASK, {**TELL, "content": f"{i}"}]} for i in range(20)
    ]
    assert compiled(tmp_path, turns, validation_size=4).report["sources"]["rows"]["dropped"] == {}
    results = [{"messages": [ASK, CALL, {"role": "tool", "content": f"{i} m"}, {**TELL, "content": f"{i}"}], "tools": [TIDE]}
               for i in range(20)]  # fmt: skip
    assert compiled(tmp_path, results, validation_size=4).report["sources"]["rows"]["dropped"] == {}


def test_rows_with_the_same_whole_prompt_never_train_beside_a_held_out_one(tmp_path):
    rows = [{"messages": [SYSTEM, ASK | {"content": f"Why {i % 10}?"}, {**TELL, "content": f"{i}"}]} for i in range(40)]
    mixed = compiled(tmp_path, rows, validation_size=3)
    held = {row.conversation["messages"][1]["content"] for row in mixed.validation}
    prompts = {load_chat("pocket").decode(row.prompt) for row in mixed.train}
    assert len(held) == 3
    assert not [question for question in held if any(question in prompt for prompt in prompts)]


def test_the_advice_where_all_rows_ask_the_same_is_not_what_is_set_already(tmp_path):
    rows = [{"query": "Tell me a joke", "response": f"joke {i}"} for i in range(30)]
    with pytest.raises(ToolkitError, match="Write data.validation_size=0 to train on all"):
        compiled(tmp_path, rows, validation_size=1)


# --- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dump", [json.dumps, repr], ids=["json", "python"])
def test_messages_kept_as_text_in_a_cell_are_read(dump, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"messages": dump([ASK, TELL]), "tools": json.dumps([TIDE])}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", encoding="utf-8") as file:
        file.write("messages\n" + '"' + rows[0]["messages"].replace('"', '""') + '"\n')
    for name in ("a.parquet", "a.csv"):
        ((_, row),) = conversations(Source(str(tmp_path / name)), 1, {})
        assert row["messages"] == [ASK, TELL]


def test_a_map_column_that_nobody_reads_does_not_reject_a_parquet_file(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.array([f"x {i}" for i in range(5)])
    maps = pa.array([[("a", 1)]] * 5, pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"query": text, "response": text, "tags": maps}), tmp_path / "a.parquet")
    data = {"validation_size": 0, "sources": [{"path": str(tmp_path / "a.parquet")}]}
    mixed = mix.compile_mix(recipe.from_dict({"name": "t", "data": data, "model": {"model_name": "pocket"}}))
    assert len(mixed.train) == 5
    assert mixed.report["sources"]["a"]["not_read"]["row"] == {"tags": 5}


@pytest.mark.parametrize("split", [False, True])
def test_a_folder_of_save_to_disk_is_read_without_its_caches(split, tmp_path):
    import datasets

    data = datasets.Dataset.from_list(rows_of(12))
    data = datasets.DatasetDict({"train": data, "test": data.select(range(3))}) if split else data
    data.save_to_disk(tmp_path / "saved", num_shards={"train": 2, "test": 1} if split else 2)
    shard = next((tmp_path / "saved").rglob("data-00000-*.arrow"))
    shutil.copy(shard, shard.with_name("cache-0123.arrow"))
    assert len(list(conversations(Source(str(tmp_path / "saved")), 1, {}))) == 12


@pytest.mark.parametrize("ending", ["jsonl.gz", "json.gz", "csv.gz", "jsonl.bz2", "jsonl.xz"])
def test_packed_files_are_read(ending, tmp_path):
    import bz2
    import lzma

    rows = rows_of(4)
    texts = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "json": json.dumps(rows),
        "csv": "query,response\n" + "".join(f"{row['query']},{row['response']}\n" for row in rows),
    }
    kind, packed = ending.split(".")
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[packed]
    (tmp_path / f"train.{ending}").write_bytes(pack(texts[kind].encode()))
    for path in (tmp_path / f"train.{ending}", tmp_path):
        assert len(list(conversations(Source(str(path)), 1, {}))) == 4
    (tmp_path / f"train.{ending}").write_bytes(pack(texts[kind].encode())[:-7])
    with pytest.raises(ToolkitError, match="cannot be read or unpacked"):
        list(conversations(Source(str(tmp_path)), 1, {}))


def test_a_zst_file_names_the_way_out(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(ToolkitError, match="zstd -d .*a.jsonl.zst"):
        list(conversations(Source(str(tmp_path / "a.jsonl.zst")), 1, {}))


# --- lengths -----------------------------------------------------------------------------------------------------------


def test_mix_json_has_the_lengths_of_completions_by_mode_and_source(tmp_path):
    reasoned = [{"query": f"sum {i}", "response": f"<think>\n{'step ' * i}\n</think>\n\n{i}"} for i in range(1, 31)]
    mixed = compiled(tmp_path, [*rows_of(20), *reasoned])
    for mode in ("thinking", "non_thinking"):
        sizes = sorted(len(row.completion) for row in mixed.train if row.mode == mode)
        lengths = mixed.report["lengths"][mode]
        assert sizes[0] <= lengths["completion_p90"] <= lengths["completion_max"] == sizes[-1]
        assert sum(size <= lengths["completion_p90"] for size in sizes) >= 0.89 * len(sizes)
        assert mixed.report["sources"]["rows"]["lengths"][mode] == lengths
