"""Which rows a report.html holds, so that one file of bounded size shows the most: a rule that the page states.

In this order, until BUDGET bytes are used: the tasks of `choose`, before and after training; of steps spread over the run, the
groups with the largest advantages, sources in turn; more tasks of the evaluations, the same in each. Of a curation: a few rows of
every stage, source and reason. Pictures are made smaller than in the dump. `hdpo report RUN --serve` has everything.
"""
from __future__ import annotations

import base64
import hashlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from hdpo.agent.images import decode_image
from hdpo.errors import DataError
from hdpo.report.document import to_json
from hdpo.report.pieces import Pieces
from hdpo.report.rows import Sheet
from hdpo.report.shelf import Dump, Shelf
from hdpo.state.dump import encode_image

BUDGET = 12 * 10**6         # bytes of JSON, pictures in base64 included
SIDE = 640                  # longest side of a picture, pixels
STEPS, GROUPS, TASKS, EACH = 12, 6, 60, 3
_MOST_TOKENS, _MOST_TEXT = 6000, 20_000     # a longer row comes without its tokens, a longer block is cut
Choice = tuple[Dump, int]


def embed(shelves: list[Shelf], tasks: list[str], left_out: list[str], budget: int = BUDGET) -> dict[str, Any]:
    """What the page's script reads where no server is: {"dumps", "sheets", "rows", "tokens", "pictures"}; `tasks` come first.

    A dump that can't be read is named in `left_out`.
    """
    dumps: list[dict[str, Any]] = []
    out: dict[str, Any] = {"dumps": dumps, "sheets": {}, "rows": {}, "tokens": {}, "pictures": {}}
    for run, shelf in enumerate(shelves):
        held, used = _Held(shelf, run, out), 0
        chosen: dict[str, dict[int, None]] = defaultdict(dict)
        found, torn = shelf.dumps(), dict[str, str]()
        for dump, row in _choices(shelf, found, tasks, torn):
            if row in chosen[dump.id]:
                continue
            try:
                used += held.add(dump, row)
            except DataError as exc:
                held.drop(dump, row)
                torn[dump.id] = str(exc)
                continue
            if used > budget // len(shelves):
                held.drop(dump, row)
                break
            chosen[dump.id][row] = None
        for dump in found:
            if rows := sorted(chosen[dump.id]):
                dumps.append(dump.public(run))
                out["sheets"][f"{run}/{dump.id}"] = _part(shelf.sheet(dump.id), rows)
        left_out += torn.values()
    return out


def _readable(shelf: Shelf, dumps: list[Dump], torn: dict[str, str]) -> list[Dump]:
    found = []
    for dump in dumps:
        try:
            shelf.sheet(dump.id)
            found.append(dump)
        except DataError as exc:
            torn[dump.id] = str(exc)
    return found


def _choices(shelf: Shelf, dumps: list[Dump], tasks: list[str], torn: dict[str, str]) -> Iterator[Choice]:
    evaluations = _readable(shelf, [dump for dump in dumps if dump.kind == "eval"], torn)
    places = {dump.id: {task: row for row, task in reversed(list(enumerate(shelf.sheet(dump.id)["columns"]["task"])))}
              for dump in evaluations}
    for task in tasks:
        yield from ((dump, places[dump.id][task]) for dump in evaluations if task in places[dump.id])
    steps = [dump for dump in dumps if dump.kind == "step"]
    count = min(STEPS, len(steps))
    spread = _readable(shelf, [steps[round(index * (len(steps) - 1) / max(1, count - 1))] for index in range(count)], torn)
    groups = {dump.id: _groups(shelf.sheet(dump.id)) for dump in spread}
    for rank in range(GROUPS):
        for dump in reversed(spread):
            yield from ((dump, row) for row in (groups[dump.id][rank] if rank < len(groups[dump.id]) else ()))
    more = list(dict.fromkeys(task for dump in evaluations[::-1] for task in _contrast(shelf.sheet(dump.id))))[:TASKS]
    for task in more:
        yield from ((dump, places[dump.id][task]) for dump in evaluations if task in places[dump.id])
    for dump in _readable(shelf, [dump for dump in dumps if dump.kind == "curation"], torn):
        yield from ((dump, row) for row in _few_of_each(shelf.sheet(dump.id)))


