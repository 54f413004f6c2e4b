"""Who is there and who is alive: collectives, the watchdog, nodes and their network.

Knows nothing of models, rows or rollouts.
Start with `world.py`, then `watchdog.py`.
"""
