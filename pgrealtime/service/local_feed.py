"""The feed of a process that reads the replication stream itself."""

import asyncio
from functools import partial

from pgrealtime.changes import TableName
from pgrealtime.feed.base import FeedStatus, WantedTables
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.reader import ReplicationReader
from pgrealtime.lsn import LSN
from pgrealtime.service.published_tables import PublicationWatch
from pgrealtime.service.streams import StreamOpener


class LocalFeed:
    """Reader and intake of this process; a ``Feed``. ``wanted`` are the first stream's tables."""

    def __init__(
        self,
        streams: StreamOpener,
        intake: Intake,
        publication: PublicationWatch,
        wanted: WantedTables,
    ) -> None:
        self._streams = streams
        self._intake = intake
        self._publication = publication
        self._wanted = wanted
        self._reader = ReplicationReader(
            partial(streams.open, wanted),
            intake,
            tables=wanted.tables,
            advance_slot=streams.advance_slot,
            is_durable=streams.is_durable,
        )

    @property
    def status(self) -> FeedStatus:
        """How the stream fares at this moment."""
        stream = self._reader.stream
        return FeedStatus(
            is_connected=stream is not None,
            changes_received=self._intake.changes_received,
            breaks=self._reader.stream_breaks,
            slot_name=None if stream is None else stream.slot.name,
        )

    async def run(self) -> None:
        """Read the stream and remove what is old, for ever; see ``ReplicationReader``."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._reader.run())
            group.create_task(self._reader.expire_periodically())

    async def catch_up(self) -> None:
        """Return at once: connections wait for the stream by themselves."""

    async def wait_for_changelog(self, lsn: LSN) -> bool:
        """Wait for an LSN; see ``ReplicationReader.wait_for_changelog``."""
        return await self._reader.wait_for_changelog(lsn)

    async def want(self, wanted: WantedTables) -> None:
        """Read these tables from now on; return when that is so.

        Raises:
            PgRealtimeError: They can't be streamed; the current stream continues.
        """
        await self._streams.check_reopenable(wanted)
        await self._reader.switch(partial(self._streams.open, wanted), wanted.tables)
        self._wanted = wanted

    def append_gap(self, reason: str, tables: frozenset[TableName]) -> None:
        """Append a gap of the tables."""
        self._intake.append_gap(reason, tables)

    async def check_publication(self) -> None:
        """Append a gap of the tables that the publication doesn't send, or sends again."""
        stream = self._reader.stream
        if stream is None or stream.slot.plugin != "pgoutput":
            return
        tables = list(self._wanted.tables.values())
        if changed := await self._publication.find_tables_with_gap(tables):
            self._intake.append_gap("schema", changed)
