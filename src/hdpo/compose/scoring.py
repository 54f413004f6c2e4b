"""The judge with its cache, and the scorer that asks it."""
from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from hdpo.background import BackgroundLoop
from hdpo.config import Config
from hdpo.protocols import Judge
from hdpo.reward.audit import AuditLog
from hdpo.reward.scoring import Scorer

if TYPE_CHECKING:
    from hdpo.ranks.world import World


def open_scorer(config: Config, background: BackgroundLoop, world: World, closing: ExitStack) -> Scorer:
    scorer = Scorer(config.reward, build_judge(config, world.node), background, AuditLog(config.run.path / "audit", world.rank))
    scorer.progress = world.progress
    closing.callback(scorer.close)
    return scorer


def build_judge(config: Config, node: int = 0) -> Judge | None:
    """The configured judge, or None: then what rules can't decide is unscored. Each node keeps verdicts in a file of its own:
    SQLite must not be shared over a network file system."""
    if not config.judge.base_url or not config.reward.judge:
        return None
    from hdpo.adapters.openai_judge import open_judges
    from hdpo.reward.panel import PanelJudge
    from hdpo.reward.verdict_cache import CachedJudge
    judges = open_judges(config.judge)
    cache = Path(config.judge.cache or config.run.path / "verdicts.sqlite")
    return CachedJudge(judges[0] if len(judges) == 1 else PanelJudge(judges),
                       cache.with_stem(f"{cache.stem}_node{node}") if node else cache)
