"""A comparison recommends where it should, says noise where it should, and never mixes evaluations silently."""

import csv
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from statistics import NormalDist

import numpy as np
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from toolkit.comparison.decide import SEED_SPREAD, compare
from toolkit.comparison.points import Average, Point, simultaneous_margin
from toolkit.comparison.report import conclude, figure, notes, numbers, terminal_table, write
from toolkit.comparison.runs import Run, Score
from toolkit.evaluation.stats import Sample, interval, is_rate, paired_difference
from toolkit.files import ROOT, ToolkitError

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
QUESTIONS = 60


def make_run(
    root, share, *, seed=1, thinking=0.5, chat=0.9, adherence=1.0, direct=1.0, kl=0.05, base=0.4, level="quick",
    questions="q1", settings=None, scored=True, modes=("thinking", "non_thinking"), asked=("accuracy", "accuracy/chat"),
    name=None,
):  # fmt: skip
    """A run folder whose tuned model is right on a given share of 60 questions; luck is the same in every run.

    With `modes=("non_thinking",)` it is an instruct model's: `share` is the share of its source "maths"."""
    folder = root / (name or f"r{share:g}-s{seed}{level}{questions}{''.join((settings or {}).keys())}")
    folder.mkdir(parents=True)
    # examples: a reasoning row is four times as long, so the same mix is a smaller share of rows
    rows = share / 4 / (share / 4 + 1 - share)
    shares = {"examples": rows, "tokens": share, "supervised_tokens": share}
    mix = {
        "unit": "supervised_tokens",
        "planned": {"talk": 1 - share, "maths": share},
        "achieved": {unit: {"maths": s, "talk": 1 - s} for unit, s in shares.items()},
        "sources": {
            name: {"mode": mode}
            for name, mode, wanted in (("maths", modes[0], share), ("talk", "non_thinking", 1 - share))
            if wanted
        },
        "achieved_modes": {unit: {modes[0]: s} for unit, s in shares.items()},
    }
    data = {"seed": seed, "sources": [{"path": "maths", "fraction": share}]}
    train = {"learning_rate": 1e-4, **(settings or {})}
    recipe = {"name": folder.name, "data": data, "train": train}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_json(folder / "mix.json", mix)
    write_json(folder / "manifest.json", {"model": {"name": "pocket", "revision": None}, "seeds": {"data": seed}})
    if scored:
        rates = {"thinking": (base, 0.9, 1.0), "non_thinking": (0.2, 0.9, 1.0)}, {
            "thinking": (thinking, chat, adherence), "non_thinking": (0.2, chat, direct)}  # fmt: skip
        if modes == ("non_thinking",):
            rates = {"non_thinking": (base, 0.9, 1.0)}, {"non_thinking": (thinking, chat, direct)}
        write_json(folder / "eval.json", evaluation(sums(*rates, kl, asked), level=level, questions=questions))
    return folder


def sums(base, tuned, kl, asked=("accuracy", "accuracy/chat")):
    """{section: [base, tuned]}, each {metric: (sums, counts)} over questions."""
    luck = np.random.default_rng(7).permutation(QUESTIONS) / QUESTIONS  # question i is answered by those who reach it
    on = [1.0] * QUESTIONS

    def section(accuracy, chat, adherence):
        right = {"accuracy": accuracy, "accuracy/chat": chat, "adherence": adherence}
        found = {m: ((luck < rate).astype(float).tolist(), on) for m, rate in right.items()}
        unasked = {m: ([0.0] * QUESTIONS, [0.0] * QUESTIONS) for m in ("accuracy", "accuracy/chat") if m not in asked}
        length = {"reasoning_tokens": 40.0, "answer_tokens": 6.0, "cut": 0.0}
        return found | unasked | {m: ([v] * QUESTIONS, on) for m, v in length.items()}

    result = {mode: [section(*base[mode]), section(*tuned[mode])] for mode in base}
    result["forgetting"] = [{"kl": ([x] * QUESTIONS, on), "nll": ([1 + x] * QUESTIONS, on)} for x in (0.0, kl)]
    return result


