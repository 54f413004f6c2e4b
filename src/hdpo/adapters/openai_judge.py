"""A judge behind any OpenAI-compatible endpoint: three answers, and no failure that becomes a verdict.

Timeouts, rate limits, 5xx, broken connections and broken JSON are retried with exponential back-off and jitter until
the deadline of the verdict; then the verdict is UNSCORED and says why. When nothing has succeeded for as long as that
deadline, the judge is taken for down: one request at a time probes it and all others share its fate, so that an outage
costs a step one deadline and not one per trajectory. The key comes from JUDGE_API_KEY and reaches neither a log, nor a
record, nor a configuration.
"""
from __future__ import annotations

import asyncio
import email.utils
import functools
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import openai

from hdpo.config import JudgeConfig
from hdpo.errors import ConfigError, JudgeError
from hdpo.reward.judge_prompt import REMINDER, SYSTEM, build_prompt, parse_verdict, prompt_version
from hdpo.types import Judgement, Verdict

T = TypeVar("T")

MAX_REPLY_TOKENS = 2048     # room for a reasoning model to think
MAX_READINGS = 3            # replies asked for until one can be read
BACKOFF_CAP_S = 30.0
_RETRIED = (408, 409, 425, 429)   # and every 5xx
_NO_TELEMETRY: Any = {f"X-Stainless-{name}": openai.Omit() for name in (
    "Lang", "Package-Version", "OS", "Arch", "Runtime", "Runtime-Version", "Async", "Retry-Count", "Read-Timeout")}
"""What the client tells about this machine is nobody's business, and each header costs as much as a look-up in a cache."""


