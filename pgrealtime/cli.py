"""The commands. Errors are printed in PostgreSQL's form; the exit code says of what kind."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import quote

import click

from pgrealtime import __version__
from pgrealtime.auth.principal import GUEST, Superuser
from pgrealtime.config import Origin, read
from pgrealtime.errors import (
    AuthError,
    ConfigError,
    DatabaseUnreachableError,
    PgRealtimeError,
    RuleError,
    SetupError,
)
from pgrealtime.hub.topic import parse_topic
from pgrealtime.observe.log import configure
from pgrealtime.operate.check import check as find_faults

if TYPE_CHECKING:
    from pgrealtime.operate.who import Who

FAILED = 1
SETUP = 2
NOT_DELIVERED = 3
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
@click.argument("topic")
@click.option("--record", metavar="ID", help="The record, where the topic is of all: posts/*.")
@click.option("--token", metavar="JWT", help="The caller's token; - reads it from standard input.")
@click.option("--user", metavar="COLLECTION/ID", help="The caller is this record.")
@click.option("--guest", is_flag=True, help="The caller has no token.")
@click.option("--superuser", is_flag=True, help="The caller passes every rule.")
@click.option("--filter", "filter_", metavar="TEXT", help="The client's filter.")
@click.option("--options", metavar="JSON", help="All of the topic's options.")
@click.option("-v", "--sql", "with_sql", is_flag=True, help="Tell the statement too.")
def explain(
    path: str,
    *,
    topic: str,
    record: str | None,
    token: str | None,
    user: str | None,
    guest: bool,
    superuser: bool,
    filter_: str | None,
    options: str | None,
    with_sql: bool,
) -> None:
    """Say whether a caller hears of a record, and why: clause by clause of the rule.

    TOPIC is what the client subscribes to, such as posts/* or posts/ID. Exits with 3 when the
    answer is no.
    """
    from pgrealtime.operate.explain import explain as find_out  # noqa: PLC0415 (as for run)

    text = _with_options(topic, filter_, options)
    if record is None and parse_topic(text).record_id is None:
        raise click.UsageError("the topic is of all records: name one by --record")
    who = _who(token, user, guest=guest, superuser=superuser)
    with _reporting():
        reading = read(path, os.environ)
        config = reading.whole()
    configure(config.logging.model_copy(update={"level": "warning"}))
    with _reporting(reading.origin):
        explanation = asyncio.run(find_out(config, who, text, record, with_sql=with_sql))
    click.echo("\n".join(explanation.lines))
    if not explanation.is_delivered:
        sys.exit(NOT_DELIVERED)


def _with_options(topic: str, filter_: str | None, options: str | None) -> str:
    """Return the topic as a client submits it."""
    if filter_ is None and options is None:
        return topic
    if "?" in topic or None not in {filter_, options}:
        raise click.UsageError("options are given once: in the topic, by --options or by --filter")
    given = options if options is not None else json.dumps({"query": {"filter": filter_}})
    return f"{topic}?options={quote(given, safe='', errors='replace')}"


def _who(token: str | None, user: str | None, *, guest: bool, superuser: bool) -> Who:
    from pgrealtime.operate.who import Bearer, User  # noqa: PLC0415 (as for run)

    if [token is not None, user is not None, guest, superuser].count(True) != 1:
        raise click.UsageError("one caller is wanted: --token, --user, --guest or --superuser")
    if token is not None:
        return Bearer(sys.stdin.read().strip() if token == "-" else token)  # noqa: S105 (a dash)
    if user is None:
        return GUEST if guest else Superuser("")
    collection, slash, record_id = user.partition("/")
    if not (collection and slash and record_id):
        raise click.UsageError("--user is COLLECTION/ID, such as users/ann")
    return User(collection, record_id)


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
        case SetupError() | AuthError():
            return SETUP
        case _:
            return FAILED
