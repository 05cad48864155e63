"""``pgrealtime live``: asks the running service whether it answers; the image's health check."""

from http import HTTPStatus
from http.client import HTTPException
from urllib.request import ProxyHandler, build_opener

import click

from pgrealtime.cli.address import configured_url
from pgrealtime.cli.options import config_option
from pgrealtime.cli.report import report_errors
from pgrealtime.errors import SubscriptionError

_TIMEOUT_SECONDS = 5.0


@click.command()
@config_option
def live(path: str) -> None:
    """Exit with 0 if the configured service answers on this machine; for health checks."""
    with report_errors():
        _check_health(configured_url(path))


def _check_health(url: str) -> None:
    # A proxy of the environment would be asked for this machine otherwise.
    opener = build_opener(ProxyHandler({}))
    try:
        with opener.open(f"{url}/api/health", timeout=_TIMEOUT_SECONDS) as response:
            reason = "" if response.status == HTTPStatus.OK else f"status {response.status}"
    except (OSError, HTTPException) as error:
        reason = str(error)
    if reason:
        raise SubscriptionError(
            f'no service answers at "{url}"', detail=reason, code="service_unreachable"
        )
