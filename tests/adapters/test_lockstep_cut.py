"""Ranks that share an engine end a step that carries (rollout.carry_over) each in its own time, and lose nothing."""
from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scripted import ScriptedEngine, ScriptedTools

from hdpo.adapters.lockstep import LockstepEngine, neighbours
from hdpo.agent import rollout as rollout_module
from hdpo.agent.carry import Carry
from hdpo.agent.chat import load_chat_format
from hdpo.agent.rollout import Rollouts
from hdpo.background import BackgroundLoop
from hdpo.config import RolloutConfig, ToolsConfig
from hdpo.protocols import GenerateRequest
from hdpo.types import EndReason, Task, Trajectory

RANKS, GROUP = 2, 2


def rank_main(rank: int, folder: str, model: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    rollout_module.POLL_S = 0.0005
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    chat, background, ended = load_chat_format(model, 1024, 4096), BackgroundLoop(), list[Trajectory]()

    def script(prompt: str, request: GenerateRequest) -> str:
        begun = chat.decode(request.token_ids[len(request.token_ids) - request.begun:]) if request.begun else ""
        number = prompt.split("What is ")[1].split("?")[0]
        return (f"<reason>{'so it is ' * 30}{number}</reason>\n<answer>{number}</answer>")[len(begun):]

    part = ScriptedEngine(chat, script, tokens_per_step=12)
    part.on_step = lambda: time.sleep(0.004)       # the loop looks whether the step is over
    engine = LockstepEngine(part, neighbours(RANKS))
    rollouts = Rollouts(engine, chat, ScriptedTools(), background, RolloutConfig(), ToolsConfig(), 4096, seed=3)
    tasks = [Task(f"{rank}-{n}", "toy", [{"role": "user", "content": f"What is {10 * rank + n}?"}], (), "4") for n in range(2)]
    held: dict[int, Any] = {}
    counts = []
    for step in range(2):
        part.version = step
        carry = Carry(held, len(tasks))
        if not step:      # rank 0 ends it long before rank 1
            carry.is_over = lambda: len(part.batches) >= (3, 9)[rank]
        rollouts.collect([] if step else tasks, group_size=GROUP, temperature=1.0, step=step, weight_version=step, carry=carry,
                         on_finished=ended.append)
        held = carry.groups
        counts.append((engine.num_unfinished(), sum(len(group.going) for group in held.values())))
    rollouts.close()
    background.close()
    whole = [t for group in held.values() for t in group.trajectories()]
    sampled = [[v for v, m in zip(t.versions, t.mask, strict=True) if m] for t in whole]
    torch.save({"counts": counts, "ended": sorted((t.index, t.sample_index) for t in ended), "lengths": len(part.batches),
                "turns": [(t.task.id, t.turns, t.end) for t in whole],
                "versions": sampled}, Path(folder) / f"{rank}.pt")
    dist.barrier()
    engine.close()
    dist.destroy_process_group()


def test_a_rank_cuts_its_own_requests_of_a_shared_engine_and_goes_on_with_them_in_the_next_step(
        tmp_path: Path, tiny_folder: Path) -> None:
    torch.multiprocessing.spawn(rank_main, (str(tmp_path), str(tiny_folder)), nprocs=RANKS)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    for rank, mine in enumerate(found):
        assert mine["counts"] == [(0, 4), (0, 0)], "the first step left four rollouts going and no request behind"
        assert mine["ended"] == [(n, sample) for n in range(2) for sample in range(GROUP)], "each ends once"
        for task, (turn,), end in mine["turns"]:
            number = 10 * rank + int(task.split("-")[1])
            assert end is EndReason.ANSWERED and turn.endswith(f"<answer>{number}</answer>") and turn.count("so it is") == 30
        assert all(set(versions) == {0, 1} and versions == sorted(versions) for versions in mine["versions"])
    begun = [max(versions.count(0) for versions in mine["versions"]) for mine in found]
    assert begun[0] < begun[1] and found[0]["lengths"] == found[1]["lengths"], "each was cut in its own time, in step"
