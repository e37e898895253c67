"""A base that changed after a run began is noticed by every later step, and a large file is not read twice for that."""

import os
import shutil

import pytest

from tests.support.pocket_run import make_run
from toolkit import recipe
from toolkit.files import POCKET, ToolkitError, read_json, sha256, write_json
from toolkit.training import base
from toolkit.training.model import load_run


@pytest.fixture
def model(tmp_path):
    """A folder with a copy of the pocket model."""
    return shutil.copytree(POCKET, tmp_path / "model")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_checksums_are_those_of_the_files(model):
    found = base.base_checksums(model)
    assert found == {name: sha256(model / name) for name in ("config.json", "model.safetensors")}


def test_a_file_is_read_once_and_again_when_it_was_written(model, monkeypatch):
    read = []
    monkeypatch.setattr(base, "sha256", lambda path: read.append(path.name) or sha256(path))
    base.base_checksums(model)
    base.base_checksums(model)
    assert sorted(read) == ["config.json", "model.safetensors"]
    times = (model / "model.safetensors").stat()
    flip(model / "model.safetensors")
    os.utime(model / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` leaves it
    assert base.base_checksums(model)["model.safetensors"] == sha256(model / "model.safetensors")
    assert read[2:] == ["model.safetensors"]


@pytest.mark.parametrize("change", ["flip", "add", "remove"])
def test_a_run_is_not_loaded_onto_another_base_than_its_own(model, tmp_path, change):
    folder = make_run(tmp_path / "outputs" / "one", base=model)
    section = recipe.load(folder / "recipe.yaml").model
    manifest = read_json(folder / "manifest.json")
    manifest["model"]["files"] = base.recorded_checksums(section)
    write_json(folder / "manifest.json", manifest)
    base.check_base(section, manifest["model"]["files"])
    changed = model / ("extra.safetensors" if change == "add" else "model.safetensors")
    {"flip": flip, "add": lambda path: path.touch(), "remove": lambda path: path.unlink()}[change](changed)
    with pytest.raises(
        ToolkitError, match=rf"{changed.name}: not the file that this run was trained on.*old file back"
    ):
        load_run(folder)


def test_a_damaged_cache_of_checksums_is_made_again(model, tmp_path):
    first = base.base_checksums(model)
    (tmp_path / "outputs" / ".checksums.json").write_text("{")
    assert base.base_checksums(model) == first
