"""Rows of users' files: tasks for RL and evaluation, demonstrations for SFT.

A bad row is named and skipped or refused here; what leaves this room is checked.
Start with `tasks.py`.
"""
