"""A run, its merged folder and its GGUF files, asked for the same tokens, prompts and probabilities: do they agree?

merged = open_merged(run, "16bit"); tuned, base = log_probs([(merged, "adapter"), (merged, "base")], sequences)
"""

import contextlib
import functools
import itertools
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.evaluation.generate import closing_token, modes_of
from toolkit.export.checkpoint import EMBEDDING, HEAD, Checkpoint, Factors, empty_model
from toolkit.export.llama import Engine
from toolkit.export.merge import Merged
from toolkit.export.tokenizer import load_tokenizer
from toolkit.files import PACKAGE, ToolkitError
from toolkit.records import JsonObject
from toolkit.training.log import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TOP = 512
"""Tokens whose probabilities a served file is asked for."""
NEAR_TIE = 1e-2
"""Two tokens this close in log-probability (1% of each other) are both the top one: rounding alone swaps them."""
PER_TEXT = 40
"""Positions compared in each text, counted from its end."""
Conversation = JsonObject
"""A case of parity_cases.json: its messages, the tools it offers, its messages as a server takes them."""
Sequences = list[list[int]]
Question = tuple[Checkpoint, str]
"""A model, and which of its weights: "merged" are those stored in its folder, "base" those without the adapter, "adapter" base
and adapter side by side as trained."""

CASES = json.loads(Path(__file__).with_name("parity_cases.json").read_text(encoding="utf-8"))
"""Texts and conversations that are compared (the file says what each is for)."""
QUESTION = CASES["conversations"][0]
FOLLOW_UP = CASES["conversations"][2]


# --- probabilities by transformers -----------------------------------------------------------------------------------


class _Weights:
    """Weights by name, read or computed when a module is about to run: what accelerate loads offloaded modules from."""

    def __init__(self, model: Merged):
        self.model = model

    def __getitem__(self, name: str) -> "torch.Tensor":
        return self.model.base_tensor(EMBEDDING if name == HEAD and self.model.tied else name)


def log_probs(questions: Sequence[Question], sequences: Sequences) -> list[np.ndarray]:
    """fp32 log-probabilities after every token of every sequence, by transformers: (positions, vocabulary) for each question.

    Folders are loaded by transformers itself. Each module's weights are read when it runs and dropped after it, so that memory
    is the largest weight in fp32 and a 14B fits a laptop. Unsloth replaces parts of transformers, so where it is imported
    this runs in a process of its own. Raises ToolkitError where transformers cannot load a folder."""
    if "unsloth" in sys.modules:
        return _in_own_process(questions, sequences)
    load = functools.cache(_network)  # a model that is asked with and without its adapter is loaded once
    answers = []
    for model, which in questions:
        beside = model.adapter.factors if isinstance(model, Merged) and which == "adapter" else {}
        answers.append(_log_probs(load(model), beside, sequences))
    return answers


def _network(model: Checkpoint) -> "PreTrainedModel":
    """A folder as transformers loads it; weights that have been through NF4 lie in no folder."""
    import torch
    from accelerate.hooks import attach_align_device_hook

    if not isinstance(model, Merged) or not model.base.four_bit:
        return load_from_disk(model.folder)
    network = empty_model(model.config)
    attach_align_device_hook(network, torch.device("cpu"), offload=True, weights_map=_Weights(model))
    return network


def _log_probs(network: "PreTrainedModel", beside: dict[str, Factors], sequences: Sequences) -> np.ndarray:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    # One batch, so that every weight is loaded once; padding to the right is not seen by what stands before it
    batch = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    # quiet: transformers warns of kernels that are not installed
    with contextlib.ExitStack() as hooks, quiet(), torch.inference_mode():
        for name, factors in beside.items():
            layer = network.get_submodule(name.removesuffix(".weight"))
            hooks.enter_context(layer.register_forward_hook(_beside(factors)))
        logits = network(batch, use_cache=False).logits
        rows = [row[: len(ids)].float().log_softmax(-1) for row, ids in zip(logits, sequences, strict=True)]
    return torch.cat(rows).numpy()


def load_from_disk(folder: Path) -> "PreTrainedModel":
    """A folder as `from_pretrained` loads it, in fp32, its weights left on the disk until a module runs.

    Raises ToolkitError where transformers refuses it."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with quiet():  # it draws a bar for each load, and warns that weights are left on the disk
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, device_map={"": "disk"}, local_files_only=True
            ).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:  # transformers has no kind of its own
        raise ToolkitError(
            f"{folder}: transformers cannot load it ({type(error).__name__}: {str(error)[:200]})"
        ) from error


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


class Tokens:
    """The tokenizer and the template in a folder; the run's own is what every exported file is compared with."""

    def __init__(self, folder: Path):
        self.tokenizer = load_tokenizer(folder)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without what the tokenizer puts before every text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def start(self) -> str:
        """What the tokenizer puts before every text, mostly nothing; llama.cpp leaves it out of what it renders."""
        first = self.tokenizer.encode("a")[:1]
        return "" if first == self.encode("a")[:1] else self.tokenizer.decode(first)

    def render(self, case: Conversation, thinking: bool) -> str:
        """The prompt; empty where the template refuses the conversation."""
        from jinja2 import TemplateError

        with contextlib.suppress(TemplateError):
            return self.tokenizer.apply_chat_template(
                case["messages"],
                tools=case.get("tools"),
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=thinking,
            )
        return ""

    def facts(self) -> JsonObject:
        """All that decides how texts become tokens, as transformers has loaded it."""
        return {
            "vocabulary and rules": self.tokenizer.backend_tokenizer.to_str(),
            "special tokens": self.tokenizer.special_tokens_map,
            "chat template": self.tokenizer.chat_template,
        }


