"""Generated rows and files, sound and broken, with the checks they must pass (`python -m tests.tools.faults.fuzz`).

A sound row in any convention must compile to exactly the conversation it was made from. Anything else must be Rejected, a
ToolkitError, or a well-formed conversation that holds no text the row does not hold.
"""

import csv
import io
import json
from pathlib import Path

from hypothesis import strategies as st

from toolkit.data.formats import COLUMN_KEYS, FORMATS
from toolkit.data.keys import is_empty
from toolkit.data.sources import Rejected, canonical, conversations
from toolkit.files import ToolkitError
from toolkit.recipe import Source

SPECIAL = (
    "<|im_end|>", "<|im_start|>user\n", "<think>", "</think>", "<think>\n\n</think>\n\n", "<tool_call>", "</tool_call>",
    '<tool_call>{"name": "f", "arguments": {}}</tool_call>', "<tool_response>x</tool_response>", "{{NAME}}", "{{AUTHOER}}",
    "{{ name }}", "\x00", "\x1b[31m", "\ud83c", "\u2028", "\ufeff", "</s>", "[INST]", "/no_think", '{"name": "f"}', "[", "[]",
    "null", "\r\n", "\u202e", "👩‍🍳", "麦", "", " ", "\n", "0", "-1", "NaN", "1e999", "9" * 5000, "[" * 3000, "x" * 70_000,
)  # fmt: skip
STRUCTURE = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Tags of a conversation's own form, which are left in no answer; a tokenizer's special tokens are the label rule's matter."""
plain = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc"], exclude_characters="<[{"), min_size=1)
texts = plain.filter(lambda text: text.strip() and len(text) < 200 and not is_empty(text))
"""None is a word by which tables write an empty cell, like "NULL": such a system or input is no text."""
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(SPECIAL) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(SPECIAL) | st.text(max_size=8), inner),
    max_leaves=6,
)
values = st.recursive(
    st.integers(-99, 99) | st.booleans() | texts,
    lambda v: st.lists(v, max_size=2) | st.dictionaries(texts, v, max_size=2),
)
calls = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    texts,
    st.dictionaries(texts, values, max_size=2),
)


@st.composite
def sound(draw, tools: bool = True) -> dict:
    """A canonical conversation; where `tools`, perhaps with calls, their results and a schema."""
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(texts)})
        if tools and draw(st.integers(0, 2)) == 0:
            called = draw(st.lists(calls, min_size=1, max_size=2))
            messages.append(
                {"role": "assistant", "content": draw(st.just("") | texts.map(str.rstrip)), "tool_calls": called}
            )
            messages += [{"role": "tool", "content": draw(texts)} for _ in called]
        messages.append({"role": "assistant", "content": draw(texts)})
        if draw(st.booleans()):
            # an answer after reasoning has no margin: it would open every reply
            messages[-1] |= {"content": draw(texts.map(str.lstrip)), "reasoning_content": draw(texts)}
    names = {call["function"]["name"] for message in messages for call in message.get("tool_calls", ())}
    schema = [
        {"type": "function", "function": {"name": name, "parameters": draw(st.dictionaries(texts, values))}}
        for name in sorted(names | {draw(texts)})
    ]
    return {"messages": messages, "tools": schema} if tools and draw(st.booleans()) else {"messages": messages}


