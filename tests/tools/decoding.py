"""Are batched replies those of plain transformers, token for token, and how long does a token take?

python -m tests.tools.decoding [MODEL] [ROWS] [NEW_TOKENS]

MODEL is a folder or a Hub name (default: pocket), loaded as a training loads it, with an adapter that changes something.
The other side is transformers and PEFT without Unsloth, one prompt after the other without padding, in a process of its
own. Both are greedy. Ends with 1 where float32 tokens differ; in 16 bits a near tie may turn, which is shown.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from toolkit.files import POCKET, ROOT

MODELS = ("base", "tuned")
QUESTIONS = (
    "What is 12 + 30?",
    "Hi",
    "Give the opposite of the word cold, and then one more word that rhymes with it.",
)
Replies = dict[str, list[list[int]]]
"""{"base" or "tuned": new tokens of each prompt, the end-of-turn token left out}."""


def batched(name: str, rows: int, new_tokens: int, folder: Path) -> tuple[Replies, dict[str, float]]:
    """(replies, seconds by model) of the toolkit's decoding; adapter and questions stay in the folder."""
    import torch

    from toolkit import recipe
    from toolkit.evaluation import decode
    from toolkit.evaluation.generate import end_tokens, inference, modes_of, plain_on_cpu, prompts, switched
    from toolkit.training import model as models

    plan = recipe.load("pocket", [f"model.model_name={name}", "model.max_seq_length=2048"])
    model, tokenizer = models.load_base(plan.model)
    model = models.attach(model, plan.lora, seed=1)
    torch.manual_seed(0)
    for key, weight in model.named_parameters():
        if "lora_B" in key:
            weight.data.normal_(0, 0.1)
    model.save_pretrained(folder / "adapter")
    texts = [QUESTIONS[i % len(QUESTIONS)] + " Please." * (i // len(QUESTIONS)) for i in range(rows)]
    ids = prompts(tokenizer, [[{"role": "user", "content": text}] for text in texts], modes_of(tokenizer)[0])
    pad, ends = tokenizer.pad_token_id or tokenizer.eos_token_id, end_tokens(model, tokenizer)
    replies, seconds = {}, {}
    for side in MODELS:
        tuned = side == "tuned"
        with switched(model, tuned), plain_on_cpu(model, merge=tuned), inference(model, tokenizer):
            # the first tokens compile kernels
            for tokens in (2, new_tokens):
                batch = [decode.Row(number, prompt, tokens) for number, prompt in enumerate(ids)]
                with timed(seconds, side):
                    decode.continue_rows(model, pad, batch, tokens, ends, None, 1)
        replies[side] = [row.new for row in batch]
    config = getattr(model.config, "quantization_config", None)
    asked = {
        "base": str(POCKET) if name == "pocket" else name,
        "prompts": ids,
        "ends": sorted(ends),
        "pad": pad,
        "new_tokens": new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": config.to_dict() if hasattr(config, "to_dict") else config,
        "device": str(model.device),
    }
    (folder / "asked.json").write_text(json.dumps(asked, default=str), encoding="utf-8")
    return replies, seconds


def plain(folder: Path) -> tuple[Replies, dict[str, float]]:
    """The same prompts answered by transformers and PEFT, each by itself."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    options: dict[str, Any] = {"dtype": getattr(torch, asked["dtype"]), "device_map": asked["device"]}
    if asked["quantization"]:
        options["quantization_config"] = BitsAndBytesConfig.from_dict(asked["quantization"])
    base = AutoModelForCausalLM.from_pretrained(asked["base"], **options)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    replies: Replies = {}
    seconds: dict[str, float] = {}
    for side in MODELS:
        with contextlib.nullcontext() if side == "tuned" else model.disable_adapter(), timed(seconds, side):
            replies[side] = plain_replies(model, asked["prompts"], asked["ends"], asked["pad"], asked["new_tokens"])
    return replies, seconds


def plain_replies(
    model: Any, prompts: Sequence[Sequence[int]], ends: Sequence[int], pad: int, new_tokens: int
) -> list[list[int]]:
    """Greedy new tokens of each prompt by itself, the end-of-turn token left out."""
    import torch

    replies = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        with torch.no_grad():
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                repetition_penalty=1.0, eos_token_id=list(ends), pad_token_id=pad,
            )  # fmt: skip
        replies.append([token for token in output[0, len(prompt) :].tolist() if token not in ends])
    return replies


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Write down how long the body takes: CPU seconds, or seconds of the clock where a card works."""
    import torch

    card = torch.cuda.is_available()
    clock = time.perf_counter if card else time.process_time
    began = clock()
    yield
    if card:
        torch.cuda.synchronize()
    seconds[name] = clock() - began


def first_differences(one: Replies, other: Replies) -> list[str]:
    """`tuned, prompt 3: token 17 differs`, for each reply that is not the same."""
    lines = []
    for side in MODELS:
        for number, (ours, theirs) in enumerate(zip(one[side], other[side], strict=True)):
            if ours != theirs:
                pairs = zip(ours, theirs, strict=False)
                place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
                lines.append(f"{side}, prompt {number}: token {place} differs")
    return lines


def main(name: str = "pocket", rows: str = "12", new_tokens: str = "48") -> int:
    """Print equality and times; 1 where float32 tokens differ."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ours, our_seconds = batched(name, int(rows), int(new_tokens), folder)
        command = [sys.executable, "-m", "tests.tools.decoding", "plain", place]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        theirs, their_seconds = json.loads(done.stdout.splitlines()[-1])
        asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    if ours["base"] == ours["tuned"]:
        sys.exit(
            "the adapter changes no reply, so half of the comparison says nothing: make it larger, or the replies longer"
        )
    differences = first_differences(ours, theirs)
    count = 2 * int(rows)
    layers = "4-bit" if asked["quantization"] else "plain"
    print(f"{name}: {layers} layers, {asked['dtype']} on {asked['device']}, {rows} rows, up to {new_tokens} new tokens")
    print(
        f"the same tokens as plain transformers: {count - len(differences)} of {count} replies",
        *differences,
        sep="\n  ",
    )
    for side in MODELS:
        tokens = sum(len(new) + 1 for new in ours[side])
        one, other = (1000 * seconds[side] / tokens for seconds in (our_seconds, their_seconds))
        print(f"{side:6} {one:8.2f} ms a token batched, {other:8.2f} ms plain, one prompt at a time ({tokens} tokens)")
    return int(bool(differences) and asked["dtype"] == "float32")


if __name__ == "__main__":
    if sys.argv[1:2] == ["plain"]:
        print("\n" + json.dumps(plain(Path(sys.argv[2]))), flush=True)
    else:
        sys.exit(main(*sys.argv[1:]))
