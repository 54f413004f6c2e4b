"""Trajectories side by side: the same task before and after training, turn by turn, with the pictures the model saw.

All text of models, tools and data is escaped; pictures become data URLs of re-checked image types.
"""
from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from hdpo.state.dump import DumpedRollout

SCAN_COLUMNS = ("task_id", "data_source", "tool_needed", "num_tool_calls", "correct", "scored")
"""What `choose` needs, so that a large dump is scanned without pictures and tokens."""

_SEGMENT = re.compile(r"<(reason|answer|tool_call)>(.*?)</\1>", re.DOTALL)
_MAX_TEXT = 4000        # characters of one block shown; the dump has the rest


def choose(before: Sequence[DumpedRollout], after: Sequence[DumpedRollout], limit: int = 10) -> list[tuple[str, str]]:
    """(task id, why it is shown), at most `limit`: calls kept where needed, dropped where not, and failures too.

    Each kind goes round the data sources, so that every sort of task is seen.
    """
    earlier = {row.task_id: row for row in before}
    pairs = [(earlier[row.task_id], row) for row in after if row.task_id in earlier]
    kinds: list[tuple[int, str, Callable[[DumpedRollout, DumpedRollout], bool]]] = [
        (4, "a tool is needed, and called", lambda old, new: bool(new.tool_needed and new.num_tool_calls and new.correct)),
        (4, "a needless call, dropped", lambda old, new: bool(not new.tool_needed and old.num_tool_calls
                                                              and not new.num_tool_calls and new.correct)),
        (1, "still calls without need", lambda old, new: new.tool_needed is False and bool(new.num_tool_calls)),
        (1, "wrong after training", lambda old, new: new.scored and not new.correct),
        (limit, "", lambda old, new: True),
    ]
    chosen: dict[str, str] = {}
    for count, why, fits in kinds:
        found = [new for old, new in pairs if new.task_id not in chosen and fits(old, new)]
        chosen |= dict.fromkeys(_round_robin(found)[:min(count, limit - len(chosen))], why)
    return list(chosen.items())


def _round_robin(rows: Sequence[DumpedRollout]) -> list[str]:
    """Task ids: the first of every data source, then the second of every one, and so on."""
    place: Counter[str] = Counter()
    order = []
    for index, row in enumerate(rows):
        order.append((place[row.data_source], index, row.task_id))
        place[row.data_source] += 1
    return [task_id for _, _, task_id in sorted(order)]


def task_card(why: str, columns: Sequence[tuple[str, DumpedRollout]]) -> str:
    """One task: question and picture, then one column per (title, trajectory)."""
    first = columns[0][1]
    need = {True: '<span class="tag">tool needed</span>', False: '<span class="tag">no tool needed</span>', None: ""}
    pictures = "".join(_picture(image) for image in first.images[:first.num_prompt_images])
    truth = " or ".join(first.ground_truth)
    body = "".join(_column(title, row) for title, row in columns)
    return (f'<article class="task"><header><p class="why">{escape(why)}</p><h3>{escape(first.question)}</h3>'
            f'<p class="meta">{need[first.tool_needed]}<span>{escape(first.data_source)}</span>'
            f'<span>{escape(first.task_id)}</span><span>truth: <b>{escape(truth)}</b></span></p></header>'
            f'<div class="body"><div class="prompt-pictures">{pictures}</div>'
            f'<div class="columns">{body}</div></div></article>')


def _column(title: str, row: DumpedRollout) -> str:
    calls = "no call" if not row.num_tool_calls else "1 call" if row.num_tool_calls == 1 else f"{row.num_tool_calls} calls"
    images = iter(row.images[row.num_prompt_images:])
    turns = []
    for index, text in enumerate(row.turns):
        call = row.calls[index] if index < len(row.calls) else None
        turns.append(f'<li class="turn">{_turn(text, call, row.answer if index == len(row.turns) - 1 else None)}</li>')
        if call is not None:
            returned = "".join(_picture(image) for image, _ in zip(images, range(call["num_images"]), strict=False))
            text = row.observations[index]
            turns.append(f'<li class="observation{"" if call["ok"] else " failed"}"><h5>{_observation_title(call)}</h5>'
                         f'{_pre(text.replace("<image>", "") if returned else text)}{returned}</li>')
    if row.error:
        turns.append(f'<li class="observation failed"><h5>ended for our own reasons</h5>{_pre(row.error)}</li>')
    answer = "no answer" if row.answer is None else row.answer or "empty answer"
    return (f'<section><h4>{escape(title)}<span class="tag">{calls}</span></h4><ol>{"".join(turns)}</ol>'
            f'<p class="verdict {escape(row.verdict)}"><b>{escape(answer)}</b>'
            f'<span>{escape(row.verdict)}, by {escape(row.by)}; {escape(row.end.replace("_", " "))}; '
            f'{sum(row.mask)} tokens, {row.seconds:.1f} s</span></p></section>')


def _observation_title(call: dict[str, Any]) -> str:
    failed = " (our failure)" if call["infrastructure"] else "" if call["ok"] else " (failed)"
    return f'{escape(call["name"] or "tool")} returned{failed}, {call["seconds"]:.2f} s'


def _turn(text: str, call: dict[str, Any] | None, verdict_answer: str | None) -> str:
    """The sampled text with its known blocks set apart; whatever is outside of them is shown as it is. The answer that
    the verdict's line repeats is left out."""
    parts, position = [], 0
    for found in _SEGMENT.finditer(text):
        parts.append(_pre(text[position:found.start()]))
        position = found.end()
        tag, inner = found[1], found[2].strip()
        if tag == "tool_call":
            parts.append(_call(inner, call))
        elif tag == "reason":
            parts.append(f'<p class="reason">{_cut(inner)}</p>')
        elif inner != verdict_answer:
            parts.append(f'<p class="answer">{_cut(inner)}</p>')
    parts.append(_pre(text[position:]))
    return "".join(parts)


def _call(action: str, call: dict[str, Any] | None) -> str:
    if call is None:
        return f"<h5>call, not executed</h5>{_pre(action, 'code')}"
    arguments = call["arguments"]
    shown = next(iter(arguments.values())) if len(arguments) == 1 else json.dumps(arguments, ensure_ascii=False)
    return f'<h5>calls {escape(call["name"] or "nothing usable")}</h5>{_pre(str(shown) if arguments else action, "code")}'


def _pre(text: str, kind: str = "text") -> str:
    return f'<pre class="{kind}">{_cut(text.strip())}</pre>' if text.strip() else ""


def _cut(text: str) -> str:
    more = f" … ({len(text) - _MAX_TEXT} more characters)" if len(text) > _MAX_TEXT else ""
    return escape(text[:_MAX_TEXT]) + more


def _picture(image: bytes) -> str:
    """Only the two types the dump writes; anything else is not put into the page."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg" if image.startswith(b"\xff\xd8") else None
    if kind is None:
        return ""
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(image).decode()}">'
