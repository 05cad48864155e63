"""Checks passwords in threads that stand behind the event loop."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from pgrealtime.auth.passwords import StoredHash, parse_hash, verify_password
from pgrealtime.errors import AuthError

_THREAD_COUNT = max(1, min(4, (os.cpu_count() or 1) - 1))
"""Threads that hash. One processor is left to delivery where there is more than one."""

_MAX_WAITING = 64
"""Passwords waiting for a thread. At 50 ms each the last one waits for a few seconds; beyond, the
client is told to come back rather than to wait longer; and of several it is one of who has most."""

_MAX_WAIT_SECONDS = 10.0
"""Seconds that the last one waits at most, by what passwords took lately: a hash may be worth some
seconds of a processor."""

_IDLE_PRIORITY_SECONDS = 1.0
"""How long a password gives way to the event loop."""


class PasswordVerifier:
    """Checks passwords off the event loop, a bounded number at a time.

    Events can't wait for a thread that shares their core, so the threads only have what the event
    loop leaves; and since a loop may leave nothing, their fair share after a while.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREAD_COUNT, thread_name_prefix="passwords")
        self._busy_thread_ids: set[int] = set()
        """Threads, by the kernel's ids."""
        self._free_threads = _THREAD_COUNT
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """For a thread, by whose they are: they take turns."""
        self._mean_seconds = 0.0
        """Seconds that a password takes a thread."""

    async def verify(
        self, password: str, stored: str | None, dummy_hash: StoredHash, *, network: str
    ) -> bool | None:
        """Return whether the password makes the stored hash; None if no hash could be checked.

        Args:
            password: As given.
            stored: The hash; None if there is none.
            dummy_hash: Checked where there is no hash that can be, so that the answer takes as
                long.
            network: Who gave it: where too many wait, one of whoever has most gives way.

        Raises:
            AuthError: Code ``login_refused``: too many wait already.
        """
        known = None if stored is None else parse_hash(stored)
        verdict = None if known is None else await self._verify_when_free(password, known, network)
        if verdict is None:
            await self._verify_when_free(password, dummy_hash, network)
        return verdict

    async def _verify_when_free(
        self, password: str, stored: StoredHash, network: str
    ) -> bool | None:
        await self._acquire_thread(network)
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, self._verify_in_thread, password, stored)
        hurrying = loop.call_later(_IDLE_PRIORITY_SECONDS, self._raise_priority)
        work.add_done_callback(partial(self._on_verified, hurrying))
        # Shielded: who hangs up doesn't make room before the thread is free.
        return await asyncio.shield(work)

    async def _acquire_thread(self, network: str) -> None:
        if self._free_threads:
            self._free_threads -= 1
            return
        self._refuse_if_crowded(network)
        place = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(network, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled() and place.exception() is None:
                self._release_thread()  # it was passed on to nobody
            elif place in self._waiting.get(network, ()):
                self._remove_waiter(network, place)
            raise

    def _refuse_if_crowded(self, network: str) -> None:
        """Let one more wait.

        Raises:
            AuthError: Too many do, and nobody has two more than this one.
        """
        waiting = sum(map(len, self._waiting.values()))
        is_long = (waiting + 1) * self._mean_seconds > _MAX_WAIT_SECONDS * _THREAD_COUNT
        if waiting < _MAX_WAITING and not is_long:
            return
        error = AuthError("too many passwords are being checked", code="login_refused")
        fullest = max(self._waiting, key=lambda one: len(self._waiting[one]), default=network)
        theirs, own = self._waiting.get(fullest, deque()), self._waiting.get(network, ())
        if len(theirs) < len(own) + 2:
            raise error
        last = theirs[-1]
        self._remove_waiter(fullest, last)
        if not last.done():
            last.set_exception(error)

    def _remove_waiter(self, network: str, waiter: asyncio.Future[None]) -> None:
        theirs = self._waiting[network]
        theirs.remove(waiter)
        if not theirs:
            del self._waiting[network]

    def _release_thread(self) -> None:
        """Give a thread that is free to whoever is next."""
        while self._waiting:
            whose, theirs = next(iter(self._waiting.items()))
            place = theirs[0]
            self._waiting.move_to_end(whose)
            self._remove_waiter(whose, place)
            if not place.done():
                place.set_result(None)
                return
        self._free_threads += 1

    def _verify_in_thread(self, password: str, stored: StoredHash) -> bool | None:
        """Run in one of the threads."""
        thread = threading.get_native_id()
        _set_priority(thread, is_idle=True)
        self._busy_thread_ids.add(thread)
        began = time.monotonic()
        try:
            return verify_password(password, stored)
        finally:
            self._busy_thread_ids.discard(thread)
            self._mean_seconds += (time.monotonic() - began - self._mean_seconds) / 4

    def _raise_priority(self) -> None:
        for thread in tuple(self._busy_thread_ids):
            _set_priority(thread, is_idle=False)

    def _on_verified(
        self, priority_timer: asyncio.TimerHandle, _: asyncio.Future[bool | None]
    ) -> None:
        priority_timer.cancel()
        self._release_thread()

    def close(self) -> None:
        """Let the threads go; what they are at they finish."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _set_priority(thread_id: int, *, is_idle: bool) -> None:
    """Let a thread go behind all others of its core, or beside them."""
    if sys.platform != "linux":  # where a policy is a thread's, not the process's
        return
    with suppress(OSError):  # a sandbox may forbid it; passwords are checked all the same
        policy = os.SCHED_IDLE if is_idle else os.SCHED_OTHER
        os.sched_setscheduler(thread_id, policy, os.sched_param(0))
