"""Right or wrong, obedient or not: one reply at a time, by rules that are written down here and in answers.py.

with AnswerChecker() as checker: checker.is_right("So it is \\boxed{42}.", "42")  # True
"""

import contextlib
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import mean, median
from typing import Any, NamedTuple

from toolkit.evaluation.answers import is_same_choice, normalized, required_words, sentences, words
from toolkit.evaluation.generate import Reply
from toolkit.family import THINK_CLOSE, THINK_TAG
from toolkit.files import ToolkitError
from toolkit.records import Question

# Longest a comparison may take; `9^{9^{9}}` would take the machine.
SECONDS = 10.0
# How Qwen3's reasoning sounds at the start of a sentence, in English and Chinese. An answer does not think aloud.
LEAK = re.compile(
    r"(?:^|[\n.!?…。！？])\s*(?:"
    r"wait\b|h+m+\b|hold on\b|let me (?:think|see|check|re-?check|double|verify|reconsider|re-?read|work)|let's see\b|"
    r"(?:ok|okay|alright|all right|right),? (?:so|let)\b|so,? the user\b|the user (?:is asking|wants|asks)|"
    r"等等|等一下|嗯|让我(?:想|再|检查|看看|重新|验证)|我再(?:想|检查|验算)|好的?，(?:用户|我(?:需要|得|要先))|用户(?:问|想|要求))",
    re.IGNORECASE)  # fmt: skip
# A direct answer longer than this many times the base's is reasoning that moved outside the block.
LENGTH_FACTOR = 3.0


class Mark(NamedTuple):
    """One row of evaluation's long table, of which every number is a sum."""

    section: str
    """A mode, or forgetting."""
    model: str
    """base or tuned."""
    metric: str
    question: int
    """The number of the question, probe or held-out row in its section: what base and tuned are paired by."""
    value: float
    weight: float
    """What it counts for: 0 for nothing."""


# --- one reply -------------------------------------------------------------------------------------------------------


def reply_marks(
    mode: str, reply: Reply, question: Question, longest: float | None, checker: "AnswerChecker"
) -> Iterator[tuple[str, float, int]]:
    """(metric, value, weight) of one reply; `longest` is the number of tokens that a direct answer to the question may
    have, None for a model with one mode.

    A reply that the limit cut is neither wrong nor disobedient: nobody knows how it would have ended. It counts in
    `cut` alone (and in the lengths, see lengths.py)."""
    # a cut reply may have the right number on its way to another
    right = reply.finished and checker.is_right(reply.answer, question["expected_answer"])
    obedient = thinks(reply) if mode == "thinking" else is_direct(reply, longest)
    counts = int(reply.finished)
    yield f"accuracy/set/{question['set']}", right, counts
    yield "accuracy/chat" if question["chat"] else "accuracy", right, counts
    yield "adherence", obedient, counts
    yield "reasoning_tokens", reply.reasoning_tokens, 1
    yield "answer_tokens", reply.answer_tokens, 1
    yield "cut", not reply.finished, 1


def is_direct(reply: Reply, longest: float | None) -> bool:
    """What non-thinking mode promises: an answer without tags. A hybrid model must not let its reasoning leak into it
    either, neither in words nor in length; a model without a thinking mode has none to leak from."""
    plain = bool(reply.answer) and not has_tags(reply.text)
    return plain and (longest is None or (not leaks(reply) and reply.answer_tokens <= longest))


def longest_answers(numbers: Sequence[int], base: Sequence[Reply]) -> dict[int, float]:
    """Tokens that a direct answer to each question may have, by what the base takes for it, or for most questions."""
    lengths = defaultdict(list)
    for number, reply in zip(numbers, base, strict=True):
        lengths[number].append(reply.answer_tokens)
    # where the base answers a question in three words, a sentence is no leak
    typical = median(map(mean, lengths.values()))
    return {number: LENGTH_FACTOR * max(mean(tokens), typical, 1) for number, tokens in lengths.items()}


def thinks(reply: Reply) -> bool:
    """What thinking mode promises: a block that is not empty, is closed, and has an answer after it."""
    after = reply.text.partition(THINK_CLOSE)[2].strip()
    return bool(reply.opened and reply.reasoning and after and not has_tags(after))


def has_tags(text: str) -> bool:
    """Whether a think tag stands in the text."""
    return bool(THINK_TAG.search(text))


def leaks(reply: Reply) -> bool:
    """Whether the answer thinks aloud."""
    return bool(LEAK.search(reply.answer))


# --- one answer ------------------------------------------------------------------------------------------------------


