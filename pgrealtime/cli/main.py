"""The commands. Errors are printed in PostgreSQL's form; the exit code says of what kind."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import quote

import click

from pgrealtime import __version__
from pgrealtime.auth.principal import GUEST, Superuser
from pgrealtime.cli.check.check import run_check as find_faults
from pgrealtime.config.load import ConfigLocations, read_config
from pgrealtime.config.units import parse_duration
from pgrealtime.errors import (
    AuthError,
    ConfigError,
    DatabaseUnreachableError,
    PgRealtimeError,
    RuleError,
    SetupError,
)
from pgrealtime.observe.log import configure_logging
from pgrealtime.protocol.topic import parse_topic

if TYPE_CHECKING:
    from pgrealtime.explain.caller import CallerSpec

EXIT_FAILED = 1
EXIT_SETUP = 2
EXIT_NOT_DELIVERED = 3
EXIT_UNREACHABLE = 69
EXIT_NOT_PERMITTED = 77
EXIT_CONFIGURATION = 78

_REACHABLE_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}  # noqa: S104 (looked up)
"""How to reach what listens there."""

_THREAD_SWITCH_SECONDS = 0.0005
"""After which a thread that is busy with Python code lets another one go on. The event loop gives
the interpreter away at each read, write and query, and waits so long to get it back while bodies
are read in other threads: at Python's own 5 ms an event came later by several times that."""
_LISTEN_TOKEN_SECONDS = 30 * 86400.0
"""How long a token holds that listen makes for itself."""

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
    from pgrealtime.service.process import serve  # noqa: PLC0415

    with _report_errors():
        reading = read_config(path, os.environ)
        config = reading.require_valid()
    sys.setswitchinterval(_THREAD_SWITCH_SECONDS)
    with _report_errors(reading.locations), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve(config, lambda: read_config(path, os.environ)))


@main.command()
@_config_option
@click.option("--no-database", is_flag=True, help="Look at the configuration alone.")
def check(path: str, *, no_database: bool) -> None:
    """Say everything that would keep the service from running."""
    with _report_errors():
        reading = read_config(path, os.environ)
        note = partial(click.echo, err=True)
        findings = asyncio.run(
            find_faults(reading, with_database=not no_database, report_progress=note)
        )
        if findings.errors:
            raise ExceptionGroup("the check failed", findings.errors)
    for warning in findings.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo("\n".join(("ok", *findings.summary_lines)))


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
    from pgrealtime.explain.explain import explain as find_out  # noqa: PLC0415 (as for run)

    text = _with_options(topic, filter_, options)
    if record is None and parse_topic(text).record_id is None:
        raise click.UsageError("the topic is of all records: name one by --record")
    who = _caller_spec(token, user, guest=guest, superuser=superuser)
    with _report_errors():
        reading = read_config(path, os.environ)
        config = reading.require_valid()
    configure_logging(config.logging.model_copy(update={"level": "warning"}))
    with _report_errors(reading.locations):
        explanation = asyncio.run(find_out(config, who, text, record, with_sql=with_sql))
    click.echo("\n".join(explanation.lines))
    if not explanation.is_delivered:
        sys.exit(EXIT_NOT_DELIVERED)


def _with_options(topic: str, filter_: str | None, options: str | None) -> str:
    """Return the topic as a client submits it."""
    if filter_ is None and options is None:
        return topic
    if "?" in topic or None not in {filter_, options}:
        raise click.UsageError("options are given once: in the topic, by --options or by --filter")
    given = options if options is not None else json.dumps({"query": {"filter": filter_}})
    return f"{topic}?options={quote(given, safe='', errors='replace')}"


def _caller_spec(
    token: str | None, user: str | None, *, guest: bool, superuser: bool
) -> CallerSpec:
    from pgrealtime.explain.caller import BearerToken, NamedUser  # noqa: PLC0415 (as for run)

    if [token is not None, user is not None, guest, superuser].count(True) != 1:
        raise click.UsageError("one caller is wanted: --token, --user, --guest or --superuser")
    if token is not None:
        return BearerToken(_read_token(token))
    if user is None:
        return GUEST if guest else Superuser("")
    return NamedUser(*_split_user(user))


def _read_token(token: str) -> str:
    """Return the token, from standard input for a dash: arguments are seen by everybody."""
    return sys.stdin.read().strip() if token == "-" else token  # noqa: S105 (a dash)


def _split_user(user: str) -> tuple[str, str]:
    """Return the collection and the id that a user is given by."""
    collection, _, record_id = user.partition("/")
    if not (collection and record_id):
        raise click.UsageError("a user is COLLECTION/ID, such as users/ann")
    return collection, record_id


