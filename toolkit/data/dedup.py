"""Rows that repeat each other or an evaluation prompt: exact duplicates, near duplicates, 13-gram overlap.

from toolkit.data.dedup import NearDuplicates, signatures; row.signature, = signatures([ids]); NearDuplicates(decode).find(row)

Rows are mix.Row: `ids`, of which `prompt_length` are the prompt, `conversation`, `signature`, `bands`.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from toolkit.family import SWITCH

WORDS = 13  # GPT-3's decontamination (arXiv:2005.14165, appendix C)
SHINGLE = 5  # token 5-grams
PERMUTATIONS, BANDS = 64, 8
"""A pair at Jaccard 0.85 meets in a band with probability 0.93; every meeting is then verified."""
SIMILAR = 0.85
REWORDED = 0.05
"""Share of the asked words that may differ in a near duplicate; short questions that differ in a word are others."""
SHORTEST = 64
"""Tokens of a completion; shorter ones of one kind look alike to MinHash, so they are only compared exactly."""
CANDIDATES = 32
"""Latest rows of a band that are verified, so that a thousand prompts with one long answer take no quadratic time."""


TYPED = re.compile(r"(?:^|\s+)/(?:no_)?think\b")
"""A soft switch as it stands in decoded text, where the end-of-turn token follows it without a space."""


def prompt_key(conversation: dict) -> bytes:
    """16 bytes that are equal for rows that ask the same: all user turns, case, spacing and typed mode switches aside."""
    return _digest(SWITCH.sub("", _asked(conversation)))


def _asked(conversation: dict) -> str:
    return "\0".join(m["content"] for m in conversation["messages"] if m["role"] == "user")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.lower().split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Duplicates:
    """Rows whose prompt and completion both repeat an earlier row's, case, spacing and typed mode switches aside."""

    def __init__(self, decode: Callable[[np.ndarray], str]):
        self._decode = decode
        self._asked: dict[bytes, object] = {}
        self._told: dict[bytes, object] = {}

    def find(self, row):
        """The earlier row that this one repeats; None where there is none, and then it is remembered."""
        first = self._asked.setdefault(prompt_key(row.conversation), row)
        if first is row:  # whole texts are compared only where rows ask the same
            return None
        self._told.setdefault(self._told_by(first), first)
        found = self._told.setdefault(self._told_by(row), row)
        return None if found is row else found

    def _told_by(self, row) -> bytes:
        return _digest(TYPED.sub("", self._decode(row.ids)))


class NearDuplicates:
    """Rows whose prompt and completion are both nearly an earlier row's.

    Candidates come from an index over bands of the completions' MinHash signatures; each is then verified. Prompts are
    nearly the same when at most 5% of the asked words differ, no number differs, and no word differs in the completion
    as well: such a word is what the row is about (an order number, a column), and its row another task.
    """

    def __init__(self, decode: Callable[[np.ndarray], str]):
        self._decode = decode
        self._buckets: dict[bytes, list] = {}

    def find(self, row):
        """The earlier row that this one nearly repeats, or None."""
        near = [earlier for band in _bands(row) for earlier in self._buckets.get(band, ())[-CANDIDATES:]]
        for earlier in dict.fromkeys(near):
            # the share of equal MinHash values estimates the Jaccard similarity of the two sets of 5-grams
            if (earlier.signature == row.signature).mean() >= SIMILAR and self._asks_the_same(row, earlier):
                return earlier
        return None

    def add(self, row) -> None:
        """Remember a row for later calls of `find`."""
        for band in _bands(row):
            self._buckets.setdefault(band, []).append(row)

    def _asks_the_same(self, row, earlier) -> bool:
        changed = self._changed(row.ids[: row.prompt_length], earlier.ids[: earlier.prompt_length])
        asked = _words(_asked(row.conversation))
        # however long the prompt, another number makes another task
        if changed.total() > REWORDED * len(asked) or any(c.isdigit() for word in changed for c in word):
            return False
        return not changed & self._changed(row.ids[row.prompt_length :], earlier.ids[earlier.prompt_length :])

    def _changed(self, ids: np.ndarray, before: np.ndarray) -> Counter:
        """Words in which two texts differ; of texts with as many words place by place, so that swapped words count."""
        a, b = _words(self._decode(ids)), _words(self._decode(before))
        if len(a) == len(b):
            return Counter(word for pair in zip(a, b, strict=True) if pair[0] != pair[1] for word in pair)
        return Counter(a) - Counter(b) + (Counter(b) - Counter(a))


def signatures(texts: list[np.ndarray]) -> list[np.ndarray | None]:
    """MinHash over token 5-grams by rensa, of many texts (token ids) at once; None for a text under 64 tokens."""
    import rensa

    shingles = [_shingles(t.astype(np.uint64)) for t in texts if len(t) >= SHORTEST]
    starts = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
    flat = np.concatenate([*shingles, np.zeros(0, np.uint64)])
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, starts, PERMUTATIONS, 42)
    found = iter(np.array(matrix.to_rows(), np.uint32))
    return [next(found) if len(t) >= SHORTEST else None for t in texts]


def _shingles(ids: np.ndarray) -> np.ndarray:
    # a polynomial hash of each 5-gram, modulo 2^64; the multiplier is the golden ratio's (Knuth)
    hashes = ids[: 1 - SHINGLE]
    for i in range(1, SHINGLE):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[i : len(ids) - SHINGLE + 1 + i]
    return hashes


def _bands(row) -> list[bytes]:
    if row.bands is None:  # asked for up to three times
        parts = () if row.signature is None else row.signature.reshape(BANDS, -1)
        row.bands = [bytes([i]) + part.tobytes() for i, part in enumerate(parts)]
    return row.bands


def grams_of(prompts: list[str]) -> set[str]:
    """Word 13-grams of evaluation prompts; a prompt of fewer words is one as a whole."""
    return {gram for prompt in prompts for gram in _grams(_words(SWITCH.sub("", prompt)))}


def shared_gram(conversation: dict, grams: set[str]) -> str | None:
    """The first of `grams` that a conversation holds; a short one counts where a user says nothing else."""
    for message in conversation["messages"] if grams else ():
        words = _words(SWITCH.sub("", message["content"]) + " " + message.get("reasoning_content", ""))
        # a short question is one gram as a whole, which an answer may hold by chance
        if message["role"] != "user" and len(words) < WORDS:
            continue
        if hit := next((gram for gram in _grams(words) if gram in grams), None):
            return hit
    return None


def _words(text: str) -> list[str]:
    """Lower-case words and numbers, with every operator and CJK character a word of its own: 3 + 5 is not 3 - 5."""
    return re.findall(r"[^\W_\u3400-\u9fff]+|[\u3400-\u9fff]|[-+*/=<>^]", text.lower())


def _grams(words: list[str]) -> Iterator[str]:
    return (" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1)))
