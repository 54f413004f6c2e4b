"""The runner with a scripted policy: what each form of the arm without tools means, and that nothing kept is asked again."""
from __future__ import annotations

import base64
import json

import pytest
from published import picture, tsv
from scripted import ScriptedEngine, ScriptedTools

from hdpo.agent.parse import EXAMPLES
from hdpo.agent.rollout import Rollouts
from hdpo.config import Config
from hdpo.errors import ConfigError
from hdpo.evaluation.benchmarks import open_benchmarks
from hdpo.evaluation.finish import finish
from hdpo.evaluation.kept import Kept, check_settings
from hdpo.evaluation.runner import REFUSED, Plan, Runner, bounded_sequences, comparable, selected, settings_of
from hdpo.evaluation.score import read_items
from hdpo.ranks.world import World

CALL = "<reason>look</reason>\n" + EXAMPLES["python"]


def eager(prompt: str, request) -> str:
    """Calls python once wherever the prompt offers it, and is right only after a picture or a result."""
    if "Code execution result" in prompt:
        return "<reason>so</reason>\n<answer>A</answer>"
    if "python runs code" in prompt and "not available" not in prompt:
        return CALL
    return "<reason>guess</reason>\n<answer>B</answer>"


class Asked:
    """One evaluation of six questions in `folder`; `run` again goes on there."""

    def __init__(self, folder, chat, background, data=None) -> None:
        self.folder, self.chat, self.background, self.data = folder, chat, background, data or folder / "data"
        self.config = Config.model_validate({"run": {"folder": str(folder), "name": "r"},
                                             "data": {"cache": str(folder / "cache")},
                                             "rollout": {"max_turns": 3}})
        if not self.data.exists():
            tsv(self.data / "logicvista" / "LogicVista.tsv", [
                {"index": k, "question": f"Which {k}?", "answer": "A", "skill": "inductive",
                 "image": base64.b64encode(picture(k)).decode() if k != 4 else "bm9ub25vbm9ub25vbm9ubw=="} for k in range(6)])
        self.engine = ScriptedEngine(chat, eager)
        self.tools = ScriptedTools()

    def run(self, plan: Plan, fail_after: int = 0):
        benchmarks, data = open_benchmarks("logicvista"), self.data
        items = {"logicvista": read_items(benchmarks[0], data)}
        kept = Kept(self.folder / "r")
        check_settings(kept.folder, settings_of(self.config, plan, self.chat, benchmarks))
        if fail_after:
            real, count = kept.add, iter(range(10**6))

            def add(*arguments) -> None:
                if next(count) >= fail_after:
                    raise OSError("killed here")
                real(*arguments)
            kept.add = add

        def rollouts(refuse: bool) -> Rollouts:
            tools = self.config.tools.model_copy(update={"allowed": []}) if refuse else self.config.tools
            return Rollouts(self.engine, self.chat, self.tools, self.background, self.config.rollout, tools, 4096)
        assert Runner(self.config, plan, World(), rollouts, kept).run(benchmarks, items, data)
        kept.close()
        records = selected(benchmarks, items, plan, kept.known())
        return finish(kept.folder, kept, benchmarks, items, data, records, {}, judge=None, background=self.background)


def test_without_tools_in_the_prompt_none_is_called(chat, background, tmp_path):
    found = Asked(tmp_path, chat, background).run(Plan(arms=("tools", "no_tools"))).records["logicvista"]
    assert found["arms"]["tools"]["score"] == 1.0 and found["arms"]["no_tools"]["score"] == 0.0
    assert found["arms"]["tools"]["tool_use"]["calls_per_question"] == 1.0 and found["tool_use"]["by_tool"] == {"python": 1.0}
    assert found["arms"]["no_tools"]["tool_use"]["tool_rate"] == 0.0 and found["wisdom"]["rescued"] == 5
    assert found["unscored"] == 1, "the picture that is none is a fault of the data, not of the policy"


def test_refused_calls_are_attempts_that_never_run(chat, background, tmp_path):
    asked = Asked(tmp_path, chat, background)
    found = asked.run(Plan(arms=("no_tools",), no_tools_form=REFUSED)).records["logicvista"]
    assert found["tool_use"]["tool_rate"] == 1.0 and found["tool_use"]["failed_share"] == 1.0 and found["score"] == 0.0
    assert asked.tools.calls == []


def test_what_is_kept_is_not_asked_again_and_the_files_are_the_same(chat, background, tmp_path):
    plan = Plan(arms=("tools", "no_tools"), samples=2, temperature=1.0)
    at_once = Asked(tmp_path / "whole", chat, background, tmp_path / "data")
    whole = at_once.run(plan)
    broken = Asked(tmp_path / "broken", chat, background, tmp_path / "data")
    with pytest.raises(OSError, match="killed here"):
        broken.run(plan, fail_after=9)
    part = next((tmp_path / "broken/r/answers").glob("*.jsonl"))
    part.write_text(part.read_text() + '{"benchmark": "logicvista", "id": "5", "arm"')      # a line that was being written
    again = Asked(tmp_path / "broken", chat, background, tmp_path / "data")
    second = again.run(plan)
    assert second.records == whole.records
    names = ("predictions.jsonl", "questions.parquet", "summary.json")
    for name in names:
        assert (tmp_path / "whole/r" / name).read_bytes() == (tmp_path / "broken/r" / name).read_bytes(), name
    assert 0 < len(again.engine.requests) < len(at_once.engine.requests)
    third = Asked(tmp_path / "broken", chat, background, tmp_path / "data")
    assert third.run(plan).records == whole.records
    assert {r.seed for r in third.engine.requests} <= {r.seed for r in again.engine.requests}, "only what failed is asked again"


def test_more_samples_keep_those_that_are_there(chat, background, tmp_path):
    first = Asked(tmp_path, chat, background)
    first.run(Plan(samples=2, temperature=1.0))
    lines = (tmp_path / "r/predictions.jsonl").read_text().splitlines()
    Asked(tmp_path, chat, background).run(Plan(samples=3, temperature=1.0))
    more = (tmp_path / "r/predictions.jsonl").read_text().splitlines()
    assert len(lines) == 12 and len(more) == 18 and set(lines) <= set(more)


def test_another_setting_needs_another_folder(chat, background, tmp_path):
    Asked(tmp_path, chat, background).run(Plan())
    with pytest.raises(ConfigError, match="temperature = 0.0, this run has 0.7.*run.name"):
        Asked(tmp_path, chat, background).run(Plan(temperature=0.7))


def test_the_setting_of_published_tables_is_told_from_others(chat):
    config = Config()
    settings = settings_of(config, Plan(), chat, open_benchmarks("vstar"))
    assert "not comparable" in comparable(settings) and json.dumps(settings)
    reference = {**settings, "max_pixels": 16384 * 32 * 32, "turns": 11}
    said = comparable(reference)
    assert said.endswith("the setting of published tables") and "16.8 MP, 11 turns, greedy" in said
    assert "temperature 0.7" in comparable({**reference, "greedy": False, "temperature": 0.7})


def test_large_pictures_mean_fewer_rollouts_at_once():
    small, large = (bounded_sequences(Config(), pixels).rollout.max_num_seqs for pixels in (4096, 1 << 24))
    assert small == 170 and large == 13
