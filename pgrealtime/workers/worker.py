"""A worker process: serves connections from a changelog that the main process fills.

Started by the hidden command ``worker``.
"""

import asyncio
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack

import msgspec
import structlog

from pgrealtime.config.load import ConfigLocations, ParsedConfig
from pgrealtime.config.model import Config
from pgrealtime.errors import PgRealtimeError
from pgrealtime.feed.intake import Intake
from pgrealtime.observe.log import configure_logging
from pgrealtime.service.build import Neighbours, RunningService, run_service
from pgrealtime.service.process import prepare_process, settle_memory, start_unless_stopped
from pgrealtime.workers.feed import FrameReceiver, WorkerBus, WorkerFeed
from pgrealtime.workers.link import Answering, Link
from pgrealtime.workers.messages import (
    BEAT_SECONDS,
    Answer,
    Apply,
    Beat,
    Bytes,
    Counts,
    Deliver,
    Failed,
    Hello,
    Look,
    Message,
    Prepare,
    ReadCounts,
    Ready,
    RefreshSchema,
    StartFailed,
    Stop,
)

log = structlog.get_logger(__name__)

_EXIT_ABANDONED = 1


async def run_worker(frames: socket.socket, messages: socket.socket) -> None:
    """Serve until the main process says stop, or ends; the sockets lead to it."""
    loop = asyncio.get_running_loop()
    worker = _Worker()
    loop.add_signal_handler(signal.SIGTERM, worker.stop.set)
    for number in (signal.SIGINT, signal.SIGHUP):
        # A terminal sends them to all processes; what is to be done the main process says.
        loop.add_signal_handler(number, lambda: None)
    await loop.create_unix_connection(lambda: worker.link, sock=messages)
    await loop.create_unix_connection(lambda: worker.receiver, sock=frames)
    tasks = {
        asyncio.create_task(_exit_when_abandoned(worker.link), name="main process"),
        asyncio.create_task(_beat(worker), name="beat"),
    }
    hello = await worker.hello
    structlog.contextvars.bind_contextvars(worker=hello.number)
    config = Config.model_validate_json(hello.config)
    server = config.server.model_copy(update={"port": hello.port})
    config = config.model_copy(update={"server": server})
    configure_logging(config.logging)
    prepare_process(config)
    try:
        await _serve(worker, config)
    except (PgRealtimeError, ExceptionGroup) as error:
        worker.link.tell(StartFailed(_as_failed(error)))
    finally:
        for task in tasks:
            task.cancel()
        worker.link.close()
        await worker.link.closed.wait()


async def _serve(worker: "_Worker", config: Config) -> None:
    neighbours = Neighbours(connect_feed=worker.connect_feed, bus=worker.bus)
    async with AsyncExitStack() as stack:
        running = stack.enter_async_context(run_service(config, neighbours=neighbours))
        service = await start_unless_stopped(worker.stop, running)
        if service is None:
            return
        settle_memory()
        worker.service.set_result(service)
        worker.link.tell(Ready(worker.bus.tag))
        await worker.stop.wait()
        log.info("worker.stopping", connections=service.connection_count)


async def _beat(worker: "_Worker") -> None:
    """Tell the main process for ever that the event loop runs."""
    while True:
        is_running = worker.service.done() and not worker.service.cancelled()
        worker.link.tell(Beat(worker.service.result().connection_count if is_running else 0))
        await asyncio.sleep(BEAT_SECONDS)


async def _exit_when_abandoned(link: Link) -> None:
    """End the process when the main process has ended: nothing feeds this one any more."""
    await link.closed.wait()
    log.error("worker.abandoned")
    # As one process that was killed does: clients reconnect, and resume when there is a new one.
    os._exit(_EXIT_ABANDONED)


def _as_failed(error: Exception) -> Failed:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, PgRealtimeError):
        return Failed.of(error)
    log.error("worker.failed", exc_info=error)
    return Failed(PgRealtimeError.code, "a worker has failed", detail=type(error).__name__)


class _Worker:
    """The ends of the sockets, and what the main process asks."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.stop = asyncio.Event()
        self.hello: asyncio.Future[Hello] = loop.create_future()
        self.service: asyncio.Future[RunningService] = loop.create_future()
        self.receiver = FrameReceiver()
        self.link = Link(self._answer)
        self.bus = WorkerBus(self.link)
        self._verdict: asyncio.Future[bool] = loop.create_future()
        self._answers_requests, self._may_deliver = asyncio.Event(), asyncio.Event()
        """Steps of the reload: requests are answered by it, and events may be delivered by it."""
        self._reload: asyncio.Task[bool] | None = None

    def connect_feed(self, intake: Intake) -> WorkerFeed:
        """Return the feed of the service that is being built."""
        return WorkerFeed(self.receiver, self.link, intake)

    def _answer(self, message: Message) -> Answering:
        match message:
            case Hello():
                self.hello.set_result(message)
                return None
            case Stop():
                self.stop.set()
                return None
            case Answer(request=request):
                return self._answer_call(request)
            case ReadCounts():
                return self._read_counts()
            case Look(view=view, query=query):
                return self._look(view, query)
            case RefreshSchema():
                return self._refresh_schema()
            case Prepare(config=config):
                return self._prepare(config)
            case Apply(is_accepted=is_accepted):
                return self._apply(is_accepted=is_accepted)
            case Deliver():
                return self._deliver()
            case _:
                raise AssertionError(message)

    async def _answer_call(self, request: bytes) -> Bytes:
        return Bytes(await self.bus.answer(request))

    async def _refresh_schema(self) -> None:
        (await asyncio.shield(self.service)).schema_mismatch.set()

    async def _read_counts(self) -> Counts:
        service = await asyncio.shield(self.service)
        return Counts(
            values=await service.status.read_metrics(),
            samples=service.metrics.samples(),
            not_ready_reasons=await service.status.not_ready_reasons(),
        )

    async def _look(self, view: str, query: Mapping[str, str]) -> Bytes:
        service = await asyncio.shield(self.service)
        return Bytes(msgspec.json.encode(await service.inspector.look(view, query)))

    async def _prepare(self, config: str) -> None:
        """Check a configuration, and hold it until the main process has decided."""
        service = await asyncio.shield(self.service)
        locations = ConfigLocations(source="configuration")
        parsed = ParsedConfig(config=Config.model_validate_json(config), locations=locations)
        verdict: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._verdict = verdict
        is_prepared, self._answers_requests, self._may_deliver = (asyncio.Event() for _ in range(3))

        async def agree() -> bool:
            is_prepared.set()
            return await verdict

        async def wait_to_deliver() -> None:
            self._answers_requests.set()
            await self._may_deliver.wait()

        self._reload = asyncio.create_task(
            service.reloader.reload_if_agreed(parsed, agree, wait_to_deliver)
        )
        await self._reload_until(is_prepared)

    async def _apply(self, *, is_accepted: bool) -> None:
        if self._reload is not None and not self._verdict.done():
            self._verdict.set_result(is_accepted)
            await self._reload_until(self._answers_requests)

    async def _deliver(self) -> None:
        if self._reload is not None:
            self._may_deliver.set()
            await self._reload

    async def _reload_until(self, event: asyncio.Event) -> None:
        """Wait for a step of the reload, or for its end; raise what keeps it from either."""
        assert self._reload is not None, "it is awaited by those who began it"
        waiting = asyncio.create_task(event.wait())
        await asyncio.wait({self._reload, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not event.is_set():
            await self._reload
