"""Do a step's reading, pictures, spool, dumps, log, tool server and memory keep to their sizes at the paper's size? (S1 to S9)

    python benchmarks/bench_scale.py [--short] [--json FILE]

Each figure stands beside that of the way before it, in the same run. Rollouts here have a photograph each prompt and a crop of a
megapixel each rollout, 16 to a prompt, with 2,000 tokens. Figures for a step are those of the paper's 2,048 rollouts, multiplied
up. Growth is the figure at 2x and 4x of rows, trajectories and ranks over that at 1x: per row, per trajectory, and per node.

Sessions with 8K pictures (S7) want a Docker engine and are left out without one. What reading costs at full size is
bench_data.py's.
"""
from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_data
import psutil
import scale_plan
from bench_batching import qwen_format
from common import Figure, arguments, paired, report
from corpus import jpeg, photograph, write_rows
from large_pictures import SESSIONS, sixteen_8k
from PIL import Image
from server_scale import CROP, NOTHING, served

from hdpo.agent.chat import ChatFormat
from hdpo.agent.images import decode_image, encode_png
from hdpo.config import Config, DataConfig
from hdpo.data.tasks import read_tasks
from hdpo.errors import ConfigError
from hdpo.pixels import expand
from hdpo.ranks.world import World
from hdpo.state.spool import Spool
from hdpo.train.runlog import RunLog
from hdpo.types import EndReason, Judgement, Reward, RewardedGroup, Task, ToolCall, Trajectory, Verdict

GROUP, STEP_ROLLOUTS, TOKENS = 16, 2048, 2000
SESSION_MIB = 8      # a Python session with its supervisor holds 5 to 7


