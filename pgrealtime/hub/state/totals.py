"""Counters of the hub for metrics; none of them is updated per event."""

from __future__ import annotations

from collections import Counter

from msgspec import Struct, field


class HubCounters(Struct):
    """Totals since the start.

    Attributes:
        closed_connections: Closed connections by reason; ``client`` if the client closed it.
        events_sent_to_closed: Events that those were sent.
        resume_outcomes: First calls of connections that submitted a position: ``resumed``, or the
            reason of the gap.
        refused_subscribe_calls: Calls with too many subscriptions of a kind for a connection or an
            address.
        incomplete_records: By collection, records that were sent to some subscribers without a
            column: its value then is not known any more, and they may not see its value now.
    """

    closed_connections: Counter[str] = field(default_factory=Counter)
    events_sent_to_closed: int = 0
    resume_outcomes: Counter[str] = field(default_factory=Counter)
    refused_subscribe_calls: int = 0
    incomplete_records: Counter[str] = field(default_factory=Counter)
