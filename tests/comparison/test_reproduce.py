"""A run is repeated from its folder alone, and what differs is named."""

import json

import pytest

from toolkit.comparison import reproduce
from toolkit.files import sha256


def make_folder(folder, *, weight=b"w", loss=1.0, accuracy=0.5, seconds=3.0):
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(weight)
    (folder / "recipe.yaml").write_text("name: one\n")
    (folder / "mix.json").write_text(json.dumps({"total": {"examples": 3}}))
    rows = [{"step": 1, "loss": 2.0, "tokens_per_second": seconds}, {"step": 2, "loss": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = {"tuned": {"thinking": {"accuracy": {"value": accuracy}}}, "seconds": seconds}
    (folder / "eval.json").write_text(json.dumps(evaluation))
    return folder


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seconds": 9.0}, []),
        ({"weight": b"v"}, ["the adapters differ"]),
        ({"loss": 1.5}, ["metrics.jsonl differs first at 1.loss: 1.0 there, 1.5 now"]),
        ({"accuracy": 0.6}, ["eval.json differs first at tuned.thinking.accuracy.value: 0.5 there, 0.6 now"]),
    ],
)
def test_times_may_differ_and_everything_else_that_does_is_named(tmp_path, changed, said):
    old, new = make_folder(tmp_path / "old"), make_folder(tmp_path / "new", **changed)
    found = reproduce.differences(old, new)
    assert [line[: len(text)] for line, text in zip(found, said, strict=True)] == said
    assert sha256(old / "adapter/adapter_model.safetensors")[:12] in "".join(found) or "weight" not in changed
