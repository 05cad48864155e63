"""``pgrealtime check``: everything that would keep the service from running, in one go."""

from __future__ import annotations

import asyncio
import os
from functools import partial

import click

from pgrealtime.cli.check.check import run_check
from pgrealtime.cli.options import config_option
from pgrealtime.cli.report import report_errors
from pgrealtime.config.load import read_config


@click.command()
@config_option
@click.option("--no-database", is_flag=True, help="Look at the configuration alone.")
def check(path: str, *, no_database: bool) -> None:
    """Say everything that would keep the service from running."""
    with report_errors():
        parsed = read_config(path, os.environ)
        print_progress = partial(click.echo, err=True)
        result = asyncio.run(
            run_check(parsed, with_database=not no_database, report_progress=print_progress)
        )
        if result.errors:
            raise ExceptionGroup("the check failed", result.errors)
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo("\n".join(("ok", *result.summary_lines)))
