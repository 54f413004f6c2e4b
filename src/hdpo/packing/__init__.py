"""Rows of all ranks -> micro-batches of equal work with global norms: costs, planning, exchange, shared prompts.

Any split must give the same loss and gradient, and every rank the same number of micro-batches; tests hold both,
so everything else here may be changed. Knows no policy, no engine and no reward.
Start with `batching.py`; `planning.py` decides who computes what.
"""
