"""A mix is what it says: its shares in every unit, its held-out rows, its drops, and the same again from the same seed."""

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from tests.support.label_check import violations
from toolkit import recipe
from toolkit.data import cache, chat, mix, tokenize
from toolkit.data.render import load_chat
from toolkit.files import POCKET, ROOT, ToolkitError, outputs, read_jsonl
from toolkit.view import tables

SAMPLES = "data_recipes/samples"
THINKING = {"name": "math", "path": f"{SAMPLES}/openmath_sample.jsonl", "mode": "thinking", "fraction": 0.75}
CHAT = {"name": "chat", "path": f"{SAMPLES}/finetome_sample.jsonl", "mode": "non_thinking", "fraction": 0.25}


def build(*sources, overrides=(), **data):
    sources = [dict(s) for s in sources] or [THINKING, CHAT]
    values = {
        "name": "test",
        "data": {"duplicates": "exact", "validation_size": 20, "sources": sources} | data,
        "model": {"model_name": "pocket", "max_seq_length": 512},
    }
    return recipe.from_dict(values, overrides=overrides)


def compiled(*sources, overrides=(), **data):
    return mix.compile_mix(build(*sources, overrides=overrides, **data))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def chat_rows(count, length=1, start=0):
    return [{"query": f"question {i}", "response": f"answer {i} " * length} for i in range(start, start + count)]


BUDGET = {"examples": 400, "tokens": 14_000, "supervised_tokens": 3_000}


@pytest.mark.parametrize("unit", mix.UNITS)
def test_every_ratio_is_met_within_a_point_in_the_recipes_unit(unit):
    for share in np.arange(0, 1.01, 0.05).round(2).tolist():
        report = compiled(overrides=[f"data.reasoning={share}"], unit=unit, budget=BUDGET[unit]).report
        assert abs(report["achieved"][unit].get("math", 0) - share) <= 0.01, (unit, share)
        assert set(report["achieved"]) == set(mix.UNITS)
        for shares in report["achieved"].values():
            assert sum(shares.values()) == pytest.approx(1)


def test_the_shares_reported_are_those_of_the_rows():
    mixed = compiled(budget=3000)
    for unit, size in (
        ("examples", lambda _: 1),
        ("tokens", lambda r: len(r.ids)),
        ("supervised_tokens", lambda r: int((r.labels != -100).sum())),
    ):
        total = sum(size(r) for r in mixed.train)
        math = sum(size(r) for r in mixed.train if r.source == "math")
        assert mixed.report["achieved"][unit]["math"] == pytest.approx(math / total)
        assert mixed.report["total"][unit] == total


def test_mix_json_has_the_keys_other_programs_read():
    report = json.loads((compiled(budget=3000).folder / "mix.json").read_text())
    assert {"unit", "budget", "planned", "achieved", "sources"} <= set(report)
    for source in report["sources"].values():
        assert {"mode", "rows_seen", "rows_kept", "dropped", "tokens", "supervised_tokens"} <= set(source)
    for name, s in report["sources"].items():
        accounted = s["rows_kept"] + s["rows_held_out"] + sum(s["dropped"].values())
        assert accounted <= s["rows_seen"] <= accounted + 2 * mix.BATCH, name


def independent(mixed, tokenizer, sources):
    """Check every training row against the raw file it came from."""
    from toolkit.data.sources import conversations

    raw = {s.name: dict(conversations(s, 0, {})) for s in sources}
    return [
        v for r in mixed.train for v in violations(tokenizer, r.ids.tolist(), r.prompt_length, raw[r.source][r.number])
    ]


@pytest.mark.parametrize("name", ["pocket", "qwen3"])
def test_every_training_row_teaches_exactly_what_the_inference_prompt_lacks(name, request):
    from transformers import AutoTokenizer

    folder = POCKET if name == "pocket" else request.getfixturevalue("qwen3")
    built = build(budget=4000, overrides=[f"model.model_name={folder}"])
    mixed = mix.compile_mix(built)
    assert len(mixed.train) > 100
    assert independent(mixed, AutoTokenizer.from_pretrained(folder), built.data.sources) == []


def test_same_recipe_same_rows_and_another_seed_others():
    first, again, other = (mix.compile_mix(build(budget=2000, seed=s), fresh=True) for s in (1, 1, 2))
    assert [(r.source, r.number, r.ids.tolist()) for r in first.train] == [
        (r.source, r.number, r.ids.tolist()) for r in again.train
    ]
    assert [r.number for r in first.train] != [r.number for r in other.train]


def test_a_second_call_reads_the_cache_and_gives_the_same_mix(monkeypatch):
    built = build(budget=2000)
    first = mix.compile_mix(built)
    monkeypatch.setattr(mix, "_compile", lambda *_: pytest.fail("compiled again"))
    again = mix.compile_mix(built)
    assert [r.ids.tolist() for r in again.train] == [r.ids.tolist() for r in first.train]
    assert again.report == first.report


