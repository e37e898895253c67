"""A run behind llama.cpp's server: one copy of the base's weights, the run's adapter beside it as a LoRA.

engine = start(["pocket"]); [chunk for chunk in engine.stream({"messages": [{"role": "user", "content": "Hi"}]})]
"""

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from toolkit.export.certificate import KL_MEAN, LIMITS
from toolkit.export.gguf_file import GgufFile, check_quant, write_gguf, write_lora_gguf
from toolkit.export.merge import Merged, open_merged
from toolkit.export.parity import Tokens, file_divergence, log_probs, probe_sequences
from toolkit.family import KINDS, MODES, family_of, sampling_of
from toolkit.files import ToolkitError, complete, lock, outputs, read_json, sha256
from toolkit.model import check_adapter, run_folder
from toolkit.render import load_chat

BASE = "base"
"""The name by which clients and messages call a run's base."""
QUANT = "q8_0"
"""What a base is converted to unless asked otherwise: half the size of F16, half a thousandth of KL from it."""
SLOTS = 4
"""Replies generated at once (llama.cpp's own default)."""
CONTEXT = 8192
"""Tokens of prompt and reply together unless asked otherwise, or fewer where the model ends before."""
SMALL = 200_000_000
"""Below so many bytes of weights one thread is quickest: several mostly wait for each other."""
BEST_FIRST = ("q8_0", "f16", "bf16", "q6_k", "q5_k_m", "q4_k_m")
"""Which exported GGUF is taken when several lie there: Q8_0 has half the size of F16 at a KL of 0.0005 to it."""


@dataclass
class Engine:
    """A server that answers OpenAI's API. `runs` are the LoRAs' names in the order of their ids; none: weights only."""

    url: str
    key: str | None = None
    runs: tuple[str, ...] = ()
    context: int = CONTEXT
    sampling: dict[str, dict] = field(default_factory=dict)
    """Recommended values by mode."""
    server: object = None
    """llama.cpp's, which lives as long as this object."""

    def lora(self, name: str) -> dict:
        """What a request says to be answered by the run of this name, or by `base`.

        `model` is what vLLM reads, `lora` what llama.cpp reads. Only requests that name a LoRA may reuse a cached prefix:
        llama.cpp does not clear it when a request without one follows a request for the base."""
        return {
            "model": name,
            "lora": [{"id": i, "scale": float(run == name)} for i, run in enumerate(self.runs)],
            "cache_prompt": True,
        }

    def call(self, route: str, body: dict | None = None):
        """The JSON that a route answers, to a POST where there is a body. Raises ToolkitError with the server's message."""
        import httpx

        method = "GET" if body is None else "POST"
        try:
            reply = httpx.request(method, self.url + route, json=body, headers=self._headers(), timeout=3600)
        except httpx.HTTPError as error:
            raise ToolkitError(f"{self.url}: does not answer ({error}): is the server running?") from error
        if reply.status_code != 200:
            raise ToolkitError(_message(reply.text))
        return reply.json()

    def stream(self, body: dict) -> Iterator[dict]:
        """The chunks of a chat completion as they come; leaving early stops the generation. Raises ToolkitError."""
        import httpx

        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        target = f"{self.url}/v1/chat/completions"
        try:
            with httpx.stream("POST", target, json=body, headers=self._headers(), timeout=3600) as reply:
                if reply.status_code != 200:
                    raise ToolkitError(_message(reply.read().decode()))
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        yield json.loads(line.removeprefix("data: "))
        except httpx.HTTPError as error:
            raise ToolkitError(f"{self.url}: the connection broke off ({error}): is the server running?") from error

    def _headers(self) -> dict:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


def _message(text: str) -> str:
    """The sentence in an error body; llama.cpp and vLLM both follow OpenAI's layout."""
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text[:300]


