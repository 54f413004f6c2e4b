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
import json
import random
import re
import time
import urllib.parse
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import openai

from hdpo.agent.images import data_url, decode_image
from hdpo.config import JudgeConfig
from hdpo.errors import ConfigError, JudgeError
from hdpo.keys import key
from hdpo.reward.judge_prompt import REMINDER, SYSTEM, build_prompt, parse_verdict, prompt_version
from hdpo.reward.judge_reply import ProviderError, is_too_long, one_line, read_reply, refused_options, words_of
from hdpo.reward.outage import Deadline, Outage, WentDownError
from hdpo.types import Judgement, Verdict

T = TypeVar("T")

MAX_READINGS = 3            # replies asked for until one can be read
BACKOFF_CAP_S = 30.0
MIN_PREDICTION_CHARS = 100  # a prediction is never cut below this to make a request fit
_RETRIED = (408, 409, 425, 429)   # and every 5xx
_REFUSALS = (400, 413, 422)       # of a request as it stands: an option, its length
_NO_KEY = "EMPTY"
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
        self._key = api_key or key("JUDGE_API_KEY") or _NO_KEY
        self._backoff_s = backoff_s
        self._options: dict[str, Any] = {   # an endpoint that refuses one of them does without it from then on
            "temperature": 0.0 if config.votes == 1 else 0.7, "max_tokens": config.max_tokens, "seed": 0, **config.extra_body}
        self._slots = asyncio.Semaphore(config.concurrency)
        self._client: openai.AsyncOpenAI | None = None
        self._model: asyncio.Task[str] | None = None
        self._fingerprint = ""
        self._outage = Outage(config.deadline_s, config.base_url)
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0

    async def judge(self, question: str, ground_truth: str | list[str], prediction: str) -> Judgement:
        """The verdict of the majority of `config.votes`; UNSCORED, with the reason, if there is none."""
        prompt = functools.partial(build_prompt, question, ground_truth, prediction)
        longest = min(len(prediction), self.config.max_prediction_chars)
        asked = [self._vote(prompt, longest, seed) for seed in range(self.config.votes)]
        votes = await asyncio.gather(*asked) if len(asked) > 1 else [await asked[0]]
        counts = Counter(vote.verdict for vote in votes)
        majority = next((v for v in (Verdict.CORRECT, Verdict.WRONG) if 2 * counts[v] > len(votes)), Verdict.UNSCORED)
        self._counts[f"verdicts_{majority.value}"] += 1
        return Judgement(majority, "judge", "\n---\n".join(vote.detail for vote in votes))

    async def ask(self, system: str, text: str, images: Sequence[bytes] = (), seed: int = 0) -> str:
        """The reply to another question than that for a verdict; `images` are encoded files. Raises JudgeError."""
        content: Any = text if not images else [
            *({"type": "image_url", "image_url": {"url": data_url(decode_image(data, "a picture"))}} for data in images),
            {"type": "text", "text": text}]
        deadline = Deadline(self.config.deadline_s)
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        send = functools.partial(self._complete, await self.model(), messages, seed, deadline)
        try:
            reply, cut = await self._retry(send, deadline)
        except _TooLongError as exc:
            raise JudgeError(str(exc)) from None
        return reply if not cut else ""

    async def model(self) -> str:
        """The model in use: the configured one, else the first that /models lists. Raises JudgeError."""
        if self.config.model:
            return self.config.model
        if self._model is None or (self._model.done() and (self._model.cancelled() or self._model.exception())):
            self._model = asyncio.create_task(self._retry(self._first_model, Deadline(self.config.deadline_s)))
        return await asyncio.shield(self._model)

    async def fingerprint(self) -> str:
        """All that determines a verdict besides the three arguments of `judge`. Raises JudgeError if the model is unknown.

        The address is not part of it, so that a judge which moved to another host or port keeps its verdicts.
        """
        config = self.config
        if not self._fingerprint:
            self._fingerprint = "\0".join(map(str, (
                await self.model(), prompt_version(), config.votes, config.max_prediction_chars, config.max_tokens, MAX_READINGS,
                json.dumps(config.extra_body, sort_keys=True, default=str))))
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

    async def _vote(self, prompt: Callable[[int], str], longest: int, seed: int) -> Judgement:
        """`prompt(n)` shows at most n characters of the prediction; `longest` is the n to begin with."""
        deadline = Deadline(self.config.deadline_s)
        reminder = cut = text = ""
        readings = 0
        try:
            model = await self.model()
            while readings < MAX_READINGS:
                messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt(longest) + reminder}]
                send = functools.partial(self._complete, model, messages, seed, deadline)
                try:
                    text, cut = await self._retry(send, deadline)
                except _TooLongError as exc:
                    # how many tokens a text has only the judge knows: what it can't read is halved until it fits
                    if longest <= MIN_PREDICTION_CHARS:
                        raise JudgeError(str(exc)) from None
                    longest = max(longest // 2, MIN_PREDICTION_CHARS)
                    self._counts["shortened"] += 1
                    continue
                verdict = Verdict.UNSCORED if cut else parse_verdict(text)
                if verdict is not Verdict.UNSCORED:
                    return Judgement(verdict, "judge", text)
                self._counts["cut" if cut else "unreadable"] += 1
                readings, reminder = readings + 1, f"\n\n{REMINDER}"
        except JudgeError as exc:
            return Judgement(Verdict.UNSCORED, "judge", str(exc))
        why = {"": "unreadable reply", "length": f"unreadable reply, cut at judge.max_tokens = {self.config.max_tokens}"}
        return Judgement(Verdict.UNSCORED, "judge", f"{why.get(cut, f'unreadable reply ({cut})')}: {text or '(empty)'}")

    async def _complete(self, model: str, messages: list[dict[str, Any]], seed: int, deadline: Deadline,
                        probing: bool) -> tuple[str, str]:
        """(text of the reply, why it is not finished or "")."""
        async with self._slots:
            deadline.start()   # waiting for a slot is not the judge's fault
            if self._outage.is_down and not probing:
                raise WentDownError   # while this one waited
            self._counts["requests"] += 1
            started = time.monotonic()
            options = self._options | ({"seed": seed} if "seed" in self._options else {})
            async with asyncio.timeout(self.config.timeout_s):   # a total: bytes that trickle in don't extend it
                # not chat.completions.create: its typed transformation costs more CPU than everything else together
                response = await self._connection().post("/chat/completions", cast_to=object, body={
                    "model": model, **options, "messages": messages})
            self._seconds += time.monotonic() - started
        reply = read_reply(response)
        self._counts["prompt_tokens"] += reply.prompt_tokens
        self._counts["completion_tokens"] += reply.completion_tokens
        return reply.text, reply.cut

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

    async def _retry(self, send: Callable[[bool], Awaitable[T]], deadline: Deadline) -> T:
        """`send(probing)` until it succeeds. Raises JudgeError at the deadline, for what retrying can't mend, or while
        the judge is down.
        """
        attempt = 0
        while True:
            probing = await self._outage.admit()
            try:
                result = await send(probing)
            except WentDownError:
                continue
            except JudgeError:
                raise
            except Exception as exc:  # noqa: BLE001  (network boundary: whatever the client or the wire raises)
                if self._dropped_option(exc):
                    continue
                reason, status = self._describe(exc), _status(exc)
                if 400 <= status < 500 and status not in _RETRIED:
                    if status in _REFUSALS and is_too_long(reason):
                        raise _TooLongError(reason) from None
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
        if not isinstance(exc, openai.APIStatusError) or exc.status_code not in _REFUSALS:
            return False
        words = _words(exc)
        refused = refused_options(exc.body, words, self._options)
        for name in refused:
            value = self._options.pop(name)
            if name == "max_tokens" and "max_completion_tokens" in words:   # its newer name
                self._options["max_completion_tokens"] = value
            self._counts["dropped_options"] += 1
        return bool(refused)

    def _describe(self, exc: Exception) -> str:
        """One short line in the provider's words, without the key, which a server may echo."""
        if isinstance(exc, openai.APIStatusError):
            text = f"HTTP {exc.status_code}: {_words(exc) or exc.message}"
            if exc.status_code in (404, 405):
                text += f" ({self.config.base_url}/chat/completions{address_hint(self.config.base_url)})"
        elif isinstance(exc, TimeoutError | openai.APITimeoutError):
            text = f"no reply within {self.config.timeout_s:g} s"
        elif isinstance(exc, ProviderError):
            text = str(exc)
        else:
            text = f"{type(exc).__name__}: {exc}"
        kind = text.split(":")[0] if text.startswith("HTTP") else type(exc).__name__
        self._counts[f"error_{kind.replace(' ', '_')}"] += 1
        return one_line(text if self._key == _NO_KEY else text.replace(self._key, "***"))


def open_judges(config: JudgeConfig) -> list[OpenAIJudge]:
    """The configured judge and the further members of its panel. A member never sees another one's key."""
    judges = [OpenAIJudge(config)]
    for number, member in enumerate(config.panel, start=2):
        model, at, url = member.partition("@")
        if not (model and at and url.startswith(("http://", "https://"))):
            raise ConfigError(f"judge.panel: {member!r} is not MODEL@URL, as in Qwen3-32B@http://host:8000/v1")
        own = config.model_copy(update={"model": model, "base_url": url, "panel": []})
        judges.append(OpenAIJudge(own, key(f"JUDGE_API_KEY_{number}") or _NO_KEY))
    return judges


class _TooLongError(Exception):
    """The judge says that the request has more tokens than it can read."""


def address_hint(base_url: str) -> str:
    """What is probably wrong with an address that has no such page: "; ..." or ""."""
    path = urllib.parse.urlsplit(base_url).path.rstrip("/")
    if path.endswith(("/chat/completions", "/completions", "/models")):
        return "; judge.base_url ends before /chat/completions, usually in /v1"
    return "" if re.search(r"/v\d+[a-z]*\b", path) else "; does judge.base_url lack its /v1?"


def _status(exc: Exception) -> int:
    return exc.status_code if isinstance(exc, openai.APIStatusError) else exc.code if isinstance(exc, ProviderError) else 0


def _words(exc: openai.APIStatusError) -> str:
    return words_of(exc.body)


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
