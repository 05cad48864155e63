"""Judged events as messages: for whole audiences, or for one connection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from time import perf_counter

from msgspec import Struct

from pgrealtime.fairness import BackgroundYieldTimer, YieldTimer
from pgrealtime.hub.connections.batch import MessageBatch
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
from pgrealtime.hub.delivery.enrichment import Enrichment
from pgrealtime.hub.delivery.render import (
    EventRendering,
    RecordRenderer,
    event_rendering,
)
from pgrealtime.hub.events.event import Event

_RENDER_GROUP_BYTES = 256 * 1024
"""Of one portion for one audience: by so much a send buffer overruns at most, one change aside."""
_COMPOSED_BYTES = 16 * 1024 * 1024
"""Of one portion for all audiences, within one change as well: what is more than that is composed
for one connection after the other."""
_CHANGE_BYTES = 1024 * 1024
"""Of one change for all audiences, above which it counts how much of that is for whom."""


_NO_RENDER_GROUPS: frozenset[RenderGroup] = frozenset()


_FIELDS_SECONDS = 0.02
"""That what clients ask to see of records may take of a slice, and for each change some more."""
_FIELDS_SECONDS_PER_CHANGE = 0.002
_EXPENSIVE_RECORD_SECONDS = 0.002
"""From which on one such record is dear."""


class ComposedMessages(Struct):
    """The messages of some of a slice's events."""

    render_groups: list[RenderGroup]
    """Each with its batch."""
    own_record_batches: dict[Subscription, MessageBatch]
    """What some see more of than their audience, instead of the same messages of its batch."""
    stop_index: int
    """Place of the first event that isn't in it."""
    failed_indexes: list[int]
    """Places of events that could not be shown to somebody who may hear of them."""
    excluded_connections: set[Connection]
    """For whom it doesn't have everything: they read it from the changelog, by themselves."""
    over_budget_connections: set[Connection]
    """Those of whom that is so since what clients ask to see of records took too long."""
    expensive_connections: set[Connection]
    """Those who ask for what took so long."""


