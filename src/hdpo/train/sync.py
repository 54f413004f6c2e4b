"""Policy weights into the engine, and the gates that prove they arrived.

A colocated run that samples from stale or slightly different weights trains on noise without any error message. So exact
checksums of what was sent are compared with what the engine holds, and log-probs of a fixed multimodal canary with the
trainer's: before the first step, after sleep and wake, and every so often. A run whose sides disagree stops by name.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from hdpo.agent.builder import Segment
from hdpo.agent.chat import ChatFormat
from hdpo.checksums import Watch
from hdpo.config import Config
from hdpo.errors import ParityError
from hdpo.packing.batching import PackingSpec, pack
from hdpo.protocols import Engine, GenerateRequest, Policy
from hdpo.train.lifecycle import due
from hdpo.train.objectives import LogProbs
from hdpo.train.runlog import RunLog
from hdpo.types import Completion, Sample

LONGEST = 8192
"""Tokens of the canary's long prompt, where the context allows: rotary frequencies that are off show at length."""


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
        """The canary when it is due after `step` finished steps; the engine is awake and has just been sent to."""
        if step and due(step, self.config.canary_every):
            self.check(f"at step {step}")

    def check(self, stage: str) -> None:
        """Compare, log. Raises ParityError with the engine asleep, so that the caller can save."""
        try:
            report = check_parity(self.policy, self.engine, self.chat, self.spec, stage=stage,
                                  tolerance=self.config.parity_tolerance, max_images=self.max_images)
        except ParityError:
            self.engine.sleep()
            raise
        for name, value in report.scalars().items():
            self.log.maximum(name, value)
        if "step " not in stage:
            self.log.note(f"parity {stage}: mean {report.mean:.1e}, max {report.max:.1e} nat")


@dataclass(frozen=True, slots=True)
class ParityReport:
    """(mean, max) of |trainer - engine| over the canary's sampled log-probs, in nat, by kind of prompt."""

    by_kind: dict[str, tuple[float, float]]

    @property
    def mean(self) -> float:
        return max(mean for mean, _ in self.by_kind.values())

    @property
    def max(self) -> float:
        return max(largest for _, largest in self.by_kind.values())

    def scalars(self) -> dict[str, float]:
        return {"mismatch/canary_mean": self.mean, "mismatch/canary_max": self.max} | {
            f"mismatch/canary_mean/{kind}": mean for kind, (mean, _) in self.by_kind.items()}

    def beyond(self, dtype: torch.dtype, tolerance: float) -> dict[str, float]:
        """Kinds that differ by more than they may, and their limits.

        fp32 bounds the largest difference (1e-4 nat). bf16 bounds the mean (0.02 nat, twice that where images are seen:
        two attention kernels round a long run of patches differently). `tolerance` replaces 1e-4 or 0.02.
        """
        if dtype == torch.float32:
            limits = dict.fromkeys(self.by_kind, tolerance or 1e-4)
            return {kind: limit for kind, limit in limits.items() if not self.by_kind[kind][1] <= limit}
        limits = {kind: (tolerance or 0.02) * (1 if kind in ("text", "long") else 2) for kind in self.by_kind}
        return {kind: limit for kind, limit in limits.items() if not self.by_kind[kind][0] <= limit}


