"""Adapter → merged weights → GGUF → Ollama, with a parity certificate.

certificate = export("outputs/hybrid", quants=("q8_0", "q4_k_m"))
"""

import importlib.metadata
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.export.card import upload_commands
from toolkit.export.certificate import Certificate, changes_nothing, failures, verify
from toolkit.export.checkpoint import Checkpoint, check_scale
from toolkit.export.gguf import gguf_path, plan_tensors, write_gguf
from toolkit.export.gguf_types import check_quant, check_tokenizer
from toolkit.export.merge import Merged, check_base, check_run, check_weights, merge, open_merged
from toolkit.export.ollama import modelfile
from toolkit.export.record import FAILED, Record
from toolkit.export.tokenizer import load_tokenizer
from toolkit.files import ToolkitError, lock, read_json
from toolkit.training.base import base_checksums
from toolkit.training.model import adapter_checksums, check_adapter
from toolkit.view.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console


def export(
    run: str | Path,
    quants: Sequence[str] = ("f16", "q8_0", "q4_k_m"),
    onto: str = "16bit",
    *,
    scale: float = 1.0,
    console: "Console | None" = None,
    details: bool = False,
) -> Certificate:
    """Write merged/ and gguf/ into the run folder and return the certificate; a second call does what is missing.

    Without `quants` it stops at merged/, from which GGUF files are made and against which they are checked. `onto`
    "16bit" merges onto the 16-bit base, "4bit" onto the dequantized NF4 weights the adapter was trained on. `scale` is how
    much of the adapter to keep (1: as it was trained, 0: the base). `details` says every check. Raises ToolkitError if another
    process works on the run, if the disk is too full (before anything is written), or if the certificate fails;
    EXPORT_FAILED.txt then stands in the run folder."""
    from rich.console import Console

    run = Path(run)
    console = console or Console()
    quants = list(dict.fromkeys(quant.lower() for quant in quants))
    # all that can be refused is refused before gigabytes are written
    check_scale(scale)
    for quant in quants:
        check_quant(quant)
    check_run(run)
    with lock(run, "export"):
        check_adapter(run)
        merged = open_merged(run, onto, scale=scale)
        check_base(run, merged.base)
        check_weights(merged)
        check_tokenizer(merged.config, run / "adapter", gguf=bool(quants))
        record = Record(run, _inputs(run, onto, merged))
        _check_disk(run, merged, quants, record, console)
        merge(merged, run, record, console)
        for quant in quants:
            _write_quant(run, quant, record, console)
        if quants:
            record.make(run / "gguf" / "Modelfile", modelfile(run, merged, load_tokenizer(run / "adapter")))
        # A certificate that is still there is that of these files: the first that is written withdraws it
        certified = (run / "certificate.json").is_file() and not (run / FAILED).is_file()
        certificate = (
            read_json(run / "certificate.json") if certified else verify(run, console=console, details=details)
        )
        _conclude(run, certificate, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
    return certificate


def _inputs(run: Path, onto: str, merged: Merged) -> dict[str, Any]:
    """Everything the files depend on; another value of any of it makes them stale."""
    base = merged.base
    return {
        "onto": onto,
        "scale": merged.adapter.scale,
        "base": base.label,
        "revision": base.revision,
        "base_files": base_checksums(base.folder),
        "adapter": adapter_checksums(run / "adapter"),
        "versions": {package: importlib.metadata.version(package) for package in ("gguf", "xllamacpp")},
    }


def _check_disk(run: Path, merged: Merged, quants: list[str], record: Record, console: "Console") -> None:
    """Say what it is merged onto and the disk needed against free. Raises ToolkitError if that is too little."""
    base = merged.base
    sizes = {"merged": merged.total_size()}
    for quant in quants:
        sizes[quant] = sum(tensor.bytes for tensor in plan_tensors(merged, quant))
    here = sum(file["bytes"] for name, file in record.files.items() if (run / name).is_file())
    needed = max(0, sum(sizes.values()) - here) * 1.01 + 20e6  # headers, vocabulary and merges of each file
    free = shutil.disk_usage(run).free
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())
    strength = "" if merged.adapter.scale == 1 else f", the adapter at {merged.adapter.scale:g} of its strength"
    lines = [
        f"base: {base.name} ({base.revision or 'local folder'}), onto {'4bit' if base.four_bit else '16bit'}{strength}",
        f"disk: {needed / 1e9:.2f} GB needed ({parts}; {here / 1e9:.2f} there already), {free / 1e9:.2f} GB free",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if needed > free:
        raise ToolkitError(
            f"{run}: {needed / 1e9:.2f} GB of disk needed, {free / 1e9:.2f} GB free. Nothing was written; make room, or "
            "export to fewer files (--quant q4_k_m)"
        )


def _write_quant(run: Path, quant: str, record: Record, console: "Console") -> None:
    path = gguf_path(run, quant)
    merged = Checkpoint(run / "merged")
    name = run.resolve().name
    with Progress(console, f"writing {quant}", total=len(merged.weights)) as progress:
        written = record.make(
            path, lambda partial: write_gguf(merged, partial, quant, name, run / "adapter", progress.advance)
        )
    note = "" if written else ", was there already"
    console.print(f"gguf: {path.name}, {path.stat().st_size / 1e9:.3f} GB{note}", markup=False, highlight=False)


def _conclude(run: Path, certificate: Certificate, say: Callable[[str], object]) -> None:
    """The verdict and the next commands. Raises ToolkitError if a check failed."""
    if failed := failures(certificate):
        raise ToolkitError(
            f"{run}: the exported files do not match the run; {len(failed)} checks failed ({'; '.join(failed)}). "
            f"See certificate.md and {FAILED} there"
        )
    commands = upload_commands(run)
    say(f"verified: {len(certificate['checks'])} checks passed")
    if changes_nothing(certificate):
        say("note:     the adapter changes nothing: these files are the run, and the run is its base. Train longer, or")
        say("          at a higher learning rate")
    say("files:    " + ", ".join(str(run / name) for name in ("merged", "gguf") if (run / name).is_dir()))
    if (run / "gguf" / "Modelfile").is_file():
        say(f"next:     cd {run / 'gguf'} && ollama create {run.resolve().name} -f Modelfile")
    else:
        say(f"next:     vllm serve {run / 'merged'}")
    for command in commands:
        say(f"share:    {command}")
