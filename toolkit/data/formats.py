"""Raw rows, in whatever convention they were kept, become one canonical conversation, or are rejected with a reason.

canonical({"query": "Hi", "response": "Hello!"}, "query_response", columns={}, placeholders={})
"""

import ast
import json
import re

from toolkit.data.conversation import checked
from toolkit.data.readers import Rejected, json_type
from toolkit.files import ToolkitError, did_you_mean

FORMATS = {
    "alpaca": {"user": "instruction", "assistant": "output", "input": "input"},
    "messages": {"messages": "messages"},
    "sharegpt": {"messages": "conversations"},
    "query_response": {"user": "query", "assistant": "response"},
    "prompt_completion": {"user": "prompt", "assistant": "completion"},
    "openmath": {"user": "problem", "assistant": "generated_solution"},
    "question": {"user": "problem", "assistant": "expected_answer"},
}
"""Column names by what they hold. A format is recognised by its columns, `input` apart."""
SHARED = {"system": "system", "history": "history", "tools": "tools", "expected_answer": "expected_answer"}
COLUMN_KEYS = ("user", "assistant", "input", "messages", "reasoning", *SHARED)
REASONING = ("reasoning_content", "reasoning", "thinking")
SETTING = re.compile(r"[\w/.-]{0,15}")
"""What a `reasoning` or `thinking` column holds that says how to answer: on, off, high, /no_think."""
USER_WORDS = ("question", "instruction", "prompt", "query", "problem", "input", "user", "human")
ASSISTANT_WORDS = ("answer", "response", "output", "completion", "solution", "reply", "chosen", "assistant")
MEDIA = ("images", "image", "videos", "audios")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("tool", "observation", "tool_response", "function"), "tool"),
}
TOOL_CALL = re.compile("<tool_call>(.*?)</tool_call>", re.DOTALL)
TOOL_RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)


def canonical(
    row: dict, format: str, columns: dict, placeholders: dict, system: str | None = None, turns: str = "last"
) -> dict:
    """One raw row as {"messages": […], "tools": […] if any, "expected_answer": "…" if any}.

    Messages hold role, content, and where there is any reasoning_content and tool_calls (arguments as an object).
    `system` is the system prompt of rows that have none, `turns` says which are trained on, as in a source. Raises Rejected
    with the reason and the field or turn.
    """
    for name in MEDIA:
        if row.get(name):
            raise Rejected("not_text", f"{name!r} is not empty: only text is trained on")
    # columns that the recipe names are taken at their word: no other column counts
    names = columns if format == "columns" else {**SHARED, **FORMATS[format]}
    messages = _messages(_turns(row, names, () if format == "columns" else REASONING), turns == "each")
    own = _field(row, names.get("system"), default="")
    if (prompt := own if own.strip() else system) and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": prompt})
    conversation = {"messages": messages}
    if tools := _tools(row.get(names.get("tools"))):
        conversation["tools"] = tools
    answer = row.get(names.get("expected_answer"))
    if answer not in (None, ""):
        conversation["expected_answer"] = _field(row, names["expected_answer"])
    return checked(conversation, placeholders)


def _field(holder: dict, name: str | None, kind: type = str, where: str = "", default=None):
    """The value of a field, which must be a text (or list); `default`, where given, for null and for a missing one."""
    value = holder.get(name)
    # JSON files keep answers as numbers, CSV files as text
    if name == "expected_answer" and type(value) in (int, float):
        return str(value)
    if value is None and default is not None:
        return default
    if type(value) is kind:
        return value
    reason = "wrong_type" if value is not None else "null_field" if name in holder else "missing_field"
    raise Rejected(reason, f"{where}{name!r} is {json_type(value)}, expected {json_type(kind())}")


