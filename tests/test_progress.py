"""What a bar leaves behind in a log."""
from __future__ import annotations

import pytest

from hdpo.progress import progress


@pytest.mark.parametrize("steps", [3, 20_000])
def test_a_log_gets_the_first_and_the_last_state_of_work_that_is_done_in_no_time(
        steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("RL", "step", total=steps) as bar:
        for step in range(steps):
            bar.set_postfix_str(f"loss {step}", refresh=False)
            bar.update()
    states = [state for state in capsys.readouterr().err.split("\r") if state.strip()]
    assert len(states) == 2
    assert f"{steps}/{steps}" in states[-1] and f"loss {steps - 1}" in states[-1]


def test_who_is_not_to_show_it_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress("answers", "", range(5), shown=False)) == [0, 1, 2, 3, 4]
    assert not capsys.readouterr().err
