"""What tables, parts and turns keep beside their text is read, rejected or counted: never dropped, never glued on."""

import json
import time

import pytest

from tests.data.test_keys import ASK, CALL, REASONED, TELL, TIDE, chat, compiled, why
from tests.data.test_render import folder_with
from tests.support import qwen3
from toolkit import recipe
from toolkit.data.formats import advice, canonical, recognise
from toolkit.data.keys import meaning
from toolkit.data.lint import OPENINGS, TAGGED
from toolkit.data.readers import Rejected, data_files
from toolkit.data.render import load_chat
from toolkit.data.sources import conversations
from toolkit.files import ToolkitError, shareable

FOUR = {"type": "text", "text": "Four."}


def not_read(tmp_path, *messages, **row):
    return compiled(tmp_path, [{"messages": list(messages), **row}]).report["sources"]["rows"]["not_read"]


# --- results of calls ---------------------------------------------------------------------------------------------------


def asked(*ids):
    calls = [{"id": name, "function": {"name": "tide", "arguments": {"port": name}}} for name in ids]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def result(name):
    return {"role": "tool", "tool_call_id": name, "content": f"high at {name}"}


@pytest.mark.parametrize("kept_as", [list, json.dumps])
def test_results_stand_in_the_order_of_their_calls_since_no_template_prints_the_ids(kept_as):
    calls = asked("a", "b", "c")
    calls["tool_calls"] = kept_as(calls["tool_calls"])
    messages = chat(ASK, calls, result("c"), result("a"), result("b"), TELL)["messages"]
    assert [turn["content"] for turn in messages if turn["role"] == "tool"] == [f"high at {name}" for name in "abc"]


def test_ids_that_each_round_uses_again_pair_the_results_of_that_round():
    rounds = [asked("a", "b"), result("b"), result("a"), asked("b", "a"), result("a"), result("b")]
    messages = chat(ASK, *rounds, TELL)["messages"]
    assert [turn["content"][-1] for turn in messages if turn["role"] == "tool"] == list("abba")


def test_a_result_of_a_call_that_nobody_made_is_rejected_where_results_must_be_told_apart():
    assert why({"messages": [ASK, asked("a", "b"), result("a"), result("x"), TELL]}) == "unknown_call"
    assert len(chat(ASK, asked("a"), result("x"), TELL)["messages"]) == 4  # one call, one result: no doubt


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [{"thought": "true"}, {"thought": True}, {"is_thought": True}, {"is_thought": 1}])
def test_a_part_marked_as_a_thought_is_reasoning_however_the_mark_is_written(sign):
    parts = [{"text": "I add.", **sign}, {"text": "So."}]
    assert chat(ASK, {"role": "assistant", "content": parts})["messages"] == [ASK, REASONED]


def test_a_key_of_a_part_that_no_rule_knows_is_counted(tmp_path):
    parts = [{"text": "I add.", "channel": "analysis"}, FOUR]
    assert not_read(tmp_path, ASK, {"role": "assistant", "content": parts})["turn"] == {"content.channel": 1}


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"masked": True}])
def test_a_part_that_is_not_to_be_trained_on_rejects_its_row(mark):
    assert why({"messages": [ASK, {"role": "assistant", "content": [FOUR | mark]}]}) == "unclear_mark"
    assert chat({"role": "user", "content": [{"text": "Why?", **mark}]}, TELL) == chat(ASK, TELL)


@pytest.mark.parametrize("key", ["file", "source", "inline_data", "image", "document"])
def test_an_object_beside_the_text_of_a_part_rejects_its_row(key):
    assert why({"messages": [ASK, {"role": "assistant", "content": [FOUR | {key: {"data": "x"}}]}]}) == "not_text"


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_parts_kept_as_text_and_gemini_s_parts_are_parts(write):
    parts = [{"type": "thinking", "text": "I add."}, {"type": "text", "text": "So."}]
    assert chat(ASK, {"role": "assistant", "content": write(parts)})["messages"] == [ASK, REASONED]
    assert chat({"role": "user", "parts": [{"text": "Why?"}]}, {"role": "model", "parts": [{"text": "So."}]}) == chat(
        ASK, TELL
    )
    shapes = '[{"type": "circle", "r": 1}]'
    assert chat(ASK, {"role": "assistant", "content": shapes})["messages"][1]["content"] == shapes


