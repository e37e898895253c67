"""Adapter → merged weights → GGUF → Ollama, with a parity certificate; then, if asked, to the Hub.

export("outputs/hybrid", quants=("q8_0", "q4_k_m")); push("outputs/hybrid", "me/hybrid", dry_run=False)
"""

import hashlib
import importlib.metadata
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from toolkit.export.certificate import FAILED, uncertify, verify
from toolkit.export.gguf_file import (
    QUANTS,
    check_quant,
    check_supported,
    plan_tensors,
    quantize_with_llama_cpp,
    write_gguf,
)
from toolkit.export.ledger import Ledger
from toolkit.export.merge import Checkpoint, Merged, merge, open_merged, size_of
from toolkit.export.model_card import model_card
from toolkit.export.parity import POSITIONS
from toolkit.files import ToolkitError, read_json, sha256
from toolkit.generate import SAMPLING
from toolkit.recipe import load

LIBRARIES = 1.0e9
"""Memory of Python with torch, transformers and llama.cpp loaded, before any weight (measured: 0.8 GB)."""
PER_TOKEN = 7e3
"""Memory for each token of the vocabulary when a GGUF's header is read back (measured: 1.1 GB for Qwen3's)."""
OLLAMA = "0.30.0"
"""The first Ollama that uses the chat template inside the GGUF when the Modelfile names no RENDERER."""


def export(
    run: str | Path,
    to: Sequence[str] = ("merged", "gguf"),
    quants: Sequence[str] = ("f16", "q8_0", "q4_k_m"),
    ollama: bool = True,
    onto: str = "16bit",
    *,
    say: Callable[[str], None] = print,
) -> dict:
    """Writes merged/ and gguf/ into the run folder and returns the certificate; a second call does what is missing.

    `to` "merged" alone stops there; "gguf" includes it, as GGUF files are made from it and checked against it.
    `onto` "16bit" merges onto the 16-bit base, "4bit" onto the dequantized NF4 weights the adapter was trained on.
    Raises ToolkitError if disk or memory is short (before it begins), if a file cannot be written, or if the
    certificate fails; EXPORT_FAILED.txt then stands in the run folder."""
    run, quants = Path(run), _quants(to, quants)
    merged = open_merged(_checked(run), onto)
    check_supported(merged.checkpoint)
    ledger = Ledger(run / "export.json", _inputs(run, onto, merged))
    _plan(run, merged, quants, ledger, say)
    _clear(run)
    merge(merged, run / "merged", ledger, run / "adapter", say)
    for quant in quants:
        _write_quant(run, quant, ledger, say)
    if ollama and quants:
        ledger.make_text(run / "gguf" / "Modelfile", modelfile(run))
    certificate = verify(run, say=say)
    if not certificate["passed"]:
        failed = [c["name"] for c in certificate["checks"] if not c["passed"]]
        raise ToolkitError(
            f"{run}: the export is not the run; {len(failed)} checks failed ({'; '.join(failed)}). "
            f"See certificate.md and {FAILED} there"
        )
    return certificate


def _quants(to: Sequence[str], quants: Sequence[str]) -> list[str]:
    unknown = set(to) - {"adapter", "merged", "gguf"}
    if unknown or not to:
        raise ToolkitError(f"to: expected merged and gguf, got {', '.join(sorted(unknown)) or 'nothing'}")
    if "gguf" not in to:
        return []
    wanted = list(dict.fromkeys(q.lower() for q in quants))
    for quant in wanted:
        check_quant(quant)
    if any(q not in QUANTS for q in wanted) and "f16" not in wanted:
        wanted.append("f16")  # llama-quantize starts from a file of ours
    return sorted(wanted, key=lambda q: q not in QUANTS)


def _checked(run: Path) -> Path:
    adapter = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json")
    missing = [n for n in ("manifest.json", *(f"adapter/{name}" for name in adapter)) if not (run / n).is_file()]
    if missing:
        raise ToolkitError(f"{run}: {', '.join(missing)} not found: expected the folder of a finished run")
    return run