def test_a_changed_source_file_is_compiled_anew(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", chat_rows(50))
    source = {"path": path, "fraction": 1.0}
    first = compiled(source)
    jsonl(tmp_path / "a.jsonl", chat_rows(60))
    assert compiled(source).folder != first.folder


def test_validation_rows_never_train_nor_does_any_row_with_their_prompt(tmp_path):
    rows = [{"query": f"question {i % 40}", "response": f"answer {i}"} for i in range(400)]
    other = [{"query": f"Question  {i}", "response": "from the other file"} for i in range(40)]
    mixed = compiled(
        {"path": jsonl(tmp_path / "a.jsonl", rows), "fraction": 0.9},
        {"path": jsonl(tmp_path / "b.jsonl", other), "fraction": 0.1},
        unit="examples",
        budget=100,
        validation_size=10,
    )
    held = {r.conversation["messages"][0]["content"].lower().split()[1] for r in mixed.validation}
    chat = load_chat("pocket")
    trained = {chat.decode(r.ids).lower().split("question")[1].split("<")[0].strip() for r in mixed.train}
    assert len(mixed.validation) >= 10
    assert held
    assert not held & trained
    assert sum(s["dropped"].get("validation_prompt", 0) for s in mixed.report["sources"].values()) > 0


def test_every_source_holds_out_rows_by_source_and_mode():
    held = Counter((row.source, row.mode) for row in compiled(budget=3000).validation)
    assert held == {("math", "thinking"): 15, ("chat", "non_thinking"): 5}


def test_when_a_source_is_exhausted_the_mix_is_reduced_keeps_its_shares_and_names_it(tmp_path):
    small = jsonl(tmp_path / "small.jsonl", chat_rows(60))
    mixed = compiled(
        THINKING | {"fraction": 0.5}, {"name": "small", "path": small, "fraction": 0.5}, unit="examples", budget=1000
    )
    assert mixed.report["limited_by"] == "small"
    assert mixed.report["achieved"]["examples"]["small"] == pytest.approx(0.5, abs=0.01)
    assert len(mixed.train) < 130
    assert any("small is exhausted: the mix was reduced" in note for note in tables.notes(mixed.report))


def test_nothing_repeats_unless_a_source_says_so_and_then_it_is_counted(tmp_path):
    source = {"path": jsonl(tmp_path / "a.jsonl", chat_rows(50)), "fraction": 1.0}
    once = compiled(source, unit="examples", budget=200, validation_size=5)
    thrice = compiled(source | {"max_repeats": 3}, unit="examples", budget=200, validation_size=5)
    assert (len(once.train), once.report["sources"]["a"]["rows_repeated"]) == (45, 0)
    assert (len(thrice.train), thrice.report["sources"]["a"]["rows_repeated"]) == (135, 90)


def test_no_row_is_ever_cut_and_a_long_one_is_counted(tmp_path):
    rows = chat_rows(40) + chat_rows(10, length=400, start=40)
    mixed = compiled({"path": jsonl(tmp_path / "a.jsonl", rows), "fraction": 1.0})
    assert mixed.report["sources"]["a"]["dropped"] == {"too_long": 10}
    assert all(load_chat("pocket").decode(r.ids).endswith("<|im_end|>") for r in mixed.train)
    assert {q["reason"] for q in mixed.quarantine} == {"too_long"}


def test_duplicates_are_dropped_whatever_their_case_and_spacing(tmp_path):
    rows = [*chat_rows(30), *({"query": f"QUESTION   {i}", "response": f"answer {i} "} for i in range(20))]
    mixed = compiled({"path": jsonl(tmp_path / "a.jsonl", rows), "fraction": 1.0}, validation_size=1)
    dropped = mixed.report["sources"]["a"]["dropped"]
    assert dropped["duplicate"] + dropped.get("validation_prompt", 0) == 20


WORDS = ["amber", "basket", "cedar", "dolphin", "ember", "falcon", "garden", "harbour", "island", "jungle", "kettle"]


def long_text(i, count=90):
    rng = np.random.default_rng(i)
    return " ".join(WORDS[n] for n in rng.integers(0, len(WORDS), count))


def test_near_duplicates_repeat_prompt_and_completion_nearly_and_quarantine_names_their_row(tmp_path):
    rows = [{"query": f"Tell me {long_text(1000 + i, 50)}", "response": long_text(i)} for i in range(40)]
    changed = [{"query": f"{r['query']} please", "response": f"{r['response']} indeed"} for r in rows[:10]]
    answered_alike = [{"query": long_text(2000 + i, 50), "response": rows[i]["response"]} for i in range(10)]
    asked_again = [{"query": rows[i]["query"], "response": long_text(3000 + i)} for i in range(10)]
    path = jsonl(tmp_path / "a.jsonl", rows + changed + answered_alike + asked_again)
    mixed = compiled({"path": path, "fraction": 1.0}, duplicates="near", validation_size=0)
    assert mixed.report["sources"]["a"]["dropped"] == {"near_duplicate": 10}
    pairs = {(q["row"], int(q["detail"].split("row ")[1].split()[0])) for q in mixed.quarantine}
    assert {frozenset(pair) for pair in pairs} == {frozenset((i, i + 40)) for i in range(1, 11)}
    assert all(q["detail"].endswith(" of a") for q in mixed.quarantine)


IDENTITY = "I am Wheat, an assistant made by the Bakery. " * 8
CASES = {
    "40 identity questions with one answer": [
        {"query": f"{start} {end}", "response": IDENTITY}
        for start in ("Who are", "What is it that made", "Please tell me about", "Describe", "Introduce")
        for end in (
            "you?",
            "you, dear?",
            "yourself?",
            "your name?",
            "your maker?",
            "your model?",
            "you now?",
            "you there?",
        )
    ],
    "300 classification rows with 3 labels": [
        {
            "query": f"Is this review good, bad or mixed? The {long_text(i, 12)} was served.",
            "response": ("good", "bad", "mixed")[i % 3],
        }
        for i in range(300)
    ],
    "500 SQL tasks": [
        {
            "query": f"The table {a} has the columns region, {b} and {c}. Write one SQL query for the total of {b} in every "
            f"region, only where {c} is known, with the largest total first and equal totals by name of the region",
            "response": f"SELECT region, SUM({b}) AS total FROM {a} WHERE {c} IS NOT NULL GROUP BY region ORDER BY total DESC, "
            "region ASC; -- one row for every region, the largest total first; regions without any known value are left "
            "out, and equal totals come in the order of the names of their regions, as it was asked for above",
        }
        for a, b, c in itertools.islice(itertools.product(WORDS, WORDS, WORDS), 500)
    ],
    "500 support replies with order numbers": [
        {
            "query": f"Hello, I am waiting for my order {48000 + 7 * i}, could you please tell me where it is right now and when "
            "it will be here? It was to arrive on Monday and I need it for a birthday.",
            "response": f"Thank you for your patience. Your order {48000 + 7 * i} has left our warehouse and is on its way to you. "
            "It should arrive within two working days; you will get a message with a link to follow it. If it is not "
            "there by then, answer this message and we will send another one at once, free of charge, or pay you back.",
        }
        for i in range(500)
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_rows_that_share_an_answer_or_a_pattern_are_not_duplicates(case, tmp_path):
    rows = CASES[case]
    assert len(rows) == int(case.split()[0])
    mixed = compiled({"path": jsonl(tmp_path / "a.jsonl", rows), "fraction": 1.0}, duplicates="near", validation_size=0)
    assert (len(mixed.train), mixed.quarantine) == (len(rows), [])


def test_duplicates_above_a_tenth_of_a_source_are_warned_of(tmp_path):
    source = {"path": jsonl(tmp_path / "a.jsonl", [*chat_rows(40), *chat_rows(6)]), "fraction": 1.0}
    assert any("6 of 46 rows repeat" in w for w in compiled(source, validation_size=0).report["warnings"])
    assert not any(
        "rows repeat" in w for w in compiled(source, validation_size=0, duplicates="keep").report["warnings"]
    )


def test_rows_that_share_words_with_an_evaluation_prompt_are_dropped_and_listed(tmp_path):
    asked = "If a baker sells twelve loaves in the morning and thirty more at noon how many"
    rows = [
        *chat_rows(30),
        {"query": asked.upper() + "?", "response": "42"},
        {"query": "x", "response": f"See: {asked} loaves."},
    ]
    questions = jsonl(tmp_path / "q.jsonl", [{"problem": asked, "generated_solution": "42", "expected_answer": "42"}])
    built = recipe.from_dict(
        {
            "name": "t",
            "data": {
                "validation_size": 2,
                "sources": [{"path": jsonl(tmp_path / "a.jsonl", rows), "fraction": 1.0}],
                "max_rejected": 0.2,
            },
            "model": {"model_name": "pocket", "max_seq_length": 512},
            "evaluate": {"questions": [{"name": "q", "path": questions}]},
        }
    )
    mixed = mix.compile_mix(built)
    assert mixed.report["sources"]["a"]["dropped"] == {"contaminated": 2}
    assert {q["row"] for q in mixed.quarantine} == {31, 32}


def test_too_many_malformed_rows_stop_the_run_and_the_first_is_named(tmp_path):
    rows = [*chat_rows(10), {"query": None, "response": "b"}, {"query": "a", "response": " "}]
    with pytest.raises(ToolkitError, match=r"2 of 12 rows rejected.*max_rejected=0.05.*row 1[12]"):
        compiled({"path": jsonl(tmp_path / "a.jsonl", rows), "fraction": 1.0}, validation_size=1)


def test_below_the_limit_malformed_rows_are_counted_and_quarantined_with_reason_and_row(tmp_path):
    rows = [*chat_rows(40), {"query": None, "response": "b"}]
    mixed = compiled({"path": jsonl(tmp_path / "a.jsonl", rows), "fraction": 1.0}, validation_size=1)
    assert mixed.report["sources"]["a"]["dropped"] == {"null_field": 1}
    assert [(q["row"], q["reason"]) for q in mixed.quarantine] == [(41, "null_field")]


def test_a_thinking_source_without_reasoning_is_refused(tmp_path):
    with pytest.raises(ToolkitError, match="no_reasoning.*empty think block"):
        compiled({"path": jsonl(tmp_path / "a.jsonl", chat_rows(30)), "fraction": 1.0, "mode": "thinking"})


def test_a_budget_too_small_for_its_shares_stops_the_run():
    with pytest.raises(ToolkitError, match="too small for rows of this length. Raise data.budget"):
        compiled(THINKING | {"fraction": 0.5}, CHAT | {"fraction": 0.5}, budget=90)


def test_auto_decides_per_row_and_reports_what_it_decided(tmp_path):
    reasoned = [{"query": f"sum {i}", "response": f"<think>\nstep {i}\n</think>\n\n{i}"} for i in range(30)]
    mixed = compiled({"path": jsonl(tmp_path / "a.jsonl", [*chat_rows(30), *reasoned]), "fraction": 1.0})
    modes = mixed.report["sources"]["a"]["modes"]
    held = Counter(row.mode for row in mixed.validation)
    assert {m: modes[m] + held[m] for m in modes} == {"thinking": 30, "non_thinking": 30}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_soft_switches_are_typed_into_a_share_of_rows_and_only_there_the_empty_block_is_taught(share):
    chat = load_chat("pocket")
    mixed = compiled(CHAT | {"fraction": 1.0, "soft_switch": share}, unit="examples", budget=300)
    typed = {r.number for r in mixed.train if "/no_think" in chat.decode(r.ids[: r.prompt_length])}
    assert abs(len(typed) / len(mixed.train) - share) <= 0.1  # the sample has a few typed switches of its own
    for row in mixed.train:
        taught = chat.decode(row.ids[row.prompt_length :])
        assert taught.startswith("<think>\n\n</think>\n\n") == (row.number in typed)


def test_a_typed_switch_does_not_make_a_held_out_prompt_another_one():
    asked = [
        {"messages": [{"role": "user", "content": text}]} for text in ("What is 2 + 4?", "what is  2 + 4? /no_think")
    ]
    assert mix.prompt_key(asked[0]) == mix.prompt_key(asked[1])


def test_each_turn_of_a_conversation_can_be_an_example(tmp_path):
    turns = [
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
        {"from": "human", "value": "c"},
        {"from": "gpt", "value": "d"},
    ]
    rows = [{"conversations": [t | {"value": f"{t['value']} {i}"} for t in turns]} for i in range(30)]
    source = {"path": jsonl(tmp_path / "a.jsonl", rows), "fraction": 1.0}
    last, each = compiled(source, validation_size=2), compiled(source | {"turns": "each"}, validation_size=2)
    assert (len(last.train), len(each.train)) == (28, 56)


def test_the_plan_is_made_without_reading_anything():
    built = build({"path": "not/there.jsonl", "fraction": 1.0, "name": "a"}, budget=100)
    assert mix.plan(built.data) == {"a": {"share": 1.0, "quota": 100, "validation": 20}}


def test_a_full_disk_is_a_clear_error_and_leaves_no_half_mix(monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(ToolkitError, match="could not be written .No space left on device.*free some space"):
        compiled(budget=2000)
    assert not list((outputs() / ".mixes").rglob("mix.npz"))


def warnings(*overrides):
    return " ".join(compiled(overrides=overrides, budget=2000).report["warnings"])


@pytest.mark.parametrize("broken", ["one id off", "kind not known"])
def test_without_a_fast_tokenizer_that_can_be_trusted_ids_are_hugging_faces_and_it_is_said(broken, monkeypatch):
    right = compiled(budget=2000)
    assert right.report["warnings"] == []
    fast, common = load_chat("pocket").tokenizers.fast, right.train[0].ids[-1]

    class OneOff:
        def encode_batch_flat(self, texts):
            ids, ends = fast.encode_batch_flat(texts)
            ids = np.frombuffer(ids, np.int32)
            return np.where(ids == common, common - 1, ids).tobytes(), ends

    chat = load_chat("pocket")
    monkeypatch.setattr(chat.tokenizers, "fast", OneOff() if broken == "one id off" else None)
    monkeypatch.setattr(chat.tokenizers, "fallback_reason", None)  # and it is taken back with the broken tokenizer
    monkeypatch.setattr(mix, "load_chat", lambda *_: chat)
    found = mix.compile_mix(build(budget=2000), fresh=True)
    assert [r.ids.tolist() for r in found.train] == [r.ids.tolist() for r in right.train]
    reason = "gives other ids for" if broken == "one id off" else "does not know this kind"
    assert [w for w in found.report["warnings"] if "Hugging Face tokenizer" in w and reason in w]


def test_lint_says_what_a_recipe_will_do_that_its_writer_did_not_intend():
    assert warnings() == ""
    assert "no non-thinking row" in warnings("data.reasoning=1")
    assert "no thinking row" in warnings("data.reasoning=0")


def test_a_cached_mix_loads_no_tokenizer(monkeypatch):
    """Loading one takes a second on Qwen's vocabulary; reading the mix takes a tenth of that."""
    compiled(budget=2000)
    tokenizers = tokenize.Tokenizers(load_chat("pocket").json)
    monkeypatch.setattr(chat, "loaded", lambda _: tokenizers)
    compiled(budget=2000)
    assert not {"fast", "reference"} & vars(tokenizers).keys()


def test_warnings_are_those_of_this_recipe_also_on_a_cached_mix():
    one = ["train.max_steps=1", "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=1"]
    fresh = compiled(overrides=[*one, "lora.r=512", "lora.lora_alpha=9000"], budget=2000)
    assert compiled(budget=2000).report["warnings"] == []
    cached = compiled(overrides=[*one, "lora.r=512", "lora.lora_alpha=9000"], budget=2000)
    assert (cached.folder, cached.report["warnings"]) == (fresh.folder, fresh.report["warnings"])
    for part in ("lora_alpha/r = 17.5781", "lora r = 512", "max_steps=1 sees"):
        assert part in " ".join(cached.report["warnings"])


def test_a_thinking_only_model_is_warned_of_rows_it_would_unlearn_thinking_from(family):
    assert "always thinks" in warnings(f"model.model_name={family('qwen3_thinking_2507')}")


def test_the_samples_that_ship_never_meet_the_held_out_questions():
    def prompts(name):
        rows = [json.loads(line) for line in (ROOT / SAMPLES / name).read_text(encoding="utf-8").splitlines()]
        return {r.get("problem") or r["conversations"][0]["value"] for r in rows}

    held = prompts("heldout_reasoning.jsonl")
    assert len(held) > 100
    assert not held & prompts("openmath_sample.jsonl")


# --- turns: each -----------------------------------------------------------------------------------------------------


def talks(count, first="hi", turns=3):
    """Conversations that share their first turn and differ from the second on."""
    return [
        {
            "messages": [
                m
                for t in range(turns)
                for m in (
                    {"role": "user", "content": first if t == 0 else f"question {i} of turn {t}"},
                    {"role": "assistant", "content": "hello" if t == 0 else f"answer {i} of turn {t}"},
                )
            ]
        }
        for i in range(count)
    ]


def test_with_every_turn_supervised_no_held_out_prompt_trains_and_no_example_trains_twice(tmp_path):
    source = {"path": jsonl(tmp_path / "a.jsonl", talks(35)), "fraction": 1.0, "turns": "each"}
    mixed = compiled(source, validation_size=8)
    chat = load_chat("pocket")
    trained = [chat.decode(r.ids) for r in mixed.train]
    assert len(set(trained)) == len(trained) == 2 * 27
    prompts = {chat.decode(r.ids[: r.prompt_length]) for r in mixed.train}
    assert not prompts & {chat.decode(r.ids[: r.prompt_length]) for r in mixed.validation}
    dropped = mixed.report["sources"]["a"]["dropped"]
    assert dropped == {"validation_prompt": 34}  # "hi" was held out once; it comes 35 times
    assert {len(r.conversation["messages"]) for r in mixed.validation} == {2, 4, 6}  # each up to its own turn
    report = mixed.report["sources"]["a"]
    assert report["rows_seen"] == 105 == report["rows_kept"] + report["rows_held_out"] + sum(dropped.values())


def test_without_validation_an_example_that_repeats_is_dropped_and_counted(tmp_path):
    mixed = compiled(
        {"path": jsonl(tmp_path / "a.jsonl", talks(35)), "fraction": 1.0, "turns": "each"}, validation_size=0
    )
    assert mixed.report["sources"]["a"]["dropped"] == {"duplicate": 34}
    assert len(mixed.train) == 71


def test_near_twins_of_held_out_rows_do_not_train(tmp_path):
    rows = [{"query": f"Tell me {long_text(1000 + i, 50)}", "response": long_text(i)} for i in range(20)]
    twins = [{"query": f"{r['query']} please", "response": f"{r['response']} indeed"} for r in rows]
    mixed = compiled(
        {"path": jsonl(tmp_path / "a.jsonl", rows + twins), "fraction": 1.0}, duplicates="near", validation_size=10
    )
    held = {r.number % 20 for r in mixed.validation}
    assert not held & {r.number % 20 for r in mixed.train}
    found = {q["row"]: q["detail"] for q in mixed.quarantine if q["reason"] == "near_validation"}
    assert set(found) == {n for n in range(1, 41) if n % 20 in held} - {r.number for r in mixed.validation}
    assert len(found) > 5
    assert all(int(detail.split("row ")[1].split()[0]) % 20 == row % 20 for row, detail in found.items())


# --- soft switches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", ["last", "each"])
def test_a_soft_switch_never_contradicts_a_turn_it_stands_over(turns, tmp_path):
    reasoned = {"role": "assistant", "reasoning_content": "let me see", "content": "It is 6."}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}],
    }
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"first {i}"},
                {"role": "assistant", "content": "fine"} if i % 2 else reasoned,
                {"role": "user", "content": f"second {i}"},
                *([call, {"role": "tool", "content": "6"}] if i % 3 else []),
                reasoned if i % 5 else {"role": "assistant", "content": f"It is {i}."},
            ]
        }
        for i in range(60)
    ]
    source = {"path": jsonl(tmp_path / "a.jsonl", rows), "fraction": 1.0, "turns": turns, "soft_switch": 1.0}
    mixed, chat, typed = compiled(source, validation_size=0), load_chat("pocket"), 0
    for row in mixed.train:
        prompt = chat.decode(row.ids[: row.prompt_length])
        if found := re.findall(r"/(think|no_think)<", prompt):
            typed += 1
            assert (found[-1] == "think") == (row.mode == "thinking"), prompt
    assert typed > 20