class MessageComposer:
    """Makes the messages of some events for each audience, and for who sees more than it.

    Args:
        renderer: Makes each.
        events: The slice's.
        hits: Per event, the groups that may receive it.
        enrichment: What is shown beside their rows.
        send_buffer_bytes: Bytes that one connection may be sent of one change here.
    """

    def __init__(
        self,
        renderer: RecordRenderer,
        events: Sequence[Event],
        hits: Sequence[Iterable[Group]],
        enrichment: Enrichment,
        *,
        send_buffer_bytes: int,
    ) -> None:
        self._renderer = renderer
        self._events = events
        self._hits = hits
        self._enrichment = enrichment
        self._send_buffer_bytes = send_buffer_bytes
        self._turn = YieldTimer()
        self._fields_seconds = 0.0
        """That clients' ``fields`` took."""
        self._max_fields_seconds = _FIELDS_SECONDS + _FIELDS_SECONDS_PER_CHANGE * len(events)
        self._live_row_render_groups = _NO_RENDER_GROUPS
        """Who is shown the event with the columns of a live row."""
        self._composed = _no_messages()
        self._composed_bytes = self._largest_batch_bytes = 0
        """Bytes of its messages, and of those of its largest batch."""
        self._change_message_count = self._change_bytes = 0
        """Messages of the change that is being composed, and their bytes."""

    async def compose(self, event_indexes: range) -> ComposedMessages:
        """Compose the events at some places, in turns with the loop's other users.

        It stops at the end of the places, or between two changes when it was too much for one
        connection or for the process. Whoever is to be sent too much of a single change is left
        out: a client may have a thousand topics that hear the same.
        """
        self._composed = _no_messages()
        self._composed_bytes = self._largest_batch_bytes = self._change_message_count = (
            self._change_bytes
        ) = 0
        self._composed.stop_index = await self._compose_events(event_indexes)
        self._composed.over_budget_connections |= self._composed.expensive_connections
        self._composed.excluded_connections |= self._composed.over_budget_connections
        return self._composed

    async def _compose_events(self, event_indexes: range) -> int:
        events = self._events
        for place in event_indexes:
            event = events[place]
            if place == event_indexes.start or event.cursor != events[place - 1].cursor:
                if (
                    self._largest_batch_bytes >= _RENDER_GROUP_BYTES
                    or self._composed_bytes >= _COMPOSED_BYTES
                ):
                    return place
                self._change_message_count = self._change_bytes = 0
            showing = event_rendering(event, place, self._enrichment)
            receivers = [one for group in self._hits[place] for one in group.render_groups]
            if showing.live_row_rendering is not None:
                self._live_row_render_groups = _render_groups_seeing_live_row(
                    showing, self._hits[place]
                )
            for count, audience in enumerate(receivers):
                if self._change_bytes > _CHANGE_BYTES:
                    await self._compose_rest_of_event(showing, receivers, count)
                    break
                self._add(showing, audience)
                if count and self._turn.is_due():
                    await self._turn.pause()
            if self._turn.is_due():
                await self._turn.pause()
        return event_indexes.stop

    async def _compose_rest_of_event(
        self, rendering: EventRendering, render_groups: Sequence[RenderGroup], composed_count: int
    ) -> None:
        """Compose the rest of a change that is much altogether, for those whom it isn't for.

        Args:
            rendering: The event.
            render_groups: All who hear of it.
            composed_count: For how many of them it was composed already.
        """
        topics = Counter(one.connection for audience in render_groups for one in audience)
        left_out = self._composed.excluded_connections
        average = self._change_bytes // max(self._change_message_count, 1)
        for connection, number in topics.items():
            if number > 1 and number * average > self._send_buffer_bytes:
                left_out.add(connection)

        def least(audience: RenderGroup) -> int:
            return min((topics[one.connection] for one in audience), default=0)

        # Those with few topics first: the others may be why it is so much.
        for audience in sorted(render_groups[composed_count:], key=least):
            takers = [one.connection for one in audience]
            if left_out.issuperset(takers):
                continue
            if self._change_bytes > _COMPOSED_BYTES:
                left_out.update(takers)
                continue
            self._add(rendering, audience)
            if self._turn.is_due():
                await self._turn.pause()

    def _add(self, rendering: EventRendering, render_group: RenderGroup) -> None:
        if render_group.render_key[1].fields is None:
            self._add_message(rendering, render_group)
        else:
            self._add_within_fields_budget(rendering, render_group)

    def _add_within_fields_budget(
        self, rendering: EventRendering, render_group: RenderGroup
    ) -> None:
        """Add the message of a record whose ``fields`` a client chose, if there is time for it."""
        takers = [one.connection for one in render_group if one.connection.state is LIVE]
        if not takers:
            return  # they read by themselves, and for them it is made there
        if len(takers) >= MANY_CONNECTIONS:
            self._add_message(rendering, render_group)
        elif self._fields_seconds >= self._max_fields_seconds:
            self._composed.over_budget_connections.update(takers)
        else:
            began = perf_counter()
            self._add_message(rendering, render_group)
            seconds = perf_counter() - began
            self._fields_seconds += seconds
            if seconds >= _EXPENSIVE_RECORD_SECONDS:
                self._composed.expensive_connections.update(takers)

    def _add_message(self, rendering: EventRendering, render_group: RenderGroup) -> None:
        place, portion, batch = rendering.event_index, self._composed, render_group.batch
        if batch is None or render_group.composed_in is not portion:
            # What another portion left behind, when it failed, is no part of this one.
            batch = render_group.batch = MessageBatch()
            render_group.composed_in = portion
            portion.render_groups.append(render_group)
        if (
            rendering.live_row_rendering is not None
            and render_group in self._live_row_render_groups
        ):
            rendering = rendering.live_row_rendering
        tail = self._renderer.render_message(rendering, render_group.render_key)
        if not tail:
            portion.failed_indexes.append(place)
            return
        batch.add(place, tail)
        size = len(tail)
        if batch.size_bytes > self._largest_batch_bytes:  # noqa: PLR1730 (for each message; max() takes thrice as long)
            self._largest_batch_bytes = batch.size_bytes
        for owner in render_group.subscriptions_of_owner(rendering.event.record_id):
            own = self._renderer.render_message(
                rendering, render_group.render_key, is_own_record=True
            )
            portion.own_record_batches.setdefault(owner, MessageBatch()).add(place, own)
            size += len(own)
        self._composed_bytes += size
        self._change_bytes += size
        self._change_message_count += 1


def _no_messages() -> ComposedMessages:
    return ComposedMessages([], {}, 0, [], set(), set(), set())


def _render_groups_seeing_live_row(
    rendering: EventRendering, hits: Iterable[Group]
) -> frozenset[RenderGroup]:
    groups = (group for group in hits if group in rendering.live_row_groups)
    return frozenset(audience for group in groups for audience in group.render_groups)


