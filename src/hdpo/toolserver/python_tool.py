"""The `python` tool: one cell in the trajectory's session, and the text and images it answers with."""
from __future__ import annotations

from hdpo import descriptors
from hdpo.toolserver import layout
from hdpo.toolserver.sessions import Sandbox, SandboxError, SessionLostError, Trajectory
from hdpo.toolserver.wire import Reply

SESSION_FILES = 3
"""Files that a session keeps open in the server."""


def wants_session(trajectory: Trajectory) -> bool:
    """Whether its first cell is to come."""
    return not (trajectory.session_open or trajectory.lost)


async def open_session(sandbox: Sandbox, trajectory: Trajectory) -> None:
    """Before the first cell. Raises SandboxError."""
    if not descriptors.room(SESSION_FILES):
        raise SandboxError(descriptors.too_many())
    trajectory.session_open = True     # before the wait: `finish` in the meantime must close what comes of it
    await sandbox.open(trajectory.session_id, trajectory.images)


async def run_python(sandbox: Sandbox, trajectory: Trajectory, code: str, timeout_s: float,
                     words: layout.Reference = layout.REFERENCE) -> Reply:
    """Execute `code` in the trajectory's session. Raises SandboxError when the sandbox fails.

    SessionLostError is for good: no later cell of the trajectory is executed without what the earlier ones had set.
    """
    if not trajectory.lost:
        try:
            return await _run_cell(sandbox, trajectory, code, timeout_s, words)
        except SessionLostError as exc:
            trajectory.lost = str(exc)
    raise SessionLostError(f"the session of this trajectory was lost: {trajectory.lost}")


async def _run_cell(sandbox: Sandbox, trajectory: Trajectory, code: str, timeout_s: float, words: layout.Reference) -> Reply:
    result = await sandbox.run(trajectory.session_id, code, timeout_s)
    notes = []
    if result.timed_out:
        notes.append(layout.timed_out(timeout_s, kept=not result.restarted))
    if trajectory.calls_lost:
        notes.append(layout.session_gone(trajectory.calls_lost))
        trajectory.calls_lost = 0
    if result.restarted:
        notes.append(f"The session ended: {result.ended}.\n" * bool(result.ended) + layout.SESSION_RESTARTED)
    stderr = "\n".join(part for part in (result.stderr.strip("\n"), *notes) if part) if notes else result.stderr
    images = words.images(result.images, result.opened, result.ok)
    stdout = result.stdout.removesuffix("\n") if result.ends_with_value else result.stdout
    text = words.python_result(stdout, stderr, len(images), result.ok)
    metrics = {"code_success": result.ok, "code_lines": code.count("\n") + 1, "session_restarted": result.restarted}
    return Reply(text, images, metrics=metrics, timed_out=result.timed_out)
