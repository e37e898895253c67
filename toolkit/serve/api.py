"""OpenAI's chat completions in words of ours: a body becomes an Ask, strictly; pieces become its chunks and replies.

ask, options = read_body(b'{"messages": [{"role": "user", "content": "Hi"}]}', max_tokens=2048)
"""

import json
import re
import secrets
import time
from dataclasses import dataclass

from toolkit.serve.request import Ask, Piece, Refused

NEUTRAL = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},), "presence_penalty": (0,),
    "frequency_penalty": (0,), "repetition_penalty": (1,), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "functions": ([],), "function_call": ("none",), "audio": (), "prediction": (),
    "reasoning_effort": (),
}  # fmt: skip
"""What is not offered: accepted as null or at the value that changes nothing, refused otherwise rather than ignored."""
NUMBERS = {
    "temperature": (float, 0, 2), "top_p": (float, 1e-9, 1), "top_k": (int, 1, 1000), "min_p": (float, 0, 1),
    "seed": (int, 0, 2**63 - 1),
}  # fmt: skip
CONTROL = re.compile(r"<\|[a-z0-9_]{1,40}\|>")
"""Qwen's control tokens: in a text they would end the turn and let it go on as somebody else."""
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
KINDS = {
    str: "text",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}
MAX_MESSAGES, MAX_TOOLS, MAX_STOPS = 1_000, 128, 4


@dataclass(frozen=True)
class Options:
    """How the reply is to be sent."""

    stream: bool
    include_usage: bool


def read_body(raw: bytes, max_tokens: int) -> tuple[Ask, Options]:
    """The request in a body. `max_tokens` is the most a request may ask for, and what it gets without asking.

    Raises Refused with the field and what was expected."""
    try:
        body = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {str(error)[:200]}") from error
    _expect(body, dict, "the body")
    for name, neutral in NEUTRAL.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise Refused(f"{name} is not offered here", param=name)
    thinking = _switch(body)
    stop = _field(body, "stop", (str, list)) or []
    stop = [stop] if type(stop) is str else stop
    if len(stop) > MAX_STOPS or any(type(s) is not str or not 0 < len(s) <= 100 for s in stop):
        raise Refused(f"stop: expected up to {MAX_STOPS} texts of 1 to 100 characters", param="stop")
    numbers = {name: _number(body, name, *limits) for name, limits in NUMBERS.items() if body.get(name) is not None}
    seed = numbers.pop("seed", None)
    tools = _tools(body)
    ask = Ask(_messages(body), thinking, _field(body, "model", (str,)) or "", tools, _length(body, max_tokens), numbers,
              seed, tuple(stop))  # fmt: skip
    options = _field(body, "stream_options", (dict,)) or {}
    return ask, Options(bool(_field(body, "stream", (bool,))), bool(_field(options, "include_usage", (bool,))))


def _no_constant(name: str):
    raise ValueError(f"{name} is not a JSON number")


def _expect(value, kind: type, where: str):
    if type(value) is not kind:
        raise Refused(f"{where}: expected {KINDS[kind]}", param=where)
    return value


def _field(body: dict, name: str, kinds: tuple[type, ...], where: str = ""):
    """A field that may be absent or null. Raises Refused when it is of another kind."""
    value = body.get(name)
    if value is not None and type(value) not in kinds:
        raise Refused(f"{where}{name}: expected {' or '.join(KINDS[k] for k in kinds)}", param=f"{where}{name}")
    return value


def _number(body: dict, name: str, kind: type, low: float, high: float):
    value = _field(body, name, (int, float) if kind is float else (int,))
    if not low <= value <= high:
        raise Refused(f"{name}: expected {KINDS[kind]} from {low:g} to {high:g}", param=name)
    return value


def _length(body: dict, most: int) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            return _number(body, name, int, 1, most)
    return most


def _switch(body: dict) -> bool:
    """enable_thinking, from chat_template_kwargs, where vLLM, SGLang and llama-server take it, or from beside the messages,
    where EvalScope puts it for its own models; on by default, as in Qwen3's template."""
    given = _field(body, "chat_template_kwargs", (dict,)) or {}
    if unknown := given.keys() - {"enable_thinking"}:
        name = f"chat_template_kwargs.{min(unknown)}"
        raise Refused(f"{name[:100]}: expected only enable_thinking", param="chat_template_kwargs")
    inner = _field(given, "enable_thinking", (bool,), "chat_template_kwargs.")
    outer = _field(body, "enable_thinking", (bool,))
    if {inner, outer} == {True, False}:
        raise Refused("enable_thinking: true in one place and false in another", param="enable_thinking")
    return False not in (inner, outer)


def _messages(body: dict) -> list[dict]:
    messages = _expect(body.get("messages"), list, "messages")
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise Refused(f"messages: expected 1 to {MAX_MESSAGES}, found {len(messages)}", param="messages")
    turns = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    for i, turn in enumerate(turns):
        if turn["role"] == "system" and i:
            raise Refused(f"messages[{i}]: a system message stands first", param=f"messages[{i}]")
        before = turns[i - 1] if i else {"role": "nobody"}
        if turn["role"] == "tool" and before["role"] != "tool" and "tool_calls" not in before:
            raise Refused(f"messages[{i}]: a tool message follows a call", param=f"messages[{i}]")
    if turns[-1]["role"] not in ("user", "tool"):
        raise Refused("messages: expected a user or tool message at the end", param="messages")
    return turns


