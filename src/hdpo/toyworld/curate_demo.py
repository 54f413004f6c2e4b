"""`hdpo curate-demo`: the embedded world recorded in five public layouts with planted faults, through all three stages.

What was planted is known, so what each stage finds is counted as precision and recall, and must be 1 in stages 1 and 2.

Whether a question needs a tool is a fact about the model too: the world says which questions can't be answered without one, but
the demo's model misreads some large digits that it could read. So before anything is recorded it is asked POOL times as many
candidates, REFERENCE times each, with another seed and in the layout they would be recorded in. Planted are those alone on
which world and model agree: no tool needed and nearly always right without one, or needed and hardly ever right. Stage 2 does
not know of this: it has other samples, 8 a row, and must drop all of the first and none of the second.

Stage 3 asks a scripted judge, a stand-in that is named as such: it finds absurd reasoning, and is wrong on purpose for one
question in ten. What must be dropped then is known to the row, and with it the precision and recall that come out.
"""
from __future__ import annotations

import argparse
import http.server
import json
import os
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from hdpo.compose.curate import main as curate
from hdpo.errors import UserError
from hdpo.state.checkpoint import step_folders
from hdpo.toyworld.families import Puzzle
from hdpo.toyworld.recordings import EXPECTED, SOURCES, Recording, draw, faults_of, record
from hdpo.toyworld.words import PLAIN_SYSTEM

Key = tuple[str, int]
"""Source and row."""
THRESHOLD, REFERENCE = 0.75, 32
POOL = 2
CLEAR = (0.25, 0.97)
"""Shares of right reference samples up to and from which a question may be planted: eight samples then err once in some 500."""
TOOLS = [source for source in SOURCES if source != "openmm"]
"""Sources that record calls, of which alone stage 2 asks."""


def main(argv: Sequence[str]) -> int:
    """0 when each stage found exactly what it had to. Raises HdpoError."""
    parser = argparse.ArgumentParser(
        prog="hdpo curate-demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/curate_demo"), help="folder to write (%(default)s)")
    parser.add_argument("--rows", type=int, default=42, help="rows of each source (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the world (%(default)s)")
    parser.add_argument("--model", type=Path, help="model of stage 2 (default: runs/demo/sft's last checkpoint)")
    parser.add_argument("--stages", default="1,2,3", help="which stages (%(default)s)")
    options = parser.parse_args(argv)
    started, stages, settings = time.monotonic(), options.stages.split(","), _settings(options)
    puzzles = {source: draw(options.seed + number, 8 * POOL * options.rows) for number, source in enumerate(SOURCES)}
    solved: dict[str, dict[Puzzle, float]] = {}
    if "2" in stages:
        print(f"what may be planted for stage 2: {REFERENCE} samples of each candidate, with another seed")
        solved = reference(options, puzzles, settings)

    def suits(source: str, puzzle: Puzzle, fault: str) -> bool:
        return fault in EXPECTED or source not in solved or planted(puzzle, solved[source].get(puzzle)) is not None
    recordings = [record(options.out / "recorded" / source, source, puzzles[source], faults_of(source, options.rows),
                         partial(suits, source)) for source in SOURCES]
    with scripted_judge() as url:
        status = curate([*_sources(recordings), "--out", str(options.out / "curated"), "--stages", options.stages, *settings,
                         "--set", f"judge.base_url={url}", "--set", "judge.model=scripted"])
    print()
    status = max(status, compare(options.out / "curated", recordings, stages, solved))
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    return status


def planted(puzzle: Puzzle, share: float | None) -> bool | None:
    """Whether the question is planted as one that needs no tool, or as one that needs it (False); None: as neither."""
    if share is None or CLEAR[0] < share < CLEAR[1]:
        return None
    needless = share >= CLEAR[1]
    return needless if puzzle.tool_needed is (not needless) else None


