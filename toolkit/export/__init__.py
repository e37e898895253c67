"""Adapter → merged weights → GGUF → Ollama, with a parity certificate.

certificate = export("outputs/hybrid", quants=("q8_0", "q4_k_m"))
"""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from toolkit.export.certificate import Certificate, changes_nothing, failures, upload_commands, verify
from toolkit.export.checkpoint import Checkpoint
from toolkit.export.gguf import gguf_path, plan_tensors, write_gguf
from toolkit.export.gguf_types import check_quant, check_tokenizer
from toolkit.export.merge import (
    Merged,
    check_base,
    check_run,
    check_weights,
    inputs_of,
    merge,
    open_merged,
    shards,
)
from toolkit.export.ollama import modelfile
from toolkit.export.record import FAILED, Record
from toolkit.export.tokenizer import load_tokenizer
from toolkit.files import ToolkitError, lock, read_if_there
from toolkit.training.model import check_adapter
from toolkit.view.progress import Progress, working

UNCHANGED = """note:     the adapter changes nothing: these files are the run, and the run is its base. Train longer,
          or at a higher learning rate"""


def export(
    run: str | Path,
    quants: Sequence[str] = ("f16", "q8_0", "q4_k_m"),
    onto: str = "16bit",
    *,
    scale: float = 1.0,
    console: Console | None = None,
) -> Certificate:
    """Write merged/ and gguf/ into the run folder and return the certificate; a second call does what is missing.

    Without `quants` it stops at merged/, from which GGUF files are made and against which they are checked. `onto`
    "16bit" merges onto the 16-bit base, "4bit" onto the dequantized NF4 weights the adapter was trained on. `scale` is how
    much of the adapter to keep (1: as it was trained, 0: the base). Raises ToolkitError if another process works on the run, if
    the disk is too full (before anything is written), or if the certificate fails; EXPORT_FAILED.txt then stands in the run
    folder."""
    run = Path(run)
    adapter = run / "adapter"
    console = console or Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    quants = [quant.lower() for quant in quants]
    # all that can be refused is refused before gigabytes are written
    for quant in quants:
        check_quant(quant)
    check_run(run)
    with lock(run, "export"):
        with working(console, "reading the run and its base"):
            check_adapter(run)
            # opened, not read: tensors are computed one by one when they are asked for
            merged = open_merged(run, onto, scale=scale)
            check_base(run, merged.base)
            check_weights(merged)
            check_tokenizer(merged.config, adapter, gguf=bool(quants))
            record = Record(run, inputs_of(run, merged))
        say(_plan(run, merged, quants, record))
        merge(merged, run, record, console)
        # GGUF files are made of what lies on the disk, so that both are the same numbers
        stored = Checkpoint(run / "merged")
        name = run.resolve().name
        for quant in quants:
            with Progress(console, f"writing {quant}", total=len(stored.weights)) as progress:
                write = partial(write_gguf, stored, quant=quant, name=name, tokenizer=adapter, advance=progress.advance)
                record.make(gguf_path(run, quant), write)
        if quants:
            record.make(run / "gguf" / "Modelfile", modelfile(run, merged, load_tokenizer(adapter)))
        # A certificate that is still there is that of these files: the first that is written withdraws it
        certificate = {} if (run / FAILED).is_file() else read_if_there(run / "certificate.json")
        certificate = certificate or verify(run, console=console)
        say(_conclusion(run, certificate))
    return certificate


def _plan(run: Path, merged: Merged, quants: list[str], record: Record) -> str:
    """What it is merged onto, and the disk needed against free. Raises ToolkitError if that is too little."""
    base = merged.base
    gigabytes = {"merged": shards(merged).metadata["total_size"] / 1e9}
    for quant in quants:
        gigabytes[quant] = sum(tensor.bytes for tensor in plan_tensors(merged, quant)) / 1e9
    there = sum(file["bytes"] for name, file in record.files.items() if (run / name).is_file()) / 1e9
    # headers, vocabulary and merges of each file come on top
    needed = max(0, sum(gigabytes.values()) - there) * 1.01 + 0.02
    free = shutil.disk_usage(run).free / 1e9
    if needed > free:
        raise ToolkitError(
            f"{run}: {needed:.2f} GB of disk needed, {free:.2f} GB free. Nothing was written; make room, or export to fewer "
            "files (--quant q4_k_m)"
        )
    parts = ", ".join(f"{name} {size:.2f}" for name, size in gigabytes.items())
    strength = "" if merged.adapter.scale == 1 else f", the adapter at {merged.adapter.scale:g} of its strength"
    return (
        f"base: {base.name} ({base.revision or 'local folder'}), onto {'4bit' if base.four_bit else '16bit'}{strength}\n"
        f"disk: {needed:.2f} GB needed ({parts}; {there:.2f} there already), {free:.2f} GB free"
    )


def _conclusion(run: Path, certificate: Certificate) -> str:
    """The verdict and the next commands. Raises ToolkitError if a check failed."""
    if failed := failures(certificate):
        raise ToolkitError(
            f"{run}: the exported files do not match the run; {len(failed)} checks failed ({'; '.join(failed)}). "
            f"See certificate.md and {FAILED} there"
        )
    files = str(run / "merged")
    following = f"vllm serve {files}"
    if (run / "gguf" / "Modelfile").is_file():
        files += f", {run / 'gguf'}"
        following = f"cd {run / 'gguf'} && ollama create {run.resolve().name} -f Modelfile"
    said = [f"verified: {len(certificate['checks'])} checks passed", f"files:    {files}", f"next:     {following}"]
    if changes_nothing(certificate):
        said.insert(1, UNCHANGED)
    return "\n".join([*said, *(f"share:    {command}" for command in upload_commands(run))])