def evaluation(counted, *, level="quick", questions="q1"):
    """An eval.json's content from sums per question."""
    result = {"level": level, "seed": 3407, "budget": {"max_new_tokens": 64, "samples": 1},
              "fingerprints": {"questions": questions, "probes": "p"}, "per_question": {}}  # fmt: skip
    for i, model in enumerate(("base", "tuned")):
        result[model] = {
            section: {m: interval(Sample.of(*both), seed=1, rate=is_rate(m)) for m, both in pair[i].items()}
            for section, pair in counted.items()
        }
    for section, pair in counted.items():
        result["per_question"][section] = {"base": pair[0], "tuned": pair[1]}
    return result


def write_json(path, content):
    path.write_text(json.dumps(content))


def printed(found, width=80, folder=None):
    """What the command prints on a terminal of that width."""
    console = Console(file=io.StringIO(), width=width)
    if folder:
        conclude(found, console, folder)
    else:
        console.print(terminal_table(found))
    return console.file.getvalue()


# --- the numbers


def test_values_intervals_and_differences_are_those_of_commit_8b55c9c_to_the_last_digit(tmp_path):
    frozen = json.loads((ROOT / "tests/support/files/compare_8b55c9c.json").read_text())
    for run in frozen["runs"]:
        folder = tmp_path / run["name"]
        folder.mkdir()
        (folder / "recipe.yaml").write_text(yaml.safe_dump(run["recipe"]))
        shares = {unit: {"thinking": share["maths"]} for unit, share in run["mix"]["achieved"].items()}
        run["mix"]["achieved_modes"] = shares  # which today's mix.json holds too
        for name in ("mix", "eval", "manifest"):
            write_json(folder / f"{name}.json", run[name])
    found = compare(tmp_path / run["name"] for run in reversed(frozen["runs"]))
    expected = frozen["expected"]
    assert [point.label for point in found.points] == [point["label"] for point in expected["points"]]
    for point, known in zip(found.points, expected["points"], strict=True):
        (row,) = [row for row in numbers(found) if row["label"] == point.label]
        assert {unit: row[f"reasoning_share_{unit}"] for unit in known["shares"]} == known["shares"]
        assert {"/".join(key): asdict(value) for key, value in point.values.items()} == known["values"]
        changes = {"/".join(key): [change.low, change.high] for key, change in point.changes.items()}
        assert {key: changes[key] for key in known["change"]} == known["change"]
        for key, ends in known["change"].items():
            members = [run for run in frozen["runs"] if run["name"] in [run.name for run in point.runs]]
            assert ends == pytest.approx(expanded_percentile(members, *key.split("/", 1)), abs=0.005), key
    assert simultaneous_margin(found.points, found.goal) == expected["margin"]
    assert found.recommended.label == expected["recommended"]


def expanded_percentile(runs, section, metric):
    """Ends of tuned minus base by the definition, without the toolkit: questions drawn by number, percentiles widened by
    Student's t of 23 degrees of freedom from a printed table, no disagreement at all bounded by 0.025 ** (1 / n)."""
    drawn = np.random.default_rng([3407, 24]).integers(24, size=(2000, 24))
    side = {}
    for model in ("base", "tuned"):
        counted = [np.array(run["eval"]["per_question"][section][model][metric]) for run in runs]
        error = np.std([sums.sum() / counts.sum() for sums, counts in counted], ddof=1) / math.sqrt(len(runs))
        noise = np.random.default_rng([3407, *"".join(sorted(run["name"] for run in runs)).encode()])
        means = np.mean([sums[drawn].sum(1) / counts[drawn].sum(1) for sums, counts in counted], axis=0)
        side[model] = means + noise.normal(0, error, 2000)
    changes = np.sort(side["tuned"] - side["base"])
    if changes[0] == changes[-1] and metric != "kl":
        return [changes[0] - (1 - 0.025 ** (1 / 24)), changes[0] + (1 - 0.025 ** (1 / 24))]
    tail = NormalDist().cdf(-math.sqrt(24 / 23) * 2.0687)
    return [changes[round(tail * 1999)], changes[round((1 - tail) * 1999)]]


def test_a_change_has_the_interval_that_the_evaluation_gave_it(tmp_path):
    """Eight reasoning questions and five of chat, as a short run is asked: one list of 13, in which each kind counts its
    own; six right of eight before, two after."""
    run, counts = make_run(tmp_path, 0.5), [1.0] * 8 + [0.0] * 5
    content = json.loads((run / "eval.json").read_text())
    pair = [([1.0] * 6 + [0.0] * 7, counts), ([0.0] * 5 + [1.0] * 2 + [0.0] * 6, counts)]
    for model, counted in zip(("base", "tuned"), pair, strict=True):
        content["per_question"]["thinking"][model]["accuracy"] = counted
        content[model]["thinking"]["accuracy"] = interval(Sample.of(*counted), seed=3407, rate=True)
    write_json(run / "eval.json", content)
    expected = paired_difference(*(Sample.of(*side) for side in pair), seed=3407, rate=True)
    change = compare([run]).points[0].changes["thinking", "accuracy"]
    assert [change.value, change.low, change.high] == [expected[end] for end in ("value", "low", "high")]


