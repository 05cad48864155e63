"""Parses a database URL as libpq would, for everything that connects to PostgreSQL."""

from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, timeout_from_conninfo

from pgrealtime.errors import SetupError

DEAD_NETWORK_SETTINGS = {
    "connect_timeout": "10",
    # What stays unacknowledged for so long shows that the network is dead; Linux alone would trust
    # it for a quarter of an hour.
    "tcp_user_timeout": "30000",
    "keepalives_idle": "30",
}
"""Settings of libpq that end a connection which is dead without an error."""


def parse_database_url(url: str) -> dict[str, Any]:
    """Return libpq's settings, as the URL gives them.

    Raises:
        SetupError: Code ``database_url_invalid``.
    """
    try:
        parameters = conninfo_to_dict(url)
        timeout_from_conninfo(parameters)  # otherwise checked only while connecting
    except psycopg.ProgrammingError:
        raise _invalid_url_error() from None  # the driver's message quotes what may be a password
    # To libpq a password ends at its first "@", so the rest of it would be shown as the name of a
    # host that isn't found. A host that begins with "@" is an abstract socket.
    if any("@" in host[1:] for host in str(parameters.get("host", "")).split(",")):
        raise _invalid_url_error()
    # The primary is meant. libpq would test whether the session may write, and ours never may.
    if parameters.get("target_session_attrs") == "read-write":
        parameters["target_session_attrs"] = "primary"
    return parameters


def _invalid_url_error() -> SetupError:
    return SetupError(
        "the database URL can't be understood",
        hint="Write postgresql://user:password@host:port/database, special characters in"
        " percent form.",
        code="database_url_invalid",
    )