def _inputs(run: Path, onto: str, merged: Merged) -> dict:
    """Everything the files depend on; another value of any of it makes them stale."""
    base = merged.base
    weights = sorted({file for file, _, _ in merged.checkpoint.entries.values()})
    digest = hashlib.sha256("".join(map(sha256, weights)).encode()).hexdigest() if base.local else None
    adapter = {file.name: sha256(file) for file in sorted((run / "adapter").iterdir()) if file.suffix != ".md"}
    return {
        "onto": onto,
        "base": base.label,
        "revision": base.revision,
        "base_sha256": digest,
        "adapter": adapter,
        "versions": {p: importlib.metadata.version(p) for p in ("gguf", "xllamacpp")},
    }


def _plan(run: Path, merged: Merged, quants: list[str], ledger: Ledger, say: Callable) -> None:
    """Disk and memory, needed against free, in numbers. Raises ToolkitError if either is short."""
    import psutil

    whole = sum(map(size_of(merged), merged.names()))
    here = sum(f["bytes"] for n, f in ledger.files.items() if (run / n).is_file())
    disk = {"merged": whole} | {q: sum(t.bytes for t in plan_tensors(merged, q)) for q in quants}
    needed = max(0, sum(disk.values()) - here) * 1.01 + 20e6  # headers, vocabulary and merges of each file
    free, memory, room = shutil.disk_usage(run).free, memory_needed(merged), psutil.virtual_memory().available
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in disk.items())
    base = merged.base
    say(f"base: {base.name} ({base.revision or 'local folder'}), onto {'4bit' if base.four_bit else '16bit'}")
    say(f"disk: {needed / 1e9:.2f} GB needed ({parts}; {here / 1e9:.2f} there already), {free / 1e9:.2f} GB free")
    say(f"memory: {memory / 1e9:.2f} GB needed, {room / 1e9:.2f} GB free")
    for what, need, have in (("disk", needed, free), ("memory", memory, room)):
        if need > have:
            raise ToolkitError(
                f"{run}: {need / 1e9:.2f} GB of {what} needed, {have / 1e9:.2f} GB free. Nothing was "
                "written; make room, or export to fewer files (--quant q4_k_m)"
            )


def memory_needed(merged: Merged) -> float:
    """Bytes: the largest weight merged in fp32, or a GGUF tensor, or the certificate's one layer and 200 positions;
    on top, the libraries and the vocabulary. Served GGUF files are memory-mapped and give way when memory is short."""
    sizes = {name: math.prod(merged.shape(name)) for name in merged.names()}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    largest = max(size for name, size in sizes.items() if merged.adapter.touches(name))
    certificate = 4 * layer + 6 * 4 * POSITIONS * merged.config["vocab_size"]
    return LIBRARIES + PER_TOKEN * merged.config["vocab_size"] + max(12 * largest, 3 * max(sizes.values()), certificate)


def _clear(run: Path) -> None:
    """Leftovers of an export that was killed: half-written files never carry their final name."""
    uncertify(run)
    for partial in [*run.glob("*.partial"), *run.glob("merged/*.partial"), *run.glob("gguf/*.partial")]:
        partial.unlink()


def gguf_path(run: str | Path, quant: str) -> Path:
    return Path(run) / "gguf" / f"{Path(run).resolve().name}.{quant}.gguf"


def _write_quant(run: Path, quant: str, ledger: Ledger, say: Callable) -> None:
    path = gguf_path(run, quant)

    def write(partial: Path) -> None:
        if quant in QUANTS:
            write_gguf(Checkpoint(run / "merged"), partial, quant, run.resolve().name)
        else:
            say(f"gguf: {quant} is not one of ours, so your llama-quantize makes it from the F16 file")
            quantize_with_llama_cpp(gguf_path(run, "f16"), partial, quant)

    done = ledger.make(path, write)
    say(f"gguf: {path.name}, {path.stat().st_size / 1e9:.3f} GB{'' if done else ', was there already'}")


