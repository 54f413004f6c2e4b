"""`hdpo replay`: a change in loss, advantages or rewards, tried on rollouts that a run kept."""
from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

from hdpo.compose.asked import beside
from hdpo.config import Config
from hdpo.config.file import load_config
from hdpo.errors import CheckpointError, UserError
from hdpo.keys import withdraw
from hdpo.state.folders import has_state, step_folders, step_of

ABOUT = """\
Train step N of a run again from the rollouts it kept, without an engine, beginning with the checkpoint before the step (or the
model, for step 1). What the run recorded and what came out now stand side by side: with nothing changed they are the same bit
for bit on as many ranks as the run had; --set hdpo.w_tool=0 shows what that would have been. Nothing of the run is changed; the
result is written to RUN/replay/step_N. On several devices: accelerate launch ... launch/replay.py RUN --step N."""


def main(argv: Sequence[str]) -> int:
    """Returns 0 where every number is the recorded one or a setting was changed, else 1."""
    parser = argparse.ArgumentParser(prog="hdpo replay", description=ABOUT)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of an RL run")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the step, counted from 1, as in rollouts/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="a setting that is tried instead of the run's (repeatable)")
    options = parser.parse_args(argv)
    file = options.run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{options.run}: no config.yaml there, so it is no run's folder")
    config = replay_config(options.run, options.step, options.overrides)
    withdraw(config.tools.key_names)
    warnings.simplefilter("ignore", FutureWarning)      # of torch and its neighbours to each other
    return _replay(options.run, options.step, config, options.overrides)


def replay_config(run: Path, step: int, overrides: Sequence[str]) -> Config:
    """The run's settings, changed ones allowed, with a folder of their own. Raises CheckpointError where the weights that sampled
    the step are gone."""
    if step < 1:
        raise UserError(f"--step {step}: steps are counted from 1")
    changed = [item.partition("=")[0] for item in overrides]
    ours = [f"run.folder={(run / 'replay').absolute()}", f"run.name=step_{step:06d}", "run.resume=true", "run.resume_from=",
            "log.tensorboard=false", "log.wandb=false", "log.rollouts_every=0", "eval.every_steps=0"]
    before = load_config([run / "config.yaml"], [*overrides, *ours])
    if "model.path" not in changed and not Path(before.model.path).exists():
        ours.append(f"model.path={beside(run, before.model.path)}")
    if step > 1:
        start = run / "checkpoints" / f"step_{step - 1:06d}"
        if not start.is_dir() or not has_state(start):
            there = [str(step_of(folder) + 1) for folder in step_folders(run) if has_state(folder)]
            raise CheckpointError(f"step {step} begins with the state after step {step - 1}, and {start} is not there; steps "
                                  f"that can be trained again: {', '.join(there) or 'none'} (checkpoint.keep)")
        ours[3] = f"run.resume_from={start.absolute()}"
    allowed = list(dict.fromkeys([*before.run.allow, *changed, "data.train"]))      # the rows may be gone: none is read
    return load_config([run / "config.yaml"], [*overrides, *ours, f"run.allow=[{','.join(allowed)}]"])


def _replay(run: Path, step: int, config: Config, overrides: Sequence[str]) -> int:
    from hdpo.compose.checks import check_launcher
    from hdpo.compose.policy import build_packing, build_reference, open_policy
    from hdpo.compose.stage import Stage
    from hdpo.train.jsonl import read_metrics
    from hdpo.train.replay import ReplayParts, compared, kept_groups, replay_step, same
    from hdpo.train.runlog import RunLog
    from hdpo.train.samples import PixelPool
    recorded = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] == step and "actor/grad_norm" in row]
    with Stage(config) as stage:
        check_launcher()
        anew = any(item.startswith("reward.") for item in overrides)
        kept_groups(run, step, config, stage.chat, stage.world.rank, stage.world.size, anew)      # before a model is loaded
        policy, checkpoints = open_policy(config, stage.chat, stage.world, None, stage)
        world = policy.world
        groups, notes = kept_groups(run, step, config, stage.chat, world.rank, world.size, anew)
        reference = build_reference(config, policy)
        checkpoints.resume()
        pixels, log = PixelPool(stage.chat), RunLog(config, world, [], [])
        stage.callback(pixels.close)
        stage.callback(log.close)
        parts = ReplayParts(policy, stage.chat, build_packing(config, stage.chat), pixels, log, reference)
        found = replay_step(config, parts, groups, step)
    if not world.is_main:
        return 0
    rows = compared(recorded[-1] if recorded else {}, found)
    print(f"step {step} of {run}{f', with {chr(32).join(overrides)}' if overrides else ''}\n"
          f"{'':38} {'recorded':>24} {'replayed':>24}")
    for name, was, now in rows:
        print(f"{name:38} {was:24.17g} {now:24.17g} {'' if same(was, now) else ' differs'}")
    differing = sum(not same(was, now) for _, was, now in rows)
    print(f"{len(rows) - differing} of {len(rows)} numbers are the same, to the last bit" if rows else
          f"{run / 'metrics.jsonl'} has no line of step {step} to compare with")
    for note in notes:
        print(f"not exact: {note}")
    result = {"step": step, "set": list(overrides), "replayed": found, "notes": notes}
    (config.run.path / "result.json").write_text(json.dumps(result))
    return 1 if differing and not overrides and not notes else 0
