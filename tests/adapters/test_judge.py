"""The judge's protocol, its cache and its accounting, against a real server on a real socket."""
from __future__ import annotations

import asyncio
import importlib.util
import multiprocessing
import os
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from judge_server import Judges, JudgeServer, fail, in_order, say, user_message
from trajectories import trajectory

from hdpo.adapters.openai_judge import OpenAIJudge
from hdpo.background import BackgroundLoop
from hdpo.config import JudgeConfig, RewardConfig
from hdpo.doctor.judge_check import KNOWN, check_judge
from hdpo.errors import ConfigError
from hdpo.reward.scoring import Scorer
from hdpo.reward.verdict_cache import CachedJudge, verdict_key
from hdpo.types import Judgement, Verdict

CORRECT, WRONG, UNSCORED = Verdict.CORRECT, Verdict.WRONG, Verdict.UNSCORED


def test_the_request_shows_question_truth_and_prediction_and_nothing_else(judges: Judges) -> None:
    server = judges.serve(in_order(say("CORRECT")), models=["first", "second"])
    group = (trajectory("an orange kite"),)
    Scorer(RewardConfig(), judges.judge(server), judges.background).score([group])
    body = server.bodies[0]
    assert body["model"] == "first" and body["temperature"] == 0 and "stream" not in body
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    text = user_message(body)
    assert "What flies there?" in text and "a red kite" in text and "an orange kite" in text
    assert "<image>" not in text and "<reason>" not in text


def test_a_list_of_ground_truths_takes_one_call(judges: Judges) -> None:
    server = judges.serve(in_order(say("CORRECT")))
    judge = judges.judge(server)
    assert judges.background.run(judge.judge("Which?", ["Lenovo", "ThinkPad"], "that laptop")).verdict is CORRECT
    assert len(server.bodies) == 1


def test_no_more_requests_are_in_flight_than_allowed(judges: Judges) -> None:
    server = judges.serve(in_order(say("CORRECT", delay=0.05)))
    scorer = Scorer(RewardConfig(), judges.judge(server, concurrency=5), judges.background)
    scorer.score([tuple(trajectory(f"bird{'x' * i}", index=i) for i in range(40))])
    assert server.most_running == 5 and server.model_requests == 1


@pytest.mark.parametrize(("replies", "verdict"), [
    (["CORRECT", "INCORRECT", "CORRECT"], CORRECT), (["INCORRECT", "INCORRECT", "CORRECT"], WRONG),
    (["CORRECT", "what?", "CORRECT"], CORRECT), (["CORRECT", "what?", "INCORRECT"], UNSCORED), (["what?"] * 3, UNSCORED)])
def test_the_majority_of_all_votes_counts(judges: Judges, replies: list[str], verdict: Verdict) -> None:
    server = judges.serve(lambda body, n: say(replies[body["seed"]]))
    answer = judges.ask(judges.judge(server, votes=3))
    assert answer.verdict is verdict and {body["seed"] for body in server.bodies} == {0, 1, 2}
    assert all(body["temperature"] > 0 for body in server.bodies)


def test_tokens_and_time_are_accounted_per_call_of_stats(judges: Judges) -> None:
    judge = judges.judge(judges.serve(in_order(say("CORRECT", delay=0.05))))
    judges.ask(judge)
    stats = judge.stats()
    assert stats["judge/prompt_tokens"] == 100 and stats["judge/completion_tokens"] == 2 and stats["judge/requests"] == 1
    assert stats["judge/request_s"] >= 0.05
    assert judge.stats() == {"judge/request_s": 0.0}


def test_without_an_address_the_message_names_the_way_out() -> None:
    with pytest.raises(ConfigError, match="JUDGE_BASE_URL"):
        OpenAIJudge(JudgeConfig())


# --- cache ------------------------------------------------------------------------------------------------------------

def cached(judges: Judges, server: JudgeServer, path: Path, **settings: object) -> CachedJudge:
    return CachedJudge(judges.judge(server, **settings), path)


