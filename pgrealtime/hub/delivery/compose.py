"""Judged events as messages: for whole audiences, or for one connection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from time import perf_counter

from msgspec import Struct

from pgrealtime.hub.connections.batch import Batch
from pgrealtime.hub.connections.connection import NO_PARTS, Connection, Part, Subscription
from pgrealtime.hub.delivery.render import Beside, Display, Showing, showing_of
from pgrealtime.hub.evaluation.matcher import Audience, Group
from pgrealtime.hub.events.event import Event
from pgrealtime.rule_queries.filter_trials import MANY_TAKERS
from pgrealtime.turns import RestingTurn, Turn

_AUDIENCE_BYTES = 256 * 1024
"""Of one portion for one audience: by so much a send buffer overruns at most, one change aside."""
_PORTION_BYTES = 16 * 1024 * 1024
"""Of one portion for all audiences, within one change as well: what is more than that is composed
for one connection after the other."""
_CHANGE_BYTES = 1024 * 1024
"""Of one change for all audiences, above which it counts how much of that is for whom."""


_NO_AUDIENCES: frozenset[Audience] = frozenset()


_VIEW_SECONDS = 0.02
"""That what clients ask to see of records may take of a slice, and for each change some more."""
_VIEW_SECONDS_OF_CHANGE = 0.002
_DEAR_SECONDS = 0.002
"""From which on one such record is dear."""


class Portion(Struct):
    """The messages of some of a slice's events."""

    audiences: list[Audience]
    """Each with its batch."""
    mine: dict[Subscription, Batch]
    """What some see more of than their audience, instead of the same messages of its batch."""
    stop: int
    """Place of the first event that isn't in it."""
    failed: list[int]
    """Places of events that could not be shown to somebody who may hear of them."""
    left_out: set[Connection]
    """For whom it doesn't have everything: they read it from the changelog, by themselves."""
    late: set[Connection]
    """Those of whom that is so since what clients ask to see of records took too long."""
    dear: set[Connection]
    """Those who ask for what took so long."""


