"""`hdpo tool-server`: Python sessions, text search and image search behind HTTP, and their client.

Imports no torch and nothing of training, so that it starts in a moment and runs anywhere.
Start with `app.py`, then `tools.py`; `backends/` runs the model's code.
"""
