"""Trajectories: what is recorded, who waits for whom, what ends them all."""
from __future__ import annotations

import asyncio
import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image
from scripted import ScriptedEngine, ScriptedTools, delays

from hdpo import oddities
from hdpo.agent.chat import ChatFormat
from hdpo.agent.images import encode_png
from hdpo.agent.parse import EXAMPLES
from hdpo.agent.queue import sampling_seed
from hdpo.agent.rollout import Rollouts
from hdpo.background import BackgroundLoop
from hdpo.config import RolloutConfig, ToolsConfig
from hdpo.errors import RequestRefused
from hdpo.protocols import GenerateRequest, ToolResult
from hdpo.types import EndReason, StopReason, Task, Trajectory

CALL = "<reason>look</reason>\n" + EXAMPLES["python"]
ANSWER = "<reason>done</reason>\n<answer>4</answer>"
OBSERVATION = "<|im_start|>user\nCode"


def task(name: str = "a", images: int = 1) -> Task:
    data = encode_png(Image.effect_noise((64, 48), 50).convert("RGB"))
    return Task(name, "toy", [{"role": "user", "content": "<image>" * images + f"What is {name}?"}], (data,) * images, "4")


def once(prompt: str, request: GenerateRequest) -> str:
    """Call python once, then answer."""
    return ANSWER if OBSERVATION in prompt else CALL


def only(groups: list[tuple[Trajectory, ...]]) -> Trajectory:
    ((trajectory,),) = groups
    length = len(trajectory.token_ids)
    assert length == len(trajectory.mask) == len(trajectory.log_probs)
    return trajectory


def test_a_call_and_an_answer_are_recorded_token_by_token(chat: ChatFormat, collect: Any) -> None:
    t = only(collect(once))
    assert t.end is EndReason.ANSWERED and t.num_tool_calls == 1 and t.turns == (CALL, ANSWER)
    prompt = chat.prompt(t.task.messages, t.images)
    observation = chat.observation("Code execution result:\n7", [], 100)
    call, answer = chat.encode_turn(CALL), [*chat.encode_turn(ANSWER), chat.end_of_turn_id]
    assert t.token_ids == prompt.expanded_ids + call + observation.expanded_ids + answer
    assert t.prompt_length == len(prompt.expanded_ids)
    assert [i for i, m in zip(t.token_ids, t.mask) if m] == call + answer
    assert [p for p, m in zip(t.log_probs, t.mask) if not m] == [0.0] * (len(t.mask) - len(call + answer))
    first, second = collect.engine.requests
    assert second.token_ids[:len(first.token_ids)] == first.token_ids


def test_tool_images_are_seen_bounded_and_broken_ones_are_named(chat: ChatFormat, collect: Any) -> None:
    good = encode_png(Image.new("RGB", (500, 300)))
    tools = ScriptedTools(lambda action, t: ToolResult("Code", (good, b"broken", good)))
    t = only(collect(once, tools, max_images=2))
    assert len(t.images) == 2 and all(chat.bound(i) is i for i in t.images)
    assert len(collect.engine.requests[1].images) == 2
    shown = chat.decode(t.token_ids)
    assert "image 2: not a readable image" in shown and "1 of 2 images are not shown" in shown
    vision = chat.vision(t.images)
    assert int(vision.grid_thw.prod(-1).sum()) // 4 == t.token_ids.count(chat.image_token_id)


def test_a_slow_tool_delays_no_other_trajectory(collect: Any) -> None:
    """The slow tool is released by the end of the last other trajectory: were anyone to wait for it, nothing would end."""
    released, ended = asyncio.Event(), []

    async def before(action: str) -> None:
        if "slow" in action:
            await released.wait()

    def script(prompt: str, request: GenerateRequest) -> str:
        if prompt.count(OBSERVATION) == 3:
            return ANSWER
        return CALL.replace("1 + 1", "slow") if "What is slow?" in prompt else CALL

    def on_finished(t: Trajectory) -> None:
        ended.append(t.task.id)
        if len(ended) == 5:
            released.set()

    tasks = [task(name) for name in ("b", "slow", "c", "d", "e", "f")]
    groups = collect(script, ScriptedTools(before=before), tasks, on_finished=on_finished)
    assert ended[-1] == "slow" and sorted(ended[:-1]) == ["b", "c", "d", "e", "f"]
    assert [g[0].task.id for g in groups] == [t.id for t in tasks]
    assert all(g[0].end is EndReason.ANSWERED for g in groups)


def test_on_finished_runs_on_the_background_loop(collect: Any, background: BackgroundLoop) -> None:
    seen: list[bool] = []

    def on_finished(t: Trajectory) -> None:
        seen.append(asyncio.get_running_loop() is background.loop)
    collect(once, tasks=[task(), task("b")], group_size=3, on_finished=on_finished)
    assert seen == [True] * 6


