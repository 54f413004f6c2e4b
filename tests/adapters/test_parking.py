"""What is parked on the host can be saved from there, and is not overwritten before that is done."""
from __future__ import annotations

import threading

import torch

from hdpo.adapters.zero3 import Parking


def test_parked_values_are_read_where_they_lie_and_scratch_returns_as_zeros() -> None:
    whole = torch.randn(12)
    kept, part, scratch = whole.clone(), torch.randn(3, 4).double(), torch.ones(7)
    view, parking = kept[2:5], Parking()
    copies = kept.clone(), part.clone()
    for _ in range(2):
        assert parking.on_host(kept) is None
        parking.park([kept, part], [scratch])
        assert parking.parked and kept.untyped_storage().nbytes() == scratch.untyped_storage().nbytes() == 0
        for tensor, copy in zip((kept, part), copies, strict=True):
            held = parking.on_host(tensor)
            assert held is not None and held.dtype == copy.dtype and torch.equal(held, copy)
        parking.unpark()
        assert torch.equal(kept, copies[0]) and torch.equal(part, copies[1]) and torch.equal(view, copies[0][2:5])
        assert not parking.parked and not scratch.any()
        scratch += 1


def test_a_buffer_that_a_checkpoint_still_reads_is_not_overwritten() -> None:
    tensor, parking, written, parked = torch.ones(4), Parking(), threading.Event(), threading.Event()
    parking.park([tensor], [])
    saved = parking.on_host(tensor)
    parking.lend(written)
    parking.unpark()
    tensor += 1
    thread = threading.Thread(target=lambda: (parking.park([tensor], []), parked.set()))
    thread.start()
    assert not parked.wait(0.2) and saved is not None and saved.tolist() == [1.0] * 4
    written.set()
    assert parked.wait(10)
    thread.join()
    again = parking.on_host(tensor)
    assert again is not None and again.tolist() == [2.0] * 4
