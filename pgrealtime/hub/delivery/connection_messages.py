"""Composes the messages of events for one connection that catches up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct

from pgrealtime.fairness import BackgroundYieldTimer, YieldTimer
from pgrealtime.hub.connections.connection import (
    NO_MESSAGE_KEYS,
    Connection,
    Group,
    MessageKey,
    Subscription,
)
from pgrealtime.hub.connections.output import MessageBatch
from pgrealtime.hub.delivery.enrichment import Enrichment
from pgrealtime.hub.delivery.render import EventRendering, RecordRenderer, event_rendering
from pgrealtime.hub.events.event import Event


class ConnectionMessages(Struct):
    """The messages that a connection is sent next."""

    batch: MessageBatch
    stop_index: int
    """Index of the first event whose messages are not all in the batch. No change is divided,
    unless this is 0: then the batch holds a part of the first change's messages."""
    failed_indexes: list[int]
    """Indexes of events that could not be rendered for it."""
    sent_messages: set[MessageKey] = set()
    """If a part of the first change is in the batch: what is sent of that change by now."""


async def compose_for_connection(
    renderer: RecordRenderer,
    connection: Connection,
    events: Sequence[Event],
    hits: Sequence[Iterable[Group]],
    enrichment: Enrichment,
    *,
    max_bytes: int,
) -> ConnectionMessages:
    """Compose messages for a connection's subscriptions, yielding to the loop.

    Args:
        renderer: Renders each message.
        connection: What it was sent of the first change before is left out.
        events: The slice's.
        hits: Per event, the groups that receive it.
        enrichment: What the records show beside their rows.
        max_bytes: Bytes after which composing stops. Only the first change is divided for it, and
            no message is.
    """
    timer = BackgroundYieldTimer() if connection.is_isolated else YieldTimer()
    batch = MessageBatch()
    sent_before = connection.messages_sent_of(events[0].cursor) if events else NO_MESSAGE_KEYS
    sent = set(sent_before)
    failed: list[int] = []
    rendering: EventRendering | None = None
    for first, index, subscription in _subscription_hits(connection, events, hits):
        event, message_key = events[index], (index - first, subscription.topic_bytes)
        if not first and message_key in sent_before:
            continue
        if batch.size_bytes >= max_bytes:
            if not first:
                return ConnectionMessages(batch, 0, failed, sent)
            return ConnectionMessages(
                batch.messages_before(first), first, [one for one in failed if one < first]
            )
        if rendering is None or rendering.event_index != index:
            rendering = event_rendering(event, index, enrichment)
        shown = rendering
        if shown.live_row_rendering is not None and subscription.group in shown.live_row_groups:
            shown = shown.live_row_rendering
        is_own = subscription.own_record_id == event.record_id
        if tail := renderer.render_message(shown, subscription.render_key, is_own_record=is_own):
            batch.add(index, tail)
            if not first:
                sent.add(message_key)
        else:
            failed.append(index)
        if timer.is_due():
            await timer.pause()
    return ConnectionMessages(batch, len(events), failed)


def _subscription_hits(
    connection: Connection, events: Sequence[Event], hits: Sequence[Iterable[Group]]
) -> Iterator[tuple[int, int, Subscription]]:
    """Yield the receivers of each event, each after two indexes: its change's first, its own."""
    by_group = subscriptions_by_group(connection)
    first = 0
    for index, (event, groups) in enumerate(zip(events, hits, strict=True)):
        if index and event.cursor != events[index - 1].cursor:
            first = index
        for group in groups:
            for subscription in by_group.get(group, ()):
                read_point = subscription.read_point
                if read_point is None or read_point.predates(event.xid, event.cursor.lsn):
                    yield first, index, subscription


def subscriptions_by_group(connection: Connection) -> Mapping[Group, Sequence[Subscription]]:
    """Return the connection's subscriptions that are in a group."""
    by_group: dict[Group, list[Subscription]] = {}
    for subscription in connection.subscriptions.values():
        if subscription.group is not None:
            by_group.setdefault(subscription.group, []).append(subscription)
    return by_group
