"""Stop signals at any moment are answered in one line: what happens now, and what is lost."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from hdpo.train.lifecycle import StopSignal

LOOP = """
import time
from hdpo.train.lifecycle import StopSignal, name_the_end
name_the_end()
print("loading", flush=True)
time.sleep({before})
with StopSignal() as stop:
    print("training", flush=True)
    until = time.monotonic() + {training}
    while not stop.is_set() and time.monotonic() < until:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep({saving})
print("saved", flush=True)
time.sleep({after})
"""


def start(rank: int = 0, **seconds: float) -> subprocess.Popen[str]:
    program = LOOP.format(**{"before": 0, "training": 30, "saving": 0, "after": 0, **seconds})
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"RANK": str(rank)})


def until(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    while (line := process.stdout.readline().strip()) != word:
        assert line, word


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_one_line_and_the_run_ends_saved(number: signal.Signals) -> None:
    process = start()
    until(process, "training")
    process.send_signal(number)
    process.send_signal(number)      # a terminal and a launcher both send it
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "saved" in out
    assert [line for line in err.splitlines() if line] == [
        "hdpo: stopping: what is under way is brought to an end and saved; a second signal ends the run at once"]


def test_a_second_signal_while_the_run_saves_ends_it_with_a_line_that_says_what_is_lost() -> None:
    process = start(saving=60)
    until(process, "training")
    process.send_signal(signal.SIGTERM)
    until(process, "saving")
    time.sleep(2.2)                  # later than what counts as the same request
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGTERM
    assert "hdpo: ended at once: what came after the newest checkpoint is lost" in err and "Traceback" not in err


@pytest.mark.parametrize(("moment", "seconds"), [("loading", {"before": 60}), ("saved", {"training": 0, "after": 60})])
def test_a_sigterm_before_and_after_training_ends_the_process_with_a_line(moment: str, seconds: dict[str, float]) -> None:
    process = start(**seconds)
    until(process, moment)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGTERM and "hdpo: ended by SIGTERM outside of training" in err


def test_one_rank_speaks_for_all() -> None:
    process = start(rank=1)
    until(process, "training")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == ""


def test_a_signal_after_a_saved_stop_ends_what_is_left_without_a_further_line() -> None:
    process = start(after=60)
    until(process, "training")
    process.send_signal(signal.SIGINT)
    until(process, "saved")
    time.sleep(StopSignal.SAME_S + 0.2)
    process.send_signal(signal.SIGTERM)      # the launcher's, as the ranks leave
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGTERM and "outside of training" not in err
