"""Compiled mixes on disk, by everything that decides their rows.

from toolkit.data import cache; cache.read(cache.folder_of(recipe, chat, fingerprints))     # a Mix, or None
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from toolkit.data.chat import Chat
from toolkit.data.rows import Mix, Row
from toolkit.files import PACKAGE, complete, outputs
from toolkit.recipe import Recipe

# The arrays of mix.npz.
PARTS = ("ids", "ends", "numbers", "names", "texts")


def folder_of(recipe: Recipe, chat: Chat, fingerprints: dict[str, str]) -> Path:
    """Where the mix of a recipe is kept, compiled with this model's template from sources of these fingerprints."""
    decides = [
        asdict(recipe.data),
        [asdict(q) for q in recipe.evaluate.questions],
        recipe.model.max_seq_length,
        f"{chat.json}{chat.template_text}{chat.tokens}{chat.switches}",
        fingerprints,
    ]
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    # a change of the code that makes rows makes another mix: nobody remembers to raise a version number
    for file in [PACKAGE / "family.py", *sorted(PACKAGE.glob("data/*.py"))]:
        key.update(file.read_bytes())
    return folder_named(key.hexdigest()[:16])


def folder_named(key: str) -> Path:
    """The folder of a mix by the name that a run's manifest keeps."""
    return outputs() / ".mixes" / key


def write(mixed: Mix) -> None:
    """mix.npz: rows, report, dropped rows and held-out conversations. The caller holds the lock."""
    rows = mixed.train + mixed.validation
    held = [row.conversation for row in mixed.validation]
    texts = json.dumps({"report": mixed.report, "quarantine": mixed.quarantine, "held": held})
    # one file, so that a kill leaves a whole mix or none; zip keeps a checksum of each part
    with complete(mixed.folder / "mix.npz") as partial, open(partial, "wb") as file:
        np.savez(
            file,
            # all ids in one array: numpy writes each array as a file of its own
            ids=np.concatenate([r.ids for r in rows]),
            ends=np.cumsum([len(r.ids) for r in rows]),
            numbers=np.array([(r.prompt_length, r.number) for r in rows]),
            names=np.array([(r.source, r.mode) for r in rows]),
            texts=np.frombuffer(texts.encode(), np.uint8),
        )


def read(folder: Path) -> Mix | None:
    """A compiled mix from its folder; None where there is none, or where a checksum in mix.npz says it is damaged."""
    try:
        # reading a part checks its checksum; numpy asks for each by its name
        with np.load(folder / "mix.npz") as file:
            arrays = {name: file[name] for name in PARTS}
    except Exception:  # missing, damaged, or of an older toolkit: zipfile and numpy have many kinds of error for that
        return None
    texts = json.loads(arrays["texts"].tobytes())
    # views of one array, no copies
    ids = np.split(arrays["ids"], arrays["ends"][:-1])
    places = zip(ids, arrays["numbers"].tolist(), arrays["names"].tolist(), strict=True)
    rows = [Row(row_ids, length, source, mode, number) for row_ids, (length, number), (source, mode) in places]
    # validation rows are the last, and the only ones whose conversations are kept
    held_from = len(rows) - len(texts["held"])
    train, validation = rows[:held_from], rows[held_from:]
    for row, conversation in zip(validation, texts["held"], strict=True):
        row.conversation = conversation
    return Mix(train, validation, texts["report"], texts["quarantine"], folder)
