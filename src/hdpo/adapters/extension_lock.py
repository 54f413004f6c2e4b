"""DeepSpeed's communication extension, compiled at the first start on a machine, loaded without a lock that outlives us.

torch guards the compilation by the mere existence of a file. A process that is killed at that moment leaves it behind,
and every later start on the machine waits for it for ever. Here an flock is taken first, which dies with its holder:
whoever has it finds a leftover only of a process that is gone. Every installation compiles into a folder of its own:
in a shared one, two of them would compile again (a minute) whenever the other was last. So would two links to one
installation, whose paths stand in the compiler's command: hence the path as imported, not the real one. And so would two
versions of ninja, which is started by name: this installation's own is the first in PATH, which also finds it where the
machine has none and the virtual environment is not activated.
"""
from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

import deepspeed
import ninja
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import _get_build_directory, get_default_build_root

from hdpo.errors import ConfigError


def load_communication_extension() -> None:
    """Compile or load it now; DeepSpeed then finds it loaded. Nothing to do for devices that have none. Raises ConfigError where
    it cannot be compiled."""
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        return
    use_own_ninja()
    installation = hashlib.sha256(deepspeed.__file__.encode()).hexdigest()[:12]
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(get_default_build_root()) / f"hdpo-{installation}"))
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with (folder / "hdpo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        try:
            builder.load(verbose=False)
        except RuntimeError as exc:
            lines = str(exc).splitlines()
            said = next((line for line in lines if "error:" in line or line.endswith("not found")), lines[0])
            raise ConfigError("DeepSpeed compiles its communication between CPUs at the first start, which wants a C++ compiler "
                              f"and Python's headers (apt-get install g++ python3-dev): {said.strip()}") from None


def use_own_ninja() -> None:
    """For this process and those that it starts."""
    path = os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != ninja.BIN_DIR:
        os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, path))
