"""Load a model through Unsloth, attach LoRA, write and reload a run's adapter.

model, tokenizer = load_run("pocket")
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from toolkit.family import family_of
from toolkit.files import (
    ToolkitError,
    did_you_mean,
    download,
    first_line,
    hide_home,
    outputs,
    read_if_there,
    read_json,
    sha256,
)
from toolkit.recipe import Lora, Model, of_run
from toolkit.records import JsonObject
from toolkit.training.base import ADAPTER_WEIGHTS, Checksums, base_folder, check_base
from toolkit.training.log import LOG, quiet
from toolkit.view.progress import working

OUT_OF_MEMORY = "OutOfMemoryError|out of memory|CUBLAS_STATUS_ALLOC_FAILED"
# (model, tokenizer), as Unsloth and transformers return them.
Loaded = tuple[Any, Any]


def unsloth() -> Any:
    """Unsloth's FastLanguageModel; importing it takes about ten seconds, so only here and only when needed.

    Its generated sources go under outputs/, it never installs or downloads on its own, and without a network its calls
    to the Hub are switched off, as they would each wait for a timeout. Raises ToolkitError where a card cannot be used.
    """
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(outputs() / ".unsloth"))
    os.environ.setdefault("UNSLOTH_AUTO_INSTALL", "0")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    try:
        with quiet():
            from unsloth import FastLanguageModel
    except NotImplementedError as error:  # unsloth_zoo/device_type.py: a driver, and no card that torch can use
        raise ToolkitError(
            "an NVIDIA driver is here, but torch cannot use a card: `python -m toolkit doctor` says why and what to do; "
            "UNSLOTH_FORCE_CPU=1 before the command runs it on the CPU"
        ) from error
    return FastLanguageModel


def on_cuda() -> bool:
    """Whether torch can use a CUDA card."""
    import torch

    return torch.cuda.is_available()


def has_bf16() -> bool:
    """Whether the CUDA card here computes in bfloat16; a T4 only emulates it."""
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the GPU has no memory left; CUDA and cuBLAS report it as a plain RuntimeError too."""
    return isinstance(error, RuntimeError) and bool(re.search(OUT_OF_MEMORY, f"{type(error).__name__} {error}"))


def checkpoint_file(section: Model, name: str) -> JsonObject:
    """A JSON file of a recipe's model, from its folder or the Hub, without loading anything; {} where it has none."""
    if folder := base_folder(section.model_name):
        return read_if_there(folder / name)
    import huggingface_hub

    try:
        file = huggingface_hub.hf_hub_download(section.model_name, name, revision=section.revision)
    except (OSError, ValueError):  # no such name, no network: loading reports it, with the reason
        return {}
    return read_json(Path(file))


def checkpoint_path(section: Model) -> str:
    """What `from_pretrained` takes for a recipe's model name: the folder it names, or the Hub name itself."""
    return str(base_folder(section.model_name) or section.model_name)


def really_loaded(section: Model) -> str:
    """The repository that Unsloth loads for a recipe's model: on CUDA it replaces many Hub names by those of its own
    4-bit checkpoints, which have a tokenizer and a chat template of their own.

    Raises ToolkitError where a revision is asked for: it is another repository's, and Unsloth would ignore it.
    """
    name = section.model_name
    if base_folder(name) or section.extra.get("use_exact_model_name") or not on_cuda():
        return name
    unsloth()
    from unsloth.models.loader_utils import get_model_name

    loaded = name
    with quiet(), contextlib.suppress(NotImplementedError):  # a name for a newer Unsloth: loading it says so
        loaded = get_model_name(name, load_in_4bit=section.load_in_4bit, revision=section.revision)
    if section.revision and loaded.lower() != name.lower():
        raise ToolkitError(
            f"model.revision: Unsloth loads {loaded} for {name} and ignores the revision: "
            f"set model.model_name to {loaded} with a revision of its own, or remove model.revision"
        )
    return loaded


def fetch(section: Model) -> None:
    """Download a Hub model's weights unless they are here. Loading would do it too, but `quiet` would hide size and speed."""
    if base_folder(section.model_name):
        return
    try:
        download(section.model_name, section.revision, local_only=True)
    except ToolkitError:
        download(section.model_name, section.revision)


@contextlib.contextmanager
def loading(section: Model, console: Console) -> Iterator[None]:
    """Download what is missing, then say what is loaded while it lasts, and how long it took."""
    fetch(section)
    name = section.model_name
    began = time.monotonic()
    if not (console.is_terminal or console.is_jupyter):
        console.print(f"loading {name} …")
    with working(console, f"loading {name}"):
        yield
    console.print(f"loaded {name} in {time.monotonic() - began:.0f} s")