def test_a_change_without_a_single_question_that_differs_has_the_exact_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "QUESTIONS", 8)
    run = make_run(tmp_path, 0.5, adherence=1.0)
    change = compare([run]).points[0].changes["thinking", "adherence"]
    assert [change.value, change.low, change.high] == pytest.approx([0, -0.3694, 0.3694], abs=1e-4)


def test_equal_ratios_are_rarely_given_a_winner():
    """Five ratios of equal skill, 60 questions each: a winner is named in about 5 of 100 comparisons (at most 8 here,
    400 comparisons have a standard error of 1.1)."""
    rng, trials, named = np.random.default_rng(0), 400, 0
    for _ in range(trials):
        right = (rng.random((5, QUESTIONS)) < rng.beta(2, 2, QUESTIONS)).astype(float)
        points = [equal_point(str(i), row.tolist()) for i, row in enumerate(right)]
        named += np.ptp(right.mean(1)) > simultaneous_margin(points, ("thinking", "accuracy"))
    assert 0.01 <= named / trials <= 0.08


def equal_point(name, right):
    key, mean = ("thinking", "accuracy"), float(np.mean(right))
    counted = np.array([right, [1.0] * QUESTIONS])
    run = Run(name, {}, {"tuned": {key: Score(mean, 0.0, 1.0, QUESTIONS, counted)}})
    return Point(name, [run], {key: Average(mean, 0.0, 1.0, QUESTIONS, [mean])})


def test_unanimous_answers_to_few_questions_prove_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "QUESTIONS", 3)
    runs = [make_run(tmp_path, s, thinking=a, base=0.0) for s, a in ((0.25, 0.0), (0.75, 1.0))]
    found = compare(runs)
    assert simultaneous_margin(found.points, found.goal) > 0.7  # three of three: 29% to 100%
    gain = found.points[1].changes[found.goal]
    assert gain.low < 0.5 < gain.value


def test_seeds_are_averaged_and_each_stays_visible(tmp_path):
    runs = [make_run(tmp_path, s, seed=n, thinking=a + n / 10) for s, a in ((0.25, 0.4), (0.75, 0.6)) for n in (1, 2)]
    found = compare(runs)
    value = found.points[0].values["thinking", "accuracy"]
    assert value.value == pytest.approx(0.55, abs=0.02)
    assert value.each == pytest.approx([0.5, 0.6], abs=0.02)
    alone = compare(runs[:1]).points[0].values["thinking", "accuracy"]
    assert value.high - value.low > alone.high - alone.low  # the seeds' own scatter is added
    assert [len(point.runs) for point in found.points] == [2, 2]


def test_shares_are_the_achieved_ones_in_all_three_units(tmp_path):
    row = numbers(compare([make_run(tmp_path, 0.5), make_run(tmp_path, 0.75)]))[1]
    shares = [row[f"reasoning_share_{unit}"] for unit in ("examples", "tokens", "supervised_tokens")]
    assert shares == pytest.approx([0.2, 0.5, 0.5])


def test_a_source_with_rows_of_both_modes_counts_by_its_rows(tmp_path):
    run = make_run(tmp_path, 0.5)
    mix = json.loads((run / "mix.json").read_text())
    mix["sources"]["maths"]["mode"] = "auto"
    mix["achieved_modes"] = {unit: {"thinking": 0.3, "non_thinking": 0.7} for unit in mix["achieved"]}
    write_json(run / "mix.json", mix)
    assert numbers(compare([run]))[1]["reasoning_share_tokens"] == 0.3
    del mix["achieved_modes"]
    write_json(run / "mix.json", mix)
    with pytest.raises(ToolkitError, match="achieved_modes"):
        compare([run])


