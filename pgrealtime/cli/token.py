"""``pgrealtime token make``: signs a token for development with the secret of an issuer."""

import os
import time

import click
import jwt

from pgrealtime.cli.options import config_option, split_user
from pgrealtime.cli.report import report_errors
from pgrealtime.config.load import read_config
from pgrealtime.config.model import AuthConfig, IssuerConfig
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
    """Return a token of COLLECTION/ID by an issuer of the configuration file.

    Raises:
        PgRealtimeError: The file has problems, or no issuer that could sign the token.
        click.UsageError: The user isn't COLLECTION/ID.
    """
    auth = read_config(path, os.environ).require_valid().auth
    return make_token(auth, *split_user(user), lifetime=lifetime_seconds)


def make_token(config: AuthConfig, collection: str, record_id: str, *, lifetime: float) -> str:
    """Return a token that names the record, signed with the secret of an issuer of its collection.

    Args:
        config: With the issuers.
        collection: Name of the auth collection.
        record_id: Not looked up: there may be no such record.
        lifetime: Seconds from now.

    Raises:
        AuthError: No issuer of the collection has a secret.
    """
    issuer = _signing_issuer(config, collection)
    claims: dict[str, object] = {issuer.id_claim: record_id, "exp": int(time.time() + lifetime)}
    if issuer.issuer:
        claims["iss"] = issuer.issuer
    if issuer.audience:
        claims["aud"] = issuer.audience
    return jwt.encode(claims, issuer.secret, algorithm="HS256")


def _signing_issuer(config: AuthConfig, collection: str) -> IssuerConfig:
    signing = [issuer for issuer in config.issuers if issuer.secret]
    for issuer in signing:
        if issuer.collection == collection:
            return issuer
    suggestion = nearest_name(collection, {issuer.collection for issuer in signing})
    raise AuthError(
        f'no issuer of the configuration can sign tokens of "{collection}"',
        detail="Only an issuer with a secret can; a public key or a JWKS only verifies tokens.",
        hint="Add one to auth.issuers, or log in and use the token of the response."
        if suggestion is None
        else f'Perhaps you meant "{suggestion}".',
        code="token_unsigned",
    )
