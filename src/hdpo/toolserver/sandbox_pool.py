"""Sessions over templates: what the two backends share."""
from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hdpo import oddities
from hdpo.toolserver.blame import Blame, slug, who_ended, who_took_the_time
from hdpo.toolserver.sandbox_link import SessionLink, Template
from hdpo.toolserver.sessions import CellResult, SandboxError, SessionLostError

log = logging.getLogger(__name__)
RETRY_S = 0.2
"""Pause before a second attempt at a session, long enough for the loop to learn that a template has died, seconds."""


@dataclass(slots=True)
class Session:
    """A trajectory's images and its present connection, None before the first and after it was given up."""

    images: Sequence[bytes]              # read when they are sent, and not kept
    link: SessionLink | None = None
    template: Template | None = None     # of the connection

    @property
    def alone(self) -> bool:
        return self.template is not None and self.template.alone

    async def give_up(self) -> str:
        """Forget a connection that ended; how it did. Raises SessionLostError unless that was its own code's doing."""
        link, template = self.link, self.template
        assert link is not None and template is not None
        self.link = None
        evidence = await link.evidence()
        link.close()
        blame, how = who_ended(evidence, abandoned=link.abandoned, alone=template.alone)
        if blame is not Blame.POLICY and not link.abandoned:
            blame, how = who_ended(evidence, template_ended=await template.ended_too(), alone=template.alone)
        if blame is not Blame.POLICY:
            oddities.count(f"session/{slug(how)}")
            raise SessionLostError(how)
        return how


class SessionPool:
    """Sessions over templates that listen on unix sockets: what the backends share.

    Implements `hdpo.toolserver.sessions.Sandbox`; a backend provides live templates.
    """

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}

    async def _template_for(self, session_id: str) -> Template:
        """A live template, started if necessary. Raises SandboxError."""
        raise NotImplementedError

    def _open_failed(self, session_id: str) -> None:
        """The template for this session did not give one."""

    async def open(self, session_id: str, images: Sequence[bytes]) -> None:
        """Start a session. Raises SandboxError when a second attempt fails too."""
        self._sessions[session_id] = Session(images)
        await self._linked(session_id)

    async def _linked(self, session_id: str) -> SessionLink:
        session = self._sessions[session_id]
        if session.link is None:
            session.template, session.link = await self._connect(session_id, session.images)
            if self._sessions.get(session_id) is not session:   # closed while it was being opened
                session.link.close()
        return session.link

    async def _connect(self, session_id: str, images: Sequence[bytes]) -> tuple[Template, SessionLink]:
        try:
            template = await self._template_for(session_id)
            return template, await SessionLink.open(template, images)
        except SandboxError as exc:   # the template may just have died: `_template_for` replaces it
            self._open_failed(session_id)
            log.warning("%s; trying once more", exc)
            await asyncio.sleep(RETRY_S)
            template = await self._template_for(session_id)
            return template, await SessionLink.open(template, images)

    async def run(self, session_id: str, code: str, timeout_s: float) -> CellResult:
        """Execute one cell; see the protocol."""
        session = self._sessions.get(session_id)
        if session is None:
            raise SandboxError("the session was closed")
        how = ""
        ended_before = session.link is not None and not session.link.alive
        if ended_before:
            how = await session.give_up()
        link = await self._linked(session_id)
        status, result = await link.run(code, timeout_s)
        if status == "died" and session_id in self._sessions:     # not closed in the meantime
            how = await session.give_up()
        elif status in ("died", "killed"):
            session.link = None
        if result.timed_out:
            blame, why = who_took_the_time(link.said, session.alone)
            if blame is not Blame.POLICY:
                oddities.count(f"session/{slug(why)}")
                raise SandboxError(why) if status == "interrupted" else SessionLostError(why)
        return replace(result, restarted=True, ended=how) if ended_before or how else result

    async def close(self, session_id: str) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None and session.link is not None:
            session.link.close()

    async def shutdown(self) -> None:
        for session_id in list(self._sessions):
            await self.close(session_id)
