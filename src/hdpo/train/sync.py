"""Policy weights into the engine, and the gates that prove they arrived.

A colocated run that samples from stale or slightly different weights trains on noise without any error message. So exact
checksums of what was sent are compared with what the engine holds, and log-probs of a fixed multimodal canary with the
trainer's: before the first step, after sleep and wake, and every so often. A run whose sides disagree stops by name.
"""
from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from hdpo.agent.chat import ChatFormat
from hdpo.checksums import Watch
from hdpo.config import Config
from hdpo.errors import ParityError
from hdpo.packing.batching import PackingSpec
from hdpo.protocols import Engine, Policy
from hdpo.train.canary import FAR, ParityReport, explain, failures, measure
from hdpo.train.lifecycle import due
from hdpo.train.runlog import RunLog


def sync_weights(policy: Policy, engine: Engine, version: int, group_mib: int, watch: Watch | None = None) -> int:
    """Send every parameter, tied ones under each name, in gathered groups of bounded size; returns bytes. Collective.

    The optimizer's state leaves the device before the engine's weights come back to it; the KV cache comes last.
    """
    policy.park()
    engine.wake()
    sizes: list[int] = []
    weights = _counted(policy.iter_weights(group_mib << 20), sizes)
    engine.load_weights(watch.passing(weights) if watch else weights, version)
    return sum(sizes)


def _counted(weights: Iterator[tuple[str, Tensor]], sizes: list[int]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        sizes.append(tensor.nbytes)
        yield name, tensor


class WeightSync:
    """Sends the policy's weights to the engine of its rank and keeps watch over both. Every method is a collective."""

    def __init__(self, policy: Policy, engine: Engine, chat: ChatFormat, spec: PackingSpec, config: Config,
                 log: RunLog) -> None:
        self.policy, self.engine, self.chat, self.spec, self.log = policy, engine, chat, spec, log
        self.config, self.max_images = config.sync, config.rollout.max_images
        self._sent = 0
        self._warned = False

    def send(self, version: int) -> None:
        """Wake the engine and replace its weights; every completion carries `version` from then on.

        The first time and every `sync.checksum_every`-th the engine's tensors are summed and compared with what was sent.
        Raises ParityError, on every rank, naming a tensor that differs.
        """
        policy, engine = self.policy, self.engine
        first, self._sent = self._sent == 0, self._sent + 1
        summed = self.config.checksum_every > 0 and (first or due(self._sent, self.config.checksum_every))
        watch = Watch() if summed else None
        sent = sync_weights(policy, engine, version, self.config.group_mib, watch)
        self.log.maximum("sync/gb", sent / 2**30)
        if watch is None:
            return
        found = engine.compare_weights(watch.sums())
        if policy.world.any(bool(found.wrong)):
            engine.sleep()
            named = next(name for name in policy.world.gather(found.wrong[:1]) if name)[0]
            raise ParityError(f"the engine's weights differ from those sent to it (version {version}), the first is {named}; "
                              "likely cause: a renamed, transposed or stale parameter in the engine's loader")
        self.log.minimum("sync/verified_share", found.share)

    def open(self, version: int, fresh: bool) -> None:
        """Refuse to train when the two disagree: as loaded (fresh runs), and after sleep, wake and a sync."""
        if fresh:
            self.policy.park()
            self.engine.wake()
            self.check("before the first step")
            self.engine.sleep()
        self.send(version)
        self.check("after sync")
        self.engine.sleep()

    def watch(self, step: int) -> None:
        """The canary when it is due after `step` finished steps, or after a warning; the engine is awake and has just been
        sent to. A first failure is a warning, unless it is far beyond the limit; the second in a row raises ParityError."""
        if not step or not (self._warned or due(step, self.config.canary_every)):
            return
        report, failing = self._measured()
        if not failing:
            self._warned = False
            return
        text = self._explain(report, f"at step {step}", failing)
        if self._warned or failures(report, self.policy.dtype, self.config.parity_tolerance, FAR):
            self.engine.sleep()
            raise ParityError(text)
        self._warned = True
        self.log.note(f"warning: {text}; the run goes on, and stops if the next step says the same")

    def check(self, stage: str) -> None:
        """Compare, log. Raises ParityError with the engine asleep, so that the caller can save."""
        report, failing = self._measured()
        if failing:
            self.engine.sleep()
            raise ParityError(self._explain(report, stage, failing))
        self.log.note(f"parity {stage}: mean {report.mean:.1e}, max {report.max:.1e} nat")

    def _measured(self) -> tuple[ParityReport, dict[str, float]]:
        """The canary's report, logged, and the kinds that fail. Collective."""
        report = measure(self.policy, self.engine, self.chat, self.spec, self.max_images)
        failing = failures(report, self.policy.dtype, self.config.parity_tolerance)
        for name, value in (report.scalars() | {"mismatch/canary_failed": float(bool(failing))}).items():
            self.log.maximum(name, value)
        return report, failing

    def _explain(self, report: ParityReport, stage: str, failing: dict[str, float]) -> str:
        return explain(report, stage, self.policy.dtype, self.config.parity_tolerance, failing)
