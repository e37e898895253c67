"""Proof that the exported files are the run: the same tokens, the same template, the same probabilities.

certificate = verify("outputs/hybrid"); certificate["passed"], certificate["checks"]
"""

import dataclasses
import importlib.metadata
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from toolkit.evaluation.generate import closing_token
from toolkit.export.gguf_file import GgufFile, header, modelfile, plan_tensors, written_files
from toolkit.export.llama import launch
from toolkit.export.merge import FAILED, Checkpoint, Merged, check_run, filled, open_merged, small_files, uncertify
from toolkit.export.parity import (
    ServedTokens,
    Tokens,
    divergence,
    file_divergence,
    log_probs,
    probe_sequences,
    tokenizer_differences,
)
from toolkit.files import ToolkitError, describe, lock, read_json, write_json, write_text
from toolkit.training.model import adapter_checksums

KL_MEAN, KL_MAX = 1e-4, 1e-3
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
"""Relative RMS error of a merged tensor: another processor rounds a few values to their bf16 neighbour."""
EXACT = 1e-12
ROUNDING = {"F32": EXACT, "F16": EXACT, "BF16": EXACT, "Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.06, "Q5_1": 0.06,
            "Q5_0": 0.08, "Q4_K": 0.12}  # fmt: skip
"""Relative RMS error allowed in a tensor of a type; normal numbers give about half of it when they are quantized."""
LOWER_BOUND = (
    "KL of a GGUF is taken over llama.cpp's 512 most likely tokens and one bucket for all others: a lower bound of the "
    "KL over the whole vocabulary. KL of merged weights is over the whole vocabulary."
)


def verify(run: str | Path, *, say: Callable[[str], None] = print, details: bool = True) -> dict:
    """Check an export and write certificate.json and certificate.md into the run folder; returns the certificate.

    EXPORT_FAILED.txt stands beside the files from the first moment and goes when every gate has passed. Without
    `details` only failures are said. Raises ToolkitError where there is no export to check, when its adapter or base is
    no longer on this machine, or when a weights file cannot be read."""
    run, began = Path(run), time.monotonic()
    if not (run / "export.json").is_file():
        raise ToolkitError(f"{run}: holds no export; `python -m toolkit export {run}` makes one and verifies it")
    with lock(run, "verify"):
        uncertify(run)
        check_run(run)
        record, report = read_json(run / "export.json"), Report(say, details)
        files = _checksums(run, record, report)
        merged, own = open_merged(run, record["inputs"]["onto"], local_only=True), Tokens(run / "adapter")
        sequences = probe_sequences(own)
        reference = _merge_checks(run, merged, own, sequences, report)
        known = written_files(run)
        for path in sorted(known):
            say(f"verifying {path.name}")
            _file_checks(path, run, merged, own, sequences, reference, report)
        for path in sorted({*(run / "gguf").glob("*.gguf")} - {*known}):
            report.note(f"{path.name}: not checked", None, "`export` did not write it")
        if known and (written := _text(run / "gguf" / "Modelfile")):
            differ = set(written.splitlines()) ^ set(modelfile(run, merged, own.tokenizer).splitlines())
            report.gate("Modelfile: lines that are not as expected", len(differ), 0)
        certificate = {
            "passed": all(check["passed"] for check in report.checks),
            "checks": report.checks,
            "reports": report.notes,
            "files": files,
            "inputs": record["inputs"],
            "positions": sum(map(len, sequences)),
            "kl": LOWER_BOUND,
            "seconds": round(time.monotonic() - began, 1),
            "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "gguf", "xllamacpp")},
        }
        _write(run, certificate)
    return certificate


class Report:
    """Gates (`checks`), and `notes`: what is measured or could not be run, and decides nothing."""

    def __init__(self, say: Callable[[str], None], details: bool):
        self.say, self.details = say, details
        self.checks: list[dict] = []
        self.notes: list[dict] = []

    def gate(self, name: str, value: float, limit: float, rule: str = "at most") -> None:
        passed = bool(value <= limit if rule == "at most" else value >= limit)
        shown = float(value) if math.isfinite(value) else None  # JSON has no NaN; a value that is none has failed
        self.checks.append({"name": name, "passed": passed, "value": shown, "limit": limit, "rule": rule})
        if self.details or not passed:
            self.say(f"{'ok    ' if passed else 'FAILED'} {name}: {_number(shown)} ({rule} {_number(limit)})")

    def note(self, name: str, value: float | None, text: str) -> None:
        self.notes.append({"name": name, "value": value, "note": text})
        if self.details or value is None:
            self.say(f"report {name}: {_number(value)}; {text}")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def _checksums(run: Path, record: dict, report: Report) -> dict:
    """{file: sha256, bytes} as they are now; the gates count those that are not as the export wrote or read them."""
    now = {name: describe(run / name) for name in record["files"] if (run / name).is_file()}
    changed = sum(now.get(name) != recorded for name, recorded in record["files"].items())
    report.gate("files changed or missing since they were written", changed, 0)
    adapter, trained = adapter_checksums(run / "adapter"), record["inputs"]["adapter"]
    report.gate("adapter files changed since the export", sum(adapter.get(n) != trained[n] for n in trained), 0)
    return now


