"""A log, its owners and its readers without network and clock, moved by single steps."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from pgrealtime.log.message import MAX_UNACKNOWLEDGED, Chain, Kind
from pgrealtime.log.reading import LogReading, Verdict

PAYLOAD = 16 + 12
"""Small, so that some messages need parts."""
LAG = 60
"""Entries that the slot stays behind what was stored; a log is set back by fewer."""
ERA_EVERY = 3
"""Messages with entries between two repeated eras."""


def encode(numbers: list[int]) -> bytes:
    return b"".join(number.to_bytes(4, "big") for number in numbers)


def decode(body: bytes) -> list[int]:
    return [int.from_bytes(body[at : at + 4], "big") for at in range(0, len(body), 4)]


@dataclass
class Stream:
    """A JetStream stream of one subject; checks the expected sequence."""

    first: int = 1
    messages: list[tuple[int, bytes]] = field(default_factory=list)
    """With the time of each, which no other message has."""
    time: int = 0

    @property
    def last(self) -> int:
        return self.first + len(self.messages) - 1

    def append(self, expected: int, payload: bytes) -> bool:
        if expected != self.last:
            return False
        self.time += 1
        self.messages.append((self.time, payload))
        return True

    def get(self, sequence: int) -> tuple[int, bytes]:
        if not self.first <= sequence <= self.last:
            return 0, b""
        return self.messages[sequence - self.first]

    def trim(self, count: int) -> None:
        count = min(count, len(self.messages))
        self.first += count
        del self.messages[:count]

    def set_back(self, count: int) -> None:
        if count:
            del self.messages[-count:]

    def wipe(self) -> None:
        self.first, self.messages = 1, []


class Reader:
    """A replica: applies what counts, skips what it has, and fails at the first entry missed."""

    def __init__(self, stream: Stream, *, obeys: bool = True) -> None:
        self.stream = stream
        self.reading = LogReading(max_bytes=1 << 20)
        self.last_time = 0
        self.head: int | None = None
        """The last entry; None before any."""
        self.log_head: int | None = None
        """The last entry that this log has."""
        self.missed: list[tuple[int, int]] = []
        self._obeys = obeys
        self.anew()

    def anew(self) -> None:
        self.reading.restart()
        self.reading.skip_to(self.stream.first)
        self.last_time, self.log_head = 0, None

    def read(self, upto: int | None = None) -> None:
        stream = self.stream
        sequence = self.reading.sequence
        if sequence >= stream.first and stream.get(sequence)[0] != self.last_time:
            self.anew()
        if stream.first > self.reading.sequence + 1:
            self.reading.skip_to(stream.first)
        upto = stream.last if upto is None else upto
        while self.reading.sequence < upto:
            sequence = self.reading.sequence + 1
            self.last_time, payload = stream.get(sequence)
            taken = self.reading.take(sequence, payload)
            if taken.verdict is Verdict.OTHER_LOG:
                self.anew()
                continue
            assert taken.verdict is not Verdict.DAMAGED
            body = taken.body
            if not self._obeys and taken.verdict is Verdict.VOID:
                body = payload[16:]
            if body is not None and taken.head is not None:
                self._apply(taken.head.kind, decode(body))

    def hear(self, beat: "tuple[int, int, int]") -> None:
        """Compare with what the owner says: its term, its sequence and the entry that it is at."""
        term, sequence, head = beat
        if self.reading.sequence < sequence:
            self.read()
        reading = self.reading
        is_there = reading.is_joined and reading.sequence >= sequence
        if is_there and (reading.term != term or (self.log_head or 0) < head):
            self.anew()
            self.read()

    def _apply(self, kind: Kind, numbers: list[int]) -> None:
        if kind is Kind.ERA:
            if self.head is None:
                self.head = numbers[0]
            elif numbers[0] > self.head:
                self.missed.append((self.head, numbers[0]))
                self.head = numbers[0]
            if self.log_head is None:
                self.log_head = numbers[0]
        elif kind is Kind.ENTRIES and self.head is not None:
            for number in numbers:
                self.log_head = max(self.log_head or 0, number)
                if number <= self.head:
                    continue
                if number != self.head + 1:
                    self.missed.append((self.head, number))
                self.head = number


class Owner:
    """A replica that may own the log; its messages travel one by one."""

    def __init__(self, stream: Stream, slot: "Slot", rng: random.Random) -> None:
        self.reader = Reader(stream)
        self.stream = stream
        self.slot = slot
        self.under_way: list[tuple[int, bytes, int]] = []
        """Sent and not arrived: what each expects, the message, the entry that it ends with."""
        self.unacknowledged = 0
        self.head: int | None = None
        """The last entry put into a message; None while this isn't the owner."""
        self.stored = 0
        self.stored_sequence = 0
        self._chain = Chain(0, 0, salt=0, max_payload=PAYLOAD)
        self._sent = 0
        self._rng = rng

    @property
    def beat(self) -> tuple[int, int, int] | None:
        return None if self.head is None else (self._chain.term, self.stored_sequence, self.stored)

    def take_over(self) -> None:
        """Fence, read up to the own fence, go on at what the log has."""
        self.resign()
        reading = self.reader.reading
        self.reader.read()
        noted, term = reading.sequence, reading.term
        salt = self._rng.randrange(1 << 16)
        self._chain = Chain(term + 1, noted, salt=salt, max_payload=PAYLOAD)
        ((expected, fence),) = self._chain.messages(Kind.FENCE, b"")
        if not self.stream.append(expected, fence):
            return
        self.reader.read(noted + 1)
        if reading.term != term + 1:
            return
        head = self.reader.log_head
        self.head = self.slot.confirmed if head is None else max(head, self.slot.confirmed)
        self.stored, self.stored_sequence, self._sent = self.head, noted + 1, 0
        self._send(Kind.ERA, [self.head])

    def resign(self) -> None:
        """Append nothing more. What is under way goes on."""
        self.head, self.unacknowledged = None, 0

    def produce(self) -> None:
        """Send the next entries, as far as messages may be unacknowledged."""
        if self.head is None or self.unacknowledged + 3 > MAX_UNACKNOWLEDGED:
            return
        last = min(self.head + self._rng.randint(1, 7), self.slot.written)
        entries = list(range(self.head + 1, last + 1))
        if not entries:
            return
        self._sent += 1
        if self._sent % ERA_EVERY == 0:
            self._send(Kind.ERA, [self.head])
        self.head = entries[-1]
        self._send(Kind.ENTRIES, entries)

    def _send(self, kind: Kind, numbers: list[int]) -> None:
        assert self.head is not None
        messages = self._chain.messages(kind, encode(numbers))
        for index, (expected, payload) in enumerate(messages):
            ends = numbers[-1] if index == len(messages) - 1 else 0
            self.under_way.append((expected, payload, ends))
            self.unacknowledged += 1

    def deliver(self) -> None:
        """Let the next message arrive; its acknowledgement may be lost."""
        if not self.under_way:
            return
        expected, payload, ends = self.under_way.pop(0)
        is_stored = self.stream.append(expected, payload)
        if self.head is None:
            return
        if not is_stored or self._rng.random() < 0.05:
            self.resign()
            return
        self.unacknowledged -= 1
        self.stored, self.stored_sequence = max(self.stored, ends), expected + 1
        self.slot.confirmed = max(self.slot.confirmed, self.stored - LAG)