class OpenAIJudge:
    """Implements `hdpo.protocols.Judge`. All methods are coroutines of one event loop, except `stats`.

    `backoff_s` is the first pause between attempts, seconds; it doubles up to BACKOFF_CAP_S.
    """

    def __init__(self, config: JudgeConfig, api_key: str | None = None, backoff_s: float = 0.5) -> None:
        if not config.base_url:
            raise ConfigError("judge.base_url (JUDGE_BASE_URL) is empty: name an OpenAI-compatible endpoint, start one "
                              "with launch/start_judge.sh, or set reward.judge=false")
        if config.votes < 1 or config.concurrency < 1:
            raise ConfigError("judge.votes and judge.concurrency must be at least 1")
        self.config = config
        self._key = api_key or os.environ.get("JUDGE_API_KEY") or "EMPTY"
        self._backoff_s = backoff_s
        self._options: dict[str, Any] = {"temperature": 0.0 if config.votes == 1 else 0.7, "max_tokens": MAX_REPLY_TOKENS}
        self._slots = asyncio.Semaphore(config.concurrency)
        self._client: openai.AsyncOpenAI | None = None
        self._model: asyncio.Task[str] | None = None
        self._fingerprint = ""
        self._outage = _Outage(config.deadline_s, config.base_url)
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0

    async def judge(self, question: str, ground_truth: str | list[str], prediction: str) -> Judgement:
        """The verdict of the majority of `config.votes`; UNSCORED, with the reason, if there is none."""
        prompt = build_prompt(question, ground_truth, prediction, self.config.max_prediction_chars)
        asked = [self._vote(prompt, seed) for seed in range(self.config.votes)]
        votes = await asyncio.gather(*asked) if len(asked) > 1 else [await asked[0]]
        counts = Counter(vote.verdict for vote in votes)
        majority = next((v for v in (Verdict.CORRECT, Verdict.WRONG) if 2 * counts[v] > len(votes)), Verdict.UNSCORED)
        self._counts[f"verdicts_{majority.value}"] += 1
        return Judgement(majority, "judge", "\n---\n".join(vote.detail for vote in votes))

    async def model(self) -> str:
        """The model in use: the configured one, else the first that /models lists. Raises JudgeError."""
        if self.config.model:
            return self.config.model
        if self._model is None or (self._model.done() and (self._model.cancelled() or self._model.exception())):
            self._model = asyncio.create_task(self._retry(self._first_model, _Deadline(self.config.deadline_s)))
        return await asyncio.shield(self._model)

    async def fingerprint(self) -> str:
        """All that determines a verdict besides the three arguments of `judge`. Raises JudgeError if the model is unknown.

        The address is not part of it, so that a judge which moved to another host or port keeps its verdicts.
        """
        config = self.config
        if not self._fingerprint:
            self._fingerprint = "\0".join(map(str, (
                await self.model(), prompt_version(), config.votes, config.max_prediction_chars, MAX_REPLY_TOKENS, MAX_READINGS)))
        return self._fingerprint

    def stats(self) -> dict[str, float]:
        """Counts, tokens and seconds since the previous call; names begin with "judge/"."""
        stats = {f"judge/{name}": float(count) for name, count in self._counts.items()}
        stats["judge/request_s"] = self._seconds
        self._counts, self._seconds = Counter(), 0.0
        return stats

    async def close(self) -> None:
        if self._model is not None:
            self._model.cancel()
        if self._client is not None:
            await self._client.close()

    # --- one vote -----------------------------------------------------------------------------------------------------

    async def _vote(self, prompt: str, seed: int) -> Judgement:
        deadline = _Deadline(self.config.deadline_s)
        reply = ""
        try:
            model = await self.model()
            for reading in range(MAX_READINGS):
                text = prompt if reading == 0 else f"{prompt}\n\n{REMINDER}"
                reply = await self._retry(functools.partial(self._complete, model, text, seed, deadline), deadline)
                verdict = parse_verdict(reply)
                if verdict is not Verdict.UNSCORED:
                    return Judgement(verdict, "judge", reply)
                self._counts["unreadable"] += 1
        except JudgeError as exc:
            return Judgement(Verdict.UNSCORED, "judge", str(exc))
        return Judgement(Verdict.UNSCORED, "judge", f"unreadable reply: {reply or '(empty)'}")

    async def _complete(self, model: str, prompt: str, seed: int, deadline: _Deadline, probing: bool) -> str:
        async with self._slots:
            deadline.start()   # waiting for a slot is not the judge's fault
            if self._outage.is_down and not probing:
                raise _WentDownError   # while this one waited
            self._counts["requests"] += 1
            started = time.monotonic()
            async with asyncio.timeout(self.config.timeout_s):   # a total: bytes that trickle in don't extend it
                # not chat.completions.create: its typed transformation costs more CPU than everything else together
                response = await self._connection().post("/chat/completions", cast_to=object, body={
                    "model": model, "seed": seed, **self._options,
                    "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]})
            self._seconds += time.monotonic() - started
        return self._read(response)

    def _read(self, response: Any) -> str:
        """The text of a completion. Raises LookupError or TypeError for JSON that is not one; that is retried."""
        text = response["choices"][0]["message"]["content"]
        usage = response.get("usage") or {}
        self._counts["prompt_tokens"] += usage.get("prompt_tokens") or 0
        self._counts["completion_tokens"] += usage.get("completion_tokens") or 0
        return text or ""

    async def _first_model(self, probing: bool) -> str:
        async with asyncio.timeout(self.config.timeout_s):
            page = await self._connection().models.list()
        if not page.data:
            raise ValueError(f"{self.config.base_url}/models lists no model")
        return page.data[0].id

    def _connection(self) -> openai.AsyncOpenAI:
        if self._client is None:
            # the aiohttp transport costs a fraction of the default one per request; retries and timeouts are ours
            self._client = openai.AsyncOpenAI(
                base_url=self.config.base_url, api_key=self._key, max_retries=0, timeout=self.config.timeout_s,
                http_client=openai.DefaultAioHttpClient(timeout=self.config.timeout_s), default_headers=_NO_TELEMETRY)
        return self._client

    # --- failures -----------------------------------------------------------------------------------------------------

    async def _retry(self, send: Callable[[bool], Awaitable[T]], deadline: _Deadline) -> T:
        """`send(probing)` until it succeeds. Raises JudgeError at the deadline, for what retrying can't mend, or while
        the judge is down.
        """
        attempt = 0
        while True:
            probing = await self._outage.admit()
            try:
                result = await send(probing)
            except _WentDownError:
                continue
            except JudgeError:
                raise
            except Exception as exc:  # noqa: BLE001  (network boundary: whatever the client or the wire raises)
                if self._dropped_option(exc):
                    continue
                reason = self._describe(exc)
                if isinstance(exc, openai.APIStatusError) and exc.status_code < 500 and exc.status_code not in _RETRIED:
                    self._counts["refused"] += 1
                    raise JudgeError(reason) from None
                self._outage.failed()
                pause = max(_retry_after(exc), min(BACKOFF_CAP_S, self._backoff_s * 2**attempt) * random.uniform(0.5, 1.0))
                deadline.start()
                if probing or pause > deadline.left():
                    self._counts["given_up"] += 1
                    raise JudgeError(f"{reason} (after {attempt + 1} attempts)") from None
            else:
                self._outage.succeeded()
                return result
            finally:
                self._outage.settle(probing)
            attempt += 1
            self._counts["retries"] += 1
            await asyncio.sleep(pause)

    def _dropped_option(self, exc: Exception) -> bool:
        """Some endpoints refuse sampling options (a reasoning model: temperature). Do without those from now on."""
        if not isinstance(exc, openai.BadRequestError):
            return False
        refused = [name for name in self._options if name in str(exc.message) or name == exc.param]
        for name in refused:
            del self._options[name]
        return bool(refused)

    def _describe(self, exc: Exception) -> str:
        """One short line without the key, which a server may echo."""
        if isinstance(exc, openai.APIStatusError):
            text = f"HTTP {exc.status_code}: {exc.message}"
        elif isinstance(exc, TimeoutError | openai.APITimeoutError):
            text = f"no reply within {self.config.timeout_s:g} s"
        else:
            text = f"{type(exc).__name__}: {exc}"
        kind = text.split(":")[0] if text.startswith("HTTP") else type(exc).__name__
        self._counts[f"error_{kind.replace(' ', '_')}"] += 1
        return " ".join(text.replace(self._key, "***").split())[:300]


def open_judges(config: JudgeConfig) -> list[OpenAIJudge]:
    """The configured judge and the further members of its panel. A member never sees another one's key."""
    judges = [OpenAIJudge(config)]
    for number, member in enumerate(config.panel, start=2):
        model, at, url = member.partition("@")
        if not (model and at and url.startswith(("http://", "https://"))):
            raise ConfigError(f"judge.panel: {member!r} is not MODEL@URL, as in Qwen3-32B@http://host:8000/v1")
        own = config.model_copy(update={"model": model, "base_url": url, "panel": []})
        judges.append(OpenAIJudge(own, os.environ.get(f"JUDGE_API_KEY_{number}") or "EMPTY"))
    return judges


class _WentDownError(Exception):
    """The judge was found to be down between the decision to ask it and the request."""


class _Outage:
    """Decides that a judge is down: failures and not one success for `after_s` seconds.

    While it is down, `admit` lets one request through as a probe; everybody else waits for it and shares its fate.
    """

    def __init__(self, after_s: float, name: str) -> None:
        self._after_s, self._name = after_s, name
        self._failing_since: float | None = None
        self._probe: asyncio.Future[None] | None = None

    @property
    def is_down(self) -> bool:
        return self._failing_since is not None and time.monotonic() - self._failing_since > self._after_s

    def failed(self) -> None:
        self._failing_since = self._failing_since or time.monotonic()

    def succeeded(self) -> None:
        self._failing_since = None

    async def admit(self) -> bool:
        """True if the caller is the probe and must call `settle(True)`; raises JudgeError after a failed probe."""
        if not self.is_down:
            return False
        if self._probe is None:
            self._probe = asyncio.get_running_loop().create_future()
            return True
        await asyncio.shield(self._probe)
        if self.is_down:
            raise JudgeError(f"the judge at {self._name} is down")
        return False

    def settle(self, probing: bool) -> None:
        if probing and self._probe is not None:
            self._probe.set_result(None)
            self._probe = None


class _Deadline:
    """A time limit that begins with the first `start`."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end = seconds, 0.0

    def start(self) -> None:
        self._end = self._end or time.monotonic() + self._seconds

    def left(self) -> float:
        return self._end - time.monotonic() if self._end else self._seconds


def _retry_after(exc: Exception) -> float:
    """Seconds the server asks us to wait (Retry-After, as seconds or as a date); 0 if it doesn't."""
    header = exc.response.headers.get("retry-after") if isinstance(exc, openai.APIStatusError) else None
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0
