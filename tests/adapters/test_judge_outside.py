"""What judges of other houses send and refuse: read for what it says, told in the provider's words, no verdict by accident."""
from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from judge_server import Judges, fail, in_order, raw, say, user_message

from hdpo.config import Config, JudgeConfig
from hdpo.doctor.reach_judge import ask_one, reach_judge
from hdpo.errors import UserError
from hdpo.reward.judge_prompt import parse_verdict
from hdpo.reward.judge_reply import one_line, refused_options, words_of
from hdpo.reward.verdict_cache import CachedJudge
from hdpo.types import Verdict

CORRECT, WRONG, UNSCORED = Verdict.CORRECT, Verdict.WRONG, Verdict.UNSCORED


# --- replies ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content", [
    [{"type": "text", "text": "INCORRECT"}], [{"type": "output_text", "text": "INCORR"}, {"type": "text", "text": "ECT"}],
    ["INCORRECT"], [{"text": "INCORRECT"}],
    [{"type": "thinking", "thinking": [{"type": "text", "text": "CORRECT"}]}, {"type": "text", "text": "INCORRECT"}]])
def test_a_content_of_parts_is_joined_without_the_thinking(judges: Judges, content: list[Any]) -> None:
    assert judges.ask(judges.judge(judges.serve(in_order(say(content))))).verdict is WRONG


@pytest.mark.parametrize("content", [
    7, True, {"verdict": "CORRECT"}, [7], [{"type": "image_url", "text": "CORRECT"}], [{"type": "text", "text": ["CORRECT"]}],
    [[{"type": "text", "text": "CORRECT"}]], []])
def test_a_content_that_is_no_text_is_asked_again(judges: Judges, content: Any) -> None:
    server = judges.serve(in_order(say(content), say("INCORRECT")))
    assert judges.ask(judges.judge(server)).verdict is WRONG and len(server.bodies) == 2


def test_a_reply_that_was_cut_is_no_verdict(judges: Judges) -> None:
    server = judges.serve(in_order(say("CORRECT", finish_reason="length"), say("INCORRECT")))
    assert judges.ask(judges.judge(server)).verdict is WRONG
    judge = judges.judge(judges.serve(in_order(say("CORRECT", finish_reason="length"))), max_tokens=7)
    answer = judges.ask(judge)
    assert answer.verdict is UNSCORED and "cut at judge.max_tokens = 7" in answer.detail and judge.stats()["judge/cut"] == 3


@pytest.mark.parametrize("reply", [
    "INCORRECT.\nCORRECT", "NOT\nCORRECT", "It is not\n\nCORRECT", "IN\nCORRECT", "Is it INCORRECT or\nCORRECT", "un-\nCORRECT",
    "INCORRECT, because the year differs.\nCORRECT", "I'd say it isn't\nCORRECT", "CORRECT?\nINCORRECT",
    "Verdict: INCORRECT!\nCORRECT"])
def test_a_reply_that_says_both_or_negates_its_last_line_is_unreadable(reply: str) -> None:
    assert parse_verdict(reply) is UNSCORED


def test_a_half_surrogate_pair_is_kept_as_text_and_the_cache_stays_open_for_all(judges: Judges, tmp_path: Path) -> None:
    text = r'"\ud83d it matches.\nCORRECT"'
    body = json.dumps({"choices": [{"finish_reason": "stop", "message": {"content": "TEXT"}}]}).replace('"TEXT"', text)
    judge = CachedJudge(judges.judge(judges.serve(in_order(raw(body)))), tmp_path / "v.sqlite")
    assert [judges.ask(judge).by for _ in range(2)] == ["judge", "cache"]
    judges.background.run(judge.close())
    with sqlite3.connect(tmp_path / "v.sqlite", timeout=0.1) as other:   # nobody holds a transaction
        assert other.execute("SELECT verdict, detail FROM verdicts").fetchall() == [("correct", "\ufffd it matches.\nCORRECT")]
        other.execute("DELETE FROM verdicts")


def test_a_row_that_no_database_holds_leaves_no_transaction_open(tmp_path: Path) -> None:
    from hdpo.reward.verdict_cache import _insert, _open
    database = _open(tmp_path / "v.sqlite")
    with pytest.raises(UnicodeEncodeError):
        _insert(database, {b"k": ("correct", "\ud83d")})
    assert not database.in_transaction
    database.close()