def test_deterministic_mode_gives_the_same_batches_and_trajectories_however_long_tools_take(collect: Any) -> None:
    def script(prompt: str, request: GenerateRequest) -> str:
        calls = prompt.count(OBSERVATION)
        return ANSWER if request.seed % 3 == 0 or calls == 4 else CALL.replace("1 + 1", str(request.seed))

    def run(seed: int) -> tuple[Any, Any]:
        groups = collect(script, ScriptedTools(before=delays(seed)), [task(n) for n in "abcd"], group_size=3, deterministic=True)
        return [[(t.token_ids, t.mask, t.log_probs, t.end) for t in g] for g in groups], collect.engine.batches

    first = run(1)
    assert len(first[1]) > 10
    for seed in (2, 3):
        assert run(seed) == first


def test_seeds_differ_by_everything_and_repeat_exactly() -> None:
    seeds = {sampling_seed(s, step, prompt, sample, turn)
             for s in (1, 2) for step in (0, 1) for prompt in (0, 1) for sample in (0, 1) for turn in (0, 1)}
    assert len(seeds) == 32 and all(0 <= s < 2**31 for s in seeds)
    assert sampling_seed(1, 2, 7, 3, 4) == 990_049_318


def test_the_same_task_twice_in_a_step_is_rolled_out_with_different_seeds(collect: Any) -> None:
    """A row repeated in a small data set, or rows of two files that bear the same name."""
    collect(once, tasks=[task(), task(), task()], group_size=4, first_index=5)
    assert len({request.seed for request in collect.engine.requests}) == len(collect.engine.requests) == 3 * 4 * 2


def test_the_groups_rollouts_share_one_decoded_prompt(collect: Any) -> None:
    groups = collect(lambda p, r: ANSWER, group_size=4)
    assert len({id(t.images[0]) for t in groups[0]}) == 1
    assert [t.sample_index for t in groups[0]] == [0, 1, 2, 3]


def test_every_trajectory_is_finished_on_the_tool_server_once_under_its_own_name(collect: Any) -> None:
    tools = ScriptedTools()
    collect(once, tools, [task(), task("b")], group_size=2)
    assert sorted(tools.finished) == sorted(set(tools.started)) and len(tools.finished) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_in_the_pump_aborts_requests_closes_trajectories_and_is_raised(
        collect: Any, background: BackgroundLoop, error: type[BaseException]) -> None:
    tools = ScriptedTools()

    def prepare(rollouts: Rollouts, engine: ScriptedEngine) -> None:
        def interrupt() -> None:
            if len(engine.batches) == 4:
                raise error
        engine.on_step = interrupt
    with pytest.raises(error):
        collect(once, tools, [task(), task("b")], group_size=2, prepare=prepare)
    assert collect.engine.num_unfinished() == 0 and collect.engine.aborted
    assert len(tools.finished) == 4

    async def left() -> int:
        return len(asyncio.all_tasks()) - 1
    assert background.run(left()) == 0


def test_a_stop_event_ends_every_trajectory_aborted_and_the_engine_empty(collect: Any) -> None:
    stop = threading.Event()

    async def hang(action: str) -> None:
        stop.set()
        await asyncio.Event().wait()

    def prepare(rollouts: Rollouts, engine: ScriptedEngine) -> None:
        rollouts.stop = stop
    groups = collect(once, ScriptedTools(before=hang), [task(), task("b")], group_size=2, prepare=prepare)
    assert {t.end for g in groups for t in g} == {EndReason.ABORTED}
    assert {t.error for g in groups for t in g} == {"the run was stopped"}


def test_a_failing_callback_is_raised_and_leaves_nothing_behind(collect: Any) -> None:
    def on_finished(t: Trajectory) -> None:
        raise ZeroDivisionError("bug in the scorer")
    with pytest.raises(ZeroDivisionError, match="bug in the scorer"):
        collect(once, tasks=[task(), task("b")], group_size=4, on_finished=on_finished)
    assert collect.engine.num_unfinished() == 0


def test_stale_weights_are_noticed(collect: Any) -> None:
    def prepare(rollouts: Rollouts, engine: ScriptedEngine) -> None:
        engine.version = 4
    with pytest.raises(RuntimeError, match="weights 4, expected 0"):
        collect(once, prepare=prepare)


def test_metrics_describe_the_collection(chat: ChatFormat, background: BackgroundLoop) -> None:
    async def before(action: str) -> None:
        await asyncio.sleep(0.05)
    engine = ScriptedEngine(chat, once)
    rollouts = Rollouts(engine, chat, ScriptedTools(before=before), background, RolloutConfig(), ToolsConfig(), 4096)
    rollouts.collect([task(), task("b")], group_size=2, temperature=0.0, step=0, weight_version=0)
    assert rollouts.metrics["rollout/engine_steps"] == len(engine.batches)
    assert rollouts.metrics["rollout/tool_seconds"] >= 4 * 0.05
    assert 0.02 < rollouts.metrics["rollout/idle_seconds"] < rollouts.metrics["rollout/seconds"]
    assert rollouts.metrics["rollout/loop_lag_max_seconds"] >= rollouts.metrics["rollout/loop_lag_p99_seconds"] >= 0
    assert rollouts.collect([], group_size=2, temperature=0.0, step=0, weight_version=0) == []
    rollouts.close()


