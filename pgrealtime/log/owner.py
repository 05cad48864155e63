"""Decides which replica reads the slot, and reads it while that is this one.

There is no lease and no clock. An owner beats; without beats others append a fence to the log,
which one of them can, and from then on nothing of the old owner counts, whatever it believes. A
take-over costs a moment, and never a row: where to go on is what the log has.
"""

import asyncio
import math
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple, Protocol

import msgspec
import structlog
from nats.errors import Error as NatsError

from pgrealtime import __version__
from pgrealtime.config.model import LogConfig
from pgrealtime.errors import DatabaseUnreachableError, LogAwayError, PgRealtimeError
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.reader import ReplicationReader
from pgrealtime.log.beat import BEAT_SECONDS, CHANCE_SECONDS, VACANT_SECONDS, Beat, encode
from pgrealtime.log.follower import LogFollower
from pgrealtime.log.jetstream import AppendRefusedError, LogStream
from pgrealtime.log.message import Chain, Kind
from pgrealtime.log.tasks import run_together
from pgrealtime.log.writer import MAX_WAITING_BYTES, LogWriter
from pgrealtime.lsn import LSN, format_lsn

log = structlog.get_logger(__name__)

_TICK_SECONDS = 0.05
_PATIENCE_SECONDS = 1.0
"""After another replica was faster, before this one tries again."""
_RESIGNED_SECONDS = 2.0
"""After this one resigned."""
_RETRY_SECONDS = 0.3
_FENCE_SECONDS = 1.0
"""For the acknowledgement of a fence; whether it was stored, the log says when it is read again."""
_FIRST_CANDIDATES = 5
"""Of so many replicas each tries at once."""
_TIMELINE_SECONDS = 5.0
_OLD_PRIMARY_SECONDS = 30.0
"""Without an owner for so long a primary of an earlier timeline is read: it was restored."""
_HOLD_SECONDS = 10.0
"""An owner whose log doesn't answer goes on beating for so long: it isn't dead."""
_KEEPALIVE_SECONDS = 0.5
_SILENT_SECONDS = 1.5
"""Walsender and pool both silent for so long: the database is away from here."""
_BUSY_SECONDS = 10.0
"""Walsender silent, pool not: it may be decoding a large transaction. Doubled each time."""
_MAX_BUSY_SECONDS = 60.0
"""PostgreSQL's default ``wal_sender_timeout``."""


class SlotPosition(NamedTuple):
    """Where the slot is, and in which history."""

    confirmed_lsn: LSN | None
    """None if there is no slot yet."""
    timeline: int
    """Of the primary."""


class OwnerDatabase(Protocol):
    """What an owner asks of PostgreSQL, apart from the stream."""

    async def slot_position(self) -> SlotPosition:
        """Return the slot's position.

        Raises:
            PgRealtimeError: The database can't be reached, or is no primary.
        """

    async def end_walsender(self) -> None:
        """End the walsender that still reads the slot for an earlier owner, if there is one."""

    async def timeline(self) -> int:
        """Return the primary's timeline; 0 if none is reached."""

    async def is_answering(self, seconds: float) -> bool:
        """Return whether a query is answered within so many seconds."""


class _ResignError(PgRealtimeError):
    """The database isn't heard from here: another replica may hear it."""

    code = "database_unheard"
    retryable = True


class _FencedError(PgRealtimeError):
    """Another replica has begun a term."""

    code = "log_fenced"
    retryable = True


