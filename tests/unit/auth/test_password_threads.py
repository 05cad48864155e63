"""Who signs in doesn't hold up those who listen, and isn't held up by them for good."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Iterator

import pytest

from pgrealtime.auth import password_threads
from pgrealtime.auth.password_threads import PasswordThreads
from pgrealtime.auth.passwords import decoy_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have no policy there")

SLOW = f"pbkdf2_sha256$12000000$salt${'A' * 43}="
"""Takes a second and more."""

DECOY = decoy_of([])


@pytest.fixture
def passwords() -> Iterator[PasswordThreads]:
    threads = PasswordThreads()
    yield threads
    threads.close()


def policies() -> set[int]:
    """The policies of the threads that check passwords."""
    return {
        os.sched_getscheduler(thread.native_id)
        for thread in threading.enumerate()
        if thread.name.startswith("passwords") and thread.native_id
    }


async def until(policy: int, checking: asyncio.Future[bool | None]) -> None:
    async with asyncio.timeout(10):
        while policies() != {policy}:
            assert not checking.done()
            await asyncio.sleep(0.001)


async def test_password_is_checked_with_what_the_event_loop_leaves(
    passwords: PasswordThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a while; then as any other thread, since a loop may leave nothing; and so each anew."""
    monkeypatch.setattr(password_threads, "_MEEK_SECONDS", 0.1)
    for _ in range(2):
        checking = asyncio.ensure_future(passwords.check("x", SLOW, DECOY))
        await until(os.SCHED_IDLE, checking)
        await until(os.SCHED_OTHER, checking)
        assert not checking.done()
        assert not await checking


async def test_password_is_checked_where_policies_are_forbidden(
    passwords: PasswordThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some containers forbid them."""

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert not await passwords.check("x", None, DECOY)
