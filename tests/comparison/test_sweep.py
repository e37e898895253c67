"""A sweep gives every ratio the same, does each run once, and shows what crashed."""

import collections
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time

import pandas as pd
import pytest
import yaml
from rich.console import Console

from tests.comparison.test_compare import evaluation, sums
from toolkit import recipe as recipes
from toolkit.comparison import sweep as sweeps
from toolkit.comparison.sweep import common_steps, plan, rows_per_step, settings_of_key, settings_of_share, sweep, work
from toolkit.data.mix import compile_mix
from toolkit.data.render import load_chat
from toolkit.evaluation.questions import SHIPPED, from_mix, questions_of
from toolkit.files import ROOT, ToolkitError
from toolkit.view.progress import Progress

RATIOS = [0, 0.25, 0.5, 0.75, 1]
RUNNER = textwrap.dedent("""
    # A stand-in for training: leaves a run folder, and a line in ran.txt for each time it was called.
    import json, os, sys, time
    from pathlib import Path
    import yaml

    sys.path.insert(0, os.environ["TEST_ROOT"])
    from toolkit.files import lock

    given, home = Path(sys.argv[1]), Path(os.environ["TOOLKIT_OUTPUTS"])
    recipe = yaml.safe_load(given.read_text())
    with open(home / "ran.txt", "a") as ran:
        ran.write(recipe["name"] + "\\n")
    folder = home / recipe["name"]
    folder.mkdir(exist_ok=True)
    held = lock(folder, "train")
    held.__enter__()  # as long as this process lives, like a training
    (folder / "recipe.yaml").write_text(given.read_text())
    steps = recipe["train"]["max_steps"]
    for step in range(1, 11):
        (folder / "metrics.jsonl").write_text(json.dumps({"step": steps * step // 10, "loss": 1.0}) + "\\n")
        time.sleep(float(os.environ.get("TEST_SECONDS", 0)) / 10)
    flag = home / f"crash-{recipe['name']}"
    if flag.exists():
        lives = int(flag.read_text())
        flag.write_text(str(lives - 1))
        if lives > 0:
            print("step 7/9"); sys.exit("RuntimeError: the cable was pulled")
    shares = {s["name"]: s["fraction"] for s in recipe["data"]["sources"]}
    modes = {s["name"]: {"mode": s["mode"]} for s in recipe["data"]["sources"]}
    files = {
        "mix.json": {"unit": "supervised_tokens", "planned": shares, "sources": modes, "limited_by": None,
                     "achieved": {u: shares for u in ("examples", "tokens", "supervised_tokens")},
                     "achieved_modes": {u: {modes[n]["mode"]: s for n, s in shares.items()}
                                        for u in ("examples", "tokens", "supervised_tokens")}},
        "eval.json": json.loads((home / "eval.json").read_text()),
        "manifest.json": {"model": {"name": "pocket"}, "finished": "now", "group": os.environ["TOOLKIT_SWEEP"],
                          "train_seconds": float(os.environ.get("TEST_TRAIN_SECONDS", 0))},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
""")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Two sources, a recipe and a scripted runner; outputs go to a folder of the test."""
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path / "out"))
    monkeypatch.setenv("TEST_ROOT", str(ROOT))
    monkeypatch.setattr(sweeps, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(sweeps, "TRAIN", [sys.executable, str(tmp_path / "runner.py")])
    (tmp_path / "out").mkdir()
    (tmp_path / "runner.py").write_text(RUNNER)
    rates = {"thinking": (0.4, 0.9, 1.0), "non_thinking": (0.2, 0.9, 1.0)}
    asked = evaluation(sums(rates, rates, 0.1))
    (tmp_path / "out" / "eval.json").write_text(json.dumps(asked))
    write_rows(tmp_path / "maths.jsonl", 90, "Carry the one, then add the tens and the hundreds. " * 3)
    write_rows(tmp_path / "talk.jsonl", 300, "")
    sources = [
        {"path": str(tmp_path / "maths.jsonl"), "mode": "thinking", "fraction": 0.75},
        {"path": str(tmp_path / "talk.jsonl"), "mode": "non_thinking", "fraction": 0.25},
    ]
    values = {
        "name": "tiny",
        "data": {"sources": sources, "budget": 4000, "validation_size": 4, "duplicates": "exact"},
        "model": {"model_name": "pocket", "max_seq_length": 512},
        "train": {"max_steps": 20, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def write_rows(file, count, reasoning):
    rows = []
    for i in range(count):
        answer = {"role": "assistant", "content": f"The number is {i} and no other."}
        if reasoning:
            answer["reasoning_content"] = f"{reasoning} That gives {i}."
        question = f"What do the columns of {i} add up to?" if reasoning else f"Which number is called {i}?"
        rows.append({"messages": [{"role": "user", "content": question}, answer]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def silent():
    return Console(file=open(os.devnull, "w"), width=200)


def loud():
    return Console(file=open(os.devnull, "w"), width=200, record=True)


def do(project, ratios, console=None):
    """Plan and work, without the picture at the end; returns the runs that failed."""
    runs = planned(recipes.load(project / "tiny.yaml"), ratios)
    folder = project / "out/tiny-sweep"
    sweeps.write_plan(folder, runs)
    return work(runs, folder, console or silent())


def planned(base, shares, seeds=1, console=None, of="reasoning"):
    """The plan of a sweep over shares."""
    return plan(base, settings_of_share(of, shares, base), seeds, console or silent())


def run_sweep(project, *, shares=(0, 1), seeds=1, console=None):
    return sweep(project / "tiny.yaml", shares=shares, seeds=seeds, console=console or silent())


def ran(project):
    return collections.Counter((project / "out" / "ran.txt").read_text().split())


# --- the plan


def test_every_ratio_gets_the_same_supervised_tokens_in_the_same_steps(project):
    runs = planned(recipes.load(project / "tiny.yaml"), RATIOS, 1)
    plans = pd.DataFrame([run.row for run in runs])
    assert plans.reasoning_share.tolist() == pytest.approx(RATIOS, abs=0.01)
    assert plans.steps.nunique() == 1
    assert len({run.recipe.data.budget for run in runs}) == 1
    assert plans.supervised_tokens.tolist() == pytest.approx([4000] * 5, rel=0.02)
    # 20 steps of few rows: half a row a step is 6%
    assert plans.tokens_trained_on.tolist() == pytest.approx(plans.supervised_tokens.tolist(), rel=0.06)
    assert (
        plans.rows_per_step.iloc[0] > 2 * plans.rows_per_step.iloc[-1]
    )  # chat rows are short: more of them make a step


def test_a_source_that_limits_one_ratio_limits_all_of_them_and_is_named(project):
    with loud() as console:
        runs = planned(recipes.load(project / "tiny.yaml", ["data.budget=8000"]), RATIOS, 1, console)
    budgets = {run.recipe.data.budget for run in runs}
    assert len(budgets) == 1
    assert 2000 < min(budgets) < 8000
    assert "talk cannot fill 8,000 in every run" in console.export_text()
    assert [run.row["supervised_tokens"] for run in runs] == pytest.approx([min(budgets)] * 5, rel=0.02)


def test_a_budget_that_a_part_of_a_row_overshoots_is_lowered_until_every_ratio_reaches_it(project, monkeypatch):
    dice, said = random.Random(3), "the quick brown fox jumps over lazy dog and then some more words".split()

    def text(shortest, longest):
        return " ".join(dice.choice(said) for _ in range(dice.randint(shortest, longest)))

    maths = [f"<think>{text(30, 80)}</think>{i}" for i in range(dice.randint(100, 160))]
    talk = [text(100, 350) for _ in range(dice.randint(400, 500))]
    for name, answers in (("maths", maths), ("talk", talk)):
        rows = [{"query": f"{name[0]} {i}", "response": answer} for i, answer in enumerate(answers)]
        (project / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compiled = []

    def once(recipe):
        assert recipe not in compiled, "the same mix is compiled again: the budget stands still"
        compiled.append(recipe)
        return compile_mix(recipe)

    monkeypatch.setattr(sweeps, "compile_mix", once)
    runs = planned(recipes.load(project / "tiny.yaml", ["data.budget=200000"]), [0.3, 0.6], 1)
    budget = runs[0].recipe.data.budget
    assert [run.row["supervised_tokens"] for run in runs] == pytest.approx([budget] * 2, rel=0.01)


def test_the_mean_row_count_decides_the_steps_when_the_recipe_counts_epochs(project):
    overrides = ["train.max_steps=-1", "train.num_train_epochs=2", "train.per_device_train_batch_size=4"]
    runs = planned(recipes.load(project / "tiny.yaml", overrides), RATIOS, 1)
    plans = pd.DataFrame([run.row for run in runs])
    assert plans.steps[0] == pytest.approx(2 * plans.rows.mean() / 4, rel=0.2)
    # whole rows: 3 or 4 a step
    assert plans.tokens_trained_on.tolist() == pytest.approx((2 * plans.supervised_tokens).tolist(), rel=0.2)


def test_common_steps_fit_whole_rows_and_never_exceed_the_memory_of_the_recipes_batch():
    seen = [3524, 2770, 2012, 1267, 517]
    steps = common_steps(seen, 150, 16)
    assert 120 <= steps <= 180
    for rows in seen:
        device, accumulation = rows_per_step(rows / steps, 16)
        assert 1 <= device <= 16
        assert device * accumulation * steps == pytest.approx(rows, rel=0.03)


def test_more_steps_than_rows_are_refused_with_the_number_that_fits(project):
    with pytest.raises(ToolkitError, match=r"set train.max_steps to at most \d+"):
        planned(recipes.load(project / "tiny.yaml", ["train.max_steps=2000"]), RATIOS, 1)


def test_runs_are_named_after_share_and_seed(project):
    runs = planned(recipes.load(project / "tiny.yaml"), [0.5], 2)
    assert [run.recipe.name for run in runs] == ["tiny-r0.5-s3407", "tiny-r0.5-s3408"]
    assert [run.recipe.data.seed for run in runs] == [3407, 3408]


def test_the_share_of_one_source_can_be_swept_where_no_source_thinks(project):
    plain = ["data.sources.0.mode=non_thinking", "data.duplicates=exact"]
    write_rows(project / "maths.jsonl", 200, "")
    base = recipes.load(project / "tiny.yaml", ["data.budget=1500", *plain])
    runs = planned(base, [0, 0.25, 0.5], of="talk")
    assert [run.recipe.name for run in runs] == ["tiny-talk0-s3407", "tiny-talk0.25-s3407", "tiny-talk0.5-s3407"]
    shares = [[source.fraction for source in run.recipe.data.sources] for run in runs]
    assert shares == [[1, 0], [0.75, 0.25], [0.5, 0.5]]
    assert len({run.row["steps"] for run in runs}) == 1
    with pytest.raises(ToolkitError, match=r"no source has mode thinking.*\(--of talk\)"):
        planned(base, [0, 0.5], 1)
    with pytest.raises(ToolkitError, match=r"tlak: no such source. Did you mean 'talk'\?"):
        planned(base, [0, 0.5], of="tlak")


def test_a_mix_given_in_counts_has_no_share_to_sweep(project):
    values = yaml.safe_load((project / "tiny.yaml").read_text())
    for source, count in zip(values["data"]["sources"], (40, 80), strict=True):
        source["path"] += f"#{count}"
        del source["fraction"]
    del values["data"]["budget"]
    (project / "tiny.yaml").write_text(yaml.safe_dump(values))
    base = recipes.load(project / "tiny.yaml")
    with pytest.raises(ToolkitError, match=r"counts \(path#500\), so it has no share to sweep"):
        planned(base, [0, 1], 1)


@pytest.mark.parametrize("width", [80, 120])
def test_the_plan_shows_every_name_and_number_whole(project, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(sweeps.plan_table(planned(recipes.load(project / "tiny.yaml"), RATIOS, 1)))
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    assert all(f"tiny-r{ratio:g}-s3407" in shown for ratio in RATIOS)


@pytest.mark.parametrize(
    ("override", "fix"),
    [("data.unit=examples", "data.unit=supervised_tokens"), ("train.packing=true", "train.packing=false")],
)
def test_what_cannot_be_compared_fairly_is_refused(project, override, fix):
    with pytest.raises(ToolkitError, match=fix):
        planned(recipes.load(project / "tiny.yaml", [override]), [0, 1], 1)


# --- the questions


def with_answers(project, name):
    """Rows of a source that carry an expected answer."""
    file = project / f"{name}.jsonl"
    rows = [json.loads(line) | {"expected_answer": str(i)} for i, line in enumerate(file.read_text().splitlines())]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts(mixed):
    chat = load_chat("pocket")
    return [chat.decode(row.ids[: row.prompt_length]) for row in mixed.train]


def test_every_run_is_asked_the_questions_that_the_recipe_as_it_stands_holds_out_and_trains_on_none(project):
    with_answers(project, "maths")
    with_answers(project, "talk")
    base = recipes.load(project / "tiny.yaml", ["data.budget=2000", "data.validation_size=8"])
    runs = planned(base, [0, 0.5, 1], 2)
    expected = {q["messages"][-1]["content"] for q in from_mix(compile_mix(base))["questions"]}
    found = [questions_of(run.recipe, compile_mix(run.recipe)) for run in runs]
    assert all(pair == found[0] for pair in found)
    reasoning, chat = found[0]
    assert (len(reasoning), len(chat)) == (6, 2)
    assert {q["messages"][-1]["content"] for q in reasoning + chat} == expected
    for run in runs:
        mixed = compile_mix(run.recipe)
        assert not [text for text in texts(mixed) if any(f"\n{question}<" in text for question in expected)]
    again = planned(base, [0, 0.5, 1], 2)
    assert [recipes.to_yaml(run.recipe) for run in again] == [recipes.to_yaml(run.recipe) for run in runs]


def test_a_sweep_without_any_expected_answer_asks_the_questions_that_ship(project):
    runs = planned(recipes.load(project / "tiny.yaml"), [0, 1], 1)
    assert [run.recipe.evaluate.questions for run in runs] == [SHIPPED] * 2


def test_questions_that_a_run_could_train_on_are_refused(project):
    with_answers(project, "maths")
    base = recipes.load(project / "tiny.yaml", ["data.decontaminate=false"])
    with pytest.raises(ToolkitError, match=r"data\.decontaminate=true"):
        planned(base, [0, 1], 1)


# --- doing it


def test_a_sweep_ends_with_table_picture_and_sentence(project):
    console = loud()
    folder = run_sweep(project, shares=RATIOS, console=console)
    assert set(ran(project).values()) == {1}
    assert len(ran(project)) == 5
    assert (folder / "comparison.png").stat().st_size > 10_000
    assert "differences are within noise" in console.export_text()  # the scripted runs are all alike
    group = json.loads((project / "out/tiny-r0-s3407/manifest.json").read_text())["group"]
    assert group == folder.name == "tiny-sweep"


def test_finished_runs_are_left_alone_and_only_the_missing_one_is_done(project):
    assert do(project, RATIOS) == []
    before = {p: p.stat().st_mtime_ns for p in (project / "out").glob("tiny-r*/*")}
    (project / "out/tiny-r0.5-s3407/eval.json").unlink()
    assert do(project, RATIOS) == []
    assert ran(project)["tiny-r0.5-s3407"] == 2
    assert sum(ran(project).values()) == 6
    changed = {p.parent.name for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert changed == {"tiny-r0.5-s3407"}


def test_a_run_that_crashes_shows_the_end_of_its_log_stops_no_other_and_is_done_by_the_next_command(project):
    (project / "out/crash-tiny-r0-s3407").write_text("1")
    console = loud()
    with pytest.raises(ToolkitError, match=r"1 of 2 runs failed: tiny-r0-s3407"):
        run_sweep(project, console=console)
    assert ran(project) == {"tiny-r0-s3407": 1, "tiny-r1-s3407": 1}
    shown = console.export_text()
    assert "step 7/9" in shown
    assert "RuntimeError: the cable was pulled" in shown
    assert (project / "out/tiny-sweep/comparison.csv").is_file()  # of what there is
    assert do(project, [0, 1]) == []
    assert ran(project) == {"tiny-r0-s3407": 2, "tiny-r1-s3407": 1}


def test_a_folder_of_another_recipe_is_refused_before_anything_trains(project):
    do(project, [0, 1])
    with pytest.raises(ToolkitError, match="holds a run of another recipe"):
        sweep(project / "tiny.yaml", ["train.max_steps=10"], shares=[0, 1], seeds=1, console=silent())
    assert sum(ran(project).values()) == 2


def damage_adapter(run):
    """An adapter that is not what its manifest says."""
    (run / "adapter").mkdir()
    (run / "adapter/adapter_model.safetensors").write_bytes(b"flipped")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["adapter"] = {"adapter_model.safetensors": "0" * 64}
    (run / "manifest.json").write_text(json.dumps(manifest))


def cut(name):
    def damage(run):
        (run / name).write_bytes((run / name).read_bytes()[:40])

    return damage


@pytest.mark.parametrize(
    "damage", [cut("manifest.json"), cut("eval.json"), cut("mix.json"), cut("metrics.jsonl"), damage_adapter]
)
def test_a_finished_run_with_a_damaged_file_is_done_again_and_not_trusted(project, damage):
    assert do(project, [0, 1]) == []
    damage(project / "out/tiny-r1-s3407")
    assert do(project, [0, 1]) == []
    expected = 1 if damage.__closure__ and damage.__closure__[0].cell_contents == "metrics.jsonl" else 2
    assert ran(project) == {"tiny-r0-s3407": 1, "tiny-r1-s3407": expected}


# --- seeds, and other keys than shares


def test_short_runs_are_trained_with_three_seeds_and_the_cost_is_said(project):
    console = loud()
    run_sweep(project, seeds=None, console=console)
    assert sorted(ran(project)) == [f"tiny-r{share}-s{seed}" for share in (0, 1) for seed in (3407, 3408, 3409)]
    assert set(ran(project).values()) == {1}
    shown = " ".join(console.export_text().split())
    assert "two more seeds of each: about 0 min" in shown
    assert "--seeds 1 leaves them out" in shown


def test_long_runs_are_trained_once_and_three_seeds_are_offered_with_their_price(project, monkeypatch):
    monkeypatch.setenv("TEST_TRAIN_SECONDS", "7200")
    console = loud()
    run_sweep(project, seeds=None, console=console)
    assert sorted(ran(project)) == ["tiny-r0-s3407", "tiny-r1-s3407"]
    shown = " ".join(console.export_text().split())
    assert "a run took 120 min, so two more of each (about 8.0 h) are trained only on request: --seeds 3" in shown
    assert "One seed: differences between runs this size came from the seed alone" in shown
    # a number that was asked for is obeyed
    run_sweep(project, seeds=2)
    assert len(ran(project)) == 4


def test_any_key_can_be_swept_at_one_budget(project):
    base = recipes.load(project / "tiny.yaml")
    runs = plan(base, settings_of_key(["train.learning_rate", "1e-4", "2e-4"], base), 1, silent())
    assert [run.recipe.train["learning_rate"] for run in runs] == [1e-4, 2e-4]
    assert [run.recipe.name for run in runs] == ["tiny-learning_rate1e-4-s3407", "tiny-learning_rate2e-4-s3407"]
    assert len({(run.row["steps"], run.row["supervised_tokens"]) for run in runs}) == 1
    over = ["train.learning_rate", "1e-4", "2e-4"]
    folder = sweep(project / "tiny.yaml", over=over, seeds=1, console=silent())
    labels = pd.read_csv(folder / "comparison.csv").label.tolist()
    assert labels == ["base", "learning_rate 0.0001", "learning_rate 0.0002"]


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        (["train.learning_rate", "1e-4"], "at least two values"),
        (["data.seed", "1", "2"], "keeps it equal"),
        (["data.budget", "1000", "2000"], "keeps it equal"),
        (["evaluate.level", "quick", "full"], "keeps it equal"),
        (["train.per_device_train_batch_size", "1", "2"], "keeps it equal"),
        (["train.learning_rte", "1e-4", "2e-4"], "learning_rate"),
        (["lora.r", "8", "many"], "lora"),
    ],
)
def test_a_key_that_cannot_be_swept_is_refused_before_anything_is_compiled(project, over, reason):
    with pytest.raises(ToolkitError, match=reason):
        settings_of_key(over, recipes.load(project / "tiny.yaml"))


def test_every_run_is_asked_as_many_questions_with_the_same_limit(project):
    runs = planned(recipes.load(project / "tiny.yaml"), [0, 1])
    settings = {(run.recipe.evaluate.questions_per_mode, run.recipe.evaluate.max_new_tokens) for run in runs}
    assert len(settings) == 1
    assert None not in settings.pop()


# --- stopped, or twice at once


def test_a_second_sweep_is_told_who_does_it_and_does_nothing(project):
    code = (
        "import sys, pathlib; from toolkit.files import lock\n"
        "with lock(pathlib.Path(sys.argv[1]), 'sweep'): print('held', flush=True); sys.stdin.readline()"
    )
    words = [sys.executable, "-c", code, str(project / "out/tiny-sweep")]
    holder = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ToolkitError, match=rf"in use by `sweep` \(process {holder.pid}, "):
        run_sweep(project)
    holder.communicate("\n")
    assert not (project / "out/ran.txt").exists()


def test_progress_shows_the_time_left_for_the_whole_sweep(project, monkeypatch):
    monkeypatch.setenv("TEST_SECONDS", "1.5")
    monkeypatch.setattr(Progress, "PLAIN_EVERY", 0.2)
    console = loud()
    assert do(project, [0, 1], console) == []
    lines = [line for line in console.export_text().splitlines() if " left" in line]
    assert len(lines) >= 4
    clock = r"\d+ s left|begun \d+ s ago|evaluating for \d+ s"
    run = rf"run (\d) of 2 \((\d+)% reasoning, seed 3407\): step (\d+) of (\d+), (?:{clock})"
    steps = [
        [int(n) for n in re.fullmatch(rf"{run}; whole sweep: (\d+) of (\d+), about \d+ s left", line).groups()]
        for line in lines
    ]
    assert {(number, share) for number, share, *_ in steps} == {(1, 0), (2, 100)}
    assert len({(of_run, total) for _, _, _, of_run, _, total in steps}) == 1
    done, total = [whole for *_, whole, _ in steps], steps[0][-1]
    assert done == [of_run * (number - 1) + step for number, _, step, of_run, *_ in steps]
    assert done == sorted(done)
    assert done[0] < total / 2 < done[-1] < total


def test_the_live_line_of_a_sweep_is_whole_at_80_columns():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with Progress(console, "whole sweep", 4800) as progress:
        progress.title = "run 4 of 15 (50% reasoning, seed 3408): step 120 of 320, 2 min left; whole sweep"
        progress.advance(1080)
        progress.bar.refresh()
        drawn = console.file.getvalue().split("\r")[-1]
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn).split("\n")[-3:]
    assert max(map(len, lines)) <= 80
    words = re.sub(r"[━╸╺\s]+", " ", " ".join(lines))
    for part in ("1080/4800", "run 4 of 15", "120 of 320", "min left; whole sweep"):
        assert part in words, words


def test_a_killed_sweep_resumes_and_waits_for_the_run_that_still_trains(project, monkeypatch):
    monkeypatch.setenv("TEST_SECONDS", "1.5")
    code = (
        "import sys; from toolkit.comparison import sweep; from rich.console import Console\n"
        "sweep.TRAIN = [sys.executable, sys.argv[2]]\n"
        "sweep.sweep(sys.argv[1], shares=[0, 1], seeds=1, console=Console(quiet=True))"
    )
    planned(recipes.load(project / "tiny.yaml"), [0, 1], 1)
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(project / "tiny.yaml"), str(project / "runner.py")], cwd=ROOT
    )
    while not (project / "out/ran.txt").is_file() and first.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)  # the run's own process holds the run now
    first.kill()
    first.wait()
    monkeypatch.setenv("TEST_SECONDS", "0")
    assert do(project, [0, 1]) == []
    assert ran(project) == {"tiny-r0-s3407": 1, "tiny-r1-s3407": 1}  # the orphan finished, and was not started twice


# --- real training


@pytest.mark.slow  # three minutes: four trainings of the pocket model
def test_a_sweep_over_two_seeds_killed_in_mid_training_ends_bit_for_bit_like_one_that_was_not(tmp_path):
    words = [sys.executable, "-m", "toolkit", "sweep", "data_recipes/sweep_pocket.yaml", "name=tiny", "data.budget=6000",
             "train.max_steps=8", "train.eval_steps=0.25", "train.save_steps=0.25", "evaluate.max_new_tokens=96",
             "evaluate.questions.0.max_rows=16", "evaluate.questions.1.max_rows=16",
             "train.per_device_train_batch_size=16", "--reasoning", "0.5", "--seeds", "2"]  # fmt: skip

    def start(name):
        environment = os.environ | {"TOOLKIT_OUTPUTS": str(tmp_path / name), "WANDB_MODE": "offline"}
        log = open(tmp_path / f"{name}.log", "a")  # noqa: SIM115 - the process writes it
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)

    def runs(name):
        return sorted((tmp_path / name).glob("tiny-r0.5-s*"))

    def steps_of_second():
        files = [run / "metrics.jsonl" for run in runs("killed")[1:]]
        return len(files[0].read_text().splitlines()) if files and files[0].is_file() else 0

    killed = start("killed")
    deadline = time.monotonic() + 300
    while steps_of_second() < 4:
        assert killed.poll() is None, (tmp_path / "killed.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    first = runs("killed")[0]
    before = {file: file.stat().st_mtime_ns for file in first.rglob("*") if file.is_file()}
    assert start("killed").wait(timeout=300) == 0, (tmp_path / "killed.log").read_text()
    assert start("whole").wait(timeout=300) == 0, (tmp_path / "whole.log").read_text()

    assert {file: file.stat().st_mtime_ns for file in first.rglob("*") if file.is_file()} == before
    assert [run.name for run in runs("killed")] == [run.name for run in runs("whole")]
    adapters = [
        [(run / "adapter/adapter_model.safetensors").read_bytes() for run in runs(n)] for n in ("killed", "whole")
    ]
    assert adapters[0] == adapters[1]
    assert adapters[0][0] != adapters[0][1]  # the seeds did differ
    for pair in zip(runs("killed"), runs("whole"), strict=True):
        mine, other = (json.loads((run / "eval.json").read_text()) for run in pair)
        assert {**mine, "seconds": 0} == {**other, "seconds": 0}
    (one, two) = [(tmp_path / n / "tiny-sweep/comparison.csv").read_text() for n in ("killed", "whole")]
    assert one == two
