"""The table of accepted and refused phrasings: (answer, expected answer, whether it is right)."""

import threading

import pytest

from toolkit.evaluation.score import AnswerChecker, same_words

PHRASINGS = [
    ("The answer is \\boxed{42}.", "42", True),
    ("12 + 30 = 42", "42", True),
    ("42 at first, but it is 41", "42", False),
    ("So $\\frac{2}{4}$.", "\\frac{1}{2}", True),
    ("答案是42。", "42", True),
    ("$1+x^2$", "x^2+1", True),
    ("2000", "2,000", True),
    ("", "42", False),
    ("Paris or London? It is London.", "Paris", False),
    ("The capital of France is **Paris**.", "Paris", True),
    ("Parisian", "Paris", False),
    ("法国的首都是巴黎。", "巴黎", True),
    ("red, green and blue", "Red green and blue", True),
    # words with a number in them are words
    ("It was Apollo 11.", "Apollo 11", True),
    ("It was Apollo 13.", "Apollo 11", False),
    ("It is GPT-4.", "GPT-4", True),
    ("The formula is H2O.", "H2O", True),
    ("The formula is CO2.", "H2O", False),
    ("It was signed on July 4, 1776.", "July 4, 1776", True),
    ("It has 4 legs.", "4 legs", True),
    ("So it has \\boxed{4}.", "4 legs", True),
    ("The meeting is at 5 am.", "5 pm", False),
    ("It is 12:30.", "12:30", True),
    ("It is 12:45.", "12:30", False),
    ("他是第3名。", "第3名", True),
    ("他是第2名。", "第3名", False),
    # but units in LaTeX and names of functions are mathematics
    ("The length is \\boxed{5}.", "5 \\text{ cm}", True),
    ("So $x = 2$ or $x = -3$.", "x = 2 or x = -3", True),
    ("The answer is A because it barks.", "A", True),
    ("The answer is B. It barks.", "B", True),
    # a choice is a letter that is marked as one
    ("The answer is B, since a dog barks.", "A", False),
    ("The answer is B, since a dog barks.", "B", True),
    ("Option B is a better choice.", "A", False),
    ("(B) A cat", "A", False),
    ("(B) A cat", "B", True),
    ("\\boxed{B}, a mammal", "A", False),
    ("So I choose **C**.", "C", True),
    ("D", "D", True),
    ("I would choose B.", "I", False),
    ("The language is C++.", "C", False),
    ("The language is C.", "C", True),
    ("答案是B。", "B", True),
    ("There is no doubt that it is yes.", "No", False),
    ("There is no doubt that it is yes.", "Yes", True),
    ("So the answer is no.", "No", True),
    # arithmetic: neither a space between digits nor a power goes lost
    ("11/2", "1 1/2", False),
    ("23", "2³", False),
    ("8", "2³", True),
    ("102", "10²", False),
    ("23", "2 3", False),
    # signs and digits as Chinese and typeset text write them
    ("答案是－42", "-42", True),
    ("答案是－42", "42", False),
    ("答案是负42", "-42", True),
    ("答案是４２", "42", True),
    ("答案是（1，2）", "(1,2)", True),
    ("答案是1．5", "1.5", True),
    ("The answer is −42.", "-42", True),
    ("The answer is –42.", "-42", True),
    # nothing but a sign
    (">", "<", False),
    ("<", "<", True),
    ("I do not know.", "<", False),
    ("", "+", False),
    ("🙁", "😀", False),
    # yes and no, where the reason holds the other word
    ("Yes, because no prime divides it.", "Yes", True),
    ("Yes – there are no exceptions.", "Yes", True),
    ("The answer is **Yes**: no prime divides both.", "Yes", True),
    ("\\boxed{\\text{Yes}} since no counterexample exists", "Yes", True),
    ("The claim is false; the true answer is 12.", "False", True),
    ("The statement is false, since it is only true for even n.", "False", True),
    ("It is not true.", "True", False),
    ("It is not true.", "False", True),
    # choices whose reason names others
    ("The correct answer is B, not A.", "B", True),
    ("Option B is correct because A and C are wrong.", "B", True),
    ("Statement A is false, so the answer is C.", "C", True),
    ("Between A and C, C is better.", "C", True),
    ("The answer is **C** (not **A**).", "C", True),
    ("The correct option is C: $F = ma$.", "C", True),
    ("A is the correct option.", "A", True),
    ("正确答案是选项B，因为A错误。", "B", True),
    ("综上，选择C，而不是B", "C", True),
    ("答案：C（A、B错误）", "C", True),
    ("(c)", "C", True),
    ("Answer: c", "C", True),
    ("\\boxed{c}", "C", True),
    ("The answer is a dog.", "A", False),
    ("The symbol is 'K'.", "K", True),
    ("o", "O", True),
    ("The answer is (C). Options A and B are wrong.", "C", True),
    ("So it is \\boxed{B}.", "\\text{(B)}", True),
    # a unit may be left out, a name may not
    ("The answer is 42", "42 apples", True),
    ("There were 3 of them.", "3 apples", True),
    ("He walks 5km.", "5 km", True),
    ("The area is 24.", "24 square units", True),
    ("90°", "90 degrees", True),
    ("5 p.m.", "5 pm", True),
    ("答案是25。", "25元", True),
    ("3", "3个", True),
    ("\\boxed{11}", "Apollo 11", False),
    ("\\boxed{5 am}", "5 pm", False),
    ("1000000", "1 000 000", True),
    ("答案：42（个）", "42", True),
    # an abbreviation does not end a sentence
    ("It is St. Petersburg.", "St. Petersburg", True),
    ("The author is J. K. Rowling.", "J. K. Rowling", True),
    ("The author is not known. Perhaps J. K. Rowling? No, J. R. R. Tolkien.", "J. K. Rowling", False),
]  # fmt: skip


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker() as checker:
        yield checker


@pytest.mark.parametrize(("answer", "expected", "right"), PHRASINGS)
def test_an_answer_is_judged_as_a_person_would(checker, answer, expected, right):
    assert checker.is_right(answer, expected) is right


def test_the_last_sentence_decides():
    assert same_words("cat. dog.", "dog")
    assert not same_words("dog. cat.", "dog")


def test_a_comparison_that_never_ends_is_ended_even_outside_the_main_thread_and_the_next_one_works():
    found = []
    with AnswerChecker(seconds=1.0) as checker:
        work = threading.Thread(
            target=lambda: found.extend([checker.is_right("$9^{9^{9^{9}}}$", "42"), checker.is_right("6 * 7", "42")])
        )
        work.start()
        work.join(60)
        assert found == [False, True]
