"""Raw rows, in whatever convention they were kept, become one canonical conversation, or are rejected with a reason.

canonical({"query": "Hi", "response": "Hello!"}, "query_response", columns={}, placeholders={})
"""

import difflib
import json

from toolkit.files import ToolkitError
from toolkit.sources.conversation import MAX_TURNS, checked, split_think
from toolkit.sources.rows import Rejected, kind_name

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
NAMES = {name: {**SHARED, "reasoning": REASONING, **own} for name, own in FORMATS.items()}
USER_WORDS = ("question", "instruction", "prompt", "query", "problem", "input", "user", "human")
ASSISTANT_WORDS = ("answer", "response", "output", "completion", "solution", "reply", "chosen", "assistant")
MEDIA = ("images", "image", "videos", "audios")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("tool", "observation", "tool_response"), "tool"),
}


def canonical(row: dict, format: str, columns: dict, placeholders: dict) -> dict:
    """One raw row as {"messages": […], "tools": […] if any, "expected_answer": "…" if any}.

    Messages hold role, content, and where there is any reasoning_content and tool_calls (arguments as an object).
    Raises Rejected with the reason and the field or turn.
    """
    for name in MEDIA:
        if row.get(name):
            raise Rejected("not_text", f"{name!r} is not empty: only text is trained on")
    names = _columns(columns) if format == "columns" else NAMES[format]
    messages = _conversation(row, names) if "messages" in names else _pair(row, names)
    system = _optional_text(row, names.get("system"))
    if system.strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    tools = _tools(row.get(names.get("tools")))
    conversation = checked(messages, tools, placeholders, row.get("tag") or row.get("language"))
    if answer := _expected_answer(row, names.get("expected_answer")):
        conversation["expected_answer"] = answer
    return conversation


def _columns(columns: dict) -> dict:
    return {**columns, "reasoning": (columns["reasoning"],)} if "reasoning" in columns else columns


def _text(row: dict, name: str) -> str:
    value = row.get(name)
    if type(value) is str:
        return value
    if value is None:
        raise Rejected("null_field" if name in row else "missing_field", f"{name!r} is missing or null, expected text")
    raise Rejected("wrong_type", f"{name!r} is {kind_name(value)}, expected text")


def _optional_text(row: dict, name: str | None) -> str:
    return "" if row.get(name) is None else _text(row, name)


def _pair(row: dict, names: dict) -> list[dict]:
    """Messages of a row with a question and an answer column, after the earlier turns of its history."""
    user, assistant = names["user"], names["assistant"]
    if type(row.get(user)) is list and type(row.get(assistant)) is list:  # TRL's conversational prompt/completion
        return _turns(row[user], user) + _turns(row[assistant], assistant)
    question, answer = _text(row, user), _text(row, assistant)
    if extra := _optional_text(row, names.get("input")):
        question = f"{question}\n{extra}"
    last = {"role": "assistant", "content": answer}
    if reasoning := _reasoning(row, names.get("reasoning", ()), "row"):
        last["reasoning_content"] = reasoning
    return [*_history(row, names.get("history")), {"role": "user", "content": question}, last]


