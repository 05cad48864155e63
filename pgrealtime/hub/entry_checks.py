"""Holds entries of the changelog back until they may be evaluated; called by the dispatcher."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from pgrealtime.changelog.memory import Entry
from pgrealtime.changes import Transaction
from pgrealtime.errors import PgRealtimeError
from pgrealtime.hub.state.progress import DispatchProgress
from pgrealtime.hub.state.visibility import VisibilityTracker
from pgrealtime.rule_queries.executor import QueryExecutor

log = structlog.get_logger(__name__)

_SCHEMA_TIMEOUT_SECONDS = 5.0
"""How long entries wait for the schema to be read; the same as for their visibility."""
_CATALOG_RETRY_SECONDS = 1.0
"""Between two queries of the catalogue if the first failed."""


@dataclass(eq=False)
class EntryChecks:
    """Decides which entries may be evaluated with the generation in force."""

    executor: QueryExecutor
    progress: DispatchProgress
    visibility: VisibilityTracker
    refresh_schema: Callable[[], Awaitable[bool]] | None
    waits_for_visibility: bool = False
    """Whether entries wait until their transactions are visible. With synchronous standbys a commit
    is in the WAL before it is visible."""

    async def leading_valid(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Return the first of the entries, those whose rows have the shape that the catalogue says.

        If the very first entry has not, the catalogue is read, and that entry alone is returned:
        then its rows are evaluated by the new schema, or become a gap. The caller must check the
        revision, for another generation may be in force on return.
        """
        revision, generation = self.progress.revision, self.progress.generation
        shapes, definitions = generation.shape_checker, generation.catalog_assumptions
        if self.waits_for_visibility:
            await self.visibility.wait_for_entries(entries)
            if self.progress.revision != revision:
                return entries
        # After the wait: what a visible transaction altered is in the catalogue that is read here.
        holds = await self._verify_assumptions(entries)
        if self.progress.revision != revision:
            return entries
        for index, entry in enumerate(entries):
            if not isinstance(entry, Transaction):
                continue
            is_stale = not holds and definitions.assumptions_for([entry]) is not None
            if not (is_stale or shapes.needs_catalog_read(entry)):
                continue
            if index:
                # These go first, by the generation in force: reading the schema may replace it.
                return entries[:index]
            # The rows may have been committed together with what altered their table.
            await self.visibility.wait_until_visible([entry.xid])
            is_read = await self._read_schema()
            shapes.decide_without_waiting(entry, is_catalog_read=is_read, is_catalog_stale=is_stale)
            return entries[:1]
        return entries

    async def _read_schema(self) -> bool:
        if self.refresh_schema is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_SCHEMA_TIMEOUT_SECONDS):
                    return await self.refresh_schema()
        return False

    async def _verify_assumptions(self, entries: Sequence[Entry]) -> bool:
        """Whether tables still are what the generation assumes, where the stream doesn't say.

        Returns only once the catalogue has answered, or another revision is in force.
        """
        revision = self.progress.revision
        assumptions = self.progress.generation.catalog_assumptions.assumptions_for(entries)
        while assumptions is not None and self.progress.revision == revision:
            try:
                return await self.executor.verify_assumptions(assumptions)
            except Exception as error:  # noqa: BLE001 (nothing may be delivered before)
                reason = error.message if isinstance(error, PgRealtimeError) else repr(type(error))
                log.warning("definitions.unknown", error=reason)
                await asyncio.sleep(_CATALOG_RETRY_SECONDS)
        return True
