"""A comparison's page lays its runs side by side in one file, and `report` writes a sweep's again from what is scored."""

import io
import json
import re

import pytest
from rich.console import Console

from tests.comparison.test_compare import SHARES, make_run, printed
from tests.view.test_page import Page
from toolkit.__main__ import main
from toolkit.comparison.decide import compare
from toolkit.comparison.report import conclude, figure
from toolkit.files import ROOT
from toolkit.view import figures


@pytest.fixture
def swept(tmp_path):
    """(what was compared, the sweep's folder) of five ratios, whose runs have pages of their own."""
    runs = [make_run(tmp_path, s, thinking=0.3 + s / 2, kl=0.1 + s, name=f"tiny-r{s:g}-s1") for s in SHARES]
    for run in runs:
        (run / "report.html").write_text("a run")
    folder = tmp_path / "tiny-sweep"
    found = compare(runs)
    conclude(found, Console(file=io.StringIO()), folder)
    (folder / "sweep.json").write_text(json.dumps({"runs": [{"name": run.name} for run in runs]}))
    return found, folder


def test_the_page_says_what_was_found_and_leads_to_the_page_of_every_run(swept):
    found, folder = swept
    read = Page(folder / "report.html")
    assert read.open == []
    for line in found.verdict[:-1]:
        assert " ".join(line.split()) in read.text
    assert found.verdict[-1].removeprefix("next: ") in read.text
    assert f"★ {found.recommended.label}" in read.text
    pictures = [address for address in read.addresses if address.startswith("data:image/png;base64,")]
    links = [address for address in read.addresses if address not in pictures]
    assert len(pictures) == 1
    assert links == [f"../tiny-r{s:g}-s1/report.html" for s in SHARES]
    assert all((folder / link).read_text() == "a run" for link in links)


def test_two_folders_of_one_name_are_two_rows(tmp_path):
    runs = [make_run(tmp_path / place, s, name="tiny") for place, s in (("here", 0.25), ("there", 0.75))]
    for run in runs:
        (run / "report.html").write_text("a run")
    folder = tmp_path / "both"
    conclude(compare(runs), Console(file=io.StringIO()), folder)
    links = [address for address in Page(folder / "report.html").addresses if not address.startswith("data:")]
    assert links == ["../here/tiny/report.html", "../there/tiny/report.html"]


def test_every_number_of_the_pages_table_has_its_interval_as_in_the_comparison(swept):
    found, folder = swept
    read = Page(folder / "report.html")
    goal = [point.values["thinking", "accuracy"] for point in found.everyone()]
    for score in goal:
        assert f"{100 * score.value:.0f}% [{100 * score.low:.0f}, {100 * score.high:.0f}]" in read.text


def test_a_source_keeps_its_colour_where_a_ratio_leaves_it_out(swept):
    _, folder = swept
    text = (folder / "report.html").read_text()
    bars = re.findall(r'background:(#\w+)" title="(\w+): [\d.]+%"', text)
    assert set(bars) == {(figures.PALETTE[0], "talk"), (figures.PALETTE[1], "maths")}
    # two of the five ratios are of one source: asked for and trained on
    assert len(bars) == 2 * (1 + 2 + 2 + 2 + 1)


def test_report_compares_the_scored_runs_of_a_sweep_again(swept, monkeypatch):
    _, folder = swept
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(folder.parent))
    (folder.parent / "tiny-r1-s1" / "eval.json").unlink()
    assert main(["report", "tiny-sweep"]) == 0
    read = Page(folder / "report.html")
    assert "tiny-r0.75-s1" in read.text
    assert "tiny-r1-s1" not in read.text


def test_a_sweep_of_which_nothing_is_scored_says_so(swept, capsys):
    _, folder = swept
    for run in folder.parent.glob("tiny-r*"):
        (run / "eval.json").unlink()
    assert main(["report", str(folder)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no run to compare: tiny-r0-s1: incomplete: no eval.json; `python -m toolkit evaluate tiny-r0-s1`" in said


def test_the_table_in_the_terminal_is_that_of_the_page(swept):
    found, folder = swept
    table = json.loads((folder / "comparison.json").read_text())["table"]
    assert len(table[0]) <= 15
    shown = printed(found)
    assert all(row["settings"].split()[0] in shown for row in table)


# --- the picture


def test_each_training_of_a_mean_is_a_small_point_and_the_recommended_is_a_star(tmp_path):
    runs = [make_run(tmp_path, s, seed=n, thinking=0.3 + s / 2 - n / 50, kl=0.1 + s) for s in SHARES for n in (1, 2)]
    found = compare(runs)
    gained = figure(found).axes[0]
    centres = [container.lines[0].get_marker() for container in gained.containers]
    best = 1 + found.points.index(found.recommended)
    assert [number for number, marker in enumerate(centres) if marker == "*"] == [best]
    assert centres[0] == "X"
    small = [line for line in gained.lines if line.get_marker() == "."]
    assert [len(line.get_xdata()) for line in small] == [2] * 5
    assert list(small[4].get_xdata()) == found.points[4].values["thinking", "accuracy"].each


def test_no_tick_of_a_per_cent_axis_is_rounded(tmp_path):
    picture = figure(compare([make_run(tmp_path, s, thinking=0.3 + s / 2, chat=0.9 + s / 20) for s in SHARES]))
    picture.savefig(tmp_path / "drawn.png")
    left, right = picture.axes
    for axis in (left.xaxis, left.yaxis, right.xaxis):
        ticks = axis.get_majorticklocs()
        assert [round(100 * tick) for tick in ticks] == pytest.approx([100 * tick for tick in ticks])


@pytest.mark.parametrize(
    ("name", "rows", "recommended"),
    [("sweep_pocket", "rows", "50% reasoning"), ("dial_pocket", "points", "scale 0.75")],
)
def test_the_recorded_pictures_are_drawn_by_the_same_function(name, rows, recommended):
    from data_recipes.measured.picture import recorded

    record = json.loads((ROOT / "data_recipes" / "measured" / f"{name}.json").read_text())
    found = recorded(name)
    drawn = figure(found).axes[0].containers
    places = [(bar.lines[0].get_xdata()[0], bar.lines[0].get_ydata()[0]) for bar in drawn]
    keys = ("thinking/accuracy", "non_thinking/accuracy/chat")
    # scales without replies have neither
    assert places == [tuple(float(row[key]) for key in keys) for row in record[rows] if set(keys) <= row.keys()]
    assert found.recommended.label == recommended
