"""What can be asked of a run and what comes back: a request, its streamed pieces, and why it may be refused.

for piece in converse(engine, Ask([{"role": "user", "content": "Hi"}], thinking=False)): print(piece.text, end="")
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from toolkit.files import ToolkitError
from toolkit.generate import SAMPLING

BASE = "base"
"""The name under which a request reaches the model without any adapter."""


class Refused(ToolkitError):
    """A request that is not answered; `status` is HTTP's word for why, `code` OpenAI's."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass(frozen=True)
class Ask:
    """One request: canonical messages, the mode, and what the caller wants otherwise than the mode's own sampling."""

    messages: list[dict]
    thinking: bool = True
    model: str = ""
    """One of engine.names; the first of them when empty."""
    tools: list[dict] | None = None
    max_tokens: int = 2048
    sampling: dict = field(default_factory=dict)
    """temperature (0 is greedy), top_p, top_k, min_p."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts that end the answer; reasoning may hold them."""

    @property
    def values(self) -> dict:
        return {**SAMPLING["thinking" if self.thinking else "non_thinking"], **self.sampling}


@dataclass(frozen=True)
class Piece:
    """A part of a reply. `kind`: reasoning, content, tool_call (text is its JSON), end, or error."""

    kind: str
    text: str = ""
    finish: str = ""
    """At the end: stop, length or tool_calls."""
    usage: dict = field(default_factory=dict)
    """At the end: prompt_tokens, completion_tokens, reasoning_tokens."""
    error: Refused | None = None


@dataclass(eq=False)
class Job:
    """A request under way: its pieces go to `emit`, from another thread; setting `cancelled` stops it at a token."""

    ask: Ask
    emit: Callable[[Piece], None]
    deadline: float
    """In time.monotonic() seconds: in the queue it is refused then, in the middle of a reply it is cut."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    ids: list[int] = field(default_factory=list)
    opened: bool = False
    """The prompt ends inside a think block (thinking-only models)."""
    limit: int = 0

    def over(self) -> bool:
        return self.cancelled.is_set() or time.monotonic() > self.deadline


def converse(engine, ask: Ask, seconds: float = 3600) -> Iterator[Piece]:
    """The pieces of a reply as they come, for one thread that waits for them. Raises Refused.

    Leaving the iterator, by Ctrl-C or `close()`, stops the reply."""
    pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    job = Job(ask, pieces.put, time.monotonic() + seconds)
    engine.start(job)
    try:
        while (piece := pieces.get()).kind != "end":
            if piece.error:
                raise piece.error
            yield piece
        yield piece
    finally:
        job.cancelled.set()
