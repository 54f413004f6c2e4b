"""What does it save to compute a prompt once for all rollouts of it in a micro-batch?

    python benchmarks/bench_prompts.py [--short] [--json FILE]

Planned: the step of bench_batching.py (128 prompts x 16 rollouts, 8 ranks, 40,960 tokens a micro-batch), as counts and as
the time that ranks in step take by the planner's own model of work. Measured: forward, loss and backward of one mini-batch
of the toy base, the same rows with and without sharing in turn, for the demo's lengths, for prompts as long as twice a
response, and for short prompts before long responses, which are left as they are because there is nothing to gain.
"""
from __future__ import annotations

import math
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_batching import BUDGET, RANKS, agent_rows
from common import Figure, arguments, paired, report
from PIL import Image

import hdpo
from hdpo.adapters.policy_model import load_policy_model, model_inputs
from hdpo.agent.chat import load_chat_format
from hdpo.compose.policy import build_packing
from hdpo.config import Config, HdpoConfig, ModelConfig
from hdpo.packing.batching import make_train_batch
from hdpo.packing.costs import Load, load
from hdpo.packing.planning import plan
from hdpo.ranks.world import World
from hdpo.train.metrics import Metrics
from hdpo.train.objectives import HdpoObjective
from hdpo.types import MiniBatch, Sample

TOY = Path(hdpo.__file__).parent / "toyworld" / "assets" / "toy-base"
SHAPES = {"the demo's lengths": (8, 32, (8, 80), 1024), "long prompts": (4, 700, (100, 600), 4096),
          "short prompts, long responses": (4, 32, (400, 1200), 4096)}
"""prompts, words of a prompt beside its picture's 16 tokens, range of response lengths, tokens of a micro-batch"""
GROUP = 8


def planning(short: bool) -> tuple[dict[str, Figure], dict[str, Any]]:
    found: list[dict[str, float]] = []
    for seed in range(2 if short else 5):
        made: dict[bool, list[list[Load]]] = {}
        for share in (False, True):
            rows = agent_rows(128, seed, share)
            seconds = math.inf      # of the fastest: a collection of garbage costs as much as the planning
            for _ in range(3):
                start = time.process_time()
                bins = plan(rows, RANKS, BUDGET)
                seconds = min(seconds, time.process_time() - start)
            made[share] = [[load(rows, bin_) for bin_ in rank] for rank in bins]
        apart, shared = made[False], made[True]
        slowest = {share: sum(max(bin_.work for bin_ in step) for step in zip(*ranks)) for share, ranks in made.items()}
        found.append({
            "time": slowest[False] / slowest[True], "tokens": total(apart, "tokens") / total(shared, "tokens"),
            "patches": total(apart, "patches") / total(shared, "patches"), "planning": seconds * 1e3,
            "efficiency": total(shared, "work") / RANKS / slowest[True],
            "again": total(shared, "work") / load(rows, range(len(rows))).work,
            "over": max(bin_.tokens for rank in shared for bin_ in rank) > BUDGET.max_tokens})

    def mean(what: str) -> float:
        return statistics.mean(part[what] for part in found)
    return {
        "planned: time of ranks in step, apart / shared": Figure(mean("time"), "x", "higher", 1.8, 0.05),
        "planned: tokens computed, apart / shared": Figure(mean("tokens"), "x", "higher", 1.9, 0.05),
        "planned: image patches computed, apart / shared": Figure(mean("patches"), "x", "higher", 2.4, 0.05),
        "planned: work / work with every prompt once in all": Figure(mean("again"), "x", "lower", 1.15, 0.05),
        "planned: sync efficiency": Figure(mean("efficiency"), "", "higher", 0.95, 0.02),
        "planned: micro-batches over the token budget": Figure(mean("over"), "share", "lower", 0.0),
        "planning 2,048 rows": Figure(mean("planning"), "CPU ms", "lower", 100, 1.0),
    }, {"steps": found}


def total(ranks: list[list[Load]], what: str) -> int:
    return sum(getattr(bin_, what) for rank in ranks for bin_ in rank)


def groups(chat: Any, prompts: int, words: int, lengths: tuple[int, int]) -> list[Sample]:
    """Rollouts of one turn; a group's hold the same tensor of their prompt's picture."""
    coin = torch.Generator().manual_seed(0)
    rows = []
    for group in range(prompts):
        picture = chat.bound(Image.effect_noise((64, 64), 40 + group).convert("RGB"))
        prompt = chat.prompt([{"role": "user", "content": "<image>" + "the " * words}], [picture])
        vision, given = chat.vision(prompt.images), len(prompt.expanded_ids)
        for number in range(GROUP):
            length = int(torch.randint(*lengths, (), generator=coin))
            ids = prompt.expanded_ids + torch.randint(0, 100, (length,), generator=coin).tolist()
            rows.append(Sample(ids, [0] * given + [1] * length, [0.0] * given + [-4.0] * length, ((-1.0) ** number, 0.5),
                               (True, True), vision, given, group))
    return rows


def update(short: bool) -> tuple[dict[str, Figure], dict[str, Any]]:
    device, dtype = (torch.device("cuda"), torch.bfloat16) if torch.cuda.is_available() else (torch.device("cpu"), torch.float32)
    chat = load_chat_format(str(TOY), 4096, 4096)
    settings = ModelConfig(path=str(TOY), gradient_checkpointing=False)
    model, objective = load_policy_model(settings, dtype).to(device), HdpoObjective(HdpoConfig(), (), 1.0, Metrics())

    def train(mini: MiniBatch) -> None:
        for micro in mini.micro_batches:
            (loss,) = model(**model_inputs(micro, chat.image_token_id, device, dtype), job=objective(micro, mini.norms, None))
            loss.backward()

    figures, details = {}, {}
    for name, (prompts, words, lengths, budget) in SHAPES.items():
        rows = groups(chat, prompts, words, lengths)
        spec = build_packing(Config(model=settings), chat)
        spec = replace(spec, max_tokens=budget, max_patches=1 << 20)
        apart, shared = (make_train_batch([rows], replace(spec, share_prompts=share), World(), 2).mini_batches[0]
                         for share in (False, True))
        tokens = [sum(micro.input_ids.shape[1] for micro in mini.micro_batches) for mini in (apart, shared)]
        times = paired({"apart": partial(train, apart), "shared": partial(train, shared)}, "shared", 3 if short else 9,
                       device.type == "cuda")
        goal = 0.9 if "short prompts" in name else 1.2     # not shared: the same work but for noise
        figures[f"{name}: tokens computed, apart / shared"] = Figure(tokens[0] / tokens[1], "x", "higher")
        figures[f"{name}: forward and backward, apart / shared"] = Figure(times["apart"]["ratio"], "x", "higher", goal, 0.15)
        details[name] = {"prompt": rows[0].prompt_length, "tokens": tokens, "times": times}
    return figures, details


def main() -> int:
    args = arguments(__doc__).parse_args()
    figures, details = {}, {}
    for part in (planning, update):
        some, detail = part(args.short)
        figures |= some
        details[part.__name__] = detail
    return not report("prompts", figures, details, args.json, args.short)


if __name__ == "__main__":
    sys.exit(main())
