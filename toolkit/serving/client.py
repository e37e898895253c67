"""Ask a server of OpenAI's API: one in this process, one that `serve` started, or vLLM's.

engine = open_engine(folder); ask(engine, chat_body(engine, folder.name, "thinking", messages, 512)).content
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from toolkit.export.checkpoint import check_scale
from toolkit.export.llama import Engine, Refused
from toolkit.files import Say, ToolkitError, append_rows, read_jsonl, write_jsonl
from toolkit.recipe import of_run
from toolkit.records import JsonObject
from toolkit.serving.engine import BASE, sampling_by_mode, start
from toolkit.training.model import checkpoint_file
from toolkit.view.progress import Progress

Message = JsonObject
Request = JsonObject
"""A reply that is wanted: row, mode, run (who answers), messages, tools if any, seed, max_new_tokens, and whatever else it
depends on. Row and mode tell it from the others of its file."""
BEGINNING = b'{"row": '
"""How the line of a reply begins."""


@dataclass
class Answer:
    """A reply, as far as it has come."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[JsonObject] = field(default_factory=list)
    tokens: int = 0
    is_cut: bool = False
    """Ended by the limit of tokens."""


def open_engine(
    folder: Path,
    *,
    url: str | None = None,
    key: str | None = None,
    names: Iterable[str] = (),
    scale: float = 1.0,
    say: Say = lambda _: None,
    **options: Any,
) -> Engine:
    """A run's engine: the server at `url` that serves `names` (by default the run), else one in this process with `options`
    of `start`. Raises ToolkitError."""
    if not url:
        return start([folder], scale=scale, say=say, **options)
    engine = connect(url, [*names] or [folder.name], key, scale)
    model = of_run(folder).model
    config = checkpoint_file(model, "config.json") | checkpoint_file(model, "generation_config.json")
    engine.sampling = sampling_by_mode(folder, config)
    return engine


def connect(url: str, wanted: Iterable[str], key: str | None = None, scale: float = 1.0) -> Engine:
    """The server at `url`, by `serve`, llama.cpp or vLLM. Raises ToolkitError where it does not serve what is wanted."""
    check_scale(scale)
    engine = Engine(url.rstrip("/").removesuffix("/v1"), key, scale=scale)
    models = engine.call("/v1/models")["data"]
    served = [model["id"] for model in models]
    engine.takes_scale = any(model.get("owned_by") == "llamacpp" for model in models)
    if engine.takes_scale:
        # its list of models has the first run only
        engine.find_runs()
        served = [*dict.fromkeys([*served, BASE, *engine.runs])] if engine.runs else served
    else:
        engine.runs = tuple(name for name in served if name != BASE)
    if missing := [name for name in wanted if name not in served]:
        raise ToolkitError(f"{url}: serves {', '.join(served)}, not {', '.join(missing)}")
    if scale != 1 and not (engine.takes_scale and engine.runs):
        raise ToolkitError(f"{url}: cannot scale an adapter: `serve` by llama.cpp, without --from, can")
    return engine


def chat_body(engine: Engine, name: str, mode: str, messages: list[Message], max_tokens: int) -> JsonObject:
    """What a chat completion is asked with: who answers, in which mode, with that mode's recommended sampling."""
    thinking = {"enable_thinking": mode == "thinking"}
    body = {"messages": messages, "max_tokens": max_tokens, "chat_template_kwargs": thinking}
    return body | engine.sampling.get(mode, {}) | engine.lora(name)


def ask(engine: Engine, body: JsonObject) -> Answer:
    """The whole answer to a request. Raises ToolkitError."""
    reply = engine.call("/v1/chat/completions", body)
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        calls = [{"type": "function", "function": call["function"]} for call in message.get("tool_calls") or []]
        tokens = (reply.get("usage") or {}).get("completion_tokens", 0)
        return Answer(*parts_of(message), calls, tokens, choice["finish_reason"] == "length")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ToolkitError(f"{engine.url}: not a chat completion: {str(reply)[:200]}") from error


def stream(engine: Engine, body: JsonObject, answer: Answer, show: Callable[[str, str], None]) -> None:
    """Add a reply to `answer` as it comes, so that it holds what came before an interruption; `show` gets the name
    (reasoning or content) and text of each piece. Raises ToolkitError."""
    for chunk in engine.stream(body):
        # the last chunk counts the tokens of the whole reply
        answer.tokens = (chunk.get("usage") or {}).get("completion_tokens", answer.tokens)
        for choice in chunk["choices"]:
            reasoning, content = parts_of(choice["delta"])
            answer.reasoning += reasoning
            answer.content += content
            answer.is_cut |= choice["finish_reason"] == "length"
            show("reasoning", reasoning)
            show("content", content)