def test_a_run_of_which_some_replies_never_end_is_left_out_of_the_choice(tmp_path):
    folders = [make_run(tmp_path, share, thinking=right) for share, right in ((0.25, 0.6), (0.75, 0.99))]
    content = json.loads((folders[1] / "eval.json").read_text())
    endless = {"value": 0.4, "low": 0.3, "high": 0.5, "n": 60}
    content["lengths"] = {"thinking": {"base": 9, "tuned": 9, "ratio": endless, "endless": endless}}
    write_json(folders[1] / "eval.json", content)
    found = compare(folders)
    assert found.recommended.label == "25% reasoning"
    assert any("replies with thinking never end" in note for note in found.notes)


def test_an_eval_file_without_values_per_question_is_left_out_with_the_reason(tmp_path):
    runs = [make_run(tmp_path, s) for s in (0.0, 1.0)]
    content = json.loads((runs[0] / "eval.json").read_text())
    write_json(runs[0] / "eval.json", {name: content[name] for name in ("base", "tuned")})
    (reason,) = compare(runs).left_out.values()
    assert reason.startswith("unreadable: KeyError: 'per_question'; `python -m toolkit evaluate r0")


# --- what is recommended


def test_the_best_ratio_that_keeps_both_modes_is_recommended_in_two_short_sentences_and_a_command(tmp_path):
    accuracy, chat, direct = (0.4, 0.6, 0.8, 0.85, 0.95), (0.95, 0.95, 0.93, 0.9, 0.5), (1, 1, 1, 0.95, 0.3)
    runs = [
        make_run(tmp_path, s, seed=seed, thinking=a, chat=c, direct=d)
        for s, a, c, d in zip(SHARES, accuracy, chat, direct, strict=True)
        for seed in (1, 2)
    ]
    found = compare(runs)
    assert found.recommended.label in ("50% reasoning", "75% reasoning")
    first, second, command = found.verdict
    assert first.startswith(f"Recommended: {found.recommended.label}: reasoning questions with thinking 40% → 8")
    assert re.fullmatch(r"Up to \d+ points between 4 ratios are chance \(95%\): it ties with .*\.", second)
    assert max(map(len, found.verdict)) <= 160
    assert command == f"next: python -m toolkit export {found.recommended.runs[0].name}"
    assert any(
        note.startswith(
            "100% reasoning is left out of the choice: keeps to its mode without thinking 100% → 30% (-70 points"
        )
        for note in found.notes
    )


def test_tied_ratios_go_to_the_lowest_share(tmp_path):
    runs = [make_run(tmp_path, s, thinking=a) for s, a in zip(SHARES, (0.2, 0.3, 0.88, 0.9, 0.9), strict=True)]
    found = compare(runs)
    assert found.recommended.label == "50% reasoning"
    assert any("it ties with 75% reasoning, 100% reasoning" in text for text in [*found.verdict, *found.notes])


def test_a_ratio_that_fell_far_below_the_base_is_named(tmp_path):
    runs = [make_run(tmp_path, s, thinking=a, base=0.6) for s, a in ((0.0, 0.1), (0.5, 0.85), (1.0, 0.95))]
    found = compare(runs)
    assert found.recommended.label == "50% reasoning"
    assert found.verdict[2].startswith("Below the base: 0% reasoning (-50 points")


@pytest.mark.parametrize("others", [0, 1])
def test_where_one_run_is_left_nothing_is_said_about_chance_between_runs(tmp_path, others):
    runs = [make_run(tmp_path, 0.5), *[make_run(tmp_path, 1.0, thinking=0.6, direct=0.3)] * others]
    found = compare(runs)
    assert found.verdict[1] == f"There is no other {'ratio' if others else 'run'} to choose from."


def test_the_next_command_can_be_pasted_and_what_to_do_with_it_stands_before_it(tmp_path):
    first, second, seeds, command = compare([make_run(tmp_path, s) for s in (0.25, 0.75)]).verdict
    assert seeds.startswith("One seed: ")
    assert command == "next: python -m toolkit evaluate r0.25-s1quickq1 --level full"
    assert first.startswith("No ratio is recommended")
    assert "more questions (`evaluate --level full` for each run)" in first
    assert second.endswith(" are chance (95%): it ties with 75% reasoning.")


