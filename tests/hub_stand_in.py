"""The few routes of the Hub that an upload needs, on a local port: `with stand_in() as (address, received): …`."""

import base64
import contextlib
import http.server
import json
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def stand_in() -> Iterator[tuple[str, dict]]:
    """`received` = {"created": [repo bodies], "commits": [{path: bytes}]}, filled as requests come in."""
    received: dict = {"created": [], "commits": [], "stored": {}}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(received))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()


def _handler(received: dict):
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def answer(self, value: dict) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_PUT(self):
            received["stored"][self.path.rsplit("/", 1)[-1]] = self.body()
            self.answer({})

        def do_POST(self):
            body, address = self.body(), f"http://{self.headers['Host']}"
            if self.path.endswith("/repos/create"):
                received["created"].append(json.loads(body))
                self.answer({"url": f"{address}/me/toy"})
            elif self.path.endswith("/validate-yaml"):
                received["card"] = json.loads(body)["content"]
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                self.answer({"files": [_mode(f) for f in json.loads(body)["files"]]})
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**o, "actions": {"upload": {"href": f"{address}/stored/{o['oid']}", "header": {}}}}
                    for o in json.loads(body)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": objects})
            elif "/commit/" in self.path:
                received["commits"].append(_files(body, received["stored"]))
                commit = "0" * 40
                self.answer({"success": True, "commitOid": commit, "commitUrl": f"{address}/me/toy/commit/{commit}"})
            else:
                self.send_error(404)

    return Handler


def _mode(file: dict) -> dict:
    mode = "lfs" if file["size"] > 100_000 else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def _files(body: bytes, stored: dict) -> dict[str, bytes]:
    """The files of a commit, which comes as JSON lines: small ones inside, large ones by the digest of their upload."""
    files = {}
    for line in map(json.loads, body.splitlines()):
        if line["key"] == "file":
            files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        elif line["key"] == "lfsFile":
            files[line["value"]["path"]] = stored[line["value"]["oid"]]
    return files