@main.command()
@_config_option
@click.option(
    "--url",
    envvar=["PGREALTIME_DATABASE__QUERY_URL", "DATABASE_URL"],
    default="",
    help="Of the database, by the login that rules are asked with; also in"
    " PGREALTIME_DATABASE__QUERY_URL or DATABASE_URL. Without one libpq's PG* variables count.",
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
    from pgrealtime.cli.init.init import next_steps_text, write_config  # noqa: PLC0415

    with _report_errors():
        asyncio.run(write_config(path, url, tuple(dict.fromkeys(schemas))))
    lacks_url = bool(url) and not os.environ.get("DATABASE_URL")
    click.echo(next_steps_text(path, lacks_url=lacks_url), err=path == "-")


@main.command()
@click.option("--port", default=8090, show_default=True, help="Of the page; 0 takes a free one.")
@click.option("--embedded", is_flag=True, help="Leave a PostgreSQL of this machine alone.")
@click.option("--no-browser", is_flag=True, help="Only print the page's address.")
def demo(*, port: int, embedded: bool, no_browser: bool) -> None:
    """Show what it does: a throwaway PostgreSQL, an application, a page to watch."""
    from pgrealtime.demo.show import run_demo  # noqa: PLC0415

    showing = run_demo(
        port=port, embedded=embedded, open_browser=not no_browser, print_line=click.echo
    )
    with _report_errors(), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(showing)


@main.command()
@_config_option
@click.argument("topics", nargs=-1, required=True, metavar="TOPIC...")
@click.option("--url", help="Of the service; by default where the configuration lets it listen.")
@click.option(
    "--token", default="", metavar="JWT", help="Whom to listen as; - reads it from standard input."
)
@click.option("--user", metavar="COLLECTION/ID", help="The same, by a token made for it.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many events.")
def listen(
    path: str,
    *,
    topics: tuple[str, ...],
    url: str | None,
    token: str,
    user: str | None,
    count: int | None,
) -> None:
    """Subscribe in the terminal: a line per event, until Ctrl-C.

    TOPIC is what a client subscribes to, such as posts/* or posts/ID. After a lost connection it
    goes on where it was.
    """
    from pgrealtime.cli import listen as listening  # noqa: PLC0415 (as for run)

    if token and user:
        raise click.UsageError("give --token or --user, not both")
    with _report_errors():
        held = (
            _read_token(token) if user is None else _make_token(path, user, _LISTEN_TOKEN_SECONDS)
        )
        address = (url or _configured_url(path)).rstrip("/")
        target = listening.ListenTarget(url=address, topics=topics, token=held)
        with suppress(KeyboardInterrupt):
            note = partial(click.echo, err=True)
            asyncio.run(
                listening.listen(
                    target, write_event=click.echo, write_status=note, max_events=count
                )
            )


def _configured_url(path: str) -> str:
    """Return where the configured service is reached from this machine."""
    server = read_config(path, os.environ).require_valid().server
    return (
        f"http://{_REACHABLE_HOSTS.get(server.host, server.host)}:{server.port}{server.base_path}"
    )


@main.group()
def token() -> None:
    """Make a token for development."""


@token.command()
@_config_option
@click.argument("user", metavar="COLLECTION/ID")
@click.option("--lifetime", default="1h", show_default=True, help="Such as 5m, 12h, 5d.")
def make(path: str, *, user: str, lifetime: str) -> None:
    """Print a token that names a record, signed with an issuer's secret."""
    try:
        seconds = parse_duration(lifetime)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--lifetime") from error
    with _report_errors():
        click.echo(_make_token(path, user, seconds))


def _make_token(path: str, user: str, lifetime_seconds: float) -> str:
    from pgrealtime.cli.token import make_token  # noqa: PLC0415 (as for run)

    auth = read_config(path, os.environ).require_valid().auth
    return make_token(auth, *_split_user(user), lifetime=lifetime_seconds)


@main.group()
def slot() -> None:
    """Tell of our slots on the server, or drop one that is left."""


@slot.command("list")
@_config_option
def list_(path: str) -> None:
    """Print a line per slot: who reads it, and how much WAL it retains."""
    from pgrealtime.cli.slot import list_slots  # noqa: PLC0415 (as for run)

    with _report_errors():
        lines = asyncio.run(list_slots(read_config(path, os.environ).require_valid()))
    click.echo("\n".join(lines) or "there are none")


@slot.command()
@_config_option
@click.argument("name")
def drop(path: str, *, name: str) -> None:
    """Drop a slot: what it has yet to send is missed."""
    from pgrealtime.cli.slot import drop_slot  # noqa: PLC0415 (as for run)

    with _report_errors():
        asyncio.run(drop_slot(read_config(path, os.environ).require_valid(), name))
    click.echo(f"dropped {name}")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 (there is none for Windows and PyPy)
    except ImportError:
        return None
    return uvloop.new_event_loop


@contextmanager
def _report_errors(locations: ConfigLocations | None = None) -> Iterator[None]:
    """Print our errors instead of a traceback, and exit with their code.

    Anything else is a fault of the program and keeps its traceback.
    """
    try:
        yield
    except (PgRealtimeError, ExceptionGroup) as error:
        errors = list(_flatten_errors(error))
        ours = [one for one in errors if isinstance(one, PgRealtimeError)]
        if len(ours) < len(errors):
            raise
    else:
        return
    for one in ours:
        placed = locations.locate(one) if locations and isinstance(one, ConfigError) else one
        click.echo(str(placed), err=True)
    sys.exit(exit_code(ours[0]))


def _flatten_errors(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            yield from _flatten_errors(inner)
    else:
        yield error


def exit_code(error: PgRealtimeError) -> int:
    """Return the exit code of an error, by sysexits.h where that has one."""
    match error:
        case ConfigError() | RuleError():
            return EXIT_CONFIGURATION
        case DatabaseUnreachableError():
            return EXIT_UNREACHABLE
        case SetupError() if error.error_code == "database_url_invalid":
            return EXIT_CONFIGURATION
        case SetupError() if error.error_code in _NOT_PERMITTED_CODES:
            return EXIT_NOT_PERMITTED
        case SetupError() | AuthError():
            return EXIT_SETUP
        case _:
            return EXIT_FAILED