def test_small_differences_are_called_noise(tmp_path):
    rng = np.random.default_rng(3)
    runs = []
    for i, share in enumerate(SHARES):  # the same skill, independent luck
        runs.append(make_run(tmp_path, share))
        content = json.loads((runs[-1] / "eval.json").read_text())
        right = (rng.random(QUESTIONS) < 0.5 + 0.005 * i).astype(float).tolist()
        counted = right, [1.0] * QUESTIONS
        content["tuned"]["thinking"]["accuracy"] = interval(Sample.of(*counted), seed=1, rate=True)
        content["per_question"]["thinking"]["tuned"]["accuracy"] = counted
        write_json(runs[-1] / "eval.json", content)
    found = compare(runs)
    assert found.recommended is None
    assert found.verdict[0].startswith("No ratio is recommended: the differences are within noise")


def test_no_ratio_is_recommended_when_all_break_a_mode(tmp_path):
    found = compare([make_run(tmp_path, s, adherence=0.3) for s in SHARES[:3]])
    assert found.recommended is None
    assert found.verdict[0].startswith("No ratio is recommended: each breaks a mode or the chat. Highest is ")


def test_no_ratio_is_recommended_when_none_is_shown_to_beat_the_base(tmp_path):
    found = compare([make_run(tmp_path, s, thinking=a) for s, a in ((0.25, 0.1), (0.75, 0.4))])
    assert found.recommended is None
    assert found.verdict[0].startswith("No ratio is recommended: none is shown to beat the base. Highest is 75% ")
    assert found.verdict[2].startswith("Below the base: 25% reasoning (-30 points")


def test_of_tied_ratios_only_those_that_beat_the_base_count(tmp_path):
    shares = ((0.0, 0.1), (0.25, 0.42), (0.75, 0.5))
    found = compare([make_run(tmp_path, s, thinking=a) for s, a in shares])
    assert found.recommended.label == "75% reasoning"
    assert any("ties with 25% reasoning" in text for text in [*found.verdict, *found.notes])


def test_tied_ratios_go_to_the_one_nearest_to_the_base_as_scales_do(tmp_path):
    settings = ((0.25, 0.2, 0.01), (0.5, 0.88, 0.3), (0.75, 0.9, 0.1))
    found = compare([make_run(tmp_path, s, thinking=a, kl=k) for s, a, k in settings])
    assert found.recommended.label == "75% reasoning"


# --- which runs can be compared


def test_runs_with_chat_questions_only_are_compared_by_their_chat_answers(tmp_path):
    runs = [make_run(tmp_path, s, chat=c, asked=("accuracy/chat",)) for s, c in ((0.0, 0.95), (1.0, 0.6))]
    found = compare(runs)
    assert found.left_out == {}
    assert found.goal == ("non_thinking", "accuracy/chat")
    assert found.verdict[2].startswith("Below the base: 100% reasoning (-30 points")
    assert write(found, tmp_path / "report")["png"].is_file()


def test_runs_of_an_instruct_model_have_one_mode_everywhere_and_their_axis_is_a_source(tmp_path):
    runs = [
        make_run(tmp_path, s, thinking=a, kl=k, modes=("non_thinking",))
        for s, a, k in ((0.0, 0.9, 0.4), (0.5, 0.88, 0.1), (0.9, 0.5, 0.05))
    ]
    found = compare(runs)
    assert found.goal == ("non_thinking", "accuracy")
    assert [point.label for point in found.points] == ["0% maths", "50% maths", "90% maths"]
    assert found.recommended.label == "50% maths"  # of the tied ones, the lower KL
    shown = printed(found, folder=tmp_path / "report")
    assert "thinking" not in shown
    assert "thinking" not in " ".join(
        name for row in numbers(found) for name in row if not name.startswith("non_thinking")
    )


def test_what_the_base_never_finished_and_a_forgetting_that_is_no_number_are_left_out_of_table_and_picture(tmp_path):
    runs = [make_run(tmp_path, s, thinking=a, asked=("accuracy",)) for s, a in ((0.0, 0.5), (1.0, 0.9))]
    for run in runs:
        content = json.loads((run / "eval.json").read_text())
        content["base"]["thinking"]["accuracy"] = content["tuned"]["forgetting"]["kl"] = dict.fromkeys(("value", "n"))
        write_json(run / "eval.json", content)
    found = compare(runs)
    assert found.recommended is None
    why = "No ratio is recommended: none is shown to beat the base. Highest is"
    assert found.verdict[0] == f"{why} 100% reasoning: reasoning questions with thinking 90%."
    assert write(found, tmp_path / "report")["png"].is_file()


