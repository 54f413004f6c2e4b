"""One place that tells a run's story: progress line, metrics.jsonl, TensorBoard, rollout dumps."""
from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from hdpo import gauges, oddities
from hdpo.config import Config
from hdpo.progress import Bar, progress, say
from hdpo.protocols import LogSink, ShownRollout
from hdpo.ranks.world import World
from hdpo.state.dump import RolloutDumps
from hdpo.state.trained import TrainedRow
from hdpo.train.metrics import Metrics, memory_scalars
from hdpo.train.objectives import gradient_scalars
from hdpo.train.rollout_metrics import rollout_rows, rollout_scalars, silence
from hdpo.train.seen import Seen
from hdpo.train.timeline import Spans, Timeline
from hdpo.types import RewardedGroup

log = logging.getLogger(__name__)

SHOWN_IMAGES, SHOWN_SIDE, SHOWN_CHARS = 8, 768, 20_000
"""Of a trajectory in TensorBoard: at most so many pictures, none longer than so many pixels, so many characters of its text."""


class RunLog(Metrics):
    """A `Metrics` that knows where a step's numbers go. Only rank 0 has sinks; every rank dumps its own rollouts."""

    def __init__(self, config: Config, world: World, sinks: Sequence[LogSink], shown: Sequence[tuple[str, str]]) -> None:
        """`shown`: (label, metric name) pairs of the progress line."""
        super().__init__()
        self.config, self.world, self.sinks, self.shown = config, world, list(sinks), list(shown)
        self.spans, self._timeline = Spans(), Timeline(config.run.path / "timeline.jsonl")
        self._bar: Bar | None = None
        self._step = 0
        self._since: float | None = None       # when the last line was written
        self._dumps = RolloutDumps(config, world)
        self._thread = ThreadPoolExecutor(1, "hdpo-log")
        self._writing: Future[None] | None = None

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """As in `Metrics`, and the other ranks learn what this one is doing (see watchdog.py)."""
        self.world.phase(phase, self._step)
        started = time.perf_counter()
        try:
            with super().timed(phase):
                yield
        finally:
            if self._since is not None:
                self.spans.note(phase, started - self._since, time.perf_counter() - started)

    def divide(self, phase: str, parts: Mapping[str, float]) -> None:
        self.spans.divide(phase, parts)

    def steps(self, start: int, end: int, what: str) -> Iterator[int]:
        """Count steps start..end-1 with a progress bar on rank 0. The clock of the first step starts here."""
        self._bar = progress(what, "step", total=end, initial=start, shown=self.world.is_main)
        self.forget_times()
        self.spans.take()
        self._since = time.perf_counter()
        with self._bar:
            for self._step in range(start, end):
                yield self._step
                self._bar.update()

    def write(self, step: int, extra: dict[str, float] | None = None, groups: Sequence[RewardedGroup] | None = None,
              advantages: Sequence[Sequence[float]] | None = None, seen: Seen | None = None) -> dict[str, float]:
        """Reduce over ranks and write one line for `step` (counted from 1). Collective; returns the scalars.

        `time/step` is the wall clock since the line before: what comes after a line (evaluation, a checkpoint) is in the
        next. Dump and pictures are written by a thread while the next step begins.
        """
        scalars = {**(extra or {}), **memory_scalars()}
        with self.timed("log"):
            self.finish()
            if groups is not None:
                rows = self.world.gather(rollout_rows(groups, rank=self.world.rank, advantages=advantages))
                hdpo = self.config.hdpo
                scalars |= rollout_scalars([row for part in rows for row in part], weights=(hdpo.w_acc, hdpo.w_tool))
        now = time.perf_counter()
        if self._since is not None:
            self.close_step(now - self._since)
            ranks = self.world.gather(self.spans.take())
            if self.sinks:
                self._timeline.write(step, now - self._since, ranks)
        self._since = now
        self.totals(oddities.take())
        for name, read in gauges.take().items():
            self.add(f"{name}/mean", read.total / read.count, weight=read.count)
            self.maximum(f"{name}/max", read.most)
        scalars |= self.reduce_over_ranks(self.world.gather)
        scalars |= gradient_scalars(scalars)
        if sampled := scalars.get("perf/sampled_tokens"):
            scalars |= {f"perf/sampled_tokens_per_second/{phase}": sampled / scalars[f"time/{phase}"]
                        for phase in ("step", "rollout") if scalars.get(f"time/{phase}")}
        with self.timed("log"):
            for sink in self.sinks:
                sink.write(step, scalars)
            if groups is not None:
                self._writing = self._thread.submit(
                    self._write_rollouts, step, groups, advantages, seen.take() if seen is not None else [])
                if why := silence(scalars):
                    self.note(f"step {step} has nothing to learn from: {why}")
            if self._bar is not None:
                values = {label: scalars[name] for label, name in self.shown if name in scalars}
                self._bar.set_postfix_str(" ".join(f"{label} {value:.3g}" for label, value in values.items()), refresh=False)
        return scalars

    def finish(self) -> None:
        """Wait until the last step's dump is on the disk; raises what went wrong with it, but for the disk."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write_rollouts(self, step: int, groups: Sequence[RewardedGroup], advantages: Sequence[Sequence[float]] | None,
                        trained: Sequence[TrainedRow]) -> None:
        every = self.config.log.rollouts_every
        if every and step % every == 0:
            try:
                self._dumps.write(step, groups, advantages, trained)
            except OSError as exc:      # a run goes on without them
                log.warning("the rollouts of step %d are not kept: %s", step, exc)
        self._show(step, groups, advantages)

    def _show(self, step: int, groups: Sequence[RewardedGroup], advantages: Sequence[Sequence[float]] | None) -> None:
        """The first rollout of a few groups, as text and small pictures."""
        if self.sinks and self.config.log.samples:
            firsts = itertools.accumulate((len(group.trajectories) for group in groups), initial=0)
            shown = [_shown(group, tuple(advantages[first]) if advantages is not None else ())
                     for group, first in zip(groups[:self.config.log.samples], firsts)]
            for sink in self.sinks:
                sink.write_rollouts(step, shown)

    def note(self, text: str) -> None:
        """A line for the person at the terminal, once."""
        if self.world.is_main:
            say(text)

    def close(self) -> None:
        """Raises what kept the last dump from being written, having closed everything."""
        self._thread.shutdown()
        for sink in self.sinks:
            sink.close()
        self.finish()


def _shown(group: RewardedGroup, advantages: tuple[float, ...]) -> ShownRollout:
    """The group's first rollout."""
    trajectory, judgement = group.trajectories[0], group.judgements[0]
    parts = [group.task.question]
    for turn, text in enumerate(trajectory.turns):
        parts += [text, *([trajectory.calls[turn].observation] if turn < len(trajectory.calls) else [])]
    said = "\n\n".join(parts)
    if len(said) > SHOWN_CHARS:
        said = f"{said[:SHOWN_CHARS]} ... ({len(said) - SHOWN_CHARS} more characters)"
    images = [image.copy() for image in trajectory.images[:SHOWN_IMAGES]]
    for image in images:
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    truth = group.task.ground_truth
    return ShownRollout(group.task.id, group.task.data_source, said, tuple(images), judgement.verdict.value, judgement.by,
                        truth if isinstance(truth, str) else " or ".join(truth), trajectory.num_tool_calls, advantages)
