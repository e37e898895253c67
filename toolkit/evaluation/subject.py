"""What evaluation asks of a model: replies, how far tuned is from base, how a reply begins.

subject = LoadedRun(model, tokenizer, cache=Path("outputs/.base_replies"))
subject.divergence([{"input_ids": [1, 2, 3, 4], "prompt_length": 2}])
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from toolkit.evaluation.decode import free_memory, rows_at_once
from toolkit.evaluation.generate import (
    Messages,
    Reply,
    closing_token,
    end_tokens,
    generate,
    inference,
    merged_on_cpu,
    modes_of,
    prompts,
    sampling_values,
    switched,
)
from toolkit.evaluation.plan import Speed
from toolkit.evaluation.questions import fingerprint
from toolkit.evaluation.reply_store import ReplyStore
from toolkit.family import THINK_CLOSE, THINK_OPEN
from toolkit.files import ToolkitError
from toolkit.recipe import INITS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LOGITS = 1 << 28
"""Logits held at a time (512 MB in 16 bits, twice: base and tuned); a row with more is read again for each part."""
BYTES_PER_LOGIT = 8
"""Base and tuned in float32, as accelerate's wrapper returns them after a training in the same process."""
CHUNK = 128
"""Positions whose full distributions are compared at once in float32 (78 MB each at Qwen3's 151,936 entries)."""
SPEED_TOKENS = 32
"""Tokens of each row by which the speed of decoding is measured."""


class Completion(TypedDict):
    """Token ids of which the first `prompt_length` are the prompt."""

    input_ids: list[int]
    prompt_length: int


class TokenSums(TypedDict):
    """Sums over the tokens of one completion."""

    tokens: int
    base: float
    """Negative log-likelihood in nats."""
    tuned: float
    kl: float
    """Of tuned from base, in nats."""
    base_hits: int
    """Tokens that are the likeliest to the model."""
    tuned_hits: int


class Beginning(TypedDict):
    """Shares of probability at the first tokens of a reply."""

    thinking: float
    """That it opens a think block which is not closed at once."""
    answer: float
    """That it answers at once, after an empty block too."""


class ProgressBar(Protocol):
    """What is told how far replies are; a toolkit.view.progress.Progress is one."""

    def advance(self, count: int) -> None:
        """`count` more are done."""

    def skip(self, count: int) -> None:
        """`count` need not be done."""


class Subject(Protocol):
    """Base and tuned, wherever they are: what `score` asks."""

    modes: tuple[str, ...]
    seed: int

    def reply(
        self, conversations: Sequence[Messages], mode: str, adapter: bool, progress: ProgressBar, *, max_new_tokens: int
    ) -> list[Reply]:
        """A reply of tuned (`adapter`) or base to each conversation."""


class NoProgress:
    """Shows nothing."""

    def advance(self, count: int) -> None:
        """`count` more are done."""

    def skip(self, count: int) -> None:
        """`count` need not be done."""


