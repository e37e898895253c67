"""Qwen3.5 to 3.8: text and sight in one checkpoint, gated delta nets among the layers, tool calls in XML, 16 bits."""

import pytest
from rich.console import Console

from tests.support import families
from tests.support.label_check import violations
from toolkit import recipe
from toolkit.data.render import examples, load_chat
from toolkit.data.tools import read_calls
from toolkit.export import export, verify
from toolkit.export.base import save_run
from toolkit.files import ToolkitError, read_json

TARGETS = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "in_proj_qkv",
    "in_proj_z",
    "out_proj",
]
TOOLS = [{"type": "function", "function": {"name": "tide", "description": "Tides.", "parameters": {
    "type": "object", "properties": {"place": {"type": "string"}, "day": {"type": "integer"}}}}}]  # fmt: skip
CALL = {"type": "function", "function": {"name": "tide", "arguments": {"place": "Brest", "day": 3}}}
ASKED = [{"role": "user", "content": "When is high tide?"}]
ROWS = {
    "plain": [*ASKED, {"role": "assistant", "content": "At noon."}],
    "thinking": [*ASKED, {"role": "assistant", "content": "At noon.", "reasoning_content": "It is spring."}],
    "second turn": [
        *ASKED,
        {"role": "assistant", "content": "At noon.", "reasoning_content": "It is spring."},
        {"role": "user", "content": "And low?"},
        {"role": "assistant", "content": "At six.", "reasoning_content": "Six hours later."},
    ],
    "system": [{"role": "system", "content": "Be brief."}, *ASKED, {"role": "assistant", "content": "Noon."}],
    "call": [*ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
    "result": [
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "12:04", "name": "tide"},
        {"role": "assistant", "content": "At four past noon."},
    ],
}


@pytest.mark.parametrize("name", families.QWEN35_NAMES)
def test_what_is_taught_is_what_inference_lacks(name, tmp_path):
    from transformers import AutoTokenizer

    families.build_tokenizer(name, tmp_path)
    chat, tokenizer = load_chat(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert chat.kind == "hybrid"
    for case, messages in ROWS.items():
        row = {"messages": messages} | ({"tools": TOOLS} if case in ("call", "result") else {})
        (example,) = examples(row, "auto", chat)
        ids = chat.encode([example.prompt])[0], chat.encode([example.completion])[0]
        assert violations(tokenizer, ids[0] + ids[1], len(ids[0]), row, chat.end) == [], case


@pytest.mark.parametrize(("name", "thinks"), [("qwen3.5", True), ("qwen3.5_small", False), ("qwen3.6", True)])
def test_the_template_of_small_sizes_does_not_think_unless_asked(name, thinks, tmp_path):
    families.build_tokenizer(name, tmp_path)
    chat = load_chat(str(tmp_path))
    assert (
        chat.render(ASKED)
        == chat.render(ASKED, enable_thinking=thinks)
        != chat.render(ASKED, enable_thinking=not thinks)
    )


def test_a_call_in_xml_is_read_as_the_template_writes_it(tmp_path):
    families.build_tokenizer("qwen3.5", tmp_path)
    call = {"name": "tide", "arguments": {"place": "Brest\nharbour", "day": "3", "note": ""}}
    messages = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [{"function": call}, {"function": call}]}]
    text = load_chat(str(tmp_path)).render(messages, TOOLS, add_generation_prompt=False)
    assert read_calls(text.rpartition("</think>")[2], "") == [call, call]


@pytest.mark.parametrize("name", ["Qwen/Qwen3.5-4B", "unsloth/Qwen3.5-0.8B", "Qwen/Qwen3.6-27B", "folder"])
def test_the_family_trains_in_16_bits_and_its_delta_nets_unless_the_recipe_says_otherwise(name, tmp_path):
    if name == "folder":
        (tmp_path / "config.json").write_text('{"model_type": "qwen3_5"}')
        name = str(tmp_path)
    rows = {"sources": [{"path": "data_recipes/samples/jobs/identity.jsonl"}]}
    values = {"name": "a", "data": rows, "model": {"model_name": name}}
    usual = recipe.from_dict(values)
    assert not usual.model.load_in_4bit
    assert list(usual.lora.target_modules) == TARGETS
    asked = recipe.from_dict(values | {"lora": {"target_modules": ["q_proj"]}}, overrides=["model.load_in_4bit=true"])
    assert asked.model.load_in_4bit
    assert asked.lora.target_modules == ("q_proj",)
    assert recipe.from_dict(recipe.to_dict(usual)) == usual


def test_other_families_train_in_4_bits():
    assert recipe.load("hybrid").model.load_in_4bit
    assert "in_proj_qkv" not in recipe.load("hybrid").lora.target_modules


