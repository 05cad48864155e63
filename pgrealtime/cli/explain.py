"""``pgrealtime explain``: whether a caller receives events of a record, or finds it, and why."""

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from urllib.parse import quote

import click

from pgrealtime.auth.principal import GUEST, Superuser
from pgrealtime.cli.options import config_option, read_token, split_user
from pgrealtime.cli.report import EXIT_NOT_DELIVERED, report_errors
from pgrealtime.config.load import read_config
from pgrealtime.explain.caller import BearerToken, CallerSpec, NamedUser
from pgrealtime.explain.explain import Explanation, explain_delivery, explain_mirror, explain_read
from pgrealtime.observe.log import configure_logging
from pgrealtime.protocol.topic import parse_topic


@click.command()
@config_option
@click.argument("topic")
@click.option("--record", metavar="ID", help="The record, if the topic is for all: posts/*.")
@click.option("--token", metavar="JWT", help="The caller's token; - reads it from standard input.")
@click.option("--user", metavar="COLLECTION/ID", help="The caller is this user.")
@click.option("--guest", is_flag=True, help="The caller has no token.")
@click.option("--superuser", is_flag=True, help="The caller passes every rule.")
@click.option(
    "--list",
    "is_read",
    is_flag=True,
    help="Explain a read: a list of the collection, or the view of the record in the topic.",
)
@click.option(
    "--before",
    metavar="JSON",
    help="Explain what a mirror is told of an update to what the record is now: the fields that it"
    " changed, with their values before.",
)
@click.option("--sort", metavar="TEXT", help="The list's sort.")
@click.option("--filter", "filter_", metavar="TEXT", help="The client's filter.")
@click.option("--options", metavar="JSON", help="All of the topic's options.")
@click.option("-v", "--sql", "with_sql", is_flag=True, help="Print the statements too.")
def explain(
    path: str,
    *,
    topic: str,
    record: str | None,
    token: str | None,
    user: str | None,
    guest: bool,
    superuser: bool,
    is_read: bool,
    before: str | None,
    sort: str | None,
    filter_: str | None,
    options: str | None,
    with_sql: bool,
) -> None:
    """Print whether a caller receives events of a record, and the value of each clause of the rule.

    TOPIC is what the client subscribes to, such as posts/* or posts/ID. With --list: whether the
    caller finds the record in a list, or may view it. With --before: what the caller's mirror is
    told of an update. Exits with 3 if the caller receives or finds nothing.
    """
    if before is not None and is_read:
        raise click.UsageError("--before is about mirrors, --list about lists: give one of them")
    if sort is not None and not is_read:
        raise click.UsageError("only lists are sorted: --sort needs --list")
    given = {"filter": filter_, "sort": sort}
    if before is not None and options is None and "?" not in topic:
        given["mode"] = "mirror"
    text = _with_options(topic, given, options)
    if record is None and parse_topic(text).record_id is None:
        raise click.UsageError("the topic is for all records: name one with --record")
    explain_topic = _explain_function(before, is_read=is_read)
    caller_spec = _caller_spec(token, user, guest=guest, superuser=superuser)
    with report_errors():
        parsed = read_config(path)
        config = parsed.require_valid()
    configure_logging(config.logging.model_copy(update={"level": "warning"}))
    with report_errors(parsed.locations):
        explanation = asyncio.run(
            explain_topic(config, caller_spec, text, record, with_sql=with_sql)
        )
    click.echo("\n".join(explanation.lines))
    if not explanation.is_delivered:
        sys.exit(EXIT_NOT_DELIVERED)


def _explain_function(
    before: str | None, *, is_read: bool
) -> Callable[..., Coroutine[None, None, Explanation]]:
    if before is None:
        return explain_read if is_read else explain_delivery
    try:
        row = json.loads(before)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise click.UsageError('--before takes a JSON object: {"owner": "ann"}')
    return partial(explain_mirror, before=row)


def _with_options(topic: str, query: Mapping[str, str | None], options: str | None) -> str:
    given = {name: value for name, value in query.items() if value is not None}
    if not given and options is None:
        return topic
    if "?" in topic or (given and options is not None):
        raise click.UsageError(
            "give options once: in the topic, with --options or with --filter and --sort"
        )
    options_text = options if options is not None else json.dumps({"query": given})
    return f"{topic}?options={quote(options_text, safe='', errors='replace')}"


def _caller_spec(
    token: str | None, user: str | None, *, guest: bool, superuser: bool
) -> CallerSpec:
    if [token is not None, user is not None, guest, superuser].count(True) != 1:
        raise click.UsageError("give exactly one of --token, --user, --guest and --superuser")
    if token is not None:
        return BearerToken(read_token(token))
    if user is None:
        return GUEST if guest else Superuser("")
    return NamedUser(*split_user(user))
