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

from toolkit.generate import SAMPLING, split_reply
from toolkit.gguf_file import bf16_bits, chat_template, check_supported, encode, fp32, gguf_names, metadata, tensors_by_name
from toolkit.merge import Checkpoint, Merged, describe, open_merged, read_json, write_json
from toolkit.parity import (
    adapter_view,
    base_view,
    divergence,
    file_divergence,
    llama_server,
    log_probs,
    merging_view,
    stored_view,
)
from toolkit.recipe import Evaluate, ToolkitError, load

FAILED = "EXPORT_FAILED.txt"
KL_MEAN, KL_MAX, TOP_1 = 1e-4, 1e-3, 0.99
"""Gates: measured 3.7e-6 for a merge and 1.6e-7 to 4.3e-6 (largest 1.0e-4) for an F16 file of sound exports."""
NO_OP = 1e-6
ALARMS = {"bf16": 5e-4, "q8_0": 2e-2, "q6_k": 5e-2, "q5_k_m": 0.12, "q4_k_m": 0.25}
"""Mean KL above which a quantized file deserves a look (q8_0 and q4_k_m from a 135M model; q6_k and q5_k_m interpolated)."""
ROUNDING = {"Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.06, "Q5_1": 0.06, "Q5_0": 0.08, "Q4_K": 0.12}
"""Largest relative RMS error of a tensor after quantization; normal numbers give a half to two thirds of it."""
POSITIONS, PER_TEXT, REPLY_TOKENS = 200, 50, 192

USER = {"role": "user", "content": "What is 17 + 25?"}
THOUGHT = {"role": "assistant", "reasoning_content": "17 + 25 is 17 + 20 + 5.", "content": "It is 42."}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}]}
CONVERSATIONS: tuple[tuple[str, list[dict], list | None], ...] = (
    ("one turn", [USER], None),
    ("system", [{"role": "system", "content": "Answer briefly."}, USER], None),
    ("many turns", [USER, THOUGHT, {"role": "user", "content": "And doubled?"}], None),
    ("tools", [{"role": "user", "content": "Weather in Zürich?"}], TOOLS),
    ("tool result", [{"role": "user", "content": "Weather in Zürich?"}, CALL, {"role": "tool", "content": '{"sky": "clear"}'}], TOOLS),
)
TEXTS = ("Hello, world!  Two  spaces\n\n\tand a tab.", "def f(x):\n    return x**2  # 12345.678", "Größe, naïve, Ελληνικά, русский",
         "中文字符测试，没问题。", "👩‍👩‍👧 🇨🇭 e\u0301 ﬁ ½", "<think>\nyes\n</think>\n\nno<|im_end|>\n", "I'll don't WE'RE 007",
         "<|im_start|>user\n/no_think<|im_end|>", " ", "\r\n\r\n  x")
REPLIES = ("<think>\nOkay, the user asks for a sum. 17 + 25 = 42.\n</think>\n\nIt is **42**.<|im_end|>",
           "Water boils at 100 °C at sea level, because its vapour pressure then equals that of the air.<|im_end|>")


def verify(run: str | Path, *, say: Callable[[str], None] = print) -> dict:
    """Checks an export and writes certificate.json and certificate.md into the run folder.

    Returns the certificate. One that fails leaves EXPORT_FAILED.txt beside it. Raises ToolkitError where there is no export."""
    run, began = Path(run), time.monotonic()
    record = read_json(run / "export.json") if (run / "export.json").is_file() else None
    if record is None:
        raise ToolkitError(f"{run}: holds no export; `python -m toolkit export {run}` makes one and verifies it")
    check_supported(Checkpoint(run / "merged"))
    report = _Report(say)
    files = _checksums(run, record["files"], report)
    tokenizer = _tokenizer(run / "adapter")
    _same_tokenizer(report, "merged", _hf_encode(_tokenizer(run / "merged")), _hf_render(_tokenizer(run / "merged")), tokenizer)
    sequences = _sequences(tokenizer)
    reference = _merge_checks(run, record["inputs"]["onto"], sequences, report)
    for path in sorted((run / "gguf").glob("*.gguf"), key=lambda p: p.stat().st_size, reverse=True):
        _file_checks(path, run, tokenizer, sequences, reference, report)
    if list((run / "gguf").glob("*.gguf")):
        _generation(min((run / "gguf").glob("*.gguf"), key=lambda p: p.stat().st_size), _prompts(run), tokenizer, report)
    certificate = {
        "passed": all(c["passed"] for c in report.checks), "checks": report.checks, "reports": report.reports,
        "skipped": report.skipped, "files": files, "inputs": record["inputs"], "positions": sum(map(len, sequences)),
        "seconds": round(time.monotonic() - began, 1),
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "gguf", "xllamacpp")},
    }
    _write(run, certificate)
    return certificate


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
        self.say(f"{'ALARM ' if alarm else 'report'} {name}: {_number(value)}{f' (alarm above {limit:g})' if limit else ''} {text}")

    def skip(self, name: str, why: str) -> None:
        self.skipped.append({"name": name, "why": why})
        self.say(f"skipped {name}: {why}")


