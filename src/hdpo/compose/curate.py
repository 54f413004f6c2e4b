"""`hdpo curate`: opens what the stages that are asked for need, and no more: stage 1 needs neither model nor engine."""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdpo.config import Config
from hdpo.config.file import add_config_options, load_config
from hdpo.errors import ConfigError, JudgeError

if TYPE_CHECKING:
    from hdpo.curation.job import Job

STAGES = ("1", "2", "3", "4")
EPILOG = """\
stage 1  every recorded call is made again in the sandbox; what fails or doesn't give the recorded observation is dropped
stage 2  questions that the base model answers without tools are dropped (model.path, rules and judge as in RL)
stage 3  a judge grades visual relevance, reasoning and the rationale of tool use (judge.base_url)
stage 4  rows whose picture or question stands in a benchmark are dropped or reported (curation.decontamination.data=FOLDER,
         a folder per benchmark); with stage 2, prompts for RL that the base model answers sometimes, by share of each source

  hdpo curate --source thyme=thyme.parquet --stages 1 --out runs/sft_data
  hdpo curate --config FILE --source deepeyes=sft_part_0.json --source openmm=wemath.parquet --stages 1,2,3,4 --out DIR

The same command goes on from where it was stopped. Its last lines are the commands that train on the result: `make sft` on
DIR/kept.parquet, `make rl` on DIR/rl.parquet."""


def main(argv: Sequence[str]) -> int:
    """0 when every row is decided, 1 when rows wait for a failure of ours to be over. Raises HdpoError."""
    from hdpo.curation.job import Job
    from hdpo.curation.source import READERS
    parser = argparse.ArgumentParser(prog="hdpo curate", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description="Make SFT data, and prompts for RL, of public tool trajectories.")
    add_config_options(parser)
    parser.add_argument("--source", action="append", default=[], metavar="NAME=FILES",
                        help=f"what to curate (repeatable); NAME is one of {', '.join(READERS)}")
    parser.add_argument("--stages", default="1", help="which stages, in order, for example 1,2,3 (%(default)s)")
    parser.add_argument("--out", help="folder of the result (curation.out)")
    options = parser.parse_args(argv)
    stages = [stage.strip() for stage in options.stages.split(",") if stage.strip()]
    if not stages or any(stage not in STAGES for stage in stages) or len(set(stages)) < len(stages):
        raise ConfigError(f"--stages {options.stages}: stages are {', '.join(STAGES)}")
    config = load_config(options.config, options.overrides)
    given = {"sources": [*config.curation.sources, *options.source], **({"out": options.out} if options.out else {})}
    config = config.model_copy(update={"curation": config.curation.model_copy(update=given)})
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    job = Job(config, sorted(stages), rank, ranks)      # sources and folder are checked before anything opens
    with ExitStack() as closing:
        manifest = job.run(_open(config, job, closing))
    return _report(manifest, config) if rank == 0 else 0


def _open(config: Config, job: Job, closing: ExitStack) -> dict[str, Any]:
    from hdpo.background import BackgroundLoop
    from hdpo.curation.prompts import RL
    from hdpo.curation.stages.contamination import Contamination
    from hdpo.curation.stages.execution import Execution
    from hdpo.curation.stages.judgement import Judgement
    from hdpo.curation.stages.run import AsyncStage
    settings, stages = config.curation, job.stages
    found: dict[str, Any] = {}
    if "3" in stages and not config.judge.base_url:
        raise ConfigError("stage 3 needs a judge: set judge.base_url (JUDGE_BASE_URL)")
    if "2" in stages:
        found["2"] = _open_necessity(config, closing)
    if "1" in stages:
        background, backend = _open_tools(config, closing)
        found["1"] = AsyncStage(Execution(backend, settings.execution), background, settings.concurrency)
    if "3" in stages:
        background = BackgroundLoop()
        closing.callback(background.close)
        found["3"] = AsyncStage(Judgement(_judge(config, background, closing), settings.judgement), background,
                                settings.concurrency)
    if "4" in stages:
        found["4"] = found[RL] = Contamination(_benchmarks(config, job), settings.decontamination)
    return {stage: found[stage] for stage in stages}


