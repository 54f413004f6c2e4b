"""What must hold between configuration, model and machine before a part is opened; each raises one line."""
from __future__ import annotations

import os
import socket
import time
import uuid
from pathlib import Path

from hdpo.agent.chat import ChatFormat
from hdpo.config import Config
from hdpo.errors import ConfigError, DataError
from hdpo.ranks.devices import check_torch_sees_devices
from hdpo.ranks.world import World

NETWORK_FILE_S = 30.0   # how late a file of another node may appear on a network file system


def check_devices() -> None:
    """Each rank needs a device of its own that torch can use, unless all train on the CPU. Raises ConfigError."""
    import torch
    check_torch_sees_devices()
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if 0 < gpus < ranks:
        nodes = int(os.environ.get("WORLD_SIZE", ranks)) // ranks
        raise ConfigError(f"{ranks} ranks were started on this machine, GPUs are {gpus}: launch with --num_processes "
                          f"{nodes * gpus}, or GPUS_PER_NODE={gpus} and launch/train_metis.sh")


def check_launcher() -> None:
    """An accelerate file must ask for DeepSpeed: without it accelerate would prepare something else. Raises ConfigError."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    deepspeed, fsdp, cpu = (os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"
                            for name in ("DEEPSPEED", "FSDP", "CPU"))
    if launched and not deepspeed and (fsdp or cpu or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        raise ConfigError("accelerate was launched with a file without DeepSpeed: give --config_file launch/accelerate/"
                          "zero3.yaml, or set distributed_type: DEEPSPEED in it (hdpo sets the rest of DeepSpeed's options)")


def check_rl(config: Config, chat: ChatFormat) -> None:
    """There must be prompts, and the largest rollout there can be must fit into a micro-batch, because it is trained whole."""
    if not config.data.train:
        raise DataError("data.train is empty: name parquet files of training rows (TRAIN_DATA)")
    image_tokens = config.rollout.max_images * chat.max_pixels // chat.factor**2 if chat.sees else 0
    patches = min(config.max_model_len, image_tokens) * chat.merge_size**2
    for name, budget, need in (
            ("batch.tokens_per_micro_batch", config.batch.tokens_per_micro_batch, config.max_model_len),
            ("batch.patches_per_micro_batch", config.batch.patches_per_micro_batch, patches)):
        if budget < need:
            raise ConfigError(f"{name} ({budget}) must be at least {need}: so large can one rollout be, by "
                              "data.max_prompt_tokens, rollout.max_response_tokens and rollout.max_images")


def check_shared_folder(run: Path, world: World) -> None:
    """All nodes write into one run folder: shards of a checkpoint, rollouts, logs. Collective. Raises ConfigError."""
    mark = world.broadcast(uuid.uuid4().hex)
    if world.is_main:
        (run / ".shared").write_text(mark)
    world.barrier()
    deadline = time.monotonic() + (NETWORK_FILE_S if world.node else 0)
    while not (seen := _reads(run / ".shared", mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    nodes = {node: (host, path) for node, host, path, ok in world.gather(
        (world.node, socket.gethostname(), str(run.resolve()), seen)) if not ok}
    for node, (host, path) in nodes.items():
        raise ConfigError(f"run.folder: {path} on node {node} ({host}) is not the folder that node 0 writes; "
                          "set run.folder to one that all nodes share")


def _reads(file: Path, text: str) -> bool:
    try:
        return file.read_text() == text
    except OSError:
        return False
