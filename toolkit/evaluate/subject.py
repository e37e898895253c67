"""What evaluation asks of a model, as four functions: a loaded run binds them, a test scripts them.

subject = bind(model, tokenizer, seed=3407, max_new_tokens=1024)
subject.reply([[{"role": "user", "content": "12 + 30?"}]], "thinking", True)  # True: with the adapter
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from toolkit.generate import Reply, generate, inference, think_probability

LOGITS = 1 << 26
"""Logits held at a time for a batch of rows (128 MB in 16 bits)."""
LONG_LOGITS = 1 << 28
"""The same for one long row (512 MB): beyond it the row is read again for each part, which costs time instead."""
CHUNK = 128
"""Positions whose full distributions are compared at once in float32 (78 MB each at Qwen3's 151,936 entries)."""


@dataclass(frozen=True)
class Subject:
    """A base and its tuned version."""

    reply: Callable[[list[list[dict]], str, bool], list[Reply]]
    """(conversations, mode, adapter on?) → a reply each."""
    first: Callable[[list[list[dict]], str, bool], list[float]]
    """(conversations, mode, adapter on?) → the probability that the first new token is `<think>`."""
    own: Callable[[list[list[dict]], str, int], list[dict]]
    """(conversations, mode, tokens) → the base's greedy answers as rows {"input_ids", "prompt_length"}."""
    divergence: Callable[[list[dict]], list[dict]]
    """rows → sums over each completion: {"tokens", "base": NLL in nats, "tuned": NLL, "kl": of tuned from base}."""


def bind(
    model,
    tokenizer,
    *,
    seed: int,
    max_new_tokens: int,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Subject:
    """The four functions of a loaded run (a PeftModel): base and tuned differ by nothing but the adapter."""

    def reply(conversations, mode, adapter):
        with switched(model, adapter):
            return generate(model, tokenizer, conversations, mode, max_new_tokens=max_new_tokens, seed=seed,
                            batch_size=batch_size, progress=progress)  # fmt: skip

    def first(conversations, mode, adapter):
        with switched(model, adapter):
            return think_probability(model, tokenizer, conversations, mode, batch_size=batch_size)

    def own(conversations, mode, tokens):
        with switched(model, adapter=False):
            replies = generate(model, tokenizer, conversations, mode, max_new_tokens=tokens, seed=seed,
                               batch_size=batch_size, greedy=True)  # fmt: skip
        return [_row(tokenizer, *pair, mode) for pair in zip(conversations, replies, strict=True)]

    return Subject(reply, first, own, lambda rows: divergence(model, tokenizer, rows, batch_size))


@contextlib.contextmanager
def switched(model, adapter: bool) -> Iterator[None]:
    """The model with its adapter, or without: its base."""
    with contextlib.nullcontext() if adapter else model.disable_adapter():
        yield


def divergence(model, tokenizer, rows: Sequence[dict], batch_size: int = 32) -> list[dict]:
    """How far tuned is from base on the supervised tokens of rows {"input_ids", "prompt_length"}, in their order."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    found: dict[int, dict] = {}
    with inference(model, tokenizer):
        while order:
            width = len(rows[order[0]]["input_ids"])
            fit = max(1, min(batch_size, LOGITS // (width * model.config.vocab_size)))
            batch, order = order[:fit], order[fit:]
            found.update(zip(batch, _batch_divergence(model, tokenizer, [rows[i] for i in batch]), strict=True))
    return [found[i] for i in range(len(rows))]


def _batch_divergence(model, tokenizer, rows: list[dict]) -> list[dict]:
    import torch

    width = max(len(row["input_ids"]) for row in rows)
    filled = [row["input_ids"] + [tokenizer.pad_token_id] * (width - len(row["input_ids"])) for row in rows]
    ids = torch.tensor(filled, device=model.device)
    places = torch.arange(1, width, device=model.device)
    lengths = torch.tensor([[row["prompt_length"], len(row["input_ids"])] for row in rows], device=model.device)
    wanted = (places >= lengths[:, :1]) & (places < lengths[:, 1:])  # position p is judged by the logits at p - 1
    sums = {name: torch.zeros(len(rows), dtype=torch.float64) for name in ("base", "tuned", "kl")}
    part = max(CHUNK, LONG_LOGITS // (len(rows) * model.config.vocab_size))
    for start in range(int(lengths[:, 0].min()) - 1, width - 1, part):
        end = min(start + part, width - 1)
        logits = [_logits(model, ids[:, :end], end - start, adapter) for adapter in (False, True)]
        for a in range(0, end - start, CHUNK):
            b = min(a + CHUNK, end - start)
            here = slice(start + a, start + b)
            pair = [x[:, a:b].float().log_softmax(-1) for x in logits]
            for name, values in _token_sums(pair, ids[:, 1:][:, here]).items():
                sums[name] += (values * wanted[:, here]).sum(1).double().cpu()
    tokens = wanted.sum(1).tolist()
    return [{"tokens": n, **{k: v[i].item() for k, v in sums.items()}} for i, n in enumerate(tokens)]


def _logits(model, ids, keep: int, adapter: bool):
    # Rows are padded on the right, where a causal model cannot look, so no mask is needed. No labels: with them Unsloth's
    # fused loss returns no logits.
    with switched(model, adapter):
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[:, -keep:]


def _token_sums(pair: list, targets) -> dict:
    base, tuned = pair
    nll = [-x.gather(-1, targets[..., None])[..., 0] for x in pair]
    return {"base": nll[0], "tuned": nll[1], "kl": (base.exp() * (base - tuned)).sum(-1)}


def _row(tokenizer, messages: list[dict], reply: Reply, mode: str) -> dict:
    prompt = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=mode == "thinking"
    )
    prompt_ids, answer_ids = tokenizer([prompt, reply.text], add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id] if reply.finished else []
    return {"input_ids": prompt_ids + answer_ids + end, "prompt_length": len(prompt_ids)}
