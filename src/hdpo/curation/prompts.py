"""Stage 4, prompts for RL: questions that the base model answers sometimes, mixed by share, in the Metis-RL schema.

A group of rollouts that are all right or all wrong teaches accuracy nothing, so 0 < pass share < 1 is kept, by stage 2's counts.
They come of all rows that stage 2 has sampled, also those it dropped from SFT (a threshold below 1) and those whose
recorded reasoning stage 3 dropped: of a prompt only the question and the truth are used.
"""
from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from hdpo.agent.chat import IMAGE_MARKER
from hdpo.config import Config
from hdpo.config.curation import PromptSettings
from hdpo.curation.chunks import DROPPED, KEPT, Entry
from hdpo.curation.record import Record
from hdpo.curation.result import origin
from hdpo.curation.source import Source
from hdpo.errors import ConfigError
from hdpo.evaluation.prompts import system_prompt

RL = "rl"
LEFT_OUT_REASONS = {"duplicate_prompt": "the same question about the same pictures came before",
                    "beyond_its_share": "curation.prompts has no more room for its source"}
PROMPT_SCHEMA = pa.schema([
    ("data_source", pa.string()), ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ("images", pa.list_(pa.struct([("bytes", pa.binary())]))), ("ability", pa.string()),
    ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
    ("extra_info", pa.struct([("index", pa.string()), ("question", pa.string()), ("answer", pa.string()), ("pass8", pa.int64()),
                              ("pass_samples", pa.int64())])),
    ("source", pa.string()), ("source_file", pa.string()), ("source_row", pa.int64())])


def candidate(entry: Entry) -> Entry:
    """A row that stage 2 has decided, as RL sees it: kept, or dropped for what its counts say."""
    assert entry.record is not None
    solved, samples = entry.record.extra.get("pass8"), entry.record.extra.get("pass_samples")
    if not samples:
        return Entry(entry.row, DROPPED, entry.record, "no_pass_count", "stage 2 has not sampled it: it calls no tool")
    if solved in (0, samples):
        return Entry(entry.row, DROPPED, entry.record, "always_solved" if solved else "never_solved",
                     f"{solved} of {samples} samples without tools are right")
    return Entry(entry.row, KEPT, entry.record)


def system_of(config: Config) -> str:
    return config.curation.prompts.system or system_prompt(config.tools)


def apportioned(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """`total` split by shares into whole numbers, the largest remainders first."""
    exact = {name: total * share / sum(shares.values()) for name, share in shares.items()}
    found = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: (found[name] - exact[name], name))[:total - sum(found.values())]:
        found[name] += 1
    return found


def largest_mix(available: Mapping[str, int], shares: Mapping[str, float], wanted: int) -> dict[str, int]:
    """The most prompts, up to `wanted` (0: any number), whose parts by `shares` are all there."""
    shares = {name: share for name, share in shares.items() if share > 0}
    low, high = 0, min(sum(available.values()), wanted or sum(available.values()))
    while high and any(count > available.get(name, 0) for name, count in apportioned(high, shares).items()):
        worst = max(shares, key=lambda name: apportioned(high, shares)[name] / max(1, available.get(name, 0)))
        bound = int(available.get(worst, 0) * sum(shares.values()) / shares[worst]) + len(shares)
        high = max(low, min(high - 1, bound))
    return apportioned(high, shares)


class Selection:
    """Which of the prompts that are offered are taken: each once, and of each source as many as its share says. The choice
    depends on the seed and the rows alone."""

    def __init__(self, settings: PromptSettings, seed: int, sources: Sequence[str]) -> None:
        if unknown := sorted(set(settings.shares) - set(sources)):
            raise ConfigError(f"curation.prompts.shares names {', '.join(unknown)}; the sources are {', '.join(sources)}")
        if settings.shares and not any(settings.shares.values()):
            raise ConfigError("curation.prompts.shares are all 0: nothing would be chosen")
        self._settings, self._seed, self._sources = settings, seed, list(sources)
        self._offered: dict[str, dict[int, None]] = {name: {} for name in sources}      # rows, in order
        self._seen: set[bytes] = set()
        self._taken: dict[str, set[int]] = {}

    def offer(self, source: str, entry: Entry) -> None:
        assert entry.record is not None
        digest = _digest(entry.record)
        if digest not in self._seen:
            self._seen.add(digest)
            self._offered[source][entry.row] = None

    def choose(self) -> tuple[int, dict[str, int]]:
        """(prompts, of each source)."""
        available = {name: len(rows) for name, rows in self._offered.items()}
        shares = self._settings.shares or {name: float(count) for name, count in available.items()}
        quotas = largest_mix(available, shares, self._settings.count) if any(available.values()) else {}
        for name in self._sources:
            coin = random.Random(f"{self._seed}/prompts/{name}")
            self._taken[name] = set(coin.sample(list(self._offered[name]), quotas.get(name, 0)))
        return sum(quotas.values()), quotas

    def left_out(self, source: str, entry: Entry) -> str:
        """Why a prompt that was offered is not taken; "" if it is."""
        if entry.row in self._taken[source]:
            return ""
        return "beyond_its_share" if entry.row in self._offered[source] else "duplicate_prompt"


def _digest(record: Record) -> bytes:
    digest = hashlib.blake2b(" ".join(record.question.split()).encode(), digest_size=16)
    for image in record.images:
        digest.update(hashlib.blake2b(image).digest())
    return digest.digest()


def prompt_row(source: Source, entry: Entry, system: str) -> dict[str, Any]:
    record = entry.record
    assert record is not None
    where = origin(source, entry)
    truth = record.truth or record.answer
    extra = {"index": f"{source.name}_{where['source_row']}", "question": record.question.replace(IMAGE_MARKER, "").strip(),
             "answer": truth, "pass8": record.extra["pass8"], "pass_samples": record.extra["pass_samples"]}
    return {"data_source": source.name, "prompt": record.task(system).messages,
            "images": [{"bytes": data} for data in record.images], "ability": source.name,
            "reward_model": {"ground_truth": truth, "style": "rule"}, "extra_info": extra, **where}