def start(
    runs: Sequence[str | Path], *, source: str = "adapter", quant: str | None = None, base: bool = False,
    host: str = "127.0.0.1", port: int = 0, key: str | None = None, context: int = CONTEXT, say=lambda _: None,
) -> Engine:  # fmt: skip
    """Load runs of one base into llama.cpp's server; `source` is adapter or merged-gguf, port 0 is any free one.

    `base` leaves the adapters out, for clients that cannot name one in their requests. `say` gets a line before each
    step that takes long. Raises ToolkitError before anything is loaded where it can."""
    folders = [run_folder(run).resolve() for run in runs]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names) or BASE in names:
        raise ToolkitError(f"{', '.join(map(str, folders))}: runs are told apart by their folders' names, not {BASE!r}")
    if len(folders) > 1 and (source != "adapter" or base):
        raise ToolkitError("several runs are served as adapters beside their base: leave out --from and --base")
    _check_port(host, port)
    if source == "adapter":
        for folder in folders:
            check_adapter(folder)
        weights, loras, facts = _converted(folders, quant or QUANT, say)
    else:
        weights, loras = exported_gguf(folders[0], quant), []
        facts = _facts_of_file(weights)
    loras = [] if base else loras
    chat = load_chat(str(folders[0] / "adapter"))
    context = min(context, facts["max_position_embeddings"])
    sampling = {m: sampling_of(family_of(facts["model_type"]), m, facts) for m in KINDS[chat.kind] or MODES}
    server = _llama_server(
        weights, loras, alias=BASE if base else names[0], template=chat.template_text, context=context,
        sampling=next(iter(sampling.values())), host=host, port=port, key=key, say=say,
    )  # fmt: skip
    here = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
    url = f"http://{here}:{server.listening_address.rpartition(':')[2]}"
    engine = Engine(url, key, tuple(names) if loras else (), context, sampling, server)
    engine.call("/lora-adapters")  # a server that is dropped before it has answered once never ends its threads
    return engine


def _check_port(host: str, port: int) -> None:
    """A port that is taken is known before a model is loaded."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise ToolkitError(f"{host}:{port}: cannot listen there ({error}); choose another with --port") from error


def _llama_server(weights: Path, loras, *, alias, template, context, sampling, host, port, key, say):
    """llama.cpp's server with these files, listening. Raises ToolkitError when llama.cpp cannot load them."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias, params.chat_template = str(weights), {alias}, template
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(p), float(i == 0)) for i, p in enumerate(loras)]
    params.n_parallel, params.n_ctx = SLOTS, SLOTS * context
    params.sampling.temp, params.sampling.top_k = sampling["temperature"], sampling["top_k"]
    params.sampling.top_p, params.sampling.min_p = sampling["top_p"], sampling["min_p"]
    # See Engine.lora; the cache in RAM does not look at LoRAs either
    params.cache_prompt, params.cache_ram_mib, params.n_ctx_checkpoints = not loras, 0, 0
    params.hostnames, params.port, params.api_keys = [host], port, [key] if key else []
    params.cors_origins = f"http://{host}:{port}"  # no page from elsewhere reads replies; llama.cpp's default is any
    params.warmup, params.verbosity, params.endpoint_slots = False, -1, False
    for cpu in (params.cpuparams, params.cpuparams_batch):
        # Threads sleep while they wait: spinning ones collapse on a shared machine
        cpu.n_threads, cpu.poll = 1 if weights.stat().st_size < SMALL else os.cpu_count(), 0
    say(f"loading {weights.stat().st_size / 1e9:.2f} GB of weights")
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise ToolkitError(
            f"{weights}: llama.cpp cannot load it ({error}): too little memory, or a damaged file: delete it and try again"
        ) from error


