"""Replies: taken apart rightly, the same for the same seed whatever the batch, and a training is left as it was found."""

import copy

import numpy as np
import pytest
from bitsandbytes.nn import Linear4bit, Params4bit

from tests.support import models
from toolkit.evaluation.decode import rows_that_fit, sampler
from toolkit.evaluation.generate import (
    LONG_PROMPTS,
    Reply,
    end_tokens,
    generate,
    inference,
    modes_of,
    plain_on_cpu,
    split_reply,
    switched,
)
from toolkit.family import KINDS, QWEN3_SAMPLING, family_of, sampling_of
from toolkit.files import ToolkitError

CHATS = [
    [{"role": "user", "content": text}]
    for text in (
        "What is one plus two",
        "Who are you",
        "hello",
        "What is the sum of three four five six one two",
        "think",
        "six",
    )
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", ("", "42", False, False)),
        ("<think>\n1 + 1\n</think>\n\n2", ("1 + 1", "2", True, True)),
        ("<think>\n\n</think>\n\n2", ("", "2", True, True)),
        ("<think>\nnever ends", ("never ends", "", True, False)),
        ("well</think>2", ("well", "2", False, True)),
        ("Hm. <think>a</think>2", ("a", "Hm. 2", True, True)),
        ("<think>a</think>2<think>b</think>3", ("a", "2<think>b</think>3", True, True)),
        ("a</think>b<think>c", ("a", "b<think>c", False, True)),
        ("", ("", "", False, False)),
    ],
)
def test_a_reply_is_split_at_its_think_tags(text, expected):
    assert split_reply(text) == expected


def test_the_same_seed_gives_the_same_replies_whatever_the_batch_size_and_another_seed_gives_others(model, tokenizer):
    replies = generate(model, tokenizer, CHATS, "thinking", max_new_tokens=12, seed=1)
    assert replies == generate(model, tokenizer, CHATS, "thinking", max_new_tokens=12, seed=1, batch_size=2)
    assert replies != generate(model, tokenizer, CHATS, "thinking", max_new_tokens=12, seed=2)


def test_sampling_leaves_the_random_state_of_a_training_alone(model, tokenizer):
    import torch

    state = torch.get_rng_state()
    generate(model, tokenizer, CHATS[:2], "non_thinking", max_new_tokens=4, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_replies_equal_a_plain_loop_without_batch_padding_or_cache(model, tokenizer):
    import torch

    for chat, reply in zip(
        CHATS, generate(model, tokenizer, CHATS, "non_thinking", max_new_tokens=8, seed=1, greedy=True), strict=True
    ):
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=False
        )
        start, ends = ids.shape[1], {tokenizer.eos_token_id, tokenizer.pad_token_id}
        with inference(model, tokenizer):
            while ids.shape[1] < start + 8 and (ids.shape[1] == start or ids[0, -1].item() not in ends):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        new = ids[0, start:].tolist()
        assert reply.finished == (new[-1] in ends)
        assert reply.text == tokenizer.decode(new[:-1] if reply.finished else new)


@pytest.mark.parametrize("mode", QWEN3_SAMPLING)
def test_sampled_tokens_follow_hugging_face_s_own_truncated_distribution(mode):
    import torch
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    values, rows = QWEN3_SAMPLING[mode], 20000
    scores = torch.randn(1, 60, generator=torch.Generator().manual_seed(5)) * 2
    expected = TemperatureLogitsWarper(values["temperature"])(None, scores)
    expected = TopPLogitsWarper(values["top_p"])(None, TopKLogitsWarper(values["top_k"])(None, expected)).softmax(-1)[0]
    uniforms = (np.arange(rows) + 0.5)[:, None] / rows  # evenly spread: the counts are exact up to rounding
    picks = sampler(values, uniforms)(None, scores.expand(rows, -1)).argmax(-1)
    found = torch.bincount(picks, minlength=60) / rows
    assert torch.allclose(found, expected, atol=2 / rows)
    assert set(picks.tolist()) == set(expected.nonzero().flatten().tolist())


