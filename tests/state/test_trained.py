"""The trainer's log-probs beside the dump: every token once, under its rollout's name, within the dump's bytes."""
from __future__ import annotations

import pytest
import torch

from hdpo.errors import DataError
from hdpo.packing.batching import PackingSpec, pack
from hdpo.state.trained import TrainedRow, find_trained, read_trained, trained_parts, write_trained
from hdpo.train.seen import Seen
from hdpo.types import Sample

FILLER = Sample([1, 2], [0, 0], [0.0, 0.0], (), (), None)
SPEC = PackingSpec(image_token_id=None, merge_size=2, max_tokens=64, max_patches=64, filler=FILLER)


def sample(group: int, index: int, sampled: int) -> Sample:
    length = 3 + sampled
    return Sample(list(range(length)), [0] * 3 + [1] * sampled, [-0.5] * length, (1.0, 0.0), (True, False), None, 3, group, index)


def log_probs(folder, step, group, number):
    return find_trained([read_trained(part) for part in trained_parts(folder, step)], group, number)


def test_every_row_comes_back_with_its_own_tokens_whatever_pack_it_was_in():
    seen, micro = Seen(), pack([sample(4, 1, 2), sample(4, 0, 3), sample(7, 5, 1)], SPEC, channels=2)
    seen.note(micro, torch.arange(6.0), None)
    other = pack([sample(9, 2, 2)], SPEC, channels=2)
    seen.note(other, torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0]))
    seen.note(micro, torch.arange(6.0) + 100, torch.arange(6.0))      # a second epoch
    assert seen.take() == [TrainedRow(4, 1, [0.0, 1.0], []), TrainedRow(4, 0, [2.0, 3.0, 4.0], []), TrainedRow(7, 5, [5.0], []),
                           TrainedRow(9, 2, [-3.0, -4.0], [-1.0, -2.0])]
    assert seen.take() == []


def test_a_reader_finds_a_row_in_whichever_ranks_part_it_is_and_none_left_by_more_ranks(tmp_path):
    for rank in range(3):
        write_trained(tmp_path, 2, [TrainedRow(rank, 0, [-0.25], [-0.5])], rank, 3)
    assert log_probs(tmp_path, 2, 2, 0) == ([-0.25], [-0.5])
    assert log_probs(tmp_path, 2, 2, 1) is None and log_probs(tmp_path, 3, 2, 0) is None
    for rank in range(2):
        write_trained(tmp_path, 2, [TrainedRow(rank, 0, [-0.25], [])], rank, 2)
    assert log_probs(tmp_path, 2, 2, 0) is None


def test_a_part_keeps_to_its_bytes_and_a_damaged_one_is_one_line(tmp_path):
    rows = [TrainedRow(index, 0, [-0.1 * index] * 1000, []) for index in range(50)]
    part = write_trained(tmp_path, 1, rows, 0, 1, byte_limit=10_000)
    assert log_probs(tmp_path, 1, 1, 0) is not None and log_probs(tmp_path, 1, 30, 0) is None
    part.write_bytes(b"torn")
    with pytest.raises(DataError, match="step_000001.rank0.parquet: not readable"):
        log_probs(tmp_path, 1, 1, 0)
