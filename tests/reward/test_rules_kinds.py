"""Rules kind by kind, on answers labelled by hand before a rule saw them: what is decided is right, and enough is decided.

rules_hostile.jsonl was written to break rules; rules_kinds.jsonl asks the same kinds in other words. The named tests say
what each kind is about; the files hold the breadth.
"""
from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from hdpo.reward.rules import rule_verdict
from hdpo.types import Verdict

CORRECT, WRONG, UNSCORED = Verdict.CORRECT, Verdict.WRONG, Verdict.UNSCORED
HERE = Path(__file__).parent
needs_math_verify = pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="needs math-verify")


def decide(prediction: str, truth: str | list[str], question: str = "", policy: str = "auto") -> Verdict:
    return rule_verdict(prediction, truth, policy, question).verdict


def never(verdict: Verdict, truth: str, question: str, *predictions: str) -> bool:
    return all(decide(prediction, truth, question) is not verdict for prediction in predictions)


@needs_math_verify
@pytest.mark.parametrize(("name", "rows_at_least"), [("rules_hostile", 100), ("rules_kinds", 600)])
def test_no_verdict_on_hostile_answers_is_false_and_at_most_30_percent_are_left(name: str, rows_at_least: int) -> None:
    rows = [json.loads(line) for line in (HERE / f"{name}.jsonl").open(encoding="utf-8")]
    decided: Counter[str] = Counter()
    for row in rows:
        verdict = decide(row["prediction"], row["ground_truth"], row["question"])
        assert verdict is UNSCORED or verdict.value == row["label"], row
        decided[row["kind"]] += verdict is not UNSCORED
    total = Counter(row["kind"] for row in rows)
    print(f"{name}: decided {decided.total()} of {len(rows)};", {k: f"{decided[k]}/{total[k]}" for k in total})
    assert len(rows) >= rows_at_least and decided.total() >= 0.7 * len(rows)


# --- choice -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("question", [
    "Which?\nA.\nB.\nC.\nD.", "Which? (A) (B) (C) (D)", "Which?\n(A)\n(B)\n(C)\n(D)", "Which? A) B) C) D)"])
def test_options_without_text_are_matched_by_letter_alone(question: str) -> None:
    for truth in "ABCD":
        assert [decide(said, truth, question) for said in "ABCD"] == [CORRECT if said == truth else WRONG for said in "ABCD"]
        assert decide("The answer is (D).", truth, question) is (CORRECT if truth == "D" else WRONG)


def test_initials_are_no_option_letters() -> None:
    question = "Who?\nA. J. R. R. Tolkien\nB. C. S. Lewis\nC. D. Lessing"
    assert decide("C. S. Lewis", "B", question) is CORRECT and decide("D. Lessing", "C", question) is CORRECT
    assert never(CORRECT, "C", question, "C. S. Lewis") and never(WRONG, "B", question.replace("\n", " "), "C. S. Lewis")


def test_an_answer_that_offers_a_choice_of_options_is_right_under_none() -> None:
    question = "Which?\nA. red\nB. blue"
    for truth in "AB":
        assert never(CORRECT, truth, question, "A or B", "either A or B", "B. red", "A/B", "both")


# --- numbers ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("unit", ["eV", "Hz", "Pa", "W", "V", "J", "Wh", "Ω", "Bq"])
def test_milli_is_never_mega(unit: str) -> None:
    assert decide(f"10 M{unit}", f"10 m{unit}") is WRONG and decide(f"10 m{unit}", f"10 M{unit}") is WRONG
    assert decide(f"10m{unit}", f"10 m{unit}") is CORRECT and decide(f"0.01 {unit}", f"10 m{unit}") is CORRECT


def test_a_scale_in_the_question_is_part_of_a_bare_truth() -> None:
    for question in ("How many million people?", "What was it, in millions?", "The revenue (in million dollars)?"):
        assert decide("83.2 million", "83.2", question) is CORRECT
        assert decide("83.2", "83.2 million", question) is CORRECT
        assert never(CORRECT, "83.2", question, "$83.2", "83.2 people", "83.2 thousand", "83.2 billion")
    assert never(WRONG, "3", "How many tens of thousands came?", "30,000")
    assert decide("83.2 million", "83.2", "What does the bar show?") is UNSCORED   # the axis may be in millions
    assert decide("1.2 billion", "1.2 million", "What is the population?") is WRONG


def test_kelvin_and_thousands_are_told_apart_by_the_question() -> None:
    assert decide("300K", "300", "What is the temperature in K?") is CORRECT
    assert decide("45K", "45,000", "How many followers are there?") is CORRECT
    assert never(WRONG, "300 K", "At what temperature?", "300K") and never(CORRECT, "300", "At what temperature?", "300,000")