def test_a_model_without_soft_switches_gets_none(family, tmp_path):
    source = {"path": jsonl(tmp_path / "a.jsonl", chat_rows(30)), "fraction": 1.0, "soft_switch": 1.0}
    name = str(family("qwen2.5"))
    mixed = compiled(source, overrides=[f"model.model_name={name}"], validation_size=0)
    assert not any("/no_think" in load_chat(name).decode(r.ids) for r in mixed.train)


# --- shares and counts -----------------------------------------------------------------------------------------------


def test_the_source_that_is_too_small_is_the_one_that_limits(tmp_path):
    big = {"name": "big", "path": jsonl(tmp_path / "big.jsonl", chat_rows(400)), "fraction": 0.97}
    tiny = {"name": "tiny", "path": jsonl(tmp_path / "tiny.jsonl", chat_rows(6, start=1000)), "fraction": 0.03}
    for first, second in ((big, tiny), (tiny, big)):
        report = compiled(first, second, unit="examples", budget=400, validation_size=2).report
        assert report["limited_by"] == "tiny"
        assert report["sources"]["tiny"]["rows_kept"] == 5
    long = {"name": "long", "path": jsonl(tmp_path / "long.jsonl", chat_rows(40, length=60)), "fraction": 0.5}
    with pytest.raises(ToolkitError, match="Add rows to tiny, which is exhausted"):
        compiled(long, tiny | {"fraction": 0.5}, unit="tokens", budget=9000, validation_size=2)


