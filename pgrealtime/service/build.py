"""Builds the rooms from the configuration and owns what runs: start, tasks, shutdown, in order."""

from __future__ import annotations

import asyncio
import errno
import gc
import resource
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
import structlog
from aiohttp import web
from psycopg.conninfo import make_conninfo

from pgrealtime import __version__
from pgrealtime.api.admin import build_admin
from pgrealtime.api.app import build_app, build_runner
from pgrealtime.api.login import LoginRoutes
from pgrealtime.auth.account import Accounts
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.auth.login import Login
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.catalog.model import Catalog
from pgrealtime.changelog.memory import MemoryChangelog
from pgrealtime.changes import TableName
from pgrealtime.cli.check.check import rule_problems
from pgrealtime.collections.build import build, table_names
from pgrealtime.config.load import Origin, Reading
from pgrealtime.config.model import AdminConfig, Config, DatabaseConfig
from pgrealtime.errors import (
    ConfigError,
    DatabaseUnreachableError,
    PgRealtimeError,
)
from pgrealtime.feed.reader import Relay
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.hub import Hub
from pgrealtime.lsn import LSN
from pgrealtime.observe.log import configure
from pgrealtime.observe.metrics import Metrics
from pgrealtime.observe.redact import without_values
from pgrealtime.postgres.pool import KEEPALIVE, QueryPool
from pgrealtime.postgres.url import settings_of
from pgrealtime.reads.own_record import OwnRecords
from pgrealtime.rule_queries.executor import Probe
from pgrealtime.rules.engine.plan import columns_asked
from pgrealtime.service.reload import Reload, Rooms, World, report_unreadable
from pgrealtime.service.status import Vitals
from pgrealtime.wal import durable
from pgrealtime.wal.server import connect_plainly
from pgrealtime.wal.slot import SlotWait
from pgrealtime.wal.stream import WalStream, open_stream, rehearse_stream

log = structlog.get_logger(__name__)

_RETRY_SECONDS = 0.5
_SETTINGS_SECONDS = 10.0
_OTHER_FILES = 100
"""Sessions of the database, logs, calls under way."""
_OBJECTS_BETWEEN_COLLECTIONS = 10_000
"""A slice of changes makes thousands of objects that live until it is delivered. At Python's own
700 looking for garbage among them was a fifth of the work; what garbage there is comes of requests.
"""


@dataclass(frozen=True, slots=True)
class Running:
    """A service that is up."""

    port: int
    hub: Hub
    reloading: Reload

    async def reload(self) -> bool:
        """Take the configuration as it stands now, without a restart; say if it was taken."""
        return await self.reloading.reload()


async def serve(config: Config, reread: Callable[[], Reading]) -> None:
    """Run the service until SIGTERM or SIGINT; SIGHUP makes it take the configuration anew.

    Args:
        config: Of the whole.
        reread: Reads the configuration as it stands at a later time.

    Raises:
        PgRealtimeError: It can't start, or can't go on.
    """
    configure(config.logging)
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS, 10, 10)
    _allow_files(config.realtime.max_connections)
    stop, changed = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, changed.set)
    async with AsyncExitStack() as stack:
        starting = stack.enter_async_context(running(config, reread=reread))
        service = await _unless_stopped(stop, starting)
        if service is None:
            return
        await stack.enter_async_context(_together([_reload_whenever(changed, service)]))
        log.info(
            "server.started", version=__version__, url=f"http://{config.server.host}:{service.port}"
        )
        await stop.wait()
        log.info("server.stopping", connections=len(service.hub.connections))


async def _unless_stopped(stop: asyncio.Event, starting: Awaitable[Running]) -> Running | None:
    """Return the service once it is up, or nothing if it shall stop before that.

    It starts in this task, which has to be the one that ends it: so what is waited for gets a
    time-out, of now.
    """

    async def give_up(patience: asyncio.Timeout) -> None:
        await stop.wait()
        patience.reschedule(asyncio.get_running_loop().time())

    try:
        async with asyncio.timeout(None) as patience:
            watch = asyncio.create_task(give_up(patience))
            try:
                return await starting
            finally:
                watch.cancel()
    except TimeoutError:
        if not stop.is_set():
            raise
        return None


