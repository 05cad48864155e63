"""The main process: reads the stream, feeds the workers, supervises them, and is their one face.

It has the slot, the admin port and the signals; connections, rules and subscribe calls are the
workers'.
"""

import asyncio
import random
import socket
import time
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

import msgspec
import psycopg
import structlog

from pgrealtime.bus.base import draw_tag
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.catalog.model import Catalog
from pgrealtime.changes import TableName
from pgrealtime.collections.load import read_configured_catalog
from pgrealtime.config.load import ParsedConfig
from pgrealtime.config.model import Config, ServerConfig
from pgrealtime.errors import HolderGoneError, PgRealtimeError, WorkerGoneError
from pgrealtime.feed.broadcast import Broadcaster
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.window import EncodedWindow
from pgrealtime.inspector.answers import (
    ALIKE_VIEWS,
    Overview,
    States,
    View,
    Worker,
    make_overview,
    merge,
    of_worker_number,
)
from pgrealtime.inspector.inspector import row_limit
from pgrealtime.lsn import LSN
from pgrealtime.observe.metrics import Metrics, MetricValues, sum_values
from pgrealtime.observe.redact import message_without_values
from pgrealtime.postgres.connect import open_query_pool
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.service.applied_config import AppliedConfig
from pgrealtime.service.build import apply_at_start, background_tasks
from pgrealtime.service.feeds import make_feed
from pgrealtime.service.listen import port_error, serve_admin
from pgrealtime.service.reload import (
    fit_reloaded,
    log_rejected,
    log_reloaded,
    report_unreadable_tables,
)
from pgrealtime.service.status import fetch_row, read_slot, read_slot_lag
from pgrealtime.workers.count import warn_of_few_cores, worker_config
from pgrealtime.workers.link import Answering
from pgrealtime.workers.messages import (
    Answer,
    Apply,
    AskForGap,
    Bytes,
    Call,
    Counts,
    Deliver,
    Done,
    Failed,
    Hello,
    Look,
    MayListen,
    Message,
    Prepare,
    RefreshSchema,
    Wait,
    Waited,
    Want,
    named_tables,
)
from pgrealtime.workers.past_counts import PastCounts, of_worker
from pgrealtime.workers.process import WorkerProcess
from pgrealtime.workers.shared_tables import GapRequests, SharedTables

log = structlog.get_logger(__name__)

_decode_view: Callable[[bytes], View] = msgspec.json.Decoder(View).decode

_POOL_SIZE = 2
"""Of the main process: the catalogue, the slot's lag, probes."""
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 10.0
_LONG_LIFE_SECONDS = 60.0
"""A worker that ran for so long is started again after the first pause."""
_STOP_MARGIN_SECONDS = 10.0
"""For what a worker does after the grace of its connections."""
_PREPARE_SECONDS = 30.0
_PUBLICATION_SECONDS = 30.0
_LOOK_SECONDS = 10.0
_MIN_PATIENCE_SECONDS = 0.1
_POLL_SECONDS = 0.01
"""Interval at which the start of the workers is polled."""


class RunningWorkers:
    """A service of several processes that accepts connections; a ``Service``."""

    def __init__(self, team: "Team", port: int) -> None:
        self._team = team
        self.port = port

    @property
    def connection_count(self) -> int:
        """The open connections, as of the last second."""
        return self._team.count_connections()

    async def reload(self) -> None:
        """Apply the configuration as it is now in all workers, or in none; the log says which."""
        await self._team.reload()


@asynccontextmanager
async def run_workers(
    config: Config, count: int, *, read_config: Callable[[], ParsedConfig]
) -> AsyncIterator[RunningWorkers]:
    """Run the service in so many workers for the duration of the block.

    It starts and stops in the order of ``run_service``. ``read_config`` reads the configuration
    again for a reload.

    Raises:
        PgRealtimeError: The service can't start.
    """
    warn_of_few_cores(count)
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(
            open_query_pool(config.database, max_size=_POOL_SIZE)
        )
        applied = await apply_at_start(config, pool)
        await report_unreadable_tables(pool, applied.collections)
        port = stack.enter_context(_reserved_port(config.server))
        team = Team(applied, pool, read_config, count=count, port=port)
        await stack.enter_async_context(background_tasks(team.coroutines()))
        await stack.enter_async_context(
            serve_admin(config.admin, team.not_ready_reasons, team.fetch_metrics, team.look)
        )
        await stack.enter_async_context(team.running())
        yield RunningWorkers(team, port)


