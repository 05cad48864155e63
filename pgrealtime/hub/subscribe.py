"""Carries out subscribe calls: the API passes them on through ``hub.hub``.

A call replaces a connection's topics and its caller. During it the connection receives nothing;
after it, it catches up from its cursor. The work is done in chunks, for a call may bring a thousand
topics and the loop is shared with all other connections.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice

import structlog

from pgrealtime.auth.principal import GUEST, Caller, is_same_principal
from pgrealtime.changelog.memory import Changelog
from pgrealtime.config.model import RealtimeConfig
from pgrealtime.errors import SubscriptionError, SubscriptionLimitError
from pgrealtime.fairness import FairLock
from pgrealtime.hub.catchup.tasks import CatchUpTasks
from pgrealtime.hub.connections.connection import (
    START_REASON,
    Connection,
    Group,
    Subscription,
)
from pgrealtime.hub.connections.group import has_same_predicate
from pgrealtime.hub.state.progress import DispatchProgress
from pgrealtime.hub.state.registry import ConnectionRegistry
from pgrealtime.hub.state.visibility import VisibilityTracker
from pgrealtime.lsn import LSN, Cursor
from pgrealtime.protocol.topic import Topic
from pgrealtime.records.encode import View
from pgrealtime.snapshot import ReadPoint

log = structlog.get_logger(__name__)

_START = Cursor(LSN(0), 0)
_NO_VIEW = View()
"""Of a subscription until it is bound."""
_STEPS_WITHOUT_LOCK = 50
"""Topics of a call that are bound or unbound at once; each takes 5 to 30 us."""
_LOGGED_TOPIC_CHARACTERS = 200
"""Characters of a topic that are logged."""


@dataclass(eq=False)
class SubscribeCalls:
    """Carries out subscribe calls, one at a time for each connection."""

    changelog: Changelog
    progress: DispatchProgress
    registry: ConnectionRegistry
    visibility: VisibilityTracker
    catch_up: CatchUpTasks
    limits: RealtimeConfig
    clock: Callable[[], float]
    _work_lock: FairLock = field(default_factory=FairLock)
    """Held by the one call that uses the loop for long work."""

    async def subscribe(
        self, client_id: str, topic_texts: Sequence[str], caller: Caller, address: str
    ) -> None:
        """Replace a connection's topics and caller; on return the promise of a 204 holds.

        The client id may end with a position after a dot; empty and repeated topics are skipped.
        Raises ``SubscriptionError`` with the code ``client_unknown``, ``address_mismatch``,
        ``authorization_mismatch`` or ``stream_away``, or, as ``SubscriptionLimitError``, for too
        many topics of a kind. The connection's topics and caller are unchanged then.
        """
        connection = self.registry.find(client_id)
        if connection is None:
            raise SubscriptionError("unknown client id", code="client_unknown")
        if self.limits.same_address and connection.address != address:
            raise SubscriptionError("another address", code="address_mismatch")
        async with connection.lock:
            # Not before: while this waited for the lock, the connection may have been closed and
            # another call may have set its caller.
            _require_open(connection)
            before = connection.caller.principal
            # As PocketBase does: a client id alone takes no authenticated connection over.
            if before != GUEST and not is_same_principal(before, caller.principal):
                raise SubscriptionError("another caller", code="authorization_mismatch")
            try:
                await self._replace_topics(
                    connection, list(dict.fromkeys(filter(None, topic_texts))), caller
                )
            except SubscriptionLimitError as error:
                self.registry.counters.refused_subscribe_calls += 1
                log.info("subscription.refused", connection=connection.id, limit=error.limit_name)
                raise
            except SubscriptionError as error:
                if error.error_code == "stream_away":
                    # Its client must call again: it does so when it has reconnected.
                    connection.mark_answered(self.clock(), close_reason="stream_away")
                raise
            connection.mark_answered(self.clock())

    def unmatchable_topics(self, client_id: str) -> frozenset[str]:
        """Return the topics of a connection that no event can match for its caller now."""
        connection = self.registry.find(client_id)
        return frozenset(
            name
            for name, subscription in (connection.subscriptions if connection else {}).items()
            if subscription.group is None
            and not subscription.topic.collection_name_or_id.startswith("PB_")
        )

    async def _replace_topics(
        self, connection: Connection, topic_texts: list[str], caller: Caller
    ) -> None:
        if not self.registry.is_stream_up:
            raise SubscriptionError("the stream is interrupted", code="stream_away")
        with self._delivery_paused(connection) as is_first:
            topics = await self.progress.generation.parse_topics(
                topic_texts, caller, self._work_lock, connection.network
            )
            # After the topics are compiled, which may take seconds: all that this snapshot sees is
            # left out for the new topics, so a late one repeats least of what the client loads.
            read_point = await self._fetch_read_point(connection, topic_texts, is_first=is_first)
            # Closed meanwhile: it must not be put into groups that nothing would take it out of.
            _require_open(connection)
            await self._install(connection, topics, caller, read_point)

    @contextmanager
    def _delivery_paused(self, connection: Connection) -> Iterator[bool]:
        """Deliver nothing to the connection in the block; yield whether it has no topics yet."""
        self.catch_up.prevent_going_live(connection)
        is_first = connection.begin_call(self.progress.head)
        try:
            yield is_first
        finally:
            # Also after an error: the topics before the call are in force again, and what was not
            # delivered for them meanwhile is read from the cursor.
            if connection.end_call(self.progress.head):
                self.catch_up.continue_after_call(connection)

    async def _fetch_read_point(
        self, connection: Connection, topic_texts: list[str], *, is_first: bool
    ) -> ReadPoint | None:
        """Return the snapshot from which the call's new topics begin.

        None if there is no new topic, or delivery of all of them resumes from a position. Raises
        ``SubscriptionError`` if the database did not answer.
        """
        if all(name in connection.subscriptions for name in topic_texts):
            return None
        loses_position = False
        if is_first and connection.is_resuming:
            if connection.cursor <= self.changelog.end_cursor:
                return None
            # The position is another process's that is ahead of this one, or it was sent before
            # the database was restored. The end of the WAL tells which.
            newest = await self.visibility.fetch_read_point(_START)
            if connection.cursor.lsn <= newest.insert_lsn:
                return None
            loses_position = True
        if is_first:
            # Nothing was delivered to it, so nothing can be out of order: begin at the head. Before
            # the fetch, whose snapshot must see all that is before the cursor.
            connection.start_at(self.progress.head, loses_position=loses_position)
        return await self.visibility.fetch_read_point(connection.cursor)

    # --- replacing the subscriptions ----------------------------------------------------------

    async def _install(
        self,
        connection: Connection,
        topics: Mapping[str, Topic],
        caller: Caller,
        read_point: ReadPoint | None,
    ) -> None:
        """Replace the subscriptions, or restore those before if that fails.

        The loop is yielded in between. During that the connection is not LIVE and its cursor stays,
        so no event is delivered for some of its topics only. If another generation or history
        begins before the end, all is done again.
        """
        before = connection.subscriptions
        groups = {name: subscription.group for name, subscription in before.items()}
        try:
            try:
                while True:
                    epoch = connection.epoch
                    # In each round: the configuration, and the cursor, may be others now.
                    current = self._current_caller(connection, caller)
                    steps = self._replace_steps(
                        connection, topics, current, read_point, previous=before, groups=groups
                    )
                    if await self._run_in_chunks(connection, steps):
                        break
                    if connection.epoch != epoch:
                        # The transaction ids of an earlier snapshot are assigned again.
                        read_point = None
                        for subscription in before.values():
                            subscription.set_read_point(None)
            except Exception:
                is_restored = False
                while not is_restored:
                    steps = self._restore_steps(connection, before)
                    is_restored = await self._run_in_chunks(connection, steps)
                raise
        except asyncio.CancelledError:
            # The server stops, or the client has gone, perhaps while the above restores: a
            # cancelled task must not wait, so all at once.
            for _ in self._restore_steps(connection, before):
                pass
            raise
        # From here to the end of the call nothing is awaited: subscriptions, topics and caller
        # change together.
        reason, is_first = connection.pending_gap_reason, connection.first_call_answered_at is None
        if topics and is_first and (connection.is_resuming or reason):
            self.registry.counters.resume_outcomes[reason or "resumed"] += 1
        connection.accept_call(topics, caller.read_point)
        self.registry.callers.set_caller(connection, current)

    def _current_caller(self, connection: Connection, caller: Caller) -> Caller:
        """Return the caller as of the connection's cursor and the configuration in force.

        Both may have changed since the caller was authenticated. Raises ``SubscriptionError`` if
        the changes since then are not known any more.
        """
        callers = self.registry.callers
        try:
            caller = callers.caller_at(caller, connection.cursor)
        except LookupError as error:
            reason = "the caller's row may have changed"
            raise SubscriptionError(reason, code="stream_away") from error
        caller = callers.revalidate(caller)
        return caller if caller.read_point is None else replace(caller, read_point=None)

    async def _run_in_chunks(self, connection: Connection, steps: Generator[None]) -> bool:
        """Run steps of a call, yielding the loop; return whether the revision stayed the same.

        If not, steps may be left. Raises ``SubscriptionError`` if the connection was closed.
        """
        revision = self.progress.revision
        with closing(steps):
            # The calls of most clients have few topics: these need neither the lock nor a pause.
            if sum(1 for _ in islice(steps, _STEPS_WITHOUT_LOCK)) < _STEPS_WITHOUT_LOCK:
                return True
            is_done = False
            while not is_done:
                async with self._work_lock.acquire_for_loop_work(connection.network) as yield_timer:
                    # Both may have changed while it waited for its turn. A closed connection's
                    # subscriptions were unbound already.
                    if not connection.is_closed() and self.progress.revision == revision:
                        is_done = True
                        for _ in steps:
                            if yield_timer.is_due():
                                is_done = False
                                break
                _require_open(connection)
                if self.progress.revision != revision:
                    return False
            return True

    def _replace_steps(
        self,
        connection: Connection,
        topics: Mapping[str, Topic],
        caller: Caller,
        read_point: ReadPoint | None,
        *,
        previous: Mapping[str, Subscription],
        groups: Mapping[str, Group | None],
    ) -> Generator[None]:
        """Replace the connection's subscriptions by those of the topics, one a step.

        A topic that it had before, in one of ``groups``, keeps its read point; the others have
        ``read_point``. Mirrors that begin, or show other rows now, are to be loaded. Raises
        ``SubscriptionLimitError`` for too many of a kind, when some are installed already.
        """
        # All old ones first: quotas count what the connection has, and the same topics must not be
        # refused because they are still there from before.
        yield from self._unbind_steps(connection)
        unmatchable: defaultdict[str, list[str]] = defaultdict(list)
        for name, topic in topics.items():
            subscription = Subscription(connection, topic, _NO_VIEW, "")
            before = previous.get(name)
            subscription.set_read_point(before.read_point if before else read_point)
            self.registry.add_read_point(subscription)
            subscription.set_mirror(before.mirror if before else None)
            # Before it is bound: a refusal unbinds all that the connection has.
            connection.add_subscription(name, subscription)
            reason = self.progress.generation.bind_subscription(subscription, caller)
            if reason:
                unmatchable[reason].append(name)
            if subscription.mirror is not None:
                if before is None:
                    if read_point is not None or self._begins_mirrors_anew(connection):
                        self.registry.request_resync(subscription, START_REASON)
                elif not has_same_predicate(groups[name], subscription.group):
                    self.registry.request_resync(subscription, "identity")
                self.registry.add_mirror_to_resync(subscription)
            yield
        for reason, names in unmatchable.items():
            # The first one's text, without its options: they may hold a token.
            text = names[0].partition("?")[0][:_LOGGED_TOPIC_CHARACTERS]
            id_, count = connection.id, len(names)
            log.info("subscription.mute", connection=id_, reason=reason, topics=count, topic=text)

    def _begins_mirrors_anew(self, connection: Connection) -> bool:
        """Whether mirrors can't go on from the position that the connection resumes from."""
        # Since then rules may have changed; or a resync was about to be written there.
        return connection.awaits_resync or connection.cursor <= self.progress.mirrors_since

    def _unbind_steps(self, connection: Connection) -> Generator[None]:
        generation = self.progress.generation
        subscriptions = iter(connection.take_subscriptions().values())
        try:
            for subscription in subscriptions:
                self.registry.unbind(subscription, generation)
                yield
        finally:
            # All at once if the connection was closed or another generation is in force.
            for subscription in subscriptions:
                self.registry.unbind(subscription, generation)

    def _restore_steps(
        self, connection: Connection, previous: Mapping[str, Subscription]
    ) -> Generator[None]:
        """Restore the subscriptions, one a step; an error closes the connection."""
        if connection.is_closed():
            return
        yield from self._unbind_steps(connection)
        with self.registry.closing_on_error(connection):
            for name, subscription in previous.items():
                connection.add_subscription(name, subscription)
                if subscription.group is None:
                    self.progress.generation.bind_subscription(subscription, connection.caller)
                self.registry.add_read_point(subscription)
                self.registry.add_mirror_to_resync(subscription)
                yield


def _require_open(connection: Connection) -> None:
    if connection.is_closed():
        raise SubscriptionError("unknown client id", code="client_unknown")
