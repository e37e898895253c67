"""How fast and how right the data stage is beside the usual ways: raw JSONL → ids and labels, cold, on this machine.

python -m tests.tools.bench.mix [speed ids audit memory]; --table prints data_recipes/measured/bench_mix.json without running

LLaMA-Factory does not install beside us: `pip install llamafactory==0.9.5` in an environment of its own, whose interpreter
LLAMAFACTORY_PYTHON names, puts it into the same rounds.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import random
import re
import statistics
import subprocess
import tempfile
from pathlib import Path

from tests.support import qwen3
from tests.support.label_check import violations
from tests.tools.bench import mix_rows, mix_ways
from tests.tools.bench.start import processor
from toolkit.files import ROOT

MEASURED = ROOT / "data_recipes" / "measured" / "bench_mix.json"
RECIPE = """\
name: bench
data:
  unit: examples
  validation_size: 40
  sources:
    - {{path: {work}/math.jsonl, format: openmath, mode: thinking, fraction: 0.2}}
    - {{path: {work}/chat.jsonl, format: sharegpt, mode: non_thinking, fraction: 0.8}}
model: {{model_name: {work}/qwen3, max_seq_length: 4096}}
"""
ROUNDS = ("ours", "warm", "floor", "again")
USUAL = ("trl", "notebook", "responses_only", "llamafactory")
TITLES = {
    "ours": "this toolkit, raw JSONL to cached mix",
    "warm": "the same, tokenizers in memory",
    "again": "this toolkit, second call",
    "floor": "floor: encode_batch_fast alone, 2 threads",
    "trl": "TRL 1.15, assistant_only_loss",
    "notebook": "the reference notebook's way",
    "responses_only": "the same + train_on_responses_only",
    "llamafactory": "LLaMA-Factory 0.9.5",
}
FEW, TIMES, WORDS_A_ROW, BUDGET = 100_000, 10, 160, 2_000_000
IM_END, NEWLINE = 151645, 198


def prepare(work: Path) -> None:
    """Rows, tokenizer, recipe, and for the floor the rendered strings, by transformers' own apply_chat_template."""
    qwen3.build(work / "qwen3")
    mix_rows.write(work, work / "qwen3")
    (work / "bench.yaml").write_text(RECIPE.format(work=work), encoding="utf-8")
    tokenizer = hf_tokenizer(work)
    texts = [tokenizer.apply_chat_template(m, tokenize=False) for m in mix_ways.messages(work)]
    (work / "rendered.json").write_text(json.dumps(texts), encoding="utf-8")


def hf_tokenizer(work: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(work / "qwen3")


def speed(work: Path, rounds: int, slow_rounds: int) -> dict:
    """Every way in cold processes, interleaved; all runs, not only their medians."""
    found = {way: [] for way in TITLES}
    for i in range(rounds):
        for way in ROUNDS + USUAL:
            if (way in ROUNDS or i < slow_rounds) and mix_ways.python_for(way):
                found[way].append(mix_ways.run(way, work))
    return {"runs": found, "imports": mix_ways.run("imports", work)}


def ids(work: Path) -> dict:
    """Every compiled row's ids against transformers' template and the Hugging Face tokenizer, rendered anew."""
    mixed, raw = compiled(work)
    tokenizer, wrong, tokens = hf_tokenizer(work), 0, 0
    rows = [*mixed.train, *mixed.validation]
    for row in rows:
        told, switch = raw[row.source][row.number]["messages"], {"enable_thinking": row.mode == "thinking"}
        prompt = tokenizer.apply_chat_template(told[:-1], tokenize=False, add_generation_prompt=True, **switch)
        whole = tokenizer.apply_chat_template(told, tokenize=False, **switch)
        parts = (prompt, whole[len(prompt) :].removesuffix("\n"))
        expected = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in parts]
        wrong += expected != [row.ids[: row.prompt_length].tolist(), row.ids[row.prompt_length :].tolist()]
        tokens += len(row.ids)
    return {"rows": len(rows), "tokens": tokens, "rows_that_differ": wrong}


def compiled(work: Path):
    """The mix that `ours` left, and its canonical conversations by source and row number."""
    from toolkit import recipe
    from toolkit.data import mix
    from toolkit.data.sources import conversations

    os.environ["TOOLKIT_OUTPUTS"] = str(work / "outputs")
    loaded = recipe.load(work / "bench.yaml")
    raw = {s.name: dict(conversations(s, 0, {})) for s in loaded.data.sources}
    return mix.compile_mix(loaded), raw


