"""A judge that fails, in every way a server can: right verdicts are kept, and no failure becomes a verdict."""
from __future__ import annotations

import email.utils
import time
from collections.abc import Callable

import pytest
from judge_server import Judges, die_in_the_body, fail, hang, in_order, raw, reset, say, trickle, user_message
from trajectories import trajectory

from hdpo.config import RewardConfig
from hdpo.errors import UnscoredLimitError
from hdpo.reward.scoring import Scorer, check_unscored, unscored_share
from hdpo.types import Verdict

CORRECT, WRONG, UNSCORED = Verdict.CORRECT, Verdict.WRONG, Verdict.UNSCORED


@pytest.mark.parametrize("fault", [
    fail(500), fail(503), fail(408), fail(409), fail(429), fail(429, headers={"Retry-After": "0"}), reset, die_in_the_body,
    raw('{"id": "c", "object": "chat.completion", "choi'), raw("<html>bad gateway</html>", "text/html"), raw(""),
    raw('{"choices": []}'), raw("null"), raw('{"choices": [{"message": null}]}'), raw("[1, 2]")])
def test_a_passing_fault_is_retried_and_the_right_verdict_kept(judges: Judges, fault) -> None:
    server = judges.serve(in_order(fault, fault, say("INCORRECT")))
    judge = judges.judge(server)
    answer = judges.ask(judge)
    assert (answer.verdict, answer.by, answer.detail) == (WRONG, "judge", "INCORRECT")
    stats = judge.stats()
    assert stats["judge/requests"] == 3 and stats["judge/retries"] == 2 and stats["judge/verdicts_wrong"] == 1


@pytest.mark.parametrize("fault", [hang, trickle])
def test_a_request_has_a_total_deadline_even_if_bytes_keep_coming(judges: Judges, fault) -> None:
    server = judges.serve(in_order(fault, say("CORRECT")))
    assert judges.ask(judges.judge(server, timeout_s=1.0)).verdict is CORRECT
    assert len(server.bodies) == 2


def test_a_fault_that_lasts_is_unscored_and_says_why(judges: Judges) -> None:
    server = judges.serve(in_order(fail(500)))
    judge = judges.judge(server, deadline_s=0.3)
    answer = judges.ask(judge)
    assert answer.verdict is UNSCORED and "HTTP 500" in answer.detail
    assert judge.stats()["judge/given_up"] == 1


def test_a_server_that_is_not_there_is_unscored(judges: Judges) -> None:
    server = judges.serve(in_order(say("CORRECT")))
    server.stop()
    for model in ("", "named"):   # whether or not the model list is needed first
        answer = judges.ask(judges.judge(server, deadline_s=0.3, model=model))
        assert answer.verdict is UNSCORED and answer.detail


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_retrying_cannot_mend_is_unscored_at_once(judges: Judges, status: int) -> None:
    server = judges.serve(in_order(fail(status), say("CORRECT")))
    assert judges.ask(judges.judge(server)).verdict is UNSCORED
    assert len(server.bodies) == 1


@pytest.mark.parametrize("header", [lambda: "0.6", lambda: email.utils.formatdate(time.time() + 2, usegmt=True)])
def test_retry_after_is_obeyed(judges: Judges, header: Callable[[], str]) -> None:
    times: list[float] = []

    def script(body, n):
        times.append(time.monotonic())
        return fail(429, headers={"Retry-After": header()}) if n == 0 else say("CORRECT")
    assert judges.ask(judges.judge(judges.serve(script))).verdict is CORRECT
    assert times[1] - times[0] >= 0.55


def test_a_pause_beyond_the_deadline_is_not_waited_for(judges: Judges) -> None:
    server = judges.serve(in_order(fail(429, headers={"Retry-After": "3600"})))
    answer = judges.ask(judges.judge(server))
    assert answer.verdict is UNSCORED and "429" in answer.detail and len(server.bodies) == 1


@pytest.mark.parametrize("words", ["YES", "The answer is not correct.", "CORRECT or INCORRECT", None, "<think>CORRECT"])
def test_wrong_words_are_asked_again_and_then_unscored(judges: Judges, words: str | None) -> None:
    server = judges.serve(in_order(say(words), say("INCORRECT")))
    assert judges.ask(judges.judge(server)).verdict is WRONG
    assert ["could not be read" in user_message(body) for body in server.bodies] == [False, True]
    never = judges.serve(in_order(say(words)))
    judge = judges.judge(never)
    answer = judges.ask(judge)
    assert answer.verdict is UNSCORED and "unreadable" in answer.detail and len(never.bodies) == 3
    assert judge.stats()["judge/unreadable"] == 3


