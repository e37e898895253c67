"""Every way in which an exporter was made to fail is noticed, with and without its hashes signed again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import families
from tests.support.export_fixtures import run_folder
from toolkit.export import export, gguf_path, verify
from toolkit.export.gguf_file import modelfile, write_gguf
from toolkit.export.merge import Checkpoint, load_tokenizer, open_merged
from toolkit.files import ToolkitError, describe, read_json

QUANTS = ("f16", "q8_0", "q4_k_m")
SIGNED = "files changed or missing since they were written"


@pytest.fixture(scope="module", params=["qwen3", pytest.param("gemma3", marks=pytest.mark.slow)])
def sound(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    run = run_folder(folder / "toy", families.build(request.param, folder / "base"))
    export(run, quants=QUANTS, say=lambda _: None)
    return run


class Faulty(Checkpoint):
    """The merged folder as a wrong exporter sees it."""

    def __init__(self, run: Path, values: Callable | None = None, **config):
        super().__init__(run / "merged")
        self.values = values
        self.config |= config

    def tensor(self, name: str):
        return self.values(self, name) if self.values else super().tensor(name)


def stored(model: Faulty, name: str):
    return Checkpoint.tensor(model, name)


def only(run: Path, *quants: str) -> None:
    """As if no other GGUF had been exported."""
    record = read_json(run / "export.json")
    for quant in set(QUANTS) - set(quants):
        gguf_path(run, quant).unlink()
        del record["files"][f"gguf/toy.{quant}.gguf"]
    if quants:
        merged = open_merged(run, "16bit")
        (run / "gguf" / "Modelfile").write_text(modelfile(run, merged, load_tokenizer(run / "adapter")))
        record["files"]["gguf/Modelfile"] = describe(run / "gguf" / "Modelfile")
    else:
        shutil.rmtree(run / "gguf")
        del record["files"]["gguf/Modelfile"]
    (run / "export.json").write_text(json.dumps(record))


def gguf(quant: str, values: Callable | None = None, tokenizer: Callable | None = None, made: str = "", **config):
    """A GGUF written anew from wrong weights, a wrong config or a wrong tokenizer; the only one of its run."""

    def sabotage(run: Path) -> None:
        folder = Path(shutil.copytree(run / "adapter", run.parent / "wrong"))
        if tokenizer:
            tokenizer(folder)
        only(run, quant)
        write_gguf(Faulty(run, values, **config), gguf_path(run, quant), made or quant, "toy", folder)

    return sabotage


def edit(file: str, change: Callable) -> Callable:
    """A JSON file of a run without GGUF files, changed."""

    def sabotage(run: Path) -> None:
        only(run)
        value = read_json(run / file)
        change(value)
        (run / file).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    return sabotage


def text(file: str, old: str, new: str) -> Callable:
    def sabotage(run: Path) -> None:
        before = (run / file).read_text()
        assert old in before
        (run / file).write_text(before.replace(old, new, 1))

    return sabotage


def weights(change: Callable, folder: str = "merged/model.safetensors") -> Callable:
    """The merged weights (or the adapter's), changed."""

    def sabotage(run: Path) -> None:
        from safetensors.torch import load_file, save_file

        only(run)
        tensors = load_file(run / folder)
        change(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, run / folder, metadata={"format": "pt"})

    return sabotage


def scaled(by: float, name: str = "mlp.up_proj") -> Callable:
    return lambda model, n: stored(model, n) * (by if f"layers.0.{name}" in n else 1)


def shifted(model: Faulty, name: str):
    """A norm, which is zero in a new Gemma and cannot be scaled."""
    return stored(model, name) + (0.02 if "layers.0.input_layernorm" in name else 0)


def other_layer(model: Faulty, name: str):
    return stored(model, name.replace("layers.0.", "layers.x.").replace("layers.1.", "layers.0.").replace(".x.", ".1."))


def swapped(model: Faulty, name: str):
    names = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    return stored(model, next((name.replace(a, b) for a, b in names.items() if a in name), name))


def swap(first: str, second: str) -> Callable:
    def change(tensors: dict) -> None:
        tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()

    return change


def multiply(name: str, by: float) -> Callable:
    def change(tensors: dict) -> None:
        for key in [k for k in tensors if name in k]:
            tensors[key] = tensors[key] * by

    return change


def one_element(tensors: dict) -> None:
    weight = tensors["model.layers.1.mlp.down_proj.weight"]
    weight[3, 5] = weight[3, 5] + 1


def change_json(file: str, change: Callable) -> Callable:
    def on(folder: Path) -> None:
        value = read_json(folder / file)
        change(value)
        (folder / file).write_text(json.dumps(value, ensure_ascii=False))

    return on


def merges_swapped(tokenizer: dict) -> None:
    merges = tokenizer["model"]["merges"]
    merges[2], merges[40] = merges[40], merges[2]


def tokens_swapped(tokenizer: dict) -> None:
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def other_type(tokenizer: dict) -> None:
    tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][0], "content": "the", "id": 350, "special": False, "normalized": False}
    )


