"""One part of the world fails: the step completes, and every rollout it did not touch is bit for bit what it would be.

Real tool servers in processes of their own, the real client, a real socket that accepts and never answers, the real judge
client; only the engine replays text, because a language model is what the failure must not depend on.
"""
from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from judge_server import JudgeServer, fail, in_order, say
from scripted import ScriptedEngine
from test_rollout import ANSWER, OBSERVATION, task
from tool_server import ToolServer

from hdpo.adapters.openai_judge import OpenAIJudge
from hdpo.agent.chat import ChatFormat
from hdpo.agent.rollout import Rollouts
from hdpo.background import BackgroundLoop
from hdpo.config import HdpoConfig, JudgeConfig, RewardConfig, RolloutConfig, ToolsConfig
from hdpo.protocols import GenerateRequest, ToolResult
from hdpo.reward.scoring import Scorer
from hdpo.toolserver import client
from hdpo.toolserver.client import ToolClient
from hdpo.train.samples import group_advantages
from hdpo.types import EndReason, RewardedGroup, Task, Trajectory, Verdict

GROUP = 4
BROKEN_SAMPLE = 1
"""Rollout 1 of every group, and all of prompt 2, are on the shard that fails."""


def script(prompt: str, request: GenerateRequest) -> str:
    """Up to three cells of real Python, each printing a function of the seed; then an answer that is sometimes right."""
    calls = prompt.count(OBSERVATION)
    if calls < request.seed % 4:
        return '<tool_call>' + json.dumps(
            {"name": "python", "arguments": {"code": f"print({request.seed} * 3, 'x' * {calls})"}}) + '</tool_call>'
    return ANSWER if request.seed % 3 else ANSWER.replace("4", "a red kite")


def on_broken_shard(prompt: int, sample: int) -> bool:
    return prompt == 2 or sample == BROKEN_SAMPLE


class Shards:
    """Sends each trajectory to one of two tool servers; `on_call(broken, number)` sees every call, counted from 1 within its
    trajectory, before it is made."""

    def __init__(self, healthy: ToolClient, other: ToolClient, on_call: Callable[[bool, int], None] = lambda b, n: None) -> None:
        self.healthy, self.other, self.on_call, self.calls = healthy, other, on_call, Counter[str]()

    def _shard(self, trajectory_id: str) -> ToolClient:
        prompt, sample = map(int, trajectory_id.split("-")[-2:])
        return self.other if on_broken_shard(prompt, sample) else self.healthy

    async def call(self, trajectory_id: str, action: str, task: Task) -> ToolResult:
        self.calls[trajectory_id] += 1
        self.on_call(self._shard(trajectory_id) is self.other, self.calls[trajectory_id])
        return await self._shard(trajectory_id).call(trajectory_id, action, task)

    def expect(self, trajectory_id: str) -> None: ...

    async def finish(self, trajectory_id: str) -> None:
        await self._shard(trajectory_id).finish(trajectory_id)

    async def close(self) -> None:
        await self.healthy.close()
        await self.other.close()


@dataclass
class Step:
    groups: list[RewardedGroup]
    advantages: dict[tuple[int, int], list[float]]
    members: dict[tuple[int, int], list[bool]]


@pytest.fixture(scope="module")
def healthy() -> Iterator[ToolServer]:
    server = ToolServer("--python-timeout", "10")
    yield server
    server.close()


@pytest.fixture
def step(chat: ChatFormat, background: BackgroundLoop, healthy: ToolServer, monkeypatch: pytest.MonkeyPatch,
         ) -> Callable[..., Step]:
    monkeypatch.setattr(client, "FINISH_TIMEOUT_S", 1.0)   # how long closing waits for the server that hangs
    def run(other: str = "", on_call: Callable[[bool, int], None] = lambda b, n: None, judge: Any = None,
            patience: float = 2.0, **config: Any) -> Step:
        clients = [ToolClient(healthy.url, timeout=30), ToolClient(other or healthy.url, timeout=patience, retries=1)]
        shards = Shards(*clients, on_call)
        rollouts = Rollouts(ScriptedEngine(chat, script), chat, shards, background, RolloutConfig(**config), ToolsConfig(),
                            4096, seed=8)
        scorer = Scorer(RewardConfig(rules={"*": "text"} if judge is None else {"*": "judge"}), judge, background)
        try:
            groups = scorer.score(rollouts.collect(
                [task(n) for n in "abcde"], group_size=GROUP, temperature=1.0, step=1, weight_version=0,
                on_finished=scorer.submit))
            rollouts.close()
        finally:
            background.run(shards.close())
            scorer.close()
        values, members = group_advantages(groups, HdpoConfig())
        keys = [(t.index, t.sample_index) for group in groups for t in group.trajectories]
        return Step(groups, dict(zip(keys, values, strict=True)), dict(zip(keys, members, strict=True)))
    return run


def content(t: Trajectory) -> tuple[Any, ...]:
    calls = [(call.name, call.arguments, call.ok, call.observation, call.infrastructure) for call in t.calls]
    return t.task.id, t.token_ids, t.mask, t.log_probs, t.turns, t.end, calls, t.error


def trajectories(step: Step) -> dict[tuple[int, int], Trajectory]:
    return {(t.index, t.sample_index): t for group in step.groups for t in group.trajectories}


