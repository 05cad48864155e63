"""``pgrealtime explain-error``: what an error's code means, and what to do about it."""

import click

from pgrealtime.error_codes import ERROR_CODES, describe_code, list_codes
from pgrealtime.spelling import did_you_mean


@click.command("explain-error")
@click.argument("code", required=False)
def explain_error(code: str | None) -> None:
    """Print cause and cure of an error CODE; without one, list all codes."""
    if code is None:
        click.echo("\n".join(list_codes()))
    elif code not in ERROR_CODES:
        hint = did_you_mean(code, ERROR_CODES)
        raise click.UsageError(f'no error has the code "{code}"{hint and f"; {hint}"}')
    else:
        click.echo("\n".join(describe_code(code)))
