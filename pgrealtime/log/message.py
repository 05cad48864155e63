"""The messages of the log: a head of 16 bytes, and a body or a part of one. Pure.

A body larger than the server's ``max_payload`` is cut into parts, each a message of its own.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

from pgrealtime.errors import LogMessageError

WIRE_VERSION = 1
"""Of head and bodies. A replica that meets a higher one isn't ready (``log_newer``)."""

MAX_UNACKNOWLEDGED = 4
"""Messages that an owner may have under way. The rule of reading relies on it."""

_HEAD = struct.Struct(">BBHHHII")
HEAD_BYTES = _HEAD.size
MAX_NUMBER = (1 << 32) - 1
_MAX_PARTS = (1 << 16) - 1


class Kind(IntEnum):
    """What a message says."""

    FENCE = 0
    """A term begins. Body: the owner's tag and the program's version."""
    ERA = 1
    """What the entries that follow belong to. Repeated, so that every window of the log has one."""
    ENTRIES = 2
    """Entries of the changelog."""
    RESIGNED = 3
    """The owner appends nothing more: others may take over at once."""


class Head(NamedTuple):
    """The first 16 bytes, in network order; the wire's version precedes them."""

    kind: Kind
    part: int
    """From 0."""
    parts: int
    """At least 1."""
    salt: int
    """Random, of the fence: tells two terms apart that have the same number, which happens if the
    server loses a fence and another owner begins that term again. 16 bits."""
    term: int
    """Of the owner that wrote the message: each begins a higher one."""
    number: int
    """Within the term, without holes: the fence is 0."""


def format_head(head: Head) -> bytes:
    """Return the head's bytes."""
    return _HEAD.pack(WIRE_VERSION, *head)


def parse_head(payload: bytes) -> Head:
    """Return the head of a message.

    Raises:
        LogMessageError: It has none; or one of a later version, with code ``log_newer``.
    """
    if len(payload) < HEAD_BYTES:
        raise LogMessageError(f"a message of {len(payload)} bytes has no head")
    version, kind, part, parts, salt, term, number = _HEAD.unpack_from(payload)
    if version > WIRE_VERSION:
        raise LogMessageError(
            "the log is written by a later version of the program",
            detail=f"It writes version {version}, and this one reads up to {WIRE_VERSION}.",
            hint="Update this replica.",
            code="log_newer",
        )
    if version == 0 or kind > max(Kind) or part >= parts:
        raise LogMessageError("a message has another head than the log's")
    return Head(Kind(kind), part, parts, salt, term, number)


class Chain:
    """Numbers the messages of one term, and says which sequence each has to follow.

    ``sequence`` is what the fence follows: the state of the log that its owner decided on. ``salt``
    is random.
    """

    def __init__(self, term: int, sequence: int, *, salt: int, max_payload: int) -> None:
        self.term = term
        self.salt = salt
        self._sequence = sequence
        self._number = 0
        self._body_bytes = max_payload - HEAD_BYTES

    @property
    def is_exhausted(self) -> bool:
        """Whether no number is left for a body of any size: another term has to begin."""
        return self._number > MAX_NUMBER - _MAX_PARTS

    def messages(self, kind: Kind, body: bytes) -> list[tuple[int, bytes]]:
        """Return for each part of a body the sequence that it has to follow, and the message."""
        size = self._body_bytes
        parts = max(1, -(-len(body) // size))
        made: list[tuple[int, bytes]] = []
        for part in range(parts):
            head = format_head(Head(kind, part, parts, self.salt, self.term, self._number))
            made.append((self._sequence, head + body[part * size : (part + 1) * size]))
            self._number += 1
            self._sequence += 1
        return made
