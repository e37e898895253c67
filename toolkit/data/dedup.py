"""Rows that repeat each other or an evaluation prompt: exact duplicates, near duplicates, 13-gram overlap.

from toolkit.data.dedup import NearDuplicates, sign; sign([row]); NearDuplicates(decode).find(row)
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

import numpy as np

from toolkit.data.conversation import asked
from toolkit.data.rows import Row
from toolkit.family import without_switch
from toolkit.records import Conversation

# GPT-3's decontamination (arXiv:2005.14165, appendix C).
WORDS_SHARED = 13
# Tokens that MinHash looks at together.
SHINGLE = 5
# A pair at Jaccard 0.85 meets in a band with probability 0.93; every meeting is then verified.
PERMUTATIONS, BANDS = 64, 8
SIMILAR = 0.85
# Share of the asked words that may differ in a near duplicate; short questions that differ in a word are others.
REWORDED = 0.05
# Tokens of a completion; shorter ones of one kind look alike to MinHash, so they are only compared exactly.
SHORTEST = 64
# Latest rows of a band that are verified, so that a thousand prompts with one long answer take no quadratic time.
CANDIDATES = 32
WORD = re.compile(r"[^\W_\u3400-\u9fff]+|[\u3400-\u9fff]|[-+*/=<>^]")

Decode = Callable[[np.ndarray], str]


def prompt_key(conversation: Conversation) -> bytes:
    """16 bytes that are equal for rows with the same prompt: all that stands before the last reply, system prompt, earlier
    turns, tools and their results included; case, spacing and typed mode switches aside."""
    messages = conversation["messages"]
    texts = [json.dumps(conversation.get("tools", []), sort_keys=True)]
    for message in messages[:-1] if messages[-1]["role"] == "assistant" else messages:
        content = message["content"]
        texts += [message["role"], without_switch(content) if message["role"] == "user" else content]
        if "tool_calls" in message:
            texts.append(json.dumps(message["tool_calls"], sort_keys=True))
    return digest("\0".join(texts))


def digest(text: str) -> bytes:
    """16 bytes by which equal texts are found, case and spacing aside."""
    plain = " ".join(text.lower().split())
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Duplicates:
    """Rows whose prompt and completion both repeat an earlier row's, case, spacing and typed mode switches aside."""

    def __init__(self, decode: Decode):
        self._decode = decode
        self._by_prompt: dict[bytes, Row] = {}
        self._by_text: dict[bytes, Row] = {}

    def find(self, row: Row, key: bytes) -> Row | None:
        """The earlier row that this one repeats; None where there is none, and then it is remembered under its prompt's
        `key`."""
        first = self._by_prompt.setdefault(key, row)
        if first is row:  # whole texts are decoded only where two rows ask the same
            return None
        self._by_text[self._text_key(first)] = first
        earlier = self._by_text.setdefault(self._text_key(row), row)
        return None if earlier is row else earlier

    def _text_key(self, row: Row) -> bytes:
        return digest(without_switch(self._decode(row.ids)))


class NearDuplicates:
    """Rows whose prompt and completion are both nearly an earlier row's.

    Candidates come from an index over bands of the completions' MinHash signatures; each is then verified. Prompts are
    nearly the same when at most 5% of the asked words differ, no number differs, and no word differs in the completion
    as well: such a word is what the row is about (an order number, a column), and its row another task.
    """

    def __init__(self, decode: Decode):
        self._decode = decode
        self._buckets: defaultdict[bytes, list[Row]] = defaultdict(list)

    def find(self, row: Row) -> Row | None:
        """The earlier row that this one nearly repeats, or None."""
        near = [earlier for band in row.bands for earlier in self._buckets.get(band, [])[-CANDIDATES:]]
        for earlier in dict.fromkeys(near):  # each once, in the order they came
            # the share of equal MinHash values estimates the Jaccard similarity of the two sets of 5-grams
            if np.mean(earlier.signature == row.signature) >= SIMILAR and self._asks_the_same(row, earlier):
                return earlier
        return None

    def add(self, row: Row) -> None:
        """Remember a row for later calls of `find`."""
        for band in row.bands:
            self._buckets[band].append(row)

    def _asks_the_same(self, row: Row, earlier: Row) -> bool:
        changed = self._changed(row.prompt, earlier.prompt)
        questions = " ".join(asked(row.conversation["messages"]))
        if changed.total() > REWORDED * len(words_of(questions)):
            return False
        # however long the prompt, another number makes another task
        if any(map(str.isdigit, "".join(changed))):
            return False
        return not changed & self._changed(row.completion, earlier.completion)

    def _changed(self, ids: np.ndarray, before: np.ndarray) -> Counter[str]:
        """Words in which two texts differ; of texts with as many words place by place, so that swapped words count."""
        a = words_of(self._decode(ids))
        b = words_of(self._decode(before))
        if len(a) == len(b):
            return Counter(word for pair in zip(a, b, strict=True) if pair[0] != pair[1] for word in pair)
        return Counter(a) - Counter(b) + (Counter(b) - Counter(a))


def sign(rows: list[Row]) -> None:
    """Give rows their signature: MinHash over token 5-grams by rensa; none to completions under 64 tokens."""
    import rensa

    # a seed of its own: signatures stay the same whatever the recipe's seed is
    long = [row for row in rows if len(row.completion) >= SHORTEST]
    shingles = [_shingles(row.completion.astype(np.uint64)) for row in long]
    starts = np.cumsum([0, *map(len, shingles)], dtype=np.uint64)
    flat = np.concatenate([*shingles, np.zeros(0, np.uint64)])
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, starts, PERMUTATIONS, 42)
    for row, signature in zip(long, np.array(matrix.to_rows(), np.uint32), strict=True):
        row.signature = signature
        for number, part in enumerate(signature.reshape(BANDS, -1)):
            # rows meet in a band only at its own place
            row.bands.append(bytes([number]) + part.tobytes())


def _shingles(ids: np.ndarray) -> np.ndarray:
    # a polynomial hash of each 5-gram, modulo 2^64; the multiplier is the golden ratio's (Knuth)
    hashes = ids[: 1 - SHINGLE]
    for i in range(1, SHINGLE):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[i : len(ids) - SHINGLE + 1 + i]
    return hashes


def grams_of(prompts: list[str]) -> set[str]:
    """Word 13-grams of evaluation prompts; a prompt of fewer words is one as a whole."""
    return {gram for prompt in prompts for gram in _grams(words_of(without_switch(prompt)))}


def shared_gram(conversation: Conversation, grams: set[str]) -> str | None:
    """The first of `grams` that a conversation holds; a short one counts where a user says nothing else."""
    for message in conversation["messages"] if grams else ():
        words = words_of(without_switch(message["content"]) + " " + message.get("reasoning_content", ""))
        # a short question is one gram as a whole, which an answer may hold by chance
        if message["role"] != "user" and len(words) < WORDS_SHARED:
            continue
        for gram in _grams(words):
            if gram in grams:
                return gram
    return None


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers, with every operator and CJK character a word of its own: 3 + 5 is not 3 - 5."""
    return WORD.findall(text.lower())


def _grams(words: list[str]) -> Iterator[str]:
    # of fewer words one gram, as a whole
    for start in range(max(1, len(words) - WORDS_SHARED + 1)):
        yield " ".join(words[start : start + WORDS_SHARED])