def parts_of(message: Message) -> tuple[str, str]:
    """(reasoning, content): llama.cpp and vLLM name the first alike, newer vLLM otherwise."""
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    return reasoning, message.get("content") or ""


# --- many requests, and the file of their replies --------------------------------------------------------------------


def answer_all(
    requests: list[Request], file: Path, open_server: Callable[[], Engine], clients: int, progress: Progress
) -> list[str]:
    """Add the replies that a file lacks, `clients` at a time; returns why the server refuses some.

    Each reply is flushed to the disk as it comes, so that the same call goes on after a kill or a cut connection; in the
    end they stand in the order of the requests. Raises ToolkitError where the file holds something else."""
    there = read_replies(file, requests)
    missing = [request for request in requests if place_of(request) not in there]
    progress.skip(len(there))
    # a file that is finished is known without loading a model
    if not missing:
        return []
    engine = open_server()
    writing = Lock()
    refused = []

    def answer(request: Request) -> None:
        try:
            line = reply_line(request, engine)
        except Refused as error:
            refused.append(f"row {request['row']}, {request['mode']}: {error}")
            return
        with writing:
            append_rows(file, [line])
            progress.advance(1)

    pool = ThreadPoolExecutor(clients)
    try:
        for future in as_completed([pool.submit(answer, request) for request in missing]):
            future.result()
    finally:  # those that run are waited for and kept, the others are not begun
        pool.shutdown(cancel_futures=True)
    # in their order, whoever was quickest; a refused one has no line, and there is no file where all were
    if file.is_file():
        lines = {place_of(line): line for line in read_jsonl(file)}
        write_jsonl(file, [lines[place] for place in map(place_of, requests) if place in lines])
    return refused


def place_of(line: JsonObject) -> tuple[int, str]:
    """What tells a request, or its reply, from the others of its file."""
    return line["row"], line["mode"]


def reply_line(request: Request, engine: Engine) -> JsonObject:
    """The line of one reply, which holds all that it depends on. Raises ToolkitError, Refused where the server says why."""
    body = chat_body(engine, request["run"], request["mode"], request["messages"], request["max_new_tokens"])
    # without a cached prefix a reply does not depend on those before it
    body |= {"seed": request["seed"] + request["row"], "cache_prompt": False}
    if "tools" in request:
        body["tools"] = request["tools"]
    answer = ask(engine, body)
    return {
        "row": request["row"],
        "prompt": request["messages"][-1]["content"],
        "mode": request["mode"],
        "reasoning": answer.reasoning.strip(),
        "answer": answer.content.strip(),
        "tool_calls": answer.tool_calls,
        "tokens": answer.tokens,
        "finished": not answer.is_cut,
        **request,
    }


def read_replies(file: Path, requests: list[Request]) -> set[tuple[int, str]]:
    """The places of the replies in a file, after cutting off a last line that a kill left unfinished.

    Raises ToolkitError, and leaves the file as it is, when it holds anything but replies to these requests."""
    if not file.is_file():
        return set()
    move = "name another file, or move this one away"
    # every complete line ends in a line feed, so what follows the last one was cut off
    *complete, unfinished = file.read_bytes().split(b"\n")
    if not BEGINNING.startswith(unfinished[: len(BEGINNING)]):
        raise ToolkitError(f"{file}, line {len(complete) + 1}: not the beginning of a reply: {move}")
    wanted = {place_of(request): {"tools": None, **request} for request in requests}
    lines = read_jsonl(file)
    for number, line in enumerate(lines, start=1):
        try:
            request = wanted[place_of(line)]
        except (KeyError, TypeError) as error:
            raise ToolkitError(f"{file}, line {number}: not a reply to these prompts in this mode: {move}") from error
        if other := [key for key, value in request.items() if line.get(key) != value]:
            raise ToolkitError(f"{file}, line {number}: a reply to other {', '.join(other)}: {move}")
    # only now is it known to be a file of replies
    os.truncate(file, file.stat().st_size - len(unfinished))
    return {place_of(line) for line in lines[: len(complete)]}
