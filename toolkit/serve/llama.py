"""A GGUF file answered from by the llama-server inside xllamacpp, which batches, splits reasoning and reads tool calls.

llama = Llama(Path("outputs/pocket/gguf/pocket.q8_0.gguf"), "pocket"); llama.start(job)
"""

import http.client
import json
import os
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from toolkit.files import ToolkitError
from toolkit.serve.request import Job, Piece, Refused
from toolkit.serve.splitter import Splitter

SLOTS = 4
"""Replies llama.cpp generates at once."""
CONTEXT = 8192
"""Tokens of prompt and reply together, or fewer where the model ends before."""


class Llama:
    """The same face as Batcher: names, context, start(job). The server listens on loopback, behind a key of its own."""

    def __init__(self, path: Path, name: str, waiting: int = 64):
        import gguf

        self.names, self.waiting = [name], waiting
        header = gguf.GGUFReader(path).get_field("qwen3.context_length")
        self.context = min(CONTEXT, int(header.contents())) if header else CONTEXT
        self._key = secrets.token_urlsafe(24)
        self._server = _server(path, self.context, self._key)
        self._address = self._server.listening_address.removeprefix("http://")
        self._pool = ThreadPoolExecutor(SLOTS, thread_name_prefix="llama")
        self._pending, self._lock = 0, threading.Lock()

    def start(self, job: Job) -> None:
        """Queues a job. Raises Refused: 404 for another model, 429 for a full queue."""
        if job.ask.model not in ("", *self.names):
            raise Refused(f"model {job.ask.model!r}: expected {self.names[0]}", 404, "model_not_found", "model")
        with self._lock:
            if self._pending >= self.waiting + SLOTS:
                raise Refused(f"{self.waiting} requests are waiting already: try again in a moment", 429, "queue_full")
            self._pending += 1
        self._pool.submit(self._answer, job)

    def _answer(self, job: Job) -> None:
        try:
            if job.over():
                raise Refused("waited too long for its turn: try again", 503, "timeout")
            self._relay(job)
        except Refused as refused:
            job.emit(Piece("error", error=refused))
        except (OSError, ValueError, http.client.HTTPException) as error:
            job.emit(Piece("error", error=Refused(f"llama.cpp broke off: {error}", 500, "server_error")))
        finally:
            with self._lock:
                self._pending -= 1

    def _relay(self, job: Job) -> None:
        """One request to llama-server; closing the connection is what stops it there."""
        connection = http.client.HTTPConnection(self._address, timeout=600)
        try:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
            connection.request("POST", "/v1/chat/completions", json.dumps(_body(job)), headers)
            reply = connection.getresponse()
            if reply.status != 200:
                raise _refusal(reply.status, reply.read())
            finish, usage, calls, thought = "length", {}, {}, 0
            parts = {"reasoning": Splitter(opened=True), "content": Splitter(opened=False)}
            for event in _events(reply):
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    delta = choice["delta"]
                    thought += bool(delta.get("reasoning_content"))
                    _emit(job, delta, parts, calls)
                    finish = choice["finish_reason"] or finish
                if job.over():
                    break
            _tell(job, parts["reasoning"].close() + parts["content"].close())
            for call in calls.values():
                job.emit(Piece("tool_call", json.dumps(call, ensure_ascii=False)))
            counts = {name: usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")}
            job.emit(Piece("end", finish=finish, usage={**counts, "reasoning_tokens": thought}))
        finally:
            connection.close()


def _server(path: Path, context: int, key: str):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx = SLOTS, SLOTS * context
    params.warmup, params.verbosity, params.port = False, -1, 0
    params.cache_ram_mib, params.n_ctx_checkpoints = 0, 0
    params.api_keys, params.endpoint_slots, params.ui = [key], False, False
    # Threads for a small model would mostly wait for each other
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1 if path.stat().st_size < 2e8 else os.cpu_count()
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise ToolkitError(f"{path}: llama.cpp cannot load it ({error}): export it again") from error


def _body(job: Job) -> dict:
    ask = job.ask
    body = {
        "messages": [_message(m) for m in ask.messages],
        "max_tokens": ask.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": ask.thinking},
        **ask.values,
    }
    optional = {"tools": ask.tools, "stop": list(ask.stop), "seed": ask.seed}
    return body | {name: value for name, value in optional.items() if value or value == 0}


def _message(message: dict) -> dict:
    """As OpenAI's API has it: a call's arguments are text there, and calls have ids."""
    if "tool_calls" not in message:
        return message
    calls = [
        {
            **call,
            "id": f"call_{i}",
            "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])},
        }
        for i, call in enumerate(message["tool_calls"])
    ]
    return {**message, "tool_calls": calls}


def _events(reply: http.client.HTTPResponse) -> Iterator[dict]:
    for line in reply:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            event = json.loads(line[6:])
            if "error" in event:
                raise Refused(f"llama.cpp: {event['error'].get('message')}", 500, "server_error")
            yield event


def _emit(job: Job, delta: dict, parts: dict[str, Splitter], calls: dict[int, dict]) -> None:
    """Hands on what a delta says, without the white space around reasoning and answer; calls are gathered."""
    if thought := delta.get("reasoning_content"):
        _tell(job, parts["reasoning"].feed(thought))
    if said := delta.get("content"):
        _tell(job, parts["reasoning"].close() + parts["content"].feed(said))
    for part in delta.get("tool_calls", ()):
        call = calls.setdefault(part["index"], {"name": "", "arguments": ""})
        call["name"] += part["function"].get("name") or ""
        call["arguments"] += part["function"].get("arguments") or ""


def _tell(job: Job, shown: list[tuple[str, str]]) -> None:
    for kind, text in shown:
        job.emit(Piece(kind, text))


def _refusal(status: int, raw: bytes) -> Refused:
    try:
        error = json.loads(raw)["error"]
        message, kind = error["message"], error["type"]
    except (ValueError, KeyError, TypeError):
        message, kind = raw[:200].decode(errors="replace"), "server_error"
    code = "context_length_exceeded" if kind == "exceed_context_size_error" else kind
    return Refused(f"llama.cpp: {message}", status, code, "messages" if status == 400 else None)
