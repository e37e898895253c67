"""Evidence without generation: each number comes from one pass over text that is there already.

marks = fast_evidence(subject, eval_set, progress)

Held-out loss and share of next tokens that are right, by source and mode; KL from the base on the base's own answers;
and how a reply begins in each mode. It takes minutes where replies take hours, and is the same at any scale of an
adapter: what is measured twice is paired by question.
"""

from collections.abc import Iterator

from toolkit.evaluation.questions import EvaluationSet
from toolkit.evaluation.score import Mark
from toolkit.evaluation.subject import LoadedRun
from toolkit.evaluation.table import MODELS
from toolkit.view.progress import Progress

FORGETTING = "forgetting"
# Probe categories a run may mean to change ("who made you?"): reported, but not part of the pooled kl and nll.
MAY_CHANGE = {"identity"}


def fast_evidence(subject: LoadedRun, eval_set: EvaluationSet, progress: Progress) -> list[Mark]:
    """Held-out loss, token accuracy, KL and beginnings of what `eval_set` holds, as rows of the long table.

    The base's own answers to the probes are made by the first call, a few dozen tokens each, and kept on the disk."""
    held_out = held_out_marks(subject, eval_set)
    return [*held_out, *forgetting_marks(subject, eval_set, progress), *beginning_marks(subject, eval_set)]


def held_out_marks(subject: LoadedRun, eval_set: EvaluationSet) -> Iterator[Mark]:
    """Loss and token accuracy on the held-out rows, by source and mode."""
    measured = subject.divergence(eval_set.validation)
    for i, (row, sums) in enumerate(zip(eval_set.validation, measured, strict=True)):
        kind = f"{row['source']}/{row['mode']}"
        tokens = sums["tokens"]
        for model, loss, hits in (
            ("base", sums["base"], sums["base_hits"]),
            ("tuned", sums["tuned"], sums["tuned_hits"]),
        ):
            yield Mark(FORGETTING, model, f"loss/{kind}", i, loss, tokens)
            yield Mark(FORGETTING, model, f"token_accuracy/{kind}", i, hits, tokens)


def forgetting_marks(subject: LoadedRun, eval_set: EvaluationSet, progress: Progress) -> Iterator[Mark]:
    """Loss and KL per token on the base's own greedy answers to the probes."""
    for mode in subject.modes:
        conversations = [probe["messages"] for probe in eval_set.probes]
        answers = subject.own(conversations, mode, eval_set.plan.size.probe_tokens, progress)
        measured = subject.divergence(answers)
        # numbered anew in each mode, so that a probe's modes are one question: its answers resemble each other
        for i, (probe, sums) in enumerate(zip(eval_set.probes, measured, strict=True)):
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
                for name, share in beginning.items():
                    yield Mark(mode, model, f"begins/{name}", i, share, 1)
