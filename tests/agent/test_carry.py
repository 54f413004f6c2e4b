"""Rollouts that go on in the next step: nothing is lost or said twice, every token keeps its weights; and how a step ends."""
from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from scripted import ScriptedEngine, ScriptedTools
from test_rollout import ANSWER, CALL, OBSERVATION, task

from hdpo.agent import carry
from hdpo.agent.carry import Carry, Held
from hdpo.agent.chat import ChatFormat
from hdpo.agent.rollout import Rollouts
from hdpo.background import BackgroundLoop
from hdpo.config import RolloutConfig, ToolsConfig
from hdpo.protocols import GenerateRequest
from hdpo.types import EndReason, Task, Trajectory

LONG = "<reason>" + "so we go on and on " * 12 + "</reason>\n"


def written(chat: ChatFormat, request: GenerateRequest) -> str:
    """The text of the turn that was cut."""
    return chat.decode(request.token_ids[len(request.token_ids) - request.begun:]) if request.begun else ""


class Steps:
    """Collections one after the other, each with weights of its own, as a run makes them."""

    def __init__(self, chat: ChatFormat, background: BackgroundLoop, full: Callable[[str], str],
                 tools: ScriptedTools | None = None, group_size: int = 2, tokens_per_step: int = 5, **config: Any) -> None:
        def rest(prompt: str, request: GenerateRequest) -> str:
            turn, begun = full(prompt), written(chat, request)
            assert turn.startswith(begun), "a cut turn goes on where it stood"
            return turn[len(begun):]
        self.engine = ScriptedEngine(chat, rest, tokens_per_step=tokens_per_step)
        self.tools, self.group_size = tools or ScriptedTools(), group_size
        self.rollouts = Rollouts(self.engine, chat, self.tools, background, RolloutConfig(**config), ToolsConfig(), 4096, seed=3)
        self.held: dict[int, Held] = {}
        self.finished: list[Trajectory] = []

    def step(self, version: int, tasks: list[Task], is_over: Callable[[], bool], known: Any = None) -> Carry:
        self.engine.version = version
        going = Carry(self.held, len(tasks), is_over=is_over)
        self.rollouts.collect(tasks, group_size=self.group_size, temperature=1.0, step=version, weight_version=version,
                              carry=going, first_index=10 * version, on_finished=self.finished.append, known=known)
        assert self.engine.num_unfinished() == 0
        self.held = going.groups
        return going

    def after(self, engine_steps: int) -> Callable[[], bool]:
        stop = len(self.engine.batches) + engine_steps
        return lambda: len(self.engine.batches) >= stop


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hdpo.agent.rollout.POLL_S", 0.0005)


def slowly(engine: ScriptedEngine, background: BackgroundLoop) -> None:
    """The loop has looked whether the step is over before the next tokens come, so that a step can be cut within a turn."""
    engine.on_step = lambda: background.run(asyncio.sleep(0.002))


def test_a_turn_that_is_cut_goes_on_from_its_last_token_and_every_token_keeps_its_weights(
        chat: ChatFormat, background: BackgroundLoop) -> None:
    steps = Steps(chat, background, lambda prompt: LONG + ANSWER if OBSERVATION in prompt else LONG + CALL)
    slowly(steps.engine, background)
    versions = 0
    while steps.held or not versions:
        steps.step(versions, [task()] if not versions else [], steps.after(4) if versions < 12 else lambda: False)
        versions += 1
        if all(held.complete(2) for held in steps.held.values()):
            break
    group = steps.held[0].trajectories()
    assert len(group) == 2 and versions > 2
    for trajectory in group:
        assert trajectory.end is EndReason.ANSWERED and len(trajectory.calls) == 1
        assert trajectory.turns == (LONG + CALL, LONG + ANSWER)
        sampled = [version for version, mask in zip(trajectory.versions, trajectory.mask, strict=True) if mask]
        assert sampled == sorted(sampled) and len(set(sampled)) > 2 and trajectory.oldest_version == 0
        assert {v for v, mask in zip(trajectory.versions, trajectory.mask) if not mask} == {-1}
        assert chat.decode([t for t, mask in zip(trajectory.token_ids, trajectory.mask) if mask]) == LONG + CALL + LONG + ANSWER
        assert len(trajectory.log_probs) == len(trajectory.token_ids)
    assert len(steps.finished) == 2 and len(steps.tools.calls) == 2, "each ends once, and calls once"
    seeds = [request.seed for request in steps.engine.requests]
    assert len(set(seeds)) == len(seeds), "the rest of a turn has random numbers of its own"
    compact = [request for request in steps.engine.requests if request.begun]
    assert compact and all(len(request.images) == 1 for request in compact)