def test_turns_kept_as_json_text_are_turns():
    assert chat(json.dumps(ASK), json.dumps(TELL)) == chat(ASK, TELL)
    assert why({"messages": ["{broken", TELL]}) == "wrong_type"


@pytest.mark.parametrize("margin", ["\r\n  ", "\n", "\n\n\t"])
def test_a_direct_reply_opens_without_line_breaks(margin):
    assert chat(ASK, {**TELL, "content": f"{margin}So."}) == chat(ASK, TELL)
    assert chat(ASK, {**TELL, "content": "    return 1"})["messages"][1]["content"] == "    return 1"


# --- keys of turns and rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "key"),
    [
        (({**ASK, "system": "Be brief."}, TELL), "system"),
        ((ASK, {**TELL, "system_prompt": "Be brief."}), "system_prompt"),
        (({**ASK, "thinking": "I ask."}, TELL), "thinking"),
        ((ASK, {**TELL, "reasoning": "I add.", "thought": "Another."}), "thought"),
        (({**ASK, "label": False}, TELL), "label"),
    ],
)
def test_a_key_with_a_meaning_on_a_turn_that_cannot_have_it_is_counted(turns, key, tmp_path):
    assert not_read(tmp_path, *turns)["turn"] == {key: 1}


@pytest.mark.parametrize(
    "key", ["img_path", "images_path", "media_path", "img_url", "video_link", "photo_link", "image_filename"]
)
def test_a_path_of_a_picture_is_a_picture(key):
    assert why({"messages": [ASK, TELL], key: "x.png"}) == "not_text"


@pytest.mark.parametrize("key", ["video_id", "audio_source", "bad_tag", "reasoning_tokens", "label_source"])
def test_a_key_that_begins_like_one_with_a_meaning_is_counted(key, tmp_path):
    assert not_read(tmp_path, ASK, TELL, **{key: "x1"})["row"] == {key: 1}


@pytest.mark.parametrize(
    "key", ["conversation_id", "num_images", "model", "source_url", "quality_score", "data_source"]
)
def test_where_a_row_is_from_stays_nothing_to_say(key):
    assert meaning(key) == "harmless"


def test_a_rejected_mark_kept_as_text_is_obeyed_and_the_text_of_a_rejected_answer_is_none(tmp_path):
    assert why({"instruction": "Why?", "output": "So.", "rejected": "true"}, "alpaca") == "marked_bad"
    assert canonical({"prompt": "Why?", "chosen": "So.", "rejected": "True"}, "preference", {}, {})
    assert not_read(tmp_path, ASK, TELL, rejected="perhaps")["row"] == {"rejected": 1}


@pytest.mark.parametrize("setting", ["on", "off", "/no_think", "High", "true", "disabled", True, 0])
def test_a_word_that_switches_thinking_is_no_reasoning_on_a_row_or_a_turn(setting):
    assert chat(ASK, TELL, thinking=setting) == chat(ASK, TELL)
    assert chat(ASK, {**TELL, "thinking": setting}) == chat(ASK, TELL)
    named = {"user": "q", "assistant": "a", "reasoning": "mode"}
    assert canonical({"q": "Why?", "a": "So.", "mode": setting}, "columns", named, {})["messages"] == [ASK, TELL]


@pytest.mark.parametrize("text", ["Trivial.", "因为酵母。", "x=1"])
def test_short_reasoning_is_reasoning(text):
    wanted = [ASK, {**TELL, "reasoning_content": text}]
    assert chat(ASK, TELL, thinking=text)["messages"] == chat(ASK, {**TELL, "thinking": text})["messages"] == wanted


