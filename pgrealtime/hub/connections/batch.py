"""The messages of one slice, shared by all who receive the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_ID_BYTES = 76
"""Of the id line before each tail, where it carries a position."""


class Batch:
    """Tails in order, each with the place of its event in the slice.

    Attributes:
        tails: After an empty first element, so that joining them with an id line puts one before
            each: one call in C per connection, whatever the number of messages.
        places: Of the events, ascending; one less than ``tails``.
        size: Bytes of the messages, about.
    """

    __slots__ = ("places", "size", "tails")

    def __init__(self, messages: Iterable[tuple[int, bytes]] = ()) -> None:
        self.tails: list[bytes] = [b""]
        self.places: list[int] = []
        self.size = 0
        for place, tail in messages:
            self.add(place, tail)

    def add(self, place: int, tail: bytes) -> None:
        """Append a message."""
        self.tails.append(tail)
        self.size += len(tail) + _ID_BYTES
        self.places.append(place)

    def upto(self, place: int) -> Batch:
        """Return the messages of the events before a place."""
        if not self.places or self.places[-1] < place:
            return self
        return Batch(message for message in self.messages() if message[0] < place)

    def messages(self) -> Iterable[tuple[int, bytes]]:
        """Places and tails."""
        return zip(self.places, self.tails[1:], strict=True)


def merged(batches: Sequence[Batch]) -> Batch:
    """Return one batch in the order of the events; equal places in the order given."""
    if len(batches) == 1:
        return batches[0]
    messages = (message for batch in batches for message in batch.messages())
    return Batch(sorted(messages, key=lambda message: message[0]))