def _allow_files(connections: int) -> None:
    """Raise the soft limit of open files, often 1024, to the hard one: a connection is a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < connections + _OTHER_FILES:
        log.warning("files.limited", limit=hard, max_connections=connections)


async def _reload_whenever(changed: asyncio.Event, service: Running) -> None:
    while True:
        await changed.wait()
        changed.clear()
        await service.reload()


@asynccontextmanager
async def running(
    config: Config,
    *,
    reread: Callable[[], Reading] | None = None,
    extend: Callable[[web.Application], None] | None = None,
) -> AsyncIterator[Running]:
    """Start everything; on leaving, stop it in order: accept, connections, stream, queries.

    Args:
        config: Of the whole.
        reread: Reads the configuration anew for a reload; without it there is only this one.
        extend: Adds routes and middlewares to what is served on the public port.

    Raises:
        PgRealtimeError: It can't start. A fault in a running part ends the block likewise.
    """
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(query_pool(config.database))
        catalog = await catalog_of(config, pool)
        collections = build(config.collections, catalog)
        if problems := tuple(rule_problems(collections)):
            raise ConfigError(problems)
        await report_unreadable(pool, collections)
        world = World(config=config, collections=collections)
        changelog = MemoryChangelog(
            LSN(0), max_size=config.changelog.max_size, max_age=config.changelog.max_age
        )
        doubted = asyncio.Event()
        metrics = Metrics()
        probe = Probe(pool, on_doubt=doubted.set, on_statement=metrics.note_rule_query)
        logins = {name: collection.login for name, collection in config.collections.items()}
        hub = Hub(
            changelog,
            Matcher(collections),
            probe,
            collections=collections,
            limits=config.realtime,
            logins=logins,
            nulls=config.records.nulls,
            hidden=config.records.hidden,
            can_resume=config.changelog.max_age > 0,
            allows_guests=config.auth.allow_guests,
            replays_at_once=max(1, config.database.pool_size // 2),
            on_doubt=doubted.set,
            reach=lambda lsn: relay.reach(lsn),  # noqa: PLW0108 (the relay is made after the hub)
            read_schema=lambda: reloading.read_schema(),  # noqa: PLW0108 (likewise)
        )
        relay = Relay(
            lambda: _stream(config, world),
            changelog,
            hub,
            tables=world.streamed,
            max_size=config.changelog.max_size,
            pass_over=lambda: _pass_over(config),
            is_durable=config.replication.slot.durable,
        )
        accounts = Accounts(pool, on_doubt=doubted.set)
        authenticator = Authenticator(
            config.auth, collections, accounts, logins=logins, asked=columns_asked(collections)
        )
        login = Login(config.auth.login, accounts)
        shown = config.records
        records = OwnRecords(probe, collections, nulls=shown.nulls, hidden=shown.hidden)
        stack.callback(login.close)
        reloading = Reload(
            world,
            Rooms(
                relay=relay,
                hub=hub,
                authenticator=authenticator,
                login=login,
                records=records,
                pool=pool,
            ),
            reread=reread
            or (lambda: Reading(config=config, origin=Origin(source="configuration"))),
            read_catalog=lambda wanted: catalog_of(wanted, pool),
            open_stream=lambda wanted: _stream(config, wanted),
            rehearse=lambda wanted: _rehearse(config, wanted),
            doubted=doubted,
        )
        parts = (
            relay.run(),
            relay.expire(),
            hub.run(),
            hub.watch_limits(),
            authenticator.run(),
            reloading.watch(),
            _watch_standbys(probe, hub),
        )
        await stack.enter_async_context(_together(parts))
        vitals = Vitals(
            hub=hub,
            relay=relay,
            changelog=changelog,
            probe=probe,
            authenticator=authenticator,
            login=login,
            pool=pool,
        )
        await stack.enter_async_context(_admin_port(config.admin, vitals, metrics))
        app = build_app(hub, authenticator, config)
        routes = LoginRoutes(login, authenticator, config.server, records)
        routes.add_to(app.router)
        if extend is not None:
            extend(app)
        runner = build_runner(app)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        stack.push_async_callback(hub.shutdown, config.server.shutdown_grace)
        site = web.TCPSite(runner, config.server.host, config.server.port, backlog=4096)
        await _start(site, "server")
        stack.push_async_callback(site.stop)
        yield Running(runner.addresses[0][1], hub, reloading)


@asynccontextmanager
async def _admin_port(config: AdminConfig, vitals: Vitals, metrics: Metrics) -> AsyncIterator[None]:
    """Serve probes and metrics, if there is a port for them, until all else has stopped."""
    if not config.port:
        yield
        return

    async def exposition() -> bytes:
        return metrics.exposition(await vitals.read())

    app = build_admin(config, faults=vitals.faults, metrics=exposition)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await _start(web.TCPSite(runner, config.host, config.port), "admin")
        yield
    finally:
        await runner.cleanup()


async def _start(site: web.TCPSite, section: str) -> None:
    try:
        await site.start()
    except OSError as error:
        raise PgRealtimeError(
            f"{section}.port can't be listened on",
            detail=str(error.strerror or error),
            hint=_port_hint(error, section),
            code="port_unavailable",
        ) from error


def _port_hint(error: OSError, section: str) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"Give {section}.port another number, or end what has it."
        case errno.EACCES:
            return f"Give {section}.port a number from 1024 on, or the process the right to lower."
        case _:
            return f"Let {section}.host be an address of this machine."


@asynccontextmanager
async def _together(parts: Iterable[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run what runs all the time, until the block is left; one that fails ends them all."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(part) for part in parts]
        yield
        for task in tasks:
            task.cancel()


async def _watch_standbys(probe: Probe, hub: Hub) -> None:
    """Let events wait for visibility as long as commits may wait for a synchronous standby."""
    while True:
        hub.gate_on_visibility(gate=await probe.has_synchronous_standbys())
        await asyncio.sleep(_SETTINGS_SECONDS)


def _stream(config: Config, world: World) -> AbstractAsyncContextManager[WalStream]:
    shown = world.shown.values()
    return open_stream(
        config.database.url,
        config.replication,
        list(world.streamed.values()),
        record_keys={collection.table.name: (collection.key.name,) for collection in shown},
        max_transaction_size=config.changelog.max_size,
        on_wait=_report_wait,
    )


async def _rehearse(config: Config, world: World) -> None:
    """Find out whether the durable slot's stream could be opened anew with a world's tables."""
    if config.replication.slot.durable:
        tables = list(world.streamed.values())
        await rehearse_stream(config.database.url, config.replication, tables)


async def _pass_over(config: Config) -> None:
    """Move the durable slot to where the server's WAL ends, if that can be."""
    try:
        async with await connect_plainly(config.database.url) as connection:
            await durable.pass_over(connection, config.replication.slot.name)
    except psycopg.Error as error:
        log.warning("slot.kept", slot=config.replication.slot.name, reason=without_values(error))


