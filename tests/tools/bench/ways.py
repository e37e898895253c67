"""Three ways to train the same rows, each in a process of its own: ours, the reference notebook's, TRL without Unsloth.

ways.run(ways.Job("ours", work="/tmp/work", size="4B"))     # {"seconds": …, "tokens": …, "peak_reserved": …} or {"failed": …}

ours      `toolkit.training.trainer` with a recipe, `hybrid` unless told otherwise
notebook  Unsloth as `data_recipes/unsloth_reference.yaml` sets it: text rows, every token a label
trl       transformers' BitsAndBytesConfig + PEFT + TRL with the recipe's values and plain gradient checkpointing
All load the same random NF4 weights and see the same rows in the same order: a hybrid mix, 75% of its supervised tokens
reasoning, none longer than max_length. Rows and accumulation make one effective batch, the recipe's. Tokens are counted
without padding, supervised tokens by the label rule whatever a way makes of them. The two longest rows come first, so
that every way meets its largest batch. Steps of the warm-up (compilation, allocator) are not timed.
"""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit.data import mix
from toolkit.files import ROOT, read_json
from toolkit.machine import fit
from toolkit.recipe import Recipe, load

REFERENCE = "data_recipes/unsloth_reference.yaml"
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
SEED = 3407
LENGTHS = {"thinking": (2500, 0.73), "non_thinking": (250, 0.75)}
"""Median and log-deviation in tokens: OpenMathReasoning and FineTome, as in tests/tools/bench/mix_rows.py."""


@dataclass(frozen=True)
class Job:
    """What one process does: `weights`, `rate`, or one of WAYS."""

    way: str
    work: str
    """A folder that the jobs of one size share."""
    size: str = ""
    """A size as `fit` knows it (`4B`), or a config.json."""
    recipe: str = "data_recipes/hybrid.yaml"
    max_length: int = 2048
    steps: int = 16
    warm_up: int = 6
    cap: int = 0
    """Bytes that torch may reserve on the GPU; then all rows are of max_length and validation runs too. 0: no cap."""

    @property
    def model(self) -> Path:
        return Path(self.work) / "model"


