"""Proof that the exported files are the run: the same tokens, the same template, the same probabilities.

certificate = verify("outputs/hybrid"); certificate["passed"], certificate["checks"]
"""

import dataclasses
import importlib.metadata
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from toolkit.export.gguf_file import (
    GgufFile,
    chat_template,
    check_supported,
    converted,
    encode,
    end_of_turn,
    gguf_names,
    load_tokenizer,
)
from toolkit.export.merge import Checkpoint, Merged, open_merged
from toolkit.export.parity import (
    adapter_view,
    base_view,
    divergence,
    file_divergence,
    hf_encode,
    hf_render,
    llama_server,
    log_probs,
    merging_view,
    probe_sequences,
    server_encode,
    server_render,
    stored_view,
    tokenizer_differences,
)
from toolkit.files import ToolkitError, describe, read_json, write_json, write_text
from toolkit.generate import SAMPLING, split_reply
from toolkit.recipe import Evaluate, load

FAILED = "EXPORT_FAILED.txt"
KL_MEAN, KL_MAX, TOP_1 = 1e-4, 1e-3, 0.99
"""Gates. Sound exports were measured at 3.7e-6 for a merge and 1.6e-7 to 4.3e-6 (largest 1.0e-4) for an F16 file."""
NO_OP = 1e-6
ALARMS = {"bf16": 5e-4, "q8_0": 2e-2, "q6_k": 5e-2, "q5_k_m": 0.12, "q4_k_m": 0.25}
"""Mean KL above which a quantized file deserves a look: q8_0, q4_k_m from a 135M model, the others interpolated."""
LOSSLESS = ("F32", "F16", "BF16")
ROUNDING = {"Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.06, "Q5_1": 0.06, "Q5_0": 0.08, "Q4_K": 0.12}
"""Relative RMS error allowed in a quantized tensor; normal numbers give about half of it. Other types: 0.5."""
REPLY_TOKENS = 192


def verify(run: str | Path, *, say: Callable[[str], None] = print) -> dict:
    """Checks an export and writes certificate.json and certificate.md into the run folder; returns the certificate.

    EXPORT_FAILED.txt stands beside the files from the first moment and goes when every gate has passed.
    Raises ToolkitError where there is no export to check, or when its base is no longer on this machine."""
    run, began = Path(run), time.monotonic()
    if not (run / "export.json").is_file():
        raise ToolkitError(f"{run}: holds no export; `python -m toolkit export {run}` makes one and verifies it")
    uncertify(run)
    record, report = read_json(run / "export.json"), _Report(say)
    files = _checksums(run, record["files"], report)
    check_supported(Checkpoint(run / "merged"))
    tokenizer, ours = load_tokenizer(run / "adapter"), load_tokenizer(run / "merged")
    sequences = probe_sequences(tokenizer)
    _same_tokenizer(report, "merged", hf_encode(ours), hf_render(ours), tokenizer)
    reference = _merge_checks(run, record["inputs"]["onto"], sequences, report)
    gguf = sorted((run / "gguf").glob("*.gguf"), key=lambda path: -path.stat().st_size)
    for path in gguf:
        _file_checks(path, run, tokenizer, sequences, reference, report)
    if gguf:
        _generation(gguf[-1], _prompts(run), tokenizer, report)
    certificate = report.certificate() | {
        "files": files,
        "inputs": record["inputs"],
        "positions": sum(map(len, sequences)),
        "seconds": round(time.monotonic() - began, 1),
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "gguf", "xllamacpp")},
    }
    _write(run, certificate)
    return certificate


def uncertify(run: Path) -> None:
    """Withdraws a certificate: the files are about to change, or to be looked at again."""
    for name in ("certificate.json", "certificate.md"):
        (run / name).unlink(missing_ok=True)
    write_text(run / FAILED, "Not verified yet: the export or its verification did not come to its end.\n")


