"""A long bad day: rollouts of the embedded world while tool server, search provider, judge and data files are each odd in 5 % of
their answers. The run ends by itself, no verdict is bent or lost, and every oddity stands in metrics.jsonl under its name.

HDPO_SOAK is the number of rollouts (`make soak`: 2,000). Only the engine replays text.
"""
from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import soak_world
from judge_server import JudgeServer
from scripted import ScriptedEngine

from hdpo import oddities
from hdpo.agent.chat import ChatFormat
from hdpo.agent.rollout import Rollouts
from hdpo.background import BackgroundLoop
from hdpo.compose.logs import open_log
from hdpo.compose.scoring import open_scorer
from hdpo.config import Config
from hdpo.data.tasks import TaskStream
from hdpo.protocols import GenerateRequest
from hdpo.ranks.world import World
from hdpo.state.dump import read_rollouts
from hdpo.state.spool import Spool
from hdpo.toolserver import process
from hdpo.toolserver.client import ToolClient
from hdpo.train.collect import Collector
from hdpo.train.jsonl import read_metrics
from hdpo.types import EndReason, RewardedGroup, Verdict

ROLLOUTS = int(os.environ.get("HDPO_SOAK", "96"))
SHARE = 0.05 if ROLLOUTS > 500 else 0.2
PROMPTS, GROUP = 6, 8

CELLS = [
    "print(6 * 7)", "image_1.crop((1, 1, 30, 30)) if 'image_1' in globals() else 5", "x = (", "!pip install x\nprint(1)",
    "%matplotlib inline\nprint(2)", "Image.new('RGB', (4, 4)).crop((2, 2, 2, 3))", "print('\\ud83d')",
    "Image.fromarray((np.arange(900, dtype=np.uint16) * 70).reshape(30, 30))",
    "import zlib, struct\nclass Odd:\n    canvas, axes = 1, [1]\n    def savefig(self, file, **_):\n        c = lambda k, b: "
    "struct.pack('>I', len(b)) + k + b + struct.pack('>I', zlib.crc32(k + b))\n        file.write(b'\\x89PNG\\r\\n\\x1a\\n' + "
    "c(b'IHDR', struct.pack('>IIBBBBB', 1, 1, 8, 2, 0, 0, 0)) + c(b'IDAT', zlib.compress(bytes(4))) + c(b'iCCP', b'') + "
    "c(b'IEND', b''))\ndisplay(Odd())"]
QUERIES = ["gate code of the fort", "富士山", '"', "“”", "half \\ud83d emoji", "?!"]


