"""Ordered: what goes in side by side comes out in order, never too much of it, and nobody hangs."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncsave.pipeline.ordered import Ordered
from tests import children
from tests.support import SMALL_LIMIT

_T = TypeVar("_T")


def run(what: Coroutine[Any, Any, _T]) -> _T:
    """Run it in a new event loop; whoever hangs is told so."""

    async def in_time() -> _T:
        return await asyncio.wait_for(what, 20)

    return asyncio.run(in_time())


async def settle() -> None:
    """Let all that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


def future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


async def is_waiting(task: asyncio.Task[Any]) -> bool:
    await settle()
    return not task.done()


# -- order, and how much there is at once ---------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One that is put: its units, and when it ends, in turns of the event loop."""

    units: int
    turns: int
    fails: bool = False


TASKS = st.lists(
    st.builds(Task, st.integers(1, 4), st.integers(0, 6), st.sampled_from([False] * 7 + [True])),
    max_size=12,
)


class Watched:
    """Feeds an Ordered and takes out of it, as a save does, and counts what is on its way."""

    def __init__(self, tasks: Sequence[Task], size: int, slow: int, wide: int | None) -> None:
        self.tasks, self.slow, self.wide = tasks, slow, wide
        self.ordered: Ordered[int] = Ordered(size)
        self.size = size
        self.on_their_way = self.most = 0
        self.out: list[int] = []

    async def work(self, number: int) -> int:
        for _ in range(self.tasks[number].turns):
            await asyncio.sleep(0)
        if self.tasks[number].fails:
            raise ZeroDivisionError(number)
        return number

    async def feed(self) -> None:
        try:
            for number, task in enumerate(self.tasks):
                for _ in range(task.units):
                    await self.ordered.reserve()
                    self.on_their_way += 1
                    self.most = max(self.most, self.on_their_way)
                    assert self.on_their_way <= self.size
                self.ordered.put(asyncio.create_task(self.work(number)))
        finally:
            self.ordered.end()

    async def take(self) -> None:
        async for number in self.ordered:
            for _ in range(self.slow):
                await asyncio.sleep(0)
            self.out.append(number)
            self.on_their_way -= self.tasks[number].units
            self.ordered.finished(self.tasks[number].units)
            if self.wide is not None and len(self.out) == 2:
                self.size = max(self.size, self.wide)
                self.ordered.widen(self.wide)

    async def all(self) -> BaseException | None:
        """Take all out; on an error, do what a save does then, and return it."""
        feeding = asyncio.create_task(self.feed())
        try:
            await self.take()
            await feeding
        except ZeroDivisionError as error:
            self.size = 1 << 30
            self.ordered.widen(self.size)
            await asyncio.wait([feeding])
            assert feeding.exception() is None
            await self.ordered.drain()
            return error
        return None


@given(TASKS, st.integers(4, 9), st.integers(0, 5), st.none() | st.integers(1, 20))
@example([Task(4, 6), Task(4, 0), Task(1, 0)], 4, 0, None)
@example([Task(1, 0, fails=True), *[Task(4, 3)] * 9], 4, 5, None)
@example([Task(1, 0)] * 12, 4, 5, 20)
def test_in_order_and_never_more_than_the_size(
    tasks: list[Task], size: int, slow: int, wide: int | None
) -> None:
    watched = Watched(tasks, size, slow, wide)
    error = run(watched.all())
    failing = [i for i, task in enumerate(tasks) if task.fails]
    if not failing:
        assert error is None
        assert watched.out == list(range(len(tasks)))
        assert watched.on_their_way == 0
        return
    assert isinstance(error, ZeroDivisionError)
    assert error.args == (failing[0],), "the first one in order, whichever failed first"
    assert watched.out == list(range(failing[0]))


@given(st.permutations(range(6)))
def test_the_order_is_kept_whatever_order_they_end_in(ends: list[int]) -> None:
    async def main() -> list[int]:
        ordered: Ordered[int] = Ordered(6)
        futures = [future() for _ in ends]
        for each in futures:
            await ordered.reserve()
            ordered.put(each)
        ordered.end()
        out: list[int] = []

        async def take() -> None:
            async for number in ordered:
                out.append(number)

        taking = asyncio.create_task(take())
        for number in ends:
            futures[number].set_result(number)
            await settle()
            there = [i for i in range(6) if all(futures[j].done() for j in range(i + 1))]
            assert out == there, "each comes out as soon as those before it have"
        await taking
        return out

    assert run(main()) == list(range(6))


# -- reserve, finished, widen ---------------------------------------------------------------------


def test_reserve_waits_until_enough_is_finished() -> None:
    async def main() -> None:
        ordered: Ordered[int] = Ordered(2)
        assert not ordered.is_full
        await ordered.reserve()
        assert not ordered.is_full
        await ordered.reserve()
        assert ordered.is_full
        third = asyncio.create_task(ordered.reserve())
        assert await is_waiting(third)
        ordered.finished(1)
        await third
        assert ordered.is_full
        ordered.finished(2)
        assert not ordered.is_full

    run(main())


