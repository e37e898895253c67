"""Turns as data sets keep them become messages: the text, the reasoning, the calls, and whether the turn is trained on.

turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!", "loss": False}]
messages, notes = read_turns(turns, trained=[True, True])
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from toolkit.data.keys import is_empty, is_good, is_setting, is_trained, meaning, yes_or_no
from toolkit.data.readers import Rejected, json_type
from toolkit.data.tools import (
    TAGGED_CALL,
    TAGGED_RESULT,
    Turn,
    in_call_order,
    parsed,
    read_call,
    read_calls,
    read_schema,
)
from toolkit.records import Json, JsonObject, Message, Messages

NAMES = {
    "system": "system developer",
    "user": "user human",
    "assistant": "assistant gpt model bot chatgpt ai",
    "call": "function_call tool_call",
    "tool": "tool observation tool_response function",
}
ROLES = {name: role for role, names in NAMES.items() for name in names.split()}
CONTENTS = ["content", "value", "parts"]  # OpenAI, ShareGPT, Gemini
# Keys of a turn that are read as such.
TURN = dict.fromkeys(
    "role from content value parts tool_calls function_call name tool_name tool_call_id toolCallId".split(),
    "text",
)
REASONING_PARTS = "reasoning thinking thought reasoning_text reasoning_content".split()
# `type` of a part of a content → what it holds.
PARTS = {
    **dict.fromkeys("text input_text output_text refusal".split(), "text"),
    **dict.fromkeys(REASONING_PARTS, "reasoning"),
    "tool_use": "call",
}
# What is read beside the turns.
TEXTS = ("reasoning", "system", "tools")
# Where a part keeps its text.
PART_TEXTS = ["text", "content", "value", "refusal", *REASONING_PARTS]
# Keys of a part that are read as such, or say nothing that is trained on.
PART = dict.fromkeys([*PART_TEXTS, "type", "is_thought", "signature", "annotations", "cache_control"], "text")
PARTS_AS_TEXT = re.compile(rf"\s*\[\s*{{\s*[\"']type[\"']\s*:\s*[\"'](?:{'|'.join(PARTS)})[\"']")


@dataclass
class Notes:
    """What the keys beside the text say, of a row or of its turns."""

    reasoning: JsonObject = field(default_factory=dict)
    """{key: value} of the keys that hold reasoning."""
    system: JsonObject = field(default_factory=dict)
    """The same of system prompts."""
    tools: list[JsonObject] = field(default_factory=list)
    marks: JsonObject = field(default_factory=dict)
    """The same of marks that say whether the loss counts something."""
    bad: JsonObject = field(default_factory=dict)
    """The same of marks by which preference data say that the answer is bad."""
    not_read: list[str] = field(default_factory=list)
    """Keys that no rule knows."""


def read_notes(
    holder: JsonObject,
    kinds: Mapping[str, str],
    where: str,
    named_only: bool = False,
) -> Notes:
    """What the keys of a row or turn say. Raises Rejected for pictures and sound.

    `kinds` says of some keys what they hold ("text": read elsewhere); with `named_only` no other key is taken for a text, and
    no number for a mark of preference data."""
    notes = Notes()
    for key, value in holder.items():
        kind = kinds.get(key) or meaning(key)
        if kind in ("text", "harmless") or is_empty(value):
            continue
        if key == "rejected" and "chosen" in holder:  # the text of the other answer, which may be "True"
            continue
        is_number = type(value) in (int, float)
        if named_only and key not in kinds and (kind in TEXTS or (kind == "good" and is_number)):
            kind = ""
        if kind == "nested" and type(value) is dict:
            _note_inner(notes, key, value, where)
        else:
            _note(notes, kind, key, value, where)
    return notes


def _note(
    notes: Notes,
    kind: str,
    key: str,
    value: Json,
    where: str,
) -> None:
    """Sort a key by what it holds."""
    match kind:
        case "media":
            raise Rejected("not_text", f"{where}{key!r} is not empty: only text is trained on")
        case "tools":
            notes.tools += read_schema(value, f"{where}{key!r}: ")
        case "reasoning":
            notes.reasoning[key] = value
        case "system":
            notes.system[key] = value
        case "train" | "no_train" | "unclear":
            notes.marks[key] = value
        case "good" | "bad" if (says := is_good(key, value)) is not None:
            if not says:
                notes.bad[key] = value
        case _:  # a label may be the class of a classification
            notes.not_read.append(key)


def _note_inner(
    notes: Notes,
    key: str,
    holder: JsonObject,
    where: str,
) -> None:
    """Of an object of particulars the marks count; a text in it is nobody's turn."""
    for name, value in holder.items():
        kind = meaning(name)
        if kind in ("train", "no_train", "good", "bad") and yes_or_no(value) is not None:
            _note(notes, kind, name, value, f"{where}{key}.")
        elif kind != "harmless" and not is_empty(value) and not (kind == "reasoning" and is_setting(name, value)):
            notes.not_read.append(f"{key}.{name}")


