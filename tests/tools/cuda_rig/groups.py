"""What is tried on Unsloth's CUDA path: every function returns plain facts, of which the tests make claims.

facts = groups.probe(Path("/tmp/rig"))     # in the process that `python -m tests.tools.cuda_rig` started, nowhere else
"""

import dataclasses
import functools
import os
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from rich.console import Console

from tests.tools.cuda_rig import LAYERS, NEW_TOKENS, PROMPT
from tests.tools.cuda_rig.shim import CALLS, with_card
from toolkit import recipe, run
from toolkit.data import mix
from toolkit.evaluation import decode
from toolkit.evaluation.generate import LONG_PROMPTS, end_tokens, inference, modes_of, prompts, switched
from toolkit.evaluation.watch import Forgetting, answer_prompts
from toolkit.files import POCKET, ToolkitError
from toolkit.training import model as models
from toolkit.training import trainer as train

QUICK = ["name=rig", "train.report_to=none", "train.optim=adamw_torch", "evaluate.max_new_tokens=2",
         'evaluate.prompts=["Hi"]', "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2",
         "train.max_steps=2", "train.logging_steps=1", "train.save_steps=1", "train.eval_steps=1",
         "train.per_device_eval_batch_size=2", "train.lr_scheduler_type=constant"]  # fmt: skip


def use_the_cuda_trainer() -> None:
    """Make Unsloth generate and patch in what it uses on CUDA; for a CPU it leaves TRL's trainer as it is."""
    models.unsloth()
    import unsloth.models.llama
    from unsloth.context_parallel import patch_sft_trainer
    from unsloth.models import rl
    from unsloth.trainer import _patch_trl_trainer

    os.environ["UNSLOTH_ALLOW_CPU"] = "0"
    rl.PatchFastRL()
    _patch_trl_trainer()
    patch_sft_trainer()
    os.environ["UNSLOTH_ALLOW_CPU"] = "1"
    rotary = unsloth.models.llama.LlamaRotaryEmbedding
    plain = torch.nn.Module.__setattr__
    # a list per card, looked up by a device's index, which a CPU does not have
    rotary.__setattr__ = lambda self, name, value: plain(self, name, ByDevice(value) if type(value) is list else value)


class ByDevice(list):
    def __getitem__(self, index):
        return super().__getitem__(0 if index is None else index)

    def __setitem__(self, index, value):
        super().__setitem__(0 if index is None else index, value)


def base(folder: Path) -> Path:
    """The pocket model cut to LAYERS layers."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    if not folder.is_dir():
        shutil.copytree(POCKET, folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"num_hidden_layers": LAYERS, "layer_types": ["full_attention"] * LAYERS}
        (folder / "config.json").write_text(json.dumps(config))
        [file] = folder.glob("*.safetensors")
        kept = {k: v for k, v in load_file(file).items() if ".layers." not in k or int(k.split(".")[2]) < LAYERS}
        save_file(kept, file, {"format": "pt"})
    return folder


def load(plan, folder: Path):
    """That model with LoRA, as on a card."""
    fast = models.unsloth()
    model, tokenizer = fast.from_pretrained(
        str(base(folder / "base")), max_seq_length=plan.model.max_seq_length, load_in_4bit=False, dtype=torch.float32,
        device_map={"": "cpu"},
    )  # fmt: skip
    with with_card():
        return models.attach(model, plan.lora, seed=1), tokenizer


def mixed(folder: Path, lengths=(9, 7, 5)) -> mix.Mix:
    """Rows of so many tokens, of which the first PROMPT are not supervised; one row is held out."""
    draw = np.random.default_rng(3407)
    rows = [mix.Row(draw.integers(20, 900, n), PROMPT, "rig", "thinking", i) for i, n in enumerate(lengths)]
    (folder / "mix.json").write_text("{}")
    (folder / "quarantine.jsonl").write_text("")
    report = {"achieved": {"supervised_tokens": {"rig": 1.0}}, "fingerprints": {}}
    return mix.Mix(rows, rows[-1:], report, [], folder)


def state(model) -> dict:
    """What generating, evaluating and training switch."""
    modules = list(model.modules())
    return {
        "checkpointing": sorted({m.gradient_checkpointing for m in modules if hasattr(m, "gradient_checkpointing")}),
        "training": sorted({m.training for m in modules}),
        "for_generation": any("_flag_for_generation" in vars(m) for m in modules),
        "buffers": any(hasattr(m, "paged_attention") for m in modules),
    }


def checkpointed() -> list:
    """A list that grows by one whenever Unsloth checkpoints a layer."""
    from unsloth_zoo.gradient_checkpointing import UnslothCheckpointFunction

    calls, forward = [], UnslothCheckpointFunction.forward

    def counted(*args):
        calls.append(1)
        return forward(*args)

    UnslothCheckpointFunction.forward = staticmethod(counted)
    return calls


def watched(kind: type) -> list[float]:
    """A list that grows by every loss that trainers of a kind compute."""
    losses, compute = [], kind.compute_loss

    def kept(*args, **kwargs):
        loss = compute(*args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    kind.compute_loss = kept
    return losses


def recorder(plan, rows: mix.Mix, folder: Path):
    """The callback that keeps the rig's run; at each evaluation the base answers, and its divergence is measured."""
    from toolkit.training.record import RunRecorder, Stages

    stages = Stages(forgetting=Forgetting(1, [], folder / "replies", tokens=2))
    return RunRecorder(plan, rows, Console(quiet=True), stages, folder=folder)