def audit(work: Path) -> dict:
    """What each way teaches, on 200 random rows of it, by plain string work on the decoded labels."""
    tokenizer = hf_tokenizer(work)
    problems = {m[0]["content"] for m in mix_ways.messages(work)[: mix_rows.TRACES]}
    mixed, raw = compiled(work)
    picked = random.Random(mix_ways.SEED).sample(mixed.train, mix_ways.SAMPLE)
    # ours is checked in every row; the others' sample is for comparison
    broken = [r for r in mixed.train if violations(tokenizer, r.ids.tolist(), r.prompt_length, raw[r.source][r.number])]
    found = {"ours": _audit([[r.ids.tolist(), r.labels.tolist()] for r in picked], tokenizer, problems)}
    found["ours"] |= {
        "label_rule_rows": len(mixed.train),
        "label_rule_broken": len(broken),
        "refused": {k: v["dropped"] for k, v in mixed.report["sources"].items()},
    }
    for way in USUAL:
        if (file := work / f"{way}.json").is_file():
            found[way] = _audit(json.loads(file.read_text()), tokenizer, problems)
    return found


def _audit(rows: list, tokenizer, problems: set) -> dict:
    count = dict.fromkeys(("traces", "chats", "empty_think", "user_tokens", "cut", "newline_after_end"), 0)
    for row_ids, labels in rows:
        shown = tokenizer.decode(row_ids)
        taught = tokenizer.decode([t for t in labels if t != -100])
        asked = shown.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
        is_trace = asked in problems
        count["traces" if is_trace else "chats"] += 1
        count["empty_think"] += not is_trace and bool(re.search(r"<think>\s*</think>", taught))
        count["user_tokens"] += asked in taught
        count["cut"] += is_trace and "</think>" not in shown
        pairs = itertools.pairwise(labels)
        count["newline_after_end"] += any(a == IM_END and b == NEWLINE for a, b in pairs)
    return count


def memory(work: Path, rounds: int) -> dict:
    """A 2M-token budget out of 100,000 lines and out of 1,000,000, the same ten times over: seconds and peak memory."""
    big, found = work / "big", {}
    big.mkdir()
    (big / "qwen3").symlink_to(work / "qwen3")
    try:
        write_lines(big / "one.jsonl", FEW, work / "qwen3")
        source = f"    - {{path: {big}/big.jsonl, format: query_response, mode: non_thinking, fraction: 1.0}}\n"
        text = RECIPE.format(work=big).replace("unit: examples", f"unit: supervised_tokens\n  budget: {BUDGET}")
        text = text[: text.index("    - ")] + source + text[text.index("model:") :]
        (big / "bench.yaml").write_text(text, encoding="utf-8")
        for times in (1, TIMES):
            with open(big / "big.jsonl", "wb") as out:
                out.writelines([(big / "one.jsonl").read_bytes()] * times)
            runs = [mix_ways.run("ours", big) for _ in range(rounds)]
            found[str(times * FEW)] = {"runs": runs, "source_mb": (big / "big.jsonl").stat().st_size >> 20}
    finally:
        for file in big.glob("*.jsonl"):
            file.unlink()
    return {**found, "imports": mix_ways.run("imports", big)}


def write_lines(file: Path, lines: int, tokenizer_folder: Path) -> None:
    """Different question and answer rows, about 270 tokens each."""
    writer = mix_rows.Writer(tokenizer_folder)
    words = [writer.word() for _ in range(1 << 20)]
    with open(file, "w", encoding="utf-8") as out:
        for i, start in enumerate(writer.rng.integers(0, len(words) - 2 * WORDS_A_ROW, lines).tolist()):
            answer = " ".join(words[start : start + WORDS_A_ROW + i % WORDS_A_ROW])
            out.write(json.dumps({"query": f"question {i}", "response": answer}) + "\n")


def machine() -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
    }


