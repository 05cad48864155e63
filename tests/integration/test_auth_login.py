"""Logins compared with the real PocketBase: same users, same requests, same answers.

PocketBase's rows, password hashes and token keys included, are copied into PostgreSQL, and both
servers have the same token secret: each must accept the tokens of the other.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import re
import sqlite3
import statistics
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import psycopg
import pytest
import pytest_asyncio
from aiohttp import web
from psycopg import sql
from pytest_postgresql.executor_noop import NoopExecutor

from pgrealtime.api.app import ResponseMiddleware
from pgrealtime.api.body_reader import BODY_READER_KEY, BodyReader
from pgrealtime.api.login import LoginRoutes
from pgrealtime.auth.account import AccountLoader
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.auth.login import LoginService
from pgrealtime.auth.principal import GUEST, AuthRecord, Caller
from pgrealtime.auth.record import update_caller
from pgrealtime.auth.token import make_login_token
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.changes import Row
from pgrealtime.collections.build import build_collections
from pgrealtime.config.model import Config
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.reads.own_record import OwnRecordRenderer
from pgrealtime.rule_queries.executor import QueryExecutor
from tests.config_values import parse_config
from tests.conformance.fixtures import SuperuserAccount
from tests.conformance.http_client import Address, Answer, Request, send
from tests.conformance.pocketbase_server import PocketBaseServer, _folders, pocketbase_binary
from tests.conformance.process import free_port, run

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = SuperuserAccount(email="root@example.com", password="rootpass1234")
SECRET = "the-same-fifty-characters-on-both-sides-0123456789"
USERS = "_pb_users_auth_"
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
ANN = b'{"identity":"ann@example.com","password":"ann-pass-1"}'
STAFF_ANN = {"vault": "vault0000000001", "teams": ["team00000000001"], "boss": "staffbob0000001"}

TEAMS_RULE = (
    "@request.context = 'expand' && @request.method = 'POST' && @request.auth.name = 'Ann' && "
    "(@request.query.q:isset = false || @request.query.q = @request.headers.x_key)"
)
STAFF_RULE = "id = @request.auth.id || @request.auth.vault.name = 'V'"
MANAGE_RULE = "@request.query.manages = 'yes' && @request.auth.id != ''"
POSTS_RULE = "public = true || author = @request.auth.id"

AUTH_RULES = (
    None,
    "verified = true",
    "@request.context = 'password'",
    "@request.context = 'default' && @request.method = 'POST'",
    "@request.auth.id = ''",
    "@request.auth.id = id || @request.auth.verified = true",
    "@request.query.q = '1' && @request.headers.x_key = 'k' && @request.query.filter != ''",
    "@collection.vaults.name ?= 'V' && email ~ 'ann'",
)
GUARDED = {f"guarded{number}": rule for number, rule in enumerate(AUTH_RULES)}
"""Collections by name, each with one of the rules."""


# -- two servers with the same users


@dataclass(frozen=True)
class Original:
    """The real PocketBase, and what its database holds of its users."""

    address: Address
    superuser_token: str
    rows: Mapping[str, list[dict[str, Any]]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def original(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Original]:
    directory = tmp_path_factory.mktemp("pocketbase")
    upsert = [pocketbase_binary(), "superuser", "upsert", ROOT.email, ROOT.password]
    await run([*upsert, *_folders(directory)])
    server = PocketBaseServer(directory, free_port())
    await server.start()
    try:
        await server.authenticate(ROOT)
        await _fill(server)
        names = ("users", "members", "locked", "vaults", "teams", "staff", "posts", *GUARDED)
        rows = {name: _stored_rows(directory, name) for name in names}
        yield Original(server.address, server.api.token, rows)
    finally:
        await server.stop()


async def _fill(server: PocketBaseServer) -> None:
    token = {"authToken": {"secret": SECRET, "duration": 432000}}
    await server.api.call("PATCH", f"/api/collections/{USERS}", token)
    members = {
        "name": "members",
        "type": "auth",
        "fields": [{"name": "username", "type": "text"}],
        "indexes": ["CREATE UNIQUE INDEX members_name ON members (username COLLATE NOCASE)"],
        "passwordAuth": {"enabled": True, "identityFields": ["username", "email"]},
    }
    locked = {"name": "locked", "type": "auth", "passwordAuth": {"enabled": False}}
    base = {"name": "projects", "type": "base", "fields": [{"name": "title", "type": "text"}]}
    guarded = [{"name": name, "type": "auth"} | token for name in GUARDED]
    for definition in (members | token, locked | token, base, *_related(token), *guarded):
        await server.api.call("POST", "/api/collections", definition)
    fields = (await server.api.call("GET", "/api/collections/staff"))["fields"]
    itself = {"fields": [*fields, _relation("boss", "staff0000000000")]}
    await server.api.call("PATCH", "/api/collections/staff", itself)
    records: list[tuple[str, dict[str, Any]]] = [
        ("users", {"id": "userann00000001", "email": "ann@example.com", "name": "Ann <&> \u2028"}),
        ("users", {"id": "userbob00000001", "email": "bob@example.com", "emailVisibility": True}),
        ("members", {"email": "m@example.com", "username": "bob@example.com"}),
        ("members", {"email": "bob@example.com", "username": "bob"}),
        ("locked", {"email": "ann@example.com"}),
        ("vaults", {"id": "vault0000000001", "name": "V"}),
        ("teams", {"id": "team00000000001", "name": "A team", "note": "hidden"}),
        ("staff", {"id": "staffbob0000001", "email": "bob@example.com", "name": "Bob"}),
        ("staff", {"id": "staffann0000001", "email": "ann@example.com", "name": "Ann"} | STAFF_ANN),
        ("posts", {"id": "post00000000001", "author": "staffann0000001", "public": False}),
        ("posts", {"id": "post00000000002", "author": "staffann0000001", "public": True}),
        ("posts", {"id": "post00000000003", "author": "staffbob0000001", "public": False}),
        ("posts", {"id": "post00000000004", "author": "staffbob0000001", "public": True}),
        *((name, {"email": "ann@example.com"}) for name in GUARDED),
        *((name, {"email": "bob@example.com", "verified": False}) for name in GUARDED),
    ]
    for collection, record in records:
        name = str(record.get("email")).partition("@")[0]
        password = f"{name}-pass-1"
        body = {"verified": True, "password": password, "passwordConfirm": password, **record}
        await server.api.call("POST", f"/api/collections/{collection}/records", body)
    for collection, rule in GUARDED.items():
        path = f"/api/collections/{collection}"
        await server.api.call("PATCH", path, {"authRule": rule})
        await server.api.call("PATCH", path, token)  # another rule made another secret


def _related(token: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return users with relations, and rules that read everything that a login has."""
    name = {"name": "name", "type": "text"}
    note = {"name": "note", "type": "text", "hidden": True}
    return [
        {"name": "vaults", "id": "vaults000000000", "type": "base", "fields": [name]},
        {"name": "teams", "id": "teams0000000000", "type": "base", "fields": [name, note]}
        | {"viewRule": TEAMS_RULE},
        {
            "name": "staff",
            "id": "staff0000000000",
            "type": "auth",
            "fields": [
                name,
                _relation("vault", "vaults000000000"),
                _relation("teams", "teams0000000000", most=9),
            ],
            "viewRule": STAFF_RULE,
            "manageRule": MANAGE_RULE,
            **token,
        },
        {
            "name": "posts",
            "id": "posts0000000000",
            "type": "base",
            "fields": [{"name": "public", "type": "bool"}, _relation("author", "staff0000000000")],
            "viewRule": POSTS_RULE,
        },
    ]


