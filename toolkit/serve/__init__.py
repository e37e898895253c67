"""Talk to a run from other programs and from a web page: OpenAI's chat API on 127.0.0.1, with limits that hold.

`python -m toolkit serve pocket`, then http://127.0.0.1:8000/ or OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-")

`transformers serve` loads a base for each adapter and knows neither tokens nor limits, llama-server knows no adapters
of ours: so one small front stands before both kinds of model (engine.py), and llama-server itself answers for a GGUF.
"""

import asyncio
import contextlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.serve.api import Options, Writer, error_object, read_body
from toolkit.serve.engine import open_engine
from toolkit.serve.request import Ask, Job, Piece, Refused

PAGE = Path(__file__).with_name("page.html")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
BODY_BYTES = 4 << 20
"""Far above any prompt that fits a context, far below what could hurt."""
BODY_SECONDS = 20
"""A body comes within this, or its connection is let go."""
GRACE = 15
"""Seconds past its deadline after which a request is answered without the model."""
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class Limits:
    """What one request may cost, and how many may wait."""

    max_tokens: int = 2048
    seconds: float = 300
    """From arrival to the last token: in the queue it is refused then, in the middle of a reply it is cut."""
    waiting: int = 64


def serve(
    runs: Sequence[str | Path], *, source: str = "adapter", quant: str | None = None, host: str = "127.0.0.1",
    port: int = 8000, token: str | None = None, limits: Limits | None = None, say=print,
) -> None:  # fmt: skip
    """Serves until Ctrl-C. Several runs share one base; a request's `model` says which run, or "base".

    Beyond loopback a token is needed, and made when none is given. Raises ToolkitError before anything listens."""
    import uvicorn

    limits = limits or Limits()
    if host not in LOOPBACK and token is None:
        token = secrets.token_urlsafe(24)
        say(f"{host} is not this machine alone, so requests need this token: {token}")
    listener = listen(host, port)
    engine = open_engine(runs, source, quant, waiting=limits.waiting)
    shown = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    say(f"serving {', '.join(engine.names)} from the {source}, {engine.context} tokens of context")
    say(f"chat page: {address}/{f'#token={token}' if token else ''}    API: {address}/v1    Ctrl-C stops")
    app = create_app(engine, limits, token, local=host in LOOPBACK)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how it ends; uvicorn has closed everything by then
        uvicorn.Server(settings(app)).run([listener])


def listen(host: str, port: int):
    """A bound socket, so that a port that is taken is known before a model is loaded. Raises ToolkitError."""
    import socket

    from toolkit.files import ToolkitError

    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise ToolkitError(f"{host}:{port}: cannot listen there ({error}); choose another with --port") from error
    return listener


def settings(app):
    """uvicorn's, with bounds on what a slow or endless client can hold."""
    import uvicorn

    return uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="off", timeout_keep_alive=15,
        timeout_graceful_shutdown=3, limit_concurrency=512,
    )  # fmt: skip


def create_app(engine, limits: Limits, token: str | None = None, *, local: bool = True):
    """The ASGI app: the chat page, /health, /v1/models, /v1/chat/completions."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route

    page = PAGE.read_text(encoding="utf-8")
    models = [
        {"id": name, "object": "model", "created": int(time.time()), "owned_by": "local"} for name in engine.names
    ]

    async def show_page(_request):
        return HTMLResponse(page, headers=SECURITY)

    async def health(_request):
        return JSONResponse({"status": "ok"})

    async def list_models(request):
        _admit(request, token, local)
        answer = {"object": "list", "data": models, "max_tokens": limits.max_tokens, "context": engine.context}
        return JSONResponse(answer)

    async def chat(request):
        _admit(request, token, local)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A web page elsewhere can send text/plain here without asking; application/json it cannot
            raise Refused("content-type: expected application/json", 415)
        ask, options = read_body(await _body(request), limits.max_tokens)
        return await _answer(request, engine, ask, options, limits)

    async def refused(_request, error: Refused):
        headers = {"Retry-After": "2"} if error.status in (429, 503) else {}
        return JSONResponse(error_object(error), error.status, headers)

    async def no_route(request, error: HTTPException):
        return await refused(
            request, Refused(f"{request.method} {request.url.path}: {error.detail}", error.status_code)
        )

    async def broken(request, _error: Exception):  # logged by uvicorn; the server goes on
        return await refused(request, Refused("the server failed on this request", 500))

    routes = [
        Route("/", show_page),
        Route("/health", health),
        Route("/v1/models", list_models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={Refused: refused, HTTPException: no_route, Exception: broken})


def _admit(request, token: str | None, local: bool) -> None:
    """The token, where there is one; on loopback without one, that the browser meant this host (DNS rebinding)."""
    host = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
    if local and token is None and host.strip("[]").lower() not in LOOPBACK:
        raise Refused("host: expected 127.0.0.1 or localhost (behind a proxy, serve with --token)", 403)
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
        raise Refused("a token is needed: Authorization: Bearer …", 401, "invalid_api_key")


async def _body(request) -> bytes:
    from starlette.requests import ClientDisconnect

    raw = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                raw += part
                if len(raw) > BODY_BYTES:
                    raise Refused(f"the body is larger than {BODY_BYTES >> 20} MiB", 413)
    except TimeoutError as error:
        raise Refused(f"the body took longer than {BODY_SECONDS} s", 408) from error
    except ClientDisconnect as error:
        raise Refused("the connection closed before the body was whole", 400) from error
    return bytes(raw)


async def _answer(request, engine, ask: Ask, options: Options, limits: Limits):
    """Starts the reply and waits for its first piece: trouble before that has a status of its own."""
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse, StreamingResponse

    loop, pieces = asyncio.get_running_loop(), asyncio.Queue()

    def emit(piece: Piece) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    job = Job(ask, emit, time.monotonic() + limits.seconds)
    writer = Writer(ask.model or engine.names[0])
    watch = asyncio.create_task(_watch(request, job))
    try:
        await run_in_threadpool(engine.start, job)
        first = await _next(pieces, job)
        if options.stream:
            body = _events(first, pieces, writer, job, options.include_usage)
            return StreamingResponse(body, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        while first.kind != "end":
            writer.delta(first)
            first = await _next(pieces, job)
        return JSONResponse(writer.reply(first))
    except BaseException:  # whatever ended the request, its reply is no longer wanted
        job.cancelled.set()
        raise
    finally:
        watch.cancel()


async def _next(pieces: asyncio.Queue, job: Job) -> Piece:
    """The next piece. The engine itself keeps to the deadline, at its next token; a model that hangs does not."""
    try:
        async with asyncio.timeout(max(0, job.deadline - time.monotonic()) + GRACE):
            piece = await pieces.get()
    except TimeoutError as error:
        raise Refused("the model did not answer in time", 503, "timeout") from error
    if piece.error:
        raise piece.error
    return piece


async def _watch(request, job: Job) -> None:
    """Stops a reply nobody waits for any more."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.5)
    job.cancelled.set()


async def _events(first: Piece, pieces, writer: Writer, job: Job, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of a reply; leaving early, as a disconnect does, stops it."""
    piece, role = first, {"role": "assistant"}
    try:
        yield _event(writer.chunk({**role, "content": ""}))
        while piece.kind != "end":
            yield _event(writer.chunk(writer.delta(piece)))
            piece = await _next(pieces, job)
        yield _event(writer.chunk({}, piece.finish))
        if include_usage:
            yield _event(writer.usage_chunk(piece))
        yield "data: [DONE]\n\n"
    except Refused as refused:
        yield _event(error_object(refused))
    finally:
        job.cancelled.set()


def _event(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
