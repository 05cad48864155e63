"""Connections that read on from the changelog at their own cursor: after a break, when slow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

import structlog

from pgrealtime.changelog.base import Changelog
from pgrealtime.errors import ChangelogError
from pgrealtime.hub.allowance import Allowance
from pgrealtime.hub.aside import Aside
from pgrealtime.hub.batch import Batch
from pgrealtime.hub.compose import compose_for
from pgrealtime.hub.connection import Connection, State, Subscription
from pgrealtime.hub.course import Course
from pgrealtime.hub.display import Sight
from pgrealtime.hub.event import Action, Event
from pgrealtime.hub.gaps import Gaps
from pgrealtime.hub.identity import Identities
from pgrealtime.hub.judge import Verdict, where
from pgrealtime.hub.match import Group
from pgrealtime.hub.recent import Recent, standpoint
from pgrealtime.hub.slices import SLICE, Announcement, Slice, parted, slices
from pgrealtime.lsn import Cursor

log = structlog.get_logger(__name__)

REPLAYS_AT_ONCE = 16


class Replays:
    """One task for each connection that reads on; it ends when the connection is LIVE.

    Args:
        changelog: What is read.
        course: Where the hub stands.
        identities: Whose connections they are.
        aside: Whose filters are slow.
        gaps: Tells of what can't be delivered.
        at_once: Connections that are served at the same moment, and half as many whose filters are
            slow; what they ask of the database must leave some of it to the others.
        send_buffer: Bytes that a connection is handed at once.
        turn: Makes a connection's caller what an event makes of it.
        end: Ends a connection, for a reason.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        changelog: Changelog,
        course: Course,
        identities: Identities,
        aside: Aside,
        gaps: Gaps,
        *,
        at_once: int,
        send_buffer: int,
        turn: Callable[[Connection, Event], None],
        end: Callable[[Connection, str], None],
        clock: Callable[[], float],
    ) -> None:
        self._changelog = changelog
        self._course = course
        self._identities = identities
        self._aside = aside
        self._gaps = gaps
        self._send_buffer = send_buffer
        self._turn = turn
        self._end = end
        self._clock = clock
        self._tasks: dict[Connection, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(at_once)
        self._slow_turns = asyncio.Semaphore(max(1, at_once // 2))
        self._recent = Recent(clock)
        self._joining: dict[Connection, None] = {}
        self._staying: dict[Connection, None] = {}
        """Those that have read all there is and must stay aside."""

    def start(self, connection: Connection) -> None:
        """Let a connection in the state REPLAY read on."""
        if connection not in self._tasks:
            self._tasks[connection] = asyncio.create_task(
                self._read_on(connection), name=f"replay {connection.id[:8]}"
            )

    def stop(self, connection: Connection) -> None:
        """Forget a connection that has ended."""
        self.hold(connection)
        task = self._tasks.pop(connection, None)
        if task is not None:
            task.cancel()

    def hold(self, connection: Connection) -> None:
        """Don't let it become LIVE: a call is at work on it."""
        self._joining.pop(connection, None)
        self._staying.pop(connection, None)

    def join_waiting(self) -> None:
        """Nothing is being judged: make those LIVE who have read all there is."""
        joining, self._joining = {**self._joining, **self._staying}, {}
        for connection in joining:
            if connection not in self._tasks:
                try:
                    self._join(connection)
                except Exception as error:  # noqa: BLE001 (as in _read_on)
                    self._fail(connection, error)

    def _join(self, connection: Connection) -> None:
        """Make LIVE a connection that has read all there is; or let it wait, or read on."""
        course = self._course
        if connection.state is not State.REPLAY:
            return
        if course.is_deciding or connection.cursor > course.head:
            # The slice being judged was judged without its groups; it has read that one itself.
            self._joining[connection] = None
        elif connection.cursor < course.head:
            self._tasks.pop(connection, None)
            self.start(connection)
        elif self._aside.bring_back(connection):
            self._staying.pop(connection, None)
            connection.state = State.LIVE
            connection.is_live = True
            if connection.wants_cursor:
                connection.say_cursor(course.head)
        elif connection not in self._staying:
            self._staying[connection] = None
            if connection.wants_cursor:
                connection.say_cursor(course.head)

    # --- one connection's task

    async def _read_on(self, connection: Connection) -> None:
        try:
            await connection.sink.drain()
            at_once = SLICE
            while at_once := await self._read_slice(connection, at_once):
                await connection.sink.drain()
                await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001 (a fault of ours ends this connection only)
            self._fail(connection, error)
        finally:
            if self._tasks.get(connection) is asyncio.current_task():
                del self._tasks[connection]
            if not self._tasks:
                self._recent.clear()

    def _fail(self, connection: Connection, error: Exception) -> None:
        log.error("replay.failed", error=type(error).__name__, at=where(error))
        self._end(connection, "failed")  # its client comes back; silence would be a gap

    async def _read_slice(self, connection: Connection, at_once: int) -> int:
        """Hand the connection what is next for it: so many events.

        Returns:
            How many should be tried the next time; 0 if there is no next time.
        """
        course = self._course
        async with connection.turn:
            if not connection.is_replaying() or self._opens_with_gap(connection):
                return 0
            if self._hand_again(connection):
                return at_once
            if connection.cursor >= course.target:
                self._join(connection)
                return 0
            is_slow = self._aside.is_slow(connection)
            async with self._slow_turns if is_slow else self._turns:
                # Looked at once more: others had their turn.
                if connection.is_replaying() and connection.cursor < course.target:
                    part, _ = parted(self._part_for(connection), at_once)
                    return await self._hand(connection, part, Allowance(is_short=not is_slow))
            return at_once

    def _opens_with_gap(self, connection: Connection) -> bool:
        """Tell a gap that the submitted position lies in; return whether that ended it."""
        if not connection.gap:
            return False
        reason, connection.gap = connection.gap, ""
        self._gaps.tell(connection, Announcement(None, reason, connection.cursor))
        return connection.is_ended

    def _hand_again(self, connection: Connection) -> bool:
        """Deliver what another one that stood there was given a moment ago, if any."""
        stands = standpoint(connection, self._course.edition)
        stretch = None if stands is None else self._recent.find(stands)
        if stretch is None or stretch.upto > self._course.target:
            return False
        self._give(connection, stretch.events, stretch.batch)
        connection.cursor = stretch.upto
        if connection.wants_cursor:
            connection.say_cursor(stretch.upto)
        return True

    def _give(
        self,
        connection: Connection,
        events: Sequence[Event],
        batch: Batch,
        hold: Cursor | None = None,
    ) -> None:
        if batch.places:
            connection.take(batch)
            connection.write(connection.compose(events, hold))
            connection.active_at = connection.written_at = self._clock()

    def _part_for(self, connection: Connection) -> Slice:
        """Return the next slice of what the connection has yet to read."""
        try:
            entries = self._changelog.read(connection.cursor, self._course.target, SLICE)
        except ChangelogError:
            floor = self._changelog.floor
            return Slice([], Announcement(None, "expired", floor), floor)

        def turns(event: Event) -> bool:
            caller = connection.caller
            return self._identities.caller_after(event, caller, connection.known) is not caller

        # Always the first: so all who stand at a cursor are given the same.
        collections = self._course.meaning.collections
        return next(slices(entries, connection.cursor, collections, turns))

    async def _hand(self, connection: Connection, part: Slice, allowance: Allowance) -> int:
        """Deliver a slice to one connection: what its own topics may see of it.

        What lies beyond the dispatch task's own is left for later, so that it is judged either
        here or there and never twice; and so is what was judged by collections that are no longer
        those of now, and what would be too much at once.

        Returns:
            How many events should be tried the next time: what isn't handed out was judged in vain.
        """
        course = self._course
        edition = course.edition
        upto = min(part.upto, course.target)
        events = [event for event in part.events if event.cursor <= upto]
        people = [event for event in part.people if event.cursor <= upto]
        self._turn_all(connection, people, "update")
        stands = standpoint(connection, edition)
        batch, verdict, stop, failed = await self._batch_for(connection, events, allowance)
        if connection.is_ended or course.edition != edition:
            return SLICE
        self._aside.note(connection, allowance, events)
        if verdict.late:
            return 1  # of one alone Postgres may know in time; else it is slow, and may be that
        is_cut = stop < len(events)
        if is_cut:
            upto = events[stop - 1].cursor
        unheard = verdict.unheard_in(events, range(stop), failed)
        self._give(connection, events, batch, self._gaps.held_at(connection, unheard))
        is_plain = part.gap is None and not part.people
        if stands is not None and is_plain and unheard is None:
            self._recent.keep(stands, events, batch, upto)
        if not is_cut:
            self._turn_all(connection, people, "delete")
        connection.cursor = upto
        gap = part.gap if part.gap is not None and part.gap.at <= upto else None
        self._gaps.tell_all(connection, gap, unheard, upto)
        # Not before the gap: who breaks off in between would come back from behind it.
        if connection.wants_cursor and not connection.is_ended:
            connection.say_cursor(upto)
        return stop if is_cut else min(SLICE, max(1, len(events)) * 2)

    def _turn_all(self, connection: Connection, people: Sequence[Event], action: Action) -> None:
        for event in people:
            if event.action == action:
                self._turn(connection, event)

    async def _batch_for(
        self, connection: Connection, events: list[Event], allowance: Allowance
    ) -> tuple[Batch, Verdict, int, list[int]]:
        """Return the messages, of how many of the events they are, and which can't be shown."""
        meaning = self._course.meaning
        by_group: dict[Group, list[Subscription]] = {}
        for subscription in connection.subscriptions.values():
            if subscription.group is not None:
                by_group.setdefault(subscription.group, []).append(subscription)
        if not events or not by_group:
            return Batch(), Verdict([]), len(events), []
        verdict = await meaning.judge.judge(events, allowance, by_group.keys())
        if verdict.late:
            return Batch(), verdict, len(events), []

        def sights(groups: Iterable[Group]) -> Iterable[Sight]:
            return ((one.viewer, one.manager) for group in groups for one in by_group[group])

        beside = await meaning.judge.look_beside(events, verdict, sights)
        batch, stop, failed = compose_for(
            meaning.display, by_group, events, verdict.hits, beside, bound=self._send_buffer
        )
        return batch, verdict, stop, failed