@pytest.mark.parametrize("empty", ["[]", "nan", "NaN", "null", "None", "N/A", "{}", " "])
def test_cells_that_mean_empty_are_empty(empty):
    row = {
        "instruction": "Why?",
        "output": "So.",
        "input": empty,
        "images": empty,
        "cot": empty,
        "tools": empty,
        "system": empty,
    }
    assert canonical(row, "alpaca", {}, {}) == {"messages": [ASK, TELL]}
    assert canonical({"instruction": "Why?", "output": "None"}, "alpaca", {}, {})["messages"][1]["content"] == "None"


# --- advice that is safe to follow -----------------------------------------------------------------------------------


def test_the_advice_names_the_reasoning_of_openthoughts_and_the_attempt_of_s1k():
    thoughts = ["problem", "deepseek_reasoning", "deepseek_solution", "domain"]
    assert "assistant: deepseek_solution, reasoning: deepseek_reasoning" in advice(thoughts)
    assert "user: question, assistant: attempt, reasoning: thinking_trajectories" in advice(
        ["solution", "question", "thinking_trajectories", "attempt"]
    )
    columns = {"user": "question", "assistant": "attempt", "reasoning": "thinking_trajectories"}
    row = {"question": "Why?", "attempt": "So.", "thinking_trajectories": ["I add."]}
    assert canonical(row, "columns", columns, {})["messages"] == [ASK, REASONED]


def test_calls_in_an_answer_column_are_calls():
    row = {"query": "Why?", "answers": json.dumps([{"name": "tide", "arguments": {}}]), "tools": json.dumps([TIDE])}
    columns = {"user": "query", "assistant": "answers", "tools": "tools"}
    assert recognise(list(row), "auto", columns, "x") == "columns"
    assert canonical(row, "columns", columns, {}) == chat(ASK, CALL, tools=[TIDE])


def test_anthropic_s_and_textual_schemas_are_openai_s():
    schema = TIDE["parameters"]
    plain = chat(ASK, TELL, tools=[TIDE])
    assert chat(ASK, TELL, tools=[{"name": "tide", "input_schema": schema}]) == plain
    assert chat(ASK, TELL, tools=[{"name": "tide", "parameters": json.dumps(schema)}]) == plain


# --- templates -------------------------------------------------------------------------------------------------------


