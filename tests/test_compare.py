"""A comparison recommends where it should, says noise where it should, and never mixes evaluations silently."""

import csv
import json
import re

import numpy as np
import pytest
import yaml

from tests.evaluation import long_table
from toolkit.compare import compare, frontier, reach
from toolkit.evaluate import summarize
from toolkit.files import ToolkitError
from toolkit.folders import Point, Run
from toolkit.report import page, table, write

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
QUESTIONS = 60


def make_run(
    root, share, *, seed=1, thinking=0.5, chat=0.9, adherence=1.0, direct=1.0, kl=0.05, base=0.4, level="quick",
    questions="q1", settings=None, scored=True,
):  # fmt: skip
    """A run folder whose tuned model is right on a given share of 60 questions; luck is the same in every run."""
    folder = root / f"r{share:g}-s{seed}{level}{questions}{''.join((settings or {}).keys())}"
    folder.mkdir(parents=True)
    # examples: a reasoning row is four times as long, so the same mix is a smaller share of rows
    rows = share / 4 / (share / 4 + 1 - share)
    achieved = {
        unit: {"maths": s, "talk": 1 - s}
        for unit, s in (("examples", rows), ("tokens", share), ("supervised_tokens", share))
    }
    sources = {"maths": {"mode": "thinking"}, "talk": {"mode": "non_thinking"}}
    write_json(
        folder / "mix.json",
        {
            "unit": "supervised_tokens",
            "planned": {"maths": share, "talk": 1 - share},
            "achieved": achieved,
            "sources": sources,
        },
    )
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "name": folder.name,
                "data": {"seed": seed, "sources": [{"path": "maths", "fraction": share}]},
                "train": {"learning_rate": 1e-4, **(settings or {})},
            }
        )
    )
    write_json(folder / "manifest.json", {"model": {"name": "pocket", "revision": None}, "seeds": {"data": seed}})
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 2, "eval_loss": 1}\n'
    )
    if scored:
        rates = {"thinking": (base, 0.9, 1.0), "non_thinking": (0.2, 0.9, 1.0)}, {
            "thinking": (thinking, chat, adherence), "non_thinking": (0.2, chat, direct)}  # fmt: skip
        write_json(
            folder / "eval.json",
            {
                "level": level,
                "seed": 3407,
                "budget": {"max_new_tokens": 64, "samples": 1},
                "fingerprints": {"questions": questions, "probes": "p"},
                **summarize(long_table(sums(*rates, kl)), 1),
            },
        )
    return folder


def sums(base, tuned, kl):
    luck = np.random.default_rng(7).permutation(QUESTIONS) / QUESTIONS  # question i is answered by those who reach it
    on = [1.0] * QUESTIONS

    def section(accuracy, chat, adherence):
        right = {"accuracy": accuracy, "accuracy/chat": chat, "adherence": adherence}
        length = {"reasoning_tokens": 40.0, "answer_tokens": 6.0, "cut": 0.0}
        return {m: ((luck < rate).astype(float).tolist(), on) for m, rate in right.items()} | {
            m: ([v] * QUESTIONS, on) for m, v in length.items()}  # fmt: skip

    result = {mode: [section(*base[mode]), section(*tuned[mode])] for mode in base}
    result["forgetting"] = [{"kl": ([x] * QUESTIONS, on), "nll": ([1 + x] * QUESTIONS, on)} for x in (0.0, kl)]
    return result


def write_json(path, content):
    path.write_text(json.dumps(content))


def test_the_best_ratio_that_keeps_both_modes_is_recommended(tmp_path):
    accuracy, chat, direct = (0.4, 0.6, 0.8, 0.85, 0.95), (0.95, 0.95, 0.93, 0.9, 0.5), (1, 1, 1, 0.95, 0.3)
    runs = [
        make_run(tmp_path, s, thinking=a, chat=c, direct=d)
        for s, a, c, d in zip(SHARES, accuracy, chat, direct, strict=True)
    ]
    found = compare(runs)
    assert found.recommended.label in ("50% reasoning", "75% reasoning")
    assert found.sentence.startswith(f"Recommended: {found.recommended.label}")
    assert re.search(r"\[0\.\d\d, 0\.\d\d\].*against the base", found.sentence)
    assert any(
        note.startswith("100% reasoning is left out of the choice: non-thinking adherence -0.7") for note in found.notes
    )


