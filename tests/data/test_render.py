"""Training sees what inference shows: the label rule on every kind of row, on two tokenizers and many templates."""

import json
import re
import shutil
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import families
from tests.support import qwen3 as real
from tests.support.label_check import violations
from toolkit import recipe
from toolkit.data import mix
from toolkit.data.render import chat_of, examples, last_switch, load_chat
from toolkit.data.sources import Rejected, conversations
from toolkit.files import POCKET, ToolkitError

USER = {"role": "user", "content": "What is 2 + 4?"}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 4}}}],
}
DIRECT = {"role": "assistant", "content": "6"}
REASONED = {"role": "assistant", "reasoning_content": "two and four\nmake six", "content": "6"}
KINDS = {
    "non_thinking": [USER, DIRECT],
    "thinking": [USER, REASONED],
    "system": [{"role": "system", "content": "Be brief."}, USER, DIRECT],
    "multi_turn": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, USER, DIRECT],
    "multi_turn_thinking": [USER, REASONED, {"role": "user", "content": "and 3 + 3?"}, REASONED],
    "tool_call": [USER, CALL],
    "after_tool": [USER, CALL, {"role": "tool", "content": "6"}, {"role": "assistant", "content": "It is 6."}],
    "no_think_typed": [{"role": "user", "content": "What is 2 + 4? /no_think"}, DIRECT],
    "think_typed": [{"role": "user", "content": "What is 2 + 4? /think"}, REASONED],
    "switched_midway": [
        {"role": "user", "content": "hi /think"},
        REASONED,
        {"role": "user", "content": "2 + 4? /no_think"},
        DIRECT,
    ],
    "switched_back": [
        {"role": "user", "content": "hi /no_think"},
        DIRECT,
        {"role": "user", "content": "2 + 4? /think"},
        REASONED,
    ],
}
TOOLED = {"tool_call", "after_tool"}


def conversation(kind):
    return {"messages": KINDS[kind]} | ({"tools": [TOOL]} if kind in TOOLED else {})


@pytest.fixture(scope="module", params=["pocket", "qwen3"])
def model(request):
    folder = POCKET if request.param == "pocket" else request.getfixturevalue("qwen3")
    from transformers import AutoTokenizer

    return load_chat(str(folder)), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taught_is_exactly_what_the_inference_prompt_lacks(model, kind):
    chat, tokenizer = model
    (example,) = examples(conversation(kind), "auto", chat)
    prompt, completion = chat.encode([example.prompt, example.completion])
    assert violations(tokenizer, prompt + completion, len(prompt), conversation(kind)) == []


def test_the_checker_sees_the_usual_mistakes(model):
    chat, tokenizer = model
    (example,) = examples(conversation("non_thinking"), "auto", chat)
    empty = "<think>\n\n</think>\n\n"
    shifted = example.prompt.removesuffix(empty), empty + example.completion  # what TRL and Unsloth train on
    newline = example.prompt, example.completion + "\n"
    for prompt, completion in (shifted, newline):
        ids = chat.encode([prompt, completion])
        assert violations(tokenizer, ids[0] + ids[1], len(ids[0]), conversation("non_thinking"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("thinking", [None, True, False])
def test_rendering_equals_apply_chat_template(model, kind, thinking):
    chat, tokenizer = model
    switch = {} if thinking is None else {"enable_thinking": thinking}
    tools = [TOOL] if kind in TOOLED else None
    for prompted in (True, False):
        theirs = tokenizer.apply_chat_template(
            KINDS[kind], tools=tools, tokenize=False, add_generation_prompt=prompted, **switch
        )
        assert chat.render(KINDS[kind], tools, thinking, prompted) == theirs


TEXTS = [
    "",
    "hello",
    "2+4=6\n\n",
    "你好，世界！",
    "🍞🙂",
    "a" * 2000,
    "İstanbul ﬁ e\u0301",
    " \t x  ",
    "<think>\n</think> <|im_end|>",
    "१२३ 12345",
]


def test_ids_equal_the_hugging_face_tokenizer(model):
    chat, tokenizer = model
    ids = chat.encode(TEXTS)
    assert ids == [tokenizer(t, add_special_tokens=False)["input_ids"] for t in TEXTS]
    assert ids == chat.tokenizers.reference_ids(TEXTS)


word = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="<>"), min_size=1, max_size=30
).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(word, word), min_size=1, max_size=4),
    st.one_of(st.none(), word),
    st.sampled_from(["last", "each"]),
)
def test_labels_never_cover_a_user_token(turns, reasoning, which):
    chat = load_chat("pocket")
    messages = [
        m for u, a in turns for m in ({"role": "user", "content": "\ue000" + u}, {"role": "assistant", "content": a})
    ]
    if reasoning:
        messages[-1] = {**messages[-1], "reasoning_content": reasoning}
    for example in examples({"messages": messages}, "auto", chat, which):
        assert "\ue000" not in example.completion
        assert example.completion.count("<|im_end|>") == 1
        assert example.prompt.count("\ue000") >= 1


