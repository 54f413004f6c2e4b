"""Is every configured judge there, does it serve the model that is asked for, and does it give a verdict? In seconds."""
from __future__ import annotations

import difflib
import json
import urllib.error
import urllib.request
from http import HTTPStatus
from typing import Any

from hdpo.background import BackgroundLoop
from hdpo.config import Config
from hdpo.errors import UserError
from hdpo.keys import key
from hdpo.reward.judge_reply import one_line, words_of
from hdpo.types import Judgement, Verdict

LOOK_S = 5.0       # for a list of models
ANSWER_S = 60.0    # for one verdict, thinking included


def reach_judge(config: Config) -> list[str]:
    """One line for each judge whose list of models answers within 5 s. A model that isn't listed is said in it.

    Raises UserError with one line where nothing answers, or only under another address.
    """
    return [_look(url, model, key, "judge.panel" if number else "judge.base_url")
            for number, (url, model, key) in enumerate(_judges(config))]


def ask_one(config: Config) -> list[str]:
    """Ask each judge one question that is beyond doubt, as training will. Raises UserError when one gives no verdict."""
    from hdpo.adapters.openai_judge import open_judges
    settings = config.judge.model_copy(update={
        "timeout_s": min(config.judge.timeout_s, ANSWER_S), "deadline_s": min(config.judge.deadline_s, ANSWER_S)})
    background, judges = BackgroundLoop(), open_judges(settings)
    lines = []
    try:
        for judge, (url, model, secret) in zip(judges, _judges(config), strict=True):
            said: Judgement = background.run(judge.judge("What is the capital of France?", "Paris", "It is Paris."))
            if said.verdict is Verdict.UNSCORED:
                raise UserError(f"judge: {url} gives no verdict: {one_line(said.detail)}{_unlisted(url, model, secret)}")
            right = said.verdict is Verdict.CORRECT
            lines.append("one question asked and judged" if right else
                         "it calls a right answer wrong: see `hdpo judge` with the same settings")
    finally:
        for judge in judges:
            background.run(judge.close())
        background.close()
    return lines


def _judges(config: Config) -> list[tuple[str, str, str]]:
    """(address, model or "", key) of each judge."""
    found = [(config.judge.base_url, config.judge.model, key("JUDGE_API_KEY") or "EMPTY")]
    for number, member in enumerate(config.judge.panel, start=2):
        model, _, url = member.partition("@")
        found.append((url, model, key(f"JUDGE_API_KEY_{number}") or "EMPTY"))
    return found


def _look(url: str, model: str, key: str, field: str) -> str:
    try:
        names = _models(url, key)
    except (urllib.error.URLError, OSError, ValueError) as exc:
        reason = _reason(exc).replace(key, "***")
        raise UserError(f"{field}: {url.rstrip('/')}/models: {reason}{_better(url, key, exc)}") from None
    return f"{url} answers{_not_among(names, model)}"


def _models(url: str, key: str) -> list[str]:
    """Names of the models served there. Raises URLError, OSError or ValueError."""
    request = urllib.request.Request(url.rstrip("/") + "/models", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=LOOK_S) as response:
        text = response.read(2**22).decode("utf-8", "replace")
    try:
        page: Any = json.loads(text)
    except ValueError:
        raise ValueError("not a list of models") from None
    rows = page.get("data") if isinstance(page, dict) else page
    if not isinstance(rows, list):
        raise ValueError(words_of(page) or "not a list of models")
    return [one_line(str(row.get("id"))) for row in rows if isinstance(row, dict)]


def _reason(exc: Exception) -> str:
    if isinstance(exc, urllib.error.HTTPError):
        body = exc.read(2**16).decode("utf-8", "replace")
        try:
            words = words_of(json.loads(body))
        except ValueError:
            words = ""
        return f"HTTP {exc.code}: {words or HTTPStatus(exc.code).phrase if exc.code in set(HTTPStatus) else exc.code}"
    return one_line(str(getattr(exc, "reason", exc)))


def _better(url: str, key: str, exc: Exception) -> str:
    """The address at which a list of models does answer, tried only where a server was found."""
    if not isinstance(exc, urllib.error.HTTPError | ValueError):
        return ""
    base = url.rstrip("/")
    for ending in ("/chat/completions", "/completions", "/models"):
        base = base.removesuffix(ending)
    for candidate in dict.fromkeys((base, f"{base}/v1")):
        try:
            if candidate != url.rstrip("/") and _models(candidate, key) is not None:
                return f"; {candidate} does answer: that is the address to set (JUDGE_BASE_URL)"
        except (urllib.error.URLError, OSError, ValueError):
            continue
    return "" if "/v" in base else "; does the address lack its /v1?"


def _not_among(names: list[str], model: str) -> str:
    if not model or not names or model in names:
        return ""
    close = difflib.get_close_matches(model, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"it lists {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
    return f", but judge.model {model} is not among its models ({hint})"


def _unlisted(url: str, model: str, key: str) -> str:
    try:
        return _not_among(_models(url, key), model)
    except (urllib.error.URLError, OSError, ValueError):
        return ""
