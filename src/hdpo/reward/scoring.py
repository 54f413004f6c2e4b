"""Trajectories -> verdicts -> rewards: rules first, the judge where they can't say, three values all the way.

A trajectory is scored from the moment it ends, while others still roll out: `Scorer.submit` returns at once and holds
no rollout slot. Nothing here guesses: what could not be judged is UNSCORED and leaves both channels.
"""
from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

from hdpo.agent.parse import extract_answer
from hdpo.background import BackgroundLoop
from hdpo.config import RewardConfig
from hdpo.errors import UnscoredLimitError
from hdpo.protocols import Judge
from hdpo.reward.audit import AuditLog, audit_record
from hdpo.reward.own import OwnReward
from hdpo.reward.rewards import reward_of
from hdpo.reward.rules import RuleVerdict, may_need_maths, policy_for, rule_verdict
from hdpo.types import Judgement, RewardedGroup, Trajectory, Verdict

_STARTED_AT_ONCE = 256
_CROSS_CHECK_GRACE_S = 5.0   # a step never waits longer than this for verdicts that only the report needs


class Scorer:
    """Scores trajectories on the background loop; one instance per rank.

    `judge` may be None: what the rules can't decide is then UNSCORED. With reward.function neither is asked. `audit`, if given,
    gets one file per step.
    Between two calls of `score`, each trajectory object may be submitted once; `score` forgets them all.
    """

    def __init__(self, config: RewardConfig, judge: Judge | None, background: BackgroundLoop,
                 audit: AuditLog | None = None) -> None:
        self.config = config
        self._judge = judge if config.judge else None
        self._own = OwnReward(config) if config.function else None
        self._background = background
        self._audit = audit
        # keyed by identity: the trajectory is kept alive beside its verdict, so an id can't be reused meanwhile
        self._pending: dict[int, tuple[Trajectory, Judgement | asyncio.Task[Judgement]]] = {}
        self._cross_checks: dict[int, asyncio.Task[Judgement]] = {}
        self._slow_rules = ThreadPoolExecutor(max_workers=2, thread_name_prefix="hdpo-rules")
        self._policy = lru_cache(maxsize=None)(partial(policy_for, rules=config.rules))   # per data_source
        self._decided: Counter[str] = Counter()
        self._waited_s = 0.0
        self.progress: Callable[[], None] = lambda: None     # set it to what is to be called after each of the judge's verdicts

    def submit(self, trajectory: Trajectory) -> None:
        """Start scoring a finished trajectory; returns at once. From any thread, the background loop's included."""
        self._background.loop.call_soon_threadsafe(self._start, trajectory)

    def score(self, groups: Sequence[tuple[Trajectory, ...]], step: int | None = None) -> list[RewardedGroup]:
        """Wait for all verdicts and return the groups in order. Not from the background loop's own thread.

        What was submitted is awaited, what was not is submitted. Never raises for a failing judge: count with
        `unscored_share`, then stop with `check_unscored`. `step` names the audit file; without it none is written.
        """
        started = time.monotonic()
        judgements = self._background.run(self._collect(groups))
        self._waited_s += time.monotonic() - started
        rewarded = [RewardedGroup(group[0].task, group, verdicts, tuple(
            reward_of(t, j, self.config) for t, j in zip(group, verdicts, strict=True)), group[0].index)
            for group, verdicts in zip(groups, judgements, strict=True)]
        self._decided.update(f"{j.verdict.value}_by_{j.by}" for verdicts in judgements for j in verdicts)
        self._write_audit(step, rewarded)
        return rewarded

    def stats(self) -> dict[str, float]:
        """Counts since the previous call, by verdict and by who decided, and the seconds `score` waited; plus the
        judge's own. Shares are left to the reader: counts can be summed over ranks.
        """
        counts = {f"score/{name}": float(count) for name, count in self._decided.items()}
        counts["score/wait_s"] = self._waited_s
        self._decided, self._waited_s = Counter(), 0.0
        judge_stats = getattr(self._judge, "stats", None)
        return counts | (judge_stats() if judge_stats else {})

    def close(self) -> None:
        """Forget what was submitted and close the judge."""
        self._background.run(self._forget())
        if self._judge is not None:
            self._background.run(self._judge.close())
        if self._own is not None:
            self._own.close()
        self._slow_rules.shutdown(wait=False, cancel_futures=True)

    # --- on the background loop ---------------------------------------------------------------------------------------

    def _start(self, trajectory: Trajectory) -> None:
        if id(trajectory) in self._pending:
            return
        answer = extract_answer(trajectory.final_turn)
        now = self._at_once(trajectory, answer)
        self._pending[id(trajectory)] = (
            trajectory, now or asyncio.create_task(self._decide(trajectory, answer or "")))
        if now and now.by == "rule" and answer and self._audit and self._judge and self._is_cross_checked(trajectory):
            task = trajectory.task
            self._cross_checks[id(trajectory)] = asyncio.create_task(
                self._judge.judge(task.question, task.ground_truth, answer))

    def _at_once(self, trajectory: Trajectory, answer: str | None) -> Judgement | None:
        """The verdict, if no waiting is needed for it."""
        if not trajectory.end.scorable:
            return Judgement(Verdict.UNSCORED, "none", trajectory.error or trajectory.end.value)
        if self._own is not None:
            return None
        if not any(g.strip() for g in _alternatives(trajectory)):
            return Judgement(Verdict.UNSCORED, "none", "no ground truth")
        if answer is None:
            return Judgement(Verdict.WRONG, "rule", "no answer")
        return _by_rule(self._rule(trajectory, answer, maths=False))

    def _rule(self, trajectory: Trajectory, answer: str, maths: bool) -> RuleVerdict:
        task = trajectory.task
        return rule_verdict(answer, task.ground_truth, self._policy(task.data_source), task.question, maths)

    async def _decide(self, trajectory: Trajectory, answer: str) -> Judgement:
        if self._own is not None:
            judgement = await self._own.judge(trajectory)
            self.progress()
            return judgement
        task = trajectory.task
        if may_need_maths(task.ground_truth, answer, self._policy(task.data_source)):
            verdict = _by_rule(await asyncio.get_running_loop().run_in_executor(
                self._slow_rules, self._rule, trajectory, answer, True))
            if verdict:
                return verdict
        if self._judge is None:
            return Judgement(Verdict.UNSCORED, "none", "the rules can't say and there is no judge")
        judgement = await self._judge.judge(task.question, task.ground_truth, answer)
        self.progress()
        return judgement

    async def _collect(self, groups: Sequence[tuple[Trajectory, ...]]) -> list[tuple[Judgement, ...]]:
        for count, trajectory in enumerate(t for group in groups for t in group):
            self._start(trajectory)
            if count % _STARTED_AT_ONCE == 0:
                await asyncio.sleep(0)   # the judge begins with the first while the others are prepared
        verdicts = []
        for group in groups:
            found = [self._pending[id(trajectory)][1] for trajectory in group]
            verdicts.append(tuple([await v if isinstance(v, asyncio.Task) else v for v in found]))
        if self._cross_checks:
            await asyncio.wait(self._cross_checks.values(), timeout=_CROSS_CHECK_GRACE_S)
        await self._forget()
        return verdicts

    async def _forget(self) -> None:
        rest = [v for _, v in self._pending.values() if isinstance(v, asyncio.Task) and not v.done()]
        rest += [task for task in self._cross_checks.values() if not task.done()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        self._pending.clear()

    # --- audit --------------------------------------------------------------------------------------------------------

    def _is_cross_checked(self, trajectory: Trajectory) -> bool:
        """A fixed share, chosen by content, so that a repeated run asks the same questions (and finds them cached)."""
        key = f"{trajectory.task.id}\0{trajectory.sample_index}\0{trajectory.final_turn}"
        digest = hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=4).digest()
        return int.from_bytes(digest, "big") < self.config.cross_check * 2**32

    def _write_audit(self, step: int | None, groups: Iterable[RewardedGroup]) -> None:
        checks, self._cross_checks = self._cross_checks, {}
        if self._audit is None or step is None:
            return
        second = {key: task.result() for key, task in checks.items() if task.done() and not task.cancelled()}
        self._audit.write(step, (audit_record(t, j, second.get(id(t)))
                                 for group in groups for t, j in zip(group.trajectories, group.judgements, strict=True)))


