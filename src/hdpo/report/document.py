"""The page around a report: its views, the data they show, our style and script, and the policy that holds the browser to them.

Text of models, tools and data never becomes markup: what Python writes is escaped, and the script builds elements and sets
their text, which `require-trusted-types-for` enforces. The script is named by its hash; nothing is loaded from elsewhere.
"""
from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from hdpo.errors import DataError

SCRIPTS = ("dom.js", "source.js", "filters.js", "conversation.js", "tokens.js", "browser.js", "pairs.js", "timeline.js", "app.js")
STYLES = ("report.css", "funnel.css", "browser.css")


def document(title: str, views: Sequence[tuple[str, str, str]], data: dict[str, Any], *, served: bool) -> str:
    """A whole HTML page. `views` are (name, label, HTML); one whose HTML is empty is filled by the script. `served`: more data
    can be had from the server that the page comes from; otherwise `data` is all there is."""
    script = "(() => {\n" + "\n".join(_asset(name) for name in SCRIPTS) + "\n})();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = "\n".join(_asset(name) for name in STYLES)
    images, connect = ("img-src 'self' data:", "connect-src 'self'") if served else ("img-src data:", "connect-src 'none'")
    policy = (f"default-src 'none'; {images}; {connect}; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
              "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'")
    tabs = "".join(f'<a href="#{name}" data-tab="{name}">{escape(label)}</a>' for name, label, _ in views)
    body = "".join(f'<div class="view" id="view-{name}" data-view="{name}">{html}</div>' for name, _, html in views)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}"><meta name="referrer" content="no-referrer">'
            f'<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<style>{style}</style></head>'
            f'<body><nav class="tabs" aria-label="Views"><b>{escape(title)}</b>{tabs}</nav><main>{body}</main>'
            f'<script type="application/json" id="data">{to_json(data, for_markup=True)}</script>'
            f'<script>{script}</script></body></html>\n')


def to_json(value: Any, for_markup: bool = False) -> str:
    """JSON in which a number that is not finite is null. `for_markup`: no text can end the element that holds it."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"))
    text = text.encode("utf-8", "replace").decode()      # lone surrogates
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029") if for_markup else text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def write_page(path: Path, page: str) -> Path:
    """Whole or not at all. Raises DataError where it can't be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    except OSError as exc:
        raise DataError(f"{path} can't be written: {exc.strerror}; `hdpo report RUN --serve` writes nothing") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _asset(name: str) -> str:
    return resources.files("hdpo").joinpath(f"report/assets/{name}").read_text(encoding="utf-8")