def trainer_in(way: str, folder: Path, calls: list) -> tuple[dict, object]:
    """(facts, model) of the trainer in one of three ways over the same rows, with its longest batch tried."""
    changes = {"padding_free": [], "packed": ["train.packing=true"], "padded": ["train.padding_free=false"]}[way]
    plan = recipe.load("pocket", [*QUICK, "train.per_device_train_batch_size=3", *changes])
    model, tokenizer = load(plan, folder)
    rows = mixed(folder)
    trainer = train.build_trainer(plan, rows, model, tokenizer, recorder(plan, rows, folder))
    # the class below the recorder's, which the probe goes past
    data, after_build, losses = trainer.train_dataset, state(model), watched(type(trainer).__bases__[1])
    batch = trainer.data_collator([data[i] for i in range(len(data))])
    calls.clear()
    before = CALLS["reset_peak_memory_stats"]
    with with_card():
        train.run_longest_batch(trainer)
    facts = {
        "arguments": {k: getattr(trainer.args, k) for k in ("packing", "padding_free")},
        "after_build": after_build,
        "probe": state(model) | {"layers": len(calls)},
        "resets": CALLS["reset_peak_memory_stats"] - before,
        "gradients": any(p.grad is not None for p in model.parameters()),
        "columns": sorted(batch),
        "rows": len(data),
        "input_ids": batch["input_ids"].tolist(),
        "labels": batch["labels"].tolist(),
        "position_ids": batch["position_ids"].tolist() if "position_ids" in batch else None,
        "loss": losses[0],
    }
    return facts, model


def probe(folder: Path) -> dict:
    """The trainer as it is by default, and a prompt longer than max_seq_length with and without `inference`."""
    facts, model = trainer_in("padding_free", folder, checkpointed())
    ids = torch.tensor([mixed(folder).train[0].ids.tolist()])
    for module in model.modules():
        if hasattr(module, "max_seq_length"):
            module.max_seq_length = 4
            vars(module).pop(LONG_PROMPTS, None)
    model.eval()
    with torch.no_grad():
        cut = model(input_ids=ids).logits.shape[1]
    with inference(model, SimpleNamespace(padding_side="left")):
        whole = model(input_ids=ids).logits.shape[1]
    return facts | names() | {"prompt": ids.shape[1], "seen_by_itself": cut, "seen_in_inference": whole}


def names() -> dict:
    """What a recipe's Hub name becomes on a card, and what is said about a revision of the other repository."""
    asked = recipe.load("pocket", ["model.model_name=Qwen/Qwen3-4B"])
    with with_card():
        resolved = run.resolve(asked, Console(quiet=True)).model
        exact = models.really_loaded(dataclasses.replace(asked.model, extra={"use_exact_model_name": True}))
        try:
            refused = models.really_loaded(dataclasses.replace(asked.model, revision="abc"))
        except ToolkitError as error:
            refused = str(error)
    return {
        "resolved": resolved.model_name,
        "again": models.really_loaded(resolved),
        "exact": exact,
        "refused": refused,
    }


def ways(folder: Path) -> dict:
    """The trainer in its two other ways."""
    calls = checkpointed()
    return {way: trainer_in(way, folder, calls)[0] for way in ("packed", "padded")}


