"""``pgrealtime init``: writes a first configuration for the tables of a database."""

from __future__ import annotations

import asyncio
import os

import click

from pgrealtime.cli.init.init import STDOUT, next_steps_text, write_config
from pgrealtime.cli.options import config_option
from pgrealtime.cli.report import report_errors


@click.command()
@config_option
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
    with report_errors():
        asyncio.run(write_config(path, url, tuple(dict.fromkeys(schemas))))
    lacks_url = bool(url) and not os.environ.get("DATABASE_URL")
    click.echo(next_steps_text(path, lacks_url=lacks_url), err=path == STDOUT)
