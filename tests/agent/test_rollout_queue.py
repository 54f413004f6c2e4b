"""Many prompts: how many trajectories live at once, which rank gets which prompt, what dynamic sampling keeps."""
from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launching import ROOT
from scripted import ScriptedEngine, ScriptedTools, delays
from test_rollout import ANSWER, CALL, OBSERVATION, by_seed, task, tokens

from hdpo.agent.chat import ChatFormat
from hdpo.agent.queue import PromptQueue, static_queue
from hdpo.agent.rollout import Rollouts
from hdpo.background import BackgroundLoop
from hdpo.config import Config, HdpoConfig, RolloutConfig, ToolsConfig
from hdpo.packing.batching import PackingSpec, make_train_batch
from hdpo.ranks.world import World
from hdpo.reward.audit import AuditLog
from hdpo.reward.scoring import Scorer
from hdpo.state.dump import read_rollouts
from hdpo.train.collect import Collector, score_groups, signal_of
from hdpo.train.metrics import Metrics
from hdpo.train.runlog import RunLog
from hdpo.train.samples import PixelPool, group_advantages, to_samples
from hdpo.types import EndReason, Judgement, Reward, RewardedGroup, Sample, Task, Trajectory, Verdict


class Counting(ScriptedTools):
    """Notes how many trajectories are between their first call and their end."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.live: set[str] = set()
        self.most = 0

    async def call(self, trajectory_id: str, action: str, task: Task) -> Any:
        self.live.add(trajectory_id)
        self.most = max(self.most, len(self.live))
        return await super().call(trajectory_id, action, task)

    async def finish(self, trajectory_id: str) -> None:
        self.live.discard(trajectory_id)
        await super().finish(trajectory_id)


def rollouts_of(chat: ChatFormat, background: BackgroundLoop, tools: Any = None, script: Any = by_seed, *,
                deterministic: bool = False, **config: Any) -> Rollouts:
    engine = ScriptedEngine(chat, script, max_num_seqs=config.get("max_num_seqs", 256))
    return Rollouts(engine, chat, tools or ScriptedTools(), background, RolloutConfig(**config), ToolsConfig(), 4096, seed=3,
                    deterministic=deterministic)


def on_ranks(size: int, main: Callable[[int], object]) -> None:
    """Every rank in a thread of its own, until all have ended."""
    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


def collect(rollouts: Rollouts, tasks: list[Task], group_size: int = 4, **how: Any) -> list[tuple[Trajectory, ...]]:
    return rollouts.collect(tasks, group_size=group_size, temperature=1.0, step=5, weight_version=0, **how)


def test_live_trajectories_are_bounded_and_prompts_are_decoded_when_they_are_due(
        chat: ChatFormat, background: BackgroundLoop) -> None:
    tools = Counting()
    rollouts = rollouts_of(chat, background, tools, lambda p, r: ANSWER if OBSERVATION in p else CALL, max_num_seqs=4)
    decoded: list[str] = []
    original = rollouts._player.prompt

    async def prompt(task: Task) -> Any:
        decoded.append(f"{task.id}@{len(tools.finished)}")
        return await original(task)
    rollouts._player.prompt = prompt   # type: ignore[method-assign]
    groups = collect(rollouts, [task(n) for n in "abcdefgh"])
    assert len(groups) == 8 and 4 <= tools.most <= 6, "1.5 x max_num_seqs"
    assert decoded[:2] == ["a@0", "b@0"] and int(decoded[-1].split("@")[1]) >= 4 * 7 - 6
    rollouts.close()


def test_a_group_larger_than_the_bound_is_rolled_out_all_the_same(chat: ChatFormat, background: BackgroundLoop) -> None:
    rollouts = rollouts_of(chat, background, max_num_seqs=2)
    (group,) = collect(rollouts, [task()], group_size=16)
    assert [t.sample_index for t in group] == list(range(16))


def test_ranks_that_share_a_queue_take_each_prompt_once_and_the_fast_one_takes_more(
        chat: ChatFormat, background: BackgroundLoop) -> None:
    """Rank 1's tools answer only when rank 0 has nothing left to do: without sharing, rank 0 would end with half the work."""
    tasks = [task(f"{n}") for n in range(16)]
    counter, gate, other = itertools.count(), asyncio.Event(), BackgroundLoop()
    results: list[Any] = [None, None]

    async def wait(action: str) -> None:
        await gate.wait()

    def rank_main(rank: int) -> None:
        loop, tools = (background, ScriptedTools()) if rank == 0 else (other, ScriptedTools(before=wait))
        rollouts = rollouts_of(chat, loop, tools, lambda p, r: ANSWER if OBSERVATION in p else CALL)
        results[rank] = collect(rollouts, tasks, 2, queue=PromptQueue(counter.__next__, 2))
        if rank == 0:
            other.loop.call_soon_threadsafe(gate.set)
        rollouts.close()
    on_ranks(2, rank_main)
    other.close()
    counts = [len(groups) for groups in results]
    assert sorted(g[0].index for groups in results for g in groups) == list(range(16))
    assert counts[1] == 6, "three quarters of its even share, and not one more"
    assert all(t.task.id == str(t.index) for groups in results for g in groups for t in g)


