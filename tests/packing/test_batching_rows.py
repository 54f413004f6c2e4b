"""From rewarded groups to rows: images are processed once, in threads, to the processor's own tensors."""
from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from synthetic_run import make_task, score

from hdpo.agent.chat import ChatFormat, load_chat_format
from hdpo.config import Config, HdpoConfig, OptimConfig, RolloutConfig
from hdpo.packing.batching import PackingSpec
from hdpo.packing.exchange import to_rows, to_tensors
from hdpo.ranks.world import World
from hdpo.train.collect import score_groups
from hdpo.train.rl import make_batch
from hdpo.train.samples import PixelPool, group_advantages, to_samples
from hdpo.types import EndReason, RewardedGroup, Sample, Trajectory


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    from tiny_models import MAX_PIXELS, MIN_PIXELS, save_tiny_qwen3_vl

    folder: Path = save_tiny_qwen3_vl(tmp_path_factory.mktemp("model"))
    return load_chat_format(str(folder), MIN_PIXELS, MAX_PIXELS)


class CountedChat:
    """A chat format that remembers which sizes it was asked to process, and where."""

    def __init__(self, chat: ChatFormat) -> None:
        self.chat, self.seen, self.threads = chat, [], set()   # type: ignore[var-annotated]

    def vision(self, images):   # type: ignore[no-untyped-def]
        self.seen += [image.size for image in images]
        self.threads.add(threading.current_thread())
        return self.chat.vision(images)


def picture(chat: ChatFormat, width: int, height: int, seed: int) -> Image.Image:
    return chat.bound(Image.effect_noise((width, height), 40 + seed).convert("RGB"))


def group(chat: ChatFormat, right: list[bool], index: int = 0, own_image: bool = True) -> RewardedGroup:
    """Rollouts that share a prompt image; each has a crop of its own besides."""
    task = make_task(index, needed=True)
    shared = picture(chat, 64, 48, index)
    trajectories = []
    for sample, correct in enumerate(right):
        images = (shared, picture(chat, 32, 64 + 16 * sample, sample)) if own_image else (shared,)
        keys = tuple([f"prompt{index}", *[f"crop{index}.{sample}"] * own_image])
        turn = f"<answer>{task.ground_truth if correct else 'no'}</answer>"
        trajectories.append(Trajectory(task, sample, [1, 2, 3], [0, 1, 1], [0.0, -1.0, -1.0], 1, images, (), EndReason.ANSWERED,
                                       (turn,), image_keys=keys))
    return replace(score(tuple(trajectories)), index=index)


def test_the_image_that_a_groups_rollouts_share_is_processed_once_and_held_once(chat: ChatFormat) -> None:
    counted = CountedChat(chat)
    pool = PixelPool(counted)   # type: ignore[arg-type]
    groups = [group(chat, [True, False, True, False])]
    for trajectory in groups[0].trajectories:
        pool.submit(trajectory)
    rows = to_samples(groups, *group_advantages(groups, HdpoConfig()), pool, HdpoConfig())
    assert len(counted.seen) == 5 and threading.current_thread() not in counted.threads
    assert len({id(row.vision.pixels[0]) for row in rows if row.vision}) == 1 and len(rows) == 4
    for row, trajectory in zip(rows, groups[0].trajectories, strict=True):
        whole = chat.vision(trajectory.images)
        assert whole is not None and row.vision is not None
        assert torch.equal(row.vision.pixel_values, whole.pixel_values) and torch.equal(row.vision.grid_thw, whole.grid_thw)
    pool.close()


def test_rows_without_a_gradient_have_no_images(chat: ChatFormat) -> None:
    counted = CountedChat(chat)
    pool = PixelPool(counted)   # type: ignore[arg-type]
    groups = [group(chat, [True, True])]
    rows = to_samples(groups, *group_advantages(groups, HdpoConfig()), pool, HdpoConfig())
    assert len(rows) == 2 and all(row.vision is None for row in rows) and not counted.seen
    pool.close()