def test_a_training_is_left_as_it_was_found(model, tokenizer):
    model.train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    before = [copy.copy({k: v for k, v in vars(m).items() if isinstance(v, bool)}) for m in model.modules()]
    with inference(model, tokenizer):
        model.base_model.model.model._flag_for_generation = True  # as Unsloth's generate() leaves behind
        tokenizer.padding_side = "left"
        model.gradient_checkpointing_disable()
        model.config.use_cache = True
    after = [{k: v for k, v in vars(m).items() if isinstance(v, bool)} for m in model.modules()]
    assert before == after
    assert tokenizer.padding_side == "right"
    assert model.config.use_cache is False
    model.gradient_checkpointing_disable()


def test_a_reply_cut_by_the_limit_says_so_and_its_tokens_are_counted(model, tokenizer):
    replies = generate(model, tokenizer, CHATS, "thinking", max_new_tokens=3, seed=3)
    cut = [reply for reply in replies if not reply.finished]
    assert cut
    assert all(reply.reasoning_tokens + reply.answer_tokens + reply.opened + reply.closed == 3 for reply in cut)


def test_a_thinking_only_template_opens_the_block_in_the_prompt(model, tokenizer):
    only = copy.deepcopy(tokenizer)
    only.chat_template = tokenizer.chat_template.replace(
        "'<|im_start|>assistant\\n' }}\n    {%- if enable", "'<|im_start|>assistant\\n<think>\\n' }}\n    {%- if enable"
    )
    replies = generate(model, only, CHATS[:2], "thinking", max_new_tokens=4, seed=0)
    assert [reply.opened for reply in replies] == [True, True]


def test_a_batch_is_as_large_as_its_key_value_cache_allows():
    from transformers import Qwen3Config

    four_billion = Qwen3Config(num_hidden_layers=36, num_key_value_heads=8, head_dim=128)  # 147,456 bytes a token
    assert rows_that_fit(four_billion, 10_000, 10e9, batch_size=32) == 4
    assert rows_that_fit(four_billion, 200, 10e9, batch_size=32) == 32
    assert rows_that_fit(four_billion, 10_000, 1e6, batch_size=32) == 1


def test_a_model_without_grouped_heads_keeps_keys_and_values_of_every_head():
    from transformers import GPTNeoXConfig

    from toolkit.machine.fit import shape_of

    config = GPTNeoXConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, vocab_size=99
    )
    row = 2 * 2 * 2 * 64 * 100  # keys and values, 2 bytes, 2 layers, 4 heads of 16, 100 tokens
    assert rows_that_fit(config, 100, 5.5 * row / 0.7, batch_size=32) == 5
    assert shape_of(config).kv_dim == 64


def test_trouble_is_named(model, tokenizer):
    with pytest.raises(ToolkitError, match="leaves no room"):
        generate(model, tokenizer, [[{"role": "user", "content": "one " * 300}]], "thinking", max_new_tokens=4, seed=0)
    with pytest.raises(ToolkitError, match="expected one of thinking, non_thinking"):
        generate(model, tokenizer, CHATS, "loud", max_new_tokens=4, seed=0)
    assert generate(model, tokenizer, [], "thinking", max_new_tokens=4, seed=0) == []
    assert Reply("", "", "", 0, 0, False, False, True).finished


