"""What fields must be to each other, named in full: the message's reader looks for them."""
from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hdpo.config.tools import SHIPPED
from hdpo.config.types import LARGEST

if TYPE_CHECKING:
    from hdpo.config import Config

_LOWER_IS_BETTER = re.compile(
    r"^(time|memory|perf|mismatch|data|end)/|(^|[/_])(loss|nll|perplexity|kl|blind|missed|unscored|malformed|failed|errors?|"
    r"skipped|seconds|norm|clipfrac)([/_]|$)")


def lower_is_better(name: str) -> bool:
    """Of a logged number. In eval/SOURCE/NUMBER the middle is a user's word."""
    return bool(_LOWER_IS_BETTER.search(name.rpartition("/")[2] if name.startswith("eval/") else name))


def rules(c: Config) -> list[tuple[bool, str]]:
    """(whether it holds, what is wrong otherwise)."""
    tools = {*SHIPPED, *c.tools.own, "*"}
    low, high = c.hdpo.importance_range
    return [
        (c.rollout.prompts_per_step % c.optim.mini_batch_prompts == 0,
         f"rollout.prompts_per_step ({c.rollout.prompts_per_step}) must be a multiple of "
         f"optim.mini_batch_prompts ({c.optim.mini_batch_prompts})"),
        (0 < low <= 1 <= high, f"hdpo.importance_range ({low}, {high}) must hold 1, with a lower bound above 0"),
        (c.hdpo.dual_clip == 0 or c.hdpo.dual_clip > 1,
         f"hdpo.dual_clip ({c.hdpo.dual_clip}) must be above 1, or 0"),
        (c.hdpo.w_acc + c.hdpo.w_tool > 0, "hdpo.w_acc and hdpo.w_tool are both 0: nothing would be trained"),
        (not (c.rollout.carry_over and c.run.deterministic),
         "rollout.carry_over: where a step ends depends on time, which run.deterministic can't repeat; turn one of them off"),
        (not (c.rollout.carry_over and c.rollout.dynamic_sampling),
         "rollout.carry_over and rollout.dynamic_sampling both start further prompts; set one of them to 0"),
        (not (c.rollout.carry_over and c.hdpo.importance == "none"),
         "rollout.carry_over trains tokens of earlier weights, which hdpo.importance must correct for; set it to token"),
        (c.model.min_pixels <= c.model.max_pixels,
         f"model.min_pixels ({c.model.min_pixels}) must not exceed model.max_pixels ({c.model.max_pixels})"),
        (c.max_model_len <= LARGEST, "data.max_prompt_tokens and rollout.max_response_tokens are too large together"),
        (bool(c.data.val or c.eval.tasks) or not c.eval.every_steps,
         f"eval.every_steps ({c.eval.every_steps}) needs data.val: name files of held-out rows there (VAL_DATA)"),
        (not c.eval.tasks or bool(c.eval.every_steps) or c.eval.before or c.eval.after,
         "eval.tasks: nothing says when they are answered; set eval.every_steps, eval.before or eval.after"),
        (not (c.data.group_by_length and c.data.mix),
         "data.mix gives every step its share of each source, which data.group_by_length would undo; leave one of them out"),
        (not lower_is_better(c.checkpoint.best) or c.checkpoint.best.startswith("-"),
         f"checkpoint.best: {c.checkpoint.best} is better the lower it is, and the checkpoint with the highest is kept; "
         f"-{c.checkpoint.best} keeps the one with the lowest"),
        *((name in tools or bool(c.tools.mcp), f"reward.tool_cost: there is no tool {name}; there are {', '.join(sorted(tools))}")
          for name in c.reward.tool_cost),
        *((not tool.mcp or tool.mcp in c.tools.mcp, f"tools.own.{name}.mcp: {tool.mcp} is not in tools.mcp")
          for name, tool in c.tools.own.items()),
    ]