class Owner:
    """Owns the log whenever nobody else does.

    Args:
        stream: Appended to.
        follower: Of this replica; an owner follows the log like all others.
        intake: Of this replica's changelog, which knows the log's era.
        database: Asked for the slot.
        make_reader: Makes a reader that fills an intake; its streams begin at a ``resume_lsn``.
        config: Section ``log``.
        tag: Of this process.
        rank: Returns how many replicas are to try before this one.
        max_pause_seconds: Without an acknowledgement for so long the stream is closed.
        era_bytes: The era is repeated at least after so many bytes of entries.

    Attributes:
        reader: While this replica is the owner.
        writer: Likewise.
        taken_count: How often this process became the owner.
    """

    def __init__(
        self,
        stream: LogStream,
        follower: LogFollower,
        intake: Intake,
        database: OwnerDatabase,
        make_reader: Callable[[Intake, LogWriter], Awaitable[ReplicationReader]],
        *,
        config: LogConfig,
        tag: str,
        rank: Callable[[], int],
        max_pause_seconds: float,
        era_bytes: int,
    ) -> None:
        self.reader: ReplicationReader | None = None
        self.writer: LogWriter | None = None
        self.taken_count = 0
        self._stream = stream
        self._follower = follower
        self._intake = intake
        self._database = database
        self._make_reader = make_reader
        self._config = config
        self._tag = tag
        self._rank = rank
        self._max_pause_seconds = max_pause_seconds
        self._era_bytes = era_bytes
        self._chain: Chain | None = None
        """Of the term that this replica owns, or owned last while the log doesn't answer."""
        self._fence_chain: Chain | None = None
        """Of the last fence of this replica, whether it counts or not."""
        self._fenced = asyncio.Event()
        self._is_resigned = asyncio.Event()
        self._timeline_seen = 0, 0
        """The primary's timeline, and the term for which that was asked."""
        self._patience_until = 0.0
        self._hold_until = 0.0
        self._busy_seconds = _BUSY_SECONDS
        self._is_leaving = False
        """Whether this owner has resigned; its tasks may take seconds to end."""
        self._beats_heard = 0
        self._heard_at = 0.0
        """When the database was last heard."""
        self._reported_code = ""

    @property
    def is_owner(self) -> bool:
        """Whether this replica reads the slot."""
        return self.reader is not None

    # -- what the follower says

    def on_fence(self, term: int, salt: int) -> None:
        """Stop, if another replica has begun a later term; it beats in a moment."""
        if _is_of(self._fence_chain, term, salt):
            return
        self._beats_heard += 1
        self._is_resigned.clear()
        if self._chain is not None and term < self._chain.term:
            return  # the log is read anew
        self._fenced.set()
        if self.reader is None:
            # This one was waiting for the log, or was paused: it is no owner any more.
            self._chain, self._hold_until = None, 0.0

    def on_resigned(self) -> None:
        """Take over at once."""
        self._is_resigned.set()

    def on_beat(self, beat: Beat) -> None:
        """Take note that there is an owner."""
        if beat.is_valid(self._follower.reading.term):
            self._beats_heard += 1
            self._is_resigned.clear()

    # -- running

    async def run(self) -> None:
        """Own the log whenever nobody else does, for ever.

        Raises:
            PgRealtimeError: The slot can't be read, and trying again doesn't help.
        """
        await run_together(self._beat_for_ever(), self._watch_timeline(), self._run_terms())

    async def _run_terms(self) -> None:
        while True:
            vacant_term = await self._until_vacant()
            try:
                await self._own(vacant_term)
            except PgRealtimeError as error:
                self._on_stopped(error)
            await asyncio.sleep(_TICK_SECONDS)

    def _on_stopped(self, error: PgRealtimeError) -> None:
        """Decide what becomes of the ownership, and when to try again.

        Raises:
            PgRealtimeError: Trying again doesn't help.
        """
        if not error.retryable:
            raise error
        now, was_owner = time.monotonic(), self._chain is not None
        pause = _RETRY_SECONDS
        if isinstance(error, _ResignError):
            pause = _RESIGNED_SECONDS
        elif isinstance(error, _FencedError | AppendRefusedError):
            pause = _PATIENCE_SECONDS
        self._patience_until = now + pause
        if isinstance(error, LogAwayError) and not isinstance(error, AppendRefusedError):
            if was_owner and not self._hold_until:
                self._hold_until = now + _HOLD_SECONDS
            elif now >= self._hold_until:
                # Not held again: a replica that alone can't reach the log would keep others off.
                self._chain, self._hold_until = None, 0.0
        else:
            self._chain, self._hold_until = None, 0.0
        if error.error_code != self._reported_code:
            self._reported_code = error.error_code
            if was_owner:
                log.warning("owner.stopped", code=error.error_code, reason=error.message)
            else:
                log.info("owner.waiting", code=error.error_code, reason=error.message)

    async def _until_vacant(self) -> int:
        """Return when there is no owner, with the term that is in force then.

        Counted in ticks: after this process was stopped for a while, what came meanwhile is read
        before the owner counts as silent.
        """
        ticks, heard, needed = 0, self._beats_heard, math.inf
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            is_silent = heard == self._beats_heard and self._stream.is_connected
            ticks, heard = ticks + 1 if is_silent else 0, self._beats_heard
            if ticks == 1:
                needed = self._ticks_of_silence()
            if time.monotonic() < self._patience_until or not self._stream.is_connected:
                continue
            is_mine = self._chain is not None and time.monotonic() < self._hold_until
            is_called = self._is_resigned.is_set() or self._is_outdated()
            if ticks >= needed or is_called or is_mine:
                self._is_resigned.clear()
                return self._follower.reading.term

    def _ticks_of_silence(self) -> float:
        """Return for how many ticks this replica waits for a beat before it takes over."""
        seconds = VACANT_SECONDS + random.uniform(0, CHANCE_SECONDS)  # noqa: S311
        if self._rank() >= _FIRST_CANDIDATES:
            # Of many replicas not all connect to the database at once.
            seconds += _PATIENCE_SECONDS
        return seconds / _TICK_SECONDS

    async def _watch_timeline(self) -> None:
        """Take over from an owner that reads on from an old primary after a failover.

        A new owner has one interval to store its era; until then the log's is the earlier owner's.
        """
        reading, term = self._follower.reading, 0
        while True:
            await asyncio.sleep(_TIMELINE_SECONDS)
            before, term = term, reading.term
            if self._intake.era is not None and not self.is_owner and term == before:
                self._timeline_seen = await self._database.timeline(), term

    def _is_outdated(self) -> bool:
        """Return whether the log's era is of an earlier timeline than this replica's primary."""
        (timeline, term), era = self._timeline_seen, self._intake.era
        return (
            era is not None
            and term == self._follower.reading.term
            and timeline > era.system.timeline
        )

    # -- taking over

    async def _own(self, vacant_term: int) -> None:
        """Take over from the owner of a term and read the slot until something ends that.

        Raises:
            PgRealtimeError: What ended it.
        """
        began = time.monotonic()
        slot = await self._database.slot_position()
        self._check_timeline(slot.timeline)
        connected = time.monotonic()
        chain = await self._fence(vacant_term)
        fenced = time.monotonic()
        start = self._follower.log_head
        if start is None:
            start = slot.confirmed_lsn or LSN(0)
        if self._fenced.is_set():  # paused meanwhile: the walsender is another owner's
            raise _FencedError("another replica has begun a term")
        writer = LogWriter(
            self._stream,
            chain,
            era=self._intake.era,
            start=start,
            stored_upto=lambda: self._follower.log_head or start,
            lag_seconds=self._config.lag,
            max_pause_seconds=self._max_pause_seconds,
            era_bytes=self._era_bytes,
        )
        writer.sequence = self._follower.reading.sequence
        # It beats from here on: others wait while a slow database answers at all.
        self.writer, self._chain, self._hold_until = writer, chain, 0.0
        self._heard_at = connected
        try:
            await self._database.end_walsender()
            self._heard_at = time.monotonic()
            intake = Intake(writer, writer, max_size=MAX_WAITING_BYTES)
            reader = await self._make_reader(intake, writer)
            self.reader, self._heard_at = reader, time.monotonic()
            self.taken_count += 1
            self._reported_code = ""
            log.info(
                "owner.taken",
                term=chain.term,
                lsn=format_lsn(start),
                connect_ms=_ms(connected - began),
                fence_ms=_ms(fenced - connected),
                end_walsender_ms=_ms(self._heard_at - fenced),
            )
            await run_together(
                reader.run(),
                reader.expire_periodically(),
                writer.run(),
                self._watch_database(reader),
                self._watch_fence(),
            )
        except PgRealtimeError as error:
            if self._fenced.is_set():
                # Several things end at once for one that was paused; this one decides what follows.
                raise _FencedError("another replica has begun a term") from error
            raise
        except asyncio.CancelledError:
            await self._resign()
            raise
        finally:
            self.reader = self.writer = None
            self._is_leaving = False

    def _check_timeline(self, timeline: int) -> None:
        """Leave it to others, if this replica still reaches the primary of before a failover.

        Raises:
            DatabaseUnreachableError: So it is, and others may reach the new one.
        """
        era = self._intake.era
        is_old = era is not None and timeline < era.system.timeline
        if is_old and self._follower.seconds_without_beat() < _OLD_PRIMARY_SECONDS:
            raise DatabaseUnreachableError(
                "the database is the primary of before a failover",
                detail=f"Its timeline is {timeline}, and the log has changes of a later one.",
                code="standby",
            )

    async def _fence(self, vacant_term: int) -> Chain:
        """Begin a term; return its chain once the log was read up to the own fence.

        Raises:
            AppendRefusedError: Another replica was faster, or the log changed meanwhile.
            LogAwayError: The log doesn't answer.
        """
        follower, reading = self._follower, self._follower.reading
        await follower.catch_up()
        self._fenced.clear()
        is_own = _is_of(self._fence_chain, reading.term, reading.salt)
        if reading.term > vacant_term and not is_own:
            raise AppendRefusedError("another replica was faster")
        beat = follower.beat
        is_others = beat is not None and beat.tag != self._tag
        term = max(reading.term, beat.term if beat is not None and is_others else 0)
        noted = reading.sequence
        chain = Chain(
            term + 1, noted, salt=secrets.randbits(16), max_payload=self._stream.max_payload
        )
        body = msgspec.msgpack.encode((self._tag, __version__))
        ((after, payload),) = chain.messages(Kind.FENCE, body)
        self._fence_chain = chain
        future = await self._stream.append(payload, after)
        try:
            async with asyncio.timeout(_FENCE_SECONDS):
                sequence = await future
        except TimeoutError:
            raise LogAwayError("the fence isn't acknowledged") from None
        await follower.catch_up()
        if (reading.term, reading.salt) != (chain.term, chain.salt) or sequence != noted + 1:
            raise AppendRefusedError("the fence doesn't count: another owner's precedes it")
        return chain

    # -- while this is the owner

    async def _resign(self) -> None:
        """Let others take over at once. What is unfinished or unacknowledged doesn't matter."""
        self._is_leaving = True
        if self._chain is None or not self._stream.is_connected:
            return
        with suppress(LogAwayError, NatsError):
            for after, payload in self._chain.messages(Kind.RESIGNED, b""):
                await self._stream.append(payload, after)
            await self._stream.client.flush(1)

    async def _watch_fence(self) -> None:
        await self._fenced.wait()
        raise _FencedError("another replica has begun a term")

    async def _watch_database(self, reader: ReplicationReader) -> None:
        """Resign if neither walsender nor pool are heard."""
        while True:
            await asyncio.sleep(_KEEPALIVE_SECONDS)
            stream = reader.stream
            if stream is None:
                continue
            stream.request_keepalive()
            silent = time.monotonic() - stream.last_received_at
            if silent < _SILENT_SECONDS - _KEEPALIVE_SECONDS:
                continue
            if not await self._database.is_answering(_KEEPALIVE_SECONDS):
                if time.monotonic() - stream.last_received_at >= _SILENT_SECONDS - 0.1:
                    await self._resign()
                    raise _ResignError("neither walsender nor pool are heard")
            elif silent > self._busy_seconds:
                self._busy_seconds = min(2 * self._busy_seconds, _MAX_BUSY_SECONDS)
                await self._resign()
                raise _ResignError(f"the walsender has been silent for {silent:.0f} s")

    def beat(self) -> Beat | None:
        """Return what this owner says of itself; None if it is none."""
        chain, writer, reader = self._chain, self.writer, self.reader
        if chain is None or self._is_leaving:
            return None
        if writer is None and time.monotonic() > self._hold_until:
            return None
        stream = None if reader is None else reader.stream
        if stream is not None:
            self._heard_at = stream.last_received_at
        return Beat(
            term=chain.term,
            salt=chain.salt,
            tag=self._tag,
            sequence=0 if writer is None else writer.sequence,
            head_lsn=LSN(0) if writer is None else writer.stored_lsn,
            wal_end=LSN(0) if stream is None else stream.wal_end,
            deaf_seconds=time.monotonic() - self._heard_at,
            is_streaming=stream is not None,
        )

    async def _beat_for_ever(self) -> None:
        subject = self._stream.names.subject("beat")
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            beat = self.beat()
            if beat is not None and self._stream.is_connected:
                with suppress(NatsError):  # it is just closing, or its buffer is full
                    await self._stream.client.publish(subject, encode(beat))


def _is_of(chain: Chain | None, term: int, salt: int) -> bool:
    """Return whether a fence is the chain's."""
    return chain is not None and (term, salt) == (chain.term, chain.salt)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
