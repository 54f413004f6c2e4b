"""A trajectory as scoring sees it: an answer, a truth, an end."""
from __future__ import annotations

from hdpo.types import EndReason, Task, Trajectory


def trajectory(answer: str | None, truth: str | list[str] = "a red kite", *, index: int = 0, task: str = "t",
               end: EndReason = EndReason.ANSWERED, source: str = "web") -> Trajectory:
    text = "<reason>hm</reason>" + ("" if answer is None else f"<answer>{answer}</answer>")
    row = Task(task, source, [{"role": "user", "content": "<image>What flies there?"}], (), truth)
    return Trajectory(row, index, [1, 2], [0, 1], [0.0, -1.0], 1, (), (), end, (text,),
                      error="" if end.scorable else "sandbox is down")
