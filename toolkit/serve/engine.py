"""A run that can be spoken to: adapters over one base, the merged folder or a GGUF, all behind one streaming call.

engine = open_engine(["outputs/pocket"]); for piece in converse(engine, Ask([{"role": "user", "content": "Hi"}])): ...
"""

from collections.abc import Sequence
from pathlib import Path

from toolkit.files import ToolkitError, read_json
from toolkit.recipe import Model, load
from toolkit.serve.batcher import Batcher
from toolkit.serve.llama import Llama
from toolkit.serve.request import BASE

BEST_FIRST = ("q8_0", "f16", "bf16", "q6_k", "q5_k_m", "q4_k_m")
"""Which GGUF is taken when several lie there: Q8_0 has half the size of F16 at a KL of 0.0005 to it."""


def open_engine(runs: Sequence[str | Path], source: str = "adapter", quant: str | None = None, *, waiting: int = 64):
    """What answers for one or more runs: `source` is adapter, merged or gguf (`quant` says which file).

    Several runs need `adapter` and one base; they are then told apart by name. Raises ToolkitError."""
    from toolkit.model import run_folder

    folders = [run_folder(run).resolve() for run in runs]
    if source != "adapter" and len(folders) > 1:
        raise ToolkitError(f"several runs share one base as adapters; --from {source} takes one run")
    if source == "gguf":
        return Llama(gguf_of(folders[0], quant), folders[0].name, waiting)
    if source == "merged":
        return _open_merged(folders[0], waiting)
    return _open_adapters(folders, waiting)


def best_source(run: str | Path) -> tuple[str, str]:
    """(source, why): the adapter on a GPU; elsewhere the certified GGUF, if there is one."""
    from toolkit.model import run_folder

    folder = run_folder(run)
    if not (certified(folder) and any(folder.glob("gguf/*.gguf"))):
        return "adapter", "what was trained; /base switches it off"
    import torch

    if torch.cuda.is_available():
        return "adapter", "what was trained, on the GPU; --from gguf for the exported file"
    return "gguf", "no GPU here, and llama.cpp is the quickest on a CPU; --from adapter has the base too"


def certified(folder: Path) -> bool:
    """The run's export has passed its certificate."""
    file = folder / "certificate.json"
    return file.is_file() and read_json(file)["passed"]


def gguf_of(folder: Path, quant: str | None) -> Path:
    """The GGUF file of a run: the quantization asked for, else the first of BEST_FIRST that is there."""
    files = {path.name.removesuffix(".gguf").rpartition(".")[2]: path for path in sorted(folder.glob("gguf/*.gguf"))}
    wanted = [quant.lower()] if quant else [*BEST_FIRST, *files]
    found = next((files[name] for name in wanted if name in files), None)
    if found is None:
        there = f"there are {', '.join(files)}" if files else "there is none"
        raise ToolkitError(f"{folder}/gguf: no {quant or 'GGUF file'}, {there}: python -m toolkit export {folder.name}")
    return found


def _open_merged(folder: Path, waiting: int):
    from toolkit.model import load_base

    if not (folder / "merged" / "config.json").is_file():
        raise ToolkitError(f"{folder}: no merged folder: python -m toolkit export {folder.name} --to merged")
    length = load(folder / "recipe.yaml").model.max_seq_length
    model, tokenizer = load_base(Model(str(folder / "merged"), max_seq_length=length, load_in_4bit=False))
    return Batcher(model, tokenizer, {folder.name: None}, waiting)


def _open_adapters(folders: list[Path], waiting: int):
    """Every run's adapter over the first one's base. PEFT calls the first "default"; a name of its own may hold dots."""
    from toolkit.model import load_run, quiet

    names = {folder.name: f"run{i}" if i else "default" for i, folder in enumerate(folders)}
    if BASE in names or len(names) < len(folders):
        raise ToolkitError(
            f"runs are told apart by their folder's names, {BASE!r} is taken: {', '.join(map(str, folders))}"
        )
    sections = [load(folder / "recipe.yaml").model for folder in folders]
    for folder, section in zip(folders[1:], sections[1:], strict=True):
        if (section.model_name, section.revision) != (sections[0].model_name, sections[0].revision):
            raise ToolkitError(
                f"{folder.name} was trained on {section.model_name}, {folders[0].name} on {sections[0].model_name}: "
                "only runs of one base can be served together"
            )
    model, tokenizer = load_run(folders[0])
    with quiet():
        for folder in folders[1:]:
            model.load_adapter(str(folder / "adapter"), adapter_name=names[folder.name])
    return Batcher(model, tokenizer, {**names, BASE: None}, waiting)
