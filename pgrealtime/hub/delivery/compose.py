"""Composes the messages of a slice once per render group, in bounded parts.

The dispatcher composes a part, enqueues its batches on the LIVE connections, and continues with the
next part. What is too much for one connection, or takes too long for one, it leaves out: such
connections read on from the changelog, and ``compose_for_connection`` composes for each alone.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from time import perf_counter

from msgspec import Struct

from pgrealtime.fairness import BackgroundYieldTimer, YieldTimer
from pgrealtime.hub.connections.connection import (
    LIVE,
    NO_MESSAGE_KEYS,
    Connection,
    Group,
    MessageKey,
    RenderGroup,
    Subscription,
)
from pgrealtime.hub.connections.group import MANY_CONNECTIONS
from pgrealtime.hub.connections.output import MessageBatch
from pgrealtime.hub.delivery.enrichment import Enrichment
from pgrealtime.hub.delivery.render import EventRendering, RecordRenderer, event_rendering
from pgrealtime.hub.events.event import Event

_RENDER_GROUP_BYTES = 256 * 1024
"""Bytes of a part for one render group, beyond which the part ends with the current change: a send
buffer is exceeded by so much and one change at most."""
_COMPOSED_BYTES = 16 * 1024 * 1024
"""Bytes of a part for all render groups, and of one change: a change with more is composed for the
remaining connections one after the other."""
_CHANGE_BYTES = 1024 * 1024
"""Bytes of one change for all render groups, beyond which it is counted how much each connection
would receive of it."""

_FIELDS_SECONDS = 0.02
"""Seconds that records with ``fields`` may take of a slice, plus ``_FIELDS_SECONDS_PER_CHANGE``
for each of its events."""
_FIELDS_SECONDS_PER_CHANGE = 0.002
_EXPENSIVE_RECORD_SECONDS = 0.002
"""A record that takes so long makes its connections expensive."""

_NO_RENDER_GROUPS: frozenset[RenderGroup] = frozenset()


class ComposedMessages(Struct):
    """The messages of a part of a slice's events."""

    stop_index: int = 0
    """Index of the first event that is not in the part."""
    render_groups: list[RenderGroup] = []
    """Those with messages; each holds its batch until it is enqueued."""
    own_record_batches: dict[Subscription, MessageBatch] = {}
    """Messages of the subscribers' own records. They replace those of the render group's batch."""
    failed_indexes: list[int] = []
    """Indexes of events that could not be rendered for some of their receivers."""
    excluded_connections: set[Connection] = set()
    """Connections for which messages are missing: they must read on from the changelog."""
    over_budget_connections: set[Connection] = set()
    """Those for which records with ``fields`` took too long."""
    expensive_connections: set[Connection] = set()
    """Those of them whose own ``fields`` took that long."""