def _relation(name: str, collection: str, *, most: int = 1) -> dict[str, Any]:
    return {"name": name, "type": "relation", "collectionId": collection, "maxSelect": most}


def _stored_rows(directory: Path, name: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(directory / "data" / "data.db")) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(f'SELECT * FROM "{name}"')]


TABLES = """
CREATE EXTENSION citext;
CREATE TABLE users (
  id text PRIMARY KEY, email text UNIQUE, "emailVisibility" bool NOT NULL, verified bool NOT NULL,
  name text, avatar text, created timestamptz, updated timestamptz,
  password text, "tokenKey" text);
CREATE TABLE members (
  id text PRIMARY KEY, username citext UNIQUE, email text UNIQUE, "emailVisibility" bool NOT NULL,
  verified bool NOT NULL, password text, "tokenKey" text);
CREATE TABLE locked (
  id text PRIMARY KEY, email text UNIQUE, "emailVisibility" bool NOT NULL,
  verified bool NOT NULL, password text, "tokenKey" text);
CREATE TABLE projects (id text PRIMARY KEY, title text);
CREATE TABLE vaults (id text PRIMARY KEY, name text);
CREATE TABLE teams (id text PRIMARY KEY, name text, note text);
CREATE TABLE staff (
  id text PRIMARY KEY, email text UNIQUE, "emailVisibility" bool NOT NULL, verified bool NOT NULL,
  name text, vault text, teams text[], boss text, password text, "tokenKey" text);
CREATE TABLE posts (id text PRIMARY KEY, public bool NOT NULL, author text);
""" + "".join(f"CREATE TABLE {name} (LIKE locked INCLUDING ALL);" for name in GUARDED)

LOGIN = {"password_hash": "password", "token_key": "tokenKey"}
COLLECTIONS: dict[str, dict[str, Any]] = {
    "users": {"table": "users", "type": "auth", "collection_id": USERS, "login": LOGIN},
    "members": {
        "table": "members",
        "type": "auth",
        "login": LOGIN | {"identity": ["username", "email"]},
    },
    "locked": {"table": "locked", "type": "auth"},
    "projects": {"table": "projects"},
    "vaults": {"table": "vaults", "collection_id": "vaults000000000"},
    "teams": {
        "table": "teams",
        "collection_id": "teams0000000000",
        "view_rule": TEAMS_RULE,
        "fields": {"hide": ["note"]},
    },
    "staff": {
        "table": "staff",
        "collection_id": "staff0000000000",
        "type": "auth",
        "view_rule": STAFF_RULE,
        "manage_rule": MANAGE_RULE,
        "login": LOGIN,
        "relations": {
            name: {"collection": target}
            for name, target in {"vault": "vaults", "teams": "teams", "boss": "staff"}.items()
        },
    },
    "posts": {
        "table": "posts",
        "collection_id": "posts0000000000",
        "view_rule": POSTS_RULE,
        "relations": {"author": {"collection": "staff"}},
    },
}
for _name, _rule in GUARDED.items():
    COLLECTIONS[_name] = {"table": _name, "type": "auth", "login": LOGIN, "auth_rule": _rule}


def config(collections: dict[str, Any] = COLLECTIONS, **login: Any) -> Config:
    auth: dict[str, Any] = {
        "issuers": [{"name": "root", "secret": SECRET, "superuser_when": {"role": "root"}}],
        "login": {"enabled": True, "secret": SECRET, **login},
    }
    return parse_config({"auth": auth, "collections": collections, "records": {"nulls": "zero"}})


@dataclass(frozen=True)
class Ours:
    """The HTTP routes on a port, with the authenticator that the service would use."""

    address: Address
    authenticator: Authenticator


