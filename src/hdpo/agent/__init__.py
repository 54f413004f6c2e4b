"""One trajectory, and thousands at once: chat format, images, the calls' grammar, turns, the engine's pump.

Knows no engine, no reward and no training; it asks for a `GenerateRequest` and a tool's reply (`protocols.py`).
Start with `rollout.py`; a call is parsed in `parse.py`, a turn becomes tokens in `chat.py`.
"""