def _turns(row: dict, names: dict, unnamed: tuple) -> list:
    """The turns of a row, as they are kept, or made of its question and answer after the turns of its history.

    Of the `unnamed` columns of reasoning none counts beside a list of messages, where sets use one for other things
    (on/off), and beside an answer the first that is no such setting."""
    user, assistant = names.get("user"), names.get("assistant")
    if "messages" in names:
        turns = _field(row, names["messages"], list)
    elif type(row.get(user)) is list:  # TRL's conversational prompt and completion
        turns = row[user] + _field(row, assistant, list)
    else:
        parts = _field(row, user), _field(row, names.get("input"), default="")
        asked = {"role": "user", "content": "\n".join(part for part in parts if part.strip())}
        answer = {"role": "assistant", "content": _field(row, assistant)}
        for name in unnamed:
            if name == "reasoning_content" or not SETTING.fullmatch(str(row.get(name)).strip()):
                answer[name] = row.get(name)
        turns = [*_history(row, names.get("history")), asked, answer]
    if "reasoning" in names and turns and type(turns[-1]) is dict:
        turns = [*turns[:-1], {**turns[-1], "reasoning_content": row.get(names["reasoning"])}]
    return turns


def _history(row: dict, name: str | None) -> list[dict]:
    """Earlier turns, kept as [[question, answer], …]."""
    turns = []
    for pair in _field(row, name, list, default=[]):
        if type(pair) is not list or len(pair) != 2:
            raise Rejected("wrong_type", f"{name!r} holds {pair!r}, expected [question, answer]")
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return turns


def _messages(turns: list, each: bool) -> list[dict]:
    """Messages from role/content or from/value turns; a function_call joins the assistant turn before it.

    Rejects a turn that the set marks as not to be trained on (weight 0, train false), where it would be."""
    messages = []
    for number, turn in enumerate(turns, start=1):
        if type(turn) is not dict:
            raise Rejected("wrong_type", f"turn {number} is {json_type(turn)}, expected role and content")
        said = turn.get("role") or turn.get("from")
        if type(said) is not str or said not in ROLES:
            reason = "missing_field" if said is None else "unknown_role"
            raise Rejected(reason, f"turn {number}: role {said!r}, expected one of {', '.join(ROLES)}")
        message = _message(turn, ROLES[said], f"turn {number} ({said}): ")
        trained = message["role"] == "assistant" and (each or number == len(turns))
        if trained and 0 in (turn.get("weight"), turn.get("train")):
            raise Rejected("untrained_turn", f"turn {number} ({said}) has weight 0 or train false: set `turns: last`")
        if ROLES[said] == "call" and messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
        elif message["role"] != "system" or message["content"].strip():  # an empty system turn says nothing
            messages.append(message)
    return messages


def _message(turn: dict, role: str, where: str) -> dict:
    """One turn as a message; calls come in `tool_calls`, as a function_call turn's JSON, or in <tool_call> tags."""
    calls = _field(turn, "tool_calls", list, where, default=[])
    if legacy := _field(turn, "function_call", dict, where, default={}):  # OpenAI's one call, before tool_calls
        calls = [*calls, legacy]
    # ShareGPT's turns are from/value, but some sets mix both spellings
    key = "value" if turn.get("content") is None and "value" in turn else "content"
    if type(parts := turn.get(key)) is list:  # OpenAI's content parts
        if not all(type(part) is dict and type(part.get("text")) is str for part in parts):
            raise Rejected("not_text", f"{where}content has parts that are not text")
        text = "".join(part["text"] for part in parts)
    else:
        text = _field(turn, key, where=where, default="" if calls or role == "system" else None)
    if role == "call":  # the call's JSON, perhaps after reasoning
        role, text = (
            "assistant",
            re.sub(r"(.*</think>)?(.*)", r"\1<tool_call>\2</tool_call>", text, count=1, flags=re.DOTALL),
        )
    reasoning = ""
    if role == "assistant":
        reasoning = next((_field(turn, name, where=where) for name in REASONING if turn.get(name)), "").strip("\n")
        head, tag, tail = text.partition("<tool_call>")
        if tag and not TOOL_CALL.sub("", tag + tail).strip():  # calls end the text; elsewhere the tag is rejected
            text = head.rstrip()
            for found in (_json(call, where) for call in TOOL_CALL.findall(tag + tail)):
                calls = calls + (found if type(found) is list else [found])
    elif match := TOOL_RESPONSE.fullmatch(text):
        role, text = "tool", match[1]
    message = {"role": role, "content": text}
    if reasoning.strip():
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [_call(call, where) for call in calls]
    return message


