"""What people see of a mix and a run: whole tables at 80 columns, colours on exactly the labels, pictures of what was measured."""

import io
import json
import re

import pytest
from matplotlib.colors import to_rgba
from rich.console import Console

from tests.data.test_mix import CHAT, THINKING, cache, chat_rows, compiled, jsonl  # noqa: F401 - cache is a fixture
from toolkit.data import mix
from toolkit.data.render import load_chat
from toolkit.view import figures, labels, tables
from toolkit.view.progress import Progress

ALIKE = "a_very_long_name_of_a_source_that_goes_on_and_on_and_ends_in_"


def printed(thing, width):
    out = io.StringIO()
    Console(file=out, width=width, legacy_windows=False).print(thing)
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_of_a_mix_is_whole_and_names_every_source(width):
    sources = [s | {"name": ALIKE + end} for s, end in ((THINKING, "one"), (CHAT, "two"))]
    report = compiled(*sources, budget=3000).report
    text = printed(tables.mix_table(report), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    squeezed = re.sub(r"\s", "", text)
    for end, name in (("one", ALIKE + "one"), ("two", ALIKE + "two")):
        assert end in text
        row = report["sources"][name]
        numbers = [row["rows_kept"], row["tokens"], row["supervised_tokens"]]
        shares = [f"{report['achieved'][unit][name]:.1%}" for unit in mix.UNITS]
        for cell in [*(f"{n:,}" for n in numbers), *shares, f"{report['planned'][name]:.1%}"]:
            assert cell in text, cell
    head = text.split("─")[0].split()
    assert head.count("supervised") == 1
    assert head.count("tokens") == 2
    assert "thinking" in squeezed
    assert "non-thinking" in squeezed


@pytest.mark.parametrize("width", [80, 120])
def test_the_plan_is_whole_too(width):
    planned = {ALIKE + "one": {"share": 0.5, "quota": 1_000_000, "validation": 50}}
    planned[ALIKE + "two"] = {"share": None, "quota": None, "validation": 0}
    text = printed(tables.plan_table(planned), width)
    assert max(map(len, text.splitlines())) <= width
    assert all(word in text for word in ("50.0%", "1,000,000", "as it comes", "all there is"))


def test_tables_print_on_terminals_that_know_no_unicode():
    report = compiled(budget=2000).report
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    console = Console(file=out, width=80)
    console.print(tables.verdict(report), tables.mix_table(report), *tables.notes(report))
    out.flush()
    text = out.buffer.getvalue().decode("ascii")
    assert "math" in text
    assert f"{report['total']['examples']:,} examples" in text


def test_the_verdict_states_size_and_distance_from_the_plan():
    report = compiled(budget=3000).report
    off = max(abs(report["achieved"]["supervised_tokens"][n] - s) for n, s in report["planned"].items())
    assert tables.verdict(report).endswith(f"shares of supervised tokens within {100 * off:.1f} points of the plan")


def test_the_shipped_samples_mix_without_a_note_of_warning():
    from toolkit import recipe
    from toolkit.files import ROOT

    for name in ("pocket", "sweep_pocket"):
        report = mix.compile_mix(recipe.load(ROOT / f"data_recipes/{name}.yaml")).report
        assert report["warnings"] == []
        assert not any("Chinese" in note for note in tables.notes(report))


def test_colours_mark_exactly_the_supervised_text():
    mixed, chat = compiled(budget=2000), load_chat("pocket")
    row, text = mixed.train[0], labels.coloured(mixed, chat, 1)
    (shown, *_), (taught, *_) = (
        [text.plain[span.start : span.end] for span in text.spans if span.style == style]
        for style in ("bright_black", "bold green")
    )
    assert (shown, taught) == (chat.decode(row.ids[: row.prompt_length]), chat.decode(row.ids[row.prompt_length :]))


def test_the_picture_has_a_bar_per_source_and_unit_and_the_limit_line():
    mixed = compiled(budget=2000)
    shares, lengths = figures.mix_figure(mixed).axes
    assert len(shares.patches) == 2 * len(mix.UNITS)
    assert any(line.get_xdata()[0] == 512 for line in lengths.lines)


def test_trl_masking_teaches_an_empty_think_block_and_the_label_rule_does_not():
    chat = load_chat("pocket")
    said = [{"role": "user", "content": "Capital of Finland?"}, {"role": "assistant", "content": "Helsinki."}]
    shown, taught = labels.trl_masking({"messages": said}, chat)
    assert taught.startswith("<think>\n\n</think>\n\nHelsinki.")
    ours = labels.label_rule({"messages": said}, chat)
    assert ours[0].endswith("<think>\n\n</think>\n\n")
    assert ours[1] == "Helsinki.<|im_end|>"
    assert shown + taught.rstrip("\n") == "".join(ours)


def test_curves_are_drawn_from_a_run_that_has_only_begun(tmp_path):
    assert figures.logged(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    left, right = figures.curves(tmp_path).axes
    assert list(left.lines[0].get_ydata()) == [2.0, 1.0]
    assert left.lines[1].get_ydata()[0] == pytest.approx(2.0)
    assert figures.png(left.figure)[:4] == b"\x89PNG"
    assert right.get_title()


@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen2.5"])
def test_trl_masking_and_the_label_rule_agree_where_there_is_no_think_block(name, family):
    chat = load_chat(str(family(name)))
    said = {
        "messages": [{"role": "user", "content": "Capital of Finland?"}, {"role": "assistant", "content": "Helsinki."}]
    }
    (shown, taught), (shown_here, taught_here) = labels.trl_masking(said, chat), labels.label_rule(said, chat)
    assert shown == shown_here
    assert taught.strip() == taught_here.strip()


def test_progress_of_which_nothing_is_done_yet_tells_no_time_left(monkeypatch):
    """All replies of a base may lie in the cache: they are skipped before the first one is generated."""
    monkeypatch.setattr(Progress, "PLAIN_EVERY", 0)
    out = io.StringIO()
    with Progress(Console(file=out), "evaluating", total=4) as progress:
        progress.skip(2)
        assert out.getvalue() == ""
        progress.advance(1)
    assert out.getvalue().startswith("evaluating: 1 of 2")


def test_curves_are_drawn_of_a_run_that_was_evaluated_before_its_first_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 2.0}\n')
    assert figures.curves(tmp_path).axes


def test_a_source_has_one_colour_in_the_picture_of_the_mix_and_in_the_curves(tmp_path):
    mixed = compiled(budget=2000)
    (tmp_path / "mix.json").write_text(json.dumps(mixed.report))
    names = list(mixed.report["sources"])
    losses = {"eval_loss": 1.0} | {f"eval_{name}/thinking_loss": 1.0 for name in reversed(names)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, **losses}) + "\n")
    lines = {line.get_label(): line.get_color() for line in figures.curves(tmp_path).axes[1].lines}
    bars = {bars.get_label(): bars.patches[0].get_facecolor() for bars in figures.mix_figure(mixed).axes[0].containers}
    assert len(names) == 2
    for name in names:
        assert to_rgba(lines[f"{name}, thinking"]) == bars[name]
