"""Rolls the questions of benchmarks out with the trainer's own agent, on any number of ranks, and keeps every answer.

The arms are "tools" and "no_tools". The second has two forms: "absent" (the prompt offers no tool) and "refused" (the prompt
is the same, every call is refused). A call is counted when it is attempted, in either.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdpo.agent.chat import ChatFormat
from hdpo.agent.queue import PromptQueue
from hdpo.agent.rollout import LIVE_PER_SEQUENCE, Rollouts
from hdpo.config import Config
from hdpo.evaluation.items import Benchmark, Item
from hdpo.evaluation.kept import Kept, record_of
from hdpo.evaluation.predictions import NO_TOOLS, TOOLS
from hdpo.evaluation.prompts import system_prompt, version
from hdpo.evaluation.questions import Pictures, Question, Questions, chosen
from hdpo.evaluation.score import place_of
from hdpo.progress import progress
from hdpo.ranks.world import World
from hdpo.train.collect import prompt_queue
from hdpo.train.lifecycle import StopSignal
from hdpo.types import Trajectory

REFERENCE_PIXELS = 16384 * 32 * 32
REFERENCE_TURNS = 11        # tool calls and the answer after the last
PICTURE_BYTES, ENCODED_BYTES, FEWEST_SEQUENCES = 1 << 30, 4 << 20, 8
"""Memory of a rank for the pictures of live trajectories, what an encoded picture takes, and what is kept running anyhow."""

ABSENT, REFUSED = "absent", "refused"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked and how. `limit` 0 is everything."""

    arms: tuple[str, ...] = (TOOLS,)
    samples: int = 1
    limit: int = 0
    no_tools_form: str = ABSENT
    temperature: float = 0.0
    system: str = ""            # "" : this project's
    system_plain: str = ""
    bare: bool = False          # questions without this project's instruction how to answer

    def prompt_of(self, arm: str, config: Config) -> str:
        if arm == NO_TOOLS and self.no_tools_form == ABSENT:
            return self.system_plain or system_prompt(config.tools.none)
        return self.system or system_prompt(config.tools)


