"""What evaluation asks of a model: replies, how far tuned is from base, how a reply begins.

subject = LoadedRun(model, tokenizer, cache=Path("outputs/.base_replies"))
subject.divergence([{"input_ids": [1, 2, 3, 4], "prompt_length": 2}])
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from toolkit.evaluation.decode import free_memory, rows_at_once
from toolkit.evaluation.generate import (
    BATCH,
    Conversations,
    Reply,
    closing_token,
    end_tokens,
    generate,
    inference,
    modes_of,
    plain_on_cpu,
    prompt_opens,
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
from toolkit.view.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Logits held at a time (512 MB in 16 bits, twice: base and tuned); a row with more is read again for each part.
LOGITS = 1 << 28
# Base and tuned in float32, as accelerate's wrapper returns them after a training in the same process.
BYTES_PER_LOGIT = 8
# Positions whose full distributions are compared at once in float32 (78 MB each at Qwen3's 151,936 entries).
CHUNK = 128
# Tokens of each row by which the speed of decoding is measured.
SPEED_TOKENS = 32


class Completion(TypedDict):
    """Token ids of which the first `prompt_length` are the prompt."""

    input_ids: list[int]
    prompt_length: int


class TokenSums(TypedDict):
    """Sums over the tokens of one completion: negative log-likelihood and KL of tuned from base in nats, and how many
    tokens are the likeliest to each model."""

    tokens: int
    base: float
    tuned: float
    kl: float
    base_hits: float
    tuned_hits: float


class Subject(Protocol):
    """Base and tuned, wherever they are: what `score` asks."""

    modes: tuple[str, ...]
    seed: int

    def reply(
        self, conversations: Conversations, mode: str, adapter: bool, progress: Progress, *, max_new_tokens: int
    ) -> list[Reply]:
        """A reply of tuned (`adapter`) or base to each conversation."""


@dataclass
class LoadedRun:
    """A PeftModel as base and tuned, which differ by nothing but the adapter; tests script a class like it."""

    model: Any
    tokenizer: Any
    cache: Path
    """Folder of the base's replies: one base asked one question set is asked once, in all runs and sweeps."""
    seed: int = 3407

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
        self, conversations: Conversations, mode: str, adapter: bool, progress: Progress, *,
        max_new_tokens: int, greedy: bool = False,
    ) -> list[Reply]:  # fmt: skip
        """A reply to each conversation; the base's are kept for the next evaluation."""
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": self.seed, "greedy": greedy}
        # only the base's are kept: tuned replies belong to one run and are asked once
        store = None if adapter else ReplyStore(self.cache / f"{self.key(conversations, mode, settings)}.jsonl")
        known = store.read() if store else {}
        if len(known) == len(conversations):
            progress.skip(len(known))
            return [known[place] for place in range(len(known))]
        with switched(self.model, adapter), plain_on_cpu(self.model, merge=adapter):
            replies = generate(self.model, self.tokenizer, conversations, mode, progress=progress.advance, **settings)
        if store:
            store.add(dict(enumerate(replies)))
        return replies

    def key(self, conversations: Conversations, mode: str, settings: dict[str, Any]) -> str:
        """Identity of everything that decides the base's replies. Not the batch size: that decides rounding alone."""
        import torch

        cuda, text = self.model.device.type == "cuda", self.model.config.get_text_config()
        return fingerprint({
            **settings,
            "weights": self.weights,
            "prompts": prompts(self.tokenizer, conversations, mode),
            "positions": [text.to_dict().get("rope_parameters"), text.max_position_embeddings],
            "ends": sorted(end_tokens(self.model, self.tokenizer)),
            "sampling": sampling_values(self.model, mode),
            "device": torch.cuda.get_device_name(self.model.device) if cuda else "cpu",
            "versions": [version("torch"), version("transformers")],
        })  # fmt: skip

    def own(self, conversations: Conversations, mode: str, tokens: int, progress: Progress) -> list[Completion]:
        """The base's greedy answers of at most so many tokens, the end-of-turn token included."""
        replies = self.reply(conversations, mode, False, progress, max_new_tokens=tokens, greedy=True)
        rows = []
        end = [closing_token(self.tokenizer)]
        for ids, reply in zip(prompts(self.tokenizer, conversations, mode), replies, strict=True):
            # the cache keeps texts, so the ids are made again, in a first evaluation too: both must score the same
            answer = self.tokenizer(reply.text, add_special_tokens=False)["input_ids"]
            rows.append(Completion(input_ids=ids + answer + end * reply.finished, prompt_length=len(ids)))
        return rows

    def divergence(self, rows: Sequence[Completion]) -> list[TokenSums]:
        """How well base and tuned know each completion, and how far tuned is from base on it."""
        with inference(self.model, self.tokenizer):
            return [_divergence(self.model, row["input_ids"], row["prompt_length"]) for row in rows]

    def beginnings(self, conversations: Conversations, mode: str, adapter: bool) -> list[dict[str, float]]:
        """How a reply to each conversation begins: the probability that it is `thinking`, opening a think block which is
        not closed at once, and that it is an `answer` at once, after an empty block too."""
        tags = [THINK_OPEN, "\n\n" + THINK_CLOSE]
        opening, close_at_once = self.tokenizer(tags, add_special_tokens=False)["input_ids"]
        if prompt_opens(self.tokenizer, mode):
            opening = []
        ends = sorted(end_tokens(self.model, self.tokenizer))
        with inference(self.model, self.tokenizer), switched(self.model, adapter):
            return [
                _beginning(self.model, prompt, opening, close_at_once, ends)
                for prompt in prompts(self.tokenizer, conversations, mode)
            ]

    def speed(self, conversations: Conversations, mode: str, limit: int) -> Speed:
        """How fast the tuned model generates here, from a few tokens of as many rows as go together."""
        longest = max(map(len, prompts(self.tokenizer, conversations, mode)))
        rows = min(len(conversations), rows_at_once(self.model, longest + limit, BATCH))
        reply = functools.partial(
            generate, self.model, self.tokenizer, conversations[:rows], mode, seed=self.seed, batch_size=rows
        )
        with plain_on_cpu(self.model, merge=True):
            # first kernels are compiled
            reply(max_new_tokens=2)
            started = busy_seconds(self.model)
            replies = reply(max_new_tokens=SPEED_TOKENS)
            seconds = busy_seconds(self.model) - started
        steps = max(reply.reasoning_tokens + reply.answer_tokens for reply in replies) + 1
        return Speed(rows, seconds / steps)


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
    row = torch.tensor(ids, device=model.device)
    sums = torch.zeros(5, dtype=torch.float64)
    for start in range(prompt_length, len(ids), part):
        targets = row[start : start + part]
        logits = []
        for adapter in (False, True):
            with switched(model, adapter):
                logits.append(_logits(model, row[: start + len(targets)], len(targets)))
        for base, tuned, target in zip(*(x.split(CHUNK) for x in (*logits, targets)), strict=True):
            sums += _token_sums(base, tuned, target).double().cpu()
    base, tuned, kl, base_hits, tuned_hits = sums.tolist()
    return TokenSums(
        tokens=len(ids) - prompt_length, base=base, tuned=tuned, kl=kl, base_hits=base_hits, tuned_hits=tuned_hits
    )


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
    model: "PreTrainedModel", prompt: list[int], opening: list[int], close_at_once: list[int], ends: list[int]
) -> dict[str, float]:
    """From one pass over the prompt and an empty think block. An end-of-turn token at once is neither."""
    import torch

    # every probability below is of one token after those before it: one pass gives all
    forced = torch.tensor(opening + close_at_once, device=model.device)
    row = torch.cat([torch.tensor(prompt, device=model.device), forced])
    log_probs = _logits(model, row, len(forced)).float().log_softmax(-1)
    token = log_probs.gather(-1, forced[:, None])[:, 0].double()
    opens = float(token[: len(opening)].sum().exp())
    empty = float(token[len(opening) :].sum().exp())
    silent = float(log_probs[0, ends].exp().sum()) if opening else 0.0
    return {"thinking": opens * (1 - empty), "answer": max(0.0, 1 - opens - silent) + opens * empty}


def _logits(model: "PreTrainedModel", row: "torch.Tensor", count: int) -> "torch.Tensor":
    """Logits (count × vocabulary) of the last tokens of a row; the one at position p - 1 judges token p."""
    # no labels: with them Unsloth's fused loss returns no logits
    return model(input_ids=row[None, :-1], use_cache=False, logits_to_keep=count).logits[0, -count:]
