"""Connections that read on from the changelog at their own cursor: after a break, when slow."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

import structlog
from msgspec import Struct

from pgrealtime.changelog.base import Changelog
from pgrealtime.errors import ChangelogError
from pgrealtime.hub.catchup.replay_cache import Recent, standpoint
from pgrealtime.hub.connections.batch import Batch
from pgrealtime.hub.connections.connection import NO_PARTS, Connection, State, Subscription
from pgrealtime.hub.connections.send_budget import SendBudget
from pgrealtime.hub.delivery.compose import Piece, compose_for, subscriptions_by_group
from pgrealtime.hub.delivery.render import NOTHING_BESIDE, Beside, Sight
from pgrealtime.hub.evaluation.evaluator import Verdict, causes_of, where
from pgrealtime.hub.evaluation.matcher import Group
from pgrealtime.hub.events.event import Action, Event
from pgrealtime.hub.events.slices import SLICE, Announcement, Slice, beginning, slices
from pgrealtime.hub.live_reads.caller_check import CallerCheck, Checked, may_have_changed
from pgrealtime.hub.live_reads.row_history import RowHistory
from pgrealtime.hub.state.callers import Identities, person_of
from pgrealtime.hub.state.gaps import Gaps
from pgrealtime.hub.state.progress import Course
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.rule_queries.slow_filters import IsolatedConnections, TimeBudget

log = structlog.get_logger(__name__)

REPLAYS_AT_ONCE = 16

_PIECE_BYTES = 256 * 1024
"""Handed to a connection at once, though more may wait for it: others of the loop have their turn
between two pieces."""


class _Judged(Struct):
    """A slice as it was judged for one connection, whose first change isn't handed out whole."""

    part: Slice
    events: Sequence[Event]
    verdict: Verdict
    beside: Beside
    upto: Cursor
    budget: TimeBudget
    edition: int
    subscriptions: Mapping[str, Subscription]
    checked: Checked | None = None
    """What was found out about its caller, as far as that was asked."""
    is_outdated: bool = False
    """Whether its caller is another by now."""

    def is_of(self, connection: Connection, edition: int) -> bool:
        """Whether it is what the connection must be handed next, by topics and rules of now."""
        return (
            self.edition == edition
            and self.subscriptions is connection.subscriptions
            and connection.is_within_change()
            and connection.cursor < self.events[0].cursor
            and bool(connection.parts_sent_of(self.events[0].cursor))
        )


class _Progress(Struct):
    """How one connection's task goes on."""

    at_once: int = SLICE
    """Events that are tried next."""
    is_limited: bool = True
    """Whether filters have a limited time for them; not if that was too little for the last."""
    judged: _Judged | None = None
    """What is left of a change too large to be sent at once."""
    too_large: int = 0
    """Bytes of the next message, if there was no room for it."""


