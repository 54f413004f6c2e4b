"""`hdpo curate-demo`: the embedded world recorded in five public layouts with planted faults, through all three stages.

What was planted is known, so what each stage finds is counted as precision and recall. Stage 2 samples with a real engine and
the model of `make demo` after SFT; stage 3 asks a scripted judge, a stand-in that is named as such: it finds absurd reasoning,
and is wrong in a known way for every tenth row.

Whether a question needs a tool is planted in the world, but whether the model can answer without one is a fact about the model:
it misreads some of the large digits, at any temperature (a lower one makes lucky guesses constant, and precision falls). So
stage 2 is held against what the model does in a reference pass of REFERENCE samples with another seed. Where that is clear
(nearly all right, or few) eight samples must find the same; between, they may fall either way, and those rows are counted.
"""
from __future__ import annotations

import argparse
import http.server
import json
import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from hdpo.compose.curate import main as curate
from hdpo.errors import UserError
from hdpo.state.checkpoint import step_folders
from hdpo.toyworld.recordings import EXPECTED, SOURCES, Recording, write_recordings
from hdpo.toyworld.words import PLAIN_SYSTEM

Key = tuple[str, int]
"""Source and row."""
THRESHOLD, REFERENCE = 0.75, 32
CLEAR = (0.25, 0.97)
"""Shares of the reference samples up to and from which a row is clear: eight samples then err once in some 500 rows."""


def main(argv: Sequence[str]) -> int:
    """0 when stage 1 found what was planted, and stage 2 what the reference pass says. Raises HdpoError."""
    parser = argparse.ArgumentParser(
        prog="hdpo curate-demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/curate_demo"), help="folder to write (%(default)s)")
    parser.add_argument("--rows", type=int, default=42, help="rows of each source (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the world (%(default)s)")
    parser.add_argument("--model", type=Path, help="model of stage 2 (default: runs/demo/sft's last checkpoint)")
    parser.add_argument("--stages", default="1,2,3", help="which stages (%(default)s)")
    options = parser.parse_args(argv)
    recordings = [write_recordings(options.out / "recorded" / source, options.seed + number, options.rows, [source])[0]
                  for number, source in enumerate(SOURCES)]
    command = [*(x for r in recordings for x in ("--source", f"{r.source}={r.file}")), "--out", str(options.out / "curated"),
               "--stages", options.stages, "--config", "demo_rl", *_settings(options)]
    stages = options.stages.split(",")
    with scripted_judge() as url:
        status = curate([*command, "--set", f"judge.base_url={url}", "--set", "judge.model=scripted"])
    solved: dict[Key, float] = {}
    if "2" in stages:
        print(f"\nreference for stage 2: {REFERENCE} samples a row with another seed")
        reference = options.out / "reference"
        curate([*command, "--stages", "2", "--out", str(reference), "--set", f"curation.necessity.samples={REFERENCE}",
                "--set", f"run.seed={options.seed + 1000}"])
        solved = shares(reference)
    return max(status, compare(options.out / "curated", recordings, stages, solved))


def shares(curated: Path) -> dict[Key, float]:
    """Share of right samples of each row that was sampled."""
    found = {}
    for name in ("kept", "dropped"):
        for row in pq.read_table(curated / f"{name}.parquet", columns=["source", "source_row", "extra_info"]).to_pylist():
            extra = json.loads(row["extra_info"] or "{}")
            if extra.get("pass_samples"):
                found[row["source"], row["source_row"]] = extra["pass8"] / extra["pass_samples"]
    return found


def _settings(options: argparse.Namespace) -> list[str]:
    settings = {"curation.judgement.send_images": "false", "curation.necessity.system": PLAIN_SYSTEM,
                "curation.necessity.threshold": THRESHOLD, "data.cache": options.out / "cache"}
    if "2" in options.stages:
        model = options.model
        if model is None:
            found = step_folders(Path("runs/demo/sft"))
            if not found:
                raise UserError("stage 2 samples with the model of `make demo`: run it first, or give --model or --stages 1,3")
            model = found[-1]
        settings["model.path"] = model
    return [x for key, value in settings.items() for x in ("--set", f"{key}={value}")]


def wrong_on_purpose(text: str) -> bool:
    """Whether the scripted judge errs on this trajectory."""
    return zlib.crc32(text.encode()) % 10 == 0


@contextmanager
def scripted_judge() -> Any:
    """The base URL of a scripted OpenAI-compatible judge on this machine; no model: it looks for the word ABSURD."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][1]["content"]
            low = ("ABSURD" in text) != wrong_on_purpose(text)
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


def compare(curated: Path, recordings: Sequence[Recording], stages: Sequence[str], solved: Mapping[Key, float]) -> int:
    """Print precision and recall of each stage; 1 when stage 1 is not what was planted, or stage 2 not what the reference pass
    (`solved`: share of its right samples) says where that is clear."""
    found: dict[Key, tuple[str, str]] = {}
    for row in pq.read_table(curated / "dropped.parquet", columns=["source", "source_row", "stage", "reason"]).to_pylist():
        found[row["source"], row["source_row"]] = row["stage"], row["reason"]
    planted: dict[str, set[Key]] = {"1": set(), "2": set(), "3": set()}
    for r in recordings:
        for row, fault in enumerate(r.faults):
            key = (r.source, row)
            if fault in EXPECTED:
                planted["1"].add(key)
            elif "2" in stages and r.source != "openmm" and not r.tool_needed[row]:
                planted["2"].add(key)
            elif fault == "absurd":
                planted["3"].add(key)
    exact = True
    for stage in stages:
        dropped = {key for key, (where, _) in found.items() if where == stage or (stage == "1" and where == "read")}
        if stage == "2":
            reached = {key for key in solved if key not in planted["1"]}
            clear = {key for key in reached if not CLEAR[0] < solved[key] < CLEAR[1]}
            truth = {key for key in clear if solved[key] >= CLEAR[1]}
            exact &= dropped & clear == truth
            _say("stage 2, by the reference pass", truth, dropped & clear,
                 f"; {len(clear)} of {len(reached)} rows are clear, of the others {len(dropped - clear)} were dropped")
            _say("stage 2, by the world's plan", planted["2"], dropped, "; the model does not solve all of these")
            continue
        _say(f"stage {stage}", planted[stage], dropped,
             " (its judge errs for one row in ten, on purpose)" if stage == "3" else "")
        exact &= stage == "3" or dropped == planted[stage]
    return 0 if exact else 1


def _say(what: str, truth: set[Key], dropped: set[Key], more: str) -> None:
    hits = len(dropped & truth)
    print(f"{what}: {len(truth)} planted, {len(dropped)} dropped, precision {hits / max(1, len(dropped)):.3f}, recall "
          f"{hits / max(1, len(truth)):.3f}{more}")
