"""The keyless address of a server on this machine: requests that a page from elsewhere sends are refused.

url = guard.opened(engine, guard.listening_socket("127.0.0.1", 8000))

A page whose name is made to point to 127.0.0.1 ("DNS rebinding") counts as the same origin to a browser; only the Host
header still names the page's own site. llama.cpp does not look at it, so this does, one request a connection.
"""

import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from toolkit.export.llama import Engine, address
from toolkit.files import ToolkitError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OF_A_CONNECTION = ("host", "connection", "transfer-encoding", "authorization", "x-api-key")
"""Headers that are not passed on: they belong to one of the two connections, or are the engine's own key."""
REFUSED = (
    b'{"error": {"code": 403, "type": "permission_error", "message": "this server answers requests to 127.0.0.1 and '
    b'localhost only; for other names start it with --api-key KEY"}}'
)


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ToolkitError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise ToolkitError(f"{host}:{port}: cannot listen there ({error}); choose another with --port") from error


def opened(engine: Engine, listener: socket.socket) -> str:
    """Serve an engine at a socket without a key, from threads of this process; returns the address."""
    # llama.cpp keeps a thread for each connection that stays open
    headers = {"Connection": "close", "Authorization": f"Bearer {engine.key}"}
    client = httpx.Client(base_url=engine.url, headers=headers, timeout=None, trust_env=False)

    class Handler(Guard):
        upstream = client

    # the socket listens already: its port was taken before the model was loaded
    server = ThreadingHTTPServer(("", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return address(*listener.getsockname()[:2])


class Guard(BaseHTTPRequestHandler):
    """Passes a request on and its answer back, if it names this machine; HTTP/1.0 ends the connection after it."""

    upstream: httpx.Client

    def pass_on(self) -> None:
        """One request, its answer as it comes. A client that leaves ends the generation, as its connection is closed."""
        if not is_local(self.headers.get_all("Host") or []):
            self.send_response(403)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(REFUSED)
            return
        headers = [(name, value) for name, value in self.headers.items() if name.lower() not in OF_A_CONNECTION]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.upstream.stream(self.command, self.path, headers=headers, content=body) as reply:
            self.send_response(reply.status_code)
            for name, value in reply.headers.multi_items():
                if name not in OF_A_CONNECTION:
                    self.send_header(name, value)
            self.end_headers()
            for piece in reply.iter_raw():
                self.wfile.write(piece)

    do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_HEAD = pass_on

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError, httpx.HTTPError):  # the client left, or sent no request
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Quiet: the terminal is the person's."""


def is_local(hosts: list[str]) -> bool:
    """Whether all Host headers, at least one, name this machine, on any port: a tunnel may have changed it."""
    names = [re.sub(r":\d*$", "", host.strip()).strip("[]").lower() for host in hosts]
    return bool(names) and all(name in LOOPBACK for name in names)