def test_percent_is_a_share_only_where_a_share_is_asked_for() -> None:
    assert decide("45%", "0.45", "What share is blue?") is CORRECT and decide("0.5%", "0.5", "What is it in percent?") is CORRECT
    assert never(CORRECT, "0.5", "What is it in percent?", "50%") and never(CORRECT, "0.45", "What share is blue?", "0.45%")


def test_rounding_follows_the_precision_of_the_truth() -> None:
    assert decide("2/3", "0.67", "What is the slope?") is CORRECT and never(WRONG, "0.67", "", "0.667")
    assert decide("8,336,817", "8.3 million", "How many live there?") is CORRECT
    assert decide("0.214", "0.21", "Round to two decimals.") is CORRECT
    assert never(CORRECT, "0.67", "", "0.7", "0.66", "0.6") and never(CORRECT, "8.5", "", "8.52")
    assert never(CORRECT, "8.3 million", "How many?", "8.34 million", "8,350,000", "8.4 million")
    assert decide("8.6 million", "8.3 million") is WRONG
    assert decide("2008", "2010", "What is the year?") is WRONG and decide("8.3", "8", "How many?") is WRONG


def test_trailing_zeros_count_in_versions_and_not_in_measures() -> None:
    for question in ("Which version is it?", "What section is marked?", "Which firmware?"):
        assert decide("3.1", "3.10", question) is WRONG
    assert decide("12.5", "12.50", "What is the value?") is CORRECT and decide("$3.5", "$3.50") is CORRECT
    assert decide("3.1", "3.10", "What is on the box?") is UNSCORED


def test_a_number_that_two_countries_read_differently_is_left_to_the_judge() -> None:
    assert decide("12500", "12.500", "What is the value?") is UNSCORED and decide("3.5", "3,5", "What is it?") is UNSCORED
    assert decide("1234.56", "1.234,56") is CORRECT and decide("1,234,567", "1.234.567") is CORRECT
    german = "Wie viele Autos zeigt die Tafel?"
    assert decide("12500", "12.500", german) is CORRECT and decide("3.5", "3,5", german) is CORRECT
    assert never(CORRECT, "1,22", "What is it?", "122", "22", "1 and 2")


def test_mixed_numbers_factorials_and_sizes_are_read_as_they_are_meant() -> None:
    assert decide("3 1/2", "3.5") is CORRECT and decide("3½", "7/2") is CORRECT and decide(r"2\frac{1}{4}", "9/4") is CORRECT
    assert never(CORRECT, "5!", "", "5") and never(CORRECT, "5", "", "5!") and decide("5!", "7") is WRONG
    assert decide("1/2006!", "1/2004!") is WRONG
    assert never(CORRECT, "3 x 2", "", "2 x 3", "6") and decide("3×2", "3 x 2") is CORRECT and decide("3 x 5", "3 x 2") is WRONG


# --- words ------------------------------------------------------------------------------------------------------------

def test_no_that_belongs_to_another_word_is_no_answer() -> None:
    question = "Is the door open?"
    for said in ("No idea", "No information available", "No answer can be extracted", "No image was provided", "No clue."):
        assert decide(said, "No", question) is WRONG and decide(said, "Yes", question) is WRONG, said
    assert never(WRONG, "Yes", question, "No doubt, it is open") and never(CORRECT, "No", question, "No doubt, it is open")
    assert decide("No, it is not.", "No", question) is CORRECT and decide("No, it is shut.", "No", question) is CORRECT
    assert never(CORRECT, "No", question, "No way to tell", "No, or yes", "Nothing", "No people are there, but it is open",
                 "No. 5", "No-one knows", "No, it is open", "No, just kidding", "No (or not?)")
    assert never(WRONG, "No", "Can the age be determined?", "It cannot be determined")   # here it is the answer


def test_a_refusal_is_wrong_unless_the_truth_or_an_option_says_so() -> None:
    for said in ("N/A", "I don't know", "It cannot be determined from the image.", "Not enough information", "unanswerable"):
        assert decide(said, "1998", "What year?") is WRONG and decide(said, "Paris", "Which city?") is WRONG, said
        assert never(WRONG, "Not Applicable", "Which label?", said)
        assert never(WRONG, "D", "Which?\nA. 1\nB. 2\nC. 3\nD. Cannot be determined", said)
        assert never(WRONG, "D", "Which picture?\nA.\nB.\nC.\nD.", said)
    assert never(WRONG, "1998", "What year?", "I cannot read it well, but 1998", "I can't be sure; maybe 1998")