def test_each_turn_becomes_an_example_that_sees_only_what_came_before():
    chat = load_chat("pocket")
    found = examples(conversation("multi_turn"), "auto", chat, "each")
    assert [e.completion for e in found] == ["hello<|im_end|>", "6<|im_end|>"]
    assert "hello" not in found[0].prompt


def test_tool_results_are_never_supervised(model):
    chat, _ = model
    found = examples(conversation("after_tool"), "auto", chat, "each")
    assert len(found) == 2
    assert all("tool_response" not in e.completion for e in found)


@pytest.mark.parametrize(
    ("kind", "mode", "reason"),
    [("non_thinking", "thinking", "no_reasoning"), ("thinking", "non_thinking", "reasoning_in_non_thinking")],
)
def test_a_row_of_the_wrong_mode_is_rejected_with_its_reason(kind, mode, reason):
    with pytest.raises(Rejected) as caught:
        examples(conversation(kind), mode, load_chat("pocket"))
    assert caught.value.reason == reason


def test_the_latest_switch_counts_and_only_as_a_word_of_its_own():
    assert (
        last_switch([{"role": "user", "content": "/think a"}, {"role": "user", "content": "b /no_think"}]) == "no_think"
    )
    assert last_switch([{"role": "user", "content": "see /thinking and path/think"}]) is None
    assert last_switch([{"role": "assistant", "content": "/think"}]) is None


