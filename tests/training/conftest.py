"""Runs that the tests of training share, each trained once a session, and a copy of them to be damaged."""

import shutil

import pytest

from tests.support.pocket_run import trained
from toolkit.files import outputs

RISING = ["train.learning_rate=0.03", "train.lr_scheduler_type=constant", "train.warmup_steps=0", "train.max_steps=9"]
"""A validation loss that falls, then rises."""


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """An outputs folder with the finished run `run`, of 4 steps with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_OUTPUTS", str(folder))
        trained("run")
    return folder


@pytest.fixture(scope="session")
def rising(root):
    """The finished run `rising` in that folder: 9 steps, best before its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_OUTPUTS", str(root))
        return trained("rising", *RISING)[0]


@pytest.fixture
def elsewhere():
    """The outputs folder of this test."""
    outputs().mkdir(parents=True)
    return outputs()


@pytest.fixture
def copy(root):
    """The outputs folder of this test, with a copy of the finished runs."""
    return shutil.copytree(root, outputs())
