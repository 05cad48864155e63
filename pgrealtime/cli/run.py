"""``pgrealtime run``: serves the configured collections."""

import sys
from contextlib import AbstractAsyncContextManager
from functools import partial

import click

from pgrealtime.cli.options import config_option, run_coroutine
from pgrealtime.cli.report import report_errors
from pgrealtime.config.load import read_config
from pgrealtime.service.build import run_service
from pgrealtime.service.process import Service, serve
from pgrealtime.workers.count import count_workers
from pgrealtime.workers.main import run_workers

SWITCH_SECONDS = 0.0005
"""After so long a thread that runs Python code lets another one run. The event loop releases the
interpreter at each read, write and query, and has to get it back while other threads parse large
request bodies: with Python's default of 5 ms, events arrived later by several times that."""


@click.command()
@config_option
def run(path: str) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    with report_errors():
        parsed = read_config(path)
        config = parsed.require_valid()
    sys.setswitchinterval(SWITCH_SECONDS)
    read_again = partial(read_config, path)
    with report_errors(parsed.locations):
        count = count_workers(config)
        running: AbstractAsyncContextManager[Service] = (
            run_service(config, read_config=read_again)
            if count == 1
            else run_workers(config, count, read_config=read_again)
        )
        run_coroutine(serve(config, running))