def test_a_special_token_that_is_null_is_left_out_as_transformers_leaves_it(tmp_path):
    from transformers import AutoTokenizer

    marks = "{{ bos_token }}{{ cls_token }}{% if bos_token is defined %}[bos]{% endif %}"
    folder_with(marks + qwen3.template("qwen3"), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.bos_token is None
    theirs = tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    assert load_chat(str(tmp_path)).render([ASK]) == theirs
    assert "None" not in theirs


def test_our_own_mark_reaches_no_template(tmp_path):
    chat_ = folder_with("{% for m in messages %}{{ m | tojson }}{% endfor %}", tmp_path)
    assert "train" not in chat_.render([ASK, {**TELL, "train": False}])


@pytest.mark.parametrize(
    "code", ["{% set t = ('a' * 99999) * 9999 %}", "{{ '%999999999d' % 1 }}", "{{ 10 ** 999999999 }}"]
)
def test_a_template_that_makes_an_endless_text_is_an_error(code, tmp_path):
    began = time.monotonic()
    with pytest.raises(ToolkitError, match="its chat template takes more than"):
        _ = folder_with(code + qwen3.template("qwen3"), tmp_path).kind
    assert time.monotonic() - began < 20


def test_a_template_that_is_no_utf_8_is_named(tmp_path):
    folder_with("x", tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfeBr\xf6tchen")
    with pytest.raises(ToolkitError, match=r"chat_template\.jinja: expected a text file in UTF-8"):
        load_chat(str(tmp_path))


# --- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "opening",
    ["好的，用户问", "嗯，用户想", "首先，我需要", "we need to find", "i need to figure out", "first, i should"],
)
def test_openings_of_thinking_aloud_are_known(opening):
    assert OPENINGS.match(opening)


@pytest.mark.parametrize(
    "opening",
    [
        "<|begin_of_thought|>", "[think]", "<think >", "## thinking\n", "<|channel|>analysis<|message|>", "<scratch_pad>",
        "◁think▷", "<seed:think>", "<cot>", "<reason>", "<inner_thoughts>", "<longcat_think>", "<unused94>thought",
        "&lt;think&gt;", "**no**",
    ],
)  # fmt: skip
def test_tags_in_which_other_models_think_are_known(opening):
    assert bool(TAGGED.match(opening)) == (opening != "**no**")


@pytest.mark.parametrize(
    "answer", ["Think of a number.", "# Reasons to travel\n", "<b>Thinking</b>", "[1] Thought", "<table>"]
)
def test_answers_about_thinking_are_no_thinking(answer):
    assert not TAGGED.match(answer.lower())


def test_a_table_of_which_files_are_missing_is_refused_and_one_file_alone_is_read(tmp_path):
    row = json.dumps({"messages": [ASK, TELL]}) + "\n"
    for number in (0, 2):
        (tmp_path / f"train-0000{number}-of-00003.jsonl").write_text(row)
    with pytest.raises(
        ToolkitError, match="2 of the 3 files train-…-of-00003 are there: fetch the others, or give `path`"
    ):
        data_files(tmp_path, "train")
    assert data_files(tmp_path / "train-00000-of-00003.jsonl", "train") == [tmp_path / "train-00000-of-00003.jsonl"]
    (tmp_path / "train-00001-of-00003.jsonl").write_text(row)
    assert len(data_files(tmp_path, "train")) == 3


def test_a_parquet_file_of_nothing_but_maps_says_what_to_do(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = pa.array([[[("role", "user")]]], pa.list_(pa.map_(pa.string(), pa.string())))
    pq.write_table(pa.table({"messages": turns}), tmp_path / "a.parquet")
    with pytest.raises(ToolkitError, match="the columns messages hold maps.*lists of objects, or as JSON text"):
        list(conversations(recipe.Source(str(tmp_path / "a.parquet")), 1, {}))


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("Authorization: Bearer sk-abcdefghijklmnopqrstuvwx", "abcdefgh"),
        ("https://user:hunter2@host/x", "hunter2"),
        ("api-key: s3cr3tvalue", "s3cr3t"),
        ("OPENAI=sk-proj-abcdefghijklmnopqrst", "abcdefgh"),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "abcdefgh"),
        ("PASSWD=hunter2", "hunter2"),
    ],
)
def test_secrets_of_other_forms_are_hidden(text, secret):
    assert secret not in shareable(text)
    assert shareable("eos_token: <eos>") == "eos_token: <eos>"


# --- calls and results in other spellings ------------------------------------------------------------------------------


def called(call, **more):
    return {"role": "assistant", "content": "", "tool_calls": [call], **more}


SPELLINGS = "arguments parameters input args kwargs params inputs tool_input action_input".split()


@pytest.mark.parametrize("write", [dict, json.dumps])
@pytest.mark.parametrize("key", SPELLINGS)
def test_the_arguments_of_a_call_are_read_in_every_spelling(key, write):
    call = {"name": "tide", key: write({"port": "Kiel"}), "id": "x", "type": "tool_call"}
    (read,) = chat(ASK, called(call))["messages"][1]["tool_calls"]
    assert read["function"] == {"name": "tide", "arguments": {"port": "Kiel"}}


@pytest.mark.parametrize("where", ["call", "function"])
def test_a_call_whose_arguments_have_a_name_that_no_rule_knows_is_rejected(where):
    more = {"payload": {"port": "Kiel"}}
    call = {"function": {"name": "tide"}, **more} if where == "call" else {"function": {"name": "tide", **more}}
    with pytest.raises(Rejected, match="'payload'") as caught:
        chat(ASK, called(call))
    assert caught.value.reason == "broken_tools"
    bare = {"name": "tide", "id": "x", "type": "tool_call", "index": 0, "payload": {}}
    assert chat(ASK, called(bare)) == chat(ASK, called({"name": "tide", "arguments": {}}))


