"""The messages of one slice, shared by all who receive the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_ID_LINE_BYTES = 76
"""Of the id line before each tail, where it carries a position."""


class MessageBatch:
    """Tails in order, each with the place of its event in the slice.

    Attributes:
        tails: After an empty first element, so that joining them with an id line puts one before
            each: one call in C per connection, whatever the number of messages.
        event_indexes: Of the events, ascending; one less than ``tails``.
        size_bytes: Bytes of the messages, about.
    """

    __slots__ = ("event_indexes", "size_bytes", "tails")

    def __init__(self, messages: Iterable[tuple[int, bytes]] = ()) -> None:
        self.tails: list[bytes] = [b""]
        self.event_indexes: list[int] = []
        self.size_bytes = 0
        for place, tail in messages:
            self.add(place, tail)

    def add(self, event_index: int, tail: bytes) -> None:
        """Append a message."""
        self.tails.append(tail)
        self.size_bytes += len(tail) + _ID_LINE_BYTES
        self.event_indexes.append(event_index)

    def messages_before(self, event_index: int) -> MessageBatch:
        """Return the messages of the events before a place."""
        if not self.event_indexes or self.event_indexes[-1] < event_index:
            return self
        return MessageBatch(message for message in self.messages() if message[0] < event_index)

    def messages(self) -> Iterable[tuple[int, bytes]]:
        """Places and tails."""
        return zip(self.event_indexes, self.tails[1:], strict=True)


def merge_batches(batches: Sequence[MessageBatch]) -> MessageBatch:
    """Return one batch in the order of the events; equal places in the order given."""
    if len(batches) == 1:
        return batches[0]
    messages = (message for batch in batches for message in batch.messages())
    return MessageBatch(sorted(messages, key=lambda message: message[0]))
