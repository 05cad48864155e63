"""The stream that a replica reads for all of them while it owns the log.

Which tables it carries, and what the owner answers to the others. ``service.log_feed`` has one.
"""

import asyncio
import math
import time
from collections import Counter

import structlog

from pgrealtime.catalog.record_ids import with_record_key
from pgrealtime.changes import TableName
from pgrealtime.errors import LogAwayError, PgRealtimeError, SetupError
from pgrealtime.feed.base import WantedTables
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.reader import ReplicationReader
from pgrealtime.log.owner import Owner
from pgrealtime.log.questions import (
    Answer,
    GapQuestion,
    PositionQuestion,
    Question,
    TablesQuestion,
    refusal,
)
from pgrealtime.log.union import WantedUnion
from pgrealtime.log.writer import LogWriter
from pgrealtime.service.published_tables import PublicationWatch
from pgrealtime.service.slot_database import SlotDatabase
from pgrealtime.service.streams import StreamOpener

log = structlog.get_logger(__name__)

_UNION_SECONDS = 5.0
"""Between two looks at what tables the replicas want."""
_STORED_SECONDS = 1.0
"""For the log to acknowledge what an answer is about."""
_SAME_GAP_SECONDS = 5.0
"""In which all replicas ask for a gap that each of them has noticed."""


class OwnedStream:
    """The stream of this replica, while ``owner`` says that it is the owner.

    Args:
        streams: Opens it.
        intake: Of this replica's changelog, which knows the log's era.
        publication: Says what it sends.
        database: Asked for the tables of the others.
        union: What all replicas want.
        wanted: What this one wants first.

    Attributes:
        owner: None until there is a connection to the log.
        wanted: What this replica wants.
        breaks: Streams that broke, by error code, whoever read them.
    """

    def __init__(
        self,
        streams: StreamOpener,
        intake: Intake,
        publication: PublicationWatch,
        database: SlotDatabase,
        union: WantedUnion,
        *,
        wanted: WantedTables,
    ) -> None:
        self.owner: Owner | None = None
        self.wanted = wanted
        self.breaks = Counter[str]()
        self._streams = streams
        self._intake = intake
        self._publication = publication
        self._database = database
        self._union = union
        self._streamed = wanted
        """What the stream carries."""
        self._appended: Intake | None = None
        """Where the reader appends."""
        self._gaps: dict[tuple[str, frozenset[TableName]], float] = {}
        """When this owner appended a gap last."""
        self._switching = asyncio.Lock()
        """Held from the question what all want to the switch to it."""

    @property
    def reader(self) -> ReplicationReader | None:
        """The stream's reader; None if this replica isn't the owner."""
        return None if self.owner is None else self.owner.reader

    async def make_reader(self, intake: Intake, writer: LogWriter) -> ReplicationReader:
        """Return a reader that fills the intake from where the log ends."""
        if self._intake.era is not None:
            # What an earlier owner streamed is wanted until its replicas have said otherwise.
            self._union.add(self._intake.era.tables, time.monotonic())
        wanted = self._streamed = await self._wanted_by_all()
        self._appended = intake
        self._gaps.clear()  # those of an earlier term may not have been stored
        reader = ReplicationReader(
            lambda: self._streams.open(wanted, writer.resume_lsn),
            intake,
            tables=wanted.tables,
            advance_slot=self._streams.advance_slot,
            is_durable=True,
        )
        # Counted as long as the process lives, whoever reads.
        reader.stream_breaks = self.breaks
        return reader

    # -- tables

    async def keep_union(self) -> None:
        """Stream what replicas want, and no longer what none does, for ever."""
        while True:
            await asyncio.sleep(_UNION_SECONDS)
            if self.reader is None:
                continue
            try:
                async with self._switching:
                    wanted = await self._wanted_by_all()
                    if not self._has_same_tables(wanted):
                        await self._switch(wanted)
            except PgRealtimeError as error:
                log.warning("log.tables_refused", code=error.error_code, reason=error.message)

    async def switch(self) -> None:
        """Stream what replicas want, as their tables are now.

        Raises:
            PgRealtimeError: It can't be streamed; the stream is as it was.
        """
        async with self._switching:
            await self._switch(await self._wanted_by_all())

    async def _wanted_by_all(self) -> WantedTables:
        """Return the tables of all replicas, as far as they are there and can be streamed."""
        own = self.wanted
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

    async def _switch(self, wanted: WantedTables) -> None:
        reader = self.reader
        writer = None if self.owner is None else self.owner.writer
        if reader is None or writer is None:
            raise LogAwayError("this replica doesn't own the log any more")
        await self._streams.check_reopenable(wanted)
        await reader.switch(lambda: self._streams.open(wanted, writer.resume_lsn), wanted.tables)
        self._streamed = wanted

    async def check_publication(self) -> None:
        """Append a gap of the tables that the publication doesn't send."""
        stream = None if self.reader is None else self.reader.stream
        if stream is None or stream.slot.plugin != "pgoutput":
            return
        tables = list(self._streamed.tables.values())
        if changed := await self._publication.find_tables_with_gap(tables):
            self._append_gap("schema", changed)

    # -- questions

    async def answer(self, question: Question) -> Answer:
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
            async with asyncio.timeout(_STORED_SECONDS):
                await writer.wait_stored()
        except PgRealtimeError as error:
            return refusal(error)
        except TimeoutError:
            return refusal(LogAwayError("the log doesn't acknowledge"))
        return Answer(sequence=writer.sequence)

    async def _stream_too(self, question: TablesQuestion) -> None:
        self._union.add(question.tables, time.monotonic(), question.record_keys)
        async with self._switching:
            wanted = await self._wanted_by_all()
            if missing := set(question.tables) - wanted.tables.keys():
                raise SetupError(
                    f'table "{min(missing)}" can\'t be streamed',
                    detail="The replica that owns the log doesn't find it, or it has no replica"
                    " identity.",
                    code="table_not_streamable",
                )
            if not self._has_same_tables(wanted):
                await self._switch(wanted)

    def _has_same_tables(self, wanted: WantedTables) -> bool:
        streamed = self._streamed
        are_same_keys = dict(wanted.record_keys) == dict(streamed.record_keys)
        return wanted.tables.keys() == streamed.tables.keys() and are_same_keys

    def _append_gap_once(self, reason: str, tables: frozenset[TableName]) -> None:
        """Append a gap that each replica asks for, when the first one does."""
        before = self._gaps.get((reason, tables), -math.inf)
        if time.monotonic() - before >= _SAME_GAP_SECONDS:
            self._append_gap(reason, tables)

    def _append_gap(self, reason: str, tables: frozenset[TableName]) -> None:
        if self._appended is not None:
            self._appended.append_gap(reason, tables)
            self._gaps[reason, tables] = time.monotonic()