def template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("user", "User", 1) + " ")


def settings(**values) -> Callable:
    return change_json("tokenizer_config.json", lambda s: s.update(values))


def truncated(run: Path) -> None:
    only(run, "q8_0")
    gguf_path(run, "q8_0").write_bytes(gguf_path(run, "q8_0").read_bytes()[:100_000])


def bigger_rope(model_config: dict) -> None:
    rope = model_config["rope_parameters"]
    for part in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        if "rope_theta" in part:
            part["rope_theta"] *= 2


def rope(quant: str) -> Callable:
    def sabotage(run: Path) -> None:
        config = read_json(run / "merged" / "config.json")
        bigger_rope(config)
        gguf(quant, rope_parameters=config["rope_parameters"])(run)

    return sabotage


def removed(file: str) -> Callable:
    return lambda run: (run / file).unlink()


LAYER = "model.layers.{}.mlp.up_proj.weight"
SABOTAGES: dict[str, Callable] = {
    "rope base doubled in the header of q8_0 alone": rope("q8_0"),
    "rope base doubled in the header of q4_k_m alone": rope("q4_k_m"),
    "rms epsilon in the header": gguf("q8_0", rms_norm_eps=1e-3),
    "context length 64 in the header": gguf("q4_k_m", max_position_embeddings=64),
    "merges swapped in the GGUF": gguf("q8_0", tokenizer=change_json("tokenizer.json", merges_swapped)),
    "pad token of the GGUF": gguf("q8_0", tokenizer=settings(pad_token="!")),
    "stop token of the Modelfile changed": text("gguf/Modelfile", "PARAMETER stop", 'PARAMETER stop "x"\n# PARAMETER'),
    "template added to the Modelfile": text("gguf/Modelfile", "PARAMETER", 'TEMPLATE "{{ .Prompt }}"\nPARAMETER'),
    "eos of the merged config": edit("merged/config.json", lambda c: c.update(eos_token_id=7)),
    "weights of the GGUF scaled": gguf("q8_0", scaled(1.05)),
    # the rest are slow only by their number
    "rope base doubled in the merged config": edit("merged/config.json", bigger_rope),
    "eos of the generation config": edit("merged/generation_config.json", lambda c: c.update(eos_token_id=[7])),
    "generation config missing": removed("merged/generation_config.json"),
    "model_max_length of the merged tokenizer": edit(
        "merged/tokenizer_config.json", lambda c: c.update(model_max_length=512)
    ),
    "merges of the merged tokenizer": edit("merged/tokenizer.json", merges_swapped),
    "template of the merged folder": lambda run: template(run / "merged"),
    "merged weights scaled": weights(multiply("layers.0.mlp.up_proj", 1.01)),
    "merged norm shifted": weights(lambda tensors: tensors["model.norm.weight"].add_(0.02)),
    "one element of the merged weights": weights(one_element),
    "merged layers swapped": weights(swap(LAYER.format(0), LAYER.format(1))),
    "merged tensors swapped": weights(swap(LAYER.format(0), LAYER.format(0).replace("up", "gate"))),
    "merged sign flipped": weights(multiply("layers.1.self_attn.v_proj", -1)),
    "merged tensor zero": weights(multiply("layers.1.self_attn.k_proj", 0)),
    "merged tensor not a number": weights(multiply("layers.1.mlp.down_proj", float("nan"))),
    "layers swapped in the GGUF": gguf("q4_k_m", other_layer),
    "tensors swapped in the GGUF": gguf("q8_0", swapped),
    "sign of a tensor of the F16": gguf("f16", scaled(-1, "self_attn.v_proj")),
    "a norm of the GGUF": gguf("q4_k_m", shifted),
    "template of the GGUF": gguf("q8_0", tokenizer=template),
    "bos flag of the GGUF": gguf("q8_0", tokenizer=settings(add_bos_token=True, add_eos_token=True)),
    "eos token of the GGUF": gguf("q8_0", tokenizer=settings(eos_token="!")),
    "two tokens of the GGUF": gguf("q8_0", tokenizer=change_json("tokenizer.json", tokens_swapped)),
    "type of a token of the GGUF": gguf("q8_0", tokenizer=change_json("tokenizer.json", other_type)),
    "a smaller quantization under another's name": gguf("q8_0", made="q4_k_m"),
    "a GGUF cut short": truncated,
    "temperature of the Modelfile": text("gguf/Modelfile", "PARAMETER t", "PARAMETER temperature 2\n# PARAMETER t"),
    "context of the Modelfile": text("gguf/Modelfile", "num_ctx", "num_ctx 7\n# num_ctx"),
    "the Modelfile names another file": text("gguf/Modelfile", "q4_k_m", "f16"),
    "the adapter scaled after the export": weights(multiply("lora_B", 1.001), "adapter/adapter_model.safetensors"),
    "alpha of the adapter after the export": edit("adapter/adapter_config.json", lambda c: c.update(lora_alpha=17)),
}
QUICK = list(SABOTAGES)[:10]


