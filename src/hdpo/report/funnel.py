"""`report.html` of a curation: how many rows each stage kept, and for every reason a few of the rows that it dropped."""
from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from hdpo.agent.images import decode_image, encode_png
from hdpo.errors import DataError

SAMPLES = 3         # rows shown of each stage, source and reason
_MAX_TEXT = 1200
_MAX_SIDE = 360


def funnel(out: Path) -> str:
    """The overview of a curation's result, from manifest.json and dropped.parquet. Raises DataError."""
    try:
        manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    except (OSError, ValueError) as exc:
        raise DataError(f"{out}/manifest.json: {exc}") from exc
    about = manifest.pop("about", {})
    body = _header(out, manifest, about) + "".join(_source(name, stages) for name, stages in manifest.items())
    body += _benchmarks(about, manifest)
    return body + "".join(section for name in ("dropped", "rl_dropped") for section in _samples(out / f"{name}.parquet"))


def _header(out: Path, manifest: dict[str, Any], about: dict[str, Any]) -> str:
    given = sum(next(iter(stages.values()))["in"] for stages in manifest.values())
    last = about.get("stages", ["1"])[-1]
    kept = sum(stages[last]["kept"] for stages in manifest.values())
    prompts = f'; {about["rl"]["prompts"]:,} prompts for RL' if "rl" in about else ""
    return (f'<header class="page"><p>hdpo curation</p><h1>{escape(out.resolve().name)}</h1><p>{kept:,} of {given:,} rows kept, '
            f'stages {escape(", ".join(about.get("stages", [])))}{prompts}</p></header>')


def _source(name: str, stages: dict[str, Any]) -> str:
    given = next(iter(stages.values()))["in"] or 1
    bars = [f'<li><span class="label">read</span><span class="bar"><i style="width:100%"></i></span><b>{given:,}</b></li>']
    for stage, counts in stages.items():
        gone = sorted({**counts["unreadable"], **counts["dropped"], **counts["waiting"]}.items(), key=lambda item: -item[1])
        reasons = ", ".join(f"{escape(reason.replace('_', ' '))} {count:,}" for reason, count in gone)
        label = "prompts" if stage == "rl" else f"stage {stage}"
        bars.append(f'<li><span class="label">{escape(label)}</span><span class="bar">'
                    f'<i style="width:{100 * counts["kept"] / given:.1f}%"></i></span><b>{counts["kept"]:,}</b>'
                    f'<small>{reasons}</small></li>')
    return f'<section class="funnel"><h2>{escape(name)}</h2><ol>{"".join(bars)}</ol></section>'


def _benchmarks(about: dict[str, Any], manifest: dict[str, Any]) -> str:
    """What was compared with, and how many rows overlap with each."""
    if not about.get("benchmarks"):
        return ""
    overlaps: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for stages in manifest.values():
        overlaps.update(stages.get("4", {}).get("overlaps", {}))
        unknown.update(stages.get("4", {}).get("overlap_unknown", {}))
    lines = "".join(
        f"<tr><td>{escape(name)}</td><td>{found['questions']:,}</td><td>{found['pictures']:,}</td>"
        f"<td>{sum(found['unreadable'].values()):,}</td><td>{overlaps[name]:,}</td></tr>"
        for name, found in about["benchmarks"].items())
    rest = ", ".join(f"{escape(reason)} {count:,}" for reason, count in unknown.most_common())
    return ('<section class="benchmarks"><h2>Benchmarks compared with</h2><table><tr><th></th><th>questions</th><th>pictures</th>'
            f'<th>not comparable</th><th>rows that overlap</th></tr>{lines}</table>'
            + (f"<p>Rows of whose pictures nothing is known: {rest}</p>" if rest else "") + "</section>")


def _samples(file: Path) -> Iterator[str]:
    """A few dropped rows of every stage, source and reason, read a group at a time."""
    shown: dict[tuple[str, str, str], list[str]] = {}
    if not file.exists():
        return
    with pq.ParquetFile(file) as opened:
        for batch in opened.iter_batches(64):
            keys = zip(*(batch.column(name).to_pylist() for name in ("stage", "reason", "source")), strict=True)
            for place, key in enumerate(keys):
                cards = shown.setdefault(key, [])
                if len(cards) < SAMPLES:
                    cards.append(_card(batch.slice(place, 1).to_pylist()[0]))
    for (stage, reason, source), cards in sorted(shown.items()):
        where = {"read": "could not be read", "rl": "no prompt for RL"}.get(stage, f"dropped by stage {stage}")
        yield (f'<section class="dropped"><h2>{escape(reason.replace("_", " "))}</h2><p class="why">{escape(source)}, '
               f'{escape(where)}</p>{"".join(cards)}</section>')


def _card(row: dict[str, Any]) -> str:
    images = iter(row["images"] or [])
    turns = []
    for message in row["messages"] or []:
        text = message["content"]
        pictures = "".join(_picture(image["bytes"]) for image, _ in zip(images, range(text.count("<image>")), strict=False))
        turns.append(f'<li class="{escape(message["role"])}"><h5>{escape(message["role"])}</h5>'
                     f'<pre>{_cut(text.replace("<image>", ""))}</pre>{pictures}</li>')
    extra = f'<pre class="extra">{_cut(row["extra_info"])}</pre>' if row["extra_info"] not in (None, "{}") else ""
    return (f'<article><header><b>{escape(str(row["source_file"]))} row {row["source_row"]}</b> '
            f'<span>{_cut(row["detail"] or "")}</span></header><ol>{"".join(turns)}</ol>{extra}</article>')


def _cut(text: str) -> str:
    more = f" … ({len(text) - _MAX_TEXT} more characters)" if len(text) > _MAX_TEXT else ""
    return escape(text[:_MAX_TEXT]) + more


def _picture(data: bytes) -> str:
    try:
        image = decode_image(data, "picture")
    except DataError:
        return '<p class="why">(a picture that can\'t be read)</p>'
    image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.BOX)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(encode_png(image)).decode()}">'