class Composer:
    """Makes the messages of some events for each audience, and for who sees more than it.

    Args:
        display: Makes each.
        events: The slice's.
        hits: Per event, the groups that may receive it.
        beside: What is shown beside their rows.
        send_buffer: Bytes that one connection may be sent of one change here.
    """

    def __init__(
        self,
        display: Display,
        events: Sequence[Event],
        hits: Sequence[Iterable[Group]],
        beside: Beside,
        *,
        send_buffer: int,
    ) -> None:
        self._display = display
        self._events = events
        self._hits = hits
        self._beside = beside
        self._send_buffer = send_buffer
        self._turn = Turn()
        self._seconds = 0.0
        """That clients' ``fields`` took."""
        self._most_seconds = _VIEW_SECONDS + _VIEW_SECONDS_OF_CHANGE * len(events)
        self._see_entire = _NO_AUDIENCES
        """Who is shown the event with the columns of a live row."""
        self._portion = _empty()
        self._size = self._largest = 0
        """Bytes of its messages, and of those of its largest batch."""
        self._messages = self._of_change = 0
        """Messages of the change that is being composed, and their bytes."""

    async def portion(self, places: range) -> Portion:
        """Compose the events at some places, in turns with the loop's other users.

        It stops at the end of the places, or between two changes when it was too much for one
        connection or for the process. Whoever is to be sent too much of a single change is left
        out: a client may have a thousand topics that hear the same.
        """
        self._portion = _empty()
        self._size = self._largest = self._messages = self._of_change = 0
        self._portion.stop = await self._compose(places)
        self._portion.late |= self._portion.dear
        self._portion.left_out |= self._portion.late
        return self._portion

    async def _compose(self, places: range) -> int:
        events = self._events
        for place in places:
            event = events[place]
            if place == places.start or event.cursor != events[place - 1].cursor:
                if self._largest >= _AUDIENCE_BYTES or self._size >= _PORTION_BYTES:
                    return place
                self._messages = self._of_change = 0
            showing = showing_of(event, place, self._beside)
            receivers = [one for group in self._hits[place] for one in group.audiences]
            if showing.entire is not None:
                self._see_entire = _seeing_entire(showing, self._hits[place])
            for count, audience in enumerate(receivers):
                if self._of_change > _CHANGE_BYTES:
                    await self._compose_some(showing, receivers, count)
                    break
                self._add(showing, audience)
                if count and self._turn.is_over():
                    await self._turn.pause()
            if self._turn.is_over():
                await self._turn.pause()
        return places.stop

    async def _compose_some(
        self, showing: Showing, receivers: Sequence[Audience], count: int
    ) -> None:
        """Compose the rest of a change that is much altogether, for those whom it isn't for.

        Args:
            showing: The event.
            receivers: All who hear of it.
            count: For how many of them it was composed already.
        """
        topics = Counter(one.connection for audience in receivers for one in audience)
        left_out = self._portion.left_out
        average = self._of_change // max(self._messages, 1)
        for connection, number in topics.items():
            if number > 1 and number * average > self._send_buffer:
                left_out.add(connection)

        def least(audience: Audience) -> int:
            return min((topics[one.connection] for one in audience), default=0)

        # Those with few topics first: the others may be why it is so much.
        for audience in sorted(receivers[count:], key=least):
            takers = [one.connection for one in audience]
            if left_out.issuperset(takers):
                continue
            if self._of_change > _PORTION_BYTES:
                left_out.update(takers)
                continue
            self._add(showing, audience)
            if self._turn.is_over():
                await self._turn.pause()

    def _add(self, showing: Showing, audience: Audience) -> None:
        if audience.receives[1].fields is None:
            self._add_message(showing, audience)
        else:
            self._add_limited(showing, audience)

    def _add_limited(self, showing: Showing, audience: Audience) -> None:
        """Add the message of a record whose ``fields`` a client chose, if there is time for it."""
        takers = [one.connection for one in audience if one.connection.is_live]
        if not takers:
            return  # they read by themselves, and for them it is made there
        if len(takers) >= MANY_TAKERS:
            self._add_message(showing, audience)
        elif self._seconds >= self._most_seconds:
            self._portion.late.update(takers)
        else:
            began = perf_counter()
            self._add_message(showing, audience)
            seconds = perf_counter() - began
            self._seconds += seconds
            if seconds >= _DEAR_SECONDS:
                self._portion.dear.update(takers)

    def _add_message(self, showing: Showing, audience: Audience) -> None:
        place, portion, batch = showing.place, self._portion, audience.batch
        if batch is None or audience.portion is not portion:
            # What another portion left behind, when it failed, is no part of this one.
            batch = audience.batch = Batch()
            audience.portion = portion
            portion.audiences.append(audience)
        if showing.entire is not None and audience in self._see_entire:
            showing = showing.entire
        tail = self._display.tail(showing, audience.receives)
        if not tail:
            portion.failed.append(place)
            return
        batch.add(place, tail)
        size = len(tail)
        if batch.size > self._largest:  # noqa: PLR1730 (for each message; max() takes thrice as long)
            self._largest = batch.size
        for owner in audience.owners(showing.event.record_id):
            own = self._display.tail(showing, audience.receives, is_own=True)
            portion.mine.setdefault(owner, Batch()).add(place, own)
            size += len(own)
        self._size += size
        self._of_change += size
        self._messages += 1


def _empty() -> Portion:
    return Portion([], {}, 0, [], set(), set(), set())


def _seeing_entire(showing: Showing, hits: Iterable[Group]) -> frozenset[Audience]:
    groups = (group for group in hits if group in showing.groups)
    return frozenset(audience for group in groups for audience in group.audiences)