def _history(row: dict, name: str | None) -> list[dict]:
    """Earlier turns, kept as [[question, answer], …]."""
    pairs = row.get(name) or []
    if type(pairs) is not list:
        raise Rejected("wrong_type", f"{name!r} is {kind_name(pairs)}, expected [[question, answer], …]")
    if len(pairs) > MAX_TURNS:
        raise Rejected("too_many_turns", f"{name!r} has {len(pairs):,} turns; the limit is {MAX_TURNS:,}")
    messages = []
    for pair in pairs:
        if type(pair) is not list or [type(text) for text in pair] != [str, str]:
            raise Rejected("wrong_type", f"{name!r} holds {str(pair)[:60]!r}, expected [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _reasoning(holder: dict, fields: tuple, where: str) -> str:
    for field in fields:
        value = holder.get(field)
        if value:
            if type(value) is not str:
                raise Rejected("wrong_type", f"{where}: {field!r} is {kind_name(value)}, expected text")
            return value.strip("\n")
    return ""


def _conversation(row: dict, names: dict) -> list[dict]:
    """Messages of a row that keeps them as a list. A reasoning column counts only when `columns` names it: sets
    with a list of messages use a `reasoning` column for other things (on/off)."""
    name = names["messages"]
    if row.get(name) is None:
        _text(row, name)
    messages = _turns(row[name], name)
    named = names.get("reasoning", REASONING)
    if named is not REASONING and messages and (reasoning := _reasoning(row, named, "row")):
        messages[-1]["reasoning_content"] = reasoning
    return messages


def _turns(turns, name: str) -> list[dict]:
    """Messages from role/content or from/value turns; a function_call joins the assistant turn before it."""
    if type(turns) is not list:
        raise Rejected("wrong_type", f"{name!r} is {kind_name(turns)}, expected a list of turns")
    if len(turns) > MAX_TURNS:
        raise Rejected("too_many_turns", f"{name!r} has {len(turns):,} turns; the limit is {MAX_TURNS:,}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if type(turn) is not dict:
            raise Rejected("wrong_type", f"turn {number} is {kind_name(turn)}, expected role and content")
        said = turn.get("role") or turn.get("from")
        role = ROLES.get(said) if type(said) is str else None
        if role is None:
            reason = "missing_field" if said is None else "unknown_role"
            raise Rejected(reason, f"turn {number}: role {said!r}, expected one of {', '.join(ROLES)}")
        message = _message(turn, role, f"turn {number} ({said})")
        if role == "call" and messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
        elif role != "system" or message["content"].strip():  # an empty system turn says nothing
            messages.append(message)
    return messages


def _message(turn: dict, role: str, where: str) -> dict:
    calls = turn.get("tool_calls") or []
    if type(calls) is not list:
        raise Rejected("broken_tools", f"{where}: tool_calls is {kind_name(calls)}, expected a list")
    content = turn["content"] if "content" in turn else turn.get("value")
    if content is None and (calls or role == "system"):
        content = ""
    if type(content) is list:
        content = _joined_parts(content, where)
    if type(content) is not str:
        missing = "null_field" if "content" in turn or "value" in turn else "missing_field"
        reason = missing if content is None else "wrong_type"
        raise Rejected(reason, f"{where}: content is {kind_name(content)}, expected text")
    if role == "call":
        reasoning, content = split_think(content, where)
        content, calls = "", _calls_of_text(content, where)
    else:
        reasoning = _reasoning(turn, REASONING, where) if role == "assistant" else ""
    message = {"role": "assistant" if role == "call" else role, "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [_call(call, where) for call in calls]
    return message


def _joined_parts(parts: list, where: str) -> str:
    """OpenAI's list of content parts, all of them text."""
    if all(type(part) is dict and type(part.get("text")) is str for part in parts):
        return "".join(part["text"] for part in parts)
    raise Rejected("not_text", f"{where}: content has parts that are not text")


def _json(text: str, where: str, what: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected("broken_tools", f"{where}: {what} is not JSON: {error}") from error


def _calls_of_text(text: str, where: str) -> list:
    value = _json(text, where, "a function_call")
    return value if type(value) is list else [value]


def _call(call, where: str) -> dict:
    """A tool call as OpenAI writes it, or bare {"name", "arguments"}; arguments as an object."""
    function = call.get("function", call) if type(call) is dict else None
    if type(function) is not dict or type(function.get("name")) is not str:
        raise Rejected("broken_tools", f"{where}: a tool call is {str(call)[:60]!r}, expected name and arguments")
    arguments = function.get("arguments") or {}
    if type(arguments) is str:
        arguments = _json(arguments, where, "a call's arguments")
    if type(arguments) is not dict:
        raise Rejected("broken_tools", f"{where}: a call's arguments are {kind_name(arguments)}, expected an object")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(value) -> list[dict]:
    """The tools schema from a list, one object, or either as JSON text; bare functions get OpenAI's wrapping."""
    if type(value) is str and value.strip():
        value = _json(value, "row", "'tools'")
    if not value or type(value) is str:
        return []
    tools = []
    for tool in value if type(value) is list else [value]:
        function = tool.get("function", tool) if type(tool) is dict else None
        if type(function) is not dict or type(function.get("name")) is not str:
            raise Rejected("broken_tools", f"'tools' holds {str(tool)[:60]!r}, expected a function with a name")
        tools.append({"type": "function", "function": function})
    return tools


def _expected_answer(row: dict, name: str | None) -> str:
    value = row.get(name)
    if type(value) in (int, float):
        return str(value)
    return "" if value is None else _text(row, name)


def recognise(fields: list[str], format: str, columns: dict, where: str) -> str:
    """The name of a source's format: checked where it is given, found by the fields where it is `auto`.

    Raises ToolkitError that lists the fields and the nearest format where they fit none or several.
    """
    known = [*FORMATS, "columns"]
    if format not in ("auto", *known):
        raise ToolkitError(f"{where}: unknown format {format!r}: expected auto, {', '.join(known)}")
    if columns or format == "columns":
        return _check_columns(fields, format, columns, where)
    fitting = [name for name in FORMATS if set(signature(name)) <= set(fields)]
    if format == "auto" and len(fitting) > 1:  # an openmath row holds a question too: the richer reading is meant
        fitting = [name for name in fitting if name != "question"]
    if format in fitting or (format == "auto" and len(fitting) == 1):
        return fitting[0] if format == "auto" else format
    if len(fitting) > 1 and format == "auto":
        raise ToolkitError(
            f"{where}: fits several formats: set `format:` to one of {', '.join(fitting)}; "
            f"the row's fields are {', '.join(fields)}"
        )
    problem = "no known format" if format == "auto" else f"not {format}, which needs {' and '.join(signature(format))}"
    raise ToolkitError(f"{where}: {problem}; the row's fields are {', '.join(fields)}. {_nearest(fields)}")


def signature(format: str) -> list[str]:
    """The columns that make a format: all but `input`."""
    return [column for key, column in FORMATS[format].items() if key != "input"]


def _check_columns(fields: list[str], format: str, columns: dict, where: str) -> str:
    if format not in ("auto", "columns"):
        raise ToolkitError(f"{where}: `columns` goes with `format: columns`, not with {format!r}")
    unknown = [key for key in columns if key not in COLUMN_KEYS]
    if unknown:
        raise ToolkitError(f"{where}: columns.{unknown[0]}: expected one of {', '.join(COLUMN_KEYS)}")
    if "messages" not in columns and not {"user", "assistant"} <= columns.keys():
        raise ToolkitError(f"{where}: columns needs `user` and `assistant` (or `messages`). {_nearest(fields)}")
    for key, column in columns.items():
        if column not in fields:
            near = difflib.get_close_matches(str(column), fields, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ToolkitError(
                f"{where}: columns.{key}: no field {column!r}: {hint}The row's fields are {', '.join(fields)}"
            )
    return "columns"


def _nearest(fields: list[str]) -> str:
    """What to write in the recipe for rows nobody recognises: the nearest format, the columns by likely names."""

    def likeness(format: str) -> float:
        best = [max(difflib.SequenceMatcher(None, c, f.lower()).ratio() for f in fields) for c in signature(format)]
        return sum(best) / len(best)

    near = max(FORMATS, key=likeness)
    user = next((f for word in USER_WORDS for f in fields if word in f.lower()), "…")
    assistant = next((f for word in ASSISTANT_WORDS for f in fields if word in f.lower() and f != user), "…")
    return (
        f"The nearest format is {near} ({', '.join(signature(near))}). "
        f"To name the columns: columns: {{user: {user}, assistant: {assistant}}}"
    )
