"""A run behind llama.cpp's server: one copy of the base's weights, the run's adapter beside it as a LoRA.

engine = start(["pocket"]); [chunk for chunk in engine.stream({"messages": [{"role": "user", "content": "Hi"}]})]
"""

import hashlib
import json
import socket
from collections.abc import Sequence
from pathlib import Path

from toolkit.data.render import load_chat
from toolkit.export.certificate import LIMITS
from toolkit.export.gguf_file import GgufFile, chat_template, check_quant, write_gguf, write_lora_gguf, written_files
from toolkit.export.llama import Engine, launch
from toolkit.export.merge import Checkpoint, Merged, open_merged
from toolkit.export.parity import Tokens, file_divergence, log_probs, probe_sequences
from toolkit.family import KINDS, MODES, family_of, sampling_of
from toolkit.files import ToolkitError, complete, lock, outputs, read_json, sha256
from toolkit.training.model import check_adapter, run_folder

BASE = "base"
"""The name by which clients and messages call a run's base."""
QUANT = "q8_0"
"""What a base is converted to unless asked otherwise: half the size of F16, at a KL of 0.004 to 0.008 from it
(data_recipes/measured/smollm2.json, export_limits.json)."""
SLOTS = 4
"""Replies generated at once (llama.cpp's own default)."""
CONTEXT = 8192
"""Tokens of prompt and reply together unless asked otherwise, or fewer where the model ends before."""
BEST_FIRST = ("q8_0", "f16", "bf16", "q6_k", "q5_k_m", "q4_k_m")
"""Which exported GGUF is taken when several lie there."""


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
        weights, loras, facts = _converted(folders, (quant or QUANT).lower(), say)
    else:
        weights, loras = exported_gguf(folders[0], quant), []
        facts = _facts_of_file(weights)
    # they are converted all the same, so that the next start has both
    loras = [] if base else loras
    chat = load_chat(str(folders[0] / "adapter"))
    context = min(context, facts["max_position_embeddings"])
    sampling = {m: sampling_of(family_of(facts["model_type"]), m, facts) for m in KINDS[chat.kind] or MODES}
    say(f"loading {weights.stat().st_size / 1e9:.2f} GB of weights")
    engine = launch(
        weights, loras, context=context, slots=SLOTS, sampling=next(iter(sampling.values())),
        template=chat.template_text, alias=BASE if base else names[0], host=host, port=port, key=key,
    )  # fmt: skip
    engine.runs, engine.sampling = tuple(names) if loras else (), sampling
    return engine


def connect(url: str, run: str, key: str | None = None) -> Engine:
    """The server that `serve` started at `url`, by llama.cpp or vLLM. Raises ToolkitError when it does not serve `run`."""
    engine = Engine(url.rstrip("/").removesuffix("/v1"), key)
    models = engine.call("/v1/models")["data"]
    served = engine.runs = tuple(model["id"] for model in models if model["id"] != BASE)
    if any(model.get("owned_by") == "llamacpp" for model in models):  # which names its first run only
        loras = engine.call("/lora-adapters")  # in the order of their ids
        engine.runs = tuple(Path(lora["path"]).name.rpartition("-")[0] for lora in loras)
        served = engine.runs or served
    if run not in served:
        raise ToolkitError(f"{url}: serves {', '.join(served) or 'a base alone'}, not {run}")
    return engine


def _check_port(host: str, port: int) -> None:
    """A port that is taken is known before a model is loaded."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise ToolkitError(f"{host}:{port}: cannot listen there ({error}); choose another with --port") from error


def check(run: str | Path, engine: Engine, quant: str | None = None) -> dict[str, dict]:
    """{"RUN" | "base": KL from the run and its base in PyTorch}, measured and limited as in an export's certificate.

    Raises ToolkitError when what is served is not the run."""
    folder = run_folder(run).resolve()
    if folder.name not in engine.runs:
        raise ToolkitError("only an adapter beside its base is checked here: an export has `python -m toolkit verify`")
    own, merged, limit = Tokens(folder / "adapter"), open_merged(folder, "16bit"), LIMITS[quant or QUANT]["mean"]
    sequences, found = probe_sequences(own), {}
    for name, which in ((folder.name, "adapter"), (BASE, "base")):
        expected = log_probs(merged, which, sequences)
        found[name] = file_divergence(engine, expected, sequences, own.encode("a")[0], **engine.lora(name))
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
    place, base = outputs() / ".gguf" / places.pop(), merged[0].base
    checkpoint = Checkpoint(base.folder)
    weights, loras = place / f"{quant}.gguf", []
    # a second server on the same base waits for the file and uses it
    with lock(place, "serve", wait=True):
        if not weights.is_file():
            say(f"converting {base.label} to {quant}, once for all runs on it")
            with complete(weights) as partial:
                write_gguf(checkpoint, partial, quant, base.label, folders[0] / "adapter", say)
        for folder, run in zip(folders, merged, strict=True):
            adapter = sha256(folder / "adapter" / "adapter_model.safetensors")[:8]
            loras.append(place / f"{folder.name}-{adapter}.lora.gguf")
            if not loras[-1].is_file():
                for old in place.glob(f"{folder.name}-????????.lora.gguf"):  # of an earlier training under this name
                    old.unlink()
                write_lora_gguf(run.adapter, checkpoint.config, loras[-1])
    sampling = base.folder / "generation_config.json"
    return weights, loras, checkpoint.config | (read_json(sampling) if sampling.is_file() else {})


def _facts_of_file(path: Path) -> dict:
    """What config.json would say, from a GGUF's header (merged/ may have been deleted to save space)."""
    file = GgufFile(path)
    kind = file.value("general.architecture")
    return {"model_type": kind, "max_position_embeddings": file.value(f"{kind}.context_length")}


def _base_key(run: Path, merged: Merged) -> str:
    """A folder name that changes with the base's weights and with the run's tokenizer and template."""
    base, stats = merged.base, {file.name: file.stat() for file in sorted(merged.base.folder.glob("*.safetensors"))}
    weights = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]
    tokenizer = [sha256(run / "adapter" / name) for name in ("tokenizer.json", "tokenizer_config.json")]
    identity = json.dumps([base.name, base.revision, weights, tokenizer, chat_template(run / "adapter")])
    return f"{base.label.replace('/', '--')}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def exported_gguf(folder: Path, quant: str | None = None) -> Path:
    """The GGUF file that `export` wrote: the quantization asked for, else the first of BEST_FIRST that is there."""
    files = written_files(folder)
    for name in [quant.lower()] if quant else BEST_FIRST:
        if found := [path for path in files if path.name.endswith(f".{name}.gguf")]:
            return found[-1]
    there = ", ".join(sorted(path.name for path in folder.glob("gguf/*.gguf"))) or "nothing"
    raise ToolkitError(
        f"{folder}/gguf: no {quant or 'GGUF file'}, there is {there}: python -m toolkit export {folder.name}"
    )
