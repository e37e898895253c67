"""A run, its merged folder and its GGUF files, asked for the same tokens, prompts and probabilities: do they agree?

divergence(log_probs(adapter_view(merged), texts), log_probs(stored_view(folder), texts)).mean()
"""

import contextlib
import http.client
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit.export.merge import EMBEDDING, HEAD, Checkpoint, Merged
from toolkit.files import ToolkitError

HEAD_ROWS = 16384
TOP = 512
NEAR_TIE = 1e-2
"""Two tokens this close in log-probability (1% of each other) are both the top one: rounding alone swaps them."""

POSITIONS, PER_TEXT = 200, 50
USER = {"role": "user", "content": "What is 17 + 25?"}
ASK = {"role": "user", "content": "Weather in Zürich?"}
THOUGHT = {"role": "assistant", "reasoning_content": "17 + 25 is 17 + 20 + 5.", "content": "It is 42."}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": CITY}}]
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": CALLS}
CONVERSATIONS: tuple[tuple[list[dict], list | None], ...] = (
    ([USER], None),
    ([{"role": "system", "content": "Answer briefly."}, USER], None),
    ([USER, THOUGHT, {"role": "user", "content": "And doubled?"}], None),
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
    "<think>\nOkay, the user asks for a sum. 17 + 25 = 42.\n</think>\n\nIt is **42**.<|im_end|>",
    "Water boils at 100 °C at sea level, because its vapour pressure then equals that of the air.<|im_end|>",
)


@dataclass(frozen=True)
class View:
    """Weights as a forward pass sees them: a tensor by name and, for an adapter that is not merged, its factors."""

    config: dict
    tensor: Callable
    factors: Callable = lambda _: None
    scaling: float = 0.0


def stored_view(checkpoint: Checkpoint) -> View:
    return View(checkpoint.config, checkpoint.tensor)


def base_view(merged: Merged) -> View:
    return View(merged.config, merged.base_tensor)


def merging_view(merged: Merged) -> View:
    """What a merge would store, without storing it."""
    return View(merged.config, merged.tensor)


def adapter_view(merged: Merged) -> View:
    """Base and adapter side by side, as the run was trained and evaluated."""

    def tensor(name: str):
        saved = merged.adapter.saved(name)
        return merged.base_tensor(name) if saved is None else saved

    return View(merged.config, tensor, merged.adapter.factors, merged.adapter.scaling)


def log_probs(view: View, sequences: list[list[int]]) -> np.ndarray:
    """fp32 log-probabilities after every token of every sequence: (positions, vocabulary).

    A dense Qwen3 written out (https://arxiv.org/abs/2505.09388, section 2), layer by layer from memory-mapped weights:
    memory is one layer, so a 14B fits a laptop; and no patch another library made to transformers' classes gets in."""
    import torch
    from torch.nn.functional import log_softmax

    config, embedding = view.config, view.tensor(EMBEDDING)
    with torch.inference_mode():
        states = [embedding[torch.tensor(ids)].float() for ids in sequences]
        turns = [_rotation(config, len(ids)) for ids in sequences]
        for i in range(config["num_hidden_layers"]):
            layer = _Layer(view, f"model.layers.{i}.")
            states = [layer(state, turn) for state, turn in zip(states, turns, strict=True)]
        hidden = torch.cat([_rms(s, view.tensor("model.norm.weight"), config["rms_norm_eps"]) for s in states])
        head = embedding if config["tie_word_embeddings"] else view.tensor(HEAD)
        rows = range(0, len(head), HEAD_ROWS)
        logits = torch.cat([hidden @ head[r : r + HEAD_ROWS].float().T for r in rows], dim=1)
        factors = None if config["tie_word_embeddings"] else view.factors(HEAD)
        if factors is not None:
            logits += (hidden @ factors[0].T) @ factors[1].T * view.scaling
        return log_softmax(logits, dim=1).numpy()