class _Report:
    """Gates (`checks`), numbers with an alarm but no gate (`reports`), and what could not be run (`skipped`)."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.checks, self.reports, self.skipped = say, [], [], []

    def at_most(self, name: str, value: float, limit: float) -> None:
        self._check(name, value <= limit, value, limit, "at most")

    def at_least(self, name: str, value: float, limit: float) -> None:
        self._check(name, value >= limit, value, limit, "at least")

    def _check(self, name: str, passed: bool, value: float, limit: float, rule: str) -> None:
        value = float(value) if math.isfinite(value) else None  # JSON has no NaN; a number that is none has failed
        self.checks.append({"name": name, "passed": bool(passed), "value": value, "limit": limit, "rule": rule})
        self.say(f"{'ok    ' if passed else 'FAILED'} {name}: {_number(value)} ({rule} {_number(limit)})")

    def note(self, name: str, value: float, limit: float | None = None, text: str = "") -> None:
        alarm = limit is not None and not value <= limit
        self.reports.append({"name": name, "value": value, "limit": limit, "alarm": alarm, "note": text})
        above = f" (alarm above {limit:g})" if limit else ""
        self.say(f"{'ALARM ' if alarm else 'report'} {name}: {_number(value)}{above}; {text}")

    def skip(self, name: str, why: str) -> None:
        self.skipped.append({"name": name, "why": why})
        self.say(f"skipped {name}: {why}")

    def certificate(self) -> dict:
        return {
            "passed": all(c["passed"] for c in self.checks),
            "checks": self.checks,
            "reports": self.reports,
            "skipped": self.skipped,
        }


def _checksums(run: Path, recorded: dict, report: _Report) -> dict:
    """{file: sha256, bytes} as they are now; the check counts those that are not as they were written."""
    now = {name: describe(run / name) for name in recorded if (run / name).is_file()}
    changed = sum(now.get(name) != recorded[name] for name in recorded)
    report.at_most("files changed or missing since they were written", changed, 0)
    return now


def _same_tokenizer(report: _Report, where: str, encode: Callable, render: Callable, tokenizer) -> None:
    ids, templates = tokenizer_differences(encode, render, tokenizer)
    report.at_most(f"{where}: texts tokenized differently", ids, 0)
    report.at_most(f"{where}: templates rendered differently", templates, 0)


def _merge_checks(run: Path, onto: str, sequences: list, report: _Report) -> np.ndarray:
    """Log-probabilities of the merged folder, held against base + adapter; also the control and QLoRA's own gap."""
    merged = open_merged(run, onto, local_only=True)
    tuned, base = log_probs(adapter_view(merged), sequences), log_probs(base_view(merged), sequences)
    effect = float(divergence(tuned, base).mean())
    gate = min(KL_MEAN, effect / 2)  # an adapter that changes little must survive rounding to bf16 all the same
    report.at_least("adapter changes the base (mean KL)", effect, NO_OP)
    stored = log_probs(stored_view(Checkpoint(run / "merged")), sequences)
    report.at_most("merged against base + adapter (mean KL)", divergence(tuned, stored).mean(), gate)
    report.at_least("control: the unmerged base fails that gate (mean KL)", effect, math.nextafter(gate, 1))
    _qlora_gap(run, onto, merged, tuned, sequences, report)
    return stored


def _qlora_gap(run: Path, onto: str, merged: Merged, tuned: np.ndarray, sequences: list, report: _Report) -> None:
    """How far each kind of merge is from the 4-bit model that was trained: QLoRA's own gap, not the export's."""
    if not read_json(run / "manifest.json")["model"].get("load_in_4bit"):
        report.skip("QLoRA gap", "trained on 16-bit weights: there is none")
        return
    other = _other_base(run, onto, merged)
    if other is None:
        report.skip("QLoRA gap", "the 16-bit base is not on this machine")
        return
    four_bit = merged if onto == "4bit" else other
    beside = log_probs(adapter_view(other), sequences)
    trained, sixteen = (tuned, beside) if onto == "4bit" else (beside, tuned)
    rounded = log_probs(merging_view(four_bit), sequences)
    note = f"mean KL to the 4-bit model that was trained ({four_bit.base.label}); this export is onto {onto}"
    report.note("QLoRA gap, onto 16bit", float(divergence(trained, sixteen).mean()), None, note)
    report.note("QLoRA gap, onto 4bit", float(divergence(trained, rounded).mean()), None, note)


def _other_base(run: Path, onto: str, merged: Merged) -> Merged | None:
    """The base not merged onto, if it can be had without a download; 4-bit weights can be made from 16-bit ones."""
    try:
        return open_merged(run, "4bit" if onto == "16bit" else "16bit", local_only=True)
    except ToolkitError:
        return Merged(dataclasses.replace(merged.base, four_bit=True), merged.adapter) if onto == "16bit" else None


