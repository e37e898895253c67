"""Replies that were paid for, kept on the disk: an evaluation that is interrupted or repeated asks only what is missing.

store = ReplyStore(Path("outputs/.base_replies/0123456789abcdef.jsonl")); replies = store.read()

One line a reply: its place among the questions, the reply, and a checksum, since a damaged line must not become a score.
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from toolkit.evaluation.generate import Reply
from toolkit.evaluation.questions import fingerprint
from toolkit.files import append_rows


@dataclass(frozen=True)
class ReplyStore:
    """One file of replies to one list of questions."""

    path: Path

    def read(self) -> dict[int, Reply]:
        """The replies by their place; lines that are cut off or damaged are left out."""
        if not self.path.is_file():
            return {}
        replies = {}
        # not splitlines(), which also splits at separators inside a text
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                if row["checksum"] == fingerprint([row["place"], row["reply"]]):
                    replies[row["place"]] = Reply(**row["reply"])
        return replies

    def add(self, replies: dict[int, Reply]) -> None:
        """Append some replies, so that a kill costs one batch at most."""
        rows = []
        for place, reply in replies.items():
            fields = asdict(reply)
            rows.append({"place": place, "reply": fields, "checksum": fingerprint([place, fields])})
        append_rows(self.path, rows)
