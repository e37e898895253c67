"""Fixtures that several test files share."""

import gc
import os
import signal
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never wait for a network

import hypothesis
import pytest

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


# What the libraries made when they were imported stays to the end. Searching it for garbage was a third of a small training (1.2 of
# 3.4 CPU seconds) and a fifth of importing Unsloth (1.5 of 7.3; one of 2 shared CPU cores, 2026-11-30, e694428).
gc.set_threshold(50_000, 20, 20)
MODULES_SEARCHED = [0]
"""How many modules were imported when the collector was last told to leave everything alone."""


def pytest_runtest_setup():
    if len(sys.modules) > MODULES_SEARCHED[0] + 500:
        MODULES_SEARCHED[0] = len(sys.modules)
        gc.collect()
        gc.freeze()


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