def check_untouched_rollouts(step: Step, reference: Step, touched: Callable[[Trajectory], bool], end: EndReason) -> None:
    """All groups are there; what the fault did not touch is equal; what it did is unscored and leaves its group."""
    found, expected = trajectories(step), trajectories(reference)
    assert set(found) == set(expected) and len(found) == 5 * GROUP
    hit = {key for key, t in expected.items() if touched(t)}
    assert 3 <= len(hit) < len(found)
    for key, t in found.items():
        if key in hit:
            assert t.end is end and t.num_tool_calls <= expected[key].num_tool_calls
        else:
            assert content(t) == content(expected[key])
    for group in step.groups:
        for t, reward, judgement in zip(group.trajectories, group.rewards, group.judgements, strict=True):
            key = (t.index, t.sample_index)
            assert reward.scored == (key not in hit) == (judgement.verdict is not Verdict.UNSCORED)
            if key in hit:
                assert step.advantages[key] == [0.0, 0.0] and step.members[key] == [False, False]
    for number, group in enumerate(reference.groups):     # a partial group is the group without those that failed
        kept = [i for i, t in enumerate(group.trajectories) if (t.index, t.sample_index) not in hit]
        part = RewardedGroup(group.task, *(tuple(some[i] for i in kept) for some in (
            group.trajectories, group.judgements, group.rewards)), group.index)
        values, members = group_advantages([part], HdpoConfig())
        keys = [(number, group.trajectories[i].sample_index) for i in kept]
        assert [step.advantages[key] for key in keys] == values and [step.members[key] for key in keys] == members


def calls_broken_shard(t: Trajectory) -> bool:
    return on_broken_shard(t.index, t.sample_index) and bool(t.calls)


def test_a_tool_server_that_hangs_costs_its_own_trajectories_only(step: Callable[..., Step]) -> None:
    reference = step()
    assert {t.end for t in trajectories(reference).values()} == {EndReason.ANSWERED}
    with socket.create_server(("127.0.0.1", 0)) as silent:      # accepts in the kernel, reads nothing, answers nothing
        broken = step(f"http://127.0.0.1:{silent.getsockname()[1]}")
    check_untouched_rollouts(broken, reference, calls_broken_shard, EndReason.INFRASTRUCTURE)
    errors = {t.error for t in trajectories(broken).values() if t.end is EndReason.INFRASTRUCTURE}
    assert all("no answer within 2 s" in error for error in errors)


def test_a_tool_server_killed_in_the_middle_of_the_step_costs_its_own_trajectories_only(step: Callable[..., Step]) -> None:
    reference = step()
    victim = ToolServer("--python-timeout", "10")
    seen: list[int] = []

    def kill(broken: bool, number: int) -> None:
        seen.append(number) if broken else None
        if broken and len(seen) == 1:
            victim.kill()
    broken = step(victim.url, kill)
    check_untouched_rollouts(broken, reference, calls_broken_shard, EndReason.INFRASTRUCTURE)


def test_a_restart_costs_the_trajectories_that_rely_on_what_it_lost_and_no_policy_a_call(step: Callable[..., Step]) -> None:
    """Killed and started again before the first call that is not its trajectory's first: later ones are refused as ours."""
    reference, victim, killed = step(), ToolServer("--python-timeout", "10"), []

    def restart(broken: bool, number: int) -> None:
        if broken and number > 1 and not killed:
            killed.append(number)
            victim.kill()
            victim.start()
    try:
        broken = step(victim.url, restart, patience=60.0)
    finally:
        victim.close()
    lost = {key for key, t in trajectories(broken).items() if t.end is EndReason.INFRASTRUCTURE}
    assert lost and killed
    for key, t in trajectories(broken).items():
        if key in lost:
            assert on_broken_shard(*key) and "the session of this trajectory was lost: the tool server restarted" in t.error
            assert [call.infrastructure for call in t.calls] == [False] * (len(t.calls) - 1) + [True] and len(t.calls) > 1
        else:
            assert content(t) == content(trajectories(reference)[key])


def test_the_wall_clock_cuts_the_stragglers_and_says_so(step: Callable[..., Step], caplog: pytest.LogCaptureFixture) -> None:
    reference = step()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        broken = step(f"http://127.0.0.1:{silent.getsockname()[1]}", patience=60.0, max_seconds=4.0)
    check_untouched_rollouts(broken, reference, calls_broken_shard, EndReason.ABORTED)
    cut = [t for t in trajectories(broken).values() if t.end is EndReason.ABORTED]
    assert all(t.error == "exceeded 4 s" for t in cut)
    assert sum("aborted: exceeded 4 s" in record.message for record in caplog.records) == len(cut)


def test_a_judge_outage_leaves_rollouts_as_they_are_and_verdicts_open(step: Callable[..., Step]) -> None:
    server = JudgeServer(in_order(say("CORRECT")))

    def judge() -> OpenAIJudge:
        return OpenAIJudge(JudgeConfig(base_url=server.url, timeout_s=5.0, deadline_s=2.0), api_key="k", backoff_s=0.01)
    try:
        reference = step(judge=judge())
        server.script = in_order(*[say("CORRECT")] * (len(server.bodies) + 5), fail(503))
        broken = step(judge=judge())
    finally:
        server.close()
    expected = trajectories(reference)
    assert {key: content(t) for key, t in trajectories(broken).items()} == {k: content(t) for k, t in expected.items()}
    verdicts = [j.verdict for group in broken.groups for j in group.judgements]
    assert {j.verdict for group in reference.groups for j in group.judgements} == {Verdict.CORRECT}
    assert set(verdicts) == {Verdict.CORRECT, Verdict.UNSCORED}, "nothing was guessed"
    for group in broken.groups:
        for t, reward in zip(group.trajectories, group.rewards, strict=True):
            assert reward.scored or broken.members[t.index, t.sample_index] == [False, False]