class _Layer:
    """One decoder layer in fp32; its weights live as long as it does."""

    def __init__(self, view: View, prefix: str):
        self.view, self.prefix, self.config = view, prefix, view.config
        self.weights: dict = {}

    def weight(self, name: str):
        if name not in self.weights:
            self.weights[name] = self.view.tensor(self.prefix + name).float()
        return self.weights[name]

    def linear(self, name: str, x):
        name += ".weight"
        y, factors = x @ self.weight(name).T, self.view.factors(self.prefix + name)
        return y if factors is None else y + (x @ factors[0].T) @ factors[1].T * self.view.scaling

    def norm(self, name: str, x):
        return _rms(x, self.weight(f"{name}.weight"), self.config["rms_norm_eps"])

    def heads(self, name: str, x, turn):
        """(heads, tokens, head_dim), queries and keys normalized per head and turned."""
        y = self.linear(f"self_attn.{name}_proj", x).view(len(x), -1, self.config["head_dim"])
        if turn is not None:
            return _turned(self.norm(f"self_attn.{name}_norm", y).transpose(0, 1), *turn)
        return y.transpose(0, 1)

    def __call__(self, x, turn):
        from torch.nn.functional import scaled_dot_product_attention, silu

        y = self.norm("input_layernorm", x)
        q, k, v = self.heads("q", y, turn), self.heads("k", y, turn), self.heads("v", y, None)
        groups = len(q) // len(k)
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.linear("self_attn.o_proj", y.transpose(0, 1).reshape(len(x), -1))
        y = self.norm("post_attention_layernorm", x)
        return x + self.linear("mlp.down_proj", silu(self.linear("mlp.gate_proj", y)) * self.linear("mlp.up_proj", y))


def _rms(x, weight, epsilon: float):
    return x * (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * weight.float()


def _rotation(config: dict, length: int) -> tuple:
    """(cos, sin) of rotary positions 0…length-1, for the default and the stretched (YaRN) kind."""
    import torch
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    full, factor = Qwen3Config.from_dict(config), 1.0
    rope = full.rope_parameters
    frequencies = rope["rope_theta"] ** (-torch.arange(0, config["head_dim"], 2).float() / config["head_dim"])
    if rope["rope_type"] != "default":
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](full, "cpu")
    angles = torch.arange(length).float()[:, None] * torch.cat([frequencies, frequencies])
    return angles.cos() * factor, angles.sin() * factor


def _turned(x, cos, sin):
    import torch

    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference ‖ other) at each position, in nats, over the whole vocabulary."""
    return np.sum(np.exp(reference, dtype=np.float64) * (reference.astype(np.float64) - other), axis=1)


def hf_encode(tokenizer) -> Callable:
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def hf_render(tokenizer) -> Callable:
    def render(messages: list, tools: list | None, thinking: bool) -> str:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )

    return render


def server_encode(post: Callable) -> Callable:
    return lambda text: post("/tokenize", {"content": text})["tokens"]


def server_render(post: Callable) -> Callable:
    def render(messages: list, tools: list | None, thinking: bool) -> str:
        body = {"messages": [_openai(m) for m in messages], "chat_template_kwargs": {"enable_thinking": thinking}}
        return post("/apply-template", body | ({"tools": tools} if tools else {}))["prompt"]

    return render


def _openai(message: dict) -> dict:
    """The API wants a call's arguments as JSON text and its id; the template gets them back as they were."""
    if "tool_calls" not in message:
        return message
    calls = []
    for i, call in enumerate(message["tool_calls"]):
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append(call | {"id": str(i), "function": call["function"] | {"arguments": arguments}})
    return message | {"tool_calls": calls}


def tokenizer_differences(encode: Callable, render: Callable, tokenizer) -> tuple[int, int]:
    """(texts, renderings) that differ from the run's own tokenizer: awkward texts, and every kind of conversation in
    both modes, with the renderings tokenized too."""
    own_encode, own_render = hf_encode(tokenizer), hf_render(tokenizer)
    cases = [(messages, tools, thinking) for messages, tools in CONVERSATIONS for thinking in (True, False)]
    rendered = [own_render(*case) for case in cases]
    texts = sum(encode(text) != own_encode(text) for text in (*TEXTS, *rendered))
    return texts, sum(render(*case) != text for case, text in zip(cases, rendered, strict=True))


