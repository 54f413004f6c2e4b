"""Run under a launcher: all ranks claim from two queues as fast as they can. Rank 0 prints [queue][rank][numbers] as JSON."""
from __future__ import annotations

import json

import torch.distributed as dist

from hdpo.ranks.world import World


def main() -> None:
    dist.init_process_group("gloo")
    world = World().connect()
    queues = [world.queue(), world.queue()]
    claimed = []
    for claim in queues:
        numbers = []
        while (number := claim()) < 50:
            numbers.append(number)
        claimed.append(numbers)
    gathered = world.gather(claimed)
    if world.is_main:
        print("RESULT " + json.dumps([[part[queue] for part in gathered] for queue in range(2)]), flush=True)
    world.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
