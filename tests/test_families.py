"""The tiny models of tests/families.py are what the other tests take them for."""

import json

import pytest

from tests import families

KIND = {"qwen3": "hybrid", "qwen3_thinking_2507": "thinking_only"}
MODEL_TYPE = {"qwen2.5": "qwen2", "llama3": "llama", "gemma3": "gemma3_text", "smollm2": "llama"}
TEXTS = ["Who are you?", " two  spaces\n\n12345", "你好，世界 🙂", "def f(x):\n\treturn x", "e\u0301 'll"]


@pytest.mark.parametrize("name", families.NAMES)
def test_a_tiny_model_loads_with_its_architecture_kind_and_ids(name, family):
    import tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from toolkit.render import load_chat

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