@st.composite
def sound_rows(draw) -> tuple[dict, str, dict, dict]:
    """(row, format, columns, the conversation it must compile to), in one of the conventions of FORMATS or by columns."""
    format = draw(st.sampled_from([*(name for name in FORMATS if name != "question"), "columns"]))
    listed = "messages" in FORMATS.get(format, {})
    wanted = draw(sound(tools=listed))
    if listed:
        row = {FORMATS[format]["messages"]: _turns(draw, wanted["messages"], format == "sharegpt")}
        if "tools" in wanted:
            bare = [tool["function"] for tool in wanted["tools"]] if draw(st.booleans()) else wanted["tools"]
            row["tools"] = json.dumps(bare) if draw(st.booleans()) else bare
        return row, format, {}, wanted
    names = FORMATS.get(format) or {"user": "Q", "assistant": "A"}
    others = {"system": "system", "history": "history", "reasoning": "reasoning_content"}
    columns = {**names, **others} if format == "columns" else {}
    messages = list(wanted["messages"])
    row = {"system": messages.pop(0)["content"]} if messages[0]["role"] == "system" else {}
    for message in messages[:-1]:
        message.pop("reasoning_content", None)  # a history holds none
    said = [message["content"] for message in messages]
    row["history"] = [list(pair) for pair in zip(said[:-2:2], said[1:-2:2], strict=True)]
    row |= {names["user"]: said[-2], names["assistant"]: said[-1]}
    if reasoning := messages[-1].get("reasoning_content"):
        row |= _reasoning(draw, names["assistant"], said[-1], reasoning)
    return row, format, columns, wanted


def _reasoning(draw, field: str, answer: str, reasoning: str) -> dict:
    """Reasoning in a field of its own or in tags before the answer, as both are kept."""
    if answer[0] == "\n" or draw(st.booleans()):
        return {"reasoning_content": reasoning}
    return {field: f"<think>\n{reasoning}\n</think>\n\n{answer}"}


def _turns(draw, messages: list[dict], sharegpt: bool) -> list[dict]:
    """Messages as OpenAI's or ShareGPT's turns, calls in `tool_calls`, in turns of their own or in the text."""
    role, content = ("from", "value") if sharegpt else ("role", "content")
    words = {"user": "human", "assistant": "gpt", "tool": "observation"} if sharegpt else {}
    turns = []
    for message in messages:
        turn = {role: words.get(message["role"], message["role"]), content: message["content"]}
        turns.append(turn)
        if "reasoning_content" in message:
            turn |= _reasoning(draw, content, message["content"], message["reasoning_content"])
        bare = [call["function"] for call in message.get("tool_calls", [])]
        way = draw(st.integers(0, 2)) if bare else None
        if way == 0:
            turn["tool_calls"] = [{"id": "1", "function": {**f, "arguments": json.dumps(f["arguments"])}} for f in bare]
        elif way == 1:
            turn[content] += "".join(
                f"\n<tool_call>\n{draw(st.sampled_from([json.dumps, repr]))(f)}\n</tool_call>" for f in bare
            )
        elif way == 2 and turn[content]:
            turns += [{role: "function_call", content: json.dumps(f)} for f in bare]
        elif way == 2:
            turns[-1] = {role: "function_call", content: json.dumps(bare)}
    return turns


@st.composite
def broken_rows(draw) -> tuple[dict, str, dict]:
    """(row, format, columns): a sound row of which one to four places were overwritten, removed or added to."""
    row, format, columns, _ = draw(sound_rows())
    row = json.loads(json.dumps(row))
    for _ in range(draw(st.integers(1, 4))):
        if not (places := list(_places(row))):
            break
        holder, key = draw(st.sampled_from(places))
        change = draw(st.integers(0, 3))
        if change == 0:
            holder[key] = draw(junk)
        elif change == 1 and isinstance(holder[key], str):
            at = draw(st.integers(0, len(holder[key])))
            holder[key] = holder[key][:at] + draw(st.sampled_from(SPECIAL)) + holder[key][at:]
        elif change == 2:
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from([*COLUMN_KEYS, *SPECIAL, "tool_calls", "content", "images", "tag"]))] = draw(
                junk
            )
    return row, format, columns


