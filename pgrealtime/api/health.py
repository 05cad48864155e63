"""The route ``/api/health`` in PocketBase's form (protocol, 9.4): whether the process responds."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from pgrealtime.api.address import client_address
from pgrealtime.api.json_response import respond_json
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.auth.principal import Superuser
from pgrealtime.config.model import ServerConfig
from pgrealtime.errors import PgRealtimeError
from pgrealtime.records.values import Json

_PROXY_HEADERS: Final = ("CF-Connecting-IP", "Fly-Client-IP", "X-Forwarded-For")


class HealthRoute:
    """The handler. Superusers receive more than others."""

    def __init__(self, authenticator: Authenticator, server: ServerConfig) -> None:
        self._authenticator = authenticator
        self._trusted_proxies = server.trusted_proxies

    async def get_health(self, request: web.Request) -> web.StreamResponse:
        """Respond 200."""
        return respond_json(
            request,
            {"message": "API is healthy.", "code": 200, "data": await self._health_data(request)},
        )

    async def _health_data(self, request: web.Request) -> dict[str, Json]:
        try:
            caller = await self._authenticator.authenticate(request.headers.get("Authorization"))
        except PgRealtimeError:
            return {}  # the users table can't be read now; this process is healthy all the same
        if not isinstance(caller.principal, Superuser):
            return {}
        return {
            "canBackup": True,
            "realIP": client_address(request, self._trusted_proxies),
            "possibleProxyHeader": next(
                (name for name in _PROXY_HEADERS if request.headers.get(name)), ""
            ),
        }
