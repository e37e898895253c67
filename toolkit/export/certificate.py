"""Proof that the exported files are the run: the same tokens, the same template, the same probabilities.

certificate = verify("outputs/hybrid"); certificate["passed"], certificate["checks"]
"""

import dataclasses
import importlib.metadata
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.evaluation.generate import closing_token
from toolkit.export.checkpoint import INDEX, Checkpoint
from toolkit.export.contents import gguf_errors, merged_errors
from toolkit.export.gguf import GgufFile, header, plan_tensors
from toolkit.export.inventory import inventory
from toolkit.export.llama import Engine, launch
from toolkit.export.merge import Merged, check_run, open_merged, settings_files
from toolkit.export.ollama import modelfile
from toolkit.export.parity import (
    Sequences,
    ServedTokens,
    Tokens,
    divergence,
    file_divergence,
    log_probs,
    probe_sequences,
    tokenizer_differences,
)
from toolkit.export.record import FAILED, uncertify, written_files
from toolkit.export.templates import filled
from toolkit.files import ToolkitError, describe, lock, read_json, write_json, write_text
from toolkit.training.base import base_checksums
from toolkit.training.model import adapter_checksums
from toolkit.view.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

Certificate = dict[str, Any]
"""The content of certificate.json."""
KL_MEAN = 1e-4
KL_MAX = 1e-3
"""Sound exports were measured at 3.7e-6 for a merge and 1.6e-7 to 4.3e-6 (largest 1.0e-4) for an F16 file."""
NO_OP = 1e-6
"""Mean KL below which an adapter changes nothing."""
LIMITS = {
    "f16": {"mean": KL_MEAN, "max": KL_MAX, "other": 0.01},
    "bf16": {"mean": 1e-3},
    "q8_0": {"mean": 4e-2},
    "q6_k": {"mean": 0.1},
    "q5_k_m": {"mean": 0.25},
    "q4_k_m": {"mean": 0.5},
}
"""Beyond these a file is not the model any more, by its type (data_recipes/measured/export_limits.json)."""
TITLES = {"mean": "mean KL", "max": "largest KL", "other": "share with another top token"}
MERGED_ERROR = 1e-4
MERGED_ROW_ERROR = 1e-2
"""Relative RMS error of a merged tensor and of one of its rows: another processor rounds a few values to their neighbour."""
LOWER_BOUND = (
    "KL of a GGUF is taken over llama.cpp's 512 most likely tokens and one bucket for all others: a lower bound of the "
    "KL over the whole vocabulary. KL of merged weights is over the whole vocabulary."
)
CHANGES_NOTHING = "the adapter changes nothing"


class Report:
    """Gates (`checks`), and `notes`: what is measured or could not be run, and decides nothing."""

    def __init__(self, console: "Console", details: bool):
        self.console = console
        self.details = details
        self.checks: list[dict[str, Any]] = []
        self.notes: list[dict[str, Any]] = []

    def gate(self, name: str, value: float, limit: float, rule: str = "at most") -> None:
        """A value that decides."""
        passed = bool(value <= limit if rule == "at most" else value >= limit)
        number = float(value) if math.isfinite(value) else None  # JSON has no NaN; a value that is none has failed
        self.checks.append({"name": name, "passed": passed, "value": number, "limit": limit, "rule": rule})
        if self.details or not passed:
            self.print(f"{'ok    ' if passed else 'FAILED'} {name}: {_number(number)} ({rule} {_number(limit)})")

    def count(self, name: str, items: list[str]) -> None:
        """A gate on a list that must be empty; the first of the items are named."""
        listed = ", ".join(items[:5]) + (", …" if len(items) > 5 else "")
        self.gate(f"{name}: {listed}" if items else name, len(items), 0)

    def note(self, name: str, value: float | None, text: str) -> None:
        """A value that decides nothing."""
        self.notes.append({"name": name, "value": value, "note": text})
        if self.details or value is None:
            self.print(f"report {name}: {_number(value)}; {text}")

    def print(self, line: str) -> None:
        """A line for the person who waits."""
        self.console.print(line, markup=False, highlight=False)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


@dataclass
class Verification:
    """A run, what its export says it wrote, and all that the checks need, read once."""

    run: Path
    record: dict[str, Any]
    """export.json."""
    merged: Merged
    stored: Checkpoint
    """The merged folder as it is on the disk."""
    own: Tokens
    """The run's tokenizer, from its adapter folder."""
    sequences: Sequences
    report: Report