def table(result: dict) -> str:
    """The measured file as Markdown."""
    host, runs = result["machine"], result["speed"]["runs"]

    def middle(way: str, key: str) -> float:
        return statistics.median(r[key] for r in runs[way])

    loads = [r["load"] for some in runs.values() for r in some]
    lines = [
        f"{host['cpu']}, {host['cores']} cores, load {min(loads):.0f} to {max(loads):.0f}, Python {host['python']}, "
        f"{host['date']}, on {host['commit']}. 1,000 traces + 3,000 chats, {runs['floor'][0]['tokens'] / 1e6:.1f}M tokens; medians.",
        "",
        "| | wall s, whole process | wall s after imports | CPU s after imports | peak MB | runs |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for way, title in TITLES.items():
        if runs[way]:
            cells = [f"{middle(way, k):.1f}" for k in ("wall_s", "after_imports_s", "after_imports_cpu_s")]
            lines.append(f"| {title} | {' | '.join(cells)} | {middle(way, 'peak_mb'):.0f} | {len(runs[way])} |")
        else:
            lines.append(f"| {title} | not measured yet | | | | |")
    return "\n".join([*lines, "", *_targets(result), *_audited(result), *_remembered(result)])


def _targets(result: dict) -> list[str]:
    """What was asked for, and by how much it is met or missed; runs of one round share their minute, so their load."""
    runs, equal = result["speed"]["runs"], result["ids"]

    def times(way: str, ours: str, key: str) -> str:
        pairs = list(zip(runs[ours], runs[way], strict=False))
        return f"{statistics.median(b[key] / a[key] for a, b in pairs):.1f} ×" if pairs else "not measured yet"

    return [
        f"- ≥ 10 × LLaMA-Factory: {times('llamafactory', 'ours', 'wall_s')} as whole processes, "
        f"{times('llamafactory', 'ours', 'after_imports_s')} after imports (medians of rounds)",
        f"- ≥ 3 × the floor: {times('floor', 'warm', 'after_imports_s')} with the tokenizers in memory on both sides "
        f"({times('floor', 'warm', 'after_imports_cpu_s')} in CPU time), {times('floor', 'ours', 'after_imports_s')} when only "
        "ours has to load them",
        f"- ids against the Hugging Face tokenizer: {equal['rows_that_differ']} of {equal['rows']:,} rows differ ({equal['tokens']:,} tokens)",
    ]


def _audited(result: dict) -> list[str]:
    head = "| 200 random rows | empty think taught (chat) | user tokens taught | traces cut | newline after the end taught |"
    lines = ["", head, "|---|--:|--:|--:|--:|"]
    for way, n in result["audit"].items():
        lines.append(
            f"| {TITLES[way]} | {n['empty_think']}/{n['chats']} | {n['user_tokens']}/{n['traces'] + n['chats']} | "
            f"{n['cut']}/{n['traces']} | {n['newline_after_end']} |"
        )
    ours = result["audit"]["ours"]
    return [
        *lines,
        "",
        f"Ours breaks the label rule on {ours['label_rule_broken']} of {ours['label_rule_rows']:,} rows and lists what it refuses: {ours['refused']}",
    ]


def _remembered(result: dict) -> list[str]:
    found = result["memory"]
    lines = ["", "| 2M supervised tokens out of | wall s | CPU s | peak MB above the imports |", "|---|--:|--:|--:|"]
    for rows in (FEW, FEW * TIMES):
        some = found[str(rows)]
        wall, cpu, peak = (statistics.median(r[k] for r in some["runs"]) for k in ("wall_s", "cpu_s", "peak_mb"))
        lines.append(
            f"| {rows:,} lines, {some['source_mb']:,} MB | {wall:.1f} | {cpu:.1f} | {peak - found['imports']['peak_mb']:.0f} |"
        )
    return lines


def main() -> None:
    """Run the parts that are asked for, keep their results, print the table."""
    parts = ("speed", "ids", "audit", "memory")
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; all without any")
    asked.add_argument("--table", action="store_true", help="only print what was measured")
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--slow-rounds", type=int, default=3, help="of the usual ways")
    asked.add_argument("--work", type=Path, help="keep the rows here and use them again")
    args = asked.parse_args()
    result = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        if not args.table:
            if not (work / "rendered.json").is_file():
                prepare(work)
            run = {
                "speed": lambda w: speed(w, args.rounds, args.slow_rounds),
                "ids": ids,
                "audit": audit,
                "memory": lambda w: memory(w, args.rounds),
            }
            for part in args.parts or parts:
                result |= {part: run[part](work), "machine": machine()}
                # a record names no place of this machine
                text = json.dumps(result, indent=1, ensure_ascii=False).replace(str(work), "WORK")
                MEASURED.write_text(text, encoding="utf-8")
    missing = [part for part in parts if part not in result]
    print(f"not measured yet: {', '.join(missing)}" if missing else table(result))


if __name__ == "__main__":
    main()
