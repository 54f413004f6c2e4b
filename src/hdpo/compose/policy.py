"""The policy, its checkpoints, and what packs rows for it."""
from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from hdpo.agent.chat import ChatFormat
from hdpo.compose.checks import check_shared_folder
from hdpo.compose.logs import open_run_folder
from hdpo.config import Config
from hdpo.config.file import dump_config
from hdpo.doctor.memory_plan import here
from hdpo.packing.batching import PackingSpec
from hdpo.packing.costs import work_model
from hdpo.protocols import Reference
from hdpo.ranks.nodes import choose_interface
from hdpo.ranks.world import World
from hdpo.state.checkpoint import Checkpoints
from hdpo.state.lock import RunLock
from hdpo.types import Sample

if TYPE_CHECKING:
    from hdpo.adapters.deepspeed_policy import DeepSpeedPolicy


def plan_memory(config: Config, sft: bool = False) -> None:
    """On devices: refuse a run that can't fit, before anything is loaded, and show what will be held when."""
    import torch
    if torch.cuda.is_available():
        lines = here(config, sft=sft).lines()
        if World().is_main:
            print("\n".join(lines), flush=True)


def open_policy(config: Config, chat: ChatFormat, world: World, lock: RunLock | None,
                closing: ExitStack) -> tuple[DeepSpeedPolicy, Checkpoints]:
    """Opens the process group and the run's folder, so it comes before all that needs either. Collective."""
    from hdpo.adapters.deepspeed_policy import DeepSpeedPolicy

    choose_interface()
    policy = DeepSpeedPolicy(config.model, config.optim, chat.image_token_id, config.run.seed, world)
    closing.callback(policy.close)
    open_run_folder(config, policy.world, {"config.yaml": dump_config(config)})
    check_shared_folder(config.run.path, policy.world)
    return policy, closing.enter_context(Checkpoints(policy, config, lock))


def build_reference(config: Config, policy: DeepSpeedPolicy) -> Reference | None:
    """What hdpo.kl_coef needs; None without it. Collective."""
    if not config.hdpo.kl_coef:
        return None
    from hdpo.adapters.reference import open_reference
    return open_reference(policy, config.model)


def build_packing(config: Config, chat: ChatFormat) -> PackingSpec:
    """Budgets and the filler row: two tokens of text and, for a model that sees, one blank image of the smallest size."""
    from hdpo.adapters.policy_model import can_share_prompts
    blank = [chat.bound(Image.new("RGB", (chat.factor, chat.factor)))] if chat.sees else []
    segment = chat.observation("", blank, max_tokens=1 << 20)
    length = len(segment.expanded_ids)
    filler = Sample(list(segment.expanded_ids), [0] * length, [0.0] * length, (), (), chat.vision(segment.images))
    return PackingSpec(
        image_token_id=chat.image_token_id, merge_size=chat.merge_size, max_tokens=config.batch.tokens_per_micro_batch,
        max_patches=config.batch.patches_per_micro_batch, filler=filler, aggregation=config.hdpo.aggregation,
        response_budget=config.rollout.max_response_tokens, positions=chat.family.positions,
        work=work_model(json.loads((Path(config.model.path) / "config.json").read_text())),
        share_prompts=config.batch.share_prompts and can_share_prompts(config.model), every_row=config.hdpo.every_row)
