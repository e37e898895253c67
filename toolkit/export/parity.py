"""A run, its merged folder and its GGUF files, asked for the same tokens, prompts and probabilities: do they agree?

merged = open_merged(run, "16bit"); divergence(log_probs(merged, "adapter", texts), log_probs(merged, "merged", texts))
"""

import contextlib
import http.client
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from toolkit.export.merge import EMBEDDING, HEAD, Checkpoint, Merged, end_of_turn, load_tokenizer
from toolkit.family import KINDS, kind_of
from toolkit.files import ROOT, ToolkitError

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


class _Weights(Mapping):
    """Weights by name, read or computed when a module is about to run: what accelerate loads offloaded modules from."""

    def __init__(self, model: Checkpoint | Merged, which: str):
        self.model, self.which = model, which

    def __getitem__(self, name: str):
        model, name = self.model, EMBEDDING if name == HEAD and self.model.tied else name
        if self.which == "merged":
            return model.tensor(name)
        saved = model.adapter.saved(name) if self.which == "adapter" else None
        return model.base_tensor(name) if saved is None else saved

    def __iter__(self):
        return iter(self.model.names())

    def __len__(self) -> int:
        return len(self.model.names())


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
    attach_align_device_hook(
        empty, execution_device=torch.device("cpu"), offload=True, weights_map=_Weights(model, which)
    )
    if which == "adapter":
        for name, module in empty.named_modules():
            if (factors := model.adapter.factors(f"{name}.weight")) is not None:
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
        "import pickle, sys, numpy; from toolkit.export.parity import log_probs; "
        "numpy.save(sys.argv[1], log_probs(*pickle.load(sys.stdin.buffer)))"
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "log_probs.npy"
        command = [sys.executable, "-c", code, str(out)]
        done = subprocess.run(
            command, input=pickle.dumps((model, which, sequences)), cwd=ROOT, capture_output=True, check=False
        )
        if done.returncode:
            raise ToolkitError(f"the reference forward pass failed: {done.stderr.decode(errors='replace')[-400:]}")
        return np.load(out)


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference ‖ other) at each position, in nats, over the whole vocabulary."""
    return np.sum(np.exp(reference, dtype=np.float64) * (reference.astype(np.float64) - other), axis=1)


class Tokens:
    """The run's own tokenizer and template: what every exported file is compared with."""

    def __init__(self, folder: Path):
        self.tokenizer = load_tokenizer(folder)
        self.kind = kind_of(lambda messages, enable_thinking: self.render(messages, None, enable_thinking))
        self.modes, self.end = KINDS[self.kind], end_of_turn(self.tokenizer)
        self.bos = self.tokenizer.decode(self.tokenizer.encode("")[:1])
        """What the tokenizer puts before every text, if anything; llama.cpp then leaves it out of what it renders."""
        self.cases = [
            (m, t, mode == "thinking") for m, t in CONVERSATIONS if self._renders(m, t) for mode in self.modes
        ]

    def _renders(self, messages: list, tools: list | None) -> bool:
        """Whether the template has a form for this: some refuse a role, and some leave tools out."""
        from jinja2 import TemplateError

        try:
            plain = self.render(messages, None, False)
            return tools is None or self.render(messages, tools, False) != plain
        except TemplateError:
            return False

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_prompt(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def render(self, messages: list, tools: list | None, thinking: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )


class ServedTokens:
    """The same two questions to a served GGUF."""

    def __init__(self, post: Callable):
        self.post = post

    def encode(self, text: str) -> list[int]:
        return self.post("/tokenize", {"content": text})["tokens"]

    def encode_prompt(self, text: str) -> list[int]:
        return self.post("/tokenize", {"content": text, "add_special": True})["tokens"]

    def render(self, messages: list, tools: list | None, thinking: bool) -> str:
        body = {"messages": [_openai(m) for m in messages], "chat_template_kwargs": {"enable_thinking": thinking}}
        return self.post("/apply-template", body | ({"tools": tools} if tools else {}))["prompt"]


def _openai(message: dict) -> dict:
    """The API wants a call's arguments as JSON text and its id; the template gets them back as they were."""
    if "tool_calls" not in message:
        return message
    calls = []
    for i, call in enumerate(message["tool_calls"]):
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append(call | {"id": str(i), "function": call["function"] | {"arguments": arguments}})
    return message | {"tool_calls": calls}


def tokenizer_differences(theirs, own: Tokens) -> tuple[int, int]:
    """(texts, renderings) that differ from the run's own: awkward texts, and every kind of conversation in each mode,
    with the renderings tokenized too."""
    texts = sum(theirs.encode(text) != own.encode(text) for text in TEXTS)
    templates = 0
    for case in own.cases:
        bare = own.render(*case).removeprefix(own.bos)
        templates += theirs.render(*case).removeprefix(own.bos) != bare
        texts += theirs.encode_prompt(bare) != own.encode(own.bos + bare)
    return texts, templates


def probe_sequences(own: Tokens) -> list[list[int]]:
    """A few hundred positions of conversation, in the modes the model has and with both kinds of reply."""
    first, last = own.modes[0] == "thinking", own.modes[-1] == "thinking"
    end = own.tokenizer.decode([own.end])
    texts = [
        own.render([USER], None, first) + REPLIES[0] + end,
        own.render([USER], None, last) + REPLIES[1] + end,
        own.render(AGAIN, None, first) + REPLIES[0] + end,
        REPLIES[1] + end + REPLIES[0] + end,
    ]
    return [own.encode(text)[-PER_TEXT:] for text in texts[: POSITIONS // PER_TEXT]]


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
