"""Builds the service from its configuration; starts and stops its parts in order.

Called by ``service.process`` for the command ``run``, by the demo and by tests. This is the only
module that knows all parts; each part receives what it needs as arguments.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import psycopg
from aiohttp import web

from pgrealtime.api.app import build_app
from pgrealtime.api.call_router import CallRouter
from pgrealtime.api.login import LoginRoutes
from pgrealtime.api.records import RecordRoutes
from pgrealtime.auth.account import AccountLoader
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.auth.login import LoginService
from pgrealtime.bus.base import Bus, NoBus, draw_tag
from pgrealtime.bus.postgres import PostgresBus
from pgrealtime.changelog.memory import Changelog
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.load import read_configured_catalog
from pgrealtime.collections.streamed_tables import reachable_tables
from pgrealtime.config.load import ConfigLocations, ParsedConfig
from pgrealtime.config.model import Config
from pgrealtime.errors import ConfigError
from pgrealtime.feed.base import Feed
from pgrealtime.feed.intake import Intake
from pgrealtime.hub.hub import Hub
from pgrealtime.hub.state.progress import HubSettings
from pgrealtime.inspector.inspector import Inspector
from pgrealtime.log.installed import require_client
from pgrealtime.lsn import LSN
from pgrealtime.observe.metrics import Metrics
from pgrealtime.postgres.connect import open_query_pool
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.reads.admission import Admission
from pgrealtime.reads.own_record import OwnRecordRenderer
from pgrealtime.reads.reader import ReadLimits, RecordReader
from pgrealtime.rule_queries.executor import QueryExecutor
from pgrealtime.rules.rule_set import caller_columns_read_by_rules, rule_problems
from pgrealtime.service.applied_config import AppliedConfig, fit_to_schema
from pgrealtime.service.feeds import make_feed
from pgrealtime.service.listen import serve_admin, serve_public
from pgrealtime.service.looking import look_here
from pgrealtime.service.parts import ServiceParts
from pgrealtime.service.reload import Reloader, report_unreadable_tables
from pgrealtime.service.status import StatusReader

_STANDBY_POLL_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class RunningService:
    """A service that accepts connections."""

    port: int
    hub: Hub
    reloader: Reloader
    status: StatusReader
    metrics: Metrics
    schema_mismatch: asyncio.Event
    """To be set where the schema may have changed."""
    inspector: Inspector

    @property
    def connection_count(self) -> int:
        """The open connections."""
        return len(self.hub.connections)

    async def reload(self) -> None:
        """Apply the configuration as it is now; the log says what became of it."""
        await self.reloader.reload()


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """What joins the service to the other processes that serve the same port."""

    connect_feed: Callable[[Intake], Feed]
    """Returns the feed that fills the intake."""
    bus: Bus


@asynccontextmanager
async def run_service(
    config: Config,
    *,
    read_config: Callable[[], ParsedConfig] | None = None,
    extend_app: Callable[[web.Application], None] | None = None,
    neighbours: Neighbours | None = None,
) -> AsyncIterator[RunningService]:
    """Run the service for the duration of the block.

    It starts from top to bottom and stops from bottom to top: first the public port is closed and
    the connections are ended, then the admin port, then the stream and all other tasks, last the
    bus and the query pool. A background task that fails ends the block with its error.

    ``read_config`` reads the configuration again for a reload; by default ``config`` stays.
    ``extend_app`` adds routes and middlewares to the public port. Without ``neighbours`` the
    service reads the replication stream by itself. With them it shares the port, and collections
    that don't fit the schema are locked, as after a change of it.

    Raises:
        PgRealtimeError: The service can't start.
    """
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(open_query_pool(config.database))
        reads_pool = await stack.enter_async_context(_open_reads_pool(config))
        if neighbours is None:
            applied = await apply_at_start(config, pool)
            await report_unreadable_tables(pool, applied.collections)
        else:
            applied = fit_to_schema(config, await read_configured_catalog(config, pool))
            with suppress(psycopg.Error):  # reported by the next query
                await pool.configure_row_security(reachable_tables(applied.collections).values())
        if reads_pool is not None:
            await reads_pool.configure_row_security(reachable_tables(applied.collections).values())
        bus = await stack.enter_async_context(
            _open_bus(config, NoBus(draw_tag()) if neighbours is None else neighbours.bus)
        )
        metrics, schema_mismatch = Metrics(), asyncio.Event()
        unchanged = ParsedConfig(config=config, locations=ConfigLocations(source="configuration"))
        parts = _build_parts(
            config,
            applied,
            pool,
            reads_pool,
            bus=bus,
            on_schema_mismatch=schema_mismatch.set,
            refresh_schema=lambda: reloader.wait_for_schema_refresh(),  # noqa: PLW0108 (made below)
            on_statement_seconds=metrics.observe_rule_query,
            neighbours=neighbours,
        )
        reloader = Reloader(
            applied,
            parts,
            read_config=read_config or (lambda: unchanged),
            read_catalog=partial(read_configured_catalog, pool=pool),
            schema_mismatch=schema_mismatch,
        )
        stack.callback(parts.login_service.close)
        status = StatusReader(
            # With a log a fresh process has the window of the others.
            parts,
            warm_up=config.cluster.warm_up if config.cluster.bus == "postgres" else 0.0,
        )
        inspector = Inspector(
            parts.hub,
            parts.changelog,
            # Of its own: a rule that is slow for an operator's look isn't suspended for clients.
            QueryExecutor(parts.pool),
            parts.pool,
            config=lambda: reloader.applied.config,
            problems=lambda: reloader.applied.problems,
        )
        coroutines = (
            parts.feed.run(),
            parts.hub.run(),
            parts.hub.run_timers(),
            parts.authenticator.run(),
            reloader.watch_schema(),
            _watch_standbys(parts.executor, parts.hub),
        )
        await stack.enter_async_context(background_tasks(coroutines))
        await stack.enter_async_context(
            serve_admin(
                config.admin,
                status.not_ready_reasons,
                partial(_fetch_metrics, status, metrics),
                partial(look_here, inspector, status),
            )
        )
        if neighbours is not None:
            await parts.feed.want(applied.wanted_tables)
        await parts.feed.catch_up()
        app = build_app(parts.hub, parts.authenticator, parts.calls, config)
        LoginRoutes(
            parts.login_service, parts.authenticator, config.server, parts.own_records
        ).add_routes(app.router)
        if parts.record_reader is not None:
            RecordRoutes(
                parts.record_reader,
                parts.authenticator,
                config.server,
                config.reads,
                parts.hub,
            ).add_routes(app.router)
        if extend_app is not None:
            extend_app(app)
        port = await stack.enter_async_context(
            serve_public(app, parts.hub, config.server, is_shared=neighbours is not None)
        )
        yield RunningService(port, parts.hub, reloader, status, metrics, schema_mismatch, inspector)


async def _fetch_metrics(status: StatusReader, metrics: Metrics) -> bytes:
    """Return the metrics of this process in Prometheus' text format."""
    return metrics.exposition(await status.read_metrics())