@contextmanager
def _reserved_port(config: ServerConfig) -> Iterator[int]:
    """Give the port on which workers may listen, and nobody else, until the end of the block.

    Raises:
        PgRealtimeError: Code ``port_unavailable``.
    """
    port = config.port
    with ExitStack() as stack:
        try:
            found = socket.getaddrinfo(
                config.host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            for family, kind, protocol, _, address in dict.fromkeys(found):
                # With SO_REUSEPORT it would be shared with another pgrealtime that has it already.
                with socket.socket(family, kind, protocol) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    _bind(probe, (address[0], port, *address[2:]))
                    port = probe.getsockname()[1]
                reserved = stack.enter_context(socket.socket(family, kind, protocol))
                reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                # It never listens, so it gets no connections.
                _bind(reserved, (address[0], port, *address[2:]))
        except OSError as error:
            raise port_error(error, "server") from error
        yield port


def _bind(bound: socket.socket, address: tuple[object, ...]) -> None:
    if bound.family is socket.AF_INET6:
        bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as asyncio does
    bound.bind(address)


class Team:
    """The workers, and what the main process has for them."""

    def __init__(
        self,
        applied: AppliedConfig,
        pool: QueryPool,
        read_config: Callable[[], ParsedConfig],
        *,
        count: int,
        port: int,
    ) -> None:
        self._started_at = time.time()
        self._config = config = applied.config
        self._count = count
        self._port = port
        self._pool = pool
        self._read_config = read_config
        self._metrics = Metrics()
        self._workers: dict[int, WorkerProcess] = {}
        limits = config.changelog
        self._window = EncodedWindow(
            LSN(0), max_bytes=limits.max_size, max_age_seconds=limits.max_age
        )
        # Within the time that reading may pause, so that one stuck worker doesn't end the stream.
        patience_seconds = max(_MIN_PATIENCE_SECONDS, config.replication.max_pause * 0.75)
        self._broadcaster = Broadcaster(self._window, patience_seconds=patience_seconds)
        self._feed = make_feed(
            config,
            Intake(self._window, self._broadcaster, max_size=limits.max_size),
            pool,
            applied.wanted_tables,
            tag=draw_tag(),
            count_connections=self.count_connections,
        )
        self._tables = SharedTables(self._feed, self._read_tables, applied.wanted_tables)
        self._gaps = GapRequests(self._feed, lambda: len(self._serving()))
        self._past = PastCounts()
        self._able_to_listen: set[int] = set()
        self._may_listen = asyncio.Event()
        self._is_started = False
        self._stopping = asyncio.Event()
        self._reload_lock = asyncio.Lock()

    @property
    def workers(self) -> Collection[WorkerProcess]:
        """The workers of this moment, those that are starting or ending included."""
        return self._workers.values()

    def count_connections(self) -> int:
        """Return the open connections, as of the last second."""
        return sum(worker.connection_count for worker in self.workers)

    def _serving(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers.values() if worker.is_serving]

    async def _read_tables(self, names: Collection[TableName]) -> Catalog:
        try:
            async with self._pool.connection() as connection:
                return await read_catalog(connection, names=names)
        except psycopg.Error as error:
            raise PgRealtimeError(
                "the catalogue can't be read", detail=message_without_values(error), code="catalog"
            ) from error

    # -- running

    def coroutines(self) -> Sequence[Coroutine[Any, Any, None]]:
        """Return what runs beside the workers, for ever."""
        return (self._feed.run(), self._broadcaster.watch(), self._check_publication())

    async def _check_publication(self) -> None:
        while True:
            await asyncio.sleep(_PUBLICATION_SECONDS)
            await self._feed.check_publication()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start the workers; at the end let them drain and wait for them.

        Raises:
            PgRealtimeError: A worker can't start.
        """
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._supervise(n + 1)) for n in range(self._count)]
            try:
                await self._wait_until_serving()
                self._is_started = True
                yield
            finally:
                await self._stop(tasks)

    async def _wait_until_serving(self) -> None:
        while len(self._serving()) < self._count:  # noqa: ASYNC110 (any of them may begin anew)
            await asyncio.sleep(_POLL_SECONDS)

    async def _stop(self, tasks: Collection[asyncio.Task[None]]) -> None:
        self._stopping.set()
        for worker in self.workers:
            if worker.is_serving:
                worker.stop()
            else:
                worker.kill()
        grace_seconds = self._config.server.shutdown_grace + _STOP_MARGIN_SECONDS
        _, late = await asyncio.wait(tasks, timeout=grace_seconds)
        for task in late:
            task.cancel()  # which kills the process

    async def _supervise(self, number: int) -> None:
        """Run a worker, and start it again whenever it ends, until the service stops."""
        pause = _FIRST_PAUSE_SECONDS
        while not self._stopping.is_set():
            began = time.monotonic()
            worker = self._workers[number] = WorkerProcess(
                Hello(number, self._worker_config(), self._port), self._broadcaster, self._answer
            )
            try:
                failure = await worker.run()
            except OSError as error:  # no memory, or too many files: perhaps later
                failure = Failed("worker_gone", "a worker can't be started", str(error.strerror))
            self._past.add(worker.counts)
            self._tables.forget(worker)
            if self._stopping.is_set():
                return
            if failure is not None and not self._is_started:
                raise failure.as_error()
            log.error(
                "worker.ended",
                worker=number,
                exit=worker.exit_code,
                code=failure and failure.code,
                reason=failure and failure.message,
                detail=failure and failure.detail,
            )
            if time.monotonic() - began >= _LONG_LIFE_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            with suppress(TimeoutError):
                async with asyncio.timeout(pause * random.uniform(0.5, 1.0)):  # noqa: S311 (jitter)
                    await self._stopping.wait()
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _worker_config(self) -> str:
        config = worker_config(self._config, self._count)
        if self._is_started:  # a successor has the window of the others
            cluster = config.cluster.model_copy(update={"warm_up": 0.0})
            config = config.model_copy(update={"cluster": cluster})
        return config.model_dump_json()

    # -- what workers ask

    def _answer(self, worker: WorkerProcess, message: Message) -> Answering:
        match message:
            case Call(tag=tag, request=request):
                return self._pass_on(tag, request)
            case Want():
                return self._want(worker, message)
            case Wait(lsn=lsn):
                return self._wait(lsn)
            case MayListen():
                return self._await_start(worker)
            case AskForGap(reason=reason, tables=tables):
                self._gaps.ask(worker, reason, named_tables(tables))
                return None
            case _:
                raise AssertionError(message)

    async def _wait(self, lsn: LSN) -> Waited:
        is_complete = await self._feed.wait_for_changelog(lsn)
        return Waited(is_complete, self._window.end_cursor.lsn)

    async def _await_start(self, worker: WorkerProcess) -> None:
        self._able_to_listen.add(worker.number)
        if len(self._able_to_listen) == self._count:
            self._may_listen.set()
        await self._may_listen.wait()

    async def _want(self, worker: WorkerProcess, want: Want) -> None:
        tables = [TableName(*pair) for pair in want.tables]
        keys = {TableName(schema, name): tuple(c) for schema, name, c in want.record_keys}
        if await self._tables.want(worker, tables, keys):
            # The others will find the same change, sooner than by their own timers.
            for other in self._serving():
                if other is not worker:
                    other.link.tell(RefreshSchema())

    def _pass_on(self, tag: str, request: bytes) -> asyncio.Future[Message]:
        for holder in self._serving():
            if holder.tag == tag and not holder.is_silent:
                return holder.link.ask_soon(Answer(request))
        raise HolderGoneError(tag)

    # -- reload

    async def reload(self) -> None:
        """Apply the configuration as it is now in all workers, or in none; the log says which."""
        async with self._reload_lock:
            began = time.monotonic()
            read_configured = partial(read_configured_catalog, pool=self._pool)
            try:
                parsed = self._read_config()
                applied = await fit_reloaded(parsed, self._config, read_configured)
                prepared = await self._prepare(applied.config)
            except PgRealtimeError as error:
                log_rejected(error)
                return
            self._config = applied.config
            await self._apply(prepared)
            await self._feed.check_publication()
            await report_unreadable_tables(self._pool, applied.collections)
            log_reloaded(parsed.require_valid(), applied, time.monotonic() - began)

    async def _prepare(self, config: Config) -> Sequence[WorkerProcess]:
        """Have the workers hold a configuration ready; return those that do.

        Raises:
            PgRealtimeError: One of them can't apply it; none of them does.
        """
        asked = self._serving()
        message = Prepare(worker_config(config, self._count).model_dump_json())
        outcomes = await asyncio.gather(
            *(_ask_in_time(worker, message) for worker in asked), return_exceptions=True
        )
        failures = [one for one in outcomes if isinstance(one, BaseException)]
        if refused := [one for one in failures if not isinstance(one, WorkerGoneError)]:
            await asyncio.gather(
                *(_ask_in_time(worker, Apply(is_accepted=False)) for worker in asked),
                return_exceptions=True,
            )
            raise refused[0]
        prepared = [w for w, one in zip(asked, outcomes, strict=True) if one is None]
        if failures and not prepared:
            raise failures[0]
        return prepared

    async def _apply(self, prepared: Sequence[WorkerProcess]) -> None:
        """Put the configuration in force: for the requests of all, then for their events.

        A mirror that is told to load anew may do so at another worker.
        """
        # Those that start from here on have this configuration.
        outdated = [worker for worker in self.workers if worker not in prepared]
        applied = list(prepared)
        for message in (Apply(is_accepted=True), Deliver()):
            outcomes = await asyncio.gather(
                *(_ask_in_time(worker, message) for worker in applied), return_exceptions=True
            )
            outdated += [w for w, one in zip(applied, outcomes, strict=True) if one is not None]
            applied = [w for w, one in zip(applied, outcomes, strict=True) if one is None]
        for worker in outdated:
            if worker.exit_code is None:
                # It is starting, hangs or has failed: it begins anew with this configuration.
                log.warning("worker.outdated", worker=worker.number)
                worker.kill()

    # -- status

    async def not_ready_reasons(self) -> list[str]:
        """Return why no traffic should be sent here; empty if it may be."""
        serving = [worker for worker in self._serving() if not worker.is_silent]
        counts = await asyncio.gather(*(worker.read_counts() for worker in serving))
        reasons = {reason for one in counts if one for reason in one.not_ready_reasons}
        if self._stopping.is_set():
            reasons.add("shutting_down")
        if len([one for one in counts if one]) < self._count:
            reasons.add("worker_away")
        status = self._feed.status
        reasons.update(status.not_ready_reasons)
        if not status.is_connected:
            reasons.add("stream_away")
        if await fetch_row(self._pool, "SELECT 1") is None:
            reasons.add("database_away")
        return sorted(reasons)

    async def fetch_metrics(self) -> bytes:
        """Return the metrics of all processes together, in Prometheus' text format."""
        serving = self._serving()
        values, counts = await self._read_values(serving)
        samples = [self._past.samples, *(one.samples for one in counts)]
        return self._metrics.exposition(values, samples, workers=len(serving))

    async def _read_values(
        self, serving: Sequence[WorkerProcess]
    ) -> tuple[MetricValues, Sequence[Counts]]:
        """Return the metrics of all processes together, and those of each worker."""
        counts = [one for one in await asyncio.gather(*(w.read_counts() for w in serving)) if one]
        status = self._feed.status
        lag_bytes, retained_bytes = await read_slot_lag(self._pool, status.slot_name)
        workers = sum_values([self._past.values, *(of_worker(one.values) for one in counts)])
        values = msgspec.structs.replace(
            workers,
            changes_received=status.changes_received,
            stream_breaks=status.breaks,
            changelog_bytes=self._window.size_bytes,
            is_replication_connected=status.is_connected,
            log=status.log,
            lag_bytes=lag_bytes,
            retained_bytes=retained_bytes,
        )
        return values, counts

    async def look(self, view: str, query: Mapping[str, str]) -> bytes:
        """Return a view of all workers together as JSON.

        Raises:
            PgRealtimeError: No worker has what is asked for.
        """
        if view == "overview":
            return msgspec.json.encode(await self._overview())
        serving = [worker for worker in self._serving() if not worker.is_silent]
        is_alike = view in ALIKE_VIEWS or "caller" in query
        asked = serving[:1] if is_alike else serving
        answers = await self._ask_all(asked, Look(view, dict(query)))
        return msgspec.json.encode(merge(answers, row_limit(query)))

    async def _ask_all(self, asked: Sequence[WorkerProcess], look: Look) -> Sequence[View]:
        """Return the answers of the workers that have one.

        Raises:
            PgRealtimeError: None has.
        """

        async def ask(worker: WorkerProcess) -> View:
            async with asyncio.timeout(_LOOK_SECONDS):
                answer = await worker.link.ask(look, Bytes)
            return of_worker_number(_decode_view(answer.data), worker.number)

        outcomes = await asyncio.gather(*map(ask, asked), return_exceptions=True)
        answers = [one for one in outcomes if not isinstance(one, BaseException)]
        if answers:
            return answers
        refused = [one for one in outcomes if isinstance(one, PgRealtimeError)]
        raise refused[0] if refused else WorkerGoneError("no worker answers")

    async def _overview(self) -> Overview:
        serving = self._serving()
        values, _ = await self._read_values(serving)
        answering = [worker for worker in serving if not worker.is_silent]
        answers = await self._ask_all(answering, Look("states", {})) if answering else ()
        config, slot_name = self._config, self._feed.status.slot_name
        return make_overview(
            values,
            merge(answers, 1) if answers else States(by_state={}, last_change_at=None),
            config,
            not_ready=await self.not_ready_reasons(),
            slot=await read_slot(self._pool, slot_name, config),
            started_at=self._started_at,
            workers=[
                Worker(
                    number=one.number,
                    connections=one.connection_count,
                    is_answering=one.is_serving and not one.is_silent,
                )
                for one in sorted(self.workers, key=lambda one: one.number)
            ],
        )


async def _ask_in_time(worker: WorkerProcess, message: Message) -> None:
    try:
        async with asyncio.timeout(_PREPARE_SECONDS):
            await worker.link.ask(message, Done)
    except TimeoutError:
        raise WorkerGoneError("the worker doesn't answer") from None