class MessageComposer:
    """Composes a slice's messages, of one change ``send_buffer_bytes`` at most for a connection."""

    def __init__(
        self,
        renderer: RecordRenderer,
        events: Sequence[Event],
        hits: Sequence[Iterable[Group]],
        enrichment: Enrichment,
        send_buffer_bytes: int,
    ) -> None:
        self._renderer = renderer
        self._events = events
        self._hits = hits
        self._enrichment = enrichment
        self._send_buffer_bytes = send_buffer_bytes
        self._timer = YieldTimer()
        self._fields_seconds = 0.0
        """Seconds that records with ``fields`` took so far."""
        self._max_fields_seconds = _FIELDS_SECONDS + _FIELDS_SECONDS_PER_CHANGE * len(events)
        self._live_row_render_groups = _NO_RENDER_GROUPS
        """The receivers of the current event that see the columns of its live row."""
        self._composed = ComposedMessages()
        self._composed_bytes = self._largest_batch_bytes = 0
        self._change_message_count = self._change_bytes = 0
        """Messages of the current change, and their bytes."""

    async def compose(self, event_indexes: range) -> ComposedMessages:
        """Return a part: the messages of the first of some events, yielding to the loop.

        The part ends between two changes once it is large enough, at the latest with the range.
        """
        self._composed = composed = ComposedMessages()
        self._composed_bytes = self._largest_batch_bytes = 0
        self._change_message_count = self._change_bytes = 0
        composed.stop_index = await self._compose_events(event_indexes)
        composed.over_budget_connections |= composed.expensive_connections
        composed.excluded_connections |= composed.over_budget_connections
        return composed

    async def _compose_events(self, event_indexes: range) -> int:
        """Compose events; return the index of the first that is not in the part."""
        events = self._events
        for index in event_indexes:
            event = events[index]
            if index == event_indexes.start or event.cursor != events[index - 1].cursor:
                if (
                    self._largest_batch_bytes >= _RENDER_GROUP_BYTES
                    or self._composed_bytes >= _COMPOSED_BYTES
                ):
                    return index
                self._change_message_count = self._change_bytes = 0
            rendering = event_rendering(event, index, self._enrichment)
            receivers = [
                render_group for group in self._hits[index] for render_group in group.render_groups
            ]
            if rendering.live_row_rendering is not None:
                live = (group for group in self._hits[index] if group in rendering.live_row_groups)
                self._live_row_render_groups = frozenset(
                    receiver for group in live for receiver in group.render_groups
                )
            for count, render_group in enumerate(receivers):
                if self._change_bytes > _CHANGE_BYTES:
                    await self._compose_rest_of_event(rendering, receivers, count)
                    break
                self._add(rendering, render_group)
                if count and self._timer.is_due():
                    await self._timer.pause()
            if self._timer.is_due():
                await self._timer.pause()
        return event_indexes.stop

    async def _compose_rest_of_event(
        self, rendering: EventRendering, render_groups: Sequence[RenderGroup], composed_count: int
    ) -> None:
        """Compose a large event without the connections that would receive too much of it.

        One client may have a thousand topics that all receive the event.
        """
        topic_counts = Counter(member.connection for group in render_groups for member in group)
        excluded = self._composed.excluded_connections
        average_bytes = self._change_bytes // max(self._change_message_count, 1)
        for connection, count in topic_counts.items():
            if count > 1 and count * average_bytes > self._send_buffer_bytes:
                excluded.add(connection)

        def fewest_topics(render_group: RenderGroup) -> int:
            return min((topic_counts[member.connection] for member in render_group), default=0)

        # If not all fit, it is probably for connections with many topics that they don't.
        for render_group in sorted(render_groups[composed_count:], key=fewest_topics):
            connections = [member.connection for member in render_group]
            if excluded.issuperset(connections):
                continue
            if self._change_bytes > _COMPOSED_BYTES:
                excluded.update(connections)
                continue
            self._add(rendering, render_group)
            if self._timer.is_due():
                await self._timer.pause()

    def _add(self, rendering: EventRendering, render_group: RenderGroup) -> None:
        if render_group.render_key[1].fields is None:
            self._add_message(rendering, render_group)
            return
        # The client determines what ``fields`` cost: they are within a budget.
        connections = [one.connection for one in render_group if one.connection.state is LIVE]
        if not connections:
            return  # those that catch up compose it themselves
        if len(connections) >= MANY_CONNECTIONS:
            self._add_message(rendering, render_group)
        elif self._fields_seconds >= self._max_fields_seconds:
            self._composed.over_budget_connections.update(connections)
        else:
            began = perf_counter()
            self._add_message(rendering, render_group)
            seconds = perf_counter() - began
            self._fields_seconds += seconds
            if seconds >= _EXPENSIVE_RECORD_SECONDS:
                self._composed.expensive_connections.update(connections)

    def _add_message(self, rendering: EventRendering, render_group: RenderGroup) -> None:
        index, composed, batch = rendering.event_index, self._composed, render_group.batch
        if batch is None or render_group.composed_in is not composed:
            # A part that failed before it was enqueued leaves its batches behind.
            batch = render_group.batch = MessageBatch()
            if render_group.is_mirror:
                batch.mirror_indexes = batch.event_indexes
            render_group.composed_in = composed
            composed.render_groups.append(render_group)
        live, key = rendering.live_row_rendering, render_group.render_key
        if live is not None and render_group in self._live_row_render_groups:
            rendering = live
        tail = self._renderer.render_message(rendering, key)
        if not tail:
            composed.failed_indexes.append(index)
            return
        batch.add(index, tail)
        size = len(tail)
        if batch.size_bytes > self._largest_batch_bytes:  # noqa: PLR1730 (for each message; max() takes three times as long)
            self._largest_batch_bytes = batch.size_bytes
        for subscription in render_group.subscriptions_of_owner(rendering.event.record_id):
            own_tail = self._renderer.render_message(rendering, key, is_own_record=True)
            own_batch = composed.own_record_batches.setdefault(subscription, MessageBatch())
            own_batch.add(index, own_tail)
            size += len(own_tail)
        self._composed_bytes += size
        self._change_bytes += size
        self._change_message_count += 1