def _message(message, where: str) -> dict:
    _expect(message, dict, where)
    role = {"developer": "system"}.get(name := message.get("role"), name) if type(message.get("role")) is str else None
    if role not in ("system", "user", "assistant", "tool"):
        raise Refused(f"{where}.role: expected system, user, assistant or tool", param=f"{where}.role")
    turn = {"role": role, "content": _content(message, where, optional=role == "assistant")}
    if role != "assistant":
        return turn
    if reasoning := _field(message, "reasoning_content", (str,), f"{where}."):
        turn["reasoning_content"] = _text(reasoning, f"{where}.reasoning_content")
    if calls := _field(message, "tool_calls", (list,), f"{where}."):
        turn["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    elif not turn["content"] and not reasoning:
        raise Refused(f"{where}.content: expected text", param=f"{where}.content")
    return turn


def _content(message: dict, where: str, optional: bool) -> str:
    content = _field(message, "content", (str, list), f"{where}.")
    if content is None and not optional:
        raise Refused(f"{where}.content: expected text", param=f"{where}.content")
    if type(content) is list:
        parts = [_expect(part, dict, f"{where}.content[{i}]") for i, part in enumerate(content)]
        if any(part.get("type") != "text" or type(part.get("text")) is not str for part in parts):
            raise Refused(f"{where}.content: only parts of type text are taken", param=f"{where}.content")
        content = "".join(part["text"] for part in parts)
    return _text(content or "", f"{where}.content")


def _text(text: str, where: str) -> str:
    if hit := CONTROL.search(text):
        raise Refused(f"{where}: holds {hit.group()}, which the model would read as structure", param=where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(f"{where}: holds half a character", param=where) from error
    return text


def _call(call, where: str) -> dict:
    function = _expect(_expect(call, dict, where).get("function"), dict, f"{where}.function")
    name = _name(function, f"{where}.function")
    try:
        arguments = json.loads(_expect(function.get("arguments"), str, f"{where}.function.arguments"))
    except (ValueError, RecursionError) as error:
        message = f"{where}.function.arguments: expected a JSON object as text"
        raise Refused(message, param=f"{where}.function.arguments") from error
    _expect(arguments, dict, f"{where}.function.arguments")
    _text(json.dumps(arguments, ensure_ascii=False), f"{where}.function.arguments")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _name(function: dict, where: str) -> str:
    name = _expect(function.get("name"), str, f"{where}.name")
    if not NAME.fullmatch(name):
        raise Refused(f"{where}.name: expected 1 to 64 letters, digits, _ . -", param=f"{where}.name")
    return name


def _tools(body: dict) -> list[dict] | None:
    tools = _field(body, "tools", (list,)) or []
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise Refused("tool_choice: expected auto or none", param="tool_choice")
    if len(tools) > MAX_TOOLS:
        raise Refused(f"tools: expected up to {MAX_TOOLS}", param="tools")
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        function = _expect(_expect(tool, dict, where).get("function"), dict, f"{where}.function")
        _name(function, f"{where}.function")
        _field(function, "description", (str,), f"{where}.function.")
        _field(function, "parameters", (dict,), f"{where}.function.")
        _text(_dumped(tool, where), where)
    return tools if tools and choice != "none" else None


def _dumped(value, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError as error:
        raise Refused(f"{where}: nested too deeply", param=where) from error


class Writer:
    """Pieces of one reply as OpenAI's chunks, or gathered as one reply."""

    def __init__(self, model: str):
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self.texts = {"reasoning": "", "content": ""}
        self.calls: list[dict] = []

    def delta(self, piece: Piece) -> dict:
        """What a piece adds, in the words of a chunk's delta; also kept for `reply`."""
        if piece.kind == "tool_call":
            call = {"id": f"call_{secrets.token_hex(8)}", "type": "function", "function": json.loads(piece.text)}
            self.calls.append(call)
            return {"tool_calls": [{"index": len(self.calls) - 1, **call}]}
        self.texts[piece.kind] += piece.text
        return {{"reasoning": "reasoning_content", "content": "content"}[piece.kind]: piece.text}

    def chunk(self, delta: dict, finish: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, end: Piece) -> dict:
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage(end)}

    def reply(self, end: Piece) -> dict:
        message = {"role": "assistant", "content": self.texts["content"] or (None if self.calls else "")}
        if self.texts["reasoning"]:
            message["reasoning_content"] = self.texts["reasoning"].strip()
        if self.calls:
            message["tool_calls"] = self.calls
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": end.finish}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": usage(end)}


def usage(end: Piece) -> dict:
    """OpenAI's count of a reply's tokens."""
    given = end.usage
    total = given["prompt_tokens"] + given["completion_tokens"]
    details = {"reasoning_tokens": given["reasoning_tokens"]}
    counts = {name: given[name] for name in ("prompt_tokens", "completion_tokens")}
    return {**counts, "total_tokens": total, "completion_tokens_details": details}


def error_object(refused: Refused) -> dict:
    """OpenAI's error body."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(refused.status, "invalid_request_error" if refused.status < 500 else "server_error")
    return {"error": {"message": str(refused), "type": kind, "param": refused.param, "code": refused.code}}
