"""Reads the log by the rule and applies what counts to this replica's changelog.

Every replica has one, the owner's too. Messages come republished as they are stored; what is
missing is asked for by its sequence, at the start, after a break, and when they came faster than
they were read.
"""

import asyncio
import math
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import suppress
from datetime import datetime

import structlog

from pgrealtime.changelog.memory import Gap
from pgrealtime.changes import TableName
from pgrealtime.errors import FrameError, LogAwayError, PgRealtimeError
from pgrealtime.feed.frames import EntriesFrame, EraFrame
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.wire import FrameDecoder
from pgrealtime.history import Era
from pgrealtime.log.beat import AWAY_SECONDS, Beat
from pgrealtime.log.jetstream import LogStream, StoredMessage, StreamState
from pgrealtime.log.message import Kind
from pgrealtime.log.reading import LogReading, Taken, Verdict
from pgrealtime.log.tasks import run_together
from pgrealtime.lsn import LSN, format_lsn

log = structlog.get_logger(__name__)

_GETS_UNDER_WAY = 50
_RETRY_SECONDS = 0.02
"""Until a copy of the stream that lags is asked again."""
_WATCH_SECONDS = 0.1
_UNKNOWN = "?"
"""No message's time: so the stream is read anew."""


class LogFollower:
    """Keeps a changelog filled from the log.

    Args:
        stream: Read.
        intake: Of this replica's changelog and hub.
        max_bytes: Of a body in parts.
        own_database: System identifier and name of the database that this replica asks.
        wanted_tables: Returns the tables of this replica's collections.
        on_fence: Called with each term that begins.
        on_resigned: Called when the owner says that others may take over.

    Attributes:
        log_head: End of the last entry of this log; None if it has none.
        fetched: Messages that were asked for.
        error_code: Why the log can't be used: ``log_newer``, ``log_foreign``; or empty.
    """

    def __init__(
        self,
        stream: LogStream,
        intake: Intake,
        *,
        max_bytes: int,
        own_database: tuple[str, str],
        wanted_tables: Callable[[], AbstractSet[TableName]] = frozenset,
        on_fence: Callable[[int, int], None] = lambda _term, _salt: None,
        on_resigned: Callable[[], None] = lambda: None,
    ) -> None:
        self.reading = LogReading(max_bytes=max_bytes)
        self.log_head: LSN | None = None
        self.fetched = 0
        self.error_code = ""
        self._stream = stream
        self._intake = intake
        self._own_database = own_database
        self._wanted_tables = wanted_tables
        self._awaits_tables = True
        self._on_fence = on_fence
        self._on_resigned = on_resigned
        self._decoder = FrameDecoder()
        self._lock = asyncio.Lock()
        """Held by whoever reads on: the subscription, or a catch-up."""
        self._has_begun = False
        self._last_stored_at = ""
        self._is_skipping = False
        """Whether entries belong to a history that was left already: the log is read anew."""
        self._epochs: set[str] = set()
        """Of the history that is read."""
        self._left_epochs: set[str] = set()
        """Of histories that were read before."""
        self._gap_reason = "slot_lost"
        self._differing_count = 0
        """How often in a row what was read differed from a beat; after the first time, holes are
        passed."""
        self._must_catch_up = asyncio.Event()
        self._progressed = asyncio.Event()
        self._is_up = False
        self._streaming_at = -math.inf
        """When the owner last said that the stream is open."""
        self._is_caught_up = False
        self._caught_up_at = time.monotonic()
        self._beat: Beat | None = None
        self._beat_at = -math.inf

    # -- what others ask

    @property
    def is_up(self) -> bool:
        """Whether the stream is being read by some owner, as the hub was told."""
        return self._is_up

    @property
    def awaits_tables(self) -> bool:
        """Whether the log has not had all tables of this replica since it started.

        Until then it serves nobody: changes of them would be missed. Tables that it wants later
        are awaited before its collections use them.
        """
        era = self._intake.era
        if self._awaits_tables and era is not None:
            self._awaits_tables = not self._wanted_tables() <= set(era.tables)
        return self._awaits_tables

    @property
    def beat(self) -> Beat | None:
        """The owner's last valid beat; None if it is too old to show an owner."""
        return self._beat

    def seconds_without_beat(self) -> float:
        """Return how long no owner was heard."""
        return time.monotonic() - self._beat_at

    @property
    def lag_messages(self) -> int:
        """Messages that the owner knows to be stored and this replica hasn't read."""
        return 0 if self._beat is None else max(0, self._beat.sequence - self.reading.sequence)

    @property
    def lag_seconds(self) -> float:
        """Seconds since this replica had read everything."""
        return time.monotonic() - self._caught_up_at if self.lag_messages else 0.0

    @property
    def not_ready_reasons(self) -> tuple[str, ...]:
        """Why this replica can't serve new clients as well as others can."""
        if not self._stream.is_connected:
            return ("log_away",)
        reasons = [self.error_code] if self.error_code else []
        if self.seconds_without_beat() > AWAY_SECONDS:
            reasons.append("owner_away")
        elif not self._is_caught_up:
            reasons.append("catching_up")
        elif self.awaits_tables:
            reasons.append("tables_awaited")
        return tuple(reasons)

    def hear(self, beat: Beat) -> None:
        """Take a beat; one of an earlier term says nothing."""
        if not beat.is_valid(self.reading.term):
            return
        self._beat, self._beat_at = beat, time.monotonic()

    def _compare(self, beat: Beat) -> None:
        """Compare what was read with what the owner said a moment ago; look again if it differs."""
        reading = self.reading
        if reading.sequence < beat.sequence:
            self._must_catch_up.set()
        elif reading.is_joined and not self._lock.locked():
            is_other = (reading.term, reading.salt) != (beat.term, beat.salt)
            if is_other and reading.term > beat.term:
                return  # it was fenced since
            if is_other or (self.log_head or 0) < beat.head_lsn:
                log.warning("log.differs", term=reading.term, beat=beat.term)
                self._differing_count += 1
                self._last_stored_at = _UNKNOWN
                self._must_catch_up.set()
            else:
                self._is_caught_up, self._differing_count = True, 0
                self._caught_up_at = time.monotonic()

    def reconnected(self) -> None:
        """Look what was missed; the stream may be another one."""
        self._must_catch_up.set()

    async def wait_for(self, sequence: int, seconds: float) -> bool:
        """Wait until a message was read; return whether it was."""
        deadline = time.monotonic() + seconds
        while self.reading.sequence < sequence:
            self._progressed.clear()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._progressed.wait()
            except TimeoutError:
                return False
        return True

    # -- running

    async def run(self) -> None:
        """Follow the log for ever."""
        await self._stream.follow(self._on_live)
        self._must_catch_up.set()
        await run_together(self._keep_caught_up(), self._watch())

    async def _keep_caught_up(self) -> None:
        while True:
            await self._must_catch_up.wait()
            self._must_catch_up.clear()
            try:
                await self.catch_up()
            except LogAwayError:
                await asyncio.sleep(_WATCH_SECONDS)
                self._must_catch_up.set()

    async def _watch(self) -> None:
        """Tell the hub whether there is a stream, and trim the changelog."""
        earlier: Beat | None = None
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            if earlier is not None:
                self._compare(earlier)
            earlier = self._beat if self.seconds_without_beat() < AWAY_SECONDS else None
            now = time.monotonic()
            self._intake.expire(now)
            beat = self._beat
            is_heard = beat is not None and now - self._beat_at < AWAY_SECONDS
            is_streaming = is_heard and beat is not None and beat.is_streaming
            if is_streaming:
                self._streaming_at = now
            is_served = not self.error_code and not self.awaits_tables
            is_up = is_served and (
                is_streaming or (self._is_up and now - self._streaming_at < AWAY_SECONDS)
            )
            if self._intake.era is None or is_up == self._is_up:
                continue
            self._is_up = is_up
            if is_up:
                self._intake.start_era(self._intake.era)
            else:
                self._intake.lose_stream()

    # -- reading

    async def _on_live(self, message: StoredMessage) -> None:
        async with self._lock:
            if not self._has_begun:
                return
            if message.sequence <= self.reading.sequence:
                # Fetched before it came, or of a stream that was made anew.
                if message.stored_at > self._last_stored_at:
                    self._must_catch_up.set()
                return
            if message.before != self.reading.sequence:
                self._must_catch_up.set()
                with suppress(LogAwayError):
                    await self._fetch(message.before)
            if message.before == self.reading.sequence:
                await self._take(message)

    async def catch_up(self) -> StreamState:
        """Read everything that the stream has; return its state.

        Raises:
            LogAwayError: It can't be read now.
        """
        async with self._lock:
            state = await self._stream.ensure()
            if not await self._continues(state):
                self._read_anew(state)
            if state.first > self.reading.sequence + 1:
                self._skip_to(state.first)
            await self._fetch(state.last)
            return state

    async def _continues(self, state: StreamState) -> bool:
        """Return whether the stream still has what was read of it.

        If it has the last message, it has those before, too: a server loses only ends.
        """
        sequence = self.reading.sequence
        if not self._has_begun or sequence > state.last:
            return False
        if sequence < state.first:
            return True
        message = await self._stream.get(sequence)
        return message is not None and message.stored_at == self._last_stored_at

    def _read_anew(self, state: StreamState) -> None:
        if self._has_begun:
            log.warning("log.read_anew", sequence=self.reading.sequence, last=state.last)
        self._has_begun, self.log_head = True, None
        self.reading.restart(passes_holes=self._differing_count > 1)
        self._is_skipping = False
        if state.first > 1:
            self.reading.skip_to(state.first)

    def _skip_to(self, first: int) -> None:
        """Leave out what the log has dropped before it was read."""
        log.warning("log.passed", sequence=self.reading.sequence, first=first)
        self.reading.skip_to(first)
        self._gap_reason = "expired"

    async def _fetch(self, upto: int) -> None:
        """Ask for the messages up to a sequence, many at once."""
        while self.reading.sequence < upto:
            begin = self.reading.sequence + 1
            end = min(upto, begin + _GETS_UNDER_WAY - 1)
            for message in await self._stream.get_all(range(begin, end + 1)):
                if message is None:
                    break
                self.fetched += 1
                if not await self._take(message):
                    return
                await asyncio.sleep(0)  # a message takes up to some milliseconds
            if self.reading.sequence < begin:
                state = await self._stream.state()
                if state.last < self.reading.sequence:
                    self._must_catch_up.set()
                    return
                if state.first > begin:
                    self._skip_to(state.first)
                else:
                    await asyncio.sleep(_RETRY_SECONDS)

    async def _take(self, message: StoredMessage) -> bool:
        """Read a message; return False if the stream is to be read anew."""
        taken = self.reading.take(message.sequence, message.payload)
        self._last_stored_at = message.stored_at
        if taken.verdict is Verdict.OTHER_LOG:
            self._last_stored_at = _UNKNOWN
            self._must_catch_up.set()
            return False
        if taken.error is not None:
            self._report(taken.error, message.sequence)
        if taken.verdict is Verdict.DAMAGED:
            await self._append_damage()
        if taken.body is not None and taken.head is not None:
            try:
                await self._apply(taken, taken.body, message.stored_at)
            except FrameError as error:
                self._report(error, message.sequence)
                await self._append_damage()
        self._progressed.set()
        return True

    def _report(self, error: PgRealtimeError, sequence: int) -> None:
        if error.error_code == "log_newer":
            self.error_code = "log_newer"
        code = "log_unreadable" if isinstance(error, FrameError) else error.error_code
        log.error("log.unreadable", code=code, reason=error.message, sequence=sequence)

    async def _append_damage(self) -> None:
        if self._intake.era is not None:
            await self._intake.append(Gap(LSN(self._intake.end_lsn + 1), "slot_lost"))
            self._intake.wake()

    # -- applying

    async def _apply(self, taken: Taken, body: bytes, stored_at: str) -> None:
        assert taken.head is not None
        match taken.head.kind:
            case Kind.FENCE:
                if self.error_code == "log_newer":
                    self.error_code = ""
                self._on_fence(taken.head.term, taken.head.salt)
            case Kind.RESIGNED:
                self._beat_at = -math.inf
                self._on_resigned()
            case Kind.ERA | Kind.ENTRIES:
                frame = self._decoder.decode(body)
                if isinstance(frame, EraFrame):
                    self._apply_era(frame)
                elif isinstance(frame, EntriesFrame):
                    await self._apply_entries(frame, stored_at)

    def _apply_era(self, frame: EraFrame) -> None:
        intake, era = self._intake, frame.era
        before = intake.era
        if self._is_foreign(frame):
            return
        self._is_skipping = era.epoch in self._left_epochs
        if self._is_skipping:
            return
        self.log_head = frame.start_lsn
        if era.epoch not in self._epochs and (before is None or _is_restart(frame, before)):
            self._left_epochs |= self._epochs
            self._epochs = {era.epoch}
            intake.restart(frame.start_lsn)
            self._start(frame)
            return
        self._epochs.add(era.epoch)
        if frame.start_lsn > intake.end_lsn:
            # What lies between is in no message any more.
            intake.append_missing(self._gap_reason, frame.start_lsn)
        self._gap_reason = "slot_lost"
        # One that begins earlier was applied, if the log is read anew.
        if era != before and frame.start_lsn >= intake.end_lsn:
            intake.continue_era(era)

    def _is_foreign(self, frame: EraFrame) -> bool:
        """Return whether the log is of another database: nothing of it is applied."""
        system = frame.era.system
        is_foreign = (system.system_id, system.database_name) != self._own_database
        if is_foreign:
            if self.error_code != "log_foreign":
                log.error(
                    "log.foreign",
                    code="log_foreign",
                    reason="the log's owner reads another database",
                    database=system.database_name,
                    hint="Give this cluster another cluster.name.",
                )
            self.error_code, self._is_skipping, self.log_head = "log_foreign", True, None
        elif self.error_code == "log_foreign":
            self.error_code = ""
        return is_foreign

    def _start(self, frame: EraFrame) -> None:
        self._intake.start_era(frame.era)
        self._is_up, self._streaming_at = not self.awaits_tables, time.monotonic()
        if not self._is_up:
            self._intake.lose_stream()
        log.info("log.era", epoch=frame.era.epoch, lsn=format_lsn(frame.start_lsn))

    async def _apply_entries(self, frame: EntriesFrame, stored_at: str) -> None:
        if self._is_skipping or self._intake.era is None:
            return
        intake, appended_at = self._intake, _monotonic_of(stored_at)
        for entry in frame.entries:
            self.log_head = max(self.log_head or LSN(0), entry.end_lsn)
            if entry.end_lsn > intake.end_lsn:
                await intake.append(entry, appended_at)
        intake.wake()


def _is_restart(frame: EraFrame, before: Era) -> bool:
    """Return whether another history begins; the era that said so may have been missed."""
    era = frame.era
    is_same = (era.system, era.restore_count) == (before.system, before.restore_count)
    return frame.is_restart or not is_same


def _monotonic_of(stored_at: str) -> float:
    """Return a server's time as this process's monotonic seconds, at most now."""
    now = time.monotonic()
    try:
        # The server writes nanoseconds.
        stored = datetime.fromisoformat(f"{stored_at[:26].rstrip('Z')}Z")
    except ValueError:
        return now
    return now - max(0.0, time.time() - stored.timestamp())
