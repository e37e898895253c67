"""GGUF files equal what llama.cpp's own tools make: names, types, bytes, metadata."""

import ctypes
import functools
import hashlib
import json
import os
import platform
from pathlib import Path

import pytest

from tests.support import families
from tests.support.export_fixtures import (
    PROJECTIONS,
    gguf_tensors,
    header_value,
    random_checkpoint,
    read_gguf,
    tokenizer,
)
from toolkit.export.checkpoint import Adapter, Checkpoint
from toolkit.export.gguf import KEEP_TEMPLATE, header, plan_tensors, write_gguf, write_lora_gguf
from toolkit.export.gguf_types import (
    check_quant,
    check_tokenizer,
    convertible,
    template_names,
    tensor_type,
    use_more_bits,
)
from toolkit.export.llama import launch
from toolkit.export.parity import file_divergence
from toolkit.export.tokenizer import tokens_beyond
from toolkit.files import ROOT, ToolkitError
from toolkit.recipe import QUANTS

MEASURED = json.loads((ROOT / "data_recipes" / "measured" / "gguf_parity.json").read_text())
CASES = MEASURED["cases"]


def of_shape(case: dict) -> tuple:
    return case["layers"], case["tied"], case["hidden"]


def name_of(case: dict) -> str:
    return "-".join(map(str, (*of_shape(case), case["quant"])))


def unless_slow(case: dict):
    """Of the deep shapes one is enough by default: the deepest, untied, with two types in it."""
    quick = case["layers"] < 8 or (case["layers"], case["tied"], case["quant"]) == (36, False, "q4_k_m")
    return pytest.param(case, id=name_of(case), marks=() if quick else pytest.mark.slow)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def get(layers: int, tied: bool, hidden: int) -> Checkpoint:
        key = layers, tied, hidden
        if key not in made:
            made[key] = Checkpoint(random_checkpoint(tmp_path_factory.mktemp("model"), *key))
        return made[key]

    return get


def digest(path: Path) -> str:
    return hashlib.sha256(json.dumps(gguf_tensors(path), sort_keys=True).encode()).hexdigest()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="bytes were recorded on x86-64")
@pytest.mark.parametrize("case", [*map(unless_slow, CASES)])
def test_every_tensor_has_the_type_and_bytes_that_llama_cpp_gave_it(case, checkpoint, tmp_path):
    write_gguf(checkpoint(*of_shape(case)), tmp_path / "x.gguf", case["quant"], "x")
    assert digest(tmp_path / "x.gguf") == case["sha256"]


def test_the_recorded_comparison_covers_28_and_36_layers_tied_and_untied():
    equal = [c for c in CASES if c["tensors"] == c["types_equal"] == c["bytes_equal"]]
    shapes = {(c["layers"], c["tied"], c["quant"]) for c in equal}
    assert {(n, tied, q) for n in (28, 36) for tied in (True, False) for q in ("q4_k_m", "q5_k_m")} <= shapes


@pytest.mark.parametrize("case", [c for c in CASES if c["quant"] == "q4_k_m" and c["hidden"] == 256], ids=str)
def test_more_bits_go_to_the_layers_llama_cpp_gave_them_to(case):
    layers = case["layers"]
    assert [i for i in range(layers) if use_more_bits(i, layers)] == sorted(case["more_bits"])


@pytest.mark.slow
@pytest.mark.skipif("LLAMA_CPP_LIBRARY" not in os.environ, reason="set LLAMA_CPP_LIBRARY to a built libllama.so")
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_quantization_is_byte_equal_to_llama_model_quantize(case, checkpoint, tmp_path):
    model = checkpoint(*of_shape(case))
    write_gguf(model, tmp_path / "bf16.gguf", "bf16", "x")
    write_gguf(model, tmp_path / "ours.gguf", case["quant"], "x")
    llama_model_quantize(tmp_path / "bf16.gguf", tmp_path / "theirs.gguf", case["quant"])
    assert gguf_tensors(tmp_path / "ours.gguf") == gguf_tensors(tmp_path / "theirs.gguf")