def _same_tokens(where: str, theirs: Tokens | ServedTokens, own: Tokens, report: Report) -> None:
    texts, templates = tokenizer_differences(theirs, own)
    report.gate(f"{where}: texts tokenized differently", texts, 0)
    report.gate(f"{where}: templates rendered differently", templates, 0)


def _merge_checks(run: Path, merged: Merged, own: Tokens, sequences: list, report: Report) -> np.ndarray:
    """The merged folder against base + adapter, with a negative control; returns its log-probabilities."""
    stored = Checkpoint(run / "merged")
    expected = small_files(merged, run / "adapter")
    different = sum(_text(run / "merged" / name) != text for name, text in expected.items())
    report.gate("merged: settings files that differ from the base's and the run's", different, 0)
    _same_tokens("merged", Tokens(run / "merged"), own, report)
    report.gate("merged: worst tensor (relative error)", _merged_error(stored, merged), MERGED_ERROR)
    tuned, base = log_probs(merged, "adapter", sequences), log_probs(merged, "base", sequences)
    # the folder as it was written to the disk, read anew
    reference, effect = log_probs(stored, "merged", sequences), float(divergence(tuned, base).mean())
    gate = merge_limit(effect)
    report.gate("merged against base + adapter (mean KL)", divergence(tuned, reference).mean(), gate)
    # the negative control: a gate that the bare base passes would prove nothing
    least = max(NO_OP, math.nextafter(gate, 1))
    report.gate("control: the base without the adapter fails that gate (mean KL)", effect, least, "at least")
    if read_json(run / "manifest.json")["model"].get("load_in_4bit") and not merged.base.four_bit:
        trained = log_probs(_four_bit(run, merged), "adapter", sequences)
        note = "mean KL of the merged weights from the 4-bit model that was trained: of QLoRA, not of this export"
        report.note("QLoRA gap", float(divergence(trained, reference).mean()), note)
    return reference


def merge_limit(effect: float) -> float:
    """Mean KL allowed between merged weights and base + adapter, when the adapter moves the base by a mean KL of `effect`.

    Storing the sum of base and adapter in bf16 moves the model as well. Merges in which every tensor was exact gave 1.3e-4
    at an effect of 0.089 (SmolLM2-135M, data_recipes/measured/smollm2.json in commit 42613c1) and 1.7e-4 to 4.2e-4 at 7.5e-4
    to 2.5e-3 (two steps on tiny models, tests/families/test_families.py). So a quarter of the effect is allowed, never more than
    KL_MAX, and never so much that the bare base would pass.
    """
    return min(max(KL_MEAN, effect / 4), KL_MAX, effect / 2)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _merged_error(stored: Checkpoint, merged: Merged) -> float:
    """Largest relative RMS error of a stored tensor against one merged anew; infinite where names or shapes differ."""
    if stored.shapes != merged.shapes:
        return math.inf
    worst = 0.0
    for name in merged.shapes:
        expected = merged.tensor(name).float()
        error = (stored.tensor(name).float() - expected).norm() / expected.norm().clamp(min=1e-12)
        worst = max(worst, error.nan_to_num(nan=math.inf).item())
    return worst


def _four_bit(run: Path, merged: Merged) -> Merged:
    """The run on the 4-bit weights it was trained on; where they are not on this machine, made from the 16-bit ones."""
    try:
        return open_merged(run, "4bit", local_only=True)
    except ToolkitError:
        return Merged(dataclasses.replace(merged.base, four_bit=True), merged.adapter)


