"""Steps with rollout.carry_over on the real collector, spool and rollouts: every prompt once, killed at any time, any ranks."""
from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import ScriptedEngine, ScriptedTools

from hdpo.agent.carry import Held, without_old
from hdpo.agent.chat import ChatFormat
from hdpo.agent.rollout import Rollouts
from hdpo.background import BackgroundLoop
from hdpo.config import Config, HdpoConfig
from hdpo.ranks.world import World
from hdpo.state.records import Records
from hdpo.state.spool import Spool
from hdpo.train.carry import Carrying, Lengths
from hdpo.train.collect import Collector
from hdpo.train.metrics import Metrics
from hdpo.train.rl import open_collector
from hdpo.train.samples import group_advantages
from hdpo.types import EndReason, Judgement, Reward, RewardedGroup, Task, Trajectory, Verdict

STEPS, PROMPTS, GROUP = 6, 4, 2


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hdpo.agent.rollout.POLL_S", 0.0005)


class Stream:
    """An endless sequence of tasks that can be gone back in."""

    position = 0

    def take(self, count: int) -> list[Task]:
        numbers = range(self.position, self.position + count)
        self.position += count
        return [Task(f"t{n}", "toy", [{"role": "user", "content": f"What is {n}?"}], (), "4") for n in numbers]

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Scorer:
    def score(self, groups: Any, step: int | None = None) -> list[RewardedGroup]:
        return [RewardedGroup(g[0].task, g, (Judgement(Verdict.CORRECT, "rule"),) * len(g),
                              tuple(Reward(1.0, 0.5, True, True, t.end.scorable) for t in g), g[0].index) for g in groups]

    def stats(self) -> dict[str, float]:
        return {}


def config(tmp_path: Path, **rollout: Any) -> Config:
    return Config.model_validate({
        "run": {"folder": str(tmp_path), "name": "r"}, "optim": {"steps": STEPS, "mini_batch_prompts": PROMPTS},
        "rollout": {"prompts_per_step": PROMPTS, "group_size": GROUP, "carry_over": 0.5, "max_turn_tokens": 2000, **rollout}})


class Life:
    """One process of a run (or a rank of it): from its parts to its end."""

    def __init__(self, c: Config, chat: ChatFormat, background: BackgroundLoop, world: World | None = None,
                 kind: type[Collector] = Carrying) -> None:
        def script(prompt: str, request: Any) -> str:
            number = int(prompt.split("What is ")[1].split("?")[0])
            begun = chat.decode(request.token_ids[len(request.token_ids) - request.begun:]) if request.begun else ""
            return ("<reason>" + f"{number} " * (2 + 37 * number % 60) + "</reason>\n<answer>4</answer>")[len(begun):]
        self.world = world or World()
        self.engine = ScriptedEngine(chat, script, tokens_per_step=8)
        self.engine.on_step = lambda: background.run(asyncio.sleep(0.002))     # the loop has looked before the next tokens come
        self.rollouts = Rollouts(self.engine, chat, ScriptedTools(), background, c.rollout, c.model_copy().tools, 4096, seed=3,
                                 deterministic=c.run.deterministic)
        self.stream, self.log, self.spool = Stream(), Metrics(), Spool(c, self.world, {})
        self.finished: list[tuple[int, int]] = []
        self.collect: Any = kind(c, self.rollouts, Scorer(), self.stream, self.world, self.log, self.ended,   # type: ignore
                                 self.spool.cut)

    def ended(self, trajectory: Trajectory) -> None:
        self.spool.add(trajectory)
        self.finished.append((trajectory.index, trajectory.sample_index))

    def step(self, step: int) -> list[RewardedGroup]:
        self.engine.version = step
        found = self.collect(step, self.spool.begin(step))
        assert found is not None
        return found[1].groups

    def save(self, folder: Path) -> dict[str, Any]:
        (folder / "trainer").mkdir(parents=True, exist_ok=True)
        self.collect.snapshot(folder)()
        return self.collect.position()

    def restore(self, folder: Path, position: dict[str, Any]) -> None:
        self.stream.restore(position)
        self.collect.restore(folder / "trainer", position)


def names(groups: list[RewardedGroup]) -> list[int]:
    assert all(int(group.task.id[1:]) == group.index for group in groups), "a prompt's number goes with its row"
    assert all(t.sample_index == n for group in groups for n, t in enumerate(group.trajectories))
    return [group.index for group in groups]