def _file_checks(path: Path, run: Path, tokenizer, sequences: list, reference: np.ndarray, report: _Report) -> None:
    """Everything about one GGUF file. One that cannot be read has failed, and the others are still looked at."""
    name, size = path.name, path.stat().st_size
    try:
        _content_checks(name, GgufFile(path), run, tokenizer, report)
        if size > _memory():
            report.skip(f"{name}: served", f"needs {size / 1e9:.1f} GB of memory, {_memory() / 1e9:.1f} GB are free")
            return
        with llama_server(path) as post:
            _same_tokenizer(report, name, server_encode(post), server_render(post), tokenizer)
            _ends_a_turn(name, post, tokenizer, report)
            plain = tokenizer.encode("a", add_special_tokens=False)[0]
            _divergence_checks(name, file_divergence(post, reference, sequences, plain), report)
    except (ToolkitError, ValueError, KeyError, IndexError) as error:  # what broken bytes make the readers raise
        report.at_most(f"{name}: could not be read ({type(error).__name__}: {str(error)[:150]})", 1, 0)


def _memory() -> int:
    import psutil

    return psutil.virtual_memory().available


def _tensor_checks(file: str, found: dict, merged: Checkpoint, report: _Report) -> None:
    """Every tensor of the file against the merged folder: equal in F16 and BF16, within rounding when quantized."""
    worst, missing = 0.0, 0
    found.pop("rope_freqs.weight", None)
    for stored, name in gguf_names(merged.config, merged.names()):
        if name in found:
            worst = max(worst, _rounding(converted(merged.config, stored, merged.tensor(stored)), found.pop(name)))
        else:
            missing += 1
    report.at_most(f"{file}: tensors missing or unknown", missing + len(found), 0)
    report.at_most(f"{file}: worst tensor, error in units of what its type allows", worst, 1)


def _rounding(ours, theirs) -> float:
    """Error of a stored tensor in units of its type's allowance; for lossless types 0 or infinite."""
    import gguf

    kind, ours = theirs.tensor_type.name, ours.reshape(-1, ours.shape[-1])
    if math.prod(theirs.shape) != ours.numel():
        return math.inf
    data, error, power, rows = theirs.data.reshape(len(ours), -1), 0.0, 1e-30, max(1, (1 << 22) // ours.shape[1])
    for start in range(0, len(ours), rows):
        part, values = data[start : start + rows], ours[start : start + rows]
        if kind in LOSSLESS:
            if not np.array_equal(part.view(np.uint8).reshape(len(values), -1), encode(values, kind)):
                return math.inf
        else:
            values = values.float().numpy()
            error += float(np.sum((gguf.dequantize(part, theirs.tensor_type) - values) ** 2, dtype=np.float64))
            power += float(np.sum(values**2, dtype=np.float64))
    return math.sqrt(error / power) / ROUNDING.get(kind, 0.5)


def _content_checks(name: str, file: GgufFile, run: Path, tokenizer, report: _Report) -> None:
    """The weights, and what other programs read from the header: the template and the token that ends a turn.

    The only user of `file`: a vocabulary read back takes a gigabyte, gone before the file is served."""
    _tensor_checks(name, file.tensors, Checkpoint(run / "merged"), report)
    template = file.value("tokenizer.chat_template") == chat_template(run / "adapter")
    ends = file.value("tokenizer.ggml.eos_token_id") == end_of_turn(tokenizer)
    report.at_least(f"{name}: carries the run's chat template", int(template), 1)
    report.at_least(f"{name}: its end-of-turn token is the template's", int(ends), 1)


def _ends_a_turn(name: str, post: Callable, tokenizer, report: _Report) -> None:
    """When the model produces the end-of-turn token, generation stops there: tried by making it certain."""
    prompt = tokenizer.encode("Hello", add_special_tokens=False)
    certain = [[end_of_turn(tokenizer), 1000.0]]
    reply = post("/completion", {"prompt": prompt, "n_predict": 8, "logit_bias": certain})
    report.at_least(f"{name}: the end-of-turn token ends generation", int(reply["stop_type"] == "eos"), 1)


def _divergence_checks(name: str, measured: dict, report: _Report) -> None:
    quant = name.split(".")[-2]
    if quant == "f16":
        report.at_most(f"{name}: against merged (mean KL)", measured["mean"], KL_MEAN)
        report.at_most(f"{name}: against merged (largest KL)", measured["max"], KL_MAX)
        report.at_least(f"{name}: against merged (share with the same top token)", measured["top1"], TOP_1)
    else:
        same = f"same top token {measured['top1']:.1%}"
        report.note(f"{name}: against merged (mean KL)", measured["mean"], ALARMS.get(quant), same)


def _prompts(run: Path) -> tuple[str, ...]:
    file = run / "recipe.yaml"
    return load(file).evaluate.prompts if file.is_file() else Evaluate().prompts


def _generation(path: Path, prompts: tuple[str, ...], tokenizer, report: _Report) -> None:
    """Replies from the file itself in both modes: how many keep to the mode, how many end by the end-of-turn token."""
    try:
        with llama_server(path) as post:
            for mode in SAMPLING:
                replies = list(_replies(post, prompts, mode, tokenizer))
                ended = sum(reply["stop_type"] == "eos" for reply in replies)
                kept = sum(_keeps_mode(reply, mode) for reply in replies) / len(replies)
                text = f"of {len(replies)} probe prompts; {ended} ended within {REPLY_TOKENS} tokens"
                report.note(f"{path.name}: share of {mode} replies that keep to the mode", kept, None, text)
    except ToolkitError as error:
        report.skip(f"{path.name}: replies", str(error))


def _replies(post: Callable, prompts: tuple[str, ...], mode: str, tokenizer) -> Iterator[dict]:
    render = server_render(post)
    for seed, prompt in enumerate(prompts):
        text = render([{"role": "user", "content": prompt}], None, mode == "thinking")
        ids = tokenizer.encode(text, add_special_tokens=False)
        yield post("/completion", {"prompt": ids, "n_predict": REPLY_TOKENS, "seed": seed} | SAMPLING[mode])


def _keeps_mode(reply: dict, mode: str) -> bool:
    """A thinking reply opens its block, and closes it if it came to an end; a non-thinking one does neither."""
    _, _, opened, closed = split_reply(reply["content"])
    if mode == "non_thinking":
        return not opened and not closed
    return opened and (closed or reply["stop_type"] != "eos")


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.3g}"


