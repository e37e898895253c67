"""Paths, writes, locks and damaged small files: what a run folder survives, and what each failure says."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from toolkit import files
from toolkit.files import (
    ROOT,
    ToolkitError,
    append_rows,
    find,
    lock,
    outputs,
    read_if_there,
    read_json,
    read_jsonl,
    write_json,
)

HOLD = """
import sys, time
from pathlib import Path
from toolkit.files import complete, lock
with lock(Path(sys.argv[1]), "train"), complete(Path(sys.argv[1]) / "weights.bin") as partial:
    partial.write_bytes(b"live")
    print("holding", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    return folder


@pytest.fixture
def holder(run):
    """A process that holds the run and is in the middle of writing a file."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "holding\n"
    yield process
    process.kill()
    process.wait()


def spellings(run: Path) -> dict[str, Path]:
    link = run.parent / "another-name"
    link.symlink_to(run)
    return {
        "dot": Path(),
        "through a child": run / "sub" / "..",
        "symlink": link,
        "parent": Path("..") / run.name,
        "double slash": Path(f"{run.parent}//{run.name}/"),
    }


@pytest.mark.usefixtures("holder")
@pytest.mark.parametrize("spelling", ["dot", "through a child", "symlink", "parent", "double slash"])
def test_one_folder_has_one_lock_however_it_is_spelled(spelling, run, monkeypatch):
    folder = spellings(run)[spelling]
    monkeypatch.chdir(run)
    with pytest.raises(ToolkitError, match=r"in use by `train` \(process"), lock(folder, "export"):
        pass
    assert len([*run.glob("*.partial")]) == 1


@pytest.mark.usefixtures("holder")
def test_the_lock_of_a_parent_folder_leaves_what_a_living_process_writes_in_a_run_inside(run):
    with lock(run.parent, "export"):
        assert len([*run.glob("*.partial")]) == 1


def test_what_a_killed_process_left_half_written_is_removed(run, holder):
    holder.kill()
    holder.wait()
    with lock(run, "train"):
        assert [*run.glob("*.partial")] == []


def test_a_folder_that_is_renamed_under_its_lock_is_noticed_at_the_next_write(run):
    with lock(run, "train"):
        write_json(run / "manifest.json", {})
        run.rename(run.with_name("renamed"))
        for write in (
            lambda: write_json(run / "manifest.json", {}),
            lambda: append_rows(run / "sub" / "rows.jsonl", [{}]),
        ):
            with pytest.raises(
                ToolkitError, match=r"mine: was renamed or removed while `train` writes to it: rename it back"
            ):
                write()
    assert not run.exists()


def test_a_folder_that_another_took_the_place_of_is_noticed(run):
    with lock(run, "train"):
        write_json(run / "manifest.json", {})
        run.rename(run.with_name("renamed"))
        run.mkdir()
        with pytest.raises(ToolkitError, match="was renamed or removed"):
            write_json(run / "manifest.json", {})


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EFBIG, "larger than this file system or `ulimit -f` allows"),
        (errno.ENOENT, "was renamed or removed meanwhile"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.EACCES, "not writable"),
        (errno.EROFS, "not writable"),
        (errno.EIO, "the disk reports an error"),
    ],
)
def test_the_advice_fits_the_cause_of_a_failed_write(number, advice, tmp_path):
    said = str(files.write_error(tmp_path / "x.json", OSError(number, os.strerror(number))))
    assert advice in said
    assert ("free some space" in said) == (number in (errno.ENOSPC, errno.EDQUOT))


@pytest.mark.parametrize("ending", [b"\xef\xbb\xbf", b""])
@pytest.mark.parametrize("line_break", [b"\r\n", b"\n"])
def test_what_an_editor_adds_to_a_file_is_read(ending, line_break, tmp_path):
    text = ending + line_break.join([b'{"a": 1,', b'"b": 2}', b""])
    (tmp_path / "x.json").write_bytes(text)
    assert read_json(tmp_path / "x.json") == {"a": 1, "b": 2}
    (tmp_path / "x.jsonl").write_bytes(ending + line_break.join([b'{"a": 1}', b'{"a": 2}', b""]))
    assert read_jsonl(tmp_path / "x.jsonl") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("content", [b'{"a": 1', b"", b"\xff\xfe{\x00}\x00", b"[1]", b"\x00" * 40, b'{"a": "caf\xe9"}'])
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("manifest.json", "run the `train` command that began this run again"),
        ("eval.json", "python -m toolkit evaluate mine"),
        ("export.json", "python -m toolkit export mine"),
        ("certificate.json", "python -m toolkit export mine"),
    ],
)
def test_a_damaged_file_of_a_run_names_the_command_that_writes_it_again(content, name, command, run):
    (run / name).write_bytes(content)
    with pytest.raises(ToolkitError, match=f"{name}: .*{command}"):
        read_json(run / name)


def test_a_json_file_that_is_not_there_is_empty_and_a_damaged_one_is_refused(run):
    assert read_if_there(run / "certificate.json") == {}
    (run / "certificate.json").write_text("{")
    with pytest.raises(ToolkitError, match=r"certificate\.json: expected a JSON file"):
        read_if_there(run / "certificate.json")


def test_numbers_that_are_none_in_json_stay_readable(tmp_path):
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), 1]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 1]}


def test_a_pipe_is_no_source_and_is_named_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    began = time.monotonic()
    with pytest.raises(ToolkitError, match=r"rows.jsonl: is a pipe.*write it to a file"):
        files.check_regular(tmp_path / "rows.jsonl")
    assert time.monotonic() - began < 1
    files.check_regular(tmp_path)
    (tmp_path / "real.jsonl").touch()
    files.check_regular(tmp_path / "real.jsonl")


def test_outputs_is_a_folder_here_unless_the_variable_names_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOOLKIT_OUTPUTS", "")
    assert outputs() == tmp_path / "outputs"
    monkeypatch.setenv("TOOLKIT_OUTPUTS", "elsewhere")
    assert outputs() == tmp_path / "elsewhere"
    monkeypatch.setenv("TOOLKIT_OUTPUTS", "~/mine")
    assert outputs() == Path.home() / "mine"


def test_what_ships_is_found_from_any_folder_and_nothing_else_beside_the_package_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("data_recipes/samples/heldout_chat.jsonl") == ROOT / "data_recipes/samples/heldout_chat.jsonl"
    # in site-packages every folder beside the package would otherwise be a data set or a model
    assert find("toolkit") is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("token hf_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789", "token hf_…"),
        ("serve mine --api-key sesame", "serve mine --api-key …"),
        ("serve mine --api-key=sesame --port 1", "serve mine --api-key=… --port 1"),
        ("model.token=secret train.x=1", "model.token=… train.x=1"),
        ("WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567", "WANDB_API_KEY=…"),
        (f"{Path.home()}/data/rows.jsonl", "~/data/rows.jsonl"),
        (f"{Path.home()}er/data", f"{Path.home()}er/data"),
    ],
)
def test_secrets_and_the_home_folder_are_taken_out_of_what_is_shared(text, shown):
    assert files.shareable(text) == shown


def test_a_path_in_the_home_folder_is_written_so_that_it_works_and_names_nobody():
    assert files.without_home(str(Path.home() / "data" / "x.jsonl")) == "~/data/x.jsonl"
    assert files.without_home("owner/name") == "owner/name"
    assert files.without_home("/srv/data") == "/srv/data"


def test_what_is_uploaded_beside_an_adapter_names_no_home_folder_and_the_vocabulary_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    adapter = tmp_path / "adapter"
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": f"{tmp_path}/models/mine", "r": 8})
    files.write_text(adapter / "README.md", f"base_model: {tmp_path}/models/mine\n- {tmp_path}/models/mine\n")
    write_json(adapter / "tokenizer.json", {"vocab": {f"{tmp_path}/": 7}})
    files.hide_home(adapter)
    assert read_json(adapter / "adapter_config.json") == {"base_model_name_or_path": "~/models/mine", "r": 8}
    assert str(tmp_path) not in (adapter / "README.md").read_text()
    assert read_json(adapter / "tokenizer.json") == {"vocab": {f"{tmp_path}/": 7}}
