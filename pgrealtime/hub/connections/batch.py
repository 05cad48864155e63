"""The messages of one slice, shared by all subscriptions that receive the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_ID_LINE_BYTES = 76
"""Size of the id line before each tail, if it carries a position."""


class MessageBatch:
    """Messages without their ids, in order, each with the index of its event in the slice.

    Attributes:
        tails: The messages after an empty first element: joining them with an id puts the id
            before each, in one call per connection whatever the number of messages.
        event_indexes: The events' indexes, ascending; one less than ``tails``.
        size_bytes: Approximate size of the messages.
    """

    __slots__ = ("event_indexes", "size_bytes", "tails")

    def __init__(self, messages: Iterable[tuple[int, bytes]] = ()) -> None:
        self.tails: list[bytes] = [b""]
        self.event_indexes: list[int] = []
        self.size_bytes = 0
        for event_index, tail in messages:
            self.add(event_index, tail)

    def add(self, event_index: int, tail: bytes) -> None:
        """Append a message."""
        self.tails.append(tail)
        self.size_bytes += len(tail) + _ID_LINE_BYTES
        self.event_indexes.append(event_index)

    def messages_before(self, event_index: int) -> MessageBatch:
        """Return the messages of the events before an index."""
        if not self.event_indexes or self.event_indexes[-1] < event_index:
            return self
        return MessageBatch(message for message in self.messages() if message[0] < event_index)

    def messages(self) -> Iterable[tuple[int, bytes]]:
        """Return the events' indexes and the tails."""
        return zip(self.event_indexes, self.tails[1:], strict=True)


def merge_batches(batches: Sequence[MessageBatch]) -> MessageBatch:
    """Return one batch in the order of the events; messages of one event in the order given."""
    if len(batches) == 1:
        return batches[0]
    messages = (message for batch in batches for message in batch.messages())
    return MessageBatch(sorted(messages, key=lambda message: message[0]))
