"""`hdpo ablation`: the same SFT checkpoint, seeds and budget for every way of charging for tool calls, on the mixed world.

The world is `hdpo.toyworld.mixed`: after SFT answers are uncertain with tools and more so without, so that accuracy has a
variance within groups that a penalty can drown in. It could refute the paper: a weak coupled penalty may turn out to work, a
strong one to keep the calls that are needed. An arm and seed that has ended is a file, OUT/seed_S/ARM.json, and is not run
again; one that was cut off goes on from its last checkpoint. The page, the figure and the table are rewritten after each.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from hdpo.errors import UserError
from hdpo.state.dump import rollout_parts
from hdpo.state.folders import step_folders
from hdpo.toyworld.ablation_figure import write_page
from hdpo.toyworld.ablation_table import HDPO, Result, table
from hdpo.toyworld.demo import hold, launch
from hdpo.toyworld.world import make_world, write_plain

ARMS: dict[str, tuple[str, ...]] = {
    "sft": (),
    "grpo": ("hdpo.w_tool=0.0",),
    "coupled-0.15": ("hdpo.tool_estimator=coupled", "hdpo.w_tool=0.15"),
    "coupled-0.5": ("hdpo.tool_estimator=coupled", "hdpo.w_tool=0.5"),
    "coupled-2": ("hdpo.tool_estimator=coupled", "hdpo.w_tool=2.0"),
    "gdpo-0.15": ("hdpo.tool_estimator=unconditional", "hdpo.w_tool=0.15"),
    "hdpo-0.10": ("hdpo.w_tool=0.10",),
    HDPO: ("hdpo.w_tool=0.15",),
    "hdpo-0.20": ("hdpo.w_tool=0.20",),
    "hdpo-0.15-effective": ("hdpo.w_tool=0.15", "hdpo.tool_norm=effective"),
}
"""Arm -> its settings; everything else is the same for all. `sft` is where they begin, evaluated."""

DEMOS, SFT_ROWS = 6000, 64        # demonstrations of a world, at most; rows of an SFT step as shipped


@dataclass(frozen=True, slots=True)
class Plan:
    """What all arms and seeds of a folder share. Results under another plan are not comparable, and are refused."""

    steps: int
    prompts: int          # of a step, 8 rollouts each
    lr: float
    sft_steps: int
    val_rows: int
    eval_every: int       # steps
    ranks: int
    set_sft: list[str]
    set_rl: list[str]


def main(argv: Sequence[str]) -> int:
    """Returns the exit status. Raises UserError for bad options and HdpoError when a stage failed."""
    parser = argparse.ArgumentParser(prog="hdpo ablation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder to write (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this one, each with a world of its own (%(default)s)")
    parser.add_argument("--arms", default=",".join(ARMS), help="arms to run, with commas (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="RL steps of an arm (%(default)s)")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a step, 8 rollouts each (%(default)s)")
    parser.add_argument("--lr", type=float, default=2e-4, help="peak learning rate of RL (%(default)s)")
    parser.add_argument("--sft-steps", type=int, default=100, help="steps of SFT (%(default)s)")
    parser.add_argument("--val-rows", type=int, default=320, help="held-out questions (%(default)s)")
    parser.add_argument("--eval-every", type=int, default=10, help="RL steps between evaluations (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="ZeRO-3 processes, each with an engine (%(default)s)")
    parser.add_argument("--set-sft", action="append", default=[], metavar="KEY=VALUE", help="override a setting of SFT")
    parser.add_argument("--set-rl", action="append", default=[], metavar="KEY=VALUE", help="override a setting of every arm's RL")
    parser.add_argument("--report", action="store_true", help="only write page, figure and tables of what has ended")
    options = parser.parse_args(argv)
    arms = [name.strip() for name in options.arms.split(",") if name.strip()]
    if unknown := sorted(set(arms) - set(ARMS)):
        raise UserError(f"--arms {','.join(unknown)}: there are {', '.join(ARMS)}")
    for name in ("seeds", "steps", "val_rows", "ranks", "sft_steps", "eval_every"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    if options.prompts < 2 or options.prompts % 2:
        raise UserError(f"--prompts {options.prompts}: an even number, as a step has two mini-batches")
    if options.report:
        return report(options.out)
    plan = Plan(**{name: getattr(options, name) for name in Plan.__dataclass_fields__})
    lock = hold(options.out, steal=False)
    try:
        keep_plan(options.out, plan)
        run(options.out, plan, options.seeds, ["sft", *(arm for arm in ARMS if arm in arms and arm != "sft")])
    finally:
        lock.release()
    return report(options.out)


def keep_plan(out: Path, plan: Plan) -> None:
    """Raises UserError where the folder's results belong to another plan."""
    path, now = out / "plan.json", asdict(plan)
    if path.is_file():
        then = json.loads(path.read_text())
        if differs := sorted(name for name in now if now[name] != then.get(name)):
            raise UserError("; ".join(f"{out} holds results with {name} {then.get(name)}, asked for is {now[name]}"
                                      for name in differs) + "; name another --out")
    write_json(path, now)


def run(out: Path, plan: Plan, seeds: int, arms: Sequence[str]) -> None:
    """Seed by seed over all arms, so that what there is when it is stopped can be compared."""
    left = [(seed, arm) for seed in range(1, seeds + 1) for arm in arms if not result_file(out, seed, arm).is_file()]
    spent: list[float] = []
    for number, (seed, arm) in enumerate(left, start=1):
        eta = f", about {(len(left) - number + 1) * sum(spent) / len(spent) / 60:.0f} minutes left" if spent else ""
        print(f"ablation {number} of {len(left)}: seed {seed}, {arm}{eta}", flush=True)
        started = time.monotonic()
        folder = out / f"seed_{seed}"
        start = prepare(folder, seed, plan)
        try:
            evaluate_sft(folder, seed, start, plan) if arm == "sft" else train(folder, seed, arm, start, plan)
        finally:
            seconds = note_seconds(folder, arm, time.monotonic() - started)
        finish(out, seed, arm, seconds)
        spent.append(time.monotonic() - started)
        report(out)


