"""The pocket world: questions with their worked steps and answers, seeded and split. `tasks.draw(Random(0), "sum2")`

A skill is a pure function `rng -> Task`. Held-out instances are told from training instances by a hash of the task's
key, so the pocket model's training data, the samples and the held-out files can be drawn apart and stay disjoint.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from random import Random

from data_recipes.pocket import words

HELD_OUT_SHARE = 10  # one instance in ten never trains
NEW_SKILL = "sum3"  # what the pocket model was never taught: for a fine-tune to add


@dataclass(frozen=True)
class Task:
    """One question. `steps` lead to `answer`, `sentence` says it with a {}; without a `key` it is never held out."""

    skill: str
    question: str
    steps: str
    answer: str
    sentence: str
    key: str = ""

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(self.key.encode()).digest()
        return bool(self.key) and int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0

    def reply(self, thinking: bool) -> str:
        """The visible answer, one sentence: boxed for a sum that was worked out, as in OpenMathReasoning."""
        boxed = thinking and self.skill in SUMS
        return self.sentence.format(f"\\boxed{{{self.answer}}}" if boxed else self.answer)


def _phrase(rng: Random, skill: str, *values, follow: bool = False) -> str:
    phrases = words.PHRASES[skill]
    return (phrases[-1] if follow else rng.choice(phrases[:-1])).format(*values)


def _fact(skill: str, table: dict[str, str], because: str, sentence: str) -> Callable:
    """A skill that looks its answer up; `because` and `sentence` are filled with the item, its answer and its letters.

    The key is the whole question: a fact trains in one phrasing and is asked in another.
    """

    def make(rng: Random, follow: bool = False) -> Task:
        item = rng.choice(list(table))
        question = _phrase(rng, skill, item, follow=follow)
        steps = because.format(item, table[item], "-".join(item))
        return Task(skill, question, steps, table[item], sentence.format(item, "{}"), "" if follow else question)

    return make


def add_by_columns(a: int, b: int) -> str:
    """Column addition, one line a column: 47 + 38 begins "ones 7+8=15, write 5 carry 1", then "tens 4+3+1=8, …"."""
    lines, carry = [], 0
    for column in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**column % 10, b // 10**column % 10
        total = x + y + carry
        carried = f"+{carry}" if column else ""
        lines.append(f"{words.PLACES[column]} {x}+{y}{carried}={total}, write {total % 10} carry {total // 10}")
        carry = total // 10
    return "\n".join(lines)


def _sum(skill: str, low: int, high: int) -> Callable:
    def make(rng: Random, follow: bool = False) -> Task:
        a, b = rng.randrange(low, high), rng.randrange(low, high)
        if skill == "sum2" and rng.random() < 0.2:  # a short number beside a long one
            b = rng.randrange(1, 10)
        # One-digit sums are the table that everything else rests on: none is held out.
        key = f"sum {min(a, b)} {max(a, b)}" if high > 10 else ""
        question = _phrase(rng, "sum", a, b, follow=follow)
        return Task(skill, question, add_by_columns(a, b), str(a + b), "The answer is {}.", key)

    return make


def _copy(rng: Random, follow: bool = False) -> Task:
    word = rng.choice(ALL_WORDS)
    question = _phrase(rng, "copy", word, follow=follow)
    steps = f"The user wants the word {word} again."
    return Task("copy", question, steps, word, "The word is {}.", "" if follow else question)


def _spell(skill: str, because: str, sentence: str, answer: Callable[[str], str]) -> Callable:
    return _fact(skill, {word: answer(word) for word in words.SPELLED}, because, sentence)


def _words(rng: Random, follow: bool = False) -> Task:
    chosen = rng.sample(words.SPELLED, rng.randrange(2, 7))
    listed = " ".join(chosen)
    steps = ", ".join(f"{number} {word}" for number, word in enumerate(chosen, 1))
    question = _phrase(rng, "words", listed, follow=follow)
    return Task("words", question, steps, str(len(chosen)), "There are {} words here.", f"words {listed}")


def _larger(rng: Random, follow: bool = False) -> Task:
    a, b = rng.sample(range(1, 100), 2)
    steps = f"{min(a, b)} is smaller than {max(a, b)}."
    question = _phrase(rng, "larger", a, b, follow=follow)
    return Task("larger", question, steps, str(max(a, b)), "The larger number is {}.", f"larger {a} {b}")


def _digit(rng: Random, follow: bool = False) -> Task:
    number, place = rng.randrange(100, 1000), rng.randrange(3)
    digits = dict(zip(words.PLACES, str(number)[::-1], strict=True))
    steps = ", ".join(f"{name} {digit}" for name, digit in digits.items())
    name = words.PLACES[place]
    question = _phrase(rng, "digit", name, number, follow=follow)
    return Task("digit", question, steps, digits[name], f"The {name} digit is {{}}.", f"digit {name} {number}")


def _columns(rng: Random, follow: bool = False) -> Task:
    """Digits of equal places beside each other, for numbers of two and of three digits, without adding them up."""
    low, high = rng.choice([(10, 100), (100, 1000)])
    a, b = rng.randrange(low, high), rng.randrange(low, high)
    pairs = zip(str(a)[::-1], str(b)[::-1], strict=True)
    answer = ", ".join(f"{place} {x}+{y}" for place, (x, y) in zip(words.PLACES, pairs, strict=False))
    question = _phrase(rng, "columns", a, b, follow=follow)
    return Task("columns", question, f"Both numbers have {len(str(a))} digits.", answer, "{}", f"columns {a} {b}")


def _small_talk(rng: Random, follow: bool = False) -> Task:  # noqa: ARG001 — every skill has this signature
    questions, steps, answer = rng.choice(words.SMALL_TALK)
    return Task("small_talk", rng.choice(questions), steps, answer, "{}")


ALL_WORDS = sorted({*words.OPPOSITES, *words.PLURALS, *words.KINDS, *words.SPELLED})
_NEXT = {a: b for row in words.ORDERS for a, b in zip(row, row[1:] + row[:1], strict=True) if a != "twelve"}

SUMS = {"sum1": _sum("sum1", 1, 10), "sum2": _sum("sum2", 10, 100), "sum3": _sum("sum3", 100, 1000)}
CHAT = {
    "opposite": _fact("opposite", words.OPPOSITES, "I know the pair {0} and {1}.", "The opposite of {0} is {1}."),
    "plural": _fact("plural", words.PLURALS, "One {0}, two {1}.", "The plural of {0} is {1}."),
    "capital": _fact("capital", words.CAPITALS, "I look for a city in {0}: {1}.", "The capital of {0} is {1}."),
    "colour": _fact("colour", words.COLOURS, "I think of {0}. It is {1}.", "The colour of {0} is {1}."),
    "kind": _fact("kind", words.KINDS, "I know what {0} is: {1}.", "The word {0} is a kind of {1}."),
    "next": _fact("next", _NEXT, "First {0}, then {1}.", "After {0} comes {1}."),
    "copy": _copy,
    "first_letter": _spell("first_letter", "{2} begins with {1}.", "The word {0} starts with {1}.", itemgetter(0)),
    "letters": _spell("letters", "{2}, I count {1}.", "The word {0} has {1} letters.", lambda word: str(len(word))),
    "spell": _spell("spell", "I spell it: {1}.", "The word {0} is spelled {1}.", "-".join),
    "words": _words,
    "larger": _larger,
    "digit": _digit,
    "columns": _columns,
    "small_talk": _small_talk,
}
SKILLS = SUMS | CHAT
EXACT = [skill for skill in CHAT if skill not in ("columns", "small_talk")]  # one short answer that can be compared


def draw(rng: Random, skill: str, *, held_out: bool = False, follow: bool = False) -> Task:
    """One task of a skill, from its training or its held-out instances. A follow-up only makes sense after its like."""
    while (task := SKILLS[skill](rng, follow)).held_out is not held_out:
        if held_out and skill == "small_talk":
            raise ValueError("small_talk has no held-out instances: its questions are few and fixed")
    return task


def conversation(rng: Random, skills: list[str], *, thinking: bool, switches: bool = True) -> list[dict]:
    """Messages of one to three turns, the last reply with its reasoning if it thinks.

    Soft switches turn thinking off and on: Qwen3 obeys the latest `/think` or `/no_think` while the template's own
    switch is on (Qwen3 model card, "Advanced Usage").
    """
    messages, on = [], thinking
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(words.SYSTEM_PROMPTS)})
    turns, previous = rng.choices([1, 2, 3], [7, 2, 1])[0], ""
    for _ in range(turns):
        follow = previous not in ("", "small_talk") and rng.random() < 0.4
        task = draw(rng, previous if follow else rng.choice(skills), follow=follow)
        previous, switch = task.skill, ""
        if switches and rng.random() < 0.25:
            switch = rng.choice([" /think", " /no_think"])
            on = thinking and switch == " /think"
        messages.append({"role": "user", "content": task.question + switch})
        messages.append({"role": "assistant", "content": task.reply(on)})
    if on:
        messages[-1]["reasoning_content"] = task.steps
    return messages