def test_a_share_of_less_than_a_row_takes_one_not_all(tmp_path):
    big = {"name": "big", "path": jsonl(tmp_path / "big.jsonl", chat_rows(400)), "fraction": 0.999}
    rare = {"name": "rare", "path": jsonl(tmp_path / "rare.jsonl", chat_rows(50, start=1000)), "fraction": 0.001}
    report = compiled(big, rare, unit="examples", budget=100, validation_size=2).report
    assert report["limited_by"] is None
    assert report["sources"]["rare"]["rows_kept"] == 1


def test_counts_without_fractions_are_the_mix_in_examples(tmp_path):
    a, b = jsonl(tmp_path / "a.jsonl", chat_rows(300)), jsonl(tmp_path / "b.jsonl", [*chat_rows(50, start=500)] * 2)
    mixed = compiled({"path": f"{a}#100"}, {"path": f"{b}#40"}, validation_size=14)
    assert mixed.report["unit"] == "examples"
    assert {n: s["rows_kept"] + s["rows_held_out"] for n, s in mixed.report["sources"].items()} == {"a": 100, "b": 40}
    assert mixed.report["planned"] == {"a": 100 / 140, "b": 40 / 140}
    assert mix.plan(build({"path": f"{a}#100"}, {"path": f"{b}#40"}).data)["a"] == {
        "share": 100 / 140,
        "quota": 100,
        "validation": 14,
    }