def hand_out(portion: Portion, events: Sequence[Event]) -> list[Connection]:
    """Give each audience's batch to its LIVE connections, the same object wherever it fits.

    Returns:
        The connections that took something, and those that are left out of the portion.
    """
    touched: list[Connection] = [one for one in portion.left_out if one.is_live]
    for audience in portion.audiences:
        shared, audience.batch, audience.portion = audience.batch, None, None
        if shared is None or not shared.places:
            continue
        for subscription in audience:
            connection = subscription.connection
            if not connection.is_live or connection in portion.left_out:
                continue
            batch = _own(shared, subscription, events, portion.mine)
            if batch.places and connection.take(batch):
                touched.append(connection)
    return touched


def _own(
    shared: Batch,
    subscription: Subscription,
    events: Sequence[Event],
    mine: Mapping[Subscription, Batch],
) -> Batch:
    batch = shared
    if subscription in mine:
        messages = {**dict(shared.messages()), **dict(mine[subscription].messages())}
        batch = Batch(messages.items())
    barrier = subscription.barrier
    if barrier is None:
        return batch
    return Batch(
        (place, tail)
        for place, tail in batch.messages()
        if barrier.admits(events[place].xid, events[place].cursor.lsn)
    )


class Piece(Struct):
    """The messages that one connection is sent next."""

    batch: Batch
    stop: int
    """Of how many of the events they are all. The batch ends with one of these events, or it has
    nothing but messages of the first change."""
    failed: list[int]
    """Places of events that could not be shown to it."""
    parts: set[Part] = set()
    """If not all of the first change is in the batch: what of it was sent by now."""


async def compose_for(
    display: Display,
    connection: Connection,
    events: Sequence[Event],
    hits: Sequence[Iterable[Group]],
    beside: Beside,
    *,
    bound: int,
) -> Piece:
    """Make the messages for one connection's subscriptions, in turns with the loop's other users.

    Args:
        display: Makes each.
        connection: The connection; of the first change it isn't sent again what it was sent.
        events: The slice's.
        hits: Per event, the groups that may receive it.
        beside: What is shown beside their rows.
        bound: Bytes that are enough. Only the first change is torn apart for it, and never a
            message.
    """
    turn = RestingTurn() if connection.is_isolated else Turn()
    batch = Batch()
    sent = connection.parts_sent_of(events[0].cursor) if events else NO_PARTS
    parts = set(sent)
    failed: list[int] = []
    showing: Showing | None = None
    for first, place, subscription in _heard(connection, events, hits):
        event, part = events[place], (place - first, subscription.name)
        if not first and part in sent:
            continue
        if batch.size >= bound:
            if not first:
                return Piece(batch, 0, failed, parts)
            return Piece(batch.upto(first), first, [place for place in failed if place < first])
        if showing is None or showing.place != place:
            showing = showing_of(event, place, beside)
        shown = showing
        if showing.entire is not None and subscription.group in showing.groups:
            shown = showing.entire
        is_own = subscription.own_id == event.record_id
        if tail := display.tail(shown, subscription.receives, is_own=is_own):
            batch.add(place, tail)
            if not first:
                parts.add(part)
        else:
            failed.append(place)
        if turn.is_over():
            await turn.pause()
    return Piece(batch, len(events), failed)


def _heard(
    connection: Connection, events: Sequence[Event], hits: Sequence[Iterable[Group]]
) -> Iterator[tuple[int, int, Subscription]]:
    """Yield who hears of which event, after the place at which the event's change begins."""
    by_group = subscriptions_by_group(connection)
    first = 0
    for place, (event, groups) in enumerate(zip(events, hits, strict=True)):
        if place and event.cursor != events[place - 1].cursor:
            first = place
        for group in groups:
            for subscription in by_group.get(group, ()):
                barrier = subscription.barrier
                if barrier is None or barrier.admits(event.xid, event.cursor.lsn):
                    yield first, place, subscription


def subscriptions_by_group(connection: Connection) -> Mapping[Group, Sequence[Subscription]]:
    """Return the connection's subscriptions that something can match."""
    by_group: dict[Group, list[Subscription]] = {}
    for subscription in connection.subscriptions.values():
        if subscription.group is not None:
            by_group.setdefault(subscription.group, []).append(subscription)
    return by_group
