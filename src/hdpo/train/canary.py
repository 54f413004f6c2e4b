"""The canary: fixed prompts that the engine continues, whose log-probs are then compared with the trainer's.

What a healthy pair may differ by. In fp32 both compute the same sums in another order: 1e-4 nat bounds every token. In bf16
published runs with vLLM differ by 0.038 nat in the mean of sampled tokens (Qwen2.5-0.5B, 3,916 tokens: sd 0.050, 95 % below
0.113, largest 0.477) and 0.056 (Qwen3-1.7B), and less with the fp32 heads that both sides have here; larger models differ less.
Faults that were met differ by 0.5 to 2 nat: a stale head 1.4 to 1.6. So a kind of prompt fails when its mean is above LIMIT
beyond doubt: `sure`, the mean less three standard errors of these very tokens. Laplace noise of mean 0.04 over 96 tokens has
a standard error of 0.004, so its mean would have to come out 8 errors too high; of mean 0.056, where 0.083 is enough, 4.7. A
fault's mean of 0.5 has a `sure` of 0.35. One wild token among 95 good ones (a router that tipped over) fails nothing.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from hdpo.agent.builder import Segment
from hdpo.agent.chat import ChatFormat
from hdpo.errors import ParityError
from hdpo.packing.batching import PackingSpec, pack
from hdpo.protocols import Engine, GenerateRequest, Policy
from hdpo.train.objectives import LogProbs
from hdpo.types import Completion, Sample

LONGEST = 8192
"""Tokens of the canary's long prompt, where the context allows: rotary frequencies that are off show at length."""
TOKENS = 96
"""Sampled tokens that each kind of prompt is judged by, at least; a model that ends its answers early is asked again."""
ROUNDS = 8
FP32_LIMIT, LIMIT, SEEN = 1e-4, 0.06, 2.0
"""Of the largest difference in fp32; of `sure` in bf16, nat. Where images are seen two attention kernels round a long run of
patches differently, so up to SEEN times that is allowed, if text differs by noise enough itself: four times its mean."""
FAR = 5.0
"""Times its limit: so much is no noise at any time of a run. A fault of 0.5 nat is beyond it."""


class Difference(NamedTuple):
    """|trainer - engine| over sampled log-probs, nat: mean, largest, and what the mean is at least (see the module)."""

    mean: float
    max: float
    sure: float


def difference(values: Tensor) -> Difference:
    """Of [n] absolute differences. What is not finite is infinite."""
    return Difference(*figures(values.double()).tolist())


