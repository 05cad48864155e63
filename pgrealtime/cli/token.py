"""``pgrealtime token make``: signs a token for development with the secret of an issuer."""

import time

import click
import jwt

from pgrealtime.cli.options import config_option, split_user
from pgrealtime.cli.report import report_errors
from pgrealtime.config.load import load_config
from pgrealtime.config.units import parse_duration
from pgrealtime.errors import AuthError
from pgrealtime.spelling import nearest_name


@click.group()
def token() -> None:
    """Sign tokens for development."""


@token.command()
@config_option
@click.argument("user", metavar="COLLECTION/ID")
@click.option(
    "--lifetime", default="1h", show_default=True, help="Lifetime, such as 5m, 12h or 5d."
)
def make(path: str, *, user: str, lifetime: str) -> None:
    """Print a token that names a record, signed with an issuer's secret."""
    try:
        seconds = parse_duration(lifetime)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--lifetime") from error
    with report_errors():
        click.echo(make_configured_token(path, user, seconds))


def make_configured_token(path: str, user: str, lifetime_seconds: float) -> str:
    """Return a token of COLLECTION/ID, signed with the secret of an issuer of the collection.

    The record isn't looked up: there may be none.

    Raises:
        PgRealtimeError: The file has problems, or no issuer that could sign the token.
        click.UsageError: The user isn't COLLECTION/ID.
    """
    signing = [issuer for issuer in load_config(path).auth.issuers if issuer.secret]
    collection, record_id = split_user(user)
    issuer = next((issuer for issuer in signing if issuer.collection == collection), None)
    if issuer is not None:
        expiry = int(time.time() + lifetime_seconds)
        claims: dict[str, object] = {issuer.id_claim: record_id, "exp": expiry}
        if issuer.issuer:
            claims["iss"] = issuer.issuer
        if issuer.audience:
            claims["aud"] = issuer.audience
        return jwt.encode(claims, issuer.secret, algorithm="HS256")
    suggestion = nearest_name(collection, {issuer.collection for issuer in signing})
    raise AuthError(
        f'no issuer of the configuration can sign tokens of "{collection}"',
        detail="Only an issuer with a secret can; a public key or a JWKS only verifies tokens.",
        hint="Add one to auth.issuers, or log in and use the token of the response."
        if suggestion is None
        else f'Perhaps you meant "{suggestion}".',
        code="token_unsigned",
    )