@pytest.fixture(scope="module")
def run(family, tmp_path_factory):
    """An adapter on text and delta nets alike, trained by nobody: random, as large as a short training makes it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = family("qwen3.5")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, target_modules=TARGETS))
    run = tmp_path_factory.mktemp("qwen35") / "run"
    save_run(model, AutoTokenizer.from_pretrained(folder), run)
    export(run, quants=(), console=Console(quiet=True))
    return run


def tensors(file):
    from safetensors.torch import load_file

    return load_file(file)


def test_a_merged_folder_is_the_base_with_other_text_weights_and_passes_its_certificate(run, family):
    import torch

    base, merged = tensors(family("qwen3.5") / "model.safetensors"), tensors(run / "merged" / "model.safetensors")
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    text = [name for name in base if name.startswith("model.language_model.layers.")]
    assert changed == {name for name in text if any(f".{target}.weight" in name for target in TARGETS)}
    assert (
        {base[name].dtype for name in base}
        == {merged[name].dtype for name in merged}
        == {torch.bfloat16, torch.float32}
    )
    assert (run / "merged" / "preprocessor_config.json").is_file()
    config = read_json(run / "merged" / "config.json")
    assert config["architectures"] == ["Qwen3_5ForConditionalGeneration"]
    certificate = read_json(run / "certificate.json")
    assert certificate["passed"]
    kept = next(note for note in certificate["reports"] if note["name"].startswith("weights"))
    assert kept["value"] == len([name for name in base if name.startswith(("model.visual.", "mtp."))])


def test_merged_weights_compute_what_peft_computes_also_in_the_model_that_sees(run, family):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    ids = torch.arange(5, 45)[None]
    base = AutoModelForCausalLM.from_pretrained(family("qwen3.5"), dtype=torch.float32)
    with torch.no_grad():
        plain = base(ids).logits.log_softmax(-1)
        theirs = PeftModel.from_pretrained(base, run / "adapter").merge_and_unload()(ids).logits.log_softmax(-1)
        for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
            model, how = kind.from_pretrained(run / "merged", dtype=torch.float32, output_loading_info=True)
            assert not how["missing_keys"]
            ours = model(ids).logits.log_softmax(-1)
            assert (ours - theirs).abs().mean() < 0.05 * (plain - theirs).abs().mean()


def test_a_changed_weight_of_the_sight_is_noticed(run, tmp_path):
    import shutil

    from safetensors.torch import save_file

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = copy / "merged" / "model.safetensors"
    weights = tensors(file)
    weights["model.visual.patch_embed.proj.weight"][0] = 0
    save_file(weights, file, {"format": "pt"})
    assert not verify(copy, console=Console(quiet=True))["passed"]


def test_a_gguf_is_refused_with_the_way_out(run):
    with pytest.raises(ToolkitError, match=r"'qwen3_5' is not among those converted here.*convert_hf_to_gguf.py"):
        export(run, quants=("q8_0",), console=Console(quiet=True))


def test_an_adapter_may_name_its_weights_as_the_model_that_sees_does(run):
    from toolkit.export.checkpoint import Adapter, seen_as

    assert seen_as("model.language_model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"
    assert seen_as("model.visual.blocks.0.attn.proj") == "model.visual.blocks.0.attn.proj"
    assert all(name.startswith("model.layers.") for name in Adapter(run / "adapter").factors)


def test_a_processor_is_unwrapped_to_its_tokenizer(family, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer, ProcessorMixin

    from toolkit.training import model as models

    class Processor(ProcessorMixin):
        """What Unsloth's loader on a card gives for a model that sees; the real one needs torchvision."""

        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

    class Loader:
        @staticmethod
        def from_pretrained(folder, **options):
            asked.update(options)
            return AutoModelForCausalLM.from_pretrained(folder), Processor(AutoTokenizer.from_pretrained(folder))

    asked = {}
    monkeypatch.setattr(models, "unsloth", lambda: Loader)
    section = recipe.Model(str(family("qwen3.5")), load_in_4bit=False)
    tokenizer = models.load_base(section)[1]
    assert tokenizer.backend_tokenizer.encode("hi").ids
    assert "text_only" not in asked  # Unsloth's loader for CPUs knows no such argument
    monkeypatch.setattr(models, "on_cuda", lambda: True)
    assert models.loading_options(section) == {"text_only": True}
    assert models.loading_options(recipe.Model(section.model_name, extra={"text_only": False})) == {"text_only": False}
    assert models.loading_options(recipe.Model("pocket")) == {}


def test_in_4_bits_the_export_knows_which_layers_unsloth_quantizes(family):
    """Compared with the model as Unsloth loads it: every linear layer of a delta net too."""
    import re

    import torch
    from bitsandbytes.functional import dequantize_4bit

    from toolkit.export.checkpoint import find_base
    from toolkit.export.merge import QUANTIZED, Merged
    from toolkit.training.model import load_base, unsloth

    unsloth()
    name = str(family("qwen3.5"))
    model, _ = load_base(recipe.Model(name))

    class NoAdapter:
        factors, scale = {}, 1

    merged = Merged(find_base({"name": name}, "4bit"), NoAdapter())
    for path, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if isinstance(module, torch.nn.Linear):
            weight = f"{path}.weight"
            assert bool(state) == bool(re.search(QUANTIZED, weight)), path
            if state:
                theirs = dequantize_4bit(module.weight.data, state).to(torch.bfloat16)
                assert torch.equal(merged.base_tensor(weight), theirs), path