def test_a_verdict_is_asked_once_and_survives_the_process(judges: Judges, tmp_path: Path) -> None:
    server = judges.serve(in_order(say("INCORRECT")))
    first = cached(judges, server, tmp_path / "deep" / "verdicts.sqlite")
    assert [judges.ask(first).by for _ in range(3)] == ["judge", "cache", "cache"]
    judges.background.run(first.close())
    again = cached(judges, server, tmp_path / "deep" / "verdicts.sqlite")
    assert judges.ask(again) == Judgement(WRONG, "cache", "INCORRECT")
    assert len(server.bodies) == 1 and again.stats()["judge/cache_hits"] == 1
    judges.background.run(again.close())


def test_a_cached_verdict_needs_no_server_if_the_model_is_named(judges: Judges, tmp_path: Path) -> None:
    server = judges.serve(in_order(say("CORRECT")))
    judge = cached(judges, server, tmp_path / "v.sqlite", model="m", deadline_s=0.2)
    judges.ask(judge)
    server.stop()
    assert judges.ask(judge).by == "cache"
    assert judges.ask(judge, "another bird").verdict is UNSCORED
    judges.background.run(judge.close())


def test_an_outage_is_not_remembered(judges: Judges, tmp_path: Path) -> None:
    server = judges.serve(in_order(fail(400), say("CORRECT")))
    judge = cached(judges, server, tmp_path / "v.sqlite")
    assert [judges.ask(judge).verdict for _ in range(2)] == [UNSCORED, CORRECT]
    judges.background.run(judge.close())


def test_all_that_determines_a_verdict_is_in_its_key(judges: Judges) -> None:
    server = judges.serve(in_order(say("CORRECT")))
    fingerprints = [judges.background.run(judges.judge(server, **settings).fingerprint()) for settings in (
        {"model": "a"}, {"model": "b"}, {"model": "a", "votes": 3}, {"model": "a", "max_prediction_chars": 9},
        {"model": "a", "max_tokens": 9}, {"model": "a", "extra_body": {"top_p": 0.5}})]
    assert len(set(fingerprints)) == 6
    keys = {verdict_key(f, *rest) for f in fingerprints for rest in (
        ("q", "t", "p"), ("q", ["t"], "p"), ("q", "t", "p "), ("q ", "t", "p"), ("q", ["t", "u"], "p"), ("qt", "", "p"))}
    assert len(keys) == 36


def test_equal_questions_in_flight_are_asked_once(judges: Judges, tmp_path: Path) -> None:
    server = judges.serve(in_order(say("CORRECT", delay=0.2)))
    judge = cached(judges, server, tmp_path / "v.sqlite")
    scorer = Scorer(RewardConfig(), judge, judges.background)
    (group,) = scorer.score([tuple(trajectory("a bird", index=i) for i in range(16))])
    assert all(j.verdict is CORRECT for j in group.judgements) and len(server.bodies) == 1
    judges.background.run(judge.close())


def test_a_cache_that_breaks_costs_questions_and_no_verdict(judges: Judges, tmp_path: Path) -> None:
    server = judges.serve(in_order(say("CORRECT")))
    judge = cached(judges, server, tmp_path / "v.sqlite")
    judges.ask(judge)
    judges.background.run(judge.close())   # what was written is in the file now
    judge = cached(judges, server, tmp_path / "v.sqlite")
    with sqlite3.connect(tmp_path / "v.sqlite") as other:
        other.execute("DROP TABLE verdicts")
    assert judges.ask(judge).by == "judge" and judge.stats()["judge/cache_errors"] >= 1
    judges.background.run(judge.close())
    (tmp_path / "not_sqlite").write_text("hello, this is a text file and not a database" * 100)
    with pytest.raises(ConfigError, match="judge.cache"):
        cached(judges, server, tmp_path / "not_sqlite")


class Counting:
    """Stands in for a judge in the processes of the next test; its replies name the process."""

    asked = 0

    async def judge(self, question: str, ground_truth: str | list[str], prediction: str) -> Judgement:
        self.asked += 1
        await asyncio.sleep(0)
        return Judgement(CORRECT if len(prediction) % 2 else WRONG, "judge", f"from {os.getpid()}")

    async def fingerprint(self) -> str:
        return "counting"

    async def close(self) -> None:
        pass


