"""The ways from raw JSONL to ids and labels that the data-stage benchmark compares, each run in a process of its own.

python -m tests.tools.bench.mix_ways ours WORK      # WORK holds math.jsonl, chat.jsonl, qwen3/, bench.yaml; prints one JSON line
"""

import json
import os
import random
import re
import resource
import sys
import time
from pathlib import Path

MAX_LENGTH, SAMPLE, SEED = 4096, 200, 3407
OTHER_PYTHON = {"llamafactory": "LLAMAFACTORY_PYTHON"}
"""Ways that do not install beside us, and the variable that names the interpreter of an environment with them."""
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


class Clock:
    """Seconds since a way had imported its libraries."""

    def __init__(self):
        self.begun = time.perf_counter(), time.process_time()

    def read(self) -> dict:
        return {
            "after_imports_s": time.perf_counter() - self.begun[0],
            "after_imports_cpu_s": time.process_time() - self.begun[1],
        }


def ours(work: Path) -> dict:
    """`compile_mix` from the raw files to the compiled, cached mix; then anew, with the tokenizers in memory."""
    from toolkit import recipe
    from toolkit.data import mix

    imports(work)
    clock, loaded = Clock(), recipe.load(work / "bench.yaml")
    mixed = mix.compile_mix(loaded, fresh=True)
    return {"rows": len(mixed.train), "folder": str(mixed.folder), **clock.read()}


def warm(work: Path) -> dict:
    """The same in a process that has its tokenizers in memory, as the floor has."""
    from toolkit import recipe
    from toolkit.data import mix

    loaded = recipe.load(work / "bench.yaml")
    mix.compile_mix(loaded, fresh=True)
    clock = Clock()
    rows = len(mix.compile_mix(loaded, fresh=True).train)
    return {"rows": rows, **clock.read()}


def again(work: Path) -> dict:
    """The second call: read from the cache."""
    from toolkit import recipe
    from toolkit.data import mix

    clock = Clock()
    rows = len(mix.compile_mix(recipe.load(work / "bench.yaml")).train)
    return {"rows": rows, **clock.read()}


def imports(work: Path) -> dict:  # noqa: ARG001 - every way takes the folder
    """The interpreter with what `ours` imports: what memory is counted above."""
    import fastokens  # noqa: F401
    import rensa  # noqa: F401
    import tokenizers  # noqa: F401

    from toolkit.data import mix  # noqa: F401

    return {"rows": 0}


def floor(work: Path) -> dict:
    """Bare batch tokenization of rendered rows by the Hugging Face tokenizer; only that call is timed."""
    import tokenizers

    texts = json.loads((work / "rendered.json").read_text(encoding="utf-8"))
    tokenizer = tokenizers.Tokenizer.from_file(str(work / "qwen3" / "tokenizer.json"))
    clock = Clock()
    found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    took = clock.read()
    return {"rows": len(found), "tokens": sum(len(e.ids) for e in found), **took}


