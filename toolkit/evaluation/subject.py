"""What evaluation asks of a model: replies, and how far tuned is from base.

subject = LoadedRun(model, tokenizer, cache=Path("outputs/.base_replies"))
subject.divergence([{"input_ids": [1, 2, 3, 4], "prompt_length": 2}])
"""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from toolkit.evaluation.generate import (
    Reply,
    closing_token,
    end_tokens,
    free_memory,
    generate,
    inference,
    modes_of,
    prompts,
    sampling_values,
    switched,
)
from toolkit.evaluation.questions import fingerprint
from toolkit.files import ToolkitError, read_json, write_json
from toolkit.recipe import INITS

LOGITS = 1 << 28
"""Logits held at a time (512 MB in 16 bits, twice: base and tuned); a row with more is read again for each part."""
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
    """Folder of the base's replies: one base asked one question set is asked once, in all runs and sweeps."""
    seed: int = 3407
    max_new_tokens: int = 1024
    batch_size: int = 32

    def __post_init__(self):
        if not hasattr(self.model, "disable_adapter"):
            raise ToolkitError("evaluation needs a PeftModel: its base is the model with the adapter switched off")
        init = self.model.peft_config[self.model.active_adapter].init_lora_weights
        if init not in INITS:
            raise ToolkitError(
                f"the adapter was made with init_lora_weights={init!r}: without it the model is not the base"
            )
        self.modes = modes_of(self.tokenizer)
        self.weights = checksum(self.model)

    def reply(self, conversations: list[list[dict]], mode: str, adapter: bool, progress, **settings) -> list[Reply]:
        """A reply to each conversation; the base's are kept for the next evaluation. `progress` is a toolkit.view.progress."""
        settings = {"max_new_tokens": self.max_new_tokens, "seed": self.seed, "greedy": False} | settings
        # only the base's are kept: tuned replies belong to one run and are asked once
        file = None if adapter else self.cache / f"{self.key(conversations, mode, settings)}.json"
        if file and (known := stored(file)):
            progress.skip(len(known))
            return known
        with switched(self.model, adapter):
            settings |= {"batch_size": self.batch_size, "progress": progress.advance}
            replies = generate(self.model, self.tokenizer, conversations, mode, **settings)
        if file:
            rows = [asdict(reply) for reply in replies]
            write_json(file, {"fingerprint": fingerprint(rows), "replies": rows})
        return replies

    def key(self, conversations: list[list[dict]], mode: str, settings: dict) -> str:
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

    def own(self, conversations: list[list[dict]], mode: str, tokens: int, progress) -> list[dict]:
        """The base's greedy answers as rows {"input_ids", "prompt_length"}, the end-of-turn token included."""
        asked = prompts(self.tokenizer, conversations, mode)[1]
        replies = self.reply(conversations, mode, False, progress, max_new_tokens=tokens, greedy=True)
        rows, end = [], [closing_token(self.tokenizer)]
        for ids, reply in zip(asked, replies, strict=True):
            # the cache keeps texts, so the ids are made again, in a first evaluation too: both must score the same
            said = self.tokenizer(reply.text, add_special_tokens=False)["input_ids"]
            rows.append({"input_ids": ids + said + end * reply.finished, "prompt_length": len(ids)})
        return rows

    def divergence(self, rows: Sequence[dict]) -> list[dict]:
        """How far tuned is from base on the completions of rows {"input_ids", "prompt_length"}: for each, sums over its
        tokens: {"tokens", "base": NLL in nats, "tuned": NLL, "kl": of tuned from base}."""
        with inference(self.model, self.tokenizer):
            return [_divergence(self.model, row["input_ids"], row["prompt_length"]) for row in rows]


def stored(file: Path) -> list[Reply] | None:
    """The replies in a file of the cache; None where it is missing, damaged or not what its own checksum says."""
    with contextlib.suppress(ToolkitError, KeyError):
        content = read_json(file)
        if content["fingerprint"] == fingerprint(content["replies"]):
            return [Reply(**row) for row in content["replies"]]
    return None


def checksum(model) -> str:
    """Identity of the base's weights as they are loaded, quantization included, whatever adapter is on top: name, type,
    shape and sum of all bytes of each tensor. To hash 8 GB byte by byte would take longer than the questions."""
    import torch

    found = []
    for name, tensor in model.get_base_model().named_parameters():
        if any(part in name for part in ("lora_", ".modules_to_save.", "trainable_tokens")):  # PEFT's own weights
            continue
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        found.append([plain, str(tensor.dtype), list(tensor.shape), int(raw.sum(dtype=torch.int64))])
    return fingerprint(found)


def logits_at_once(free_bytes: float) -> int:
    """LOGITS, or as many as fill half of the free memory."""
    return int(min(LOGITS, free_bytes / 2 / BYTES_PER_LOGIT))


def _divergence(model, ids: list[int], prompt_length: int) -> dict:
    # One row at a time: nothing is padded, and no logits are held for other tokens than the completion's
    import torch

    part = max(CHUNK, logits_at_once(free_memory(model)) // model.config.get_text_config().vocab_size)
    row = torch.tensor([ids], device=model.device)
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(prompt_length, len(ids), part):
        end = min(start + part, len(ids))
        logits = [_logits(model, row[:, : end - 1], end - start, adapter) for adapter in (False, True)]
        parts = (x.split(CHUNK) for x in (*logits, row[0, start:end]))
        for base, tuned, target in zip(*parts, strict=True):
            base, tuned = (x.float().log_softmax(-1) for x in (base, tuned))
            nll = [-x.gather(-1, target[:, None]).sum() for x in (base, tuned)]
            kl = (base.exp() * (base - tuned)).sum()
            sums += torch.stack([*nll, kl]).double().cpu()
    base, tuned, kl = sums.tolist()
    return {"tokens": len(ids) - prompt_length, "base": base, "tuned": tuned, "kl": kl}


def _logits(model, ids, keep: int, adapter: bool):
    # No labels: with them Unsloth's fused loss returns no logits. The one at position p - 1 judges token p.
    with switched(model, adapter):
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0, -keep:]