def _report_wait(wait: SlotWait) -> None:
    log.warning("slot.waiting", pids=wait.pids, prepared=wait.prepared)


@asynccontextmanager
async def query_pool(database: DatabaseConfig) -> AsyncIterator[QueryPool]:
    """Open the connections on which rules are asked: read only, each statement bounded in time.

    Raises:
        DatabaseUnreachableError: Nobody answered for ``wait_for``.
        SetupError: Code ``database_url_invalid``.
    """
    settings = settings_of(database.query_url or database.url) | {
        "application_name": "pgrealtime",
        "client_encoding": "utf8",
        **KEEPALIVE,
    }
    conninfo = make_conninfo("", **settings)
    await _wait_for_server(conninfo, database)

    pool = QueryPool(
        conninfo, statement_timeout=database.statement_timeout, max_size=database.pool_size
    )
    async with pool:
        yield pool


async def _wait_for_server(conninfo: str, database: DatabaseConfig) -> None:
    deadline = time.monotonic() + database.wait_for
    key = "database.query_url" if database.query_url else "database.url"
    told = ""
    while True:
        try:
            async with await psycopg.AsyncConnection.connect(conninfo):
                return
        except psycopg.OperationalError as error:
            detail = str(error).strip()
            if time.monotonic() >= deadline:
                raise DatabaseUnreachableError(
                    "the database can't be reached",
                    detail=detail,
                    hint=f"Check {key}; it has to lead to the primary.",
                ) from error
            if detail != told:
                # A wrong password looks like a server that is still starting.
                log.warning("database.waiting", wait_for=database.wait_for, detail=detail)
                told = detail
            await asyncio.sleep(_RETRY_SECONDS)


async def catalog_of(config: Config, pool: QueryPool) -> Catalog:
    """Read what the catalogue says of the configured tables.

    Raises:
        PgRealtimeError: Code ``catalog``: Postgres refuses.
    """
    names: tuple[TableName, ...] = table_names(config.collections, config.database.schemas)
    try:
        async with pool.connection() as connection:
            return await read_catalog(connection, names=names)
    except psycopg.Error as error:
        raise PgRealtimeError(
            "the catalogue can't be read", detail=without_values(error), code="catalog"
        ) from error
