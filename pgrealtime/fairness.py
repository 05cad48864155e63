"""Shares the event loop and exclusive resources fairly between clients.

``YieldTimer`` splits long work; ``FairQueue`` and ``FairLock`` let waiting keys (clients, networks)
take turns; ``client_network`` is the network a client is counted by. Used by ``api``, ``auth`` and
``hub``.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from time import perf_counter

_MAX_NETWORKS = 4096
"""Addresses whose network is cached; to parse one takes longer than to count by it."""
YIELD_AFTER_SECONDS = 0.002
"""Work between two pauses. Each task with such work delays an event by up to this; a pause without
other work to run costs about ten microseconds."""
_MAX_PAUSE_SECONDS = 0.1


class YieldTimer:
    """Tells long work when to let the event loop run other tasks; started when constructed."""

    __slots__ = ("_deadline",)

    def __init__(self) -> None:
        self._deadline = perf_counter() + YIELD_AFTER_SECONDS

    def is_due(self) -> bool:
        """Whether ``YIELD_AFTER_SECONDS`` have passed since the start or the last pause."""
        return perf_counter() >= self._deadline

    async def pause(self) -> None:
        """Let other tasks run once, then restart the timer."""
        await asyncio.sleep(0)
        self._deadline = perf_counter() + YIELD_AFTER_SECONDS


class BackgroundYieldTimer(YieldTimer):
    """For work that nothing waits for, of which there may be much: takes 2 % of the loop."""

    __slots__ = ()

    async def pause(self) -> None:
        """Let other tasks run for 0.1 s, then restart the timer."""
        await asyncio.sleep(_MAX_PAUSE_SECONDS)
        self._deadline = perf_counter() + YIELD_AFTER_SECONDS


_JOIN_SECONDS = 0.002
_QUIET_PASSES = 2
"""A request that was received takes two passes of the loop to reach its query."""


async def wait_while_growing(size: Callable[[], int]) -> None:
    """Return once two passes of the event loop have added nothing to a batch, or after 2 ms.

    A batch that is sent at once holds only its first member: the requests that the loop is about to
    read would each share the next one. On an idle loop this takes some microseconds.
    """
    deadline, quiet_passes, before = perf_counter() + _JOIN_SECONDS, 0, size()
    while quiet_passes < _QUIET_PASSES and perf_counter() < deadline:
        await asyncio.sleep(0)
        now = size()
        quiet_passes, before = (quiet_passes + 1 if now == before else 0), now


class FairQueue:
    """Waiting tasks in one queue per key; the keys take turns.

    A key with many waiting tasks delays itself: any other waits for one task of each key.
    """

    def __init__(self) -> None:
        self._waiters: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._waiters.values()))

    def count_waiting(self, key: str) -> int:
        """Return how many tasks wait under the key."""
        return len(self._waiters.get(key, ()))

    def longest_key(self) -> str | None:
        """Return the key with the most waiting tasks, None if none waits."""
        return max(self._waiters, key=self.count_waiting, default=None)

    async def wait(self, key: str, release: Callable[[], None]) -> None:
        """Wait until ``wake_next`` wakes this task.

        ``release`` gives up what the wake-up granted. It is called if this task is cancelled after
        it was woken and before it ran; without it the grant would be lost.
        """
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(key, deque()).append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            # Still queued: nothing was granted. A waiter that is done was woken, and cancelled
            # before it ran.
            if waiter.cancelled():
                self._remove(key, waiter)
            elif waiter.exception() is None:
                release()
            raise

    def wake_next(self) -> bool:
        """Wake the first task of the next key; return False if none waits."""
        while self._waiters:
            key, waiters = self._waiters.popitem(last=False)
            waiter = waiters.popleft()
            if waiters:
                self._waiters[key] = waiters
            # A task that was cancelled while it waited has not run yet, so its waiter may still be
            # queued.
            if not waiter.done():
                waiter.set_result(None)
                return True
        return False

    def fail_last(self, key: str, error: Exception) -> None:
        """Remove the key's last task from its queue, where ``wait`` raises the error."""
        last = self._waiters[key][-1]
        self._remove(key, last)
        if not last.done():
            # The last, which has waited least.
            last.set_exception(error)

    def _remove(self, key: str, waiter: asyncio.Future[None]) -> None:
        waiters = self._waiters.get(key, deque())
        if waiter in waiters:
            waiters.remove(waiter)
            if not waiters:
                del self._waiters[key]


class FairPermits:
    """A number of permits for which the waiting keys take turns."""

    def __init__(self, count: int) -> None:
        self._free_count = count
        self._waiting = FairQueue()

    def count_waiting(self, key: str) -> int:
        """Return how many tasks wait under the key."""
        return self._waiting.count_waiting(key)

    @asynccontextmanager
    async def acquire(self, key: str) -> AsyncIterator[None]:
        """Hold one permit."""
        # No await between the check and the count: tasks of one loop can't both take the last.
        if self._free_count:
            self._free_count -= 1
        else:
            # A permit that is passed on never counts as free.
            await self._waiting.wait(key, self._release)
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        if not self._waiting.wake_next():
            self._free_count += 1


class FairLock:
    """A lock for which the waiting keys take turns; the tasks of one key get it in order."""

    def __init__(self) -> None:
        self._is_locked = False
        self._waiting = FairQueue()

    @asynccontextmanager
    async def acquire(self, key: str) -> AsyncIterator[None]:
        """Hold the lock."""
        # No await between the check and the assignment below: tasks of one loop can't both pass.
        if self._is_locked:
            # The lock stays locked while it is passed on: no task that comes between can take it.
            await self._waiting.wait(key, self._release)
        self._is_locked = True
        try:
            yield
        finally:
            self._release()

    @asynccontextmanager
    async def acquire_for_loop_work(self, key: str) -> AsyncIterator[YieldTimer]:
        """Hold the lock for work on the event loop; afterwards leave the loop as much time.

        When the yielded timer is due, the lock should be released and acquired again.
        """
        async with self.acquire(key):
            began = perf_counter()
            yield YieldTimer()
            seconds = perf_counter() - began
            # After the release: others get the lock meanwhile, and the key that worked comes last.
            await asyncio.sleep(
                min(seconds, _MAX_PAUSE_SECONDS) if seconds > YIELD_AFTER_SECONDS else 0
            )

    def _release(self) -> None:
        if not self._waiting.wake_next():
            self._is_locked = False


@lru_cache(_MAX_NETWORKS)
def client_network(address: str) -> str:
    """Return the client's network: an IPv4 address itself, of an IPv6 address its /64.

    An IPv6 client usually has a whole /64 (RFC 6177), so a limit per address would not bind it.
    """
    try:
        parsed = ip_address(address)
    except ValueError:
        return address  # empty for a Unix socket, or an address with a scope
    if isinstance(parsed, IPv6Address):
        return str(ip_network((int(parsed), 64), strict=False))
    return address