def test_what_a_rollout_becomes_does_not_depend_on_the_rank_that_makes_it(
        chat: ChatFormat, background: BackgroundLoop) -> None:
    tasks = [task(n) for n in "abcdef"]
    alone = tokens(collect(rollouts_of(chat, background), tasks))
    parts = [tokens(collect(rollouts_of(chat, background), tasks, queue=static_queue(rank, 3))) for rank in range(3)]
    assert [sorted({index for index, _ in part}) for part in parts] == [[0, 3], [1, 4], [2, 5]]
    assert {key: value for part in parts for key, value in part.items()} == alone


def test_deterministic_mode_repeats_every_batch_with_a_bounded_number_live(
        chat: ChatFormat, background: BackgroundLoop) -> None:
    def run(seed: int) -> tuple[Any, Any]:
        rollouts = rollouts_of(chat, background, ScriptedTools(before=delays(seed)), deterministic=True, max_num_seqs=4)
        found = tokens(collect(rollouts, [task(n) for n in "abcdef"], 3))
        return found, rollouts._engine.batches   # type: ignore[attr-defined]
    first = run(1)
    assert max(map(len, first[1])) <= 4 and len(first[1]) > 20
    for seed in (2, 3):
        assert run(seed) == first


def test_a_stop_starts_nothing_more_and_leaves_unfinished_groups_out(chat: ChatFormat, background: BackgroundLoop) -> None:
    stop, ended = threading.Event(), []

    async def before(action: str) -> None:
        stop.set()
        await asyncio.Event().wait()
    tools = ScriptedTools(before=before)
    rollouts = rollouts_of(chat, background, tools, lambda p, r: CALL, max_num_seqs=4)
    rollouts.stop = stop
    groups = collect(rollouts, [task(n) for n in "abcd"], on_finished=ended.append)
    assert [g[0].index for g in groups] == [0], "six of sixteen were live: one whole group, cut short"
    assert {t.end for g in groups for t in g} == {EndReason.ABORTED} and ended == []
    assert len(tools.finished) == 6


# -- dynamic sampling ----------------------------------------------------------------------------------------------


class FakeRollouts:
    """Groups whose rewards are written in the task's ground truth; stands in for engine and tools, not for the subject."""

    def __init__(self) -> None:
        self.stop = None
        self.taken: list[list[str]] = []
        self.metrics = Counter({"rollout/seconds": 0.1, "rollout/prompt_tokens": 1.0})

    def collect(self, tasks: Any, *, queue: PromptQueue, first_index: int, group_size: int, **_: Any) -> Any:
        self.taken.append([task.id for task in tasks])
        mine = itertools.takewhile(lambda number: number < len(tasks), iter(queue.claim, None))
        return [tuple(trajectory(tasks[n], sample, first_index + n) for sample in range(group_size)) for n in mine]

    def score(self, groups: Any, step: int | None = None) -> list[RewardedGroup]:
        return [rewarded(group) for group in groups]

    def stats(self) -> dict[str, float]:
        return {}