# --- refusals ---------------------------------------------------------------------------------------------------------

def forbids(name: str, shape: str, status: int = 422):
    """A server that refuses one field of the request, in the words of one of the public ones."""
    def script(body: dict[str, Any], n: int):
        if name not in body:
            return say("CORRECT")
        quoted = {**body, "note": "seed temperature max_tokens top_k"}   # what it echoes is no complaint
        return fail(status, {
            "fastapi": {"detail": [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted",
                                    "input": quoted}]},
            "mistral": {"object": "error", "message": {"detail": [{"type": "extra_forbidden", "loc": ["body", name],
                                                                   "msg": "Extra inputs are not permitted"}]}},
            "azure": {"error": {"code": "extra_forbidden", "message": f"parameter {name} is not supported", "param": None}},
            "openai": {"error": {"message": f"Unsupported parameter: '{name}' is not supported with this model.", "param": name}},
            "text": {"message": f"{name}: Extra inputs are not permitted"}}[shape])
    return script


@pytest.mark.parametrize("shape", ["fastapi", "mistral", "azure", "openai", "text"])
@pytest.mark.parametrize(("name", "status"), [
    ("seed", 422), ("seed", 400), ("temperature", 422), ("max_tokens", 400), ("top_k", 422)])
def test_a_refused_option_is_lost_alone_and_for_that_judge(judges: Judges, name: str, status: int, shape: str) -> None:
    server = judges.serve(forbids(name, shape, status))
    judge = judges.judge(server, model="m", extra_body={"top_k": 1})
    assert [judges.ask(judge).verdict for _ in range(2)] == [CORRECT, CORRECT] and len(server.bodies) == 3
    left = {"seed", "temperature", "max_tokens", "top_k"} - {name}
    assert left <= server.bodies[-1].keys() and name not in server.bodies[-1]
    other = judges.judge(server, model="m")
    judges.ask(other)
    assert name == "top_k" or name in server.bodies[3]   # the other judge tries it for itself


def test_the_newer_name_of_max_tokens_is_taken_where_the_old_one_is_refused(judges: Judges) -> None:
    words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    server = judges.serve(lambda body, n: fail(400, {"error": {"message": words, "param": "max_tokens"}})
                          if "max_tokens" in body else say("CORRECT"))
    assert judges.ask(judges.judge(server, max_tokens=99)).verdict is CORRECT
    assert server.bodies[-1]["max_completion_tokens"] == 99


@pytest.mark.parametrize("words", [
    "This model's maximum context length is 300 tokens. However, your messages resulted in 9000 tokens.",
    "prompt is too long: 9000 tokens > 300 maximum", "Input is too long for requested model."])
@pytest.mark.parametrize("character", ["x ", "\U0001f680", "東"])
def test_a_prediction_with_too_many_tokens_is_cut_until_the_judge_can_read_it(judges: Judges, words: str, character: str) -> None:
    def script(body: dict[str, Any], n: int):
        shown = user_message(body).split("is the prediction.\n")[1].split("\n")[1]
        return say("INCORRECT") if len(shown.encode()) <= 600 else fail(400, {"error": {"message": words}})
    server = judges.serve(script)
    judge = judges.judge(server)
    assert judges.ask(judge, character * 30_000).verdict is WRONG
    assert "characters are shown" in user_message(server.bodies[-1]) and judge.stats()["judge/shortened"] >= 2
    stubborn = judges.judge(judges.serve(in_order(fail(400, {"error": {"message": words}}))))
    assert judges.ask(stubborn, character * 30_000).verdict is UNSCORED   # and it ends


def test_length_and_further_fields_of_a_request_are_settings(judges: Judges) -> None:
    server = judges.serve(in_order(say("CORRECT")))
    judges.ask(judges.judge(server, max_tokens=123, extra_body={"chat_template_kwargs": {"enable_thinking": False}}))
    assert server.bodies[0]["max_tokens"] == 123 and server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    with pytest.raises(ValueError, match="messages, model can't be set here"):
        JudgeConfig(extra_body={"messages": [], "model": "x"})