def settings_of(config: Config, plan: Plan, chat: ChatFormat, benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    """Everything an answer depends on, for the record and to refuse a resume with other settings."""
    return {
        "model": config.model.path, "max_pixels": chat.max_pixels, "min_pixels": chat.min_pixels,
        "max_tool_pixels": chat.max_tool_pixels, "tell_sizes": chat.tells_sizes,
        "turns": config.rollout.max_turns + 1, "temperature": plan.temperature, "greedy": plan.temperature == 0,
        "max_response_tokens": config.rollout.max_response_tokens, "max_prompt_tokens": config.data.max_prompt_tokens,
        "no_tools_form": plan.no_tools_form, "tools": list(config.tools.offered), "seed": config.run.seed,
        "bare": plan.bare, "prompts": {arm: version(plan.prompt_of(arm, config)) for arm in (TOOLS, NO_TOOLS)},
        "benchmark_prompts": {benchmark.name: benchmark.prompt_version for benchmark in benchmarks}}


def comparable(settings: Mapping[str, Any]) -> str:
    """One line: pixels, turns and sampling of a score, and whether published tables used the same."""
    differs = [f"{name} {shown}" for name, same, shown in (
        ("pixels", settings["max_pixels"] == REFERENCE_PIXELS, f"{settings['max_pixels'] / 1e6:.3g} MP, not 16.8"),
        ("turns", settings["turns"] == REFERENCE_TURNS, f"{settings['turns']}, not {REFERENCE_TURNS}"),
        ("sampling", settings["greedy"], f"at temperature {settings['temperature']:g}, not greedy")) if not same]
    how = "greedy" if settings["greedy"] else f"temperature {settings['temperature']:g}"
    said = f"prompt images up to {settings['max_pixels'] / 1e6:.3g} MP, {settings['turns']} turns, {how}"
    return f"{said}: " + (f"not comparable with published tables ({'; '.join(differs)})" if differs
                          else "the setting of published tables")


def bounded_sequences(config: Config, max_pixels: int) -> Config:
    """With as many sequences at once as PICTURE_BYTES hold the pictures of, encoded and as the model may see them at most."""
    room = PICTURE_BYTES // int(LIVE_PER_SEQUENCE * (ENCODED_BYTES + 3 * max_pixels))
    count = min(config.rollout.max_num_seqs, max(FEWEST_SEQUENCES, room))
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_num_seqs": count})})


@dataclass(slots=True)
class Runner:
    """One evaluation. `rollouts` makes the rollouts of an arm, whose tools may be refused."""

    config: Config
    plan: Plan
    world: World
    rollouts: Callable[[bool], Rollouts]
    kept: Kept

    def run(self, benchmarks: Sequence[Benchmark], items: Mapping[str, Mapping[str, Item]], data: Path) -> bool:
        """Roll out what is not kept yet. Collective. False when it was asked to stop first."""
        questions = self._questions(benchmarks, items, data)
        known = self.world.broadcast({key for key, record in self.kept.known().items() if not record["error"]}
                                     if self.world.is_main else None)
        todo = {arm: [q for q in questions if any((q.benchmark.name, q.item.id, arm, sample) not in known
                                                  for sample in range(self.plan.samples))] for arm in self.plan.arms}
        total = self.plan.samples * sum(map(len, todo.values()))
        bar = progress("answers", "", total=total, shown=self.world.is_main and total > 0)
        with StopSignal() as stop, bar:
            for arm in self.plan.arms:
                if todo[arm] and not self.world.any(stop.is_set()):
                    self._arm(Questions(todo[arm], arm, self.plan.prompt_of(arm, self.config), self.plan.bare), known, bar, stop)
            return not self.world.any(stop.is_set())

    def _questions(self, benchmarks: Sequence[Benchmark], items: Mapping[str, Mapping[str, Item]], data: Path) -> list[Question]:
        found = []
        for benchmark in benchmarks:
            pictures = Pictures(place_of(benchmark, data), self.config.data.cache)
            found += [Question(benchmark, item, pictures)
                      for item in chosen(list(items[benchmark.name].values()), self.plan.limit)]
        return found

    def _arm(self, questions: Questions, known: set[Any], bar: Any, stop: StopSignal) -> None:
        world, counter = self.world, f"eval/{questions.arm}"
        done_before = bar.n

        def finished(trajectory: Trajectory) -> None:
            extra = trajectory.task.extra
            if (extra["benchmark"], extra["item"], questions.arm, trajectory.sample_index) not in known:
                broken = questions.broken.get(trajectory.task.id, "")
                self.kept.add(record_of(trajectory, broken), trajectory.images)
            count = world.claim(counter) + 1
            world.phase("evaluate", count)      # the watch takes hours in one phase for a hang
            if world.is_main:
                bar.update(done_before + count - bar.n)
        rollouts = self.rollouts(questions.arm == NO_TOOLS)
        rollouts.stop = stop
        world.phase("evaluate", 0)
        queue: PromptQueue = prompt_queue(world, self.config.run.deterministic)
        rollouts.collect(questions, queue=queue, numbers=questions.numbers(), group_size=self.plan.samples,
                         temperature=self.plan.temperature, step=0, weight_version=0, on_finished=finished, keep=False)
        world.barrier()


def selected(benchmarks: Sequence[Benchmark], items: Mapping[str, Mapping[str, Item]], plan: Plan,
             known: Mapping[Any, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The kept answers that this plan asks for: by benchmark, question, arm and sample, whoever gave them and when."""
    found = []
    for benchmark in benchmarks:
        for item in chosen(list(items[benchmark.name].values()), plan.limit):
            keys = [(benchmark.name, item.id, arm, sample) for arm in plan.arms for sample in range(plan.samples)]
            found += [known[key] for key in keys if key in known]
    return found
