"""Stage 1, hallucinated dynamics: every recorded call is made again, in order, in one session with the row's pictures.

Code that fails drops the row, and so does an observation that the code doesn't give; or, by setting, the real one takes its
place. Where they agree the real one is kept as well: it is what the environment says in RL, word for word. A session that ended
or a cell that took too long may be a busy machine's doing: such a row is run again from its start before it is dropped.
"""
from __future__ import annotations

import json
import uuid
from dataclasses import replace

from hdpo.agent.parse import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, ParsedCall
from hdpo.config.curation import ExecutionSettings
from hdpo.curation.record import Observation, Outcome, Record, Step, Waits
from hdpo.curation.stages.compare import same_pictures, same_text, streams
from hdpo.errors import ToolServerError
from hdpo.protocols import ToolBackend, ToolResult

ATTEMPTS = 3
_AGAIN = ("session_ended", "execution_timed_out")


class Execution:
    """`backend` runs calls (a tool server's client)."""

    def __init__(self, backend: ToolBackend, settings: ExecutionSettings) -> None:
        self._backend, self._settings = backend, settings

    async def __call__(self, record: Record) -> Outcome:
        """Raises Waits when the tool server failed, which says nothing about the row."""
        for _ in range(ATTEMPTS):
            outcome = await self._once(record)
            if outcome.reason not in _AGAIN:
                break
        return outcome

    async def _once(self, record: Record) -> Outcome:
        session = f"curate-{uuid.uuid4().hex}"
        steps: list[Step] = []
        rewritten = 0
        try:
            for number, step in enumerate(record.steps, start=1):
                if step.call.name != "python" and self._settings.search != "replay":
                    if self._settings.search == "drop":
                        return Outcome(record, "search_call", f"call {number} is a {step.call.name}")
                    steps.append(step)
                    continue
                result = await self._backend.call(session, _action(step.call), record.task())
                problem, detail = self._compare(step, result)
                if problem == "observation_mismatch" and self._settings.mismatch == "rewrite":
                    rewritten += 1
                elif problem:
                    return Outcome(record, problem, f"call {number}: {detail}")
                steps.append(replace(step, observation=Observation(result.text, tuple(result.images))))
        except ToolServerError as exc:
            raise Waits(str(exc)) from exc
        finally:
            await self._backend.finish(session)
        searches = sum(step.call.name != "python" for step in record.steps)
        noted = {"rewritten_observations": rewritten} if rewritten else {}
        return Outcome(replace(record, steps=tuple(steps)).noted(**noted, **({"searches": searches} if searches else {})))

    def _compare(self, step: Step, result: ToolResult) -> tuple[str, str]:
        """("", "") where the recorded observation holds; else (reason, what was found)."""
        if result.metrics.get("timed_out"):
            return "execution_timed_out", "the code ran longer than its limit"
        if not result.ok and result.metrics.get("session_restarted"):
            return "session_ended", _last_line(result.text)
        if not result.ok:
            return "execution_failed", _last_line(result.text)
        if step.call.name != "python":
            return "", ""           # a replayed search is what the cache says
        (recorded, recorded_errors), (real, _) = streams(step.observation.text), streams(result.text)
        if _is_traceback(recorded_errors) or _is_traceback(recorded):
            return "recorded_failure", _last_line(recorded_errors or recorded)
        settings = self._settings
        if not same_text(recorded, real, settings.number_tolerance, names_pictures=bool(result.images)):
            return "observation_mismatch", f"recorded {recorded[:120]!r}, ran {real[:120]!r}"
        if not same_pictures(step.observation.images, result.images, settings.picture_tolerance):
            return "observation_mismatch", (f"recorded {len(step.observation.images)} pictures, ran {len(result.images)}"
                                            if len(step.observation.images) != len(result.images) else "the picture differs")
        return "", ""


def _action(call: ParsedCall) -> str:
    return TOOL_CALL_OPEN + json.dumps({"name": call.name, "arguments": call.arguments}) + TOOL_CALL_CLOSE


def _is_traceback(text: str) -> bool:
    return "Traceback (most recent call last)" in text


def _last_line(text: str) -> str:
    lines = [line for line in text.replace("```", "").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no message"
