"""Lines of a notebook that are no Python: `!pip install x`, `%matplotlib inline`. They are skipped, and said to be.

Only a line at which Python itself stops is taken for one, so that `%` and `!` inside of strings and expressions stay what they
are. Standard library only.
"""
from __future__ import annotations

import ast
import re

_COMMAND = re.compile(r"(\s*)(?:[A-Za-z_]\w*\s*=\s*)?([!%].*)")
_TIMING = ("%%time", "%%timeit", "%%capture", "%%prun")
"""Cell magics whose cell is Python."""


def parse(code: str, name: str) -> tuple[str, ast.Module, list[str]]:
    """(the code that runs, its tree, what to say of each line that does not). Raises SyntaxError when such lines are not all
    that is wrong with it."""
    try:
        return code, ast.parse(code, name), []
    except SyntaxError:
        pass
    lines, skipped = code.split("\n"), list[str]()
    first = next((i for i, line in enumerate(lines) if line.strip()), 0)
    if lines[first].lstrip().startswith("%%"):
        magic = lines[first].strip()
        if magic.split()[0] not in _TIMING:
            return "", ast.Module([], []), [f"{_shown(magic)} was not run: a cell holds Python here, and nothing else."]
        lines[first] = ""
    while True:
        try:
            return "\n".join(lines), ast.parse("\n".join(lines), name), skipped
        except SyntaxError as exc:
            number = (exc.lineno or 0) - 1
            command = _COMMAND.fullmatch(lines[number]) if 0 <= number < len(lines) else None
            if command is None:
                for note in skipped:
                    exc.add_note(note)
                raise
        lines[number] = command[1] + "pass"
        skipped.append(_note(command[2]))


def _note(command: str) -> str:
    if command.startswith("!"):
        return f"{_shown(command)} was not run: this session runs Python, and nothing can be installed."
    return f"{_shown(command)} was ignored: there are no notebook commands here."


def _shown(command: str) -> str:
    return command if len(command) <= 80 else command[:77] + "..."