@asynccontextmanager
async def serving(url: str, config: Config) -> AsyncIterator[Ours]:
    async with QueryPool(url) as pool:
        async with pool.connection() as connection:
            collections = build_collections(
                config.collections, await read_catalog(connection, schemas=["public"])
            )
        accounts = AccountLoader(pool)
        logins = {name: c.login for name, c in config.collections.items()}
        authenticator = Authenticator(config.auth, collections, accounts, logins=logins)
        login = LoginService(config.auth.login, accounts)
        surface = ResponseMiddleware(config.server)
        app = web.Application(middlewares=[surface.handle])
        app[BODY_READER_KEY] = BodyReader()
        app.on_response_prepare.append(surface.add_headers)
        records = OwnRecordRenderer(QueryExecutor(pool), collections, nulls=config.records.nulls)
        routes = LoginRoutes(login, authenticator, config.server, records)
        routes.add_routes(app.router)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            yield Ours(Address(host="127.0.0.1", port=runner.addresses[0][1]), authenticator)
        finally:
            await runner.cleanup()
            login.close()


def _fill_tables(url: str, original: Original) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.SQL(TABLES))
        for table, rows in original.rows.items():
            for row in rows:
                connection.execute(
                    sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
                        sql.Identifier(table),
                        sql.SQL(", ").join(map(sql.Identifier, row)),
                        sql.SQL(", ").join(sql.Placeholder() * len(row)),
                    ),
                    [_converted(name, value) for name, value in row.items()],
                )


def _converted(name: str, value: Any) -> Any:
    if name in {"emailVisibility", "verified", "public"}:
        return bool(value)
    return json.loads(value) if name == "teams" else value


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ours(postgresql_proc: NoopExecutor, original: Original) -> AsyncIterator[Ours]:
    """A server shared by all tests that change nothing."""
    server = f"postgresql://postgres@{postgresql_proc.host}:{postgresql_proc.port}"
    name = sql.Identifier(f"test_auth_login_{os.getpid()}")
    with psycopg.connect(f"{server}/postgres", autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(name))
        try:
            url = f"{server}/test_auth_login_{os.getpid()}"
            _fill_tables(url, original)
            async with serving(url, config(attempts_per_minute=1000)) as running:
                yield running
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


@pytest.fixture
def users_url(database_url: str, original: Original) -> str:
    """A database of the test's own with PocketBase's users in it."""
    _fill_tables(database_url, original)
    return database_url


@pytest_asyncio.fixture(loop_scope="module")
async def mine(users_url: str) -> AsyncIterator[Ours]:
    """A server of the test's own on that database."""
    async with serving(users_url, config()) as server:
        yield server


async def post(
    to: Address, path: str, body: bytes = b"", headers: Mapping[str, str] = JSON
) -> Answer:
    path = path if path.startswith("/") else f"/api/collections/{path}"
    return await send(Request(method="POST", path=path, headers=headers, body=body), to)


async def log_in(to: Address, collection: str = "users", body: bytes = ANN) -> str:
    answer = await post(to, f"{collection}/auth-with-password", body)
    assert answer.head.status == 200, answer.body
    return str(json.loads(answer.body)["token"])


def claims(token: str) -> tuple[str, dict[str, Any]]:
    """Return the token's header as text and its claims in their order."""
    header, payload, _ = token.split(".")
    parts = [base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in (header, payload)]
    return parts[0].decode(), json.loads(parts[1])


TOKEN = re.compile(rb'"token":"([^"]+)"')


def comparable(answer: Answer) -> tuple[int, str | None, bytes]:
    """Return status, type and body, with a token's text without what depends on time."""

    def shown(found: re.Match[bytes]) -> bytes:
        header, payload = claims(found[1].decode())
        expires = payload.pop("exp")
        assert abs(expires - time.time() - 432000) < 30
        return f"{header}{list(payload.items())}".encode()

    return answer.head.status, answer.head.header("content-type"), TOKEN.sub(shown, answer.body)


# -- the same answers


def login(collection: str, body: bytes, headers: Mapping[str, str] = JSON, query: str = "") -> Any:
    name = (
        f"{collection} {body[:90].decode(errors='replace')} {headers.get('Content-Type')} {query}"
    )
    return pytest.param(f"{collection}/auth-with-password{query}", body, headers, id=name)


BOB = b'{"identity":"bob@example.com","password":"bob-pass-1"}'
MULTIPART = (
    b'--b\r\nContent-Disposition: form-data; name="identity"\r\n\r\nann@example.com\r\n'
    b'--b\r\nContent-Disposition: form-data; name="password"\r\n\r\nann-pass-1\r\n--b--\r\n'
)

