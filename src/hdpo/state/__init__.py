"""What outlives a process: checkpoints, shards of the training state, exported weights, spooled and dumped rollouts.

A folder is visible when it is whole. Knows no vendor: tensors come in, files go out.
Start with `checkpoint.py`.
"""
