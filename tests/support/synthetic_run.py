"""A finished run's folder without a model: real records, real dumps, real metrics; only the policy is a coin.

The policy calls python with probability `eager` where no tool is needed and `useful` where one is; it answers needed
tasks rightly only after a crop. Used by the tests of metrics, dumps, evaluation and the report.
"""
from __future__ import annotations

import io
import itertools
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

from hdpo.agent.queue import static_queue
from hdpo.config import Config
from hdpo.config.file import dump_config
from hdpo.evaluation.evaluate import evaluate, write_summary
from hdpo.reward.audit import AuditLog, audit_record
from hdpo.state.dump import write_rollouts
from hdpo.train.jsonl import JsonlSink
from hdpo.train.metrics import Metrics
from hdpo.train.rollout_metrics import rollout_rows, rollout_scalars
from hdpo.types import EndReason, Judgement, Reward, RewardedGroup, Task, ToolCall, Trajectory, Verdict

CODE = "crop = image_1.crop((300, 40, 380, 100)).resize((320, 240))\nplt.imshow(crop)\nplt.show()"


def make_task(index: int, needed: bool) -> Task:
    digit = str((index * 7 + 3) % 10)
    picture = _picture(digit, tiny=needed)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    question = ("Which digit is printed on the small label near the upper right corner?" if needed
                else "Which digit is printed on the large sign?")
    messages = [{"role": "system", "content": "Solve the problem; call tools only when they help."},
                {"role": "user", "content": "<image>" + question}]
    source = "toy/small_print" if needed else "toy/large_print"
    return Task(f"toy_{index:04d}", source, messages, (buffer.getvalue(),), digit, {"tool_needed": needed, "index": index})


def _picture(digit: str, tiny: bool) -> Image.Image:
    image = Image.new("RGB", (448, 320), (222, 230, 236))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 210, 448, 320), fill=(150, 168, 140))
    draw.rectangle((40, 90, 200, 250), fill=(178, 84, 66))
    draw.polygon([(30, 90), (120, 20), (210, 90)], fill=(110, 60, 50))
    if tiny:
        draw.rectangle((325, 58, 349, 82), fill="white", outline="black")
        draw.text((334, 64), digit, fill="black", font_size=11)
    else:
        draw.rectangle((270, 60, 410, 220), fill="white", outline="black", width=3)
        draw.text((315, 75), digit, fill="black", font_size=110)
    return image


def make_trajectory(task: Task, sample_index: int, *, call: bool, right: bool,
                    end: EndReason = EndReason.ANSWERED) -> Trajectory:
    image = Image.open(io.BytesIO(task.images[0])).convert("RGB")
    truth = str(task.ground_truth)
    answer = truth if right else str((int(truth) + 1) % 10)
    turns, calls, images = [], [], [image]
    if call:
        action = json.dumps({"name": "python", "arguments": {"code": CODE}})
        turns.append(f"<reason>The label is small; I'll enlarge it.</reason>\n<tool_call>{action}</tool_call>")
        calls.append(ToolCall("python", {"code": CODE}, True, "Code execution result:\n<image>", 1, 0.21))
        images.append(image.crop((300, 40, 380, 100)).resize((320, 240), Image.Resampling.LANCZOS))
    if end is EndReason.ANSWERED:
        turns.append(f"<reason>I can read the digit {answer}.</reason>\n<answer>{answer}</answer>")
    prompt, given, sampled = 140, 90 * len(calls), 30 * max(1, len(turns))
    length = prompt + given + sampled
    mask = [0] * prompt + [1] * 30 * len(calls) + [0] * given + [1] * (sampled - 30 * len(calls))
    return Trajectory(
        task=task, sample_index=sample_index, token_ids=[17 * n % 151_000 for n in range(length)], mask=mask,
        log_probs=[-0.25 * m for m in mask], prompt_length=prompt, images=tuple(images), calls=tuple(calls), end=end,
        turns=tuple(turns), weight_version=3, seconds=1.0 + 2.0 * len(calls))


