"""reward.function: a user's own code says what is right, in place of rules and judge. hdpo.own has the records."""
from __future__ import annotations

import numbers
from typing import Any

from hdpo import oddities
from hdpo.agent.parse import extract_answer, format_ok
from hdpo.config import RewardConfig
from hdpo.own import Graded, OwnCode, Rollout, load_function
from hdpo.text import one_line
from hdpo.types import Judgement, Trajectory, Verdict

BY = "own"


class OwnReward:
    """Methods are coroutines of one event loop. Raises ConfigError for a function that can't be found."""

    def __init__(self, config: RewardConfig) -> None:
        self._function = load_function(config.function, "reward.function")
        self._timeout_s, self._code = config.function_timeout_s, OwnCode(threads=8)

    async def judge(self, trajectory: Trajectory) -> Judgement:
        """UNSCORED for a function that raises, takes too long, or gives back what is no verdict. Never raises."""
        try:
            graded = _graded(await self._code.run(self._function, rollout_of(trajectory), timeout_s=self._timeout_s))
        except TimeoutError:
            return _failed(f"no verdict within {self._timeout_s:g} s")
        except Exception as exc:  # noqa: BLE001 - code of the user's
            return _failed(f"{type(exc).__name__}: {one_line(exc)}")
        answer = graded.answer if graded.verdict is not Verdict.UNSCORED and graded.answer >= 0 else None
        return Judgement(graded.verdict, BY, "" if graded.correct is not None else "the function gave no verdict", answer)

    def close(self) -> None:
        self._code.close()


def rollout_of(trajectory: Trajectory) -> Rollout:
    task = trajectory.task
    return Rollout(task.question, extract_answer(trajectory.final_turn), task.ground_truth, trajectory.turns, trajectory.calls,
                   task.images, task.data_source, task.extra, trajectory.end.value, format_ok(trajectory.turns))


def _graded(given: Any) -> Graded:
    """Raises TypeError for what is none of three values: a number says nothing of whether an answer is right."""
    if given is None or isinstance(given, bool) or type(given).__name__ in ("bool", "bool_"):     # numpy's
        return Graded(None if given is None else bool(given))
    if not isinstance(given, Graded) or given.correct not in (True, False, None):
        raise TypeError(f"a reward is True, False, None or Graded(correct, answer), got {one_line(repr(given), 80)}")
    if not isinstance(given.answer, numbers.Real) or not float(given.answer) <= 1:
        raise TypeError(f"Graded.answer is from 0 to 1, got {one_line(repr(given.answer), 80)}")
    return Graded(given.correct, float(given.answer))


def _failed(why: str) -> Judgement:
    oddities.count("reward/own_failed")
    return Judgement(Verdict.UNSCORED, BY, why)
