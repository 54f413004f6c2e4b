"""The command line. One front door for every command; errors a user can mend are one line and exit status 2."""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hdpo.config import Config
from hdpo.config_file import describe_fields, dump_config, load_config
from hdpo.errors import USER_STATUS, WORLD_STATUS, HdpoError, UserError, say

ABOUT = """\
hdpo teaches a multimodal agent when not to call a tool: SFT, then HDPO reinforcement learning, then evaluation.

  hdpo demo                                        the whole loop on this machine, with a tiny model
  hdpo sft  --config launch/configs/metis_8b_sft.yaml --set model.path=... --set data.train=[demos.parquet]
  hdpo rl   --config launch/configs/metis_8b_rl.yaml  --set model.path=... --set data.train=[rl.parquet]
  hdpo eval --config launch/configs/metis_8b_rl.yaml  --set model.path=CHECKPOINT --set data.val=[val.parquet]
  hdpo rl --config FILE --dry-run                  check data, model, tools and judge without training

On several devices: accelerate launch --config_file launch/accelerate/zero3.yaml launch/train_rl.py --config ...
`hdpo COMMAND --help` tells more; `hdpo settings` lists every setting.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done or stopped and saved, 2 bad input, 3 the world failed, 130 Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    try:
        if name in ("--help", "-h"):
            print(ABOUT)
            return 0
        if name not in COMMANDS:
            raise UserError(f"unknown command {name}; commands are {', '.join(COMMANDS)}")
        return COMMANDS[name](arguments[1:])
    except HdpoError as exc:
        say(exc)
        return USER_STATUS if isinstance(exc, UserError) else WORLD_STATUS
    except KeyboardInterrupt:
        print("hdpo: interrupted; what is saved is kept, and the same command goes on from there", file=sys.stderr, flush=True)
        return 130


def _run_arguments(command: str, description: str, argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog=f"hdpo {command}", description=description,
                                     epilog="`hdpo settings` lists every setting with its default and meaning.")
    parser.add_argument("--config", help="YAML file; see launch/configs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override one setting, for example --set hdpo.w_tool=0.1 (repeatable)")
    parser.add_argument("--print-config", action="store_true", help="print the resulting configuration as YAML and end")
    parser.add_argument("--dry-run", action="store_true", help="check data, model folder, tools and judge, then end")
    options = parser.parse_args(argv)
    return load_config(options.config, options.overrides), options


def _training_command(command: str, description: str) -> Callable[[Sequence[str]], int]:
    def run(argv: Sequence[str]) -> int:
        config, options = _run_arguments(command, description, argv)
        if options.print_config:
            if os.environ.get("RANK", "0") == "0":
                print(dump_config(config), end="")
            return 0
        if options.dry_run:
            from hdpo.doctor.doctor import dry_run
            return dry_run(config, command)
        from hdpo.train.lifecycle import follow_launcher
        follow_launcher()
        return RUNNERS[command](config)
    return run


def run_sft(config: Config) -> int:
    from hdpo.build import Stage
    from hdpo.train import sft
    with Stage(config) as stage:
        sft.train(config, stage.sft())
    return 0


def run_rl(config: Config) -> int:
    from hdpo.build import Stage
    from hdpo.train import rl
    with Stage(config) as stage:
        rl.train(config, stage.rl())
    return 0


def run_eval(config: Config) -> int:
    from hdpo.build import Stage
    from hdpo.evaluation.evaluate import format_table
    with Stage(config) as stage:
        evaluator = stage.evaluation()
        result = evaluator(config.eval.label_after, 0)
        if evaluator.world.is_main and result is not None:
            print(format_table(result.summary))
    return 0


RUNNERS: dict[str, Callable[[Config], int]] = {"sft": run_sft, "rl": run_rl, "eval": run_eval}


def settings(argv: Sequence[str]) -> int:
    argparse.ArgumentParser(prog="hdpo settings", description="Every setting, its default and its meaning.").parse_args(argv)
    for path, default, description in describe_fields():
        print(f"{path:34} {default!r:28} {description}")
    return 0


def tool_server(argv: Sequence[str]) -> int:
    from hdpo.toolserver.app import main as serve
    return serve(list(argv)) or 0


def demo(argv: Sequence[str]) -> int:
    from hdpo.toyworld.demo import main as run
    return run(argv)


def report(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hdpo report", description="Write RUN/report.html from what a run has logged.")
    parser.add_argument("run", type=Path, help="the run's folder, for example runs/demo")
    options = parser.parse_args(argv)
    if not options.run.is_dir():
        raise UserError(f"no such run folder: {options.run}")
    from hdpo.report.page import write_report
    print(write_report(options.run))
    return 0


def judge(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="hdpo judge", description="Ask the configured judge ten known questions: agreement, latency, parse failures. "
        "JUDGE_BASE_URL, JUDGE_API_KEY and JUDGE_MODEL say which judge; `make judge` starts one.")
    parser.add_argument("--check", action="store_true", help="ask the ten questions (what this command does)")
    parser.add_argument("--config", help="YAML file; see launch/configs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override one setting")
    options = parser.parse_args(argv)
    config = load_config(options.config, options.overrides)
    if not config.judge.base_url:
        raise UserError("judge.base_url is not set: give JUDGE_BASE_URL or --set judge.base_url=http://HOST:PORT/v1")
    from hdpo.adapters.openai_judge import open_judges
    from hdpo.background import BackgroundLoop
    from hdpo.doctor.doctor import reach_judge
    reach_judge(config)      # a client would try again for minutes
    from hdpo.doctor.judge_check import check_judge
    background, judges = BackgroundLoop(), open_judges(config.judge)
    checks = []
    try:
        for client in judges:
            checks.append(background.run(check_judge(client)))
            print(*[f"{client.config.base_url}:"] * (len(judges) > 1), *checks[-1].lines(), sep="\n")
    finally:
        for client in judges:
            background.run(client.close())
        background.close()
    return 0 if all(check.ok for check in checks) else 1


def toy_base(argv: Sequence[str]) -> int:
    from hdpo.toyworld.base import main as pretrain
    sys.argv = ["hdpo toy-base", *argv]
    pretrain()
    return 0


def doctor(argv: Sequence[str]) -> int:
    from hdpo.doctor.doctor import main as run
    return run(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "sft": _training_command("sft", "Supervised fine-tuning on recorded tool trajectories (columns messages, images)."),
    "rl": _training_command("rl", "HDPO reinforcement learning on rows in the Metis-RL schema."),
    "eval": _training_command("eval", "Greedy rollouts on held-out rows: accuracy and tool use, by family and by need."),
    "tool-server": tool_server, "report": report, "settings": settings, "doctor": doctor, "judge": judge,
    "toy-base": toy_base,
}

if __name__ == "__main__":
    sys.exit(main())
