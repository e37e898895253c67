"""Replies take the minutes they may take, at the speed of the machine; what cannot be told is said before the first."""

import pytest

from toolkit.evaluation.measure import announcement, duration
from toolkit.evaluation.plan import (
    LEVELS,
    Plan,
    Speed,
    generation_seconds,
    minutes_for,
    plan_generation,
    smallest_change,
)
from toolkit.evaluation.questions import reply_limits, select

LIMITS = {"thinking": 3100, "non_thinking": 1024}
CARD = Speed(rows=16, seconds_per_step=0.05)


def planned(level="quick", speed=CARD, limits=LIMITS, **settings) -> Plan:
    return plan_generation(level, limits=limits, speed=lambda: speed, **settings)


def never() -> Speed:
    raise AssertionError("the speed decides nothing here and must not be measured")


@pytest.mark.parametrize("minutes", [8, 14, 60])
def test_replies_fit_the_minutes_and_a_larger_plan_would_not(minutes):
    plan = planned(minutes=minutes)
    assert plan.seconds <= 60 * minutes
    assert plan.size.questions >= 8
    more = [n for n in (12, 16, 24, 32, 48, 64) if n > plan.size.questions]
    if more:
        larger = LEVELS["quick"].__class__(**{**vars(plan.size), "questions": more[0]})
        assert generation_seconds(larger, plan, ("thinking", "non_thinking"), CARD) > 60 * minutes


def test_the_default_time_is_a_third_of_the_training_and_at_least_three_minutes():
    assert minutes_for("quick", 3 * 3600) == 60
    assert minutes_for("quick", 60) == minutes_for("quick", None) == 3
    assert minutes_for("full", 60) == 120


def test_one_minute_gives_fast_evidence_only_and_says_so():
    plan = plan_generation("quick", limits=LIMITS, minutes=1, speed=never)
    assert plan.size.questions == 0
    assert plan.note.startswith("fast evidence only")


def test_a_machine_too_slow_for_eight_questions_generates_nothing_and_says_how_long_it_would_take():
    plan = planned(speed=Speed(rows=1, seconds_per_step=0.5))
    assert plan.size.questions == 0
    assert "about 584 minutes" in plan.note
    assert "--minutes 585 generates" in plan.note


def test_numbers_that_a_recipe_fixes_are_asked_whatever_the_machine():
    plan = plan_generation("quick", limits=LIMITS, questions=20, speed=never)
    assert (plan.size.questions, plan.seconds) == (20, None)
    assert plan_generation("fast", limits=LIMITS, speed=never).size.questions == 0


def test_full_is_two_hours_and_never_weeks():
    plan = planned("full", speed=Speed(rows=8, seconds_per_step=0.06))
    assert 3600 < plan.seconds <= 7200
    assert planned("full", speed=Speed(rows=512, seconds_per_step=0.001)).size == LEVELS["full"]


def test_few_steps_ask_few_questions_and_say_why_unless_somebody_names_the_minutes():
    assert planned(steps=40, train_seconds=9e9).size.questions == 8
    assert "after 40 training steps" in planned(steps=40, train_seconds=9e9).note
    assert planned(steps=40, minutes=600).size.questions == 64


def question(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}], "expected_answer": "1"}


def test_what_is_asked_and_how_long_it_takes_is_said_before_the_first_reply():
    questions = [question(str(i)) for i in range(12)]
    chat = [question(f"c{i}") for i in range(12)]
    size = LEVELS["quick"]
    asked = select("quick", None, questions, chat, [], plan=Plan(size, LIMITS, seconds=840))
    lines = announcement(asked, ("thinking", "non_thinking")).splitlines()
    assert lines[0] == (
        "quick evaluation: 24 questions x 2 modes (thinking and non-thinking) x base and tuned, up to 3,100 tokens: "
        "about 14 minutes"
    )
    assert lines[1] == "from 12 questions of a kind, a change below 50 points cannot be told"


def test_the_smallest_change_needs_six_questions_that_differ():
    assert [smallest_change(n) for n in (6, 8, 24, 64)] == [100, 75, 25, 10]
    assert (duration(30), duration(840)) == ("30 seconds", "14 minutes")


class CompiledMix:
    """The part of a mix that decides a limit."""

    def __init__(self, **p90: int):
        self.report = {"lengths": {mode: {"completion_p90": tokens} for mode, tokens in p90.items()}}


def test_the_limit_of_a_mode_is_the_90th_percentile_of_what_it_was_taught_and_at_least_1024():
    assert reply_limits(CompiledMix(thinking=4500, non_thinking=100)) == {"thinking": 4500, "non_thinking": 1024}
    assert Plan(LEVELS["quick"], reply_limits(CompiledMix())).limit("thinking") == 1024