class Stream:
    """Tasks whose rollouts turn out as `kinds` says, over and over."""

    def __init__(self, kinds: str) -> None:
        self.kinds, self.position = kinds, 0

    def take(self, count: int) -> list[Task]:
        numbers = range(self.position, self.position + count)
        self.position += count
        return [Task(f"{n}{self.kinds[n % len(self.kinds)]}", "toy", [{"role": "user", "content": "?"}], (), "4")
                for n in numbers]


def trajectory(task: Task, sample: int, index: int, end: EndReason = EndReason.ANSWERED) -> Trajectory:
    return Trajectory(task, sample, [1, 2, 3], [0, 1, 1], [0.0, -1.0, -1.0], 1, (), (), end, ("x",), index=index)


def rewarded(group: tuple[Trajectory, ...]) -> RewardedGroup:
    """By the letter of the task: m mixed accuracy, t all right with unequal tool calls, s all right and the same, w all
    wrong, u unscored."""
    kind, size = group[0].task.id[-1], len(group)
    right = [sample < size // 2 if kind == "m" else kind in "ts" for sample in range(size)]
    tool = [(0.5 if kind == "t" and sample else 1.0) if r else 0.0 for sample, r in enumerate(right)]
    rewards = tuple(Reward(float(r), tl, r, True, kind != "u") for r, tl in zip(right, tool))
    return RewardedGroup(group[0].task, group, (Judgement(Verdict.CORRECT, "rule"),) * size, rewards, group[0].index)


def collector(kinds: str, rounds: int, prompts: int = 6, **hdpo: Any) -> tuple[Any, Any, Any]:
    config = Config.model_validate({
        "rollout": {"prompts_per_step": prompts, "group_size": 4, "dynamic_sampling": rounds}, "hdpo": hdpo,
        "optim": {"mini_batch_prompts": prompts}})
    fake, stream, log = FakeRollouts(), Stream(kinds), Metrics()
    return Collector(config, fake, fake, stream, World(), log, lambda t: None), fake, (stream, log)   # type: ignore[arg-type]


def test_dynamic_sampling_replaces_groups_without_signal_until_there_are_enough() -> None:
    collect, fake, (stream, log) = collector("mswt", rounds=5)
    everything, trained = collect(0)
    assert [group.task.id[-1] for group in trained.groups] == ["m", "t", "m", "t", "m", "t"]
    assert [len(ids) for ids in fake.taken] == [6, 3, 1, 1, 1] and stream.position == len(everything.groups) == 12
    assert len({group.index for group in everything.groups}) == 12 and len(trained.advantages) == 6 * 4
    scalars = log.reduce_over_ranks()
    assert (scalars["rollout/groups_with_signal"], scalars["rollout/groups_dropped"], scalars["rollout/refills"]) == (6, 6, 4)


def test_an_all_correct_group_with_unequal_calls_is_kept_for_its_tool_channel_if_that_has_weight() -> None:
    groups = [rewarded(tuple(trajectory(t, s, n) for s in range(4))) for n, t in enumerate(Stream("mtswu").take(5))]
    assert signal_of(score_groups(groups, HdpoConfig()), HdpoConfig()) == [True, True, False, False, False]
    assert signal_of(score_groups(groups, HdpoConfig(w_tool=0.0)), HdpoConfig(w_tool=0.0)) == [True, False, False, False, False]


def test_when_the_rounds_are_used_up_the_first_groups_without_signal_fill_the_places() -> None:
    collect, fake, (stream, log) = collector("smwwww", rounds=2)
    everything, trained = collect(0)
    assert [len(ids) for ids in fake.taken] == [6, 5, 4] and stream.position == 15
    assert [group.task.id for group in trained.groups] == ["0s", "1m", "2w", "3w", "7m", "13m"]
    assert log.reduce_over_ranks()["rollout/groups_with_signal"] == 3


def test_without_dynamic_sampling_every_group_is_trained_and_nothing_more_is_taken() -> None:
    collect, fake, (stream, _) = collector("sw", rounds=0)
    everything, trained = collect(0)
    assert everything is trained and len(trained.groups) == stream.position == 6


def test_ranks_agree_on_what_is_taken_and_trained_even_if_one_of_them_gets_no_prompt() -> None:
    """Three ranks in threads; rank 2 always claims last and gets nothing, yet takes part in every collective."""
    size = 3
    box: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=30)
    shared, lock, first_two = itertools.count(), threading.Lock(), threading.Barrier(size, timeout=30)

    class Ranks(World):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.rank, self.size = rank, size

        def queue(self) -> Any:
            numbers = shared if self.rank < 2 else itertools.repeat(10**6)

            def claim() -> int:
                with lock:
                    return next(numbers)
            return claim

        def gather(self, value: Any) -> list[Any]:
            box[self.rank] = value
            barrier.wait()
            values = list(box)
            barrier.wait()
            return values

        def sum(self, values: list[float]) -> list[float]:
            return [sum(column) for column in zip(*self.gather(values), strict=True)]

        def max(self, values: list[float]) -> list[float]:
            return [max(column) for column in zip(*self.gather(values), strict=True)]

    results: list[Any] = [None] * size

    def rank_main(rank: int) -> None:
        collect, fake, (stream, _) = collector("msw", rounds=0)
        collect._world = Ranks(rank)
        first_two.wait()
        results[rank] = (*collect(0), stream.position)
    on_ranks(size, rank_main)
    assert [position for *_, position in results] == [6, 6, 6]
    assert results[2][0].groups == [] and results[2][0].advantages == []
    assert sorted(group.index for everything, *_ in results for group in everything.groups) == list(range(6))