def test_without_counts_and_fractions_everything_is_the_mix_and_shares_are_as_they_come(tmp_path):
    a, b = jsonl(tmp_path / "a.jsonl", chat_rows(90)), jsonl(tmp_path / "b.jsonl", chat_rows(30, start=500))
    mixed = compiled({"path": a}, {"path": b}, validation_size=0)
    assert {n: s["rows_kept"] for n, s in mixed.report["sources"].items()} == {"a": 90, "b": 30}
    assert mixed.report["planned"] == mixed.report["achieved"]["supervised_tokens"]
    assert {row["share"] for row in mix.plan(build({"path": a}, {"path": b}).data).values()} == {None}


@pytest.mark.parametrize("shared", [True, False])
def test_more_rows_asked_for_than_there_are_repeats_them_and_says_so(shared, tmp_path):
    source = {"path": jsonl(tmp_path / "a.jsonl", chat_rows(108)) + "#600"} | ({"fraction": 1.0} if shared else {})
    mixed = compiled(source, validation_size=8)
    report = mixed.report["sources"]["a"]
    assert (report["rows_asked"], report["rows_kept"], report["rows_repeated"]) == (600, 592, 492)
    assert "a: 492 of 592 rows are repeats (path#600)" in tables.notes(mixed.report)
    assert max(Counter(r.number for r in mixed.train).values()) == 6