def result_file(out: Path, seed: int, arm: str) -> Path:
    return out / f"seed_{seed}" / f"{arm}.json"


def prepare(folder: Path, seed: int, plan: Plan) -> Path:
    """World and SFT of a seed, made once for all arms; returns the checkpoint they start from."""
    world = folder / "world"
    if not (world / "done.json").is_file():
        made = make_world(world, seed, train_rows=plan.steps * plan.prompts, val_rows=plan.val_rows,
                          demos=min(DEMOS, plan.sft_steps * SFT_ROWS), difficulty="mixed")
        write_plain(made.val, world / "val_plain.parquet")
        write_json(world / "done.json", {"seed": seed})
    base = Path(str(resources.files("hdpo").joinpath("toyworld/assets/toy-base")))
    if not (folder / "sft_run" / "done.json").is_file():
        launch("sft", "demo_sft.yaml", plan.ranks, [
            f"run.seed={seed}", f"run.folder={folder}", "run.name=sft_run", f"model.path={base}", "log.tensorboard=false",
            f"data.train=[{world / 'demos.parquet'}]", f"optim.steps={plan.sft_steps}", *plan.set_sft], again="hdpo ablation")
        write_json(folder / "sft_run" / "done.json", {"seed": seed})
    return step_folders(folder / "sft_run")[-1]


def evaluate_sft(folder: Path, seed: int, start: Path, plan: Plan) -> None:
    """The checkpoint's answers to the held-out questions, with tools and where none is offered."""
    world = folder / "world"
    launch("eval", "demo_rl.yaml", plan.ranks, [
        f"run.seed={seed}", f"run.folder={folder}", "run.name=sft", f"model.path={start}",
        f"data.val=[{world / 'val.parquet'},{world / 'val_plain.parquet'}]", *tools(world), *plan.set_rl], again="hdpo ablation")


def train(folder: Path, seed: int, arm: str, start: Path, plan: Plan) -> None:
    world = folder / "world"
    launch("rl", "demo_rl.yaml", plan.ranks, [
        f"run.seed={seed}", f"run.folder={folder}", f"run.name={arm}", f"model.path={start}",
        f"data.train=[{world / 'train.parquet'}]", f"data.val=[{world / 'val.parquet'}]", *tools(world),
        f"optim.steps={plan.steps}", f"optim.lr={plan.lr}", f"rollout.prompts_per_step={plan.prompts}",
        f"optim.mini_batch_prompts={plan.prompts // 2}", f"eval.every_steps={plan.eval_every}", "eval.before=false",
        "eval.after=true", "checkpoint.every_steps=10", "checkpoint.keep=1", "log.tensorboard=false", "log.rollouts_every=10",
        *plan.set_rl, *ARMS[arm]], again="hdpo ablation")


def tools(world: Path) -> list[str]:
    return [f"tools.text_index={world / 'facts.sqlite'}", f"tools.image_index={world / 'badges'}"]


def note_seconds(folder: Path, arm: str, seconds: float) -> float:
    """Add to what the arm has taken, over all attempts."""
    path = folder / "seconds.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    known[arm] = known.get(arm, 0.0) + seconds
    write_json(path, known)
    return known[arm]


def finish(out: Path, seed: int, arm: str, seconds: float) -> None:
    """The arm's figures and its answers to every question, as one file; what only a resume would need goes."""
    folder = out / f"seed_{seed}" / arm
    summary = json.loads((folder / "summary.json").read_text())
    curve = [{"step": int(label.removeprefix("step_")), **figures} for label, figures in summary.items()
             if label.startswith("step_")]
    steps = json.loads((out / "plan.json").read_text())["steps"]
    answers, plain = read_answers(folder)
    if arm != "sft":
        curve.append({"step": steps, **summary["rl"]})
    write_json(result_file(out, seed, arm), {
        "arm": arm, "seed": seed, "settings": list(ARMS[arm]), "seconds": seconds, "curve": curve, "answers": answers,
        "plain": plain})
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def read_answers(folder: Path) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """{question: [correct, calls, need]} of the last evaluation's scored answers: with tools, and where none was offered."""
    found: tuple[dict[str, list[Any]], dict[str, list[Any]]] = {}, {}
    for part in rollout_parts(folder / "eval" / "rl.parquet"):
        for row in pq.read_table(part, columns=["task_id", "data_source", "correct", "scored", "num_tool_calls",
                                                "tool_needed"]).to_pylist():
            if row["scored"]:
                place = found[row["data_source"].startswith("plain/")]
                place[row["task_id"]] = [row["correct"], row["num_tool_calls"], row["tool_needed"]]
    return {name: found[0][name] for name in sorted(found[0])}, {name: found[1][name] for name in sorted(found[1])}


def report(out: Path) -> int:
    """Write report.html, figure.svg, table.md and table.json of the results in the folder; says where, and shows the table."""
    results = [Result.read(file) for arm in ARMS for file in sorted(out.glob(f"seed_*/{arm}.json"))]
    if not results:
        raise UserError(f"--out {out}: no arm has ended there")
    found = table(results)
    write_json(out / "table.json", found.record())
    (out / "table.md").write_text(found.markdown())
    write_page(out, found)
    print(f"{found.markdown()}\n{out / 'report.html'}", flush=True)
    return 0


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.tmp")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)