def test_finished_lets_as_many_go_on_as_there_is_room_for() -> None:
    async def main() -> None:
        ordered: Ordered[int] = Ordered(3)
        for _ in range(3):
            await ordered.reserve()
        waiting = [asyncio.create_task(ordered.reserve()) for _ in range(4)]
        for left in (2, 0):
            assert all([await is_waiting(each) for each in waiting[2 - left :]])
            ordered.finished(2)
            await settle()
            assert [each.done() for each in waiting].count(False) == left

    run(main())


def test_widen_makes_room_and_never_takes_any() -> None:
    async def main() -> None:
        ordered: Ordered[int] = Ordered(2)
        for _ in range(2):
            await ordered.reserve()
        waiting = asyncio.create_task(ordered.reserve())
        ordered.widen(2)
        ordered.widen(1)
        assert await is_waiting(waiting)
        ordered.widen(4)
        await waiting
        await ordered.reserve()
        assert ordered.is_full
        ordered.finished(1)
        assert not ordered.is_full, "it is four still"

    run(main())


# -- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before anybody takes", "while somebody waits"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_end_comes_after_the_last_task(when: str, count: int) -> None:
    async def main() -> None:
        ordered: Ordered[int] = Ordered(9)
        out: list[int] = []

        async def take() -> None:
            async for number in ordered:
                out.append(number)

        taking = asyncio.create_task(take())
        if when == "while somebody waits":
            assert await is_waiting(taking)
        tasks = [future() for _ in range(count)]
        for each in tasks:
            ordered.put(each)
        ordered.end()
        if tasks:
            assert await is_waiting(taking), "the last one is at work"
        for number, each in enumerate(tasks):
            each.set_result(number)
        await taking
        assert out == list(range(count))
        with pytest.raises(StopAsyncIteration):
            await anext(ordered)  # and again

    run(main())


def test_who_takes_waits_for_the_next_one() -> None:
    async def main() -> None:
        ordered: Ordered[int] = Ordered(9)
        for number in range(3):
            taking = asyncio.create_task(take_one(ordered))
            assert await is_waiting(taking), "there is none yet"
            task = future()
            ordered.put(task)
            assert await is_waiting(taking), "it is at work"
            task.set_result(number)
            assert await taking == number

    run(main())


async def take_one(ordered: Ordered[int]) -> int:
    return await anext(ordered)


# -- errors ---------------------------------------------------------------------------------------


def test_an_error_comes_out_in_its_place_and_drain_swallows_the_rest() -> None:
    lost: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
        ordered: Ordered[int] = Ordered(9)
        tasks = [future() for _ in range(5)]
        for each in tasks:
            ordered.put(each)
        ordered.end()
        tasks[1].set_exception(KeyError("in its place"))
        tasks[3].set_exception(KeyError("nobody hears of this one"))
        taking = asyncio.create_task(take_one(ordered))
        assert await is_waiting(taking), "the first one is at work"
        tasks[0].set_result(0)
        assert await taking == 0
        with pytest.raises(KeyError, match="in its place"):
            await anext(ordered)
        draining = asyncio.create_task(ordered.drain())
        tasks[4].set_result(4)
        assert await is_waiting(draining), "one is at work still"
        tasks[2].set_result(2)
        await draining
        assert all(each.done() for each in tasks)
        with pytest.raises(StopAsyncIteration):
            await anext(ordered)

    run(main())
    gc.collect()
    assert lost == [], "or asyncio would write that an exception was never retrieved"


def test_drain_of_nothing_is_nothing() -> None:
    run(Ordered[int](1).drain())


# -- who takes gives back -------------------------------------------------------------------------

SAVES = """
import json, sys, torch, asyncsave
from pathlib import Path
from tests.doubles.disks import SlowDisk
from tests.support import assert_same, in_small_chunks
compression, memory_limit = json.loads(sys.argv[2])
state = in_small_chunks() | {"more": torch.randn(600_000)}
with asyncsave.Checkpointer(
    SlowDisk(1e-9).at(Path(sys.argv[1])),
    compression=compression, memory_limit=memory_limit, signals=(),
) as ckpt:
    for step in (1, 2):
        assert ckpt.save(step, state).result().chunks >= 8
    assert_same(ckpt.load(), state)
"""


@pytest.mark.parametrize("compression", ["auto", "off", 1])
@pytest.mark.parametrize("memory_limit", [2_100_000, 3 * SMALL_LIMIT, "auto"])
def test_a_save_of_more_chunks_than_may_be_on_their_way_ends(
    tmp_path: Path, compression: Any, memory_limit: Any
) -> None:
    """Two with "auto" until the disk is known, and three frames: fewer than there are chunks.

    In a process of its own, which can be ended if the save does not.
    """
    ended = children.run(SAVES, tmp_path, json.dumps([compression, memory_limit]))
    assert (ended.returncode, ended.stderr) == (0, "")
