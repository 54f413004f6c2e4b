"""What a node's host memory will hold, by phase: what sleeps, what is parked, what is saved, pictures, tools.

Weights, optimizer state and copies are exact sums. Processes, pictures, server and sessions are estimates, each from a constant
below. All sizes are bytes of one node. Page cache (weights and data read from files) is left out: the kernel gives it back.
"""
from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from hdpo.agent.rollout import FIRST_SHARE, LIVE_PER_SEQUENCE
from hdpo.config import Config
from hdpo.train.samples import AHEAD_BYTES, BYTES_PER_PIXEL

if TYPE_CHECKING:
    from hdpo.doctor.memory_plan import Shapes

GIB, MIB = 2**30, 2**20
PROCESS = 3 * GIB           # a rank's own: interpreter, torch, CUDA, vLLM, without the libraries that ranks share
SESSION = 24 * MIB          # a Python session: 5 when it starts, 20 with a crop of a picture of the mean size, 29 if enlarged
SERVER = 150 * MIB          # a process of the tool server, or its front
SERVED = MIB // 4           # what the tool server keeps of a live trajectory; pictures and replies are files
CROPS = 2_000_000           # pixels of the pictures that tools return to one rollout
PIXEL_BYTES = 4 + 1         # decoded (Pillow pads a pixel to 4), and the file it came as; patches are counted apart
TOKEN_BYTES = 64            # of a trajectory's lists
LIVE_OF_SERVER, MOST_SERVERS = 256, 8      # live trajectories that one process of the tool server is given
EVALUATED = 1000            # held-out rows of SFT, where eval.rows doesn't say
GRAPHS = 3 * GIB // 2       # vLLM's pool for decode steps of up to 256 sequences

Phases = dict[str, dict[str, int]]


def pinned(size: float) -> int:
    """Bytes that torch takes for a pinned block: the next power of two."""
    return 1 << max(0, math.ceil(size) - 1).bit_length()


def host_phases(config: Config, shapes: Shapes, ranks: int, of_node: int, size: int, sft: bool) -> Phases:
    """By phase and part, of a node with `of_node` of the `ranks`. `size`: bytes of a weight."""
    from hdpo.adapters.zero3 import SUB_GROUP

    trained = math.ceil(shapes.trained / ranks)
    master = trained * (12 if size < 4 else 8)
    if config.optim.offload:    # DeepSpeed pins each sub-group's fp32 weights, both moments and gradients
        groups = [min(SUB_GROUP, trained - start) for start in range(0, trained, SUB_GROUP)]
        state = {"optimizer": sum(4 * pinned(4 * group) for group in groups), "copy of the optimizer": master}
    else:
        state = {"optimizer": master, "copy of the optimizer": 0}
    always = {"processes": PROCESS, "optimizer": state["optimizer"]}
    saved = {"checkpoint": math.ceil(shapes.parameters / ranks) * size + state["copy of the optimizer"]}
    if sft and not config.eval.tasks:
        return _of_node({"update": always, "save": always | saved}, of_node)
    if copies_reference(config) and not sft:
        always["reference"] = math.ceil(shapes.parameters / ranks) * size
    always["engine's pictures"] = int(config.rollout.image_cache_gib * GIB)
    prompts = math.ceil((config.eval.rows or EVALUATED if sft else config.rollout.prompts_per_step) / ranks)
    rollouts = prompts if sft else math.ceil(config.rollout.prompts_per_step * config.rollout.group_size / ranks)
    pixels = (rollouts * CROPS + prompts * config.model.max_pixels) if shapes.vision_layers else 0
    rows = {"pictures": pixels * PIXEL_BYTES, "trajectories": rollouts * config.max_model_len // 2 * TOKEN_BYTES}
    patches = pixels * BYTES_PER_PIXEL
    tools = {} if config.tools.url else {"tool server, sessions": math.ceil(_tool_server(config, ranks, of_node) / of_node)}
    sleeping = {"sleeping engine": asleep(config, shapes, size)}
    return _of_node({"rollout": always | rows | {"patches": min(patches, AHEAD_BYTES)} | tools | saved,
                     "update": always | rows | {"patches": patches} | sleeping,
                     "save": always | sleeping | saved}, of_node)


def copies_reference(config: Config) -> bool:
    """Whether an RL run holds the starting policy beside the trained one, and not in it."""
    return bool(config.hdpo.kl_coef and not config.model.lora_rank)


def live(config: Config, ranks: int) -> int:
    """Trajectories that one of `ranks` keeps live at once, at most."""
    rollouts = math.ceil(config.rollout.prompts_per_step * config.rollout.group_size / ranks)
    return min(math.ceil(LIVE_PER_SEQUENCE * config.rollout.max_num_seqs), math.ceil(FIRST_SHARE * rollouts), rollouts)


def server_processes(config: Config, ranks: int, of_node: int) -> int:
    """Of the run's own tool server on a node."""
    return config.tools.server_processes or max(1, min(MOST_SERVERS, live(config, ranks) * of_node // LIVE_OF_SERVER))


def _tool_server(config: Config, ranks: int, of_node: int) -> int:
    """Bytes of a node's. The store counts: its files are memory where TMPDIR is."""
    processes = server_processes(config, ranks, of_node)
    store = config.tools.picture_store_mib * MIB
    return live(config, ranks) * of_node * (SESSION + SERVED) + (processes + (processes > 1)) * SERVER + store


def asleep(config: Config, shapes: Shapes, size: int) -> int:
    """What one rank's sleeping engine keeps on the host, in pinned blocks: with rollout.sleep drop no weights."""
    rest = shapes.deepstack * pinned(config.rollout.max_batched_tokens * shapes.hidden * size)
    rest += 0 if config.rollout.enforce_eager else pinned(GRAPHS)
    if config.rollout.sleep == "drop":
        return rest
    return rest + shapes.pinned_parameters * size // config.rollout.tensor_parallel


def _of_node(phases: Phases, ranks: int) -> Phases:
    return {phase: {part: ranks * bytes for part, bytes in parts.items() if bytes} for phase, parts in phases.items()}


def machine_memory(groups: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int:
    """Bytes that this process and those beside it may hold: the machine's memory, or less where a control group that it is in
    (a container's, a batch job's, or one around them) says so."""
    limits = [psutil.virtual_memory().total]
    with contextlib.suppress(OSError):
        for line in Path(own).read_text().splitlines():
            _, kinds, name = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            top, file = (Path(groups, "memory"), "memory.limit_in_bytes") if kinds else (Path(groups), "memory.max")
            for group in [top / name.strip("/"), *(top / part for part in Path(name.strip("/")).parents)]:
                with contextlib.suppress(OSError, ValueError):     # no such group, or "max"
                    limits.append(int((group / file).read_text()))
    return min(limits)
