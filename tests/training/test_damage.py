"""Small files of a run that an editor or a full disk damaged: the run's own command reads or writes them again."""

import shutil

import pytest

from tests.support.pocket_run import Screen, trained
from toolkit import recipe
from toolkit.files import ToolkitError, read_json

FEW = ["train.max_steps=2", "data.budget=2000", "train.eval_strategy=no", "train.load_best_model_at_end=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two steps, and the outputs folder it lies in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_OUTPUTS", str(tmp_path_factory.mktemp("damage")))
        yield trained("tiny", *FEW)[0]


def again() -> str:
    """What the run's own command says."""
    return trained("tiny", *FEW)[1]


def bom_and_crlf(content: bytes) -> bytes:
    return b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")


DAMAGE = {
    "bom and crlf": bom_and_crlf,
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "not utf-8": lambda content: content.replace(b"pocket", b"caf\xe9"),
    "utf-16": lambda content: content.decode().encode("utf-16"),
}


@pytest.mark.parametrize("name", ["recipe.yaml", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_a_run_is_read_or_written_again_by_its_own_command(name, damage, run):
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    sound = (run / name).read_bytes()
    (run / name).write_bytes(DAMAGE[damage](sound))
    again()
    assert recipe.of_run(run).name == "tiny"
    assert read_json(run / "manifest.json")["state"] == "finished"
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == weights


def test_an_edited_recipe_is_refused_by_what_reads_the_run_and_mended_by_its_own_command(run):
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    (run / "recipe.yaml").write_text(text.replace("model_name: pocket", "model_name: owner/other"), encoding="utf-8")
    with pytest.raises(ToolkitError, match="was changed after this run began"):
        recipe.of_run(run)
    again()
    assert (run / "recipe.yaml").read_text(encoding="utf-8") == text


def test_a_run_that_was_renamed_is_found_under_its_new_name(run):
    moved = run.with_name("other")
    run.rename(moved)
    try:
        assert recipe.of_run(moved).name == "tiny"
    finally:
        moved.rename(run)


def test_a_run_folder_that_is_renamed_while_it_trains_stops_the_run_and_begins_no_second_one(run):
    folder = run.with_name("moving")
    screen = Screen("step 1/", lambda: folder.rename(run.with_name("moved")))
    with pytest.raises(ToolkitError, match="moving: was renamed or removed while `train` writes to it: rename it back"):
        trained("moving", *FEW, screen=screen)
    # TRL may have saved a checkpoint between the two; nothing of ours is there
    assert {path.name for path in folder.glob("*")} <= {"checkpoints"}
    shutil.rmtree(folder, ignore_errors=True)
    # renamed back, the same command goes on from what is there
    run.with_name("moved").rename(folder)
    trained("moving", *FEW)
    assert read_json(folder / "manifest.json")["state"] == "finished"
