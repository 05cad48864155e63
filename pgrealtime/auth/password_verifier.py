"""Checks passwords in threads of low priority, a bounded number at a time. Used by ``auth.login``.

Hashing takes tens to hundreds of milliseconds of a processor and releases the interpreter's lock,
so a thread does not stop the event loop but competes with it for the core. A thread therefore runs
under SCHED_IDLE, which leaves the loop every slice it can use. A loop that is busy all the time
would starve it, so after a second its priority becomes ordinary.
"""

import asyncio
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from pgrealtime.auth.passwords import StoredHash, parse_hash, verify_password
from pgrealtime.errors import AuthError
from pgrealtime.fairness import FairQueue

_THREAD_COUNT = max(1, min(4, (os.cpu_count() or 1) - 1))
"""Threads that hash. One processor is left to delivery where there is more than one."""

_MAX_WAITING = 64
"""Passwords waiting for a thread. At 50 ms each the last one waits for a few seconds; beyond that
one is refused, of the network that has most waiting."""

_MAX_WAIT_SECONDS = 10.0
"""Expected wait of the last one, from the mean time of recent checks: a hash may take seconds."""

_IDLE_PRIORITY_SECONDS = 1.0


class PasswordVerifier:
    """Verifies passwords off the event loop. Networks take turns for a thread."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREAD_COUNT, thread_name_prefix="passwords")
        self._busy_thread_ids: set[int] = set()
        """The kernel's ids of threads that are hashing."""
        self._free_threads = _THREAD_COUNT
        self._waiting = FairQueue()
        self._mean_seconds = 0.0

    async def verify(
        self, password: str, stored: str | None, dummy_hash: StoredHash, *, network: str
    ) -> bool | None:
        """Return whether the password matches the stored hash; None if that can't be checked.

        Raises:
            AuthError: Code ``login_refused``: too many checks wait.
        """
        # Without an account, or with a hash that can't be checked, the dummy is checked all the
        # same: the time of the response must not tell whether an account exists.
        known = None if stored is None else parse_hash(stored)
        verdict = None if known is None else await self._verify_when_free(password, known, network)
        if verdict is None:
            await self._verify_when_free(password, dummy_hash, network)
        return verdict

    async def _verify_when_free(
        self, password: str, stored: StoredHash, network: str
    ) -> bool | None:
        if self._free_threads:
            self._free_threads -= 1
        else:
            self._make_room(network)
            # A thread is passed on without counting as free: no task in between can take it.
            await self._waiting.wait(network, self._release_thread)
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, self._verify_in_thread, password, stored)
        priority_timer = loop.call_later(_IDLE_PRIORITY_SECONDS, self._raise_priority)
        work.add_done_callback(partial(self._on_verified, priority_timer))
        # Shielded: a thread can't be interrupted. If the client disconnects, its place must stay
        # taken until the thread is free, or disconnecting would admit any number of checks.
        return await asyncio.shield(work)

    def _make_room(self, network: str) -> None:
        """Make room for one more waiting check, or raise ``login_refused``, where too many wait."""
        waiting = len(self._waiting)
        is_long = (waiting + 1) * self._mean_seconds > _MAX_WAIT_SECONDS * _THREAD_COUNT
        if waiting < _MAX_WAITING and not is_long:
            return
        error = AuthError("too many passwords are being checked", code="login_refused")
        longest = self._waiting.longest_key()
        if longest is None:
            longest = network
        # So that a flood from one network locks out no other: the last check of the network with
        # most of them makes room, unless this network would then have as many.
        if self._waiting.count_waiting(longest) < self._waiting.count_waiting(network) + 2:
            raise error
        self._waiting.fail_last(longest, error)

    def _release_thread(self) -> None:
        if not self._waiting.wake_next():
            self._free_threads += 1

    def _verify_in_thread(self, password: str, stored: StoredHash) -> bool | None:
        thread = threading.get_native_id()
        _set_priority(thread, is_idle=True)
        self._busy_thread_ids.add(thread)
        began = time.monotonic()
        try:
            return verify_password(password, stored)
        finally:
            self._busy_thread_ids.discard(thread)
            # Several threads may lose one another's update; an estimate stands that.
            self._mean_seconds += (time.monotonic() - began - self._mean_seconds) / 4

    def _raise_priority(self) -> None:
        # All that are busy, since it isn't known which one has this check. A copy: threads add and
        # remove their ids meanwhile. One that has just ended is idle again with its next check.
        for thread in tuple(self._busy_thread_ids):
            _set_priority(thread, is_idle=False)

    def _on_verified(
        self, priority_timer: asyncio.TimerHandle, _: asyncio.Future[bool | None]
    ) -> None:
        priority_timer.cancel()
        self._release_thread()

    def close(self) -> None:
        """Stop accepting checks; running ones finish."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _set_priority(thread_id: int, *, is_idle: bool) -> None:
    if sys.platform != "linux":  # only there a scheduling policy belongs to a thread
        return
    with suppress(OSError):  # sandboxes may forbid it; passwords are checked without
        policy = os.SCHED_IDLE if is_idle else os.SCHED_OTHER
        os.sched_setscheduler(thread_id, policy, os.sched_param(0))
