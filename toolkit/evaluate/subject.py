"""What evaluation asks of a model: replies, the chance of a think block, how far tuned is from base.

subject = LoadedRun(model, tokenizer, cache=Path("outputs/.base_replies"))
subject.reply([[{"role": "user", "content": "12 + 30?"}]], "thinking", True)  # True: with the adapter
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from toolkit.evaluate.base_replies import base_key, checksum, remembered
from toolkit.family import family_of
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


@dataclass
class LoadedRun:
    """A PeftModel as base and tuned, which differ by nothing but the adapter; tests script a class like it."""

    model: object
    tokenizer: object
    cache: Path
    """Folder of the base's replies."""
    seed: int = 3407
    max_new_tokens: int = 1024
    batch_size: int = 32

    def __post_init__(self):
        if not hasattr(self.model, "disable_adapter"):
            raise ToolkitError("evaluation needs a PeftModel: its base is the model with the adapter switched off")
        self.modes = modes_of(self.tokenizer)
        self.switches = len(self.modes) > 1 and family_of(self.model.config.model_type).switches
        """Whether it obeys /think and /no_think."""
        self.weights = checksum(self.model)

    def reply(
        self, conversations: list[list[dict]], mode: str, adapter: bool, progress=None, **settings
    ) -> list[Reply]:
        """A reply to each conversation; the base's are kept for the next evaluation. `progress` is a toolkit.progress."""
        settings = {"max_new_tokens": self.max_new_tokens, "seed": self.seed, "greedy": False} | settings
        settings["progress"] = progress and progress.advance

        def ask() -> list[dict]:
            with switched(self.model, adapter):
                size = self.batch_size
                replies = generate(self.model, self.tokenizer, conversations, mode, batch_size=size, **settings)
            return [asdict(reply) for reply in replies]

        if adapter:
            return [Reply(**row) for row in ask()]
        ids = prompts(self.tokenizer, conversations, mode)[1]
        decides = {k: v for k, v in settings.items() if k != "progress"} | {"weights": self.weights, "prompts": ids}
        rows, found = remembered(self.cache, base_key(self.model, mode, decides), ask)
        if found and progress:
            progress.skip(len(rows))
        return [Reply(**row) for row in rows]

    def first(self, conversations: list[list[dict]], mode: str, adapter: bool) -> list[float]:
        """The probability of each conversation that the first new token is `<think>`."""
        with switched(self.model, adapter):
            return think_probability(self.model, self.tokenizer, conversations, mode, batch_size=self.batch_size)

    def own(self, conversations: list[list[dict]], mode: str, tokens: int, progress=None) -> list[dict]:
        """The base's greedy answers as rows {"input_ids", "prompt_length"}, the end-of-turn token included."""
        asked = prompts(self.tokenizer, conversations, mode)[1]
        replies = self.reply(conversations, mode, False, progress, max_new_tokens=tokens, greedy=True)
        rows, end = [], [closing_token(self.tokenizer)]
        for ids, reply in zip(asked, replies, strict=True):
            said = self.tokenizer(reply.text, add_special_tokens=False)["input_ids"]
            rows.append({"input_ids": ids + said + end * reply.finished, "prompt_length": len(ids)})
        return rows

    def divergence(self, rows: Sequence[dict]) -> list[dict]:
        """Sums over each row's completion: {"tokens", "base": NLL in nats, "tuned": NLL, "kl": of tuned from base}."""
        return divergence(self.model, self.tokenizer, rows, self.batch_size)


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
