"""The feed of a replica that follows a log, and reads the slot for all while it owns that log."""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import msgspec
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg

from pgrealtime import __version__
from pgrealtime.changes import TableName
from pgrealtime.config.model import Config
from pgrealtime.errors import (
    DatabaseUnreachableError,
    LogAwayError,
    LogMessageError,
    PgRealtimeError,
)
from pgrealtime.feed.base import FeedStatus, WantedTables
from pgrealtime.feed.intake import Intake
from pgrealtime.log.beat import PRESENCE_SECONDS, Beat, Presence, decode, encode
from pgrealtime.log.connection import LogNames, connect
from pgrealtime.log.follower import LogFollower
from pgrealtime.log.jetstream import LogStream, stream_config
from pgrealtime.log.owner import Owner
from pgrealtime.log.questions import (
    Answer,
    GapQuestion,
    PositionQuestion,
    Question,
    TablesQuestion,
    decode_answer,
    decode_question,
)
from pgrealtime.log.replicas import Replicas
from pgrealtime.log.tasks import run_together
from pgrealtime.log.union import WantedUnion
from pgrealtime.lsn import LSN
from pgrealtime.observe.metrics import LogValues
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.service.owned_stream import OwnedStream
from pgrealtime.service.published_tables import PublicationWatch
from pgrealtime.service.slot_database import SlotDatabase
from pgrealtime.service.streams import StreamOpener

log = structlog.get_logger(__name__)

_START_RETRY_SECONDS = 0.5
_TABLES_SECONDS = 10.0
"""Between two messages of presence with the wanted tables."""
_POSITION_SECONDS = 1.0
_WANT_SECONDS = 20.0
_GAP_SECONDS = 10.0
"""For finding an owner that appends a gap."""
_GAP_RETRY_SECONDS = 60.0
"""For how long one that refuses is asked again, or none is found."""
_ASK_RETRY_SECONDS = 0.2
_ONE_ASK_SECONDS = 1.0


