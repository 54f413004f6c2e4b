"""Several judges as one: the majority of all its members is the panel's verdict."""
from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from hdpo.reward.verdict_cache import FingerprintedJudge
from hdpo.types import Judgement, Verdict


class PanelJudge:
    """Implements `hdpo.protocols.Judge`. More than half of ALL members must agree, so that an outage of some never
    turns a minority into a majority; without that the verdict is UNSCORED. Use an odd number of members.
    """

    def __init__(self, members: Sequence[FingerprintedJudge]) -> None:
        if len(members) < 2:
            raise ValueError("a panel has at least two members")
        self._members = tuple(members)
        self._counts: Counter[str] = Counter()

    async def judge(self, question: str, ground_truth: str | list[str], prediction: str) -> Judgement:
        said = await asyncio.gather(*[member.judge(question, ground_truth, prediction) for member in self._members])
        counts = Counter(judgement.verdict for judgement in said)
        majority = next((v for v in (Verdict.CORRECT, Verdict.WRONG) if 2 * counts[v] > len(said)), Verdict.UNSCORED)
        self._counts["panel_split"] += counts[Verdict.CORRECT] > 0 and counts[Verdict.WRONG] > 0
        return Judgement(majority, "judge", "\n---\n".join(f"{j.verdict.value}: {j.detail}" for j in said))

    async def fingerprint(self) -> str:
        """All that determines a verdict. Raises JudgeError while a member's model is unknown."""
        return "\0\0".join(await asyncio.gather(*[member.fingerprint() for member in self._members]))

    def stats(self) -> dict[str, float]:
        """The members' counts summed since the previous call, and judge/panel_split: verdicts that were not unanimous."""
        total = Counter({f"judge/{name}": float(count) for name, count in self._counts.items()})
        self._counts = Counter()
        for member in self._members:
            member_stats = getattr(member, "stats", None)
            total.update(member_stats() if member_stats else {})
        return dict(total)

    async def close(self) -> None:
        for member in self._members:
            await member.close()
