"""Ask a server of OpenAI's API: one that `serve` started, by llama.cpp or vLLM, or one in this process.

engine = open_engine(folder); ask(engine, chat_body(engine, folder.name, "thinking", messages, 512)).content
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.export.llama import Engine
from toolkit.files import ToolkitError
from toolkit.recipe import of_run
from toolkit.serving.engine import BASE, Say, check_scale, sampling_by_mode, start
from toolkit.training.model import checkpoint_file

Message = dict[str, Any]
NAMES = {"reasoning_content": "reasoning", "reasoning": "reasoning", "content": "content"}
"""Where llama.cpp and vLLM put the two parts of a reply."""


@dataclass
class Answer:
    """A reply as far as it has come."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    is_cut: bool = False
    """Ended by the limit of tokens."""


def open_engine(
    folder: Path, *, url: str | None = None, key: str | None = None, scale: float = 1.0, say: Say = lambda _: None,
    **options: Any,
) -> Engine:  # fmt: skip
    """A run's engine for a client: the server at `url`, else one in this process with `options` of `start`."""
    if not url:
        return start([folder], scale=scale, say=say, **options)
    engine = connect(url, folder.name, key, scale)
    model = of_run(folder).model
    config = checkpoint_file(model, "config.json") | checkpoint_file(model, "generation_config.json")
    engine.sampling = sampling_by_mode(folder, config)
    return engine


def chat_body(engine: Engine, name: str, mode: str, messages: list[Message], max_tokens: int) -> dict[str, Any]:
    """What a chat completion is asked with: who answers, in which mode, with that mode's recommended sampling."""
    thinking = {"enable_thinking": mode == "thinking"}
    body = {"messages": messages, "max_tokens": max_tokens, "chat_template_kwargs": thinking}
    return body | engine.sampling.get(mode, {}) | engine.lora(name)


def ask(
    engine: Engine, body: dict[str, Any], show: Callable[[str, str], None] = lambda *_: None,
    stop: threading.Event | None = None, answer: Answer | None = None,
) -> Answer:  # fmt: skip
    """The answer to a request; `show` gets each piece of its reasoning and content, and `stop` ends it early.

    Pieces are added to `answer`, which thus holds what came before an interruption. Raises ToolkitError."""
    answer = answer or Answer()
    for chunk in engine.stream(body):
        # the last chunk counts the tokens of the whole reply
        answer.tokens = (chunk.get("usage") or {}).get("completion_tokens", answer.tokens)
        for choice in chunk["choices"]:
            add_piece(answer, choice["delta"], show)
            answer.is_cut |= choice["finish_reason"] == "length"
        if stop and stop.is_set():
            break
    return answer


def add_piece(answer: Answer, delta: dict[str, Any], show: Callable[[str, str], None]) -> None:
    """Add what one chunk brings."""
    for key, part in NAMES.items():
        if text := delta.get(key):
            show(part, text)
            setattr(answer, part, getattr(answer, part) + text)
    for piece in delta.get("tool_calls") or []:
        # a call comes in pieces: its name first, then its arguments
        if piece["index"] == len(answer.tool_calls):
            answer.tool_calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
        call = answer.tool_calls[piece["index"]]["function"]
        for name, text in piece.get("function", {}).items():
            call[name] += text or ""


def connect(url: str, run: str, key: str | None = None, scale: float = 1.0) -> Engine:
    """The server that `serve` started at `url`, by llama.cpp or vLLM. Raises ToolkitError when it does not serve `run`."""
    check_scale(scale)
    engine = Engine(url.rstrip("/").removesuffix("/v1"), key, scale=scale)
    names = served_names(engine)
    if run not in names:
        others = [name for name in names if name != BASE]
        raise ToolkitError(f"{url}: serves {', '.join(others) or 'a base alone'}, not {run}")
    if scale != 1 and not (engine.takes_scale and engine.runs):
        raise ToolkitError(f"{url}: cannot scale an adapter: `serve` by llama.cpp, without --from, can")
    return engine


def served_names(engine: Engine) -> list[str]:
    """What a server answers to; the engine then knows its runs, and whether they can be scaled. Raises ToolkitError."""
    models = engine.call("/v1/models")["data"]
    names = [model["id"] for model in models]
    engine.takes_scale = any(model.get("owned_by") == "llamacpp" for model in models)
    if not engine.takes_scale:
        engine.runs = tuple(name for name in names if name != BASE)
        return names
    # llama.cpp lists its first run only, and its adapters in the order of their ids
    engine.runs = tuple(Path(lora["path"]).name.rpartition("-")[0] for lora in engine.call("/lora-adapters"))
    return list(dict.fromkeys([*names, BASE, *engine.runs])) if engine.runs else names
