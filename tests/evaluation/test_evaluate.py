"""Scripted models that always think, never do, leak, never close or guess score exactly what they must; intervals cover."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from tests.support import models
from toolkit import recipe as recipes
from toolkit.data.mix import compile_mix
from toolkit.data.sources import Rejected
from toolkit.evaluation.generate import Reply, inference, split_reply
from toolkit.evaluation.measure import evaluate, from_mix, is_rate, score, summary
from toolkit.evaluation.plan import LEVELS, Plan, sized
from toolkit.evaluation.questions import PROBES as SHIPPED_PROBES
from toolkit.evaluation.questions import as_question, choose, fingerprint, questions_of, select
from toolkit.evaluation.score import leaks
from toolkit.evaluation.stats import Sample, paired_difference
from toolkit.evaluation.subject import LOGITS, LoadedRun, checksum, logits_at_once
from toolkit.evaluation.words import own_rows_text, times_likelier, verdict
from toolkit.family import MODES
from toolkit.files import ToolkitError, read_jsonl
from toolkit.view.tables import score_table

NUMBERS = ("one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
           "eighteen nineteen twenty").split()  # fmt: skip
# words, which are compared without starting math-verify
SUMS = [{"messages": [{"role": "user", "content": f"{a} + 1?"}], "expected_answer": word, "set": "sums"}
        for a, word in enumerate(NUMBERS)]  # fmt: skip
CHAT = [{"messages": [{"role": "user", "content": f"Say {word}"}], "expected_answer": word, "set": "say"}
        for word in ("red apple", "green tea", "绿茶", "blue", "moon")]  # fmt: skip
PROBES = [{"id": str(i), "category": c, "language": "en", "messages": [{"role": "user", "content": c}]}
          for i, c in enumerate(("identity", "knowledge"))]  # fmt: skip
ANSWERS = {q["messages"][0]["content"]: q["expected_answer"] for q in SUMS + CHAT}
THOUGHT = "<think>\nfirst this, then that\n</think>\n\n"


def reply(text: str, finished: bool = True) -> Reply:
    reasoning, answer, opened, closed = split_reply(text)
    return Reply(reasoning, answer, text, len(reasoning.split()), len(answer.split()), opened, closed, finished)


def known(conversation) -> str:
    return ANSWERS[conversation[-1]["content"]]


def perfect(conversation, mode) -> Reply:
    return reply(("" if mode == "non_thinking" else THOUGHT) + known(conversation))


def always_thinks(conversation, _mode):
    return reply(THOUGHT + known(conversation))


def never_thinks(conversation, _mode):
    return reply(known(conversation))


def empty_block(conversation, mode):
    return reply("<think>\n\n</think>\n\n" * (mode == "thinking") + known(conversation))


def leaks_aloud(conversation, _mode):
    return reply("Hmm. Wait, let me check that again.\n" + known(conversation))


def rambles(conversation, _mode):
    return reply("First one adds the ones and then the tens. " * 5 + known(conversation))


def never_closes(_conversation, _mode):
    return reply("<think>\non and on")


def thinks_twice(conversation, _mode):
    return reply(THOUGHT + THOUGHT + known(conversation))


def thinks_after_the_answer(conversation, _mode):
    return reply(known(conversation) + THOUGHT)


def endless(_conversation, _mode):
    return reply("<think>\non and on", finished=False)


def kls(rows):
    return [
        {"tokens": 10, "base": 5.0, "tuned": 5.0 + row["extra"], "kl": row["extra"], "base_hits": 5, "tuned_hits": 6}
        for row in rows
    ]


class Scripted:
    """A base and a tuned model that reply by scripts."""

    seed = 3407

    def __init__(self, base, tuned, divergence, modes):
        self.scripts, self.divergence, self.modes = (base, tuned), divergence, modes

    def reply(self, conversations, mode, adapter, progress, **_settings):
        progress.advance(len(conversations))
        return [self.scripts[adapter](c, mode) for c in conversations]

    def beginnings(self, conversations, mode, adapter):
        thinking = [self.scripts[adapter](c, mode).opened for c in conversations]
        return [{"thinking": float(opens), "answer": float(not opens)} for opens in thinking]

    def own(self, conversations, _mode, _tokens, _progress):
        return [{"extra": 1.0 if c[0]["content"] == "identity" else 3.0} for c in conversations]


def run(tuned, base=perfect, level="quick", questions=SUMS, chat=CHAT, validation=(), steps=None,
        divergence=kls, modes=MODES):  # fmt: skip
    subject = Scripted(base, tuned, divergence, modes)
    console = Console(file=io.StringIO())
    plan = Plan(sized(level, steps), dict.fromkeys(MODES, 64))
    return score(subject, select(level, steps, questions, chat, PROBES, validation, plan=plan), console)


def values(result, mode, name="tuned"):
    return {metric: found["value"] for metric, found in result[name][mode].items()}


def test_a_model_that_keeps_both_modes_scores_one_everywhere():
    result = run(perfect)
    for mode in ("thinking", "non_thinking"):
        found = values(result, mode)
        assert {m for m, v in found.items() if is_rate(m) and v != 1.0} == {"cut"}
        assert (found["begins/thinking"], found["begins/answer"]) == ((1, 0) if mode == "thinking" else (0, 1))
        assert found["cut"] == 0.0
        assert all(change["value"] == 0.0 for change in result["difference"][mode].values())
    assert result["tuned"]["thinking"]["accuracy"]["n"] == 20
    assert result["tuned"]["thinking"]["accuracy/chat"]["n"] == 5


@pytest.mark.parametrize(("script", "thinking", "non_thinking"), [
    (always_thinks, {"adherence": 1, "accuracy": 1},
     {"adherence": 0, "accuracy": 1}),
    (never_thinks, {"adherence": 0, "accuracy": 1}, {"adherence": 1, "accuracy": 1}),
    (empty_block, {"adherence": 0, "accuracy": 1}, {"adherence": 1}),
    (leaks_aloud, {"adherence": 0, "accuracy": 1}, {"adherence": 0, "accuracy": 1}),
    (rambles, {"adherence": 0, "accuracy": 1}, {"adherence": 0, "accuracy": 1}),
    (never_closes, {"adherence": 0, "accuracy": 0, "accuracy/chat": 0, "cut": 0}, {"adherence": 0, "accuracy": 0}),
    (thinks_twice, {"adherence": 0}, {"adherence": 0}),
    (thinks_after_the_answer, {"adherence": 0}, {"adherence": 0}),
    (endless, {"adherence": None, "cut": 1, "accuracy": None}, {"cut": 1, "accuracy": None}),
])  # fmt: skip
def test_a_scripted_model_scores_exactly_what_it_must(script, thinking, non_thinking):
    result = run(script)
    assert {m: values(result, "thinking").get(m) for m in thinking} == thinking
    assert {m: values(result, "non_thinking").get(m) for m in non_thinking} == non_thinking


def test_random_answers_score_chance_and_their_interval_says_so():
    rng = np.random.default_rng(0)
    questions = [
        {**SUMS[0], "messages": [{"role": "user", "content": f"{i}"}], "expected_answer": str(i % 10)}
        for i in range(60)
    ]
    result = run(
        lambda *_: reply(THOUGHT + str(rng.integers(10))), base=lambda *_: reply("0"), questions=questions, chat=()
    )
    found = result["tuned"]["thinking"]["accuracy"]
    assert found["low"] < 0.1 < found["high"] < 0.25
    assert values(result, "thinking")["adherence"] == 1


def test_accuracy_keeps_its_place_when_every_reply_was_cut():
    result = run(endless)
    assert result["tuned"]["thinking"]["accuracy"] == {"value": None, "low": None, "high": None, "n": 0}
    assert result["difference"]["thinking"]["accuracy"]["n"] == 0


def test_cut_replies_leave_accuracy_and_show_in_n():
    def half_cut(conversation, mode):
        cut = conversation in [q["messages"] for q in SUMS[:8]]
        return endless(conversation, mode) if cut else perfect(conversation, mode)

    found = run(half_cut)["tuned"]["thinking"]
    assert (found["accuracy"]["value"], found["accuracy"]["n"]) == (1.0, 12)
    assert found["cut"]["value"] == pytest.approx(8 / 25)


def test_samples_of_a_question_stay_together_and_n_counts_questions():
    result = run(perfect, level="full")
    assert result["tuned"]["thinking"]["adherence"]["n"] == 25
    assert result["budget"]["replies"] == 2 * 2 * 25 * 4
    assert result["per_question"]["thinking"]["tuned"]["adherence"][1] == [4.0] * 25


def test_forgetting_weighs_tokens_and_leaves_out_what_may_change():
    rows = [{"source": "s", "mode": "thinking", "extra": x} for x in (1.0, 2.0)]
    result = run(perfect, validation=rows)
    tuned, base = values(result, "forgetting"), values(result, "forgetting", "base")
    assert tuned["kl"] == pytest.approx(0.3)  # the knowledge probe alone: 3 nats over 10 tokens, in both modes
    assert tuned["kl/identity"] == pytest.approx(0.1)
    assert (base["kl"], base["nll"]) == (0.0, pytest.approx(0.5))
    assert tuned["loss/s/thinking"] == pytest.approx(0.65)


def test_the_result_has_the_documented_keys_and_flat_names():
    result = run(perfect)
    for name in ("base", "tuned", "difference"):
        assert {"accuracy", "adherence", "reasoning_tokens", "answer_tokens", "cut"} <= result[name]["thinking"].keys()
        assert {"kl", "nll"} <= result[name]["forgetting"].keys()
    assert set(result["tuned"]["non_thinking"]["accuracy"]) == {"value", "low", "high", "n"}
    flat = summary(result)
    assert flat["eval/tuned/thinking/accuracy"] == 1.0
    assert (len(flat), {name.split("/")[1] for name in flat}) == (24, {"base", "tuned", "difference"})


def test_three_held_out_rows_of_each_source_are_answered_before_and_after_beside_their_reference():
    own = [
        {"source": source, "mode": mode, "messages": SUMS[i]["messages"], "reference": f"it is {ANSWERS[f'{i} + 1?']}"}
        for source, mode in (("mine", "thinking"), ("yours", "non_thinking"))
        for i in range(9)
    ]
    plan = Plan(sized("quick", 40), dict.fromkeys(MODES, 64))
    asked = select("quick", None, SUMS, CHAT, PROBES, own_rows=own, plan=plan)
    result = score(Scripted(without_answers, perfect, kls, MODES), asked, Console(file=io.StringIO()))
    rows = result["own_rows"]
    assert [(row["source"], row["mode"]) for row in rows] == [("mine", "thinking")] * 3 + [
        ("yours", "non_thinking")
    ] * 3
    for row in rows:
        assert "I do not know" in row["base"]
        assert row["tuned"].endswith(row["reference"].removeprefix("it is "))
    lines = list(own_rows_text(result))
    assert len(lines) == 4 * 6
    assert max(map(len, lines)) <= 76
    assert lines[0].startswith("mine (thinking): ")


def test_sets_that_ship_are_named_as_a_check_of_what_was_kept_and_come_after_the_person_s_own_rows():
    rows = [{"source": "mine", "mode": "thinking", "extra": 1.0} for _ in range(8)]
    shipped = {"set": "chat"}
    result = run(perfect, validation=rows, chat=[question | shipped for question in CHAT])
    lines = verdict(result | {"shipped": ["chat"]})
    assert lines[0].startswith("your held-out replies, mine (thinking): ")
    assert lines[1] == "what was kept, chat questions with thinking: 100% → 100% (no change shown)"
    assert any(line.startswith("reasoning questions with thinking: ") for line in lines)


@pytest.mark.parametrize(("change", "words"), [
    (-0.875469, "2.4 times likelier"), (0.875469, "2.4 times less likely"), (0.0, "as likely as before"),
    (-900.0, "5.18e+21 times likelier"),
])  # fmt: skip
def test_a_change_of_the_loss_reads_as_how_many_times_likelier(change, words):
    assert times_likelier(change) == words


def test_nothing_to_ask_is_an_error():
    with pytest.raises(ToolkitError, match="nothing to ask"):
        run(perfect, questions=(), chat=())


@pytest.mark.parametrize(
    "text", ["Wait, that is wrong.", "It is 4.\nHmm, no.", "Okay, so the user asks", "嗯，用户问的是", "让我想想"]
)
def test_thinking_aloud_is_a_leak(text):
    assert leaks(reply(text))


@pytest.mark.parametrize(
    "text", ["The waiter waits.", "You should wait until noon.", "Right is the opposite of left.", "等于四"]
)
def test_ordinary_words_are_no_leak(text):
    assert not leaks(reply(text))


def test_questions_are_chosen_evenly_by_set_and_the_same_in_whatever_order_they_come():
    rows = [{"set": "a", "i": i} for i in range(50)] + [{"set": "b", "i": i} for i in range(5)]
    chosen = choose(rows, 20, "set")
    assert sum(row["set"] == "b" for row in chosen) == 5
    assert (len(chosen), chosen) == (20, choose(rows[::-1], 20, "set"))


def test_a_question_ends_at_its_last_user_turn():
    row = {
        "messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}],
        "expected_answer": "2",
    }
    assert as_question(row, "sums")["messages"] == row["messages"][:1]
    with pytest.raises(Rejected, match="expected_answer"):
        as_question({"messages": row["messages"]}, "sums")


def test_the_probe_set_is_frozen_bilingual_and_balanced():
    probes = read_jsonl(SHIPPED_PROBES)
    counts = {(p["category"], p["language"]) for p in probes}
    assert (len(probes), len(counts)) == (72, 12)
    assert len({p["messages"][0]["content"] for p in probes}) == 72
    assert fingerprint(probes) == "819bf2a74a174352", "changing a probe makes old evaluations incomparable"


def test_divergence_equals_a_plain_softmax_over_each_row(tokenizer, tmp_path, monkeypatch):
    import torch

    import toolkit.evaluation.subject

    model = models.tuned(tokenizer)
    rows = [{"input_ids": list(range(20, 20 + n)), "prompt_length": p} for n, p in ((30, 3), (12, 11), (200, 1))]
    monkeypatch.setattr(toolkit.evaluation.subject, "LOGITS", 1)  # long rows in parts of CHUNK positions
    for row, found in zip(rows, LoadedRun(model, tokenizer, tmp_path).divergence(rows), strict=True):
        ids, start = torch.tensor([row["input_ids"]]), row["prompt_length"]
        with inference(model, tokenizer):
            tuned = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            with model.disable_adapter():
                base = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        nll = [-x.gather(-1, ids[0, start:, None]).sum().item() for x in (base, tuned)]
        assert [found["base"], found["tuned"]] == pytest.approx(nll, rel=1e-4)
        assert found["kl"] == pytest.approx((base.exp() * (base - tuned)).sum().item(), rel=1e-3)
        assert (found["tokens"], found["kl"] > 0) == (len(row["input_ids"]) - start, True)


def test_an_adapter_that_changes_nothing_scores_no_difference(tokenizer, tmp_path):
    model, console = models.tuned(tokenizer, adapter_works=False), Console(file=io.StringIO(), width=80)
    rows = [{"input_ids": [20, 21, 22, 23], "prompt_length": 2, "source": "s", "mode": "thinking"}]
    asked = SUMS[:4], CHAT[:2], PROBES, rows
    result = evaluate(model, tokenizer, *asked, seed=1, max_new_tokens=6, console=console, cache=tmp_path)
    for section in ("thinking", "non_thinking", "forgetting"):
        for metric, found in result["difference"][section].items():
            assert found["value"] in (None, pytest.approx(0.0, abs=1e-6)), metric
    said = " ".join(console.file.getvalue().split())
    assert "6 questions x 2 modes (thinking and non-thinking) x base and tuned, up to 6 tokens: about" in said


def test_values_that_are_not_numbers_count_as_not_measured_and_the_verdict_says_that_the_run_is_broken():
    diverged = [
        {"tokens": 10, "base": 5.0, "tuned": float("nan"), "kl": float("nan"), "base_hits": 0, "tuned_hits": 0}
    ] * 2
    result = run(never_thinks, divergence=lambda rows: diverged[: len(rows)])
    assert result["tuned"]["forgetting"]["kl"] == {"value": None, "low": None, "high": None, "n": 0}
    assert "BROKEN" in result["verdict"][-1]
    json.dumps(result, allow_nan=False)


def test_a_short_training_is_asked_fewer_questions_by_its_steps_alone():
    assert [sized("quick", steps).questions for steps in (None, 1000, 256, 255, 128, 60, 6)] == [
        64,
        64,
        64,
        32,
        32,
        8,
        8,
    ]
    assert sized("full", steps=6) == LEVELS["full"]
    small = run(perfect, steps=6)
    assert (small["budget"]["replies"], run(perfect)["budget"]["replies"]) == (2 * 2 * (8 + 5), 2 * 2 * (20 + 5))
    assert small["fingerprints"]["questions"] == run(perfect, steps=63)["fingerprints"]["questions"]


@pytest.mark.parametrize("modes", [("non_thinking",), ("thinking",)])
def test_a_model_with_one_mode_is_scored_in_that_mode_alone(modes):
    result = run(perfect, modes=modes)
    for name in ("base", "tuned", "difference", "per_question"):
        assert set(result[name]) == {*modes, "forgetting"}
    assert {row["mode"] for row in result["samples"]} == set(modes)
    assert "thinking" not in " ".join(result["verdict"])


def test_a_model_without_a_thinking_mode_keeps_to_its_mode_when_it_answers_without_tags():
    loud = run(leaks_aloud, base=never_thinks, modes=("non_thinking",))
    assert values(loud, "non_thinking")["adherence"] == 1.0  # it has no thinking to leak
    assert values(run(always_thinks, modes=("non_thinking",)), "non_thinking")["adherence"] == 0.0


def test_a_held_out_loss_reads_as_one_item_of_a_list():
    rows = [{"source": s, "mode": "thinking", "extra": 1.0} for s in ("a", "b") for _ in range(8)]
    learned = [
        {"tokens": 10, "base": 5.0 + i % 3, "tuned": 1.0, "kl": 0.1, "base_hits": 5, "tuned_hits": 9}
        for i in range(len(PROBES) + len(rows))
    ]
    last = run(perfect, validation=rows, divergence=lambda asked: learned[: len(asked)])["verdict"][-1]
    assert last.startswith("result: better than the base in loss on a (thinking), loss on b (thinking); nothing")


def without_answers(_conversation, _mode):
    return reply(THOUGHT + "I do not know")


@pytest.mark.parametrize(("base", "tuned", "last"), [
    (without_answers, perfect, "result: better than the base in reasoning questions with thinking"),
    (perfect, without_answers, "result: WORSE than the base in reasoning questions with thinking"),
    (perfect, perfect, "result: no change shown"),
    (perfect, endless, "result: WORSE than the base in begins by answering without thinking, ending its replies with"),
])  # fmt: skip
def test_the_verdict_says_in_a_few_lines_what_changed_and_ends_with_better_or_worse(base, tuned, last):
    lines = run(tuned, base=base)["verdict"]
    assert 4 <= len(lines) <= 11
    assert lines[-1].startswith(last), lines
    if base is without_answers:
        assert lines[1] == "reasoning questions with thinking: 0% → 100% (+100 points, certain)"
    if tuned is endless:
        assert lines[1] == "reasoning questions with thinking: not measured (100% of replies cut by the token limit)"


@pytest.mark.parametrize(("n", "said"), [
    (5, "12% → 0% (no change shown; 44% of replies cut by the token limit)"),  # five pairs prove nothing
    (9, "12% → 0% (-12 points, certain; 44% of replies cut by the token limit)"),
])  # fmt: skip
def test_the_points_of_a_change_are_the_difference_of_the_shares_beside_them(n, said):
    """The shares are over all questions that a model finished, the interval over those that both did."""
    found = [{"value": v, "low": v, "high": v, "n": n} for v in (0.12, 0.0)]
    base, tuned = ({"thinking": {"accuracy/set/sums": f, "cut": {"value": 0.44}}} for f in found)
    paired = paired_difference(Sample.of([1] * n, [1] * n), Sample.of([0] * n, [1] * n), seed=1, rate=True)
    assert paired["value"] == -1
    changes = {"thinking": {"accuracy/set/sums": paired}}
    result = {"modes": ["thinking"], "base": base, "tuned": tuned, "difference": changes, "lengths": {}, "shipped": []}
    assert verdict(result)[0] == f"reasoning questions: {said}"


def rendered(result, width) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(score_table(result))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_no_name_or_number_of_the_table_is_cut_at_80_and_120_columns(width):
    rows = [{"source": s, "mode": "thinking", "extra": 1.0} for s in ("openmath_sample", "finetome_sample")]
    text = rendered(run(without_answers, validation=rows), width)
    assert "openmath_sample" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for words in ("reasoning questions with thinking", "say without thinking", "keeps to its mode with thinking", "KL, knowledge",
                  "100%", "-100 [-100, -83]"):  # fmt: skip
        assert words in text


def test_the_table_has_no_row_twice_and_none_that_is_zero_for_both():
    text = rendered(run(perfect), 80)
    assert text.count("reasoning questions with thinking") == 1
    assert "cut by the token limit" not in text


def test_the_base_is_asked_once_and_its_replies_are_used_again_unless_the_file_is_damaged(tokenizer, tmp_path):
    model, console = models.tuned(tokenizer), Console(file=io.StringIO())

    def scored(**changes):
        settings = {"seed": 1, "max_new_tokens": 6, "console": console, "cache": tmp_path} | changes
        result = evaluate(model, tokenizer, SUMS[:4], CHAT[:2], PROBES, **settings)
        return {key: value for key, value in result.items() if key != "seconds"}

    def stored():
        return {file: file.read_bytes() for file in tmp_path.iterdir()}

    fresh = scored()
    assert len(stored()) == 4  # replies and greedy answers, in two modes
    for file, content in stored().items():
        file.write_bytes(content.replace(b'"answer": "', b'"answer": "x').replace(b"1", b"2"))
    damaged = stored()
    assert scored() == fresh
    repaired = stored()
    assert all(repaired[file] != content for file, content in damaged.items())  # asked again
    assert scored() == fresh
    assert stored() == repaired
    scored(seed=2)
    assert len(list(tmp_path.iterdir())) == 8


def test_the_checksum_of_a_base_is_the_same_under_every_adapter_and_another_for_other_weights(tokenizer):
    import torch

    one, other = (models.tuned(tokenizer, adapter_works=works) for works in (True, False))
    assert checksum(one) == checksum(other)
    with torch.no_grad():
        one.get_base_model().model.embed_tokens.weight[7, 3] += 1
    assert checksum(one) != checksum(other)


def test_logits_take_half_of_the_free_memory_at_most():
    assert logits_at_once(float("inf")) == LOGITS
    assert logits_at_once(1e9) * 8 <= 0.5e9


def test_a_model_without_an_adapter_is_refused(tokenizer):
    with pytest.raises(ToolkitError, match="needs a PeftModel"):
        evaluate(models.tuned(tokenizer).get_base_model(), tokenizer, SUMS)


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "gemma3", "smollm2", "qwen3_thinking_2507"])
def test_every_family_is_evaluated_in_the_modes_it_has(name, family, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family(name))
    base = AutoModelForCausalLM.from_pretrained(family(name), dtype="float32")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    console = Console(file=io.StringIO())
    result = evaluate(model, tokenizer, SUMS[:3], CHAT[:1], PROBES, max_new_tokens=4, console=console, cache=tmp_path)
    assert result["modes"] == ["thinking" if "thinking" in name else "non_thinking"]
    assert result["difference"]["forgetting"]["kl"]["value"] == pytest.approx(0.0, abs=1e-6)


def test_a_mix_in_somebody_s_own_notebook_gives_the_held_out_rows_and_the_questions_among_them():
    mixed = compile_mix(recipes.load("data_recipes/pocket.yaml", ["data.budget=3000", "data.validation_size=8"]))
    given = from_mix(mixed)
    assert [row["source"] for row in given["validation"]] == [row.source for row in mixed.validation]
    assert all(0 < row["prompt_length"] < len(row["input_ids"]) for row in given["validation"])
    answered = [row for row in mixed.validation if row.mode == "thinking"]
    assert [q["expected_answer"] for q in given["questions"]] == [r.conversation["expected_answer"] for r in answered]
    assert {q["messages"][-1]["role"] for q in given["questions"]} == {"user"}


def test_without_questions_the_ones_that_ship_are_asked(tokenizer, tmp_path):
    model, console = models.tuned(tokenizer), Console(file=io.StringIO())
    result = evaluate(model, tokenizer, probes=[], steps=1, max_new_tokens=2, console=console, cache=tmp_path)
    assert {m for m in result["tuned"]["thinking"] if "set" in m} == {"accuracy/set/sums", "accuracy/set/chat"}
    assert {len(values) for values in result["per_question"]["thinking"]["tuned"]["accuracy"]} == {16}


# --- questions of a recipe


def recipe_with(folder, questions: list[dict], rows: list[dict] = (), **data):
    """A recipe whose training rows and questions lie in files of `folder`."""
    rows = rows or [{"query": f"Which word is number {i}?", "response": f"Word {i}."} for i in range(30)]
    for name, content in (("rows", rows), ("asked", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    source = {"path": str(folder / "rows.jsonl"), "turns": data.pop("turns", "last")}
    data = {"sources": [source], "validation_size": 3, "duplicates": "keep"} | data
    asked = {"questions": [{"path": str(folder / "asked.jsonl"), "max_rows": 4}]} if questions else {}
    values = {"name": "asks", "data": data, "model": {"model_name": "pocket"}, "evaluate": asked}
    return recipes.from_dict(values)


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path / "out"))
    return tmp_path


def test_the_seed_of_a_run_does_not_decide_which_questions_of_a_larger_set_it_is_asked(outputs):
    asked = [{"problem": f"{i} + 1?", "expected_answer": str(i + 1)} for i in range(50)]
    rows = [{"query": q["problem"], "response": q["expected_answer"]} for q in asked]
    found, dropped = [], []
    for seed in (1, 2):
        recipe = recipe_with(outputs, asked, rows, seed=seed)
        mixed = compile_mix(recipe)
        (chosen, _) = questions_of(recipe, mixed)
        found.append(chosen)
        dropped.append({entry["row"] for entry in mixed.quarantine if entry["reason"] == "contaminated"})
        held = {row.number for row in mixed.validation}
        assert dropped[-1] | held >= {int(q["expected_answer"]) for q in chosen}
    assert found[0] == found[1]
    assert len(found[0]) == 4


@pytest.mark.parametrize("decontaminate", [True, False])
@pytest.mark.parametrize(("row", "why"), [
    ({"problem": "What is that?", "expected_answer": None}, "'expected_answer' is null"),
    ({"problem": "", "expected_answer": "5"}, "blank"),
])  # fmt: skip
def test_a_malformed_question_is_named_before_anything_trains(outputs, row, why, decontaminate):
    asked = [{"problem": f"{i}?", "expected_answer": str(i)} for i in range(2)] + [row]
    with pytest.raises(ToolkitError, match=rf"asked\.jsonl, row 3: .*{why}"):
        compile_mix(recipe_with(outputs, asked, decontaminate=decontaminate))


def test_a_question_without_an_expected_answer_is_named_before_anything_trains(outputs):
    asked = [{"query": "1?", "response": "one", "expected_answer": answer} for answer in ("1", "")]
    with pytest.raises(ToolkitError, match=r"asked\.jsonl, row 2: .*expected_answer"):
        compile_mix(recipe_with(outputs, asked))


def talk(*contents: str, **more) -> dict:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": turns, **more}


def test_a_typed_switch_is_no_part_of_a_question_and_training_rows_that_carry_one_still_ask_the_same(outputs):
    row = talk("/think What is 2 + 2?", "4", "And 3 + 3? /no_think", "6", expected_answer="6")
    asked = [m["content"] for m in as_question(row, "sums")["messages"]]
    assert asked == ["What is 2 + 2?", "4", "And 3 + 3?"]
    rows = [{"query": f"{i} + {i}? /no_think", "response": str(2 * i)} for i in range(30)]
    mixed = compile_mix(recipe_with(outputs, [{"problem": "7 + 7? /think", "expected_answer": "14"}], rows))
    assert [(entry["row"], entry["reason"]) for entry in mixed.quarantine] == [(8, "contaminated")]


CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "w"}}]}
TOOLED = [
    talk("Weather?", "Sunny.", tools=[{"name": "w"}], expected_answer="Sunny"),
    {"messages": [talk("Weather?")["messages"][0], CALL, {"role": "tool", "content": "5"},
                  {"role": "assistant", "content": "5."}], "expected_answer": "5"},
]  # fmt: skip


@pytest.mark.parametrize("row", TOOLED)
def test_a_question_that_needs_tools_is_refused_in_a_set_and_left_out_of_those_from_a_mix(outputs, row):
    with pytest.raises(ToolkitError, match=r"asked\.jsonl, row 1: .*tool"):
        compile_mix(recipe_with(outputs, [row]))
    rows = [json.loads(json.dumps(row).replace("Weather?", f"Weather {i}?")) for i in range(20)]
    assert from_mix(compile_mix(recipe_with(outputs, [], rows)))["questions"] is None


def test_only_the_example_that_ends_a_conversation_is_asked_for_its_expected_answer(outputs):
    rows = [
        talk(f"Think of {i}.", "Done.", "Double it.", f"It is {2 * i}.", expected_answer=str(2 * i)) for i in range(30)
    ]
    mixed = compile_mix(recipe_with(outputs, [], rows, turns="each"))
    assert (len(mixed.validation), len(from_mix(mixed)["questions"])) == (6, 3)
    assert {len(question["messages"]) for question in from_mix(mixed)["questions"]} == {3}
    for row in rows:
        row["messages"][-1]["content"] += " word" * 5000  # too long, so that only the earlier turn is held out
    mixed = compile_mix(recipe_with(outputs, [], rows, turns="each"))
    assert (len(mixed.validation), from_mix(mixed)["questions"]) == (3, None)
