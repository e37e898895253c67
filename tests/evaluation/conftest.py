"""One small model with an adapter, and its tokenizer, for all tests of evaluation: whoever changes them puts them back."""

import pytest

from tests.support import export_fixtures, models


@pytest.fixture(scope="session")
def tokenizer():
    return export_fixtures.tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    return models.tuned(tokenizer)
