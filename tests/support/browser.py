"""A real headless Chromium, driven by its own protocol over a pipe: no driver, no port, no package.

`HDPO_REQUIRE_BROWSER=1` makes a missing browser a failure instead of a reason to skip.
"""
from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PATIENCE_S = 60.0
_FLAGS = ("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
          "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-default-apps",
          "--disable-sync",
          "--hide-scrollbars", "--mute-audio", "--force-color-profile=srgb")


def find_browser() -> str:
    """Skips the test, or fails it, where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        end = pytest.fail if os.environ.get("HDPO_REQUIRE_BROWSER") == "1" else pytest.skip
        end("no Chromium on PATH (apt-get install chromium)")
    return str(found)


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(prefix="hdpo-browser-", ignore_cleanup_errors=True) as profile:
        from_us, to_browser = os.pipe()
        from_browser, to_us = os.pipe()
        command = [find_browser(), *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(["bash", "-c", f'exec "$@" 3<&{from_us} 4>&{to_us}', "browser", *command],
                                   pass_fds=(from_us, to_us), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        os.close(from_us)
        os.close(to_us)
        try:
            yield Browser(to_browser, from_browser)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(to_browser)
            os.close(from_browser)


class Browser:
    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from, self._number, self._rest = to_browser, from_browser, 0, b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data):]
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], PATIENCE_S)
            part = os.read(self._from, 1 << 20) if ready else b""
            if not part:
                raise RuntimeError("the browser has ended or does not answer")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def page(self, width: int = 1400, height: int = 900, dark: bool = False) -> Tab:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Tab(self, session, target, width, height, dark)


class Tab:
    """One page. What it asked of the network, and every error and dialog, is kept."""

    def __init__(self, browser: Browser, session: str, target: str, width: int, height: int, dark: bool) -> None:
        self._browser, self._session, self._target = browser, session, target
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def _call(self, method: str, **params: Any) -> Any:
        return self._browser.call(method, self._session, **params)

    def open(self, url: str | Path) -> Tab:
        self._call("Page.navigate", url=url.as_uri() if isinstance(url, Path) else url)
        self.until("document.readyState === 'complete'")
        return self

    def js(self, expression: str) -> Any:
        """Value of an expression; raises what it throws."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def until(self, condition: str) -> Any:
        """Wait until an expression is truthy, and return it. Raises AssertionError."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                if value := self.js(f"((value) => value instanceof Node || value)({condition})"):
                    return value
            except RuntimeError as exc:
                if "Cannot find context" not in str(exc) and "TypeError" not in str(exc):
                    raise
            time.sleep(0.03)
        raise AssertionError(f"never true: {condition}; errors: {self.errors()}")

    def texts(self, selector: str) -> list[str]:
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.innerText)")

    def click(self, selector: str) -> None:
        self.until(f"document.querySelector({json.dumps(selector)})")
        self.js(f"document.querySelector({json.dumps(selector)}).click()")

    def choose(self, facet: str, value: str) -> None:
        """Set a <select data-facet>."""
        self.until(f"document.querySelector('.view:not([hidden]) select[data-facet={facet}]')")
        self.js(f"(() => {{ const s = document.querySelector('.view:not([hidden]) select[data-facet={facet}]'); "
                f"s.value = {json.dumps(value)}; s.dispatchEvent(new Event('change')); return s.value; }})()")

    def key(self, key: str) -> None:
        text = key if len(key) == 1 else ""
        self._call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, code=key)
        self._call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def type(self, text: str) -> None:
        self._call("Input.insertText", text=text)

    def screenshot(self, path: Path, whole: bool = False) -> Path:
        self.js("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 150)))")
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))
        return path

    def _events(self, *methods: str) -> list[dict[str, Any]]:
        self.js("1")       # whatever came before has been read by now
        return [event["params"] for event in self._browser.events
                if event.get("sessionId") == self._session and event.get("method") in methods]

    def requests(self) -> list[str]:
        """Addresses that the page asked for, without data: ones."""
        return [event["request"]["url"] for event in self._events("Network.requestWillBeSent")
                if not event["request"]["url"].startswith("data:")]

    def errors(self) -> list[str]:
        found = [event["exceptionDetails"].get("exception", {}).get("description", str(event["exceptionDetails"]))
                 for event in self._events("Runtime.exceptionThrown")]
        found += [event["entry"]["text"] for event in self._events("Log.entryAdded") if event["entry"]["level"] == "error"]
        return found + [f"dialog: {event['message']}" for event in self._events("Page.javascriptDialogOpening")]

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)