def reference(options: argparse.Namespace, puzzles: Mapping[str, Sequence[Puzzle]],
              settings: Sequence[str]) -> dict[str, dict[Puzzle, float]]:
    """By source and puzzle, the share of right samples of the candidates."""
    count = POOL * options.rows
    candidates = [record(options.out / "candidates" / source, source, puzzles[source], [""] * count) for source in TOOLS]
    out = options.out / "reference"
    curate([*_sources(candidates), "--stages", "2", "--out", str(out), *settings, "--set",
            f"curation.necessity.samples={REFERENCE}", "--set", f"run.seed={options.seed + 1000}"])
    place = {recording.source: recording.puzzles for recording in candidates}
    found: dict[str, dict[Puzzle, float]] = {source: {} for source in TOOLS}
    for name in ("kept", "dropped"):
        for row in pq.read_table(out / f"{name}.parquet", columns=["source", "source_row", "extra_info"]).to_pylist():
            extra = json.loads(row["extra_info"] or "{}")
            if extra.get("pass_samples"):
                found[row["source"]][place[row["source"]][row["source_row"]]] = extra["pass8"] / extra["pass_samples"]
    return found


def _sources(recordings: Sequence[Recording]) -> list[str]:
    return [x for r in recordings for x in ("--source", f"{r.source}={r.file}")]


def _settings(options: argparse.Namespace) -> list[str]:
    settings: dict[str, Any] = {"curation.judgement.send_images": "false", "curation.necessity.system": PLAIN_SYSTEM,
                                "curation.necessity.threshold": THRESHOLD, "data.cache": options.out / "cache"}
    if "2" in options.stages:
        model = options.model
        if model is None:
            found = step_folders(Path("runs/demo/sft"))
            if not found:
                raise UserError("stage 2 samples with the model of `make demo`: run it first, or give --model or --stages 1,3")
            model = found[-1]
        settings["model.path"] = model
    return ["--config", "demo_rl", *(x for key, value in settings.items() for x in ("--set", f"{key}={value}"))]


def wrong_on_purpose(question: str) -> bool:
    """Whether the scripted judge errs on trajectories of this question."""
    return zlib.crc32(question.encode()) % 10 == 0


@contextmanager
def scripted_judge() -> Any:
    """The base URL of a scripted OpenAI-compatible judge on this machine; no model: it looks for the word ABSURD."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][1]["content"]
            question = text.split("[user]\n", 1)[1].split("\n\n[assistant]\n", 1)[0]
            low = ("ABSURD" in text) != wrong_on_purpose(question)
            scores = {"visual_relevance": 1 if low else 5, "reasoning_coherence": 2 if low else 4, "tool_rationale": 4}
            reply = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": {
                "role": "assistant", "content": json.dumps(scores)}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ.setdefault("JUDGE_API_KEY", "none")
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def compare(curated: Path, recordings: Sequence[Recording], stages: Sequence[str],
            solved: Mapping[str, Mapping[Puzzle, float]]) -> int:
    """Print precision and recall of each stage; 1 when one of them has not dropped exactly what it had to."""
    dropped: dict[str, set[Key]] = {"1": set(), "2": set(), "3": set()}
    questions: dict[Key, str] = {}
    for name in ("kept", "dropped"):
        for row in pq.read_table(curated / f"{name}.parquet").to_pylist():
            key = row["source"], row["source_row"]
            questions[key] = next((m["content"] for m in row["messages"] or () if m["role"] == "user"), "")
            if name == "dropped":
                dropped["1" if row["stage"] == "read" else row["stage"]].add(key)
    truth: dict[str, set[Key]] = {"1": set(), "2": set(), "3": set()}
    for r in recordings:
        for row, (puzzle, fault) in enumerate(zip(r.puzzles, r.faults, strict=True)):
            if fault in EXPECTED:
                truth["1"].add((r.source, row))
            elif r.source in solved and planted(puzzle, solved[r.source][puzzle]):
                truth["2"].add((r.source, row))
            elif fault == "absurd":
                truth["3"].add((r.source, row))
    exact = True
    for stage in stages:
        wanted, more = truth[stage], ""
        if stage == "3":
            reached = questions.keys() - truth["1"] - truth["2"]
            wanted = {key for key in reached if (key in truth["3"]) != wrong_on_purpose(questions[key])}
            more = f"; with the errors of its judge, one question in ten, {_figures(truth[stage], wanted)} is right"
        print(f"stage {stage}: {len(truth[stage])} planted, {len(dropped[stage])} dropped, "
              f"{_figures(truth[stage], dropped[stage])}{more}")
        exact &= dropped[stage] == wanted
    return 0 if exact else 1


def _figures(truth: set[Key], dropped: set[Key]) -> str:
    hits = len(dropped & truth)
    return f"precision {hits / max(1, len(dropped)):.3f} and recall {hits / max(1, len(truth)):.3f}"