def test_every_prompt_is_trained_once_and_no_token_is_older_than_the_limit(
        tmp_path: Path, chat: ChatFormat, background: BackgroundLoop) -> None:
    life = Life(config(tmp_path), chat, background)
    trained, scalars = [], []
    for step in range(STEPS):
        groups = life.step(step)
        assert len(groups) == PROMPTS
        trained += names(groups)
        for group in groups:
            assert all(step - t.oldest_version <= 1 for t in group.trajectories)
        scalars.append(life.log.reduce_over_ranks())
    assert sorted(trained) == list(range(STEPS * PROMPTS)) == list(range(life.stream.position))
    assert len(life.finished) == len(set(life.finished)) == STEPS * PROMPTS * GROUP
    assert [row["carry/dropped"] for row in scalars] == [0] * STEPS
    assert all(row["carry/groups_waiting"] <= 2 for row in scalars) and scalars[-1]["carry/groups_waiting"] == 0
    assert any(row["carry/share"] > 0 for row in scalars[1:]) and max(row["carry/age_max"] for row in scalars) == 1
    assert scalars[-1]["carry/length_bias"] == pytest.approx(0)


def test_without_carry_over_the_collector_is_the_plain_one_and_one_that_could_carry_trains_the_same_to_the_last_bit(
        tmp_path: Path, chat: ChatFormat, background: BackgroundLoop) -> None:
    c = config(tmp_path, carry_over=0.0)
    c = Config.model_validate(c.model_dump() | {"run": {**c.run.model_dump(), "deterministic": True}})
    plain, able = Life(c, chat, background, kind=Collector), Life(c, chat, background)
    for step in range(STEPS):
        found = []
        for life in (plain, able):
            life.engine.version = step
            everything, trained = life.collect(step, None)
            assert everything.groups == trained.groups
            found.append(([(g.task.id, g.rewards, [(t.token_ids, t.mask, t.log_probs, t.versions, t.turns, t.end)
                                                   for t in g.trajectories]) for g in trained.groups],
                          trained.advantages, trained.members, life.stream.position))
        assert found[0] == found[1] and len(found[0][0]) == PROMPTS
    assert plain.engine.batches and [len(b) for b in plain.engine.batches] == [len(b) for b in able.engine.batches]
    first = [request.seed for request in plain.engine.requests[:PROMPTS * GROUP]]
    assert first == [request.seed for request in able.engine.requests[:PROMPTS * GROUP]]

    class Parts:
        rollouts = scorer = tasks = log = ended = None
        policy = checkpoints = spool = SimpleNamespace(world=None, cut=None, start=None)
    for carry_over, position, kind in ((0.0, None, Collector), (0.0, {"position": 3}, Collector), (0.5, None, Carrying),
                                       (0.0, {"position": 3, "started": 4}, Carrying)):
        assert type(open_collector(config(tmp_path, carry_over=carry_over), Parts, position)) is kind   # type: ignore[arg-type]


def tokens(groups: list[RewardedGroup]) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    return {(t.index, t.sample_index): (t.token_ids, t.versions) for group in groups for t in group.trajectories}


def after_a_step(c: Config, chat: ChatFormat, background: BackgroundLoop) -> tuple[Life, Path, dict[str, Any]]:
    """A run that has saved after its first step, its checkpoint, and where the data stood."""
    life, folder = Life(c, chat, background), Path(c.run.folder) / "checkpoint"
    life.step(0)
    return life, folder, life.save(folder)


def test_a_killed_run_goes_on_with_what_was_carried_and_repeats_whole_steps_without_sampling(
        tmp_path: Path, chat: ChatFormat, background: BackgroundLoop) -> None:
    c = config(tmp_path)
    first, checkpoint, position = after_a_step(c, chat, background)
    waiting = sorted((h.index, s) for h in first.collect._held.values() for s in (*h.done, *h.going))
    assert waiting, "something is carried, or the test shows nothing"
    lived = [tokens(first.step(step)) for step in (1, 2)]
    first.spool.begin(3)        # killed in step 3, before anything ended; its files are on the disk

    again = Life(c, chat, background)
    again.restore(checkpoint, position)
    assert sorted((h.index, s) for h in again.collect._held.values() for s in (*h.done, *h.going)) == waiting
    repeated = [tokens(again.step(step)) for step in (1, 2)]
    assert repeated == lived and not again.engine.batches, "both steps came from the spool"
    assert again.collect.position() == first.collect.position() | {"position": again.stream.position}
    rest = [names(again.step(step)) for step in range(3, STEPS)]
    trained = [index for part in lived for index, sample in part if not sample] + [index for part in rest for index in part]
    assert len(set(trained)) == len(trained) == (STEPS - 1) * PROMPTS
    assert again.stream.position == STEPS * PROMPTS


def test_a_run_killed_within_a_step_samples_no_finished_rollout_again(
        tmp_path: Path, chat: ChatFormat, background: BackgroundLoop) -> None:
    c = config(tmp_path)
    first, checkpoint, position = after_a_step(c, chat, background)
    first.spool.cut = lambda *_: None                       # type: ignore[method-assign]
    first.collect._on_cut = lambda *_: None                 # killed before the step's end was written
    before = len(first.finished)
    first.step(1)
    first.spool.begin(2)
    ended = first.finished[before:]
    again = Life(c, chat, background)
    again.restore(checkpoint, position)
    known = again.spool.begin(1)
    assert isinstance(known, Records) and sorted(known) == sorted(ended) and known.claimed is None
    names(again.step(1))
    sampled_twice = {key for key in ended if key not in again.finished}
    assert not sampled_twice, "they are taken as they are, and said once"