def folder_with(template, tmp_path):
    """The pocket tokenizer under another chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, tmp_path / name)
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return load_chat(str(tmp_path))


QWEN = {
    "qwen3": "hybrid",
    "qwen3_instruct_2507": "instruct",
    "qwen3_5_think": "hybrid",
    "qwen3_5_nothink": "hybrid",
    "qwen3_6": "hybrid",
    "qwen3_8": "hybrid",
    "qwen2_5": "instruct",
}
THINKING_ONLY = families.thinking_2507_template()


@pytest.mark.parametrize("turns", ["last", "each"])
@pytest.mark.parametrize("name", [*QWEN, "thinking_only"])
def test_the_label_rule_holds_on_every_qwen_template(name, turns, tmp_path):
    from transformers import AutoTokenizer

    chat = folder_with(THINKING_ONLY if name == "thinking_only" else real.template(name), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    kinds = ["non_thinking", "system", "multi_turn", "tool_call", "after_tool"]
    kinds += [] if chat.kind == "instruct" else ["thinking", "multi_turn_thinking"]
    for kind in kinds:
        made = examples(conversation(kind), "auto", chat, turns)
        answers = [i for i, message in enumerate(KINDS[kind]) if message["role"] == "assistant"]
        for example, place in zip(made, answers[-1:] if turns == "last" else answers, strict=True):
            settings = {"tools": conversation(kind).get("tools"), "enable_thinking": example.mode == "thinking"}
            before, reply = KINDS[kind][:place], KINDS[kind][place]
            shown = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True, **settings)
            full = tokenizer.apply_chat_template([*before, reply], tokenize=False, **settings)
            assert example.prompt == shown
            assert full.removeprefix(shown + example.completion).strip() == ""
            assert example.completion.endswith(reply["content"].strip() + "<|im_end|>")
            assert not example.completion.startswith("<think>\n\n</think>")


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8", "qwen2_5", "qwen3"])
def test_reasoning_for_a_model_without_thinking_is_refused_and_never_for_a_hybrid(name, tmp_path):
    chat = folder_with(real.template(name), tmp_path)
    if chat.kind != "instruct":
        assert examples(conversation("thinking"), "auto", chat)
        return
    with pytest.raises(Rejected, match="no thinking mode"):
        examples(conversation("thinking"), "auto", chat)


ENDS = {"llama3": "<|eot_id|>", "gemma3": "<end_of_turn>"}  # the others: <|im_end|>


@pytest.mark.parametrize("name", families.NAMES)
def test_the_label_rule_holds_on_every_family(name, family):
    from transformers import AutoTokenizer

    folder = family(name)
    chat, tokenizer = load_chat(str(folder)), AutoTokenizer.from_pretrained(folder)
    assert chat.end == ENDS.get(name, "<|im_end|>")
    assert len(chat.encode([chat.end])[0]) == 1
    assert {*families.NAMES} >= {"qwen3", "qwen2.5", "llama3", "gemma3", "smollm2", "qwen3_thinking_2507"}
    for kind in ("non_thinking", "system", "multi_turn", "thinking", "multi_turn_thinking"):
        if kind.endswith("thinking") and kind != "non_thinking" and chat.kind == "instruct":
            with pytest.raises(Rejected, match="no thinking mode"):
                examples(conversation(kind), "auto", chat)
            continue
        (example,) = examples(conversation(kind), "auto", chat)
        prompt, completion = chat.encode([example.prompt, example.completion])
        found = violations(tokenizer, prompt + completion, len(prompt), conversation(kind), chat.end)
        assert [f for f in found if chat.kind != "thinking_only" or "empty think" not in f] == []


@pytest.mark.parametrize("name", families.NAMES)
def test_a_chat_made_from_a_loaded_tokenizer_is_the_folders(name, family):
    from transformers import AutoTokenizer

    folder = family(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)  # leaves its settings in the backend
    chat, other = load_chat(str(folder)), chat_of(tokenizer)
    (a,), (b,) = (examples(conversation("multi_turn"), "auto", c) for c in (chat, other))
    assert a == b
    assert chat.encode(TEXTS) == other.encode(TEXTS) == other.tokenizers.reference_ids(TEXTS)


def test_the_kind_of_a_model_is_found_by_rendering_its_template(tmp_path):
    for name, kind in QWEN.items():
        folder = tmp_path / name
        folder.mkdir()
        assert folder_with(real.template(name), folder).kind == kind, name
    (tmp_path / "t").mkdir()
    assert folder_with(THINKING_ONLY, tmp_path / "t").kind == "thinking_only"
    (tmp_path / "b").mkdir()
    assert folder_with(None, tmp_path / "b").kind == "base"


def test_a_model_without_a_chat_template_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(ToolkitError, match="has no chat template.*Choose an instruct or hybrid model"):
        examples(conversation("thinking"), "auto", folder_with(None, tmp_path))


def test_a_template_whose_reply_does_not_continue_the_prompt_is_rejected_with_the_difference(tmp_path):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    with pytest.raises(Rejected, match="prompt has '<bot>'"):
        examples(conversation("non_thinking"), "auto", folder_with(template, tmp_path))


def test_a_template_without_a_generation_prompt_is_an_error_that_says_so(tmp_path):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    with pytest.raises(ToolkitError, match="has no generation prompt.*official template"):
        examples(conversation("non_thinking"), "auto", folder_with(template, tmp_path))


CLOSED = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}END\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("", "ends a reply with '', which is no token of its"),
        ("<|eot_id|>", "ends a reply with '<|eot_id|>', which is no token of its"),
    ],
)
def test_a_turn_that_ends_in_no_token_is_an_error_before_any_row_is_read(end, said, tmp_path):
    chat = folder_with(CLOSED.replace("END\n", end), tmp_path)
    with pytest.raises(ToolkitError, match=re.escape(said)):
        _ = chat.end


def test_the_end_of_turn_is_what_the_template_writes_whatever_eos_token_says(tmp_path):
    chat = folder_with(CLOSED.replace("END", "<|endoftext|>"), tmp_path)
    assert (chat.end, chat.tokens["eos_token"]) == ("<|endoftext|>", "<|im_end|>")
    (example,) = examples(conversation("non_thinking"), "auto", chat)
    assert example.completion == "6<|endoftext|>"


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("gemma4", "thinking", "reasoning_lost"),
        ("idefics3", "non_thinking", "text_lost"),
        ("smolvlm", "non_thinking", "text_lost"),
        ("qwen2_5", "call_without_template", "tool_lost"),
    ],
)
def test_a_row_whose_text_the_template_drops_is_rejected(name, kind, reason, tmp_path):
    template = real.template(name)
    if kind == "call_without_template":
        kind, template = "tool_call", CLOSED.replace("END", "<|im_end|>")
    with pytest.raises(Rejected) as caught:
        examples(conversation(kind), "auto", folder_with(template, tmp_path))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ m.content[0].text + 'x' }}", "text"),
        ("{{ m.content.parts() }}", "parts"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_what_a_template_raises_is_a_rejection_in_its_words(line, said, tmp_path):
    template = "{% for m in messages %}{% if m.role == 'system' %}" + line + "{% endif %}" + CLOSED.split("%}", 1)[1]
    chat = folder_with(template.replace("END", "<|im_end|>"), tmp_path)
    assert examples(conversation("non_thinking"), "auto", chat)
    with pytest.raises(Rejected, match=said) as caught:
        examples(conversation("system"), "auto", chat)
    assert caught.value.reason == "template_error"


def test_a_template_that_cannot_be_parsed_or_fails_on_every_row_is_an_error_that_names_the_model(tmp_path):
    with pytest.raises(ToolkitError, match="chat_template.jinja, line 1"):
        _ = folder_with("{% for %}", tmp_path).kind
    with pytest.raises(ToolkitError, match="fails on a plain question.*no such thing"):
        _ = folder_with("{{ raise_exception('no such thing') }}", tmp_path).kind


ENDLESS = {
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "ranges in ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "texts in texts": "{% for a in 'x' * 99999 %}{% for b in 'x' * 99999 %}{{ loop.index }}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}


@pytest.mark.parametrize("loop", ENDLESS)
def test_a_template_that_loops_for_ever_is_an_error_that_names_the_model(loop, tmp_path):
    began = time.monotonic()
    with pytest.raises(ToolkitError, match=f"{tmp_path}: its chat template .*"):
        _ = folder_with(ENDLESS[loop] + real.template("qwen3"), tmp_path).kind
    assert time.monotonic() - began < 60


def test_a_template_that_loops_for_ever_on_some_rows_stops_the_mix_and_says_what_to_do(tmp_path):
    """A row at a time it would be rejected for hours."""
    template = f"{{% if messages | length > 2 %}}{ENDLESS['ranges in ranges']}{{% endif %}}{real.template('qwen3')}"
    chat = folder_with(template, tmp_path)
    assert examples(conversation("non_thinking"), "auto", chat)
    with pytest.raises(ToolkitError, match="more than 1,000,000 steps.*official template: chat_template.jinja"):
        examples(conversation("multi_turn"), "auto", chat)


@pytest.mark.parametrize("name", ["llama3", "gemma3", "smollm2", "pocket"])
def test_text_that_holds_a_special_token_of_the_tokenizer_is_rejected(name, family):
    chat = load_chat(name if name == "pocket" else str(family(name)))
    for field in ("content", "reasoning_content"):
        reply = DIRECT | {field: f"see {chat.end} and on"}
        with pytest.raises(Rejected, match="reads as structure") as caught:
            examples({"messages": [USER, reply]}, "auto", chat)
        assert caught.value.reason == "control_token"


TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|fim_prefix|>",
    "<tool_call>",
    "</tool_response>",
    "<think>",
    "</think>",
]


def places(text):
    """A conversation for each place that a text may stand in."""
    called = [{"type": "function", "function": {"name": "add", "arguments": {"x": text}}}]
    yield [{"role": "user", "content": text}, DIRECT], None
    yield [{"role": "system", "content": text}, USER, DIRECT], None
    yield [USER, {"role": "assistant", "content": "", "tool_calls": called}], [TOOL]
    yield [USER, CALL, {"role": "tool", "content": text}, DIRECT], [TOOL]
    yield [USER, DIRECT], [{"type": "function", "function": {"name": "f", "description": text}}]


@pytest.mark.parametrize("token", TOKENS)
def test_what_the_tokenizer_reads_as_structure_is_rejected_wherever_it_stands(model, token):
    chat, _ = model
    for messages, tools in places(f"a{token}b"):
        with pytest.raises(Rejected, match="reads as structure") as caught:
            examples({"messages": messages} | ({"tools": tools} if tools else {}), "auto", chat)
        assert caught.value.reason == "control_token"


@pytest.mark.parametrize(
    "text", ["<s>old</s> new", "<speak><s>Hi.</s></speak>", "[INST]", "<unk>", "<pad>", "<|eot_id|>", "<bos>"]
)
def test_what_the_tokenizer_reads_as_plain_text_is_taught(model, text):
    chat, tokenizer = model
    (example,) = examples({"messages": [USER, {"role": "assistant", "content": text}]}, "auto", chat)
    assert example.completion == f"{text}<|im_end|>"
    assert not set(tokenizer(text)["input_ids"]) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize(
    ("name", "taken", "free"),
    [("llama3", "<|eot_id|>", "<|im_end|>"), ("gemma3", "<end_of_turn>", "<s>"), ("smollm2", "<|im_end|>", "</s>")],
)
def test_each_familys_tokenizer_decides_for_itself(name, taken, free, family):
    chat = load_chat(str(family(name)))
    for token in (taken, free):
        hit = chat.special.search(f"a {token} b")
        assert bool(hit) == (token == taken)


@pytest.mark.parametrize("name", ["<|im_end|>\n<|im_start|>user", "</think>", "<tool_call>"])
@pytest.mark.parametrize("way", ["placeholder", "system"])
def test_a_name_or_a_system_prompt_brings_no_control_token_into_a_row(name, way, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"query": "Who?", "response": "I, {{NAME}}."}))
    source = recipe.Source(str(tmp_path / "a.jsonl"), system=name if way == "system" else None)
    ((_, row),) = conversations(source, 1, {"NAME": name if way == "placeholder" else "Wheat"})
    if not isinstance(row, Rejected):
        with pytest.raises(Rejected) as caught:
            examples(row, "auto", load_chat("pocket"))
        row = caught.value
    assert row.reason in ("control_token", "think_in_answer")


def test_a_model_that_cannot_be_reached_is_an_error_that_says_so():
    with pytest.raises(ToolkitError, match="nobody/nothing: no such folder here, and the Hub did not give it"):
        load_chat("nobody/nothing")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    with pytest.raises(ToolkitError, match="tokenizer.json not found"):
        load_chat(str(tmp_path))


def test_truncation_and_padding_kept_in_tokenizer_json_cut_nothing(tmp_path):
    import tokenizers

    kept = tokenizers.Tokenizer.from_file(str(POCKET / "tokenizer.json"))
    kept.enable_truncation(4)
    kept.enable_padding(length=8)
    chat = folder_with(families.trl_template("qwen3"), tmp_path)
    kept.save(str(tmp_path / "tokenizer.json"))
    assert (
        load_chat(str(tmp_path)).encode(TEXTS)
        == load_chat(str(tmp_path)).tokenizers.reference_ids(TEXTS)
        == chat.encode(TEXTS)
    )


# --- tokenizers that put a space before every text


ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def sentencepiece(folder, template: str, scheme: str):
    """A byte-fallback BPE as Llama 2, TinyLlama, Mistral and Phi-3 have one, in both ways to write the space before a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "Prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *pieces], show_progress=False)
    tokenizer.train_from_iterator([f"question {i} answer {i} Hello there" for i in range(200)], trainer)
    file = json.loads(tokenizer.to_str()) | {"added_tokens": []}
    tokenizer = Tokenizer.from_str(json.dumps(file))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "chat_template.jinja").write_text(template)
    return tokenizer


