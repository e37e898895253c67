"""Answers that are neither mathematics nor plain words: a choice (B), yes or no, a number with a unit or a name.

is_same_choice("The answer is B, since a dog barks.", "B")  # True; None where a letter or yes/no was not expected

The table of phrasings that are accepted and refused is tests/evaluation/test_answers.py.
"""

import re
import unicodedata

# Full-width forms → ASCII, minus sign and en dash → hyphen.
KEYBOARD = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | dict.fromkeys((0x2212, 0x2013), "-")
# A choice: a capital that stands alone, or a small letter that ends the answer.
LETTER = r"([A-Z](?![\w'’+#-])|[a-z](?=\W*$))"
# How people name their choice, the clearest way first.
CHOICES = (
    re.compile(r"^\W*([A-Za-z])\W*$"),
    re.compile(r"\\boxed\{\W*(?:\\text\{\W*)?([A-Za-z])\W*\}"),
    re.compile(rf"(?i:answer|option|choice|choose|select)(?i:\s+is)?[\s:*(_]*{LETTER}", re.ASCII),
    re.compile(rf"(?:答案|选项|选择|选)[是为]?[\s:*(]*(?:选项)?{LETTER}", re.ASCII),
    re.compile(r"(?<![\w'’-])([A-Z]) is (?:the )?(?:correct|right|better|best)", re.ASCII),
    re.compile(r"\(([A-Z])\)|\*\*([A-Z])\*\*"),
)
LONE_CAPITAL = re.compile(r"(?<![\w'’-])(?!I\s+[a-z]|I['’])([A-Z])(?![\w'’+#-])", re.ASCII)
QUOTED_CAPITAL = re.compile(r"(?<!\w)['\"‘“_`]([A-Z])['\"’”_`](?!\w)")
LEADING_ARTICLE = re.compile(r"^\W*A\s+(?=[a-z])")
EXPECTED_CHOICE = re.compile(r"\W*(?:\\text\{\W*)?([A-Z])\W*")
# Where an answer says yes or no: boxed, bold, at its beginning, after "the answer is", or last.
DECISIONS = (
    re.compile(r"\\boxed\{\s*(?:\\text\{\s*)?(\w+)"),
    re.compile(r"\*\*(\w+)\W*\*\*"),
    re.compile(r"^\W*(\w+)"),
    re.compile(r"\b(?:answer|claim|statement|it)\s+is\W+(\w+)", re.IGNORECASE),
    re.compile(r"(\w+)"),
)
NEGATED = re.compile(r"\bnot (true|false)\b", re.IGNORECASE)
OPPOSITES = frozenset({"yes", "no"}), frozenset({"true", "false"})
LATEX = re.compile(r"\\(?:text|mathrm|mbox)\{[^{}]*\}|\\[a-zA-Z]+")
OPERATOR = re.compile(r"[=+*/^<>]|(?<![^\W\d_])-")
# Words, Chinese characters, formulas of substances and times of day.
NAME = re.compile(r"[\u3400-\u9fff]|(?<!\w)[^\W\d_]{2,}(?!\w)|(?<!\w)[A-Z][A-Za-z]*\d\w*|\d+(?::\d+)+")
MATHEMATICAL_WORDS = frozenset("and or ln log sin cos tan mod".split())


def normalized(text: str) -> str:
    """Signs and digits as a keyboard has them: full-width forms, typographic minus signs, 负 before a number, powers, p.m."""
    text = text.translate(KEYBOARD)
    text = re.sub(r"负(?=\s*\d)", "-", text)
    text = re.sub(r"\b([ap])\.m\.?", r"\1m", text, flags=re.IGNORECASE)
    return re.sub("[⁰¹²³⁴-⁹]+", lambda power: "^{" + unicodedata.normalize("NFKC", power[0]) + "}", text)


def words(text: str) -> list[str]:
    """Lower-case words without punctuation or markup; each Chinese character counts as a word."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+", text)


def sentences(text: str) -> list[str]:
    """Those that hold a word."""
    return [s for s in re.split(r"(?<=[.!?])\s+|[。！？\n]+", text) if words(s)]


def is_same_choice(answer: str, expected: str) -> bool | None:
    """Whether an answer names the expected letter, or says the expected one of two opposites; None where the expected
    answer is neither. Both texts are normalized."""
    if letter := EXPECTED_CHOICE.fullmatch(expected):
        return chosen_letters(answer) == {letter[1]}
    wanted = words(expected)
    for pair in OPPOSITES:
        if len(set(wanted)) == 1 and wanted[0] in pair:
            return chosen_opposite(answer, pair) == wanted[0]
    return None


def chosen_letters(answer: str) -> set[str]:
    """The letter that an answer to a multiple-choice question names; several where it only mentions some."""
    answer = QUOTED_CAPITAL.sub(r"\1", answer)
    # the last match of the clearest way: a reply may weigh the choices before it decides
    for way in CHOICES:
        if matches := way.findall(answer):
            return {"".join(matches[-1]).upper()}
    for sentence in reversed(sentences(answer)):
        if capitals := LONE_CAPITAL.findall(LEADING_ARTICLE.sub("", sentence)):
            return set(capitals)
    return set()


def chosen_opposite(answer: str, pair: frozenset[str]) -> str:
    """Which of two opposites an answer says, by the clearest of DECISIONS; empty where it says neither."""
    answer = NEGATED.sub(lambda match: "false" if match[1].lower() == "true" else "true", answer)
    for way in DECISIONS:
        spoken = [word.casefold() for word in way.findall(answer)]
        if decided := [word for word in spoken if word in pair]:
            return decided[-1]
    return ""


def required_words(expected: str) -> tuple[set[str], str]:
    """(words, rest) of an expected answer that is a number with words: those that stand before it or in one with it must
    be said (`Apollo 11`, `第3名`, `5 pm`, `H2O`, `12:30`); a unit after it (`5 km`, `42 apples`, `3元`) may be left out.

    No words in a formula, where letters are variables."""
    bare = LATEX.sub(" ", expected)
    if OPERATOR.search(bare) or not NAME.search(bare):
        return set(), expected
    number = re.search(r"\d|$", bare)
    required = set()
    for name in NAME.finditer(bare):
        before_the_number = number is not None and name.start() < number.start()
        if before_the_number or re.search(r"\d|^[ap]m$", name[0], re.IGNORECASE):
            required.add(name[0].casefold())
    return required - MATHEMATICAL_WORDS, NAME.sub(" ", bare)
