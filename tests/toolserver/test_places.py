"""Who may run a cell: short ones are not held up by long ones, modest trajectories not by greedy ones, and no place is lost."""
from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from hdpo.toolserver import places
from hdpo.toolserver.places import MOST_LATER_S, Places


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


async def cell(where: Places, order: list[str], name: str, taken_s: float = 0.0, end: asyncio.Event | None = None) -> None:
    async with where.take(taken_s):
        order.append(name)
        if end is not None:
            await end.wait()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_no_more_run_at_once_than_there_are_places_and_the_next_comes_when_one_ends() -> None:
    async def work() -> None:
        where, order, end = Places(2, 1e6), list[str](), asyncio.Event()
        tasks = [asyncio.create_task(cell(where, order, str(k), end=end)) for k in range(4)]
        await settled()
        assert order == ["0", "1"]
        end.set()
        await asyncio.gather(*tasks)
        assert order == ["0", "1", "2", "3"] and where.free == 2
    run(work())


def test_endless_cells_hold_up_no_short_one_until_there_are_too_many_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "LONG", 3)

    async def work() -> None:
        where, order, end = Places(1, 0.01), list[str](), asyncio.Event()
        endless = [asyncio.create_task(cell(where, order, f"endless {k}", end=end)) for k in range(3)]
        await settled()
        await cell(where, order, "short")
        assert order[-1] == "short" and len(order) == 4 and where.long == 3
        endless.append(asyncio.create_task(cell(where, order, "one too many", end=end)))
        await settled()
        late = asyncio.create_task(cell(where, order, "late"))
        await asyncio.sleep(0.1)
        assert order[-1] == "one too many"         # this one keeps its place
        end.set()
        await asyncio.gather(late, *endless)
        assert order[-1] == "late" and (where.free, where.long) == (1, 0)
    run(work())


def test_a_trajectory_whose_cells_have_taken_much_comes_after_those_that_arrive_soon_after_it() -> None:
    async def work() -> None:
        where, order, end = Places(1, 1e6), list[str](), asyncio.Event()
        tasks = [asyncio.create_task(cell(where, order, *rest)) for rest in (
            ("running", 0.0, end), ("greedy", 3600.0), ("some", MOST_LATER_S / 2), ("modest", 0.0), ("modest too", 0.0))]
        await settled()
        end.set()
        await asyncio.gather(*tasks)
        assert order == ["running", "modest", "modest too", "some", "greedy"]
    run(work())


@pytest.mark.parametrize("given", [False, True], ids=["while it waits", "as its turn comes"])
def test_a_call_that_is_given_up_takes_no_place_with_it(given: bool) -> None:
    async def work() -> None:
        where, order, end = Places(1, 1e6), list[str](), asyncio.Event()
        first = asyncio.create_task(cell(where, order, "first", end=end))
        gone = asyncio.create_task(cell(where, order, "gone"))
        await settled()
        if given:
            where._release()      # as the end of the first does
            gone.cancel()
            await settled()
            where.free -= 1
        else:
            gone.cancel()
        end.set()
        await asyncio.gather(first, gone, return_exceptions=True)
        assert order == ["first"] and where.free == 1
        await cell(where, order, "next")
    run(work())
