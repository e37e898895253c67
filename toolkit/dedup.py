"""Rows that repeat each other, or repeat an evaluation prompt: exact, near and 13-gram overlap.

near = NearDuplicates(); near.seen(signatures([ids]))   # True when almost the same text came before
"""

import hashlib
import re

import numpy as np

WORDS = 13  # GPT-3's decontamination (arXiv:2005.14165, appendix C)
SHINGLE = 5  # token 5-grams
PERMUTATIONS, BANDS = (
    64,
    8,
)  # a pair at Jaccard 0.85 meets in a band with probability 0.93; every meeting is then verified
SIMILAR = 0.85
SHORTEST = 64  # tokens; shorter texts of one kind look alike to MinHash, so they are only compared exactly


def text_key(conversation: dict) -> bytes:
    """16 bytes that are equal for conversations with the same text, case and spacing aside."""
    parts = [m["role"] + "\n" + m.get("reasoning_content", "") + "\n" + m["content"] for m in conversation["messages"]]
    calls = [str(m["tool_calls"]) for m in conversation["messages"] if m.get("tool_calls")]
    normal = " ".join("\n".join(parts + calls).lower().split())
    return hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Duplicates:
    """Conversations equal to one before, case and spacing aside. Only those that ask the same are read in full."""

    def __init__(self):
        self._by_prompt: dict[bytes, dict | set[bytes]] = {}

    def seen(self, prompt: bytes, conversation: dict) -> bool:
        """Whether it came before; `prompt` is the key of what it asks. Remembers it if not."""
        before = self._by_prompt.setdefault(prompt, conversation)
        if before is conversation:
            return False
        if not isinstance(before, set):
            before = self._by_prompt[prompt] = {text_key(before)}
        known, key = len(before), text_key(conversation)
        before.add(key)
        return len(before) == known


class Grams:
    """Word 13-grams of evaluation prompts; a prompt of fewer words is held as a whole."""

    def __init__(self, prompts: list[str]):
        self.grams = {" ".join(g) for p in prompts for g in _grams(_words(p))}
        self.whole = {" ".join(_words(p)) for p in prompts if len(_words(p)) < WORDS}

    def shared(self, conversation: dict) -> str | None:
        """The first evaluation 13-gram (or short whole prompt) found in a conversation, or None."""
        if not self.grams and not self.whole:
            return None
        for message in conversation["messages"]:
            words = _words(message["content"] + " " + message.get("reasoning_content", ""))
            if message["role"] == "user" and " ".join(words) in self.whole:
                return " ".join(words)
            if self.grams and (hit := next((" ".join(g) for g in _grams(words) if " ".join(g) in self.grams), None)):
                return hit
        return None


def _words(text: str) -> list[str]:
    """Lower-case words and numbers, with every operator and CJK character a word of its own: 3 + 5 is not 3 - 5."""
    return re.findall(r"[^\W_\u3400-\u9fff]+|[\u3400-\u9fff]|[-+*/=<>^]", text.lower())


def _grams(words: list[str]):
    return zip(*(words[i:] for i in range(WORDS)), strict=False)


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
    hashes = ids[: 1 - SHINGLE]
    for i in range(1, SHINGLE):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[i : len(ids) - SHINGLE + 1 + i]
    return hashes


class NearDuplicates:
    """Texts much like one before: candidates from an index over bands of their signatures, each then verified."""

    def __init__(self):
        self._buckets: dict[bytes, list[int]] = {}
        self._signatures: list[np.ndarray] = []

    def seen(self, new: list[np.ndarray]) -> bool:
        """Whether any of these signatures is nearly one seen before; remembers them if not."""
        bands = [_bands(s) for s in new]
        if any(self._similar(s, b) for s, b in zip(new, bands, strict=True)):
            return True
        for signature, keys in zip(new, bands, strict=True):
            for bucket in keys:
                self._buckets.setdefault(bucket, []).append(len(self._signatures))
            self._signatures.append(signature)
        return False

    def _similar(self, signature: np.ndarray, bands: list) -> bool:
        candidates = {c for b in bands for c in self._buckets.get(b, ())}
        return any((self._signatures[c] == signature).mean() >= SIMILAR for c in candidates)


def _bands(signature: np.ndarray) -> list[bytes]:
    raw, width = signature.tobytes(), signature.nbytes // BANDS
    return [bytes([i]) + raw[i * width : (i + 1) * width] for i in range(BANDS)]
