"""Password checks do not delay the event loop, and are not starved by it."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from pgrealtime.auth import password_verifier
from pgrealtime.auth.password_verifier import PasswordVerifier
from pgrealtime.auth.passwords import StoredHash, dummy_hash_for
from pgrealtime.errors import AuthError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have no policy there")

SLOW = f"pbkdf2_sha256$12000000$salt${'A' * 43}="
"""A hash that takes a second or more."""

DUMMY_HASH = dummy_hash_for([])


@pytest.fixture
def passwords() -> Iterator[PasswordVerifier]:
    threads = PasswordVerifier()
    yield threads
    threads.close()


def policies() -> set[int]:
    """Return the scheduling policies of the threads that check passwords."""
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
    passwords: PasswordVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At idle priority for a second.

    Then at normal priority, since the loop may be busy all the time.
    """
    monkeypatch.setattr(password_verifier, "_IDLE_PRIORITY_SECONDS", 0.1)
    for _ in range(2):
        checking = asyncio.ensure_future(passwords.verify("x", SLOW, DUMMY_HASH, network="ann"))
        await until(os.SCHED_IDLE, checking)
        await until(os.SCHED_OTHER, checking)
        assert not checking.done()
        assert not await checking


async def test_password_is_checked_where_policies_are_forbidden(
    passwords: PasswordVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some containers forbid changing the scheduling policy."""

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert not await passwords.verify("x", None, DUMMY_HASH, network="ann")


async def test_no_queue_is_longer_than_a_client_would_wait(
    passwords: PasswordVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expensive hashes shorten the queue; a check that finds a free thread is never refused."""

    def expensive(_password: str, _stored: StoredHash) -> bool:
        time.sleep(0.1)
        return True

    monkeypatch.setattr(password_verifier, "verify_password", expensive)
    monkeypatch.setattr(password_verifier, "_MAX_WAIT_SECONDS", 0.3)
    for _ in range(6):
        assert await passwords.verify("x", SLOW, DUMMY_HASH, network="ann")
    results = await asyncio.gather(
        *(passwords.verify("x", SLOW, DUMMY_HASH, network="ann") for _ in range(60)),
        return_exceptions=True,
    )

    served = results.count(True)
    refused = [one for one in results if isinstance(one, AuthError)]
    workers = password_verifier._THREAD_COUNT
    assert workers <= served <= workers * 6
    assert [one.error_code for one in refused] == ["login_refused"] * (60 - served)
    assert await passwords.verify("x", SLOW, DUMMY_HASH, network="ann")


async def test_the_limit_of_waiting_checks_excludes_those_with_a_thread(
    passwords: PasswordVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further checks are refused at once, before anything is hashed."""
    released = threading.Event()
    monkeypatch.setattr(password_verifier, "verify_password", lambda *_: released.wait(10))
    monkeypatch.setattr(password_verifier, "_MAX_WAITING", 3)
    room = password_verifier._THREAD_COUNT + 3

    checks = [
        asyncio.ensure_future(passwords.verify("x", SLOW, DUMMY_HASH, network="ann"))
        for _ in range(room + 2)
    ]
    done, _ = await asyncio.wait(checks, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    assert len(done) == 2
    assert [one for one in checks if one in done] == checks[room:]
    released.set()

    results = await asyncio.gather(*checks, return_exceptions=True)
    assert results[:room] == [True] * room
    assert all(isinstance(one, AuthError) for one in results[room:])


@pytest.mark.parametrize("eve", ["eve", ""], ids=["known", "unknown"])
async def test_a_client_that_fills_the_queue_locks_no_other_out(
    eve: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks take turns; beyond the limit the longest queue loses its last check."""
    released, order = threading.Event(), list[str]()

    def slow(password: str, _stored: StoredHash) -> bool:
        released.wait(10)
        order.append(password)
        return True

    monkeypatch.setattr(password_verifier, "verify_password", slow)
    monkeypatch.setattr(password_verifier, "_MAX_WAITING", 4)
    monkeypatch.setattr(password_verifier, "_THREAD_COUNT", 1)
    passwords = PasswordVerifier()

    def come(name: str, whose: str) -> asyncio.Future[bool | None]:
        return asyncio.ensure_future(passwords.verify(name, SLOW, DUMMY_HASH, network=whose))

    flood = [come(f"eve{n}", eve) for n in range(5)]
    await asyncio.sleep(0)
    ann, bob = come("ann", "ann"), come("bob", "bob")
    await asyncio.sleep(0)
    late = come("late", eve)
    refused = [one for one in (late, *flood) if isinstance(await _refusal(one), AuthError)]
    assert refused == [late, *flood[3:]]
    flood[1].cancel()
    last = come("last", eve)
    await asyncio.sleep(0)
    released.set()
    assert all(await asyncio.gather(ann, bob, flood[0], flood[2], last))
    passwords.close()

    assert order == ["eve0", "eve2", "ann", "bob", "last"]
    assert passwords._free_threads == 1
    assert not passwords._waiting


async def _refusal(checking: asyncio.Future[bool | None]) -> BaseException | None:
    """Return the error that refused it, if it was refused at once."""
    await asyncio.wait([checking], timeout=0.05)
    return checking.exception() if checking.done() else None
