"""The trained agent for people and programs: asked at a terminal, or behind an OpenAI-compatible address.

Start with `session.py`: one question is one trajectory of the training loop's own kind, told as it grows. `speech.py` says what
is heard, `terminal.py` shows it, `requests.py` reads what OpenAI's clients send and `service.py` answers them.
"""