def test_tied_ratios_go_to_the_lowest_share(tmp_path):
    runs = [make_run(tmp_path, s, thinking=a) for s, a in zip(SHARES, (0.2, 0.3, 0.88, 0.9, 0.9), strict=True)]
    found = compare(runs)
    assert found.recommended.label == "50% reasoning"
    assert "tied with 75% reasoning and 100% reasoning" in found.sentence


def test_small_differences_are_called_noise(tmp_path):
    rng = np.random.default_rng(3)
    runs = []
    for i, share in enumerate(SHARES):  # the same skill, independent luck
        runs.append(make_run(tmp_path, share))
        content = json.loads((runs[-1] / "eval.json").read_text())
        right = (rng.random(QUESTIONS) < 0.5 + 0.005 * i).astype(float).tolist()
        pair = [{"accuracy": (content["per_question"]["thinking"][n]["accuracy"])} for n in ("base", "tuned")]
        pair[1]["accuracy"] = (right, [1.0] * QUESTIONS)
        again = summarize(long_table({"thinking": pair}), 1)
        content["tuned"]["thinking"]["accuracy"] = again["tuned"]["thinking"]["accuracy"]
        content["per_question"]["thinking"]["tuned"]["accuracy"] = again["per_question"]["thinking"]["tuned"][
            "accuracy"
        ]
        write_json(runs[-1] / "eval.json", content)
    found = compare(runs)
    assert found.recommended is None
    assert found.sentence.startswith("The differences are within noise: thinking accuracy runs from 0.")


def test_equal_ratios_are_rarely_given_a_winner():
    """Five ratios of equal skill, 60 questions each: a winner is named in about 5 of 100 comparisons (at most 8 here,
    400 comparisons have a standard error of 1.1)."""
    rng, trials, named = np.random.default_rng(0), 400, 0
    for _ in range(trials):
        right = (rng.random((5, QUESTIONS)) < rng.beta(2, 2, QUESTIONS)).astype(float)
        points = [equal_point(str(i), row.tolist()) for i, row in enumerate(right)]
        named += np.ptp(right.mean(1)) > reach(points)
    assert 0.01 <= named / trials <= 0.08


def equal_point(name, right):
    found = {"value": float(np.mean(right)), "low": 0.0, "high": 1.0, "n": QUESTIONS}
    counted = {"thinking": {"tuned": {"accuracy": (right, [1.0] * QUESTIONS)}}}
    content = {"tuned": {"thinking": {"accuracy": found}}, "per_question": counted}
    return Point(name, "", 0.0, [Run(name, {}, {}, content, {}, [])], {}, {("thinking", "accuracy"): found})


def test_no_ratio_is_recommended_when_all_break_a_mode(tmp_path):
    found = compare([make_run(tmp_path, s, adherence=0.3) for s in SHARES[:3]])
    assert found.recommended is None
    assert found.sentence == "None of the 3 ratios can be recommended: each breaks a mode or the chat."


def test_no_ratio_is_recommended_when_none_is_shown_to_beat_the_base(tmp_path):
    found = compare([make_run(tmp_path, s, thinking=a) for s, a in ((0.25, 0.1), (0.75, 0.4))])
    assert found.recommended is None
    assert found.sentence.startswith("No ratio is shown to beat the base: 75% reasoning, the highest")


def test_of_tied_ratios_only_those_that_beat_the_base_count(tmp_path):
    shares = ((0.0, 0.1), (0.25, 0.42), (0.75, 0.5))
    found = compare([make_run(tmp_path, s, thinking=a) for s, a in shares])
    assert found.recommended.label == "75% reasoning"
    assert "tied with 25% reasoning" in found.sentence


def test_seeds_are_averaged_and_each_stays_visible(tmp_path):
    runs = [make_run(tmp_path, s, seed=n, thinking=a + n / 10) for s, a in ((0.25, 0.4), (0.75, 0.6)) for n in (1, 2)]
    found = compare(runs)
    value = found.points[0].values["thinking", "accuracy"]
    assert value["value"] == pytest.approx(0.55, abs=0.02)
    assert value["each"] == pytest.approx([0.5, 0.6], abs=0.02)
    alone = compare(runs[:1]).points[0].values["thinking", "accuracy"]
    assert value["high"] - value["low"] > alone["high"] - alone["low"]  # the seeds' own scatter is added
    assert [len(point.runs) for point in found.points] == [2, 2]


