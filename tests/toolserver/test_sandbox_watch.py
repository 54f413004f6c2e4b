"""What a supervisor counts as its session's memory."""
from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hdpo.toolserver.backends.process_sandbox import worker_folder


def test_a_session_that_has_no_file_systems_of_its_own_yet_is_not_charged_for_the_machines() -> None:
    """A busy machine looks at a session before that has mounted them: its disk and /dev/shm may hold any amount then."""
    status = os.statvfs("/")
    if (status.f_blocks - status.f_bfree) * status.f_frsize < 1 << 20:
        pytest.skip("nothing on this machine's disk")
    count = "import watch; print(watch.Account(1 << 20, ['/', '/dev/shm'], watch.Room()).count([]))"
    done = subprocess.run([sys.executable, "-c", count], cwd=worker_folder(), capture_output=True, text=True, check=True)
    assert int(done.stdout) == 0