def read_turns(turns: list[Json], trained: list[bool]) -> tuple[Messages, Notes]:
    """Messages from role/content or from/value turns, and what the turns say beside them.

    A function_call joins the assistant turn before it. A turn that is not to be trained on has train: False; `trained`
    is the row's own mark for each turn. Raises Rejected."""
    read: list[Turn] = []
    notes = Notes()
    for number, kept in enumerate(turns, start=1):
        is_text = type(kept) is str and kept.lstrip().startswith("{")  # a turn as JSON text
        turn = parsed(kept, f"turn {number}: ", "wrong_type") if is_text else kept
        role = role_of(turn, number)
        where = f"turn {number} ({role}): "
        message, calls = read_turn(turn, role, where, notes)
        if not trained[number - 1] and message["role"] == "assistant":
            message["train"] = False
        if role == "call" and read and (last := read[-1]).message["role"] == "assistant":
            join_calls(last.message, message, where)
            last.calls += calls
        elif role != "system" or message["content"].strip():  # an empty system turn says nothing
            read.append(Turn(message, turn, calls))
    return in_call_order(read), notes


def join_calls(message: Message, later: Message, where: str) -> None:
    """Add the calls of a turn of their own to the assistant's message before it, with the reasoning that leads to them.

    Raises Rejected where a template, which writes reasoning first, would put it before what was said earlier."""
    thought = re.sub("</?think>", "", later.get("reasoning_content", later["content"])).strip()
    if not thought:
        message["tool_calls"] = message.get("tool_calls", []) + later["tool_calls"]
    elif message["content"].strip() or not message.keys().isdisjoint(("reasoning_content", "tool_calls")):
        raise Rejected("reasoning_out_of_place", f"{where}reasoning after a text, a call or other reasoning")
    else:
        message.update(later)
    if "train" in later:  # one mark is enough for both
        message["train"] = False


def role_of(turn: Json, number: int) -> str:
    """Who speaks: a value of ROLES. Raises Rejected."""
    if type(turn) is not dict:
        raise Rejected("wrong_type", f"turn {number} is {json_type(turn)}, expected role and content")
    name = turn.get("role") or turn.get("from")
    role = ROLES.get(str(name).lower())
    if role is None:
        reason = "missing_field" if name is None else "unknown_role"
        raise Rejected(reason, f"turn {number}: role {name!r}, expected one of {', '.join(ROLES)}")
    return role


def read_turn(
    turn: JsonObject,
    role: Json,
    where: str,
    notes: Notes,
) -> tuple[Message, list[Json]]:
    """One turn as a message, with its calls as they are kept; what else it says joins `notes`, which are those of the row."""
    # most turns are a role and a text
    own = read_notes(turn, TURN, where) if len(turn) > 2 else Notes()
    notes.tools += own.tools
    # a system prompt belongs to the row; other roles neither think nor are they judged
    notes.not_read += [*own.not_read, *own.system]
    text, reasoning, calls = read_content(turn, role, where, notes)
    if role not in ("assistant", "call"):
        notes.not_read += [*own.reasoning, *own.bad]
        # Hermes keeps the results of calls in user turns
        if "<tool_response>" in text and (result := TAGGED_RESULT.fullmatch(text)):
            return {"role": "tool", "content": result[1]}, []
        return {"role": role, "content": text}, []
    if is_thought(turn):
        raise Rejected(
            "reasoning_out_of_place", f"{where}the turn is a thought: put it before its answer, as `thinking`"
        )
    for name, value in own.reasoning.items():
        if is_setting(name, value):
            continue
        thought = field_of(turn, name, where=where)
        if reasoning and thought.strip() not in reasoning:
            notes.not_read.append(name)
        reasoning = reasoning or thought
    if role == "call" and not text.rstrip().endswith("</tool_call>"):  # the JSON of calls, perhaps after reasoning
        head, close, call = text.rpartition("</think>")
        text = f"{head}{close}<tool_call>{call}</tool_call>"
    text, tagged = split_calls(text, where)
    message: Message = {"role": "assistant", "content": text}
    if reasoning.strip():
        message["reasoning_content"] = reasoning.strip("\r\n")
    calls = calls + tagged
    if calls:
        message["tool_calls"] = [read_call(call, where) for call in calls]
    # one mark that says no is enough: sets repeat it under several names
    trained = [is_trained(key, value, where) for key, value in own.marks.items()]
    if own.bad or not all(trained):
        message["train"] = False
    return message, calls


