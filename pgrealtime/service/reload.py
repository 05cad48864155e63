"""Applies another configuration, or another schema, while the service runs: all of it or nothing.

Connections stay open; the events that follow are evaluated with what was applied. Started by
``service.build``; SIGHUP calls ``reload``, and the hub waits for ``wait_for_schema_refresh``.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TypeAlias

import psycopg
import structlog

from pgrealtime.auth.authenticator import issuer_key_problems
from pgrealtime.catalog.model import Catalog, Table
from pgrealtime.catalog.privileges import read_privilege_errors
from pgrealtime.changes import TableName
from pgrealtime.collections.model import Collections
from pgrealtime.collections.names import configured_table_names
from pgrealtime.collections.streamed_tables import collection_name_of, reachable_tables
from pgrealtime.config.load import ParsedConfig
from pgrealtime.config.model import Config
from pgrealtime.errors import ConfigError, PgRealtimeError
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.rules.rule_set import caller_columns_read_by_rules
from pgrealtime.service.applied_config import AppliedConfig, fit_to_schema
from pgrealtime.service.parts import ServiceParts

log = structlog.get_logger(__name__)

_REFRESH_SECONDS = 30.0
"""Between two reads of the catalogue if nothing indicates a change."""
_MIN_REFRESH_SECONDS = 1.0
"""Between two reads of the catalogue, however many mismatches there are."""

_RELOADABLE_SECTIONS = ("collections", "auth", "tests")
"""Sections that a reload applies; the others need a restart."""


class _SchemaRead:
    """One read of the catalogue, which callers may wait for."""

    def __init__(self) -> None:
        self.is_applied = False
        self.completed = asyncio.Event()


async def fit_reloaded(
    parsed: ParsedConfig, running: Config, read_catalog: Callable[[Config], Awaitable[Catalog]]
) -> AppliedConfig:
    """Return the reloadable sections of a configuration, fitted to the current schema.

    The other sections are those of ``running``.

    Raises:
        PgRealtimeError: With every problem found.
    """
    read = parsed.require_valid()
    update = {name: getattr(read, name) for name in _RELOADABLE_SECTIONS}
    config = running.model_copy(update=update)
    applied = fit_to_schema(config, await read_catalog(config))
    if problems := (*applied.problems, *issuer_key_problems(config)):
        raise parsed.locations.locate(ConfigError(problems))
    return applied


def log_rejected(error: PgRealtimeError) -> None:
    """Log all problems of a configuration that was not applied."""
    is_list = isinstance(error, ConfigError)
    problems = error.detail.splitlines() if is_list else [str(error)]
    log.error("config.rejected", code=error.error_code, reason=error.message, problems=problems)


def log_reloaded(read: Config, applied: AppliedConfig, seconds: float) -> None:
    """Log that a configuration was applied, and which sections of it only a restart applies."""
    running = applied.config
    if waiting := [n for n in Config.model_fields if getattr(read, n) != getattr(running, n)]:
        log.warning("config.restart_needed", sections=waiting)
    log.info(
        "config.reloaded",
        collections=len(applied.collections),
        duration_ms=round(seconds * 1000),
    )


class Reloader:
    """Keeps the applied configuration in step with its file and with the schema.

    Args:
        applied: In force at the start.
        parts: Receive what is applied.
        read_config: Reads the configuration again.
        read_catalog: Reads the tables that a configuration names.
        schema_mismatch: Set by any part that met a row or a rule that doesn't fit the catalogue.
    """

    def __init__(
        self,
        applied: AppliedConfig,
        parts: ServiceParts,
        *,
        read_config: Callable[[], ParsedConfig],
        read_catalog: Callable[[Config], Awaitable[Catalog]],
        schema_mismatch: asyncio.Event,
    ) -> None:
        self._applied = applied
        self._parts = parts
        self._read_config = read_config
        self._read_catalog = read_catalog
        self._schema_mismatch = schema_mismatch
        self._streamed_tables = applied.streamed_tables
        """Of the current stream; differs from ``applied`` while the stream can't be switched."""
        self._lock = asyncio.Lock()
        self._current_read, self._next_read = _SchemaRead(), _SchemaRead()
        self._refresh_requested = asyncio.Event()

    @property
    def applied(self) -> AppliedConfig:
        """The configuration in force, with its collections and what is wrong with them."""
        return self._applied

    # -- the configuration

    async def reload(self) -> bool:
        """Apply the configuration as it is now; return whether it was applied.

        With any problem everything stays as it was; the log names all problems.
        """
        async with self._lock:
            began = time.monotonic()
            try:
                parsed = self._read_config()
                await self._apply(
                    await fit_reloaded(parsed, self._applied.config, self._read_catalog)
                )
            except PgRealtimeError as error:
                log_rejected(error)
                return False
            await self._parts.feed.check_publication()
            await report_unreadable_tables(self._parts.pool, self._applied.collections)
            log_reloaded(parsed.require_valid(), self._applied, time.monotonic() - began)
            return True

    async def reload_if_agreed(
        self,
        parsed: ParsedConfig,
        agree: Callable[[], Awaitable[bool]],
        wait_to_deliver: Callable[[], Awaitable[None]],
    ) -> bool:
        """Apply a configuration if ``agree`` says so; return whether it was applied.

        ``agree`` is called when nothing but its answer stands in the way: the stream has the
        tables; ``wait_to_deliver`` between the last change for requests and the first for events.
        Nothing is logged.

        Raises:
            PgRealtimeError: There is a problem; everything is as it was.
        """
        async with self._lock:
            applied = await fit_reloaded(parsed, self._applied.config, self._read_catalog)
            if _table_identities(applied.streamed_tables) != _table_identities(
                self._streamed_tables
            ):
                # More than both have to be streamed if the others don't agree.
                before = self._applied.streamed_tables
                await self._parts.feed.want(
                    replace(applied.wanted_tables, tables={**before, **applied.streamed_tables})
                )
            if not await agree():
                return False
            await self._apply(applied, wait_to_deliver)
            with suppress(psycopg.Error):  # reported by the next query
                tables = reachable_tables(applied.collections)
                await self._parts.pool.configure_row_security(tables.values())
            return True

    # -- the schema

    async def watch_schema(self) -> None:
        """Refresh the schema for ever: at intervals, and soon after a mismatch."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_MIN_REFRESH_SECONDS):
                    await self._refresh_requested.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(_REFRESH_SECONDS - _MIN_REFRESH_SECONDS):
                    await self._schema_mismatch.wait()
            self._refresh_requested.clear()
            self._schema_mismatch.clear()
            await self.refresh_schema()

    async def wait_for_schema_refresh(self) -> bool:
        """Wait until the schema as of now, or a later one, is in force; return whether it is.

        Requires ``watch_schema`` to run. The stream may not have been switched to it yet.
        """
        # A read that has begun may have seen an older schema: wait for the next one.
        read = self._next_read
        self._refresh_requested.set()
        self._schema_mismatch.set()
        await read.completed.wait()
        return read.is_applied

    async def refresh_schema(self) -> None:
        """Read the catalogue and apply what changed; log a warning if it can't be read."""
        async with self._lock:
            before = self._applied
            read = self._current_read = self._next_read
            self._next_read = _SchemaRead()
            try:
                applied = fit_to_schema(before.config, await self._read_catalog(before.config))
                if applied != before:
                    await self._apply(applied)
                    _log_schema_change(before, applied)
                elif applied.streamed_tables != self._streamed_tables:
                    await self._switch_stream(applied)
                read.is_applied = True
            except PgRealtimeError as error:
                log.warning(
                    "schema.read_failed",
                    code=error.error_code,
                    reason=error.message,
                    detail=error.detail,
                    hint=error.hint,
                )
            finally:
                read.completed.set()
            if read.is_applied:
                with suppress(psycopg.Error):  # reported by the next query
                    tables = reachable_tables(self._applied.collections)
                    for pool in self._parts.query_pools:
                        await pool.configure_row_security(tables.values())
            await self._parts.feed.check_publication()

    # -- applying

    async def _apply(
        self, applied: AppliedConfig, wait_to_deliver: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Put a configuration in force.

        The order keeps every event correct: first the stream, before anyone can subscribe to a
        table that only the new stream has; then the collections and the pool; then the gaps.

        Raises:
            PgRealtimeError: Its tables can't be streamed; everything is as it was.
        """
        before, parts = self._applied, self._parts
        known = _table_identities(self._streamed_tables)
        wanted = _table_identities(applied.streamed_tables)
        if wanted != known:
            await self._switch_stream(applied)
        # Queries that are running use the old collections: allow the tables of both.
        tables = {*reachable_tables(before.collections), *reachable_tables(applied.collections)}
        for pool in parts.query_pools:
            pool.enable_row_security_for(tables)
        await self._update_parts(applied, wait_to_deliver)
        if applied.streamed_tables != before.streamed_tables:
            # A statement prepared before a column's type changed fails from then on.
            for pool in parts.query_pools:
                await pool.drain()
        self._applied = applied
        if replaced := _tables_with_gap(before, applied, known, wanted):
            parts.feed.append_gap("schema", replaced)
        # Events wait for this; switching the stream takes longer, and they don't need it.
        self._current_read.is_applied = True
        self._current_read.completed.set()
        if applied.streamed_tables != self._streamed_tables:
            await self._try_switch_stream(applied)

    async def _update_parts(
        self, applied: AppliedConfig, wait_to_deliver: Callable[[], Awaitable[None]] | None
    ) -> None:
        auth, collections, parts = applied.config.auth, applied.collections, self._parts
        parts.login_service.replace_settings(auth.login)
        parts.own_records.replace_collections(collections)
        parts.admission.replace_collections(collections)
        if parts.record_reader is not None:
            parts.record_reader.replace_collections(collections)
        parts.authenticator.replace_settings(
            auth,
            collections,
            logins=applied.logins,
            rule_columns=caller_columns_read_by_rules(collections),
        )
        if wait_to_deliver is not None:
            await wait_to_deliver()
        await parts.hub.replace_generation(
            collections,
            parts.authenticator.revalidate_caller,
            logins=applied.logins,
            allows_guests=auth.allow_guests,
        )

    async def _switch_stream(self, applied: AppliedConfig) -> None:
        await self._parts.feed.want(applied.wanted_tables)
        self._streamed_tables = applied.streamed_tables

    async def _try_switch_stream(self, applied: AppliedConfig) -> None:
        """Give the decoder the current columns and replica identities of the same tables.

        If that fails, the old stream continues to read them, less exactly, and the next refresh
        tries again.
        """
        try:
            await self._switch_stream(applied)
        except PgRealtimeError as error:
            log.warning("replication.schema_outdated", code=error.error_code, reason=error.message)


_TableIdentities: TypeAlias = Mapping[TableName, tuple[object, ...]]


def _table_identities(tables: Mapping[TableName, Table]) -> _TableIdentities:
    """Return what makes a table the one that the stream reads, whatever its columns.

    Of what its ids are computed, the stream must know before they are looked for.
    """
    return {name: (table.oid, table.leaves, table.id_column) for name, table in tables.items()}


def _tables_with_gap(
    before: AppliedConfig, after: AppliedConfig, known: _TableIdentities, wanted: _TableIdentities
) -> frozenset[TableName]:
    """Return the tables of which subscribers may lack events.

    A configured table that was replaced by another one under its name: changes between its
    creation and the switch of the stream weren't read. And the table of a collection that was
    locked, and is no more.
    """
    schemas = before.config.database.schemas
    configured = configured_table_names(before.config.collections, schemas)
    replaced = {name for name in configured if name in wanted and wanted[name] != known.get(name)}
    return frozenset(replaced | (before.locked_tables - after.locked_tables))


async def report_unreadable_tables(pool: QueryPool, collections: Collections) -> None:
    """Log each table that the role may not read in full: rules that read it deny everyone."""
    tables = reachable_tables(collections).values()
    try:
        await pool.configure_row_security(tables)
        async with pool.connection() as connection:
            errors = await read_privilege_errors(connection, tables)
    except psycopg.Error:
        return  # reported by the next query
    for error in errors.values():
        log.error(
            "table.unreadable",
            code=error.error_code,
            reason=error.message,
            detail=error.detail or None,
            hint=error.hint,
        )


def _log_schema_change(before: AppliedConfig, after: AppliedConfig) -> None:
    names = before.collections.keys() | after.collections.keys()
    changed = [n for n in names if before.collections.get(n) != after.collections.get(n)]
    log.warning("schema.changed", collections=sorted(changed))
    for problem in after.problems:
        if problem not in before.problems:
            keys: dict[str, str | None] = {"collection": collection_name_of(problem)}
            keys |= {"path": problem.path, "reason": problem.message, "hint": problem.hint or None}
            if problem.path.endswith("_rule"):
                log.error("rule.rejected", **keys)
            else:
                log.error("collection.locked", **keys)
