"""A reload applies a configuration to all parts of the service, or to none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import jwt
import pytest
from structlog.testing import capture_logs

from pgrealtime.api.call_router import CallRouter
from pgrealtime.auth.account import AccountLoader
from pgrealtime.auth.authenticator import Authenticator, _login_trust_digest
from pgrealtime.auth.login import LoginAttempt, LoginService
from pgrealtime.auth.principal import GUEST, AuthRecord, Caller, Superuser
from pgrealtime.auth.record import digest_token_key
from pgrealtime.bus.base import NoBus, draw_tag
from pgrealtime.catalog.model import Catalog, Table
from pgrealtime.changes import Row, TableName, Update, WholeRow
from pgrealtime.collections.build import build_collections
from pgrealtime.config.load import ConfigLocations, ParsedConfig
from pgrealtime.config.model import Config
from pgrealtime.errors import AuthError, DatabaseUnreachableError
from pgrealtime.feed.base import FeedStatus, WantedTables
from pgrealtime.lsn import LSN
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.reads.admission import Admission
from pgrealtime.reads.own_record import OwnRecordRenderer
from pgrealtime.rule_queries.executor import QueryExecutor
from pgrealtime.service.applied_config import AppliedConfig, fit_to_schema
from pgrealtime.service.parts import ServiceParts
from pgrealtime.service.reload import Reloader
from tests.config_values import parse_config
from tests.unit.hub.harness import (
    COLLECTIONS,
    NOTES,
    PEOPLE,
    POSTS,
    HubHarness,
    insert,
    open_harness,
    update,
)

SECRET = "made up for the tests, and long enough"


def _with_key(table: Table) -> Table:
    """Return the table with a primary key and one more column."""
    key, *others = table.columns
    others.append(replace(others[0], name="role", attribute_number=len(table.columns) + 1))
    columns = (replace(key, not_null=True), *others)
    return replace(table, columns=columns, unique_keys=(("id",),))


TABLES = {one.table.name: _with_key(one.table) for one in COLLECTIONS.values()}
CATALOG = Catalog(tables=TABLES, server_version=170_000, schemas=("public",))
LOGIN = {"identity": ["email"], "password_hash": "key"}


def configured(
    *,
    posts: Mapping[str, object] | None = None,
    people: Mapping[str, object] | None = None,
    auth: Mapping[str, object] | None = None,
    **sections: object,
) -> Config:
    """Return a configuration of the test collections, with some keys changed."""
    public = {"list_rule": "", "view_rule": ""}
    collections = {
        "posts": {"table": "public.posts", **public, **(posts or {})},
        "notes": {"table": "public.notes", **public},
        "people": {
            "table": "public.people",
            "type": "auth",
            "auth_rule": "",
            "login": LOGIN,
            **public,
            **(people or {}),
        },
    }
    login = {"enabled": True, "secret": "s" * 40, "attempts_per_minute": 1}
    return parse_config(
        {"collections": collections, "auth": {"login": login, **(auth or {})}, **sections}
    )


@dataclass
class Running:
    """A service without a database, with the configuration and the schema that it reads next."""

    harness: HubHarness
    parts: ServiceParts
    reloading: Reloader
    config: Config
    catalog: Catalog

    async def reload(self, config: Config) -> bool:
        self.config = config
        return await self.reloading.reload()


class NoFeed:
    """The tables stay the same, so that nothing is asked of it."""

    status = FeedStatus(is_connected=True, changes_received=0, breaks={})

    async def run(self) -> None:
        raise AssertionError

    async def catch_up(self) -> None:
        raise AssertionError

    async def wait_for_changelog(self, lsn: LSN) -> bool:
        raise AssertionError(lsn)

    async def want(self, wanted: WantedTables) -> None:
        raise AssertionError(wanted)

    def append_gap(self, reason: str, tables: frozenset[TableName]) -> None:
        raise AssertionError(reason, tables)

    async def check_publication(self) -> None:
        """There is none."""


@asynccontextmanager
async def running() -> AsyncIterator[Running]:
    """A running service, whose stream is never opened again."""
    config = configured()
    collections = build_collections(config.collections, CATALOG)
    logins = {name: one.login for name, one in config.collections.items()}
    applied = AppliedConfig(config=config, collections=collections)
    async with open_harness() as harness:
        pool = QueryPool()  # never opened: every query fails
        accounts = AccountLoader(pool)
        login = LoginService(config.auth.login, accounts)
        executor = QueryExecutor(pool)
        authenticator = Authenticator(config.auth, collections, accounts, logins=logins)
        parts = ServiceParts(
            executor=executor,
            changelog=harness.changelog,
            feed=NoFeed(),
            hub=harness.hub,
            authenticator=authenticator,
            calls=CallRouter(harness.hub, authenticator, NoBus(draw_tag())),
            login_service=login,
            admission=Admission(executor, collections),
            own_records=OwnRecordRenderer(executor, collections, nulls="null"),
            pool=pool,
        )
        made: Running

        async def read_catalog(_config: Config) -> Catalog:
            return made.catalog

        reloading = Reloader(
            applied,
            parts,
            read_config=lambda: ParsedConfig(
                config=made.config, locations=ConfigLocations(source="test.yaml")
            ),
            read_catalog=read_catalog,
            schema_mismatch=asyncio.Event(),
        )
        made = Running(harness, parts, reloading, config, CATALOG)
        try:
            yield made
        finally:
            login.close()


@pytest.mark.parametrize(
    ("rules", "received"),
    [
        ({}, {"posts/*", "posts/a"}),
        ({"list_rule": None}, {"posts/a"}),
        ({"view_rule": None}, {"posts/*"}),
        ({"view_rule": "title = 'other'"}, {"posts/*"}),
        ({"list_rule": "title = 'other'"}, {"posts/a"}),
        ({"list_rule": None, "view_rule": None}, set()),
    ],
)
async def test_each_rule_counts_from_the_next_event_on(
    rules: Mapping[str, object], received: set[str]
) -> None:
    """List rules for topics of the collection, view rules for topics of a record."""
    async with running() as service:
        harness = service.harness
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*", "posts/a", "notes/*")
        assert await service.reload(configured(posts=rules))
        harness.commit(update("a", "new"), insert("n", table=NOTES))
        await harness.until_delivered()
        assert {name for _, name, _ in sink.events()[1:]} == {*received, "notes/*"}

        assert await service.reload(configured())
        harness.commit(update("a", "newer"))
        events = await sink.wait_for(len(sink.events()) + 2)
        assert {name for _, name, _ in events[-2:]} == {"posts/*", "posts/a"}


async def test_logins_are_decided_by_the_new_auth_rule() -> None:
    """The ``auth_rule`` in force decides whether a login is accepted."""
    row: Row = {"id": "ann", "email": "ann@example.com", "key": "k"}

    async def may_sign_in(service: Running) -> bool:
        people = COLLECTIONS["people"]
        return await service.parts.own_records.may_sign_in(
            people, row, Caller(), query={}, headers={}, context="password"
        )

    async with running() as service:
        assert await may_sign_in(service)
        assert await service.reload(configured(people={"auth_rule": None}))
        assert not await may_sign_in(service)
        assert await service.reload(configured(people={"auth_rule": "email ~ 'example'"}))
        with pytest.raises(DatabaseUnreachableError):  # the new rule needs a query
            await may_sign_in(service)


async def test_the_login_takes_its_new_settings() -> None:
    """A new limit of attempts is in force for the next attempt."""

    async def outcome(service: Running) -> str:
        users = service.parts.authenticator.find_user_collection("people")
        assert users is not None
        attempt = LoginAttempt(identity="ann", password="x")
        try:
            await service.parts.login_service.log_in(users, attempt, "10.0.0.1")
        except AuthError as error:
            return error.error_code
        return ""

    more = {"login": {"enabled": True, "secret": "s" * 40, "attempts_per_minute": 2}}
    async with running() as service:
        before = [await outcome(service) for _ in range(2)]
        assert await service.reload(configured(auth=more))
        after = [await outcome(service) for _ in range(3)]

    assert before == ["login_failed", "login_refused"]
    assert after == ["login_failed", "login_failed", "login_refused"]


async def test_login_and_rule_columns_are_taken_from_the_new_collections() -> None:
    """Identity columns, and the columns of users' rows that rules read, are the new ones."""
    async with running() as service:
        authenticator = service.parts.authenticator
        before = authenticator.find_user_collection("people")
        other = {"login": {**LOGIN, "identity": ["id"]}}
        rule = "@request.auth.role = title"
        assert await service.reload(configured(people=other, posts={"list_rule": rule}))
        after = authenticator.find_user_collection("people")

    assert before is not None
    assert after is not None
    assert (before.login.identity, after.login.identity) == (("email",), ("id",))
    assert (before.rule_columns, after.rule_columns) == ((), ("role",))