def _json(text: str, where: str):
    """The value of JSON text, or of a Python literal, as Hermes sets write their calls."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            return json.loads(json.dumps(ast.literal_eval(text.strip())))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise Rejected("broken_tools", f"{where}{text[:60]!r} is not JSON: {error}") from error


def _function(value, where: str) -> dict:
    """A function as OpenAI wraps it, {"type": "function", "function": {"name", …}}, or bare."""
    function = value.get("function", value) if type(value) is dict else None
    if type(function) is not dict or type(function.get("name")) is not str:
        raise Rejected("broken_tools", f"{where}{str(value)[:60]!r}: expected a function with a name")
    return function


def _call(call, where: str) -> dict:
    """A tool call with its arguments as an object; some sets write `parameters` for arguments."""
    function = _function(call, where)
    arguments = function.get("arguments", function.get("parameters")) or {}
    if type(arguments) is str:
        arguments = _json(arguments, where)
    if type(arguments) is not dict:
        raise Rejected("broken_tools", f"{where}a call's arguments are {json_type(arguments)}, expected an object")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(value) -> list[dict]:
    """The tools schema from a list, one object, or either as JSON text; bare functions get OpenAI's wrapping."""
    if type(value) is str and value.strip():
        value = _json(value, "'tools': ")
    if not value or type(value) is str:
        return []
    tools = value if type(value) is list else [value]
    return [{"type": "function", "function": _function(tool, "'tools': ")} for tool in tools]


def recognise(fields: list[str], format: str, columns: dict, where: str) -> str:
    """The name of a source's format: checked where it is given, found by the fields where it is `auto`.

    Raises ToolkitError that lists the fields and what to write where they fit none or several.
    """
    if format == "columns" or (columns and format == "auto"):
        return _check_columns(fields, columns, where)
    fitting = [name for name in FORMATS if set(signature(name)) <= set(fields)]
    if format in fitting and not columns:
        return format
    if format == "auto" and len(fitting) > 1:  # an openmath row holds a question too: the richer reading is meant
        fitting = [name for name in fitting if name != "question"]
    if format == "auto" and len(fitting) == 1:
        return fitting[0]
    if format == "auto":
        several = f"fits several formats: set `format:` to one of {', '.join(fitting)}"
        problem = several if fitting else "no known format"
    elif format not in FORMATS:
        problem = f"unknown format {format!r}: expected auto, columns, {', '.join(FORMATS)}"
    elif columns:
        problem = f"`columns` goes with `format: columns`, not with {format!r}"
    else:
        problem = f"not {format}, which needs {' and '.join(signature(format))}"
    raise ToolkitError(f"{where}: {problem}; the row's fields are {', '.join(fields)}. {_advice(fields)}")


def signature(format: str) -> list[str]:
    """The columns that make a format: all but `input`."""
    return [column for key, column in FORMATS[format].items() if key != "input"]


def _check_columns(fields: list[str], columns: dict, where: str) -> str:
    for key, column in columns.items():
        if key not in COLUMN_KEYS:
            raise ToolkitError(f"{where}: columns.{key}: expected one of {', '.join(COLUMN_KEYS)}")
        if column not in fields:
            raise ToolkitError(f"{where}: columns.{key}: no field {column!r}{did_you_mean(str(column), fields)}")
    if "messages" not in columns and not {"user", "assistant"} <= columns.keys():
        raise ToolkitError(f"{where}: columns needs `user` and `assistant` (or `messages`). {_advice(fields)}")
    return "columns"


def _advice(fields: list[str]) -> str:
    """What to write in the recipe for rows that are not recognised: the columns, by likely names."""
    if fields == ["text"]:
        return "Plain text has no question and answer to tell apart: split it into `prompt` and `completion`"
    user = next((f for word in USER_WORDS for f in fields if word in f.lower()), "…")
    assistant = next((f for word in ASSISTANT_WORDS for f in fields if word in f.lower() and f != user), "…")
    return f"To name the columns: columns: {{user: {user}, assistant: {assistant}}}"