def score(trajectories: tuple[Trajectory, ...], index: int = 0) -> RewardedGroup:
    """Exact match; an infrastructure end is unscored."""
    task = trajectories[0].task
    judgements, rewards = [], []
    for trajectory in trajectories:
        scored = trajectory.end.scorable
        right = scored and f"<answer>{task.ground_truth}</answer>" in trajectory.final_turn
        verdict = Verdict.UNSCORED if not scored else Verdict.CORRECT if right else Verdict.WRONG
        judgements.append(Judgement(verdict, "rule" if scored else "none", "exact"))
        formatted = scored and trajectory.end is EndReason.ANSWERED
        tool = right / (trajectory.num_tool_calls + 1)
        rewards.append(Reward(0.9 * right + 0.1 * formatted, tool, right, formatted, scored))
    return RewardedGroup(task, trajectories, tuple(judgements), tuple(rewards), index)


class CoinRollouts:
    """A policy of coins behind the interface of the real rollouts; also the scorer."""

    def __init__(self, seed: int, eager: float, useful: float) -> None:
        self.seed, self.eager, self.useful = seed, eager, useful

    def collect(self, tasks, *, queue, group_size, temperature, step, weight_version):
        mine = itertools.takewhile(lambda number: number < len(tasks), iter(queue.claim, None))
        return [tuple(self._one(tasks[number], sample, step) for sample in range(group_size)) for number in mine]

    def _one(self, task: Task, sample: int, step: int) -> Trajectory:
        coin = random.Random(f"{self.seed}/{task.id}/{sample}/{step}")
        needed = task.extra["tool_needed"]
        call = coin.random() < (self.useful if needed else self.eager)
        right = coin.random() < (0.92 if not needed or call else 0.1)
        return make_trajectory(task, sample, call=call, right=right)

    def score(self, groups):
        return [score(group, group[0].index) for group in groups]


def write_run(folder: Path, *, steps: int = 24, seed: int = 5) -> Path:
    """A whole run: config, metrics of `steps` steps, dumps of two, evaluation before and after, summary, audit."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(Config()))
    tasks = [make_task(index, needed=index % 2 == 0) for index in range(8)]
    sink = JsonlSink(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        progress = step / steps
        policy = CoinRollouts(seed, eager=max(0.03, 0.95 - 1.2 * progress), useful=0.9)
        groups = policy.score(policy.collect(
            tasks, queue=static_queue(), group_size=4, temperature=1.0, step=step, weight_version=step))
        sink.write(step, rollout_scalars(rollout_rows(groups)) | _training_scalars(step, progress))
        if step in (1, steps):
            write_rollouts(folder / "rollouts" / f"step_{step:06d}.parquet", groups, step=step)
    sink.close()
    held_out = [make_task(100 + index, needed=index % 2 == 0) for index in range(24)]
    summaries = {}
    for name, eager in (("sft", 0.95), ("rl", 0.04)):
        policy = CoinRollouts(seed, eager=eager, useful=0.95)
        result = evaluate(policy, policy, held_out)
        write_rollouts(folder / "eval" / f"{name}.parquet", result.groups, step=0)
        summaries[name] = result.summary
    write_summary(folder / "summary.json", summaries)
    _write_audit(folder / "audit")
    return folder


def _training_scalars(step: int, progress: float) -> dict[str, float]:
    coin = random.Random(step)
    metrics = Metrics()
    metrics.add("mismatch/k1", 2e-4 * coin.random())
    metrics.add("mismatch/k3", 1e-4 * (1 + coin.random()))
    metrics.maximum("mismatch/ratio_max", 1.1 + 0.3 * coin.random())
    metrics.add("actor/grad_norm", 0.4 + 0.3 * coin.random())
    metrics.add("actor/entropy", 0.6 - 0.3 * progress)
    phases = {"sync": 4, "rollout": 60 - 20 * progress, "score": 6, "update": 35, "evaluate": 3}
    for phase, seconds in phases.items():
        metrics.add(f"time/{phase}", seconds * (0.9 + 0.2 * coin.random()))
    return metrics.reduce_over_ranks()


def _write_audit(folder: Path) -> None:
    """Two rollouts that the judge was asked about too (it disagrees on the first), one that it was not."""
    records = []
    for index, second in ((0, Verdict.WRONG), (2, Verdict.CORRECT), (4, None)):
        trajectory = make_trajectory(make_task(index, needed=True), 0, call=True, right=True)
        judgement = Judgement(Verdict.CORRECT, "rule", "exact")
        records.append(audit_record(trajectory, judgement, second and Judgement(second, "judge", f"<{second.value}>")))
    AuditLog(folder).write(1, records)
