"""The command line: one front door. A command is one entry of COMMANDS; errors that a user can mend are one line and status 2.

A command's function takes the arguments behind its name and returns the exit status. It is imported when it is called, so
that `hdpo --help` and `hdpo tool-server` load neither torch nor an engine.
"""
from __future__ import annotations

import importlib
import os
import select
import sys
from collections.abc import Sequence

from hdpo.descriptors import raise_limit
from hdpo.errors import USER_STATUS, WORLD_STATUS, HdpoError, UserError, say

COMMANDS = {
    "demo": ("hdpo.toyworld.demo:main", "the whole loop on this machine, with a tiny model"),
    "sft": ("hdpo.compose.commands:sft", "supervised fine-tuning on recorded tool trajectories"),
    "rl": ("hdpo.compose.commands:rl", "HDPO reinforcement learning"),
    "eval": ("hdpo.compose.commands:evaluate", "held-out rows, or published benchmarks: accuracy and tool use"),
    "eval-demo": ("hdpo.toyworld.eval_demo:main", "three miniature benchmarks with the demo's checkpoint, in both arms"),
    "ablation": ("hdpo.toyworld.ablation:main", "every way of charging for tool calls on the mixed world, same seeds and budget"),
    "ask": ("hdpo.compose.ask:ask", "one question to a model folder, with its tools, shown as it reasons and calls"),
    "chat": ("hdpo.compose.ask:chat", "several questions, one after another"),
    "serve": ("hdpo.compose.serve:main", "the same agent behind an OpenAI-compatible /v1/chat/completions"),
    "score": ("hdpo.compose.score:main", "answers to benchmarks, by their official rules, without a model"),
    "curate": ("hdpo.compose.curate:main", "SFT data from public tool trajectories, in three stages"),
    "curate-demo": ("hdpo.toyworld.curate_demo:main", "the embedded world in five public layouts, with planted faults, curated"),
    "replay": ("hdpo.compose.replay:main", "train a step of a run again from its kept rollouts, without an engine"),
    "report": ("hdpo.report.command:main", "a run's page, two runs beside each other, or all of a run in the browser (--serve)"),
    "settings": ("hdpo.config.file:main", "every setting with its default and meaning"),
    "doctor": ("hdpo.doctor.doctor:main", "what this machine has and lacks; with --config the memory of a run"),
    "judge": ("hdpo.doctor.judge_check:main", "ask the configured judge ten known questions"),
    "tool-server": ("hdpo.toolserver.app:main", "serve Python, text search and image search"),
    "toy-base": ("hdpo.toyworld.base:main", "pretrain the demo's base model again"),
}
"""Name -> (module:function, one line for --help)."""

ABOUT = """\
hdpo teaches a multimodal agent when not to call a tool: SFT, then HDPO reinforcement learning, then evaluation.

{commands}

  hdpo sft  --config launch/configs/metis_8b_sft.yaml --set model.path=... --set data.train=[demos.parquet]
  hdpo rl   --config launch/configs/metis_8b_rl.yaml  --set model.path=... --set data.train=[rl.parquet]
  hdpo eval --config launch/configs/metis_8b_rl.yaml  --set model.path=CHECKPOINT --set data.val=[val.parquet]
  hdpo eval --benchmarks vstar,wemath --data FOLDER   --set model.path=CHECKPOINT --preset reference
  hdpo rl --config FILE --dry-run                  check data, model, tools and judge without training

On several devices: accelerate launch --config_file launch/accelerate/zero3.yaml launch/train_rl.py --config ...
`hdpo COMMAND --help` tells more; `hdpo settings` lists every setting."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done or stopped and saved, 2 bad input, 3 the world failed, 130 Ctrl-C, 141 where
    nobody reads what is printed any more (`hdpo ... | head`)."""
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        return 141


def _reader_has_gone() -> bool:
    """Whether it is standard output that broke; then nothing more is written to it, not by Python's end either."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")      # a terminal that lacks a character shows another
    name = arguments[0] if arguments else "--help"
    try:
        if name in ("--help", "-h"):
            print(ABOUT.format(commands="\n".join(f"  hdpo {command:12} {line}" for command, (_, line) in COMMANDS.items())))
            return 0
        if name == "--version":
            from hdpo import __version__
            print(f"hdpo {__version__}")
            return 0
        if name not in COMMANDS:
            raise UserError(f"unknown command {name}; commands are {', '.join(COMMANDS)}")
        raise_limit()
        module, _, function = COMMANDS[name][0].partition(":")
        return getattr(importlib.import_module(module), function)(arguments[1:])
    except HdpoError as exc:
        say(exc)
        return USER_STATUS if isinstance(exc, UserError) else WORLD_STATUS
    except KeyboardInterrupt:
        print("hdpo: interrupted; what is saved is kept, and the same command goes on from there", file=sys.stderr, flush=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
