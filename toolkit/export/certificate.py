"""Proof that the exported files are the run: the same tokens, the same template, the same probabilities.

certificate = verify("outputs/hybrid"); certificate["passed"], certificate["checks"]
"""

import dataclasses
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from toolkit.export.gguf_file import GgufFile, encode, header, modelfile, plan_tensors, values_of
from toolkit.export.merge import FAILED, Checkpoint, Merged, generation_config, open_merged, small_files, uncertify
from toolkit.export.parity import (
    ServedTokens,
    Tokens,
    divergence,
    file_divergence,
    llama_server,
    log_probs,
    probe_sequences,
    tokenizer_differences,
)
from toolkit.family import family_of, mode_title, sampling_of
from toolkit.files import ToolkitError, describe, lock, read_json, write_json, write_text
from toolkit.generate import split_reply
from toolkit.recipe import Evaluate, load

KL_MEAN, KL_MAX, TOP_1 = 1e-4, 1e-3, 0.99
"""Gates. Sound exports were measured at 3.7e-6 for a merge and 1.6e-7 to 4.3e-6 (largest 1.0e-4) for an F16 file."""
NO_OP = 1e-6
ALARMS = {"bf16": 5e-4, "q8_0": 2e-2, "q6_k": 5e-2, "q5_k_m": 0.12, "q4_k_m": 0.25}
"""Mean KL above which a quantized file deserves a look: q8_0, q4_k_m from a 135M model, the others interpolated."""
LIMITS = {"bf16": 1e-3, "q8_0": 4e-2, "q6_k": 0.1, "q5_k_m": 0.25, "q4_k_m": 0.5}
"""Mean KL above which a quantized file is not the model any more (data_recipes/measured/export_limits.json)."""
MERGED_ERROR = 1e-4
"""Relative RMS error of a merged tensor: another processor rounds a few values to their bf16 neighbour."""
LOSSLESS = ("F32", "F16", "BF16")
ROUNDING = {"Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.06, "Q5_1": 0.06, "Q5_0": 0.08, "Q4_K": 0.12}
"""Relative RMS error allowed in a quantized tensor; normal numbers give about half of it. Other types: 0.5."""
REPLY_TOKENS = 192
LOWER_BOUND = (
    "KL of a GGUF is taken over llama.cpp's 512 most likely tokens and one bucket for all others: a lower bound of the "
    "KL over the whole vocabulary. KL of merged weights is over the whole vocabulary."
)


def verify(run: str | Path, *, say: Callable[[str], None] = print, details: bool = True) -> dict:
    """Check an export and write certificate.json and certificate.md into the run folder; returns the certificate.

    EXPORT_FAILED.txt stands beside the files from the first moment and goes when every gate has passed. Without
    `details` only failures and alarms are said. Raises ToolkitError where there is no export to check, when its adapter
    or base is no longer on this machine, or when a weights file cannot be read."""
    run, began = Path(run), time.monotonic()
    if not (run / "export.json").is_file():
        raise ToolkitError(f"{run}: holds no export; `python -m toolkit export {run}` makes one and verifies it")
    with lock(run, "verify"):
        uncertify(run)
        record, report = read_json(run / "export.json"), Report(say, details)
        onto = record["inputs"]["onto"]
        files = _checksums(run, record, report)
        merged, own = open_merged(run, onto, local_only=True), Tokens(run / "adapter")
        sequences = probe_sequences(own)
        reference = _merge_checks(run, onto, merged, own, sequences, report)
        gguf = sorted((run / "gguf").glob("*.gguf"), key=lambda path: -path.stat().st_size)
        for path in gguf:
            say(f"verifying {path.name}")
            _file_checks(path, run, merged, own, sequences, reference, report)
        if (run / "gguf" / "Modelfile").is_file():
            written = (run / "gguf" / "Modelfile").read_text(encoding="utf-8").splitlines()
            expected = modelfile(run, merged, own.tokenizer).splitlines()
            report.check("Modelfile: lines that are not as expected", len(set(written) ^ set(expected)), 0)
        if gguf:
            _generation(gguf[-1], run, merged, own, report)
        certificate = (
            {"passed": all(c["passed"] for c in report.lists["checks"])}
            | report.lists
            | {
                "files": files,
                "inputs": record["inputs"],
                "positions": sum(map(len, sequences)),
                "kl": LOWER_BOUND,
                "seconds": round(time.monotonic() - began, 1),
                "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "gguf", "xllamacpp")},
            }
        )
        _write(run, certificate)
    return certificate


class Report:
    """Gates (`checks`), numbers with an alarm but no gate (`reports`), and what could not be run (`skipped`)."""

    def __init__(self, say: Callable[[str], None], details: bool):
        self.say, self.details = say, details
        self.lists: dict[str, list] = {"checks": [], "reports": [], "skipped": []}

    def check(self, name: str, value: float, limit: float, rule: str = "at most") -> None:
        passed = bool(value <= limit if rule == "at most" else value >= limit)
        value = float(value) if math.isfinite(value) else None  # JSON has no NaN; a value that is none has failed
        self.lists["checks"].append({"name": name, "passed": passed, "value": value, "limit": limit, "rule": rule})
        if self.details or not passed:
            self.say(f"{'ok    ' if passed else 'FAILED'} {name}: {_number(value)} ({rule} {_number(limit)})")

    def note(self, name: str, value: float, limit: float | None = None, text: str = "") -> None:
        alarm = limit is not None and not value <= limit
        self.lists["reports"].append({"name": name, "value": value, "limit": limit, "alarm": alarm, "note": text})
        if self.details or alarm:
            above = f" (alarm above {limit:g})" if limit else ""
            self.say(f"{'ALARM ' if alarm else 'report'} {name}: {_number(value)}{above}; {text}")

    def skip(self, name: str, why: str) -> None:
        self.lists["skipped"].append({"name": name, "why": why})
        self.say(f"skipped {name}: {why}")


def _checksums(run: Path, record: dict, report: Report) -> dict:
    """{file: sha256, bytes} as they are now; the checks count those that are not as the export wrote or read them."""
    now = {name: describe(run / name) for name in record["files"] if (run / name).is_file()}
    changed = sum(now.get(name) != recorded for name, recorded in record["files"].items())
    report.check("files changed or missing since they were written", changed, 0)
    adapter = {name: run / "adapter" / name for name in record["inputs"]["adapter"]}
    gone = [name for name, file in adapter.items() if not file.is_file()]
    if gone:
        raise ToolkitError(
            f"{run / 'adapter'}: {', '.join(gone)} not found. The adapter is what an export is compared with: restore "
            "the folder, or train the run again"
        )
    other = sum(describe(file)["sha256"] != record["inputs"]["adapter"][name] for name, file in adapter.items())
    report.check("adapter files changed since the export", other, 0)
    return now


def _same_tokenizer(report: Report, where: str, theirs: Callable, own: Tokens) -> None:
    """`theirs()` makes the other side's tokens; a template that cannot even be rendered differs everywhere."""
    from jinja2 import TemplateError

    try:
        ids, templates = tokenizer_differences(theirs(), own)
    except TemplateError as error:
        report.check(f"{where}: template errors ({str(error)[:150]})", 1, 0)
        return
    report.check(f"{where}: texts tokenized differently", ids, 0)
    report.check(f"{where}: templates rendered differently", templates, 0)


def _merge_checks(run: Path, onto: str, merged: Merged, own: Tokens, sequences: list, report: Report) -> np.ndarray:
    """The merged folder against base + adapter, with a negative control; returns its log-probabilities."""
    stored = Checkpoint(run / "merged")
    expected = small_files(merged, run / "adapter")
    different = sum(not _equal(run / "merged" / name, text) for name, text in expected.items())
    report.check("merged: settings files that differ from the base's and the run's", different, 0)
    _same_tokenizer(report, "merged", lambda: Tokens(run / "merged"), own)
    report.check("merged: worst tensor (relative error)", _merged_error(stored, merged), MERGED_ERROR)
    tuned, base = log_probs(merged, "adapter", sequences), log_probs(merged, "base", sequences)
    effect = float(divergence(tuned, base).mean())
    gate = merge_limit(effect)
    report.check("adapter changes the base (mean KL)", effect, NO_OP, "at least")
    reference = log_probs(stored, "merged", sequences)
    report.check("merged against base + adapter (mean KL)", divergence(tuned, reference).mean(), gate)
    report.check("control: the unmerged base fails that gate (mean KL)", effect, math.nextafter(gate, 1), "at least")
    _qlora_gap(run, onto, merged, tuned, sequences, report)
    return reference


def merge_limit(effect: float) -> float:
    """Mean KL allowed between merged weights and base + adapter, when the adapter moves the base by a mean KL of `effect`.

    A larger adapter is rounded more when its sum with the base is stored in bf16: SmolLM2-135M, all tensors merged exactly,
    gave 1.3e-4 at an effect of 0.089 (data_recipes/measured/smollm2.json). So a hundredth of the effect is allowed, never
    more than KL_MAX; and an adapter that changes little must survive the rounding all the same.
    """
    return min(max(KL_MEAN, effect / 100), KL_MAX, effect / 2)


def _equal(file: Path, text: str) -> bool:
    if not file.is_file():
        return False
    return read_json(file) == json.loads(text) if file.suffix == ".json" else file.read_text(encoding="utf-8") == text


def _merged_error(stored: Checkpoint, merged: Merged) -> float:
    """Largest relative RMS error of a stored tensor against one merged anew; infinite where names or shapes differ."""
    if {n: stored.shape(n) for n in stored.names()} != {n: merged.shape(n) for n in merged.names()}:
        return math.inf
    worst = 0.0
    for name in merged.names():
        expected = merged.tensor(name).float()
        error = (stored.tensor(name).float() - expected).norm() / expected.norm().clamp(min=1e-12)
        worst = max(worst, error.nan_to_num(nan=math.inf).item())
    return worst


def _qlora_gap(run: Path, onto: str, merged: Merged, tuned: np.ndarray, sequences: list, report: Report) -> None:
    """How far each kind of merge is from the 4-bit model that was trained: QLoRA's own gap, not the export's."""
    if not read_json(run / "manifest.json")["model"].get("load_in_4bit"):
        report.skip("QLoRA gap", "trained on 16-bit weights: there is none")
        return
    other = _other_base(run, onto, merged)
    if other is None:
        report.skip("QLoRA gap", "the 16-bit base is not on this machine")
        return
    four_bit = merged if onto == "4bit" else other
    beside = log_probs(other, "adapter", sequences)
    trained, sixteen = (tuned, beside) if onto == "4bit" else (beside, tuned)
    rounded = log_probs(four_bit, "merged", sequences)
    note = f"mean KL to the 4-bit model that was trained ({four_bit.base.label}); this export is onto {onto}"
    report.note("QLoRA gap, onto 16bit", float(divergence(trained, sixteen).mean()), None, note)
    report.note("QLoRA gap, onto 4bit", float(divergence(trained, rounded).mean()), None, note)


def _other_base(run: Path, onto: str, merged: Merged) -> Merged | None:
    """The base not merged onto, if it can be had without a download; 4-bit weights can be made from 16-bit ones."""
    try:
        return open_merged(run, "4bit" if onto == "16bit" else "16bit", local_only=True)
    except ToolkitError:
        return Merged(dataclasses.replace(merged.base, four_bit=True), merged.adapter) if onto == "16bit" else None


def _file_checks(
    path: Path, run: Path, merged: Merged, own: Tokens, sequences: list, reference: np.ndarray, report: Report
) -> None:
    """Everything about one GGUF file. One that cannot be read has failed, and the others are still looked at."""
    import psutil

    name, size, free = path.name, path.stat().st_size, psutil.virtual_memory().available
    try:
        _content_checks(path, run, merged, report)
        if size > free:
            report.skip(f"{name}: served", f"needs {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
            return
        with llama_server(path) as post:
            _same_tokenizer(report, name, lambda: ServedTokens(post), own)
            _ends_a_turn(name, post, own, report)
            plain = own.encode("a")[0]
            _divergence_checks(name, file_divergence(post, reference, sequences, plain), report)
    except (ToolkitError, ValueError, KeyError, IndexError) as error:  # what broken bytes make the readers raise
        report.check(f"{name}: could not be read ({type(error).__name__}: {str(error)[:150]})", 1, 0)


def _content_checks(path: Path, run: Path, merged: Merged, report: Report) -> None:
    """Every value of the header and every tensor, against the base's config.json and the run's tokenizer.

    `file` is freed before the file is served: a vocabulary read back takes a gigabyte."""
    file, quant = GgufFile(path), path.name.split(".")[-2]
    expected = header(merged, run / "adapter", quant, run.resolve().name).kv_data[0]
    keys = sorted(k for k in {*expected, *file.fields} if not k.startswith("GGUF.") and not _same(expected, file, k))
    report.check(f"{path.name}: header values that differ{': ' if keys else ''}{', '.join(keys)}", len(keys), 0)
    stored, worst, wrong = Checkpoint(run / "merged"), 0.0, 0
    for tensor in plan_tensors(stored, quant):
        found = file.tensors.pop(tensor.name, None)
        if found is None or found.tensor_type.name != tensor.kind:
            wrong += 1
        else:
            worst = max(worst, _rounding(values_of(stored, tensor), found))
    report.check(f"{path.name}: tensors missing, unknown or of another type", wrong + len(file.tensors), 0)
    report.check(f"{path.name}: worst tensor, error in units of what its type allows", worst, 1)


def _same(expected: dict, file: GgufFile, key: str) -> bool:
    if key not in expected or key not in file.fields:
        return False
    wanted, found = expected[key].value, file.value(key)
    if isinstance(wanted, float):
        return np.float32(wanted) == np.float32(found)
    if isinstance(wanted, list) and isinstance(wanted[0], float):
        return np.array_equal(np.float32(wanted), np.float32(found))
    return wanted == found


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


def _ends_a_turn(name: str, post: Callable, own: Tokens, report: Report) -> None:
    """When the model produces the end-of-turn token, generation stops there: tried by making it certain."""
    certain = [[own.end, 1000.0]]
    reply = post("/completion", {"prompt": own.encode("Hello"), "n_predict": 8, "logit_bias": certain})
    report.check(f"{name}: end-of-turn tokens that do not end generation", int(reply["stop_type"] != "eos"), 0)


def _divergence_checks(name: str, measured: dict, report: Report) -> None:
    quant = name.split(".")[-2]
    if quant == "f16":
        report.check(f"{name}: against merged (mean KL)", measured["mean"], KL_MEAN)
        report.check(f"{name}: against merged (largest KL)", measured["max"], KL_MAX)
        report.check(f"{name}: against merged (share with the same top token)", measured["top1"], TOP_1, "at least")
    else:
        report.check(f"{name}: against merged (mean KL, gate)", measured["mean"], LIMITS[quant])
        same = f"same top token {measured['top1']:.1%}"
        report.note(f"{name}: against merged (mean KL)", measured["mean"], ALARMS[quant], same)


def _generation(path: Path, run: Path, merged: Merged, own: Tokens, report: Report) -> None:
    """Replies from the file itself in every mode: how many keep to the mode, how many end by the end-of-turn token."""
    recipe = run / "recipe.yaml"
    prompts = (load(recipe).evaluate.prompts if recipe.is_file() else ()) or Evaluate().prompts
    family, generation = family_of(merged.config["model_type"]), generation_config(merged, own.tokenizer)
    try:
        with llama_server(path) as post:
            for mode in own.modes:
                replies = list(_replies(post, prompts, mode, own, sampling_of(family, mode, generation)))
                ended = sum(reply["stop_type"] == "eos" for reply in replies)
                kept = sum(_keeps_mode(reply, mode, own) for reply in replies) / len(replies)
                text = f"of {len(replies)} probe prompts; {ended} ended within {REPLY_TOKENS} tokens"
                title = f"{path.name}: share of {mode_title(mode)} replies that keep to the mode"
                report.note(title, kept, None, text)
    except ToolkitError as error:
        report.skip(f"{path.name}: replies", str(error))


def _replies(post: Callable, prompts: tuple[str, ...], mode: str, own: Tokens, sampling: dict) -> Iterator[dict]:
    for seed, prompt in enumerate(prompts):
        ids = own.encode(own.render([{"role": "user", "content": prompt}], None, mode == "thinking"))
        yield post("/completion", {"prompt": ids, "n_predict": REPLY_TOKENS, "seed": seed} | sampling)


def _keeps_mode(reply: dict, mode: str, own: Tokens) -> bool:
    """A thinking reply opens its block, and closes it if it came to an end; a non-thinking one does neither."""
    _, _, opened, closed = split_reply(reply["content"])
    if mode == "non_thinking":
        return not opened and not closed
    opened = opened or own.kind == "thinking_only"  # there the prompt has opened the block
    return opened and (closed or reply["stop_type"] != "eos")


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.3g}"


def _write(run: Path, certificate: dict) -> None:
    failed = [c["name"] for c in certificate["checks"] if not c["passed"]]
    if failed:
        lines = ["Verification failed: the exported files do not match the run. Do not use or share them. Failed:"]
        write_text(run / FAILED, "\n".join([*lines, *failed]) + "\n")
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
        f"KL in nats, over {certificate['positions']} positions. {certificate['kl']}",
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
