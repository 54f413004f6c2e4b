"""launch/train_rl.py, whose rank 0 writes every phase it enters to the file PHASES, so that a test knows when to kill it."""
import os
import sys

from hdpo.cli import main
from hdpo.ranks.world import World

enter = World.phase


def note(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        with open(os.environ["PHASES"], "a") as file:
            file.write(line + "\n")


def phase(self: World, name: str, step: int | None = None) -> None:
    note(name)
    enter(self, name, step)


if __name__ == "__main__":
    World.phase = phase   # type: ignore[method-assign]
    note("start")
    sys.exit(main(["rl", *sys.argv[1:]]))
