"""The real Qwen3 tokenizer, rebuilt offline from the token ranks that Qwen's own dashscope package carries.

folder = build(tmp_path)  # tokenizer.json, tokenizer_config.json, chat_template.jinja: 151,669 tokens, 2 s
"""

import base64
import importlib.util
import json
from pathlib import Path

from data_recipes.pocket.build import ADDED, SPECIAL, SPLIT

FIRST_SPECIAL = 151643


def template(name: str = "qwen3") -> str:
    """A chat template as the installed TRL ships it."""
    folder = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def build(folder: Path) -> Path:
    """Write the tokenizer's files to `folder` and return it."""
    import tokenizers
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    ranks = Path(importlib.util.find_spec("dashscope").origin).parent / "resources" / "qwen.tiktoken"
    pieces = [base64.b64decode(line.split()[0]) for line in ranks.read_bytes().splitlines()]
    vocabulary, merges = _merges(pieces)
    tokenizer = Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, special=t in SPECIAL, normalized=False) for t in SPECIAL + ADDED])
    assert tokenizer.token_to_id("<|endoftext|>") == FIRST_SPECIAL
    assert tokenizer.token_to_id("</think>") == 151668
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template())
    return folder


def _merges(pieces: list[bytes]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE from tiktoken ranks: a piece was made by the merge that its parts, merged by rank, stop before."""
    letters = _byte_letters()
    rank = {piece: i for i, piece in enumerate(pieces)}

    def text(piece: bytes) -> str:
        return "".join(letters[b] for b in piece)

    merges = []
    for piece in pieces:
        if len(piece) > 1:
            parts = _split(piece, rank)
            if len(parts) == 2:
                merges.append((text(parts[0]), text(parts[1])))
    return {text(p): i for p, i in rank.items()}, merges


def _split(piece: bytes, rank: dict[bytes, int]) -> list[bytes]:
    """Merge a piece's bytes by rank, with only the merges that came before the piece itself."""
    parts, limit = [bytes([b]) for b in piece], rank[piece]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: rank.get(parts[i] + parts[i + 1], limit))
        if rank.get(parts[best] + parts[best + 1], limit) >= limit:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
