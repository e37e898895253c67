"""Right or wrong, obedient or not: one reply at a time, by rules that are written down here.

with Judge() as judge: judge.right("So it is \\boxed{42}.", "42")  # True
"""

import contextlib
import json
import queue
import re
import subprocess
import sys
import threading
import unicodedata

from toolkit.files import ToolkitError
from toolkit.generate import Reply

SECONDS = 10.0
"""Longest a comparison may take; `9^{9^{9}}` would take the machine."""
LEAK = re.compile(
    r"(?:^|[\n.!?…。！？])\s*(?:"
    r"wait\b|h+m+\b|hold on\b|let me (?:think|see|check|re-?check|double|verify|reconsider|re-?read|work)|let's see\b|"
    r"(?:ok|okay|alright|all right|right),? (?:so|let)\b|so,? the user\b|the user (?:is asking|wants|asks)|"
    r"等等|等一下|嗯|让我(?:想|再|检查|看看|重新|验证)|我再(?:想|检查|验算)|好的?，(?:用户|我(?:需要|得|要先))|用户(?:问|想|要求))",
    re.IGNORECASE)  # fmt: skip
"""How Qwen3's reasoning sounds at the start of a sentence, in English and Chinese. An answer does not think aloud."""
LENGTH_FACTOR = 3.0
"""A direct answer longer than this many times the base's is reasoning that moved outside the block."""


def thinks(reply: Reply) -> bool:
    """What thinking mode promises: a block that is not empty, is closed, and has an answer after it."""
    after = reply.text.partition("</think>")[2].strip()
    return bool(reply.opened and reply.reasoning and after and not has_tags(after))


def answers_at_once(reply: Reply, base_tokens: float) -> bool:
    """What non-thinking mode promises: an answer without tags, without thinking aloud, not far longer than the base's."""
    return bool(reply.answer) and not (has_tags(reply.text) or leaks(reply) or too_long(reply, base_tokens))


def obeys_no_think(reply: Reply) -> bool:
    """`/no_think` in the prompt of a thinking template: the block stays empty (Qwen3 writes it) or is not there."""
    return bool(reply.answer) and not reply.reasoning and not has_tags(reply.answer) and not leaks(reply)


def has_tags(text: str) -> bool:
    return "<think>" in text or "</think>" in text


def leaks(reply: Reply) -> bool:
    return bool(LEAK.search(reply.answer))


def too_long(reply: Reply, base_tokens: float) -> bool:
    return reply.answer_tokens > LENGTH_FACTOR * base_tokens


def is_mathematics(expected: str) -> bool:
    """An expected answer with a digit, a LaTeX command or an operator between symbols. Words are compared as words:
    math-verify would read "Paris" as a product of five variables and order would not count."""
    return bool(re.search(r"\d|\\[a-zA-Z]|(?<!\w)\w\s*[=+*/^<>]\s*\w(?!\w)", expected))


def words(text: str) -> list[str]:
    """Lower-case words without punctuation or markup; each Chinese character counts as a word."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+", text)


def same_words(answer: str, expected: str) -> bool:
    """The answer is the expected words, or its last sentence contains them in a row ("The capital is Paris.").

    Only the last sentence: an answer that lists the candidates and then decides is judged by its decision."""
    sentences = [s for s in re.split(r"(?<=[.!?])\s+|[。！？\n]+", answer) if words(s)]
    wanted, last = words(expected), words(sentences[-1]) if sentences else []
    runs = [last[i : i + len(wanted)] for i in range(len(last) - len(wanted) + 1)]
    return bool(wanted) and (words(answer) == wanted or wanted in runs)


class Judge:
    """Compares answers; mathematics in a process of its own, which is ended when a comparison takes too long.

    math-verify's own timeout is an alarm signal: it fails outside the main thread (notebook servers, training callbacks),
    and no signal interrupts a big-integer power. Without it nothing ends `9^{9^{9}}`. Hence a process."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds, self.timeouts = seconds, 0
        self.process: subprocess.Popen | None = None
        self.lines: queue.Queue[str] = queue.Queue()
        self.known: dict[tuple[str, str], bool] = {}

    def right(self, answer: str, expected: str) -> bool:
        """Whether the answer is the expected one: as mathematics if that is mathematics, else as words."""
        if not is_mathematics(expected):
            return same_words(answer, expected)
        key = (answer, expected)
        if key not in self.known:
            equal = bool(words(answer)) and _squeezed(answer) == _squeezed(expected)
            self.known[key] = equal or self._verified(answer, expected)
        return self.known[key]

    def _verified(self, answer: str, expected: str) -> bool:
        # math-verify finds no number that touches Chinese text: 答案是42。
        apart = re.sub(r"[\u3000-\u9fff\uff00-\uffef]+", " ", answer)
        process = self.process or self._start()
        process.stdin.write(json.dumps([apart, expected]) + "\n")
        process.stdin.flush()
        try:
            line = self.lines.get(timeout=self.seconds)
        except queue.Empty:
            self.timeouts += 1
            self.close()
            return False
        if not line:
            self.close()
            raise ToolkitError("math-verify ended unexpectedly: run `python -c 'import math_verify'` to see why")
        return json.loads(line)

    def _start(self) -> subprocess.Popen:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self.lines = queue.Queue()
        threading.Thread(target=_forward, args=(self.process.stdout, self.lines), daemon=True).start()
        ready = self.lines.get(timeout=120)  # importing sympy takes seconds on a busy machine
        if not ready:
            raise ToolkitError("math-verify did not start: run `python -c 'import math_verify'` to see why")
        return self.process

    def close(self) -> None:
        """End the process; a next comparison starts another."""
        if self.process:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()
            self.process = None

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_) -> None:
        self.close()


# What the process runs. `None` switches math-verify's alarm off: here the clock is the parent's.
SERVE = r"""
import json, logging, sys
logging.disable(logging.CRITICAL)
from math_verify import parse, verify
print("ready", flush=True)
for line in sys.stdin:
    answer, expected = json.loads(line)
    gold = expected if "$" in expected or "boxed" in expected else f"${expected}$"
    gold, found = (parse(text, parsing_timeout=None) for text in (gold, answer))
    if not found and len(answer) < 100:  # a bare formula without dollars: a + b
        found = parse(f"${answer}$", parsing_timeout=None)
    print(json.dumps(bool(verify(gold, found, timeout_seconds=None))), flush=True)
"""


def _forward(stream, lines: queue.Queue) -> None:
    with contextlib.suppress(ValueError):  # closed while it waited
        for line in stream:
            lines.put(line)
    lines.put("")


def _squeezed(text: str) -> str:
    return re.sub(r"[\s$]|\\boxed\{(.*)\}|\.$", r"\1", unicodedata.normalize("NFKC", text).strip())