class LogFeed:
    """A ``Feed``: the follower of the log, and its owner while nobody else is."""

    def __init__(
        self,
        config: Config,
        streams: StreamOpener,
        intake: Intake,
        publication: PublicationWatch,
        pool: QueryPool,
        *,
        wanted: WantedTables,
        tag: str,
        count_connections: Callable[[], int],
    ) -> None:
        self._config = config
        self._intake = intake
        self._database = SlotDatabase(config, pool)
        self._tag = tag
        self._count_connections = count_connections
        self._names = LogNames(name=config.cluster.name)
        self._union = WantedUnion()
        self._replicas = Replicas()
        self._owned = OwnedStream(
            streams, intake, publication, self._database, self._union, wanted=wanted
        )
        self._complete_upto = "", LSN(0)
        """Epoch, and an LSN up to which the changelog has all its commits, as the owner said."""
        self._says_tables = True
        self._background: set[asyncio.Task[None]] = set()
        self._stream: LogStream | None = None
        self.follower: LogFollower | None = None

    @property
    def status(self) -> FeedStatus:
        """How the stream fares at this moment."""
        reader = self._owned.reader
        stream = None if reader is None else reader.stream
        return FeedStatus(
            is_connected=self.follower is not None and self.follower.is_up,
            changes_received=self._intake.changes_received,
            breaks=self._owned.breaks,
            slot_name=None if stream is None else stream.slot.name,
            not_ready_reasons=("log_away",)
            if self.follower is None
            else self.follower.not_ready_reasons,
            log=self._log_values(),
        )

    def _log_values(self) -> LogValues:
        owner, follower = self._owned.owner, self.follower
        writer = None if owner is None else owner.writer
        digests = Counter(each.digest for each in self._replicas.present(time.monotonic()))
        return LogValues(
            is_owner=owner is not None and owner.is_owner,
            taken_count=0 if owner is None else owner.taken_count,
            term=0 if follower is None else follower.reading.term,
            lag_messages=0 if follower is None else follower.lag_messages,
            lag_seconds=0.0 if follower is None else follower.lag_seconds,
            append_seconds=0.0 if writer is None else writer.append_seconds,
            void_count=0 if follower is None else follower.reading.void_count,
            fetched_count=0 if follower is None else follower.fetched,
            replicas=digests,
        )

    # -- running

    async def run(self) -> None:
        """Follow the log, and own it whenever nobody else does, for ever.

        Raises:
            PgRealtimeError: The log or the stream can't be read, and waiting doesn't help.
        """
        await run_together(self._run())

    async def _run(self) -> None:
        config, names = self._config, self._names
        changelog = config.changelog
        limits = stream_config(
            names, config.log, max_age=changelog.max_age, max_bytes=changelog.max_size
        )
        async with connect(
            config.log,
            names,
            client_name=f"pgrealtime {self._tag}",
            on_disconnected=self._on_disconnected,
            on_reconnected=self._on_reconnected,
        ) as client:
            stream = self._stream = LogStream(client, names, limits)
            await self._open(stream)
            follower = self.follower = LogFollower(
                stream,
                self._intake,
                max_bytes=2 * changelog.max_size,
                own_database=await self._own_database(),
                wanted_tables=lambda: self._owned.wanted.tables.keys(),  # noqa: PLW0108 (replaced by want)
                on_fence=lambda term, salt: owner.on_fence(term, salt),  # noqa: PLW0108 (made below)
                on_resigned=lambda: owner.on_resigned(),  # noqa: PLW0108 (made below)
            )
            owner = self._owned.owner = Owner(
                stream,
                follower,
                self._intake,
                self._database,
                self._owned.make_reader,
                config=config.log,
                tag=self._tag,
                rank=lambda: self._replicas.rank(self._tag, time.monotonic()),
                max_pause_seconds=config.replication.max_pause,
                era_bytes=max(1, changelog.max_size // 4),
            )
            await client.subscribe(names.subject("beat"), cb=self._on_beat)
            await client.subscribe(names.subject("node"), cb=self._on_presence)
            await client.subscribe(names.subject("ask"), cb=self._on_question)
            await run_together(
                follower.run(),
                owner.run(),
                self._say_presence(client),
                self._owned.keep_union(),
                self._ask_for_tables(follower),
            )

    async def _own_database(self) -> tuple[str, str]:
        while True:
            try:
                return await self._database.identity()
            except DatabaseUnreachableError:
                await asyncio.sleep(_START_RETRY_SECONDS)

    async def _open(self, stream: LogStream) -> None:
        is_reported = False
        while True:
            try:
                await stream.open()
            except LogAwayError as error:
                if not is_reported:
                    is_reported = True
                    log.warning("log.away", reason=error.message, detail=error.detail or None)
                await asyncio.sleep(_START_RETRY_SECONDS)
            else:
                return

    def _on_disconnected(self) -> None:
        if self._stream is not None:
            self._stream.disconnected()

    def _on_reconnected(self) -> None:
        if self.follower is not None:
            self.follower.reconnected()

    async def _on_beat(self, message: Msg) -> None:
        with suppress(LogMessageError):
            beat = decode(message.data, Beat)
            if self.follower is not None and self._owned.owner is not None:
                self.follower.hear(beat)
                self._owned.owner.on_beat(beat)

    # -- replicas

    async def _say_presence(self, client: Client) -> None:
        said_at = 0.0
        while True:
            now = time.monotonic()
            says_tables = self._says_tables or now - said_at > _TABLES_SECONDS
            if says_tables:
                said_at, self._says_tables = now, False
            if client.is_connected:
                presence = self._presence(says_tables=says_tables)
                await client.publish(self._names.subject("node"), encode(presence))
            await asyncio.sleep(PRESENCE_SECONDS)

    def _presence(self, *, says_tables: bool) -> Presence:
        wanted = self._owned.wanted
        return Presence(
            tag=self._tag,
            program=__version__,
            digest=_digest(self._config, wanted),
            connections=self._count_connections(),
            head_lsn=self._intake.end_lsn,
            tables=tuple(wanted.tables) if says_tables else None,
            record_keys=tuple(wanted.record_keys.items()) if says_tables else (),
        )

    async def _on_presence(self, message: Msg) -> None:
        with suppress(LogMessageError):
            presence, now = decode(message.data, Presence), time.monotonic()
            self._replicas.hear(presence, now)
            if presence.tables is not None:
                self._union.add(presence.tables, now, presence.record_keys)

    # -- questions

    async def _on_question(self, message: Msg) -> None:
        if self._owned.reader is None:
            return  # the owner answers
        with suppress(LogMessageError):
            question = decode_question(message.data)
            task = asyncio.create_task(self._respond(message, question))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _respond(self, message: Msg, question: Question) -> None:
        await message.respond(msgspec.msgpack.encode(await self._owned.answer(question)))

    async def _ask(self, question: Question, seconds: float) -> Answer:
        """Ask the owner, again and again until it answers.

        Raises:
            LogAwayError: There is none in time.
        """
        deadline = time.monotonic() + seconds
        payload = msgspec.msgpack.encode(question)
        while True:
            try:
                if self._owned.reader is not None:
                    return await self._owned.answer(question)
                # Replicas that don't own the log stay silent; so does one that is just dying.
                remaining = max(0.05, deadline - time.monotonic())
                return decode_answer(await self._request(payload, min(remaining, _ONE_ASK_SECONDS)))
            except LogAwayError:
                if time.monotonic() + _ASK_RETRY_SECONDS >= deadline:
                    raise
                await asyncio.sleep(_ASK_RETRY_SECONDS)

    async def _request(self, payload: bytes, seconds: float) -> bytes:
        if self._stream is None:
            raise LogAwayError("there is no connection to NATS")
        answer = await self._stream.request(self._names.subject("ask"), payload, seconds)
        return bytes(answer.data)

    # -- what hub and service ask

    async def catch_up(self) -> None:
        """Return at once: connections wait for the log by themselves."""

    async def wait_for_changelog(self, lsn: LSN) -> bool:
        """Wait for an LSN; see ``ReplicationReader.wait_for_changelog``."""
        follower, era = self.follower, self._intake.era
        if follower is None or era is None:
            return False
        epoch, complete_upto = self._complete_upto
        if self._intake.end_lsn >= lsn or (epoch == era.epoch and complete_upto >= lsn):
            return True
        deadline = time.monotonic() + _POSITION_SECONDS
        try:
            answer = await self._ask(PositionQuestion(lsn), _POSITION_SECONDS)
        except LogAwayError:
            return False
        if answer.error_code:
            return False
        if await follower.wait_for(answer.sequence, deadline - time.monotonic()):
            self._complete_upto = era.epoch, lsn
            return True
        return False

    async def want(self, wanted: WantedTables) -> None:
        """Have the stream carry at least these tables; return when the changelog has them.

        Raises:
            PgRealtimeError: They can't be streamed; the stream is as it was.
        """
        before, self._owned.wanted = self._owned.wanted, wanted
        self._says_tables = True
        try:
            if self._owned.reader is not None:
                await self._owned.switch()
                return
            answer = await self._ask(self._tables_question(), _WANT_SECONDS)
            answer.raise_error()
            if self.follower is not None:
                await self.follower.wait_for(answer.sequence, _WANT_SECONDS)
        except PgRealtimeError:
            self._owned.wanted = before
            raise

    async def _ask_for_tables(self, follower: LogFollower) -> None:
        """Have the owner stream the tables of this replica, which serves nobody before."""
        reported = ""
        while follower.awaits_tables:
            try:
                (await self._ask(self._tables_question(), _WANT_SECONDS)).raise_error()
            except LogAwayError:
                pass
            except PgRealtimeError as error:
                if error.message != reported:
                    reported = error.message
                    log.error("log.tables_refused", code=error.error_code, reason=error.message)  # noqa: TRY400 (of another replica)
            await asyncio.sleep(_START_RETRY_SECONDS)

    def _tables_question(self) -> TablesQuestion:
        wanted = self._owned.wanted
        return TablesQuestion(tuple(wanted.tables), tuple(wanted.record_keys.items()))

    def append_gap(self, reason: str, tables: frozenset[TableName]) -> None:
        """Have the owner append a gap of the tables."""

        async def ask() -> None:
            question = GapQuestion(reason, tuple(sorted(tables)))
            deadline = time.monotonic() + _GAP_RETRY_SECONDS
            while True:
                try:
                    (await self._ask(question, _GAP_SECONDS)).raise_error()
                except PgRealtimeError as error:
                    if time.monotonic() >= deadline:
                        log.error("log.gap_refused", code=error.error_code, reason=error.message)  # noqa: TRY400 (of the owner)
                        return
                    await asyncio.sleep(_START_RETRY_SECONDS)
                else:
                    return

        task = asyncio.create_task(ask())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def check_publication(self) -> None:
        """As the owner: append a gap of the tables that the publication doesn't send."""
        await self._owned.check_publication()


def _digest(config: Config, wanted: WantedTables) -> str:
    """Return a digest of what decides who receives what."""
    text = repr((config.collections, config.auth, sorted(map(str, wanted.tables))))
    return hashlib.blake2s(text.encode(), digest_size=4).hexdigest()
