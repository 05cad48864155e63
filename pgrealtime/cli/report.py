"""Prints a command's errors as PostgreSQL does (message, DETAIL, HINT), and exits with a code.

Every command runs in ``report_errors``. The exit code tells the kind of the first error.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from pgrealtime import errors
from pgrealtime.config.load import ConfigLocations
from pgrealtime.errors import PgRealtimeError

EXIT_FAILED = 1
EXIT_SETUP = 2
"""Something beside the configuration has to be set up; click exits with it for a usage error."""
EXIT_NOT_DELIVERED = 3
"""Of ``explain``: the caller would not receive the event."""
# The others are those of sysexits.h.
EXIT_UNREACHABLE = 69
EXIT_NOT_PERMITTED = 77
EXIT_CONFIGURATION = 78

_NOT_PERMITTED_CODES = ("replication_attribute_missing", "plugin_refused", "select_not_granted")


@contextmanager
def report_errors(locations: ConfigLocations | None = None) -> Iterator[None]:
    """Print the program's own errors instead of a traceback, and exit with the first one's code.

    Any other error is a bug: it is raised again, as is a group that contains one. ``locations``
    adds file and line to problems of the configuration.
    """
    try:
        yield
    except (PgRealtimeError, ExceptionGroup) as error:
        found = list(_flatten_errors(error))
        ours = [reported for reported in found if isinstance(reported, PgRealtimeError)]
        if len(ours) < len(found):
            raise
    else:
        return
    for reported in ours:
        located = (
            locations.locate(reported)
            if locations and isinstance(reported, errors.ConfigError)
            else reported
        )
        click.echo(str(located), err=True)
    sys.exit(exit_code(ours[0]))


def _flatten_errors(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            yield from _flatten_errors(inner)
    else:
        yield error


def exit_code(error: PgRealtimeError) -> int:
    """Return the exit code of an error."""
    match error:
        case errors.ConfigError() | errors.RuleError() | errors.RuleTestError():
            return EXIT_CONFIGURATION
        case errors.DatabaseUnreachableError():
            return EXIT_UNREACHABLE
        case errors.SetupError() if error.error_code == "database_url_invalid":
            return EXIT_CONFIGURATION
        case errors.SetupError() if error.error_code in _NOT_PERMITTED_CODES:
            return EXIT_NOT_PERMITTED
        case errors.SetupError() | errors.AuthError():
            return EXIT_SETUP
        case _:
            return EXIT_FAILED
