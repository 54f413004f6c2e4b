"""Run under a launcher: model folders through ZeRO-3 and vLLM once each. Prints a JSON line per folder on rank 0.

Usage: family_cycle.py FOLDER...      FOLDER-saved is written

For each: parity of trainer and engine, an optimizer step on rows that differ between the ranks (so that a mixture uses
other experts on each), the new weights into the engine in many small groups, parity again, a folder saved in small files by both.
"""
import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from PIL import Image

from hdpo.adapters.deepspeed_policy import DeepSpeedPolicy
from hdpo.adapters.engines import make_engine
from hdpo.agent.chat import ChatFormat, load_chat_format
from hdpo.compose.policy import build_packing
from hdpo.config import Config, ModelConfig, OptimConfig, RolloutConfig
from hdpo.packing.batching import make_train_batch
from hdpo.train.canary import check_parity
from hdpo.train.metrics import Metrics
from hdpo.train.objectives import SftObjective
from hdpo.train.update import update
from hdpo.types import Sample

GROUP_BYTES = 50_000
SHARED = ("qwen3_vl_moe", "qwen2_5_vl")
SHARD_BYTES = 60_000


def rows(chat: ChatFormat, rank: int) -> list[Sample]:
    """Two rows, the second with an image where the model sees; other text and other lengths on each rank."""
    samples = []
    for index in range(2):
        picture = Image.radial_gradient("L").crop((40 * rank, 0, 40 * rank + 200, 100)).resize((64, 32)).convert("RGB")
        images = [picture] if index and chat.sees else []
        prompt = chat.prompt([{"role": "user", "content": "<image>" * len(images) + "What?" + "abcxyz"[rank::2] * 9}], images)
        answer = chat.encode_turn(f"{'MNOPQR'[rank::2] * (7 + rank)} {index}") + [chat.end_of_turn_id]
        ids, given = prompt.expanded_ids + answer, len(prompt.expanded_ids)
        samples.append(Sample(ids, [0] * given + [1] * len(answer), [0.0] * len(ids), (), (), chat.vision(prompt.images)))
    return samples


def one_more_policy() -> None:
    """Let this process build another policy beside the first; accelerate allows one and keeps the process group apart."""
    AcceleratorState._reset_state()


def cycle(folder: Path) -> dict:
    chat = load_chat_format(str(folder), 32 * 32, 128 * 128)
    spec = build_packing(Config.model_validate({"model": {"path": str(folder)}, "batch": {"tokens_per_micro_batch": 128}}), chat)
    policy = DeepSpeedPolicy(ModelConfig(path=str(folder), dtype="float32"), OptimConfig(lr=1e-2), chat.image_token_id, seed=0)
    rank = policy.world.rank
    engine = make_engine(
        "vllm", str(folder), max_model_len=1024, config=RolloutConfig(
            max_num_seqs=8, max_batched_tokens=512, kv_cache_gib=0.25, tensor_parallel=2 if folder.name in SHARED else 1),
        stop_token_ids=chat.stop_ids, tool_call_end_id=chat.tool_call_end_id, banned_token_ids=chat.banned_ids, image_limit=4,
        min_pixels=chat.min_pixels, max_pixels=chat.max_pixels, dtype="float32")
    before = check_parity(policy, engine, chat, spec, stage="before the first step")
    old = {name: value.clone() for name, value in policy.iter_weights(GROUP_BYTES)}
    batch = make_train_batch([rows(chat, rank)], spec, policy.world, channels=0)
    norm = update(policy, batch.mini_batches[0], SftObjective(Metrics()), 1e-2)
    new = {name: value.clone() for name, value in policy.iter_weights(GROUP_BYTES)}
    engine.load_weights(new.items(), 1)
    after = check_parity(policy, engine, chat, spec, stage="after sync")
    engine.close()
    saved = folder.with_name(folder.name + "-saved")
    if policy.world.is_main:
        saved.mkdir()
        torch.save(new, saved / "sent.pt")
    policy.world.barrier()
    wrote = policy.export_model(saved, SHARD_BYTES)()
    return {"shards": policy.world.gather(sorted(path.name for path in wrote if path.suffix == ".safetensors")),
            "before": before.max, "after": after.max, "norm": norm, "micro_batches": len(batch.mini_batches[0].micro_batches),
            "unchanged": [name for name in new if torch.equal(new[name], old[name])]}


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        one_more_policy()
        result = cycle(folder)
        if torch.distributed.get_rank() == 0:
            print("RESULT " + json.dumps({"family": folder.name, **result}), flush=True)


if __name__ == "__main__":
    main()
