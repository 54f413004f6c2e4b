"""The trained agent for people, asked at a terminal.

Start with `session.py`: one question is one trajectory of the training loop's own kind, told as it grows. `speech.py` says what
is heard, `terminal.py` shows it.
"""
