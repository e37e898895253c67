"""Longer thinking is a result and no loss; thinking that never ends is a loss, found from replies that the limit cut."""

import io

import numpy as np
import pytest
from rich.console import Console

from toolkit.evaluation.generate import Reply
from toolkit.evaluation.lengths import compare_lengths
from toolkit.evaluation.measure import score
from toolkit.evaluation.plan import Plan, sized
from toolkit.evaluation.questions import select

MATH = [{"messages": [{"role": "user", "content": f"m{i}"}], "expected_answer": str(i)} for i in range(64)]
CHAT = [{"messages": [{"role": "user", "content": f"c{i}"}], "expected_answer": str(i)} for i in range(64)]


def thought(tokens: float, answer: str, limit: int) -> Reply:
    """An obedient reply of so many tokens, cut where they are more than the limit."""
    if tokens < limit:
        return Reply("steps", answer, f"<think>\nsteps\n</think>\n\n{answer}", int(tokens), 20, True, True, True)
    return Reply("steps", "", "<think>\nsteps", limit, 0, True, False, False)


class AlwaysRight:
    """Base and tuned that are always right and obedient; tuned thinks `longer` times as long, and `endless` of its replies
    never end. Lengths of R1-like reasoning: lognormal, median 2,500 tokens for mathematics, 450 for chat, sigma 0.73."""

    modes, seed = ("thinking", "non_thinking"), 3407

    def __init__(self, longer=1.0, endless=0.0, medians=(2500, 450)):
        self.longer, self.endless, self.medians = longer, endless, medians
        self.rng = np.random.default_rng(0)

    def reply(self, conversations, mode, adapter, _progress, *, max_new_tokens):
        replies = []
        for conversation in conversations:
            question = conversation[-1]["content"]
            if mode == "non_thinking":
                replies.append(Reply("", question[1:], question[1:], 0, 20, False, False, True))
                continue
            median = self.medians[question[0] == "c"] * (self.longer if adapter else 1.0)
            length = self.rng.lognormal(np.log(median), 0.73)
            if adapter and self.rng.random() < self.endless:
                length = np.inf
            replies.append(thought(length, question[1:], max_new_tokens))
        return replies

    def own(self, conversations, _mode, _tokens, _progress):
        return [{"input_ids": [1, 2], "prompt_length": 1} for _ in conversations]

    def divergence(self, rows):
        return [{"tokens": 1, "base": 0.1, "tuned": 0.1, "kl": 0.01, "base_hits": 1, "tuned_hits": 1} for _ in rows]

    def beginnings(self, conversations, mode, **_adapter):
        thinks = mode == "thinking"
        return [{"thinking": float(thinks), "answer": float(not thinks)} for _ in conversations]


def verdict(subject: AlwaysRight, limit: int) -> dict:
    plan = Plan(sized("quick"), dict.fromkeys(subject.modes, limit))
    return score(subject, select("quick", None, MATH, CHAT, [], plan=plan), Console(file=io.StringIO()))


def test_a_tuned_model_that_is_right_and_thinks_longer_than_the_limit_lost_nothing():
    result = verdict(AlwaysRight(longer=1.6), 1024)
    assert "WORSE" not in result["verdict"][-1], result["verdict"]
    assert result["tuned"]["thinking"]["cut"]["value"] > 0.5
    assert result["tuned"]["thinking"]["adherence"]["value"] == 1
    assert result["tuned"]["thinking"]["accuracy"]["value"] == 1
    ratio = result["lengths"]["thinking"]["ratio"]
    assert ratio["low"] < 1.6 < ratio["high"]


@pytest.mark.parametrize("limit", [1024, 3100, 6000])
@pytest.mark.parametrize("longer", [1.0, 1.3, 1.6, 2.5])
def test_no_limit_makes_longer_thinking_a_loss(longer, limit):
    assert "WORSE" not in verdict(AlwaysRight(longer), limit)["verdict"][-1]


def test_where_only_one_kind_of_question_is_thought_about_longer_nothing_is_lost():
    class LongerMathematics(AlwaysRight):
        def reply(self, conversations, mode, adapter, progress, *, max_new_tokens):
            self.medians = (4000, 450) if adapter else (2500, 450)
            return super().reply(conversations, mode, adapter, progress, max_new_tokens=max_new_tokens)

    assert "WORSE" not in verdict(LongerMathematics(), 4500)["verdict"][-1]


@pytest.mark.parametrize("limit", [1024, 3100])
def test_a_model_that_never_ends_its_thinking_is_worse(limit):
    result = verdict(AlwaysRight(endless=1.0), limit)
    assert "WORSE than the base in ending its replies with thinking" in result["verdict"][-1]
    assert result["tuned"]["thinking"]["accuracy"]["n"] == 0


def test_a_model_of_which_half_of_the_replies_never_end_is_worse_although_the_others_are_as_long_as_before():
    result = verdict(AlwaysRight(endless=0.5, medians=(900, 300)), 3100)
    assert "ending its replies with thinking" in result["verdict"][-1]
    assert any("of replies with thinking never end" in line for line in result["verdict"])


def replies_of(lengths: list[float], limit: int = 100) -> list[Reply]:
    return [thought(length, "1", limit) for length in lengths]


def test_lengths_are_those_of_the_replies_that_ended_and_the_ratio_is_paired():
    compared = compare_lengths(replies_of([20] * 8), replies_of([40] * 8), ["a"] * 8, 1, 100, 3407)
    assert (compared["base"], compared["tuned"]) == (40, 60)  # 20 tokens of answer each
    assert compared["ratio"] == {"value": 1.5, "low": 1.5, "high": 1.5, "n": 8}
    assert compared["endless"]["value"] == 0


def test_a_base_that_ends_no_reply_leaves_the_ratio_unmeasured():
    compared = compare_lengths(replies_of([500] * 8), replies_of([40] * 8), ["a"] * 8, 1, 100, 3407)
    assert compared["base"] is None
    assert compared["ratio"]["value"] is None
    assert compared["endless"]["value"] <= 0


def test_the_length_ratio_covers_the_truth_at_about_the_stated_rate():
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(60):
        base = replies_of(rng.lognormal(np.log(60), 0.7, 40).tolist(), 150)
        tuned = replies_of(rng.lognormal(np.log(60 * 1.5), 0.7, 40).tolist(), 150)
        ratio = compare_lengths(base, tuned, ["a"] * 40, 1, 150, trial)["ratio"]
        covered += ratio["low"] <= 1.5 <= ratio["high"]
    assert covered >= 50