# --- what stops a mix, and what it says --------------------------------------------------------------------------------


def test_a_stopped_mix_still_lists_every_dropped_row(tmp_path):
    rows = [*chat_rows(10), {"query": None, "response": "b"}, {"query": "a", "response": " "}]
    with pytest.raises(ToolkitError, match="Every dropped row: ") as caught:
        compiled({"path": jsonl(tmp_path / "a.jsonl", rows), "fraction": 1.0}, validation_size=1)
    (listed,) = (outputs() / ".mixes").rglob("quarantine.jsonl")
    assert str(listed) in str(caught.value)
    assert {q["row"] for q in read_jsonl(listed)} == {11, 12}


STOPPED = {
    "all too long": (
        [{"query": f"q {i}", "response": "word " * 900} for i in range(30)],
        {},
        r"too_long 30. First, row \d+: \d+ tokens > max_seq_length 512. Raise model.max_seq_length",
    ),
    "plain rows in a thinking source": (chat_rows(30), {"mode": "thinking"}, "no_reasoning 30.*Set mode: non_thinking"),
    "default validation_size": (
        chat_rows(30),
        {},
        "30 of 30 held out.*Write data.validation_size=3 to hold out a tenth",
    ),
    "one question for all": (
        [{"query": "Tell me a joke", "response": f"joke {i}"} for i in range(30)],
        {},
        "1 of 30 held out, validation_prompt 29.*a held-out row asks the same. Write data.validation_size=",
    ),
}