SAME_BYTES = [
    login("users", ANN),
    login(USERS, BOB),
    login("users", b'{"identity":"ann@example.com","password":"wrong"}'),
    login("users", b'{"identity":"nobody@example.com","password":"ann-pass-1"}'),
    login("users", b'{"identity":"ANN@example.com","password":"ann-pass-1"}'),
    login("users", b'{"identity":"ann","password":"ann-pass-1"}'),
    login("users", ANN.replace(b"}", b',"identityField":"email"}')),
    login("users", ANN.replace(b"}", b',"identityField":null}')),
    login("users", ANN.replace(b"}", b',"identityField":"id"}')),
    login("users", json.dumps({"password": "x", "identityField": "y" * 256}).encode()),
    login("users", json.dumps({"password": "x", "identityField": "ä" * 128}).encode()),
    login("users", b'{"IDENTITY":"ann@example.com","Pass_word":"ann-pass-1"}'),
    login("users", b'{"identity":"ann@example.com","password":"ann-pass-1"} more'),
    login("users", b'{"identity":"ann@example.com","password":"ann-pass-1","x":[{"y":1}]}'),
    *(
        login("users", json.dumps({"identity": text, "password": "ann-pass-1"}).encode())
        for text in (" ann@example.com", "ann@example.com\n", "ann@EXAMPLE.com", "@", "%", "ann@")
    ),
    *(
        login("users", json.dumps({"identity": "ann@example.com", "password": text}).encode())
        for text in ("ann-pass-1 ", "ann-pass-1\0", "ann-pass-1" + "x" * 100, "é" * 127)
    ),
    *(
        login("members", BOB.replace(b"}", b',"identityField":"%s"}' % name))
        for name in (b"EMAIL", b"email ", b"id", b"tokenKey", b"password", b"email", b" ")
    ),
    login("users", b"\xef\xbb\xbf" + ANN),
    login("users", b'{"identity":"\\ud800","password":"x"}'),
    login("users", b'{"identity":"\xff","password":"x"}'),
    login("users", ANN[:-1] + b',"IDENTITY":"x"}'),
    login("users", b'{"username":"ann@example.com","password":"ann-pass-1"}'),
    login("users", b"{}"),
    login("users", b"null"),
    login("users", b"[]"),
    login("users", b"{bad"),
    login("users", b'{"identity":1,"password":"x"}'),
    login("users", b'{"identity":"a","identity":"b","password":"x"}'),
    login("users", b'{"identity":"","password":"","identityField":"nope"}'),
    login("users", b'{"identity":"  ","password":" "}'),
    login("users", b'{"identity":"a\\u0000b@c.d","password":"x"}'),
    login("users", json.dumps({"identity": "x" * 255, "password": "y" * 255}).encode()),
    login("users", json.dumps({"identity": "x" * 256, "password": "y" * 256}).encode()),
    login("users", json.dumps({"identity": "ä" * 128, "password": "ä" * 128}).encode()),
    login("users", b"", {}),
    login("users", b"", {"Content-Type": "text/plain"}),
    login("users", ANN, {}),
    login("users", ANN, {"Content-Type": "text/plain"}),
    login("users", ANN, {"Content-Type": "Application/JSON"}),
    login("users", ANN, {"Content-Type": "application/json; charset=utf-8"}),
    login("users", b"", JSON | {"Transfer-Encoding": "chunked"}),
    login("users", ANN, JSON | {"Transfer-Encoding": "chunked"}),
    login("users", b"identity=ann%40example.com&password=ann-pass-1", FORM),
    login("users", b"password=ann-pass-1", FORM, "?identity=ann%40example.com"),
    login("users", b"password=ann-pass-1&password=x&identity=ann%40example.com", FORM),
    login("users", b"identity=x&%40jsonPayload=" + ANN.replace(b'"', b"%22"), FORM),
    login("users", b"identity=ann%40example.com&password=ann-pass-1&%40jsonPayload=null", FORM),
    login("users", b"%40jsonPayload=null&%40jsonPayload=" + ANN.replace(b'"', b"%22"), FORM),
    login("users", b"%40jsonPayload=" + ANN.replace(b'"', b"%22") + b"&%40jsonPayload=null", FORM),
    login("users", MULTIPART, {"Content-Type": "multipart/form-data; boundary=b"}),
    login("users", MULTIPART, {"Content-Type": "multipart/form-data"}),
    login("users", ANN, JSON | {"Authorization": "nonsense"}),
    login("members", BOB),
    login("members", b'{"identity":"bob@example.com","password":"m-pass-1"}'),
    login("members", BOB.replace(b'"bob-pass-1"', b'"m-pass-1","identityField":"username"')),
    login("members", b'{"identity":"BOB","password":"bob-pass-1"}'),
    login("members", b'{"identity":"bob","password":"bob-pass-1","identityField":"email"}'),
    login("locked", ANN),
    login("locked", b"{bad"),
    login("projects", ANN),
    login("nosuch", ANN),
    login("Users", ANN),
    login("us%65rs", ANN),
    login("_PB_users_auth_", ANN),
    login("users", ANN, query="?fields=token"),
    login("users", ANN, query="?fields=record.id"),
    login("users", ANN, query="?fields=nosuch"),
    login("users", ANN, query="?fields=record.name:excerpt(3)"),
    login("users", ANN, query="?fields=token("),
    login("users", b"{}", query="?fields=message"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "headers"), SAME_BYTES)
async def test_a_login_is_answered_as_by_pocketbase(
    original: Original, ours: Ours, path: str, body: bytes, headers: Mapping[str, str]
) -> None:
    """The answer is the same to the byte, except for the time at which a token expires."""
    theirs = await post(original.address, path, body, headers)

    answer = await post(ours.address, path, body, headers)

    assert comparable(answer) == comparable(theirs)


@pytest.mark.parametrize("query", ["?fields=*", "?fields=record.name,token", "?fields=record.*"])
async def test_picked_members_are_those_of_pocketbase(
    original: Original, ours: Ours, query: str
) -> None:
    """PocketBase's order of picked members is random, so values are compared."""
    path = f"users/auth-with-password{query}"
    theirs = json.loads((await post(original.address, path, ANN)).body)
    answer = json.loads((await post(ours.address, path, ANN)).body)

    assert answer.pop("token", "").split(".")[0] == theirs.pop("token", "").split(".")[0]
    assert answer == theirs


@pytest.mark.parametrize("collection", GUARDED)
@pytest.mark.parametrize("caller", ["nobody", "ann", "bob", "root"])
async def test_a_login_is_admitted_if_pocketbase_admits_it(
    original: Original, ours: Ours, collection: str, caller: str
) -> None:
    """The auth rule decides by the record and by the request with its own token.

    A filter has no effect.
    """
    query = "?q=1&filter=id%3D%22x%22" if caller != "bob" else ""
    rows = {row["email"].partition("@")[0]: row for row in original.rows[collection]}
    tokens = {name: await _token_of(original, collection, row) for name, row in rows.items()}
    roots = original.superuser_token, jwt.encode({"sub": "root", "role": "root"}, SECRET)

    async def answers(address: Address, root: str) -> list[tuple[int, str | None, bytes]]:
        headers = JSON | {"X-Key": "k"}
        if caller != "nobody":
            headers["Authorization"] = {**tokens, "root": root}[caller]
        logins = [
            await post(address, f"{collection}/auth-with-password{query}", body, headers)
            for body in (ANN, BOB)
        ]
        refresh = await post(address, f"{collection}/auth-refresh{query}", b"", headers)
        return [comparable(answer) for answer in (*logins, refresh)]

    assert await answers(ours.address, roots[1]) == await answers(original.address, roots[0])


