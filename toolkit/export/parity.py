"""A run, its merged folder and its GGUF files, asked for the same tokens, prompts and probabilities: do they agree?

merged = open_merged(run, "16bit"); tuned, base = log_probs([(merged, "adapter"), (merged, "base")], sequences)
"""

import contextlib
import copy
import itertools
import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from toolkit.evaluation.generate import closing_token, modes_of
from toolkit.export.checkpoint import EMBEDDING, HEAD, Checkpoint, Factors, full_config
from toolkit.export.llama import Engine
from toolkit.export.merge import Merged
from toolkit.export.tokenizer import load_tokenizer
from toolkit.files import PACKAGE, ToolkitError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TOP = 512
"""Tokens whose probabilities a served file is asked for."""
NEAR_TIE = 1e-2
"""Two tokens this close in log-probability (1% of each other) are both the top one: rounding alone swaps them."""
PER_TEXT = 50
"""Positions compared in each text, counted from its end."""
Message = dict[str, Any]
Tool = dict[str, Any]
Sequences = list[list[int]]
Question = tuple[Checkpoint, str]
"""A model, and which of its weights: "merged" are those stored in its folder, "base" those without the adapter, "adapter" base
and adapter side by side as trained."""

CASES = json.loads(Path(__file__).with_name("parity_cases.json").read_text(encoding="utf-8"))
"""Texts and conversations that are compared (the file says what each is for)."""


# --- probabilities by transformers -----------------------------------------------------------------------------------


class _Weights:
    """Weights by name, read or computed when a module is about to run: what accelerate loads offloaded modules from."""

    def __init__(self, model: Checkpoint):
        self.tied = model.tied
        self.read = model.base_tensor if isinstance(model, Merged) else model.tensor

    def __getitem__(self, name: str) -> "torch.Tensor":
        return self.read(EMBEDDING if name == HEAD and self.tied else name)


def log_probs(questions: Sequence[Question], sequences: Sequences) -> list[np.ndarray]:
    """fp32 log-probabilities after every token of every sequence, by transformers: (positions, vocabulary) for each question.

    Folders are loaded by transformers itself. Each module's weights are read when it runs and dropped after it, so that memory
    is the largest weight in fp32 and a 14B fits a laptop. Unsloth replaces parts of transformers, so where it is imported
    this runs in a process of its own. Raises ToolkitError where transformers cannot load a folder."""
    if "unsloth" in sys.modules:
        return _in_own_process(questions, sequences)
    return [_log_probs(model, which, sequences) for model, which in questions]


def _log_probs(model: Checkpoint, which: str, sequences: Sequences) -> np.ndarray:
    import torch

    in_4_bit = isinstance(model, Merged) and model.base.four_bit
    network = _network(model) if in_4_bit or not model.is_plain() else load_from_disk(model.folder)
    factors = model.adapter.factors if isinstance(model, Merged) and which == "adapter" else {}
    for name, module in network.named_modules():
        if added := factors.get(f"{name}.weight"):
            module.register_forward_hook(_beside(added))
    # One batch, so that every weight is loaded once; padding to the right is not seen by what stands before it
    longest = max(map(len, sequences))
    batch = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences])
    with torch.inference_mode():
        logits = network(batch, use_cache=False).logits
        rows = [row[: len(ids)].float().log_softmax(-1) for row, ids in zip(logits, sequences, strict=True)]
        return torch.cat(rows).numpy()


def load_from_disk(folder: Path) -> "PreTrainedModel":
    """A folder as `from_pretrained` loads it, in fp32, its weights left on the disk until a module runs.

    Raises ToolkitError where transformers refuses it, lacks a weight or finds one that it does not know."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, device_map={"": "disk"}, output_loading_info=True, local_files_only=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:  # transformers has no kind of its own
        raise ToolkitError(
            f"{folder}: transformers cannot load it ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    for kind in ("missing", "mismatched"):
        if names := sorted(map(str, report[f"{kind}_keys"])):
            raise ToolkitError(f"{folder}: {len(names)} weights are {kind} for transformers, e.g. {names[0]}")
    return model.eval()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its bar for each load, and without the warnings that weights are left on the disk."""
    from transformers.utils import logging as verbosity

    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate.big_modeling")]
    levels = [logger.level for logger in loggers]
    bars = verbosity.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    verbosity.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            verbosity.enable_progress_bar()