def read_content(
    turn: JsonObject,
    role: str,
    where: str,
    notes: Notes,
) -> tuple[str, str, list[Json]]:
    """(text, reasoning, calls) of a turn, as far as its content and its fields for calls hold them."""
    calls = field_of(turn, "tool_calls", list, where, default=[])
    legacy = field_of(turn, "function_call", dict, where, default={})
    if legacy:  # OpenAI's one call, before tool_calls
        calls = [*calls, legacy]
    # some sets mix the spellings; the first that says something is the turn's
    present = [key for key in CONTENTS if key in turn] or ["content"]
    said = [key for key in present if turn.get(key) not in (None, "", [])]
    key = (said or present)[0]
    parts = turn.get(key)
    if type(parts) is str and PARTS_AS_TEXT.match(parts):
        parts = parsed(parts, f"{where}{key!r}: ", "not_text")
    if type(parts) is list:
        text, reasoning, part_calls = read_parts(parts, role, where, notes)
        calls = [*calls, *part_calls]
    else:
        reasoning = ""
        text = field_of(turn, key, where=where, default="" if calls or role == "system" else None)
    notes.not_read += [other for other in said[1:] if turn[other] not in (text, [{"text": text}])]
    return text, reasoning, calls


def split_calls(text: str, where: str) -> tuple[str, list[Json]]:
    """An answer without the <tool_call> tags that end it, and their calls. Elsewhere in a text the tag is rejected later."""
    head, tag, tail = text.partition("<tool_call>")
    calls = tag + tail
    if not tag or TAGGED_CALL.sub("", calls).strip():
        return text, []
    return head.rstrip(), read_calls(calls, where)


def read_parts(
    parts: list[Json],
    role: str,
    where: str,
    notes: Notes,
) -> tuple[str, str, list[Json]]:
    """(text, reasoning, calls) of content parts, as OpenAI, Anthropic and Gemini write them. Raises Rejected."""
    text = ""
    thoughts = []
    calls = []
    for part in parts:
        kind = kind_of_part(part)
        if kind == "call" and role == "assistant":
            calls.append(part)
        elif kind == "text":
            text += text_of_part(part, role, where, notes)
        # reasoning between two texts cannot be kept in its order by a template that writes it first
        elif kind == "reasoning" and role == "assistant" and not text.strip():
            thoughts.append(text_of_part(part, role, where, notes))
        else:
            reason = "reasoning_out_of_place" if kind == "reasoning" else "not_text"
            raise Rejected(reason, f"{where}content has a part of type {kind!r}, expected text, or reasoning before it")
    return text, "\n".join(thoughts), calls


def kind_of_part(part: Json) -> str:
    """text, reasoning or call; for other parts their own type."""
    if type(part) is not dict:
        return "text" if type(part) is str else json_type(part)
    if is_thought(part):
        return "reasoning"
    kind = str(part.get("type") or "text")
    return PARTS.get(kind, kind)


def is_thought(holder: JsonObject) -> bool:
    """Whether a part or turn is marked as reasoning, as Gemini marks it."""
    return any(yes_or_no(holder.get(key)) for key in ("thought", "is_thought"))


def text_of_part(
    part: Json,
    role: str,
    where: str,
    notes: Notes,
) -> str:
    """The text of a part, which must hold nothing else: a text part may come with a picture. Raises Rejected."""
    if type(part) is str:
        return part
    own = read_notes(part, PART, where)
    notes.not_read += [f"content.{key}" for key in (*own.not_read, *own.reasoning, *own.system, *own.bad)]
    if role == "assistant" and not all(is_trained(key, value, where) for key, value in own.marks.items()):
        raise Rejected(
            "unclear_mark", f"{where}a part of it is marked as not to be trained on: a turn is, whole, or is not"
        )
    texts = [part[key] for key in PART_TEXTS if type(part.get(key)) in (str, list) and part[key] != part.get("thought")]
    beside = [key for key, value in part.items() if key not in PART and type(value) in (dict, list) and value]
    if beside or len(texts) != 1:
        raise Rejected("not_text", f"{where}content has a part that is not one text: {str(part)[:60]}")
    # Mistral's thinking parts hold text parts
    return texts[0] if type(texts[0]) is str else read_parts(texts[0], "assistant", where, notes)[0]


def field_of(
    holder: JsonObject,
    name: str,
    kind: type = str,
    where: str = "",
    default: Json = None,
) -> Json:
    """The value of a field, which must be a text (or list, or object); `default`, where given, for null and for a
    missing one. Lists and objects may be kept as JSON text, as in CSV files. Raises Rejected."""
    value = holder.get(name)
    if value is None and default is not None:
        return default
    if kind is not str and type(value) is str and value.lstrip()[:1] in ("[", "{"):
        value = parsed(value, f"{where}{name!r}: ", "wrong_type")
    if type(value) is kind:
        return value
    reason = "wrong_type" if value is not None else "null_field" if name in holder else "missing_field"
    raise Rejected(reason, f"{where}{name!r} is {json_type(value)}, expected {json_type(kind())}")