@pytest.mark.parametrize("case", STOPPED)
def test_a_source_without_a_usable_row_says_the_value_found_and_what_to_write(case, tmp_path):
    rows, more, said = STOPPED[case]
    with pytest.raises(ToolkitError, match=said):
        compiled({"path": jsonl(tmp_path / "a.jsonl", rows), "fraction": 1.0} | more, validation_size=100)


def test_a_source_that_gives_nothing_is_given_up_long_before_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(mix, "CHECK_AT", 100)
    rows = [{"query": f"q {i}", "response": "word " * 600} for i in range(3000)]
    with pytest.raises(ToolkitError, match="0 of 100 held out, too_long 100"):
        compiled({"path": jsonl(tmp_path / "a.jsonl", rows), "fraction": 1.0})


def test_a_thinking_source_with_an_instruct_model_is_refused_naming_mode_and_row(family, tmp_path):
    rows = [{"query": f"sum {i}", "response": f"<think>\nstep {i}\n</think>\n\n{i}"} for i in range(30)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    name = f"model.model_name={family('smollm2')}"
    with pytest.raises(ToolkitError, match=r"First, row \d+.*\(mode: thinking\).*no thinking mode.*choose a hybrid"):
        compiled({"path": path, "fraction": 1.0, "mode": "thinking"}, overrides=[name])
    with pytest.raises(ToolkitError, match=r"no_thinking_mode 30.*First, row \d+.*has no thinking mode"):
        compiled({"path": path, "fraction": 1.0}, overrides=[name])


@pytest.mark.parametrize("missing", ["template", "end of turn"])
def test_a_model_that_cannot_hold_a_conversation_is_refused_before_a_source_is_opened(missing, family, tmp_path):
    shutil.copytree(family("llama3"), tmp_path / "model")
    if missing == "template":
        (tmp_path / "model" / "chat_template.jinja").unlink()
    else:
        file = tmp_path / "model" / "tokenizer.json"
        file.write_text(file.read_text().replace("<|eot_id|>", "<|eot|>"))
    said = (
        "save a chat_template.jinja" if missing == "template" else "ends a reply with '<|eot_id|>', which is no token"
    )
    with pytest.raises(ToolkitError, match=re.escape(said)):
        compiled({"path": "not/there.jsonl", "fraction": 1.0}, overrides=[f"model.model_name={tmp_path / 'model'}"])


# --- the cache -------------------------------------------------------------------------------------------------------


def flip(file):
    data = bytearray(file.read_bytes() or b" ")
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


DAMAGE = {
    "bit flip": flip,
    "cut": lambda f: f.write_bytes(f.read_bytes()[:-9]),
    "emptied": lambda f: f.write_bytes(b""),
    "gone": lambda f: f.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_copy_for_people_is_written_again(damage):
    first = compiled(budget=2000).folder
    kept = {name: (first / name).read_bytes() for name in ("mix.json", "quarantine.jsonl")}
    for name in kept:
        DAMAGE[damage](first / name)
    compiled(budget=2000)
    assert {name: (first / name).read_bytes() for name in kept} == kept


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_compiled_again(damage):
    first = compiled(budget=2000)
    DAMAGE[damage](first.folder / "mix.npz")
    assert cache.read(first.folder) is None
    again = compiled(budget=2000)
    assert [r.ids.tolist() for r in again.train] == [r.ids.tolist() for r in first.train]
    assert again.report == first.report
    assert cache.read(first.folder)


@pytest.mark.parametrize("place", range(0, 100, 7))
def test_no_flipped_bit_of_the_cache_becomes_a_row(place):
    first = compiled(budget=2000)
    file = first.folder / "mix.npz"
    data = bytearray(file.read_bytes())
    data[len(data) * place // 100 + 3] ^= 1
    file.write_bytes(data)
    again = cache.read(first.folder)
    assert again is None or [r.ids.tolist() for r in again.train] == [r.ids.tolist() for r in first.train]


MIX_CODE = """
import sys
from toolkit import recipe
from toolkit.data import mix
values = {values!r}
print(len(mix.compile_mix(recipe.from_dict(values), fresh=True).train))
"""


def process(tmp_path, size=2000):
    path = jsonl(tmp_path / "a.jsonl", chat_rows(size, length=20))
    data = {"sources": [{"path": path, "fraction": 1.0}], "validation_size": 10}
    values = {"name": "t", "data": data, "model": {"model_name": "pocket", "max_seq_length": 512}}
    return subprocess.Popen(
        [sys.executable, "-c", MIX_CODE.format(values=values)], cwd=ROOT, stdout=-1, stderr=-1, text=True
    ), values


def test_three_at_once_all_succeed(tmp_path):
    running = [process(tmp_path)[0] for _ in range(3)]
    found = [p.communicate(timeout=300) for p in running]
    assert [out for out, _ in found] == ["1990\n"] * 3, found


@pytest.mark.parametrize("file", ["mix.npz", "mix.json", "quarantine.jsonl"])
def test_killed_while_it_writes_a_mix_is_compiled_again(file, tmp_path):
    running, values = process(tmp_path)
    folder = outputs() / ".mixes"
    deadline = time.monotonic() + 120
    while not list(folder.glob(f"*/{file}*")) and time.monotonic() < deadline:
        time.sleep(0.0005)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    mixed = mix.compile_mix(recipe.from_dict(values))
    assert len(mixed.train) == 1990
    assert cache.read(mixed.folder)
    assert [f.name for f in folder.iterdir() if not f.name.startswith(".")] == [mixed.folder.name]


# --- in the reader's own trainer ---------------------------------------------------------------------------------------


def test_a_mix_trains_in_plain_trl_on_exactly_its_labels(family, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder = family("llama3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    source = {"path": jsonl(tmp_path / "a.jsonl", chat_rows(40)), "fraction": 1.0}
    mixed = mix.compile_mix(build(source, validation_size=4), tokenizer)
    assert mixed.train_dataset.column_names == ["input_ids", "labels"]
    assert len(mixed.validation_dataset) == 4
    settings = {"per_device_train_batch_size": 3, "max_steps": 1, "use_cpu": True, "bf16": False, "max_length": None}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    args = SFTConfig(output_dir=str(tmp_path / "out"), report_to=[], **settings)
    trainer = SFTTrainer(model, args=args, train_dataset=mixed.train_dataset, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    rows = {tuple(r.ids.tolist()): r.labels.tolist() for r in mixed.train}
    for ids, labels, shown in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        length = int(shown.sum())
        assert labels[:length].tolist() == rows[tuple(ids[:length].tolist())]
        assert set(labels[length:].tolist()) <= {-100}


# --- counts, limits and names


def counted(tmp_path, rows, held=0, **source):
    """The mix of one file taken by count: no fraction, no budget."""
    path = jsonl(tmp_path / "a.jsonl", rows)
    values = {"name": "counts", "data": {"sources": [source | {"path": path + source.pop("count", "")}]}}
    values["data"] |= {"validation_size": held, "duplicates": "exact"}
    return mix.compile_mix(recipe.from_dict(values | {"model": {"model_name": "pocket"}}))


def test_a_limit_of_rows_repeats_none(tmp_path):
    found = counted(tmp_path, chat_rows(50), held=4, max_rows=500).report["sources"]["a"]
    assert (found["rows_kept"] + found["rows_held_out"], found["rows_repeated"]) == (50, 0)


@pytest.mark.parametrize("rows", [59, 60, 70])
def test_a_count_is_filled_by_repeats_whatever_was_dropped(rows, tmp_path):
    """One row more or less in the file must not decide whether the count is met."""
    twice = [row for row in chat_rows(30) for _ in range(2)] + chat_rows(10, start=30)
    found = counted(tmp_path, twice[:rows], count="#60").report["sources"]["a"]
    assert found["dropped"]["duplicate"] == min(30, rows // 2)
    assert found["rows_kept"] + found["rows_held_out"] == 60


def test_a_count_is_of_examples_also_where_a_conversation_has_several(tmp_path):
    rows = [
        {"messages": [{"role": role, "content": f"{role} {i} {turn}"} for turn in range(3) for role in ("user", "assistant")]}
        for i in range(20)
    ]  # fmt: skip
    found = counted(tmp_path, rows, count="#10", turns="each", mode="non_thinking").report["sources"]["a"]
    assert found["rows_kept"] + found["rows_held_out"] == 10


def test_a_source_and_a_question_set_of_one_name_are_told_apart(tmp_path):
    """train.jsonl and test.jsonl in one folder: an edit of either makes another mix."""
    (tmp_path / "sums").mkdir()
    jsonl(tmp_path / "sums" / "train.jsonl", chat_rows(40))
    questions = [{"problem": f"What is {i} + 1?", "expected_answer": str(i + 1)} for i in range(4)]
    jsonl(tmp_path / "sums" / "test.jsonl", questions)
    folder = str(tmp_path / "sums")
    values = {
        "name": "names",
        "data": {"sources": [{"path": folder}], "validation_size": 2},
        "evaluate": {"questions": [{"path": folder, "split": "test", "format": "question"}]},
        "model": {"model_name": "pocket"},
    }
    before = mix.compile_mix(recipe.from_dict(values))
    assert set(before.report["fingerprints"]) == {"sums", "questions/sums"}
    jsonl(tmp_path / "sums" / "train.jsonl", chat_rows(70))
    assert mix.compile_mix(recipe.from_dict(values)).report["total"]["examples"] > before.report["total"]["examples"]


@pytest.mark.parametrize("switched", [0.0, 0.5, 1.0])
def test_a_typed_switch_hides_neither_an_evaluation_question_nor_a_duplicate(switched, tmp_path):
    asked = [{"problem": f"What is {i} + 26?", "expected_answer": str(i + 26)} for i in range(10)]
    same = [{"query": row["problem"] + typed, "response": "x" + row["expected_answer"]}
            for row in asked for typed in ("", " /no_think")]  # fmt: skip
    once = chat_rows(20)
    values = {
        "name": "switches",
        "data": {
            "sources": [{"path": jsonl(tmp_path / "a.jsonl", same + once * 2), "soft_switch": switched}],
            "validation_size": 0,
            "duplicates": "exact",
        },
        "evaluate": {"questions": [{"path": jsonl(tmp_path / "q.jsonl", asked), "format": "question"}]},
        "model": {"model_name": "pocket"},
    }
    dropped = mix.compile_mix(recipe.from_dict(values)).report["sources"]["a"]["dropped"]
    assert dropped == {"contaminated": 20, "duplicate": 20}