async def _token_of(original: Original, collection: str, row: Mapping[str, Any]) -> str:
    kind = f"/api/collections/{collection}"
    request = Request(method="GET", path=kind, headers={"Authorization": original.superuser_token})
    collection_id = json.loads((await send(request, original.address)).body)["id"]
    return make_login_token(
        collection_id=collection_id,
        record_id=row["id"],
        signing_key=row["tokenKey"] + SECRET,
        expires_at=int(time.time()) + 1000,
    )


EXPANDS = [
    *("vault", "teams", "boss", "nope", "teams.nope", "teams,vault", "teams,+boss.teams", "%20"),
    *(
        "posts_via_author",
        "posts_via_author.author.boss",
        "boss.posts_via_author",
        "staff_via_boss",
    ),
    *("teams&q=k", "teams&q=other", "teams&q=", "teams&filter=name%3D%22zzz%22", "%zz", "te;ams"),
    *("boss&manages=yes", "boss&manages=no", "boss&expand=teams", "x;y&expand=boss", ""),
    *("teams&fields=record.expand", "teams&fields=token,record.id,record.expand.teams.name"),
    *("teams&fields=*,record.expand.teams.name:excerpt(3,true)", "teams&fields=record.expand.*"),
    *("boss&fields=record.expand.boss.email", "teams&fields=record&fields=token", "teams&fields=("),
]


@pytest.mark.parametrize("query", EXPANDS)
@pytest.mark.parametrize("name", ["ann", "bob"])
async def test_related_records_are_those_of_pocketbase(
    original: Original, ours: Ours, name: str, query: str
) -> None:
    """Related records obey their view rules, evaluated for the login's user and request."""
    body = json.dumps({"identity": f"{name}@example.com", "password": f"{name}-pass-1"}).encode()

    async def answers(address: Address) -> list[tuple[int, Any]]:
        login = f"staff/auth-with-password?expand={query}"
        first = await post(address, login, body, JSON | {"X-Key": "k"})
        token = await log_in(address, "staff", body)
        headers = {"X-Key": "k", "Authorization": token}
        second = await post(address, f"staff/auth-refresh?expand={query}", headers=headers)
        return [_without_token(first), _without_token(second)]

    assert await answers(ours.address) == await answers(original.address)


def _without_token(answer: Answer) -> tuple[int, Any]:
    """Return status and content: the order of picked members is random in PocketBase."""
    content = json.loads(answer.body)
    return answer.head.status, {**content, "token": "token" in content}


@pytest.mark.parametrize("path", ["users", "members", "locked", "projects", "nosuch", USERS])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_auth_methods_are_listed_as_by_pocketbase(
    original: Original, ours: Ours, method: str, path: str
) -> None:
    request = Request(method=method, path=f"/api/collections/{path}/auth-methods", headers={})
    theirs = await send(request, original.address)

    answer = await send(request, ours.address)

    assert comparable(answer) == comparable(theirs)


@pytest.mark.parametrize("path", ["users/auth-refresh", "users/auth-with-password"])
async def test_a_get_finds_no_file(original: Original, ours: Ours, path: str) -> None:
    request = Request(method="GET", path=f"/api/collections/{path}", headers={})

    assert comparable(await send(request, ours.address)) == comparable(
        await send(request, original.address)
    )


REFRESHES = [
    ("users", "{token}"),
    ("users", "Bearer {token}"),
    ("users", "Bearer  {token}"),
    (USERS, "{token}"),
    ("users", ""),
    ("users", "garbage"),
    ("users", "{token}x"),
    ("users", "{token}="),
    ("users", "bEaReR {token}"),
    ("users", "Bearer\t{token}"),
    ("users", "{token} {token}"),
    ("members", "{token}"),
    ("locked", "{token}"),
    ("projects", "{token}"),
    ("projects", ""),
    ("nosuch", "{token}"),
    ("users?fields=token", "{token}"),
]


@pytest.mark.parametrize(("path", "authorization"), REFRESHES)
async def test_a_refresh_is_answered_as_by_pocketbase(
    original: Original, ours: Ours, path: str, authorization: str
) -> None:
    collection, mark, query = path.partition("?")
    path = f"{collection}/auth-refresh{mark}{query}"

    async def refresh(address: Address) -> Answer:
        value = authorization.format(token=await log_in(address))
        return await post(address, path, headers={"Authorization": value} if value else {})

    assert comparable(await refresh(ours.address)) == comparable(await refresh(original.address))


async def test_a_large_login_delays_no_other_request(ours: Ours) -> None:
    """Parsing such a body takes a second; other requests hardly wait for it."""
    body = ANN[:-1] + b',"x":[' + b"1," * 190_000 + b"1]}"
    loop = asyncio.get_running_loop()
    answer = asyncio.create_task(post(ours.address, "users/auth-with-password", body))
    longest = 0.0
    while not answer.done():
        asked = loop.time()
        await asyncio.sleep(0)  # a turn of the loop
        longest = max(longest, loop.time() - asked)

    assert answer.result().head.status == 200
    assert longest < 0.3


