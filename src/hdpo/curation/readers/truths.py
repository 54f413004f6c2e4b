"""The source's own answer to a question, where it gives one that can be read."""
from __future__ import annotations

from typing import Any

from hdpo.data.rows import checked_truth
from hdpo.errors import DataError


def truth_of(value: Any) -> str:
    """As text; of several alternatives the first; "" where there is none: then the trajectory's answer counts."""
    try:
        found = checked_truth({"ground_truth": value})
    except DataError:
        return ""
    return found if isinstance(found, str) else found[0]