def enqueue_messages(composed: ComposedMessages, events: Sequence[Event]) -> list[Connection]:
    """Enqueue a part's batches on LIVE connections: the same object on all where that is possible.

    Returns the connections that received anything, and those that are excluded. The render
    groups hold no batch afterwards.
    """
    receivers: list[Connection] = [
        connection for connection in composed.excluded_connections if connection.state is LIVE
    ]
    for render_group in composed.render_groups:
        shared, render_group.batch, render_group.composed_in = render_group.batch, None, None
        if shared is None or not shared.event_indexes:
            continue
        for subscription in _loaded(render_group) if render_group.is_mirror else render_group:
            connection = subscription.connection
            if connection.state is not LIVE or connection in composed.excluded_connections:
                continue
            batch = _batch_for_subscription(
                shared, subscription, events, composed.own_record_batches
            )
            if batch.event_indexes and connection.enqueue(batch):
                receivers.append(connection)
    return receivers


def _loaded(render_group: RenderGroup) -> Iterator[Subscription]:
    """Yield the mirrors whose clients were told to load their lists: the others have none yet."""
    for subscription in render_group:
        if subscription.mirror is None or not subscription.mirror.is_unloaded:
            yield subscription


def _batch_for_subscription(
    batch: MessageBatch,
    subscription: Subscription,
    events: Sequence[Event],
    own_record_batches: Mapping[Subscription, MessageBatch],
) -> MessageBatch:
    """Return the shared batch, or a copy with the subscription's own record and read point."""
    if own := own_record_batches.get(subscription):
        messages = (dict(batch.messages()) | dict(own.messages())).items()
        batch = _batch_like(batch, messages)
    read_point = subscription.read_point
    if read_point is None:
        return batch
    return _batch_like(
        batch,
        (
            (index, tail)
            for index, tail in batch.messages()
            if read_point.predates(events[index].xid, events[index].cursor.lsn)
        ),
    )


def _batch_like(batch: MessageBatch, messages: Iterable[tuple[int, bytes]]) -> MessageBatch:
    """Return other messages for the same render group."""
    other = MessageBatch(messages)
    if batch.mirror_indexes:
        other.mirror_indexes = other.event_indexes
    return other


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

    What it was sent of the first change before is left out. Composing stops after
    ``max_bytes``: only the first change is divided for it, and no message is.
    """
    timer = BackgroundYieldTimer() if connection.is_isolated else YieldTimer()
    batch = MessageBatch()
    sent_before = connection.messages_sent_of(events[0].cursor) if events else NO_MESSAGE_KEYS
    sent = set(sent_before)
    failed: list[int] = []
    batch.mirror_indexes = mirror_indexes = list[int]()
    rendering: EventRendering | None = None
    for first, index, subscription in _subscription_hits(connection, events, hits):
        event, message_key = events[index], (index - first, subscription.topic_bytes)
        if not first and message_key in sent_before:
            continue
        if batch.size_bytes >= max_bytes:
            if not first:
                return ConnectionMessages(batch, 0, failed, sent)
            return ConnectionMessages(
                batch.messages_before(first), first, [i for i in failed if i < first]
            )
        if rendering is None or rendering.event_index != index:
            rendering = event_rendering(event, index, enrichment)
        content = _rendering_for(subscription, rendering)
        is_own = subscription.own_record_id == event.record_id
        if tail := renderer.render_message(content, subscription.render_key, is_own_record=is_own):
            batch.add(index, tail)
            if subscription.mirror is not None:
                mirror_indexes.append(index)
            if not first:
                sent.add(message_key)
        else:
            failed.append(index)
        if timer.is_due():
            await timer.pause()
    return ConnectionMessages(batch, len(events), failed)


def _rendering_for(subscription: Subscription, rendering: EventRendering) -> EventRendering:
    live = rendering.live_row_rendering
    return (
        live if live is not None and subscription.group in rendering.live_row_groups else rendering
    )


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
                if subscription.mirror is not None and subscription.mirror.is_unloaded:
                    continue
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