def _benchmarks(config: Config, job: Job) -> Any:
    from hdpo.curation.benchmarks import open_known
    settings = config.curation.decontamination
    if not settings.data:
        if job.rank == 0:
            print("hdpo curate: nothing is compared with benchmarks; curation.decontamination.data names their folder",
                  file=sys.stderr)
        return None
    known = open_known(settings, job.out / "work", config.data.cache)
    job.benchmarks = known.about
    return known


def _open_tools(config: Config, closing: ExitStack) -> tuple[Any, Any]:
    """A tool server of this process's own, unless the configuration names one; searches only where they are replayed."""
    from hdpo.compose.tools import open_tools
    tools = config.tools
    if config.curation.execution.search != "replay":
        tools = tools.model_copy(update={"allowed": ["python"]})
    out = Path(config.curation.out)
    run = config.run.model_copy(update={"folder": str(out.parent), "name": out.name})
    return open_tools(config.model_copy(update={"tools": tools, "run": run}), None, closing)


def _open_necessity(config: Config, closing: ExitStack) -> Any:
    from hdpo.compose.stage import Stage
    from hdpo.curation.stages.run import NecessityStage
    if not config.model.path:
        raise ConfigError("stage 2 needs the base model: set model.path (MODEL_PATH)")
    bare = config.model_copy(update={"tools": config.tools.model_copy(update={"allowed": []})})
    rollouts, scorer = closing.enter_context(Stage(bare)).sampling()
    return NecessityStage(rollouts, scorer, config.curation.necessity)


def _judge(config: Config, background: Any, closing: ExitStack) -> Any:
    from hdpo.adapters.openai_judge import open_judges
    from hdpo.curation.record import Waits
    judge = open_judges(config.judge)[0]
    closing.callback(lambda: background.run(judge.close(), timeout=10))

    async def ask(system: str, text: str, images: tuple[bytes, ...], attempt: int) -> str:
        try:
            return await judge.ask(system, text, images, seed=attempt)
        except JudgeError as exc:
            raise Waits(str(exc)) from exc
    return ask


def _report(manifest: dict[str, Any], config: Config) -> int:
    waiting = 0
    for source, stages in manifest.items():
        if source == "about":
            continue
        for stage, counts in stages.items():
            gone = {**counts["unreadable"], **counts["dropped"]}
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(gone.items(), key=lambda item: -item[1]))
            print(f"{source:16} stage {stage}: {counts['kept']} of {counts['in']} kept" + (f"; {reasons}" if reasons else ""))
            waiting += sum(counts["waiting"].values())
            for what, found in (("overlaps with", counts.get("overlaps")), ("not comparable:", counts.get("overlap_unknown"))):
                if found:
                    print(f"{'':16} {what} " + ", ".join(f"{name} {count}" for name, count in sorted(found.items())))
    if rl := manifest["about"].get("rl"):
        parts = ", ".join(f"{source} {count}" for source, count in rl["per_source"].items())
        wanted = f" of {rl['wanted']} wanted; more of these shares are not there" if rl["wanted"] > rl["prompts"] else ""
        print(f"rl.parquet: {rl['prompts']} prompts{wanted} ({parts})")
    for reason, shown in manifest["about"]["first_unreadable"].items():
        print(f"{'':16} unreadable, {reason}: first {shown}")
    from hdpo.report.page import write_report
    page = write_report(config.curation.out)
    print(f"{page}; kept.parquet, dropped.parquet and manifest.json beside it")
    for line in _what_next(manifest, config):
        print(line)
    if waiting:
        print(f"hdpo curate: {waiting} rows wait for the tool server or the judge; the same command tries them again",
              file=sys.stderr)
    return 1 if waiting else 0


def _what_next(manifest: dict[str, Any], config: Config) -> list[str]:
    """The commands that train on what there is."""
    from hdpo.compose.commands import PART_OF, command_line
    if PART_OF in os.environ:
        return []
    about, model = manifest["about"], f"model.path={config.model.path or 'MODEL'}"
    last = about["stages"][-1]
    kept = sum(stages[last]["kept"] for source, stages in manifest.items() if source != "about")
    ready = [("sft", "metis_8b_sft", "kept", kept), ("rl", "metis_8b_rl", "rl", about.get("rl", {}).get("prompts", 0))]
    lines = [command_line(command, file, [model, f"data.train=[{config.curation.out}/{rows}.parquet]"], devices=True)
             for command, file, rows, count in ready if count]
    return [f"{'next':9} {line}" for line in lines]