@pytest.mark.parametrize(("action", "words"), [
    (raw('{"error": {"message": "Insufficient credits", "code": 402}}'), "Insufficient credits"),
    (fail(422, {"detail": "no such\x1b[31m\nkey sk-very-secret"}), "HTTP 422: no such [31m key ***"),
    (fail(400, {"detail": [{"loc": ["body", "messages"], "msg": "bad role"}]}), "HTTP 400: body.messages: bad role"),
    (fail(403, {"message": "quota of this month is used up"}), "HTTP 403: quota of this month is used up"),
    (raw('{"choices": [], "message": "the queue is full"}'), "the queue is full"),
    (raw("<html>bad gateway</html>", "text/html"), "bad gateway")])
def test_the_reason_is_in_the_providers_words_on_one_line_without_the_key(judges: Judges, action, words: str) -> None:
    answer = judges.ask(judges.judge(judges.serve(in_order(action)), model="m", deadline_s=0.2))
    assert answer.verdict is UNSCORED and words in answer.detail, answer
    assert "sk-very-secret" not in answer.detail and answer.detail.isprintable()


def test_no_body_of_an_error_makes_reading_it_raise() -> None:
    for body in (None, 7, [], {}, [[{"msg": 3}]], {"error": None}, {"error": {"message": {"detail": [1]}}},
                 "\ud83d\x00", b"\xff"):
        assert isinstance(words_of(body), str) and isinstance(refused_options(body, words_of(body), ["seed"]), list)
    assert one_line("a\u202eb\x1b]0;title\x07\r\nc" + "x" * 9999).startswith("a b ]0;title c")
    assert len(one_line("y" * 9999)) == 300


# --- before the run ---------------------------------------------------------------------------------------------------

def config_of(url: str, **settings: Any) -> Config:
    return Config.model_validate({"judge": {"base_url": url, **settings}})


def test_the_dry_run_asks_one_real_question(judges: Judges) -> None:
    server = judges.serve(in_order(say("CORRECT")))
    assert reach_judge(config_of(server.url)) == [f"{server.url} answers"] and not server.bodies
    assert ask_one(config_of(server.url)) == ["one question asked and judged"] and len(server.bodies) == 1
    wrong = judges.serve(in_order(say("INCORRECT")))
    assert "calls a right answer wrong" in ask_one(config_of(wrong.url))[0]
    broke = judges.serve(in_order(fail(403, {"error": {"message": "Insufficient credits"}})))
    with pytest.raises(UserError, match="gives no verdict: HTTP 403: Insufficient credits"):
        ask_one(config_of(broke.url))


@pytest.mark.parametrize("ending", ["", "/", "/v1/chat/completions", "/v1/models"])
def test_an_address_that_is_not_quite_right_gets_the_right_one(judges: Judges, ending: str) -> None:
    server = judges.serve(in_order(say("CORRECT")))
    with pytest.raises(UserError, match=f"{server.url} does answer: that is the address to set") as caught:
        reach_judge(config_of(server.url.removesuffix("/v1") + ending))
    assert "\n" not in str(caught.value)
    bare = judges.judge(server, model="m")
    bare.config = bare.config.model_copy(update={"base_url": server.url.removesuffix("/v1")})
    assert "does judge.base_url lack its /v1?" in judges.ask(bare).detail   # and a run that is under way says it too


def test_a_model_that_the_server_does_not_list_is_noticed(judges: Judges) -> None:
    server = judges.serve(in_order(fail(404, {"error": {"message": "no such model"}})), models=["Qwen3-32B", "other"])
    noticed = "judge.model Qwen3-23B is not among its models (did you mean Qwen3-32B?)"
    assert noticed in reach_judge(config_of(server.url, model="Qwen3-23B"))[0]
    with pytest.raises(UserError) as caught:
        ask_one(config_of(server.url, model="Qwen3-23B"))
    assert noticed in str(caught.value) and "no such model" in str(caught.value)
    assert reach_judge(config_of(server.url, model="other"))[0].endswith("answers")


def test_each_member_of_a_panel_is_looked_at(judges: Judges) -> None:
    server = judges.serve(in_order(say("CORRECT")))
    panel = config_of(server.url, panel=[f"scripted@{server.url}", "m@http://127.0.0.1:9/v1"])
    with pytest.raises(UserError, match="judge.panel: http://127.0.0.1:9/v1/models: "):
        reach_judge(panel)
