"""Watches whether pgoutput's publication still sends every change of the streamed tables."""

from collections.abc import Collection

import psycopg
import structlog

from pgrealtime.catalog.model import Table
from pgrealtime.changes import TableName
from pgrealtime.errors import SetupError
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.wal.publication import Publication, check_publication, tables_not_fully_published
from pgrealtime.wal.slot import read_publication

log = structlog.get_logger(__name__)


class PublicationWatch:
    """Compares a publication with the streamed tables, and logs what is wrong with it."""

    def __init__(self, pool: QueryPool, publication: str) -> None:
        self._pool = pool
        self._publication = publication
        self._incomplete: frozenset[TableName] = frozenset()

    async def find_tables_with_gap(self, tables: Collection[Table]) -> frozenset[TableName]:
        """Return the tables with a gap: those that became incomplete, or complete again.

        Also a table that is complete again has a gap, for clients that loaded it in between.
        Nothing if PostgreSQL doesn't answer.
        """
        try:
            async with self._pool.connection() as connection:
                publication = await read_publication(connection, self._publication)
                server_version = connection.info.server_version
        except psycopg.Error:
            return frozenset()
        before, self._incomplete = self._incomplete, tables_not_fully_published(publication, tables)
        if self._incomplete == before:
            return frozenset()
        self._log_problems(publication, tables, server_version)
        return before | self._incomplete

    def _log_problems(
        self, publication: Publication | None, tables: Collection[Table], server_version: int
    ) -> None:
        try:
            check_publication(self._publication, publication, tables, server_version)
        except SetupError as error:
            log.error(  # noqa: TRY400 (the traceback says nothing more)
                "publication.rejected", reason=error.message, detail=error.detail, hint=error.hint
            )
