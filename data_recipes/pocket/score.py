"""What the pocket model can do, measured in both modes on held-out questions. `python -m data_recipes.pocket.score`"""

import argparse
import json
import re
from itertools import cycle
from pathlib import Path
from random import Random

from data_recipes.pocket import tasks
from toolkit.files import POCKET

FOLDER = POCKET
SEED = 11
MAX_NEW_TOKENS = 112  # the longest worked sum of the new skill is about 70 tokens
THINK = re.compile(r"<think>\n(?P<reasoning>.*?)\n?</think>\n\n(?P<answer>.*)", re.DOTALL)

CARD = """# Pocket Qwen3

A Qwen3 of {parameters:,} parameters ({megabytes:.1f} MB, bfloat16) with both of Qwen3's modes, trained from nothing. It
is no language model to talk to for long: it exists so that data, training, evaluation, export and chat run for real,
offline, on a CPU.

- **Architecture**: `Qwen3ForCausalLM`, hidden 256, 4 layers, 4 heads and 2 key-value heads of 64, QK-norm, tied
  embeddings.
- **Tokenizer**: own byte-level BPE of {vocabulary:,} tokens with Qwen2's split rule and Qwen3's added tokens; Qwen3's
  official chat template.
- **Data**: the seeded world of `tasks.py` and `words.py` in `data_recipes/pocket/`, written for this project: sums of one and two digits with
  worked steps, and everyday questions
  ({skills}).
  Both modes on both kinds of question, one to three turns, system prompts, `/think` and `/no_think`. One instance in
  ten is held out for ever; one-digit sums, small talk and follow-up questions ("And of dark?") are not.
- **Labels**: the completion after the prompt that inference shows, up to `<|im_end|>`; nothing else.
- **Not taught**: three-digit sums (`{new_skill}`). They are what the sample recipes teach it.
- **Made by** `python -m data_recipes.pocket.build`: seed {seed}, {steps:,} steps of {batch} conversations, {seconds:,} s of
  training on {hardware}, {date}, torch {torch}, transformers {transformers}.

| mode | questions | right answer | keeps to its mode | n |
|---|---|--:|--:|--:|
{table}

Measured by `python -m data_recipes.pocket.score` (greedy, seed {score_seed}, held-out questions, float32). "Keeps to its
mode": thinking is a non-empty, closed block, an answer behind it and `<|im_end|>`; not thinking is an answer without a
trace of a block or of worked steps; the switch (`/no_think` in the question) must first write the empty block.

Known limits: it knows single facts only; anything outside this world is babble. Licence: CC0.
"""


def held_out(skills: list[str], count: int, seed: int = SEED) -> list[tasks.Task]:
    """`count` different held-out tasks, the skills in turn (one that has no more simply adds none)."""
    rng, found, turn = Random(seed), {}, cycle(skills)
    while len(found) < count:
        task = tasks.draw(rng, next(turn), held_out=True)
        found.setdefault(task.question, task)
    return list(found.values())


def replies(model, tokenizer, prompts: list[list[dict]], thinking: bool, batch_size: int = 64) -> list[str]:
    """Greedy replies as raw text; one that ended by itself still carries its <|im_end|>."""
    import torch

    def render(messages):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )

    texts, tokenizer.padding_side = [], "left"
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer([render(m) for m in prompts[start : start + batch_size]], return_tensors="pt", padding=True)
        with torch.no_grad():
            output = model.generate(
                **inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, temperature=None, top_p=None, top_k=None
            )
        texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    return [text.replace(tokenizer.pad_token, "") for text in texts]


def judge(task: tasks.Task, text: str, thinking: bool) -> dict[str, bool]:
    """Is the visible answer exactly the expected one, and does the reply keep to its mode?

    Thinking is well-formed when the block is non-empty, closed, followed by an answer and ended by <|im_end|>;
    non-thinking when no trace of a think block or of worked steps shows.
    """
    finished, text = text.endswith("<|im_end|>"), text.removesuffix("<|im_end|>")
    match = THINK.fullmatch(text)
    answer = match["answer"] if match else text
    if thinking:
        kept = bool(match and finished and match["reasoning"].strip() and answer.strip())
    else:
        kept = finished and "think>" not in text and "carry" not in text
    return {"accuracy": finished and answer == task.reply(thinking), "adherence": kept}


def score(model, tokenizer, count: int = 100) -> dict[str, dict]:
    """{mode: {kind of question: {"accuracy", "adherence", "n"}}}, the new skill among the kinds."""
    kinds = {"chat": tasks.EXACT, "sums": ["sum2"], "new_skill": [tasks.NEW_SKILL]}
    result = {}
    for mode in ("thinking", "non_thinking"):
        asked = {kind: held_out(skills, count) for kind, skills in kinds.items()}
        thinking, flat = mode == "thinking", [task for group in asked.values() for task in group]
        texts = iter(replies(model, tokenizer, [[{"role": "user", "content": t.question}] for t in flat], thinking))
        result[mode] = {
            kind: _shares([judge(task, next(texts), thinking) for task in group]) for kind, group in asked.items()
        }
    result["no_think_switch"] = {"chat": _switched_off(model, tokenizer, held_out(kinds["chat"], count // 2))}
    return result


def _switched_off(model, tokenizer, asked: list[tasks.Task]) -> dict:
    """Thinking template, `/no_think` in the question: the model itself must write the empty block, then answer."""
    empty = "<think>\n\n</think>\n\n"
    texts = replies(model, tokenizer, [[{"role": "user", "content": f"{t.question} /no_think"}] for t in asked], True)
    judged = [
        judge(task, text.removeprefix(empty), False) | {"adherence": text.startswith(empty)}
        for task, text in zip(asked, texts, strict=True)
    ]
    return _shares(judged)


def _shares(judged: list[dict[str, bool]]) -> dict:
    return {name: round(sum(j[name] for j in judged) / len(judged), 3) for name in judged[0]} | {"n": len(judged)}


def load(folder: Path = FOLDER):
    """The pocket model in float32 (what a CPU computes in) and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def write_card(folder: Path, build: dict) -> None:
    """Measure the model in `folder`, write card.json and the README.md printed from it. `build`: how it was made."""
    model, tokenizer = load(folder)
    card = {
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "new_skill": tasks.NEW_SKILL,
        "build": build,
        "score_seed": SEED,
        "scores": score(model, tokenizer),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card_text(card), encoding="utf-8")


def card_text(card: dict) -> str:
    rows = [
        f"| {mode} | {kind} | {s['accuracy']:.1%} | {s['adherence']:.1%} | {s['n']} |".replace("_", " ")
        for mode, kinds in card["scores"].items()
        for kind, s in kinds.items()
    ]
    return CARD.format(
        **card, **card["build"], table="\n".join(rows), megabytes=card["bytes"] / 1e6, skills=", ".join(tasks.CHAT)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--count", type=int, default=100, help="questions per kind and mode")
    arguments = parser.parse_args()
    print(json.dumps(score(*load(arguments.folder), arguments.count), indent=2))


if __name__ == "__main__":
    main()
