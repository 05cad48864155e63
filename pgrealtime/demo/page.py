"""The demo page's routes: the page, the state of the application, and its buttons."""

import time
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from random import Random
from typing import Any

import jwt
import psycopg
from aiohttp import web

from pgrealtime.api.admin import LOCAL_HOST
from pgrealtime.config.model import CollectionConfig
from pgrealtime.demo.application import Application
from pgrealtime.demo.writer import Writer, new_task_title

_TOKEN_SECONDS = 12 * 3600.0

_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
)
"""Allows one file with inline style and script, and no other origin."""


def sign_token(secret: str, claims: Mapping[str, object]) -> str:
    """Return a token as the application's own login would make it."""
    expiry = time.time() + _TOKEN_SECONDS
    return jwt.encode({**claims, "exp": expiry}, secret, algorithm="HS256")


@web.middleware
async def reject_other_origins(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Refuse requests of pages of other origins.

    Tokens and buttons are for the user of this machine alone. A page elsewhere can send requests to
    127.0.0.1, but with its own ``Origin``. By DNS rebinding it can have its own host name resolve
    to 127.0.0.1 and so share the origin, but then that name is in ``Host``.
    """
    own = f"http://{request.host}"
    is_own = request.headers.get("Origin", own).lower() == own.lower()
    if not (is_own and LOCAL_HOST.fullmatch(request.host)):
        raise web.HTTPForbidden(text="open the demo by its address, on the machine where it runs\n")
    return await handler(request)


class Page:
    """The handlers of the routes.

    Args:
        application: Runs the operations of the buttons.
        writer: Pauses after each of them.
        collections: Whose rules are shown.
        secret: Of the configured issuer.
        server: Version of the database, as a text.
        random: Chooses titles of tasks.
    """

    def __init__(
        self,
        application: Application,
        writer: Writer,
        *,
        collections: Mapping[str, CollectionConfig],
        secret: str,
        server: str,
        random: Random,
    ) -> None:
        self._application = application
        self._writer = writer
        self._rules = {name: collection.list_rule for name, collection in collections.items()}
        self._secret = secret
        self._server = server
        self._random = random
        self._html = files("pgrealtime.demo").joinpath("page.html").read_text(encoding="utf-8")

    def add_routes(self, app: web.Application) -> None:
        """Add the routes to the API's application, so that the page has the API's origin."""
        app.middlewares.append(reject_other_origins)
        app.add_routes(
            [
                web.get("/", self.get_page),
                web.get("/demo/state", self.get_state),
                web.post("/demo/step", self.post_step),
                web.post("/demo/writer", self.post_writer),
            ]
        )

    async def get_page(self, _request: web.Request) -> web.Response:
        """Return the page."""
        headers = {"Content-Security-Policy": _CONTENT_SECURITY_POLICY, "Cache-Control": "no-cache"}
        return web.Response(text=self._html, content_type="text/html", headers=headers)

    async def get_state(self, _request: web.Request) -> web.Response:
        """Return the users, each with a token, and the rules; the page loads rows by the API."""
        people = (await self._application.fetch_tables())["people"]
        for person in people:
            person["token"] = sign_token(self._secret, {"sub": person["id"]})
        return web.json_response(
            {
                "people": people,
                "watcher": sign_token(self._secret, {"sub": "watcher", "role": "admin"}),
                "rules": self._rules,
                "server": self._server,
                "writing": self._writer.is_writing,
            },
            headers={"Cache-Control": "no-store"},
        )

    async def post_step(self, request: web.Request) -> web.Response:
        """Run the operation ``{"do": NAME, ...}``; return its SQL and the id of the changed row."""
        values = await _json_object(request)
        self._writer.defer()
        if values.get("do") == "add":
            rows = await self._application.fetch_tables()
            values["title"] = new_task_title(rows, str(values.get("id")), self._random)
        try:
            sql, row_id = await self._application.execute(str(values.get("do")), values)
        except (KeyError, psycopg.DataError, psycopg.IntegrityError, psycopg.ProgrammingError):
            raise web.HTTPBadRequest(text="no such step") from None
        return web.json_response({"sql": sql, "id": row_id})

    async def post_writer(self, request: web.Request) -> web.Response:
        """Start or stop the writer: ``{"writing": true}``."""
        self._writer.set_writing(writing=(await _json_object(request)).get("writing") is True)
        return web.json_response({"writing": self._writer.is_writing})


async def _json_object(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="not a JSON object")
    return body