@dataclass
class Slot:
    """What the database has, and from where on it sends that again."""

    written: int = 0
    confirmed: int = 0


def run(  # noqa: C901 (each inner function is an act)
    seed: int, *, obeys: bool = True, steps: int = 400, faults: bool = True
) -> list[Reader]:
    """Return the readers after a random run; all have then read everything."""
    rng = random.Random(seed)
    stream, slot = Stream(), Slot()
    owners = [Owner(stream, slot, rng) for _ in range(2)]
    readers = [Reader(stream, obeys=obeys) for _ in range(2)]
    for reader in readers:
        reader.head = 0

    def hear() -> None:
        if (beat := rng.choice(owners).beat) is not None:
            rng.choice(readers).hear(beat)

    def join() -> None:
        readers.append(late := Reader(stream, obeys=obeys))
        late.read()

    def set_back() -> None:
        """Lose the tail, with fewer entries in it than the slot stays behind."""
        stream.set_back(min(rng.randint(0, 2), len(stream.messages)))

    def wipe() -> None:
        if rng.random() < 0.3:  # rarer than the others
            stream.wipe()

    def trim() -> None:
        if len(stream.messages) > 60:
            stream.trim(5)
            for behind in (*readers, *(owner.reader for owner in owners)):
                behind.read()

    acts: list[Callable[[], None]] = [
        *[lambda: rng.choice(owners).take_over()] * 2,
        lambda: rng.choice(owners).resign(),
        *[lambda: rng.choice(owners).produce()] * 13,
        *[lambda: rng.choice(owners).deliver()] * 12,
        *[lambda: rng.choice(readers).read()] * 6,
        *[hear] * 2,
        *((join, set_back, wipe, trim) if faults else ()),
    ]
    for _ in range(steps):
        slot.written += rng.randint(0, 2)
        rng.choice(acts)()
    _come_to_rest(owners[0], readers, slot)
    return readers


def _come_to_rest(owner: Owner, readers: list[Reader], slot: Slot) -> None:
    """Let one owner append all that was written, without faults, and everyone read it."""
    while owner.stored < slot.written or owner.head is None:
        if owner.head is None:
            owner.under_way.clear()
            owner.take_over()
        owner.produce()
        owner.deliver()
    while owner.under_way:
        owner.deliver()
    beat = owner.beat
    for reader in readers:
        if beat is None:
            _come_to_rest(owner, readers, slot)
            return
        reader.hear(beat)