def test_work_ahead_is_bounded_and_what_it_left_out_is_made_when_needed(chat: ChatFormat) -> None:
    counted = CountedChat(chat)
    pool = PixelPool(counted, ahead_bytes=1)   # type: ignore[arg-type]
    first, second = group(chat, [True, False], own_image=False), group(chat, [True, False], 1, own_image=False)
    for trajectory in (*first.trajectories, *second.trajectories):
        pool.submit(trajectory)
    aborted = replace(second.trajectories[0], end=EndReason.ABORTED)
    pool.submit(aborted)
    assert pool.vision(first.trajectories[1]) is not None and len(counted.seen) == 1
    assert pool.vision(second.trajectories[1]) is not None and len(counted.seen) == 2
    pool.clear()
    assert pool.vision(first.trajectories[0]) is not None and len(counted.seen) == 3   # forgotten with its step
    pool.close()


def test_images_without_names_are_told_apart_by_content(chat: ChatFormat) -> None:
    pool = PixelPool(chat)
    one, two = (replace(t, image_keys=(), images=(picture(chat, 64, 64, seed),))
                for seed, t in enumerate(group(chat, [True, False]).trajectories))
    made = [pool.vision(t) for t in (one, two, one)]
    assert made[0] is not None and made[1] is not None and made[2] is not None
    assert not torch.equal(made[0].pixel_values, made[1].pixel_values) and made[0].pixels[0] is made[2].pixels[0]
    pool.close()


def test_a_mini_batch_is_a_run_of_the_steps_prompts_whatever_the_order_and_number_of_groups(chat: ChatFormat) -> None:
    """Indices have gaps and no order where ranks share the prompts and groups without a signal are replaced."""
    config = Config(rollout=RolloutConfig(prompts_per_step=4, group_size=2), optim=OptimConfig(mini_batch_prompts=2))
    filler = Sample([1, 2], [0, 0], [0.0, 0.0], (), (), None)
    parts: Any = SimpleNamespace(policy=SimpleNamespace(world=World()), pixels=PixelPool(chat),
                                 spec=PackingSpec(None, 1, 1000, 1000, filler))

    def without_images(index: int) -> RewardedGroup:
        made = group(chat, [True, False], index)
        return replace(made, trajectories=tuple(replace(t, token_ids=[index, 2, 3], images=(), image_keys=())
                                                for t in made.trajectories))
    groups = [without_images(index) for index in (6, 0, 9, 3)]
    batch = make_batch(config, parts, score_groups(groups, config.hdpo))
    assert [sorted(set(mini.micro_batches[0].input_ids[0, ::3].tolist())) for mini in batch.mini_batches] == [[0, 3], [6, 9]]
    assert all(mini.norms[0] == 8.0 for mini in batch.mini_batches)
    parts.pixels.close()


def test_a_demonstration_travels_like_a_rollout_and_an_image_travels_once(chat: ChatFormat) -> None:
    vision = chat.vision([picture(chat, 64, 48, 1), picture(chat, 32, 32, 2)])
    assert vision is not None
    rows = [Sample([7, 8, 9], [0, 1, 1], [0.0, -0.1, -1e-9], (), (), vision, 1, 12), Sample([5], [0], [0.0], (), (), None),
            Sample([6, 6], [0, 1], [0.0, -3.0], (), (), replace(vision, pixels=vision.pixels[:1], grid_thw=vision.grid_thw[:1]))]
    sent = to_tensors(rows)
    assert sum(t.numel() for t in sent[9:]) == sum(pixels.numel() for pixels in vision.pixels)
    got = to_rows([t.clone() for t in sent])
    for row, copy in zip(rows, got, strict=True):
        assert replace(copy, vision=None) == replace(row, vision=None)
    assert got[1].vision is None and got[0].vision is not None and got[2].vision is not None
    assert torch.equal(got[0].vision.pixel_values, vision.pixel_values) and got[0].vision.scale == vision.scale is not None
    assert torch.equal(got[0].vision.grid_thw, vision.grid_thw) and got[2].vision.pixels[0] is got[0].vision.pixels[0]
    assert to_rows(to_tensors([])) == []