def test_runs_that_differ_in_more_than_the_share_are_compared_by_name_and_the_keys_are_said(tmp_path):
    runs = [
        make_run(tmp_path, s, thinking=a, settings={"learning_rate": r}, name=f"sweep_pocket-r{s}-learning_rate{r}")
        for s, a, r in ((0.25, 0.9, 1e-4), (0.75, 0.5, 2e-4))
    ]
    found = compare(runs)
    assert [point.label for point in found.points] == [run.name for run in runs]
    assert found.recommended.label == runs[0].name
    assert "25%" not in found.verdict[0]  # no share is recommended
    assert found.notes[0].endswith(
        "more than a share: train.learning_rate, share of talk, share of maths, share of reasoning."
    )


def test_keys_that_do_not_change_the_training_do_not_count_as_a_difference(tmp_path):
    runs = [make_run(tmp_path, 0.25), make_run(tmp_path, 0.75, settings={"report_to": "none", "logging_steps": 5})]
    assert compare(runs).axis == "reasoning"


def test_runs_evaluated_differently_or_unfinished_are_named_and_left_out(tmp_path):
    runs = [make_run(tmp_path, s) for s in SHARES[:3]]
    runs += [
        make_run(tmp_path, 0.75, level="full"),
        make_run(tmp_path, 1.0, questions="q2"),
        make_run(tmp_path, 0.1, scored=False),
    ]
    (tmp_path / "damaged").mkdir()
    for name in ("recipe.yaml", "mix.json", "manifest.json", "eval.json"):
        (tmp_path / "damaged" / name).write_text("{")
    found = compare([*runs, tmp_path / "damaged"])
    reasons = found.left_out
    assert [run.name for point in found.points for run in point.runs] == [run.name for run in runs[:3]]
    assert reasons[runs[3].name] == "evaluated differently: level full instead of quick"
    assert reasons[runs[4].name] == "evaluated differently: other questions"
    assert any("`python -m toolkit evaluate NAME --level full` for each" in note for note in found.notes)
    assert f"no eval.json; `python -m toolkit evaluate {runs[5].name}`" in reasons[runs[5].name]
    assert "mix.json: expected a JSON file" in reasons["damaged"]
    assert all(any(name in note for note in notes(found)) for name in reasons)


def test_the_largest_group_evaluated_alike_is_compared_and_not_a_mixture_that_no_run_has(tmp_path):
    """Of two runs, one has the first level by name, the other the first questions: neither has both."""
    runs = [make_run(tmp_path, 0.25, level="full", questions="q9"), make_run(tmp_path, 0.75, questions="q3", name="b")]
    found = compare(runs)
    assert [run.name for point in found.points for run in point.runs] == ["b"]  # the first by name
    assert found.left_out == {runs[0].name: "evaluated differently: level full instead of quick; other questions"}
    pair = [make_run(tmp_path, s, level="full", questions="q4") for s in (0.5, 1.0)]
    found = compare([*runs, *pair])
    assert {run.name for point in found.points for run in point.runs} == {run.name for run in pair}


def test_of_groups_of_equal_size_the_one_with_more_questions_is_compared(tmp_path, monkeypatch):
    many = make_run(tmp_path, 0.25, name="more", questions="q2")
    monkeypatch.setattr(sys.modules[__name__], "QUESTIONS", 8)
    few = make_run(tmp_path, 0.75, name="few")
    found = compare([few, many])
    assert found.left_out == {"few": "evaluated differently: other questions; 8 questions kept instead of 60"}


def test_no_run_at_all_is_an_error_that_says_why(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ToolkitError, match=r"empty: incomplete: no recipe\.yaml"):
        compare([tmp_path / "empty"])


# --- what people see


def many(tmp_path):
    return [make_run(tmp_path, s, seed=n, thinking=0.3 + s / 2, name=f"sweep_pocket-r{s}-s340{n}")
            for s in SHARES for n in (7, 8)]  # fmt: skip


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_shows_every_run_and_number_whole(tmp_path, width):
    runs = many(tmp_path)
    found = compare(runs)
    shown = printed(found, width, tmp_path / "report")
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    table = printed(found, width)
    assert all(f"{value}%" in table for value in ("40", "30", "55", "80"))
    assert all(run.name in shown for run in runs)
    assert shown.rstrip().splitlines()[-1].startswith("next: python -m toolkit ")


