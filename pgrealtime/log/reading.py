"""The rule of reading: which messages of the log count. Pure; the same for every replica.

The expected sequence alone doesn't keep two owners apart. An old owner has messages under way,
each of which expects the one before. The fence of a new owner takes the place of the first, which
is refused; the second, which expects exactly that sequence to be taken, is then stored: the old
owner's messages have a hole that no sequence shows. So every message has a term and a number.

And the new owner's messages can get a hole in the same way, by an old message that takes a sequence
before them. The new owner is then refused as well and begins another term with what the hole
lacks; so what follows a hole is void, like all that an owner writes after it was refused.
"""

from enum import Enum
from typing import NamedTuple

from pgrealtime.errors import LogMessageError
from pgrealtime.log.message import HEAD_BYTES, MAX_UNACKNOWLEDGED, Head, Kind, parse_head


class Verdict(Enum):
    """What a message is to the reader."""

    COUNTS = "counts"
    UNFINISHED = "unfinished"
    """It counts, and its body is complete only with a later message."""
    VOID = "void"
    """Written by an owner after another one's fence, or by none."""
    EARLY = "early"
    """The reader began in the middle, and doesn't know yet what counts."""
    DAMAGED = "damaged"
    """Messages before this one are missing, or parts of it, and won't come again."""
    OTHER_LOG = "other log"
    """It doesn't continue what was read, as if the stream had been replaced: read it anew."""


class Taken(NamedTuple):
    """A message's verdict, with the body that it completes."""

    verdict: Verdict
    head: Head | None = None
    body: bytes | None = None
    error: LogMessageError | None = None
    """Why the message can't be read."""


class LogReading:
    """Reads messages in the order of their sequences.

    A fence counts if its term is higher than the one in force. Any other message counts if it is of
    the term in force, with the fence's salt, and its number is the next. Everything else is void.

    A reader that begins in the middle of the log waits for an era that surely counts. ``max_bytes``
    bounds a body that comes in parts.

    Attributes:
        term: In force; 0 before any.
        salt: Of its fence.
        sequence: Of the last message read; 0 before the first.
        void_count: Messages that were void.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self.void_count = 0
        self._questioned: set[tuple[int, int]] = set()
        """Terms, with their salts, whose fence was not found."""
        self._max_bytes = max_bytes
        self.restart()

    def restart(self, *, passes_holes: bool = False) -> None:
        """Read a stream from its first message: another stream, or the same one again.

        ``passes_holes`` is for a log of which the server has lost messages: those that follow them
        count, and the first of them is DAMAGED.
        """
        self.term = self.salt = self.sequence = self._number = 0
        self._passes_holes = passes_holes
        self._early_count = 0
        self._is_joined = False
        self._drop_parts()

    def skip_to(self, sequence: int) -> None:
        """Go on before a message, because the log has dropped those up to it."""
        self.sequence = sequence - 1
        # Counted from the place at which reading goes on.
        self._early_count = MAX_UNACKNOWLEDGED if sequence > 1 else 0
        self._is_joined = False
        self._drop_parts()

    @property
    def is_joined(self) -> bool:
        """Whether the reader knows what counts."""
        return self._is_joined

    def take(self, sequence: int, payload: bytes) -> Taken:
        """Return what the message is; ``sequence`` follows the last one."""
        self.sequence = sequence
        is_early = self._early_count > 0
        self._early_count = max(0, self._early_count - 1)
        try:
            head = parse_head(payload)
        except LogMessageError as error:
            # If it was part of what the owner wrote, the next number shows that.
            self.void_count += 1
            return Taken(Verdict.VOID, error=error)
        if head.kind is Kind.FENCE and head.part == 0:
            return self._take_fence(head, payload)
        if not self._is_joined:
            return self._join(head, payload, is_early=is_early)
        is_in_force = head.term == self.term and head.salt == self.salt
        if is_in_force and head.number == self._number + 1:
            self._number = head.number
            return self._finish(head, payload, Verdict.COUNTS)
        if is_in_force and self._passes_holes and head.number > self._number:
            self._number = head.number
            self._drop_parts()
            return self._finish(head, payload, Verdict.DAMAGED)
        if head.term > self.term and (head.term, head.salt) not in self._questioned:
            # Its fence isn't in what was read, although nothing was skipped. Still so when that was
            # read once more: the server lost the fence, and what follows is void.
            self._questioned.add((head.term, head.salt))
            return Taken(Verdict.OTHER_LOG, head)
        return self._void(head)

    def _take_fence(self, head: Head, payload: bytes) -> Taken:
        if head.term <= self.term:
            return self._void(head)
        self._put_in_force(head)
        return Taken(Verdict.COUNTS, head, payload[HEAD_BYTES:])

    def _join(self, head: Head, payload: bytes, *, is_early: bool) -> Taken:
        # What an old owner had under way follows the fence that it lost against within
        # MAX_UNACKNOWLEDGED messages. Whoever began after that fence can't know; so as many are
        # skipped, and all that come later are of the term in force.
        if is_early or head.kind is not Kind.ERA or head.part:
            return Taken(Verdict.EARLY, head)
        self._put_in_force(head)
        return self._finish(head, payload, Verdict.COUNTS)

    def _put_in_force(self, head: Head) -> None:
        self.term, self.salt, self._number = head.term, head.salt, head.number
        self._is_joined = True
        self._drop_parts()

    def _void(self, head: Head) -> Taken:
        self.void_count += 1
        return Taken(Verdict.VOID, head)

    def _finish(self, head: Head, payload: bytes, verdict: Verdict) -> Taken:
        """Join the parts; the last one completes the body."""
        if head.part == 0:
            self._drop_parts()
        if head.part != len(self._parts):
            return Taken(Verdict.DAMAGED, head)  # the first parts of it are missing
        self._parts_bytes += len(payload) - HEAD_BYTES
        if self._parts_bytes > self._max_bytes:
            self._drop_parts()
            error = LogMessageError(f"a message in parts has more than {self._max_bytes} bytes")
            return Taken(Verdict.DAMAGED, head, error=error)
        self._parts.append(payload[HEAD_BYTES:])
        if head.part + 1 < head.parts:
            return Taken(Verdict.UNFINISHED if verdict is Verdict.COUNTS else verdict, head)
        body = b"".join(self._parts)
        self._drop_parts()
        return Taken(verdict, head, body)

    def _drop_parts(self) -> None:
        self._parts: list[bytes] = []
        self._parts_bytes = 0
