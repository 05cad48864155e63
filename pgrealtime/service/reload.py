"""Takes another configuration, or another schema, while the service runs: all of it or nothing.

Connections stay open; what they hear from the next event on is judged by what was taken.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import TypeAlias

import psycopg
import structlog

from pgrealtime.auth.authenticator import Authenticator, issuer_key_problems, key_sources_of
from pgrealtime.auth.login import LoginService
from pgrealtime.catalog.model import Catalog, Table
from pgrealtime.catalog.privileges import read_privilege_errors
from pgrealtime.changes import TableName
from pgrealtime.collections.build import configured_table_names
from pgrealtime.collections.model import Collections
from pgrealtime.collections.streamed_tables import collection_name_of, reachable_tables
from pgrealtime.config.load import ParsedConfig
from pgrealtime.config.model import Config
from pgrealtime.errors import ConfigError, PgRealtimeError, SetupError
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.reader import ReplicationReader
from pgrealtime.hub.hub import Hub
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.reads.own_record import OwnRecordRenderer
from pgrealtime.rules.rule_set import caller_columns_read_by_rules
from pgrealtime.service.applied_config import AppliedConfig, fit_to_schema
from pgrealtime.wal.publication import check_publication, tables_not_fully_published
from pgrealtime.wal.slot import read_publication
from pgrealtime.wal.stream import WalStream

log = structlog.get_logger(__name__)

_REFRESH_SECONDS = 30.0
"""Between two looks at the catalogue when nothing points to a change."""
_MIN_REFRESH_SECONDS = 1.0
"""Between two looks at the least, however much there is to doubt."""

_RELOADABLE_SECTIONS = ("collections", "auth")
"""The sections that a reload takes; the others need a restart."""

ReadCatalog: TypeAlias = Callable[[Config], Awaitable[Catalog]]
OpenStream: TypeAlias = "Callable[[AppliedConfig], AbstractAsyncContextManager[WalStream]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadTargets:
    """Who is told of a reload."""

    replication_reader: ReplicationReader
    intake: Intake
    hub: Hub
    authenticator: Authenticator
    login: LoginService
    own_records: OwnRecordRenderer
    pool: QueryPool


class _SchemaRead:
    """A look at the catalogue that somebody may wait for."""

    def __init__(self) -> None:
        self.is_applied = False
        """Whether what was read is in force."""
        self.completed = asyncio.Event()


class Reloader:
    """Brings into force what is configured and what is there.

    Args:
        applied: What is in force at the start.
        targets: Who is told.
        read_config: Reads the configuration anew.
        read_catalog: Reads the tables that a configuration names.
        open_stream: Opens a stream of a world's tables.
        check_stream: Raises what would keep that stream from being opened, where it can't be opened
            beside the one of now.
        schema_mismatch: Set by whoever met something that doesn't fit the catalogue.
    """

    def __init__(
        self,
        applied: AppliedConfig,
        targets: ReloadTargets,
        *,
        read_config: Callable[[], ParsedConfig],
        read_catalog: ReadCatalog,
        open_stream: OpenStream,
        check_stream: Callable[[AppliedConfig], Awaitable[None]],
        schema_mismatch: asyncio.Event,
    ) -> None:
        self._applied = applied
        self._targets = targets
        self._read_config = read_config
        self._read_catalog = read_catalog
        self._open_stream = open_stream
        self._check_stream = check_stream
        self._schema_mismatch = schema_mismatch
        self._streamed_tables = applied.streamed_tables
        self._unpublished_tables: frozenset[TableName] = frozenset()
        """Tables that pgoutput's publication lacks, or has not whole."""
        self._lock = asyncio.Lock()
        self._current_read, self._next_read = _SchemaRead(), _SchemaRead()
        self._refresh_requested = asyncio.Event()

    async def reload(self) -> bool:
        """Take the configuration as it stands now; return whether it was taken.

        With any problem everything stays as it was, and the log says all of them.
        """
        async with self._lock:
            began = time.monotonic()
            try:
                reading = self._read_config()
                await self._apply(await self._fit_config(reading))
            except PgRealtimeError as error:
                _report_rejected(error)
                return False
            await self._check_publication()
            await report_unreadable_tables(self._targets.pool, self._applied.collections)
            if waiting := _sections_needing_restart(reading.require_valid(), self._applied.config):
                log.warning("config.restart_needed", sections=waiting)
            log.info(
                "config.reloaded",
                collections=len(self._applied.collections),
                duration_ms=round((time.monotonic() - began) * 1000),
            )
            return True

    async def _fit_config(self, parsed: ParsedConfig) -> AppliedConfig:
        """Return what the configuration makes of the schema of now.

        Raises:
            PgRealtimeError: With every problem that was found.
        """
        given = parsed.require_valid()
        taken = {name: getattr(given, name) for name in _RELOADABLE_SECTIONS}
        config = self._applied.config.model_copy(update=taken)
        world = fit_to_schema(config, await self._read_catalog(config))
        if problems := (*world.problems, *issuer_key_problems(config)):
            raise parsed.locations.locate(ConfigError(problems))
        return world

    async def watch_schema(self) -> None:
        """Follow the schema, for ever."""
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
        """Return once the schema of now, or of later, is in force; False if it can't be read.

        ``watch`` must be running. The stream may be opened anew for it still.
        """
        look = self._next_read
        self._refresh_requested.set()
        self._schema_mismatch.set()
        await look.completed.wait()
        return look.is_applied

    async def refresh_schema(self) -> None:
        """Read the catalogue, and bring into force what changed in it."""
        async with self._lock:
            before = self._applied
            look = self._current_read = self._next_read
            self._next_read = _SchemaRead()
            try:
                world = fit_to_schema(before.config, await self._read_catalog(before.config))
                if world != before:
                    await self._apply(world)
                    _report_schema_change(before, world)
                elif world.streamed_tables != self._streamed_tables:
                    await self._switch_stream(world)
                look.is_applied = True
            except PgRealtimeError as error:
                log.warning(
                    "schema.unknown",
                    code=error.error_code,
                    reason=error.message,
                    detail=error.detail,
                    hint=error.hint,
                )
            finally:
                look.completed.set()
            if look.is_applied:
                with suppress(psycopg.Error):  # said by whoever has something to ask
                    await self._targets.pool.configure_row_security(
                        reachable_tables(self._applied.collections).values()
                    )
            await self._check_publication()

    async def _check_publication(self) -> None:
        """Say of which tables pgoutput sends nothing any more; what that hides is a gap.

        Told again once it sends them, since whoever loaded in between goes on from there.
        """
        stream, config = self._targets.replication_reader.stream, self._applied.config.replication
        if stream is None or stream.plugin != "pgoutput":
            return
        tables = list(self._streamed_tables.values())
        try:
            async with self._targets.pool.connection() as connection:
                found = await read_publication(connection, config.publication)
                version = connection.info.server_version
        except psycopg.Error:
            return  # said by whoever has something to ask
        before, self._unpublished_tables = (
            self._unpublished_tables,
            tables_not_fully_published(found, tables),
        )
        if self._unpublished_tables == before:
            return
        try:
            check_publication(config.publication, found, tables, version)
        except SetupError as error:
            log.error(  # noqa: TRY400 (for the operator, not for us)
                "publication.unfit", reason=error.message, detail=error.detail, hint=error.hint
            )
        self._targets.intake.append_gap("schema", before | self._unpublished_tables)

    async def _apply(self, applied: AppliedConfig) -> None:
        """Put a world into force.

        Raises:
            PgRealtimeError: Its tables can't be streamed; everything is as it was.
        """
        before = self._applied
        schemas = before.config.database.schemas
        named = configured_table_names(before.config.collections, schemas)
        known = _table_identities(self._streamed_tables)
        wanted = _table_identities(applied.streamed_tables)
        if wanted != known:
            # Before anybody may subscribe to what only the other stream has.
            await self._switch_stream(applied)
        # What is in force changes under questions: of all tables that may be asked about.
        self._targets.pool.enable_row_security_for(
            {*reachable_tables(before.collections), *reachable_tables(applied.collections)}
        )
        await self._update_targets(applied)
        if applied.streamed_tables != before.streamed_tables:
            # A statement prepared before a column's type changed fails from then on.
            await self._targets.pool.drain()
        self._applied = applied
        # A table that was there already and became another: what happened to it since then, and
        # until the stream followed, wasn't read.
        became = {name for name in named if name in wanted and wanted[name] != known.get(name)}
        # Nobody heard of the rows of a collection as long as it was locked.
        became |= before.locked_tables - applied.locked_tables
        if became:
            self._targets.intake.append_gap("schema", frozenset(became))
        # Events wait for this; the stream takes longer, and is of no use to them.
        self._current_read.is_applied = True
        self._current_read.completed.set()
        if applied.streamed_tables != self._streamed_tables:
            await self._try_switch_stream(applied)

    async def _update_targets(self, applied: AppliedConfig) -> None:
        auth, collections, rooms = applied.config.auth, applied.collections, self._targets
        logins = {name: one.login for name, one in applied.config.collections.items()}
        rooms.login.replace_settings(auth.login)
        rooms.own_records.replace_collections(collections)
        rooms.authenticator.replace_settings(
            key_sources_of(auth),
            auth.login,
            collections,
            logins=logins,
            rule_columns=caller_columns_read_by_rules(collections),
            allow_guests=auth.allow_guests,
        )
        await rooms.hub.replace_generation(
            collections,
            rooms.authenticator.revalidate_caller,
            logins=logins,
            allows_guests=auth.allow_guests,
        )

    async def _switch_stream(self, applied: AppliedConfig) -> None:
        await self._check_stream(applied)
        await self._targets.replication_reader.switch(
            lambda: self._open_stream(applied), applied.streamed_tables
        )
        self._streamed_tables = applied.streamed_tables

    async def _try_switch_stream(self, applied: AppliedConfig) -> None:
        """Let the decoder know the same tables' columns and identities of now.

        The stream of before goes on to read them, only less exactly; ``look`` tries again.
        """
        try:
            await self._switch_stream(applied)
        except PgRealtimeError as error:
            log.warning("replication.outdated", code=error.error_code, reason=error.message)


