"""Options and arguments that several commands have."""

from __future__ import annotations

import sys

import click

config_option = click.option(
    "-c",
    "--config",
    "path",
    envvar="PGREALTIME_CONFIG",
    default="pgrealtime.yaml",
    show_default=True,
    metavar="FILE",
    help="The configuration; also in PGREALTIME_CONFIG.",
)


def read_token(token: str) -> str:
    """Return the token, from standard input for "-": others can see a process's arguments."""
    return sys.stdin.read().strip() if token == "-" else token  # noqa: S105 (a dash)


def split_user(user: str) -> tuple[str, str]:
    """Return collection and id of COLLECTION/ID.

    Raises:
        click.UsageError: One of them is missing.
    """
    collection, _, record_id = user.partition("/")
    if not (collection and record_id):
        raise click.UsageError("a user is COLLECTION/ID, such as users/ann")
    return collection, record_id
