"""One call from its text to its reply: parse, dispatch, bound, and decide whose fault a failure is."""
from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hdpo import descriptors, oddities, text
from hdpo.agent.parse import MalformedCall, ParsedCall, parse_tool_call
from hdpo.errors import ConfigError, InfrastructureError
from hdpo.toolserver import layout
from hdpo.toolserver.counters import Counters
from hdpo.toolserver.image_cache import ImageCache
from hdpo.toolserver.image_search import ImageProvider, InTurn, run_image_search
from hdpo.toolserver.lens import SerperLens, Showcase
from hdpo.toolserver.picture_store import MissingPictures, PictureStore
from hdpo.toolserver.places import Places
from hdpo.toolserver.providers import TextProvider, hosted_provider
from hdpo.toolserver.python_tool import open_session, run_python, wants_session
from hdpo.toolserver.search_cache import CachedSearch
from hdpo.toolserver.sessions import Sandbox, Sessions, Trajectory
from hdpo.toolserver.settings import TOOLS, Settings
from hdpo.toolserver.text_search import TextIndex, run_text_search
from hdpo.toolserver.wire import Call, Reply

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Toolbox:
    """The tools a server offers and what they need. `sandbox`, `text`, `images` are None where a tool is not offered."""

    settings: Settings
    sandbox: Sandbox | None
    text: TextProvider | None
    images: ImageProvider | None
    pictures: PictureStore
    sessions: Sessions = field(init=False)
    openings: Places = field(init=False)
    cells: Places = field(init=False)
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        self.sessions = Sessions(self.sandbox, self.settings.idle_limit_s)
        self.openings = Places(self.settings.running_cells)
        self.cells = Places(self.settings.running_cells)

    @property
    def showcase(self) -> Showcase | None:
        """Query images a hosted search may fetch; None without one."""
        sources = self.images.sources if isinstance(self.images, InTurn) else ()
        return next((source.showcase for source in sources if isinstance(source, SerperLens)), None)

    @property
    def words(self) -> layout.Reference:
        return layout.LAYOUTS[self.settings.layout]

    @property
    def tools(self) -> list[str]:
        return [tool for tool, part in zip(TOOLS, (self.sandbox, self.text, self.images)) if part is not None]

    @property
    def _unknown(self) -> str:
        """How this server came not to know a trajectory that had a session."""
        return ("the tool server restarted, or closed it because nobody had called for "
                f"{self.settings.idle_limit_s:g} s (--idle-limit)")

    async def answer(self, call: Call) -> tuple[Reply, float]:
        """(reply, seconds the call waited for its turn). Never raises but for cancellation."""
        started = time.monotonic()
        if call.finish:
            await self.sessions.finish(call.trajectory_id)
            return Reply("", done=True), 0.0
        trajectory = self.sessions.get(call.trajectory_id)
        if trajectory is None:
            if call.images is None and call.image_keys is None and call.images_sent:
                return _need_images(True), 0.0
            try:
                images = await self._pictures_of(call)
            except MissingPictures as exc:
                return _need_images(exc.keys), 0.0
            except OSError as exc:
                return self._failed(f"pictures can't be kept: {text.one_line(exc)}"), 0.0
            if (trajectory := self.sessions.get(call.trajectory_id)) is None:      # not made by another call meanwhile
                trajectory = self._begin(call, images)
        if trajectory.python_calls < call.python_calls and not trajectory.lost:
            trajectory.lost = (f"{call.python_calls} Python calls were executed, of which this server knows "
                               f"{trajectory.python_calls}")
        waited = 0.0

        async def work() -> Reply:
            nonlocal waited
            waited = time.monotonic() - started
            return await self._guarded(trajectory, call)

        return await asyncio.shield(trajectory.once(call.request_id, work)), waited

    async def _pictures_of(self, call: Call) -> Sequence[bytes]:
        """Raises MissingPictures, or OSError."""
        if call.image_keys is not None:
            return self.pictures.hold(call.image_keys)
        return await asyncio.to_thread(self.pictures.take, call.images) if call.images else ()

    def _begin(self, call: Call, images: Sequence[bytes]) -> Trajectory:
        trajectory = self.sessions.create(call.trajectory_id, images, call.index,
                                          lost=self._unknown if call.expects_session else "")
        trajectory.calls_lost = 0 if call.request_id else self.sessions.journal.calls_lost(call.trajectory_id)
        return trajectory

    async def _guarded(self, trajectory: Trajectory, call: Call) -> Reply:
        parsed = parse_tool_call(call.action, self.tools)
        tool = parsed.name if isinstance(parsed, ParsedCall) else "none"
        if tool == "python":
            trajectory.python_calls += 1
            if not call.request_id:      # our own client knows itself what it expects
                self.sessions.journal.called(call.trajectory_id, trajectory.python_calls)
        started = time.monotonic()
        with oddities.collected() as met:
            reply = await self._attributed(trajectory, parsed)
        if reply.images:
            with contextlib.suppress(OSError):       # then it is remembered in memory
                reply = replace(reply, images=await asyncio.to_thread(self.pictures.keep, reply.images))
        self.counters.record(tool, _outcome(reply), time.monotonic() - started)
        return replace(reply, metrics=reply.metrics | {"oddities": dict(met)}) if met else reply

    async def _attributed(self, trajectory: Trajectory, parsed: ParsedCall | MalformedCall) -> Reply:
        try:
            return await self._dispatch(trajectory, parsed)
        except TimeoutError:
            problem = f"the call took longer than {self.settings.call_timeout_s:g} s"
        except InfrastructureError as exc:
            problem = descriptors.exhausted(exc) or text.one_line(exc)
        except Exception as exc:  # noqa: BLE001 - network boundary: a bug of ours is not the policy's fault
            problem = descriptors.exhausted(exc)
            if not problem:
                log.exception("a tool call failed")
                problem = f"internal error: {type(exc).__name__}"
        return self._failed(problem)

    @staticmethod
    def _failed(problem: str) -> Reply:
        log.warning("infrastructure failure: %s", problem)
        return Reply(f"Tool unavailable: {problem}", valid=False, infrastructure=True)

    async def _dispatch(self, trajectory: Trajectory, parsed: ParsedCall | MalformedCall) -> Reply:
        if isinstance(parsed, MalformedCall):
            return Reply(parsed.message, valid=False)
        if parsed.name not in self.tools:
            return Reply(layout.tool_not_offered(parsed.name, self.tools), valid=False)
        if parsed.name == "python":
            return await self._python(trajectory, parsed.arguments["code"])
        async with asyncio.timeout(self.settings.call_timeout_s):
            if parsed.name == "text_search":
                assert self.text is not None
                return await run_text_search(self.text, parsed.arguments["query"], self.words)
            return await self._image_search(trajectory, parsed.arguments)

    async def _python(self, trajectory: Trajectory, code: str) -> Reply:
        assert self.sandbox is not None
        if wants_session(trajectory):
            async with self.openings.take(), asyncio.timeout(self.settings.call_timeout_s):
                await open_session(self.sandbox, trajectory)
        async with self.cells.take(trajectory.cells_s) as taken:
            try:
                async with asyncio.timeout(self.settings.call_timeout_s):
                    return await run_python(self.sandbox, trajectory, code, self.settings.python_timeout_s, self.words)
            finally:
                trajectory.cells_s += taken()

    async def _image_search(self, trajectory: Trajectory, arguments: dict[str, Any]) -> Reply:
        assert self.images is not None
        if trajectory.image_searches >= self.settings.max_image_searches:
            return Reply(self.words.image_search_used(trajectory.image_searches), metrics={"deduplicated": True})
        reply = await run_image_search(self.images, trajectory.images, trajectory.index, arguments, self.words)
        trajectory.image_searches += reply.valid      # a mistaken call searched for nothing
        return reply

    async def close(self) -> None:
        if self.sandbox is not None:
            await self.sandbox.shutdown()
        for source in (self.text, self.images):
            if source is not None:
                await source.close()


