"""Adapter → merged weights → GGUF → Ollama, with a parity certificate; then, if asked, to the Hub.

export("outputs/hybrid", quants=("q8_0", "q4_k_m")); push("outputs/hybrid", "me/hybrid", dry_run=False)
"""

import hashlib
import importlib.metadata
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from toolkit.export.certificate import verify
from toolkit.export.gguf_file import check_quant, check_supported, gguf_path, modelfile, plan_tensors, write_gguf
from toolkit.export.merge import (
    FAILED,
    SHARD_BYTES,
    Checkpoint,
    Merged,
    Record,
    load_tokenizer,
    merge,
    open_merged,
    size_of,
)
from toolkit.export.model_card import model_card
from toolkit.export.parity import POSITIONS
from toolkit.files import ToolkitError, lock, read_json, sha256
from toolkit.model import check_adapter

LIBRARIES = 1.0e9
"""Memory of Python with torch, transformers and llama.cpp loaded, before any weight (measured: 0.8 GB)."""
PER_TOKEN = 7e3
"""Memory for each token of the vocabulary when a GGUF's header is read back (measured: 1.1 GB for Qwen3's)."""


def export(
    run: str | Path,
    to: Sequence[str] = ("merged", "gguf"),
    quants: Sequence[str] = ("f16", "q8_0", "q4_k_m"),
    ollama: bool = True,
    onto: str = "16bit",
    *,
    say: Callable[[str], None] = print,
    details: bool = False,
) -> dict:
    """Write merged/ and gguf/ into the run folder and return the certificate; a second call does what is missing.

    `to` "merged" alone stops there; "gguf" includes it, as GGUF files are made from it and checked against it.
    `onto` "16bit" merges onto the 16-bit base, "4bit" onto the dequantized NF4 weights the adapter was trained on.
    `details` says every check. Raises ToolkitError if another process works on the run, if disk or memory is short
    (before anything is written), or if the certificate fails; EXPORT_FAILED.txt then stands in the run folder."""
    run, quants = Path(run), _quants(to, quants)
    with lock(_checked(run), "export"):
        merged = open_merged(run, onto)
        if quants:
            check_supported(merged)
        record = Record(run, _inputs(run, onto, merged))
        _plan(run, merged, quants, record, say)
        merge(merged, run, record, say)
        for quant in quants:
            _write_quant(run, quant, record, say)
        if ollama and quants:
            record.make(run / "gguf" / "Modelfile", modelfile(run, merged, load_tokenizer(run / "adapter")))
        certificate = _valid_certificate(run, record) or verify(run, say=say, details=details)
    _conclude(run, certificate, say)
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
    return wanted


def _checked(run: Path) -> Path:
    adapter = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json")
    missing = [n for n in ("manifest.json", *(f"adapter/{name}" for name in adapter)) if not (run / n).is_file()]
    if missing:
        raise ToolkitError(f"{run}: {', '.join(missing)} not found: expected the folder of a finished run")
    check_adapter(run)
    return run


def _inputs(run: Path, onto: str, merged: Merged) -> dict:
    """Everything the files depend on; another value of any of it makes them stale."""
    base, weights = merged.base, sorted(set(merged.checkpoint.files.values()))
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


def _plan(run: Path, merged: Merged, quants: list[str], record: Record, say: Callable) -> None:
    """Disk and memory, needed against free, in numbers. Raises ToolkitError if either is short."""
    import psutil

    disk = {"merged": sum(size_of(merged, name) for name in merged.names())}
    disk |= {q: sum(t.bytes for t in plan_tensors(merged, q)) for q in quants}
    here = sum(f["bytes"] for n, f in record.files.items() if (run / n).is_file())
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
    """Bytes: a shard and its largest weight merged in fp32, or a GGUF tensor, or the certificate's largest weight and
    200 positions; besides, the libraries and the vocabulary. Served GGUF files are memory-mapped."""
    sizes = [math.prod(merged.shape(name)) for name in merged.names()]
    shard = min(2 * sum(sizes), max(SHARD_BYTES, 2 * max(sizes)))
    touched = max(math.prod(merged.shape(name)) for name in merged.names() if merged.adapter.touches(name))
    vocabulary = merged.config["vocab_size"]
    certificate = 6 * max(sizes) + 4 * 4 * POSITIONS * vocabulary
    return LIBRARIES + PER_TOKEN * vocabulary + max(shard + 12 * touched, certificate)


def _write_quant(run: Path, quant: str, record: Record, say: Callable) -> None:
    path, name = gguf_path(run, quant), run.resolve().name

    def write(partial: Path) -> None:
        write_gguf(Checkpoint(run / "merged"), partial, quant, name, run / "adapter", say)

    done = record.make(path, write)
    say(f"gguf: {path.name}, {path.stat().st_size / 1e9:.3f} GB{'' if done else ', was there already'}")


def _valid_certificate(run: Path, record: Record) -> dict | None:
    """The certificate of an export in which nothing had to be written: its files have just been compared by checksum."""
    if record.wrote or (run / FAILED).is_file() or not (run / "certificate.json").is_file():
        return None
    certificate = read_json(run / "certificate.json")
    same = certificate["files"] == record.files and certificate["inputs"] == record.inputs
    return certificate if same and certificate["passed"] else None


def _conclude(run: Path, certificate: dict, say: Callable) -> None:
    """The verdict and the next command. Raises ToolkitError if a check failed."""
    failed = [c["name"] for c in certificate["checks"] if not c["passed"]]
    if failed:
        raise ToolkitError(
            f"{run}: the exported files do not match the run; {len(failed)} checks failed ({'; '.join(failed)}). "
            f"See certificate.md and {FAILED} there"
        )
    alarms = [r["name"] for r in certificate["reports"] if r["alarm"]]
    say(f"verified: {len(certificate['checks'])} checks passed{', 1 alarm: ' + alarms[0] if alarms else ''}")
    say(f"files:    {run / 'merged'}" + (f", {run / 'gguf'}" if (run / "gguf").is_dir() else ""))
    if (run / "gguf" / "Modelfile").is_file():
        say(f"next:     cd {run / 'gguf'} && ollama create {run.resolve().name} -f Modelfile")
    else:
        say(f"next:     vllm serve {run / 'merged'}")


def push(
    run: str | Path,
    repo: str,
    dry_run: bool = True,
    private: bool = True,
    *,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Upload an export to the Hub as one commit, with a model card; `dry_run` (the default) only says what would go.

    Merged weights lie at the top, so that from_pretrained(repo) works; GGUF files and adapter in folders of their own.
    Returns [{"path", "bytes"}]. Raises ToolkitError without a passed certificate, or when the Hub refuses."""
    run = Path(run)
    if not (run / "certificate.json").is_file() or not read_json(run / "certificate.json")["passed"]:
        raise ToolkitError(f"{run}: no certificate has passed, so it is not pushed: python -m toolkit export {run}")
    card, files = model_card(run, repo), _files(run)
    listing = [{"path": "README.md", "bytes": len(card.encode())}]
    listing += [{"path": path, "bytes": file.stat().st_size} for path, file in files.items()]
    say(f"{'would upload' if dry_run else 'uploading'} to {repo} ({'private' if private else 'public'}):")
    for entry in listing:
        say(f"{entry['bytes'] / 1e6:12.2f} MB  {entry['path']}")
    say(f"{sum(e['bytes'] for e in listing) / 1e6:12.2f} MB  in {len(listing)} files")
    if dry_run:
        say("nothing was uploaded: add --really-push to the same command to upload these files")
    else:
        _upload(repo, card, files, private)
        say(f"uploaded: https://huggingface.co/{repo}")
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