def figures(values: Tensor) -> Tensor:
    """[..., n] -> [..., 3]: the numbers of a `Difference`."""
    mean, largest = values.mean(-1), values.amax(-1)
    error = values.var(-1, correction=min(1, values.shape[-1] - 1)).sqrt() / values.shape[-1] ** 0.5
    found = torch.stack([mean, largest, (mean - 3 * error).clamp(min=0)], dim=-1)
    return torch.where(values.isfinite().all(-1, keepdim=True), found, float("inf"))


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The canary's differences by kind of prompt, the worst over ranks."""

    by_kind: dict[str, Difference]

    @property
    def mean(self) -> float:
        return max(kind.mean for kind in self.by_kind.values())

    @property
    def max(self) -> float:
        return max(kind.max for kind in self.by_kind.values())

    def scalars(self) -> dict[str, float]:
        return {"mismatch/canary_mean": self.mean, "mismatch/canary_max": self.max} | {
            f"mismatch/canary_mean/{kind}": found.mean for kind, found in self.by_kind.items()}

    def excess(self, dtype: torch.dtype, tolerance: float = 0.0) -> dict[str, float]:
        """By kind, how many times its limit it differs: above 1 it fails. `tolerance` replaces 1e-4 or LIMIT."""
        if dtype == torch.float32:
            return {kind: found.max / (tolerance or FP32_LIMIT) for kind, found in self.by_kind.items()}
        limit = tolerance or LIMIT
        noise = self.by_kind["text"].mean if "text" in self.by_kind else limit
        seen = SEEN * limit if tolerance else min(max(limit, 4 * noise), SEEN * limit)
        return {kind: found.sure / (limit if kind in ("text", "long") else seen) for kind, found in self.by_kind.items()}

    def describe(self) -> str:
        return ", ".join(f"{kind} mean {found.mean:.2e} max {found.max:.2e}" for kind, found in self.by_kind.items())


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
    two = [picture(chat, 192, 512, 2), picture(chat, 640, 160, 3)]
    return text + [(ask("<image>What do you see?"), [picture(chat, 512, 128, 1)]),
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
    shown = [picture(chat, 384, 128, 4), picture(chat, 96, 96, 5), picture(chat, 128, 512, 6)]
    prompt, observation = chat.prompt(messages, images), chat.observation("Three crops:", shown, 1 << 20)
    call = chat.encode_turn('Look closer.\n<tool_call>\n{"name": "python", "arguments": {"code": "crop()"}}\n</tool_call>')
    return Segment(prompt.compact_ids + call + observation.compact_ids, prompt.expanded_ids + call + observation.expanded_ids,
                   prompt.images + observation.images, prompt.image_keys + observation.image_keys)


def measure(policy: Policy, engine: Engine, chat: ChatFormat, spec: PackingSpec, max_images: int = 4) -> ParityReport:
    """Let the engine continue the canary and compare its log-probs with the trainer's. Collective."""
    prompts = canary(chat, engine.max_model_len - TOKENS, max_images)
    found: dict[str, list[Tensor]] = {kind: [] for kind, _ in prompts}
    for round in range(ROUNDS):
        short = {kind for kind, parts in found.items() if sum(map(len, parts)) < TOKENS}
        if not policy.world.any(bool(short)):
            break
        for kind, sample in sampled(engine, chat, prompts, seed=1234 + 100 * round):
            found[kind].append(compare_log_probs(policy, sample, spec, chat))
    local = [figure for parts in found.values() for figure in difference(torch.cat(parts))]
    figures = iter(policy.world.max(local))
    return ParityReport({kind: Difference(next(figures), next(figures), next(figures)) for kind in found})


def sampled(engine: Engine, chat: ChatFormat, prompts: Sequence[tuple[str, Segment]], seed: int) -> list[tuple[str, Sample]]:
    """(kind, row) of what the engine makes of the prompts, at most TOKENS tokens each."""
    rows = []
    for (kind, prompt), completion in zip(prompts, _generate(engine, [prompt for _, prompt in prompts], seed), strict=True):
        given = len(prompt.expanded_ids)
        rows.append((kind, Sample(
            prompt.expanded_ids + completion.token_ids, [0] * given + [1] * len(completion.token_ids),
            [0.0] * given + completion.log_probs, (), (), chat.vision(prompt.images))))
    return rows


def _generate(engine: Engine, prompts: Sequence[Segment], seed: int) -> list[Completion]:
    for index, prompt in enumerate(prompts):
        engine.add_request(f"canary-{index}", GenerateRequest(
            list(prompt.compact_ids), tuple(prompt.images), TOKENS, 1.0, seed + index, prompt.image_keys))
    done: dict[str, Completion] = {}
    while engine.num_unfinished():   # ranks that share the engine all ask something, so they end together
        done.update(engine.step())
    return [done[f"canary-{index}"] for index in range(len(prompts))]


def compare_log_probs(policy: Policy, sample: Sample, spec: PackingSpec, chat: ChatFormat) -> Tensor:
    """[n] |trainer - engine| of the row's sampled tokens."""
    micro = pack([sample], spec)
    with torch.no_grad():
        (log_probs,) = policy.run(micro, LogProbs(chat.banned_ids)(micro))
    return (log_probs.float().cpu() - micro.rollout_log_probs).abs()


def check_parity(policy: Policy, engine: Engine, chat: ChatFormat, spec: PackingSpec, *, stage: str, tolerance: float = 0.0,
                 max_images: int = 4) -> ParityReport:
    """`measure`. Raises ParityError, on every rank, with the figures and the likely cause, where a kind exceeds its limit."""
    report = measure(policy, engine, chat, spec, max_images)
    if failing := failures(report, policy.dtype, tolerance):
        raise ParityError(explain(report, stage, policy.dtype, tolerance, failing))
    return report


def failures(report: ParityReport, dtype: torch.dtype, tolerance: float, times: float = 1.0) -> dict[str, float]:
    """Kinds that differ by more than so many times their limit, and by how many times."""
    return {kind: excess for kind, excess in report.excess(dtype, tolerance).items() if not excess <= times}


def explain(report: ParityReport, stage: str, dtype: torch.dtype, tolerance: float, failing: dict[str, float]) -> str:
    """One line: the figures, the likely cause, and the setting that lets such a difference pass."""
    if set(failing) <= {"images", "tool_images"}:
        cause = "only prompts with images differ: image preprocessing, vision weights or multimodal positions"
    elif set(failing) == {"long"}:
        cause = "only the long prompt differs: rotary frequencies or positions, or the engine's sliding window"
    elif stage != "before the first step":
        cause = "weights did not arrive whole (a tied lm_head that was not sent, a skipped or renamed parameter)"
    else:
        cause = "the two load different models: precision, rotary frequencies, attention, or another folder"
    limit = tolerance or (FP32_LIMIT if dtype == torch.float32 else LIMIT)
    wide = limit * max(failing.values())
    way = "" if wide == float("inf") else (
        f"; if this pair is known to differ so much, sync.parity_tolerance={wide * 1.2:.2g} lets it pass")
    return (f"trainer and engine disagree {stage}: {report.describe()} nat ({', '.join(failing)} beyond the limit, "
            f"sync.parity_tolerance {limit:g}); likely cause: {cause}{way}")