def llama_model_quantize(source: Path, target: Path, quant: str) -> None:
    import gguf

    class Parameters(ctypes.Structure):  # llama.h of llama.cpp 0.5.0: llama_model_quantize_params
        _fields_ = [
            *[(n, ctypes.c_int32) for n in ("threads", "ftype", "output_type", "embedding_type")],
            *[(n, ctypes.c_bool) for n in ("requantize", "output", "copy", "pure", "keep_split", "dry_run")],
            *[(n, ctypes.c_void_p) for n in ("imatrix", "overrides", "types", "prune")],
            ("buffer", ctypes.c_size_t),
        ]

    llama = ctypes.CDLL(os.environ["LLAMA_CPP_LIBRARY"])
    llama.llama_model_quantize_default_params.restype = Parameters
    llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = int(gguf.LlamaFileType[f"MOSTLY_{quant.upper()}"])
    assert llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)) == 0


@pytest.mark.parametrize("quant", QUANTS)
def test_the_predicted_size_is_that_of_the_tensors(quant, checkpoint, tmp_path):

    model = checkpoint(4, True, 96)
    write_gguf(model, tmp_path / "x.gguf", quant, "x")
    assert sum(t.bytes for t in plan_tensors(model, quant)) == sum(
        int(t.n_bytes) for t in read_gguf(tmp_path / "x.gguf").tensors
    )


def test_the_header_says_what_the_folder_says(checkpoint, tmp_path):
    model = checkpoint(4, True, 96)
    write_gguf(model, tmp_path / "x.gguf", "q8_0", "my run")
    value, tok = functools.partial(header_value, tmp_path / "x.gguf"), tokenizer()
    assert value("general.name") == "my run"
    assert value("qwen3.context_length") == 4096
    assert value("qwen3.rope.freq_base") == 1e6
    assert value("tokenizer.ggml.pre") == "qwen2"
    assert value("tokenizer.chat_template") == KEEP_TEMPLATE + tok.chat_template
    assert value("tokenizer.ggml.eos_token_id") == tok.convert_tokens_to_ids("<|im_end|>")
    assert value("tokenizer.ggml.padding_token_id") == tok.convert_tokens_to_ids("<|endoftext|>")
    assert value("tokenizer.ggml.tokens")[: len(tok)] == tok.convert_ids_to_tokens(range(len(tok)))
    assert value("tokenizer.ggml.tokens")[-1] == "[PAD511]"


def test_a_real_qwen3_vocabulary_goes_over_whole(qwen3, tmp_path):
    folder = random_checkpoint(tmp_path / "model", 1, True, 32, vocabulary=151936)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((Path(qwen3) / name).read_bytes())
    write_gguf(Checkpoint(folder), tmp_path / "x.gguf", "q8_0", "x")
    fields = read_gguf(tmp_path / "x.gguf").fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    assert len(tokens) == 151936
    assert len(merges) == 151387
    assert tokens[151667] == "<think>"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 151645


ARCHITECTURES = ("qwen3", "qwen2.5", "llama3", "gemma3", "smollm2")


