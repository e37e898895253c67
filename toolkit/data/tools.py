"""Tool schemas and calls in the forms that data sets give them, as OpenAI's objects.

from toolkit.data.tools import read_call; read_call({"name": "tide", "arguments": "{}"}, "turn 2: ")
"""

import ast
import json
import re
from dataclasses import dataclass

from toolkit.data.keys import is_empty, meaning
from toolkit.data.readers import Rejected, json_type
from toolkit.records import Json, JsonObject, Message, Messages, ToolCall

TAGGED_CALL = re.compile("<tool_call>(.*?)</tool_call>", re.DOTALL)
# A call as Qwen3.5 and Qwen3-Coder write it.
XML_CALL = re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
XML_ARGUMENT = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
TAGGED_RESULT = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)
# where a call keeps its arguments: the first that is not empty
ARGUMENTS = "arguments parameters input args kwargs params inputs tool_input action_input".split()
RESULT_IDS = "tool_call_id call_id tool_use_id toolCallId tool_id".split()
CALL_IDS = [*RESULT_IDS, "id"]


@dataclass
class Turn:
    """A message with what pairs calls and results, which messages leave out since no template prints it."""

    message: Message
    raw: JsonObject  # the turn as its set keeps it
    calls: list[Json]  # the message's calls, the same way


def parsed(text: str, where: str, reason: str = "broken_tools") -> Json:
    """The value of JSON text, or of a Python literal, as Hermes sets and pandas write them. Raises Rejected."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            return json.loads(json.dumps(ast.literal_eval(text.strip())))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise Rejected(reason, f"{where}{text[:60]!r} is not JSON: {error}") from error


def function_of(value: Json, where: str) -> JsonObject:
    """A function as OpenAI wraps it, {"type": "function", "function": {"name", …}}, or bare."""
    function = value.get("function", value) if type(value) is dict else None
    if type(function) is not dict or type(function.get("name")) is not str:
        raise Rejected("broken_tools", f"{where}{str(value)[:60]!r}: expected a function with a name")
    # Anthropic's name; some sets keep it as JSON text
    parameters = function.get("input_schema") or function.get("parameters")
    if type(parameters) is str and parameters.strip():
        parameters = parsed(parameters, where)
    if parameters == function.get("parameters"):
        return function
    return {key: value for key, value in function.items() if key != "input_schema"} | {"parameters": parameters}


def read_call(call: Json, where: str) -> ToolCall:
    """A tool call with its arguments as an object, under any name of ARGUMENTS. Raises Rejected.

    A call without any of them has no other key that might be its arguments."""
    function = function_of(call, where)
    arguments: Json = next((function[key] for key in ARGUMENTS if function.get(key)), {})
    if type(arguments) is str:
        arguments = parsed(arguments, where)
    if type(arguments) is not dict:
        raise Rejected("broken_tools", f"{where}a call's arguments are {json_type(arguments)}, expected an object")
    if function.keys().isdisjoint(ARGUMENTS):
        for key, value in {**call, **function}.items():
            if key not in ("name", "function") and meaning(key) != "harmless" and not is_empty(value):
                raise Rejected("broken_tools", f"{where}a call has {key!r} and no arguments: call them `arguments`")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def read_calls(text: str, where: str) -> list[Json]:
    """The calls in <tool_call> tags, as JSON or as XML; one pair of tags may hold a list of calls.

    Values of XML stay text, which a template writes as it was: the row does not say whether 3 is a number."""
    calls: list[Json] = []
    for tagged in TAGGED_CALL.findall(text):
        in_xml = XML_CALL.findall(tagged)
        value = [{"name": name, "arguments": dict(XML_ARGUMENT.findall(body))} for name, body in in_xml]
        value = value or parsed(tagged, where)
        calls += value if type(value) is list else [value]
    return calls


def in_call_order(turns: list[Turn]) -> Messages:
    """Messages, with the results of tools in the order of their calls: templates print both without what pairs them.

    Raises Rejected where several results follow a turn and one of them answers none of its calls."""
    blocks: list[list[Turn]] = []  # a turn, and the results that follow it
    for turn in turns:
        if blocks and turn.message["role"] == "tool":
            blocks[-1].append(turn)
        else:
            blocks.append([turn])
    return [turn.message for first, *results in blocks for turn in (first, *sort_results(results, first.calls))]


def sort_results(results: list[Turn], calls: list[Json]) -> list[Turn]:
    """Results in the order of the calls, by their ids, or else by the names of the functions. Raises Rejected.

    Without either they stay as they are."""
    if len(results) < 2:
        return results
    ids = [sign_of(call, CALL_IDS) for call in calls]
    names = [function_of(call, "")["name"] for call in calls]
    for keys, known in ((RESULT_IDS, ids), (["id"], ids), (["name", "tool_name"], names)):
        given = [sign_of(result.raw, keys) for result in results]
        # a result's own `id` or name may be something else, its number or who speaks
        if any(known) and any(given) and (keys is RESULT_IDS or not set(known).isdisjoint(given)):
            if given == known:
                break
            if sorted(set(given).intersection(known)) != sorted(given):
                raise Rejected("unknown_call", f"the results are of the calls {given}, one each, the calls are {known}")
            return [results[given.index(sign)] for sign in sorted(given, key=known.index)]
    return results


def sign_of(holder: JsonObject, keys: list[str]) -> str:
    """The first of some keys that holds something, as text: ids may be numbers, 0 too."""
    return next((str(holder[key]) for key in keys if holder.get(key) not in (None, "")), "")


def read_schema(value: Json, where: str) -> list[JsonObject]:
    """The tools of a list or of one object, or of either as JSON text; bare functions get OpenAI's wrapping."""
    while type(value) is str and value.strip():  # some sets encode it twice
        value = parsed(value, where)
    if not value or type(value) is str:
        return []
    tools = value if type(value) is list else [value]
    return [{"type": "function", "function": function_of(tool, where)} for tool in tools]


def check_calls(messages: Messages, tools: list[JsonObject]) -> None:
    """Raises Rejected where a called tool is not in the row's schema, and for numbers that JSON does not have."""
    calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    if not calls and not tools:
        return
    names = [tool["function"]["name"] for tool in tools]
    for call in calls:
        # without a schema the tools are described in the system prompt, if at all
        if names and call["name"] not in names:
            raise Rejected("unknown_tool", f"{call['name']!r} is called; the row's tools are {', '.join(names)[:200]}")
    try:
        # Python reads and writes NaN and Infinity, which no JSON parser of a tool takes
        json.dumps([calls, tools], allow_nan=False)
    except ValueError as error:
        raise Rejected("not_finite", f"a number in a tool or call is NaN or infinite: {error}") from error
