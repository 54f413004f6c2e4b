"""Several judges as one: majority of all, nobody's key at another's door, one cache entry per panel."""
from __future__ import annotations

from pathlib import Path

import pytest
from aiohttp import web
from judge_server import Action, Judges, completion, fail, in_order, say

from hdpo.adapters.openai_judge import open_judges
from hdpo.config import JudgeConfig
from hdpo.errors import ConfigError
from hdpo.reward.panel import PanelJudge
from hdpo.reward.verdict_cache import CachedJudge
from hdpo.types import Verdict

CORRECT, WRONG, UNSCORED = Verdict.CORRECT, Verdict.WRONG, Verdict.UNSCORED


@pytest.mark.parametrize(("replies", "verdict"), [
    (["CORRECT", "CORRECT", "INCORRECT"], CORRECT), (["INCORRECT", "CORRECT", "INCORRECT"], WRONG),
    (["CORRECT", "CORRECT", "what?"], CORRECT), (["CORRECT", "what?", "what?"], UNSCORED), (["CORRECT", "INCORRECT"], UNSCORED)])
def test_more_than_half_of_all_members_must_agree(judges: Judges, replies: list[str], verdict: Verdict) -> None:
    panel = PanelJudge([judges.judge(judges.serve(in_order(say(reply)))) for reply in replies])
    assert judges.background.run(panel.judge("What flies there?", "a kite", "a bird")).verdict is verdict
    stats = panel.stats()
    assert stats["judge/panel_split"] == float("CORRECT" in replies and "INCORRECT" in replies)
    assert stats["judge/requests"] >= len(replies)


def test_a_member_that_is_down_costs_a_verdict_only_where_the_others_disagree(judges: Judges) -> None:
    down = judges.judge(judges.serve(in_order(fail(500))), deadline_s=0.1)
    agree = [judges.judge(judges.serve(in_order(say("CORRECT")))) for _ in range(2)]
    other = judges.judge(judges.serve(in_order(say("INCORRECT"))))
    assert judges.background.run(PanelJudge([down, *agree]).judge("q", "a kite", "a bird")).verdict is CORRECT
    assert judges.background.run(PanelJudge([down, agree[0], other]).judge("q", "a kite", "a crow")).verdict is UNSCORED


def test_no_member_sees_the_key_of_another(judges: Judges, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def listen(name: str) -> Action:
        async def action(request: web.Request) -> web.StreamResponse:
            seen[name] = request.headers["Authorization"]
            return web.json_response(completion("CORRECT"))
        return action

    servers = {name: judges.serve(in_order(listen(name))) for name in ("first", "second", "third")}
    monkeypatch.setenv("JUDGE_API_KEY", "sk-one")
    monkeypatch.setenv("JUDGE_API_KEY_3", "sk-three")
    members = open_judges(JudgeConfig(base_url=servers["first"].url, model="m1",
                                      panel=[f"m2@{servers['second'].url}", f"m3@{servers['third'].url}"]))
    panel = PanelJudge(members)
    assert judges.background.run(panel.judge("q", "a kite", "a bird")).verdict is CORRECT
    judges.background.run(panel.close())
    assert seen == {"first": "Bearer sk-one", "second": "Bearer EMPTY", "third": "Bearer sk-three"}
    assert [server.bodies[0]["model"] for server in servers.values()] == ["m1", "m2", "m3"]


def test_a_panel_is_cached_as_one_and_apart_from_its_members(judges: Judges, tmp_path: Path) -> None:
    servers = [judges.serve(in_order(say("CORRECT"))) for _ in range(2)]
    for panel, requests in ((True, [1, 1]), (True, [1, 1]), (False, [2, 1]), (False, [2, 1])):
        members = [judges.judge(server, model=f"m{n}") for n, server in enumerate(servers)]
        cached = CachedJudge(PanelJudge(members) if panel else members[0], tmp_path / "verdicts.sqlite")
        assert judges.background.run(cached.judge("q", "a kite", "a bird")).verdict is CORRECT
        judges.background.run(cached.close())
        assert [len(server.bodies) for server in servers] == requests


@pytest.mark.parametrize("member", ["", "model", "model@", "@http://host/v1", "model@host:80/v1"])
def test_a_panel_member_that_cannot_be_reached_by_its_name_is_refused(member: str) -> None:
    with pytest.raises(ConfigError, match="judge.panel: .* is not MODEL@URL"):
        open_judges(JudgeConfig(base_url="http://127.0.0.1:1/v1", panel=[member]))


def test_votes_and_panel_combine(judges: Judges) -> None:
    server = judges.serve(lambda body, n: say("CORRECT" if body["seed"] else "INCORRECT"))
    members = [judges.judge(server, votes=3), judges.judge(server, votes=3)]
    assert judges.background.run(PanelJudge(members).judge("q", "a kite", "a bird")).verdict is CORRECT
    assert len(server.bodies) == 6
