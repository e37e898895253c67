"""Two runs predict the ratios between them by their sums: written once, switched in memory, compared with what was trained."""

import io
import re

import pytest
from rich.console import Console

from tests.comparison.test_blend import verb
from tests.comparison.test_dial import FEW
from tests.support.pocket_run import trained
from toolkit.comparison import dial, probe
from toolkit.comparison.blend import blend
from toolkit.comparison.probe import HIGH, LOW, SHARES, WITH_REPLIES, error_note, predict, weights_of
from toolkit.comparison.runs import read_run
from toolkit.files import read_json


def test_the_weights_of_a_share_are_on_the_line_between_both_runs():
    for share in SHARES:
        low, high = weights_of(share)
        assert low + high == pytest.approx(1)
        assert low * LOW + high * HIGH == pytest.approx(share)
    assert weights_of(LOW) == [1, 0]
    assert weights_of(HIGH) == [0, 1]
    assert set(WITH_REPLIES) < set(SHARES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The two runs of a seed, as a sweep leaves them, and one that was trained half way between."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_OUTPUTS", str(tmp_path_factory.mktemp("out")))
        few = [*FEW, "train.learning_rate=1.0e-2"]
        names = {share: f"tiny-r{share:g}-s3407" for share in (LOW, 0.5, HIGH)}
        yield {share: trained(name, f"data.reasoning={share}", *few, score=True)[0] for share, name in names.items()}


FEW_SHARES, FEW_WITH_REPLIES = [LOW, 0.25, 0.5, HIGH], (0.25, 0.5, HIGH)
"""Of the nine and four that a probe scores: each takes seconds."""
FEW_SCALES = (0.5, 1.0)
"""Of its five."""


def predicted(runs, monkeypatch):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(runs[LOW].parent))
    monkeypatch.setattr(probe, "SHARES", FEW_SHARES)
    monkeypatch.setattr(probe, "WITH_REPLIES", FEW_WITH_REPLIES)
    monkeypatch.setattr(probe, "SCALES", FEW_SCALES)
    console = Console(file=io.StringIO(), width=80)
    folder = runs[LOW].parent / "tiny-sweep"
    predict([runs[LOW], runs[HIGH]], folder, console, of="reasoning")
    return folder / "probe", console.file.getvalue()


def test_a_probe_scores_every_ratio_says_its_error_and_names_the_sum_to_make(runs, monkeypatch):
    folder, shown = predicted(runs, monkeypatch)
    measured = read_json(folder / "sums-tiny-r0.1-s3407" / "probe.json")["scales"]
    assert {key for key in measured if key.startswith("fast")} == {f"fast {share:g}" for share in FEW_SHARES}
    assert {key for key in measured if key.startswith("quick")} == {f"quick {share:g}" for share in FEW_WITH_REPLIES}
    table = read_json(folder / "comparison.json")
    assert table["axis"] == "summed reasoning"
    # the base's, though the first ratio has no replies
    assert table["points"][0]["non_thinking/accuracy/chat"] is not None
    assert re.search(r"Error against 1 trainings at these ratios: \d+ points, at most \d+\.", " ".join(shown.split()))
    assert (folder / "comparison.png").stat().st_size > 10_000
    weights = re.search(r"next: python -m toolkit blend tiny-r0.1-s3407 tiny-r0.9-s3407 --weights (\S+) (\S+)", shown)
    # ratio and scale together are two weights: their sum is the scale, on the line of a ratio that was scored
    low, high = map(float, weights.groups())
    scale = low + high
    assert round((low * LOW + high * HIGH) / scale, 4) in SHARES
    dialled = read_json(next((folder / "sums-tiny-r0.1-s3407").glob("scales-*.json")))["scales"]
    assert f"quick {scale:.4g}" in dialled
    assert {key for key in dialled if key.startswith("fast")} == {f"fast {scale:g}" for scale in FEW_SCALES}
    assert read_json(folder / "scale" / "comparison.json")["axis"] == "scale"
    code, said = verb(*weights[0].split()[4:], "--name", "chosen")
    assert code == 0
    assert "dial chosen" in said

    def never(*_):
        raise AssertionError("the model is loaded again")

    monkeypatch.setattr(dial.models, "load_run", never)
    assert predicted(runs, monkeypatch)[1].splitlines()[-1] == shown.splitlines()[-1]