class Replays:
    """One task for each connection that reads on; it ends when the connection is LIVE.

    Args:
        changelog: What is read.
        course: Where the hub stands.
        identities: Whose connections they are.
        isolated: Those whose filters are slow.
        gaps: Tells of what can't be delivered.
        history: Knows what was done to rows later.
        at_once: Connections that are served at the same moment, and half as many isolated ones;
            what they ask of the database must leave some of it to the others.
        budget: How much may wait for connections.
        stall_timeout: Seconds that one waits for room before the connection that takes most of
            it is dropped.
        seen: Returns once readers see some transactions.
        turn: Makes a connection's caller what an event makes of it.
        end: Ends a connection, for a reason.
        drop: Ends one that takes too little.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        changelog: Changelog,
        course: Course,
        identities: Identities,
        isolated: IsolatedConnections,
        gaps: Gaps,
        *,
        history: RowHistory,
        at_once: int,
        budget: SendBudget,
        stall_timeout: float,
        seen: Callable[[Iterable[Xid]], Awaitable[None]],
        turn: Callable[[Connection, Event], None],
        end: Callable[[Connection, str], None],
        drop: Callable[[Connection], None],
        clock: Callable[[], float],
    ) -> None:
        self._changelog = changelog
        self._course = course
        self._identities = identities
        self._isolated = isolated
        self._gaps = gaps
        self._history = history
        self._budget = budget
        self._stall_timeout = stall_timeout
        self._drop = drop
        self._seen = seen
        self._turn = turn
        self._end = end
        self._clock = clock
        self._tasks: dict[Connection, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(at_once)
        self._isolated_turns = asyncio.Semaphore(max(1, at_once // 2))
        self._recent = Recent(clock)
        self._waiting: dict[Connection, bool] = {}
        """Those that have read all there is: they wait for the slice being evaluated, or (True)
        must stay isolated."""

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
        self._waiting.pop(connection, None)

    def join_waiting(self) -> None:
        """Nothing is being judged: make those LIVE who have read all there is."""
        for connection in list(self._waiting):
            if connection not in self._tasks:
                try:
                    self._join(connection)
                except Exception as error:  # noqa: BLE001 (as in _read_on)
                    self._fail(connection, error)

    def _join(self, connection: Connection) -> None:
        """Make LIVE a connection that has read all there is; or let it wait, or read on."""
        course = self._course
        if connection.state is not State.REPLAY:
            self._waiting.pop(connection, None)
            return
        if course.is_deciding or connection.cursor > course.head:
            # The slice being judged was judged without its groups; it has read that one itself.
            self._waiting.setdefault(connection, False)
        elif connection.cursor < course.head:
            self._tasks.pop(connection, None)
            self.start(connection)
        elif self._isolated.try_rejoin(connection):
            self._waiting.pop(connection, None)
            connection.state = State.LIVE
            connection.is_live = True
            if connection.wants_cursor:
                connection.say_cursor(course.head)
        elif not self._waiting.get(connection):
            self._waiting[connection] = True
            if connection.wants_cursor:
                connection.say_cursor(course.head)

    # --- one connection's task

    async def _read_on(self, connection: Connection) -> None:
        try:
            await connection.sink.drain()
            progress = _Progress()
            while await self._read_slice(connection, progress):
                if connection.sink.buffered() >= self._budget.counted:
                    progress.judged = None  # it would keep a transaction in memory meanwhile
                await connection.sink.drain()
                if progress.too_large:
                    await self._read_alone(connection, progress)
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

    async def _read_alone(self, connection: Connection, progress: _Progress) -> None:
        """Hand on a message that is larger than what may wait for one: when there is room.

        One after the other, so that none waits for ever. Clients that leave no room for too long
        are dropped, those that take least of what they are sent first.
        """
        async with self._budget.line:
            while not await self._budget.has_room(progress.too_large, self._stall_timeout):
                largest = self._budget.largest()
                if largest is not None:
                    self._drop(largest)
            await self._read_slice(connection, progress)

    async def _read_slice(self, connection: Connection, progress: _Progress) -> bool:
        """Hand the connection what is next for it; return whether there is a next time."""
        course = self._course
        async with connection.turn:
            if not connection.is_replaying() or self._opens_with_gap(connection):
                return False
            if self._hand_again(connection):
                return True
            if connection.cursor >= course.target:
                self._join(connection)
                return False
            is_isolated = connection.is_isolated
            async with self._isolated_turns if is_isolated else self._turns:
                # Looked at once more: others had their turn, perhaps from the same cursor.
                if self._has_more(connection) and not self._hand_again(connection):
                    await self._hand(connection, progress)
                    # At once, so that those who wait to ask the same needn't be late as well.
                    if is_isolated and not progress.is_limited and self._has_more(connection):
                        await self._hand(connection, progress)
            return True

    def _has_more(self, connection: Connection) -> bool:
        """Whether there is more for it to read; it changes between awaits."""
        return connection.is_replaying() and connection.cursor < self._course.target

    def _opens_with_gap(self, connection: Connection) -> bool:
        """Tell a gap that the submitted position lies in; return whether nothing may follow."""
        if not connection.gap:
            return False
        reason, connection.gap = connection.gap, ""
        self._gaps.tell(connection, Announcement(None, reason, connection.cursor))
        return not connection.is_replaying()

    def _hand_again(self, connection: Connection) -> bool:
        """Deliver what another one that stood there was given a moment ago, if any."""
        if connection.is_within_change():
            return False
        stands = standpoint(connection, self._course.edition)
        stretch = None if stands is None else self._recent.find(stands)
        if stretch is None or stretch.upto > self._course.target:
            return False
        if not self._may_share(connection, stretch.checked):
            return False
        if stretch.size > self._budget.limit():
            return False
        self._isolated.record(connection, stretch.budget, stretch.events)
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
            self._budget.note(connection)

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
        meaning = self._course.meaning
        fits = meaning.shapes.fits
        return next(slices(entries, connection.cursor, meaning.collections, turns, fits=fits))

    async def _hand(self, connection: Connection, progress: _Progress) -> None:
        """Deliver a slice to one connection, or a piece of it: what its own topics may see of it.

        What lies beyond the dispatch task's own is left for later, so that it is judged either
        here or there and never twice; and so is what was judged by collections that are no longer
        those of now, and what would be too much at once. What isn't handed out was judged in
        vain, so fewer events are tried the next time.
        """
        edition = self._course.edition
        stands = None if connection.is_within_change() else standpoint(connection, edition)
        judged, progress.judged = progress.judged, None
        if judged is None or not judged.is_of(connection, edition):
            budget = self._isolated.budget(connection, is_limited=progress.is_limited)
            judged = await self._judge(connection, progress.at_once, budget)
            await self._see_causes(judged)
            if not connection.is_replaying() or self._course.edition != edition:
                return
            was_late = self._isolated.record(connection, budget, judged.events)
            progress.is_limited = not was_late
            if judged.verdict.late:
                # Of one event Postgres may know in time; else it is slow, and may be that.
                progress.at_once = 1
                return
        part, events, verdict = judged.part, judged.events, judged.verdict
        limit = self._budget.limit()
        piece = await self._compose(connection, judged, min(limit, _PIECE_BYTES))
        if connection.is_ended or self._course.edition != edition:
            return
        size, progress.too_large = piece.batch.size, 0
        if size > limit and not self._budget.admits(size):
            progress.too_large, progress.judged = size, judged
            return
        if piece.parts:
            self._give(connection, events, piece.batch, events[0].cursor)
            connection.note_parts(events[0].cursor, piece.parts)
            progress.judged = judged
            return
        is_cut = piece.stop < len(events)
        upto = events[piece.stop - 1].cursor if is_cut else judged.upto
        unheard = verdict.unheard_in(events, range(piece.stop), piece.failed)
        self._give(connection, events, piece.batch, self._gaps.held_at(connection, unheard))
        is_plain = part.gap is None and not part.people
        if stands is not None and is_plain and unheard is None and not judged.is_outdated:
            self._recent.keep(
                stands, events, piece.batch, upto, judged.budget, checked=judged.checked
            )
        connection.cursor = upto
        connection.note_parts(upto, NO_PARTS)
        gap = part.gap if part.gap is not None and part.gap.at <= upto else None
        self._gaps.tell_all(connection, gap, unheard, upto)
        if not is_cut and not connection.is_ended:
            # Not before the gap: what may be missed is told to who might have heard it.
            people = [event for event in part.people if event.cursor <= upto]
            self._turn_all(connection, people, "delete")
        # Nor this: who breaks off in between would come back from behind the gap.
        if connection.wants_cursor and not connection.is_ended:
            connection.say_cursor(upto)
        progress.at_once = piece.stop if is_cut else min(SLICE, max(1, len(events)) * 2)

    async def _compose(self, connection: Connection, judged: _Judged, bound: int) -> Piece:
        """Make so many bytes of messages; on return readers see the events that can't be shown."""
        events = judged.events
        piece = await compose_for(
            self._course.meaning.display,
            connection,
            events,
            judged.verdict.hits,
            judged.beside,
            bound=bound,
        )
        if piece.failed:
            await self._seen(events[place].xid for place in piece.failed)
        return piece

    async def _see_causes(self, judged: _Judged) -> None:
        """Wait until readers see what caused the gaps that are about to be told."""
        gap = judged.part.gap
        if gap is not None and gap.at > judged.upto:
            gap = None
        subscribed = self._course.meaning.subscriptions
        if causes := causes_of(gap, judged.events, judged.verdict, subscribed):
            await self._seen(causes)

    def _turn_all(self, connection: Connection, people: Sequence[Event], action: Action) -> None:
        for event in people:
            if event.action == action:
                self._turn(connection, event)

    async def _judge(self, connection: Connection, at_once: int, budget: TimeBudget) -> _Judged:
        """Judge what is next for a connection: so many events, if there are."""
        course = self._course
        part = beginning(self._part_for(connection), at_once)
        upto = min(part.upto, course.target)
        events = [event for event in part.events if event.cursor <= upto]
        people = [event for event in part.people if event.cursor <= upto]
        self._turn_all(connection, people, "update")
        judged = _Judged(
            part,
            events,
            Verdict([()] * len(events)),
            NOTHING_BESIDE,
            upto,
            budget,
            course.edition,
            connection.subscriptions,
        )
        by_group = subscriptions_by_group(connection)
        if not events or not by_group:
            return judged
        judge = course.meaning.judge
        judged.verdict = await judge.judge(events, budget, by_group.keys())

        def sights(groups: Iterable[Group]) -> Iterable[Sight]:
            return ((one.viewer, one.manager) for group in groups for one in by_group[group])

        if not judged.verdict.late:
            check = self._check_of(connection, events)
            judged.beside = await judge.try_to_look_beside(events, judged.verdict, sights, check)
            judged.checked = check.checked
            judged.is_outdated = connection in check.outdated
            seconds = judged.beside.related.seconds
            budget.spend(seconds)
            viewers = (one.viewer for one in connection.subscriptions.values() if one.viewer)
            course.meaning.display.note_seconds(viewers, seconds, len(events))
            if outdated := check.outdated.get(connection):
                judge.withhold(events, judged.verdict, judged.beside, outdated)
        return judged

    def _check_of(self, connection: Connection, events: Sequence[Event]) -> CallerCheck:
        """Return what finds out whether the connection's caller is another by now."""
        return CallerCheck(
            self._identities,
            self._course.meaning,
            self._history,
            events=events,
            connections=lambda _viewers, _groups: [connection],
        )

    def _may_share(self, connection: Connection, checked: Checked | None) -> bool:
        """Whether what was read live for another one that stood there may be shown to this one."""
        person = person_of(connection.caller)
        if checked is None or person is None:
            return True
        collection = self._course.meaning.collections.get(person[0])
        before = LSN(checked.commit - 1)
        return checked.is_complete and (
            collection is None or not may_have_changed(self._history, collection, person, before)
        )
