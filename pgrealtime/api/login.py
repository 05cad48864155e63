"""The routes ``/api/collections/COLL/auth-…``: log in, renew a token, list the ways to log in."""

from collections.abc import Callable
from typing import Final, TypeVar

from aiohttp import web
from msgspec import Raw

from pgrealtime.api.address import client_address
from pgrealtime.api.body_reader import BODY_READER_KEY
from pgrealtime.api.error_responses import (
    COLLECTION_INVALID,
    TOKEN_REQUIRED,
    TOO_MANY_REQUESTS,
    ErrorResponse,
    RequestRefusedError,
)
from pgrealtime.api.json_response import headers_for_rules, query_values, respond_json
from pgrealtime.api.login_body import check_body_readable, check_login_body, parse_login_body
from pgrealtime.auth.account import UserCollection
from pgrealtime.auth.authenticator import Authenticator, caller_of_account
from pgrealtime.auth.login import LoginAttempt, LoginService, LoginSession
from pgrealtime.auth.principal import AuthRecord, Caller
from pgrealtime.config.model import ServerConfig
from pgrealtime.errors import AuthError
from pgrealtime.reads.own_record import OwnRecordRenderer
from pgrealtime.records.values import Json

_Content = TypeVar("_Content")

_MAX_BODY_BYTES: Final = 1024 * 1024
"""More than two texts of 255 bytes take in any encoding."""

_AUTH_COLLECTION_NOT_FOUND: Final = ErrorResponse(
    404, "Missing or invalid auth collection context.", "缺少或无效的认证集合上下文。"
)
_PASSWORD_AUTH_DISABLED: Final = ErrorResponse(
    403,
    "The collection is not configured to allow password authentication.",
    "该集合未配置为允许密码认证。",
)
_AUTH_RULE_NOT_SATISFIED: Final = ErrorResponse(
    403,
    "The request doesn't satisfy the collection requirements to authenticate.",
    "请求不满足该集合的认证要求。",
)
_LOGIN_FAILED: Final = ErrorResponse(400, "Failed to authenticate.", "身份验证失败。")


class LoginRoutes:
    """The handlers."""

    def __init__(
        self,
        login: LoginService,
        authenticator: Authenticator,
        server: ServerConfig,
        own_records: OwnRecordRenderer,
    ) -> None:
        self._login = login
        self._authenticator = authenticator
        self._server = server
        self._own_records = own_records

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add the routes."""
        path = f"{self._server.base_path}/api/collections/{{collection}}"
        router.add_get(f"{path}/auth-methods", self.auth_methods)
        router.add_post(f"{path}/auth-with-password", self.auth_with_password)
        router.add_post(f"{path}/auth-refresh", self.auth_refresh)

    async def auth_methods(self, request: web.Request) -> web.Response:
        """Respond with the ways to log in to the collection."""
        login = self._requested_auth_users(request).login
        is_enabled = bool(login.password_hash)
        names: list[Json] = [*login.identity] if is_enabled else []
        off: dict[str, Json] = {"enabled": False, "duration": 0}
        return respond_json(
            request,
            {
                "password": {"identityFields": names, "enabled": is_enabled},
                "oauth2": {"providers": [], "enabled": False},
                "mfa": off,
                "otp": off,
                # Read by SDKs before 0.23.
                "authProviders": [],
                "usernamePassword": "username" in names,
                "emailPassword": "email" in names,
            },
        )

    async def auth_with_password(self, request: web.Request) -> web.Response:
        """Log in by password; respond with token and record."""
        users = self._requested_auth_users(request)
        if not users.login.password_hash:
            raise RequestRefusedError(_PASSWORD_AUTH_DISABLED)
        attempt = await self._read_body(request, parse_login_body) or LoginAttempt()
        check_login_body(attempt, users.login.identity)
        address = client_address(request, self._server.trusted_proxies)
        try:
            session = await self._login.log_in(users, attempt, address)
        except AuthError as error:
            is_busy = error.error_code == "login_refused"
            raise RequestRefusedError(TOO_MANY_REQUESTS if is_busy else _LOGIN_FAILED) from error
        caller = await self._authenticator.authenticate(request.headers.get("Authorization"))
        return await self._respond_with_session(request, session, caller, context="password")

    async def auth_refresh(self, request: web.Request) -> web.Response:
        """Respond with the record of the token's user and, if it is refreshable, a new token."""
        users = self._requested_users(request)
        try:
            authorization = request.headers.get("Authorization")
            authenticated = await self._authenticator.authenticate_token(authorization)
        except AuthError as error:
            raise RequestRefusedError(TOKEN_REQUIRED) from error
        caller = authenticated.caller
        match caller.principal:
            case AuthRecord(collection_id=users.collection.id, id=record_id):
                pass
            case AuthRecord(collection_name=name):
                raise RequestRefusedError(_wrong_collection(name))
            case _:
                raise RequestRefusedError(_wrong_collection("_superusers"))
        await self._read_body(request, check_body_readable)
        try:
            session = await self._login.refresh_session(users, record_id, authenticated)
        except AuthError as error:
            raise RequestRefusedError(TOKEN_REQUIRED) from error
        return await self._respond_with_session(request, session, caller, context="default")

    async def _read_body(
        self, request: web.Request, parse: Callable[[str, bytes, bytes], _Content]
    ) -> _Content | None:
        address = client_address(request, self._server.trusted_proxies)
        reader = request.app[BODY_READER_KEY]
        return await reader.read(request, address, parse, max_bytes=_MAX_BODY_BYTES)

    def _requested_users(self, request: web.Request) -> UserCollection:
        if not self._login.is_enabled:
            raise web.HTTPNotFound
        users = self._authenticator.find_user_collection(request.match_info["collection"])
        if users is None:
            raise RequestRefusedError(COLLECTION_INVALID)
        return users

    def _requested_auth_users(self, request: web.Request) -> UserCollection:
        users = self._requested_users(request)
        if users.collection.type != "auth":
            raise RequestRefusedError(_AUTH_COLLECTION_NOT_FOUND)
        return users

    async def _respond_with_session(
        self, request: web.Request, session: LoginSession, caller: Caller, *, context: str
    ) -> web.Response:
        """Respond with token and record, if the collection's ``auth_rule`` holds in the context."""
        account = session.account
        collection, row = account.users.collection, account.row
        query, headers = query_values(request), headers_for_rules(request)
        if not await self._own_records.may_sign_in(
            collection, row, caller, query=query, headers=headers, context=context
        ):
            raise RequestRefusedError(_AUTH_RULE_NOT_SATISFIED)
        record = await self._own_records.render_record(
            collection, row, caller_of_account(account, None), query=query, headers=headers
        )
        return respond_json(request, {"record": Raw(record), "token": session.token})


def _wrong_collection(name: str) -> ErrorResponse:
    return ErrorResponse(
        403,
        f"The request requires auth record from {name} collection.",
        f"请求需要来自 {name} 集合的认证记录。",
    )
