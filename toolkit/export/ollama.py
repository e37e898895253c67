"""The Modelfile beside the GGUF files: stop tokens, context, and the model's own sampling by mode.

text = modelfile(run, merged, load_tokenizer(run / "adapter"))
"""

from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.evaluation.generate import modes_of
from toolkit.export.merge import Merged, generation_config, stop_tokens
from toolkit.export.record import written_files
from toolkit.export.templates import filled
from toolkit.family import family_of, mode_title, stated_sampling
from toolkit.recipe import load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OLLAMA = "0.30.0"
"""The first Ollama that uses the chat template inside the GGUF when the Modelfile names no RENDERER."""
CONTEXT = 8192
"""Tokens, where no recipe says how long the run's rows were."""


def modelfile(run: Path, merged: Merged, tokenizer: "PreTrainedTokenizerBase") -> bytes:
    """An Ollama Modelfile for the smallest GGUF of a run."""
    recipe = run / "recipe.yaml"
    trained = load(recipe).model.max_seq_length if recipe.is_file() else CONTEXT
    generation = generation_config(merged, tokenizer)
    family = family_of(merged.config["model_type"])
    # one file is named, and on most machines the smallest is the one that fits
    smallest = min(written_files(run), key=lambda path: path.stat().st_size)
    values = {
        "ollama": OLLAMA,
        "name": smallest.name.rsplit(".", 2)[0],  # not the folder's, which may be renamed
        "smallest": smallest.name,
        "stops": [tokenizer.decode(stop) for stop in sorted(stop_tokens(generation, merged.config))],
        "context": min(merged.config["max_position_embeddings"], max(4096, trained)),
        "penalty": generation.get("repetition_penalty"),
        "modes": {mode_title(mode): stated_sampling(family, mode, generation) for mode in modes_of(tokenizer)},
    }
    return filled("Modelfile", values).encode()