async def apply_at_start(config: Config, pool: QueryPool) -> AppliedConfig:
    """Return the collections of the configuration; unlike a later schema, they must all be valid.

    Raises:
        ConfigError: A collection doesn't fit its table, or a rule can't be evaluated.
    """
    catalog = await read_configured_catalog(config, pool)
    collections = build_collections(
        config.collections,
        catalog,
        config.auth.claim_names,
        is_strict=config.records.hidden == "strict",
    )
    if problems := tuple(rule_problems(collections)):
        raise ConfigError(problems)
    return AppliedConfig(config=config, collections=collections)


def _build_parts(
    config: Config,
    applied: AppliedConfig,
    pool: QueryPool,
    reads_pool: QueryPool | None,
    *,
    bus: Bus,
    on_schema_mismatch: Callable[[], None],
    refresh_schema: Callable[[], Awaitable[bool]],
    on_statement_seconds: Callable[[float], None],
    neighbours: Neighbours | None,
) -> ServiceParts:
    collections = applied.collections
    executor = QueryExecutor(
        pool, on_schema_mismatch=on_schema_mismatch, on_statement_seconds=on_statement_seconds
    )
    changelog = Changelog(
        LSN(0), max_bytes=config.changelog.max_size, max_age_seconds=config.changelog.max_age
    )
    settings = HubSettings(
        mirrors=config.mirrors,
        limits=config.realtime,
        logins=applied.logins,
        allows_guests=config.auth.allow_guests,
        nulls=config.records.nulls,
        hidden_fields=config.records.hidden,
        tag=bus.tag,
        can_resume=config.changelog.max_age > 0,
        # What catch-ups ask of PostgreSQL must leave connections to the dispatcher.
        max_concurrent_catch_ups=max(1, config.database.pool_size // 2),
    )
    record_reader = (
        None
        if reads_pool is None
        else _make_reader(config, applied, reads_pool, on_schema_mismatch)
    )
    hub = Hub(
        changelog,
        executor,
        collections,
        settings,
        on_schema_mismatch=on_schema_mismatch,
        wait_for_changelog=lambda lsn: feed.wait_for_changelog(lsn),  # noqa: PLW0108 (made below)
        refresh_schema=refresh_schema,
        list_reader=record_reader,
    )
    intake = Intake(changelog, hub, max_size=config.changelog.max_size)
    feed = (
        make_feed(
            config,
            intake,
            pool,
            applied.wanted_tables,
            tag=bus.tag,
            count_connections=lambda: len(hub.connections),
        )
        if neighbours is None
        else neighbours.connect_feed(intake)
    )
    accounts = AccountLoader(pool, on_schema_mismatch=on_schema_mismatch)
    admission = Admission(executor, collections)
    authenticator = Authenticator(
        config.auth,
        collections,
        accounts,
        logins=applied.logins,
        rule_columns=caller_columns_read_by_rules(collections),
        admission=admission,
    )
    return ServiceParts(
        pool=pool,
        executor=executor,
        changelog=changelog,
        feed=feed,
        hub=hub,
        authenticator=authenticator,
        calls=CallRouter(hub, authenticator, bus),
        login_service=LoginService(config.auth.login, accounts),
        admission=admission,
        own_records=OwnRecordRenderer(
            executor, collections, nulls=config.records.nulls, hidden=config.records.hidden
        ),
        reads_pool=reads_pool,
        record_reader=record_reader,
    )


@asynccontextmanager
async def _open_bus(config: Config, local: Bus) -> AsyncIterator[Bus]:
    """Give the bus of the cluster, or the local one if there is no other machine."""
    cluster, url = config.cluster, config.database.url
    if cluster.bus == "none":
        yield local
        return
    if cluster.bus == "nats":
        require_client()
        from pgrealtime.bus.nats import NatsBus  # noqa: PLC0415 (an extra, as for the feed)

        nats_bus = NatsBus(config.log, name=cluster.name, secret=cluster.secret, tag=draw_tag())
        async with nats_bus.running():
            yield nats_bus
        return
    bus = PostgresBus(url, name=cluster.name, secret=cluster.secret, tag=draw_tag())
    async with bus.running():
        yield bus


@asynccontextmanager
async def _open_reads_pool(config: Config) -> AsyncIterator[QueryPool | None]:
    if not config.reads.enabled:
        yield None
        return
    async with open_query_pool(
        config.database,
        statement_timeout=config.reads.statement_timeout,
        max_size=config.reads.pool_size,
    ) as pool:
        yield pool


def _make_reader(
    config: Config,
    applied: AppliedConfig,
    pool: QueryPool,
    on_schema_mismatch: Callable[[], None],
) -> RecordReader:
    return RecordReader(
        QueryExecutor(pool, on_schema_mismatch=on_schema_mismatch),
        applied.collections,
        nulls=config.records.nulls,
        hidden=config.records.hidden,
        limits=ReadLimits(
            max_joined_rows=config.reads.max_joined_rows,
            max_answer_bytes=config.reads.max_answer_size,
            max_seconds=config.reads.statement_timeout,
        ),
    )


async def _watch_standbys(executor: QueryExecutor, hub: Hub) -> None:
    """Delay events until their commits are visible, while there are synchronous standbys.

    With synchronous replication a commit is in the WAL before its transaction becomes visible.
    """
    while True:
        hub.set_waits_for_visibility(waits=await executor.has_synchronous_standbys())
        await asyncio.sleep(_STANDBY_POLL_SECONDS)


@asynccontextmanager
async def background_tasks(coroutines: Iterable[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run the coroutines until the end of the block; one that fails cancels the block."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(coroutine) for coroutine in coroutines]
        yield
        for task in tasks:
            task.cancel()