def _checksums(run: Path, recorded: dict, report: _Report) -> dict:
    """{file: sha256, bytes} as they are now; the check counts those that are not as they were written."""
    now = {name: describe(run / name) for name in recorded if (run / name).is_file()}
    report.at_most("files changed since they were written", sum(now.get(n) != recorded[n] for n in recorded), 0)
    return now


def _tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _hf_encode(tokenizer) -> Callable:
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def _hf_render(tokenizer) -> Callable:
    def render(messages: list, tools: list | None, thinking: bool) -> str:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True,
                                             enable_thinking=thinking)

    return render


def _server_render(post: Callable) -> Callable:
    def render(messages: list, tools: list | None, thinking: bool) -> str:
        body = {"messages": [_openai(m) for m in messages], "chat_template_kwargs": {"enable_thinking": thinking}}
        return post("/apply-template", body | ({"tools": tools} if tools else {}))["prompt"]

    return render


def _openai(message: dict) -> dict:
    """The API wants a call's arguments as JSON text and its id; the template gets them back as they were."""
    if "tool_calls" not in message:
        return message
    calls = [{**c, "id": str(i), "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False)}}
             for i, c in enumerate(message["tool_calls"])]
    return {**message, "tool_calls": calls}


def _same_tokenizer(report: _Report, where: str, encode: Callable, render: Callable, tokenizer) -> None:
    """Ids of awkward texts and renderings of every kind of conversation in both modes, against the run's own tokenizer."""
    own_encode, own_render = _hf_encode(tokenizer), _hf_render(tokenizer)
    cases = [(m, tools, thinking) for _, m, tools in CONVERSATIONS for thinking in (True, False)]
    rendered = [own_render(*case) for case in cases]
    texts = [*TEXTS, *rendered]
    report.at_most(f"{where}: texts tokenized differently", sum(encode(t) != own_encode(t) for t in texts), 0)
    report.at_most(f"{where}: templates rendered differently", sum(render(*c) != r for c, r in zip(cases, rendered, strict=True)), 0)


def _sequences(tokenizer) -> list[list[int]]:
    """A few hundred positions of conversation, both modes and both kinds of reply."""
    render, encode = _hf_render(tokenizer), _hf_encode(tokenizer)
    texts = [render([USER], None, True) + REPLIES[0], render([USER], None, False) + REPLIES[1], REPLIES[1] + REPLIES[0],
             render(CONVERSATIONS[2][1], None, True) + REPLIES[0]]
    return [encode(text)[-PER_TEXT:] for text in texts[: POSITIONS // PER_TEXT]]


def _merge_checks(run: Path, onto: str, sequences: list, report: _Report) -> np.ndarray:
    """Log-probabilities of the merged folder, held against base + adapter; also the control and QLoRA's own gap."""
    merged = open_merged(run, onto, local_only=True)
    tuned, base = log_probs(adapter_view(merged), sequences), log_probs(base_view(merged), sequences)
    effect = float(divergence(tuned, base).mean())
    gate = min(KL_MEAN, effect / 2)  # an adapter that changes little must survive rounding to bf16 all the same
    report.at_least("adapter changes the base (KL)", effect, NO_OP)
    stored = log_probs(stored_view(Checkpoint(run / "merged")), sequences)
    report.at_most("merged against base + adapter (mean KL)", divergence(tuned, stored).mean(), gate)
    report.at_least("control: the unmerged base must fail that gate (mean KL)", effect, math.nextafter(gate, 1))
    _qlora_gap(run, onto, merged, tuned, sequences, report)
    return stored


def _qlora_gap(run: Path, onto: str, merged: Merged, tuned: np.ndarray, sequences: list, report: _Report) -> None:
    """How far each base is from the 4-bit one that was trained on: QLoRA's own, not charged to the export."""
    if not read_json(run / "manifest.json")["model"].get("load_in_4bit"):
        return report.skip("QLoRA gap", "trained on 16-bit weights: there is none")
    other = _other_base(run, onto, merged)
    if other is None:
        return report.skip("QLoRA gap", "the 16-bit base is not on this machine")
    far, four_bit = (merged, other) if onto == "16bit" else (other, merged)
    trained = tuned if onto == "4bit" else log_probs(adapter_view(four_bit), sequences)
    sixteen = tuned if onto == "16bit" else log_probs(adapter_view(far), sequences)
    note = f"this export is onto {onto}; 4-bit base: {four_bit.base.name}"
    report.note("QLoRA gap, onto 16bit (mean KL to the 4-bit model that was trained)", float(divergence(trained, sixteen).mean()), None, note)
    rounded = log_probs(merging_view(four_bit), sequences)
    return report.note("QLoRA gap, onto 4bit (mean KL to the 4-bit model that was trained)", float(divergence(trained, rounded).mean()), None, note)


def _other_base(run: Path, onto: str, merged: Merged) -> Merged | None:
    """The base not merged onto, if it can be had without a download; 4-bit weights can be made from 16-bit ones."""
    try:
        return open_merged(run, "4bit" if onto == "16bit" else "16bit", local_only=True)
    except ToolkitError:
        return Merged(dataclasses.replace(merged.base, four_bit=True), merged.adapter) if onto == "16bit" else None


def _file_checks(path: Path, run: Path, tokenizer, sequences: list, reference: np.ndarray, report: _Report) -> None:
    """Everything about one GGUF file. One that cannot be read has failed, and the others are still looked at."""
    name, quant = path.name, path.name.split(".")[-2]
    try:
        _tensor_checks(path, Checkpoint(run / "merged"), report)
        _metadata_checks(path, run, tokenizer, report)
        if path.stat().st_size > _memory():
            return report.skip(f"{name}: served", f"needs {path.stat().st_size / 1e9:.1f} GB of memory, {_memory() / 1e9:.1f} GB are free")
        with llama_server(path, 4096) as post:
            _same_tokenizer(report, name, lambda t: post("/tokenize", {"content": t})["tokens"], _server_render(post), tokenizer)
            _ends_a_turn(name, post, tokenizer, report)
            _divergence_checks(name, quant, file_divergence(post, reference, sequences, tokenizer.encode("a")[0]), report)
    except (ToolkitError, ValueError, KeyError, IndexError) as error:  # what broken bytes make the readers raise
        report.at_most(f"{name}: unreadable ({type(error).__name__}: {str(error)[:120]})", 1, 0)
    return None


def _memory() -> int:
    import psutil

    return psutil.virtual_memory().available


def _tensor_checks(path: Path, merged: Checkpoint, report: _Report) -> None:
    """Every tensor of the file against the merged folder: equal in F16 and BF16, within rounding when quantized."""
    worst, missing = 0.0, 0
    found = tensors_by_name(path)
    for stored, name, shape in gguf_names(merged):
        if name not in found:
            missing += 1
            continue
        worst = max(worst, _rounding(bf16_bits(merged, stored).reshape(-1, shape[-1]), found.pop(name)))
    report.at_most(f"{path.name}: tensors missing or unknown", missing + len(found), 0)
    report.at_most(f"{path.name}: worst tensor, error relative to what its type allows", worst, 1)


def _rounding(bits: np.ndarray, tensor) -> float:
    """Error of a stored tensor in units of its type's allowance; for lossless types 0 or infinite."""
    import gguf

    kind, rows = tensor.tensor_type.name, max(1, (1 << 22) // bits.shape[1])
    if len(bits) != math.prod(tensor.shape) // bits.shape[1]:
        return math.inf
    data, error, power = tensor.data.reshape(len(bits), -1), 0.0, 0.0
    for start in range(0, len(bits), rows):
        part, ours = data[start : start + rows], bits[start : start + rows]
        if kind not in ROUNDING:
            if not np.array_equal(part.view(np.uint8).reshape(len(ours), -1), encode(ours, kind)):
                return math.inf
            continue
        values = fp32(ours)
        error += float(np.sum((gguf.dequantize(part, tensor.tensor_type) - values) ** 2, dtype=np.float64))
        power += float(np.sum(values**2, dtype=np.float64))
    return math.sqrt(error / max(power, 1e-30)) / ROUNDING.get(kind, 1.0)


def _metadata_checks(path: Path, run: Path, tokenizer, report: _Report) -> None:
    """What other programs read from the header: the template's text and the token that ends a turn."""
    header = metadata(path)
    same = header.get("tokenizer.chat_template") == chat_template(run / "adapter")
    report.at_least(f"{path.name}: carries the run's chat template", int(same), 1)
    ends = header.get("tokenizer.ggml.eos_token_id")
    report.at_least(f"{path.name}: end-of-turn token is the template's", int(ends == _end_of_turn(tokenizer)), 1)


def _end_of_turn(tokenizer) -> int:
    """The token the template closes an assistant turn with, whatever the tokenizer's own settings say."""
    text = tokenizer.apply_chat_template([USER, {"role": "assistant", "content": "4"}], tokenize=False).rstrip()
    return tokenizer.encode(text, add_special_tokens=False)[-1]


def _ends_a_turn(name: str, post: Callable, tokenizer, report: _Report) -> None:
    """When the model produces the end-of-turn token, generation stops there: tried by making it certain."""
    reply = post("/completion", {"prompt": tokenizer.encode("Hello", add_special_tokens=False), "n_predict": 8,
                                 "logit_bias": [[_end_of_turn(tokenizer), 1000.0]]})
    report.at_least(f"{name}: end-of-turn token ends generation", int(reply["stop_type"] == "eos"), 1)


def _divergence_checks(name: str, quant: str, measured: dict, report: _Report) -> None:
    if quant == "f16":
        report.at_most(f"{name}: against merged (mean KL)", measured["mean"], KL_MEAN)
        report.at_most(f"{name}: against merged (largest KL)", measured["max"], KL_MAX)
        report.at_least(f"{name}: against merged (same top token)", measured["top1"], TOP_1)
        return
    report.note(f"{name}: against merged (mean KL)", measured["mean"], ALARMS.get(quant), f"same top token {measured['top1']:.1%}")


def _prompts(run: Path) -> tuple[str, ...]:
    file = run / "recipe.yaml"
    return load(file).evaluate.prompts if file.is_file() else Evaluate().prompts


def _generation(path: Path, prompts: tuple[str, ...], tokenizer, report: _Report) -> None:
    """Replies from the file itself in both modes: how many keep to the mode, how many end by the end-of-turn token."""
    try:
        with llama_server(path, 4096) as post:
            for mode, sampling in SAMPLING.items():
                replies = list(_replies(post, prompts, mode, sampling, tokenizer))
                ended = sum(r["stop_type"] == "eos" for r in replies)
                kept = sum(_keeps_mode(r, mode) for r in replies)
                text = f"of {len(replies)} probe prompts; {ended} ended within {REPLY_TOKENS} tokens"
                report.note(f"{path.name}: {mode} replies that keep to the mode", kept / len(replies), None, text)
    except ToolkitError as error:
        report.skip(f"{path.name}: replies", str(error))


def _replies(post: Callable, prompts: tuple[str, ...], mode: str, sampling: dict, tokenizer) -> Iterator[dict]:
    render = _server_render(post)
    for seed, prompt in enumerate(prompts):
        text = render([{"role": "user", "content": prompt}], None, mode == "thinking")
        body = {"prompt": tokenizer.encode(text, add_special_tokens=False), "n_predict": REPLY_TOKENS, "seed": seed}
        yield post("/completion", body | sampling)


def _keeps_mode(reply: dict, mode: str) -> bool:
    _, _, opened, closed = split_reply(reply["content"])
    if mode == "non_thinking":
        return not opened and not closed
    return opened and (closed or reply["stop_type"] != "eos")


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.3g}"


def _write(run: Path, certificate: dict) -> None:
    write_json(run / "certificate.json", certificate)
    (run / "certificate.md").write_text(_page(certificate), encoding="utf-8")
    failed = [c["name"] for c in certificate["checks"] if not c["passed"]]
    (run / FAILED).unlink(missing_ok=True)
    if failed:
        lines = ["This export is not the run it was made from. Do not use or share its files. Failed:", *failed]
        (run / FAILED).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _page(certificate: dict) -> str:
    """The certificate for people, as Markdown."""
    verdict = "passed: the files behave like the run" if certificate["passed"] else "FAILED: do not use these files"
    inputs = certificate["inputs"]
    lines = [f"# Parity certificate: {verdict}", "",
             f"Merged onto the {inputs['onto']} base {inputs['base']} ({inputs['revision'] or 'local'}). KL in nats over "
             f"{certificate['positions']} positions.", "", "| check | value | limit | |", "|---|--:|--:|---|"]
    lines += [f"| {c['name']} | {_number(c['value'])} | {c['rule']} {_number(c['limit'])} | {'ok' if c['passed'] else '**failed**'} |"
              for c in certificate["checks"]]
    lines += ["", "Reported, not gates:", "", "| what | value | alarm above | |", "|---|--:|--:|---|"]
    lines += [f"| {r['name']} | {_number(r['value'])}{' **alarm**' if r['alarm'] else ''} | {r['limit'] or ''} | {r['note']} |"
              for r in certificate["reports"]]
    lines += ["", *[f"Not run: {s['name']} ({s['why']})." for s in certificate["skipped"]], "", "| file | bytes | SHA-256 |", "|---|--:|---|"]
    lines += [f"| {n} | {f['bytes']:,} | {f['sha256']} |" for n, f in certificate["files"].items()]
    return "\n".join(lines) + "\n"