FAMILIES = {
    "qwen3": ("hybrid", ["<|im_end|>", "<|endoftext|>"]),
    "qwen3_instruct_2507": ("instruct", ["<|im_end|>", "<|endoftext|>"]),
    "qwen3_thinking_2507": ("thinking_only", ["<|im_end|>", "<|endoftext|>"]),
    "qwen2.5": ("instruct", ["<|im_end|>", "<|endoftext|>"]),
    "llama3": ("instruct", ["<|eot_id|>", "<|end_of_text|>"]),
    "gemma3": ("instruct", ["<end_of_turn>", "<eos>"]),
    "smollm2": ("instruct", ["<|im_end|>"]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_replies_in_the_modes_it_has_and_stops_at_its_end_of_turn(name, family):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind, ends = FAMILIES[name]
    tokenizer = AutoTokenizer.from_pretrained(family(name))
    model = AutoModelForCausalLM.from_pretrained(family(name), dtype="float32")
    assert modes_of(tokenizer) == KINDS[kind]
    model.generation_config.eos_token_id = None  # as a checkpoint without the file: the template still tells
    assert tokenizer.convert_tokens_to_ids(ends[0]) in end_tokens(model, tokenizer)
    for mode in KINDS[kind]:
        replies = generate(model, tokenizer, CHATS[:3], mode, max_new_tokens=5, seed=1)
        assert replies == generate(model, tokenizer, CHATS[:3], mode, max_new_tokens=5, seed=1, batch_size=1)
        assert all(reply.opened for reply in replies if kind == "thinking_only")
        assert all(r.reasoning_tokens + r.answer_tokens <= 5 for r in replies)
    for mode in {"thinking", "non_thinking"} - set(KINDS[kind]):
        with pytest.raises(ToolkitError, match=f"expected one of {KINDS[kind][0]}, which this model has"):
            generate(model, tokenizer, CHATS[:1], mode, max_new_tokens=5, seed=1)


def test_a_base_model_without_a_template_is_refused_with_the_way_out(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ToolkitError, match="Choose an instruct or hybrid model"):
        modes_of(bare)


def test_a_model_samples_with_its_own_values():
    own = {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "min_p": None}
    assert sampling_of(family_of("gemma3_text"), "non_thinking", own) == {**own, "min_p": 0.0}
    assert sampling_of(family_of("qwen3"), "thinking", own) == QWEN3_SAMPLING["thinking"]  # one file for two modes


def test_a_top_k_of_zero_leaves_every_token_in():
    import torch

    picks = sampler({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}, np.linspace(0, 1, 400)[:, None])
    assert set(picks(None, torch.zeros(400, 40)).argmax(-1).tolist()) == set(range(40))


def test_no_prompt_is_cut_to_the_training_length_while_replies_are_generated(model, tokenizer):
    inner = model.base_model.model.model
    inner.max_seq_length = 4  # what Unsloth sets; a longer prompt would lose its end, the generation prompt included
    with inference(model, tokenizer):
        assert vars(inner)[LONG_PROMPTS]
    assert LONG_PROMPTS not in vars(inner)
    del inner.max_seq_length


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("models/llama.py", [LONG_PROMPTS, "max_seq_length", "_flag_for_generation"]),
        ("models/_decode_graphs.py", ["def release_for_training(model)", "PREALLOC = ", "UNSLOTH_DECODE_CUDA_GRAPHS"]),
    ],
)
def test_private_names_of_unsloth_that_replies_rely_on_still_exist(file, names):
    import importlib.util
    from pathlib import Path

    folder = Path(importlib.util.find_spec("unsloth").submodule_search_locations[0])
    text = (folder / file).read_text(encoding="utf-8")
    assert [name for name in names if name not in text] == []


def test_a_prompt_that_leaves_little_room_cuts_no_other_reply_of_its_batch(model, tokenizer, monkeypatch):
    from toolkit.evaluation import generate as module

    longest = max(len(ids) for ids in module.prompts(tokenizer, CHATS, "non_thinking"))
    monkeypatch.setattr(model.config, "max_position_embeddings", longest + 3)
    settings = {"max_new_tokens": 12, "seed": 1}
    together = generate(model, tokenizer, CHATS, "non_thinking", batch_size=32, **settings)
    assert together == generate(model, tokenizer, CHATS, "non_thinking", batch_size=1, **settings)
    lengths = [reply.answer_tokens + reply.reasoning_tokens for reply in together]
    assert min(lengths) <= 3 < max(lengths)


def test_a_temperature_of_zero_is_greedy(model, tokenizer, monkeypatch):
    from toolkit.evaluation import generate as module

    wanted = generate(model, tokenizer, CHATS, "non_thinking", max_new_tokens=8, seed=1, greedy=True)
    cold = {"temperature": 0.0, "top_p": 0.8, "top_k": 20, "min_p": 0.0}
    monkeypatch.setattr(module, "sampling_values", lambda *_: cold)
    assert generate(model, tokenizer, CHATS, "non_thinking", max_new_tokens=8, seed=1) == wanted


@pytest.mark.parametrize("greedy", [True, False])
def test_a_long_reply_generated_in_parts_is_the_reply_generated_at_once(model, tokenizer, monkeypatch, greedy):
    from toolkit.evaluation import decode

    settings = {"max_new_tokens": 24, "seed": 1, "greedy": greedy}
    whole = generate(model, tokenizer, CHATS, "thinking", **settings)
    monkeypatch.setattr(decode, "FIRST_PART", 3)
    done = []
    parts = generate(model, tokenizer, CHATS, "thinking", batch_size=2, progress=done.append, **settings)
    assert parts == whole
    assert sum(done) == len(CHATS)
    lengths = {reply.reasoning_tokens + reply.answer_tokens for reply in whole}
    assert max(lengths) > 12, "some reply is longer than three parts"


