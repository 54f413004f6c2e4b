"""Rows of a rollout dump as the browser shows them: columns to list, filter and sort by; a conversation; its tokens.

A sheet is {"n", "facets", "sorts", "columns"}: columns are lists of equal length; a facet's value is a string, or a list of them
where a row has several. A conversation is a list of blocks, whose pictures are places in the dump's row.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Sheet = dict[str, Any]

SHEET = ("task_id", "data_source", "tool_needed", "sample_index", "question", "calls", "answer", "ground_truth", "verdict", "by",
         "end", "reward_accuracy", "reward_tool", "correct", "format_ok", "scored", "advantages", "num_tool_calls", "mask",
         "seconds", "num_prompt_images", "index")
DETAIL = (*SHEET, "prompt", "turns", "observations", "detail", "error", "prompt_length", "weight_version")
SEARCH = ("task_id", "data_source", "question", "turns", "observations", "answer", "ground_truth", "detail", "error", "calls")
TOKENS = ("step", "index", "sample_index", "token_ids", "mask", "log_probs", "advantages", "prompt_length")
OPTIONAL = {"index", "weight_version"}      # dumps of earlier runs may lack them
HISTORY = ("task_id", "verdict", "num_tool_calls")

FACETS = {"source": "source", "need": "need", "verdict": "verdict", "by": "decided by", "tools": "tool use", "end": "end",
          "format": "format"}
SORTS = {"a_acc": "accuracy advantage", "a_tool": "tool advantage", "reward": "accuracy reward", "tool_reward": "tool reward",
         "calls": "calls", "sampled": "sampled tokens", "seconds": "seconds"}
_SHORT = 180        # characters of a question or answer in a list


def sheet(table: pa.Table) -> Sheet:
    """Of the columns SHEET, in their order. `prompt` numbers the prompts, `thumb` is the row whose picture stands for it."""
    sampled = _sums(table.column("mask"))
    rows = table.drop_columns(["mask"]).to_pylist()
    columns: dict[str, list[Any]] = {name: [] for name in (
        "title", "task", "sample", "prompt", "thumb", "answer", *FACETS, *SORTS, "qualifies")}
    prompts: dict[tuple[Any, Any], tuple[int, int]] = {}
    for number, row in enumerate(rows):
        group = row.get("index")
        key = (row["task_id"], group if group is not None and group >= 0 else None)
        prompt, first = prompts.setdefault(key, (len(prompts), number))
        answer = row["answer"]
        advantages = row["advantages"] or []
        for name, value in {
                "title": _cut(row["question"]), "task": row["task_id"], "sample": row["sample_index"], "prompt": prompt,
                "thumb": first if row["num_prompt_images"] else None,
                "answer": None if answer is None else _cut(answer),
                "source": row["data_source"], "need": need(row["tool_needed"]), "verdict": row["verdict"], "by": row["by"],
                "tools": tool_use(json.loads(row["calls"])), "end": row["end"].replace("_", " "),
                "format": "right" if row["format_ok"] else "wrong",
                "a_acc": advantages[0] if advantages else None, "a_tool": advantages[1] if len(advantages) > 1 else None,
                "reward": row["reward_accuracy"], "tool_reward": row["reward_tool"], "calls": row["num_tool_calls"],
                "sampled": sampled[number], "seconds": round(row["seconds"], 3),
                "qualifies": bool(row["scored"] and row["correct"])}.items():
            columns[name].append(value)
    return _sheet(columns, len(rows))


def _sheet(columns: dict[str, list[Any]], count: int) -> Sheet:
    """Only what tells rows apart can be filtered or sorted by."""
    def differs(name: str) -> bool:
        return any(value != columns[name][0] for value in columns[name])
    return {"n": count, "facets": [[name, label] for name, label in FACETS.items() if count and differs(name)],
            "sorts": [[name, label] for name, label in SORTS.items() if count and differs(name)], "columns": columns}


def _sums(lists: pa.ChunkedArray) -> list[int]:
    """The sum of each list, without a Python object for each of its numbers, of which a step has millions."""
    lengths = pc.list_value_length(lists).to_numpy()
    totals = np.concatenate([[0], np.cumsum(pc.list_flatten(lists).to_numpy(), dtype=np.int64)])
    ends = np.cumsum(lengths)
    found: list[int] = (totals[ends] - totals[ends - lengths]).tolist()
    return found


def need(known: bool | None) -> str:
    return {True: "tool needed", False: "not needed", None: "not known"}[known]


def tool_use(calls: Sequence[dict[str, Any]]) -> list[str]:
    """The kinds that a rollout is listed under: whether it called, which tools, and whether a call failed, and by whose fault."""
    if not calls:
        return ["no call"]
    found = ["called", *dict.fromkeys(call["name"] or "not a call" for call in calls)]
    if any(not call["ok"] and not call["infrastructure"] for call in calls):
        found.append("failed call")
    return found + (["failed for our own reasons"] if any(call["infrastructure"] for call in calls) else [])


def detail(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the columns DETAIL as a conversation."""
    calls: list[dict[str, Any]] = json.loads(row["calls"])
    blocks: list[dict[str, Any]] = [{"kind": "prompt", "text": row["prompt"], "short": row["question"],
                                     "pictures": list(range(row["num_prompt_images"]))}]
    place = row["num_prompt_images"]
    for index, text in enumerate(row["turns"]):
        call = calls[index] if index < len(calls) else None
        blocks.append({"kind": "turn", "text": text, "call": call and {"name": call["name"], "arguments": call["arguments"]}})
        if call is not None:
            count = call["num_images"]
            blocks.append({"kind": "observation", "name": call["name"], "ok": call["ok"], "ours": call["infrastructure"],
                           "seconds": call["seconds"], "text": row["observations"][index],
                           "pictures": list(range(place, place + count))})
            place += count
    if row["error"]:
        blocks.append({"kind": "error", "text": row["error"]})
    return {
        "kind": "rollout", "title": row["question"], "task": row["task_id"], "sample": row["sample_index"],
        "source": row["data_source"], "need": need(row["tool_needed"]), "truth": row["ground_truth"], "answer": row["answer"],
        "verdict": row["verdict"], "by": row["by"], "detail": row["detail"], "end": row["end"].replace("_", " "),
        "reward": row["reward_accuracy"], "tool_reward": row["reward_tool"], "format_ok": row["format_ok"],
        "qualifies": bool(row["scored"] and row["correct"]), "scored": row["scored"], "advantages": row["advantages"] or [],
        "sampled": sum(row["mask"]), "length": len(row["mask"]), "prompt_length": row["prompt_length"],
        "seconds": row["seconds"], "tool_seconds": sum(call["seconds"] for call in calls),
        "weight_version": row.get("weight_version"), "blocks": blocks}


def tokens(row: dict[str, Any], trained: tuple[list[float], list[float]] | None) -> dict[str, Any]:
    """A row of the columns TOKENS. `trainer` and `updated` hold a number for each sampled token, or are None where the trainer
    did not compute the row (`trained`, see state/trained.py)."""
    return {"ids": row["token_ids"], "mask": row["mask"], "engine": [round(value, 5) for value in row["log_probs"]],
            "trainer": trained and trained[0], "updated": trained and (trained[1] or None),
            "advantages": row["advantages"] or [], "prompt_length": row["prompt_length"]}


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHORT else text[:_SHORT] + "…"