def is_mathematics(expected: str) -> bool:
    """An expected answer with a digit, a LaTeX command or an operator between symbols. Words are compared as words:
    math-verify would read "Paris" as a product of five variables and order would not count."""
    return bool(re.search(r"\d|\\[a-zA-Z]|(?<!\w)\w\s*[=+*/^<>]\s*\w(?!\w)", expected))


def same_words(answer: str, expected: str) -> bool:
    """The answer is the expected words, or its last sentence contains them in a row ("The capital is Paris.").

    Only the last sentence: an answer that lists the candidates and then decides is judged by its decision. (As many as the
    expected answer seems to have: `St. Petersburg` looks like two.)"""
    wanted = words(expected)
    last = words(" ".join(sentences(answer)[-len(sentences(expected)) :]))
    runs = [last[i : i + len(wanted)] for i in range(len(last) - len(wanted) + 1)]
    return bool(wanted) and (words(answer) == wanted or wanted in runs)


class AnswerChecker(contextlib.AbstractContextManager):
    """Compares answers; mathematics in a process of its own, which ends itself when a comparison takes too long.

    math-verify's own timeout is an alarm signal: it fails outside the main thread (notebook servers, training callbacks),
    and no signal interrupts a big-integer power: nothing but the end of its process stops `9^{9^{9}}`. It is a plain
    child process, since `multiprocessing` would import the caller's script once more, which runs it again where the
    script has no `if __name__ == "__main__"`."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds = seconds
        # math-verify's, with pipes of text; None where it is not needed or was ended
        self.process: Any = None

    def is_right(self, answer: str, expected: str) -> bool:
        """Whether the answer is the expected one. From the most to the least particular kind: the first that fits decides."""
        answer, expected = normalized(answer), normalized(expected)
        same = _squeezed(answer) == _squeezed(expected)
        if same or not words(expected):  # signs and emojis have no words
            return same and bool(expected.strip())
        same_choice = is_same_choice(answer, expected)
        if same_choice is not None:
            return same_choice
        if not is_mathematics(expected):
            return same_words(answer, expected)
        required, rest = required_words(expected)
        # in a formula, which has no rest, letters are variables and not words
        if rest != expected and same_words(answer, expected):
            return True
        return required <= set(words(answer)) and self._verified(answer, rest)

    def _verified(self, answer: str, expected: str) -> bool:
        """Whether math-verify finds both equal; False where it does not come to an end."""
        self.process = self.process or _start(self.seconds)
        # math-verify finds no number that touches Chinese text: 答案是42。
        apart = re.sub(r"\(?[\u3000-\u9fff]+[:)]?", " ", answer)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([apart, expected]) + "\n")
            self.process.stdin.flush()
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.close()  # out of time, or dead for want of memory: no verdict, and a fresh process for the next
        return False

    def close(self) -> None:
        """End the process; a next comparison starts another."""
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def __exit__(self, *_: object) -> None:
        self.close()


def _start(seconds: float) -> Any:
    process: Any = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(seconds)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
    )  # fmt: skip
    if not process.stdout.readline():  # "ready": importing sympy takes seconds, which are no comparison's
        raise ToolkitError("math-verify did not start: run `python -c 'import math_verify'` to see why")
    return process


# What the process runs. `None` switches math-verify's alarm off; faulthandler's clock ends the process from a thread
# that does not need the interpreter, so in the midst of a big-integer power too.
WORKER = r"""
import faulthandler, json, logging, sys
logging.disable(logging.CRITICAL)
from math_verify import parse, verify
print("ready", flush=True)
for line in sys.stdin:
    answer, expected = json.loads(line)
    faulthandler.dump_traceback_later(float(sys.argv[1]), exit=True)
    gold = expected if "$" in expected or "boxed" in expected else f"${expected}$"
    gold, found = (parse(text, parsing_timeout=None) for text in (gold, answer))
    if not found and len(answer) < 100:  # a bare formula without dollars: a + b
        found = parse(f"${answer}$", parsing_timeout=None)
    right = bool(verify(gold, found, timeout_seconds=None))
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(right), flush=True)
"""


def _squeezed(text: str) -> str:
    """Without what does not change an answer: dollars, a box, a last full stop, spaces but between digits."""
    text = re.sub(r"(?<=\d)\s(?=\d{3}(?!\d))", "", text.strip())  # 1 000 000
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)  # between two other digits a space means something: 1 1/2
    return re.sub(r"\$|\\boxed\{(.*)\}|\.$", r"\1", text)
