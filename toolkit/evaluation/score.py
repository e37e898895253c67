"""Right or wrong, obedient or not: one reply at a time, by rules that are written down here.

with Judge() as judge: judge.right("So it is \\boxed{42}.", "42")  # True
"""

import contextlib
import json
import re
import subprocess
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import mean, median

from toolkit.evaluation.generate import Reply
from toolkit.family import THINK_CLOSE, THINK_TAG
from toolkit.files import ToolkitError

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


def marks(
    mode: str, reply: Reply, question: dict, longest: float | None, judge: "Judge"
) -> Iterable[tuple[str, float, int]]:
    """(metric, value, weight) of one reply; `longest` is the number of tokens that a direct answer to the question may
    have, None for a model with one mode.

    A reply that the limit cut counts nothing for accuracy (weight 0), so that its share stands in `cut` alone."""
    # a cut reply may hold the right number on its way to another
    right = reply.finished and judge.right(reply.answer, question["expected_answer"])
    yield f"accuracy/set/{question['set']}", right, int(reply.finished)
    yield "accuracy/chat" if question["chat"] else "accuracy", right, int(reply.finished)
    yield "adherence", thinks(reply) if mode == "thinking" else is_direct(reply, longest), 1
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
    """What thinking mode promises: a block that is not empty, is closed, and has an answer after it. A block that the
    limit cut open breaks it too: endless thinking is how that mode dies, and `cut` stands beside it."""
    after = reply.text.partition(THINK_CLOSE)[2].strip()
    return bool(reply.opened and reply.reasoning and after and not has_tags(after))


def has_tags(text: str) -> bool:
    """Whether a think tag stands in the text."""
    return bool(THINK_TAG.search(text))


def leaks(reply: Reply) -> bool:
    """Whether the answer thinks aloud."""
    return bool(LEAK.search(reply.answer))


def is_mathematics(expected: str) -> bool:
    """An expected answer with a digit, a LaTeX command or an operator between symbols. Words are compared as words:
    math-verify would read "Paris" as a product of five variables and order would not count."""
    return bool(re.search(r"\d|\\[a-zA-Z]|(?<!\w)\w\s*[=+*/^<>]\s*\w(?!\w)", expected))


LATEX = re.compile(r"\\(?:text|mathrm|mbox)\{[^{}]*\}|\\[a-zA-Z]+")
OPERATOR = re.compile(r"[=+*/^<>]|(?<![^\W\d_])-")
NAME = re.compile(r"[\u3400-\u9fff]|(?<!\w)[^\W\d_]{2,}(?!\w)|(?<!\w)[A-Z][A-Za-z]*\d\w*|\d+(?::\d+)+")
MATHEMATICAL_WORDS = frozenset("and or ln log sin cos tan mod".split())


def required_words(expected: str) -> tuple[set[str], str]:
    """(words, rest) of an expected answer that is a number with words: those that stand before it or in one with it must be said
    (`Apollo 11`, `第3名`, `5 pm`, `H2O`, `12:30`); a unit after it (`5 km`, `42 apples`, `3元`) may be left out. No words in a
    formula, where letters are variables."""
    bare = LATEX.sub(" ", expected)
    if OPERATOR.search(bare) or not NAME.search(bare):
        return set(), expected
    first = re.search(r"\d|$", bare).start()
    said = [m[0].casefold() for m in NAME.finditer(bare) if m.start() < first or re.search(r"\d|^[ap]m$", m[0], re.I)]
    return set(said) - MATHEMATICAL_WORDS, NAME.sub(" ", bare)


KEYBOARD = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | dict.fromkeys((0x2212, 0x2013), "-")
"""Full-width forms → ASCII, minus sign and en dash → hyphen."""


def normalized(text: str) -> str:
    """Signs and digits as a keyboard has them: full-width forms, typographic minus signs, 负 before a number, powers, p.m."""
    text = text.translate(KEYBOARD)
    text = re.sub(r"负(?=\s*\d)", "-", text)
    text = re.sub(r"\b([ap])\.m\.?", r"\1m", text, flags=re.I)
    return re.sub("[⁰¹²³⁴-⁹]+", lambda power: "^{" + unicodedata.normalize("NFKC", power[0]) + "}", text)


