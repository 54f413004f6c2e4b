"""Run under a launcher: optimizer steps on rollouts with and without shared prompts, from the same weights.

Usage: share_prompts.py FOLDER      FOLDER/start.pt, False.pt and True.pt are written; a JSON line on rank 0

Rank 0 has most groups, so that rows move, and micro-batches are so small that groups are spread over several.
"""
import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from PIL import Image

from hdpo.adapters.deepspeed_policy import DeepSpeedPolicy
from hdpo.agent.builder import TrajectoryBuilder
from hdpo.agent.chat import ChatFormat, load_chat_format
from hdpo.compose.policy import build_packing
from hdpo.config import Config, HdpoConfig, ModelConfig, OptimConfig
from hdpo.packing.batching import make_train_batch
from hdpo.train.metrics import Metrics
from hdpo.train.objectives import HdpoObjective
from hdpo.train.update import old_log_probs, update
from hdpo.types import Completion, Sample, StopReason, join

MIN_PIXELS, MAX_PIXELS = 32 * 32, 128 * 128


def rollouts(chat: ChatFormat, group: int, count: int, words: str = "") -> list[Sample]:
    """A group whose prompt has two pictures. Every other rollout is shown another by a tool, a different one each; one
    samples a single token."""
    def picture(width: int, height: int, seed: int) -> Image.Image:
        shades = torch.randint(0, 255, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        return Image.fromarray(shades.numpy())

    coin = torch.Generator().manual_seed(group)

    def sampled(length: int) -> Completion:
        return Completion(torch.randint(0, 250, (length,), generator=coin).tolist(), [-5.0] * length, StopReason.TOOL_CALL, 0)

    shown = [picture(64, 48, group), picture(48, 96, group + 10)] if chat.sees else []
    prompt = chat.prompt([{"role": "user", "content": f"Group {group} {words}" + "<image> and " * len(shown)}], shown)
    seen = chat.vision(prompt.images)
    rows = []
    for number in range(count):
        row, vision = TrajectoryBuilder(), seen
        row.append_given(prompt)
        row.append_sampled(sampled(1 if number == 2 else 7 + 4 * number))
        if number % 2:
            crop = [picture(32 + 16 * number, 64, 100 + 10 * group + number)] if chat.sees else []
            observation = chat.observation("Seen:", crop, 1 << 20)
            row.append_given(observation)
            row.append_sampled(sampled(5))
            if seen is not None and (more := chat.vision(observation.images)) is not None:
                vision = join([seen, more])
        rows.append(Sample(row.token_ids, row.mask, row.log_probs, ((-1.0) ** number * (1 + number), 0.3 * number - 0.4),
                           (True, number != 1), vision, len(prompt.expanded_ids), group))
    return rows


def keep_weights(policy: DeepSpeedPolicy, file: Path) -> None:
    weights = {name: value.clone() for name, value in policy.iter_weights(1 << 20)}
    if policy.world.is_main:
        torch.save(weights, file)


def train(folder: Path, share: bool) -> dict:
    chat = load_chat_format(str(folder), MIN_PIXELS, MAX_PIXELS)
    batching = {"tokens_per_micro_batch": 400, "share_prompts": share}
    spec = build_packing(Config.model_validate({"model": {"path": str(folder)}, "batch": batching}), chat)
    AcceleratorState._reset_state()     # accelerate allows one policy at a time
    policy = DeepSpeedPolicy(ModelConfig(path=str(folder), dtype="float32"), OptimConfig(), chat.image_token_id, seed=0)
    world, metrics = policy.world, Metrics()
    keep_weights(policy, folder / "start.pt")
    groups = [rollouts(chat, group, 6) for group in range(5)]
    mine = groups[:4] if world.is_main else groups[4:]
    batch = make_train_batch([[row for group in mine[::2] for row in group], [row for group in mine[1::2] for row in group]],
                             spec, world, channels=2)
    objective = HdpoObjective(HdpoConfig(), chat.banned_ids, 1.0, metrics)
    old = old_log_probs(policy, batch, objective.log_probs, epochs=1)
    norms = [update(policy, mini, objective, 1e-3, old_of_mini) for mini, old_of_mini in zip(batch.mini_batches, old)]
    packs = [micro for mini in batch.mini_batches for micro in mini.micro_batches]
    tokens, patches, shared = world.sum([float(sum(counts)) for counts in (
        [micro.input_ids.shape[1] for micro in packs], [micro.vision.num_patches for micro in packs if micro.vision],
        [any(span.prompt >= 0 for span in micro.spans) for micro in packs])])
    logged = metrics.reduce_over_ranks(world.gather)
    keep_weights(policy, folder / f"{share}.pt")
    return {"norms": norms, "tokens": tokens, "patches": patches, "packs_that_share": shared, "micro_batches": len(packs),
            "loss": logged["actor/pg_loss"], "entropy": logged["actor/entropy"], "kl": logged["actor/ppo_kl"]}


def main() -> None:
    result = {str(share): train(Path(sys.argv[1]), share) for share in (False, True)}
    if torch.distributed.get_rank() == 0:
        print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