@pytest.mark.parametrize(("key", "is_still_ann"), [("k1", True), ("k2", False)])
async def test_a_new_password_ends_the_login_s_tokens_after_a_reload_too(
    key: str, *, is_still_ann: bool
) -> None:
    """A change of the token key makes the caller a guest; other changes of the row don't."""
    async with running() as service:
        users = service.parts.authenticator.find_user_collection("people")
        assert users is not None
        ann = Caller(
            AuthRecord(collection_id=users.collection.id, collection_name="people", id="ann"),
            trust_digest=_login_trust_digest(service.config.auth.login.secret, users),
            token_key_digest=digest_token_key("k1"),
        )
        connection, _ = service.harness.connect()
        await service.harness.subscribe(connection, "posts/*", caller=ann)
        assert await service.reload(configured(posts={"view_rule": None}))
        assert connection.caller == ann
        before: Row = {"id": "ann", "email": "ann@x", "key": "k1"}
        after: Row = {**before, "key": key}
        service.harness.commit(Update(PEOPLE, after, WholeRow(before)))
        await service.harness.until_delivered()

        assert isinstance(connection.caller.principal, AuthRecord) is is_still_ann


async def test_policies_count_all_through_a_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row security policies that exist are applied at every moment of a reload.

    So they are where the database can't say whether policies exist. Policies created later are
    applied from the next reading of the schema on.
    """
    counted: list[bool] = []

    async with running() as service:
        pool, hub = service.parts.pool, service.parts.hub
        use = hub.replace_generation

        async def recording(*args: Any, **more: Any) -> None:
            counted.append("'posts'" in str(pool.begin_statements()))
            await use(*args, **more)
            counted.append("'posts'" in str(pool.begin_statements()))

        monkeypatch.setattr(hub, "replace_generation", recording)
        assert await service.reload(configured(posts={"list_rule": "title = 'x'"}))
        counted.append("'posts'" in str(pool.begin_statements()))
        pool.enable_row_security_for(())
        await service.reloading.refresh_schema()
        counted.append("'posts'" in str(pool.begin_statements()))

    assert counted == [True, True, True, True]


async def test_tokens_count_by_the_issuers_in_force() -> None:
    """The caller of a token whose issuer isn't configured is a guest."""
    issuer: dict[str, Any] = {"name": "app", "secret": SECRET, "superuser_when": {"role": "admin"}}
    claims = {"sub": "root", "role": "admin", "exp": time.time() + 60}
    token = jwt.encode(claims, SECRET, "HS256")
    async with running() as service:
        authenticate = service.parts.authenticator.authenticate
        assert (await authenticate(token)).principal == GUEST
        assert await service.reload(configured(auth={"issuers": [issuer]}))
        assert isinstance((await authenticate(token)).principal, Superuser)
        assert await service.reload(configured())
        assert (await authenticate(token)).principal == GUEST


