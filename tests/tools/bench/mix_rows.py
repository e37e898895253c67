"""The seeded rows of the data-stage benchmark: 1,000 OpenMathReasoning-like and 3,000 FineTome-like, about 4.9M tokens.

folder = write(Path("/tmp/bench"), qwen3.build(Path("/tmp/qwen3")))  # math.jsonl, chat.jsonl
"""

import json
import re
from pathlib import Path

import numpy as np

SEED = 3407
TRACES, CHATS = 1_000, 3_000
TRACE_TOKENS = (2_500, 0.73)
"""Median and log-deviation: a quarter of the traces is longer than 4,096 tokens, as in OpenMathReasoning."""
CHAT_TOKENS = (250, 0.75)
COMMON = (
    "the of and to in a is that it for we as with be on this so by are have can you from or if not then let which an "
    "at but has all what was how my one two its do now i will more use out up no just get like also"
).split()
"""The head of the word list; what else is short among a tokenizer's pieces is mostly not a word."""
WORDS = 30_000
RARE = 0.03
"""Share of words that are put together from two: names, inflections, what no tokenizer holds whole."""


class Writer:
    """Seeded text: words of the tokenizer's own vocabulary at Zipf's frequencies, sentences, digits and LaTeX."""

    def __init__(self, tokenizer_folder: Path, seed: int = SEED):
        model = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        by_rank = sorted(model["vocab"], key=model["vocab"].get)
        self.words = COMMON + [w[1:] for w in by_rank if re.fullmatch(r"Ġ[a-z]{4,14}", w)][:WORDS]  # Ġ: a space
        self.rng = np.random.default_rng(seed)
        odds = 1 / (np.arange(len(self.words)) + 2.7) ** 1.05
        self.odds = np.cumsum(odds / odds.sum())
        self._drawn = iter(())

    def word(self) -> str:
        """One word; a fresh supply is drawn 65,536 at a time."""
        found = next(self._drawn, None)
        if found is None:
            ranks = np.searchsorted(self.odds, self.rng.random((2, 1 << 16)))
            rare = self.rng.random(1 << 16) < RARE
            self._drawn = iter(
                [self.words[a] + self.words[b] if r else self.words[a] for a, b, r in zip(*ranks, rare, strict=True)]
            )
            found = next(self._drawn)
        return found

    def sentence(self) -> str:
        """4 to 24 words, about 17 tokens."""
        words = [self.word() for _ in range(self.rng.integers(4, 25))]
        words[0] = words[0].capitalize()
        if len(words) > 12:
            words[len(words) // 2] += ","
        return " ".join(words) + "?."[self.rng.random() < 0.93]

    def formula(self) -> str:
        """A line of mathematics, in LaTeX or plain, about 38 tokens."""
        a, b, c, d = self.rng.integers(2, 2_000, 4).tolist()
        x, y = self.rng.choice(list("abcdkmnpqrstuvxyz"), 2)
        lines = (
            f"\\( {x}^{{2}} + {a}{x} = {b} \\), so \\( {x} = \\frac{{-{a} \\pm \\sqrt{{{c}}}}}{{2}} \\).",
            f"{a} × {b} = {a * b}, then {a * b} - {c} = {a * b - c}.",
            f"$$\\sum_{{{x}=1}}^{{{a}}} \\binom{{{b}}}{{{x}}} {y}^{{{x}}} = {c}$$",
            f"If {x} = {a}/{b} and {y} = {c}, then {x}{y} = {a * c / b:.3f} ≈ {round(a * c / b)}.",
            f"\\( {x} \\equiv {a} \\pmod{{{b}}} \\) and \\( {y} \\leq {d} \\), \\( \\angle {x.upper()}{y.upper()} = {d % 180}^\\circ \\)",
        )
        return lines[self.rng.integers(len(lines))]

    def paragraphs(self, tokens: float, formulas: float) -> str:
        """About so many tokens of text, of whose lines the share `formulas` is mathematics."""
        parts, written = [], 0.0
        while written < tokens:
            is_formula = self.rng.random() < formulas
            parts.append(self.formula() if is_formula else self.sentence())
            parts.append("\n\n" if self.rng.random() < 0.2 else " ")
            written += 38 if is_formula else 17
        return "".join(parts).strip()

    def length(self, median_and_spread: tuple[float, float]) -> float:
        """A log-normal length in tokens, from 20."""
        median, spread = median_and_spread
        return max(20.0, self.rng.lognormal(np.log(median), spread))


def trace(writer: Writer) -> dict:
    """A row as nvidia/OpenMathReasoning keeps it."""
    problem = f"{writer.sentence()} {writer.formula()} {writer.sentence()}"
    number = str(writer.rng.integers(1, 10_000))
    thought = writer.paragraphs(writer.length(TRACE_TOKENS) - 150, 0.4)
    answer = f"{writer.paragraphs(80, 0.3)} The answer is \\boxed{{{number}}}."
    return {
        "expected_answer": number,
        "problem_type": "has_answer_extracted",
        "problem": problem,
        "generated_solution": f"<think>\n{thought}\n</think>\n\n{answer}",
        "inference_mode": "cot",
    }


def chat(writer: Writer) -> dict:
    """A row as mlabonne/FineTome-100k keeps it: one turn in ten has a system prompt, one in four goes on."""
    turns = [{"from": "system", "value": writer.sentence()}] if writer.rng.random() < 0.1 else []
    for _ in range(writer.rng.integers(2, 5) if writer.rng.random() < 0.25 else 1):
        turns.append({"from": "human", "value": " ".join(writer.sentence() for _ in range(writer.rng.integers(1, 6)))})
        turns.append({"from": "gpt", "value": writer.paragraphs(writer.length(CHAT_TOKENS), 0.1)})
    return {"conversations": turns, "source": "bench", "score": 4.5}


def write(folder: Path, tokenizer_folder: Path, traces: int = TRACES, chats: int = CHATS) -> Path:
    """math.jsonl and chat.jsonl in `folder`."""
    writer = Writer(tokenizer_folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, make, count in (("math", trace, traces), ("chat", chat, chats)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(make(writer), ensure_ascii=False) + "\n" for _ in range(count))
    return folder