def _write(run: Path, certificate: dict) -> None:
    failed = [c["name"] for c in certificate["checks"] if not c["passed"]]
    if failed:
        lines = ["This export is not the run it was made from. Do not use or share its files. Failed:", *failed]
        write_text(run / FAILED, "\n".join(lines) + "\n")
    write_text(run / "certificate.md", _page(certificate))
    write_json(run / "certificate.json", certificate)
    if not failed:
        (run / FAILED).unlink()


def _page(certificate: dict) -> str:
    """The certificate for people, as Markdown."""
    verdict = "passed: the files behave like the run" if certificate["passed"] else "FAILED: do not use these files"
    inputs = certificate["inputs"]
    lines = [
        f"# Parity certificate: {verdict}",
        "",
        f"Merged onto the {inputs['onto']} base {inputs['base']} ({inputs['revision'] or 'local folder'}). "
        f"KL in nats, over {certificate['positions']} positions.",
        "",
        "| check | value | limit | |",
        "|---|--:|--:|---|",
    ]
    for c in certificate["checks"]:
        verdict = "ok" if c["passed"] else "**failed**"
        lines.append(f"| {c['name']} | {_number(c['value'])} | {c['rule']} {_number(c['limit'])} | {verdict} |")
    lines += ["", "Reported, not gates:", "", "| what | value | alarm above | |", "|---|--:|--:|---|"]
    for r in certificate["reports"]:
        alarm = " **alarm**" if r["alarm"] else ""
        lines.append(f"| {r['name']} | {_number(r['value'])}{alarm} | {r['limit'] or ''} | {r['note']} |")
    lines += ["", *[f"Not run: {s['name']} ({s['why']})." for s in certificate["skipped"]]]
    lines += ["", "| file | bytes | SHA-256 |", "|---|--:|---|"]
    lines += [f"| {name} | {f['bytes']:,} | {f['sha256']} |" for name, f in certificate["files"].items()]
    return "\n".join(lines) + "\n"
