"""A run, its merged folder and its GGUF files, asked for the same tokens, prompts and probabilities: do they agree?

merged = open_merged(run, "16bit"); divergence(log_probs(merged, "adapter", texts), log_probs(merged, "merged", texts))
"""

import contextlib
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from toolkit.evaluation.generate import closing_token, modes_of
from toolkit.export.llama import Engine
from toolkit.export.merge import EMBEDDING, HEAD, Checkpoint, Merged, load_tokenizer
from toolkit.files import ROOT, ToolkitError

TOP = 512
NEAR_TIE = 1e-2
"""Two tokens this close in log-probability (1% of each other) are both the top one: rounding alone swaps them."""

PER_TEXT = 50
USER = {"role": "user", "content": "What is 17 + 25?"}
ASK = {"role": "user", "content": "Weather in Zürich?"}
THOUGHT = {"role": "assistant", "reasoning_content": "17 + 25 is 17 + 20 + 5.", "content": "It is 42."}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": CITY}}]
CALL, SERVED_CALL = (
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", **named}]}
    for named in (
        {"function": {"name": "weather", "arguments": {"city": "Zürich"}}},
        {"id": "0", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}},
    )
)
"""A call as the template takes it, and as the API does, which gives it to the template as the first."""
AGAIN = [USER, THOUGHT, {"role": "user", "content": "And doubled?"}]
CONVERSATIONS: tuple[tuple[list[dict], list | None], ...] = (
    ([USER], None),
    ([{"role": "system", "content": "Answer briefly."}, USER], None),
    (AGAIN, None),
    ([ASK], TOOLS),
    ([ASK, CALL, {"role": "tool", "content": '{"sky": "clear"}'}], TOOLS),
)
TEXTS = (
    "Hello, world!  Two  spaces\n\n\tand a tab.",
    "def f(x):\n    return x**2  # 12345.678",
    " ",
    "\r\n\r\n  x",
    "Größe, naïve, Ελληνικά, русский",
    "中文字符测试没问题。",
    "👩‍👩‍👧 🇨🇭 ﬁ ½",
    "I'll don't WE'RE 007",
    "<think>\nyes\n</think>\n\nno<|im_end|>\n",
    "<|im_start|>user\n/no_think<|im_end|>",
)
"""No decomposed accents (e + U+0301): Qwen's tokenizer composes them (NFC), llama.cpp does not, in any GGUF of Qwen."""
REPLIES = (
    "<think>\nOkay, the user asks for a sum. 17 + 25 = 42.\n</think>\n\nIt is **42**.",
    "Water boils at 100 °C at sea level, because its vapour pressure then equals that of the air.",
)


class _Weights:
    """Weights by name, read or computed when a module is about to run: what accelerate loads offloaded modules from."""

    def __init__(self, model: Checkpoint | Merged, which: str):
        self.tied, self.read = model.tied, model.tensor if which == "merged" else model.base_tensor

    def __getitem__(self, name: str):
        return self.read(EMBEDDING if name == HEAD and self.tied else name)


def log_probs(model: Checkpoint | Merged, which: str, sequences: list[list[int]]) -> np.ndarray:
    """fp32 log-probabilities after every token of every sequence: (positions, vocabulary), by transformers.

    `which`: "merged" are the stored or merged weights, "base" those without the adapter, "adapter" base and adapter side
    by side as trained. Each module's weights are loaded when it runs and dropped after it, so that memory is the
    largest weight in fp32 and a 14B fits a laptop. Unsloth replaces parts of transformers, so where it is imported
    this runs in a process of its own."""
    if "unsloth" in sys.modules:
        return _in_own_process(model, which, sequences)
    import torch
    from accelerate import init_empty_weights
    from accelerate.hooks import attach_align_device_hook
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config), dtype=torch.float32).eval()
    weights = _Weights(model, which)
    attach_align_device_hook(empty, execution_device=torch.device("cpu"), offload=True, weights_map=weights)
    for name, module in empty.named_modules() if which == "adapter" else ():
        if factors := model.adapter.factors.get(f"{name}.weight"):
            module.register_forward_hook(_beside(*factors, model.adapter.scaling))
    # One batch, so that every weight is loaded once; padding to the right is not seen by what stands before it.
    longest = max(map(len, sequences))
    batch = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences])
    with torch.inference_mode():
        logits = empty(batch, use_cache=False).logits
        rows = [row[: len(ids)].log_softmax(-1) for row, ids in zip(logits, sequences, strict=True)]
        return torch.cat(rows).numpy()


def _beside(a, b, scaling: float) -> Callable:
    return lambda _, inputs, output: output + (inputs[0] @ a.T) @ b.T * scaling


