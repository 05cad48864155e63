"""Builds the rooms from the configuration and owns what runs: start, tasks, shutdown, in order."""

from __future__ import annotations

import asyncio
import errno
import gc
import resource
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
import structlog
from aiohttp import web

from pgrealtime import __version__
from pgrealtime.api.admin import build_admin_app
from pgrealtime.api.app import build_app, build_runner
from pgrealtime.api.login import LoginRoutes
from pgrealtime.auth.account import AccountLoader
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.auth.login import LoginService
from pgrealtime.changelog.memory import MemoryChangelog
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.load import read_configured_catalog
from pgrealtime.config.load import ConfigLocations, ParsedConfig
from pgrealtime.config.model import AdminConfig, Config
from pgrealtime.errors import (
    ConfigError,
    PgRealtimeError,
)
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.reader import ReplicationReader
from pgrealtime.hub.hub import Hub, HubCallbacks
from pgrealtime.hub.state.settings import HubSettings
from pgrealtime.lsn import LSN
from pgrealtime.observe.log import configure_logging
from pgrealtime.observe.metrics import Metrics
from pgrealtime.observe.redact import message_without_values
from pgrealtime.postgres.connect import open_query_pool
from pgrealtime.reads.own_record import OwnRecordRenderer
from pgrealtime.rule_queries.executor import QueryExecutor
from pgrealtime.rules.rule_set import caller_columns_read_by_rules, rule_problems
from pgrealtime.service.applied_config import AppliedConfig
from pgrealtime.service.reload import Reloader, ReloadTargets, report_unreadable_tables
from pgrealtime.service.status import StatusReader
from pgrealtime.wal import slot_status
from pgrealtime.wal.server import open_ordinary_connection
from pgrealtime.wal.slot import SlotWait
from pgrealtime.wal.stream import WalStream, dry_run_stream, open_stream

log = structlog.get_logger(__name__)

_STANDBY_POLL_SECONDS = 10.0
_RESERVED_FILES = 100
"""Sessions of the database, logs, calls under way."""
_GC_THRESHOLD = 10_000
"""A slice of changes makes thousands of objects that live until it is delivered. At Python's own
700 looking for garbage among them was a fifth of the work; what garbage there is comes of requests.
"""


@dataclass(frozen=True, slots=True)
class RunningService:
    """A service that is up."""

    port: int
    hub: Hub
    reloader: Reloader

    async def reload(self) -> bool:
        """Take the configuration as it stands now, without a restart; say if it was taken."""
        return await self.reloader.reload()


async def serve(config: Config, read_config: Callable[[], ParsedConfig]) -> None:
    """Run the service until SIGTERM or SIGINT; SIGHUP makes it take the configuration anew.

    Args:
        config: Of the whole.
        read_config: Reads the configuration as it stands at a later time.

    Raises:
        PgRealtimeError: It can't start, or can't go on.
    """
    configure_logging(config.logging)
    gc.set_threshold(_GC_THRESHOLD, 10, 10)
    _raise_file_limit(config.realtime.max_connections)
    stop, changed = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, changed.set)
    async with AsyncExitStack() as stack:
        starting = stack.enter_async_context(run_service(config, read_config=read_config))
        service = await _start_unless_stopped(stop, starting)
        if service is None:
            return
        await stack.enter_async_context(_background_tasks([_reload_on_signal(changed, service)]))
        log.info(
            "server.started", version=__version__, url=f"http://{config.server.host}:{service.port}"
        )
        await stop.wait()
        log.info("server.stopping", connections=len(service.hub.connections))


async def _start_unless_stopped(
    stop: asyncio.Event, starting: Awaitable[RunningService]
) -> RunningService | None:
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