def test_parts_grow_so_that_little_is_read_twice():
    from toolkit.evaluation.decode import part_length

    parts = []
    while sum(parts) < 3100:
        parts.append(part_length(sum(parts), 3100))
    assert parts == [256, 256, 512, 1024, 1052]
    assert part_length(0, 160) == 160  # short replies are one part


def test_few_rows_that_need_no_dequantizing_are_preferred_to_some_more_that_do():
    from toolkit.evaluation.decode import rows_for_kernels

    rtx_4090, rtx_3060, t4 = (8, 9), (8, 6), (7, 5)
    assert [rows_for_kernels(fit, rtx_4090) for fit in (2, 10, 32)] == [2, 4, 32]
    assert [rows_for_kernels(fit, rtx_3060) for fit in (4, 12)] == [1, 12]
    assert rows_for_kernels(32, t4) == 16


def test_decode_graphs_are_on_while_a_card_generates_and_as_they_were_afterwards(monkeypatch):
    import sys
    import types

    import torch

    from toolkit.evaluation import decode

    released = []
    graphs = types.SimpleNamespace(PREALLOC=False, release_for_training=released.append)
    monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    monkeypatch.setitem(sys.modules, "unsloth.models", types.SimpleNamespace(_decode_graphs=graphs))
    monkeypatch.delenv(decode.GRAPHS, raising=False)
    card = types.SimpleNamespace(device=torch.device("cuda"))
    with decode.decode_graphs(card):
        assert (decode.os.environ[decode.GRAPHS], graphs.PREALLOC) == ("1", True)
    assert (decode.GRAPHS in decode.os.environ, graphs.PREALLOC, released) == (False, False, [card])
    monkeypatch.setenv(decode.GRAPHS, "0")  # whoever switches them off is obeyed
    with decode.decode_graphs(card):
        assert decode.os.environ[decode.GRAPHS] == "0"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("four_bit", [False, True])
def test_on_a_cpu_replies_come_from_plain_weights_and_every_layer_is_as_before_afterwards(tokenizer, four_bit, dtype):
    """In float32 with the adapter in them; 16 bits would round the sum to another model."""
    import torch

    model = models.tuned(tokenizer).to(getattr(torch, dtype))
    if four_bit:
        quantize(model)
    settings = {"max_new_tokens": 12, "seed": 1, "greedy": True}
    generate(model, tokenizer, CHATS, "thinking", **settings)  # the first step may lay out 4-bit weights anew
    before = {name: weight.data.clone() for name, weight in model.named_parameters()}
    layers = [(name, type(module)) for name, module in model.named_modules()]
    for adapter in (False, True):
        with switched(model, adapter):
            separate = generate(model, tokenizer, CHATS, "thinking", **settings)
            # where the processor has a kernel for 4-bit weights, they stay
            packed = any(is_packed(module) for module in model.modules())
            with plain_on_cpu(model, merge=adapter):
                merged = {name for m in model.modules() for name in vars(m).get("merged_adapters", [])}
                assert bool(merged) == (adapter and dtype == "float32" and not packed)
                assert any(isinstance(m, Linear4bit) for m in model.modules()) == packed
                assert generate(model, tokenizer, CHATS, "thinking", **settings) == separate
    assert not any(vars(m).get("merged_adapters") for m in model.modules())
    assert [(name, type(module)) for name, module in model.named_modules()] == layers
    assert all(torch.equal(weight.data, before[name]) for name, weight in model.named_parameters())


def test_a_diverged_adapter_is_no_obstacle_to_replies(tokenizer):
    model = models.tuned(tokenizer)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(float("nan"))
    with plain_on_cpu(model, merge=True):
        assert len(generate(model, tokenizer, CHATS[:2], "thinking", max_new_tokens=2, seed=1)) == 2


def is_packed(module) -> bool:
    """Whether bitsandbytes has laid a module's weights out for this processor's own kernel, at its first step."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def quantize(model) -> None:
    """Give every LoRA layer 4-bit weights, as a base that was loaded in 4 bits has them."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            base = module.base_layer
            module.base_layer = Linear4bit(base.in_features, base.out_features, bias=False, quant_type="nf4")
            module.base_layer.weight = Params4bit(base.weight.data, requires_grad=False, quant_type="nf4")
            module.base_layer.to("cpu")
