"""What depends on the model family: modes, thinking tags and switches, sampling, control tokens, names.

family = family_of(config["model_type"]); family.gguf, family.sampling["thinking"], family.switches

What its GGUF file needs stands in export/gguf_types.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from toolkit.records import Json, Messages

# Names of the two modes in recipes and result files; an instruct model has `non_thinking` only.
MODES = ("thinking", "non_thinking")
# Kind of a model → the modes it has.
KINDS = {
    "hybrid": ("thinking", "non_thinking"),
    "thinking_only": ("thinking",),
    "instruct": ("non_thinking",),
    "base": (),
}
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
THINK_TAG = re.compile("</?think>")
# A question and a reply by which templates are tried out.
PROBE: Messages = [{"role": "user", "content": "probe"}]
PROBE_REPLY = "probe-reply"
ANSWERED_PROBE: Messages = [*PROBE, {"role": "assistant", "content": PROBE_REPLY}]
# Qwen3's soft switches in a user turn (model card of Qwen/Qwen3-8B, "Advanced Usage"); in rendered text a token may
# follow.
SWITCH = re.compile(r"(?:^|\s+)/(no_think|think)(?=\s|<|$)")
# How added tokens look that are structure, though a tokenizer does not call them special: <|fim_prefix|>, <｜User｜>.
STRUCTURE = re.compile(r"<[|｜].{1,40}[|｜]>")

# Qwen3's own values for each mode (model card of Qwen/Qwen3-8B, "Best Practices").
QWEN3_SAMPLING = {
    "thinking": {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0},
    "non_thinking": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0},
}
# Qwen3.5's own for general tasks, its presence_penalty left out (model card of Qwen/Qwen3.5-4B, in front of its API
# examples).
QWEN35_SAMPLING = QWEN3_SAMPLING | {"thinking": QWEN3_SAMPLING["thinking"] | {"temperature": 1.0}}
PLAIN_SAMPLING = {"non_thinking": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}}


@dataclass(frozen=True)
class Family:
    """Facts of one model family that no file of a checkpoint states."""

    title: str
    model_types: tuple[str, ...]
    """`model_type` values of config.json that belong to it."""
    gguf: str | None = None
    """Architecture name in GGUF headers (`gguf.MODEL_ARCH_NAMES`); None where conversion is not offered."""
    sampling: dict[str, dict[str, float]] = field(default_factory=lambda: PLAIN_SAMPLING)
    """Recommended sampling by mode; the checkpoint's generation_config.json goes first (see `sampling_of`)."""
    sampling_is_borrowed: bool = False
    """`sampling` holds another family's values, to generate with here; no exported file states them."""
    switches: bool = False
    """Obeys /think and /no_think in user turns."""
    recommended: tuple[str, ...] = ()
    """Hub names of 4-bit checkpoints, smallest first."""
    hub_names: str = "(?!)"
    """Pattern of its names on the Hub, for what is asked before config.json is here; by default of none."""
    in_4bit: bool = True
    """Trained in 4 bits unless a recipe says otherwise."""
    text_only: bool = False
    """Its checkpoints also see; of those the text model alone is loaded and trained, unless a recipe says otherwise."""
    more_targets: tuple[str, ...] = ()
    """Linear layers beside attention and MLP that a LoRA adapts unless a recipe says otherwise."""


FAMILIES = (
    Family(
        "Qwen3",
        ("qwen3",),
        "qwen3",
        QWEN3_SAMPLING,
        switches=True,
        recommended=tuple(f"unsloth/Qwen3-{s}-unsloth-bnb-4bit" for s in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")),
    ),
    Family(
        "Qwen3 MoE",
        ("qwen3_moe",),
        None,
        QWEN3_SAMPLING,
        switches=True,
    ),
    Family(
        # Qwen3.6 and 3.8 are of the same architecture. Without enable_thinking the templates of 2B and smaller do not think,
        # those of 4B and larger do (TRL 1.15, chat_templates/README.md); the toolkit always says which mode it asks for.
        "Qwen3.5",
        ("qwen3_5", "qwen3_5_text"),
        None,
        QWEN35_SAMPLING,
        hub_names=r"Qwen3\.[568]-[\d.]+B(?!-A\d)",  # no mixture of experts
        # "It is not recommended to do QLoRA (4-bit) training on the Qwen3.5 models, no matter MoE or dense, due to higher
        # than normal quantization differences" (unsloth.ai/docs/models/qwen3.5/fine-tune)
        in_4bit=False,
        text_only=True,
        # of the gated delta net, which stands for attention in three layers of four; a and b are a number per head
        more_targets=("in_proj_qkv", "in_proj_z", "out_proj"),
    ),
    Family("Qwen2.5", ("qwen2",), "qwen2"),
    Family(
        "Llama",
        ("llama",),
        "llama",
        sampling_is_borrowed=True,
    ),
    Family(
        "Gemma 3",
        ("gemma3_text", "gemma3"),
        "gemma3",
        sampling_is_borrowed=True,
    ),
)
UNKNOWN = Family("unknown", ())


def family_of(model_type: str) -> Family:
    """The family of config.json's `model_type`; UNKNOWN, with neutral values, for any other."""
    return next((f for f in FAMILIES if model_type in f.model_types), UNKNOWN)


def family_named(name: str, model_type: str | None) -> Family:
    """The family of a model by config.json's `model_type`, or where that is not at hand (None) by its name on the Hub."""
    if model_type is not None:
        return family_of(model_type)
    return next((f for f in FAMILIES if re.search(f.hub_names, name, re.IGNORECASE)), UNKNOWN)


def kind_of(render: Callable[..., str]) -> str:
    """hybrid, thinking_only or instruct, found by rendering: `render(messages, enable_thinking=…)` → prompt text."""
    # by behaviour, since names say little: Qwen3-4B-Instruct-2507 has no thinking mode, Qwen3-4B has
    thinking = render(PROBE, enable_thinking=True)
    if thinking != render(PROBE, enable_thinking=False):
        return "hybrid"
    return "thinking_only" if thinking.rstrip().endswith(THINK_OPEN) else "instruct"


def end_of_turn(render: Callable[..., str], added: dict[str, bool]) -> str | None:
    """The token that ends a turn: the first that the chat template writes after a reply (Llama 3: <|eot_id|>); None where
    it writes none.

    `render(messages, add_generation_prompt=False)` → text; `added` is {added token: whether the tokenizer calls it special}.
    """
    after = render(ANSWERED_PROBE, add_generation_prompt=False).rpartition(PROBE_REPLY)[2]
    written = [token for token in added if token in after]
    # Gemma has line breaks among its added tokens, which are not special
    candidates = [token for token in written if added[token]] or written
    return min(candidates, key=lambda token: (after.index(token), -len(token)), default=None)


def sampling_of(family: Family, mode: str, generation_config: dict[str, Json]) -> dict[str, float]:
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


def stated_sampling(family: Family, mode: str, generation_config: dict[str, Any]) -> dict[str, float]:
    """`sampling_of` without what neither the checkpoint nor its own family states."""
    values = sampling_of(family, mode, generation_config)
    if not family.sampling_is_borrowed:
        return values
    return {key: value for key, value in values.items() if generation_config.get(key) is not None}


def without_switch(text: str) -> str:
    """A text without the soft switches typed in it."""
    # hardly any text has one, and the plain search takes a hundredth of the time
    return SWITCH.sub("", text) if "/think" in text or "/no_think" in text else text


def mode_title(mode: str) -> str:
    """The words for a mode: thinking, non-thinking."""
    return mode.replace("_", "-")