def load_base(section: Model) -> Loaded:
    """(model, tokenizer) of a recipe's `model:` section: a dynamic-quant checkpoint, or 16-bit weights quantized on load.
    A name is taken as `really_loaded` gives it.

    Raises ToolkitError when the name is neither a folder nor on the Hub, or when the weights do not fit on the card.
    """
    fast = unsloth()
    from transformers import ProcessorMixin

    try:
        with quiet():
            model, tokenizer = fast.from_pretrained(
                checkpoint_path(section), max_seq_length=section.max_seq_length, load_in_4bit=section.load_in_4bit,
                revision=section.revision, **loading_options(section),
            )  # fmt: skip
        if isinstance(tokenizer, ProcessorMixin):  # what a model that sees has in its place
            tokenizer = tokenizer.tokenizer
    # ValueError: what Unsloth raises for a model that would spill from the card (loader_utils.raise_if_bnb_cpu_spill)
    except (OSError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        if out_of_memory(error) or "does not fit in GPU memory" in reason:
            reason = "no room in GPU memory: `python -m toolkit fit RECIPE` shows what fits, `nvidia-smi` who holds it"
        raise ToolkitError(f"{section.model_name}: cannot be loaded: {reason} (details: {LOG.path})") from error
    if model.device.type == "cuda":
        from unsloth.utils.packing import mark_allow_overlength

        mark_allow_overlength(model)  # otherwise prompts longer than max_seq_length are cut without a word
    model.generation_config.max_length = None  # Unsloth sets it; generate() would warn at every call
    # Unsloth sets it to max_seq_length; saved with the adapter, it would make other programs cut their prompts
    settings = checkpoint_file(section, "tokenizer_config.json")
    tokenizer.model_max_length = settings.get("model_max_length") or tokenizer.model_max_length
    split_as_its_file_says(tokenizer, checkpoint_file(section, "tokenizer.json"))
    return model, tokenizer


def loading_options(section: Model) -> dict[str, Any]:
    """Further arguments of `from_pretrained`. Unsloth's CPU loader has no `text_only`: it loads the text model in any case."""
    family = family_of(checkpoint_file(section, "config.json").get("model_type", ""))
    options = {"text_only": True, **section.extra} if family.text_only else dict(section.extra)
    if not on_cuda():
        options.pop("text_only", None)
    return options


def split_as_its_file_says(tokenizer: Any, file: JsonObject) -> None:
    """Give a loaded tokenizer the rules of its tokenizer.json back, by which the rows of a mix are tokenized.

    transformers 5 builds some classes' tokenizers anew from their vocabulary: a GPT2Tokenizer, which SmolLM2's repositories
    name, has lost the split into single digits, and the export finds other ids in the run's tokenizer."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    if file and rules(file) != rules(json.loads(backend.to_str())):
        as_written = tokenizers.Tokenizer.from_str(json.dumps(file))
        backend.normalizer = as_written.normalizer
        backend.pre_tokenizer = as_written.pre_tokenizer
        tokenizer.__class__ = PreTrainedTokenizerFast  # saved under this name, its file is read as it is


def rules(tokenizer: JsonObject) -> str:
    """How a tokenizer.json cleans and splits text; `trim_offsets` changes no id, and the classes set it as they like."""
    text = json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")])
    return text.replace('"trim_offsets": false', '"trim_offsets": true')


def attach(model: Any, lora: Lora, *, seed: int) -> Any:
    """The model with a fresh LoRA adapter; on a GPU with Unsloth's offloaded checkpointing unless the recipe says otherwise."""
    # "unsloth" moves activations to main memory, which needs a card to move them from
    checkpointing = "unsloth" if on_cuda() else False
    options = {"use_gradient_checkpointing": checkpointing, "random_state": seed, "bias": "none", **lora.extra}
    with quiet():
        attached = unsloth().get_peft_model(
            model, r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout, use_rslora=lora.use_rslora,
            target_modules=list(lora.target_modules), **options,
        )  # fmt: skip
    for config in attached.peft_config.values():
        if not isinstance(config.target_modules, str):  # a set to PEFT, in another order in every process
            config.target_modules = sorted(config.target_modules)
    return attached


def load_run(folder: str | Path) -> Loaded:
    """(model, tokenizer) of a finished run: its base, with its adapter on; `model.disable_adapter()` gives the base."""
    folder = run_folder(folder)
    check_adapter(folder)
    section = of_run(folder).model
    check_base(section, read_json(folder / "manifest.json").get("model", {}).get("files", {}))
    model, tokenizer = load_base(section)
    with quiet():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder / "adapter"))
        unsloth().for_inference(model)
    return model, tokenizer


def run_folder(folder: str | Path) -> Path:
    """A run's folder by path or by name under outputs/, or one that `export_model` wrote, which has no recipe. Raises
    ToolkitError when there is no finished run."""
    for run in (Path(folder), outputs() / folder):
        # written by the last step of a training
        if (run / "adapter" / "adapter_config.json").is_file():
            return run
        if (run / "recipe.yaml").is_file():
            raise ToolkitError(f"{run}: this run has no adapter yet: finish it with the `train` command that began it")
    runs = [file.parent.name for file in outputs().glob("*/recipe.yaml")]
    raise ToolkitError(f"{folder}: no such run in {outputs()}{did_you_mean(str(folder), runs)}")


def write_adapter(checkpoint: Path, model: Any, tokenizer: Any, folder: Path) -> Checksums:
    """Load a checkpoint's weights into `model` and write them as the run's adapter. Returns {file: SHA-256}, but for the card."""
    import peft
    from safetensors.torch import load_file

    with quiet():
        peft.set_peft_model_state_dict(model, load_file(checkpoint / ADAPTER_WEIGHTS))
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    hide_home(folder)
    return adapter_checksums(folder)


def adapter_checksums(adapter: Path) -> Checksums:
    """{file: SHA-256} of an adapter's folder, but for the card, which is rewritten with the scores."""
    return {file.name: sha256(file) for file in sorted(adapter.iterdir()) if file.is_file() and file.suffix != ".md"}


def damaged(folder: Path, checksums: Checksums) -> str | None:
    """The first file of a folder that is missing or differs from its SHA-256; None when all are as written."""
    return next((n for n, s in checksums.items() if not (folder / n).is_file() or sha256(folder / n) != s), None)


def check_adapter(folder: Path) -> None:
    """Compare a run's adapter with the checksums in its manifest. Raises ToolkitError naming a damaged file."""
    name = damaged(folder / "adapter", read_json(folder / "manifest.json").get("adapter", {}))
    if name:
        raise ToolkitError(
            f"{folder / 'adapter' / name}: missing or damaged: its SHA-256 differs from manifest.json. Run the `train` "
            "command of this run again (of a sum: `blend`): it writes the adapter again from the last checkpoint, without training"
        )
