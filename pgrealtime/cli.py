"""The commands. Errors are printed in PostgreSQL's form; the exit code says of what kind."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from pgrealtime import __version__
from pgrealtime.config import Origin, read
from pgrealtime.errors import (
    ConfigError,
    DatabaseUnreachableError,
    PgRealtimeError,
    RuleError,
    SetupError,
)
from pgrealtime.operate.check import check as find_faults

FAILED = 1
SETUP = 2
UNREACHABLE = 69
NOT_PERMITTED = 77
CONFIGURATION = 78

_NOT_PERMITTED_CODES = ("replication_attribute_missing", "plugin_refused", "select_not_granted")

_config_option = click.option(
    "-c",
    "--config",
    "path",
    envvar="PGREALTIME_CONFIG",
    default="pgrealtime.yaml",
    show_default=True,
    metavar="FILE",
    help="The configuration; also in PGREALTIME_CONFIG.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pgrealtime", message="%(prog)s %(version)s")
def main() -> None:
    """PocketBase's realtime API for the PostgreSQL database you already have."""


@main.command()
@_config_option
def run(path: str) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    # Here, because a check needs nothing of what serving needs.
    from pgrealtime.run import serve  # noqa: PLC0415

    with _reporting():
        reading = read(path, os.environ)
        config = reading.whole()
    with _reporting(reading.origin), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve(config, lambda: read(path, os.environ)))


@main.command()
@_config_option
@click.option("--no-database", is_flag=True, help="Look at the configuration alone.")
def check(path: str, *, no_database: bool) -> None:
    """Say everything that would keep the service from running."""
    with _reporting():
        reading = read(path, os.environ)
        findings = asyncio.run(find_faults(reading, with_database=not no_database))
        if findings.errors:
            raise ExceptionGroup("the check failed", findings.errors)
    for warning in findings.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo("\n".join(("ok", *findings.facts)))


@main.command()
@_config_option
@click.option(
    "--url",
    envvar="DATABASE_URL",
    default="",
    help="Of the database; also in DATABASE_URL. Without one libpq's PG* variables count.",
)
@click.option(
    "--schema",
    "schemas",
    multiple=True,
    default=["public"],
    show_default=True,
    help="Whose tables are to be served; may be given several times.",
)
def init(path: str, url: str, schemas: tuple[str, ...]) -> None:
    """Write a configuration for the tables that are there, all rules locked."""
    from pgrealtime.operate.init import next_steps, write  # noqa: PLC0415

    with _reporting():
        asyncio.run(write(path, url, tuple(dict.fromkeys(schemas))))
    lacks_url = bool(url) and not os.environ.get("DATABASE_URL")
    click.echo(next_steps(path, lacks_url=lacks_url), err=path == "-")


@main.command()
@click.option("--port", default=8090, show_default=True, help="Of the page; 0 takes a free one.")
@click.option("--embedded", is_flag=True, help="Leave a PostgreSQL of this machine alone.")
@click.option("--no-browser", is_flag=True, help="Only print the page's address.")
def demo(*, port: int, embedded: bool, no_browser: bool) -> None:
    """Show what it does: a throwaway PostgreSQL, an application, a page to watch."""
    from pgrealtime.demo.show import show  # noqa: PLC0415

    showing = show(port=port, embedded=embedded, browse=not no_browser, say=click.echo)
    with _reporting(), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(showing)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 (there is none for Windows and PyPy)
    except ImportError:
        return None
    return uvloop.new_event_loop


@contextmanager
def _reporting(origin: Origin | None = None) -> Iterator[None]:
    """Print our errors instead of a traceback, and exit with their code.

    Anything else is a fault of the program and keeps its traceback.
    """
    try:
        yield
    except (PgRealtimeError, ExceptionGroup) as error:
        errors = list(_leaves(error))
        ours = [one for one in errors if isinstance(one, PgRealtimeError)]
        if len(ours) < len(errors):
            raise
    else:
        return
    for one in ours:
        placed = origin.locate(one) if origin and isinstance(one, ConfigError) else one
        click.echo(str(placed), err=True)
    sys.exit(exit_code(ours[0]))


def _leaves(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def exit_code(error: PgRealtimeError) -> int:
    """Return the exit code of an error, by sysexits.h where that has one."""
    match error:
        case ConfigError() | RuleError():
            return CONFIGURATION
        case DatabaseUnreachableError():
            return UNREACHABLE
        case SetupError() if error.error_code == "database_url_invalid":
            return CONFIGURATION
        case SetupError() if error.error_code in _NOT_PERMITTED_CODES:
            return NOT_PERMITTED
        case SetupError():
            return SETUP
        case _:
            return FAILED
