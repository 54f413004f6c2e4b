"""The algorithm inside other trainers: TRL, verl, prime-rl, and any loop under DistributedDataParallel.

Each file imports its host only when it is used, and of hdpo nothing but the algorithm (losses, advantages).
Start with `ddp.py`: what every host that averages over ranks has to be told. `one_stream.py` is for hosts that carry a single
advantage per token.
"""
