"""Runs the demo: database server, application, pgrealtime itself, writer and page.

Called by the command ``demo``.
"""

import asyncio
import os
import secrets
import signal
import socket
import sys
import time
import webbrowser
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import as_file, files
from random import Random
from typing import Any

import psycopg
from psycopg import AsyncConnection

from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.names import configured_table_names
from pgrealtime.collections.streamed_tables import streamed_tables
from pgrealtime.config.load import load_config
from pgrealtime.config.model import Config
from pgrealtime.demo.application import Application
from pgrealtime.demo.os_account import is_libpq_variable
from pgrealtime.demo.page import Page
from pgrealtime.demo.server import ThrowawayServer, throwaway_server
from pgrealtime.demo.writer import Writer
from pgrealtime.errors import PgRealtimeError, SetupError
from pgrealtime.observe.log import configure_logging
from pgrealtime.service.build import run_service
from pgrealtime.wal.publication import publication_sql

_HOST = "127.0.0.1"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def run_demo(
    *, port: int, embedded: bool, open_browser: bool, print_line: Callable[[str], object]
) -> None:
    """Run the demo until a signal ends it, and remove all of it.

    ``embedded`` uses the wheel's server even if this machine has one.

    Raises:
        PgRealtimeError: The demo can't start, or can't continue.
    """
    stop = asyncio.Event()
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    for name in filter(is_libpq_variable, list(os.environ)):
        del os.environ[name]  # they lead libpq to other databases
    async with asyncio.TaskGroup() as group:
        page_task = group.create_task(
            _run_until_cancelled(port, print_line, embedded=embedded, open_browser=open_browser)
        )
        await stop.wait()
        page_task.cancel()
    print_line("\nStopped. All of its files were removed.")


async def _run_until_cancelled(
    port: int, print_line: Callable[[str], object], *, embedded: bool, open_browser: bool
) -> None:
    _check_port(port)
    started = time.monotonic()
    print_line("Starting a throwaway PostgreSQL ...")
    async with throwaway_server(embedded=embedded) as server, _connect(server.url) as connection:
        secret = secrets.token_urlsafe(32)
        config = _demo_config(server.url, port, secret)
        configure_logging(config.logging)
        await _create_tables(connection, config)
        application, random = Application(connection), Random()  # noqa: S311 (jokes, no secrets)
        writer = Writer(application, random)
        page = Page(
            application,
            writer,
            collections=config.collections,
            secret=secret,
            server=f"PostgreSQL {server.version}",
            random=random,
        )
        async with run_service(config, extend_app=page.add_routes) as service:
            url = f"http://{_HOST}:{service.port}/"
            print_line(_welcome_text(server, url, time.monotonic() - started))
            if open_browser and _has_display():
                await asyncio.to_thread(webbrowser.open, url)
            async with asyncio.TaskGroup() as group:
                group.create_task(writer.run(), name="writer")
                group.create_task(server.watch(), name="server")


def _has_display() -> bool:
    """Whether a browser would open a window; one for the terminal would take over this terminal."""
    return sys.platform == "darwin" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))


def _check_port(port: int) -> None:
    try:
        with socket.create_server((_HOST, port)):
            pass
    except OSError as error:
        raise SetupError(
            f"port {port} of {_HOST} can't be used",
            detail=f"{os.strerror(error.errno or 0)}.",
            hint="Choose another one with --port; 0 takes any that is free.",
            code="port_taken",
        ) from error


def _demo_config(url: str, port: int, secret: str) -> Config:
    """Return the configuration ``demo.yaml`` for this run, independent of the environment."""
    with as_file(files("pgrealtime.demo").joinpath("demo.yaml")) as path:
        return load_config(
            path,
            {
                "DATABASE_URL": url,
                "DEMO_SECRET": secret,
                "PGREALTIME_SERVER__HOST": _HOST,
                "PGREALTIME_SERVER__PORT": str(port),
                # Pages of other origins have access neither to the tokens nor to the API.
                "PGREALTIME_SERVER__CORS_ORIGINS": "",
                "PGREALTIME_SERVER__SHUTDOWN_GRACE": "1s",
                "PGREALTIME_LOGGING__LEVEL": "warning",
            },
        )


@asynccontextmanager
async def _connect(url: str) -> AsyncIterator[AsyncConnection[Any]]:
    try:
        connection = await psycopg.AsyncConnection.connect(url, autocommit=True)
    except psycopg.OperationalError as error:
        raise PgRealtimeError(
            "the demo's PostgreSQL can't be reached", detail=str(error).strip()
        ) from error
    async with connection:
        yield connection


async def _create_tables(connection: AsyncConnection[Any], config: Config) -> None:
    """Create the application's tables, and the publication that pgoutput needs of them."""
    await connection.execute(files("pgrealtime.demo").joinpath("demo.sql").read_bytes())
    names = configured_table_names(config.collections, config.database.schemas)
    catalog = await read_catalog(connection, names=names)
    streamed = streamed_tables(
        build_collections(config.collections, catalog, config.auth.claim_names)
    ).values()
    publication = publication_sql(config.replication.publication, streamed, catalog.server_version)
    await connection.execute(publication.encode())


def _welcome_text(server: ThrowawayServer, url: str, seconds: float) -> str:
    return f"""
  Open       {url}
  Database   {server.url}

  PostgreSQL {server.version} ({server.origin}), ready in {seconds:.1f} s.
  It lives in {server.directory}.
  Ctrl-C ends it and removes everything.
"""
