"""Tokens a second of replies on a 4-bit model: how many rows at once, with CUDA graphs and without, and whether they agree.

python -m tests.gpu.decode /tmp/4B/model outputs/gpu/decode.json 160
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.tools.bench.start import processor
from toolkit import recipe
from toolkit.evaluation import decode
from toolkit.evaluation.generate import inference
from toolkit.files import write_json
from toolkit.training import model as models
from toolkit.training.folder import commit

BATCHES = ((32, "1"), (32, "0"), (4, "1"), (4, "0"), (1, "1"), (1, "0"))
"""Rows at once, and whether the decode step is replayed as a graph."""
WARM_UP = 8
"""New tokens of a first reply, in which kernels are compiled and graphs captured."""


def replies(model: Any, tokenizer: Any, count: int, new_tokens: int) -> list[list[int]]:
    """Greedy replies of exactly so many tokens to prompts of different lengths."""
    texts = ["What is 12 + 30? " * (3 + number % 5) for number in range(count)]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    rows = [decode.Row(number, ids, new_tokens) for number, ids in enumerate(prompts)]
    with inference(model, tokenizer):
        # without tokens that end a reply
        decode.continue_rows(model, tokenizer.pad_token_id, rows, new_tokens, {tokenizer.vocab_size + 1}, None, 1)
    return [row.new for row in rows]


def measured(
    model: Any, tokenizer: Any, rows: int, graphs: str, new_tokens: int
) -> tuple[dict[str, Any], list[list[int]]]:
    """(seconds and tokens a second of one batch, its tokens)."""
    import torch

    os.environ[decode.GRAPHS] = graphs
    replies(model, tokenizer, rows, WARM_UP)
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    tokens = replies(model, tokenizer, rows, new_tokens)
    wait()
    seconds = time.perf_counter() - began
    rate = {
        "tokens_per_second": round(rows * new_tokens / seconds, 1),
        "ms_per_step": round(1000 * seconds / new_tokens, 2),
    }
    return {"rows": rows, "graphs": graphs == "1", "seconds": round(seconds, 2)} | rate, tokens


def main(folder: str, file: Path, new_tokens: int) -> None:
    """Measure every batch; the file is written after each."""
    models.unsloth()
    import torch

    plan = recipe.load("pocket", [f"model.model_name={folder}", "model.max_seq_length=2048"])
    model, tokenizer = models.load_base(plan.model)
    model = models.attach(model, plan.lora, seed=1)
    hardware = torch.cuda.get_device_name(0) if torch.cuda.is_available() else processor()
    record = {"hardware": hardware, "date": time.strftime("%Y-%m-%d"), "commit": commit(), "new_tokens": new_tokens}
    results: list[dict[str, Any]] = []
    first: dict[int, list[list[int]]] = {}
    for rows, graphs in BATCHES:
        try:
            result, tokens = measured(model, tokenizer, rows, graphs, new_tokens)
            result["same_tokens"] = first.setdefault(rows, tokens) == tokens
        except RuntimeError as error:  # out of memory, or a graph that cannot be captured: that is a result
            result = {"rows": rows, "graphs": graphs == "1", "failed": str(error)[:300]}
        results.append(result)
        print(result, flush=True)
        write_json(file, record | {"batches": results})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
