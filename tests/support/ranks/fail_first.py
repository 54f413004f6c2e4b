"""Run under a launcher: connected ranks, of which one fails in its first life. Rank 0 prints how many lives it took.

Usage: fail_first.py HOW NOTES     HOW: user (rank 1 alone has an error that only the user can mend) or kill (SIGKILL)
"""
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hdpo.cli import COMMANDS, main
from hdpo.compose.stage import Stage
from hdpo.config import Config
from hdpo.errors import DataError

BASE = Path(__file__).resolve().parents[3] / "src" / "hdpo" / "toyworld" / "assets" / "toy-base"


def fail_first(argv: Sequence[str]) -> int:
    how, notes = argv[0], Path(argv[1])
    with Stage(Config.model_validate({"model": {"path": str(BASE)}, "run": {"hang_timeout_s": 5}})) as stage:
        world = stage.world.connect()
        if world.is_main:
            with notes.open("a") as file:
                file.write("life\n")
        world.barrier()
        if world.rank == 1 and notes.read_text().count("life") == 1:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise DataError("rows.parquet: no such file, on this rank alone")
        world.barrier()
    return 0


if __name__ == "__main__":
    COMMANDS["fail"] = (f"{__name__}:fail_first", "")
    sys.exit(main(["fail", *sys.argv[1:]]))
