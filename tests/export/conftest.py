"""One toy model, run and export for the tests of this folder that change nothing in them, or copy them first."""

import pytest
from rich.console import Console

from tests.support.export_fixtures import base_model, run_folder
from toolkit.export import export


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return base_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def trained(base, tmp_path_factory):
    """A run that was trained and not exported."""
    return run_folder(tmp_path_factory.mktemp("trained") / "toy", base)


@pytest.fixture(scope="session")
def sound(base, tmp_path_factory):
    """(run folder, certificate) of an export with an F16 and a Q4_K_M file."""
    run = run_folder(tmp_path_factory.mktemp("sound") / "toy", base)
    return run, export(run, quants=("f16", "q4_k_m"), console=Console(quiet=True))
