"""Reading answers: the letter that is meant, and nothing where none is."""
from __future__ import annotations

import math

import pytest

from hdpo.evaluation.extraction import as_list, as_number, choice_letter, choice_letters, final_answer, only_number

OPTIONS = {"A": "The green bus", "B": "The red car", "C": "Not the red car", "D": "A dog"}


@pytest.mark.parametrize(("answer", "letter"), [
    ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("**B**", "B"), ("\\boxed{B}", "B"), ("（B）", "B"), ("`B`", "B"),
    ("B. The red car", "B"), ("(B) the red car", "B"), ("B: because its colour is plainly that of a tomato in the sun", "B"),
    ("The answer is B", "B"), ("The answer is (B), since the bus behind it hides all the other things", "B"),
    ("I think the answer is D", "D"), ("So it must be option C", "C"), ("The best option: B", "B"),
    ("The answer is A because B is wrong", "A"), ("Answer:B", "B"),
    ("the red car", "B"), ("The red car.", "B"), ("it is the red car", "B"), ("not the red car", "C"),
    ("A dog", "D"), ("A dog is there", "D"), ("A", "A"), ("A is right", "A"), ("green bus", "A"),
])
def test_the_letter_that_is_meant(answer, letter):
    assert choice_letter(answer, OPTIONS) == letter


@pytest.mark.parametrize("answer", [
    "", "   ", "A or B", "Neither A nor B", "A, B", "Based on what the picture shows", "A small thing near the door", "Dunno",
    "E", "F.",
    "I'm not sure", "I don't know", "I cannot determine the answer", "Sorry, I can't help with images",
    "Could be anything, for example the bus or the car",
    "Cats are seen Beside the Door, as far as anybody can tell from this picture",
])
def test_where_nothing_is_meant_no_letter_is_made_up(answer):
    assert choice_letter(answer, OPTIONS) is None


def test_letters_beyond_d_are_letters_and_an_option_may_be_part_of_another():
    options = {"A": "1", "B": "10", "C": "100", "D": "male", "E": "female", "F": "The image does not feature it"}
    assert [choice_letter(text, options) for text in ("10", "female", "The answer is F", "does not feature it")] == ["B", "E",
                                                                                                                     "F", "F"]


@pytest.mark.parametrize(("text", "answer"), [
    ("<answer>B</answer>", "B"), ("A <answer> C </answer> D", "C"), ("<answer>A</answer> no <answer>B</answer>", "B"),
    ("<Answer>B</Answer>", "B"), ("<answer>B", "<answer>B"), ("<think>A or B? A.</think> C", "C"), (None, ""), (7, "7"), ("", ""),
    ("<answer></answer>", ""),
])
def test_the_final_answer_is_the_last_answer_tag(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(("answer", "letters"), [
    ("A, C", "AC"), ("A and C", "AC"), ("AC", "AC"), ("(A), (C)", "AC"), ("C", "C"), ("The answer is A, C", "AC"), ("g", "G"),
    ("I", "I"),
    ("The answers are B and D", "BD"), ("the correct option is E", "E"),
])
def test_several_letters(answer, letters):
    assert choice_letters(answer) == frozenset(letters)


@pytest.mark.parametrize(("text", "value"), [
    ("3", 3), ("-2.5", -2.5), ("1,200", 1200), ("3/4", 0.75), ("\\frac{1}{2}", 0.5), ("2π", 2 * math.pi), ("-π/3", -math.pi / 3),
    ("2\\pi", 2 * math.pi), ("$3.5$", 3.5), (".5", 0.5), ("1e3", 1000), ("x", None), ("", None), ("3 cm", None), ("1/0", None),
    ("1,2", None),
])
def test_numbers(text, value):
    assert as_number(text) == (value if value is None else pytest.approx(value))


@pytest.mark.parametrize(("text", "value"), [
    ("x = 3.5", 3.5), ("12 cm", 12), ("about 7.", 7), ("The total is 1,250 dollars", 1250), ("3 or 4", None), ("none", None),
    ("14.0", 14),
])
def test_the_only_number_of_an_answer(text, value):
    assert only_number(text) == value


def test_a_list_is_read_without_executing_it():
    assert as_list("[1, 'a']") == [1, "a"] and as_list('["x"]') == ["x"] and as_list([2]) == [2]
    assert as_list("__import__('os').getcwd()") is None and as_list("[open('/etc/passwd')]") is None and as_list(None) is None


@pytest.mark.parametrize("answer", ["I'm not sure", "I don't know", "I’d say none", "A picture", ""])
def test_where_i_is_an_option_the_pronoun_is_none(answer):
    assert choice_letters(answer) is None
