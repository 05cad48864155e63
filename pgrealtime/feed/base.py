"""What hub and service ask of a feed, wherever the replication stream is read.

In one process the feed is the reader itself. Where another process reads the stream, the feed
applies what that sends, and passes on what is asked here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import Struct

from pgrealtime.catalog.model import Table
from pgrealtime.changes import TableName
from pgrealtime.lsn import LSN
from pgrealtime.observe.metrics import LogValues
from pgrealtime.wal.assembler import RecordKeys


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedTables:
    """What a stream is to carry."""

    tables: Mapping[TableName, Table]
    """As they are in the schema now."""
    record_keys: RecordKeys = field(default_factory=dict)
    """Columns that name a record, where they aren't the primary key."""


class FeedStatus(Struct, frozen=True, kw_only=True):
    """How the stream fares, for probes and metrics."""

    is_connected: bool
    """Whether it is being read."""
    changes_received: int
    breaks: Mapping[str, int]
    """Streams that broke or couldn't be opened, by error code."""
    slot_name: str | None = None
    """The slot that this process reads; None if it reads none now."""
    not_ready_reasons: tuple[str, ...] = ()
    """Why others serve new clients better, apart from the stream being away."""
    log: LogValues | None = None
    """None without a log."""


class Feed(Protocol):
    """Fills the changelog."""

    @property
    def status(self) -> FeedStatus:
        """How the stream fares at this moment."""

    async def run(self) -> None:
        """Fill the changelog, and remove from it what is old, for ever.

        Raises:
            PgRealtimeError: The stream can't be read, and waiting doesn't help.
        """

    async def catch_up(self) -> None:
        """Return once the changelog can serve connections; ``run`` runs already.

        It may lack a stream, but where it is filled from another process it has what that has.
        """

    async def wait_for_changelog(self, lsn: LSN) -> bool:
        """Wait until the changelog has all commits up to an LSN; return whether it does.

        A second at most; see ``ReplicationReader.wait_for_changelog``.
        """

    async def want(self, wanted: WantedTables) -> None:
        """Have the stream carry at least these tables; return when the changelog has them.

        Nothing is missed or repeated.

        Raises:
            PgRealtimeError: They can't be streamed; the stream is as it was.
        """

    def append_gap(self, reason: str, tables: frozenset[TableName]) -> None:
        """Have a gap of the tables appended: changes of them may be missing up to here.

        Several processes that ask for the same gap at about the same time get one.
        """

    async def check_publication(self) -> None:
        """Append a gap of the tables that the publication doesn't send, or sends again."""