@dataclass
class LoadedRun:
    """A PeftModel as base and tuned, which differ by nothing but the adapter; tests script a class like it."""

    model: Any
    tokenizer: Any
    cache: Path
    """Folder of the base's replies: one base asked one question set is asked once, in all runs and sweeps."""
    seed: int = 3407
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not hasattr(self.model, "disable_adapter"):
            raise ToolkitError("evaluation needs a PeftModel: its base is the model with the adapter switched off")
        init = self.model.peft_config[self.model.active_adapter].init_lora_weights
        if init not in INITS:
            raise ToolkitError(
                f"the adapter was made with init_lora_weights={init!r}: without it the model is not the base"
            )
        self.modes = modes_of(self.tokenizer)
        self.weights = checksum(self.model)

    def reply(
        self, conversations: Sequence[Messages], mode: str, adapter: bool, progress: ProgressBar, *,
        max_new_tokens: int, greedy: bool = False,
    ) -> list[Reply]:  # fmt: skip
        """A reply to each conversation; the base's are kept for the next evaluation, a batch at a time."""
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": self.seed, "greedy": greedy}
        # only the base's are kept: tuned replies belong to one run and are asked once
        store = None if adapter else ReplyStore(self.cache / f"{self.key(conversations, mode, settings)}.jsonl")
        replies = store.read() if store else {}
        missing = [place for place in range(len(conversations)) if place not in replies]
        progress.skip(len(conversations) - len(missing))
        if not missing:
            return [replies[place] for place in range(len(conversations))]
        with merged_on_cpu(self.model) if adapter else switched(self.model, False):
            new = generate(
                self.model, self.tokenizer, [conversations[place] for place in missing], mode, numbers=missing,
                batch_size=self.batch_size, progress=progress.advance, **settings,
                keep=lambda batch: store.add({missing[i]: reply for i, reply in batch.items()}) if store else None,
            )  # fmt: skip
        replies |= dict(zip(missing, new, strict=True))
        complete = [replies[place] for place in range(len(conversations))]
        if store:
            store.complete(complete)
        return complete

    def key(self, conversations: Sequence[Messages], mode: str, settings: dict[str, Any]) -> str:
        """Identity of everything that decides the base's replies. Not the batch size: that decides rounding alone."""
        import torch

        cuda, text = self.model.device.type == "cuda", self.model.config.get_text_config()
        decides = {
            **settings,
            "weights": self.weights,
            "prompts": prompts(self.tokenizer, conversations, mode)[1],
            "positions": [text.to_dict().get("rope_parameters"), text.max_position_embeddings],
            "ends": sorted(end_tokens(self.model, self.tokenizer)),
            "sampling": sampling_values(self.model, mode),
            "device": torch.cuda.get_device_name(self.model.device) if cuda else "cpu",
            "versions": [version("torch"), version("transformers")],
        }
        return fingerprint(decides)

    def own(self, conversations: Sequence[Messages], mode: str, tokens: int, progress: ProgressBar) -> list[Completion]:
        """The base's greedy answers of at most so many tokens, the end-of-turn token included."""
        prompt_ids = prompts(self.tokenizer, conversations, mode)[1]
        replies = self.reply(conversations, mode, False, progress, max_new_tokens=tokens, greedy=True)
        rows: list[Completion] = []
        end = [closing_token(self.tokenizer)]
        for ids, reply in zip(prompt_ids, replies, strict=True):
            # the cache keeps texts, so the ids are made again, in a first evaluation too: both must score the same
            answer = self.tokenizer(reply.text, add_special_tokens=False)["input_ids"]
            rows.append({"input_ids": ids + answer + end * reply.finished, "prompt_length": len(ids)})
        return rows

    def divergence(self, rows: Sequence[Completion]) -> list[TokenSums]:
        """How well base and tuned know each completion, and how far tuned is from base on it."""
        with inference(self.model, self.tokenizer):
            return [_divergence(self.model, row["input_ids"], row["prompt_length"]) for row in rows]

    def beginnings(self, conversations: Sequence[Messages], mode: str, adapter: bool) -> list[Beginning]:
        """How a reply to each conversation begins, by the model's own probabilities."""
        texts, ids = prompts(self.tokenizer, conversations, mode)
        encode = self.tokenizer
        opening, close_at_once = encode([THINK_OPEN, "\n\n" + THINK_CLOSE], add_special_tokens=False)["input_ids"]
        ends = end_tokens(self.model, self.tokenizer)
        beginnings = []
        with inference(self.model, self.tokenizer), switched(self.model, adapter):
            for text, prompt in zip(texts, ids, strict=True):
                # a thinking-only model's prompt opens the block itself
                opened = text.rstrip().endswith(THINK_OPEN)
                beginnings.append(_beginning(self.model, prompt, [] if opened else opening, close_at_once, ends))
        return beginnings

    def speed(self, conversations: Sequence[Messages], mode: str, limit: int) -> Speed:
        """How fast the tuned model generates here, from a few tokens of as many rows as go together."""
        longest = max(map(len, prompts(self.tokenizer, conversations, mode)[1]))
        rows = min(len(conversations), rows_at_once(self.model, longest + limit, self.batch_size))
        chosen = list(conversations[:rows])
        options: dict[str, Any] = {"seed": self.seed, "batch_size": rows}
        generate(self.model, self.tokenizer, chosen, mode, max_new_tokens=2, **options)  # first kernels are compiled
        started = busy_seconds(self.model)
        replies = generate(self.model, self.tokenizer, chosen, mode, max_new_tokens=SPEED_TOKENS, **options)
        steps = max(reply.reasoning_tokens + reply.answer_tokens for reply in replies) + 1
        return Speed(rows, (busy_seconds(self.model) - started) / steps)


