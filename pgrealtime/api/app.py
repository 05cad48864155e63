"""The public port: its routes, and what all responses have in common. Served by ``service``."""

import logging
import posixpath
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final
from urllib.parse import quote

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from pgrealtime.api import error_responses
from pgrealtime.api.address import client_address
from pgrealtime.api.body_reader import BODY_READER_KEY, MAX_BODY_BYTES, BodyReader
from pgrealtime.api.call_router import CallRouter
from pgrealtime.api.cors import AllowedOrigins, Headers
from pgrealtime.api.json_response import respond_json
from pgrealtime.api.realtime import RUNNER_KEY, SHUTDOWN_SECONDS, RealtimeRoutes
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.auth.principal import Superuser
from pgrealtime.config.model import Config, ServerConfig
from pgrealtime.errors import PgRealtimeError
from pgrealtime.hub.hub import Hub
from pgrealtime.protocol.query_string import has_bad_escape
from pgrealtime.records.values import Json

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

_REDIRECT_STATUS: Final = 307
"""Temporary Redirect: the client repeats method and body."""

_SAFE_IN_PATHS: Final = "%/!$&'()*+,;=:@~[]"
"""Characters that stay unescaped besides letters, digits and ``-._``; existing escapes too."""

_HTML_ESCAPES: Final = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&#34;", "'": "&#39;"}
)

_PROXY_HEADERS: Final = ("CF-Connecting-IP", "Fly-Client-IP", "X-Forwarded-For")


def build_app(
    hub: Hub, authenticator: Authenticator, calls: CallRouter, config: Config
) -> web.Application:
    """Return the application, to be served by ``build_runner``, which sets its limits."""
    middleware = ResponseMiddleware(config.server)
    app = web.Application(middlewares=[_redirect_to_clean_path, middleware.handle])
    app[BODY_READER_KEY] = BodyReader()
    app.on_response_prepare.append(middleware.add_headers)
    realtime = RealtimeRoutes(hub, calls, config.server, config.realtime, middleware.fields_of)
    app.on_shutdown.append(realtime.close_streams)
    path = f"{config.server.base_path}/api/realtime"
    app.router.add_get(path, realtime.handle_connect)
    app.router.add_post(path, realtime.handle_subscribe, expect_handler=_handle_expect)
    health_path = f"{config.server.base_path}/api/health"
    app.router.add_get(health_path, _health_handler(authenticator, config.server))
    return app


def build_runner(app: web.Application) -> web.AppRunner:
    """Return a runner with this module's limits, whose handlers are cancelled on disconnect."""
    logger = logging.getLogger("pgrealtime.http")
    logger.addFilter(_is_actionable)
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        logger=logger,
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
            return self._respond_with_error(request, error_responses.BODY_TOO_LARGE)
        try:
            return await handler(request)
        except PgRealtimeError as error:
            refusal = error_responses.error_response_of(error)
            if refusal is error_responses.INTERNAL_ERROR:
                log.error("request.failed", path=request.path, error=error)  # noqa: TRY400 (expected kind, known code)
        except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
            is_file = request.method in ("GET", "HEAD")
            refusal = error_responses.FILE_NOT_FOUND if is_file else error_responses.ROUTE_NOT_FOUND
        except web.HTTPException:
            raise
        except ConnectionError:
            return web.Response()  # the client is gone: aiohttp drops the response silently
        except Exception:
            # A defect of this program: the client gets a response of the API's form all the same.
            log.exception("request.failed", path=request.path)
            if request.writer.output_size and request.transport is not None:
                request.transport.abort()  # the head was sent, so no second one can follow
            refusal = error_responses.INTERNAL_ERROR
        return self._respond_with_error(request, refusal)

    def _respond_with_error(
        self, request: web.Request, refusal: error_responses.ErrorResponse
    ) -> web.Response:
        language = self._locale
        if language == "auto":
            accepted = ",".join(request.headers.getall("Accept-Language", []))
            language = error_responses.preferred_language(accepted)
        body = error_responses.encode_error_response(refusal, language)
        response = web.Response(status=refusal.status, body=body, content_type="application/json")
        is_body_left = refusal == error_responses.TOO_MANY_REQUESTS and not request.content.at_eof()
        closing = (error_responses.BODY_TOO_LARGE, error_responses.REQUEST_TIMEOUT)
        if is_body_left or refusal in closing:
            response.force_close()
        return response

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Add the headers of all responses; PocketBase's router sends redirects without them."""
        response.headers.popall("Server", None)  # aiohttp's; PocketBase sends none
        if response.status == _REDIRECT_STATUS:
            return
        if request.method == "OPTIONS":
            origin = request.headers.get("Origin", "")
            requested = request.headers.get("Access-Control-Request-Headers", "")
            response.headers.extend(self._allowed_origins.preflight_headers(origin, requested))
        else:
            response.headers.extend(self.fields_of(request))

    def fields_of(self, request: web.BaseRequest) -> Headers:
        """Return the header fields of a response that is neither a redirect nor a preflight's."""
        origin = request.headers.get("Origin", "")
        return [*_SECURITY_HEADERS, *self._allowed_origins.response_headers(origin)]


