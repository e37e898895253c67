"""One toy model, run and export for the tests of this folder that change nothing in them, or copy them first."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
from rich.console import Console

from tests.support.export_fixtures import base_model, run_folder
from toolkit.export import export, parity


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


@pytest.fixture(scope="session", autouse=True)
def one_reference_process():
    """Where an earlier file has imported Unsloth, each verification would start a process for its reference pass: one serves
    all of a session."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        own_process = parity._in_own_process
        patch.setattr(parity, "_in_own_process", lambda *request: pool.submit(parity.log_probs, *request).result())
        yield own_process