def _groups(sheet: Sheet) -> list[list[int]]:
    """Rows of each prompt, those with the largest advantages first, sources in turn."""
    columns = sheet["columns"]
    groups: dict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(columns["prompt"]):
        groups[prompt].append(row)
    turns: dict[str, int] = defaultdict(int)
    order: list[tuple[int, int, list[int]]] = []
    for rows in sorted(groups.values(), key=lambda rows: -sum(abs(columns["a_acc"][row] or 0) + abs(columns["a_tool"][row] or 0)
                                                              for row in rows)):
        source = columns["source"][rows[0]]
        order.append((turns[source], len(order), rows))
        turns[source] += 1
    return [rows for _, _, rows in sorted(order)]


def _contrast(sheet: Sheet) -> list[str]:
    """Tasks, those that are wrong or unscored first, then sources in turn."""
    columns, turns = sheet["columns"], defaultdict[str, int](int)
    order: list[tuple[bool, int, int, str]] = []
    for row, task in enumerate(columns["task"]):
        source = columns["source"][row]
        order.append((columns["verdict"][row] == "correct", turns[source], row, task))
        turns[source] += 1
    return [task for *_, task in sorted(order)]


def _few_of_each(sheet: Sheet) -> list[int]:
    columns, seen = sheet["columns"], defaultdict[tuple[str, ...], int](int)
    found = []
    for row in range(sheet["n"]):
        key = columns["stage"][row], columns["reason"][row], columns["source"][row]
        seen[key] += 1
        if seen[key] <= EACH:
            found.append(row)
    return found


def _part(sheet: Sheet, rows: list[int]) -> Sheet:
    return {**sheet, "n": len(rows), "all": sheet["n"], "rows": rows,
            "columns": {name: [values[row] for row in rows] for name, values in sheet["columns"].items()}}


class _Held:
    """Fills the page's rows, tokens and pictures; `add` says how many bytes more they are."""

    def __init__(self, shelf: Shelf, run: int, out: dict[str, Any]) -> None:
        self._shelf, self._run, self._out = shelf, run, out
        self._pieces = Pieces(shelf.folder)

    def add(self, dump: Dump, row: int) -> int:
        name, used = f"{self._run}/{dump.id}", 0
        detail = self._shelf.row(dump.id, row)
        for block in detail["blocks"]:
            if len(block["text"]) > _MOST_TEXT:
                block["text"] = block["text"][:_MOST_TEXT] + f" … ({len(block['text']) - _MOST_TEXT} more characters)"
            block["pictures"], more = self._pictures(dump, row, block.get("pictures", ()))
            used += more
        self._out["rows"].setdefault(name, {})[row] = detail
        used += len(to_json(detail))
        if dump.kind == "curation":
            return used
        tokens = self._shelf.tokens(dump.id, row)
        if len(tokens["ids"]) <= _MOST_TOKENS:
            tokens["pieces"] = self._pieces.texts(tokens["ids"])
            self._out["tokens"].setdefault(name, {})[row] = tokens
            used += len(to_json(tokens))
        return used

    def drop(self, dump: Dump, row: int) -> None:
        for kind in ("rows", "tokens"):
            self._out[kind].get(f"{self._run}/{dump.id}", {}).pop(row, None)

    def _pictures(self, dump: Dump, row: int, places: Any) -> tuple[list[str | None], int]:
        keys: list[str | None] = []
        used = 0
        for place in places:
            try:
                data = self._shelf.picture(dump.id, row, place)
                key = hashlib.sha256(data).hexdigest()[:20]
                if key not in self._out["pictures"]:
                    small = encode_image(decode_image(data, "picture"), SIDE)
                    kind = "png" if small.startswith(b"\x89PNG") else "jpeg"
                    self._out["pictures"][key] = f"data:image/{kind};base64,{base64.b64encode(small).decode()}"
                    used += len(self._out["pictures"][key])
            except DataError:
                key = None
            keys.append(key)
        return keys, used