def _rank(path: str, barrier, results) -> None:
    background, counting = BackgroundLoop(), Counting()
    barrier.wait()
    judge = CachedJudge(counting, path)

    async def all_answers() -> list[Judgement]:
        return await asyncio.gather(*[judge.judge("q", "t", "x" * n) for n in range(300)])
    first = background.run(all_answers())
    barrier.wait()
    asked = counting.asked
    second = background.run(all_answers())
    ok = all((j.verdict is CORRECT) == bool(n % 2) for n, j in enumerate(first))
    ok &= all(j.by == "cache" for j in second) and counting.asked == asked
    results.put((ok, judge.stats().get("judge/cache_errors", 0)))
    background.run(judge.close())
    background.close()


def test_several_processes_share_one_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    ranks = [context.Process(target=_rank, args=(str(tmp_path / "v.sqlite"), barrier, results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    assert [results.get(timeout=120) for _ in ranks] == [(True, 0)] * 4
    for rank in ranks:
        rank.join(timeout=60)
    with sqlite3.connect(tmp_path / "v.sqlite") as database:
        assert database.execute("SELECT count(*), count(DISTINCT key) FROM verdicts").fetchone() == (300, 300)


# --- hdpo judge --check and a real model server -----------------------------------------------------------------------

def test_the_check_reports_agreement_and_failures(judges: Judges) -> None:
    right = {prediction: good for _, _, prediction, good in KNOWN}

    def perfect(body, n):
        shown = user_message(body).split("is the prediction.\n")[1].splitlines()[1]
        return say("CORRECT" if right[shown] else "INCORRECT")
    check = judges.background.run(check_judge(judges.judge(judges.serve(perfect))))
    assert check.ok and check.agreed == len(KNOWN) == 10
    assert len(check.lines()) == 1 and "agreement 10/10" in check.lines()[0]
    yes = judges.background.run(check_judge(judges.judge(judges.serve(in_order(say("CORRECT"))))))
    assert not yes.ok and yes.agreed == 5 and len(yes.lines()) == 6
    mute = judges.background.run(check_judge(judges.judge(judges.serve(in_order(say("hm"))))))
    assert not mute.ok and mute.failed == 10 and "without a verdict 10" in mute.lines()[-1]


@pytest.mark.slow
@pytest.mark.engine
def test_the_protocol_holds_against_a_real_vllm_server(
        judges: Judges, tmp_path: Path) -> None:
    """A tiny random model can't judge; what counts is that its server takes our requests and its noise is unscored."""
    if not importlib.util.find_spec("vllm"):
        pytest.skip("vllm is not installed")
    from tiny_models import save_tiny_qwen3_vl
    tiny_folder = save_tiny_qwen3_vl(tmp_path / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "JUDGE_MAX_MODEL_LEN": "4096",
                   "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "JUDGE_API_KEY": "sk-local"}
    script = Path(__file__).parents[2] / "launch" / "start_judge.sh"
    log = (tmp_path / "vllm.log").open("w")
    server = subprocess.Popen([str(script), str(tiny_folder), str(port), "--enforce-eager", "--dtype", "float32"],
                              env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait_until_healthy(server, port, tmp_path / "vllm.log")
        config = JudgeConfig(base_url=f"http://127.0.0.1:{port}/v1", timeout_s=300, deadline_s=600, max_prediction_chars=500,
                             max_tokens=16)   # a random model never stops by itself
        judge = OpenAIJudge(config, api_key="sk-local")
        assert judges.background.run(judge.model()) == str(tiny_folder)
        answer = judges.background.run(judge.judge("What flies there?", "a kite", "a bird"))
        stats = judge.stats()
        assert answer.by == "judge" and answer.verdict in Verdict
        assert answer.verdict is not UNSCORED or answer.detail.startswith("unreadable reply"), answer
        assert stats["judge/prompt_tokens"] > 0 and stats["judge/completion_tokens"] > 0
        judges.background.run(judge.close())
        stranger = OpenAIJudge(config, api_key="wrong")
        assert "401" in judges.background.run(stranger.judge("q", "t", "p")).detail
        judges.background.run(stranger.close())
    finally:
        server.terminate()   # the server ends its engine process itself
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, 9)
        log.close()


def _wait_until_healthy(server: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])