def raw(work: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (work / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def messages(work: Path) -> list[list[dict]]:
    """All rows as role/content messages, reasoning left inside its tags: what TRL's documents ask for."""
    traces = [
        [{"role": "user", "content": r["problem"]}, {"role": "assistant", "content": r["generated_solution"]}]
        for r in raw(work, "math")
    ]
    chats = [[{"role": ROLES[t["from"]], "content": t["value"]} for t in r["conversations"]] for r in raw(work, "chat")]
    return traces + chats


def tokenizer_and_model(work: Path):
    """The real tokenizer and a random Qwen3 too small to cost time: preparation of data is what is measured."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(work / "qwen3")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(
        vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=32, tie_word_embeddings=True, **sizes
    )
    model = Qwen3ForCausalLM(config)
    model.config._name_or_path = str(work / "qwen3")
    return tokenizer, model


def trainer(work: Path, dataset, **settings):
    """TRL's SFTTrainer, as far as its constructor goes: it prepares the data there."""
    from trl import SFTConfig, SFTTrainer

    tokenizer, model = tokenizer_and_model(work)
    config = SFTConfig(
        output_dir=str(work / "trainer"),
        max_length=MAX_LENGTH,
        dataset_num_proc=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        **settings,
    )
    return SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)


def trl(work: Path) -> dict:
    """TRL's own preparation with assistant_only_loss."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # noqa: F401 - imported before the clock starts

    clock = Clock()
    made = trainer(work, Dataset.from_dict({"messages": messages(work)}), assistant_only_loss=True)
    return clock.read() | collated(made, work / "trl.json")


def notebook(work: Path, responses_only: bool = False) -> dict:
    """The reference notebook's way, told in our words: standardize, render to text, join with pandas, SFTTrainer."""
    import unsloth  # noqa: F401, I001 - before transformers, as it asks to be
    from unsloth.chat_templates import standardize_sharegpt, train_on_responses_only
    import pandas as pd
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # noqa: F401 - imported before the clock starts

    clock = Clock()
    tokenizer, _ = tokenizer_and_model(work)
    traces = [m for m in messages(work) if "<think>" in m[-1]["content"]]
    chats = standardize_sharegpt(Dataset.from_list(raw(work, "chat")))
    texts = [
        *tokenizer.apply_chat_template(traces, tokenize=False),
        *tokenizer.apply_chat_template(list(chats["conversations"]), tokenize=False),
    ]
    joined = Dataset.from_pandas(pd.DataFrame({"text": pd.Series(texts)})).shuffle(seed=SEED)
    made = trainer(work, joined, dataset_text_field="text")
    if responses_only:
        markers = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
        made = train_on_responses_only(made, **markers, num_proc=2)
    return clock.read() | collated(made, work / ("responses_only.json" if responses_only else "notebook.json"))


def responses_only(work: Path) -> dict:
    """The same with Unsloth's train_on_responses_only."""
    return notebook(work, responses_only=True)


def llamafactory(work: Path) -> dict:
    """LLaMA-Factory's `get_dataset`, its own way from files to ids and labels, with two workers."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    clock = Clock()
    sharegpt = {"file_name": "chat.jsonl", "formatting": "sharegpt"}
    alpaca = {"file_name": "math.jsonl", "columns": {"prompt": "problem", "response": "generated_solution"}}
    (work / "dataset_info.json").write_text(json.dumps({"math": alpaca, "chat": sharegpt}))
    settings = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(work / "qwen3"),
        "dataset_dir": str(work),
        "dataset": "math,chat",
        "template": "qwen3",
        "cutoff_len": MAX_LENGTH,
        "preprocessing_num_workers": 2,
        "output_dir": str(work / "trainer"),
        "overwrite_cache": True,
        "use_cpu": True,
    }
    model, data, training, _, _ = get_train_args(settings)
    tokens = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(tokens["tokenizer"], data)
    dataset = get_dataset(template, model, data, training, stage="sft", **tokens)["train_dataset"]
    took = clock.read()
    picked = dataset.select(random.Random(SEED).sample(range(len(dataset)), SAMPLE))
    (work / "llamafactory.json").write_text(json.dumps([[r["input_ids"], r["labels"]] for r in picked]))
    return {"rows": len(dataset), **took}


def collated(made, file: Path) -> dict:
    """Ids and labels of a random sample, as the trainer's own collator hands them to the model."""
    dataset = made.train_dataset
    picked = random.Random(SEED).sample(range(len(dataset)), min(SAMPLE, len(dataset)))
    names = [n for n in ("input_ids", "attention_mask", "labels", "assistant_masks") if n in dataset.column_names]
    rows = []
    for row in dataset.select_columns(names).select(picked):
        batch = made.data_collator([row])
        rows.append([batch["input_ids"][0].tolist(), batch["labels"][0].tolist()])
    file.write_text(json.dumps(rows))
    return {"rows": len(dataset)}


WAYS = {f.__name__: f for f in (ours, warm, again, imports, floor, trl, notebook, responses_only, llamafactory)}


def python_for(way: str) -> str | None:
    """The interpreter a way runs in; None where it is not there."""
    return os.environ.get(OTHER_PYTHON[way]) if way in OTHER_PYTHON else sys.executable


def run(way: str, work: Path) -> dict:
    """One way in a cold process: its JSON line with wall and CPU seconds and peak memory (of the largest process)."""
    python = python_for(way)
    command = [python, "-m", "tests.tools.bench.mix_ways", way, str(work)]
    threads = {"RAYON_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true", "TOOLKIT_OUTPUTS": str(work / "outputs")}
    cold = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf" / f"{way}{time.time_ns()}")}
    log = work / f"{way}.log"
    begun = time.perf_counter()
    actions = [(os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)]
    actions.append((os.POSIX_SPAWN_OPEN, 2, str(work / f"{way}.err"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644))
    pid = os.posix_spawn(python, command, cold, file_actions=actions)
    _, status, used = os.wait4(pid, 0)
    wall = time.perf_counter() - begun
    if status:
        raise SystemExit(f"{way} failed:\n{(work / f'{way}.err').read_text()[-3000:]}")
    line = json.loads(log.read_text().splitlines()[-1])
    measured = {"wall_s": wall, "cpu_s": used.ru_utime + used.ru_stime}
    return {**measured, **line, "load": os.getloadavg()[0]}


if __name__ == "__main__":
    done = WAYS[sys.argv[1]](Path(sys.argv[2]))
    # Not wait4's number: that one starts from what the process was forked off.
    peak = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    done["peak_mb"] = max(peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024
    print("\n" + json.dumps(done), flush=True)
