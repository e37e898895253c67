"""Fixtures that several test files share."""

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never wait for a network

import hypothesis
import pytest

from tests.support.collector import pass_over_imports

# the same examples each time, so that a change that broke nothing fails nothing; new ones: python -m tests.tools.faults.fuzz
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    asked = [str(word).partition("::")[0] for word in config.invocation_params.args]
    if not any(word.endswith("test_gpu.py") for word in asked):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit for bit is a CPU's truth; tests/test_gpu.py runs when it is named
    config.addinivalue_line("markers", "slow: minutes long; `make test-slow` runs these too")
    for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if (
            number and signal.getsignal(number) is signal.SIG_IGN
        ):  # so jobs of a script and of nohup begin, and what they start
            signal.signal(number, usual)


def pytest_runtest_setup():
    pass_over_imports()


LONGEST = (
    "training/test_train.py", "tools/test_faults.py", "comparison/test_probe.py", "comparison/test_blend.py",
    "training/test_record.py", "comparison/test_dial.py", "export/test_sabotage.py", "tools/test_cuda_rig.py",
    "data/test_mix.py", "serving/test_serve.py", "export/test_export.py",
)  # fmt: skip
"""The files that take half a minute or more."""


def pytest_collection_modifyitems(items):
    """The longest files first, so that workers (`--dist loadfile --no-loadscope-reorder`) end together."""
    order = {f"tests/{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


@pytest.fixture(scope="session", autouse=True)
def outputs_of_the_session(tmp_path_factory):
    """$TOOLKIT_OUTPUTS for whatever is made before a test begins: nothing is ever written into the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("outputs_of_the_session"))
        patch.setenv("TOOLKIT_OUTPUTS", folder)
        yield folder


@pytest.fixture(autouse=True)
def outputs_of_the_test(outputs_of_the_session, tmp_path, monkeypatch):
    """$TOOLKIT_OUTPUTS of each test: a folder of its own, unless its module's fixture chose one for all its tests."""
    if os.environ["TOOLKIT_OUTPUTS"] == outputs_of_the_session:
        monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path / "outputs"))


def answer_in(folder, *request):
    """What the reference process does: the request, in the folder that its relative paths are relative to."""
    from toolkit.export import parity

    os.chdir(folder)
    return parity.log_probs(*request)


@pytest.fixture(scope="session", autouse=True)
def one_reference_process():
    """Where an earlier test has imported Unsloth, each verification would start a process for its reference pass (5 CPU seconds
    of imports): one serves all of a session. Yields the function whose place it takes."""
    from toolkit.export import parity

    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        own_process = parity._in_own_process
        patch.setattr(parity, "_in_own_process", lambda *asked: pool.submit(answer_in, os.getcwd(), *asked).result())
        yield own_process


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory):
    """A folder with the real Qwen3 tokenizer and chat template."""
    from tests.support import qwen3

    return qwen3.build(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """family("llama3") is a folder with a tiny random model of that family, built once a session (tests/support/families.py)."""
    import functools

    from tests.support import families

    return functools.cache(lambda name: families.build(name, tmp_path_factory.mktemp(name)))