async def test_guests_are_ended_where_they_are_not_allowed_any_more() -> None:
    """Their open connections are ended, and new calls of guests are refused."""
    async with running() as service:
        connection, sink = service.harness.connect()
        await service.harness.subscribe(connection, "posts/*")
        admit = service.parts.authenticator.authenticate_subscriber
        assert (await admit(None)).principal == GUEST
        assert await service.reload(configured(auth={"allow_guests": False}))
        await sink.wait_until("ended")
        with pytest.raises(AuthError, match="guests may not"):
            await admit(None)


async def test_a_configuration_with_a_problem_changes_nothing() -> None:
    """Also the valid parts of it don't apply."""
    async with running() as service:
        harness = service.harness
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*", "notes/*")
        with capture_logs() as logged:
            bad = configured(
                posts={"list_rule": None}, people={"view_rule": "nothing = 1"}, auth={"issuers": []}
            )
            assert not await service.reload(bad)
        harness.commit(insert("a"), insert("n", table=NOTES))
        events = await sink.wait_for(3)

    assert [name for _, name, _ in events[1:]] == ["posts/*", "notes/*"]
    (entry,) = logged
    assert (entry["event"], entry["code"]) == ("config.rejected", "config_invalid")
    assert "collections.people.view_rule" in "".join(entry["problems"])


async def test_what_needs_a_restart_is_said() -> None:
    """A warning names the changed sections that only a restart applies."""
    async with running() as service:
        with capture_logs() as logged:
            assert await service.reload(configured(server={"port": 1}))

    entry = [one for one in logged if one["event"] == "config.restart_needed"]
    assert [one["sections"] for one in entry] == [["server"]]


def test_a_collection_that_its_table_does_not_fit_any_more_is_locked() -> None:
    """One invalid rule locks all rules of its collection; other collections stay as they are."""
    table = TABLES[POSTS]
    renamed = replace(table, columns=(table.columns[0], replace(table.columns[1], name="name")))
    catalog = replace(CATALOG, tables={**TABLES, POSTS: renamed})

    applied = fit_to_schema(configured(posts={"view_rule": "title = 't'"}), catalog)

    locked = applied.collections["posts"]
    assert (locked.list_rule, locked.view_rule) == (None, None)
    assert [fault.path for fault in applied.problems] == ["collections.posts.view_rule"]
    assert applied.collections["notes"].list_rule == ""
    assert set(applied.streamed_tables) == set(TABLES)


def test_settings_of_collections_outlive_a_change_of_the_schema() -> None:
    """Without the names of claims a rule would read them as fields of the caller: as NULL."""
    issuer = {"name": "app", "secret": "s" * 32, "claims": {"tenant": "org_id"}}
    config = configured(auth={"issuers": [issuer]}, records={"hidden": "pocketbase"})

    collections = fit_to_schema(config, CATALOG).collections

    assert collections.claim_names == {"tenant"}
    assert not collections.is_strict


# Reading the schema for a row that doesn't fit it


async def _nothing(*_: object) -> None:
    pass


def _with_title(oid: int) -> Catalog:
    """Return the catalogue after the title of posts got another type."""
    posts = TABLES[POSTS]
    columns = tuple(
        replace(one, type=replace(one.type, oid=oid)) if one.name == "title" else one
        for one in posts.columns
    )
    return replace(CATALOG, tables={**TABLES, POSTS: replace(posts, columns=columns)})


def _title(service: Running) -> int:
    """Return the type in which the title of posts is evaluated."""
    column = service.harness.hub._progress.generation.collections["posts"].table.find_column(
        "title"
    )
    assert column is not None
    return column.type.oid


@asynccontextmanager
async def watching(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    """A running service that reads the schema on request."""
    async with running() as service:
        monkeypatch.setattr(service.parts.feed, "want", _nothing)
        monkeypatch.setattr(service.parts.pool, "drain", _nothing)
        watch = asyncio.create_task(service.reloading.watch_schema())
        try:
            async with asyncio.timeout(10):
                yield service
        finally:
            watch.cancel()
            await asyncio.wait([watch])


async def test_the_present_schema_is_in_force_after_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is read at once, not at the next interval."""
    async with watching(monkeypatch) as service:
        service.catalog = _with_title(4711)
        began = time.monotonic()
        assert await service.reloading.wait_for_schema_refresh()
        assert time.monotonic() - began < 1
        assert _title(service) == 4711
        assert await service.reloading.wait_for_schema_refresh(), "the schema is the same"


async def test_a_failed_reading_of_the_schema_is_reported_to_the_waiting_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``wait_for_schema_refresh`` returns False."""

    async def fail(_config: Config) -> NoReturn:
        raise DatabaseUnreachableError("no answer")

    async with watching(monkeypatch) as service:
        monkeypatch.setattr(service.reloading, "_read_catalog", fail)
        assert not await service.reloading.wait_for_schema_refresh()


async def test_a_reading_that_began_before_the_request_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may have read the schema from before the row, so another reading is waited for."""
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def read(_config: Config) -> Catalog:
        found = service.catalog
        reading.set()
        await go_on.wait()
        return found

    async with watching(monkeypatch) as service:
        monkeypatch.setattr(service.reloading, "_read_catalog", read)
        first = asyncio.create_task(service.reloading.wait_for_schema_refresh())
        await reading.wait()
        service.catalog = _with_title(4711)
        second = asyncio.create_task(service.reloading.wait_for_schema_refresh())
        await asyncio.sleep(0)
        go_on.set()
        assert await first
        assert await second
        assert _title(service) == 4711
