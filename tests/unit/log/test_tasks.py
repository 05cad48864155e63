"""Tasks end, and the first error is raised, whatever a library does with cancellations."""

import asyncio
from contextlib import suppress

import pytest

from pgrealtime.log.tasks import run_together


async def swallow(times: int, ended: list[int]) -> None:
    """Ignore so many cancellations, as a library may."""
    for _ in range(times):
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
    try:
        await asyncio.Event().wait()
    finally:
        ended.append(times)


async def fail() -> None:
    await asyncio.sleep(0)
    raise ValueError("this one")


async def test_the_others_end_with_the_one_that_fails() -> None:
    ended: list[int] = []
    async with asyncio.timeout(5):
        with pytest.raises(ValueError, match="this one"):
            await run_together(swallow(0, ended), swallow(2, ended), fail())
    assert sorted(ended) == [0, 2]


async def test_a_cancellation_ends_all_of_them_and_goes_on() -> None:
    """Also of what runs within."""
    ended: list[int] = []
    outer = asyncio.create_task(
        run_together(run_together(swallow(1, ended), swallow(3, ended)), swallow(2, ended))
    )
    await asyncio.sleep(0.01)
    outer.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await outer
    assert sorted(ended) == [1, 2, 3]
