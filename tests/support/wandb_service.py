"""A stand-in for W&B's service on this machine, so that the stock `wandb sync` can be tried offline.

with RunService() as service: subprocess.run([*wandb, "sync", run], env=service.environment()); service.history
"""

import gzip
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VIEWER = {"id": "1", "name": "me", "username": "me", "entity": "me", "admin": False, "email": "", "flags": "{}",
          "deletedAt": None, "apiKeys": {"edges": []}, "teams": {"edges": []}}  # fmt: skip


class Service:
    """W&B's address on this machine: GraphQL goes to `answer(query, variables)`, all else to `take(path, body)`."""

    def __init__(self):
        self.lock = threading.Lock()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    sent = gzip.decompress(sent)
                found = {}
                with service.lock:
                    if self.path == "/graphql":
                        asked = json.loads(sent)
                        found = {"data": service.answer(asked["query"], asked.get("variables") or {})}
                    else:
                        service.take(self.path, sent)
                body = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_PUT = do_POST

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self) -> dict:
        """For wandb's own programs: this service instead of the real one, and a key that it would accept."""
        mine = {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": "0" * 40, "WANDB_PROJECT": "p", "WANDB_ENTITY": "me"}
        return os.environ | mine

    def take(self, path: str, body: bytes) -> None:
        """What wandb sends besides GraphQL; its own error reports may be thrown away."""


class RunService(Service):
    """Takes what the stock `wandb sync` reads out of offline runs: their config, summary, history and tables."""

    def __init__(self):
        super().__init__()
        self.runs: list[dict] = []
        """As first announced: name, groupName, jobType, config, …"""
        self.summary, self.history, self.tables = {}, [], []

    def answer(self, query: str, variables: dict) -> dict:
        if "upsertBucket" in query:
            self.runs.append(variables | {"config": json.loads(variables["config"])})
            project = {"id": "1", "name": "p", "entity": {"id": "1", "name": "me"}}
            bucket = {"id": "1", "name": variables["name"], "displayName": "", "sweepName": None, "description": "",
                      "config": "{}", "project": project, "historyLineCount": 0}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createArtifact" in query:  # "we have it already": the tables come as files too
            artifact = {"__typename": "Artifact", "id": "1", "digest": variables["input"]["digest"], "state": "COMMITTED",
                        "artifactSequence": {"id": "1", "latestArtifact": None}}  # fmt: skip
            return {"createArtifact": {"artifact": artifact}}
        if "createRunFiles" in query:
            files = [{"name": n, "uploadUrl": f"{self.address}/upload/{n}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {"viewer": VIEWER, "serverInfo": {"cliVersionInfo": {}, "features": []}}

    def take(self, path: str, body: bytes) -> None:
        if path.endswith("/file_stream"):
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history += [json.loads(line) for line in lines]
        elif path.endswith("/wandb-summary.json"):
            self.summary = json.loads(body)
        elif path.endswith(".table.json"):
            self.tables.append(json.loads(body))