def _network(model: Checkpoint) -> "PreTrainedModel":
    """A model whose weights have been through NF4, which no folder holds, or are laid out so that accelerate misses some."""
    import torch
    from accelerate import init_empty_weights
    from accelerate.hooks import attach_align_device_hook
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(full_config(model.config), dtype=torch.float32).eval()
    attach_align_device_hook(empty, torch.device("cpu"), offload=True, weights_map=_Weights(model))
    return empty


def _beside(factors: Factors) -> Callable:
    """A forward hook that adds what the adapter computes beside a layer."""
    a, b, scaling = factors
    return lambda _, inputs, output: output + (inputs[0] @ a.T) @ b.T * scaling


def _in_own_process(questions: Sequence[Question], sequences: Sequences) -> list[np.ndarray]:
    code = (
        f"import pickle, sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); out, sys.stdout = sys.stdout, sys.stderr; "
        "from toolkit.export.parity import log_probs; pickle.dump(log_probs(*pickle.load(sys.stdin.buffer)), out.buffer)"
    )
    question = pickle.dumps((questions, sequences))
    # in this folder, which relative paths are relative to
    done = subprocess.run([sys.executable, "-c", code], input=question, capture_output=True, check=False)
    if done.returncode:
        raise ToolkitError(f"the reference forward pass failed: {done.stderr.decode(errors='replace')[-400:]}")
    return pickle.loads(done.stdout)


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference ‖ other) at each position, in nats, over the whole vocabulary."""
    return np.sum(np.exp(reference, dtype=np.float64) * (reference.astype(np.float64) - other), axis=1)


# --- tokens and templates --------------------------------------------------------------------------------------------


class Conversation(NamedTuple):
    """A case of parity_cases.json."""

    messages: list[Message]
    tools: list[Tool] | None


CONVERSATIONS = [Conversation(case["messages"], case.get("tools")) for case in CASES["conversations"]]
QUESTION = CONVERSATIONS[0].messages
FOLLOW_UP = CONVERSATIONS[2].messages


class Tokens:
    """The tokenizer and the template in a folder; the run's own is what every exported file is compared with."""

    def __init__(self, folder: Path):
        self.tokenizer = load_tokenizer(folder)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text; `special` with what the tokenizer puts around every text."""
        return self.tokenizer.encode(text, add_special_tokens=special)

    def render(self, messages: list[Message], tools: list[Tool] | None, thinking: bool) -> str:
        """The prompt; empty where the template refuses the conversation."""
        from jinja2 import TemplateError

        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
        with contextlib.suppress(TemplateError):
            return self.tokenizer.apply_chat_template(messages, tools=tools, **options)
        return ""

    def encode_prompt(self, text: str, start: str) -> list[int]:
        """Ids of a rendered prompt that is given without `start`, which the tokenizer puts before every text."""
        return self.encode(start + text)

    def special(self) -> dict[str, Any]:
        """What a program that loads the tokenizer is told about its tokens."""
        tokenizer = self.tokenizer
        added = {i: (token.content, token.special) for i, token in tokenizer.added_tokens_decoder.items()}
        return {
            "special tokens": tokenizer.special_tokens_map,
            "ids": {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")},
            "added tokens": added,
            "size": len(tokenizer),
            "chat template": tokenizer.chat_template,
        }


class ServedTokens:
    """The same two questions to a served GGUF."""

    def __init__(self, engine: Engine):
        self.call = engine.call

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text."""
        return self.call("/tokenize", {"content": text, "add_special": special})["tokens"]

    def encode_prompt(self, text: str, _start: str) -> list[int]:
        """Ids as a completion has them: the server itself puts the start before the text."""
        return self.encode(text, special=True)

    def render(self, messages: list[Message], tools: list[Tool] | None, thinking: bool) -> str:
        """The prompt."""
        body = {"messages": _as_openai(messages), "chat_template_kwargs": {"enable_thinking": thinking}}
        return self.call("/apply-template", body | ({"tools": tools} if tools else {}))["prompt"]


def _as_openai(messages: list[Message]) -> list[Message]:
    """Tool calls as the API takes them, which gives them to the template as `Tokens.render` does: with an id, arguments as text."""
    served = copy.deepcopy(messages)
    for message in served:
        for number, call in enumerate(message.get("tool_calls", [])):
            call["id"] = str(number)
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return served