def probe_sequences(tokenizer) -> list[list[int]]:
    """A few hundred positions of conversation, both modes and both kinds of reply."""
    render, encode = hf_render(tokenizer), hf_encode(tokenizer)
    texts = [
        render([USER], None, True) + REPLIES[0],
        render([USER], None, False) + REPLIES[1],
        render(CONVERSATIONS[2][0], None, True) + REPLIES[0],
        REPLIES[1] + REPLIES[0],
    ]
    return [encode(text)[-PER_TEXT:] for text in texts[: POSITIONS // PER_TEXT]]


@contextlib.contextmanager
def llama_server(path: Path, context: int = 2048, lora: Path | None = None) -> Iterator[Callable[[str, dict], dict]]:
    """The llama-server inside xllamacpp on a free local port; yields `post(route, body)`.

    Weights are memory-mapped. A small model gets one thread: more would mostly wait for each other. With `lora`, a GGUF
    LoRA, a request chooses its part by {"lora": [{"id": 0, "scale": 0 to 1}]}; without that it is fully applied."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity, params.port = context, 1, False, -1, 0
    params.cache_ram_mib, params.n_ctx_checkpoints = 0, 0
    if lora:
        applied = xllamacpp.CommonAdapterLoraInfo()
        applied.path, applied.scale = str(lora), 1.0
        params.lora_adapters = [applied]
    threads = 1 if path.stat().st_size < 2e8 else os.cpu_count()
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads, cpu.poll = threads, 0  # sleep while waiting: spinning threads collapse on a shared machine
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise ToolkitError(f"{path}: llama.cpp cannot load it ({error})") from error
    address = server.listening_address.removeprefix("http://")

    def post(route: str, body: dict):
        connection = http.client.HTTPConnection(address)
        connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        data = reply.read()
        connection.close()
        if reply.status != 200:
            raise ToolkitError(f"{path}: llama.cpp answers {reply.status} to {route}: {data[:300]!r}")
        return json.loads(data)

    yield post
    del server


def file_divergence(
    post: Callable, reference: np.ndarray, sequences: list[list[int]], plain_token: int, **more
) -> dict:
    """KL and top-1 agreement of a served file with `reference`, over its top 512 tokens and one bucket for the rest.

    One prompt per position, a request per text. The sampled token is forced to `plain_token`: the probabilities are
    those before sampling, and the server withholds them when the token it draws is half a character."""
    options = {
        "n_predict": 1,
        "n_probs": TOP,
        "logit_bias": [[plain_token, 1000.0]],
        "response_fields": ["index", "completion_probabilities"],
    } | more
    tops = []
    for ids in sequences:
        prompts = [ids[:end] for end in range(1, len(ids) + 1)]
        replies = post("/completion", options | {"prompt": prompts})
        tops += [r["completion_probabilities"][0]["top_logprobs"] for r in sorted(replies, key=lambda r: r["index"])]
    values, agreed = [], 0
    for top, row in zip(tops, reference, strict=True):
        ours, kept = row.astype(np.float64), [t["id"] for t in top]
        values.append(_bucketed(ours[kept], np.array([t["logprob"] for t in top], np.float64)))
        agreed += bool(ours[kept[0]] > ours.max() - NEAR_TIE)
    return {"mean": float(np.mean(values)), "max": float(np.max(values)), "top1": agreed / len(values)}


def _bucketed(ours: np.ndarray, theirs: np.ndarray) -> float:
    rest, other = max(1 - np.exp(ours).sum(), 1e-9), max(1 - np.exp(theirs).sum(), 1e-9)
    return float(np.sum(np.exp(ours) * (ours - theirs)) + rest * np.log(rest / other))
