"""Options and arguments that several commands have, and how they run a coroutine."""

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any

import click

config_option = click.option(
    "-c",
    "--config",
    "path",
    envvar="PGREALTIME_CONFIG",
    default="pgrealtime.yaml",
    show_default=True,
    metavar="FILE",
    help="Configuration file; also read from PGREALTIME_CONFIG.",
)


def read_token(token: str) -> str:
    """Return the token, from standard input for "-": others can see a process's arguments."""
    return sys.stdin.read().strip() if token == "-" else token  # noqa: S105 (a dash)


def split_user(user: str) -> tuple[str, str]:
    """Return collection and id of COLLECTION/ID; raises ``UsageError`` if one is missing."""
    collection, _, record_id = user.partition("/")
    if not (collection and record_id):
        raise click.UsageError("a user is COLLECTION/ID, such as users/ann")
    return collection, record_id


def run_coroutine(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in a new event loop."""
    try:
        import uvloop  # noqa: PLC0415 (there is none for Windows and PyPy)
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(coroutine)
