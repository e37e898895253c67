"""The comparison of decoding with plain transformers: on the pocket model both agree, and a token that differs is named."""

import subprocess
import sys

import pytest

from tests.tools.decoding import first_differences
from toolkit.files import ROOT


def test_a_token_that_differs_and_a_reply_that_ends_early_are_named():
    ours = {"base": [[1, 2, 3], [4]], "tuned": [[5, 6], [7, 8]]}
    theirs = {"base": [[1, 9, 3], [4]], "tuned": [[5, 6], [7]]}
    assert first_differences(ours, theirs) == ["base, prompt 0: token 1 differs", "tuned, prompt 1: token 1 differs"]
    assert first_differences(ours, ours) == []


@pytest.mark.slow
def test_batched_replies_of_the_pocket_model_are_those_of_plain_transformers():
    command = [sys.executable, "-m", "tests.tools.decoding", "pocket", "4", "12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "the same tokens as plain transformers: 8 of 8 replies" in done.stdout