def verify(run: str | Path, *, console: "Console | None" = None, details: bool = True) -> Certificate:
    """Check an export and write certificate.json and certificate.md into the run folder; returns the certificate.

    EXPORT_FAILED.txt stands beside the files from the first moment and goes when every gate has passed. Without
    `details` only failures are said. Raises ToolkitError where there is no export to check, when its adapter or base is
    no longer on this machine, or when a weights file cannot be read."""
    from rich.console import Console

    run = Path(run)
    began = time.monotonic()
    if not (run / "export.json").is_file():
        raise ToolkitError(f"{run}: holds no export; `python -m toolkit export {run}` makes one and verifies it")
    report = Report(console or Console(), details)
    with lock(run, "verify"):
        certified = read_json(run / "certificate.json")["files"] if (run / "certificate.json").is_file() else {}
        uncertify(run)
        check_run(run)
        verification = _open(run, report)
        files = _check_files(verification, certified)
        ggufs = sorted(written_files(run))
        with Progress(report.console, "verifying", total=2 + len(ggufs)) as progress:
            reference = _check_merged(verification)
            progress.advance(2)
            for path in ggufs:
                _check_gguf(verification, path, reference)
                progress.advance(1)
        if ggufs:
            expected = modelfile(run, verification.merged, verification.own.tokenizer)
            differing = set(_text(run / "gguf" / "Modelfile").splitlines()) ^ set(expected.splitlines())
            report.gate("Modelfile: lines that are not as expected", len(differing), 0)
        certificate = _certificate(verification, files, round(time.monotonic() - began, 1))
        _write(run, certificate)
    return certificate


def _open(run: Path, report: Report) -> Verification:
    record = read_json(run / "export.json")
    inputs = record["inputs"]
    merged = open_merged(run, inputs["onto"], scale=inputs.get("scale", 1.0), local_only=True)
    own = Tokens(run / "adapter")
    return Verification(run, record, merged, Checkpoint(run / "merged"), own, probe_sequences(own), report)


def _certificate(verification: Verification, files: dict[str, Any], seconds: float) -> Certificate:
    report = verification.report
    return {
        "passed": all(check["passed"] for check in report.checks),
        "checks": report.checks,
        "reports": report.notes,
        "files": files,
        "inputs": verification.record["inputs"],
        "positions": sum(map(len, verification.sequences)),
        "kl": LOWER_BOUND,
        "seconds": seconds,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "gguf", "xllamacpp")},
    }


# --- which files are there -------------------------------------------------------------------------------------------


def _check_files(verification: Verification, certified: dict[str, Any]) -> dict[str, Any]:
    """Gate what was changed since it was written, trained or certified, and what does not belong; returns the checksums."""
    run = verification.run
    report = verification.report
    recorded = verification.record["files"]
    inputs = verification.record["inputs"]
    now = {name: describe(run / name) for name in recorded if (run / name).is_file()}
    report.gate("files changed or missing since they were written", _changes(now, recorded), 0)
    if certified:
        report.gate("files changed since their certificate", _changes(now, certified), 0)
    adapter = adapter_checksums(run / "adapter")
    report.gate("adapter files changed since the export", _changes(adapter, inputs["adapter"]), 0)
    base = base_checksums(verification.merged.base.folder)
    report.gate("base files changed since the export", _changes(base, inputs.get("base_files", {})), 0)
    _check_inventory(verification)
    return now


def _changes(now: dict[str, Any], before: dict[str, Any]) -> int:
    return sum(now.get(name) != known for name, known in before.items())


def _check_inventory(verification: Verification) -> None:
    """Both folders, file by file."""
    run = verification.run
    report = verification.report
    settings = settings_files(verification.merged, run / "adapter")
    # whatever transformers would load is compared below; what lies beside it is not
    weights = sorted({entry.file.name for entry in verification.stored.entries.values()})
    sharded = [INDEX] if len(weights) > 1 else []
    merged = inventory(run / "merged", [*settings, *weights, *sharded])
    report.count("merged: files that are missing", merged.missing)
    report.count("merged: files that do not belong there", merged.foreign + merged.unchecked)
    different = [name for name, content in settings.items() if _bytes(run / "merged" / name) != content]
    report.count("merged: settings files that differ from the base's and the run's", different)
    report.count(
        "merged: tensors that the index does not name, or not where they are", verification.stored.index_differences()
    )
    known = [path.name for path in written_files(run)]
    if not (run / "gguf").is_dir() and not known:
        return
    gguf = inventory(run / "gguf", [*known, "Modelfile"] if known else [])
    report.count("gguf: files that are missing", gguf.missing)
    report.count("gguf: files that do not belong there", gguf.foreign)
    for name in gguf.unchecked:
        report.note(f"{name}: not checked", None, "`export` did not write it")


