"""Rows that a curation kept or dropped, in the words of rows.py: sheets and conversations."""
from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from hdpo.agent.parse import extract_answer

SHEET = ("source", "source_file", "source_row", "stage", "reason", "detail", "messages")
DETAIL = (*SHEET, "extra_info", "reward_model")
OPTIONAL = {"stage", "reason", "detail", "reward_model"}
SEARCH = ("source", "source_file", "reason", "detail", "messages", "extra_info")

FACETS = {"stage": "stage", "reason": "reason", "source": "source", "tools": "tool use"}
SORTS = {"turns": "turns", "length": "characters"}
_SHORT = 180


def sheet(table: pa.Table) -> dict[str, Any]:
    rows = table.to_pylist()
    columns: dict[str, list[Any]] = {name: [] for name in (
        "title", "task", "sample", "prompt", "thumb", "answer", *FACETS, *SORTS)}
    for number, row in enumerate(rows):
        messages = row["messages"] or []
        text = " ".join(_question(messages).split()) or row.get("detail") or ""
        called = any("<tool_call>" in message["content"] for message in messages if message["role"] == "assistant")
        for name, value in {
                "title": text[:_SHORT], "task": f'{row["source_file"]} {row["source_row"]}', "sample": 0, "prompt": number,
                "thumb": number if any("<image>" in message["content"] for message in messages) else None,
                "answer": _answer(messages), "stage": _stage(row), "reason": _reason(row), "source": row["source"],
                "tools": ["called" if called else "no call"], "turns": len(messages),
                "length": sum(len(message["content"]) for message in messages)}.items():
            columns[name].append(value)

    def differs(name: str) -> bool:
        return any(value != columns[name][0] for value in columns[name])
    return {"n": len(rows), "columns": columns, "facets": [[n, label] for n, label in FACETS.items() if rows and differs(n)],
            "sorts": [[n, label] for n, label in SORTS.items() if rows and differs(n)]}


def detail(row: dict[str, Any]) -> dict[str, Any]:
    messages = row["messages"] or []
    truth = (row.get("reward_model") or {}).get("ground_truth")
    return {
        "kind": "curation", "title": _question(messages), "task": f'{row["source_file"]} row {row["source_row"]}',
        "source": row["source"], "stage": _stage(row), "reason": _reason(row), "detail": row.get("detail") or "",
        "extra": json.loads(row["extra_info"] or "{}"), "truth": [truth] if truth else [], "answer": _answer(messages),
        "blocks": list(_blocks(messages))}


def _blocks(messages: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    place, asked = 0, False
    for message in messages:
        text, count = message["content"].replace("<image>", "").strip(), message["content"].count("<image>")
        pictures, place = list(range(place, place + count)), place + count
        if message["role"] == "assistant":
            yield {"kind": "turn", "text": text, "call": None, "pictures": pictures, "recorded": True}
        elif message["role"] == "user" and asked:
            yield {"kind": "observation", "name": "tool", "ok": True, "ours": False, "text": text, "pictures": pictures}
        else:
            asked = asked or message["role"] == "user"
            yield {"kind": "prompt", "text": "", "short": text, "role": message["role"], "pictures": pictures}


def _question(messages: list[dict[str, str]]) -> str:
    text = next((message["content"] for message in messages if message["role"] == "user"), "")
    return text.replace("<image>", "").strip()


def _answer(messages: list[dict[str, str]]) -> str | None:
    return extract_answer(messages[-1]["content"]) if messages and messages[-1]["role"] == "assistant" else None


def _stage(row: dict[str, Any]) -> str:
    stage = row.get("stage")
    return "kept" if stage is None else "reading" if stage == "read" else f"stage {stage}"


def _reason(row: dict[str, Any]) -> str:
    return (row.get("reason") or "kept").replace("_", " ")
