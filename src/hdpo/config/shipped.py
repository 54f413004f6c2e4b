"""Files that travel with the package and start runs: launch/ of a checkout, hdpo/launch of a wheel."""
from __future__ import annotations

from pathlib import Path


def launch_folder() -> Path:
    """Where configs/, accelerate/ and the scripts lie."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "launch"
    return inside if inside.is_dir() else package.parents[1] / "launch"


def shipped_file(name: str, kind: str) -> Path | None:
    """The shipped file that a path or bare name means, if it is one: `metis_8b_rl`, `metis_8b_rl.yaml` and
    `launch/configs/metis_8b_rl.yaml` from any folder. `kind` is the folder under launch/, "" the scripts'."""
    given = Path(name)
    usual = Path("launch") / kind
    if given.parent not in (Path("."), Path(kind), usual):
        return None
    found = launch_folder() / kind / (given.name if given.suffix else f"{given.name}.yaml")
    return found if found.is_file() else None