def _bytes(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


def _text(file: Path) -> str:
    return _bytes(file).decode("utf-8", errors="replace")


# --- merged weights --------------------------------------------------------------------------------------------------


def _same_tokens(where: str, theirs: Tokens | ServedTokens, own: Tokens, report: Report) -> None:
    differences = tokenizer_differences(theirs, own)
    report.gate(f"{where}: texts tokenized differently", differences.texts, 0)
    report.gate(f"{where}: templates rendered differently", differences.renderings, 0)


def _check_merged(verification: Verification) -> np.ndarray:
    """The merged folder against base + adapter, with a negative control; returns its log-probabilities."""
    run = verification.run
    merged = verification.merged
    report = verification.report
    theirs = Tokens(run / "merged")
    _same_tokens("merged", theirs, verification.own, report)
    special = theirs.special()
    report.count(
        "merged: what its tokenizer says of its tokens",
        [key for key, value in verification.own.special().items() if special[key] != value],
    )
    errors = merged_errors(verification.stored, merged)
    report.gate("merged: tensors missing, unknown or of another type", errors.missing, 0)
    report.gate("merged: worst tensor (relative error)", errors.tensor, MERGED_ERROR)
    report.gate("merged: worst row of a tensor (relative error)", errors.row, MERGED_ROW_ERROR)
    return _check_probabilities(verification)


def _check_probabilities(verification: Verification) -> np.ndarray:
    merged = verification.merged
    report = verification.report
    questions = [(merged, "adapter"), (merged, "base")]
    trained = None
    if read_json(verification.run / "manifest.json")["model"].get("load_in_4bit") and not merged.base.four_bit:
        trained = _four_bit(verification.run, merged)
        questions.append((trained, "adapter"))
    tuned, base, *in_4_bit = log_probs(questions, verification.sequences)
    try:
        # the folder as it was written to the disk, read anew by transformers
        [reference] = log_probs([(verification.stored, "merged")], verification.sequences)
    except ToolkitError as error:
        report.gate(f"merged: cannot be loaded ({error})", 1, 0)
        return tuned
    _gate_probabilities(report, tuned, base, reference)
    if in_4_bit:
        note = "mean KL of the merged weights from the 4-bit model that was trained: of QLoRA, not of this export"
        report.note("QLoRA gap", float(divergence(in_4_bit[0], reference).mean()), note)
    return reference


def _gate_probabilities(report: Report, tuned: np.ndarray, base: np.ndarray, reference: np.ndarray) -> None:
    """The merged weights against the run, and the bare base, which must not pass for them."""
    effect = float(divergence(tuned, base).mean())
    distance = float(divergence(tuned, reference).mean())
    name = "merged against base + adapter (mean KL)"
    if effect < NO_OP:
        report.gate(name, distance, NO_OP)
        report.note(CHANGES_NOTHING, effect, "mean KL of the run from its base: these files equal both")
        return
    limit = merge_limit(effect)
    report.gate(name, distance, limit)
    # the negative control: a gate that the bare base passes would prove nothing
    control = "control: the base without the adapter fails that gate (mean KL)"
    report.gate(control, effect, max(NO_OP, math.nextafter(limit, 1)), "at least")


def merge_limit(effect: float) -> float:
    """Mean KL allowed between merged weights and base + adapter, when the adapter moves the base by a mean KL of `effect`.

    Storing the sum of base and adapter in bf16 moves the model as well. Merges in which every tensor was exact gave 1.3e-4
    at an effect of 0.089 (SmolLM2-135M, data_recipes/measured/smollm2.json in commit 42613c1) and 1.7e-4 to 4.2e-4 at 7.5e-4
    to 2.5e-3 (two steps on tiny models, tests/families/test_families.py). So a quarter of the effect is allowed, never more than
    KL_MAX, and never so much that the bare base would pass.
    """
    return min(max(KL_MEAN, effect / 4), KL_MAX, effect / 2)


def _four_bit(run: Path, merged: Merged) -> Merged:
    """The run on the 4-bit weights it was trained on; where they are not on this machine, made from the 16-bit ones."""
    try:
        return open_merged(run, "4bit", scale=merged.adapter.scale, local_only=True)
    except ToolkitError:
        return Merged(dataclasses.replace(merged.base, four_bit=True), merged.adapter)


# --- GGUF files ------------------------------------------------------------------------------------------------------


def _check_gguf(verification: Verification, path: Path, reference: np.ndarray) -> None:
    """Everything about one GGUF file. One that cannot be read has failed, and the others are still looked at."""
    import psutil

    report = verification.report
    name = path.name
    report.print(f"verifying {name}")
    try:
        _check_contents(verification, path)
        # a file that does not fit is read and compared, but not served: the machine would swap for hours
        size = path.stat().st_size
        free = psutil.virtual_memory().available
        if size > free:
            report.note(f"{name}: not served", None, f"needs {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free")
        else:
            _check_served(verification, name, launch(path), reference)
    except (ToolkitError, ValueError, KeyError, IndexError) as error:  # what broken bytes make the readers raise
        report.gate(f"{name}: could not be read ({type(error).__name__}: {str(error)[:150]})", 1, 0)


def _check_contents(verification: Verification, path: Path) -> None:
    """Every value of the header and every tensor, against the base's config.json and the run's tokenizer."""
    report = verification.report
    name, quant, _ = path.name.rsplit(".", 2)  # the folder may have been renamed since
    file = GgufFile(path)
    written = header(verification.merged, verification.run / "adapter", quant, name).kv_data[0]
    expected = {key: _in_32_bits(value.value) for key, value in written.items() if not key.startswith("GGUF.")}
    keys = sorted(key for key in expected | file.values if expected.get(key) != file.value(key))
    report.count(f"{path.name}: header values that differ", keys)
    errors = gguf_errors(file, plan_tensors(verification.stored, quant))
    report.gate(f"{path.name}: tensors missing, unknown or of another type", errors.missing, 0)
    report.gate(f"{path.name}: worst tensor, error in units of what its type allows", errors.tensor, 1)
    report.gate(f"{path.name}: worst row of a tensor, in the same units", errors.row, 1)


def _in_32_bits(value: Any) -> Any:
    """A number, or the numbers of a list, as a GGUF header keeps them."""
    first = value[0] if isinstance(value, list) else value
    return np.float32(value).tolist() if isinstance(first, float) else value


def _check_served(verification: Verification, name: str, engine: Engine, reference: np.ndarray) -> None:
    """The header may say what it likes: only a running file shows how it tokenizes, stops and predicts."""
    own = verification.own
    report = verification.report
    _same_tokens(name, ServedTokens(engine), own, report)
    # the end-of-turn token is made certain: a file that lists another one to stop at talks on
    end = closing_token(own.tokenizer)
    certain = {"prompt": own.encode("Hello"), "n_predict": 8, "logit_bias": [[end, 1000.0]]}
    ended = engine.call("/completion", certain)["stop_type"] == "eos"
    report.gate(f"{name}: end-of-turn tokens that do not end generation", int(not ended), 0)
    measured = file_divergence(engine, reference, verification.sequences, own.encode("a")[0])
    for key, limit in LIMITS[name.split(".")[-2]].items():
        report.gate(f"{name}: against merged ({TITLES[key]})", getattr(measured, key), limit)


# --- what is said ----------------------------------------------------------------------------------------------------


def failures(certificate: Certificate) -> list[str]:
    """Names of the gates that did not pass."""
    return [check["name"] for check in certificate["checks"] if not check["passed"]]


def changes_nothing(certificate: Certificate) -> bool:
    """Whether the run behind an export is its base."""
    return any(note["name"] == CHANGES_NOTHING for note in certificate["reports"])


def _write(run: Path, certificate: Certificate) -> None:
    failed = failures(certificate)
    if failed:
        first = "Verification failed: the exported files do not match the run. Do not use or share them. Failed:"
        write_text(run / FAILED, "\n".join([first, *failed]) + "\n")
    values = {"number": _number, "changes_nothing": changes_nothing(certificate)}
    write_text(run / "certificate.md", filled("certificate.md", certificate | values))
    write_json(run / "certificate.json", certificate)
    if not failed:
        (run / FAILED).unlink()
