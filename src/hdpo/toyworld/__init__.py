"""The embedded world: tasks with a known need for a tool, its tiny base model, the demo.

Uses hdpo as a user would; nothing below knows of it.
Start with `world.py`, `demo.py`.
"""
