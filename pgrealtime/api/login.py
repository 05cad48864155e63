"""``/api/collections/COLL/auth-…``: logging in and staying so, on an existing users table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from aiohttp import web
from msgspec import Raw

from pgrealtime.api.address import client_address
from pgrealtime.api.answers import json_answer, query_of
from pgrealtime.api.login_body import (
    LoginCall,
    check,
    check_readable,
    read_login,
)
from pgrealtime.api.problems import NO_TOKEN, TOO_MANY, Problem, RefusedError, Text
from pgrealtime.api.uploads import UPLOADS
from pgrealtime.auth.account import Users
from pgrealtime.auth.authenticator import Authenticator, Identity, caller_of
from pgrealtime.auth.login import Attempt, Login, Session
from pgrealtime.auth.principal import AuthRecord, Caller
from pgrealtime.config.model import ServerConfig
from pgrealtime.errors import AuthError
from pgrealtime.protocol.topic import snake_case
from pgrealtime.reads.own_record import OwnRecords
from pgrealtime.records.values import Json

_Content = TypeVar("_Content")

_LARGEST_BODY: Final = 1024 * 1024
"""Bytes; two texts of 255 bytes are no longer in any encoding."""

_NO_COLLECTION: Final = Problem(
    404, Text("Missing or invalid collection context.", "缺少或无效的集合上下文。")
)
_NO_AUTH_COLLECTION: Final = Problem(
    404, Text("Missing or invalid auth collection context.", "缺少或无效的认证集合上下文。")
)
_NO_PASSWORDS: Final = Problem(
    403,
    Text(
        "The collection is not configured to allow password authentication.",
        "该集合未配置为允许密码认证。",
    ),
)
_NOT_LET_IN: Final = Problem(
    403,
    Text(
        "The request doesn't satisfy the collection requirements to authenticate.",
        "请求不满足该集合的认证要求。",
    ),
)
_FAILED: Final = Problem(400, Text("Failed to authenticate.", "身份验证失败。"))


class LoginRoutes:
    """The handlers.

    Args:
        login: Checks passwords and makes tokens.
        authenticator: Knows the collections and who a token means.
        server: Where the routes begin, and whose word on addresses counts.
        records: Makes the records that are answered.
    """

    def __init__(
        self,
        login: Login,
        authenticator: Authenticator,
        server: ServerConfig,
        records: OwnRecords,
    ) -> None:
        self._login = login
        self._authenticator = authenticator
        self._server = server
        self._records = records

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Add the routes."""
        path = f"{self._server.base_path}/api/collections/{{collection}}"
        router.add_get(f"{path}/auth-methods", self.methods)
        router.add_post(f"{path}/auth-with-password", self.with_password)
        router.add_post(f"{path}/auth-refresh", self.refresh)

    async def methods(self, request: web.Request) -> web.Response:
        """Say how people of the collection can log in."""
        login = self._auth_users(request).login
        is_enabled = bool(login.password_hash)
        names: list[Json] = [*login.identity] if is_enabled else []
        off: dict[str, Json] = {"enabled": False, "duration": 0}
        return json_answer(
            request,
            {
                "password": {"identityFields": names, "enabled": is_enabled},
                "oauth2": {"providers": [], "enabled": False},
                "mfa": off,
                "otp": off,
                # What SDKs before 0.23 read.
                "authProviders": [],
                "usernamePassword": "username" in names,
                "emailPassword": "email" in names,
            },
        )

    async def with_password(self, request: web.Request) -> web.Response:
        """Log in."""
        users = self._auth_users(request)
        if not users.login.password_hash:
            raise RefusedError(_NO_PASSWORDS)
        call = await self._read(request, read_login) or LoginCall()
        check(call, users.login.identity)
        attempt = Attempt(
            identity=call.identity, password=call.password, identity_field=call.identity_field
        )
        address = client_address(request, self._server.trusted_proxies)
        try:
            session = await self._login.with_password(users, attempt, address)
        except AuthError as error:
            is_busy = error.error_code == "login_refused"
            raise RefusedError(TOO_MANY if is_busy else _FAILED) from error
        caller = await self._authenticator.authenticate(request.headers.get("Authorization"))
        return await self._answer(request, session, caller, context="password")

    async def refresh(self, request: web.Request) -> web.Response:
        """Give whoever has a token that holds the record, and if possible a newer token."""
        users = self._users(request)
        identity = await self._identify(request)
        match identity.caller.principal:
            case AuthRecord(collection_id=collection, id=record_id) if (
                collection == users.collection.id
            ):
                pass
            case AuthRecord(collection_name=name):
                raise RefusedError(_of_another_collection(name))
            case _:
                raise RefusedError(_of_another_collection("_superusers"))
        await self._read(request, check_readable)
        try:
            session = await self._login.refresh(users, record_id, identity)
        except AuthError as error:
            raise RefusedError(NO_TOKEN) from error
        return await self._answer(request, session, identity.caller, context="default")

    async def _read(
        self, request: web.Request, take: Callable[[str, bytes, bytes], _Content]
    ) -> _Content | None:
        """Return what the body says, None if there is none."""
        if not request.body_exists or request.content_length == 0:
            return None
        address = client_address(request, self._server.trusted_proxies)
        uploads = request.app[UPLOADS]
        return await uploads.read(request, address, take, largest=_LARGEST_BODY)

    async def _identify(self, request: web.Request) -> Identity:
        try:
            return await self._authenticator.identify(request.headers.get("Authorization"))
        except AuthError as error:
            raise RefusedError(NO_TOKEN) from error

    def _users(self, request: web.Request) -> Users:
        if not self._login.is_enabled:
            raise web.HTTPNotFound
        users = self._authenticator.users(request.match_info["collection"])
        if users is None:
            raise RefusedError(_NO_COLLECTION)
        return users

    def _auth_users(self, request: web.Request) -> Users:
        users = self._users(request)
        if users.collection.type != "auth":
            raise RefusedError(_NO_AUTH_COLLECTION)
        return users

    async def _answer(
        self, request: web.Request, session: Session, caller: Caller, *, context: str
    ) -> web.Response:
        """Let somebody in, if the collection's rule does.

        Args:
            request: Of either kind.
            session: Theirs.
            caller: Who asks, as the request's own token says.
            context: What rules call it.
        """
        account = session.account
        collection, row = account.users.collection, account.row
        query, headers = query_of(request), _headers_for_rules(request)
        if not await self._records.may_sign_in(
            collection, row, caller, query=query, headers=headers, context=context
        ):
            raise RefusedError(_NOT_LET_IN)
        record = await self._records.record(
            collection, row, caller_of(account, None), query=query, headers=headers
        )
        return json_answer(request, {"record": Raw(record), "token": session.token})


def _headers_for_rules(request: web.Request) -> dict[str, str]:
    """The first value of each header; Go keeps ``Host`` apart from them."""
    headers: dict[str, str] = {}
    for name, value in request.headers.items():
        headers.setdefault(snake_case(name), value)
    headers.pop("host", None)
    return headers


def _of_another_collection(name: str) -> Problem:
    return Problem(
        403,
        Text(
            f"The request requires auth record from {name} collection.",
            f"请求需要来自 {name} 集合的认证记录。",
        ),
    )
