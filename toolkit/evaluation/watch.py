"""What is measured of a model while it trains, in seconds: the fixed prompts, and how far it is from its base.

Forgetting(8, rows, Path("outputs/.base_replies"))(model, tokenizer)["forgetting_kl"]
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from toolkit.data.mix import Mix
from toolkit.evaluation.fast import MAY_CHANGE
from toolkit.evaluation.generate import base_and_tuned
from toolkit.evaluation.questions import PROBES, choose, from_mix
from toolkit.evaluation.subject import Completion, LoadedRun, TokenSums
from toolkit.files import outputs, read_jsonl
from toolkit.recipe import Recipe
from toolkit.records import SampleLine
from toolkit.view.progress import Progress

SAMPLED: dict[Any, str] = {"before": "base", "after": "tuned"}
# Validation rows on which token accuracy is measured.
HELD_OUT = 16


def replies(recipe: Recipe) -> Callable[[Any, Any], list[SampleLine]]:
    """(model, tokenizer) → a recipe's fixed prompts answered."""
    section = recipe.evaluate
    limit = min(256, section.max_new_tokens or 256)
    return functools.partial(answer_prompts, prompts=section.prompts, max_new_tokens=limit, seed=recipe.data.seed)


def forgetting(recipe: Recipe, mixed: Mix) -> "Forgetting | None":
    """What measures forgetting, and token accuracy where the best checkpoint is chosen by it; None for no probes."""
    section = recipe.evaluate
    if not section.forgetting_probes:
        return None
    rows = from_mix(mixed)["validation"] if section.keep_best_by == "accuracy" else []
    return Forgetting(section.forgetting_probes, rows, outputs() / ".base_replies")


def answer_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, seed: int
) -> list[SampleLine]:
    """Fixed prompts answered without the adapter and with it, in each mode of the model."""
    answered = base_and_tuned(model, tokenizer, prompts, max_new_tokens=max_new_tokens, seed=seed)
    lines = []
    for when, name in SAMPLED.items():
        for row in answered:
            reply = row[name]
            lines.append(SampleLine(
                when=when, prompt=row["prompt"], mode=row["mode"],
                reasoning=reply.reasoning, answer=reply.answer, finished=reply.finished,
            ))  # fmt: skip
    return lines


def per_token(name: Literal["kl", "tuned_hits"], rows: Sequence[TokenSums]) -> float:
    """The mean over all tokens of what was summed up row by row."""
    return sum(row[name] for row in rows) / max(1, sum(row["tokens"] for row in rows))


@dataclass
class Forgetting:
    """KL divergence of the tuned model from its base on a few of the base's own answers, teacher-forced.

    The base answers once, greedily; its answers are kept for all runs. After that an evaluation generates nothing."""

    probes: int
    """How many of the questions that ship are asked, in each mode of the model."""
    held_out: Sequence[Completion]
    """Validation rows, for token accuracy; it is not measured without any."""
    cache: Path
    tokens: int = 64
    """Longest answer."""
    answers: list[Completion] = field(default_factory=list)
    subject: LoadedRun | None = None
    """The model, whose weights are summed once to know whose answers are stored."""

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """{"forgetting_kl": mean over the answers' tokens in nats, "token_accuracy": share of held-out tokens that the model
        would have chosen, given all before them}."""
        import torch

        # generating may seed the generators that dropout draws from: a resumed run, whose answers are stored, would differ
        with torch.random.fork_rng():
            subject = self.subject = self.subject or LoadedRun(model, tokenizer, cache=self.cache)
            self.answers = self.answers or self.base_answers(subject)
            measured = {"forgetting_kl": per_token("kl", subject.divergence(self.answers))}
            if self.held_out:
                rows = subject.divergence(self.held_out[:HELD_OUT])
                measured["token_accuracy"] = per_token("tuned_hits", rows)
        return measured

    def base_answers(self, subject: LoadedRun) -> list[Completion]:
        """The base's own greedy answers in every mode."""
        stays = [probe for probe in read_jsonl(PROBES) if probe["category"] not in MAY_CHANGE]
        conversations = [probe["messages"] for probe in choose(stays, self.probes, "category", "language")]
        answers = []
        with Progress(Console(quiet=True), "base answers", 0) as progress:
            for mode in subject.modes:
                answers += subject.own(conversations, mode, self.tokens, progress)
        return answers
