"""Everything that depends on the model family: modes, thinking tags and switches, sampling, control tokens, names.

family = family_of(config["model_type"]); family.gguf, family.sampling["thinking"], family.switches
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

MODES = ("thinking", "non_thinking")
"""Names of the two modes in recipes and result files; an instruct model has `non_thinking` only."""
KINDS = {
    "hybrid": ("thinking", "non_thinking"),
    "thinking_only": ("thinking",),
    "instruct": ("non_thinking",),
    "base": (),
}
"""Kind of a model → the modes it has."""
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
THINK_TAG = re.compile("</?think>")
SWITCH = re.compile(r"(?<!\S)/(no_think|think)(?!\S)")
"""Qwen3's soft switches in a user turn (model card of Qwen/Qwen3-8B, "Advanced Usage")."""
ANGLE_TOKEN = re.compile(
    r"<(?:[|｜][\w▁]{1,40}[|｜]|/?tool_(?:call|response)|/?(?:start|end)_of_(?:turn|image)|/?s|bos|eos|pad|unk)>"
)
SQUARE_TOKEN = re.compile(r"\[/?INST\]")
CONTROL_TOKEN = re.compile(f"{ANGLE_TOKEN.pattern}|{SQUARE_TOKEN.pattern}")
"""What tokenizers read as structure wherever it stands: Qwen, Llama, Phi, gpt-oss, DeepSeek; Gemma; Mistral.

`render` also rejects every text that holds one of the loaded tokenizer's own special tokens. One after the other, the
two parts, which have one first character each, are searched for 30 times as fast: 15 µs in 20,000 characters."""

QWEN3_SAMPLING = {
    "thinking": {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0},
    "non_thinking": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0},
}
"""Qwen3's own values for each mode (model card of Qwen/Qwen3-8B, "Best Practices")."""
PLAIN_SAMPLING = {"non_thinking": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}}


@dataclass(frozen=True)
class Family:
    """Facts of one model family that no file of a checkpoint states."""

    title: str
    model_types: tuple[str, ...]
    """`model_type` values of config.json that belong to it."""
    gguf: str | None = None
    """Architecture name in GGUF headers (`gguf.MODEL_ARCH_NAMES`); None where conversion is not offered."""
    sampling: dict = field(default_factory=lambda: PLAIN_SAMPLING)
    """Recommended sampling by mode; the checkpoint's generation_config.json goes first (see `sampling_of`)."""
    switches: bool = False
    """Obeys /think and /no_think in user turns."""
    licence: str = "its own licence applies"
    recommended: tuple[str, ...] = ()
    """Hub names of 4-bit checkpoints, smallest first."""


FAMILIES = (
    Family(
        "Qwen3",
        ("qwen3",),
        "qwen3",
        QWEN3_SAMPLING,
        switches=True,
        licence="by the Qwen team, Apache-2.0",
        recommended=tuple(f"unsloth/Qwen3-{s}-unsloth-bnb-4bit" for s in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")),
    ),
    Family(
        "Qwen3 MoE",
        ("qwen3_moe",),
        None,
        QWEN3_SAMPLING,
        switches=True,
        licence="by the Qwen team, Apache-2.0",
    ),
    Family("Qwen2.5", ("qwen2",), "qwen2", licence="by the Qwen team, see its model card"),
    Family(
        "Llama",
        ("llama",),
        "llama",
        licence="see its model card (Llama licence, or SmolLM2's Apache-2.0)",
    ),
    Family("Gemma 3", ("gemma3_text", "gemma3"), "gemma3", licence="Gemma terms of use"),
)
UNKNOWN = Family("unknown", ())


def family_of(model_type: str) -> Family:
    """The family of config.json's `model_type`; UNKNOWN, with neutral values, for any other."""
    return next((f for f in FAMILIES if model_type in f.model_types), UNKNOWN)


def kind_of(render: Callable[..., str]) -> str:
    """hybrid, thinking_only or instruct, found by rendering: `render(messages, enable_thinking=…)` → prompt text."""
    probe = [{"role": "user", "content": "probe"}]
    # by behaviour, since names say little: Qwen3-4B-Instruct-2507 has no thinking mode, Qwen3-4B has
    on, off = (render(probe, enable_thinking=value) for value in (True, False))
    if on != off:
        return "hybrid"
    return "thinking_only" if on.rstrip().endswith(THINK_OPEN) else "instruct"


def sampling_of(family: Family, mode: str, generation_config: dict) -> dict:
    """{"temperature", "top_p", "top_k", "min_p"} for a mode.

    A hybrid family's own table goes first, since generation_config.json holds one set for both modes; otherwise the
    checkpoint's file, and what it leaves open from the family.
    """
    # a mode that a family does not have gets the values of plain chat
    usual = family.sampling.get(mode) or family.sampling["non_thinking"]
    if len(family.sampling) > 1:
        return dict(usual)
    return {
        key: value if generation_config.get(key) is None else generation_config[key] for key, value in usual.items()
    }


def mode_title(mode: str) -> str:
    """The words for a mode: thinking, non-thinking."""
    return mode.replace("_", "-")