def test_a_request_that_the_engine_refuses_ends_its_trajectory_alone_and_is_not_the_policys(collect: Any) -> None:
    def prepare(rollouts: Rollouts, engine: ScriptedEngine) -> None:
        add = engine.add_request

        def refusing(request_id: str, request: GenerateRequest) -> None:
            if len(engine.requests) == 2:
                engine.requests.append(request)
                raise RequestRefused("At most 4 image(s)\nmay be provided", request_id)
            add(request_id, request)
        engine.add_request = refusing
    oddities.take()
    groups = collect(lambda p, r: ANSWER, tasks=[task("a"), task("b")], group_size=2, prepare=prepare)
    ends = [t.end for group in groups for t in group]
    assert Counter(ends) == {EndReason.ANSWERED: 3, EndReason.INFRASTRUCTURE: 1}
    (refused,) = [t for group in groups for t in group if t.end is EndReason.INFRASTRUCTURE]
    assert refused.error == "the engine refused the request: At most 4 image(s) may be provided"
    assert oddities.take() == {"odd/prompt/refused": 1.0}


def test_a_prompt_that_cannot_be_shown_ends_its_rollouts_alone(collect: Any) -> None:
    broken = replace(task("broken"), images=(b"no picture",))
    groups = collect(lambda p, r: ANSWER, tasks=[broken, task("b")], group_size=2)
    assert [[t.end for t in group] for group in groups] == [[EndReason.INFRASTRUCTURE] * 2, [EndReason.ANSWERED] * 2]
    assert "image 0 of task broken" in groups[0][0].error


def test_an_engine_that_drops_a_request_aborts_only_that_trajectory(chat: ChatFormat, collect: Any) -> None:
    def prepare(rollouts: Rollouts, engine: ScriptedEngine) -> None:
        original = engine._completion

        def dropping(row: Any) -> Any:
            completion = original(row)
            if len(engine.batches) > 3:
                return completion
            return type(completion)([], [], StopReason.ABORTED, 0)
        engine._completion = dropping
    t = only(collect(lambda p, r: ANSWER, prepare=prepare))
    assert t.end is EndReason.ABORTED and "dropped" in t.error


def tokens(groups: list[tuple[Trajectory, ...]]) -> dict[tuple[int, int], Any]:
    return {(t.index, t.sample_index): (t.task.id, t.token_ids, t.mask, t.log_probs, t.end) for g in groups for t in g}


def by_seed(prompt: str, request: GenerateRequest) -> str:
    """What a rollout does is a function of its seed alone: up to three calls, then an answer."""
    calls = prompt.count(OBSERVATION)
    return ANSWER if request.seed % 3 == 0 or calls == 3 else CALL.replace("1 + 1", str(request.seed))


def test_rollouts_that_are_known_are_taken_as_they_are_and_scored(collect: Any) -> None:
    tasks = [task(n) for n in "abc"]
    whole = collect(by_seed, tasks=tasks, group_size=4, first_index=10)
    known = {(t.index, t.sample_index): t for g in whole for t in g if (t.index + t.sample_index) % 3 or t.index == 11}
    finished: list[Trajectory] = []
    tools = ScriptedTools()
    again = collect(by_seed, tools, tasks, group_size=4, first_index=10, known=known, on_finished=finished.append)
    assert tokens(again) == tokens(whole)
    assert all(again[i][j] is known[10 + i, j] for i in range(3) for j in range(4) if (10 + i, j) in known)
    assert {(t.index, t.sample_index) for t in finished} == set(tokens(whole)) and len(finished) == 12
    started = {(t.index, t.sample_index) for g in again for t in g} - set(known)
    assert {tuple(map(int, name.split("-")[-2:])) for name in tools.finished} == started
    assert collect(by_seed, tasks=tasks, group_size=4, first_index=10, known=tokens_of(whole)) == whole
    assert collect.engine.batches == [], "nothing left to sample"


def tokens_of(groups: list[tuple[Trajectory, ...]]) -> dict[tuple[int, int], Trajectory]:
    return {(t.index, t.sample_index): t for g in groups for t in g}


def test_a_known_rollout_of_another_task_is_not_taken(collect: Any) -> None:
    whole = collect(once, tasks=[task("a"), task("b")])
    again = collect(once, tasks=[task("a"), task("c")], known=tokens_of(whole))
    assert again[0][0] is whole[0][0] and again[1][0].task.id == "c"