def _raise_file_limit(max_connections: int) -> None:
    """Raise the soft limit of open files, often 1024, to the hard one: a connection is a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < max_connections + _RESERVED_FILES:
        log.warning("files.limited", limit=hard, max_connections=max_connections)


async def _reload_on_signal(changed: asyncio.Event, service: RunningService) -> None:
    while True:
        await changed.wait()
        changed.clear()
        await service.reload()


def hub_settings(config: Config) -> HubSettings:
    """Return the hub's settings by the configuration."""
    return HubSettings(
        limits=config.realtime,
        logins={name: collection.login for name, collection in config.collections.items()},
        allows_guests=config.auth.allow_guests,
        nulls=config.records.nulls,
        hidden_fields=config.records.hidden,
        can_resume=config.changelog.max_age > 0,
        max_concurrent_catch_ups=max(1, config.database.pool_size // 2),
    )


@asynccontextmanager
async def run_service(
    config: Config,
    *,
    read_config: Callable[[], ParsedConfig] | None = None,
    extend_app: Callable[[web.Application], None] | None = None,
) -> AsyncIterator[RunningService]:
    """Start everything; on leaving, stop it in order: accept, connections, stream, queries.

    Args:
        config: Of the whole.
        read_config: Reads the configuration anew for a reload; without it there is only this one.
        extend_app: Adds routes and middlewares to what is served on the public port.

    Raises:
        PgRealtimeError: It can't start. A fault in a running part ends the block likewise.
    """
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(open_query_pool(config.database))
        catalog = await read_configured_catalog(config, pool)
        collections = build_collections(config.collections, catalog)
        if problems := tuple(rule_problems(collections)):
            raise ConfigError(problems)
        await report_unreadable_tables(pool, collections)
        world = AppliedConfig(config=config, collections=collections)
        changelog = MemoryChangelog(
            LSN(0), max_bytes=config.changelog.max_size, max_age_seconds=config.changelog.max_age
        )
        doubted = asyncio.Event()
        metrics = Metrics()
        probe = QueryExecutor(
            pool, on_schema_mismatch=doubted.set, on_statement_seconds=metrics.observe_rule_query
        )
        logins = {name: collection.login for name, collection in config.collections.items()}
        hub = Hub(
            changelog,
            probe,
            collections,
            hub_settings(config),
            callbacks=HubCallbacks(
                on_schema_mismatch=doubted.set,
                wait_for_changelog=lambda lsn: relay.wait_for_changelog(lsn),  # noqa: PLW0108 (made after the hub)
                refresh_schema=lambda: reloading.wait_for_schema_refresh(),  # noqa: PLW0108 (likewise)
            ),
        )
        intake = Intake(changelog, hub, max_size=config.changelog.max_size)
        relay = ReplicationReader(
            lambda: _open_stream(config, world),
            intake,
            tables=world.streamed_tables,
            advance_slot=lambda: _advance_slot(config),
            is_durable=config.replication.slot.durable,
        )
        accounts = AccountLoader(pool, on_schema_mismatch=doubted.set)
        authenticator = Authenticator(
            config.auth,
            collections,
            accounts,
            logins=logins,
            rule_columns=caller_columns_read_by_rules(collections),
        )
        login = LoginService(config.auth.login, accounts)
        shown = config.records
        records = OwnRecordRenderer(probe, collections, nulls=shown.nulls, hidden=shown.hidden)
        stack.callback(login.close)
        reloading = Reloader(
            world,
            ReloadTargets(
                replication_reader=relay,
                intake=intake,
                hub=hub,
                authenticator=authenticator,
                login=login,
                own_records=records,
                pool=pool,
            ),
            read_config=read_config
            or (
                lambda: ParsedConfig(
                    config=config, locations=ConfigLocations(source="configuration")
                )
            ),
            read_catalog=lambda wanted: read_configured_catalog(wanted, pool),
            open_stream=lambda wanted: _open_stream(config, wanted),
            check_stream=lambda wanted: _check_stream(config, wanted),
            schema_mismatch=doubted,
        )
        parts = (
            relay.run(),
            relay.expire(),
            hub.run(),
            hub.run_timers(),
            authenticator.run(),
            reloading.watch_schema(),
            _watch_standbys(probe, hub),
        )
        await stack.enter_async_context(_background_tasks(parts))
        vitals = StatusReader(
            hub=hub,
            replication_reader=relay,
            intake=intake,
            changelog=changelog,
            executor=probe,
            authenticator=authenticator,
            login=login,
            pool=pool,
        )
        await stack.enter_async_context(_serve_admin(config.admin, vitals, metrics))
        app = build_app(hub, authenticator, config)
        routes = LoginRoutes(login, authenticator, config.server, records)
        routes.add_to(app.router)
        if extend_app is not None:
            extend_app(app)
        runner = build_runner(app)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        stack.push_async_callback(hub.shutdown, config.server.shutdown_grace)
        site = web.TCPSite(runner, config.server.host, config.server.port, backlog=4096)
        await _start_listening(site, "server")
        stack.push_async_callback(site.stop)
        yield RunningService(runner.addresses[0][1], hub, reloading)


@asynccontextmanager
async def _serve_admin(
    config: AdminConfig, status: StatusReader, metrics: Metrics
) -> AsyncIterator[None]:
    """Serve probes and metrics, if there is a port for them, until all else has stopped."""
    if not config.port:
        yield
        return

    async def exposition() -> bytes:
        return metrics.exposition(await status.read_metrics())

    app = build_admin_app(
        config, not_ready_reasons=status.not_ready_reasons, fetch_metrics=exposition
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await _start_listening(web.TCPSite(runner, config.host, config.port), "admin")
        yield
    finally:
        await runner.cleanup()


async def _start_listening(site: web.TCPSite, section: str) -> None:
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
async def _background_tasks(coroutines: Iterable[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run what runs all the time, until the block is left; one that fails ends them all."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(part) for part in coroutines]
        yield
        for task in tasks:
            task.cancel()


async def _watch_standbys(probe: QueryExecutor, hub: Hub) -> None:
    """Let events wait for visibility as long as commits may wait for a synchronous standby."""
    while True:
        hub.set_waits_for_visibility(waits=await probe.has_synchronous_standbys())
        await asyncio.sleep(_STANDBY_POLL_SECONDS)


def _open_stream(config: Config, applied: AppliedConfig) -> AbstractAsyncContextManager[WalStream]:
    shown = applied.readable_collections.values()
    return open_stream(
        config.database.url,
        config.replication,
        list(applied.streamed_tables.values()),
        record_keys={collection.table.name: (collection.key.name,) for collection in shown},
        max_transaction_bytes=config.changelog.max_size,
        on_wait=_report_slot_wait,
    )


async def _check_stream(config: Config, applied: AppliedConfig) -> None:
    """Find out whether the durable slot's stream could be opened anew with a world's tables."""
    if config.replication.slot.durable:
        tables = list(applied.streamed_tables.values())
        await dry_run_stream(config.database.url, config.replication, tables)


async def _advance_slot(config: Config) -> None:
    """Move the durable slot to where the server's WAL ends, if that can be."""
    try:
        async with await open_ordinary_connection(config.database.url) as connection:
            await slot_status.advance_slot(connection, config.replication.slot.name)
    except psycopg.Error as error:
        log.warning(
            "slot.kept", slot=config.replication.slot.name, reason=message_without_values(error)
        )


def _report_slot_wait(wait: SlotWait) -> None:
    log.warning("slot.waiting", pids=wait.pids, prepared=wait.prepared)
