"""How long `hdpo report` of a long run takes to open, as a file and served, in a real headless Chromium.

The run is synthetic but for its form: real dumps (Parquet as state/dump.py writes it), log-probs of the trainer, metrics,
timeline and evaluations. The full run is 200 steps of 2,048 rollouts with 1,500 tokens and one or two pictures each; --short is
20 steps. A time is the fastest of three, from the address to what is looked for being on the screen.
"""
from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import Figure, arguments, report
from PIL import Image

from hdpo.state.dump import SCHEMA, encode_image
from hdpo.train.rollout_metrics import rollout_rows, rollout_scalars
from hdpo.train.timeline import Timeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))      # the browser, and the run's small parts
from browser import Browser, Tab, open_browser  # noqa: E402
from synthetic_run import CODE, CoinRollouts, make_task, write_run  # noqa: E402

PROMPTS, GROUP, TOKENS, PROMPT_TOKENS, RANKS, POOL = 128, 16, 1500, 900, 8, 64
ROWS_OF_A_ROW_GROUP = 13 * GROUP        # what state/dump.py makes of rows with such tokens and pictures
TASKS = 100 * PROMPTS                   # each is met twice in 200 steps
SOURCES = ("charts", "fine_print", "geometry", "search", "photographs")
OPEN_S, FILE_MB = 2.0, 20.0


def pictures(coin: np.random.Generator) -> tuple[list[bytes], list[bytes]]:
    """(photographs of 800 x 600, crops of them): smooth noise, which JPEG makes as large as photographs."""
    whole, crops = [], []
    for _ in range(POOL):
        rough = Image.fromarray(coin.integers(0, 255, (60, 80, 3), dtype=np.uint8)).resize((800, 600), Image.Resampling.BICUBIC)
        grain = Image.fromarray(coin.integers(0, 255, (600, 800, 3), dtype=np.uint8))
        image = Image.blend(rough, grain, 0.12)
        whole.append(encode_image(image))
        crops.append(encode_image(image.crop((200, 150, 520, 390))))
    return whole, crops


def write_step(folder: Path, step: int, coin: np.random.Generator, pool: tuple[list[bytes], list[bytes]]) -> None:
    """The dump of a step, and what the trainer held of it."""
    count = PROMPTS * GROUP
    prompt = np.repeat(np.arange(PROMPTS), GROUP)
    task = ((step - 1) * PROMPTS + prompt) % TASKS
    called, right = coin.random(count) < 0.6, coin.random(count) < 0.7
    advantages = coin.normal(size=(count, 2)).astype(np.float32)
    mask = np.zeros((count, TOKENS), np.int32)
    mask[:, PROMPT_TOKENS:] = 1
    mask[called, PROMPT_TOKENS + 200:PROMPT_TOKENS + 400] = 0
    log_probs = np.where(mask, -coin.exponential(0.4, mask.shape), 0.0).astype(np.float32)
    call = [{"name": "python", "arguments": {"code": CODE}, "ok": True, "num_images": 1, "seconds": 0.4, "infrastructure": False}]
    truth = [str(number % 10) for number in task]
    answers = [one if ok else "no" for one, ok in zip(truth, right, strict=True)]
    action = f"<reason>The label is too small to read; a crop shows it.</reason><tool_call>{json.dumps(call[0])}</tool_call>"
    columns: dict[str, Any] = {
        "step": [step] * count, "task_id": [f"task_{number:06d}" for number in task],
        "data_source": [SOURCES[number % 5] for number in task], "tool_needed": [bool(number % 2) for number in task],
        "sample_index": list(range(GROUP)) * PROMPTS, "prompt": ["[user]\n<image>Which number is on the label?"] * count,
        "question": [f"Which number is on the label {number} near the door of the shop?" for number in task],
        "turns": [([action] if some else []) + [f"<reason>I can read it.</reason><answer>{answer}</answer>"]
                  for some, answer in zip(called, answers, strict=True)],
        "calls": [json.dumps(call if some else []) for some in called],
        "observations": [["Code execution result:\n<image>"] if some else [] for some in called],
        "images": [[pool[0][number % POOL]] + ([pool[1][number % POOL]] if some else [])
                   for number, some in zip(task, called, strict=True)],
        "num_prompt_images": [1] * count, "answer": answers, "ground_truth": [[one] for one in truth],
        "verdict": ["correct" if ok else "wrong" for ok in right], "by": [("rule", "judge")[number % 2] for number in prompt],
        "detail": ["exact"] * count, "end": ["answered"] * count, "error": [""] * count,
        "reward_accuracy": right.astype(float), "reward_tool": right / (called + 1.0), "correct": right,
        "format_ok": [True] * count, "scored": [True] * count, "advantages": advantages.tolist(),
        "num_tool_calls": called.astype(int), "prompt_length": [PROMPT_TOKENS] * count,
        "token_ids": tokens(coin.integers(0, 151_000, mask.shape)), "mask": tokens(mask),
        "log_probs": pa.ListArray.from_arrays(ends(count, TOKENS), pa.array(log_probs.ravel())),
        "weight_version": [step] * count, "seconds": 10 + 20 * coin.random(count),
        "weight_versions": tokens(mask * step - (1 - mask)), "index": prompt}
    path = folder / "rollouts" / f"step_{step:06d}.parquet"
    pq.write_table(pa.table(columns, schema=SCHEMA), path, compression="zstd", row_group_size=ROWS_OF_A_ROW_GROUP,
                   dictionary_pagesize_limit=2**30)
    sampled = mask.sum(1)
    trained = pa.ListArray.from_arrays(pa.array(np.concatenate([[0], sampled.cumsum()]).astype(np.int32)),
                                       pa.array(log_probs[mask.astype(bool)] + np.float32(0.01)))
    pq.write_table(pa.table({"group": prompt, "sample": columns["sample_index"], "log_probs": trained, "updated": trained}),
                   folder / "rollouts" / "trainer" / f"step_{step:06d}.rank0.parquet", compression="zstd", use_dictionary=False)


