"""How much memory an evaluation takes that streams 20,000 questions with pictures of 3 MB each.

The rows are MME-RealWorld's: JSON with paths of pictures, or (--layout parquet) the pictures inside. Everything but the model
is real: reading, decoding, bounding, rollouts, the kept answers, scoring. The engine answers at once. The full run is the
20,000 rows over 64 different files; --short is 600. Pictures are of noise, a megapixel each, uncompressed.
"""
from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from common import Figure, arguments, report
from PIL import Image
from rollout_world import toy_chat

from hdpo.agent.rollout import Rollouts
from hdpo.background import BackgroundLoop
from hdpo.config import Config
from hdpo.evaluation.benchmarks import open_benchmarks
from hdpo.evaluation.finish import finish
from hdpo.evaluation.kept import Kept
from hdpo.evaluation.runner import Plan, Runner, bounded_sequences, selected
from hdpo.evaluation.score import read_items
from hdpo.protocols import GenerateRequest, ToolResult
from hdpo.ranks.world import World
from hdpo.types import Completion, StopReason, Task

FILES, SIDE, MAX_PIXELS = 64, 1024, 1 << 20
CHOICES = ["(A) one", "(B) two", "(C) three", "(D) four", "(E) none"]


class PromptEngine:
    """Answers every request in the next step."""

    max_model_len = 1 << 20

    def __init__(self, chat: Any, max_num_seqs: int) -> None:
        self._ids = [*chat.encode_turn("<answer>A</answer>"), chat.end_of_turn_id]
        self._rows: dict[str, GenerateRequest] = {}
        self._most = max_num_seqs

    def add_request(self, request_id: str, request: GenerateRequest) -> None:
        self._rows[request_id] = request

    def step(self) -> list[tuple[str, Completion]]:
        names = list(self._rows)[:self._most]
        for name in names:
            del self._rows[name]
        done = Completion(self._ids, [-0.5] * len(self._ids), StopReason.END_OF_TURN, 0)
        return [(name, done) for name in names]

    def num_unfinished(self) -> int:
        return len(self._rows)

    def abort(self, request_ids: Sequence[str]) -> None:
        for name in request_ids:
            self._rows.pop(name, None)


class NoTools:
    async def call(self, trajectory_id: str, action: str, task: Task) -> ToolResult:
        return ToolResult("")

    def expect(self, trajectory_id: str) -> None: ...

    async def finish(self, trajectory_id: str) -> None: ...

    async def close(self) -> None: ...


def write_rows(folder: Path, rows: int, layout: str) -> None:
    (folder / "images").mkdir(parents=True)
    for k in range(FILES):
        noise = np.random.default_rng(k).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"{k}.bmp")
    common = [{"question": "How many?", "multi-choice options": CHOICES, "answer": "AB"[k % 2],
               "category": "Perception/Monitoring",
               "l2-category": "count"} for k in range(rows)]
    if layout == "json":
        (folder / "MME_RealWorld.json").write_text(json.dumps([
            {"Question_id": str(k), "Image": f"{k % FILES}.bmp", "Text": row["question"], "Answer choices": CHOICES,
             "Ground truth": row["answer"], "Task": "Perception", "Subtask": "Monitoring", "Category": "count"}
            for k, row in enumerate(common)]))
        return
    writer = None
    for start in range(0, rows, 50):
        part = pa.Table.from_pylist([{**row, "index": start + k,
                                      "bytes": (folder / "images" / f"{(start + k) % FILES}.bmp").read_bytes()}
                                     for k, row in enumerate(common[start:start + 50])])
        writer = writer or pq.ParquetWriter(folder / "train.parquet", part.schema, use_dictionary=False, compression="none")
        writer.write_table(part)
    assert writer is not None
    writer.close()


class Watch(threading.Thread):
    """The most anonymous memory the process held, bytes: pages of mapped files, which the system may drop, are not counted."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.most_resident, self._stop_it = 0, 0, threading.Event()

    def run(self) -> None:
        process = psutil.Process()
        while not self._stop_it.wait(0.1):
            info = process.memory_info()
            self.most = max(self.most, info.rss - info.shared)
            self.most_resident = max(self.most_resident, info.rss)

    def stop(self) -> None:
        self._stop_it.set()
        self.join()


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=0, help="questions (20,000; with --short 600)")
    parser.add_argument("--layout", choices=("json", "parquet"), default="json")
    options = parser.parse_args()
    rows = options.rows or (600 if options.short else 20_000)
    folder = Path(tempfile.mkdtemp(prefix="hdpo-bench-eval-"))
    try:
        write_rows(folder / "data" / "mmerealworld", rows, options.layout)
        config = Config.model_validate({"run": {"folder": str(folder), "name": "r"}, "data": {"cache": str(folder / "cache")}})
        chat = toy_chat(MAX_PIXELS)
        config = bounded_sequences(config, chat.max_pixels)
        watch, started = Watch(), time.monotonic()
        watch.start()
        background = BackgroundLoop()
        rollouts = Rollouts(PromptEngine(chat, config.rollout.max_num_seqs), chat, NoTools(), background, config.rollout,
                            config.tools, 1 << 20)
        benchmarks, data = open_benchmarks("mmerealworld"), folder / "data"
        items = {"mmerealworld": read_items(benchmarks[0], data)}
        kept, plan = Kept(folder / "r" / "benchmarks"), Plan()
        Runner(config, plan, World(), lambda refuse: rollouts, kept).run(benchmarks, items, data)
        kept.close()
        found = finish(kept.folder, kept, benchmarks, items, data, selected(benchmarks, items, plan, kept.known()), {},
                       judge=None,
                       background=background)
        seconds = time.monotonic() - started
        watch.stop()
        rollouts.close()
        background.close()
        record = found.records["mmerealworld"]
        assert record["n"] == rows and record["score"] == 0.5 and not record["unscored"], record
        figures = {"resident": Figure(watch.most_resident / 2**30, "GiB", "lower", 2.0 if options.layout == "json" else None),
                   "resident without mapped files": Figure(watch.most / 2**30, "GiB", "lower", 2.0),
                   "questions per second": Figure(rows / seconds, "1/s", "higher")}
        return 0 if report("eval", figures, {"rows": rows, "layout": options.layout, "live": config.rollout.max_num_seqs},
                           options.json, options.short) else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
