"""Rules against random text: no answer is right under two truths, nothing raises, nothing takes long.

RULES_ROUNDS sets how many hedges and rounds are drawn: 3,000 by default, 150,000 before a release.
"""
from __future__ import annotations

import os
import random
import time
from typing import get_args

from hdpo.config.types import RulePolicy
from hdpo.reward.rules import rule_verdict
from hdpo.types import Verdict

ROUNDS = int(os.environ.get("RULES_ROUNDS", "3000"))

QUESTIONS = {   # question -> truths of which at most one can be right at a time
    "How many birds sit on the wire?": ["3", "4", "34", "43", "3.4", "300", "3000", "3 million", "0.3", "-3", "30%", "3/4"],
    "What is the value?": ["12,500", "12.5", "1.25", "125", "12.500.000", "1,22", "122", "5!", "5", "120", "7.25",
                           "7 1/4 kg", "3 x 2", "2 x 3"],
    "How many million people live there?": ["83.2", "8.32", "83.2 thousand", "832", "0.832"],
    "How much does it cost?": ["$1.50", "€1.50", "$1,500", "$15", "$1.5 million", "150 yen", "£150"],
    "What does the meter show?": ["10 mV", "10 MV", "10 V", "10 kV", "10 mA", "10 mm", "10 m", "10 min", "10 MHz", "10 mHz",
                                  "10 K", "10 °C"],
    "What percentage is it?": ["45%", "0.45%", "4.5", "54", "450"],
    "What share is it?": ["45%", "0.045", "0.45%", "1/4", "0.54"],
    "Is the light on?": ["Yes", "No"],
    "Is it false that it rains?": ["True", "False"],
    "Which one?\nA. red\nB. blue\nC. dark blue\nD. none of these": ["A", "B", "C", "D"],
    "Which one? (A) (B) (C) (D)": ["A", "B", "C", "D"],
    "Which picture?\nA.\nB.\nC.\nD.": ["A", "B", "C", "D"],
    "Who?\nA. A. Brown\nB. C. Dale\nC. B. Crew\nD. E. F. Benson": ["A", "B", "C", "D"],
    "Who? A. A. Brown B. C. Dale C. B. Crew D. E. F. Benson": ["A", "B", "C", "D"],
    "When was it?": ["2020-03-04", "2020-04-03", "4 May 2020", "May 2021", "1990", "1990s", "5:30 pm", "5:30 am", "17:15"],
    "What is the ratio of cats to dogs?": ["3:4", "4:3", "3:7", "7:3"],
    "Which values are marked?": ["2, 3", "2, 3, 5", "3, 5", "2-3", "2-5", "(2, 5)", "(5, 2)", "[2, 5)", "(2, 5]"],
    "Solve for x.": ["x = 2", "x = 3", "x = 2 or x = 3", "x = -2", r"x = \pm 2", "x > 2", r"x \ge 2", "x < 2",
                     r"\frac{2}{3}", r"\frac{3}{2}"],
    "Which version is installed?": ["3.1", "3.10", "3.11", "3.0.1", "310"],
    "What is written there?": ["A positive", "positive", "B positive", "Co", "CO", "mg", "Mg", "the exit", "no exit", "007",
                               "7", "07"],
}
_JOINTS = [
    " or ", " and ", ", ", "; ", "/", " ", "\n", " (", ")", ": ", " - ", "-", " = ", ". ", " not ", " but ", "either ",
    "between ", "maybe ", "about ", "The answer is ", "$", "**", "\\boxed{", "}", " million", " thousand", "%", "K", "s", "!",
    "x = ", "{",
    "No, ", "Yes, ", "Option ", " x ", " to ", "~", "±", "'", "\\pm ", "\\lor ", "..."]


def hedge(draw: random.Random, truths: list[str]) -> str:
    """Pieces of several truths, joined as a policy that wants to be right either way would."""
    parts = [draw.choice(truths) if draw.random() < 0.6 else draw.choice(_JOINTS) for _ in range(draw.randint(1, 5))]
    text = "".join(part if draw.random() < 0.5 else part + draw.choice(_JOINTS) for part in parts)
    if draw.random() < 0.2 and text:
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(["", " ", ",", ".", "0", "-", text[at].swapcase()]) + text[at + 1:]
    return text


def test_no_answer_is_correct_under_two_different_truths() -> None:
    draw = random.Random(7)
    correct = 0
    for _ in range(ROUNDS):
        question = draw.choice(list(QUESTIONS))
        said = hedge(draw, QUESTIONS[question])
        right = [truth for truth in QUESTIONS[question]
                 if rule_verdict(said, truth, "auto", question, maths=False).verdict is Verdict.CORRECT]
        assert len(right) <= 1, (question, said, right)
        correct += len(right)
    assert correct > ROUNDS / 50   # the draw is not all nonsense


def test_every_truth_is_correct_and_no_other_one_of_its_question() -> None:
    for question, truths in QUESTIONS.items():
        for said in truths:
            right = [t for t in truths if rule_verdict(said, t, "auto", question).verdict is Verdict.CORRECT]
            assert right == [said], (question, said, right)


_ALPHABET = (
    "0123456789", ".,;:!?'\"", "+-*/^=<>≤≥±×÷√π°%$€¥", "()[]{}\\_|&#@~`", "abcdefgxyzABCDEFGK mkMG",
    "ÄéßçñİΩμ½²³⁻−–٣３\u200b\u202e\ud83d",
    [" million", " to ", " or ", "yes", "no ", "\\frac", "\\sqrt", "\\text{", "\\boxed{", "answer is ", "2020-", "May ", "am",
     "\n", "A. ", "(B) ", "N/A", "cannot ", " kg", "e9", "!!", "^{", "x=", "in "])


def noise(draw: random.Random) -> str:
    length = draw.choice([0, 1, 2, 3, 5, 8, 13, 40, 90, 300])
    return "".join(draw.choice(draw.choice(_ALPHABET)) for _ in range(length))


def test_no_random_text_makes_a_rule_raise_or_takes_20_milliseconds() -> None:
    draw = random.Random(11)
    slow = []
    for _ in range(ROUNDS):
        said, truth, question, policy = noise(draw), noise(draw), noise(draw), draw.choice(get_args(RulePolicy))
        started = time.thread_time()
        rule_verdict(said, truth, policy, question, maths=False)
        if time.thread_time() - started > 0.02:   # a collection of garbage may have fallen into it: only the second time counts
            started = time.thread_time()
            rule_verdict(said + " ", truth + " ", policy, question + " ", maths=False)
            slow += [(said, truth, policy, question)] if time.thread_time() - started > 0.02 else []
    assert not slow