class Ranks(World):
    """Ranks in threads of one process."""

    box: list[Any] = []

    def __init__(self, rank: int, size: int, shared: dict[str, Any]) -> None:
        super().__init__()
        self.rank, self.size, self._shared = rank, size, shared

    def queue(self) -> Any:
        self._queues += 1
        name = self._queues

        def claim(count: int = 1) -> int:
            with self._shared["lock"]:
                taken = self._shared.setdefault(name, 0)
                self._shared[name] = taken + count
                return taken
        return claim

    def gather(self, value: Any) -> list[Any]:
        self._shared["box"][self.rank] = value
        self._shared["barrier"].wait()
        found = list(self._shared["box"])
        self._shared["barrier"].wait()
        return found

    def sum(self, values: list[float]) -> list[float]:
        return [sum(column) for column in zip(*self.gather(values))]

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))

    def barrier(self) -> None:
        self._shared["barrier"].wait()


@pytest.fixture
def loops() -> Iterator[list[BackgroundLoop]]:
    found = [BackgroundLoop() for _ in range(3)]
    yield found
    for loop in found:
        loop.close()


def on_ranks(size: int, c: Config, chat: ChatFormat, loops: list[BackgroundLoop], steps: range, start: Any, save: Path | None,
             ) -> tuple[list[list[int]], dict[str, Any]]:
    """(prompts trained in each step over all ranks, the position afterwards)."""
    shared: dict[str, Any] = {"lock": threading.Lock(), "barrier": threading.Barrier(size, timeout=60), "box": [None] * size}
    trained: list[list[int]] = [[] for _ in steps]
    positions: list[Any] = [None] * size

    def main(rank: int) -> None:
        life = Life(c, chat, loops[rank], Ranks(rank, size, shared))
        if start is not None:
            life.restore(*start)
        for number, step in enumerate(steps):
            trained[number] += names(life.step(step))
        positions[rank] = life.save(save) if save else life.collect.position()
    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(position == positions[0] for position in positions)
    return trained, positions[0]


def test_ranks_end_a_step_together_and_any_number_of_them_go_on_with_what_was_carried(
        tmp_path: Path, chat: ChatFormat, loops: list[BackgroundLoop]) -> None:
    c = config(tmp_path)
    first, position = on_ranks(2, c, chat, loops, range(3), None, tmp_path / "checkpoint")
    assert len(list((tmp_path / "checkpoint" / "trainer").glob("carried_*.spool"))) == 2
    rest, _ = on_ranks(3, c, chat, loops, range(3, STEPS), (tmp_path / "checkpoint", position), None)
    assert all(len(step) == PROMPTS for step in first + rest)
    assert sorted(itertools.chain(*first, *rest)) == list(range(STEPS * PROMPTS))


def test_length_bias_compares_the_trained_with_all_that_were_started() -> None:
    assert Lengths(300, 3, 0, 0).bias(300, 1) == pytest.approx(100 / 150 - 1)
    assert Lengths(300, 3, 300, 1).bias(0, 0) == pytest.approx(100 / 150 - 1)
    assert Lengths().bias(0, 0) == 0.0


def test_what_is_dropped_by_age_touches_neither_advantages_nor_norms_of_others() -> None:
    """The group with a trajectory dropped trains what the group without it would."""
    row = Task("t", "toy", [{"role": "user", "content": "?"}], (), "4")
    group = [Trajectory(row, sample, [1] * (4 + sample), [0] + [1] * (3 + sample), [-0.5] * (4 + sample), 1, (), (),
                        EndReason.ANSWERED, ("x",), versions=[-1] + [3 + (sample != 2)] * (3 + sample)) for sample in range(4)]
    held = without_old(Held(0, row, dict(enumerate(group)), {}), step=5, max_versions=2)
    kept, hdpo = [0, 1, 3], HdpoConfig()

    def rewarded(trajectories: Sequence[Trajectory]) -> RewardedGroup:
        rewards = tuple(Reward(t.sample_index / 4, 1 / (1 + t.sample_index), True, True, t.end.scorable) for t in trajectories)
        return RewardedGroup(row, tuple(trajectories), (Judgement(Verdict.CORRECT, "rule"),) * len(rewards), rewards, 0)

    def trained(whole: RewardedGroup) -> dict[int, tuple[Any, ...]]:
        values, members = group_advantages([whole], hdpo)
        return {t.sample_index: (tuple(v), tuple(m), t.num_sampled if any(m) else 0)
                for t, v, m in zip(whole.trajectories, values, members, strict=True)}
    found, without = trained(rewarded(held.trajectories())), trained(rewarded([group[sample] for sample in kept]))
    assert {sample: found[sample] for sample in kept} == without
    assert found[2] == ((0.0, 0.0), (False, False), 0), "it counts in no norm"
