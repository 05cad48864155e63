"""Takes another configuration, or another schema, while the service runs: all of it or nothing.

Connections stay open; what they hear from the next event on is judged by what was taken.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, replace
from typing import TypeAlias

import psycopg
import structlog

from pgrealtime.auth.authenticator import Authenticator, issuers_of
from pgrealtime.auth.login import Login
from pgrealtime.catalog.model import Catalog, Table
from pgrealtime.changes import TableName
from pgrealtime.cli.check.check import (
    key_problems,
    rely_on_policies,
    rule_problems,
    rule_right_errors,
    tables_asked,
)
from pgrealtime.collections.build import examine, table_names
from pgrealtime.collections.model import Collections
from pgrealtime.config.load import Reading
from pgrealtime.config.model import Config
from pgrealtime.errors import ConfigError, PgRealtimeError, Problem, SetupError
from pgrealtime.feed.reader import Relay
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.hub import Hub
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.reads.own_record import OwnRecords
from pgrealtime.rules.engine.plan import columns_asked
from pgrealtime.service.streamed_tables import collection_of, shown, streamed_tables
from pgrealtime.wal.publication import check_publication, missed_by
from pgrealtime.wal.slot import read_publication
from pgrealtime.wal.stream import WalStream

log = structlog.get_logger(__name__)

_LOOK_SECONDS = 30.0
"""Between two looks at the catalogue when nothing points to a change."""
_DOUBT_SECONDS = 1.0
"""Between two looks at the least, however much there is to doubt."""

_TAKEN = ("collections", "auth")
"""The sections that a reload takes; the others need a restart."""

ReadCatalog: TypeAlias = Callable[[Config], Awaitable[Catalog]]
OpenStream: TypeAlias = "Callable[[World], AbstractAsyncContextManager[WalStream]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rooms:
    """Who is told of a reload."""

    relay: Relay
    hub: Hub
    authenticator: Authenticator
    login: Login
    records: OwnRecords
    pool: QueryPool


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is in force: what was configured, and what it makes of the schema."""

    config: Config
    collections: Collections
    """Those that the schema doesn't fit are locked, or left out if there is nothing to show."""
    faults: tuple[Problem, ...] = ()
    """What doesn't fit."""

    @property
    def shown(self) -> Collections:
        """The collections whose changes can be read."""
        return shown(self.collections, self.faults)

    @property
    def locked(self) -> set[TableName]:
        """The tables of collections that the schema doesn't fit: nobody hears of their rows."""
        faulty = {collection_of(fault) for fault in self.faults}
        return {one.table.name for one in self.collections.values() if one.name in faulty}

    @property
    def streamed(self) -> Mapping[TableName, Table]:
        """The tables whose changes are read."""
        return streamed_tables(self.collections, self.faults)


def fitted(config: Config, catalog: Catalog) -> World:
    """Return what a configuration that was fine makes of a schema that changed since.

    A collection that the schema doesn't fit any more, or whose rules don't, is locked: whatever
    can't be decided is denied. The others go on.
    """
    collections, problems = examine(config.collections, catalog)
    faults = (*problems, *rule_problems(collections))
    faulty = {collection_of(fault) for fault in faults}
    locked = (
        replace(one, list_rule=None, view_rule=None, manage_rule=None)
        if one.name in faulty
        else one
        for one in collections.values()
    )
    return World(
        config=config,
        collections=Collections(tuple(locked), encoding=collections.encoding),
        faults=faults,
    )


class _Look:
    """A look at the catalogue that somebody may wait for."""

    def __init__(self) -> None:
        self.is_read = False
        """Whether what was read is in force."""
        self.is_over = asyncio.Event()


