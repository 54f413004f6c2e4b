"""The composition root: configuration -> parts, in order. The only room that knows every adapter.

Start with `stage.py`: what an SFT run, an RL run and an evaluation consist of, in the order in which they must be opened.
The files beside it open one kind of part each; `commands.py` runs them for the command line. Nothing below imports this room.
"""