def _need_images(which: bool | list[str]) -> Reply:
    return Reply("", valid=False, metrics={"need_images": which})


def _outcome(reply: Reply) -> str:
    if reply.infrastructure:
        return "infrastructure"
    if reply.metrics.get("session_restarted"):
        return "restarted"
    if reply.timed_out:
        return "timeout"
    return "ok" if reply.valid and reply.metrics.get("code_success", True) else "failed"


def make_toolbox(settings: Settings, pictures: PictureStore) -> Toolbox:
    """Build what `settings` asks for. Raises ConfigError or DataError when a named tool can't be served."""
    wanted = settings.tools or TOOLS
    pages = _make_text_search(settings) if "text_search" in wanted else None
    images = _make_image_search(settings) if "image_search" in wanted else None
    if "text_search" in settings.tools and pages is None:
        raise ConfigError("text_search: give --text-index FILE, or a key such as SERPER_API_KEY in the environment")
    if "image_search" in settings.tools and images is None:
        raise ConfigError("image_search: give --image-index FOLDER, --image-cache FILE, or --public-url with SERPER_API_KEY")
    return Toolbox(settings, _make_sandbox(settings) if "python" in wanted else None, pages, images, pictures)


def _make_image_search(settings: Settings) -> InTurn | None:
    sources: list[ImageProvider] = []
    if settings.image_cache:
        sources.append(ImageCache(settings.image_cache))
    if settings.image_index:
        from hdpo.toolserver.image_index import ImageIndex  # needs ImageHash, which only this tool uses
        sources.append(ImageIndex(settings.image_index))
    if settings.public_url:
        lens = SerperLens(settings.lens_key, settings.lens_url, Showcase(settings.public_url))
        lens.limit(settings.search_rate, settings.search_deadline_s)
        sources.append(lens)
    return InTurn(sources) if sources else None


def _make_text_search(settings: Settings) -> TextProvider | None:
    scope = str(settings.search_results)
    if settings.search_cache == "replay":
        return CachedSearch(settings.search_cache_file, None, scope)
    hosted = hosted_provider(settings.search_provider, settings.search_results)
    if hosted is not None:
        hosted.limit(settings.search_rate, settings.search_deadline_s)
        cached = settings.search_cache == "on" and settings.search_cache_file
        return CachedSearch(settings.search_cache_file, hosted, scope) if cached else hosted
    return TextIndex(settings.text_index, settings.search_results) if settings.text_index else None


def _make_sandbox(settings: Settings) -> Sandbox:
    if settings.sandbox == "process":
        from hdpo.toolserver.backends.process_sandbox import ProcessSandbox
        return ProcessSandbox(trusted=settings.i_trust_the_model)
    from hdpo.toolserver.backends.docker_sandbox import DockerSandbox
    return DockerSandbox(settings.sandbox_image, "strict" if settings.sandbox == "docker-strict" else "shared",
                         memory_mib=settings.container_memory_mib, cpus=settings.container_cpus,
                         sessions_per_container=settings.sessions_per_container)
