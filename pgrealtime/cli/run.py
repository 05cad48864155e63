"""``pgrealtime run``: serves the configured collections."""

from __future__ import annotations

import os
from functools import partial

import click

from pgrealtime.cli.options import config_option, run_coroutine
from pgrealtime.cli.report import report_errors
from pgrealtime.config.load import read_config
from pgrealtime.service.process import serve


@click.command()
@config_option
def run(path: str) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    with report_errors():
        parsed = read_config(path, os.environ)
        config = parsed.require_valid()
    with report_errors(parsed.locations):
        run_coroutine(serve(config, partial(read_config, path, os.environ)))