def test_runs_evaluated_differently_or_unfinished_are_named_and_left_out(tmp_path):
    runs = [make_run(tmp_path, s) for s in SHARES[:3]]
    runs += [
        make_run(tmp_path, 0.75, level="full"),
        make_run(tmp_path, 1.0, questions="q2"),
        make_run(tmp_path, 0.1, scored=False),
    ]
    found = compare(runs)
    reasons = dict(found.left_out)
    assert [run.name for point in found.points for run in point.runs] == [run.name for run in runs[:3]]
    assert "level full (the others: quick)" in reasons[runs[3].name]
    assert "questions q2 (the others: q1)" in reasons[runs[4].name]
    assert reasons[runs[5].name] == "incomplete: no eval.json"
    assert all(name in page(found, "<svg></svg>") for name in reasons)


def test_no_run_at_all_is_an_error_that_says_why(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ToolkitError, match=r"empty: incomplete: no recipe\.yaml"):
        compare([tmp_path / "empty"])


def test_runs_that_differ_in_more_than_the_share_are_not_averaged(tmp_path):
    runs = [make_run(tmp_path, 0.5, seed=1), make_run(tmp_path, 0.5, seed=2, settings={"max_steps": 9})]
    assert [point.label for point in compare(runs).points] == ["max_steps=9", "max_steps=None"]


def test_an_eval_file_without_values_per_question_is_compared_by_its_intervals(tmp_path):
    runs = [make_run(tmp_path, s, thinking=a) for s, a in zip(SHARES, (0.1, 0.3, 0.5, 0.7, 0.95), strict=True)]
    for run in runs:
        content = json.loads((run / "eval.json").read_text())
        write_json(run / "eval.json", {name: content[name] for name in ("base", "tuned")})
    assert compare(runs).recommended.label == "100% reasoning"


def test_shares_are_the_achieved_ones_in_all_three_units(tmp_path):
    found = compare([make_run(tmp_path, 0.5), make_run(tmp_path, 0.75)])
    assert found.points[0].shares == pytest.approx({"examples": 0.2, "tokens": 0.5, "supervised_tokens": 0.5})


def test_a_source_with_rows_of_both_modes_counts_by_its_rows(tmp_path):
    run = make_run(tmp_path, 0.5)
    mix = json.loads((run / "mix.json").read_text())
    mix["sources"]["maths"]["mode"] = "auto"
    write_json(run / "mix.json", mix)
    with pytest.raises(ToolkitError, match="achieved_modes"):
        compare([run])
    mix["achieved_modes"] = {unit: {"thinking": 0.3, "non_thinking": 0.7} for unit in mix["achieved"]}
    write_json(run / "mix.json", mix)
    assert compare([run]).points[0].shares["tokens"] == 0.3


def test_the_frontier_holds_what_nothing_beats(tmp_path):
    runs = [
        make_run(tmp_path, s, thinking=a, chat=c)
        for s, a, c in ((0.0, 0.4, 0.95), (0.5, 0.7, 0.9), (0.75, 0.6, 0.8), (1.0, 0.9, 0.7))
    ]
    assert [p.label for p in frontier(compare(runs).points)] == ["0% reasoning", "50% reasoning", "100% reasoning"]


def test_the_report_is_one_file_that_needs_no_network_and_the_csv_reads_back(tmp_path):
    runs = [make_run(tmp_path, s, seed=n, thinking=0.3 + s / 2) for s in SHARES for n in (1, 2)]
    found = compare(runs)
    paths = write(found, tmp_path / "report")
    text = paths["html"].read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!#)|url\((?!#)|@import""", text)
    assert found.sentence.split("[")[0] in text
    rows = list(csv.DictReader(paths["csv"].open()))
    assert [row["label"] for row in rows] == ["base", *(f"{100 * s:g}% reasoning" for s in SHARES)]
    assert float(rows[-1]["thinking/accuracy"]) == pytest.approx(0.8, abs=0.01)
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    assert table(found).row_count > 8
    assert (
        page(compare(runs), text[text.index("<svg") : text.index("</svg>") + 6] + "\n") == text
    )  # nothing in it depends on the hour