def check(run: str | Path, engine: Engine, quant: str | None = None) -> dict[str, dict]:
    """{"RUN" | "base": KL from the run and its base in PyTorch}, measured and limited as in an export's certificate.

    Raises ToolkitError when what is served is not the run."""
    folder = run_folder(run).resolve()
    if folder.name not in engine.runs:
        raise ToolkitError("only an adapter beside its base is checked here: an export has `python -m toolkit verify`")
    own, merged, limit = Tokens(folder / "adapter"), open_merged(folder, "16bit"), LIMITS.get(quant or QUANT, KL_MEAN)
    sequences, found = probe_sequences(own), {}
    for name, which in ((folder.name, "adapter"), (BASE, "base")):
        expected = log_probs(merged, which, sequences)
        found[name] = file_divergence(engine.call, expected, sequences, own.encode("a")[0], **engine.lora(name))
        if found[name]["mean"] > limit:
            raise ToolkitError(f"{name}: served with a KL of {found[name]['mean']:.2g} from the run, limit {limit:g}")
    return found


# --- files that llama.cpp reads --------------------------------------------------------------------------------------


def _converted(folders: list[Path], quant: str, say) -> tuple[Path, list[Path], dict]:
    """(base GGUF, LoRA GGUFs, config.json and generation_config.json as one), made now or found in outputs/.gguf/."""
    merged = [open_merged(folder, "16bit") for folder in folders]
    places = {_base_key(folder, m) for folder, m in zip(folders, merged, strict=True)}
    if len(places) > 1:
        raise ToolkitError(f"{', '.join(f.name for f in folders)}: trained on different bases: serve them one by one")
    check_quant(quant)
    place, base, checkpoint = outputs() / ".gguf" / places.pop(), merged[0].base, merged[0].checkpoint
    weights, loras = place / f"{quant}.gguf", []
    with lock(place, "serve", wait=True):
        if not weights.is_file():
            say(f"converting {base.label} to {quant}, once for all runs on it")
            with complete(weights) as partial:
                write_gguf(checkpoint, partial, quant, base.label, folders[0] / "adapter", say)
        for folder in folders:
            adapter = sha256(folder / "adapter" / "adapter_model.safetensors")[:8]
            loras.append(place / f"{folder.name}-{adapter}.lora.gguf")
            if not loras[-1].is_file():
                for old in place.glob(f"{folder.name}-????????.lora.gguf"):  # of an earlier training under this name
                    old.unlink()
                write_lora_gguf(folder / "adapter", checkpoint.config, loras[-1])
    sampling = base.folder / "generation_config.json"
    return weights, loras, checkpoint.config | (read_json(sampling) if sampling.is_file() else {})


def _facts_of_file(path: Path) -> dict:
    """What config.json would say, from a GGUF's header (merged/ may have been deleted to save space)."""
    file = GgufFile(path)
    kind = file.value("general.architecture")
    return {"model_type": kind, "max_position_embeddings": file.value(f"{kind}.context_length")}


def _base_key(run: Path, merged: Merged) -> str:
    """A folder name that changes with the base's weights and with the run's tokenizer and template."""
    base = merged.base
    files = [(f.name, f.stat()) for f in sorted(base.folder.glob("*.safetensors"))]
    weights = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    tokenizer = [sha256(run / "adapter" / name) for name in ("tokenizer.json", "tokenizer_config.json")]
    template = load_chat(str(run / "adapter")).template_text
    identity = json.dumps([base.name, base.revision, weights, tokenizer, template])
    return f"{base.label.replace('/', '--')}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def exported_gguf(folder: Path, quant: str | None = None) -> Path:
    """The GGUF file that `export` wrote: the quantization asked for, else the first of BEST_FIRST that is there."""
    files = {path.name.removesuffix(".gguf").rpartition(".")[2]: path for path in sorted(folder.glob("gguf/*.gguf"))}
    wanted = [quant.lower()] if quant else [*BEST_FIRST, *files]
    found = next((files[name] for name in wanted if name in files), None)
    if found is None:
        there = f"there are {', '.join(files)}" if files else "there is none"
        raise ToolkitError(f"{folder}/gguf: no {quant or 'GGUF file'}, {there}: python -m toolkit export {folder.name}")
    return found
