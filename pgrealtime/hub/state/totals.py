"""What the hub counts, for whoever looks: nothing here is per event."""

from __future__ import annotations

from collections import Counter

from msgspec import Struct, field

from pgrealtime.hub.connections.connection import Connection


class Counts(Struct):
    """Since the start.

    Attributes:
        closed: Connections that are over, by reason; ``client`` went by itself.
        events_of_closed: Events that those were sent.
        resumes: First calls of connections that came with a position: ``resumed``, or why not.
        filters_refused: Calls with too many options of one kind, by connection or address.
        left_out: Records that were shown to somebody without a column, by collection: what it held
            isn't known any more, and what it holds now may be seen by others alone.
    """

    closed: Counter[str] = field(default_factory=Counter)
    events_of_closed: int = 0
    resumes: Counter[str] = field(default_factory=Counter)
    filters_refused: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def note_call(self, connection: Connection) -> None:
        """Take note of a call with topics, before it is answered."""
        if connection.answered_at is None and (connection.resumes or connection.gap):
            self.resumes[connection.gap or "resumed"] += 1
