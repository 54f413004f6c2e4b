"""Rules: never a false "correct" on a labelled set, decisions where they are safe, doubt everywhere else."""
from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdpo.config.types import RulePolicy
from hdpo.reward.choice import options_of
from hdpo.reward.quantities import parse_quantities
from hdpo.reward.rules import may_need_maths, policy_for, rule_verdict
from hdpo.reward.words import unwrap
from hdpo.types import Verdict

POLICIES = get_args(RulePolicy)
ROWS = [json.loads(line) for line in (Path(__file__).parent / "rules_labelled.jsonl").open(encoding="utf-8")]
CORRECT, WRONG, UNSCORED = Verdict.CORRECT, Verdict.WRONG, Verdict.UNSCORED
needs_math_verify = pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="needs math-verify")


def decide(prediction: str, truth: str | list[str], policy: str = "auto", question: str = "") -> Verdict:
    return rule_verdict(prediction, truth, policy, question).verdict


def test_no_verdict_on_the_labelled_set_is_false_and_most_rows_are_decided() -> None:
    decided: Counter[str] = Counter()
    for row in ROWS:
        verdict = decide(row["prediction"], row["ground_truth"], row["policy"], row["question"])
        assert verdict is UNSCORED or verdict.value == row["label"], row
        decided[row["kind"]] += verdict is not UNSCORED
    total = Counter(row["kind"] for row in ROWS)
    share = decided.total() / len(ROWS)
    print(f"decided by rules: {share:.1%} of {len(ROWS)};", {k: f"{decided[k]}/{total[k]}" for k in total})
    assert len(ROWS) >= 150 and sum(row["label"] == "wrong" for row in ROWS) >= 75
    assert share > 0.7 or not importlib.util.find_spec("math_verify")


def test_without_mathematics_nothing_blocks_and_nothing_is_false() -> None:
    for row in ROWS:
        prediction, truth, policy = row["prediction"], row["ground_truth"], row["policy"]
        verdict = rule_verdict(prediction, truth, policy, row["question"], maths=False).verdict
        assert verdict is UNSCORED or verdict.value == row["label"], row
        if not may_need_maths(truth, prediction, policy):
            assert verdict is decide(prediction, truth, policy, row["question"]), row


@settings(max_examples=200, deadline=None)
@given(st.decimals(-10**6, 10**6, places=2), st.decimals(-10**6, 10**6, places=2))
def test_two_plain_numbers_are_always_decided(a: Decimal, b: Decimal) -> None:
    verdict = decide(str(a), str(b))
    assert verdict is not UNSCORED
    assert verdict is CORRECT if a == b else (verdict is WRONG or abs(a - b) <= abs(b) * Decimal("0.005"))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_a_text_equal_to_the_ground_truth_is_correct_under_every_rule(text: str) -> None:
    if text.strip() and unwrap(text):
        for policy in POLICIES:
            assert decide(text, text, policy) is (UNSCORED if policy == "judge" else CORRECT)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ABCDab01 .,()[]{}$\\*-+/^%:;\n'\"=<>yesno", max_size=80), st.text(max_size=20),
       st.sampled_from(POLICIES))
def test_no_text_makes_a_rule_raise(prediction: str, truth: str, policy: str) -> None:
    rule_verdict(prediction, truth, policy, prediction, maths=False)


@pytest.mark.parametrize("text", [
    "(" * 50_000, "**" * 50_000, "A. " * 30_000, "\\boxed{" * 20_000, "1" * 100_000, "$ " * 50_000, "answer is " * 20_000,
    "a, " * 40_000, "<" * 100_000, "yes " * 30_000, " " * 100_000 + "x"], ids=lambda text: repr(text[:9]))
def test_no_text_takes_a_rule_long(text: str) -> None:
    for policy in POLICIES:
        started = time.thread_time()
        for question in ("Which?\nA. x\nB. y", text):
            rule_verdict(text, "B", policy, question, maths=False)
            rule_verdict("B", text, policy, question, maths=False)
        assert time.thread_time() - started < 1.0


def test_alternatives_need_one_match_and_are_wrong_only_if_all_are() -> None:
    assert decide("8", ["7", "8"]) is CORRECT
    assert decide("9", ["7", "8"]) is WRONG
    assert decide("9", ["7", "a dog"]) is UNSCORED
    assert decide("x", []) is UNSCORED and decide("x", ["", " "]) is UNSCORED
    assert decide(" ", "7") is WRONG


def test_free_text_is_called_wrong_only_where_the_policy_says_so() -> None:
    assert decide("a puppy", "a dog") is UNSCORED
    assert decide("a puppy", "a dog", "text") is WRONG


def test_a_policy_is_found_by_name_then_by_the_longest_pattern() -> None:
    rules = {"*": "auto", "toy/*": "text", "toy/maths*": "maths", "toy/maths_hard": "judge"}
    sources = ("web", "toy/x", "toy/maths_1", "toy/maths_hard")
    assert [policy_for(s, rules) for s in sources] == ["auto", "text", "maths", "judge"]
    assert policy_for("web", {}) == "auto"


def test_options_are_read_from_questions_of_many_layouts() -> None:
    expected = {"A": "red", "B": "dark blue", "C": "green"}
    for text in ("Q?\nA. red\nB. dark blue\nC. green", "Q? (A) red (B) dark blue (C) green",
                 "Q? A) red, B) dark blue, C) green", "Q?\nA: red\nB: dark blue\nC: green\nAnswer with the letter.",
                 "Vitamin A. Q?\n(A) red\n(B) dark blue\n(C) green."):
        assert options_of(text) == expected, text
    assert options_of("Is A. Einstein here?") == {} == options_of("")


@pytest.mark.parametrize("text", [
    "007", "about 7", "7-9", "3-1/2", "12:30", "2020-01-05", "7 or 8", "x", "", "1.2.3", "½ cup of 3", "5!", "3 x 2"])
def test_what_is_not_one_number_is_not_parsed_as_one(text: str) -> None:
    assert parse_quantities(text) == ()


@needs_math_verify
def test_mathematics_has_a_hard_limit_off_the_main_thread_and_survives_it() -> None:
    verdicts: list[Verdict] = []
    bombs = [threading.Thread(target=lambda: verdicts.append(decide("2^{9^{9^{9^{9}}}}", "x^2", "maths"))) for _ in range(2)]
    for thread in bombs:
        thread.start()
    for thread in bombs:
        thread.join(timeout=180)
    assert verdicts == [UNSCORED, UNSCORED]
    assert decide("0.5", r"\frac{1}{2}", "maths") is CORRECT


@needs_math_verify
def test_the_maths_worker_sees_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    from hdpo.reward import maths
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret")
    process = maths._start()
    try:
        environment, deadline = b"", time.monotonic() + 30
        while not environment and time.monotonic() < deadline:   # empty until the new program has been loaded
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        assert b"PATH=" in environment and b"sk-very-secret" not in environment
    finally:
        process.kill()
        process.communicate()


def test_without_math_verify_the_maths_rule_cannot_say() -> None:
    """In a fresh process in which math-verify can't be found."""
    code = ("import importlib.util as u; find = u.find_spec\n"
            "u.find_spec = lambda name, *a: None if name == 'math_verify' else find(name, *a)\n"
            "from hdpo.reward.rules import rule_verdict\n"
            "print([rule_verdict('2x', gold, 'maths').verdict.value for gold in (r'\\frac{4x}{2}', '2x')])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert out.strip() == "['unscored', 'correct']"