BODIES: list[tuple[bytes, Mapping[str, str]]] = [
    (b"{}", JSON),
    (b" null x", JSON),
    (b'{"a":1,"A":{"b":[]}} x', JSON),
    (b"{bad", JSON),
    (b"[]", JSON),
    (b'"x"', JSON),
    (b'{"x":[{"a":1,"a":2}]}', JSON),
    (b'{"x":"\xff"}', JSON),
    (b"\xef\xbb\xbf{}", JSON),
    (b"", JSON | {"Transfer-Encoding": "chunked"}),
    (b"a=1&a=2&=&&%ff", FORM),
    (b"%zz", FORM),
    (b"a;b", FORM),
    (b"@jsonPayload=null", FORM),
    (b"@jsonPayload=%7B%22identity%22%3A1%7D", FORM),
    (b"@jsonPayload=%7B%7D x", FORM),
    (b"@jsonPayload=", FORM),
    (MULTIPART, {"Content-Type": "multipart/form-data; boundary=b"}),
    (MULTIPART, {"Content-Type": "multipart/form-data"}),
    (b"", {"Content-Type": "text/plain"}),
    (b"x", {"Content-Type": "text/plain"}),
    (b"{}", {}),
]


@pytest.mark.parametrize(("body", "headers"), BODIES)
@pytest.mark.parametrize("path", ["users/auth-refresh", "members/auth-refresh?%zz"])
async def test_a_refresh_wants_no_body_but_one_that_can_be_read(
    original: Original, ours: Ours, path: str, body: bytes, headers: Mapping[str, str]
) -> None:
    """The token is checked before the body: callers without one get that error first."""
    account = (path.partition("/")[0], BOB if path.startswith("members") else ANN)

    async def refresh(address: Address, token: str) -> tuple[int, str | None, bytes]:
        return comparable(await post(address, path, body, {**headers, "Authorization": token}))

    for token in (await log_in(original.address, *account), ""):
        assert await refresh(ours.address, token) == await refresh(original.address, token)


# -- each other's tokens


async def test_either_takes_the_others_tokens(original: Original, ours: Ours) -> None:
    """Users stay signed in when an application moves from PocketBase, and when it moves back."""
    for collection, body in (("users", ANN), ("members", BOB)):
        here = await log_in(ours.address, collection, body)
        there = await log_in(original.address, collection, body)
        path = f"{collection}/auth-refresh"

        assert (
            await post(original.address, path, headers={"Authorization": here})
        ).head.status == 200
        assert (await post(ours.address, path, headers={"Authorization": there})).head.status == 200


async def test_the_same_second_makes_the_same_token(original: Original, ours: Ours) -> None:
    """Tokens are equal byte for byte: header, order of claims, key."""
    for _ in range(20):
        there = await log_in(original.address)
        here = await log_in(ours.address)
        if claims(here)[1]["exp"] == claims(there)[1]["exp"]:
            break

    assert here == there


async def test_a_token_that_is_not_refreshable_comes_back_as_it_is(
    original: Original, ours: Ours
) -> None:
    path = "users/impersonate/userann00000001"
    made = await post(
        original.address,
        path,
        b'{"duration":600}',
        JSON | {"Authorization": original.superuser_token},
    )
    token = json.loads(made.body)["token"]

    for address in (original.address, ours.address):
        answer = await post(address, "users/auth-refresh", headers={"Authorization": token})
        assert json.loads(answer.body)["token"] == token


@pytest.mark.parametrize("claims", [{}, {"collectionId": USERS, "type": "auth"}], ids=["", "both"])
async def test_a_token_of_others_never_becomes_one_of_ours(
    ours: Ours, claims: dict[str, Any]
) -> None:
    """Whatever a foreign token claims, its issuer decides how long the user is signed in."""
    given = {"sub": "userann00000001", "exp": SOON, "refreshable": True, **claims}
    token = jwt.encode(given, SECRET)

    answer = await post(ours.address, "users/auth-refresh", headers={"Authorization": token})

    assert answer.head.status == 200
    assert json.loads(answer.body)["token"] == token


async def test_a_pocketbase_token_is_its_user_everywhere(original: Original, ours: Ours) -> None:
    token = await log_in(original.address)

    caller = await ours.authenticator.authenticate(f"Bearer {token}")

    assert caller.principal == AuthRecord(
        collection_id=USERS,
        collection_name="users",
        id="userann00000001",
        email="ann@example.com",
        verified=True,
    )
    assert caller.expires_at == claims(token)[1]["exp"]


async def test_other_tokens_of_pocketbase_are_guests(original: Original, ours: Ours) -> None:
    """Superuser and file tokens are signed with other secrets, so they identify no user here."""
    file = await post(
        original.address,
        "/api/files/token",
        headers={"Authorization": await log_in(original.address)},
    )

    for token in (original.superuser_token, json.loads(file.body)["token"]):
        assert (await ours.authenticator.authenticate(token)).principal == GUEST


def sign(payload: Mapping[str, Any], key: str, header: Mapping[str, Any] | None = None) -> str:
    """Return a hand-made token, for what PocketBase would never issue."""
    texts = [json.dumps(dict(part)) for part in (header or {"alg": "HS256"}, payload)]
    parts = [base64.urlsafe_b64encode(text.encode()).rstrip(b"=") for text in texts]
    signature = hmac.digest(key.encode(), b".".join(parts), hashlib.sha256)
    return b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


SOON = int(time.time()) + 3000
HAND_MADE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"collectionId": "users"}, {}),
    ({"collectionId": "USERS"}, {}),
    ({"collectionId": "_PB_users_auth_"}, {}),
    ({"exp": None}, {}),
    ({"exp": 1}, {}),
    ({"exp": "4000000000"}, {}),
    ({"exp": SOON + 0.5}, {}),
    ({"nbf": SOON}, {}),
    ({"iat": SOON}, {}),
    ({"nbf": 1, "iat": 1}, {}),
    ({"type": "file"}, {}),
    ({"type": None}, {}),
    ({"id": ""}, {}),
    ({"id": 7}, {}),
    ({"id": "nosuchuser00000"}, {}),
    ({"collectionId": "members"}, {}),
    ({"collectionId": "nosuch"}, {}),
    ({"refreshable": False}, {}),
    ({"exp": []}, {}),
    ({"exp": -1}, {}),
    ({"nbf": "1"}, {}),
    ({"iat": []}, {}),
    ({"iat": 0}, {}),
    ({"aud": ["x"], "iss": 1, "sub": 1, "jti": 1}, {}),
    ({"type": "Auth"}, {}),
    ({"type": 1}, {}),
    ({"collectionId": 1}, {}),
    ({"collectionId": ""}, {}),
    ({"id": "userann00000001 "}, {}),
    ({"id": "USERANN00000001"}, {}),
    ({}, {"alg": "hs256"}),
    ({}, {"typ": "JWT"}),
    ({}, {"alg": "HS256", "kid": "x", "jwk": {}}),
    ({}, {"alg": "HS256", "typ": "other"}),
    ({}, {"alg": "HS384"}),
    ({}, {"alg": "none"}),
]