class TokenDifferences(NamedTuple):
    """How often a file's tokenizer and template differ from the run's."""

    texts: int
    renderings: int


def prefix_of(own: Tokens) -> str:
    """What the tokenizer puts before every text, mostly nothing; llama.cpp leaves it out of what it renders."""
    first = own.encode("a", special=True)[:1]
    return "" if first == own.encode("a")[:1] else own.tokenizer.decode(first)


def tokenizer_differences(theirs: Tokens | ServedTokens, own: Tokens) -> TokenDifferences:
    """Awkward texts, and every kind of conversation in each mode, with the renderings tokenized too."""
    texts = sum(theirs.encode(text) != own.encode(text) for text in CASES["texts"])
    renderings = 0
    start = prefix_of(own)
    for mode, (messages, tools) in itertools.product(modes_of(own.tokenizer), CONVERSATIONS):
        thinking = mode == "thinking"
        rendered = own.render(messages, tools, thinking)
        if not rendered or (tools and rendered == own.render(messages, None, thinking)):
            continue  # some templates refuse a role, and some leave tools out
        bare = rendered.removeprefix(start)
        renderings += theirs.render(messages, tools, thinking).removeprefix(start) != bare
        texts += theirs.encode_prompt(bare, start) != own.encode_prompt(bare, start)
    return TokenDifferences(texts, renderings)


# --- probabilities of a served file ----------------------------------------------------------------------------------


def probe_sequences(own: Tokens) -> Sequences:
    """A few hundred positions of conversation, in the modes the model has and with both kinds of reply."""
    modes = modes_of(own.tokenizer)
    end = own.tokenizer.decode([closing_token(own.tokenizer)])
    thinking = modes[0] == "thinking"
    direct = modes[-1] != "thinking"
    thought = CASES["replies"]["thinking"]
    reply = CASES["replies"]["direct"]
    # prompts as inference shows them with the replies of both modes, and a reply that follows another without a header
    texts = [
        own.render(QUESTION, None, thinking) + thought,
        own.render(QUESTION, None, not direct) + reply,
        own.render(FOLLOW_UP, None, thinking) + thought,
        reply + end + thought,
    ]
    return [own.encode(text + end)[-PER_TEXT:] for text in texts]


@dataclass(frozen=True)
class FileDivergence:
    """A served file beside the reference, over its top 512 tokens and one bucket for the rest."""

    mean: float
    """KL in nats."""
    max: float
    """The largest KL of a position."""
    other: float
    """The share of positions with another top token."""


def file_divergence(
    engine: Engine, reference: np.ndarray, sequences: Sequences, plain: int, **request: Any
) -> FileDivergence:
    """How far a served file is from `reference`; `request` goes into each request.

    One prompt per position, a request per text. The sampled token is forced to `plain`: the probabilities are
    those before sampling, and the server withholds them when the token it draws is an incomplete UTF-8 sequence."""
    options = {"n_predict": 1, "n_probs": TOP, "logit_bias": [[plain, 1000.0]]}
    options |= {"response_fields": ["index", "completion_probabilities"]} | request
    tops: list[list[dict[str, Any]]] = []
    for ids in sequences:
        prompts = [ids[:end] for end in range(1, len(ids) + 1)]
        replies = engine.call("/completion", options | {"prompt": prompts})
        replies.sort(key=lambda reply: reply["index"])
        tops += [reply["completion_probabilities"][0]["top_logprobs"] for reply in replies]
    values = []
    other = 0
    for top, row in zip(tops, reference.astype(np.float64), strict=True):
        kept = [token["id"] for token in top]
        values.append(_bucketed(row[kept], np.array([token["logprob"] for token in top], np.float64)))
        other += bool(row[kept[0]] <= row.max() - NEAR_TIE)
    return FileDivergence(float(np.mean(values)), float(np.max(values)), other / len(values))


def _bucketed(ours: np.ndarray, theirs: np.ndarray) -> float:
    """KL over the given tokens and one bucket for all others."""
    # what lies outside the 512, at least a billionth: the logarithm of 0 is no number
    rest = max(1 - np.exp(ours).sum(), 1e-9)
    other = max(1 - np.exp(theirs).sum(), 1e-9)
    return float(np.sum(np.exp(ours) * (ours - theirs)) + rest * np.log(rest / other))
