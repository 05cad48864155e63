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

from pgrealtime.auth.passwords import StoredHash, is_correct, read_hash
from pgrealtime.errors import AuthError

_WORKERS = max(1, min(4, (os.cpu_count() or 1) - 1))
"""Threads that hash. One processor is left to delivery where there is more than one."""

_MOST_WAITING = 64
"""Passwords waiting for a thread. At 50 ms each the last one waits for a few seconds; beyond, the
client is told to come back rather than to wait longer; and of several it is one of who has most."""

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
        self._free = _WORKERS
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """For a thread, by whose they are: they take turns."""
        self._lately = 0.0
        """Seconds that a password takes a thread."""

    async def check(
        self, password: str, stored: str | None, decoy: StoredHash, *, whose: str
    ) -> bool | None:
        """Return whether the password makes the stored hash; None if no hash could be checked.

        Args:
            password: As given.
            stored: The hash; None if there is none.
            decoy: Checked where there is no hash that can be, so that the answer takes as long.
            whose: Who gave it: where too many wait, one of whoever has most gives way.

        Raises:
            AuthError: Code ``login_refused``: too many wait already.
        """
        known = None if stored is None else read_hash(stored)
        verdict = None if known is None else await self._run(password, known, whose)
        if verdict is None:
            await self._run(password, decoy, whose)
        return verdict

    async def _run(self, password: str, stored: StoredHash, whose: str) -> bool | None:
        await self._wait_for_thread(whose)
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, self._is_correct, password, stored)
        hurrying = loop.call_later(_MEEK_SECONDS, self._hurry)
        work.add_done_callback(partial(self._finished, hurrying))
        # Shielded: who hangs up doesn't make room before the thread is free.
        return await asyncio.shield(work)

    async def _wait_for_thread(self, whose: str) -> None:
        if self._free:
            self._free -= 1
            return
        self._make_room(whose)
        place = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(whose, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled() and place.exception() is None:
                self._pass_on()  # it was passed on to nobody
            elif place in self._waiting.get(whose, ()):
                self._take_out(whose, place)
            raise

    def _make_room(self, whose: str) -> None:
        """Let one more wait.

        Raises:
            AuthError: Too many do, and nobody has two more than this one.
        """
        waiting = sum(map(len, self._waiting.values()))
        is_long = (waiting + 1) * self._lately > _LONGEST_WAIT * _WORKERS
        if waiting < _MOST_WAITING and not is_long:
            return
        error = AuthError("too many passwords are being checked", code="login_refused")
        fullest = max(self._waiting, key=lambda one: len(self._waiting[one]), default=whose)
        theirs, own = self._waiting.get(fullest, deque()), self._waiting.get(whose, ())
        if len(theirs) < len(own) + 2:
            raise error
        last = theirs[-1]
        self._take_out(fullest, last)
        if not last.done():
            last.set_exception(error)

    def _take_out(self, whose: str, place: asyncio.Future[None]) -> None:
        theirs = self._waiting[whose]
        theirs.remove(place)
        if not theirs:
            del self._waiting[whose]

    def _pass_on(self) -> None:
        """Give a thread that is free to whoever is next."""
        while self._waiting:
            whose, theirs = next(iter(self._waiting.items()))
            place = theirs[0]
            self._waiting.move_to_end(whose)
            self._take_out(whose, place)
            if not place.done():
                place.set_result(None)
                return
        self._free += 1

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
        self._pass_on()

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