@pytest.mark.parametrize(("changed", "header"), HAND_MADE, ids=[f"{c} {h}" for c, h in HAND_MADE])
async def test_a_hand_made_token_counts_where_it_counts_for_pocketbase(
    original: Original, ours: Ours, changed: dict[str, Any], header: dict[str, Any]
) -> None:
    row = original.rows["users"][0]
    given = {
        "collectionId": USERS,
        "exp": SOON,
        "id": row["id"],
        "refreshable": True,
        "type": "auth",
    }
    payload = {k: v for k, v in (given | changed).items() if v is not None}
    token = sign(payload, row["tokenKey"] + SECRET, header)

    answers = [
        await post(address, "users/auth-refresh", headers={"Authorization": token})
        for address in (original.address, ours.address)
    ]

    theirs, answer = (a.head.status for a in answers)
    assert answer == theirs
    assert (await ours.authenticator.authenticate(token)).principal != GUEST or theirs != 200


# -- what an existing table needs


async def test_a_new_password_ends_all_tokens(users_url: str, mine: Ours) -> None:
    """Applications change the token key with the password, as PocketBase does."""
    token = await log_in(mine.address)
    with psycopg.connect(users_url, autocommit=True) as connection:
        connection.execute("""UPDATE users SET "tokenKey" = md5('new')""")

    assert (await mine.authenticator.authenticate(token)).principal == GUEST


async def test_without_a_token_key_the_password_hash_serves(users_url: str) -> None:
    """Then changing the password alone invalidates the tokens."""
    collections = {
        **COLLECTIONS,
        "users": {**COLLECTIONS["users"], "login": {"password_hash": "password"}},
    }
    async with serving(users_url, config(collections)) as server:
        token = await log_in(server.address)
        assert (await server.authenticator.authenticate(token)).principal != GUEST

        with psycopg.connect(users_url, autocommit=True) as connection:
            connection.execute("UPDATE users SET password = password || 'x'")

        assert (await server.authenticator.authenticate(token)).principal == GUEST


@pytest.mark.parametrize("login", [LOGIN, {"password_hash": "password"}], ids=["key", "hash"])
async def test_a_new_hash_ends_our_own_tokens_alone(users_url: str, login: dict[str, str]) -> None:
    """A rehashed password invalidates pgrealtime's own tokens and no other issuer's.

    Django stores a new hash at a login when its cost setting has grown: its own tokens stay valid.
    That holds on open connections and for new ones.
    """
    collections = {**COLLECTIONS, "users": {**COLLECTIONS["users"], "login": login}}
    foreign = jwt.encode({"sub": "userann00000001", "exp": SOON}, SECRET)
    async with serving(users_url, config(collections)) as server:
        own = await log_in(server.address)
        users = server.authenticator.find_user_collection("users")
        assert users is not None
        callers = [await server.authenticator.authenticate(token) for token in (own, foreign)]
        row: Row = {"id": "userann00000001", "password": "other", "tokenKey": "other"}
        kept = [update_caller(caller, users.collection, users.login, row) for caller in callers]
        with psycopg.connect(users_url, autocommit=True) as connection:
            connection.execute("""UPDATE users SET password = 'other', "tokenKey" = 'other'""")
        back = [await server.authenticator.authenticate(token) for token in (own, foreign)]

    assert [one.principal.id for one in callers if isinstance(one.principal, AuthRecord)] == [
        "userann00000001"
    ] * 2
    assert kept == [Caller(), callers[1]]
    assert [one.principal for one in back] == [GUEST, callers[1].principal]


@pytest.mark.parametrize("column", ['"tokenKey" = NULL', """"tokenKey" = ''"""])
async def test_a_user_without_a_token_key_has_not_everybodys(
    users_url: str, mine: Ours, column: str
) -> None:
    """The login secret alone would sign for every such user alike."""
    with psycopg.connect(users_url, autocommit=True) as connection:
        connection.execute(sql.SQL(f"UPDATE users SET {column}"))
    claims_ = {"collectionId": USERS, "exp": SOON, "id": "userann00000001", "type": "auth"}

    token = await log_in(mine.address)

    assert (await mine.authenticator.authenticate(token)).principal != GUEST
    assert (await mine.authenticator.authenticate(sign(claims_, SECRET))).principal == GUEST


@pytest.mark.parametrize("stored", ["NULL", "''", "'ann-pass-1'", "'!'"])
async def test_a_user_without_a_usable_hash_cannot_log_in(
    users_url: str, mine: Ours, stored: str
) -> None:
    with psycopg.connect(users_url, autocommit=True) as connection:
        connection.execute(sql.SQL(f"UPDATE users SET password = {stored}"))

    answer = await post(mine.address, "users/auth-with-password", ANN)

    assert answer.body == b'{"data":{},"message":"Failed to authenticate.","status":400}'