def training(folder: Path) -> dict:
    """Replies, then two steps with validation in between: what every micro-batch was given, in which state it ran."""
    plan, events, calls = recipe.load("pocket", [*QUICK, "train.per_device_train_batch_size=1"]), [], checkpointed()
    model, tokenizer = load(plan, folder)
    rows, build = mixed(folder, (7, 6, 5, 5)), train.build_trainer

    def traced(name, function):
        def call(*args, **kwargs):
            found, done = {"event": name, "before": state(model)}, len(calls)
            result = function(*args, **kwargs)
            items = kwargs.get("num_items_in_batch", args[2] if name == "step" and len(args) > 2 else None)
            found |= {"after": state(model), "layers": len(calls) - done}
            events.append(found | {"items": None if items is None else int(items)})
            return result

        return call

    def built(*args):
        trainer = build(*args)
        trainer.training_step = traced("step", trainer.training_step)
        trainer.evaluate = traced("evaluate", trainer.evaluate)
        return trainer

    train.build_trainer = built
    traced("sample", answer_prompts)(model, tokenizer, plan.evaluate.prompts, 2, 1)
    records = []

    def make(plan):
        records.append(recorder(plan, rows, folder))
        return records[-1]

    train.train(plan, rows, model, tokenizer, make, Console(quiet=True))
    supervised = [len(row.ids) - PROMPT for row in rows.train]
    return {"events": events, "supervised": supervised, "totals": records[-1].counts.totals}


class Enough(Exception):
    """The third attempt was reached: nothing more is to be learnt."""


def memory(folder: Path) -> dict:
    """Memory runs out inside the first training step, as torch and as CUDA report it; the next attempt looks back."""
    errors = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
              RuntimeError("CUDA error: out of memory"), Enough()]  # fmt: skip
    changes = ["train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=3"]
    plan = recipe.load("pocket", [*QUICK, *changes])
    model, tokenizer = load(plan, folder)
    build, attempts, refs = train.build_trainer, [], {}
    inner = model.base_model.model.model.layers[1]
    forward = inner.forward

    def full(hidden, *args, **kwargs):  # noqa: ARG001 - a layer's signature
        attempts[-1]["left"] = [name for name, ref in refs.items() if ref() is not None]
        refs.update(activations=weakref.ref(hidden), optimizer=weakref.ref(attempts.trainer().optimizer))
        raise errors.pop(0)

    def built(*args):
        trainer = build(*args)
        attempts.append(
            {k: getattr(trainer.args, k) for k in ("per_device_train_batch_size", "gradient_accumulation_steps")}
        )
        attempts.trainer = weakref.ref(trainer)
        return trainer

    attempts = type("Attempts", (list,), {})()
    train.build_trainer, inner.forward = built, full
    try:
        rows = mixed(folder, (5,) * 12)
        make = functools.partial(recorder, rows=rows, folder=folder)
        train.train(plan, rows, model, tokenizer, make, Console(quiet=True))
    except Enough:
        inner.forward = forward
    return {"attempts": attempts}


def decoding(folder: Path) -> dict:
    """Greedy replies of a left-padded batch on Unsloth's decode path, in both modes, the adapter off and on; base and adapter
    stay in the folder, so that somebody else can answer the same prompts."""
    model, tokenizer = load(recipe.load("pocket", QUICK), folder)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.2)
    model.save_pretrained(folder / "adapter")
    questions = (
        "What is 12 + 30?",
        "Hi",
        "Give the opposite of the word cold, and then one more word that rhymes with it.",
    )
    conversations = [[{"role": "user", "content": question}] for question in questions]
    replies = {}
    for mode in modes_of(tokenizer):
        ids = prompts(tokenizer, conversations, mode)
        for name in ("base", "tuned"):
            rows = [decode.Row(number, prompt, NEW_TOKENS) for number, prompt in enumerate(ids)]
            ends = end_tokens(model, tokenizer)
            with switched(model, name == "tuned"), inference(model, tokenizer):
                decode.continue_rows(model, tokenizer.pad_token_id, rows, NEW_TOKENS, ends, None, 1)
            replies[f"{mode}/{name}"] = {"prompts": ids, "ends": sorted(ends), "new": [row.new for row in rows]}
    return replies


GROUPS = {"probe": probe, "ways": ways, "training": training, "memory": memory, "decoding": decoding}
