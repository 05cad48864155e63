"""The private port for operators: probes, metrics, and a page. Served by ``service``.

The page is one file without data; what it shows it asks for by ``/inspect/VIEW``.
"""

import hmac
import re
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha256
from typing import TypeAlias

import msgspec
from aiohttp import web

from pgrealtime.config.model import AdminConfig
from pgrealtime.errors import PgRealtimeError
from pgrealtime.observe.metrics import CONTENT_TYPE

LOCAL_HOST = re.compile(r"(?i)(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")
"""Host names that only this machine can have; the port differs behind a tunnel."""

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.Response]]

Look: TypeAlias = Callable[[str, Mapping[str, str]], Awaitable[bytes]]
"""Returns the JSON of a view, by its name and parameters."""


def build_admin_app(
    config: AdminConfig,
    *,
    not_ready_reasons: Callable[[], Awaitable[list[str]]],
    fetch_metrics: Callable[[], Awaitable[bytes]],
    look: Look,
    page: str,
) -> web.Application:
    """Return the application.

    ``/metrics`` and ``/inspect/...`` require the configured token, if any; probes and the page
    itself never do. ``not_ready_reasons`` returns why no traffic should be sent here,
    ``fetch_metrics`` Prometheus' text format.
    """

    async def live(_request: web.Request) -> web.Response:
        return web.json_response({"status": "live"})

    async def ready(_request: web.Request) -> web.Response:
        if reasons := await not_ready_reasons():
            body = msgspec.json.encode({"status": "not_ready", "reasons": reasons})
            return web.Response(status=503, body=body, content_type="application/json")
        return web.json_response({"status": "ready"})

    async def scrape(request: web.Request) -> web.Response:
        if not _is_authorized(request, config):
            return web.Response(status=401, headers={"WWW-Authenticate": "Bearer"})
        return web.Response(body=await fetch_metrics(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    app.add_routes(
        [
            web.get("/live", live),
            web.get("/ready", ready),
            web.get("/metrics", scrape),
            web.get("/", _page_handler(page)),
            web.get("/inspect/{view}", _look_handler(config, look)),
        ]
    )
    return app


def _is_authorized(request: web.Request, config: AdminConfig) -> bool:
    given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
    return not config.token or hmac.compare_digest(given, b"Bearer " + config.token.encode())


def _page_handler(page: str) -> Handler:
    headers = {
        "Content-Security-Policy": _policy_of(page),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    async def show(_request: web.Request) -> web.Response:
        return web.Response(text=page, content_type="text/html", headers=headers)

    return show


def _look_handler(config: AdminConfig, look: Look) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        if not _is_authorized(request, config):
            return _refusal(401, "token_required", "the admin port's token is required")
        # A page elsewhere can have its own host name resolve to this machine, and then read.
        if not config.token and not LOCAL_HOST.fullmatch(request.host):
            return _refusal(
                403,
                "host_unknown",
                "without admin.token this is for 127.0.0.1 and localhost only",
                "Open the page by one of these names, through a tunnel if need be; or set"
                " admin.token.",
            )
        try:
            body = await look(request.match_info["view"], request.query)
        except PgRealtimeError as error:
            return _refusal(400, error.error_code, error.message, error.hint, error.detail)
        return web.Response(body=body, content_type="application/json", headers=_NOT_KEPT)

    return answer


_NOT_KEPT = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def _refusal(
    status: int, code: str, message: str, hint: str = "", detail: str = ""
) -> web.Response:
    body = {"code": code, "message": message, "detail": detail, "hint": hint}
    headers = {**_NOT_KEPT, **({"WWW-Authenticate": "Bearer"} if status == 401 else {})}  # noqa: PLR2004
    return web.Response(
        status=status,
        body=msgspec.json.encode(body),
        content_type="application/json",
        headers=headers,
    )


def _policy_of(page: str) -> str:
    """Return the policy that allows the page its own style and script, and nothing else."""
    style, script = (
        " ".join(f"'sha256-{_digest(text)}'" for text in re.findall(pattern, page, re.DOTALL))
        or "'none'"
        for pattern in ("<style>(.*?)</style>", "<script>(.*?)</script>")
    )
    return (
        f"default-src 'none'; style-src {style}; script-src {script};"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    )


def _digest(text: str) -> str:
    return b64encode(sha256(text.encode()).digest()).decode()
