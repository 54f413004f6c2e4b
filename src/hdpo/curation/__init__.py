"""SFT data that can be trusted: public tool trajectories read, re-executed, and filtered in three stages.

A row is kept, dropped or unreadable, each with a reason that is counted; nothing is guessed, and a failure of ours lets a row
wait. Start with `job.py`; a source is one file of `readers/`, a stage one of `stages/`, `record.py` is what passes between them.
"""