def _table_identities(tables: Mapping[TableName, Table]) -> dict[TableName, tuple[object, ...]]:
    """Return what makes a table the one that the stream reads, whatever its columns."""
    return {name: (table.oid, table.leaves) for name, table in tables.items()}


def _sections_needing_restart(configured: Config, running: Config) -> list[str]:
    """Return the sections that say something else than what is in force."""
    return [
        name for name in Config.model_fields if getattr(configured, name) != getattr(running, name)
    ]


async def report_unreadable_tables(pool: QueryPool, collections: Collections) -> None:
    """Say of which tables rules can't be asked: what has no answer is denied, to everybody."""
    try:
        tables = reachable_tables(collections).values()
        await pool.configure_row_security(tables)
        async with pool.connection() as connection:
            errors = await read_privilege_errors(connection, tables)
    except psycopg.Error:
        return  # said by whoever has something to ask
    for error in errors.values():
        log.error(
            "table.unreadable",
            code=error.error_code,
            reason=error.message,
            detail=error.detail or None,
            hint=error.hint,
        )


def _report_rejected(error: PgRealtimeError) -> None:
    problems = error.detail.splitlines() if isinstance(error, ConfigError) else [str(error)]
    log.error("config.rejected", code=error.error_code, reason=error.message, problems=problems)


def _report_schema_change(before: AppliedConfig, after: AppliedConfig) -> None:
    log.warning("schema.changed", collections=sorted(_changed_collections(before, after)))
    for fault in after.problems:
        if fault not in before.problems:
            is_rule = fault.path.endswith("_rule")
            facts = {"path": fault.path, "reason": fault.message, "hint": fault.hint or None}
            if is_rule:
                log.error("rule.error", collection=collection_name_of(fault), **facts)
            else:
                log.error("collection.locked", collection=collection_name_of(fault), **facts)


def _changed_collections(before: AppliedConfig, after: AppliedConfig) -> Iterator[str]:
    for name in before.collections.keys() | after.collections.keys():
        if before.collections.get(name) != after.collections.get(name):
            yield name
