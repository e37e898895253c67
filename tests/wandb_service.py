"""A stand-in for W&B's sweep service on this machine, so that the stock `wandb sweep` and `wandb agent` can be tried offline.

with SweepService() as service: subprocess.run([*wandb, "agent", "me/project/sweep1"], env=service.environment())

It keeps one sweep, hands out its grid run by run to whichever agent asks, and ends the agents when none is left.
"""

import itertools
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


class SweepService:
    """GraphQL answers for wandb 0.31: create a sweep, register an agent, heartbeat."""

    def __init__(self):
        self.config, self.agents, self.given, self.waiting = "", 0, [], []
        self.lock = threading.Lock()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                sent = self.rfile.read(int(self.headers["Content-Length"]))
                found = {}
                if self.path == "/graphql":  # what else wandb sends (its own error reports) may be thrown away
                    asked = json.loads(sent)
                    found = {"data": service.answer(asked["query"], asked.get("variables") or {})}
                body = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self) -> dict:
        """For wandb's own programs: this service instead of the real one, and a key that it would accept."""
        address = f"http://127.0.0.1:{self.server.server_port}"
        return os.environ | {
            "WANDB_BASE_URL": address,
            "WANDB_API_KEY": "0" * 40,
            "WANDB_PROJECT": "p",
            "WANDB_ENTITY": "me",
        }

    def answer(self, query: str, variables: dict) -> dict:
        with self.lock:
            if "upsertSweep" in query:
                return self._keep(variables)
            if "createAgent" in query:
                self.agents += 1
                return {"createAgent": {"agent": {"id": f"agent{self.agents}"}}}
            if "agentHeartbeat" in query:
                return self._heartbeat(variables)
            if "SweepWithRuns" in query:
                sweep = {"id": "1", "name": "sweep1", "method": "grid", "state": "RUNNING", "config": self.config}
                return {"project": {"sweep": sweep | {"runs": {"edges": []}}}}
            user = {"id": "1", "name": "me", "username": "me", "entity": "me", "admin": False, "email": "", "flags": "{}",
                    "deletedAt": None, "apiKeys": {"edges": []}, "teams": {"edges": []}}  # fmt: skip
            return {"viewer": user, "serverInfo": {"cliVersionInfo": {}, "features": []}}

    def _keep(self, variables: dict) -> dict:
        self.config = variables["config"]
        parameters = yaml.safe_load(self.config)["parameters"]
        combinations = itertools.product(*([(k, v) for v in p["values"]] for k, p in parameters.items()))
        self.waiting = [dict(combination) for combination in combinations]
        project = {"id": "1", "name": "p", "entity": {"id": "1", "name": "me"}}
        return {"upsertSweep": {"sweep": {"name": "sweep1", "project": project}, "configValidationWarnings": []}}

    def _heartbeat(self, variables: dict) -> dict:
        agent, busy = variables["id"], json.loads(variables["runState"])
        commands = []
        if not busy and self.waiting:
            args = self.waiting.pop(0)
            self.given.append((agent, args))
            args = {name: {"value": value} for name, value in args.items()}
            commands = [{"type": "run", "run_id": f"run{len(self.given)}", "args": args, "program": None}]
        elif not busy:
            commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": agent}, "commands": json.dumps(commands)}}
