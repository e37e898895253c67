"""The package installs: a wheel is built without a network and holds everything that the code reads; a copy of it works in
an empty folder."""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support import venvs
from toolkit import __version__
from toolkit.files import ROOT
from toolkit.machine import install

SMALL = (
    "data.budget=3000 data.validation_size=8 train.max_steps=3 evaluate.max_new_tokens=8 train.report_to=none".split()
)
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def tracked(*folders: str) -> set[str]:
    """Files that git holds, or would, in the folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in names if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of this checkout: building leaves folders of its own beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    archive = folder / "source.tar"
    with tarfile.open(archive, "w") as tar:
        for name in sorted(tracked()):
            tar.add(ROOT / name, arcname=name)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "source", filter="data")
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*PIP, "wheel", "-q", *offline, "-w", folder / "made", folder / "source"], check=True)
    return next((folder / "made").glob("*.whl"))


def content(wheel: Path, name: str) -> str:
    """The text of the file of a wheel whose path ends like this."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(path for path in archive.namelist() if path.endswith(name))).decode()


def test_the_wheel_holds_the_two_packages_with_their_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == tracked("toolkit", "data_recipes") | {"toolkit/requirements.txt"}
    assert {"toolkit/py.typed", "toolkit/pocket/model.safetensors", "data_recipes/pocket.yaml"} <= held


def test_it_asks_for_the_pins_of_requirements_txt_and_for_a_range_of_torch(wheel):
    told = email.message_from_string(content(wheel, "/METADATA"))
    assert (told["Name"], told["Version"]) == ("qlora-toolkit", __version__)
    asked = dict(re.match(r"([\w.\-]+)([^;]*)", line).groups() for line in told.get_all("Requires-Dist"))
    low, high = (".".join(map(str, version)) for version in install.TORCH)
    windows = [line for line in told.get_all("Requires-Dist") if "win32" in line]
    assert [re.match(r"[\w-]+", line)[0] for line in windows] == ["triton-windows"]
    assert asked.pop("triton-windows")
    assert set(asked.pop("torch").split(",")) == {f">={low}", f"<{high}"}
    pins = {name: f"=={version}" for name, version in install.pins().items()}
    assert asked == {name: pin for name, pin in pins.items() if name not in {"torch", *install.NO_DEPS}}


def test_an_installed_copy_knows_the_pins_that_it_needs(wheel, tmp_path, monkeypatch):
    """`python -m toolkit setup` reads them there; notebooks and checks are extras, which pip installs when asked."""
    (tmp_path / "requirements.txt").write_text(content(wheel, "toolkit/requirements.txt"), encoding="utf-8")
    every = install.pins()
    monkeypatch.setattr(install, "REQUIREMENTS", tmp_path / "requirements.txt")
    assert every.keys() - install.pins().keys() >= {"pytest", "ruff", "jupyterlab"}
    assert install.pins().items() <= every.items()
    assert {"torch", "trl", *install.NO_DEPS} <= install.pins().keys()


@pytest.mark.slow  # three processes that import torch
def test_an_installed_copy_trains_evaluates_and_exports_in_an_empty_folder(wheel, tmp_path):
    python = venvs.make(tmp_path / "venv")
    subprocess.run([*PIP, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in ("TOOLKIT_OUTPUTS", "PYTHONPATH")}

    def toolkit(*words: str) -> str:
        done = subprocess.run([python, "-m", "toolkit", *words], cwd=empty, env=kept, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    toolkit("train", "pocket", *SMALL)
    toolkit("evaluate", "pocket")
    toolkit("export", "pocket", "--quant", "q8_0")
    run = empty / "outputs" / "pocket"
    assert {"eval.json", "certificate.json", "gguf", "adapter"} <= {path.name for path in run.iterdir()}
    assert {path.name for path in empty.iterdir()} <= {"outputs", "unsloth_compiled_cache"}
