"""Every way in which an exporter was made to fail is noticed, with and without its hashes signed again."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tests.support import families
from tests.support.export_fixtures import gguf_tensor, run_folder
from toolkit.export import export, gguf_path, verify
from toolkit.export.checkpoint import Checkpoint
from toolkit.export.gguf import write_gguf
from toolkit.export.merge import open_merged
from toolkit.export.ollama import modelfile
from toolkit.export.tokenizer import load_tokenizer
from toolkit.files import ToolkitError, describe, read_json

QUANTS = ("f16", "q8_0", "q4_k_m")
SIGNED = "files changed or missing since they were written"
BY_CHECKSUM = {SIGNED, "files changed since their certificate"}


@pytest.fixture(scope="module", params=["qwen3", pytest.param("gemma3", marks=pytest.mark.slow)])
def sound(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    run = run_folder(folder / "toy", families.build(request.param, folder / "base"))
    export(run, quants=QUANTS, console=Console(quiet=True))
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
        (run / "gguf" / "Modelfile").write_bytes(modelfile(run, merged, load_tokenizer(run / "adapter")))
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
        only(run, "q8_0")
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
    model_config["rope_theta"] *= 2  # as the Hub spells it


def rope(quant: str) -> Callable:
    def sabotage(run: Path) -> None:
        gguf(quant, rope_theta=2 * read_json(run / "merged" / "config.json")["rope_theta"])(run)

    return sabotage


def removed(file: str) -> Callable:
    def sabotage(run: Path) -> None:
        only(run, "q8_0")
        (run / file).unlink()

    return sabotage


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
    "the Modelfile names another file": text("gguf/Modelfile", "q8_0", "f16"),
    "the adapter scaled after the export": weights(multiply("lora_B", 1.001), "adapter/adapter_model.safetensors"),
    "alpha of the adapter after the export": edit("adapter/adapter_config.json", lambda c: c.update(lora_alpha=17)),
}
QUICK = list(SABOTAGES)[:10]


def damaged(sound: Path, name: str, folder: Path) -> dict:
    """The certificate of a copy of the run after one sabotage."""
    run = Path(shutil.copytree(sound, folder / "toy"))
    SABOTAGES[name](run)
    return verify(run, console=Console(quiet=True))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SABOTAGES])
def test_every_sabotage_is_noticed_by_its_checksum_and_by_what_it_does(name, sound, tmp_path):
    checks = damaged(sound, name, tmp_path)["checks"]
    failed = {c["name"] for c in checks if not c["passed"]}
    if name.startswith("alpha of") or "the adapter scaled" in name:
        assert "adapter files changed since the export" in failed
    else:
        assert SIGNED in failed  # as the files were signed
    assert failed - BY_CHECKSUM, "an exporter that signs its own faults would pass"


@pytest.mark.parametrize("nothing", [gguf("q8_0"), edit("merged/config.json", lambda _: None), weights(lambda _: None)])
def test_the_same_ways_of_writing_without_a_fault_raise_no_alarm(nothing, sound, tmp_path):
    run = Path(shutil.copytree(sound, tmp_path / "toy"))
    nothing(run)
    assert {c["name"] for c in verify(run, console=Console(quiet=True))["checks"] if not c["passed"]} <= BY_CHECKSUM


@pytest.mark.parametrize("file", ["gguf/toy.q8_0.gguf", "gguf/Modelfile", "merged/generation_config.json"])
def test_a_missing_file_is_noticed(file, sound, tmp_path):
    run = Path(shutil.copytree(sound, tmp_path / "toy"))
    removed(file)(run)
    assert SIGNED in {c["name"] for c in verify(run, console=Console(quiet=True))["checks"] if not c["passed"]}


def test_the_table_has_at_least_thirty_sabotages():
    assert len(SABOTAGES) >= 30


def test_a_truncated_merged_file_and_a_deleted_adapter_are_clear_errors(sound, tmp_path):
    run = Path(shutil.copytree(sound, tmp_path / "toy"))
    file = run / "merged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(ToolkitError, match=r"merged/model\.safetensors: expected whole safetensors"):
        verify(run, console=Console(quiet=True))
    shutil.rmtree(run / "adapter")
    with pytest.raises(ToolkitError, match=r"adapter_model\.safetensors.* not found.*restore"):
        verify(run, console=Console(quiet=True))


# Files that do not belong, and rows: all with their hashes signed again


def resign(run: Path) -> None:
    """export.json as an exporter would have written it that signs whatever is there."""
    record = read_json(run / "export.json")
    files = [path for folder in ("merged", "gguf") for path in (run / folder).rglob("*") if path.is_file()]
    record["files"] = {path.relative_to(run).as_posix(): describe(path) for path in files}
    (run / "export.json").write_text(json.dumps(record))
    (run / "certificate.json").unlink(missing_ok=True)


def added(name: str, content: str | bytes) -> Callable:
    def sabotage(run: Path) -> None:
        only(run, "q8_0")
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return sabotage


def adapter_left(run: Path) -> None:
    only(run, "q8_0")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / "adapter" / name, run / "merged" / name)


def index_beside(run: Path) -> None:
    names = Checkpoint(run / "merged").entries
    shutil.copy(run / "merged" / "model.safetensors", run / "merged" / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (run / "merged" / "model.safetensors.index.json").write_text(json.dumps(index))


def weights_under_another_name(run: Path) -> None:
    (run / "merged" / "model.safetensors").rename(run / "merged" / "other.safetensors")
    config = read_json(run / "merged" / "config.json") | {"transformers_weights": "other.safetensors"}
    (run / "merged" / "config.json").write_text(json.dumps(config))


def extra_head(values: Callable) -> Callable:
    def change(tensors: dict) -> None:
        tensors["lm_head.weight"] = values(tensors["model.embed_tokens.weight"])

    return weights(change)


def other_dtype(tensors: dict) -> None:
    for name in tensors:
        tensors[name] = tensors[name].float()


def zeroed_row(tensors: dict) -> None:
    tensors["model.embed_tokens.weight"][300] = 0


def faint_row(tensors: dict) -> None:
    """A row that is a thousandth of the others, as an unused token's: its share in the tensor's error is below any limit."""
    tensors["model.embed_tokens.weight"][300] *= 0.001


def rows(quant: str, change: Callable, name: str = "token_embd.weight") -> Callable:
    """Stored rows of one GGUF alone, changed as bytes; it is the only one of its run."""

    def sabotage(run: Path) -> None:
        only(run, quant)
        tensor = gguf_tensor(gguf_path(run, quant), name)
        data = tensor.data.copy()
        change(data)
        with open(gguf_path(run, quant), "rb+") as file:
            file.seek(tensor.data_offset)
            file.write(data.tobytes())

    return sabotage


def swap_rows(data) -> None:
    data[[300, 301]] = data[[301, 300]]


def zero_row(data) -> None:
    data[300] = 0


def next_row(data) -> None:
    data[300] = data[301]


EOS = json.dumps({"eos_token": "!", "pad_token": "!"})
FOREIGN: dict[str, Callable] = {
    "an adapter left in merged": adapter_left,
    "weights beside an index": index_beside,
    "weights under a name that config.json gives": weights_under_another_name,
    "an extra head": extra_head(lambda embedding: embedding.flip(0)),
    "an extra head that is the embedding": extra_head(lambda embedding: embedding.clone()),
    "weights of another type": weights(other_dtype),
    "a pickle beside the weights": added("merged/pytorch_model.bin", b"x"),
    "special_tokens_map.json with another eos": added("merged/special_tokens_map.json", EOS),
    "added_tokens.json": added("merged/added_tokens.json", '{"<new>": 7}'),
    "a template by name": added("merged/additional_chat_templates/tool_use.jinja", "{{ messages }}"),
    "another vocabulary beside tokenizer.json": added("merged/tokenizer.model", b"x"),
    "merges of another vocabulary": added("merged/merges.txt", "#version: 0.2\na b\n"),
    "code beside the weights": added("merged/modeling_qwen3.py", "import os"),
    "a setting of sentence-transformers": added("merged/modules.json", "[]"),
    "no index and no file": lambda run: (run / "merged" / "chat_template.jinja").unlink(),
    "a template in the tokenizer's settings": edit(
        "merged/tokenizer_config.json", lambda c: c.update(chat_template="{{ 1 }}")
    ),
    "a deleted Modelfile": removed("gguf/Modelfile"),
    "an adapter in gguf": added("gguf/adapter_config.json", "{}"),
    "a projector that LM Studio loads": added("gguf/mmproj-toy.gguf", b"GGUF"),
    "a template file of Ollama": added("gguf/template", "{{ .Prompt }}"),
    "a merged row of zeros": weights(zeroed_row),
    "a faint merged row": weights(faint_row),
    "two rows of q8_0 swapped": rows("q8_0", swap_rows),
    "a row of q8_0 zeroed": rows("q8_0", zero_row),
    "two rows of q4_k_m swapped": rows("q4_k_m", swap_rows),
    "a row of q4_k_m zeroed": rows("q4_k_m", zero_row),
    "a row of q4_k_m that is its neighbour": rows("q4_k_m", next_row),
    "two rows of f16 swapped": rows("f16", swap_rows),
    "a row of one layer of q4_k_m zeroed": rows("q4_k_m", zero_row, "blk.0.ffn_gate.weight"),
}
QUICK_FOREIGN = [
    "an adapter left in merged", "an extra head", "special_tokens_map.json with another eos", "a deleted Modelfile",
    "two rows of q8_0 swapped", "a row of q4_k_m zeroed",
]  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK_FOREIGN else pytest.mark.slow) for n in FOREIGN]
)
def test_what_does_not_belong_and_single_rows_are_noticed_whatever_is_signed(name, sound, tmp_path):
    run = Path(shutil.copytree(sound, tmp_path / "toy"))
    FOREIGN[name](run)
    resign(run)
    if name == "weights under a name that config.json gives":
        with pytest.raises(ToolkitError, match="neither weights nor an index"):
            verify(run, console=Console(quiet=True))
        assert (run / "EXPORT_FAILED.txt").is_file()
        return
    certificate = verify(run, console=Console(quiet=True))
    assert not certificate["passed"]
    assert SIGNED not in {check["name"] for check in certificate["checks"] if not check["passed"]}


def test_documents_beside_the_files_decide_nothing(sound, tmp_path):
    run = Path(shutil.copytree(sound, tmp_path / "toy"))
    for name in ("merged/README.md", "merged/.gitattributes", "merged/LICENSE", "gguf/README.md", "merged/mix.png"):
        (run / name).write_text("x")
    assert verify(run, console=Console(quiet=True))["passed"]


MERGE = sys.modules["toolkit.export.merge"]  # export has a function of that name
SMALL_SHARD = 2 * 10**6


@pytest.fixture(scope="module")
def sharded(sound, tmp_path_factory):
    """The same run, its merged weights in more than one file."""
    run = Path(shutil.copytree(sound, tmp_path_factory.mktemp("sharded") / "toy"))
    only(run)
    (run / "export.json").unlink()
    shutil.rmtree(run / "merged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MERGE, "SHARD_BYTES", SMALL_SHARD)
        assert export(run, quants=(), console=Console(quiet=True))["passed"]
    assert len(list((run / "merged").glob("*.safetensors"))) > 1
    return run


def misplaced(weight_map: dict) -> None:
    first = next(iter(weight_map))
    weight_map[first] = next(file for file in weight_map.values() if file != weight_map[first])


@pytest.mark.parametrize(
    "change",
    [
        misplaced,
        lambda weight_map: weight_map.popitem(),
        lambda weight_map: weight_map.update(new=next(iter(weight_map.values()))),
    ],
    ids=["misplaced", "missing", "unknown"],
)
def test_an_index_that_names_tensors_wrongly_is_noticed(change, sharded, tmp_path, monkeypatch):
    monkeypatch.setattr(MERGE, "SHARD_BYTES", SMALL_SHARD)
    run = Path(shutil.copytree(sharded, tmp_path / "toy"))
    assert verify(run, console=Console(quiet=True))["passed"]
    index = read_json(run / "merged" / "model.safetensors.index.json")
    change(index["weight_map"])
    (run / "merged" / "model.safetensors.index.json").write_text(json.dumps(index))
    resign(run)
    assert not verify(run, console=Console(quiet=True))["passed"]


def test_a_file_changed_after_its_certificate_is_noticed_whatever_export_json_says(sound, tmp_path):
    run = Path(shutil.copytree(sound, tmp_path / "toy"))
    file = run / "gguf" / "Modelfile"  # and no other: what it is about would be noticed anyway
    file.write_text(file.read_text().replace("PARAMETER num_ctx", "# PARAMETER num_ctx", 1))
    certificate = read_json(run / "certificate.json")
    resign(run)
    (run / "certificate.json").write_text(json.dumps(certificate))
    failed = {check["name"] for check in verify(run, console=Console(quiet=True))["checks"] if not check["passed"]}
    assert "files changed since their certificate" in failed