def test_a_call_under_way_at_the_cut_goes_on_and_is_answered_once(chat: ChatFormat, background: BackgroundLoop) -> None:
    gate = background.run(_event())
    begun: list[str] = []

    async def before(action: str) -> None:
        begun.append(action)
        await gate.wait()
    tools = ScriptedTools(before=before)
    steps = Steps(chat, background, lambda prompt: ANSWER if OBSERVATION in prompt else CALL, tools, group_size=2)
    steps.step(0, [task()], lambda: len(begun) == 2)
    assert len(steps.held[0].going) == 2 and not tools.calls and not tools.finished, "sessions are kept"
    background.loop.call_soon_threadsafe(gate.set)
    steps.step(1, [], lambda: False)
    assert steps.held[0].complete(2) and len(begun) == len(tools.calls) == 2
    steps.rollouts.close()
    assert sorted(tools.finished) == sorted(set(tools.started)) and len(tools.finished) == 2
    assert not tools.expected, "this process opened the sessions itself"


async def _event() -> asyncio.Event:
    return asyncio.Event()


def test_a_trajectory_of_an_earlier_process_goes_on_and_its_session_is_expected(
        chat: ChatFormat, background: BackgroundLoop) -> None:
    def full(prompt: str) -> str:
        return LONG + ANSWER if OBSERVATION in prompt else CALL
    first = Steps(chat, background, full, group_size=1)
    slowly(first.engine, background)
    first.step(0, [task()], lambda: len(first.tools.calls) == 1 and first.engine.num_unfinished() > 0)
    (going,) = first.held[0].going.values()
    assert going.begun and len(going.so_far.calls) == 1 and going.so_far.end is EndReason.ABORTED
    again = Steps(chat, background, full, group_size=1)
    again.held = first.held
    again.step(1, [], lambda: False)
    (ended,) = again.held[0].trajectories()
    assert again.tools.expected == [going.session] and ended.turns == (CALL, LONG + ANSWER)
    assert ended.token_ids[:len(going.so_far.token_ids)] == going.so_far.token_ids
    assert ended.seconds > going.so_far.seconds


def test_a_stop_leaves_what_was_carried_as_it_was(chat: ChatFormat, background: BackgroundLoop) -> None:
    steps = Steps(chat, background, lambda prompt: LONG * 4 + ANSWER)
    slowly(steps.engine, background)
    steps.step(0, [task()], steps.after(3))
    before = {sample: dataclasses.replace(c) for sample, c in steps.held[0].going.items()}
    lengths = {sample: len(c.so_far.token_ids) for sample, c in before.items()}
    steps.rollouts.stop = threading.Event()
    steps.rollouts.stop.set()
    steps.step(1, [], lambda: False)
    assert steps.held[0].going == before
    assert {sample: len(c.so_far.token_ids) for sample, c in steps.held[0].going.items()} == lengths


# -- the rule ------------------------------------------------------------------------------------------------------


def test_groups_that_may_not_wait_are_trained_first_then_the_oldest_prompts() -> None:
    assert carry.chosen([(True, 3), (False, 9), (True, 4), (True, 1)], 2) == {9, 1}
    assert not carry.is_over(7, 8, 0) and not carry.is_over(9, 8, 1) and carry.is_over(8, 8, 0)


def test_no_more_prompts_are_open_than_steps_are_left_to_train_them() -> None:
    assert [carry.open_prompts(8, 0.5, left) for left in (5, 2, 1)] == [12, 12, 8]
    assert carry.open_prompts(1, 0.01, 9) == 2 and carry.open_prompts(8, 0.0, 9) == 8


@pytest.mark.parametrize("max_versions", [2, 3])
def test_no_token_that_is_trained_is_older_than_the_limit_and_every_prompt_is_trained_once(max_versions: int) -> None:
    """A thousand steps of random ends: held groups that may not wait end within the step, the others when they like."""
    coin, wanted, held, started, trained = random.Random(1), 8, dict[int, int](), 0, list[int]()
    for step in range(1000):
        assert not any(carry.too_old(born, step, max_versions) for born in held.values())
        for _ in range(carry.open_prompts(wanted, 0.5, 1000 - step) - len(held)):
            held[started] = step
            started += 1
        waits = {n: carry.may_wait(born, step, max_versions) for n, born in held.items()}
        ends = sorted(held, key=lambda n: (waits[n], coin.random()))
        complete = [(waits[n], n) for n in ends[:max(wanted, sum(not w for w in waits.values()))]]
        chosen = carry.chosen(complete, wanted)
        assert len(chosen) == wanted
        trained += sorted(chosen)
        held = {n: born for n, born in held.items() if n not in chosen}
    assert not held and sorted(trained) == list(range(started)) and started == 8000


def test_what_is_too_old_is_dropped_alone_and_leaves_the_others_as_they_were() -> None:
    def of(version: int, sample: int) -> Trajectory:
        row = Task("t", "toy", [{"role": "user", "content": "?"}], (), "4")
        return Trajectory(row, sample, [1, 2], [0, 1], [0.0, -1.0], 1, (), (), EndReason.ANSWERED, ("x",), versions=[-1, version])
    young, old = of(5, 0), of(3, 1)
    held = carry.without_old(Held(7, young.task, {0: young, 1: old}, {}), step=5, max_versions=2)
    assert held.done[0] is young and held.done[1].end is EndReason.ABORTED
    assert "rollout.carry_max_versions (2)" in held.done[1].error and held.complete(2)
