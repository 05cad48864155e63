"""What the hub counts, for whoever looks: nothing here is per event."""

from __future__ import annotations

from collections import Counter

from msgspec import Struct, field

from pgrealtime.hub.connections.connection import Connection


class HubCounters(Struct):
    """Since the start.

    Attributes:
        closed_connections: Connections that are over, by reason; ``client`` went by itself.
        events_sent_to_closed: Events that those were sent.
        resume_outcomes: First calls of connections that came with a position: ``resumed``, or why
            not.
        refused_subscribe_calls: Calls with too many options of one kind, by connection or address.
        incomplete_records: Records that were shown to somebody without a column, by collection:
            what it held isn't known any more, and what it holds now may be seen by others alone.
    """

    closed_connections: Counter[str] = field(default_factory=Counter)
    events_sent_to_closed: int = 0
    resume_outcomes: Counter[str] = field(default_factory=Counter)
    refused_subscribe_calls: int = 0
    incomplete_records: Counter[str] = field(default_factory=Counter)

    def record_resume_outcome(self, connection: Connection) -> None:
        """Take note of a call with topics, before it is answered."""
        if connection.first_call_answered_at is None and (
            connection.is_resuming or connection.pending_gap_reason
        ):
            self.resume_outcomes[connection.pending_gap_reason or "resumed"] += 1
