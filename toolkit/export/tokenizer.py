"""The tokenizer of a run's folder: loaded, copied, and what about it stands in the way of an export.

tokenizer = load_tokenizer(Path("toolkit/pocket")); tokenizer_files(Path("toolkit/pocket")).keys()
"""

import functools
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.export.checkpoint import ModelConfig, text_settings
from toolkit.export.record import as_json
from toolkit.files import ToolkitError, read_json
from toolkit.records import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = """tokenizer.json tokenizer_config.json chat_template.jinja special_tokens_map.json added_tokens.json
vocab.json merges.txt tokenizer.model""".split()
NAMED_TEMPLATES = "additional_chat_templates"
"""transformers' folder of chat templates beside the default one."""
TokenizerJson = JsonObject
"""The content of a tokenizer.json."""


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder. Raises ToolkitError when its files are missing or damaged."""
    # a verification asks for the same one a dozen times, and a vocabulary of 150,000 tokens takes over a second
    changed = max((path.stat().st_ctime_ns for path in folder.glob("*")), default=0)
    return _load_tokenizer(folder.resolve(), changed)


@functools.lru_cache(maxsize=2)
def _load_tokenizer(folder: Path, _changed: int) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions for a damaged tokenizer.json
        raise ToolkitError(
            f"{folder}: the tokenizer cannot be loaded ({str(error)[:200]}): restore its files"
        ) from error


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """{file: content} of everything that makes a folder's tokenizer; one template where transformers reads one only."""
    paths = [folder / name for name in TOKENIZER_FILES] + sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}
    settings = read_json(folder / "tokenizer_config.json")
    # transformers reads the file; other programs might read an older template that is left in the settings
    if "chat_template.jinja" in files and settings.pop("chat_template", None):
        files["tokenizer_config.json"] = as_json(settings)
    return files


def tokens_beyond(tokenizer: TokenizerJson, config: ModelConfig) -> str | None:
    """Why a tokenizer does not fit a model; None where every token has a row of the embedding."""
    vocabulary = tokenizer["model"]["vocab"]
    # a list in place of {token: id} for unigram models
    ids = range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
    last = max([*ids, *(token["id"] for token in tokenizer["added_tokens"])], default=-1)
    rows = text_settings(config).get("vocab_size", math.inf)
    if last < rows:
        return None
    return (
        f"tokenizer.json has a token {last}, the model's embedding {rows} rows: tokens were added without "
        "resize_token_embeddings. Take the tokenizer of the base, or resize the model, save it and train on that"
    )


def chat_template(folder: Path) -> str:
    """The inference template. TRL's training variants carry {% generation %}, which no other program understands."""
    text = load_tokenizer(folder).chat_template
    if isinstance(text, dict):  # several by name
        text = text["default"]
    if not text or re.search(r"{%-?\s*generation\b", text):
        raise ToolkitError(
            f"{folder}: {'a training' if text else 'no'} chat template; expected the model's inference "
            "template in chat_template.jinja (copy it from the base model's folder)"
        )
    return text