def words(text: str) -> list[str]:
    """Lower-case words without punctuation or markup; each Chinese character counts as a word."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+", text)


def sentences(text: str) -> list[str]:
    """Those that hold a word."""
    return [s for s in re.split(r"(?<=[.!?])\s+|[。！？\n]+", text) if words(s)]


def same_words(answer: str, expected: str) -> bool:
    """The answer is the expected words, or its last sentence contains them in a row ("The capital is Paris.").

    Only the last sentence: an answer that lists the candidates and then decides is judged by its decision. (As many as the
    expected answer seems to have: `St. Petersburg` looks like two.)"""
    wanted, last = words(expected), words(" ".join(sentences(answer)[-len(sentences(expected)) :]))
    runs = [last[i : i + len(wanted)] for i in range(len(last) - len(wanted) + 1)]
    return bool(wanted) and (words(answer) == wanted or wanted in runs)


LETTER = r"([A-Z](?![\w'’+#-])|[a-z](?=\W*$))"
"""A choice: a capital that stands alone, or a small letter that ends the answer."""
CHOICES = (
    re.compile(r"^\W*([A-Za-z])\W*$"),
    re.compile(r"\\boxed\{\W*(?:\\text\{\W*)?([A-Za-z])\W*\}"),
    re.compile(rf"(?i:answer|option|choice|choose|select)(?i:\s+is)?[\s:*(_]*{LETTER}", re.ASCII),
    re.compile(rf"(?:答案|选项|选择|选)[是为]?[\s:*(]*(?:选项)?{LETTER}", re.ASCII),
    re.compile(r"(?<![\w'’-])([A-Z]) is (?:the )?(?:correct|right|better|best)", re.ASCII),
    re.compile(r"\(([A-Z])\)|\*\*([A-Z])\*\*"),
)
"""How people name their choice, the clearest way first."""
LONE = re.compile(r"(?<![\w'’-])(?!I\s+[a-z]|I['’])([A-Z])(?![\w'’+#-])", re.ASCII)
DECISIONS = (
    re.compile(r"\\boxed\{\s*(?:\\text\{\s*)?(\w+)"),
    re.compile(r"\*\*(\w+)\W*\*\*"),
    re.compile(r"^\W*(\w+)"),
    re.compile(r"\b(?:answer|claim|statement|it)\s+is\W+(\w+)", re.IGNORECASE),
    re.compile(r"(\w+)"),
)
OPPOSITES = frozenset({"yes", "no"}), frozenset({"true", "false"})


def chosen_letters(answer: str) -> set[str]:
    """The letter that an answer to a multiple-choice question names; several where it only mentions some."""
    answer = re.sub(r"(?<!\w)['\"‘“_`]([A-Z])['\"’”_`](?!\w)", r"\1", answer)
    # the last match of the clearest way: a reply may weigh the choices before it decides
    for way in CHOICES:
        if found := way.findall(answer):
            return {"".join(found[-1]).upper()}
    for sentence in reversed(sentences(answer)):
        if found := LONE.findall(re.sub(r"^\W*A\s+(?=[a-z])", "", sentence)):  # an article
            return set(found)
    return set()


def chosen_opposite(answer: str, pair: frozenset) -> str:
    """Which of two opposites an answer says: boxed or bold, at its beginning, after "the answer is", or last."""
    answer = re.sub(
        r"\bnot (true|false)\b", lambda m: "false" if m[1].lower() == "true" else "true", answer, flags=re.I
    )
    ways = ([word.casefold() for word in way.findall(answer)] for way in DECISIONS)
    return next((hits[-1] for way in ways if (hits := [word for word in way if word in pair])), "")


class Judge(contextlib.AbstractContextManager):
    """Compares answers; mathematics in a process of its own, which ends itself when a comparison takes too long.

    math-verify's own timeout is an alarm signal: it fails outside the main thread (notebook servers, training callbacks),
    and no signal interrupts a big-integer power: nothing but the end of its process stops `9^{9^{9}}`. It is a plain
    child process, since `multiprocessing` would import the caller's script once more, which runs it again where the
    script has no `if __name__ == "__main__"`."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds, self.timeouts = seconds, 0
        self.process: subprocess.Popen | None = None

    def right(self, answer: str, expected: str) -> bool:
        """Whether the answer is the expected one: as mathematics if that is mathematics, else as words."""
        # from the most to the least particular kind of answer: the first that fits decides
        answer, expected = normalized(answer), normalized(expected)
        wanted, same = words(expected), _squeezed(answer) == _squeezed(expected)
        if same or not wanted:  # signs and emojis have no words
            return same and bool(expected.strip())
        if letter := re.fullmatch(r"\W*(?:\\text\{\W*)?([A-Z])\W*", expected):
            return chosen_letters(answer) == {letter[1]}
        for pair in OPPOSITES:
            if set(wanted) < pair:
                return chosen_opposite(answer, pair) == wanted[0]
        if not is_mathematics(expected):
            return same_words(answer, expected)
        required, rest = required_words(expected)
        # a formula: what stands in it are variables, not words
        if rest == expected:
            return self._verified(answer, expected)
        return same_words(answer, expected) or (required <= set(words(answer)) and self._verified(answer, rest))

    def _verified(self, answer: str, expected: str) -> bool:
        self.process = self.process or _start(self.seconds)
        # math-verify finds no number that touches Chinese text: 答案是42。
        apart = re.sub(r"\(?[\u3000-\u9fff]+[:)]?", " ", answer)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([apart, expected]) + "\n")
            self.process.stdin.flush()
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.close()  # out of time, or dead for want of memory: no verdict, and a fresh process for the next
        self.timeouts += 1
        return False

    def close(self) -> None:
        """End the process; a next comparison starts another."""
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def __exit__(self, *_) -> None:
        self.close()


def _start(seconds: float) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-c", WORKER, str(seconds)]
    process = subprocess.Popen(command, **pipes, text=True, encoding="utf-8")
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
    text = re.sub(r"(?<=\d)\s(?=\d{3}(?!\d))", "", text.strip())  # 1 000 000
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)  # between two other digits a space means something: 1 1/2
    return re.sub(r"\$|\\boxed\{(.*)\}|\.$", r"\1", text)
