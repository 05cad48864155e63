"""The public port: its routes, and what all responses have in common. Served by ``service``."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from pgrealtime.api import redirect
from pgrealtime.api.body_reader import BODY_READER_KEY, MAX_BODY_BYTES, BodyReader
from pgrealtime.api.cors import AllowedOrigins
from pgrealtime.api.error_responses import (
    BODY_TOO_LARGE,
    FILE_NOT_FOUND,
    INTERNAL_ERROR,
    REQUEST_TIMEOUT,
    ROUTE_NOT_FOUND,
    TOO_MANY_REQUESTS,
    ErrorResponse,
    Language,
    encode_error_response,
    error_response_of,
    preferred_language,
)
from pgrealtime.api.health import HealthRoute
from pgrealtime.api.realtime import RUNNER_KEY, SHUTDOWN_SECONDS, RealtimeRoutes
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.config.model import Config, ServerConfig
from pgrealtime.errors import PgRealtimeError
from pgrealtime.hub.hub import Hub

log = structlog.get_logger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_SECURITY_HEADERS: Final = (
    ("X-XSS-Protection", "1; mode=block"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "SAMEORIGIN"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
)

_MAX_LINE_BYTES: Final = 32 * 1024
"""Of the request line and of one header. A native EventSource never reconnects after an error
response, so a long Last-Event-ID must not cause one."""

_IDLE_SECONDS: Final = 300
"""Time limit of a request's head, and of an idle connection between requests: PocketBase's, and
longer than that of common proxies, which otherwise would reuse a connection closed here."""

_LINGERING_SECONDS: Final = 1
"""How long the rest of a refused body is read and dropped. Closing at once would reset the
connection, and the client might lose the response."""


def build_app(hub: Hub, authenticator: Authenticator, config: Config) -> web.Application:
    """Return the application, to be served by ``build_runner``, which sets its limits."""
    middleware = ResponseMiddleware(config.server)
    app = web.Application(middlewares=[redirect.redirect_to_clean_path, middleware.handle])
    app[BODY_READER_KEY] = BodyReader()
    app.on_response_prepare.append(middleware.add_headers)
    realtime = RealtimeRoutes(hub, authenticator, config.server, config.realtime)
    health = HealthRoute(authenticator, config.server)
    path = config.server.base_path
    app.on_shutdown.append(realtime.close_streams)
    app.router.add_get(f"{path}/api/realtime", realtime.handle_connect)
    app.router.add_post(
        f"{path}/api/realtime", realtime.handle_subscribe, expect_handler=_handle_expect
    )
    app.router.add_get(f"{path}/api/health", health.get_health)
    return app


def build_runner(app: web.Application) -> web.AppRunner:
    """Return a runner with this module's limits, whose handlers are cancelled on disconnect."""
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        logger=_http_logger(),
        keepalive_timeout=_IDLE_SECONDS,
        lingering_time=_LINGERING_SECONDS,
        shutdown_timeout=SHUTDOWN_SECONDS,
        max_line_size=_MAX_LINE_BYTES,
        max_field_size=_MAX_LINE_BYTES,
        auto_decompress=False,
    )
    app[RUNNER_KEY] = runner
    return runner


class ResponseMiddleware:
    """Responds to preflights, encodes errors and adds headers, for all routes."""

    def __init__(self, server: ServerConfig) -> None:
        self._allowed_origins = AllowedOrigins(server.cors_origins)
        self._locale = server.locale

    @web.middleware
    async def handle(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Call the handler; respond to its errors in the API's form."""
        if request.method == "OPTIONS":
            return web.Response(status=204)
        if (request.content_length or 0) > MAX_BODY_BYTES:
            return self._respond_with_error(request, BODY_TOO_LARGE)
        try:
            return await handler(request)
        except PgRealtimeError as error:
            refusal = error_response_of(error)
            if refusal is INTERNAL_ERROR:
                log.error("request.failed", path=request.path, error=error)  # noqa: TRY400 (expected kind, known code)
        except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
            is_file = request.method in ("GET", "HEAD")
            refusal = FILE_NOT_FOUND if is_file else ROUTE_NOT_FOUND
        except web.HTTPException:
            raise
        except ConnectionError:
            return web.Response()  # the client is gone: aiohttp drops the response silently
        except Exception:
            # A defect of this program: the client gets a response of the API's form all the same.
            log.exception("request.failed", path=request.path)
            if request.writer.output_size and request.transport is not None:
                request.transport.abort()  # the head was sent, so no second one can follow
            refusal = INTERNAL_ERROR
        return self._respond_with_error(request, refusal)

    def _respond_with_error(
        self, request: web.Request, error_response: ErrorResponse
    ) -> web.Response:
        response = web.Response(
            status=error_response.status,
            body=encode_error_response(error_response, self._response_language(request)),
            content_type="application/json",
        )
        is_unread = error_response is TOO_MANY_REQUESTS and not request.content.at_eof()
        if is_unread or error_response in (BODY_TOO_LARGE, REQUEST_TIMEOUT):
            response.force_close()
        return response

    def _response_language(self, request: web.Request) -> Language:
        if self._locale != "auto":
            return self._locale
        return preferred_language(",".join(request.headers.getall("Accept-Language", [])))

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Add the headers of all responses; PocketBase's router sends redirects without them."""
        response.headers.popall("Server", None)  # aiohttp's; PocketBase sends none
        if response.status == redirect.REDIRECT_STATUS:
            return
        origin = request.headers.get("Origin", "")
        if request.method == "OPTIONS":
            requested = request.headers.get("Access-Control-Request-Headers", "")
            response.headers.extend(self._allowed_origins.preflight_headers(origin, requested))
        else:
            response.headers.extend(
                (*_SECURITY_HEADERS, *self._allowed_origins.response_headers(origin))
            )


async def _handle_expect(request: web.Request) -> None:
    """Answer ``Expect: 100-continue``, unless the declared body is too large."""
    if request.headers["Expect"].lower() != "100-continue":
        raise web.HTTPExpectationFailed(text="")
    if (request.content_length or 0) <= MAX_BODY_BYTES:
        with suppress(ConnectionError):
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # as aiohttp's own handler: the response is yet to come


class _ClientErrorFilter(logging.Filter):
    """Drops aiohttp's log entries about requests that aren't HTTP: no operator can act on them."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, HttpProcessingError)


def _http_logger() -> logging.Logger:
    logger = logging.getLogger("pgrealtime.http")
    if not logger.filters:
        logger.addFilter(_ClientErrorFilter())
    return logger
