"""llama.cpp's server, as it lies in xllamacpp, and the one client of it and of every other OpenAI-compatible server.

engine = launch(Path("model.gguf")); engine.call("/tokenize", {"content": "Hello"})["tokens"]
"""

import contextlib
import functools
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from toolkit.files import ToolkitError

SMALL = 600_000_000
"""Below so many bytes of weights one thread is quickest: several mostly wait for each other, on a shared machine most of all."""
PAGE = json.dumps({"customJson": json.dumps({"tools": []})})
"""Settings of the chat page at its first visit. It offers tools of its own to every model, which makes a prompt of 46
tokens one of 550; its custom parameters replace them in each request."""
LORA = ".lora.gguf"
"""The end of an adapter's file, after the run's name: a server tells its runs by it."""
Sampling = dict[str, dict[str, float]]
"""Recommended values by mode."""


class Refused(ToolkitError):
    """A request that a server answered with an error: it runs, and others may be answered."""


@dataclass
class Engine:
    """A server that answers OpenAI's API. `runs` are the LoRAs' names in the order of their ids; none: weights only."""

    url: str
    key: str | None = None
    runs: tuple[str, ...] = ()
    context: int = 8192
    sampling: Sampling = field(default_factory=dict)
    scale: float = 1.0
    """How much of a LoRA is added; llama.cpp takes it with each request, vLLM does not."""
    takes_scale: bool = True
    server: object = None
    """llama.cpp's, which lives as long as this object; None for a server of another process."""

    @functools.cached_property
    def _client(self) -> httpx.Client:
        headers = {"Connection": "close"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        direct = self.server is not None  # a proxy of the environment does not see this machine's ports
        hooks = {"response": [_refused]}
        return httpx.Client(base_url=self.url, headers=headers, timeout=3600, trust_env=not direct, event_hooks=hooks)

    def find_runs(self) -> None:
        """Set `runs` to what llama.cpp serves: the names of its LoRAs' files, in the order of their ids."""
        self.runs = tuple(Path(lora["path"]).name.removesuffix(LORA) for lora in self.call("/lora-adapters"))

    def lora(self, name: str, scale: float | None = None) -> dict[str, object]:
        """What a request says to be answered by the run of this name at a scale, or by `base`.

        `model` is what vLLM reads, `lora` what llama.cpp reads. Only requests that name a LoRA may reuse a cached prefix:
        llama.cpp does not clear it when a request without one follows a request for the base."""
        wanted = self.scale if scale is None else scale
        scales = [{"id": i, "scale": wanted if run == name else 0.0} for i, run in enumerate(self.runs)]
        return {"model": name, "lora": scales, "cache_prompt": True}

    def call(self, route: str, body: dict | None = None) -> Any:
        """The JSON that a route answers, to a POST where there is a body. Raises ToolkitError with the server's message."""
        with _named(self.url):
            return self._client.request("GET" if body is None else "POST", route, json=body).json()

    def stream(self, body: dict) -> Iterator[dict]:
        """The chunks of a chat completion as they come; leaving early stops the generation. Raises ToolkitError."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with _named(self.url), self._client.stream("POST", "/v1/chat/completions", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        raise ToolkitError(f"{url}: does not answer ({error}): is the server running?") from error


def _refused(reply: httpx.Response) -> None:
    """The sentence in an error body; llama.cpp and vLLM both follow OpenAI's layout."""
    if reply.is_error:
        text = reply.read().decode(errors="replace")
        with contextlib.suppress(ValueError, KeyError, TypeError):
            text = json.loads(text)["error"]["message"]
        raise Refused(text[:300])


def launch(
    weights: Path, loras: Sequence[Path] = (), *, context: int = 2048, slots: int = 1, sampling: Sampling | None = None,
    template: str = "", alias: str = "", host: str = "127.0.0.1", port: int = 0, key: str | None = None, scale: float = 1.0,
) -> Engine:  # fmt: skip
    """A server on these files; `slots` replies are generated at once, each within `context` tokens.

    Weights are memory-mapped. The first mode's `sampling` and the chat template are what requests get that name none (by
    default those inside the file). A request that does not say otherwise is answered with the first LoRA, at `scale`. There is
    always an API key, since pages in a browser reach this machine's ports too: one is made where none is given. Raises
    ToolkitError."""
    from xllamacpp import CommonAdapterLoraInfo, CommonParams, Server

    key = key or secrets.token_urlsafe(24)
    params = CommonParams()
    params.model.path = str(weights)
    settings = {
        "model_alias": {alias or weights.stem},
        "chat_template": template,
        "lora_adapters": [
            CommonAdapterLoraInfo(str(path), 0.0 if number else scale) for number, path in enumerate(loras)
        ],
        "n_parallel": slots,
        "n_ctx": slots * context,
        # See Engine.lora; the cache in RAM does not look at LoRAs either
        "cache_prompt": not loras,
        "cache_ram_mib": 0,
        "n_ctx_checkpoints": 0,
        "hostnames": [host],
        "port": port,
        "api_keys": [key],
        "ui_config_json": PAGE,
        "cors_origins": f"http://{host}:{port}",  # no page from elsewhere reads replies; llama.cpp's default is any
        "warmup": False,
        "verbosity": -1,
        "endpoint_slots": False,
    }
    for name, value in settings.items():
        setattr(params, name, value)
    sampling = sampling or {}
    for name, value in next(iter(sampling.values()), {}).items():
        setattr(params.sampling, "temp" if name == "temperature" else name, value)
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = 1 if weights.stat().st_size < SMALL else os.cpu_count()
        cpu.poll = 0  # threads sleep while they wait: spinning ones collapse on a shared machine
    try:
        server = Server(params)
    except RuntimeError as error:
        raise ToolkitError(
            f"{weights}: llama.cpp cannot load it ({error}): too little memory, or a damaged file: delete it and try again"
        ) from error
    # 0.0.0.0 is where it listens, no address that can be asked
    url = address("127.0.0.1" if host == "0.0.0.0" else host, server.listening_address.rpartition(":")[2])
    engine = Engine(url, key, context=context, sampling=sampling, scale=scale, server=server)
    engine.find_runs()  # a server that is dropped before it has answered once never ends its threads
    return engine


def address(host: str, port: object) -> str:
    """The URL of a server; an IPv6 address stands in brackets there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
