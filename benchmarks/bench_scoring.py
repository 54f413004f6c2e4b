"""Does scoring keep the judge busy, is a repeated run free, and how many answers need no judge at all?

    python benchmarks/bench_scoring.py [--short] [--json FILE]

2048 trajectories with different free-text answers (so that no rule decides and none shares a verdict) against a server
that takes 200 ms per request, in a process of its own, at concurrency 128: ideally 2048 / 128 * 0.2 s = 3.2 s. Then the
same again with fresh objects on the same cache file. Wall time, because waiting is the point: run it on an idle machine.
"""
from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Figure, arguments, report

from hdpo.adapters.openai_judge import OpenAIJudge
from hdpo.background import BackgroundLoop, freeze_heap
from hdpo.config import JudgeConfig, RewardConfig
from hdpo.reward.rules import rule_verdict
from hdpo.reward.scoring import Scorer
from hdpo.reward.verdict_cache import CachedJudge
from hdpo.types import EndReason, Task, Trajectory, Verdict

LATENCY_S, CONCURRENCY, GROUP = 0.2, 128, 16
LABELLED = Path(__file__).parents[1] / "tests" / "reward" / "rules_labelled.jsonl"
QUESTION = "<image>Read the caption below the second figure and say which of the described events came first. " * 3


def serve() -> None:
    """The server's process: prints its port, answers every request after LATENCY_S."""
    from aiohttp import web

    message = {"role": "assistant", "content": "INCORRECT"}
    reply = {"id": "c", "object": "chat.completion", "created": 1, "model": "bench",
             "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
             "usage": {"prompt_tokens": 400, "completion_tokens": 2, "total_tokens": 402}}

    async def chat(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(LATENCY_S)
        return web.json_response(reply)

    async def main() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", chat)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()

    asyncio.run(main())


def trajectories(count: int) -> list[tuple[Trajectory, ...]]:
    def one(task: Task, i: int) -> Trajectory:
        answer = f"the one described in line {'i' * (i % 50)}{i:x} of the caption, which speaks of the harbour"
        return Trajectory(task, i, [1, 2], [0, 1], [0.0, -1.0], 1, (), (), EndReason.ANSWERED, (f"<answer>{answer}</answer>",))

    tasks = [Task(f"t{n}", "web", [{"role": "user", "content": f"{QUESTION}{n}"}], (), "the storm that destroyed the pier")
             for n in range(count // GROUP)]
    return [tuple(one(task, GROUP * n + i) for i in range(GROUP)) for n, task in enumerate(tasks)]


def score(groups: list[tuple[Trajectory, ...]], port: int, cache: Path) -> tuple[float, float, dict[str, float]]:
    """(wall seconds, CPU seconds, statistics) of one step on fresh objects."""
    background = BackgroundLoop()
    config = JudgeConfig(base_url=f"http://127.0.0.1:{port}/v1", model="bench", concurrency=CONCURRENCY)
    scorer = Scorer(RewardConfig(), CachedJudge(OpenAIJudge(config), cache), background)
    wall, cpu = time.perf_counter(), time.process_time()
    scored = scorer.score(groups)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert all(j.verdict is Verdict.WRONG for group in scored for j in group.judgements), scored[0].judgements[0]
    stats = scorer.stats()
    scorer.close()
    background.close()
    return wall, cpu, stats


def rule_share() -> float:
    rows = [json.loads(line) for line in LABELLED.open(encoding="utf-8")]
    return sum(rule_verdict(r["prediction"], r["ground_truth"], r["policy"], r["question"]).verdict is not Verdict.UNSCORED
               for r in rows) / len(rows)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--serve", action="store_true", help="be the server (used by the benchmark itself)")
    args = parser.parse_args()
    if args.serve:
        serve()
        return 0
    count = 512 if args.short else 2048
    ideal = count / CONCURRENCY * LATENCY_S
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        with tempfile.TemporaryDirectory() as folder:
            score(trajectories(CONCURRENCY), port, Path(folder) / "warm_up.sqlite")   # imports, not scoring
            freeze_heap()   # as a run does before its first step
            cold, cold_cpu, cold_stats = score(trajectories(count), port, Path(folder) / "verdicts.sqlite")
            repeats = [score(trajectories(count), port, Path(folder) / "verdicts.sqlite") for _ in range(3)]
    finally:
        server.kill()
        server.wait()
    again, again_cpu, again_stats = min(repeats, key=lambda r: r[0])
    assert cold_stats["judge/requests"] == count and again_stats["judge/cache_hits"] == count
    goal = None if args.short else 1.3      # four rounds of requests do not pay for the start
    figures = {
        f"S1 {count} judged trajectories, wall / ideal": Figure(cold / ideal, "x", "lower", goal),
        "S1 CPU per judged trajectory": Figure(1e3 * cold_cpu / count, "ms", "lower", None, 1.0),
        "S2 first run / run from cache": Figure(cold / again, "x", "higher", 50, 0.5),
        "S2 CPU per cached trajectory": Figure(1e6 * again_cpu / count, "us", "lower", None, 1.0),
        "S3 labelled answers decided by rules": Figure(100 * rule_share(), "%", "higher", 70, 0.05),
    }
    details = {"cold_s": cold, "cached_s": [r[0] for r in repeats], "ideal_s": ideal, "latency_s": LATENCY_S,
               "concurrency": CONCURRENCY}
    return not report("scoring", figures, details, args.json, args.short)


if __name__ == "__main__":
    sys.exit(main())
