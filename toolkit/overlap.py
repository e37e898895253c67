"""Rows that repeat each other, or repeat an evaluation prompt: exact, near and 13-gram overlap.

near = NearDuplicates(); near.seen([row_ids])   # True when almost the same text came before
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


class NearDuplicates:
    """MinHash over token 5-grams by rensa: candidates from its LSH index, each verified on the signatures."""

    def __init__(self):
        import rensa

        self._hash = rensa.RMinHash.digest_matrix_from_flat_token_hashes
        self._buckets: dict[bytes, list[int]] = {}
        self._signatures: list[np.ndarray] = []

    def seen(self, texts: list[np.ndarray]) -> bool:
        """Whether any of a row's supervised texts (token ids) is nearly one seen before; remembers those that are not."""
        new = [self._signature(t) for t in texts if len(t) >= SHORTEST]
        if any(self._similar(s) for s in new):
            return True
        for signature in new:
            for bucket in self._bands(signature):
                self._buckets.setdefault(bucket, []).append(len(self._signatures))
            self._signatures.append(signature)
        return False

    def _signature(self, ids: np.ndarray) -> np.ndarray:
        shingles = ids[: 1 - SHINGLE].astype(np.uint64)
        for i in range(1, SHINGLE):
            shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + ids[i : len(ids) - SHINGLE + 1 + i].astype(np.uint64)
        matrix = self._hash(shingles, np.array([0, len(shingles)], np.uint64), PERMUTATIONS, 42)
        return np.array(matrix.to_rows()[0], np.uint32)

    def _bands(self, signature: np.ndarray):
        return [bytes([i]) + band.tobytes() for i, band in enumerate(signature.reshape(BANDS, -1))]

    def _similar(self, signature: np.ndarray) -> bool:
        candidates = {c for b in self._bands(signature) for c in self._buckets.get(b, ())}
        return any((self._signatures[c] == signature).mean() >= SIMILAR for c in candidates)
