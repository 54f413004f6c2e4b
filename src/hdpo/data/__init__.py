"""Rows of users' files: tasks for RL and evaluation, demonstrations for SFT.

A bad row is named and skipped or refused here; what leaves this room is checked.
Start with `store.py` for rows of any kind, with `tasks.py` for training records.
"""
