"""What evaluation asks of a model, as four functions: a loaded run binds them, a test scripts them.

subject = bind(model, tokenizer, seed=3407, max_new_tokens=1024)
subject.reply([[{"role": "user", "content": "12 + 30?"}]], "thinking", True)  # True: with the adapter
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from toolkit.evaluate.base_replies import base_replies_key, checksum, remembered
from toolkit.evaluate.questions import fingerprint
from toolkit.family import MODES, family_of
from toolkit.files import ToolkitError
from toolkit.generate import (
    Reply,
    closing_token,
    free_memory,
    generate,
    inference,
    modes_of,
    pad_token,
    prompts,
    think_probability,
)

LOGITS = 1 << 26
"""Logits held at a time for a batch of rows (128 MB in 16 bits, twice: base and tuned)."""
LONG_LOGITS = 1 << 28
"""The same for one long row (512 MB): beyond it the row is read again for each part, which costs time instead."""
BYTES_PER_LOGIT = 8
"""Base and tuned in float32, as accelerate's wrapper returns them after a training in the same process."""
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
    modes: tuple[str, ...] = MODES
    switches: bool = True
    """Whether it obeys /think and /no_think."""


def bind(
    model,
    tokenizer,
    *,
    seed: int,
    max_new_tokens: int,
    batch_size: int = 32,
    progress=None,
    cache: Path | None = None,
) -> Subject:
    """The four functions of a loaded run (a PeftModel): base and tuned differ by nothing but the adapter.

    `progress` has `advance(n)` and `skip(n)` (toolkit.progress); `cache` is the folder of the base's replies."""
    if not hasattr(model, "disable_adapter"):
        raise ToolkitError("evaluation needs a PeftModel: its base is the model with the adapter off (get_peft_model)")
    limits = {"max_new_tokens": max_new_tokens, "seed": seed, "batch_size": batch_size}
    modes = modes_of(tokenizer)
    weights = cache and checksum(model)

    def base_key(conversations, mode, **settings):
        """What decides the base's replies; the batch size, which only decides their rounding, is left out."""
        ids = prompts(tokenizer, conversations, mode)[1]
        return base_replies_key(model, weights, mode) | {"prompts": fingerprint(ids)} | settings

    def reply(conversations, mode, adapter):
        def ask() -> list[dict]:
            advance = progress and progress.advance
            with switched(model, adapter):
                return [asdict(r) for r in generate(model, tokenizer, conversations, mode, progress=advance, **limits)]

        if adapter or not cache:
            return [Reply(**row) for row in ask()]
        key = base_key(conversations, mode, max_new_tokens=max_new_tokens, seed=seed)
        rows, found = remembered(cache, key, ask)
        if found and progress:
            progress.skip(len(rows))
        return [Reply(**row) for row in rows]

    def first(conversations, mode, adapter):
        with switched(model, adapter):
            return think_probability(model, tokenizer, conversations, mode, batch_size=batch_size)

    def own(conversations, mode, tokens):
        def ask() -> list[dict]:
            with switched(model, adapter=False):
                greedy = limits | {"max_new_tokens": tokens}
                replies = generate(model, tokenizer, conversations, mode, greedy=True, **greedy)
            return answered_rows(tokenizer, conversations, mode, replies)

        return remembered(cache, base_key(conversations, mode, greedy=tokens), ask)[0] if cache else ask()

    switches = len(modes) > 1 and family_of(model.config.model_type).switches
    return Subject(reply, first, own, lambda rows: divergence(model, tokenizer, rows, batch_size), modes, switches)


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
            fit = max(1, min(batch_size, logits_at_once(LOGITS, free_memory(model)) // (width * _vocabulary(model))))
            batch, order = order[:fit], order[fit:]
            found.update(zip(batch, _batch_divergence(model, tokenizer, [rows[i] for i in batch]), strict=True))
    return [found[i] for i in range(len(rows))]


def logits_at_once(wanted: int, free_bytes: float) -> int:
    """`wanted` logits, or as many as fill half of the free memory."""
    return int(min(wanted, free_bytes / 2 / BYTES_PER_LOGIT))


def _vocabulary(model) -> int:
    return model.config.get_text_config().vocab_size


def _batch_divergence(model, tokenizer, rows: list[dict]) -> list[dict]:
    import torch

    width = max(len(row["input_ids"]) for row in rows)
    filled = [row["input_ids"] + [pad_token(tokenizer)] * (width - len(row["input_ids"])) for row in rows]
    ids = torch.tensor(filled, device=model.device)
    places = torch.arange(1, width, device=model.device)
    lengths = torch.tensor([[row["prompt_length"], len(row["input_ids"])] for row in rows], device=model.device)
    wanted = (places >= lengths[:, :1]) & (places < lengths[:, 1:])  # position p is judged by the logits at p - 1
    sums = {name: torch.zeros(len(rows), dtype=torch.float64) for name in ("base", "tuned", "kl")}
    part = max(CHUNK, logits_at_once(LONG_LOGITS, free_memory(model)) // (len(rows) * _vocabulary(model)))
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


def answered_rows(tokenizer, conversations: list[list[dict]], mode: str, replies: list[Reply]) -> list[dict]:
    """Prompts with their replies as rows {"input_ids", "prompt_length"}, the end-of-turn token included."""
    _, asked = prompts(tokenizer, conversations, mode)
    said = tokenizer([r.text for r in replies], add_special_tokens=False)["input_ids"] if replies else []
    closing = closing_token(tokenizer)
    ends = [[closing] if r.finished and closing is not None else [] for r in replies]
    rows = zip(asked, said, ends, strict=True)
    return [{"input_ids": ids + new + end, "prompt_length": len(ids)} for ids, new, end in rows]