def groups(chat: ChatFormat, count: int, enlarged: bool = False) -> list[RewardedGroup]:
    """Crops as they are, or each half as wide and high and enlarged by the model's code, which is no box of any picture."""
    made = []
    for index in range(count):
        file = jpeg(2250 + index, 1500)
        whole = decode_image(file, "prompt")
        prompt = chat.bound(whole)
        task = Task(f"{index}", "bench", [{"role": "user", "content": "<image>What is written there?"}], (file,), "7", row=index)
        rollouts = []
        for sample in range(GROUP):
            corner = 5 * (GROUP * index + sample) % 400
            size = (550, 475) if enlarged else (1100, 950)
            crop = whole.crop((corner, corner, corner + size[0], corner + size[1]))
            sent = encode_png(crop.resize((1100, 950), Image.Resampling.LANCZOS) if enlarged else crop)
            seen = chat.bound(decode_image(sent, "crop"))
            mask = [0] * (TOKENS // 2) + [1] * (TOKENS // 2)
            rollouts.append(Trajectory(
                task, sample, list(range(1000, 1000 + TOKENS)), mask, [-0.7 * sampled for sampled in mask], TOKENS // 2,
                (prompt, seen), (ToolCall("python", {"code": "crop"}, True, "1 image", 1),), EndReason.ANSWERED,
                ("<reason>" + "word " * 200, "<answer>7</answer>"), image_keys=(f"p{index}", f"c{index}.{sample}"), index=index,
                files=(file, sent)))
        made.append(RewardedGroup(task, tuple(rollouts), (Judgement(Verdict.CORRECT, "rule"),) * GROUP,
                                  (Reward(1.0, 0.5, True, True, True),) * GROUP, index))
    return made


def without_files(made: list[RewardedGroup]) -> list[RewardedGroup]:
    """What a spool had to go on before: pixels, and rows without a number."""
    return [replace(group, trajectories=tuple(
        replace(one, files=(), task=replace(one.task, row=-1)) for one in group.trajectories)) for group in made]


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
    wanted, room = 256 if short else 2048, int((psutil.virtual_memory().available / 2**30 - 6) * 1024 / SESSION_MIB)
    some = [served(count, NOTHING, uploads=True, pictures=False, processes=1 if short else 8)
            for count in sorted({max(16, min(wanted, room) // share) for share in (4, 2, 1)})]
    many, one = some[-1], 32 if short else 128
    now, before = (served(one, CROP, uploads=uploads) for uploads in (True, False))
    figures = {
        "S1 live trajectories": Figure(many["count"], "", "higher", None if short or room < wanted else wanted, 1.0),
        "S1 failed calls at a soft limit of 1,024 files": Figure(many["failed"], "", "lower", 0),
        "S6 server, a trajectory's memory": Figure(now["mib"], "MiB", "lower", 4, 1.0),
        "S6 the same with data URLs": Figure(before["mib"], "MiB", "lower", None, 1.0),
        "S6 server, kept after finish": Figure(now["kept_mib"], "MiB", "lower", 2, 1.0),
        "S6 server, CPU of a first call": Figure(now["cpu_ms"], "ms", "lower", None, 1.0),
        "S6 client, CPU of a first call": Figure(now["own_cpu_ms"], "ms", "lower", None, 1.0),
        "S6 data URLs / by content, CPU of the server": Figure(before["cpu_ms"] / now["cpu_ms"], "x", "higher", None, 1.0),
        "S6 data URLs / by content, CPU of the client": Figure(
            before["own_cpu_ms"] / now["own_cpu_ms"], "x", "higher", None, 1.0)}
    for times, bigger in zip((2, 4), some[1:]):
        figures[f"growth, {times}x trajectories: server's CPU of each"] = Figure(
            bigger["cpu_ms"] / some[0]["cpu_ms"], "x", "lower", 1.5, 0.5)
    return figures, [some, now, before]


def reading(folder: Path, chat: ChatFormat, short: bool) -> dict[str, Figure]:
    """Training rows and held-out ones, from 1x, 2x and 4x of rows, and by 1, 2 and 4 ranks."""
    rows = 120 if short else 600
    files = [folder / f"{times}.parquet" for times in (1, 2, 4)]
    taken, held = [], []
    for times, file in zip((1, 2, 4), files):
        write_rows(file, times * rows, 100)
        what: dict[str, Any] = {"file": str(file), "cache": str(folder / "cache"), "steps": 1}
        bench_data.copy(str(file), str(folder / "cache"))
        taken.append(bench_data.ranks_of(1, reader="copy", count=64, **what))
        before = bench_data.ranks_of(1, reader="groups", count=64, **what)
        config = DataConfig(val=[str(file)], cache=str(folder / "cache"), max_prompt_tokens=1 << 20)
        start = time.process_time()
        assert len(read_tasks([str(file)], chat, config, rows=50)) == 50
        held.append(time.process_time() - start)
    start = time.process_time()
    assert len(read_tasks([str(file)], chat, config)) == 4 * rows
    all_s = time.process_time() - start
    ranks = [taken[-1], *(bench_data.ranks_of(n, reader="copy", count=64, **what) for n in (2, 4))]
    per_byte = [one["read"] / one["wanted"] for one in taken]
    figures = {"S2 bytes read a wanted byte": Figure(per_byte[-1], "x", "lower", 1.5),
               "S2 the same, row groups": Figure(before["read"] / before["wanted"], "x", "lower"),
               "S2 CPU, row groups / copy": Figure(before["cpu_s"] / taken[-1]["cpu_s"], "x", "higher", None, 0.7),
               "S3 CPU for the first 50 held-out rows": Figure(held[-1], "s", "lower", None, 1.0),
               "S3 CPU, all of them (before) / the first 50": Figure(all_s / held[-1], "x", "higher", None, 0.7)}
    for place, times in ((1, 2), (2, 4)):
        figures |= {
            f"growth, {times}x rows: bytes read by a step": Figure(taken[place]["read"] / taken[0]["read"], "x", "lower", 1.3),
            f"growth, {times}x rows: CPU for 50 held-out rows": Figure(held[place] / held[0], "x", "lower", 2.0, 1.0),
            f"growth, {times}x ranks: bytes read by a node's step": Figure(
                ranks[place]["read"] * times / ranks[0]["read"], "x", "lower", 1.3)}
    return figures


def kept(made: list[RewardedGroup], enlarged: list[RewardedGroup]) -> tuple[dict[str, Figure], Any]:
    """Spool and dumps."""
    spool, dump = grown(spooled, made), grown(lambda some, folder: logged(some, folder, 0.0)[:2], made)
    beside = {}
    for name, some in (("pixels alone (before)", without_files(made[:2])), ("crops that were enlarged", enlarged)):
        with tempfile.TemporaryDirectory() as folder:
            beside[f"S5 spool, a step with {name}"] = spooled(some, Path(folder))
    figures = {"S5 spool, a step": Figure(spool[-1][0] * STEP_ROLLOUTS / 1e9, "GB", "lower", 1.5, 0.1)}
    figures |= {name: Figure(found[0] * STEP_ROLLOUTS / 1e9, "GB", "lower", None, 0.1) for name, found in beside.items()}
    figures["S5 dumps, a step"] = Figure(dump[-1][0] * STEP_ROLLOUTS / 1e9, "GB", "lower", None, 0.1)
    for name, found in (("spool", spool), ("dumps", dump)):
        figures[f"S5 {name}, CPU of a rollout"] = Figure(found[-1][1], "s", "lower", None, 1.0)
        figures |= {f"growth, {times}x rollouts: bytes of each in {name}": Figure(bigger[0] / found[0][0], "x", "lower", 1.1)
                    for times, bigger in zip((2, 4), found[1:])}
    limit = 0.4 * dump[-1][0] * 3 * len(made) * GROUP
    with tempfile.TemporaryDirectory() as limited:
        size, _, lines = logged(made, Path(limited), limit / 2**30)
    figures["S5 dumps within a limit / the limit"] = Figure(size * 3 * len(made) * GROUP / limit, "x", "lower", 1.05)
    for name, unlogged in (("", ("other",)), (", reading and writing in none (before)", ("other", "data", "log"))):
        share = max(sum(line.get(f"time/{phase}", 0.0) for phase in unlogged) / line["time/step"] for line in lines)
        figures[f"S8 share of a step that no phase accounts for{name}"] = Figure(
            100 * share, "%", "lower", None if name else 2, 1.0)
    return figures, {"spool": spool, "dumps": dump, "beside": beside}


def large_pictures() -> tuple[dict[str, Figure], Any]:
    """Nothing where no engine is."""
    try:
        now, before = (asyncio.run(sixteen_8k(by_pixels)) for by_pixels in (True, False))
    except ConfigError as exc:
        print(f"S7 left out: {exc}", file=sys.stderr)
        return {}, None
    return {f"S7 cells lost, {SESSIONS} sessions with 8K pictures": Figure(now["lost"], "", "lower", 0, 0),
            "S7 the same, placed by their number (before)": Figure(before["lost"], "", "lower", None, 1.0),
            "S7 time until the last of them is open": Figure(now["all_open_s"], "s", "lower", None, 1.0)}, [now, before]


def main() -> int:
    args = arguments(__doc__).parse_args()
    served_figures, live = servers(args.short)      # first, while the machine's memory is free
    with tempfile.TemporaryDirectory() as folder:
        chat = qwen_format(Path(folder))
        figures, times = pixels(chat)
        figures |= reading(Path(folder), chat, args.short)
    count = 4 if args.short else 16
    for index in range(count):
        jpeg(2250 + index, 1500)      # made once, and no rollout's
    held = bench_data.own_memory()
    made = groups(chat, count)
    figures |= scale_plan.rank(chat, made, held) | scale_plan.sessions(16 if args.short else 64) | scale_plan.node()
    found, files = kept(made, groups(chat, 1, enlarged=True))
    figures |= found
    figures |= served_figures
    found, large = large_pictures()
    details = {"pixels": times, "kept": files, "servers": live, "8K": large}
    return not report("scale", figures | found, details, args.json, args.short)


if __name__ == "__main__":
    sys.exit(main())
