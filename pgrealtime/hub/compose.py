"""Judged events as messages: for whole audiences, or for one connection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from pgrealtime.hub.batch import Batch
from pgrealtime.hub.connection import Connection, Subscription
from pgrealtime.hub.display import Beside, Display, Showing
from pgrealtime.hub.event import Event
from pgrealtime.hub.match import Audience, Group

_AUDIENCE_BYTES = 256 * 1024
"""Of one portion for one audience: by so much a send buffer overruns at most, one change aside."""
_PORTION_BYTES = 16 * 1024 * 1024
"""Of one portion for all audiences: a client may have a thousand topics that hear the same."""


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


def compose(
    display: Display,
    events: Sequence[Event],
    hits: Sequence[Iterable[Group]],
    beside: Beside,
    places: range,
) -> Portion:
    """Make the messages of some events for each audience, and for who sees more than it.

    It stops at the end of the places, or between two changes when it was too much for one
    connection or for the process.
    """
    audiences: list[Audience] = []
    mine: dict[Subscription, Batch] = {}
    failed: list[int] = []
    portion = Portion(audiences, mine, places.stop, failed)
    size = largest = 0
    for place in places:
        event = events[place]
        is_enough = largest >= _AUDIENCE_BYTES or size >= _PORTION_BYTES
        if is_enough and event.cursor != events[place - 1].cursor:
            portion.stop = place
            return portion
        showing = Showing(event, place, beside)
        for group in hits[place]:
            for audience in group.audiences:
                batch = audience.batch
                if batch is None or audience.portion is not portion:
                    # What another portion left behind, when it failed, is no part of this one.
                    batch = audience.batch = Batch()
                    audience.portion = portion
                    audiences.append(audience)
                tail = display.tail(showing, audience.receives)
                if not tail:
                    failed.append(place)
                    continue
                batch.add(place, tail)
                size += len(tail)
                largest = max(largest, batch.size)
                for owner in audience.owners(event.record_id):
                    own = display.tail(showing, audience.receives, is_own=True)
                    mine.setdefault(owner, Batch()).add(place, own)
    return portion


def hand_out(portion: Portion, events: Sequence[Event]) -> list[Connection]:
    """Give each audience's batch to its LIVE connections, the same object wherever it fits.

    Returns:
        The connections that took something.
    """
    touched: list[Connection] = []
    for audience in portion.audiences:
        shared, audience.batch, audience.portion = audience.batch, None, None
        if shared is None or not shared.places:
            continue
        for subscription in audience:
            connection = subscription.connection
            if not connection.is_live:
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


def compose_for(
    display: Display,
    by_group: Mapping[Group, Sequence[Subscription]],
    events: Sequence[Event],
    hits: Sequence[Iterable[Group]],
    beside: Beside,
    *,
    bound: int,
) -> tuple[Batch, int, list[int]]:
    """Make the messages for one connection's subscriptions.

    Args:
        display: Makes them.
        by_group: The subscriptions.
        events: The slice's.
        hits: Per event, the groups that may receive it.
        beside: What is shown beside their rows.
        bound: Bytes that are enough; no change is torn apart for it.

    Returns:
        The messages, of how many of the events they are, and the places of those that could not be
        shown.
    """
    batch = Batch()
    failed: list[int] = []
    for place, (event, groups) in enumerate(zip(events, hits, strict=True)):
        if batch.size >= bound and event.cursor != events[place - 1].cursor:
            return batch, place, failed
        showing = Showing(event, place, beside)
        for subscription in (one for group in groups for one in by_group[group]):
            barrier = subscription.barrier
            if barrier is not None and not barrier.admits(event.xid, event.cursor.lsn):
                continue
            is_own = subscription.own_id == event.record_id
            if tail := display.tail(showing, subscription.receives, is_own=is_own):
                batch.add(place, tail)
            else:
                failed.append(place)
    return batch, len(events), failed
