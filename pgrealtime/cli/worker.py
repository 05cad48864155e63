"""``pgrealtime worker``: a process that ``run`` starts where the service has several; hidden."""

import socket
import sys

import click

from pgrealtime.cli.options import run_coroutine
from pgrealtime.cli.run import SWITCH_SECONDS
from pgrealtime.workers.worker import run_worker


@click.command(hidden=True)
@click.argument("frames", type=int)
@click.argument("messages", type=int)
def worker(frames: int, messages: int) -> None:
    """Serve connections from what comes by two inherited sockets, given by their numbers."""
    sys.setswitchinterval(SWITCH_SECONDS)
    run_coroutine(run_worker(socket.socket(fileno=frames), socket.socket(fileno=messages)))
