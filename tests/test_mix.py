"""A mix is what it says: its shares in every unit, its held-out rows, its drops, and the same again from the same seed."""

import itertools
import json

import numpy as np
import pytest

from tests.label_check import violations
from toolkit import mix, recipe, render, show
from toolkit.files import POCKET, ROOT, ToolkitError
from toolkit.lint import lint
from toolkit.render import load_chat

SAMPLES = "data_recipes/samples"
THINKING = {"name": "math", "path": f"{SAMPLES}/openmath_sample.jsonl", "mode": "thinking", "fraction": 0.75}
CHAT = {"name": "chat", "path": f"{SAMPLES}/finetome_sample.jsonl", "mode": "non_thinking", "fraction": 0.25}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path / "outputs"))


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
    from toolkit.sources import conversations

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
    report = compiled(budget=3000).report
    assert report["validation"] == {"math/thinking": 15, "chat/non_thinking": 5}


def test_when_a_source_runs_dry_the_whole_mix_shrinks_keeps_its_shares_and_names_it(tmp_path):
    small = jsonl(tmp_path / "small.jsonl", chat_rows(60))
    mixed = compiled(
        THINKING | {"fraction": 0.5}, {"name": "small", "path": small, "fraction": 0.5}, unit="examples", budget=1000
    )
    assert mixed.report["limited_by"] == "small"
    assert mixed.report["achieved"]["examples"]["small"] == pytest.approx(0.5, abs=0.01)
    assert len(mixed.train) < 130
    assert any("small ran dry" in note for note in show.notes(mixed.report))


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


def test_near_duplicates_are_dropped_and_different_rows_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(f"word{n}" for n in rng.integers(0, 4000, 60)) for _ in range(30)]
    near = [t.rsplit(" ", 1)[0] + " changed" for t in texts[:10]]
    rows = [{"query": f"question {i}", "response": t} for i, t in enumerate(texts + near)]
    mixed = compiled({"path": jsonl(tmp_path / "a.jsonl", rows), "fraction": 1.0}, duplicates="near", validation_size=1)
    assert mixed.report["sources"]["a"]["dropped"]["near_duplicate"] in {9, 10}
    assert len(mixed.train) >= 29


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
    held = mixed.report["validation"]
    assert {m: modes[m] + held.get(f"a/{m}", 0) for m in modes} == {"thinking": 30, "non_thinking": 30}


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


def test_a_stray_language_in_a_source_is_counted_and_said(tmp_path):
    rows = [*chat_rows(60), {"query": "你好", "response": "你好！"}, {"query": "再见", "response": "再见！"}]
    mixed = compiled({"path": jsonl(tmp_path / "a.jsonl", rows), "fraction": 1.0}, validation_size=1)
    assert sum(mixed.report["sources"]["a"]["languages"].values()) == len(mixed.train)
    assert any("replies are Chinese, unlike the rest" in note for note in show.notes(mixed.report))
    alone = compiled({"path": jsonl(tmp_path / "b.jsonl", chat_rows(60)), "fraction": 1.0}, validation_size=1)
    assert not any("Chinese" in note for note in show.notes(alone.report))


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
    with pytest.raises(ToolkitError, match="could not be written .No space left on device.: free some space"):
        compiled(budget=2000)
    assert not list(mix.cache_folder().rglob("mix.json"))


def test_colours_mark_exactly_the_supervised_text():
    mixed, chat = compiled(budget=2000), load_chat("pocket")
    page = show.html(mixed, chat, 1)
    row = mixed.train[0]
    from html import escape

    assert f"color:#111'>{escape(chat.decode(row.ids[row.prompt_length :]))}</span>" in page
    spans = list(itertools.islice(show.terminal(mixed, chat, 1), 2))[1].spans
    assert [s.style for s in spans] == ["bright_black", "bold green"]


def test_the_picture_has_a_bar_per_source_and_unit_and_the_limit_line():
    mixed = compiled(budget=2000)
    shares, lengths = show.figure(mixed).axes
    assert len(shares.patches) == 2 * len(mix.UNITS)
    assert any(line.get_xdata()[0] == 512 for line in lengths.lines)


def lint_of(overrides=(), rows=None, model="pocket"):
    built = build(overrides=overrides, budget=2000)
    return " ".join(lint(built, load_chat(model), mix.compile_mix(built).train if rows is None else rows))


@pytest.mark.parametrize("broken", ["one id off", "kind not known"])
def test_without_a_fast_tokenizer_that_can_be_trusted_ids_are_hugging_faces_and_it_is_said(broken, monkeypatch):
    right = compiled(budget=2000)
    assert right.report["tokenizer"] == {"name": "fastokens", "rows_compared": len(right.train[:32])}
    fast = load_chat("pocket").fast

    class OneOff:
        def encode_batch_flat(self, texts):
            ids, ends = fast.encode_batch_flat(texts)
            return np.where(np.frombuffer(ids, np.int32) == 220, 221, np.frombuffer(ids, np.int32)).tobytes(), ends

    monkeypatch.setattr(render, "_fast", lambda _: OneOff() if broken == "one id off" else None)
    chat = load_chat("pocket")
    monkeypatch.setattr(mix, "load_chat", lambda *_: chat)
    found = mix.compile_mix(build(budget=2000), fresh=True)
    assert [r.ids.tolist() for r in found.train] == [r.ids.tolist() for r in right.train]
    assert found.report["tokenizer"] == {"name": "tokenizers"}
    reason = "other ids for row" if broken == "one id off" else "does not know this kind"
    assert [w for w in found.report["warnings"] if "Hugging Face tokenizer" in w and reason in w]


def test_lint_says_what_a_recipe_will_do_that_its_writer_did_not_mean():
    assert lint_of() == ""
    assert "lora_alpha/r = 8" in lint_of(["lora.r=4"])
    assert "max_steps=1 sees" in lint_of(
        ["train.max_steps=1", "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=1"]
    )
    assert "no non-thinking row" in lint_of(["data.reasoning=1"])
    assert "no thinking row" in lint_of(["data.reasoning=0"])


def test_lint_finds_rows_without_end_of_turn_and_rows_a_thinking_only_model_unlearns_from(tmp_path):
    from tests.test_render import THINKING_ONLY, folder_with

    folder_with(THINKING_ONLY, tmp_path)
    rows = compiled(budget=2000).train
    assert "always thinks" in lint_of(rows=rows, model=str(tmp_path))
    cut = [mix.Row(r.ids[:-1], r.prompt_length, r.source, r.mode, r.number) for r in rows]
    assert f"{len(cut)} rows do not end" in lint_of(rows=cut)


def test_the_samples_that_ship_never_meet_the_held_out_questions():
    def prompts(name):
        rows = [json.loads(line) for line in (ROOT / SAMPLES / name).read_text(encoding="utf-8").splitlines()]
        return {r.get("problem") or r["conversations"][0]["value"] for r in rows}

    held = prompts("heldout_reasoning.jsonl")
    assert len(held) > 100
    assert not held & prompts("openmath_sample.jsonl")