def test_reasoning_output_is_read(judges: Judges) -> None:
    server = judges.serve(in_order(say("<think>It might be INCORRECT.\nINCORRECT\nNo.</think>\n\n**CORRECT**"),
                                   say("INCORRECT", reasoning_content="CORRECT")))
    judge = judges.judge(server)
    assert [judges.ask(judge).verdict for _ in range(2)] == [CORRECT, WRONG]


def test_an_empty_model_list_is_waited_for_and_then_unscored(judges: Judges) -> None:
    server = judges.serve(in_order(say("CORRECT")), models=[])
    answer = judges.ask(judges.judge(server, deadline_s=0.3))
    assert answer.verdict is UNSCORED and "lists no model" in answer.detail
    server.models = ["late"]
    judge = judges.judge(server)
    assert judges.ask(judge).verdict is CORRECT and server.bodies[-1]["model"] == "late"


def test_a_refused_sampling_option_is_left_out_from_then_on(judges: Judges) -> None:
    def script(body, n):
        for name in ("temperature", "max_tokens"):
            if name in body:
                return fail(400, {"error": {"message": f"Unsupported parameter: '{name}'", "param": name}})
        return say("CORRECT")
    server = judges.serve(script)
    judge = judges.judge(server)
    assert judges.ask(judge).verdict is CORRECT and judges.ask(judge).verdict is CORRECT
    assert len(server.bodies) == 4


def test_an_outage_costs_one_deadline_and_not_one_per_trajectory(judges: Judges) -> None:
    """A black hole with 2 slots and 60 answers: one after the other they would take 30 time-outs."""
    server = judges.serve(in_order(hang))
    judge = judges.judge(server, model="m", concurrency=2, timeout_s=0.5, deadline_s=1.0)
    scorer = Scorer(RewardConfig(), judge, judges.background)
    groups = scorer.score([tuple(trajectory(f"bird{'x' * i}", index=i) for i in range(60))])
    assert unscored_share(groups) == (60, 60)
    assert len(server.bodies) < 20
    with pytest.raises(UnscoredLimitError, match="60 of 60"):
        check_unscored(60, 60, 0.1)
    server.script = in_order(say("CORRECT"))   # and one success ends it
    assert judges.ask(judge).verdict is CORRECT


def test_a_server_that_dies_and_comes_back_in_mid_step_loses_no_verdict(judges: Judges) -> None:
    truth = {f"bird{'x' * i}": CORRECT if i % 3 else WRONG for i in range(60)}

    def script(body, n):
        if n == 20:
            return reset
        line = user_message(body).split("is the prediction.\n")[1].splitlines()[1]
        return say("CORRECT" if truth[line] is CORRECT else "INCORRECT", delay=0.05)
    server = judges.serve(script)
    scorer = Scorer(RewardConfig(), judges.judge(server, concurrency=4), judges.background)
    group = tuple(trajectory(text, index=i) for i, text in enumerate(truth))
    for t in group:
        scorer.submit(t)
    while len(server.bodies) < 20:
        time.sleep(0.01)
    server.stop()
    before = len(server.bodies)
    server.start()
    (rewarded,) = scorer.score([group])
    assert [j.verdict for j in rewarded.judgements] == list(truth.values())
    assert before < 60 < len(server.bodies)


def test_a_mixed_storm_never_turns_a_failure_into_a_verdict(judges: Judges) -> None:
    faults = [fail(500), fail(429), reset, die_in_the_body, raw('{"id": '), say("maybe"), fail(503)]

    def script(body, n):
        line = user_message(body).split("is the prediction.\n")[1].splitlines()[1]
        if n % 3:
            return faults[n % len(faults)]
        return say("CORRECT" if line.startswith("good") else "INCORRECT")
    server = judges.serve(script)
    scorer = Scorer(RewardConfig(), judges.judge(server, concurrency=8, deadline_s=60.0), judges.background)
    group = tuple(trajectory(f"{'good' if i % 2 else 'bad'} {'x' * i}", index=i) for i in range(80))
    (rewarded,) = scorer.score([group])
    for t, judgement in zip(group, rewarded.judgements, strict=True):
        expected = CORRECT if "good" in t.final_turn else WRONG
        assert judgement.verdict in (expected, UNSCORED)
        assert judgement.verdict is expected or "unreadable" in judgement.detail


def test_the_key_is_sent_but_never_repeated(judges: Judges, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    server = judges.serve(in_order(fail(401, {"error": {"message": "Incorrect API key provided: sk-very-secret"}})))
    judge = judges.judge(server)
    answer = judges.ask(judge)
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert answer.verdict is UNSCORED and "Incorrect API key provided: ***" in answer.detail
    assert "sk-very-secret" not in caplog.text + repr(judge.config) + str(judge.stats())
