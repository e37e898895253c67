"""The few routes of the Hub that an upload, a download or the stream of a dataset needs, on a local port.

with stand_in() as (address, received): …   or   with repository({"train.jsonl": b"…"}) as address: …
"""

import base64
import contextlib
import http.server
import json
import threading
from collections.abc import Iterator

ONLINE = {
    "HF_HUB_DISABLE_XET": "1",
    # Unsloth sets all three where one is set: a test that imported it before leaves them to the processes it starts
    "HF_HUB_OFFLINE": "0",
    "HF_DATASETS_OFFLINE": "0",
    "TRANSFORMERS_OFFLINE": "0",
}
"""The environment of a process that may ask the stand-in."""


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


REVISION = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def repository(files: dict[str, bytes]) -> Iterator[str]:
    """A Hub whose owner/bakery, dataset and model, has these files at REVISION; yields its address for HF_ENDPOINT."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, data: bytes = b"", code: int = 200, **headers) -> None:
            self.send_response(code)
            for name, value in {**headers, "Content-Length": len(data), "X-Repo-Commit": REVISION}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_GET(self):
            path = self.path.split("?")[0]
            name = path.split("/")[-1]
            if "/owner/bakery" not in path:
                self.answer(code=404, X_Error_Code="RepoNotFound")
            elif "/tree/" in path:
                listed = [{"type": "file", "path": f, "size": len(data), "oid": "0" * 40} for f, data in files.items()]
                self.answer(json.dumps(listed).encode(), Content_Type="application/json")
            elif path.startswith("/api/"):
                about = {"id": "owner/bakery", "sha": REVISION, "siblings": [{"rfilename": f} for f in files]}
                self.answer(json.dumps(about).encode(), Content_Type="application/json")
            elif name not in files:
                self.answer(code=404, X_Error_Code="EntryNotFound")
            elif asked := self.headers.get("Range"):
                first, last = asked.removeprefix("bytes=").split("-")
                part = files[name][int(first) : int(last) + 1 if last else None]
                self.answer(part, 206, Content_Range=f"bytes {first}-{int(first) + len(part) - 1}/{len(files[name])}")
            else:
                self.answer(files[name], ETag='"1"', Accept_Ranges="bytes")

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
