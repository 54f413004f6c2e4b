"""Policy weights into the engine, and the gate that proves they arrived.

A colocated run that samples from stale or slightly different weights trains on noise without any error message. So the
log-probs of a fixed multimodal canary are compared before the first step and after the first sync, and the run refuses
to start when they differ.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from hdpo.agent.chat import ChatFormat
from hdpo.errors import ParityError
from hdpo.protocols import Engine, GenerateRequest, Policy
from hdpo.train.batching import PackingSpec, pack
from hdpo.train.objectives import LogProbs
from hdpo.types import Completion, Sample


def sync_weights(policy: Policy, engine: Engine, version: int, group_mib: int) -> None:
    """Send every parameter, tied ones under each name, in gathered groups of bounded size. Collective."""
    policy.park()
    engine.wake()
    engine.load_weights(policy.iter_weights(group_mib << 20), version)


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Differences |trainer - engine| of the canary's sampled log-probs, in nat."""

    text_mean: float
    text_max: float
    image_mean: float
    image_max: float

    @property
    def mean(self) -> float:
        return max(self.text_mean, self.image_mean)

    @property
    def max(self) -> float:
        return max(self.text_max, self.image_max)

    def scalars(self) -> dict[str, float]:
        return {"mismatch/canary_mean": self.mean, "mismatch/canary_max": self.max}


def canary_prompts(chat: ChatFormat) -> list[tuple[list[dict[str, str]], list[Image.Image]]]:
    """Fixed prompts: text alone and, for a model that sees, one image, and two images of different shapes around text."""
    def picture(width: int, height: int, seed: int) -> Image.Image:
        image = Image.new("RGB", (width, height), (40 * seed % 256, 90, 200 - 30 * seed))
        draw = ImageDraw.Draw(image)
        for i in range(6):
            x, y = (37 * i * seed) % width, (53 * i + 11 * seed) % height
            draw.ellipse([x, y, x + width // 5, y + height // 4], fill=(255 - 40 * i, 30 * i, 77 * seed % 256))
        return chat.bound(image)

    def ask(text: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": "You are a helpful agent."}, {"role": "user", "content": text}]

    long = " ".join(f"Item {i} costs {i * 37 % 100}." for i in range(24))
    text: list[tuple[list[dict[str, str]], list[Image.Image]]] = [
        (ask("What is 17 + 25? Think first."), []),
        (ask(long + " Which item is the cheapest?"), [])]
    if not chat.sees:
        return text
    return text + [
        (ask("<image>What do you see?"), [picture(96, 64, 1)]),
        (ask("<image>Compare it with <image>and say which has more circles."), [picture(64, 128, 2), picture(160, 96, 3)]),
    ]


def check_parity(policy: Policy, engine: Engine, chat: ChatFormat, spec: PackingSpec, *, stage: str,
                 tolerance: float = 0.0, tokens: int = 16) -> ParityReport:
    """Let the engine continue the canary and compare its log-probs with the trainer's. Collective.

    `tolerance` bounds the largest difference in fp32 (0 means 1e-4 nat) and the mean difference in bf16 (0 means 0.02).
    Raises ParityError, on every rank, with the measured figures and the likely cause.
    """
    prompts = [chat.prompt(messages, images) for messages, images in canary_prompts(chat)]
    completions = _generate(engine, prompts, tokens)
    samples = []
    for prompt, completion in zip(prompts, completions):
        given = len(prompt.expanded_ids)
        samples.append(Sample(
            prompt.expanded_ids + completion.token_ids, [0] * given + [1] * len(completion.token_ids),
            [0.0] * given + completion.log_probs, (), (), chat.vision(prompt.images)))
    differences = [_difference(policy, sample, spec, chat) for sample in samples]
    text = torch.cat([d for d, s in zip(differences, samples) if s.vision is None])
    image = torch.cat([d for d, s in zip(differences, samples) if s.vision is not None] or [torch.zeros(1)])
    local = [float(text.mean()), float(text.max()), float(image.mean()), float(image.max())]
    report = ParityReport(*policy.world.max([v if v == v else float("inf") for v in local]))
    fp32 = policy.dtype == torch.float32
    limit = tolerance or (1e-4 if fp32 else 0.02)
    if (report.max if fp32 else report.mean) > limit:
        raise ParityError(_explain(report, stage, limit))
    return report


def _generate(engine: Engine, prompts: Sequence[Any], tokens: int) -> list[Completion]:
    for index, prompt in enumerate(prompts):
        engine.add_request(f"canary-{index}", GenerateRequest(
            list(prompt.compact_ids), tuple(prompt.images), tokens, 1.0, 1234 + index))
    done: dict[str, Completion] = {}
    while engine.num_unfinished():
        done.update(engine.step())
    return [done[f"canary-{index}"] for index in range(len(prompts))]


def _difference(policy: Policy, sample: Sample, spec: PackingSpec, chat: ChatFormat) -> Tensor:
    micro = pack([sample], spec)
    with torch.no_grad():
        (log_probs,) = policy.run(micro, LogProbs(chat.banned_ids)(micro))
    return (log_probs.float().cpu() - micro.rollout_log_probs).abs()


def _explain(report: ParityReport, stage: str, limit: float) -> str:
    if report.text_max <= limit < report.image_max:
        cause = "only prompts with images differ: image preprocessing, vision weights or multimodal positions"
    elif stage == "after sync":
        cause = "weights did not arrive whole (a tied lm_head that was not sent, a skipped or renamed parameter)"
    else:
        cause = "the two load different models: precision, rotary frequencies, attention, or another folder"
    return (f"trainer and engine disagree {stage}: text mean {report.text_mean:.2e} max {report.text_max:.2e}, images mean "
            f"{report.image_mean:.2e} max {report.image_max:.2e} nat (limit {limit:g}); likely cause: {cause}")