TWO = [{"name": "tide", "arguments": {"port": "a"}}, {"name": "wind", "arguments": {"port": "b"}}]


def paired(results, calls=TWO, **turn):
    """The results as they stand after two calls."""
    turns = [{"role": "tool", "content": content, **signs} for content, signs in results]
    row = chat(ASK, {"role": "assistant", "content": "", "tool_calls": calls, **turn}, *turns, TELL)
    return [message["content"] for message in row["messages"] if message["role"] == "tool"]


def with_ids(first, second, key="id"):
    return [{**TWO[0], key: first}, {**TWO[1], key: second}]


@pytest.mark.parametrize("key", ["name", "tool_name"])
def test_results_that_only_their_function_tells_apart_stand_in_the_order_of_the_calls(key):
    assert paired([("high", {key: "wind"}), ("low", {key: "tide"})]) == ["low", "high"]
    thrice = [TWO[0], TWO[1], TWO[0]]
    given = [("low", {key: "tide"}), ("high", {key: "wind"}), ("mid", {key: "tide"})]
    assert paired(given, thrice) == ["low", "high", "mid"]
    with pytest.raises(Rejected, match="one each"):
        paired([given[1], given[0], given[2]], thrice)


def test_a_name_that_is_no_function_s_or_a_number_of_the_turn_changes_no_order():
    assert paired([("b", {"name": "Bob"}), ("a", {"name": "Ann"})]) == ["b", "a"]
    assert paired([("b", {"id": 7}), ("a", {"id": 8})], with_ids("x", "y")) == ["b", "a"]


@pytest.mark.parametrize("key", ["tool_call_id", "call_id", "id", "tool_use_id", "tool_id", "toolCallId"])
@pytest.mark.parametrize("ids", [("x", "y"), (0, 1)], ids=str)
def test_ids_pair_results_with_calls_whatever_their_key_and_kind(key, ids, tmp_path):
    given = [("high", {key: ids[1]}), ("low", {key: ids[0]})]
    assert paired(given, with_ids(*ids)) == paired(given, with_ids(*ids, key="call_id")) == ["low", "high"]
    turns = [{"role": "tool", "content": content, **signs} for content, signs in given]
    call = {"role": "assistant", "content": "", "tool_calls": with_ids(*ids)}
    assert not_read(tmp_path, ASK, call, *turns, TELL)["turn"] == {}


def test_ids_of_calls_in_parts_and_in_turns_of_their_own_pair_results():
    results = [result("b"), result("a")]
    parts = [{"type": "tool_use", "name": call["name"], "input": {}, "id": call["id"]} for call in with_ids("a", "b")]
    turns = [{"role": "tool_call", "content": json.dumps(call)} for call in with_ids("a", "b")]
    for said in ([{"role": "assistant", "content": parts}], turns):
        found = chat(ASK, *said, *results, TELL)["messages"]
        assert [turn["content"] for turn in found if turn["role"] == "tool"] == ["high at a", "high at b"]


@pytest.mark.parametrize(
    "signs",
    [
        [{"tool_call_id": "y"}, {}],
        [{"tool_call_id": "x"}, {"tool_call_id": "x"}],
        [{"tool_call_id": "v"}, {"tool_call_id": "w"}],
        [{"name": "wind"}, {}],
    ],
    ids=["one without", "one twice", "others", "one without name"],
)
def test_results_of_which_one_cannot_be_paired_reject_their_row(signs):
    with pytest.raises(Rejected) as caught:
        paired([("high", signs[0]), ("low", signs[1])], with_ids("x", "y"))
    assert caught.value.reason == "unknown_call"


def test_one_result_of_two_calls_is_taught_as_it_stands():
    assert paired([("high", {"tool_call_id": "y"})], with_ids("x", "y")) == ["high"]


# --- what stands beside or before a text -------------------------------------------------------------------------------

