"""What an export would stumble over is said before the training."""

import json

import pytest

from tests.support import families
from toolkit import recipe
from toolkit.export.preflight import findings


@pytest.fixture
def model(tmp_path):
    """A model's small files."""
    families.build_tokenizer("qwen3", tmp_path)
    config = {"model_type": "qwen3", "vocab_size": 1024, "num_hidden_layers": 2, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def said(model, *overrides: str) -> str:
    return "\n".join(findings(recipe.load("pocket", [f"model.model_name={model}", *overrides])))


def change(file, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_nothing_is_said_of_a_model_that_exports(model):
    assert said(model) == ""


def test_tokens_beyond_the_embedding_are_said_whatever_is_exported(model):
    change(model / "config.json", vocab_size=100)
    for asked in ("export.quantization_method=[q8_0]", "export.quantization_method=[]"):
        assert "this run cannot be exported: tokenizer.json has a token" in said(model, asked)


def test_several_chat_templates_and_a_normalizer_are_said_with_the_way_out(model):
    named = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]
    change(model / "tokenizer_config.json", chat_template=named)
    assert "not as GGUF: it has several chat templates (default, tool_use)" in said(model)
    change(model / "tokenizer.json", normalizer={"type": "Lowercase"})
    assert "its normalizer Lowercase changes texts" in said(model)
