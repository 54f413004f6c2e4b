"""Run under a launcher: many small steps of sync, rollout and update; prints memory after each on rank 0, as JSON.

Usage: grow.py MODEL STEPS [ENGINE]        ENGINE: hf (default) or vllm
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from hdpo.adapters.deepspeed_policy import DeepSpeedPolicy
from hdpo.adapters.engines import make_engine
from hdpo.agent.chat import load_chat_format
from hdpo.config import Config, HdpoConfig
from hdpo.packing.batching import PackingSpec, make_train_batch
from hdpo.protocols import GenerateRequest
from hdpo.train.canary import canary_prompts
from hdpo.train.objectives import HdpoObjective
from hdpo.train.runlog import RunLog
from hdpo.train.sync import WeightSync
from hdpo.train.update import update
from hdpo.types import Sample

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import MAX_PIXELS, MIN_PIXELS  # noqa: E402


def resident() -> int:
    """Bytes of host memory this process holds."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def main() -> None:
    folder, steps, kind = sys.argv[1], int(sys.argv[2]), (sys.argv[3:] or ["hf"])[0]
    config = Config.model_validate({"model": {"path": folder}, "rollout": {"max_num_seqs": 8, "kv_cache_gib": 0.25,
                                    "max_batched_tokens": 512}, "sync": {"checksum_every": 10, "canary_every": 50}})
    chat = load_chat_format(folder, MIN_PIXELS, MAX_PIXELS)
    policy = DeepSpeedPolicy(config.model, config.optim, chat.image_token_id, seed=0)
    policy.park()
    engine = make_engine(
        kind, folder, config=config.rollout, max_model_len=512, stop_token_ids=chat.stop_ids,   # type: ignore[arg-type]
        tool_call_end_id=chat.tool_call_end_id, banned_token_ids=chat.banned_ids, image_limit=4, min_pixels=chat.min_pixels,
        max_pixels=chat.max_pixels, dtype=config.model.dtype)
    engine.sleep()
    blank = chat.prompt(*canary_prompts(chat)[2])
    filler = Sample(blank.expanded_ids, [0] * len(blank.expanded_ids), [0.0] * len(blank.expanded_ids), (), (),
                    chat.vision(blank.images))
    spec = PackingSpec(image_token_id=chat.image_token_id, merge_size=chat.merge_size, max_tokens=400, max_patches=4096,
                       filler=filler)
    log = RunLog(config, policy.world, [], [])
    sync = WeightSync(policy, engine, chat, spec, config, log)
    objective = HdpoObjective(HdpoConfig(), chat.banned_ids, 1.0, log)
    prompts = [chat.prompt(*canary_prompts(chat)[i]) for i in (0, 2)]
    host, device = [], []
    for step in range(steps):
        sync.send(step)
        sync.watch(step)
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), GenerateRequest(prompt.compact_ids, prompt.images, 6, 1.0, 10 * step + index))
        done: dict = {}
        while engine.num_unfinished():
            done.update(engine.step())
        engine.sleep()
        samples = []
        for index, prompt in enumerate(prompts):
            completion, given = done[str(index)], len(prompt.expanded_ids)
            samples.append(Sample(
                prompt.expanded_ids + completion.token_ids, [0] * given + [1] * len(completion.token_ids),
                [0.0] * given + completion.log_probs, (1.0 - 2.0 * index, 0.5), (True, True), chat.vision(prompt.images)))
        batch = make_train_batch([samples], spec, policy.world, channels=2)
        update(policy, batch.mini_batches[0], objective, 1e-5)
        log.reduce_over_ranks(policy.world.gather)
        host.append(resident())
        device.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
    if policy.world.is_main:
        print("RESULT " + json.dumps({"host": host, "device": device}))
    engine.close()
    policy.close()


if __name__ == "__main__":
    main()
