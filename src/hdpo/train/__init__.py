"""The two loops and their verbs: collect, samples, objectives, update, sync, metrics.

Knows parts by their protocols; `compose` decides what they are. A feature lives in a part, not in the loop.
Start with `rl.py`, one page; a token's advantage is used in `objectives.py`.
"""