def damaged(sound: Path, name: str, folder: Path) -> dict:
    """The certificate of a copy of the run after one sabotage."""
    run = Path(shutil.copytree(sound, folder / "toy"))
    SABOTAGES[name](run)
    return verify(run, say=lambda _: None)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SABOTAGES])
def test_every_sabotage_is_noticed_by_its_checksum_and_by_what_it_does(name, sound, tmp_path):
    checks = damaged(sound, name, tmp_path)["checks"]
    failed = {c["name"] for c in checks if not c["passed"]}
    if name.startswith("alpha of") or "the adapter scaled" in name:
        assert "adapter files changed since the export" in failed
    else:
        assert SIGNED in failed  # as the files were signed
    assert failed - {SIGNED}, "an exporter that signs its own faults would pass"


@pytest.mark.parametrize("nothing", [gguf("q8_0"), edit("merged/config.json", lambda _: None), weights(lambda _: None)])
def test_the_same_ways_of_writing_without_a_fault_raise_no_alarm(nothing, sound, tmp_path):
    run = Path(shutil.copytree(sound, tmp_path / "toy"))
    nothing(run)
    assert {c["name"] for c in verify(run, say=lambda _: None)["checks"] if not c["passed"]} <= {SIGNED}


@pytest.mark.parametrize("file", ["gguf/toy.q8_0.gguf", "gguf/Modelfile", "merged/generation_config.json"])
def test_a_missing_file_is_noticed(file, sound, tmp_path):
    run = Path(shutil.copytree(sound, tmp_path / "toy"))
    (run / file).unlink()
    assert SIGNED in {c["name"] for c in verify(run, say=lambda _: None)["checks"] if not c["passed"]}


def test_the_table_has_at_least_thirty_sabotages():
    assert len(SABOTAGES) >= 30


def test_a_truncated_merged_file_and_a_deleted_adapter_are_clear_errors(sound, tmp_path):
    run = Path(shutil.copytree(sound, tmp_path / "toy"))
    file = run / "merged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(ToolkitError, match=r"merged/model\.safetensors: expected whole safetensors"):
        verify(run, say=lambda _: None)
    shutil.rmtree(run / "adapter")
    with pytest.raises(ToolkitError, match=r"adapter_model\.safetensors.* not found.*restore"):
        verify(run, say=lambda _: None)
