"""A run behind llama.cpp's server: one copy of the base's weights, the run's adapter beside it as a LoRA.

engine = start(["pocket"]); [chunk for chunk in engine.stream({"messages": [{"role": "user", "content": "Hi"}]})]
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from toolkit.data.chat import Chat, load_chat
from toolkit.export.checkpoint import Base, Checkpoint, ModelConfig, check_scale, generation_of
from toolkit.export.gguf import write_gguf, write_lora_gguf
from toolkit.export.gguf_types import check_quant
from toolkit.export.llama import LORA, Engine, Sampling, launch
from toolkit.export.merge import open_merged
from toolkit.export.record import written_files
from toolkit.export.tokenizer import chat_template
from toolkit.family import KINDS, family_of, sampling_of
from toolkit.files import Say, ToolkitError, complete, lock, outputs, read_if_there, sha256
from toolkit.serving.guard import listening_socket
from toolkit.training.base import ADAPTER_WEIGHTS
from toolkit.training.model import check_adapter, run_folder
from toolkit.view.progress import Progress

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


class Files(NamedTuple):
    """What llama.cpp reads, and what config.json and generation_config.json say of it."""

    weights: Path
    loras: list[Path]
    config: ModelConfig


def start(
    runs: Sequence[str | Path],
    *,
    source: str = "adapter",
    quant: str | None = None,
    scale: float = 1.0,
    host: str = "127.0.0.1",
    port: int = 0,
    key: str | None = None,
    context: int = CONTEXT,
    say: Say = lambda _: None,
) -> Engine:
    """Load runs of one base into llama.cpp's server; `source` is adapter or merged-gguf, port 0 is any free one.

    `scale` is how much of the first run's adapter requests get that do not say it: with 0 they get the base. `say` gets a
    line before each step that takes long. Raises ToolkitError before anything is loaded where it can."""
    folders = [run_folder(run).resolve() for run in runs]
    first = folders[0]
    check_request(folders, source, scale)
    # a port that is taken is known before a model is loaded
    listening_socket(host, port).close()
    files = converted(folders, quant or QUANT, say) if source == "adapter" else exported(first, quant, say)
    say(f"loading {files.weights.stat().st_size / 1e9:.2f} GB of weights")
    return launch(
        files.weights,
        files.loras,
        context=min(context, files.config["max_position_embeddings"]),
        slots=SLOTS,
        sampling=sampling_by_mode(first, files.config),
        # the run's own template: the base may have another, or none
        template=chat_of(first).template_text or "",
        alias=first.name,
        host=host,
        port=port,
        key=key,
        scale=scale,
    )


def check_request(folders: Sequence[Path], source: str, scale: float) -> None:
    """Raises ToolkitError for runs and options that cannot be served together."""
    names = [BASE, *(folder.name for folder in folders)]
    if len(set(names)) < len(names):
        raise ToolkitError(f"{', '.join(map(str, folders))}: runs are told apart by their folders' names, not {BASE!r}")
    check_scale(scale)
    if source != "adapter" and (len(folders) > 1 or scale != 1):
        raise ToolkitError("several runs, or a --scale, are adapters beside their base: leave out --from")


def chat_of(folder: Path) -> Chat:
    """A run's template and tokenizer."""
    return load_chat(str(folder / "adapter"))


def modes_of_run(folder: Path) -> tuple[str, ...]:
    """The modes that a run's chat template has."""
    return KINDS[chat_of(folder).kind] or ("non_thinking",)


def sampling_by_mode(folder: Path, config: ModelConfig) -> Sampling:
    """The recommended values of each mode, by the facts of config.json and generation_config.json."""
    family = family_of(config.get("model_type", ""))
    return {mode: sampling_of(family, mode, config) for mode in modes_of_run(folder)}


# --- files that llama.cpp reads --------------------------------------------------------------------------------------