def test_long_names_that_differ_at_the_end_stay_apart_at_80_columns(tmp_path):
    runs = [
        make_run(tmp_path, 0.5, settings={"learning_rate": r, "optim": f"adam{r}"}, name=f"{'long_' * 8}{r}")
        for r in (1e-4, 2e-4)
    ]
    shown = "".join(re.sub(r" +[-0-9]*%.*", "", line).strip() for line in printed(compare(runs)).splitlines())
    assert all(run.name in shown for run in runs)


@pytest.mark.parametrize("named", [False, True])
def test_every_label_of_the_picture_lies_inside_and_no_two_names_are_equal(tmp_path, named):
    if named:
        runs = [make_run(tmp_path, 0.5, thinking=a, kl=k, settings={"learning_rate": r, "optim": f"o{r}"}, name=f"a_rather_long_name_{r}")
                for a, k, r in ((0.3, 0.1, 1e-4), (0.9, 0.8, 2e-4), (0.9, 0.8, 3e-4))]  # fmt: skip
    else:
        runs = [make_run(tmp_path, s, thinking=0.3 + s / 2, kl=s, chat=1 - s / 5) for s in SHARES]
    picture = figure(compare(runs))
    picture.savefig(tmp_path / "drawn.png", dpi=60)
    renderer = FigureCanvasAgg(picture).get_renderer()
    frontier = picture.axes[0]
    inside = frontier.get_window_extent(renderer)
    texts = [text for text in frontier.texts if text.get_text()]
    assert len(texts) >= 3
    for text in texts:
        box = text.get_window_extent(renderer)
        assert inside.x0 <= box.x0 <= box.x1 <= inside.x1, text.get_text()
        assert inside.y0 <= box.y0 <= box.y1 <= inside.y1, text.get_text()
    for drawn in (picture._suptitle, *(axes.title for axes in picture.axes)):
        box = drawn.get_window_extent(renderer)
        assert picture.bbox.x0 <= box.x0 <= box.x1 <= picture.bbox.x1
    if named:
        names = picture.get_suptitle().splitlines()
        assert [name.split() for name in names] == [[str(i), run.name] for i, run in enumerate(runs, 1)]


def drawn(axes):
    """(colour, x, y) of every point of a panel, in the order of the comparison."""
    bars = [container.lines[0] for container in axes.containers]
    return [(line.get_color(), line.get_xdata()[0], line.get_ydata()[0]) for line in bars]


def test_the_base_and_every_point_are_in_the_picture_in_per_cent_and_the_recommended_is_dark(tmp_path):
    found = compare([make_run(tmp_path, s, thinking=0.3 + s / 2, kl=0.1 + s) for s in SHARES])
    gained, distance = (drawn(axes) for axes in figure(found).axes)
    assert len(gained) == 6
    assert [round(100 * x) for _, x, _ in gained] == [40, 30, 43, 55, 68, 80]
    assert {round(100 * y) for _, _, y in gained} == {90}
    assert figure(found).axes[0].xaxis.get_major_formatter()(0.4) == "40%"
    colours = [colour for colour, _, _ in gained]
    best = 1 + found.points.index(found.recommended)
    assert [i for i, colour in enumerate(colours) if colours.count(colour) == 1] == [0, best]
    assert [(x, pytest.approx(y)) for _, x, y in distance] == [(s, 0.1 + s) for s in SHARES]


def test_the_intervals_of_the_picture_are_those_of_the_table(tmp_path):
    found = compare([make_run(tmp_path, s, thinking=0.3 + s / 2) for s in SHARES])
    (bars, *_) = figure(found).axes[0].containers[3].lines[2]
    (left, _), (right, _) = bars.get_segments()[0]
    score = found.points[2].values["thinking", "accuracy"]
    assert [left, right] == pytest.approx([score.low, score.high])


def test_the_csv_reads_back_and_the_same_runs_give_the_same_files(tmp_path):
    found = compare(many(tmp_path))
    paths = write(found, tmp_path / "report")
    rows = list(csv.DictReader(paths["csv"].open()))
    assert [row["label"] for row in rows] == ["base", *(f"{100 * s:g}% reasoning" for s in SHARES)]
    assert float(rows[-1]["thinking/accuracy"]) == pytest.approx(0.8, abs=0.01)
    assert float(rows[2]["reasoning_share_examples"]) == pytest.approx(1 / 13)
    again = write(compare(many(tmp_path / "more")), tmp_path / "again")
    # nothing in them depends on the hour
    assert [path.read_bytes() for path in again.values()] == [path.read_bytes() for path in paths.values()]