def test_over_long_filtering_takes_rows_out_of_loss_and_norm_but_not_out_of_the_groups_statistics(
        chat: ChatFormat) -> None:
    one = Stream("m").take(1)[0]
    trajectories = tuple(trajectory(one, s, 0, EndReason.MAX_TOKENS if s == 3 else EndReason.ANSWERED) for s in range(4))
    group = rewarded(trajectories)
    pool = PixelPool(chat)
    plain, masked = HdpoConfig(), HdpoConfig(mask_truncated=True)
    advantages, members = group_advantages([group], masked)
    assert (advantages, members) == group_advantages([group], plain)
    rows = {config.mask_truncated: to_samples([group], advantages, members, pool, config) for config in (plain, masked)}
    assert len(rows[False]) == 4 and rows[True] == rows[False][:3], "no row: no loss, and no token counted in a norm"
    only_cut = RewardedGroup(one, trajectories[2:], group.judgements[2:], group.rewards[1:3], 0)   # right and cut, wrong
    assert signal_of(score_groups([only_cut], plain), plain) == [True]
    all_cut = tuple(trajectory(one, s, 0, EndReason.MAX_TOKENS) for s in range(4))
    cut_group = RewardedGroup(one, all_cut, group.judgements, group.rewards, 0)
    assert signal_of(score_groups([cut_group], masked), masked) == [False], "nothing of it would be trained"


def test_a_rank_without_groups_scores_packs_and_logs_nothing_without_complaint(
        tmp_path: Path, background: BackgroundLoop) -> None:
    config = Config.model_validate({"run": {"folder": str(tmp_path)}})
    scorer = Scorer(config.reward, None, background, AuditLog(tmp_path / "audit"))
    assert scorer.score([], 1) == []
    scored = score_groups([], config.hdpo)
    spec = PackingSpec(image_token_id=None, merge_size=1, max_tokens=64, max_patches=64,
                       filler=Sample([1, 2], [0, 0], [0.0, 0.0], (), (), None))
    batch = make_train_batch([[], []], spec, World(), 2)
    assert [len(mini.micro_batches) for mini in batch.mini_batches] == [1, 1], "in step with the other ranks"
    log = RunLog(config, World(), [], [])
    scalars = log.write(1, None, scored.groups, scored.advantages)
    log.close()
    assert not any(name.startswith("reward/") for name in scalars)
    assert read_rollouts(tmp_path / "run" / "rollouts" / "step_000001.parquet") == []
    scorer.close()


# -- real ranks ----------------------------------------------------------------------------------------------------


def test_three_processes_claim_every_number_once_from_queues_they_open_in_the_same_order() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3",
               str(ROOT / "tests/support/ranks/claim_numbers.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if "RESULT " in line).split("RESULT ", 1)[1])
    for claimed in found:     # per queue, per rank
        assert sorted(itertools.chain(*claimed)) == list(range(50))
