"""Serves the public and the admin port."""

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from aiohttp import web

from pgrealtime.api.admin import Look, build_admin_app
from pgrealtime.api.app import build_runner
from pgrealtime.config.model import AdminConfig, ServerConfig
from pgrealtime.errors import PgRealtimeError
from pgrealtime.hub.hub import Hub
from pgrealtime.service.looking import page_text

_BACKLOG = 4096
"""Connections that the kernel may hold for us: all clients reconnect at once after a restart."""


@asynccontextmanager
async def serve_public(
    app: web.Application, hub: Hub, config: ServerConfig, *, is_shared: bool = False
) -> AsyncIterator[int]:
    """Serve the API and give its port; at the end stop listening, then end the connections.

    A shared port is one that other processes listen on, too: the kernel distributes connections.

    Raises:
        PgRealtimeError: Code ``port_unavailable``.
    """
    runner = build_runner(app)
    await runner.setup()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(runner.cleanup)
        stack.push_async_callback(hub.shutdown, config.shutdown_grace)
        site = web.TCPSite(
            runner, config.host, config.port, backlog=_BACKLOG, reuse_port=is_shared or None
        )
        await _start_listening(site, "server")
        stack.push_async_callback(site.stop)
        yield runner.addresses[0][1]


@asynccontextmanager
async def serve_admin(
    config: AdminConfig,
    not_ready_reasons: Callable[[], Awaitable[list[str]]],
    fetch_metrics: Callable[[], Awaitable[bytes]],
    look: Look,
) -> AsyncIterator[None]:
    """Serve probes, metrics and the page, if a port is configured for them.

    Raises:
        PgRealtimeError: Code ``port_unavailable``.
    """
    if not config.port:
        yield
        return
    app = build_admin_app(
        config,
        not_ready_reasons=not_ready_reasons,
        fetch_metrics=fetch_metrics,
        look=look,
        page=page_text(),
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
        raise port_error(error, section) from error


def port_error(error: OSError, section: str) -> PgRealtimeError:
    """Return the error of a port that can't be listened on."""
    return PgRealtimeError(
        f"can't listen on {section}.port",
        detail=str(error.strerror or error),
        hint=_port_hint(error, section),
        code="port_unavailable",
    )


def _port_hint(error: OSError, section: str) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"Give {section}.port another number, or end the process that uses it."
        case errno.EACCES:
            return f"Give {section}.port a number from 1024 on, or the process the right to use it."
        case _:
            return f"Set {section}.host to an address of this machine."
