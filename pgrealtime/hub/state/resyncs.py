"""Writes resyncs: tells the clients of mirrors to load their lists anew.

Whoever finds that events can't keep a mirror right requests one (``registry``). The dispatcher
writes what is due to LIVE connections, each catching-up connection's task to its own: at the end
of a transaction, behind the events of all that was delivered, once all of that is visible to who
loads. A topic is told at most once in a while, and of all connections a few at a time: the rest
waits, and the last request is never lost. Where the client asked for it the list follows, read by
``loads``: its connection catches up meanwhile, so that what is in the list isn't sent again.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from pgrealtime.config.model import MirrorsConfig
from pgrealtime.errors import DatabaseUnreachableError
from pgrealtime.hub.connections.connection import (
    LIVE,
    START_REASON,
    WIDE_REASON,
    Connection,
    ConnectionState,
    Subscription,
)
from pgrealtime.hub.state.loads import LoadedList, MirrorLoads
from pgrealtime.hub.state.progress import DispatchProgress
from pgrealtime.hub.state.registry import ConnectionRegistry
from pgrealtime.hub.state.visibility import VisibilityTracker
from pgrealtime.lsn import END_ORDINAL, Cursor
from pgrealtime.protocol.frame import mirror_ready_tail, mirror_resync_tail

_WATCH_SECONDS = 0.05
"""How often it is looked whether resyncs that waited are due."""


@dataclass(eq=False)
class MirrorResyncs:
    """Writes the resyncs that were requested."""

    progress: DispatchProgress
    registry: ConnectionRegistry
    visibility: VisibilityTracker
    loads: MirrorLoads
    limits: MirrorsConfig
    clock: Callable[[], float]
    written: Counter[str] = field(default_factory=Counter)
    """Resyncs written, by reason."""
    _allowance: float = field(init=False)
    """How many may be written at once: it grows with time, up to those of a second."""
    _allowance_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._allowance, self._allowance_at = self.limits.resyncs_per_second, self.clock()

    async def write_to_live(self) -> list[Connection]:
        """Write what is due to LIVE connections; return those that were written to.

        Called by the dispatcher, which delivers nothing meanwhile.
        """

        def due() -> Iterator[Subscription]:
            head = self.progress.head
            return (
                one
                for one in self._due(self.registry.mirrors_to_resync)
                if one.connection.state is LIVE
                and not one.is_loaded_here
                and _may_follow(one, head)
            )

        return await self._write_due(due, lambda _: self.progress.head)

    def live_to_load(self) -> list[Connection]:
        """Return LIVE connections with lists to be sent: each has to catch up for that.

        Called by the dispatcher, as ``write_to_live``.
        """
        if not self.registry.mirrors_to_resync:
            return []
        head, count = self.progress.head, int(self._grown_allowance())
        due = (
            one.connection
            for one in self._due(self.registry.mirrors_to_resync)
            if one.is_loaded_here and one.connection.state is LIVE and _may_follow(one, head)
        )
        return list(dict.fromkeys(islice(due, count)))

    async def write_to(self, connection: Connection) -> None:
        """Write what is due to a connection that catches up. Its lock is held."""
        if connection.awaits_resync:
            for subscription in list(connection.subscriptions.values()):
                if subscription.is_loaded_here:
                    await self._load(subscription)

        def due() -> Iterator[Subscription]:
            own = connection.subscriptions.values() if connection.is_catching_up() else ()
            return (
                one
                for one in self._due(own)
                if not one.is_loaded_here and _may_follow(one, connection.cursor)
            )

        if connection.awaits_resync:
            await self._write_due(due, lambda one: one.cursor)

    async def _write_due(
        self,
        find_due: Callable[[], Iterator[Subscription]],
        delivered_upto: Callable[[Connection], Cursor],
    ) -> list[Connection]:
        if not self.registry.mirrors_to_resync or self._grown_allowance() < 1:
            return []
        if next(find_due(), None) is None:
            return []
        revision = self.progress.revision
        await self.visibility.wait_for_delivered()
        written: dict[Connection, None] = {}
        # Nothing is awaited from here on: what was delivered until now is visible.
        count = int(self._grown_allowance()) if self.progress.revision == revision else 0
        for subscription in list(islice(find_due(), count)):
            self._allowance -= 1
            connection = subscription.connection
            with self.registry.closing_on_error(connection):
                self._write(subscription, delivered_upto(connection))
            written[connection] = None
        return list(written)

    async def _load(self, subscription: Subscription) -> None:
        """Send a list that is due, or tell the client to load it itself."""
        connection, mirror = subscription.connection, subscription.mirror
        assert mirror is not None
        # Its lock is held and it is behind the others: its cursor stays while the list is read.
        is_due = connection.is_catching_up() and any(self._due([subscription]))
        if not is_due or not _may_follow(subscription, connection.cursor):
            return
        if self._grown_allowance() < 1:
            return
        self._allowance -= 1
        revision = self.progress.revision
        try:
            loaded = await self.loads.load(subscription)
        except DatabaseUnreachableError:
            mirror.resynced_at = self.clock()  # it is tried again, at the pace of resyncs
            return
        if self.progress.revision != revision or not connection.is_catching_up():
            return
        if loaded is None:
            mirror.pending_reason = WIDE_REASON
            self._write(subscription, connection.cursor)
        elif self._has_room(connection, loaded.size_bytes):
            self._write(subscription, connection.cursor, loaded)
        else:
            mirror.resynced_at = self.clock()  # as above: its client reads slowly

    def _has_room(self, connection: Connection, size: int) -> bool:
        budget, buffered = self.registry.send_budget, connection.writer.buffered_bytes()
        return buffered + size <= budget.limit_bytes() or (not buffered and budget.admits(size))

    def _due(self, subscriptions: Iterable[Subscription]) -> Iterator[Subscription]:
        """Yield those of the subscriptions that may be told now, by their own pace."""
        now, pace = self.clock(), self.limits.pace
        for one in subscriptions:
            mirror = one.mirror
            if mirror and mirror.pending_reason and now - mirror.resynced_at >= pace:
                yield one

    def _grown_allowance(self) -> float:
        now, per_second = self.clock(), self.limits.resyncs_per_second
        grown = self._allowance + (now - self._allowance_at) * per_second
        self._allowance, self._allowance_at = min(grown, per_second), now
        return self._allowance

    def _write(
        self, subscription: Subscription, cursor: Cursor, loaded: LoadedList | None = None
    ) -> None:
        topic, mirror = subscription.topic, subscription.mirror
        collection = self.progress.generation.collections.find(topic.collection_name_or_id)
        self.registry.mirrors_to_resync.pop(subscription, None)
        if collection is not None and mirror is not None:
            reason = mirror.pending_reason
            tail = mirror_resync_tail(
                subscription.topic_bytes, collection.id, collection.name, reason
            )
            connection, now = subscription.connection, self.clock()
            if loaded is None:
                connection.write_resync(subscription, tail, cursor, now)
            else:
                ready = mirror_ready_tail(subscription.topic_bytes, collection.id, collection.name)
                connection.write_list(subscription, (tail, *loaded.tails, ready), cursor, now)
                # What the list has is not sent again: a row would go back for a moment.
                subscription.set_read_point(loaded.read_point)
                self.registry.add_read_point(subscription)
                self.registry.send_budget.update(connection)
            self.written[reason] += 1

    async def watch(self, wake: Callable[[Iterable[Connection]], None]) -> None:
        """Call back, for ever, with connections that resyncs are due to be written to."""
        requested = self.registry.resync_requested
        while True:
            await requested.wait()
            self._forget_gone()
            if self._grown_allowance() >= 1:
                due = self._due(self.registry.mirrors_to_resync)
                wake({subscription.connection: None for subscription in due})
            if not self.registry.mirrors_to_resync:
                requested.clear()
            await asyncio.sleep(_WATCH_SECONDS)

    def _forget_gone(self) -> None:
        """Forget the topics that are gone, and those of connections that are."""
        waiting = self.registry.mirrors_to_resync
        for subscription in list(waiting):
            connection = subscription.connection
            is_own = connection.subscriptions.get(subscription.topic.text) is subscription
            is_in_call = connection.state is ConnectionState.SUBSCRIBING
            if connection.is_closed() or not (is_own or is_in_call):
                del waiting[subscription]


def _may_follow(subscription: Subscription, delivered: Cursor) -> bool:
    """Whether a resync may be written behind a cursor: at the end of a transaction.

    The list that is loaded then would be followed by the rest of the transaction's events.
    """
    mirror = subscription.mirror
    is_start = mirror is not None and mirror.pending_reason == START_REASON
    return is_start or delivered.ordinal in {0, END_ORDINAL}