def converted(folders: Sequence[Path], quant: str, say: Say) -> Files:
    """The base as GGUF, made now or found in outputs/.gguf/, and the adapters, made anew. Raises ToolkitError."""
    for folder in folders:
        check_adapter(folder)
    merged = {folder: open_merged(folder, "16bit") for folder in folders}
    keys = {base_key(folder, run.base) for folder, run in merged.items()}
    if len(keys) > 1:
        raise ToolkitError(f"{', '.join(f.name for f in folders)}: trained on different bases: serve them one by one")
    quant = quant.lower()
    check_quant(quant)
    cache = outputs() / ".gguf" / keys.pop()
    base = merged[folders[0]].base
    checkpoint = Checkpoint(base.folder)
    # a second server on the same base waits for the file and uses it
    with lock(cache, "serve", wait=True):
        weights = converted_base(cache, checkpoint, quant, base.label, folders[0] / "adapter", say)
        loras = []
        for folder, run in merged.items():
            # one folder for each run's weights: a run may be trained again under its name while an old one is served
            file = cache / sha256(folder / "adapter" / ADAPTER_WEIGHTS)[:8] / f"{folder.name}{LORA}"
            write_lora_gguf(run.adapter, checkpoint.config, file)
            loras.append(file)
    return Files(weights, loras, checkpoint.config | generation_of(base.folder))


def converted_base(cache: Path, checkpoint: Checkpoint, quant: str, label: str, tokenizer: Path, say: Say) -> Path:
    """The base's file, of which the name holds the checksum: a damaged one is made again, and not served for ever."""
    for file in cache.glob(f"{quant}-*.gguf"):
        if sha256(file)[:16] == file.stem.removeprefix(f"{quant}-"):
            return file
        say(f"{file}: damaged: it is made again")
        file.unlink()
    say(f"converting {label} to {quant}, once for all runs on it")
    new = cache / f"{quant}.gguf"
    with complete(new) as partial, Progress(Console(), f"converting to {quant}", len(checkpoint.weights)) as progress:
        write_gguf(checkpoint, partial, quant, label, tokenizer, progress.advance)
    return new.rename(cache / f"{quant}-{sha256(new)[:16]}.gguf")


def exported(folder: Path, quant: str | None, say: Say) -> Files:
    """An exported file, once its certificate was found to be about it. Raises ToolkitError."""
    file = exported_gguf(folder, quant)
    certificate = read_if_there(folder / "certificate.json")
    say(f"comparing {file.name} with its certificate")
    if not certificate:
        reason = f"not verified, as {folder / 'certificate.json'} is missing"
    elif not certificate.get("passed"):
        reason = "its certificate did not pass, so it is not the run"
    elif certificate["files"].get(f"gguf/{file.name}", {}).get("sha256") != sha256(file):
        reason = "not the file that its certificate is about"
    elif "model" not in certificate:
        reason = "its certificate is of an older version of this toolkit"
    else:
        # the folder merged/, which has a config.json, may have been deleted to save space
        return Files(file, [], certificate["model"])
    again = f"python -m toolkit verify {folder.name}   or   python -m toolkit export {folder.name}"
    raise ToolkitError(f"{file}: {reason}: {again}")


def base_key(run: Path, base: Base) -> str:
    """A folder name that changes with the base's weights and with the run's tokenizer and template."""
    # sizes and times stand for contents: hashing a large base takes longer than loading it
    shards = {file.name: file.stat() for file in sorted(base.folder.glob("*.safetensors"))}
    weights = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in shards.items()]
    tokenizer = [sha256(run / "adapter" / name) for name in ("tokenizer.json", "tokenizer_config.json")]
    identity = json.dumps([base.name, base.revision, weights, tokenizer, chat_template(run / "adapter")])
    return f"{base.label.replace('/', '--')}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def exported_gguf(folder: Path, quant: str | None = None) -> Path:
    """The GGUF file that `export` wrote: the quantization asked for, else the first of BEST_FIRST that is there."""
    files = {path.name.split(".")[-2]: path for path in written_files(folder)}
    for name in [quant.lower()] if quant else BEST_FIRST:
        if name in files:
            return files[name]
    there = ", ".join(sorted(path.name for path in folder.glob("gguf/*.gguf"))) or "nothing"
    raise ToolkitError(
        f"{folder}/gguf: no {quant or 'GGUF file'}, there is {there}: python -m toolkit export {folder.name}"
    )
