"""Raw values of a row -> checked values. Pure functions; each raises DataError, one line, for what no sensible reading fits.

Values come from Parquet, JSON or a data set of any age: structs may be JSON text, flags 0 or "yes", dates dates. What leaves
this file is valid Unicode and plain JSON, so that dumps, spool and tool server take it as it is.
"""
from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from typing import Any

from hdpo import text
from hdpo.errors import DataError

_FLAGS = {"1": True, "true": True, "yes": True, "y": True, "0": False, "false": False, "no": False, "n": False}
_LEFT_OUT = object()


def row_text(value: str) -> str:
    return text.valid(value, "row")


def checked_messages(value: Any, column: str) -> list[dict[str, str]]:
    """[{"role", "content"}] with at least one user message; the list may be JSON text."""
    value = _parsed(value)
    if not isinstance(value, list) or not value:
        raise DataError(f"{column} must be a list of messages")
    messages = []
    for message in value:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{column}: every message needs role and content, both strings")
        messages.append({"role": row_text(role), "content": row_text(content)})
    if not any(m["role"] == "user" for m in messages):
        raise DataError(f"{column} holds no user message")
    return messages


def checked_truth(reward_model: Any) -> str | list[str]:
    """`ground_truth` of the struct (or its JSON text): a string, or the alternatives of a list or of {"target": list}.

    Numbers and booleans become text, nulls in a list are left out.
    """
    fields = _parsed(reward_model)
    if not isinstance(fields, Mapping):
        raise DataError('reward_model must be a struct, or JSON text, with "ground_truth"')
    truth = fields.get("ground_truth")
    if isinstance(truth, Mapping) and "target" in truth:
        truth = truth["target"]
    if not isinstance(truth, (list, tuple)):
        one = _truth(truth)
        if one is None:
            raise DataError("reward_model.ground_truth is empty: it must be a string or a list of strings")
        return one
    several = [one for one in map(_truth, truth) if one is not None]
    if not several:
        raise DataError("reward_model.ground_truth is an empty list: it must be a string or a list of strings")
    return several


def _truth(value: Any) -> str | None:
    """None for null and for text without a character; both say nothing."""
    if value is None or isinstance(value, str) and not value.strip():
        return None
    if isinstance(value, (str, int)) or isinstance(value, float) and math.isfinite(value):
        return row_text(str(value))
    raise DataError(f"reward_model.ground_truth must be a string or a list of strings, not {type(value).__name__}")


def checked_extra(value: Any) -> dict[str, Any]:
    """`extra_info` (a struct, JSON text or null) as plain JSON: dates as ISO text, binary values and nulls left out, and
    `tool_needed` true or false. `answer` repeats the ground truth and is left out, so that the rest may leave the trainer."""
    value = _parsed(value)
    if value is None or value == "":
        return {}
    if not isinstance(value, Mapping):
        raise DataError("extra_info must be a struct or the JSON text of an object")
    extra = _plain({key: item for key, item in value.items() if key != "answer"})
    if "tool_needed" in extra:
        extra["tool_needed"] = checked_flag(extra["tool_needed"], "extra_info.tool_needed")
    return extra


def checked_flag(value: Any, name: str) -> bool:
    """True or false, also written as 0 or 1, "yes" or "no"."""
    known = value if isinstance(value, bool) else _FLAGS.get(str(value).strip().lower().removesuffix(".0"))
    if known is None:
        raise DataError(f"{name} is {text.one_line(value, 40)}: it must be true or false")
    return known


def _parsed(value: Any) -> Any:
    """JSON text of a list or an object as what it says; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return row_text(value)
    if value is None or isinstance(value, (bytes, bytearray, memoryview)):
        return _LEFT_OUT
    if isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _LEFT_OUT
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, Mapping):
        items = {row_text(str(key)): _plain(item) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not _LEFT_OUT}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [item for item in map(_plain, value) if item is not _LEFT_OUT]
    return row_text(str(value))
