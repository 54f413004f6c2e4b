"""Run under a launcher: adapters, then frozen parts, through ZeRO-3. Prints a JSON line on rank 0.

Usage: lora_cycle.py FOLDER OUT      FOLDER holds a tiny tied Qwen3-VL; OUT gets the exported folder and what was sent

With adapters: an SFT step and an HDPO step; what moved, what the engine is sent, parity with it, the export, a resume.
With the vision tower and the (tied) embedding frozen: one HDPO step; what moved.
"""
import json
import sys
from pathlib import Path

import deepspeed
import torch
from family_cycle import GROUP_BYTES, one_more_policy, rows

from hdpo.adapters.deepspeed_policy import DeepSpeedPolicy
from hdpo.adapters.engines import make_engine
from hdpo.agent.chat import load_chat_format
from hdpo.compose.policy import build_packing
from hdpo.config import Config, HdpoConfig, ModelConfig, OptimConfig, RolloutConfig
from hdpo.packing.batching import make_train_batch, pack
from hdpo.state.shards import ShardReader, shard_path, write_state
from hdpo.train.canary import check_parity
from hdpo.train.metrics import Metrics
from hdpo.train.objectives import HdpoObjective, LogProbs, SftObjective
from hdpo.train.sync import sync_weights
from hdpo.train.update import update
from hdpo.types import Sample

OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1)


def raw(policy: DeepSpeedPolicy) -> dict[str, torch.Tensor]:
    """Every parameter as it is stored in the trainer, adapters apart from their weights."""
    values = {}
    for name, parameter in policy.engine.module.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            values[name] = parameter.detach().clone()
    return values


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


def rl_row(sample: Sample, sign: float) -> Sample:
    return Sample(sample.token_ids, sample.mask, [-5.0 * m for m in sample.mask], (sign, -sign / 2), (True, True), sample.vision)


def main() -> None:
    folder, out = sys.argv[1], Path(sys.argv[2])
    chat = load_chat_format(folder, 32 * 32, 128 * 128)
    spec = build_packing(Config.model_validate({"model": {"path": str(folder)}, "batch": {"tokens_per_micro_batch": 128}}), chat)
    result: dict = {}

    def start(seed: int = 0, **settings: object) -> DeepSpeedPolicy:
        return DeepSpeedPolicy(ModelConfig(path=folder, dtype="float32", **settings), OPTIM, chat.image_token_id, seed)

    def rl_step(policy: DeepSpeedPolicy) -> float:
        mine = [rl_row(row, (-1.0) ** i) for i, row in enumerate(rows(chat, policy.world.rank))]
        mini = make_train_batch([mine], spec, policy.world, channels=2).mini_batches[0]
        return update(policy, mini, HdpoObjective(HdpoConfig(), chat.banned_ids, 1.0, Metrics()), 1e-2)

    adapters = dict(lora_rank=4, lora_alpha=8, freeze=["*layers.1.mlp.*"])
    policy = start(**adapters)
    mine = rows(chat, policy.world.rank)
    first = raw(policy)
    result["optimized"] = sum(p.ds_numel for group in policy.engine.optimizer.fp16_groups for p in group)
    mini = make_train_batch([mine], spec, policy.world, channels=0).mini_batches[0]
    result["sft_norm"] = update(policy, mini, SftObjective(Metrics()), 1e-2)
    write_state(shard_path(out, policy.world.rank), policy.snapshot_state())
    policy.world.barrier()
    result["sft_moved"] = moved(first, raw(policy))
    result["rl_norm"] = rl_step(policy)
    last = raw(policy)
    result["moved"] = moved(first, last)
    result["adapters"] = [name for name in first if ".lora_" in name]
    result["adapter_numel"] = sum(value.numel() for name, value in first.items() if ".lora_" in name)

    sent = {name: value.clone() for name, value in policy.iter_weights(GROUP_BYTES)}
    result["kept"] = moved(last, raw(policy))   # sending changes nothing
    engine = make_engine(
        "hf", folder, config=RolloutConfig(max_num_seqs=8), max_model_len=1024, stop_token_ids=chat.stop_ids,
        tool_call_end_id=chat.tool_call_end_id, banned_token_ids=chat.banned_ids, image_limit=4, min_pixels=chat.min_pixels,
        max_pixels=chat.max_pixels, dtype="float32")
    sync_weights(policy, engine, 1, 1)
    result["parity"] = check_parity(policy, engine, chat, spec, stage="after sync").max
    (out / "model").mkdir(exist_ok=True)
    policy.export_model(out / "model")()
    policy.world.barrier()
    micro = pack(rows(chat, 0), spec)
    with torch.no_grad():
        log_probs = policy.run(micro, LogProbs(())(micro))[0]

    if policy.world.is_main:
        torch.save({"sent": sent, "raw": last, "log_probs": log_probs}, out / "seen.pt")

    one_more_policy()
    resumed = start(seed=1, **adapters)     # other adapters at first; then those after the SFT step, and the RL step again
    resumed.restore_state(ShardReader(out, resumed.world.size))
    rl_step(resumed)
    result["resumed_differently"] = moved(last, raw(resumed))

    one_more_policy()
    frozen = start(freeze=["model.visual.*", "*.embed_tokens.weight"])
    before = raw(frozen)
    result["frozen_norm"] = rl_step(frozen)
    result["frozen_moved"], result["all"] = moved(before, raw(frozen)), list(before)
    if policy.world.is_main:
        print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
