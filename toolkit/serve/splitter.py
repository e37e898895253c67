"""A reply taken apart while it streams: reasoning, answer and tool calls, however the text is cut into pieces.

splitter = Splitter(opened=False); splitter.feed("<thi") + splitter.feed("nk>so</think>\\n\\n42") + splitter.close()
"""

import json


class Splitter:
    """Text in, (kind, text) out; kind is reasoning, content or tool_call (JSON: its name, and its arguments as
    JSON text, which is how OpenAI's API hands them out).

    The same as `generate.split_reply` for a text that opens its think block; white space around each part is dropped.
    `stopped` is set once one of the `stop` texts came up in the answer: nothing comes after it.
    """

    def __init__(self, opened: bool, tools: bool = False, stop: tuple[str, ...] = ()):
        self.state = "reasoning" if opened else "content"
        self.stopped = False
        self._buffer = ""
        self._begun = False  # this part has shown text, so white space now lies inside it
        answer = {"<tool_call>": "tool_call"} if tools else {}
        answer |= dict.fromkeys(stop, "stopped")
        self._tags = {
            "content": answer if opened else {"<think>": "reasoning", **answer},
            "reasoning": {"</think>": "content"},
            "tool_call": {"</tool_call>": "content"},
        }

    def feed(self, text: str) -> list[tuple[str, str]]:
        """What can be shown now; what may yet turn out to be a tag, or trailing white space, waits."""
        out: list[tuple[str, str]] = []
        self._buffer += text
        while not self.stopped and (hit := self._next_tag()):
            start, tag = hit
            before, self._buffer = self._buffer[:start], self._buffer[start + len(tag) :]
            out += self._part(before.rstrip())
            self._enter(tag)
        if self.stopped or self.state == "tool_call":
            return out
        keep = self._held()
        shown, self._buffer = self._buffer[: len(self._buffer) - keep], self._buffer[len(self._buffer) - keep :]
        return out + self._part(shown)

    def close(self) -> list[tuple[str, str]]:
        """What waited, at the end of the reply. A call that was cut off is given as the text it is."""
        if self.stopped:
            return []
        if self.state == "tool_call":
            self.state, self._buffer, self._begun = "content", "<tool_call>" + self._buffer, True
        rest, self._buffer = self._buffer.rstrip(), ""
        return self._part(rest)

    def _next_tag(self) -> tuple[int, str] | None:
        found = [(self._buffer.find(tag), tag) for tag in self._tags[self.state]]
        return min((hit for hit in found if hit[0] >= 0), default=None)

    def _enter(self, tag: str) -> None:
        into = self._tags[self.state][tag]
        if into == "reasoning":  # one think block a reply: a later tag is part of the answer, as in split_reply
            del self._tags["content"]["<think>"]
        if into == "stopped":
            self.stopped = True
        else:
            self.state, self._begun = into, False

    def _part(self, text: str) -> list[tuple[str, str]]:
        if self.state == "tool_call":
            return [read_call(text)]
        if not self._begun:
            text = text.lstrip()
        self._begun = self._begun or bool(text)
        return [(self.state, text)] if text else []

    def _held(self) -> int:
        """Characters at the end of the buffer that may become a tag, with the white space before them."""
        kept = 0
        for tag in self._tags[self.state]:
            longest = min(len(tag) - 1, len(self._buffer))
            kept = max(kept, next((n for n in range(longest, 0, -1) if self._buffer.endswith(tag[:n])), 0))
        shown = self._buffer[: len(self._buffer) - kept]
        return kept + len(shown) - len(shown.rstrip())


def read_call(text: str) -> tuple[str, str]:
    """("tool_call", its JSON), or the text as content when it is no call."""
    try:
        call = json.loads(text)
        name, arguments = call["name"], call["arguments"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "content", f"<tool_call>{text}</tool_call>"
    if type(name) is not str or type(arguments) is not dict:
        return "content", f"<tool_call>{text}</tool_call>"
    inner = json.dumps(arguments, ensure_ascii=False)
    return "tool_call", json.dumps({"name": name, "arguments": inner}, ensure_ascii=False)
