"""`hdpo replay`: what of a kept step can't be trained again is refused in one line."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from hdpo.agent.chat import ChatFormat
from hdpo.cli import main
from hdpo.compose.replay import replay_config
from hdpo.config import Config
from hdpo.config.file import dump_config, load_config
from hdpo.errors import CheckpointError, DataError, UserError
from hdpo.reward.rewards import reward_of
from hdpo.state.dump import read_rollouts, write_rollouts, write_rows
from hdpo.train.replay import kept_groups
from hdpo.types import EndReason, Judgement, RewardedGroup, Task, ToolCall, Trajectory, Verdict

CONFIG = load_config(None, ["rollout.prompts_per_step=2", "optim.mini_batch_prompts=1", "rollout.group_size=2"])


def group(chat: ChatFormat, index: int, side: int = 32) -> RewardedGroup:
    task = Task(f"t{index}", "toy", [{"role": "user", "content": "q"}], (), "4", {"tool_needed": 1})
    image = chat.bound(Image.new("RGB", (side, side), (index, 0, 0)))
    ids = [1] + [chat.image_token_id] * chat.image_tokens(image.size) + [2, 3]
    calls = (ToolCall("python", {"code": "1"}, True, "saw", 0),)
    trajectories = tuple(Trajectory(
        task, sample, ids, [0] * (len(ids) - 1) + [1], [0.0] * (len(ids) - 1) + [-0.1 - sample], len(ids) - 2, (image,), calls,
        EndReason.ANSWERED, ("<answer>4</answer>",), index=index, versions=[]) for sample in range(2))
    judgements = (Judgement(Verdict.CORRECT, "rule", "r"), Judgement(Verdict.UNSCORED, "none", "?"))
    rewards = tuple(reward_of(t, j, CONFIG.reward) for t, j in zip(trajectories, judgements))
    return RewardedGroup(task, trajectories, judgements, rewards, index)


@pytest.fixture
def run(tmp_path: Path, chat: ChatFormat) -> Path:
    write_rollouts(tmp_path / "rollouts" / "step_000003.parquet", [group(chat, 1), group(chat, 0)], step=3)
    (tmp_path / "config.yaml").write_text(dump_config(CONFIG))
    return tmp_path


def test_kept_groups_are_those_that_were_dumped_in_their_order(run: Path, chat: ChatFormat) -> None:
    groups, notes = kept_groups(run, 3, CONFIG, chat)
    assert notes == [] and [g.index for g in groups] == [1, 0]
    for kept, made in zip(groups, [group(chat, 1), group(chat, 0)]):
        assert kept.rewards == made.rewards and [j.verdict for j in kept.judgements] == [j.verdict for j in made.judgements]
        for ours, theirs in zip(kept.trajectories, made.trajectories):
            assert (ours.token_ids, ours.mask, ours.prompt_length, ours.end) == (
                theirs.token_ids, theirs.mask, theirs.prompt_length, theirs.end)
            assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-7)
            assert [i.tobytes() for i in ours.images] == [i.tobytes() for i in theirs.images]
            assert ours.num_tool_calls == theirs.num_tool_calls == 1 and ours.task.tool_needed
    halves = [kept_groups(run, 3, CONFIG, chat, rank, 2) for rank in range(2)]
    assert [[g.index for g in own] for own, _ in halves] == [[0], [1]] and "sums are in another order" in halves[0][1][0]


def test_rewards_are_made_anew_where_their_settings_are_changed(run: Path, chat: ChatFormat) -> None:
    costly = load_config(run / "config.yaml", ["reward.tool_cost={python: 3}"])
    kept, anew = (kept_groups(run, 3, costly, chat, anew=anew)[0][0].rewards[0].tool for anew in (False, True))
    assert (kept, anew) == (0.5, 0.25)


def changed(run: Path, **values: object) -> None:
    path = run / "rollouts" / "step_000003.parquet"
    write_rows(path, [dataclasses.replace(row, **values) for row in read_rollouts(path)])


def test_a_dump_that_can_t_be_trained_is_refused_and_says_why(run: Path, chat: ChatFormat) -> None:
    with pytest.raises(DataError, match="no rollouts of step 4 were kept; there are those of 3 to 3"):
        kept_groups(run, 4, CONFIG, chat)
    with pytest.raises(DataError, match=r"holds 4 of 6 rollouts: it was thinned to log.rollouts_gib"):
        kept_groups(run, 3, load_config(run / "config.yaml", ["rollout.group_size=3"]), chat)
    small = Image.new("RGB", (8, 8))
    for values, problem in (({"images": []}, "kept without its pictures"), ({"log_probs": []}, "lacks its tokens or log-probs"),
                            ({"images": [_png(small)]}, "kept smaller than the model saw"),
                            ({"index": None}, "before dumps said")):
        write_rollouts(run / "rollouts" / "step_000003.parquet", [group(chat, 1), group(chat, 0)], step=3)
        changed(run, **values)
        with pytest.raises(DataError, match=problem) as failed:
            kept_groups(run, 3, CONFIG, chat)
        assert "\n" not in str(failed.value)


def _png(image: Image.Image) -> bytes:
    from hdpo.state.dump import encode_image
    return encode_image(image)


def test_a_run_that_was_moved_begins_with_the_model_that_lies_with_it(run: Path) -> None:
    (run / "sft" / "model").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(CONFIG.model_copy(update={
        "run": CONFIG.run.model_copy(update={"folder": "elsewhere", "name": "was"}),
        "model": CONFIG.model.model_copy(update={"path": "elsewhere/was/sft/model"})})))
    assert replay_config(run, 1, []).model.path == str(run / "sft" / "model")
    assert replay_config(run, 1, ["model.path=mine"]).model.path == "mine"


def test_weights_that_are_gone_and_folders_that_are_no_run_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="begins with the state after step 2, .*; steps that can be trained again: none"):
        replay_config(run, 3, [])
    with pytest.raises(UserError, match="steps are counted from 1"):
        replay_config(run, 0, [])
    with pytest.raises(UserError, match="did you mean hdpo.w_tool"):
        replay_config(run, 1, ["hdpo.tool_weight=0"])
    config = replay_config(run, 1, ["hdpo.w_tool=0"])
    assert config.run.path == run.absolute() / "replay" / "step_000001" and config.run.allow == ["hdpo.w_tool", "data.train"]
    assert isinstance(config, Config) and main(["replay", str(run / "rollouts"), "--step", "1"]) == 2
    assert "no config.yaml there" in capsys.readouterr().err
