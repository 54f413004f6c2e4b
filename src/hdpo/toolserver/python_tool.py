"""The `python` tool: one cell in the trajectory's session, and the text and images it answers with."""
from __future__ import annotations

from hdpo.toolserver import layout
from hdpo.toolserver.sessions import Sandbox, Trajectory
from hdpo.toolserver.wire import Reply


async def run_python(sandbox: Sandbox, trajectory: Trajectory, code: str, timeout_s: float) -> Reply:
    """Execute `code`; opens the session at the first call. Raises SandboxError when the sandbox itself fails."""
    if not trajectory.session_open:
        trajectory.session_open = True     # before the wait: `finish` in the meantime must close what comes of it
        await sandbox.open(trajectory.session_id, list(trajectory.images))
    result = await sandbox.run(trajectory.session_id, code, timeout_s)
    restarted = result.restarted or trajectory.lost
    trajectory.lost = False
    notes = []
    if result.timed_out:
        notes.append(layout.timed_out(timeout_s, kept=not restarted))
    if restarted:
        notes.append(layout.SESSION_LOST)
    stderr = "\n".join(part for part in (result.stderr.strip("\n"), *notes) if part)
    text = layout.python_result(result.stdout, stderr, len(result.images))
    metrics = {"code_success": result.ok, "code_lines": code.count("\n") + 1, "session_restarted": restarted}
    return Reply(text, result.images, metrics=metrics, timed_out=result.timed_out)