def _file_checks(
    path: Path, run: Path, merged: Merged, own: Tokens, sequences: list, reference: np.ndarray, report: Report
) -> None:
    """Everything about one GGUF file. One that cannot be read has failed, and the others are still looked at."""
    import psutil

    name, size, free = path.name, path.stat().st_size, psutil.virtual_memory().available
    try:
        _content_checks(path, run, merged, report)
        # a file that does not fit is read and compared, but not served: the machine would swap for hours
        if size > free:
            report.note(f"{name}: not served", None, f"needs {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free")
            return
        # the header may say what it likes: only a running file shows how it tokenizes, stops and predicts
        engine, end, plain = launch(path), closing_token(own.tokenizer), own.encode("a")[0]
        _same_tokens(name, ServedTokens(engine), own, report)
        # the end-of-turn token is made certain: a file that lists another one to stop at talks on
        certain = {"prompt": own.encode("Hello"), "n_predict": 8, "logit_bias": [[end, 1000.0]]}
        ended = engine.call("/completion", certain)["stop_type"] == "eos"
        report.gate(f"{name}: end-of-turn tokens that do not end generation", int(not ended), 0)
        measured = file_divergence(engine, reference, sequences, plain)
        for key, limit in LIMITS[name.split(".")[-2]].items():
            report.gate(f"{name}: against merged ({TITLES[key]})", measured[key], limit)
    except (ToolkitError, ValueError, KeyError, IndexError) as error:  # what broken bytes make the readers raise
        report.gate(f"{name}: could not be read ({type(error).__name__}: {str(error)[:150]})", 1, 0)


def _content_checks(path: Path, run: Path, merged: Merged, report: Report) -> None:
    """Every value of the header and every tensor, against the base's config.json and the run's tokenizer.

    `file` is freed before the file is served: a vocabulary read back takes a gigabyte."""
    file, (name, quant, _) = GgufFile(path), path.name.rsplit(".", 2)  # the folder may have been renamed since
    written = header(merged, run / "adapter", quant, name).kv_data[0]
    expected = {key: _in_32_bits(value.value) for key, value in written.items() if not key.startswith("GGUF.")}
    found = {key: file.value(key) for key in file.fields if not key.startswith("GGUF.")}
    keys = sorted(key for key in expected | found if expected.get(key) != found.get(key))
    report.gate(f"{path.name}: header values that differ{': ' if keys else ''}{', '.join(keys)}", len(keys), 0)
    stored, worst, wrong = Checkpoint(run / "merged"), 0.0, 0
    for tensor in plan_tensors(stored, quant):
        # what is left over at the end is in the file and in no plan
        there = file.tensors.pop(tensor.name, None)
        if there is None or there.tensor_type.name != tensor.kind:
            wrong += 1
        else:
            worst = max(worst, _rounding(tensor.values(), there))
    report.gate(f"{path.name}: tensors missing, unknown or of another type", wrong + len(file.tensors), 0)
    report.gate(f"{path.name}: worst tensor, error in units of what its type allows", worst, 1)


def _in_32_bits(value):
    """A number, or the numbers of a list, as a GGUF header keeps them."""
    first = value[0] if isinstance(value, list) else value
    return np.float32(value).tolist() if isinstance(first, float) else value


def _rounding(ours, theirs) -> float:
    """Relative RMS error of a stored tensor in units of its type's allowance; infinite for another shape or no numbers."""
    import gguf

    kind, ours = theirs.tensor_type, ours.reshape(-1, ours.shape[-1])
    if math.prod(theirs.shape) != ours.numel():
        return math.inf
    data, error, power, rows = theirs.data.reshape(len(ours), -1), 0.0, 1e-30, max(1, (1 << 22) // ours.shape[1])
    for start in range(0, len(ours), rows):
        values = ours[start : start + rows].float().numpy()
        expected = np.float32(np.float16(values)) if kind.name == "F16" else values
        error += float(np.sum((gguf.dequantize(data[start : start + rows], kind) - expected) ** 2, dtype=np.float64))
        power += float(np.sum(values**2, dtype=np.float64))
    found = math.sqrt(error / power) / ROUNDING[kind.name]
    return found if math.isfinite(found) else math.inf


def failures(certificate: dict) -> list[str]:
    """Names of the gates that did not pass."""
    return [check["name"] for check in certificate["checks"] if not check["passed"]]


def _write(run: Path, certificate: dict) -> None:
    failed = failures(certificate)
    if failed:
        lines = ["Verification failed: the exported files do not match the run. Do not use or share them. Failed:"]
        write_text(run / FAILED, "\n".join([*lines, *failed]) + "\n")
    write_text(run / "certificate.md", filled("certificate.md", certificate | {"number": _number}))
    write_json(run / "certificate.json", certificate)
    if not failed:
        (run / FAILED).unlink()
