"""Do a step's pictures, spool, dumps, log and tool server keep to their sizes, does anything grow too fast? (S1, S4 to S6, S8)

    python benchmarks/bench_scale.py [--short] [--json FILE]

What reading costs is bench_data.py's. Rollouts here have a photograph each prompt and a crop of a megapixel each rollout, 16 to
a prompt, with 2,000 tokens. Figures for a step are those of the paper's 2,048 rollouts, multiplied up.
"""
from __future__ import annotations

import io
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_batching import qwen_format
from common import Figure, arguments, paired, report
from corpus import jpeg, photograph
from PIL import Image
from server_scale import CROP, NOTHING, served

from hdpo.agent.chat import ChatFormat
from hdpo.config import Config
from hdpo.pixels import expand
from hdpo.ranks.world import World
from hdpo.state.spool import Spool
from hdpo.train.runlog import RunLog
from hdpo.types import EndReason, Judgement, Reward, RewardedGroup, Task, ToolCall, Trajectory, Verdict

GROUP, STEP_ROLLOUTS, TOKENS = 16, 2048, 2000


def groups(chat: ChatFormat, count: int) -> list[RewardedGroup]:
    whole = Image.open(io.BytesIO(jpeg(2250, 1500))).convert("RGB")     # as a tool sees it: decoded
    made = []
    for index in range(count):
        prompt = chat.bound(whole.resize((1280, 960)))
        task = Task(f"{index}", "bench", [{"role": "user", "content": "<image>What is written there?"}], (jpeg(1280, 960),), "7")
        rollouts = []
        for sample in range(GROUP):
            corner = 5 * (GROUP * index + sample) % 400
            crop = chat.bound(whole.crop((corner, corner, corner + 1100, corner + 950)))
            mask = [0] * (TOKENS // 2) + [1] * (TOKENS // 2)
            rollouts.append(Trajectory(
                task, sample, list(range(1000, 1000 + TOKENS)), mask, [-0.7 * sampled for sampled in mask], TOKENS // 2,
                (prompt, crop), (ToolCall("python", {"code": "crop"}, True, "1 image", 1),), EndReason.ANSWERED,
                ("<reason>" + "word " * 200, "<answer>7</answer>"), image_keys=(f"p{index}", f"c{index}.{sample}"), index=index))
        made.append(RewardedGroup(task, tuple(rollouts), (Judgement(Verdict.CORRECT, "rule"),) * GROUP,
                                  (Reward(1.0, 0.5, True, True, True),) * GROUP, index))
    return made


def pixels(chat: ChatFormat) -> tuple[dict[str, Figure], Any]:
    image = chat.bound(photograph(1280, 960))
    frames, whole = chat.vision([image]), chat._processed([image])
    assert frames is not None and frames.scale is not None and whole is not None
    assert expand(frames.pixels[0], frames.scale).equal(whole.pixel_values)
    times = paired({"processor": lambda: chat._processed([image]), "frames": lambda: chat.vision([image])}, "frames", 5)
    area = image.width * image.height
    return {"S4 host bytes a pixel": Figure(frames.pixels[0].nbytes / area, "B", "lower", 3),
            "S4 processor's tensor, bytes a pixel": Figure(whole.pixel_values.nbytes / area, "B", "lower"),
            "S4 processor / frames, CPU": Figure(times["processor"]["ratio"], "x", "higher", 4, 0.6)}, times


def spooled(made: list[RewardedGroup], folder: Path) -> tuple[float, float]:
    """(bytes, CPU seconds) of a rollout."""
    start = time.process_time()
    with Spool(Config.model_validate({"run": {"folder": str(folder)}}), World()) as spool:
        spool.begin(0)
        for group in made:
            for trajectory in group.trajectories:
                spool.add(trajectory)
    rollouts = len(made) * GROUP
    return sum(file.stat().st_size for file in folder.rglob("*.spool")) / rollouts, (time.process_time() - start) / rollouts


def logged(made: list[RewardedGroup], folder: Path, gib: float) -> tuple[float, float, list[dict[str, float]]]:
    """(bytes of a rollout's dump, CPU seconds of a rollout, the lines of three steps)."""
    config = Config.model_validate({"run": {"folder": str(folder)}, "log": {"rollouts_gib": gib}, "optim": {"steps": 3}})
    start, lines = time.process_time(), []
    log = RunLog(config, World(), [], [])
    for step in log.steps(0, 3, "log"):
        with log.timed("rollout"):
            time.sleep(0.5)
        lines.append(log.write(step + 1, {}, made, [[0.0, 0.0]] * (len(made) * GROUP)))
    log.close()
    rollouts = 3 * len(made) * GROUP
    size = sum(file.stat().st_size for file in folder.rglob("*.parquet"))
    return size / rollouts, (time.process_time() - start) / rollouts, lines


def grown(measure: Callable[[list[RewardedGroup], Path], tuple[float, ...]],
          made: list[RewardedGroup]) -> list[tuple[float, ...]]:
    """A measurement of a rollout at 1x, 2x and 4x."""
    found = []
    for count in (len(made) // 4, len(made) // 2, len(made)):
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(made[:count], Path(folder)))
    return found


def servers(short: bool) -> tuple[dict[str, Figure], Any]:
    """A tool server's live trajectories, sent by content (now) and as data URLs (what the reference's clients send)."""
    many = served(256 if short else 1024, NOTHING, uploads=True, pictures=False)
    now, before = (served(32 if short else 128, CROP, uploads=uploads) for uploads in (True, False))
    return {"S1 failed calls at a soft limit of 1,024 files": Figure(many["failed"], "", "lower", 0),
            "S6 server, a trajectory's memory": Figure(now["mib"], "MiB", "lower", 4, 1.0),
            "S6 server, kept after finish": Figure(now["kept_mib"], "MiB", "lower", 2, 1.0),
            "S6 server, CPU of a first call": Figure(now["cpu_ms"], "ms", "lower", None, 1.0),
            "S6 client, CPU of a first call": Figure(now["own_cpu_ms"], "ms", "lower", None, 1.0),
            "S6 data URLs / by content, CPU of the server": Figure(before["cpu_ms"] / now["cpu_ms"], "x", "higher", None, 1.0),
            "S6 data URLs / by content, CPU of the client": Figure(
                before["own_cpu_ms"] / now["own_cpu_ms"], "x", "higher", None, 1.0)}, [many, now, before]


def main() -> int:
    args = arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chat = qwen_format(Path(folder))
    made = groups(chat, 4 if args.short else 16)
    figures, times = pixels(chat)
    found, live = servers(args.short)
    figures |= found
    spool = grown(spooled, made)
    dump = grown(lambda some, folder: logged(some, folder, 0.0)[:2], made)
    for name, found in (("spool", spool), ("dumps", dump)):
        figures[f"S5 {name}, a step"] = Figure(found[-1][0] * STEP_ROLLOUTS / 2**30, "GiB", "lower", None, 0.1)
        figures[f"S5 {name}, CPU of a rollout"] = Figure(found[-1][1], "s", "lower", None, 1.0)
        figures[f"S5 {name}, a rollout's bytes at 4x / 1x"] = Figure(found[-1][0] / found[0][0], "x", "lower", 1.1)
    whole = dump[-1][0] * 3 * len(made) * GROUP
    limited = Path(tempfile.mkdtemp())
    size, _, lines = logged(made, limited, 0.4 * whole / 2**30)
    shutil.rmtree(limited)
    figures["S5 dumps within a limit / the limit"] = Figure(size * 3 * len(made) * GROUP / (0.4 * whole), "x", "lower", 1.05)
    other = max(line["time/other"] / line["time/step"] for line in lines)
    figures["S8 share of a step that no phase accounts for"] = Figure(100 * other, "%", "lower", 2, 1.0)
    return not report("scale", figures, {"pixels": times, "spool": spool, "dumps": dump, "servers": live}, args.json, args.short)


if __name__ == "__main__":
    sys.exit(main())
