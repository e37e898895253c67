"""Adapter → merged weights → GGUF → Ollama, with a parity certificate; then, if asked, to the Hub.

export("outputs/hybrid", quants=("q8_0", "q4_k_m")); push("outputs/hybrid", "me/hybrid", dry_run=False)
"""

import hashlib
import importlib.metadata
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from toolkit.export.certificate import failures, verify
from toolkit.export.gguf_file import check_quant, check_supported, gguf_path, modelfile, plan_tensors, write_gguf
from toolkit.export.merge import (
    FAILED,
    Checkpoint,
    Merged,
    Record,
    check_run,
    load_tokenizer,
    merge,
    open_merged,
    size_of,
)
from toolkit.export.model_card import model_card
from toolkit.files import ToolkitError, lock, read_json, sha256
from toolkit.training.model import adapter_checksums, check_adapter


def export(
    run: str | Path,
    quants: Sequence[str] = ("f16", "q8_0", "q4_k_m"),
    onto: str = "16bit",
    *,
    say: Callable[[str], None] = print,
    details: bool = False,
) -> dict:
    """Write merged/ and gguf/ into the run folder and return the certificate; a second call does what is missing.

    Without `quants` it stops at merged/, from which GGUF files are made and against which they are checked. `onto`
    "16bit" merges onto the 16-bit base, "4bit" onto the dequantized NF4 weights the adapter was trained on. `details`
    says every check. Raises ToolkitError if another process works on the run, if the disk is too full
    (before anything is written), or if the certificate fails; EXPORT_FAILED.txt then stands in the run folder."""
    run, quants = Path(run), list(dict.fromkeys(quant.lower() for quant in quants))
    for quant in quants:
        check_quant(quant)
    # all that can be refused is refused before gigabytes are written
    check_run(run)
    with lock(run, "export"):
        check_adapter(run)
        merged = open_merged(run, onto)
        if quants:
            check_supported(merged)
        record = Record(run, _inputs(run, onto, merged))
        _plan(run, merged, quants, record, say)
        merge(merged, run, record, say)
        for quant in quants:
            _write_quant(run, quant, record, say)
        if quants:
            record.make(run / "gguf" / "Modelfile", modelfile(run, merged, load_tokenizer(run / "adapter")))
        # A certificate that is still there is that of these files: the first that is written withdraws it
        certified = (run / "certificate.json").is_file() and not (run / FAILED).is_file()
        certificate = read_json(run / "certificate.json") if certified else verify(run, say=say, details=details)
    _conclude(run, certificate, say)
    return certificate


def _inputs(run: Path, onto: str, merged: Merged) -> dict:
    """Everything the files depend on; another value of any of it makes them stale."""
    base, weights = merged.base, sorted(set(merged.files.values()))
    return {
        "onto": onto,
        "base": base.label,
        "revision": base.revision,
        "base_sha256": hashlib.sha256("".join(map(sha256, weights)).encode()).hexdigest() if base.local else None,
        "adapter": adapter_checksums(run / "adapter"),
        "versions": {package: importlib.metadata.version(package) for package in ("gguf", "xllamacpp")},
    }


def _plan(run: Path, merged: Merged, quants: list[str], record: Record, say: Callable) -> None:
    """Say what it is merged onto and the disk needed against free. Raises ToolkitError if that is too little."""
    base, sizes = merged.base, {"merged": sum(size_of(merged, name) for name in merged.shapes)}
    sizes |= {quant: sum(tensor.bytes for tensor in plan_tensors(merged, quant)) for quant in quants}
    here = sum(file["bytes"] for name, file in record.files.items() if (run / name).is_file())
    needed = max(0, sum(sizes.values()) - here) * 1.01 + 20e6  # headers, vocabulary and merges of each file
    free, parts = shutil.disk_usage(run).free, ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())
    say(f"base: {base.name} ({base.revision or 'local folder'}), onto {'4bit' if base.four_bit else '16bit'}")
    say(f"disk: {needed / 1e9:.2f} GB needed ({parts}; {here / 1e9:.2f} there already), {free / 1e9:.2f} GB free")
    if needed > free:
        raise ToolkitError(
            f"{run}: {needed / 1e9:.2f} GB of disk needed, {free / 1e9:.2f} GB free. Nothing was written; make room, or "
            "export to fewer files (--quant q4_k_m)"
        )


def _write_quant(run: Path, quant: str, record: Record, say: Callable) -> None:
    path, merged, name = gguf_path(run, quant), Checkpoint(run / "merged"), run.resolve().name
    done = record.make(path, lambda partial: write_gguf(merged, partial, quant, name, run / "adapter", say))
    say(f"gguf: {path.name}, {path.stat().st_size / 1e9:.3f} GB{'' if done else ', was there already'}")


def _conclude(run: Path, certificate: dict, say: Callable) -> None:
    """The verdict and the next command. Raises ToolkitError if a check failed."""
    if failed := failures(certificate):
        raise ToolkitError(
            f"{run}: the exported files do not match the run; {len(failed)} checks failed ({'; '.join(failed)}). "
            f"See certificate.md and {FAILED} there"
        )
    say(f"verified: {len(certificate['checks'])} checks passed")
    say("files:    " + ", ".join(str(run / name) for name in ("merged", "gguf") if (run / name).is_dir()))
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
    from huggingface_hub import CommitOperationAdd

    run = Path(run)
    if not (run / "certificate.json").is_file() or not read_json(run / "certificate.json")["passed"]:
        raise ToolkitError(f"{run}: no certificate has passed, so it is not pushed: python -m toolkit export {run}")
    # one commit: a push that breaks off leaves the repository as it was
    files = [CommitOperationAdd("README.md", model_card(run, repo).encode())]
    files += [CommitOperationAdd(name.removeprefix("merged/"), str(run / name)) for name in _pushed(run)]
    listing = [{"path": file.path_in_repo, "bytes": file.upload_info.size} for file in files]
    say(f"{'would upload' if dry_run else 'uploading'} to {repo} ({'private' if private else 'public'}):")
    for entry in listing:
        say(f"{entry['bytes'] / 1e6:12.2f} MB  {entry['path']}")
    say(f"{sum(entry['bytes'] for entry in listing) / 1e6:12.2f} MB  in {len(listing)} files")
    if dry_run:
        say("nothing was uploaded: add --really-push to the same command to upload these files")
    else:
        _upload(repo, files, private)
        say(f"uploaded: https://huggingface.co/{repo}")
    return listing


def _pushed(run: Path) -> list[str]:
    """What was exported and certified, the adapter, and what explains the run."""
    adapter = [f"adapter/{name}" for name in adapter_checksums(run / "adapter")]
    told = ("certificate.json", "certificate.md", "recipe.yaml", "mix.json", "eval.json")
    return [*read_json(run / "certificate.json")["files"], *adapter, *[n for n in told if (run / n).is_file()]]


def _upload(repo: str, files: list, private: bool) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(repo, files, commit_message="Fine-tuned model with parity certificate")
    except Exception as error:  # the Hub library raises many kinds; to the user they are one: it was not accepted
        raise ToolkitError(
            f"{repo}: the Hub did not take it ({type(error).__name__}: {str(error)[:300]}). Log in with "
            "`hf auth login` and check the name; nothing was committed"
        ) from error