def test_a_ratio_in_memory_is_the_sum_that_blend_writes_at_its_weights(runs, monkeypatch):
    from toolkit.run import evaluate

    folder, _ = predicted(runs, monkeypatch)
    measured = read_json(folder / "sums-tiny-r0.1-s3407" / "probe.json")["scales"]["quick 0.25"]
    half = blend([runs[LOW], runs[HIGH]], weights_of(0.25), name="quarter", console=Console(quiet=True))
    assert evaluate(half, Console(quiet=True))["tuned"] == measured["tuned"]


def test_a_sum_at_scale_1_is_the_sum_of_its_ratio(runs, monkeypatch):
    folder, _ = predicted(runs, monkeypatch)
    sums = folder / "sums-tiny-r0.1-s3407"
    dialled = next(sums.glob("scales-*.json"))
    high = float(dialled.stem.partition("-")[2])
    ratio = read_json(sums / "probe.json")["scales"][f"quick {LOW + high * (HIGH - LOW):g}"]
    assert read_json(dialled)["scales"]["quick 1"]["tuned"] == ratio["tuned"]


def test_the_ends_of_a_probe_are_its_runs(runs, monkeypatch):
    folder, _ = predicted(runs, monkeypatch)
    measured = read_json(folder / "sums-tiny-r0.1-s3407" / "probe.json")["scales"]
    for share in (LOW, HIGH):
        run = read_json(runs[share] / "eval.json")["tuned"]["forgetting"]["kl"]["value"]
        assert measured[f"fast {share:g}"]["tuned"]["forgetting"]["kl"]["value"] == pytest.approx(run, rel=1e-3)


def test_the_error_is_of_trainings_that_were_asked_alike(tmp_path):
    from tests.comparison.test_compare import make_run

    low = make_run(tmp_path, 0.1, name="a-r0.1-s1")
    for share, accuracy, questions in ((0.25, 0.5, "q1"), (0.5, 0.8, "q1"), (0.75, 0.1, "others")):
        make_run(tmp_path, share, name=f"a-r{share}-s1", thinking=accuracy, questions=questions)
        make_run(tmp_path, share, name=f"sum{share}", thinking=0.6)
    member = {share: read_run(tmp_path / f"sum{share}") for share in WITH_REPLIES[:-1]}
    goal = ("thinking", "accuracy")
    assert error_note(goal, [low], [member]) == "Error against 2 trainings at these ratios: 15 points, at most 20."
    assert error_note(goal, [tmp_path / "b-r0.1-s1"], [member]).startswith("How wrong the sums are is not known here")


@pytest.mark.parametrize("other", [["--reasoning", "0", "1"], ["--over", "train.learning_rate", "1e-4", "2e-4"]])
def test_a_probe_chooses_the_shares_itself(other):
    code, _ = verb("sweep", "sweep_pocket", "--probe", *other)
    assert code == 2


def test_a_probe_trains_two_shares_and_predicts_when_all_runs_are_finished(monkeypatch):
    asked = {}
    monkeypatch.setattr(probe, "sweep", lambda *words, **options: asked.update(options, words=words))
    probe.probe("tiny", ["name=a"], of="talk", seeds=2)
    assert (asked["words"], asked["shares"], asked["of"], asked["seeds"]) == (
        ("tiny", ["name=a"]),
        (LOW, HIGH),
        "talk",
        2,
    )
    assert asked["ending"].keywords == {"of": "talk"}