def busy_seconds(model: "PreTrainedModel") -> float:
    """A clock for the speed of generation. On a CPU this process's own time, shared among its threads: what other programs
    take must not change which questions are asked."""
    import torch

    if model.device.type == "cuda":
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def checksum(model: "PreTrainedModel") -> str:
    """Identity of the base's weights as they are loaded, quantization included, whatever adapter is on top: name, type,
    shape and sum of all bytes of each tensor. To hash 8 GB byte by byte would take longer than the questions."""
    import torch

    tensors = []
    for name, tensor in model.get_base_model().named_parameters():
        if any(part in name for part in ("lora_", ".modules_to_save.", "trainable_tokens")):  # PEFT's own weights
            continue
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        tensors.append([plain, str(tensor.dtype), list(tensor.shape), int(raw.sum(dtype=torch.int64))])
    return fingerprint(tensors)


# --- teacher-forced passes: one row at a time, so that nothing is padded and no logits are kept but the completion's --


def logits_at_once(free_bytes: float) -> int:
    """LOGITS, or as many as fill half of the free memory."""
    return int(min(LOGITS, free_bytes / 2 / BYTES_PER_LOGIT))


def _divergence(model: "PreTrainedModel", ids: list[int], prompt_length: int) -> TokenSums:
    import torch

    part = max(CHUNK, logits_at_once(free_memory(model)) // model.config.get_text_config().vocab_size)
    row = torch.tensor([ids], device=model.device)
    sums = torch.zeros(5, dtype=torch.float64)
    for start in range(prompt_length, len(ids), part):
        end = min(start + part, len(ids))
        logits = [_logits(model, row[:, : end - 1], end - start, adapter) for adapter in (False, True)]
        for base, tuned, target in zip(*(x.split(CHUNK) for x in (*logits, row[0, start:end])), strict=True):
            sums += _token_sums(base, tuned, target).double().cpu()
    base, tuned, kl, base_hits, tuned_hits = sums.tolist()
    return {
        "tokens": len(ids) - prompt_length, "base": base, "tuned": tuned, "kl": kl,
        "base_hits": int(base_hits), "tuned_hits": int(tuned_hits),
    }  # fmt: skip


def _token_sums(base: "torch.Tensor", tuned: "torch.Tensor", target: "torch.Tensor") -> "torch.Tensor":
    """(NLL of base, NLL of tuned, KL, hits of base, hits of tuned) over some positions, from their logits."""
    import torch

    # float32: differences of 16-bit log-probabilities would be noise
    base, tuned = (logits.float().log_softmax(-1) for logits in (base, tuned))
    nll = [-x.gather(-1, target[:, None]).sum() for x in (base, tuned)]
    kl = (base.exp() * (base - tuned)).sum()
    hits = [(x.argmax(-1) == target).sum() for x in (base, tuned)]
    return torch.stack([*nll, kl, *hits])


def _beginning(
    model: "PreTrainedModel", prompt: list[int], opening: list[int], close_at_once: list[int], ends: set[int]
) -> Beginning:
    """From one pass over the prompt and an empty think block. An end-of-turn token at once is neither."""
    import torch

    ids = torch.tensor([prompt + opening + close_at_once], device=model.device)
    # every probability below is of one token after those before it: one pass gives all
    forced = ids[0, len(prompt) :]
    log_probs = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=len(forced)).logits[0, -len(forced) :]
    log_probs = log_probs.float().log_softmax(-1)
    token = log_probs.gather(-1, forced[:, None])[:, 0].double()
    opens = float(token[: len(opening)].sum().exp())
    empty = float(token[len(opening) :].sum().exp())
    silent = 0.0 if not opening else float(log_probs[0, sorted(ends)].exp().sum())
    return {"thinking": opens * (1 - empty), "answer": max(0.0, 1 - opens - silent) + opens * empty}


def _logits(model: "PreTrainedModel", ids: "torch.Tensor", keep: int, adapter: bool) -> "torch.Tensor":
    # No labels: with them Unsloth's fused loss returns no logits. The one at position p - 1 judges token p.
    with switched(model, adapter):
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0, -keep:]