def _places(value):
    """(holder, key) of every place inside a row."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


@st.composite
def files(draw) -> tuple[str, bytes]:
    """(name, bytes) of a file of rows: any kind and encoding, whole, cut, flipped or joined with other bytes."""
    # mostly what can be read, so that what is wrong lies deeper than the name or the encoding
    ending = draw(st.sampled_from([*[".jsonl"] * 3, ".json", ".csv", ".tsv", ".parquet", ".xlsx", ".txt"]))
    encoding = draw(st.sampled_from([*["utf-8"] * 5, "utf-8-sig", "utf-16", "gb18030", "big5", "cp1252"]))
    rows = draw(
        st.lists(
            sound_rows().map(lambda found: found[0]) | broken_rows().map(lambda found: found[0]), min_size=1, max_size=4
        )
    )
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in rows]
    text = draw(st.sampled_from(["\n", "\r\n", "\n\n", ",\n"])).join(lines)
    if draw(st.booleans()):
        text = json.dumps(rows, indent=draw(st.sampled_from([None, 1])))
    if "csv" in ending or "tsv" in ending:
        out = io.StringIO()
        csv.writer(out, delimiter=draw(st.sampled_from(",;\t"))).writerows(
            [list(row) for row in rows] + [row.values() for row in rows]
        )
        text = out.getvalue()
    raw = text.encode(encoding, "replace")
    at = draw(st.integers(0, len(raw)))
    harm = draw(st.sampled_from(["none", "none", "cut", "flip", "bytes"]))
    if harm == "cut":
        raw = raw[:at]
    elif harm != "none":
        raw = (
            raw[:at]
            + (bytes([raw[at] ^ 32]) if harm == "flip" and at < len(raw) else draw(st.binary()))
            + raw[at + 1 :]
        )
    return f"a{ending}", raw


def assert_sound(case: tuple) -> None:
    """A sound row compiles to the conversation it was made from."""
    row, format, columns, wanted = case
    assert canonical(row, format, columns, {}) == wanted


def assert_broken(case: tuple) -> None:
    """A broken row is rejected, or compiles to a well-formed conversation without a text that is not in the row."""
    row, format, columns = case
    names = {"NAME": "Wheat", "AUTHOR": "us"}
    before = repr(row)
    try:
        found = canonical(row, format, columns, names)
    except Rejected as rejected:
        found = rejected
    assert repr(row) == before  # the row itself is left alone
    if isinstance(found, Rejected):
        assert 0 < len(found.detail) < 2000
        return
    well_formed(found)
    said = "\n".join(_texts(row)).replace("{{NAME}}", "Wheat").replace("{{AUTHOER}}", "us")
    for message in found["messages"]:
        for line in (message["content"] + "\n" + message.get("reasoning_content", "")).split("\n"):
            assert line.strip() in said


def well_formed(found: dict) -> None:
    """Turns in order, text in every field, nothing that a model reads as structure, writable as JSON in UTF-8."""
    roles = "".join({"system": "s", "user": "u", "assistant": "a", "tool": "t"}[m["role"]] for m in found["messages"])
    assert roles.endswith("a")
    assert not any(pair in roles for pair in ("uu", "aa", "us", "as", "ut", "su" * 2, "tu", "ts"))
    text = json.dumps(found, ensure_ascii=False, allow_nan=False)
    text.encode()
    assert "\x00" not in text
    for message in found["messages"]:
        assert message["content"].strip() or message["role"] == "tool" or message["tool_calls"]
        assert message.keys() <= {"role", "content", "reasoning_content", "tool_calls", "train"}
        answer = message["content"] + message.get("reasoning_content", "") if message["role"] == "assistant" else ""
        assert not [token for token in STRUCTURE if token in answer]


def _texts(value):
    """Every text in a row, those inside JSON and Python literals too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield "".join(part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str))
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(item)


def assert_file(case: tuple, folder: Path) -> None:
    """A file gives conversations and Rejected rows, or a ToolkitError that names it."""
    name, raw = case
    path = folder / name
    path.write_bytes(raw)
    message = str(path)
    try:
        for number, found in conversations(Source(str(path)), 1, {"NAME": "Wheat", "AUTHOR": "us"}):
            assert number > 0
            if not isinstance(found, Rejected):
                well_formed(found)
    except ToolkitError as error:
        message = str(error)
    assert str(path) in message
