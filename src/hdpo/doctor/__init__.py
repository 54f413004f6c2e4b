"""What a machine and a configuration have and lack, before a device is touched: dry run, plans of memory and disk, judge check.

Starts nothing that trains.
Start with `doctor.py`, `memory_plan.py`, `reach_judge.py`.
"""