def test_a_table_needs_neither_matplotlib_nor_wandb_nor_pandas(tmp_path):
    runs = [str(make_run(tmp_path, s)) for s in SHARES]
    code = (
        "import sys; from toolkit.__main__ import main; main(['compare', *sys.argv[1:]]); "
        "print(sorted({'matplotlib', 'wandb', 'pandas', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *runs], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "next: python -m toolkit" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


# --- one seed, and what differs beside the ratio


def test_one_seed_each_is_said_with_the_spread_that_seeds_had_and_no_recommendation_in_words(tmp_path):
    runs = [make_run(tmp_path, s, thinking=a) for s, a in ((0.25, 0.5), (0.75, 0.9))]
    verdict = compare(runs).verdict
    assert verdict[0].startswith("Best so far, with one seed each: 75% reasoning")
    (sentence,) = [line for line in verdict if line.startswith("One seed: ")]
    assert f"up to {100 * SEED_SPREAD:.0f} points on the pocket model" in sentence
    runs += [make_run(tmp_path, s, thinking=a, seed=2) for s, a in ((0.25, 0.5), (0.75, 0.9))]
    verdict = compare(runs).verdict
    assert verdict[0].startswith("Recommended: 75% reasoning")
    assert not any(line.startswith("One seed") for line in verdict)


def test_rows_per_step_are_said_where_they_differ(tmp_path):
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    few = make_run(tmp_path, 1.0, settings=sizes | {"gradient_accumulation_steps": 1}, name="few")
    found = compare([make_run(tmp_path, 0.0, settings=sizes, name="some"), few])
    assert found.axis == "reasoning"
    assert any(note.startswith("Rows per step: 8 to 16") for note in found.notes)
    same = [make_run(tmp_path, s, settings=sizes, name=f"same{s}") for s in (0.0, 1.0)]
    assert not any("Rows per step" in note for note in compare(same).notes)


def test_runs_that_differ_in_one_key_are_points_on_its_axis(tmp_path):
    runs = [
        make_run(tmp_path, 0.5, thinking=a, seed=seed, settings={"learning_rate": r}, name=f"rate{r}-s{seed}")
        for r, a in ((5e-4, 0.9), (1e-4, 0.5), (2e-4, 0.9))
        for seed in (1, 2)
    ]
    found = compare(runs)
    assert found.axis == "train.learning_rate"
    assert [point.label for point in found.points] == [f"learning_rate {r}" for r in ("0.0001", "0.0002", "0.0005")]
    assert "between 3 values are chance" in found.verdict[1]


# --- damage


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("eval.json", lambda text: text[: len(text) // 2]),
        ("eval.json", lambda _: "[]"),
        ("eval.json", lambda text: text.replace("0.", '"0."', 3)),
        ("eval.json", lambda _: '{"base": 1, "tuned": {}, "per_question": {}}'),
        ("mix.json", lambda text: text.replace("planned", "plan")),
        ("manifest.json", lambda _: "null"),
        ("recipe.yaml", lambda _: "- a\n- list\n"),
        ("recipe.yaml", lambda _: "name: {"),
        ("recipe.yaml", lambda _: b"\xff\xfe\x00"),
    ],
)
def test_a_damaged_file_costs_one_run_and_says_which(tmp_path, file, damage):
    runs = [make_run(tmp_path, s) for s in SHARES]
    text = (runs[2] / file).read_text()
    content = damage(text)
    (runs[2] / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = compare(runs)
    assert list(found.left_out) == [runs[2].name]
    assert len(found.points) == 4


def test_a_run_whose_questions_were_cut_is_left_out_and_stops_nothing(tmp_path):
    runs = [make_run(tmp_path, s) for s in SHARES]
    content = json.loads((runs[2] / "eval.json").read_text())
    sums = content["per_question"]["thinking"]["tuned"]["accuracy"]
    content["per_question"]["thinking"]["tuned"]["accuracy"] = [row[:40] for row in sums]
    write_json(runs[2] / "eval.json", content)
    found = compare(runs)
    assert "questions kept instead of 60" in found.left_out[runs[2].name]
    assert len(found.points) == 4


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    run = make_run(tmp_path, 0.5)
    file = run / "recipe.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert compare([run]).left_out == {}