async def test_an_identity_of_two_users_admits_neither(users_url: str, mine: Ours) -> None:
    """Choosing one of them could sign a caller in as the other user."""
    with psycopg.connect(users_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE users DROP CONSTRAINT users_email_key")
        connection.execute("UPDATE users SET email = 'ann@example.com'")

    answer = await post(mine.address, "users/auth-with-password", ANN)

    assert answer.head.status == 400


async def test_hash_and_token_key_are_in_no_answer(ours: Ours, original: Original) -> None:
    answer = await post(ours.address, "users/auth-with-password", ANN)

    for row in original.rows["users"]:
        assert row["tokenKey"].encode() not in answer.body
        assert row["password"].encode() not in answer.body


@pytest.mark.parametrize(
    ("column", "unique", "status"),
    [
        ("text", "CREATE UNIQUE INDEX ON users (lower(email))", 200),
        ("varchar(80)", 'CREATE UNIQUE INDEX ON users (lower("email"))', 200),
        ("text", "CREATE UNIQUE INDEX ON users (email)", 400),
        ("text", "CREATE INDEX ON users (lower(email))", 400),
        ("text", "CREATE UNIQUE INDEX ON users (lower(email)) WHERE verified", 400),
        ("text", "CREATE UNIQUE INDEX ON users (lower(email), id)", 400),
        ("citext", "CREATE UNIQUE INDEX ON users (email)", 200),
    ],
)
async def test_case_counts_unless_the_unique_index_ignores_it(
    users_url: str, column: str, unique: str, status: int
) -> None:
    """As PocketBase does with an index COLLATE NOCASE (protocol, 9.1)."""
    with psycopg.connect(users_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE users DROP CONSTRAINT users_email_key")
        connection.execute(sql.SQL(f"ALTER TABLE users ALTER email TYPE {column}"))
        connection.execute(sql.SQL(unique))
        connection.execute("UPDATE users SET email = 'Ann@Example.com' WHERE name LIKE 'Ann%'")
    collections = {"users": COLLECTIONS["users"]}
    async with serving(users_url, config(collections)) as server:
        exact = await post(
            server.address, "users/auth-with-password", ANN.replace(b"ann@e", b"Ann@E")
        )
        other = await post(server.address, "users/auth-with-password", ANN)

    assert exact.head.status == 200
    assert other.head.status == status


OTHER_KEYS = """
CREATE TABLE users (id {type} PRIMARY KEY, mail text UNIQUE, hash text);
CREATE EXTENSION pgcrypto;
INSERT INTO users VALUES ({id}, 'ann@example.com', crypt('ann-pass-1', gen_salt('bf', 4)));
"""


@pytest.mark.parametrize(
    ("key_type", "value"),
    [("uuid", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"), ("bigint", "7"), ("text", "ä")],
)
async def test_users_of_any_table_log_in_with_hashes_of_postgres(
    database_url: str, key_type: str, value: str
) -> None:
    """Keys of type uuid and integer, another name for the address, pgcrypto's bcrypt hashes."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(sql.SQL(OTHER_KEYS.format(type=key_type, id=f"'{value}'")))
    users = {
        "table": "users",
        "type": "auth",
        "fields": {"rename": {"mail": "email"}},
        "login": {"password_hash": "hash"},
    }
    async with serving(database_url, config({"users": users})) as server:
        token = await log_in(server.address)
        answer = await post(server.address, "users/auth-refresh", headers={"Authorization": token})
        caller = await server.authenticator.authenticate(token)

    assert json.loads(answer.body)["record"] == {
        "collectionId": "pbc_1736455494",
        "collectionName": "users",
        "email": "ann@example.com",
        "id": value,
    }
    assert isinstance(caller.principal, AuthRecord)
    assert caller.principal.id == value


# -- guessing


async def test_guesses_are_counted_and_the_right_password_starts_anew(users_url: str) -> None:
    async with serving(users_url, config(attempts_per_minute=3)) as server:

        async def attempt(body: bytes) -> int:
            return (await post(server.address, "users/auth-with-password", body)).head.status

        wrong = ANN.replace(b"ann-pass-1", b"guess")
        assert [await attempt(wrong) for _ in range(2)] == [400, 400]
        assert await attempt(ANN) == 200
        assert [await attempt(wrong) for _ in range(4)] == [400, 400, 400, 429]
        assert await attempt(ANN) == 429
        assert await attempt(ANN.replace(b"ann@", b"ANN@")) == 429
        assert await attempt(BOB) == 200
        answer = await post(server.address, "users/auth-with-password", ANN)

    assert answer.body == b'{"data":{},"message":"Too Many Requests.","status":429}'


async def work_of(server: Ours, identity: str) -> float:
    """Return the CPU seconds of this process, with the server in it, for refusing one password."""
    body = json.dumps({"identity": identity, "password": "guess"}).encode()
    started = time.process_time()
    await post(server.address, "users/auth-with-password", body)
    return time.process_time() - started


async def test_an_unknown_user_takes_as_long_as_a_wrong_password(users_url: str) -> None:
    """The response time must not show whether an account exists."""
    identities = ("ann@example.com", "eve@example.com", "eve")
    async with serving(users_url, config(attempts_per_minute=1000)) as server:
        rounds = [[await work_of(server, one) for one in identities] for _ in range(7)]

    known, unknown, shapeless = (statistics.median(times) for times in zip(*rounds, strict=True))
    assert known / 1.5 < unknown < known * 1.5
    assert known / 1.5 < shapeless < known * 1.5


async def test_the_decoy_follows_the_hashes_once_one_of_the_new_ones_was_right(
    users_url: str,
) -> None:
    """The dummy hash costs as much as the table's, or its time would show which accounts exist."""
    async with serving(users_url, config(attempts_per_minute=1000)) as server:
        before = statistics.median([await work_of(server, "eve") for _ in range(5)])
        with psycopg.connect(users_url, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION pgcrypto")
            connection.execute("UPDATE users SET password = crypt('ann-pass-1', gen_salt('bf', 4))")
        await log_in(server.address)
        after = statistics.median([await work_of(server, "eve") for _ in range(5)])

    assert after < before / 2