def run(job: Job) -> dict:
    """The job's result, or {"failed": reason}."""
    command = [sys.executable, "-m", "tests.tools.bench.ways", json.dumps(dataclasses.asdict(job))]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOOLKIT_OUTPUTS": job.work}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        return {"failed": f"the process ended with {done.returncode}: {done.stderr[-500:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def recipe(job: Job, path: str) -> Recipe:
    """A recipe on this job's model and rows; the effective batch is always the one of `job.recipe`."""
    batch = load(job.recipe).train
    changes = {
        "model.model_name": job.model,
        "model.max_seq_length": job.max_length,
        "evaluate.prompts": "[]",
        "train.max_steps": job.steps,
        "train.train_sampling_strategy": "sequential",
        "train.eval_strategy": "steps" if job.cap else "no",
        "train.eval_steps": job.steps,
        "train.load_best_model_at_end": "false",
        "train.report_to": "none",
    } | {f"train.{name}": batch[name] for name in BATCH}
    return load(path, [f"{key}={value}" for key, value in changes.items()])


def rows(tokenizer, count: int, max_length: int, full: bool = False) -> list[mix.Row]:
    """Seeded rows of words that are one token each; the two longest first. `full`: all of max_length."""
    random = np.random.default_rng(SEED)
    words = [i for piece, i in sorted(tokenizer.get_vocab().items()) if re.fullmatch("Ġ[a-z]{2,}", piece)]
    made, supervised = [], {"thinking": 0, "non_thinking": 0}
    for number in range(count):
        mode = "thinking" if supervised["thinking"] <= 3 * supervised["non_thinking"] else "non_thinking"
        median, spread = LENGTHS[mode]
        prompt = min(int(random.integers(40, 160)), max_length // 2)
        completion = max_length if full else 20 + int(random.lognormal(np.log(median), spread))
        completion = min(completion, max_length - prompt)
        supervised[mode] += completion
        made.append(mix.Row(random.choice(words, prompt + completion), prompt, "bench", mode, number))
    longest = sorted(made, key=lambda row: -len(row.ids))[:2]
    return longest + [row for row in made if row not in longest]


def flops(shape: fit.Shape, lengths: list[int], lora: int) -> int:
    """FLOPs the model needs to train rows of these lengths, `lora` trained parameters beside the frozen ones.

    A token and weight: 6 (PaLM, arXiv:2204.02311, appendix B), but 4 where the weight is frozen and needs no gradient of
    its own. Attention: 12 x layers x heads x head_dim x length^2 a row there, half of it as it is causal (arXiv:2307.08691,
    section 4.1). Embeddings are looked up, the head multiplies. What checkpointing computes twice counts once.
    """
    frozen = shape.linear_parameters + shape.vocab_size * shape.hidden_size
    attention = 6 * shape.num_hidden_layers * shape.q_dim * sum(n * n for n in lengths)
    return (4 * frozen + 6 * lora) * sum(lengths) + attention


# --- in the job's process --------------------------------------------------------------------------------------------


def weights(job: Job) -> dict:
    """Write the random model, every linear layer in 4-bit: Unsloth's dynamic checkpoints keep some in 16-bit."""
    from tests.tools.bench import weights

    weights.write(job.model, weights.CONFIGS.get(job.size) or json.loads((ROOT / job.size).read_text(encoding="utf-8")))
    return {}


def rate(job: Job) -> dict:  # noqa: ARG001 - every job's function takes it
    """16-bit matrix rate in FLOP/s: the median of 20 square products; and what it was measured on."""
    import torch

    from tests.tools.bench.start import processor

    cuda = torch.cuda.is_available()
    n, device = (8192, "cuda") if cuda else (512, "cpu")
    a, b = torch.randn(2, n, n, device=device, dtype=_half())
    seconds = []
    for _ in range(25):
        _wait()
        began = time.perf_counter()
        a @ b
        _wait()
        seconds.append(time.perf_counter() - began)
    gpu = torch.cuda.get_device_properties(0) if cuda else None
    hardware = {"name": gpu.name, "memory_bytes": gpu.total_memory} if gpu else {"name": processor()}
    return {"flops_per_second": 2 * n**3 / float(np.median(seconds[5:])), "dtype": str(a.dtype), "hardware": hardware}


def ours(job: Job) -> dict:
    """`toolkit.training.trainer` as `run.train` calls it."""
    import torch
    from rich.console import Console

    from toolkit.training import model as models
    from toolkit.training import trainer as train

    models.unsloth()  # sets up the allocator, so it comes before the first touch of the GPU
    from toolkit.training.record import RunRecorder

    if job.cap:
        torch.cuda.set_per_process_memory_fraction(job.cap / torch.cuda.get_device_properties(0).total_memory)
    plan = recipe(job, job.recipe)
    model, tokenizer = models.load_base(plan.model)
    model = models.attach(model, plan.lora, seed=plan.data.seed)
    drawn = rows(tokenizer, _count(job, plan), job.max_length, bool(job.cap))
    held = drawn[:1] * plan.train["per_device_eval_batch_size"] if job.cap else []
    folder = Path(tempfile.mkdtemp(dir=job.work))
    report = {"achieved": {plan.data.unit: {"bench": 1.0}}, "fingerprints": {}}
    ends, out = _stopwatch(), folder / "run"
    out.mkdir()
    console, mixed = Console(quiet=True), mix.Mix(drawn, held, report, [], folder)
    recorder = functools.partial(RunRecorder, mixed=mixed, console=console, folder=out)
    train.train(plan, mixed, model, tokenizer, recorder, console)
    manifest = read_json(out / "manifest.json")
    used = {key: manifest[key] for key in ("batch", "packing", "padding_free")}
    return _result(job, plan, drawn, ends, fit.settings(plan, len(drawn[0].ids))) | used


def notebook(job: Job) -> dict:
    """The reference notebook's calls, told in our words."""
    from toolkit.training.model import unsloth

    fast = unsloth()
    import datasets

    plan = recipe(job, REFERENCE)
    model, tokenizer = fast.from_pretrained(str(job.model), max_seq_length=job.max_length, load_in_4bit=True)
    adapter = {"r": plan.lora.r, "lora_alpha": plan.lora.lora_alpha, "lora_dropout": 0, "bias": "none"}
    options = {"use_gradient_checkpointing": "unsloth", "random_state": SEED, "use_rslora": False}
    model = fast.get_peft_model(model, target_modules=list(plan.lora.target_modules), **adapter, **options)
    drawn = rows(tokenizer, _count(job, plan), job.max_length)
    texts = datasets.Dataset.from_dict({"text": tokenizer.batch_decode([row.ids for row in drawn])})
    trainer, ends = _trainer(job, plan, model, tokenizer, texts, dataset_text_field="text")
    return _result(job, plan, drawn, ends, fit.settings(plan, len(drawn[0].ids))) | _used(trainer)


def trl(job: Job) -> dict:
    """Without Unsloth: the checkpoint's own BitsAndBytesConfig, PEFT's LoRA, TRL's trainer."""
    import datasets
    import peft
    import torch
    import transformers

    plan = recipe(job, job.recipe)
    cuda, half = torch.cuda.is_available(), _half()
    device = {"device_map": {"": 0}} if cuda else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=half, **device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    targets, r, alpha = list(plan.lora.target_modules), plan.lora.r, plan.lora.lora_alpha
    adapter = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    drawn = rows(tokenizer, _count(job, plan), job.max_length)
    masks = [(np.arange(len(row.ids)) >= row.prompt_length).astype(int) for row in drawn]
    data = datasets.Dataset.from_dict({"input_ids": [row.ids for row in drawn], "completion_mask": masks})
    kind = {"bf16": cuda and half == torch.bfloat16, "fp16": cuda and half == torch.float16}
    options = {"max_length": job.max_length, "gradient_checkpointing": True, "completion_only_loss": True}
    trainer, ends = _trainer(job, plan, model, tokenizer, data, adapter, **kind, **options)
    settings = dataclasses.replace(fit.settings(plan, len(drawn[0].ids)), use_gradient_checkpointing=True)
    return _result(job, plan, drawn, ends, settings) | _used(trainer)


WAYS = {"ours": ours, "notebook": notebook, "trl": trl}
JOBS = WAYS | {"weights": weights, "rate": rate}


def _count(job: Job, plan: Recipe) -> int:
    return job.steps * plan.train[BATCH[0]] * plan.train[BATCH[1]]


def _trainer(job: Job, plan: Recipe, model, tokenizer, data, adapter=None, **more):
    """A plain SFTTrainer with the recipe's values, trained; and when its steps ended."""
    import trl

    names = (*BATCH, "learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "optim", "weight_decay")
    fixed = {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": SEED, "disable_tqdm": True}
    values = {name: plan.train[name] for name in (*names, "train_sampling_strategy")} | fixed | more
    ends = _stopwatch()
    config = trl.SFTConfig(output_dir=tempfile.mkdtemp(dir=job.work), **values)
    peft = {"peft_config": adapter} if adapter else {}
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, **peft)
    trainer.train()
    return trainer, ends


def _half():
    """bfloat16, or float16 on cards without it."""
    import torch

    from toolkit.training.model import has_bf16

    return torch.bfloat16 if not torch.cuda.is_available() or has_bf16() else torch.float16


def _used(trainer) -> dict:
    batch = {name: getattr(trainer.args, name) for name in BATCH}
    return {"batch": batch, "packing": bool(trainer.args.packing), "padding_free": bool(trainer.args.padding_free)}


def _stopwatch() -> list[float]:
    """Clock times at the beginning and after every step, filled in by any trainer that is made from here on."""
    from transformers import TrainerCallback, trainer

    ends = []

    class Stopwatch(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):  # noqa: ARG002 - the signature is transformers'
            ends[:] = [time.perf_counter()]

        def on_step_end(self, *args, **kwargs):  # noqa: ARG002 - as above
            _wait()
            ends.append(time.perf_counter())

    trainer.DEFAULT_CALLBACKS.append(Stopwatch())
    return ends


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _result(job: Job, plan: Recipe, drawn: list[mix.Row], ends: list[float], settings: fit.Settings) -> dict:
    """What is kept of a run: its steps' seconds, and tokens, FLOPs and seconds of those after the warm-up."""
    from toolkit.training.counts import peak_memory

    steps = np.diff(ends).tolist()
    timed = drawn[job.warm_up * (len(drawn) // job.steps) :]
    shape = fit.shape(str(job.model))
    lora = sum(fit.lora_tensors(shape, plan.lora.r, plan.lora.target_modules))
    return {
        "step_seconds": [round(s, 4) for s in steps],
        "seconds": sum(steps[job.warm_up :]),
        "tokens": sum(len(row.ids) for row in timed),
        "supervised_tokens": sum(row.size("supervised_tokens") for row in timed),
        "flops": flops(shape, [len(row.ids) for row in timed], lora),
        "peak_reserved": peak_memory(),
        "forecast": fit.forecast(settings, shape).reserved(),
    }


if __name__ == "__main__":
    job = Job(**json.loads(sys.argv[1]))
    try:
        result = JOBS[job.way](job)
    except Exception as error:  # whatever it is, it is this way's result
        result = {"failed": f"{type(error).__name__}: {error}"[:500]}
    print("\n" + json.dumps(result), flush=True)