def test_dates_are_days_whatever_their_order() -> None:
    same = ("25 December 2020", "December 25, 2020", "2020-12-25", "12/25/2020", "25/12/2020", "25.12.2020", "Dec. 25th 2020",
            "Friday, 25 December 2020")
    assert all(decide(a, b, "When was it?") is CORRECT for a in same for b in same)
    assert all(decide(a, "24 December 2020", "When was it?") is WRONG for a in same)
    assert decide("3 April 2020", "03/04/2020") is UNSCORED and decide("3/4/2020", "03/04/2020") is CORRECT
    assert never(WRONG, "2019-2020", "Which season?", "2019-20")
    assert decide("March 1952", "1952", "When?") is CORRECT and never(CORRECT, "March 1952", "When?", "1952")
    assert never(CORRECT, "1990", "What's the year?", "1990s")


def test_a_letter_that_looks_like_an_article_is_none() -> None:
    assert never(CORRECT, "A positive", "", "positive") and never(CORRECT, "A minor", "", "minor", "a major")
    assert decide("exit", "The Exit") is CORRECT and decide("apple", "an apple") is CORRECT


# --- mathematics ------------------------------------------------------------------------------------------------------

@needs_math_verify
@pytest.mark.parametrize(("question", "truth", "restated", "worked_out"), [
    ("Expand (x+1)^2.", "x^2+2x+1", ["(1+x)^2", "(x+1)^2", "(x+1)(1+x)", "(x+1)(x+1)"], "1+2x+x^2"),
    ("Factor x^2-5x+6.", "(x-2)(x-3)", ["6-5x+x^2", "x^2-5x+6", "x(x-5)+6"], "(x-3)(x-2)"),
    ("Simplify $\\sqrt{72}$.", r"6\sqrt{2}", [r"\sqrt{72}", r"\sqrt{71+1}", r"2\sqrt{18}", r"\sqrt{2 \cdot 36}"], r"6 \sqrt{2}"),
    ("What is sin(5pi/12)?", r"\frac{\sqrt{6}+\sqrt{2}}{4}", [r"\sin(5\pi/12)", "sin(5pi/12)", r"\cos(\pi/12)"],
     r"(\sqrt{2}+\sqrt{6})/4"),
    ("Solve 2y = 4x + 2 for y.", "y=2x+1", ["y=(4x+2)/2", r"y=\frac{4x+2}{2}"], "y = 1+2x"),
    ("What is the product of x+1 and x+2?", "x^2+3x+2", ["(x+1)(x+2)", "(x+2)(1+x)"], "x^2 + 3x + 2"),
    ("Compute 2^10.", "1024", ["2^10", "2^{10}", r"4^5", "1023+1"], "1,024"),
    ("Write 320000 in scientific notation.", r"3.2 \times 10^5", ["320000", r"32 \times 10^4"], "3.2e5"),
    ("Convert 0.75 to a fraction.", "3/4", ["0.75", "75/100", "75%"], r"\frac{3}{4}"),
    ("Write 3/8 as a decimal.", "0.375", ["3/8", r"\frac{3}{8}", "6/16"], "0.375"),
    ("Convert 90 minutes to hours.", "1.5 hours", ["90 minutes", "90 min"], "1.5 h")])
def test_a_question_restated_is_no_answer(question: str, truth: str, restated: list[str], worked_out: str) -> None:
    assert never(CORRECT, truth, question, *restated)
    assert decide(worked_out, truth, question) is CORRECT


@needs_math_verify
def test_what_is_certain_in_mathematics_is_decided_without_a_judge() -> None:
    for said, truth, verdict in (
            ("x=11", "11", CORRECT), ("11", "x = 11", CORRECT), ("x=12", "11", WRONG), ("63/400", "64/400", WRONG),
            (r"\frac{63}{400}", "63/400", CORRECT), ("2^9", "1024", WRONG), ("x = 3 or x = 2", r"x=2 \lor x=3", CORRECT),
            (r"x=2 \lor x=3", "x=3", WRONG),
            ("x=2 or x=3", "3", WRONG), (r"\pm 3", "3", WRONG), (r"\{2, 3\}", "x=2 or x=3", CORRECT),
            ("3 < x", "x > 3", CORRECT), (r"x \geq 3", "x > 3", WRONG), ("(1, 2)", "[1, 2)", WRONG), ("2x-1", "2x+1", WRONG),
            (r"\sqrt{12}", r"2\sqrt{3}", CORRECT), (r"3\sqrt{2}", r"2\sqrt{3}", WRONG),
            (r"\frac{\pi}{6}", r"\frac{\pi}{5}", WRONG)):
        assert decide(said, truth, "Find it, x is the number.") is verdict, (said, truth)
        assert decide(said, truth, "Find it, x is the number.", "maths") is verdict, (said, truth)


@needs_math_verify
def test_what_math_verify_would_pick_out_of_an_answer_is_not_its_value() -> None:
    for said in (r"3\boxed{5}", r"\boxed{3} \boxed{5}", "5, 5", "4=5", "x=4=5", "5 cm", r"5\%", "5 of 6",
                 r"\boxed{5} or \boxed{4}"):
        assert decide(said, "5", "What is x?") is not CORRECT, said