def served_differences(engine: Engine, own: Tokens) -> tuple[int, int]:
    """How many texts a served file tokenizes and how many conversations it renders otherwise than the run: awkward texts, and
    every kind of conversation in each mode, with the renderings tokenized too."""

    def encode(text: str, special: bool = False) -> list[int]:
        return engine.call("/tokenize", {"content": text, "add_special": special})["tokens"]

    # the texts are such that a wrong pre-tokenizer, normalizer or list of added tokens changes one of them
    texts = sum(encode(text) != own.encode(text) for text in CASES["texts"])
    renderings = 0
    start = own.start()
    for mode, case in itertools.product(modes_of(own.tokenizer), CASES["conversations"]):
        thinking = mode == "thinking"
        rendered = own.render(case, thinking)
        if not rendered or ("tools" in case and rendered == own.render(case | {"tools": None}, thinking)):
            continue  # some templates refuse a role, and some leave tools out
        body = {
            "messages": case.get("served_messages", case["messages"]),
            "tools": case.get("tools", []),
            "chat_template_kwargs": {"enable_thinking": thinking},
        }
        prompt = engine.call("/apply-template", body)["prompt"]
        bare = rendered.removeprefix(start)
        renderings += prompt.removeprefix(start) != bare
        # the server itself puts the start before a prompt
        texts += encode(bare, special=True) != own.encode(start + bare)
    return texts, renderings


# --- probabilities of a served file ----------------------------------------------------------------------------------


def probe_sequences(own: Tokens) -> Sequences:
    """A few hundred positions of conversation, in the modes the model has and with both kinds of reply."""
    modes = modes_of(own.tokenizer)
    end = own.tokenizer.decode([closing_token(own.tokenizer)])
    thinking = "thinking" in modes
    thought = CASES["replies"]["thinking"]
    reply = CASES["replies"]["direct"]
    # prompts as inference shows them with the replies of both modes, and a reply that follows another without a header
    texts = [
        own.render(QUESTION, thinking) + thought,
        own.render(QUESTION, modes == ("thinking",)) + reply,
        own.render(FOLLOW_UP, thinking) + thought,
        reply + end + thought,
    ]
    return [own.encode(text + end)[-PER_TEXT:] for text in texts]


def file_divergence(
    engine: Engine, reference: np.ndarray, sequences: Sequences, plain: int, **request: Any
) -> dict[str, float]:
    """How far a served file is from `reference` (by the names in certificate.LIMITS), over its top 512 tokens and one bucket
    for the rest; `request` goes into each request.

    A request per position, for all texts at once, which a server with as many slots computes together. The sampled token is
    forced to `plain`: the probabilities are those before sampling, and the server withholds them when the token it draws is
    an incomplete UTF-8 sequence."""
    # not the whole vocabulary, which would be hundreds of megabytes of JSON for a text
    fields = ["index", "completion_probabilities"]
    body = {"n_predict": 1, "n_probs": TOP, "logit_bias": [[plain, 1000.0]], "response_fields": fields, **request}
    expected = np.split(reference, np.cumsum([len(ids) for ids in sequences])[:-1])
    values = []
    others = 0
    for position in range(max(map(len, sequences))):
        there = [number for number, ids in enumerate(sequences) if position < len(ids)]
        prompts = [sequences[number][: position + 1] for number in there]
        replies = engine.call("/completion", body | {"prompt": prompts})
        # a list of one prompt is answered with an object
        for reply in replies if len(prompts) > 1 else [replies]:
            row = expected[there[reply["index"]]][position].astype(np.float64)
            top = reply["completion_probabilities"][0]["top_logprobs"]
            kept = row[[token["id"] for token in top]]
            values.append(_bucketed(kept, np.array([token["logprob"] for token in top])))
            others += bool(kept[0] <= row.max() - NEAR_TIE)
    return {
        "mean KL": float(np.mean(values)),
        "largest KL": float(np.max(values)),
        "share with another top token": others / len(values),
    }


def _bucketed(ours: np.ndarray, theirs: np.ndarray) -> float:
    """KL over the given tokens and one bucket for all others."""
    # what lies outside the 512, at least a billionth: the logarithm of 0 is no number
    rest = max(1 - np.exp(ours).sum(), 1e-9)
    other = max(1 - np.exp(theirs).sum(), 1e-9)
    return float(np.sum(np.exp(ours) * (ours - theirs)) + rest * np.log(rest / other))