def modelfile(run: Path) -> str:
    """An Ollama Modelfile for the smallest GGUF of a run, with Qwen3's sampling for both modes."""
    smallest = min((run / "gguf").glob("*.gguf"), key=lambda p: p.stat().st_size)
    context = read_json(run / "merged" / "config.json")["max_position_embeddings"]
    wanted = load(run / "recipe.yaml").model.max_seq_length if (run / "recipe.yaml").is_file() else 8192
    name = run.resolve().name
    return "\n".join(
        [
            f"# Ollama {OLLAMA} or newer: it uses the chat template inside the GGUF. ollama create {name} -f Modelfile",
            f"FROM ./{smallest.name}",
            'PARAMETER stop "<|im_end|>"',
            'PARAMETER stop "<|endoftext|>"',
            f"PARAMETER num_ctx {min(context, max(4096, wanted))}",
            f"# Sampling for thinking mode, Qwen3's default: ollama run {name}",
            *_parameters("thinking", ""),
            f"# For non-thinking mode (ollama run {name} --think=false) put these in place of the four above:",
            *_parameters("non_thinking", "# "),
            "",
        ]
    )


def _parameters(mode: str, prefix: str) -> list[str]:
    return [f"{prefix}PARAMETER {key} {value:g}" for key, value in SAMPLING[mode].items()]


def push(
    run: str | Path,
    repo: str,
    dry_run: bool = True,
    private: bool = True,
    *,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Puts an export on the Hub as one commit, with a model card; `dry_run` (the default) only says what would go.

    Merged weights lie at the top, so that from_pretrained(repo) works; GGUF files and adapter in folders of their own.
    Returns [{"path", "bytes"}]. Raises ToolkitError without a passed certificate, or when the Hub refuses."""
    run = Path(run)
    if not (run / "certificate.json").is_file() or not read_json(run / "certificate.json")["passed"]:
        raise ToolkitError(f"{run}: no certificate has passed, so it is not pushed: python -m toolkit export {run}")
    card, files = model_card(run, repo), _files(run)
    listing = [{"path": "README.md", "bytes": len(card.encode())}]
    listing += [{"path": path, "bytes": file.stat().st_size} for path, file in files.items()]
    say(f"{'would push' if dry_run else 'pushing'} to {repo} ({'private' if private else 'public'}):")
    for entry in listing:
        say(f"{entry['bytes'] / 1e6:12.2f} MB  {entry['path']}")
    say(f"{sum(e['bytes'] for e in listing) / 1e6:12.2f} MB  in {len(listing)} files")
    if not dry_run:
        _upload(repo, card, files, private)
    return listing


def _files(run: Path) -> dict[str, Path]:
    """{path in the repository: file}: what was exported and certified, the adapter, and what explains the run."""
    exported = {name: run / name for name in read_json(run / "certificate.json")["files"]}
    adapter = {f"adapter/{f.name}": f for f in sorted((run / "adapter").iterdir()) if f.suffix != ".md"}
    told = {name: run / name for name in ("certificate.json", "certificate.md", "recipe.yaml", "mix.json", "eval.json")}
    every = exported | adapter | {name: file for name, file in told.items() if file.is_file()}
    return {name.removeprefix("merged/"): file for name, file in every.items()}


def _upload(repo: str, card: str, files: dict[str, Path], private: bool) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd("README.md", card.encode())]
    operations += [CommitOperationAdd(path, str(file)) for path, file in files.items()]
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(repo, operations, commit_message="Fine-tuned model with parity certificate")
    except Exception as error:  # the Hub library raises many kinds; to the user they are one: it was not accepted
        raise ToolkitError(
            f"{repo}: the Hub did not take it ({type(error).__name__}: {str(error)[:300]}). Log in with "
            "`hf auth login` and check the name; nothing was committed"
        ) from error
