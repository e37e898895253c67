"""The keyless address of a server on this machine: requests that a page from elsewhere sends are refused.

url = guard.opened(engine, guard.listening_socket("127.0.0.1", 8000))

A page whose name is made to point to 127.0.0.1 ("DNS rebinding") counts as the same origin to a browser; only the Host
header still names the page's own site. llama.cpp does not look at it, so this does, one request a connection.
"""

import asyncio
import re
import socket
import threading

from toolkit.export.llama import Engine
from toolkit.files import ToolkitError

HEAD_BYTES = 65536
"""Longest head of a request, and what is copied at a time."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
REFUSED = (
    b'{"error": {"code": 403, "type": "permission_error", "message": "this server answers requests to 127.0.0.1 and '
    b'localhost only; for other names start it with --api-key KEY"}}'
)


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ToolkitError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ToolkitError(f"{host}:{port}: cannot listen there ({error}); choose another with --port") from error


def opened(engine: Engine, listener: socket.socket) -> str:
    """Serve an engine at a socket without a key, from a thread of this process; returns the address."""
    loop = asyncio.new_event_loop()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await pass_on(engine, reader, writer)
        except (OSError, EOFError, asyncio.LimitOverrunError):  # the client left, or sent no request
            pass
        finally:
            writer.close()

    loop.run_until_complete(asyncio.start_server(answer, sock=listener, limit=HEAD_BYTES))
    threading.Thread(target=loop.run_forever, daemon=True).start()
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def pass_on(engine: Engine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request to the engine and its answer back, byte for byte but for the connection and the key."""
    head = await reader.readuntil(b"\r\n\r\n")
    if not is_local(head.decode("latin-1")):
        length = str(len(REFUSED)).encode()
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nContent-Length: " + length)
        writer.write(b"\r\nConnection: close\r\n\r\n" + REFUSED)
        await writer.drain()
        return
    host, _, port = engine.url.removeprefix("http://").rpartition(":")
    upstream, downstream = await asyncio.open_connection(host.strip("[]"), int(port))
    downstream.write(with_key(head, engine.key or ""))
    both = [asyncio.ensure_future(copied(reader, downstream)), asyncio.ensure_future(copied(upstream, writer))]
    # the engine closes the connection after its answer; a client that leaves early ends the generation
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    for copying in both:
        copying.cancel()
    await asyncio.gather(*both, return_exceptions=True)
    downstream.close()


def is_local(head: str) -> bool:
    """Whether a request's Host header names this machine, on any port: a tunnel may have changed it."""
    hosts = re.findall(r"(?im)^host:[ \t]*(.*?)[ \t]*\r?$", head)
    names = [re.sub(r":\d*$", "", host).strip("[]").lower() for host in hosts]
    return bool(names) and all(name in LOOPBACK for name in names)


def with_key(head: bytes, key: str) -> bytes:
    """The head of a request with the engine's own key, and no further request after it: each one is looked at."""
    first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    kept = [line for line in lines if not re.match(rb"(?i)(connection|authorization|x-api-key)[ \t]*:", line)]
    own = [b"Connection: close", b"Authorization: Bearer " + key.encode()]
    return b"\r\n".join([first, *kept, *own]) + b"\r\n\r\n"


async def copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until the reader ends."""
    while data := await reader.read(HEAD_BYTES):
        writer.write(data)
        await writer.drain()
