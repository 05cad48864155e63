"""Keys with much work delay themselves, not each other."""

from __future__ import annotations

import asyncio
from time import perf_counter

from pgrealtime.fairness import YIELD_AFTER_SECONDS, FairLock, FairPermits, YieldTimer


async def test_those_who_wait_take_turns_whatever_each_has_to_do() -> None:
    """A waiting task waits for one task of each other key, not for all of them."""
    queue, done = FairLock(), list[str]()

    async def work(whose: str, name: str) -> None:
        async with queue.acquire(whose):
            await asyncio.sleep(0)
            done.append(name)

    async with asyncio.TaskGroup() as tasks:
        for number in range(5):
            tasks.create_task(work("many", f"many {number}"))
        tasks.create_task(work("one", "one"))

    assert done.index("one") <= 2
    assert [name for name in done if name != "one"] == [f"many {number}" for number in range(5)]


async def test_who_gives_up_while_waiting_holds_up_nobody() -> None:
    queue, done = FairLock(), list[str]()

    async def work(whose: str) -> None:
        async with queue.acquire(whose):
            await asyncio.sleep(0)
            done.append(whose)

    async with asyncio.timeout(5.0), queue.acquire("first"):
        tasks = [asyncio.create_task(work(whose)) for whose in ("a", "b", "c")]
        await asyncio.sleep(0)
        tasks[0].cancel()
    tasks[1].cancel()  # the turn was passed on to it, or is about to be
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(5.0), queue.acquire("last"):
        pass

    assert "c" in done


async def test_long_turns_leave_the_loop_half_of_the_time() -> None:
    """However many keys are waiting."""
    queue = FairLock()
    worked = [0.0]

    async def work(number: int) -> None:
        async with queue.acquire_for_loop_work(str(number)):
            began = perf_counter()
            while perf_counter() - began < 4 * YIELD_AFTER_SECONDS:
                pass
            worked[0] += perf_counter() - began

    began = perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for number in range(10):
            tasks.create_task(work(number))

    assert worked[0] <= 0.6 * (perf_counter() - began)


async def test_a_turn_is_over_after_its_time_and_not_before() -> None:
    turn = YieldTimer()
    assert not turn.is_due()
    await asyncio.sleep(2 * YIELD_AFTER_SECONDS)
    assert turn.is_due()
    await turn.pause()
    assert not turn.is_due()


async def test_permits_are_passed_to_waiting_keys_in_turn() -> None:
    """A key with many waiting tasks delays itself, and no permit is lost."""
    permits, order = FairPermits(2), list[str]()

    async def hold(key: str) -> None:
        async with permits.acquire(key):
            order.append(key)
            await asyncio.sleep(0)

    await asyncio.gather(*(hold("many") for _ in range(6)), hold("one"))

    assert order.index("one") <= 3
    assert len(order) == 7
    async with permits.acquire("a"), permits.acquire("b"):
        assert permits.count_waiting("c") == 0


async def test_a_cancelled_waiter_gives_its_permit_back() -> None:
    permits = FairPermits(1)

    async def hold() -> None:
        async with permits.acquire("a"):
            pass

    async with permits.acquire("a"):
        waiting = asyncio.create_task(hold())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
    async with asyncio.timeout(1):
        await hold()
