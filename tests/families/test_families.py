"""Every verb works on every family, on tiny random models of the real architectures with the real chat templates."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from tests.support import families
from tests.support.label_check import violations
from toolkit import recipe, run
from toolkit.comparison import report
from toolkit.comparison.decide import compare
from toolkit.data.mix import compile_mix, split_count
from toolkit.data.render import load_chat
from toolkit.data.sources import conversations
from toolkit.export import export
from toolkit.family import KINDS, MODES, PROBE, mode_title
from toolkit.files import read_json, read_jsonl
from toolkit.machine import fit
from toolkit.serving.batch import answer_file
from toolkit.training.model import load_base, unsloth

KIND = {"qwen3": "hybrid", "qwen3_thinking_2507": "thinking_only"} | dict.fromkeys(families.QWEN35_NAMES, "hybrid")
MODEL_TYPE = {"qwen2.5": "qwen2", "llama3": "llama", "gemma3": "gemma3_text", "smollm2": "llama"}
MODEL_TYPE |= dict.fromkeys(families.QWEN35_NAMES, "qwen3_5")
TEXTS = ["Who are you?", " two  spaces\n\n12345", "你好，世界 🙂", "def f(x):\n\treturn x", "e\u0301 'll"]


@pytest.mark.parametrize("name", families.NAMES)
def test_a_tiny_model_loads_with_its_architecture_kind_and_ids(name, family):
    import tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = family(name)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == MODEL_TYPE.get(name, "qwen3")
    chat = load_chat(str(folder))
    assert chat.kind == KIND.get(name, "instruct")
    tokenizer, raw = (
        AutoTokenizer.from_pretrained(folder),
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
    )
    for text in TEXTS:
        ids = raw.encode(text, add_special_tokens=False).ids
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids) == chat.decode(ids)
        normal = text.replace("e\u0301", "é") if name.startswith("qwen") else text  # Qwen normalises to NFC
        assert raw.decode(ids) == normal
        assert chat.encode([text]) == [ids]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert str(model.dtype) == "torch.bfloat16"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt"
    )
    out = model.generate(prompt["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape[1] >= prompt["input_ids"].shape[1] + 1
    stops = model.generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else stops
    assert tuple(tokenizer.decode([i]) for i in stops) == families.TINY[name].stops


def test_a_loaded_tokenizer_splits_text_as_its_file_says_also_once_saved(family, tmp_path):
    """transformers 5 builds a GPT2Tokenizer, which SmolLM2 names, anew and without the split into single digits."""
    import tokenizers

    unsloth()
    from transformers import AutoTokenizer

    _, tokenizer = load_base(recipe.Model(str(family("smollm2"))))
    tokenizer.save_pretrained(tmp_path)
    own = tokenizers.Tokenizer.from_file(str(family("smollm2") / "tokenizer.json"))
    for text in ["x  1  22", "line\n\n 12345", *TEXTS]:
        ids = own.encode(text, add_special_tokens=False).ids
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"] == ids


# --- every verb on every family --------------------------------------------------------------------------------------

SOURCES = {
    "thinking": {"name": "sums", "path": "data_recipes/samples/openmath_sample.jsonl#24", "format": "openmath"},
    "non_thinking": {"name": "identity", "path": "data_recipes/samples/jobs/identity.jsonl#24"},
}
PLACEHOLDERS = {"NAME": {"zh": "小麦", "en": "Wheat"}, "AUTHOR": {"zh": "面包房", "en": "the Bakery"}}


def small(folder, name: str, modes, **data) -> recipe.Recipe:
    """A recipe of two steps on shipped rows in the given modes."""
    sources = [SOURCES[mode] | {"mode": mode} for mode in modes]
    return recipe.from_dict(
        {
            "name": name,
            "data": {"sources": sources, "validation_size": 4, "placeholders": PLACEHOLDERS} | data,
            "model": {"model_name": str(folder), "max_seq_length": 4096},
            "lora": {"r": 8},
            # larger where the weights are normed twice: the effect of two steps would be smaller than bf16's rounding
            "train": {"learning_rate": 2e-4 if converts(folder) else 2e-3, "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
                      "eval_steps": 1, "save_steps": 1, "report_to": "none"},
            "evaluate": {"max_new_tokens": 8, "prompts": ["Who are you?"]},
            "export": {"quantization_method": ["f16", "q8_0"] if converts(folder) else []},
        }
    )  # fmt: skip


def converts(folder) -> bool:
    """Whether GGUF files are made of it here."""
    return read_json(Path(folder) / "config.json")["model_type"] != "qwen3_5"


def that_ends(folder: Path, copy: Path) -> Path:
    """A copy of a tiny model that often says its end-of-turn token: what never ends is not scored."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    shutil.copytree(folder, copy)
    chat, weights = load_chat(str(folder)), load_file(copy / "model.safetensors")
    (end,) = chat.encode([chat.end])[0]
    prompt = torch.tensor(chat.encode([chat.render(PROBE)]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    row = model.get_output_embeddings().weight[end]
    out = model(prompt, output_hidden_states=True)
    last = out.hidden_states[-1][0, -1]
    row.copy_(last * 4 * out.logits[0, -1].max() / (last @ last))  # far ahead, as other prompts end elsewhere
    name = next(n for n in sorted(weights, key=len) if n.endswith(("lm_head.weight", ".embed_tokens.weight")))
    weights[name][end] = row.bfloat16()
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy


def told(source: recipe.Source, data: recipe.Data) -> dict[int, dict]:
    """Row number → conversation."""
    return dict(conversations(split_count(source)[0], data.seed, data.placeholders))


def wrong_labels(mixed, loaded: recipe.Recipe, chat) -> list[str]:
    """What the independent checker finds wrong in the rows of a mix, trained on and held out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(loaded.model.model_name)
    rows = {source.name: told(source, loaded.data) for source in loaded.data.sources}
    found = [
        fault
        for row in mixed.train + mixed.validation
        for fault in violations(tokenizer, row.ids.tolist(), row.prompt_length, rows[row.source][row.number], chat.end)
    ]
    return [f for f in found if chat.kind != "thinking_only" or "empty think" not in f]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in families.NAMES if name not in ("qwen2.5", "qwen3.5")]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3.5", *SLOW])
def test_every_step_from_mix_to_generate_works_in_the_modes_the_model_has(name, family, tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path))
    unsloth()  # before transformers, which it patches
    console = Console(file=io.StringIO(), width=120)
    kind = KIND.get(name, "instruct")
    modes = KINDS[kind]
    folder = that_ends(family(name), tmp_path / "model")
    loaded = small(folder, "one", modes)

    mixed = compile_mix(loaded)
    assert {row.mode for row in mixed.train} == set(modes)
    assert wrong_labels(mixed, loaded, load_chat(str(folder))) == []
    assert fit.forecast(loaded, longest=max(len(row.ids) for row in mixed.train), vram=8 * 2**30).peak > 0

    runs = [run.train(loaded, console), run.train(small(folder, "two", modes, seed=1), console)]
    samples = read_jsonl(runs[0] / "samples.jsonl")
    assert {row["mode"] for row in samples} == set(modes)
    assert {"before", "after"} <= {row["when"] for row in samples}
    result = read_json(runs[0] / "eval.json")
    assert result["modes"] == list(modes)
    assert set(result["tuned"]) == {*modes, "forgetting"}
    said = console.file.getvalue()
    assert [title for title in map(mode_title, MODES) if f" {title}" in said] == list(map(mode_title, modes))

    compared = compare(runs)
    report.conclude(compared, console, tmp_path / "comparison")
    assert (tmp_path / "comparison" / "comparison.png").is_file()

    certificate = export(runs[0], quants=loaded.export.quantization_method, console=Console(quiet=True))
    assert certificate["passed"]
    ggufs = {"gguf/one.f16.gguf", "gguf/one.q8_0.gguf"} if converts(folder) else set()
    assert {f for f in certificate["files"] if f.endswith(".gguf")} == ggufs

    if not converts(folder):
        return  # llama.cpp replies
    (tmp_path / "ask.txt").write_text("Who are you?\n你是谁?\n", encoding="utf-8")
    assert answer_file(runs[0], tmp_path / "ask.txt", tmp_path / "replies.jsonl", max_new_tokens=4) == []
    assert len(read_jsonl(tmp_path / "replies.jsonl")) == 2 * len(modes)