def adapted(folder: Path, adapter: Path, **lora):
    """The model of `folder` in fp32 with a random adapter, also saved to `adapter`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(1)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": PROJECTIONS} | lora
    model = get_peft_model(model, LoraConfig(**settings))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data += torch.randn_like(weight) * 0.03
    model.save_pretrained(adapter)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_llama_cpp_computes_the_base_and_with_the_lora_the_tuned_model_of_every_family(name, tmp_path):
    import torch

    folder, ids = families.build(name, tmp_path / "base"), list(range(5, 60))
    model = adapted(folder, tmp_path / "adapter", use_rslora=name == "llama3")
    with torch.inference_mode():
        tuned = model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
        with model.disable_adapter():
            base = model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    write_gguf(Checkpoint(folder), tmp_path / "base.gguf", "f16", "base")
    config = json.loads((folder / "config.json").read_text())
    write_lora_gguf(Adapter(tmp_path / "adapter"), config, tmp_path / "lora.gguf")
    engine = launch(tmp_path / "base.gguf", [tmp_path / "lora.gguf"])

    def kl(reference, scale: int) -> float:
        return file_divergence(engine, reference, [ids], 70, lora=[{"id": 0, "scale": scale}])["mean KL"]

    assert kl(tuned, 1) < 1e-5
    assert kl(base, 0) < 1e-5
    assert kl(base, 1) > 1e-2  # the two can be told apart


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
POSITIONS = {
    "llama 3.1 on the Hub": ("llama3", {"rope_scaling": families.LLAMA3_ROPE}),
    "llama 3.1 as transformers 5 saves it": (
        "llama3",
        {"rope_scaling": None, "rope_theta": None, "rope_parameters": families.LLAMA3_ROPE | {"rope_theta": 5e5}},
    ),
    "yarn as Qwen3's card says": ("qwen3", {"rope_scaling": {"rope_type": "yarn"} | YARN}),
    "yarn as Qwen2.5's card says": ("qwen2.5", {"rope_scaling": {"type": "yarn"} | YARN}),
    "yarn as transformers 5 saves it": ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6} | YARN}),
    "linear": ("smollm2", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "linear in gemma 3's full attention": ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "gemma 3's window": ("gemma3", {"sliding_window": 8}),
}


@pytest.mark.parametrize(("name", "changes"), POSITIONS.values(), ids=POSITIONS)
def test_llama_cpp_computes_the_positions_of_the_config(name, changes, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder, ids = families.build(name, tmp_path / "base"), list(range(5, 65))

    def logits():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    plain = logits()
    changed = {key: value for key, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(changed))
    model = Checkpoint(folder)
    write_gguf(model, tmp_path / "base.gguf", "f16", "base")
    assert model.config == changed  # reading the defaults of transformers changes nothing
    engine = launch(tmp_path / "base.gguf")
    assert file_divergence(engine, logits(), [ids], 70)["mean KL"] < 1e-5
    assert file_divergence(engine, plain, [ids], 70)["mean KL"] > 1e-5  # the change is one that can be seen


def test_another_architecture_is_refused_with_the_way_out(checkpoint, monkeypatch):
    model = checkpoint(4, True, 96)
    assert convertible(model.config) is None
    assert "'mistral' is not among those converted here. Merged weights" in convertible({"model_type": "mistral"})
    assert "attention_bias" in convertible(model.config | {"attention_bias": True})
    for key in ("type", "rope_type"):
        dynamic = {key: "dynamic", "factor": 2.0}
        assert "rope type 'dynamic'" in convertible(model.config | {"rope_scaling": dynamic})
    assert "activation 'gelu'" in convertible(model.config | {"hidden_act": "gelu"})
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 10000.0}
    assert convertible(model.config | {"rope_parameters": yarn | {"beta_fast": 32}}) is None
    for key, value in (("beta_fast", 64), ("attention_factor", 1.0), ("truncate", False)):
        assert f"YaRN {key}" in convertible(model.config | {"rope_parameters": yarn | {key: value}})
    monkeypatch.setitem(model.config, "model_type", "qwen3_moe")
    with pytest.raises(ToolkitError, match=r"'qwen3_moe'.*--to merged.*convert_hf_to_gguf\.py"):
        check_tokenizer(model.config, model.folder, gguf=True)


def test_an_unknown_quantization_is_refused_with_the_way_out():
    with pytest.raises(ToolkitError, match=r"q3_k_l.*q4_k_m.*llama-quantize"):
        check_quant("q3_k_l")
    with pytest.raises(ToolkitError, match=r"train\.max_steps=3: a finished run takes no overrides"):
        check_quant("train.max_steps=3")  # `export RUN --quant q8_0 train.max_steps=3`


def test_a_training_template_is_never_exported(tmp_path):
    model = random_checkpoint(tmp_path / "model", 1, True, 32)
    (model / "chat_template.jinja").write_text("{% generation %}x{% endgeneration %}")
    with pytest.raises(ToolkitError, match="training chat template"):
        write_gguf(Checkpoint(model), tmp_path / "x.gguf", "f16", "x")


def test_a_weight_too_large_for_f16_is_an_error_not_an_infinity(tmp_path):
    folder = random_checkpoint(tmp_path / "model", 1, True, 32, scale=1e6)
    with pytest.raises(ToolkitError, match="export bf16"):
        write_gguf(Checkpoint(folder), tmp_path / "x.gguf", "f16", "x")


# What llama.cpp is told besides the tensors


def test_attn_v_of_an_80_layer_model_gets_five_bits_as_llama_quantize_gives_it():
    """src/llama-quant.cpp: LLM_TYPE_70B, whose eight heads share one attn_v."""
    qwen = {"model_type": "qwen2", "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    llama_65b = qwen | {"model_type": "llama", "num_key_value_heads": 64}

    def kinds(config: dict, quant: str = "q4_k_m") -> set[str]:
        names = [f"blk.{i}.attn_v.weight" for i in range(config["num_hidden_layers"])]
        return {tensor_type(name, (1024, 8192), quant, config, False) for name in names}

    assert kinds(qwen) == kinds(qwen | {"model_type": "llama"}) == {"Q5_K", "Q6_K"}
    assert kinds(llama_65b) == kinds(qwen | {"num_hidden_layers": 64}) == {"Q4_K", "Q6_K"}
    assert kinds(qwen, "q5_k_m") == {"Q5_K", "Q6_K"}
    assert tensor_type("blk.20.ffn_down.weight", (8192, 8192), "q4_k_m", qwen, False) == "Q4_K"


def test_a_file_says_how_its_model_is_sampled_where_the_model_says_so(tmp_path):
    def sampling(name: str) -> dict:
        folder = families.build(name, tmp_path / name)
        values = header(Checkpoint(folder), folder, "f16", "x").kv_data[0]
        return {k.removeprefix("general.sampling."): v.value for k, v in values.items() if "sampling" in k}

    assert sampling("qwen3") == {"temp": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
    assert sampling("qwen2.5") == {"temp": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0, "penalty_repeat": 1.1}
    assert sampling("gemma3") == {"top_k": 64, "top_p": 0.95}  # says no temperature, and Qwen's is none of its own
    assert sampling("smollm2") == {}


def test_a_file_names_the_first_token_that_only_config_json_knows(tmp_path):
    folder = families.build("qwen3", tmp_path / "base")
    config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": 3}
    (folder / "config.json").write_text(json.dumps(config))
    values = header(Checkpoint(folder), folder, "f16", "x").kv_data[0]
    assert values["tokenizer.ggml.bos_token_id"].value == 3
    assert values["tokenizer.ggml.add_bos_token"].value is False


def test_the_template_in_a_file_is_too_far_from_ollamas_own_to_be_replaced_and_renders_the_same(tmp_path):
    from transformers import AutoTokenizer

    folder = families.build("smollm2", tmp_path / "base")
    text = header(Checkpoint(folder), folder, "f16", "x").kv_data[0]["tokenizer.chat_template"].value
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(text) - len(tokenizer.chat_template) > 100  # template/template.go of Ollama: an edit distance below 100
    messages = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.apply_chat_template(messages, tokenize=False, chat_template=text) == rendered


def tokenizer_with(**changes) -> dict:
    return json.loads(tokenizer().backend_tokenizer.to_str()) | changes


def test_a_tokenizer_that_llama_cpp_does_not_have_is_named_before_training(checkpoint):
    config = checkpoint(4, True, 96).config
    assert convertible(config, tokenizer_with()) is None
    assert "normalizer Lowercase" in convertible(config, tokenizer_with(normalizer={"type": "Lowercase"}))
    both = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    assert "normalizer Lowercase" in convertible(config, tokenizer_with(normalizer=both))
    for key in ("lstrip", "rstrip"):
        tokens = tokenizer_with()["added_tokens"]
        tokens[1][key] = True
        assert "takes in the blanks beside it" in convertible(config, tokenizer_with(added_tokens=tokens))
    tokens = [*tokenizer_with()["added_tokens"], {"id": 512, "content": "<new>", "special": True}]
    assert "a token 512, the model's embedding 512 rows" in tokens_beyond(tokenizer_with(added_tokens=tokens), config)
    named = template_names({"chat_template": [{"name": "default"}, {"name": "tool_use"}]})
    assert "several chat templates (default, tool_use)" in convertible(config, tokenizer_with(), named)
