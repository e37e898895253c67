"""A base is read as transformers loads it, whatever lies in its folder; what cannot be merged onto is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.support import families
from tests.support.export_fixtures import gguf_tensors, header_value, run_folder
from toolkit.export import export
from toolkit.export.checkpoint import EMBEDDING, HEAD, Adapter, Checkpoint, find_base
from toolkit.export.gguf import gguf_path
from toolkit.files import ToolkitError, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SILENT = {"console": Console(quiet=True)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder, run) of a tied model and an adapter on it."""
    folder = families.build("qwen3", tmp_path_factory.mktemp("base") / "model")
    return folder, run_folder(tmp_path_factory.mktemp("run") / "toy", folder)


@pytest.fixture
def base(model, tmp_path):
    return Path(shutil.copytree(model[0], tmp_path / "model"))


@pytest.fixture
def run(model, base, tmp_path):
    """The run, on the base that a test changes."""
    copy = Path(shutil.copytree(model[1], tmp_path / "toy"))
    (copy / "manifest.json").write_text(json.dumps({"model": {"name": str(base), "load_in_4bit": True}}))
    return copy


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(read_json(file) | values))


def save(tensors: dict, file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def shard(base: Path, tensors: dict, parts: int = 2) -> list[Path]:
    """The weights in shards with an index, in place of the one file."""
    (base / WEIGHTS).unlink()
    names = sorted(tensors)
    files = [base / f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    for i, file in enumerate(files):
        save({name: tensors[name] for name in names[i::parts]}, file)
    weight_map = {name: files[i % parts].name for i, name in enumerate(names)}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def doubled(tensors: dict) -> dict:
    return {name: tensor * 2 for name, tensor in tensors.items()}


def own_head(tensors: dict) -> dict:
    import torch

    torch.manual_seed(7)
    return tensors | {HEAD: torch.randn_like(tensors[EMBEDDING]) * 0.05}


# Layouts: each makes a folder of a model's tensors that transformers can load


def stale_shards_beside(base: Path, tensors: dict) -> None:
    shard(base, doubled(tensors))
    save(tensors, base / WEIGHTS)


def index_that_misses_and_misplaces(base: Path, tensors: dict) -> None:
    files = shard(base, tensors)
    index = read_json(base / INDEX)
    first, second, *rest = sorted(index["weight_map"])
    wrong = {second: files[0].name, **{name: index["weight_map"][name] for name in rest}}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": wrong}))
    assert first not in wrong


def twice_in_two_shards(base: Path, tensors: dict) -> None:
    files = shard(base, tensors)
    old = doubled(load_file(files[1]))
    save(load_file(files[0]) | old, files[0])


def pickle_beside(base: Path, tensors: dict) -> None:
    import torch

    torch.save(doubled(tensors), base / "pytorch_model.bin")


def stale_shard_outside_the_index(base: Path, tensors: dict) -> None:
    shard(base, tensors)
    save(doubled(tensors), base / "model-00003-of-00003.safetensors")


def head_of_its_own(base: Path, tensors: dict) -> None:
    save(own_head(tensors), base / WEIGHTS)


def head_of_its_own_in_fp32(base: Path, tensors: dict) -> None:
    tensors = own_head(tensors)
    save(tensors | {HEAD: tensors[HEAD].float()}, base / WEIGHTS)


def head_of_its_own_in_a_shard(base: Path, tensors: dict) -> None:
    shard(base, own_head(tensors), 3)


def head_that_is_the_embedding(base: Path, tensors: dict) -> None:
    save(tensors | {HEAD: tensors[EMBEDDING].clone()}, base / WEIGHTS)


LAYOUTS = [
    lambda *_: None, lambda base, tensors: shard(base, tensors), stale_shards_beside, index_that_misses_and_misplaces,
    twice_in_two_shards, pickle_beside, stale_shard_outside_the_index, head_of_its_own, head_of_its_own_in_fp32,
    head_of_its_own_in_a_shard, head_that_is_the_embedding,
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_is_read_as_transformers_reads_it(layout, base):
    import torch
    from transformers import AutoModelForCausalLM

    layout(base, load_file(base / WEIGHTS))
    ours = Checkpoint(base)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = loaded.state_dict()
    assert ours.tied == (loaded.lm_head.weight is loaded.model.embed_tokens.weight)
    assert set(ours.shapes) == theirs.keys() - ({HEAD} if ours.tied else set())
    assert [name for name in ours.shapes if not torch.equal(ours.tensor(name).float(), theirs[name])] == []


@pytest.mark.parametrize(
    "layout",
    [stale_shards_beside, head_of_its_own_in_fp32],
    ids=lambda layout: layout.__name__,
)
def test_an_unusual_layout_exports_as_the_model_that_transformers_loads(layout, base, run):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    layout(base, load_file(base / WEIGHTS))
    certificate = export(run, quants=("f16",), **SILENT)
    assert certificate["passed"]
    ids = torch.arange(5, 40)[None]
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(theirs, run / "adapter")
    with torch.inference_mode():
        difference = (merged(ids).logits - tuned(ids).logits).abs().max()
    assert difference < 0.1  # the merged weights are rounded to bf16; another head differs by units
    tied = read_json(run / "merged" / "config.json")["tie_word_embeddings"]
    assert tied == ("head_of" not in layout.__name__)
    assert ("output.weight" in gguf_tensors(gguf_path(run, "f16"))) == (not tied)


def drop_shard(base: Path) -> None:
    shard(base, load_file(base / WEIGHTS))[1].unlink()


def only_a_pickle(base: Path) -> None:
    import torch

    torch.save(load_file(base / WEIGHTS), base / "pytorch_model.bin")
    (base / WEIGHTS).unlink()


def untied_without_head(base: Path) -> None:
    change(base / "config.json", tie_word_embeddings=False)


def lost_tensor(base: Path) -> None:
    tensors = load_file(base / WEIGHTS)
    del tensors["model.layers.1.input_layernorm.weight"]
    save(tensors, base / WEIGHTS)


def other_shape(base: Path) -> None:
    change(base / "config.json", intermediate_size=512)


def embedding_under_the_heads_name(base: Path) -> None:
    tensors = load_file(base / WEIGHTS)
    save({name if name != EMBEDDING else HEAD: tensor for name, tensor in tensors.items()}, base / WEIGHTS)


REFUSED = {
    r"model-00002-of-00002\.safetensors: expected whole safetensors": drop_shard,
    r"A pickle \(\.bin\) is not read": only_a_pickle,
    "neither weights nor an index": lambda base: (base / WEIGHTS).unlink(),
    "expected a weight_map": lambda base: (
        (base / WEIGHTS).unlink(),
        (base / INDEX).write_text('{"metadata": {}}'),
    ),
    "does not say where the weights of these files are": lambda base: index_that_misses_and_misplaces(
        base, load_file(base / WEIGHTS)
    ),
    r"model\.embed_tokens\.weight is missing": embedding_under_the_heads_name,
    r"has no lm_head\.weight although": untied_without_head,
    r"model\.layers\.1\.input_layernorm\.weight is missing, expected \(": lost_tensor,
    r"is \(\d+, \d+\), expected \(512, \d+\) by config\.json": other_shape,
    "transformers would add that adapter": lambda base: (base / "adapter_config.json").write_text("{}"),
    "quantized by fp8": lambda base: change(base / "config.json", quantization_config={"quant_method": "fp8"}),
    "quantized by bitsandbytes": lambda base: change(
        base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_base_that_cannot_be_merged_onto_is_refused_before_anything_is_written(message, base, run):
    REFUSED[message](base)
    with pytest.raises(ToolkitError, match=message):
        export(run, quants=(), **SILENT)
    assert not (run / "merged").exists()


def test_a_base_that_changed_since_the_training_is_refused_and_since_the_export_noticed(base, run):
    from toolkit.export.certificate import verify
    from toolkit.training.base import base_checksums

    recorded = base_checksums(base)
    change(run / "manifest.json", model={"name": str(base), "load_in_4bit": False, "files": recorded})
    export(run, quants=(), **SILENT)
    save(doubled(load_file(base / WEIGHTS)), base / WEIGHTS)
    failed = {check["name"] for check in verify(run, **SILENT)["checks"] if not check["passed"]}
    assert "base files changed since the export" in failed
    with pytest.raises(ToolkitError, match=r"model\.safetensors: not the file that this run was trained on"):
        export(run, quants=(), **SILENT)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_merge_is_in_the_bases_own_type_and_bit_equal_to_pefts(dtype, base, run):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    wanted = getattr(torch, dtype)
    random = {n: t.float() * (1 + 1e-5) for n, t in load_file(base / WEIGHTS).items()}  # no bf16 values any more
    save({name: tensor.to(wanted) for name, tensor in random.items()}, base / WEIGHTS)
    change(base / "config.json", torch_dtype=dtype)
    assert export(run, quants=(), **SILENT)["passed"]
    ours = load_file(run / "merged" / WEIGHTS)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=wanted)
    theirs = PeftModel.from_pretrained(loaded, run / "adapter").merge_and_unload().state_dict()
    assert {tensor.dtype for tensor in ours.values()} == {wanted}
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert read_json(run / "merged" / "config.json")["dtype"] == dtype


def test_a_tokenizer_model_file_goes_over_as_bytes(run):
    (run / "adapter" / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\xff\xfe\x00")  # SentencePiece's protobuf
    assert export(run, quants=("f16",), **SILENT)["passed"]
    assert (run / "merged" / "tokenizer.model").read_bytes() == (run / "adapter" / "tokenizer.model").read_bytes()


def test_an_older_template_in_the_tokenizers_settings_does_not_go_over(run):
    change(run / "adapter" / "tokenizer_config.json", chat_template="{{ 'an older one' }}")
    assert export(run, quants=(), **SILENT)["passed"]
    assert "chat_template" not in read_json(run / "merged" / "tokenizer_config.json")


def test_no_path_of_this_machine_goes_over(base, run):
    change(base / "config.json", _name_or_path="/home/me/models/qwen3")
    export(run, quants=(), **SILENT)
    assert "/home/me" not in (run / "merged" / "config.json").read_text()


def test_an_end_of_sequence_flag_of_the_tokenizer_is_no_obstacle(run):
    change(run / "adapter" / "tokenizer_config.json", add_eos_token=True)
    assert export(run, quants=("f16",), **SILENT)["passed"]
    # a token after the prompt would end the reply before it begins
    assert header_value(gguf_path(run, "f16"), "tokenizer.ggml.add_eos_token") is not True


def test_tokens_beyond_the_embedding_are_refused_for_merged_weights_too(run):
    tokenizer = read_json(run / "adapter" / "tokenizer.json")
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 5000, "content": "<new>"})
    (run / "adapter" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ToolkitError, match="a token 5000, the model's embedding .* resize_token_embeddings"):
        export(run, quants=(), **SILENT)
    assert not (run / "merged").exists()


# Adapters


@pytest.mark.parametrize("scale", [-0.1, 2.1, float("nan"), float("inf"), "much", None, True])
def test_a_scale_that_no_adapter_can_have_is_refused(scale, run):
    with pytest.raises(ToolkitError, match=r"scale: expected a number from 0 .* to 2"):
        export(run, quants=(), scale=scale, **SILENT)
    assert not (run / "merged").exists()


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"up_proj": 32}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 4}},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 0.8])
def test_a_scaled_merge_is_bit_equal_to_pefts(lora, scale, base, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from toolkit.export.merge import Merged

    run = run_folder(tmp_path / "other", base, **lora)
    ours = Merged(find_base({"name": str(base)}, "16bit"), Adapter(run / "adapter", scale))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), run / "adapter")
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: value * scale for name, value in module.scaling.items()}
    theirs = model.merge_and_unload().state_dict()
    assert [name for name in ours.shapes if not torch.equal(ours.tensor(name), theirs[name])] == []


def test_an_adapter_that_holds_no_numbers_is_refused(run):
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save(tensors, file)
    with pytest.raises(ToolkitError, match="values that are no numbers"):
        export(run, quants=(), **SILENT)