def enqueue_messages(composed: ComposedMessages, events: Sequence[Event]) -> list[Connection]:
    """Give each audience's batch to its LIVE connections, the same object wherever it fits.

    Returns:
        The connections that took something, and those that are left out of the portion.
    """
    touched: list[Connection] = [one for one in composed.excluded_connections if one.state is LIVE]
    for audience in composed.render_groups:
        shared, audience.batch, audience.composed_in = audience.batch, None, None
        if shared is None or not shared.event_indexes:
            continue
        for subscription in audience:
            connection = subscription.connection
            if connection.state is not LIVE or connection in composed.excluded_connections:
                continue
            batch = _batch_for_subscription(
                shared, subscription, events, composed.own_record_batches
            )
            if batch.event_indexes and connection.enqueue(batch):
                touched.append(connection)
    return touched


def _batch_for_subscription(
    shared_batch: MessageBatch,
    subscription: Subscription,
    events: Sequence[Event],
    own_record_batches: Mapping[Subscription, MessageBatch],
) -> MessageBatch:
    batch = shared_batch
    if subscription in own_record_batches:
        messages = {
            **dict(shared_batch.messages()),
            **dict(own_record_batches[subscription].messages()),
        }
        batch = MessageBatch(messages.items())
    barrier = subscription.read_point
    if barrier is None:
        return batch
    return MessageBatch(
        (place, tail)
        for place, tail in batch.messages()
        if barrier.predates(events[place].xid, events[place].cursor.lsn)
    )


class ConnectionMessages(Struct):
    """The messages that one connection is sent next."""

    batch: MessageBatch
    stop_index: int
    """Of how many of the events they are all. The batch ends with one of these events, or it has
    nothing but messages of the first change."""
    failed_indexes: list[int]
    """Places of events that could not be shown to it."""
    sent_messages: set[MessageKey] = set()
    """If not all of the first change is in the batch: what of it was sent by now."""


async def compose_for_connection(
    renderer: RecordRenderer,
    connection: Connection,
    events: Sequence[Event],
    hits: Sequence[Iterable[Group]],
    enrichment: Enrichment,
    *,
    max_bytes: int,
) -> ConnectionMessages:
    """Make the messages for one connection's subscriptions, in turns with the loop's other users.

    Args:
        renderer: Makes each.
        connection: The connection; of the first change it isn't sent again what it was sent.
        events: The slice's.
        hits: Per event, the groups that may receive it.
        enrichment: What is shown beside their rows.
        max_bytes: Bytes that are enough. Only the first change is torn apart for it, and never a
            message.
    """
    turn = BackgroundYieldTimer() if connection.is_isolated else YieldTimer()
    batch = MessageBatch()
    sent = connection.messages_sent_of(events[0].cursor) if events else NO_MESSAGE_KEYS
    parts = set(sent)
    failed: list[int] = []
    showing: EventRendering | None = None
    for first, place, subscription in _subscription_hits(connection, events, hits):
        event, part = events[place], (place - first, subscription.topic_bytes)
        if not first and part in sent:
            continue
        if batch.size_bytes >= max_bytes:
            if not first:
                return ConnectionMessages(batch, 0, failed, parts)
            return ConnectionMessages(
                batch.messages_before(first), first, [place for place in failed if place < first]
            )
        if showing is None or showing.event_index != place:
            showing = event_rendering(event, place, enrichment)
        shown = showing
        if showing.live_row_rendering is not None and subscription.group in showing.live_row_groups:
            shown = showing.live_row_rendering
        is_own = subscription.own_record_id == event.record_id
        if tail := renderer.render_message(shown, subscription.render_key, is_own_record=is_own):
            batch.add(place, tail)
            if not first:
                parts.add(part)
        else:
            failed.append(place)
        if turn.is_due():
            await turn.pause()
    return ConnectionMessages(batch, len(events), failed)


def _subscription_hits(
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
                barrier = subscription.read_point
                if barrier is None or barrier.predates(event.xid, event.cursor.lsn):
                    yield first, place, subscription


def subscriptions_by_group(connection: Connection) -> Mapping[Group, Sequence[Subscription]]:
    """Return the connection's subscriptions that something can match."""
    by_group: dict[Group, list[Subscription]] = {}
    for subscription in connection.subscriptions.values():
        if subscription.group is not None:
            by_group.setdefault(subscription.group, []).append(subscription)
    return by_group
