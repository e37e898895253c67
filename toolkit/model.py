"""Load a 4-bit Qwen3 through Unsloth, attach LoRA, reload a run.

model, tokenizer = load_run("outputs/pocket"); with model.disable_adapter(): ...  # the base
"""

import contextlib
import json
import os
from pathlib import Path

from toolkit.files import POCKET, ToolkitError, did_you_mean, find, outputs
from toolkit.recipe import Lora, Model

VOID = open(os.devnull, "w")  # noqa: SIM115 - stays open: log handlers made while it is in place keep writing to it


def unsloth():
    """Unsloth's FastLanguageModel; importing it takes about ten seconds, so only here and only when needed.

    Its generated sources go under outputs/, it never installs or downloads on its own, and without a network its calls
    to the Hub are switched off, as they would each wait for a time-out.
    """
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(outputs() / ".unsloth"))
    os.environ.setdefault("UNSLOTH_AUTO_INSTALL", "0")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    with quiet():
        from unsloth import FastLanguageModel
    return FastLanguageModel


@contextlib.contextmanager
def quiet():
    """Keep library chatter off the screen, unless TOOLKIT_DEBUG is set; errors come as exceptions all the same."""
    if os.environ.get("TOOLKIT_DEBUG"):
        yield
        return
    import logging
    import warnings

    with contextlib.redirect_stdout(VOID), contextlib.redirect_stderr(VOID), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def has_bf16() -> bool:
    """Whether the CUDA card here computes in bfloat16; a T4 only emulates it."""
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)


def load_base(section: Model):
    """(model, tokenizer) of a recipe's `model:` section: a dynamic-quant checkpoint, or 16-bit weights quantized on load.

    Raises ToolkitError when the name is neither a folder nor to be had from the Hub.
    """
    fast = unsloth()
    where = POCKET if section.model_name == "pocket" else find(section.model_name)
    try:
        with quiet():
            model, tokenizer = fast.from_pretrained(
                str(where or section.model_name),
                max_seq_length=section.max_seq_length,
                load_in_4bit=section.load_in_4bit,
                revision=section.revision,
                **section.extra,
            )
    except OSError as error:
        raise ToolkitError(f"{section.model_name}: cannot be loaded: {str(error).splitlines()[0]}") from error
    return model, tokenizer


def attach(model, lora: Lora, *, seed: int, use_gradient_checkpointing="unsloth"):
    """The model with a fresh LoRA adapter; on a GPU with Unsloth's offloaded checkpointing unless told otherwise."""
    import torch

    checkpointing = use_gradient_checkpointing if torch.cuda.is_available() else False
    options = {"use_gradient_checkpointing": checkpointing, "random_state": seed, "bias": "none", **lora.extra}
    with quiet():
        return unsloth().get_peft_model(
            model,
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=list(lora.target_modules),
            use_rslora=lora.use_rslora,
            **options,
        )


def load_run(folder: str | Path):
    """(model, tokenizer) of a finished run: its base, with its adapter on; `model.disable_adapter()` gives the base."""
    from toolkit import recipe

    folder = run_folder(folder)
    resolved = recipe.load(folder / "recipe.yaml")
    model, tokenizer = load_base(resolved.model)
    with quiet():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder / "adapter"))
        unsloth().for_inference(model)
    return model, tokenizer


def run_folder(folder: str | Path) -> Path:
    """A run's folder by path or by name under outputs/. Raises ToolkitError when there is no finished run."""
    found = next((p for p in (Path(folder), outputs() / folder) if (p / "recipe.yaml").is_file()), None)
    if found is None:
        runs = [p.parent.name for p in outputs().glob("*/recipe.yaml")]
        raise ToolkitError(f"{folder}: no such run in {outputs()}{did_you_mean(str(folder), runs)}")
    if not (found / "adapter" / "adapter_config.json").is_file():
        raise ToolkitError(f"{found}: this run has no adapter yet: finish it with the `train` command that began it")
    return found


def manifest(folder: Path) -> dict:
    """A run's manifest.json."""
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
