"""Stages for a batch of records: many at once on the background loop, or one step of the engine."""
from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from hdpo.agent.queue import PromptQueue, static_queue
from hdpo.background import BackgroundLoop
from hdpo.config.curation import NecessitySettings
from hdpo.curation.record import Outcome, Record, Waits
from hdpo.curation.stages.necessity import applies, decide, no_tools_task
from hdpo.types import RewardedGroup, Task, Trajectory


class AsyncStage:
    """`one` for each record, `concurrency` at once."""

    def __init__(self, one: Callable[[Record], Awaitable[Outcome]], background: BackgroundLoop, concurrency: int) -> None:
        self._one, self._background, self._concurrency = one, background, concurrency

    def run(self, records: Sequence[Record]) -> list[Outcome | Waits]:
        return self._background.run(self._all(records))

    async def _all(self, records: Sequence[Record]) -> list[Outcome | Waits]:
        turnstile = asyncio.Semaphore(self._concurrency)

        async def guarded(record: Record) -> Outcome | Waits:
            async with turnstile:
                try:
                    return await self._one(record)
                except Waits as exc:
                    return exc
        return list(await asyncio.gather(*map(guarded, records)))


class Samples(Protocol):
    def collect(self, tasks: Sequence[Task], *, queue: PromptQueue, group_size: int, temperature: float, step: int,
                weight_version: int) -> list[tuple[Trajectory, ...]]: ...


class Scores(Protocol):
    def score(self, groups: Sequence[tuple[Trajectory, ...]]) -> list[RewardedGroup]: ...


class NecessityStage:
    """Rollouts of a whole chunk at once; a rank's engine works alone."""

    def __init__(self, rollouts: Samples, scorer: Scores, settings: NecessitySettings) -> None:
        self._rollouts, self._scorer, self._settings = rollouts, scorer, settings

    def run(self, records: Sequence[Record]) -> list[Outcome | Waits]:
        asked = [record for record in records if applies(record, self._settings)]
        groups: dict[int, RewardedGroup] = {}
        if asked:
            collected = self._rollouts.collect(
                [no_tools_task(record, self._settings) for record in asked], queue=static_queue(),
                group_size=self._settings.samples, temperature=self._settings.temperature, step=0, weight_version=0)
            groups = {group.index: group for group in self._scorer.score(collected)}
        found: list[Outcome | Waits] = []
        for record in records:
            if not applies(record, self._settings):
                found.append(Outcome(record))
                continue
            group = groups.get(next(i for i, other in enumerate(asked) if other is record))
            found.append(decide(record, group, self._settings) if group else Waits("its rollouts were cut short"))
        return found
