"""The private port for operators: ``/live``, ``/ready`` and ``/metrics``. Served by ``service``."""

import hmac
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from pgrealtime.config.model import AdminConfig
from pgrealtime.observe.metrics import CONTENT_TYPE


def build_admin_app(
    config: AdminConfig,
    *,
    not_ready_reasons: Callable[[], Awaitable[list[str]]],
    fetch_metrics: Callable[[], Awaitable[bytes]],
) -> web.Application:
    """Return the application.

    ``/metrics`` requires the configured token, if any; probes never do. ``not_ready_reasons``
    returns why no traffic should be sent here, ``fetch_metrics`` Prometheus' text format.
    """

    async def live(_request: web.Request) -> web.Response:
        return web.json_response({"status": "live"})

    async def ready(_request: web.Request) -> web.Response:
        if reasons := await not_ready_reasons():
            body = msgspec.json.encode({"status": "not_ready", "reasons": reasons})
            return web.Response(status=503, body=body, content_type="application/json")
        return web.json_response({"status": "ready"})

    async def scrape(request: web.Request) -> web.Response:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if config.token and not hmac.compare_digest(given, b"Bearer " + config.token.encode()):
            return web.Response(status=401, headers={"WWW-Authenticate": "Bearer"})
        return web.Response(body=await fetch_metrics(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    app.add_routes([web.get("/live", live), web.get("/ready", ready), web.get("/metrics", scrape)])
    return app