class Reload:
    """Brings into force what is configured and what is there.

    Args:
        world: What is in force at the start.
        rooms: Who is told.
        reread: Reads the configuration anew.
        read_catalog: Reads the tables that a configuration names.
        open_stream: Opens a stream of a world's tables.
        rehearse: Raises what would keep that stream from being opened, where it can't be opened
            beside the one of now.
        doubted: Set by whoever met something that doesn't fit the catalogue.
    """

    def __init__(
        self,
        world: World,
        rooms: Rooms,
        *,
        reread: Callable[[], Reading],
        read_catalog: ReadCatalog,
        open_stream: OpenStream,
        rehearse: Callable[[World], Awaitable[None]],
        doubted: asyncio.Event,
    ) -> None:
        self._world = world
        self._rooms = rooms
        self._reread = reread
        self._read_catalog = read_catalog
        self._open_stream = open_stream
        self._rehearse = rehearse
        self._doubted = doubted
        self._streamed = world.streamed
        self._unpublished: frozenset[TableName] = frozenset()
        """Tables that pgoutput's publication lacks, or has not whole."""
        self._turn = asyncio.Lock()
        self._look, self._next_look = _Look(), _Look()
        self._urgent = asyncio.Event()

    async def reload(self) -> bool:
        """Take the configuration as it stands now; return whether it was taken.

        With any problem everything stays as it was, and the log says all of them.
        """
        async with self._turn:
            began = time.monotonic()
            try:
                reading = self._reread()
                await self._bring_in(await self._world_of(reading))
            except PgRealtimeError as error:
                _report_rejected(error)
                return False
            await self._look_at_publication()
            await report_unreadable(self._rooms.pool, self._world.collections)
            if waiting := _untaken(reading.whole(), self._world.config):
                log.warning("config.restart_needed", sections=waiting)
            log.info(
                "config.reloaded",
                collections=len(self._world.collections),
                duration_ms=round((time.monotonic() - began) * 1000),
            )
            return True

    async def _world_of(self, reading: Reading) -> World:
        """Return what the configuration makes of the schema of now.

        Raises:
            PgRealtimeError: With every problem that was found.
        """
        given = reading.whole()
        taken = {name: getattr(given, name) for name in _TAKEN}
        config = self._world.config.model_copy(update=taken)
        world = fitted(config, await self._read_catalog(config))
        if problems := (*world.faults, *key_problems(config)):
            raise reading.origin.locate(ConfigError(problems))
        return world

    async def watch(self) -> None:
        """Follow the schema, for ever."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_DOUBT_SECONDS):
                    await self._urgent.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS - _DOUBT_SECONDS):
                    await self._doubted.wait()
            self._urgent.clear()
            self._doubted.clear()
            await self.look()

    async def read_schema(self) -> bool:
        """Return once the schema of now, or of later, is in force; False if it can't be read.

        ``watch`` must be running. The stream may be opened anew for it still.
        """
        look = self._next_look
        self._urgent.set()
        self._doubted.set()
        await look.is_over.wait()
        return look.is_read

    async def look(self) -> None:
        """Read the catalogue, and bring into force what changed in it."""
        async with self._turn:
            before = self._world
            look = self._look = self._next_look
            self._next_look = _Look()
            try:
                world = fitted(before.config, await self._read_catalog(before.config))
                if world != before:
                    await self._bring_in(world)
                    _report_changed(before, world)
                elif world.streamed != self._streamed:
                    await self._stream(world)
                look.is_read = True
            except PgRealtimeError as error:
                log.warning(
                    "schema.unknown",
                    code=error.error_code,
                    reason=error.message,
                    detail=error.detail,
                    hint=error.hint,
                )
            finally:
                look.is_over.set()
            if look.is_read:
                with suppress(psycopg.Error):  # said by whoever has something to ask
                    await rely_on_policies(self._rooms.pool, self._world.collections)
            await self._look_at_publication()

    async def _look_at_publication(self) -> None:
        """Say of which tables pgoutput sends nothing any more; what that hides is a gap.

        Told again once it sends them, since whoever loaded in between goes on from there.
        """
        stream, config = self._rooms.relay.stream, self._world.config.replication
        if stream is None or stream.plugin != "pgoutput":
            return
        tables = list(self._streamed.values())
        try:
            async with self._rooms.pool.connection() as connection:
                found = await read_publication(connection, config.publication)
                version = connection.info.server_version
        except psycopg.Error:
            return  # said by whoever has something to ask
        before, self._unpublished = self._unpublished, missed_by(found, tables)
        if self._unpublished == before:
            return
        try:
            check_publication(config.publication, found, tables, version)
        except SetupError as error:
            log.error(  # noqa: TRY400 (for the operator, not for us)
                "publication.unfit", reason=error.message, detail=error.detail, hint=error.hint
            )
        self._rooms.relay.tell_gap("schema", before | self._unpublished)

    async def _bring_in(self, world: World) -> None:
        """Put a world into force.

        Raises:
            PgRealtimeError: Its tables can't be streamed; everything is as it was.
        """
        before = self._world
        schemas = before.config.database.schemas
        named = table_names(before.config.collections, schemas)
        known = _identities(self._streamed)
        wanted = _identities(world.streamed)
        if wanted != known:
            # Before anybody may subscribe to what only the other stream has.
            await self._stream(world)
        # What is in force changes under questions: of all tables that may be asked about.
        asked = tables_asked(before.collections, world.collections)
        self._rooms.pool.rely_on_policies(asked)
        await self._tell(world)
        if world.streamed != before.streamed:
            # A statement prepared before a column's type changed fails from then on.
            await self._rooms.pool.drain()
        self._world = world
        # A table that was there already and became another: what happened to it since then, and
        # until the stream followed, wasn't read.
        became = {name for name in named if name in wanted and wanted[name] != known.get(name)}
        # Nobody heard of the rows of a collection as long as it was locked.
        became |= before.locked - world.locked
        if became:
            self._rooms.relay.tell_gap("schema", frozenset(became))
        # Events wait for this; the stream takes longer, and is of no use to them.
        self._look.is_read = True
        self._look.is_over.set()
        if world.streamed != self._streamed:
            await self._renew_stream(world)

    async def _tell(self, world: World) -> None:
        auth, collections, rooms = world.config.auth, world.collections, self._rooms
        logins = {name: one.login for name, one in world.config.collections.items()}
        rooms.login.use(auth.login)
        rooms.records.use(collections)
        rooms.authenticator.use(
            issuers_of(auth),
            auth.login,
            collections,
            logins=logins,
            asked=columns_asked(collections),
            allow_guests=auth.allow_guests,
        )
        await rooms.hub.use(
            collections,
            Matcher(collections),
            rooms.authenticator.reconsider,
            logins=logins,
            allows_guests=auth.allow_guests,
        )

    async def _stream(self, world: World) -> None:
        await self._rehearse(world)
        await self._rooms.relay.switch(lambda: self._open_stream(world), world.streamed)
        self._streamed = world.streamed

    async def _renew_stream(self, world: World) -> None:
        """Let the decoder know the same tables' columns and identities of now.

        The stream of before goes on to read them, only less exactly; ``look`` tries again.
        """
        try:
            await self._stream(world)
        except PgRealtimeError as error:
            log.warning("replication.outdated", code=error.error_code, reason=error.message)


def _identities(tables: Mapping[TableName, Table]) -> dict[TableName, tuple[object, ...]]:
    """Return what makes a table the one that the stream reads, whatever its columns."""
    return {name: (table.oid, table.leaves) for name, table in tables.items()}


def _untaken(given: Config, running: Config) -> list[str]:
    """Return the sections that say something else than what is in force."""
    return [name for name in Config.model_fields if getattr(given, name) != getattr(running, name)]


async def report_unreadable(pool: QueryPool, collections: Collections) -> None:
    """Say of which tables rules can't be asked: what has no answer is denied, to everybody."""
    try:
        await rely_on_policies(pool, collections)
        async with pool.connection() as connection:
            errors = await rule_right_errors(connection, collections)
    except psycopg.Error:
        return  # said by whoever has something to ask
    for error in errors:
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


def _report_changed(before: World, world: World) -> None:
    log.warning("schema.changed", collections=sorted(_changed(before, world)))
    for fault in world.faults:
        if fault not in before.faults:
            is_rule = fault.path.endswith("_rule")
            facts = {"path": fault.path, "reason": fault.message, "hint": fault.hint or None}
            if is_rule:
                log.error("rule.error", collection=collection_of(fault), **facts)
            else:
                log.error("collection.locked", collection=collection_of(fault), **facts)


def _changed(before: World, world: World) -> Iterator[str]:
    for name in before.collections.keys() | world.collections.keys():
        if before.collections.get(name) != world.collections.get(name):
            yield name
