"""Runs the service as a process: signals, open files, garbage collection, logging.

Called by the command ``run`` and by workers; tests and the demo use ``run_service`` alone.
"""

import asyncio
import gc
import resource
import signal
from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Protocol, TypeVar

import structlog

from pgrealtime import __version__
from pgrealtime.config.model import Config
from pgrealtime.observe.log import configure_logging
from pgrealtime.service.build import background_tasks

log = structlog.get_logger(__name__)

_RESERVED_FILES = 100
"""Files beyond the connections: database sessions, logs, calls being answered."""
_GC_THRESHOLD = 10_000
"""Objects between two garbage collections. A slice of changes makes thousands that live until it is
delivered; with Python's default of 700, looking for garbage among them took a fifth of the CPU."""


_S = TypeVar("_S")


class Service(Protocol):
    """A service that accepts connections, in one process or in several."""

    @property
    def port(self) -> int:
        """Of the API."""

    @property
    def connection_count(self) -> int:
        """The open connections."""

    async def reload(self) -> None:
        """Apply the configuration as it is now; the log says what became of it."""


async def serve(config: Config, running: AbstractAsyncContextManager[Service]) -> None:
    """Run the service until SIGTERM or SIGINT, and have it reload at SIGHUP.

    Raises:
        PgRealtimeError: The service can't start, or can't continue.
    """
    configure_logging(config.logging)
    prepare_process(config)
    stop, hangup = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    async with AsyncExitStack() as stack:
        service = await start_unless_stopped(stop, stack.enter_async_context(running))
        if service is None:
            return
        settle_memory()
        await stack.enter_async_context(background_tasks([_reload_on_signal(hangup, service)]))
        log.info(
            "server.started", version=__version__, url=f"http://{config.server.host}:{service.port}"
        )
        await stop.wait()
        log.info("server.stopping", connections=service.connection_count)


def prepare_process(config: Config) -> None:
    """Set what the whole process has: its limits of open files and of garbage."""
    gc.set_threshold(_GC_THRESHOLD, 10, 10)
    _raise_file_limit(config.realtime.max_connections)


def settle_memory() -> None:
    """Exempt what was made until now from garbage collection; called once the service runs."""
    # It is mostly there for good: modules, configuration, schema. Looking for garbage among it too
    # took ten times as long, all in one piece.
    gc.collect()
    gc.freeze()


async def start_unless_stopped(stop: asyncio.Event, starting: Awaitable[_S]) -> _S | None:
    """Return the service once it runs, or None if the process is to stop before that.

    The start is awaited in this task, because the task that enters the service's task group has to
    leave it, too. So it is interrupted by a timeout, set to now once ``stop`` is set.
    """

    async def expire_when_stopped(start: asyncio.Timeout) -> None:
        await stop.wait()
        start.reschedule(asyncio.get_running_loop().time())

    try:
        async with asyncio.timeout(None) as start:
            watcher = asyncio.create_task(expire_when_stopped(start))
            try:
                return await starting
            finally:
                watcher.cancel()
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


async def _reload_on_signal(hangup: asyncio.Event, service: Service) -> None:
    while True:
        await hangup.wait()
        hangup.clear()
        await service.reload()