TIDE_TEXT = '{"name":"tide","arguments":{}}'


@pytest.mark.parametrize(
    "thinking",
    [
        {"content": f"<think>I add.</think>{TIDE_TEXT}"},
        {"content": TIDE_TEXT, "reasoning_content": "I add."},
    ],
    ids=["tags", "key"],
)
def test_the_reasoning_of_a_call_in_a_turn_of_its_own_is_kept_or_rejects_its_row(thinking):
    after, call = {"role": "tool", "content": "high"}, {"role": "tool_call", **thinking}
    silent = {"role": "assistant", "content": ""}
    found = chat(ASK, silent, call, after, TELL)["messages"]
    assert found == chat(ASK, {**CALL, "reasoning_content": "I add."}, after, TELL)["messages"]
    assert found == chat(ASK, call, after, TELL)["messages"]
    plain = {"role": "tool_call", "content": TIDE_TEXT}
    for earlier in ({**silent, "content": "Let me look."}, {**silent, "thinking": "Hm."}, plain, call):
        assert why({"messages": [ASK, earlier, call, after, TELL]}) == "reasoning_out_of_place"
    empty = {"role": "tool_call", "content": f"<think>\n</think>{TIDE_TEXT}"}
    look = {"role": "assistant", "content": "Let me look."}
    assert chat(ASK, look, empty, after, TELL) == chat(ASK, look, plain, after, TELL)


@pytest.mark.parametrize(
    "text", [f"<tool_call>{TIDE_TEXT}</tool_call>", f"<tool_call>{TIDE_TEXT}", f"{TIDE_TEXT}</tool_call>"]
)
def test_a_turn_of_calls_in_tags_is_read_or_rejected(text):
    look, call = {"role": "assistant", "content": "Let me look."}, {"role": "tool_call", "content": text}
    if text.startswith("<") and text.endswith(">"):
        plain = {"role": "tool_call", "content": TIDE_TEXT}
        assert chat(ASK, look, call) == chat(ASK, look, plain)
    else:
        assert why({"messages": [ASK, look, call]}) in ("broken_tools", "reasoning_out_of_place")


def test_tools_that_were_encoded_twice_are_tools():
    twice = json.dumps(json.dumps([TIDE]))
    assert chat(ASK, TELL, tools=twice) == chat(ASK, TELL, tools=[TIDE])
    assert why({"messages": [ASK, TELL], "tools": json.dumps("the tide")}) == "broken_tools"


@pytest.mark.parametrize(("key", "value"), [("parts", [{"text": "No."}]), ("value", "No."), ("value", 3)], ids=str)
def test_another_text_beside_the_content_is_counted(key, value, tmp_path):
    assert not_read(tmp_path, ASK, {**TELL, key: value})["turn"] == {key: 1}


@pytest.mark.parametrize(("key", "value"), [("parts", [{"text": "So."}]), ("value", "So."), ("value", "")], ids=str)
def test_the_same_text_beside_the_content_says_nothing_more(key, value, tmp_path):
    assert not_read(tmp_path, ASK, {**TELL, key: value})["turn"] == {}


@pytest.mark.parametrize(("key", "value"), [("parts", [{"text": "So."}]), ("value", "So.")], ids=str)
@pytest.mark.parametrize("empty", ["", None, []], ids=repr)
def test_a_text_beside_an_empty_content_is_the_text(key, value, empty):
    assert chat(ASK, {**TELL, "content": empty, key: value}) == chat(ASK, TELL)


@pytest.mark.parametrize("sign", [{"thought": True}, {"thought": "true"}, {"is_thought": True}], ids=str)
def test_a_turn_marked_as_a_thought_is_not_taught_as_an_answer(sign):
    assert why({"messages": [ASK, {**TELL, **sign}]}) == "reasoning_out_of_place"
    assert why({"contents": [ASK, {"role": "model", "parts": [{"text": "So."}], **sign}]}, "columns", {
        "messages": "contents"}) == "reasoning_out_of_place"  # fmt: skip
