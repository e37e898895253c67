"""Evidence without generation: each number comes from one pass over text that is there already.

fast_evidence(subject, eval_set).value("forgetting", "kl")

Held-out loss and share of next tokens that are right, by source and mode; KL from the base on the base's own answers;
and how a reply begins in each mode. It takes minutes where replies take hours, and is the same at any scale of an
adapter: what is measured twice is paired by question.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from toolkit.evaluation.questions import EvaluationSet
from toolkit.evaluation.score import Mark
from toolkit.evaluation.subject import Completion, LoadedRun, NoProgress, ProgressBar
from toolkit.evaluation.table import MODELS, Scores, summarize
from toolkit.records import Probe

FORGETTING = "forgetting"
MAY_CHANGE = {"identity"}
"""Probe categories a run may mean to change ("who made you?"): reported, but not part of the pooled kl and nll."""


@dataclass(frozen=True)
class FastEvidence:
    """What teacher-forced passes showed of base and tuned, mark by mark."""

    marks: list[Mark]

    def scores(self, seed: int) -> Scores:
        """Every number of base, tuned and their paired difference, with its interval."""
        return summarize(self.marks, seed)

    def value(self, section: str, metric: str, model: str = "tuned") -> float:
        """One number, without its interval: `value("forgetting", "kl")`."""
        own = [m for m in self.marks if (m.section, m.metric, m.model) == (section, metric, model)]
        return sum(mark.value for mark in own) / sum(mark.weight for mark in own)


def fast_evidence(subject: LoadedRun, eval_set: EvaluationSet, progress: ProgressBar | None = None) -> FastEvidence:
    """Held-out loss, token accuracy, KL and beginnings of what `eval_set` holds.

    The base's own answers to the probes are made by the first call, a few dozen tokens each, and kept on the disk."""
    progress = progress or NoProgress()
    return FastEvidence(
        [
            *held_out_marks(subject, eval_set),
            *forgetting_marks(subject, eval_set, progress),
            *beginning_marks(subject, eval_set),
        ]
    )


def base_answers(subject: LoadedRun, probes: Sequence[Probe], tokens: int) -> list[Completion]:
    """The base's own greedy answers to some probes in every mode, to be stored and measured again while a run trains."""
    conversations = [probe["messages"] for probe in probes]
    return [row for mode in subject.modes for row in subject.own(conversations, mode, tokens, NoProgress())]


def mean_kl(subject: LoadedRun, answers: Sequence[Completion]) -> float:
    """KL of tuned from base in nats per token on stored answers: two passes over each, no generation."""
    sums = subject.divergence(answers)
    return sum(row["kl"] for row in sums) / max(1, sum(row["tokens"] for row in sums))


def held_out_marks(subject: LoadedRun, eval_set: EvaluationSet) -> Iterator[Mark]:
    """Loss and token accuracy on the held-out rows, by source and mode."""
    for i, (row, sums) in enumerate(zip(eval_set.validation, subject.divergence(eval_set.validation), strict=True)):
        kind = f"{row['source']}/{row['mode']}"
        for model, loss, hits in (
            ("base", sums["base"], sums["base_hits"]),
            ("tuned", sums["tuned"], sums["tuned_hits"]),
        ):
            yield Mark(FORGETTING, model, f"loss/{kind}", i, loss, sums["tokens"])
            yield Mark(FORGETTING, model, f"token_accuracy/{kind}", i, hits, sums["tokens"])


def forgetting_marks(subject: LoadedRun, eval_set: EvaluationSet, progress: ProgressBar) -> Iterator[Mark]:
    """Loss and KL per token on the base's own greedy answers to the probes."""
    for mode in subject.modes:
        conversations = [probe["messages"] for probe in eval_set.probes]
        answers = subject.own(conversations, mode, eval_set.plan.size.probe_tokens, progress)
        # numbered anew in each mode, so that a probe's modes are one question: its answers resemble each other
        for i, (probe, sums) in enumerate(zip(eval_set.probes, subject.divergence(answers), strict=True)):
            tokens = sums["tokens"]
            # weight 0 leaves a probe out of the pooled number
            pooled = int(probe["category"] not in MAY_CHANGE)
            for model, kl, loss in (("base", 0.0, sums["base"]), ("tuned", sums["kl"], sums["tuned"])):
                yield Mark(FORGETTING, model, f"kl/{probe['category']}", i, kl, tokens)
                yield Mark(FORGETTING, model, "kl", i, pooled * kl, pooled * tokens)
                yield Mark(FORGETTING, model, "nll", i, pooled * loss, pooled * tokens)


def beginning_marks(subject: LoadedRun, eval_set: EvaluationSet) -> Iterator[Mark]:
    """Shares of probability on beginning with thinking and with an answer, in each mode."""
    conversations = [question["messages"] for question in eval_set.starts]
    for mode in subject.modes:
        for model in MODELS:
            beginnings = subject.beginnings(conversations, mode, adapter=model == "tuned")
            for i, beginning in enumerate(beginnings):
                yield Mark(mode, model, "begins/thinking", i, beginning["thinking"], 1)
                yield Mark(mode, model, "begins/answer", i, beginning["answer"], 1)