def _alternatives(trajectory: Trajectory) -> list[str]:
    truth = trajectory.task.ground_truth
    return [truth] if isinstance(truth, str) else truth


def _by_rule(verdict: RuleVerdict) -> Judgement | None:
    return None if verdict.verdict is Verdict.UNSCORED else Judgement(verdict.verdict, "rule", verdict.rule)


def unscored_share(groups: Iterable[RewardedGroup]) -> tuple[int, int]:
    """(unscored, total) trajectories of this rank: sum both over ranks, then call `check_unscored`."""
    rewards = [reward for group in groups for reward in group.rewards]
    return sum(not reward.scored for reward in rewards), len(rewards)


def unscored_reasons(groups: Iterable[RewardedGroup], most: int = 3) -> str:
    """The commonest reasons on this rank, one line: "41 judge: timed out; 3 none: tool server unreachable"."""
    reasons = Counter(f"{j.by}: {j.detail.splitlines()[0][:120] if j.detail.strip() else 'unknown'}"
                      for group in groups for j, r in zip(group.judgements, group.rewards, strict=True) if not r.scored)
    return "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(most))


def check_unscored(unscored: int, total: int, limit: float, reasons: str = "") -> None:
    """Raise UnscoredLimitError if the share of unscored trajectories of a step passes the limit. Save before calling."""
    if total and unscored / total > limit:
        why = f" ({reasons})" if reasons else ""
        raise UnscoredLimitError(
            f"{unscored} of {total} trajectories of this step are unscored, more than reward.max_unscored = {limit:g}{why}; "
            "nothing was learned from them. Mend the cause and start again: the run resumes where it stopped")