def picture(chat: ChatFormat, width: int, height: int, seed: int) -> Image.Image:
    """A few discs, the same every time, at a size the model sees unchanged or bounded."""
    image = Image.new("RGB", (width, height), (40 * seed % 256, 90, (200 - 30 * seed) % 256))
    draw = ImageDraw.Draw(image)
    for i in range(6):
        x, y = (37 * i * seed) % width, (53 * i + 11 * seed) % height
        draw.ellipse([x, y, x + width // 5, y + height // 4], fill=(255 - 40 * i, 30 * i, 77 * seed % 256))
    return chat.bound(image)


def canary_prompts(chat: ChatFormat) -> list[tuple[list[dict[str, str]], list[Image.Image]]]:
    """Fixed prompts: text alone and, for a model that sees, one image, and two images of different shapes around text."""
    def ask(text: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": "You are a helpful agent."}, {"role": "user", "content": text}]

    several = " ".join(f"Item {i} costs {i * 37 % 100}." for i in range(24))
    text: list[tuple[list[dict[str, str]], list[Image.Image]]] = [
        (ask("What is 17 + 25? Think first."), []), (ask(several + " Which item is the cheapest?"), [])]
    if not chat.sees:
        return text
    two = [picture(chat, 64, 128, 2), picture(chat, 160, 96, 3)]
    return text + [(ask("<image>What do you see?"), [picture(chat, 96, 64, 1)]),
                   (ask("<image>Compare it with <image>and say which has more circles."), two)]


def canary(chat: ChatFormat, room: int, max_images: int) -> list[tuple[str, Segment]]:
    """(kind, prompt) of what the canary asks within `room` tokens and `max_images` images: also a long text, and an agent
    that has called a tool and been shown several images.
    """
    asked = [("images" if images else "text", chat.prompt(messages, images)) for messages, images in canary_prompts(chat)]
    asked.append(("long", _long_prompt(chat, min(LONGEST, room // 2))))
    if chat.sees:
        asked.append(("tool_images", _tool_turn(chat)))
    return [(kind, prompt) for kind, prompt in asked
            if len(prompt.expanded_ids) <= room and len(prompt.images) <= max_images]


def _long_prompt(chat: ChatFormat, length: int) -> Segment:
    """About `length` tokens of text, never more."""
    def ask(items: int) -> Segment:
        text = " ".join(f"Item {i} costs {i * 37 % 100}." for i in range(items))
        return chat.prompt([{"role": "user", "content": f"{text} Which item is the cheapest?"}], [])

    overhead = len(ask(0).expanded_ids)
    each = (len(ask(1000).expanded_ids) - overhead) / 1000   # items grow longer: what fits a thousand fits fewer
    return ask(max(1, int((length - overhead) / each)))


def _tool_turn(chat: ChatFormat) -> Segment:
    """A prompt with an image, a call as the policy would have written it, and an observation with three images."""
    messages, images = canary_prompts(chat)[2]
    shown = [picture(chat, 128, 64, 4), picture(chat, 96, 96, 5), picture(chat, 64, 96, 6)]
    prompt, observation = chat.prompt(messages, images), chat.observation("Three crops:", shown, 1 << 20)
    call = chat.encode_turn('Look closer.\n<tool_call>\n{"name": "python", "arguments": {"code": "crop()"}}\n</tool_call>')
    return Segment(prompt.compact_ids + call + observation.compact_ids, prompt.expanded_ids + call + observation.expanded_ids,
                   prompt.images + observation.images, prompt.image_keys + observation.image_keys)


def check_parity(policy: Policy, engine: Engine, chat: ChatFormat, spec: PackingSpec, *, stage: str,
                 tolerance: float = 0.0, tokens: int = 16, max_images: int = 4) -> ParityReport:
    """Let the engine continue the canary and compare its log-probs with the trainer's. Collective.

    `tolerance`: see ParityReport.beyond. Raises ParityError, on every rank, with the figures and the likely cause.
    """
    prompts = canary(chat, engine.max_model_len - tokens, max_images)
    completions = _generate(engine, [prompt for _, prompt in prompts], tokens)
    differences: dict[str, list[Tensor]] = {}
    for (kind, prompt), completion in zip(prompts, completions):
        given = len(prompt.expanded_ids)
        sample = Sample(prompt.expanded_ids + completion.token_ids, [0] * given + [1] * len(completion.token_ids),
                        [0.0] * given + completion.log_probs, (), (), chat.vision(prompt.images))
        differences.setdefault(kind, []).append(_difference(policy, sample, spec, chat))
    kinds = {kind: torch.cat(parts) for kind, parts in differences.items()}
    local = [float(figure) for values in kinds.values() for figure in (values.mean(), values.max())]
    figures = iter(policy.world.max([v if v == v else float("inf") for v in local]))
    report = ParityReport({kind: (next(figures), next(figures)) for kind in kinds})
    if beyond := report.beyond(policy.dtype, tolerance):
        raise ParityError(_explain(report, stage, beyond))
    return report


def _generate(engine: Engine, prompts: Sequence[Segment], tokens: int) -> list[Completion]:
    for index, prompt in enumerate(prompts):
        engine.add_request(f"canary-{index}", GenerateRequest(
            list(prompt.compact_ids), tuple(prompt.images), tokens, 1.0, 1234 + index, prompt.image_keys))
    done: dict[str, Completion] = {}
    while engine.num_unfinished():   # ranks that share the engine all ask something, so they end together
        done.update(engine.step())
    return [done[f"canary-{index}"] for index in range(len(prompts))]


def _difference(policy: Policy, sample: Sample, spec: PackingSpec, chat: ChatFormat) -> Tensor:
    micro = pack([sample], spec)
    with torch.no_grad():
        (log_probs,) = policy.run(micro, LogProbs(chat.banned_ids)(micro))
    return (log_probs.float().cpu() - micro.rollout_log_probs).abs()


def _explain(report: ParityReport, stage: str, beyond: dict[str, float]) -> str:
    if set(beyond) <= {"images", "tool_images"}:
        cause = "only prompts with images differ: image preprocessing, vision weights or multimodal positions"
    elif set(beyond) == {"long"}:
        cause = "only the long prompt differs: rotary frequencies or positions, or the engine's sliding window"
    elif stage != "before the first step":
        cause = "weights did not arrive whole (a tied lm_head that was not sent, a skipped or renamed parameter)"
    else:
        cause = "the two load different models: precision, rotary frequencies, attention, or another folder"
    figures = ", ".join(f"{kind} mean {mean:.2e} max {largest:.2e}" for kind, (mean, largest) in report.by_kind.items())
    limits = ", ".join(f"{kind} {limit:g}" for kind, limit in beyond.items())
    return f"trainer and engine disagree {stage}: {figures} nat (beyond the limit of {limits}); likely cause: {cause}"
