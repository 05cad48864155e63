"""Checks passwords in threads that stand behind the event loop."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from pgrealtime.auth.passwords import StoredHash, is_correct, read_hash
from pgrealtime.errors import AuthError

_WORKERS = max(1, min(4, (os.cpu_count() or 1) - 1))
"""Threads that hash. One processor is left to delivery where there is more than one."""

_MOST_WAITING = 64
"""Passwords waiting for a thread. At 50 ms each the last one waits for a few seconds; beyond, the
client is told to come back rather than to wait longer."""

_LONGEST_WAIT = 10.0
"""Seconds that the last one waits at most, by what passwords took lately: a hash may be worth some
seconds of a processor."""

_MEEK_SECONDS = 1.0
"""How long a password gives way to the event loop."""


class PasswordThreads:
    """Checks passwords off the event loop, a bounded number at a time.

    Events can't wait for a thread that shares their core, so the threads only have what the event
    loop leaves; and since a loop may leave nothing, their fair share after a while.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_WORKERS, thread_name_prefix="passwords")
        self._at_work: set[int] = set()
        """Threads, by the kernel's ids."""
        self._waiting = 0
        self._lately = 0.0
        """Seconds that a password takes a thread."""

    async def check(self, password: str, stored: str | None, decoy: StoredHash) -> bool | None:
        """Return whether the password makes the stored hash; None if no hash could be checked.

        Args:
            password: As given.
            stored: The hash; None if there is none.
            decoy: Checked where there is no hash that can be, so that the answer takes as long.

        Raises:
            AuthError: Code ``login_refused``: too many wait already.
        """
        known = None if stored is None else read_hash(stored)
        verdict = None if known is None else await self._run(password, known)
        if verdict is None:
            await self._run(password, decoy)
        return verdict

    async def _run(self, password: str, stored: StoredHash) -> bool | None:
        ahead = self._waiting - _WORKERS + 1
        if ahead > _MOST_WAITING or (ahead > 0 and ahead * self._lately > _LONGEST_WAIT * _WORKERS):
            raise AuthError("too many passwords are being checked", code="login_refused")
        self._waiting += 1
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, self._is_correct, password, stored)
        hurrying = loop.call_later(_MEEK_SECONDS, self._hurry)
        work.add_done_callback(partial(self._finished, hurrying))
        # Shielded: who hangs up doesn't make room before the thread is free.
        return await asyncio.shield(work)

    def _is_correct(self, password: str, stored: StoredHash) -> bool | None:
        """Run in one of the threads."""
        thread = threading.get_native_id()
        _schedule(thread, is_meek=True)
        self._at_work.add(thread)
        began = time.monotonic()
        try:
            return is_correct(password, stored)
        finally:
            self._at_work.discard(thread)
            self._lately += (time.monotonic() - began - self._lately) / 4

    def _hurry(self) -> None:
        for thread in tuple(self._at_work):
            _schedule(thread, is_meek=False)

    def _finished(self, hurrying: asyncio.TimerHandle, _: asyncio.Future[bool | None]) -> None:
        hurrying.cancel()
        self._waiting -= 1

    def close(self) -> None:
        """Let the threads go; what they are at they finish."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _schedule(thread: int, *, is_meek: bool) -> None:
    """Let a thread go behind all others of its core, or beside them."""
    if sys.platform != "linux":  # where a policy is a thread's, not the process's
        return
    with suppress(OSError):  # a sandbox may forbid it; passwords are checked all the same
        policy = os.SCHED_IDLE if is_meek else os.SCHED_OTHER
        os.sched_setscheduler(thread, policy, os.sched_param(0))