def script(prompt: str, request: GenerateRequest) -> str:
    """Up to three calls of all kinds, well- and malformed, then an answer whose verdict its own digit decides."""
    draw, calls = request.seed, prompt.count("<|im_start|>user") - 1
    if draw % 4 and calls < 1 + draw % 3:
        kind = draw // 4 % 10
        if kind < 5:
            return call("python", code=CELLS[draw // 40 % len(CELLS)])
        if kind < 8:
            return call("text_search", query=QUERIES[draw // 40 % len(QUERIES)])
        return call("image_search") if kind == 8 else "<tool_call>{broken</tool_call>"
    return f"<reason>so</reason><answer>kite {draw % 9973} says {draw // 7 % 10}</answer>"


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}</tool_call>"


def serve_tools(closing: ExitStack, provider: str, world: Any, said: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A real tool server in a process of its own, whose hosted search is `provider`."""
    popen = process.subprocess.Popen

    def started(command: list[str], *args: Any, **kwargs: Any) -> Any:
        options = command[command.index("-m") + 2:]
        return popen([sys.executable, soak_world.__file__, provider, *options], *args, **kwargs)
    with monkeypatch.context() as patched:
        patched.setattr(process.subprocess, "Popen", started)
        server, address = process.start_tool_server(
            ["--no-token", "--image-index", str(world.image_index), "--python-timeout", "10"], said)
    closing.callback(lambda: (server.terminate(), server.wait(30)))
    return address


def test_a_bad_day_of_the_whole_world_ends_no_run_and_bends_no_verdict(
        chat: ChatFormat, toy_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, unusable = soak_world.odd_data(toy_world.train, tmp_path, 2 * SHARE, seed=3)
    oddities.take()
    with ExitStack() as closing:
        provider = soak_world.Provider(SHARE, 1)
        closing.callback(provider.close)
        front = soak_world.OddToolServer(
            serve_tools(closing, provider.url, toy_world, tmp_path / "said.log", monkeypatch), SHARE, 2)
        closing.callback(front.close)
        odd_judge = soak_world.OddJudge(SHARE, 4)
        judge = JudgeServer(odd_judge)
        closing.callback(judge.close)
        config = Config.model_validate({
            "run": {"folder": str(tmp_path), "name": "soak"}, "reward": {"rules": {"*": "judge"}},
            "judge": {"base_url": judge.url, "model": "scripted"}, "optim": {"mini_batch_prompts": PROMPTS},
            "rollout": {"prompts_per_step": PROMPTS, "group_size": GROUP, "max_response_tokens": 40_000, "max_turns": 5},
            "data": {"cache": str(tmp_path / "cache"), "max_prompt_tokens": 4096}})
        groups = run(config, chat, files, front.url, closing)
    check(config, groups, provider, front, odd_judge, unusable)


def run(config: Config, chat: ChatFormat, files: list[str], url: str, closing: ExitStack) -> list[RewardedGroup]:
    background, world = BackgroundLoop(), World()
    closing.callback(background.close)
    tasks = TaskStream(files, chat, config.data, seed=1)
    client = ToolClient(url, timeout=60)
    closing.callback(lambda: background.run(client.close()))
    engine = ScriptedEngine(chat, script, max_model_len=100_000, max_num_seqs=64, tokens_per_step=64)
    rollouts = Rollouts(engine, chat, client, background, config.rollout, config.tools, 100_000)
    closing.callback(rollouts.close)
    scorer, log = open_scorer(config, background, world, closing), open_log(config, world, [], 0, closing)
    spool = closing.enter_context(Spool(config, world))
    collect = Collector(config, rollouts, scorer, tasks, world, log, lambda t: (spool.add(t), scorer.submit(t)))
    groups: list[RewardedGroup] = []
    for step in range(math.ceil(ROLLOUTS / (PROMPTS * GROUP))):
        engine.version = step
        collected = collect(step, spool.begin(step))
        assert collected is not None
        groups += collected[0].groups
        log.write(step + 1, {"data/skipped": len(tasks.skipped)}, collected[0].groups, collected[0].advantages)
    return groups


def check(config: Config, groups: list[RewardedGroup], provider: soak_world.Provider, front: soak_world.OddToolServer,
          judge: soak_world.OddJudge, unusable: int) -> None:
    rows = [(t, j, r) for g in groups for t, j, r in zip(g.trajectories, g.judgements, g.rewards, strict=True)]
    lines = read_metrics(config.run.path / "metrics.jsonl")
    counted = Counter[str]()
    for line in lines:
        counted.update({name: line[name] for name in line if name.startswith(("odd/", "judge/"))})
    served = provider.chance.served + front.chance.served + judge.chance.served
    lost = [t for t, j, _ in rows if j.verdict is Verdict.UNSCORED]
    print(f"\n{len(rows)} rollouts, {sum(len(t.calls) for t, _, _ in rows)} calls, {len(lost)} unscored: "
          f"{Counter(t.error[-60:] for t in lost)}\nserved {sorted(served.items())}\ncounted {sorted(counted.items())}")

    assert len(rows) >= min(ROLLOUTS, PROMPTS * GROUP) and lines[0]["data/skipped"] == counted["odd/row/skipped"] == unusable
    for trajectory, judgement, reward in rows:      # every verdict is the one that its answer deserves
        if judgement.verdict is not Verdict.UNSCORED:
            assert trajectory.end is EndReason.ANSWERED and reward.scored
            assert (judgement.verdict is Verdict.CORRECT) == (int(trajectory.final_turn[-10]) % 2 == 0)
        else:
            assert trajectory.end is EndReason.INFRASTRUCTURE and trajectory.error
    assert served[soak_world.LOST] <= len(lost) <= served[soak_world.LOST] + max(2, len(rows) // 200)
    assert all("attempts" in t.error or "serper: " in t.error for t in lost)

    for name in ("odd/search/busy", "odd/search/failed", "odd/text/search", "odd/text/tool", "odd/image/tool",
                 "odd/tool/unreadable_answer", "judge/unreadable", "judge/cut", "judge/retries"):
        # the model's own cells draw broken pictures besides; an answer that got lost on the way took its report with it
        assert counted[name] >= served[name] if name == "odd/image/tool" else counted[name] == served[name], name
    assert counted["odd/tool/failed_attempt"] == served["failed"] + served["odd/tool/unreadable_answer"]
    assert len(read_rollouts(config.run.path / "rollouts")) == len(rows)