def ends(count: int, each: int) -> pa.Array:
    return pa.array(np.arange(0, count * each + 1, each, dtype=np.int32))


def tokens(values: np.ndarray) -> pa.Array:
    """[B, L] as lists."""
    return pa.ListArray.from_arrays(ends(*values.shape), pa.array(values.astype(np.int32).ravel()))


def write_long_run(folder: Path, steps: int) -> None:
    """A run with evaluations before and after, and `steps` full steps."""
    write_run(folder, steps=1)
    for part in (folder / "rollouts").iterdir():
        part.unlink()
    (folder / "rollouts" / "trainer").mkdir()
    coin, pool = np.random.default_rng(1), pictures(np.random.default_rng(2))
    (folder / "metrics.jsonl").unlink()
    policy, tasks = CoinRollouts(1, 0.5, 0.9), [make_task(index, index % 2 == 0) for index in range(8)]
    groups = policy.score([tuple(policy._one(task, sample, 0) for sample in range(4)) for task in tasks])
    scalars = rollout_scalars(rollout_rows(groups))
    timeline = Timeline(folder / "timeline.jsonl")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            write_step(folder, step, coin, pool)
            phases = {"sync": 5.0, "rollout": 70 + 5 * random.random(), "score": 4.0, "old_log_prob": 9.0, "update": 40.0,
                      "log": 1.0}
            noisy = {name: value * (0.9 + 0.2 * random.random()) for name, value in scalars.items()}
            file.write(json.dumps({"step": step, **noisy,
                                   **{f"time/{name}": seconds for name, seconds in phases.items()}}) + "\n")
            starts = dict(zip(phases, np.cumsum([0, *phases.values()]), strict=False))
            timeline.write(step, sum(phases.values()), [
                {"spans": [[name, round(float(starts[name]), 3), round(seconds, 3)] for name, seconds in phases.items()],
                 "parts": {"rollout": {"generation": 60.0, "tools": 6.0, "ranks": rank}}} for rank in range(RANKS)])


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, float]]:
    """(address, seconds until it was printed) of a real `hdpo report --serve`."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "hdpo", "report", str(folder), "--serve", "--port", "0"],
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), time.perf_counter() - started
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def fastest(browser: Browser, look: Callable[[Tab], float], times: int = 3) -> float:
    """Seconds; each time in a new page with nothing cached."""
    found = []
    for _ in range(times):
        page = browser.page()
        page._call("Network.setCacheDisabled", cacheDisabled=True)
        found.append(look(page))
        assert page.errors() == [], page.errors()
        page.close()
    return min(found)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


OVERVIEW = "document.querySelectorAll('.charts svg').length > 5 && document.querySelector('.tile')"
CLICK = "document.querySelector('[data-tab={}]').click()"
LIST = "document.querySelectorAll('.browser .row').length > 20 && document.querySelector('.detail .verdict')"


def measure(folder: Path, last: int) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}

    def note(name: str, seconds: float, goal: float | None = OPEN_S) -> None:
        figures[name] = Figure(seconds, "s", "lower", goal, tolerance=1.0)
    note("file: written in", timed(lambda: subprocess.run(
        [sys.executable, "-m", "hdpo", "report", str(folder)], check=True, stdout=subprocess.DEVNULL)), None)
    file = folder / "report.html"
    figures["file: size"] = Figure(file.stat().st_size / 1e6, "MB", "lower", FILE_MB)
    step = f"#rollouts?dump=0/step_{last:06d}"

    def open_until(address: str, condition: str) -> Callable[[Tab], float]:
        return lambda page: timed(lambda: (page.open(address), page.until(condition)))

    def then(address: str, act: Callable[[Tab], object]) -> Callable[[Tab], float]:
        def look(page: Tab) -> float:
            page.open(address).until(LIST)
            return timed(lambda: act(page))
        return look

    def act(change: str, condition: str) -> Callable[[Tab], object]:
        return lambda page: (page.js(change), page.until(condition))
    acts = {
        "another step": act("document.querySelector('#before').click()",
                            f"document.querySelector('.detail .meta')?.innerText.startsWith('step {last - 1},')"),
        "tokens of a rollout": act(CLICK.format("tokens"), "document.querySelector('.token.sampled')"),
        "its group side by side": act(CLICK.format("group"), f"document.querySelectorAll('.beside .rollout').length === {GROUP}"),
        "text search in a step": lambda page: (
            page.key("/"), page.type("a crop shows"),
            page.until("/^[\\d,]+ of 2,048 rows/.test(document.querySelector('.count').innerText)")),
        "the same task in all steps": act(
            CLICK.format("history"), "document.querySelector('[data-facet=other]') || document.querySelector('.detail .empty')"),
    }
    with open_browser() as browser:
        note("file: overview", fastest(browser, open_until(file.as_uri(), OVERVIEW)))
        rows = "document.querySelector('.browser .row') && document.querySelector('.detail .verdict')"
        note("file: rollouts of the last step", fastest(browser, open_until(file.as_uri() + step, rows)))
        with served(folder) as (address, ready):
            note("served: ready", ready, None)
            note("served: overview", fastest(browser, open_until(address, OVERVIEW)))
            note("served: 2,048 rows of a step", fastest(browser, open_until(address + step, LIST)))
            for name, one in acts.items():
                note(f"served: {name}", fastest(browser, then(address + step, one)))
    return figures


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--run", type=Path, help="a folder to make the run in, which stays; if it is there, it is used")
    options = parser.parse_args()
    steps = 20 if options.short else 200
    with tempfile.TemporaryDirectory(prefix="bench-report-") as scratch:
        folder = options.run or Path(scratch) / "run"
        if not (folder / "metrics.jsonl").exists():
            write_long_run(folder, steps)
        size = sum(part.stat().st_size for part in folder.rglob("*.parquet"))
        print(f"{steps} steps of {PROMPTS * GROUP:,} rollouts, {size / 1e9:.1f} GB of dumps", flush=True)
        met = report("report", measure(folder, steps), {"steps": steps, "rollouts": PROMPTS * GROUP, "bytes": size},
                     options.json, options.short)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
