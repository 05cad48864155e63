"""The public port: routes, and what every answer has in common."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from pgrealtime.api import problems, redirect
from pgrealtime.api.cors import Origins
from pgrealtime.api.health import Health
from pgrealtime.api.problems import Language, Problem, preferred_language, problem_of
from pgrealtime.api.realtime import RUNNER, SHUTDOWN_SECONDS, Realtime
from pgrealtime.api.uploads import LARGEST_BODY, UPLOADS, Uploads
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.config.model import Config, ServerConfig
from pgrealtime.errors import PgRealtimeError
from pgrealtime.hub.hub import Hub

log = structlog.get_logger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_SECURITY: Final = (
    ("X-XSS-Protection", "1; mode=block"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "SAMEORIGIN"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
)

_LONGEST_LINE: Final = 32 * 1024
"""Bytes of the request line and of one header: a native EventSource for which a long
Last-Event-ID were refused would never come back."""

_IDLE_SECONDS: Final = 300
"""How long a connection may take over its request's head, and live between two requests; as
PocketBase, and longer than proxies keep theirs."""

_LINGERING_SECONDS: Final = 1
"""How long the rest of a refused body is read and dropped, so that the client sees the answer."""


def build_app(hub: Hub, authenticator: Authenticator, config: Config) -> web.Application:
    """Return the application; ``build_runner`` serves it with the limits it counts on."""
    surface = Surface(config.server)
    app = web.Application(middlewares=[redirect.put_right, surface.answer])
    app[UPLOADS] = Uploads()
    app.on_response_prepare.append(surface.add_headers)
    realtime = Realtime(hub, authenticator, config.server, config.realtime)
    health = Health(authenticator, config.server)
    path = config.server.base_path
    app.on_shutdown.append(realtime.finish)
    app.router.add_get(f"{path}/api/realtime", realtime.connect)
    app.router.add_post(f"{path}/api/realtime", realtime.subscribe, expect_handler=_expect)
    app.router.add_get(f"{path}/api/health", health.check)
    return app


def build_runner(app: web.Application) -> web.AppRunner:
    """Return the runner that notices at once when a client goes away, and keeps its limits."""
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        logger=_quiet_about_clients(),
        keepalive_timeout=_IDLE_SECONDS,
        lingering_time=_LINGERING_SECONDS,
        shutdown_timeout=SHUTDOWN_SECONDS,
        max_line_size=_LONGEST_LINE,
        max_field_size=_LONGEST_LINE,
        auto_decompress=False,
    )
    app[RUNNER] = runner
    return runner


class Surface:
    """What is the same whatever the route: headers, preflights, the form of a refusal.

    Args:
        server: Origins and language.
    """

    def __init__(self, server: ServerConfig) -> None:
        self._origins = Origins(server.cors_origins)
        self._locale = server.locale

    @web.middleware
    async def answer(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Let the handler answer, and say in the API's form why it can't."""
        if request.method == "OPTIONS":
            return web.Response(status=204)
        if (request.content_length or 0) > LARGEST_BODY:
            return self._refusal(request, problems.TOO_LARGE)
        try:
            return await handler(request)
        except PgRealtimeError as error:
            problem = problem_of(error)
            if problem is problems.INTERNAL:
                log.error("request.failed", path=request.path, error=error)  # noqa: TRY400 (expected kind, known code)
        except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
            is_file = request.method in ("GET", "HEAD")
            problem = problems.NO_SUCH_FILE if is_file else problems.NO_SUCH_ROUTE
        except web.HTTPException:
            raise
        except ConnectionError:
            return web.Response()  # nobody is there to read it, and aiohttp drops it quietly
        except Exception:
            # The last resort: whoever asked still gets an answer of the API's form.
            log.exception("request.failed", path=request.path)
            if request.writer.output_size and request.transport is not None:
                request.transport.abort()  # the head is out, another can't follow
            problem = problems.INTERNAL
        return self._refusal(request, problem)

    def _refusal(self, request: web.Request, problem: Problem) -> web.Response:
        response = web.Response(
            status=problem.status,
            body=problems.encode(problem, self._language(request)),
            content_type="application/json",
        )
        is_unread = problem is problems.TOO_MANY and not request.content.at_eof()
        if is_unread or problem in (problems.TOO_LARGE, problems.TOO_SLOW):
            response.force_close()
        return response

    def _language(self, request: web.Request) -> Language:
        if self._locale != "auto":
            return self._locale
        return preferred_language(",".join(request.headers.getall("Accept-Language", [])))

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Add what every answer of ours carries; to PocketBase a redirect is its router's."""
        response.headers.popall("Server", None)  # aiohttp's; PocketBase sends none
        if response.status == redirect.STATUS:
            return
        origin = request.headers.get("Origin", "")
        if request.method == "OPTIONS":
            asked = request.headers.get("Access-Control-Request-Headers", "")
            response.headers.extend(self._origins.preflight(origin, asked))
        else:
            response.headers.extend((*_SECURITY, *self._origins.simple(origin)))


async def _expect(request: web.Request) -> None:
    """Answer ``Expect: 100-continue``, unless what would come is too large anyway."""
    if request.headers["Expect"].lower() != "100-continue":
        raise web.HTTPExpectationFailed(text="")
    if (request.content_length or 0) <= LARGEST_BODY:
        with suppress(ConnectionError):
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # as aiohttp's own: not yet the answer


class _NotForClients(logging.Filter):
    """Lowers what aiohttp says of requests that aren't HTTP: nobody here must act on those."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, HttpProcessingError)


def _quiet_about_clients() -> logging.Logger:
    logger = logging.getLogger("pgrealtime.http")
    if not logger.filters:
        logger.addFilter(_NotForClients())
    return logger
