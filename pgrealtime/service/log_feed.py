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
from nats.aio.subscription import Subscription

from pgrealtime import __version__
from pgrealtime.catalog.record_ids import with_record_key
from pgrealtime.changes import TableName
from pgrealtime.config.model import Config
from pgrealtime.errors import (
    DatabaseUnreachableError,
    LogAwayError,
    LogMessageError,
    PgRealtimeError,
    SetupError,
)
from pgrealtime.feed.base import FeedStatus, WantedTables
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.reader import ReplicationReader
from pgrealtime.log.beat import GONE_SECONDS, PRESENCE_SECONDS, Beat, Presence, decode, encode
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
    refusal,
)
from pgrealtime.log.tasks import run_together
from pgrealtime.log.union import WantedUnion
from pgrealtime.log.writer import LogWriter
from pgrealtime.lsn import LSN
from pgrealtime.observe.metrics import LogValues
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.service.published_tables import PublicationWatch
from pgrealtime.service.slot_database import SlotDatabase
from pgrealtime.service.streams import StreamOpener

log = structlog.get_logger(__name__)

_START_RETRY_SECONDS = 0.5
_PROBE_SECONDS = 5.0
_TABLES_SECONDS = 10.0
"""Between two messages of presence with the wanted tables."""
_UNION_SECONDS = 5.0
_POSITION_SECONDS = 1.0
_WANT_SECONDS = 20.0
_GAP_SECONDS = 10.0
"""For finding an owner that appends a gap."""
_SAME_GAP_SECONDS = 5.0
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
        self._streams = streams
        self._intake = intake
        self._publication = publication
        self._wanted = wanted
        self._streamed = wanted
        """What the owner's stream carries, while this is the owner."""
        self._database = SlotDatabase(config, pool)
        self._tag = tag
        self._count_connections = count_connections
        self._names = LogNames(name=config.cluster.name)
        self._breaks = Counter[str]()
        self._union = WantedUnion()
        self._replicas: dict[str, tuple[float, Presence]] = {}
        """By tag: when a replica was last heard, and what it said."""
        self._gaps: dict[tuple[str, frozenset[TableName]], float] = {}
        self._complete_upto = "", LSN(0)
        """Epoch, and an LSN up to which the changelog has all its commits, as the owner said."""
        self._says_tables = True
        self._owner_intake: Intake | None = None
        self._asked: Subscription | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._stream: LogStream | None = None
        self.follower: LogFollower | None = None
        self.owner: Owner | None = None

    @property
    def status(self) -> FeedStatus:
        """How the stream fares at this moment."""
        reader = None if self.owner is None else self.owner.reader
        stream = None if reader is None else reader.stream
        return FeedStatus(
            is_connected=self.follower is not None and self.follower.is_up,
            changes_received=self._intake.changes_received,
            breaks=self._breaks,
            slot_name=None if stream is None else stream.slot.name,
            not_ready_reasons=("log_away",)
            if self.follower is None
            else self.follower.not_ready_reasons,
            log=self._log_values(),
        )

    def _log_values(self) -> LogValues:
        owner, follower = self.owner, self.follower
        writer = None if owner is None else owner.writer
        digests = Counter(presence.digest for presence in self.replicas())
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
                wanted_tables=lambda: self._wanted.tables.keys(),  # noqa: PLW0108 (replaced by want)
                on_fence=lambda term, salt: owner.on_fence(term, salt),  # noqa: PLW0108 (made below)
                on_resigned=lambda: owner.on_resigned(),  # noqa: PLW0108 (made below)
            )
            owner = self.owner = Owner(
                stream,
                follower,
                self._intake,
                self._database,
                self._make_reader,
                config=config.log,
                tag=self._tag,
                rank=self._rank,
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
                self._keep_union(),
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
            if self.follower is not None and self.owner is not None:
                self.follower.hear(beat)
                self.owner.on_beat(beat)

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
        wanted = self._wanted
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
            self._replicas[presence.tag] = now, presence
            if presence.tables is not None:
                self._union.add(presence.tables, now, presence.record_keys)

    def replicas(self) -> list[Presence]:
        """Return what the replicas said that are there."""
        now = time.monotonic()
        self._replicas = {
            tag: said for tag, said in self._replicas.items() if now - said[0] < GONE_SECONDS
        }
        return [presence for _, presence in self._replicas.values()]

    def _rank(self) -> int:
        """Return how many replicas with a lower tag there are."""
        return sum(presence.tag < self._tag for presence in self.replicas())

    # -- tables

    async def _wanted_by_all(self) -> WantedTables:
        """Return the tables of all replicas, as far as they are there and can be streamed."""
        own = self._wanted
        others = self._union.tables(time.monotonic()) - own.tables.keys()
        found = await self._database.read_tables(frozenset(others))
        keys = self._union.record_keys(found)
        named = {n: with_record_key(table, keys.get(n, ())) for n, table in found.items()}
        usable = {
            name: table
            for name, table in named.items()
            if (table.replica_identity_columns or table.has_digest_id) and not table.is_unlogged
        }
        return WantedTables(
            tables={**own.tables, **usable},
            record_keys={**self._union.record_keys(usable), **own.record_keys},
        )

    async def _make_reader(self, intake: Intake, writer: LogWriter) -> ReplicationReader:
        if self._intake.era is not None:
            # What an earlier owner streamed is wanted until its replicas have said otherwise.
            self._union.add(self._intake.era.tables, time.monotonic())
        wanted = self._streamed = await self._wanted_by_all()
        self._owner_intake = intake
        reader = ReplicationReader(
            lambda: self._streams.open(wanted, writer.resume_lsn),
            intake,
            tables=wanted.tables,
            advance_slot=self._streams.advance_slot,
            is_durable=True,
        )
        # Counted as long as the process lives, whoever reads.
        reader.stream_breaks = self._breaks
        return reader

    async def _keep_union(self) -> None:
        """While this is the owner: stream what replicas want, and no longer what none does."""
        while True:
            await asyncio.sleep(_UNION_SECONDS)
            if self.owner is None or self.owner.reader is None:
                continue
            try:
                wanted = await self._wanted_by_all()
                if wanted.tables.keys() != self._streamed.tables.keys():
                    await self._switch(wanted)
            except PgRealtimeError as error:
                log.warning("log.tables_refused", code=error.error_code, reason=error.message)

    async def _switch(self, wanted: WantedTables) -> None:
        reader = None if self.owner is None else self.owner.reader
        writer = None if self.owner is None else self.owner.writer
        if reader is None or writer is None:
            raise LogAwayError("this replica doesn't own the log any more")
        await self._streams.check_reopenable(wanted)
        await reader.switch(lambda: self._streams.open(wanted, writer.resume_lsn), wanted.tables)
        self._streamed = wanted

    # -- questions

    async def _on_question(self, message: Msg) -> None:
        if self.owner is None or self.owner.reader is None:
            return  # the owner answers
        with suppress(LogMessageError):
            question = decode_question(message.data)
            task = asyncio.create_task(self._respond(message, question))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _respond(self, message: Msg, question: Question) -> None:
        await message.respond(msgspec.msgpack.encode(await self._answer(question)))

    async def _answer(self, question: Question) -> Answer:
        """Answer as the owner."""
        owner = self.owner
        if owner is None or owner.reader is None or owner.writer is None:
            return refusal(LogAwayError("this replica doesn't own the log"))
        writer = owner.writer
        try:
            match question:
                case PositionQuestion(lsn=lsn):
                    if not await owner.reader.wait_for_changelog(lsn):
                        raise LogAwayError("the stream has not reached that position")
                case TablesQuestion():
                    await self._stream_too(question)
                case GapQuestion():
                    self._append_gap_once(question.reason, frozenset(question.tables))
            async with asyncio.timeout(_POSITION_SECONDS):
                await writer.wait_stored()
        except PgRealtimeError as error:
            return refusal(error)
        except TimeoutError:
            return refusal(LogAwayError("the log doesn't acknowledge"))
        return Answer(sequence=writer.sequence)

    async def _stream_too(self, question: TablesQuestion) -> None:
        self._union.add(question.tables, time.monotonic(), question.record_keys)
        wanted = await self._wanted_by_all()
        if missing := set(question.tables) - wanted.tables.keys():
            raise SetupError(
                f'table "{min(missing)}" can\'t be streamed',
                detail="The replica that owns the log doesn't find it, or it has no replica"
                " identity.",
                code="table_not_streamable",
            )
        if wanted.tables.keys() != self._streamed.tables.keys():
            await self._switch(wanted)

    def _append_gap_once(self, reason: str, tables: frozenset[TableName]) -> None:
        now = time.monotonic()
        before = self._gaps.get((reason, tables), -_SAME_GAP_SECONDS)
        self._gaps[reason, tables] = now
        if now - before >= _SAME_GAP_SECONDS and self._owner_intake is not None:
            self._owner_intake.append_gap(reason, tables)

    async def _ask(self, question: Question, seconds: float) -> Answer:
        """Ask the owner, again and again until it answers.

        Raises:
            LogAwayError: There is none in time.
        """
        deadline = time.monotonic() + seconds
        payload = msgspec.msgpack.encode(question)
        while True:
            try:
                if self.owner is not None and self.owner.is_owner:
                    return await self._answer(question)
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
        before, self._wanted = self._wanted, wanted
        self._says_tables = True
        try:
            if self.owner is not None and self.owner.is_owner:
                await self._switch(await self._wanted_by_all())
                return
            answer = await self._ask(self._tables_question(), _WANT_SECONDS)
            answer.raise_error()
            if self.follower is not None:
                await self.follower.wait_for(answer.sequence, _WANT_SECONDS)
        except PgRealtimeError:
            self._wanted = before
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
        wanted = self._wanted
        return TablesQuestion(tuple(wanted.tables), tuple(wanted.record_keys.items()))

    def append_gap(self, reason: str, tables: frozenset[TableName]) -> None:
        """Have the owner append a gap of the tables."""

        async def ask() -> None:
            with suppress(LogAwayError):
                await self._ask(GapQuestion(reason, tuple(sorted(tables))), _GAP_SECONDS)

        task = asyncio.create_task(ask())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def check_publication(self) -> None:
        """As the owner: append a gap of the tables that the publication doesn't send."""
        reader = None if self.owner is None else self.owner.reader
        stream = None if reader is None else reader.stream
        if stream is None or stream.slot.plugin != "pgoutput":
            return
        tables = list(self._streamed.tables.values())
        if changed := await self._publication.find_tables_with_gap(tables):
            self._append_gap_once("schema", changed)


def _digest(config: Config, wanted: WantedTables) -> str:
    """Return a digest of what decides who receives what."""
    text = repr((config.collections, config.auth, sorted(map(str, wanted.tables))))
    return hashlib.blake2s(text.encode(), digest_size=4).hexdigest()