def _in_own_process(model: Checkpoint | Merged, which: str, sequences: list[list[int]]) -> np.ndarray:
    code = (
        "import pickle, sys; out, sys.stdout = sys.stdout, sys.stderr; from toolkit.export.parity import log_probs; "
        "pickle.dump(log_probs(*pickle.load(sys.stdin.buffer)), out.buffer)"
    )
    given = pickle.dumps((model, which, sequences))
    # the paths in `model` are from this folder: the process starts in it too
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": search}
    done = subprocess.run([sys.executable, "-c", code], input=given, env=environment, capture_output=True, check=False)
    if done.returncode:
        raise ToolkitError(f"the reference forward pass failed: {done.stderr.decode(errors='replace')[-400:]}")
    return pickle.loads(done.stdout)


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference ‖ other) at each position, in nats, over the whole vocabulary."""
    return np.sum(np.exp(reference, dtype=np.float64) * (reference.astype(np.float64) - other), axis=1)


class Tokens:
    """The tokenizer and the template in a folder; the run's own is what every exported file is compared with."""

    def __init__(self, folder: Path):
        self.tokenizer = load_tokenizer(folder)

    def encode(self, text: str, special: bool = False) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=special)

    def render(self, messages: list, tools: list | None, thinking: bool) -> str:
        """The prompt; empty where the template refuses the conversation."""
        from jinja2 import TemplateError

        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
        with contextlib.suppress(TemplateError):
            return self.tokenizer.apply_chat_template(messages, tools=tools, **options)
        return ""


class ServedTokens:
    """The same two questions to a served GGUF."""

    def __init__(self, engine: Engine):
        self.call = engine.call

    def encode(self, text: str, special: bool = False) -> list[int]:
        return self.call("/tokenize", {"content": text, "add_special": special})["tokens"]

    def render(self, messages: list, tools: list | None, thinking: bool) -> str:
        messages = [SERVED_CALL if message is CALL else message for message in messages]
        body = {"messages": messages, "chat_template_kwargs": {"enable_thinking": thinking}}
        return self.call("/apply-template", body | ({"tools": tools} if tools else {}))["prompt"]


def tokenizer_differences(theirs: Tokens | ServedTokens, own: Tokens) -> tuple[int, int]:
    """(texts, renderings) that differ from the run's own: awkward texts, and every kind of conversation in each mode,
    with the renderings tokenized too."""
    texts, templates = sum(theirs.encode(text) != own.encode(text) for text in TEXTS), 0
    # What the tokenizer puts before every text, if anything; llama.cpp leaves it out of what it renders
    start = own.tokenizer.decode(own.encode("", special=True)[:1])
    for mode, (messages, tools) in itertools.product(modes_of(own.tokenizer), CONVERSATIONS):
        case = messages, tools, mode == "thinking"
        rendered = own.render(*case)
        if not rendered or (tools and rendered == own.render(messages, None, mode == "thinking")):
            continue  # some templates refuse a role, and some leave tools out
        bare = rendered.removeprefix(start)
        templates += theirs.render(*case).removeprefix(start) != bare
        texts += theirs.encode(bare, special=True) != own.encode(start + bare)
    return texts, templates


def probe_sequences(own: Tokens) -> list[list[int]]:
    """A few hundred positions of conversation, in the modes the model has and with both kinds of reply."""
    modes, end = modes_of(own.tokenizer), own.tokenizer.decode([closing_token(own.tokenizer)])
    first, last = (mode == "thinking" for mode in (modes[0], modes[-1]))
    # prompts as inference shows them with the replies of both modes, and a reply that follows another without a header
    texts = [
        own.render([USER], None, first) + REPLIES[0],
        own.render([USER], None, last) + REPLIES[1],
        own.render(AGAIN, None, first) + REPLIES[0],
        REPLIES[1] + end + REPLIES[0],
    ]
    return [own.encode(text + end)[-PER_TEXT:] for text in texts]


def file_divergence(engine: Engine, reference: np.ndarray, sequences: list[list[int]], plain: int, **more) -> dict:
    """A served file beside `reference`: {"mean": KL, "max": the largest, "other": the share of positions with another
    top token}, over its top 512 tokens and one bucket for the rest.

    One prompt per position, a request per text. The sampled token is forced to `plain`: the probabilities are
    those before sampling, and the server withholds them when the token it draws is half a character."""
    options = {"n_predict": 1, "n_probs": TOP, "logit_bias": [[plain, 1000.0]]}
    options["response_fields"] = ["index", "completion_probabilities"]
    tops = []
    for ids in sequences:
        prompts = [ids[:end] for end in range(1, len(ids) + 1)]
        replies = engine.call("/completion", options | more | {"prompt": prompts})
        tops += [r["completion_probabilities"][0]["top_logprobs"] for r in sorted(replies, key=lambda r: r["index"])]
    values, other = [], 0
    for top, row in zip(tops, reference.astype(np.float64), strict=True):
        kept = [t["id"] for t in top]
        values.append(_bucketed(row[kept], np.array([t["logprob"] for t in top], np.float64)))
        other += bool(row[kept[0]] <= row.max() - NEAR_TIE)
    return {"mean": float(np.mean(values)), "max": float(np.max(values)), "other": other / len(values)}


def _bucketed(ours: np.ndarray, theirs: np.ndarray) -> float:
    # what lies outside the 512, at least a billionth: the logarithm of 0 is no number
    rest, other = max(1 - np.exp(ours).sum(), 1e-9), max(1 - np.exp(theirs).sum(), 1e-9)
    return float(np.sum(np.exp(ours) * (ours - theirs)) + rest * np.log(rest / other))