async def _handle_expect(request: web.Request) -> None:
    """Answer ``Expect: 100-continue``, unless the declared body is too large."""
    if request.headers["Expect"].lower() != "100-continue":
        raise web.HTTPExpectationFailed(text="")
    if (request.content_length or 0) <= MAX_BODY_BYTES:
        with suppress(ConnectionError):
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # as aiohttp's own handler: the response is yet to come


def _is_actionable(record: logging.LogRecord) -> bool:
    """Whether a log entry isn't about a request that isn't HTTP: no operator can act on those."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)


def clean_path(path: str) -> str:
    """Return the still escaped path without empty and dot segments; a final slash stays.

    As Go's router does: ``//api/realtime`` isn't canonical; ``%2F`` is no slash, ``%2E`` no dot.
    """
    plain = posixpath.normpath("/" + path.lstrip("/"))
    return f"{plain}/" if path.endswith("/") and plain != "/" else plain


@web.middleware
async def _redirect_to_clean_path(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Redirect to the canonical path, or call the handler if this is one.

    A path with a faulty escape is refused, as Go's server does, before any route is looked for.
    """
    if has_bad_escape(request.raw_path.partition("?")[0].encode()):
        return web.Response(status=400, text="400 Bad Request")
    path = request.rel_url.raw_path
    plain = clean_path(path)
    if plain == path or not path.startswith("/"):
        return await handler(request)
    query = request.rel_url.raw_query_string
    location = quote(plain, safe=_SAFE_IN_PATHS) + (f"?{query}" if query else "")
    response = web.Response(status=_REDIRECT_STATUS, headers={"Location": location})
    if request.method in ("GET", "HEAD"):
        response.content_type = "text/html"
        response.charset = "utf-8"
        response.text = f'<a href="{location.translate(_HTML_ESCAPES)}">Temporary Redirect</a>.\n\n'
    return response


def _health_handler(authenticator: Authenticator, server: ServerConfig) -> _Handler:
    """Return the handler of ``/api/health`` in PocketBase's form (protocol, 9.4)."""

    async def respond(request: web.Request) -> web.StreamResponse:
        data: dict[str, Json] = {}
        # While the users table can't be read, this process is healthy all the same.
        with suppress(PgRealtimeError):
            caller = await authenticator.authenticate(request.headers.get("Authorization"))
            if isinstance(caller.principal, Superuser):
                proxy_headers = (name for name in _PROXY_HEADERS if request.headers.get(name))
                data = {
                    "canBackup": True,
                    "realIP": client_address(request, server.trusted_proxies),
                    "possibleProxyHeader": next(proxy_headers, ""),
                }
        return respond_json(request, {"message": "API is healthy.", "code": 200, "data": data})

    return respond
