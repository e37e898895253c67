"""Fine-tune a chat model on one GPU and know what it did.

mixed = toolkit.compile_mix("data_recipes/pocket.yaml")

The four calls for your own Unsloth or TRL notebook take and return what those libraries use: a tokenizer, data sets, a
PeftModel, a folder. Importing this loads neither torch nor Unsloth.
"""

import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from toolkit.comparison.decide import Comparison
    from toolkit.data.mix import Mix
    from toolkit.recipe import Recipe
    from toolkit.records import Evaluation
    from toolkit.training import record

__version__ = "0.1.0"
__all__ = ["RunRecorder", "__version__", "blend", "compile_mix", "dial", "evaluate_model", "export_model"]

# Read once, when torch is imported. Spinning OpenMP threads collapse on shared cores: a training step of the pocket
# model took 3.4 s instead of 0.7 s (2 cores, 2026-11-21).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

# Read once, when CUDA starts, which happens before Unsloth sets it: without it memory fragments, and a run that is
# forecast to fit can fail. Where the driver lacks it (Windows, WSL, Tegra) Unsloth leaves it out too.
_kernel = platform.uname()
_lacks_it = _kernel.system == "Windows" or "microsoft" in _kernel.release.lower() or "tegra" in _kernel.release.lower()
if not _lacks_it and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# What they warn of at import (kernels of other cards, a call that torch will drop) nobody can act on
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def __dir__() -> list[str]:
    """What `dir(toolkit)` and completion show: the public calls."""
    return __all__


def compile_mix(
    recipe: "str | Path | dict[str, Any] | Recipe",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    overrides: Sequence[str] = (),
) -> "Mix":
    """A recipe's mix for a loaded tokenizer: `.train_dataset` and `.validation_dataset` hold input_ids and labels.

    `recipe` is a file, a dict with its keys, or a Recipe; of its model only `max_seq_length` counts when a tokenizer is
    given. Pass both data sets to SFTTrainer with SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, max_length=None):
    without these two, TRL cuts every row at 1,024 tokens.
    Raises ToolkitError on a recipe or row that cannot be used, and when the achieved shares are off their plan.
    """
    from toolkit import run
    from toolkit.data import mix

    loaded = _loaded(recipe, overrides)
    if tokenizer is None:
        loaded = run.resolve(loaded, run.default_console())
    return mix.compile_mix(loaded, tokenizer)


def _loaded(recipe: "str | Path | dict[str, Any] | Recipe", overrides: Sequence[str] = ()) -> "Recipe":
    from toolkit import recipe as recipes

    if isinstance(recipe, str | Path):
        return recipes.load(recipe, overrides)
    values = recipe if isinstance(recipe, dict) else recipes.to_dict(recipe)
    return recipes.from_dict(values, overrides=overrides)


def RunRecorder(
    recipe: "str | Path | dict[str, Any] | Recipe", mixed: "Mix", console: "Console | None" = None
) -> "record.RunRecorder":
    """A callback for SFTTrainer: `SFTTrainer(..., callbacks=[RunRecorder(recipe, mixed)])`, then `trainer.train()`, and the
    run's folder is there, as `python -m toolkit train` leaves it.

    `trainer.train()` resumes from the run's newest checkpoint, records every step, checks that the model learns, and ends
    with the best checkpoint as adapter/. The recipe names the run and says what is kept (`evaluate:`, `save_total_limit`);
    the trainer's own arguments decide how it trains. Raises ToolkitError when another recipe's run holds the name.
    """
    from toolkit import run

    return run.recorder(_loaded(recipe), mixed, console)


def evaluate_model(
    model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", mixed: "Mix | None" = None, **options: Any
) -> "Evaluation":
    """Score a PeftModel against its own base (adapter on and off) in every mode its template has, with intervals.

    Reasoning questions are the mix's held-out rows with an expected answer, otherwise those that ship; chat questions are
    those that ship. `questions=` and `chat_questions=` are your own; further `options` as in
    `toolkit.evaluation.measure.evaluate`. Prints the verdict; returns what a run keeps as eval.json.
    """
    from toolkit.evaluation import measure

    questions = measure.from_mix(mixed) if mixed else {}
    result = measure.evaluate(model, tokenizer, **(questions | options))
    print("\n".join(measure.verdict(result)))
    return result


def export_model(
    model: "PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: str | Path,
    gguf: str | Sequence[str] = ("q8_0",),
    **options: Any,
) -> dict[str, Any]:
    """Save the adapter into `folder`, merge it, write GGUF files and verify them; returns the certificate.

    `gguf` names quantizations (none: merged weights only). The base is found again by the name the model was loaded from,
    and compared with the one in memory.
    Further `options` are those of `toolkit.export.export`. Raises ToolkitError when a check fails.
    """
    from toolkit.export import export
    from toolkit.export.base import save_run

    # the processes that check the export start in other folders
    target = Path(folder).expanduser().absolute()
    save_run(model, tokenizer, target)
    return export(target, (gguf,) if isinstance(gguf, str) else tuple(gguf), **options)


def dial(*runs: str | Path, **options: Any) -> "Comparison":
    """Score a finished run at several scales of its adapter, without training, and recommend one; several runs are one
    recipe with other seeds. `options` are those of `toolkit.comparison.dial.dial`; prints the table and the next command.
    """
    from toolkit.comparison.dial import dial

    return dial(runs, **options)


def blend(runs: Sequence[str | Path], weights: Sequence[float], **options: Any) -> Path:
    """Write the weighted sum of what finished runs of one base changed as a run of its own, and return its folder; nothing
    is trained. `options` are those of `toolkit.comparison.blend.blend`.
    """
    from toolkit.comparison.blend import blend

    return blend(runs, weights, **options)