@pytest.mark.parametrize("scheme", ["Prepend", "Metaspace"])
@pytest.mark.parametrize("template", [ZEPHYR, MISTRAL], ids=["zephyr", "mistral"])
def test_no_space_is_put_before_a_reply_that_continues_a_prompt(template, scheme, tmp_path):
    """A row is what the tokenizer makes of its text as a whole; its completion reads as the template writes it."""
    tokenizer = sentencepiece(tmp_path, template, scheme)
    rows = [{"query": f"question {i}", "response": f"Hello there {i}"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "rows.jsonl"), "fraction": 1.0}
    data = {"sources": [source], "unit": "examples", "validation_size": 0}
    mixed = mix.compile_mix(recipe.from_dict({"name": "sp", "data": data, "model": {"model_name": str(tmp_path)}}))
    chat = load_chat(str(tmp_path))
    assert len(mixed.train) == 30
    for row in mixed.train:
        number = row.number - 1
        asked = [{"role": "user", "content": f"question {number}"}]
        prompt = chat.render(asked)
        told = [*asked, {"role": "assistant", "content": f"Hello there {number}"}]
        text = chat.render(told, add_generation_prompt=False).rstrip("\n")
        assert text.startswith(prompt)
        taught = tokenizer.decode(row.ids.tolist()[row.prompt_length :], skip_special_tokens=False)
        assert taught == text.removeprefix(prompt)
        assert row.ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
        assert row.ids.tolist()[: row.prompt_length] == tokenizer.encode(prompt, add_special_tokens=False).ids


def test_tools_and_earlier_calls_that_the_template_leaves_out_are_noticed(tmp_path):
    """SmolLM2's and Llama 3's templates print neither."""
    chat = folder_with(CLOSED.replace("END", "<|im_end|>"), tmp_path)
    asked = {"role": "user", "content": "The weather?"}
    answer = {"role": "assistant", "content": "Sunny."}
    with pytest.raises(Rejected, match="tool_lost"):
        examples({"messages": [asked, answer], "tools": [TOOL]}, "auto", chat)
    call = {"type": "function", "function": {"name": "sky_now", "arguments": {}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(Rejected, match="call_lost"):
        examples({"messages": [asked, called, {"role": "tool", "content": "{}"}, answer]}, "auto", chat)


def test_only_the_last_turn_has_the_expected_answer(model):
    chat, _ = model
    turns = [("user", "Think of 15."), ("assistant", "Done."), ("user", "Double it."), ("assistant", "30")]
    messages = [{"role": role, "content": text} for role, text in turns]
    first, last = examples({"messages": messages, "expected_answer": "30"}, "auto", chat, "each")
    assert "expected_answer" not in first.conversation
    assert last.conversation["expected_answer"] == "30"
