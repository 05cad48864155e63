"""Queries to the database bind the caller's row as the stream has it, not as it is by now.

Between a commit and its arrival in the stream the database is ahead of a connection's caller. There
a deleted user has an id and no columns, which is neither that user nor a guest, and a changed role
takes effect too early.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psycopg
import pytest

from pgrealtime.auth.principal import Caller
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.changelog.memory import Gap
from pgrealtime.changes import Delete, Insert, Row, TableName, Transaction, Update, WholeRow
from pgrealtime.collections.build import build_collections
from pgrealtime.config.model import CollectionConfig, RealtimeConfig
from pgrealtime.expand import load
from pgrealtime.hub.connections.connection import LIVE
from pgrealtime.hub.delivery import enrichment
from pgrealtime.hub.events.event import SLICE_CHANGES
from pgrealtime.hub.state import callers as caller_check
from tests.attacks.held_stream import World, world_of

SCHEMA = """
CREATE TABLE teams (id text PRIMARY KEY, open bool);
CREATE TABLE users (
  id uuid PRIMARY KEY, email text, role text, level int, team text REFERENCES teams, teams text[],
  is_out bool GENERATED ALWAYS AS (role = 'banned') STORED);
CREATE TABLE bans (id text PRIMARY KEY, person uuid REFERENCES users ON DELETE CASCADE);
CREATE TABLE secrets (id text PRIMARY KEY, body text, level int);
CREATE TABLE posts (id text PRIMARY KEY, secret text REFERENCES secrets);
INSERT INTO teams VALUES ('closed', false), ('open', true);
INSERT INTO secrets VALUES ('s', 'body', 5);
INSERT INTO users VALUES
  ('00000000-0000-0000-0000-00000000000b', 'bad@x', 'banned', 9, 'closed', '{closed}'),
  ('00000000-0000-0000-0000-00000000000c', 'good@x', 'member', 1, 'open', '{open}'),
  ('00000000-0000-0000-0000-00000000000d', 'other@x', 'member', 1, 'open', '{open}');
INSERT INTO bans VALUES ('b', '00000000-0000-0000-0000-00000000000b');
"""
BAD = "00000000-0000-0000-0000-00000000000b"
GOOD = "00000000-0000-0000-0000-00000000000c"
OTHER = "00000000-0000-0000-0000-00000000000d"

SIGNED_IN = "@request.auth.id != '' && "


@pytest.fixture(autouse=True)
def _expands_take_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine an expand may exceed its milliseconds.

    Its connection would read on by itself then, for as long as the next one takes, too.
    """
    monkeypatch.setattr(enrichment, "_EXPAND_SECONDS", 60.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A rule that excludes the bad user and guests, and where it is evaluated."""

    rule: str
    place: str
    """Collection and rule."""
    topic: str = "posts/*"
    is_of_columns: bool = True
    """True if columns of the caller's row decide, or rows that it references.

    False if rows that reference it.
    """


ROLE = SIGNED_IN + "@request.auth.role != 'banned'"
LEVEL = SIGNED_IN + "secret.level > @request.auth.level"
FILTERED = "posts/*?options=" + json.dumps({"query": {"filter": "secret.body = 'body'"}})
EXPANDED = "posts/*?options=" + json.dumps({"query": {"expand": "secret"}})

CASES = {
    "a list rule": Case(rule=ROLE, place="posts.list_rule"),
    "a filter over a locked collection": Case(rule=ROLE, place="secrets.list_rule", topic=FILTERED),
    "expand": Case(rule=ROLE, place="secrets.view_rule", topic=EXPANDED),
    "addresses": Case(rule=ROLE, place="users.manage_rule", topic="users/*"),
    "a generated column": Case(
        rule=SIGNED_IN + "@request.auth.is_out != true", place="posts.list_rule"
    ),
    "a generated column, expanded": Case(
        rule=SIGNED_IN + "@request.auth.is_out != true", place="secrets.view_rule", topic=EXPANDED
    ),
    "a column beside a related one": Case(rule=LEVEL, place="posts.list_rule"),
    "a column beside a related one, expanded": Case(
        rule=SIGNED_IN + "level > @request.auth.level && posts_via_secret.id != ''",
        place="secrets.view_rule",
        topic=EXPANDED,
    ),
    "what a column points to": Case(
        rule=SIGNED_IN + "@request.auth.team.open != false", place="posts.list_rule"
    ),
    "what a column points to, expanded": Case(
        rule=SIGNED_IN + "@request.auth.team.open != false",
        place="secrets.view_rule",
        topic=EXPANDED,
    ),
    "what an array points to": Case(
        rule=SIGNED_IN + "@request.auth.teams.open != false", place="posts.list_rule"
    ),
    "rows that point to the caller": Case(
        rule=SIGNED_IN + "@request.auth.bans_via_person.id = ''",
        place="posts.list_rule",
        is_of_columns=False,
    ),
    "rows that hold the id": Case(
        rule=SIGNED_IN + "@collection.bans.person != @request.auth.id",
        place="posts.list_rule",
        is_of_columns=False,
    ),
    "rows that hold the id, expanded": Case(
        rule=SIGNED_IN + "@collection.bans.person != @request.auth.id",
        place="secrets.view_rule",
        topic=EXPANDED,
        is_of_columns=False,
    ),
}


def configured(case: Case) -> dict[str, CollectionConfig]:
    relations = {
        "users": {"team": {"collection": "teams"}, "teams": {"collection": "teams"}},
        "bans": {"person": {"collection": "users"}},
        "posts": {"secret": {"collection": "secrets"}},
    }
    raw: dict[str, dict[str, Any]] = {
        name: {
            "table": f"public.{name}",
            "list_rule": "",
            "view_rule": "",
            "relations": relations.get(name, {}),
        }
        for name in ("teams", "users", "bans", "secrets", "posts")
    }
    raw["users"]["type"] = "auth"
    collection, rule = case.place.split(".")
    raw[collection][rule] = case.rule
    return {name: CollectionConfig.model_validate(one) for name, one in raw.items()}


def received(world: World, name: str, record_id: str) -> str:
    """Return what the connection was shown of a record's event, empty for nothing.

    Withheld related records appear as the gap that it is notified of.
    """
    for data in map(json.loads, world.data(name)):
        record: Mapping[str, Any] = data.get("record", {})
        if record.get("id") == record_id:
            if world.topics[name] == EXPANDED and "expand" not in record:
                return "withheld"
            is_whole = "email" in record or ("secret" in record and record.get("expand") != {})
            return "all" if is_whole else "the rest"
    return ""


POSTS, USERS = TableName("public", "posts"), TableName("public", "users")
SECRETS = TableName("public", "secrets")

NEW = Update(SECRETS, {"id": "s", "body": "NEW", "level": "5"}, WholeRow({"id": "s"}))


def user(record_id: str, **more: str) -> Row:
    """Return the image of a user's row, a member unless more is given."""
    given: Row = {"id": record_id, "email": "e@x", "role": "member", "level": "1"}
    return given | {"team": "open", "teams": "{open}"} | more


async def event_of(world: World, case: Case, name: str) -> Transaction:
    """Commit a change that the topic matches; its record's id is the name."""
    if case.topic != "users/*":
        row: Row = {"id": name, "secret": "s"}
        return await world.write(f"INSERT INTO posts VALUES ('{name}', 's')", Insert(POSTS, row))
    change = Update(USERS, user(name), WholeRow(user(name)))
    return await world.write(f"UPDATE users SET email = 'e@x' WHERE id = '{name}'", change)


def name_of(case: Case, number: int) -> str:
    return f"p{number}" if case.topic != "users/*" else OTHER


@pytest.mark.parametrize("name", CASES)
async def test_a_deleted_caller_is_shown_no_more_than_before(database_url: str, name: str) -> None:
    """That holds before the deletion, until the stream reaches it, and after it."""
    case = CASES[name]
    async with world_of(database_url, SCHEMA, configured(case)) as world:
        for user_id in (BAD, GOOD):
            await world.listen(user_id, case.topic, await world.user(user_id))
        await world.listen("", case.topic, Caller())
        before = await event_of(world, case, name_of(case, 1))
        await world.stream(before)
        found = {user_id: received(world, user_id, name_of(case, 1)) for user_id in (BAD, GOOD, "")}
        assert found[GOOD] == "all"
        assert found[BAD] == found[""] != "all"
        for sink in world.sinks.values():
            sink.forget()

        between = await event_of(world, case, name_of(case, 2))
        gone = await world.write(
            f"DELETE FROM users WHERE id IN ('{BAD}', '{GOOD}')",
            Delete(USERS, WholeRow(user(BAD, role="banned"))),
            Delete(USERS, WholeRow(user(GOOD))),
        )
        await world.stream(between)
        seen = {user_id: received(world, user_id, name_of(case, 2)) for user_id in (BAD, "")}
        assert seen[BAD] in {found[""], "withheld"}
        assert seen[""] == found[""]
        for sink in world.sinks.values():
            sink.forget()

        await world.stream(gone, await event_of(world, case, name_of(case, 3)))
        after = [received(world, user_id, name_of(case, 3)) for user_id in (BAD, GOOD, "")]
        assert after == [found[""]] * 3


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.is_of_columns])
async def test_rights_change_at_their_own_change_of_the_stream(
    database_url: str, name: str
) -> None:
    """A caller's rights change when the stream brings its row's change, not when that commits.

    A caller that gains rights has them no change too early, and one that loses them receives the
    changes before. What is read in its current state is withheld from both.
    """
    case = CASES[name]
    async with world_of(database_url, SCHEMA, configured(case)) as world:
        for user_id in (BAD, GOOD):
            await world.listen(user_id, case.topic, await world.user(user_id))
        await world.listen("", case.topic, Caller())
        before = await event_of(world, case, name_of(case, 1))
        banned = {"role": "banned", "level": "9", "team": "closed", "teams": "{closed}"}
        swapped = await world.write(
            "UPDATE users SET (role, level, team, teams) ="
            " (SELECT o.role, o.level, o.team, o.teams FROM users o WHERE o.role != users.role"
            f"  AND o.id IN ('{BAD}', '{GOOD}')) WHERE id IN ('{BAD}', '{GOOD}')",
            Update(USERS, user(BAD), WholeRow(user(BAD, **banned))),
            Update(USERS, user(GOOD, **banned), WholeRow(user(GOOD))),
        )
        await world.stream(before)
        least = received(world, "", name_of(case, 1))
        if case.topic == EXPANDED:
            assert [received(world, user_id, "p1") for user_id in (GOOD, BAD)] == [
                "withheld",
                least,
            ]
            assert [c.close_reason for c in world.hub.connections] == ["", "gap", ""]
            return
        assert received(world, GOOD, name_of(case, 1)) == "all"
        assert received(world, BAD, name_of(case, 1)) == least != "all"
        for sink in world.sinks.values():
            sink.forget()

        await world.stream(swapped, await event_of(world, case, name_of(case, 2)))
        assert received(world, BAD, name_of(case, 2)) == "all"
        assert received(world, GOOD, name_of(case, 2)) == least


@pytest.mark.parametrize(
    "name", ["a list rule", "expand", "addresses", "what a column points to", "a generated column"]
)
async def test_a_reload_that_reads_more_columns_changes_no_caller(
    database_url: str, name: str
) -> None:
    """An earlier caller lacks the columns that new rules read.

    The current row is read, and must exist.
    """
    case = CASES[name]
    plain = configured(replace(case, rule="" if "manage" not in case.place else "id = 'nobody'"))
    async with world_of(database_url, SCHEMA, plain) as world:
        for user_id in (BAD, GOOD):
            await world.listen(user_id, case.topic, await world.user(user_id))
        await world.listen("", case.topic, Caller())
        collections = build_collections(
            configured(case), await read_catalog(world.connection, schemas=["public"])
        )
        await world.hub.replace_generation(collections, lambda caller: caller)
        await world.stream(await event_of(world, case, name_of(case, 1)))
        found = {user_id: received(world, user_id, name_of(case, 1)) for user_id in (BAD, GOOD, "")}
        assert found[GOOD] == "all"
        assert found[BAD] == found[""] != "all"
        for sink in world.sinks.values():
            sink.forget()

        between = await event_of(world, case, name_of(case, 2))
        await world.write(f"DELETE FROM users WHERE id IN ('{BAD}', '{GOOD}')")
        await world.stream(between)
        heard_since = {received(world, user_id, name_of(case, 2)) for user_id in (BAD, GOOD, "")}
        assert heard_since <= {found[""], "withheld"}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.is_of_columns])
async def test_a_caller_that_may_have_changed_in_a_gap_is_shown_nothing_more(
    database_url: str, name: str
) -> None:
    """A connection stays open for a second after its first answer.

    It receives nothing in that time.
    """
    case = CASES[name]
    async with world_of(database_url, SCHEMA, configured(case)) as world:
        await world.listen(GOOD, case.topic, await world.user(GOOD))
        await world.stream(await event_of(world, case, name_of(case, 1)))
        assert received(world, GOOD, name_of(case, 1)) == "all"
        world.sinks[GOOD].forget()

        lost = await world.write(
            "UPDATE users SET (role, level, team, teams) ="
            " (SELECT o.role, o.level, o.team, o.teams FROM users o"
            f"  WHERE o.id = '{BAD}') WHERE id = '{GOOD}'"
        )
        await world.stream(
            Gap(lost.end_lsn, "slot_lost"), await event_of(world, case, name_of(case, 2))
        )
        assert received(world, GOOD, name_of(case, 2)) == ""
        assert [connection.close_reason for connection in world.hub.connections] == ["gap"]
        await world.listen("again", case.topic, await world.user(GOOD))
        await world.listen("", case.topic, Caller())
        await world.stream(await event_of(world, case, name_of(case, 3)))
        least = received(world, "", name_of(case, 3))
        assert received(world, "again", name_of(case, 3)) == least != "all"


async def test_a_deleted_caller_receives_nothing_more_without_guests(database_url: str) -> None:
    """Nor what only guests may receive: without guests there are no topics for it."""
    async with world_of(
        database_url,
        SCHEMA,
        configured(Case(rule="", place="posts.list_rule")),
        allows_guests=False,
    ) as world:
        await world.listen(GOOD, "posts/*", await world.user(GOOD))
        case = CASES["a list rule"]
        await world.stream(await event_of(world, case, "p1"))
        deleted = await world.write(
            f"DELETE FROM users WHERE id = '{GOOD}'", Delete(USERS, WholeRow(user(GOOD)))
        )
        await world.stream(deleted, await event_of(world, case, "p2"))
        assert [received(world, GOOD, name) for name in ("p1", "p2")] == ["all", ""]
        assert [connection.close_reason for connection in world.hub.connections] == ["guest"]


EXPANDING = [name for name, case in CASES.items() if case.topic == EXPANDED and case.is_of_columns]


@pytest.mark.parametrize("is_notified", [True, False], ids=["notified", "not notified"])
@pytest.mark.parametrize("name", EXPANDING)
async def test_a_connection_behind_is_not_shown_what_was_written_after_a_right_was_lost(
    database_url: str, name: str, *, is_notified: bool
) -> None:
    """Related rows are read in their current state, for callers that still have the right."""
    case = CASES[name]
    last = f'"p{SLICE_CHANGES + 2}"'.encode()
    limits = RealtimeConfig(send_buffer=1000)
    async with world_of(database_url, SCHEMA, configured(case), limits=limits) as world:
        for user_id in (GOOD, OTHER):
            await world.listen(user_id, case.topic, await world.user(user_id), "")
        changed = Update(SECRETS, {"id": "s", "body": "body", "level": "5"}, WholeRow({"id": "s"}))
        again = "UPDATE secrets SET level = 5"  # so that the callers' own rows are looked up
        await world.stream(await event_of(world, case, "p1"), await world.write(again, changed))
        for sink in world.sinks.values():
            await sink.wait_for_bytes(b'"p1"')
            sink.is_stuck = True
        for number in range(2, SLICE_CHANGES + 3):
            await world.stream(await event_of(world, case, f"p{number}"))
        banned = {"role": "banned", "level": "9", "team": "closed", "teams": "{closed}"}
        lost = await world.write(
            "UPDATE users SET (role, level, team, teams) ="
            f" ('banned', 9, 'closed', '{{closed}}') WHERE id = '{GOOD}'",
            Update(USERS, user(GOOD, **banned), WholeRow(user(GOOD))),
        )
        changes = []
        if "generated" not in name:  # what that is by now no image says
            changes = [Update(USERS, user(OTHER), WholeRow(user(OTHER)))]
        kept = await world.write("UPDATE users SET email = 'e@x'", *changes)
        new = await world.write("UPDATE secrets SET body = 'NEW'", NEW)
        if is_notified:
            await world.stream(lost, kept, new)

        world.sinks[OTHER].unstick()
        await world.sinks[OTHER].wait_for_bytes(last)
        assert b"NEW" in world.sinks[OTHER].data
        assert b"PB_RESYNC" not in world.sinks[OTHER].data
        # A connection at the position of an earlier one receives the same, if it may see that.
        world.sinks[GOOD].unstick()
        await world.sinks[GOOD].wait_for_bytes(last)
        assert b"NEW" not in world.sinks[GOOD].data
        await world.sinks[GOOD].wait_for_bytes(b"PB_RESYNC")


async def live(world: World, case: Case, *people: str) -> None:
    """Open connections, until what they expand is loaded for all LIVE connections together."""
    for user_id in people:
        await world.listen(user_id, case.topic, await world.user(user_id), "")
    for number in range(3):
        await world.stream(await event_of(world, case, f"before {number}"))
    assert all(one.state is LIVE for one in world.hub.connections)
    for sink in world.sinks.values():
        sink.forget()


LOSSES = {
    "banned": f"UPDATE users SET role = 'banned', level = 9, team = 'closed' WHERE id = '{GOOD}'",
    "deleted": f"DELETE FROM users WHERE id = '{GOOD}'",
}


def lost(how: str) -> Update | Delete:
    """Return the change that the statement makes."""
    if how == "deleted":
        return Delete(USERS, WholeRow(user(GOOD)))
    after = user(GOOD, role="banned", level="9", team="closed")
    return Update(USERS, after, WholeRow(user(GOOD)))


@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("name", EXPANDING)
@pytest.mark.parametrize("is_notified", [True, False], ids=["notified at once", "not notified"])
async def test_a_caller_that_lost_a_right_is_shown_nothing_written_since(
    database_url: str, name: str, how: str, *, is_notified: bool
) -> None:
    """A related row and the caller's own row are both read in their current state.

    Other LIVE connections are shown it in the same slice; a connection whose caller lost the right
    is notified of a gap.
    """
    case = CASES[name]
    async with world_of(database_url, SCHEMA, configured(case)) as world:
        await live(world, case, GOOD, OTHER)
        before = await event_of(world, case, "p1")
        loss = await world.write(LOSSES[how], lost(how))
        new = await world.write("UPDATE secrets SET body = 'NEW'", NEW)
        rest = [] if is_notified else [loss, new]
        await world.stream(before, *([loss, new] if is_notified else []))
        assert b"NEW" in world.sinks[OTHER].data
        assert b"PB_RESYNC" not in world.sinks[OTHER].data
        # A query that needs the row of a deleted caller denies.
        is_denied = received(world, GOOD, "p1") == "the rest"
        assert is_denied == (how == "deleted" and "points to" in name)
        assert is_denied or received(world, GOOD, "p1") == "withheld"
        assert (b"PB_RESYNC" in world.sinks[GOOD].data) != is_denied

        await world.stream(*rest, await event_of(world, case, "p2"))
        assert received(world, GOOD, "p2") == "the rest"
        assert b"NEW" not in world.sinks[GOOD].data


@pytest.mark.parametrize("is_notified", [True, False], ids=["notified", "not notified"])
@pytest.mark.parametrize("order", [(OTHER, GOOD), (GOOD, OTHER)], ids=["seeing", "denied"])
async def test_nor_columns_that_another_one_was_shown_a_moment_ago(
    database_url: str, order: Sequence[str], *, is_notified: bool
) -> None:
    """Cached columns are reused only for callers that may see them and need no others."""
    case = Case(rule=ROLE, place="secrets.list_rule", topic="secrets/*")
    limits, last = RealtimeConfig(send_buffer=1000), f'"level":{SLICE_CHANGES + 19}'.encode()
    async with world_of(database_url, SCHEMA, configured(case), limits=limits) as world:
        for user_id in (GOOD, OTHER):
            await world.listen(user_id, case.topic, await world.user(user_id), "")
            world.sinks[user_id].is_stuck = True
        row: Row = {"id": "s", "level": "6"}
        for level in range(6, SLICE_CHANGES + 20):
            row = {"id": "s", "level": str(level)}
            change = Update(SECRETS, row, WholeRow({"id": "s"}))
            await world.stream(await world.write(f"UPDATE secrets SET level = {level}", change))
        loss = await world.write(LOSSES["banned"], lost("banned"))
        new = await world.write("UPDATE secrets SET body = 'NEW'", NEW)
        if is_notified:
            await world.stream(loss, new)
        for user_id in order:
            world.sinks[user_id].unstick()
            await world.sinks[user_id].wait_for_bytes(last)
        assert b"NEW" not in world.sinks[GOOD].data
        assert world.sinks[OTHER].data.count(b"NEW") > SLICE_CHANGES


@pytest.mark.parametrize("how", LOSSES)
async def test_nor_columns_that_the_wal_left_out(database_url: str, how: str) -> None:
    """Those of a row that was written again are shown to callers that may see its current state."""
    case = Case(rule=ROLE, place="secrets.list_rule", topic="secrets/*")
    async with world_of(database_url, SCHEMA, configured(case)) as world:
        for user_id in (GOOD, OTHER):
            await world.listen(user_id, case.topic, await world.user(user_id), "")
        row: Row = {"id": "s", "level": "6"}
        before = await world.write(
            "UPDATE secrets SET level = 6", Update(SECRETS, row, WholeRow({"id": "s"}))
        )
        loss = await world.write(LOSSES[how], lost(how))
        image: Row = {"id": "s", "body": "NEW", "level": "6"}
        later = await world.write(
            "UPDATE secrets SET body = 'NEW'", Update(SECRETS, image, WholeRow(image))
        )
        await world.stream(before)
        shown = {user_id: world.data(user_id)[0] for user_id in (GOOD, OTHER)}
        assert json.loads(shown[OTHER])["record"]["body"] == "NEW"
        assert "body" not in json.loads(shown[GOOD])["record"]

        await world.stream(loss, later)
        assert b"NEW" not in world.sinks[GOOD].data
        assert world.sinks[OTHER].data.count(b"NEW") == 2


async def test_the_own_commit_of_a_change_is_no_reason_to_withhold_anything(
    database_url: str,
) -> None:
    """No reader sees the rest of a commit before it, so it is shown as at the change."""
    case = CASES["expand"]
    async with world_of(database_url, SCHEMA, configured(case)) as world:
        await live(world, case, GOOD)
        row: Row = {"id": "p1", "secret": "s"}
        both = await world.write(
            f"INSERT INTO posts VALUES ('p1', 's'); {LOSSES['deleted']}",
            Insert(POSTS, row),
            lost("deleted"),
        )
        await world.stream(both, await world.write("SELECT 1"))
        assert received(world, GOOD, "p1") == "all"
        assert b"PB_RESYNC" not in world.sinks[GOOD].data


@pytest.mark.parametrize("how", LOSSES)
async def test_what_is_written_later_is_not_shown_to_callers_that_lost_a_right_in_that_commit(
    database_url: str, how: str
) -> None:
    case = CASES["expand"]
    async with world_of(database_url, SCHEMA, configured(case)) as world:
        await live(world, case, GOOD)
        row: Row = {"id": "p1", "secret": "s"}
        both = await world.write(
            f"INSERT INTO posts VALUES ('p1', 's'); {LOSSES[how]}", Insert(POSTS, row), lost(how)
        )
        new = await world.write("UPDATE secrets SET body = 'NEW'", NEW)
        await world.stream(both, new)
        assert received(world, GOOD, "p1") == "withheld"
        assert b"NEW" not in world.sinks[GOOD].data


async def test_a_slice_that_ends_within_a_commit_proves_nothing_of_the_rest_of_it(
    database_url: str,
) -> None:
    """The same commit writes what is shown and, after that, removes the right to see it."""
    case = CASES["expand"]
    async with world_of(database_url, SCHEMA, configured(case)) as world:
        await live(world, case, GOOD)
        before = await event_of(world, case, "p1")
        both = await world.write(
            f"UPDATE secrets SET body = 'NEW'; {LOSSES['banned']}", NEW, lost("banned")
        )
        await world.stream(before, both)
        assert received(world, GOOD, "p1") == "withheld"
        assert b"NEW" not in world.sinks[GOOD].data


@pytest.mark.parametrize("fault", ["no answer", "no connection"])
@pytest.mark.parametrize("of", ["expand", "columns"])
async def test_caller_rows_that_cannot_be_read_are_a_gap_for_those_callers_alone(
    database_url: str, monkeypatch: pytest.MonkeyPatch, of: str, fault: str
) -> None:
    """Guests are shown nothing that depends on a caller's row."""

    async def fail(*_args: object) -> None:
        if fault == "no connection":
            raise psycopg.OperationalError

    monkeypatch.setattr(caller_check, "fetch_rows_by_id", fail)
    monkeypatch.setattr(load, "CONNECTION_RETRY_DELAYS", (0.0, None))
    rule = "@request.auth.role != 'banned'"
    case = replace(CASES["expand"], rule=rule)
    if of == "columns":
        case = Case(rule=rule, place="secrets.list_rule", topic="secrets/*")
    async with world_of(database_url, SCHEMA, configured(case)) as world:
        await world.listen(GOOD, case.topic, await world.user(GOOD), "")
        await world.listen("", case.topic, Caller(), "")
        if of == "expand":
            before = await event_of(world, case, "p1")
        else:
            change = Update(SECRETS, {"id": "s", "level": "6"}, WholeRow({"id": "s"}))
            before = await world.write("UPDATE secrets SET level = 6", change)
        await world.write(LOSSES["banned"], lost("banned"))
        await world.write("UPDATE secrets SET body = 'NEW'", NEW)
        await world.stream(before)
        assert b"NEW" not in world.sinks[GOOD].data
        assert len(world.data(GOOD)) == (1 if of == "columns" and fault == "no answer" else 2)
        if fault == "no answer":
            assert b"NEW" in world.sinks[""].data
            assert b"PB_RESYNC" not in world.sinks[""].data


async def test_what_a_caller_is_in_the_database_counts_by_what_is_asked_of_it(
    database_url: str,
) -> None:
    """A change of a column that no rule of a related record reads withholds nothing."""
    case = CASES["expand"]
    async with world_of(database_url, SCHEMA, configured(case)) as world:
        await world.listen(GOOD, case.topic, await world.user(GOOD), "")
        before = await event_of(world, case, "p1")
        await world.write(f"UPDATE users SET email = 'new@x', level = 3 WHERE id = '{GOOD}'")
        await world.write("UPDATE secrets SET body = 'NEW'")
        await world.stream(before)
        assert b"NEW" in world.sinks[GOOD].data
        assert b"PB_RESYNC" not in world.sinks[GOOD].data


async def test_a_connection_behind_its_callers_deletion_is_notified_of_earlier_gaps(
    database_url: str,
) -> None:
    """The gap is decided by the rights that the caller had then: a guest had nothing to miss."""
    case = Case(rule=SIGNED_IN + "secret = 's'", place="posts.list_rule")
    limits = RealtimeConfig(send_buffer=1)
    async with world_of(database_url, SCHEMA, configured(case), limits=limits) as world:
        await world.listen(GOOD, case.topic, await world.user(GOOD), "")
        await world.stream(await event_of(world, case, "p1"))
        sink = world.sinks[GOOD]
        await sink.wait_for_bytes(b'"p1"')
        sink.is_stuck = True
        for number in (2, 3):
            await world.stream(await event_of(world, case, f"p{number}"))
        # The image lacks what the rule reads, and the row was deleted.
        unproved = await world.write(
            "DELETE FROM posts WHERE id = 'p1'", Update(POSTS, {"id": "p1"}, WholeRow({"id": "p1"}))
        )
        deleted = await world.write(
            f"DELETE FROM users WHERE id = '{GOOD}'", Delete(USERS, WholeRow(user(GOOD)))
        )
        await world.stream(unproved, deleted)
        sink.unstick()
        await sink.wait_for_bytes(b"PB_RESYNC")
        assert received(world, GOOD, "p3") == "all"


@pytest.mark.parametrize("column", ["verified", "email"])
async def test_a_caller_that_the_stream_cannot_update_must_reconnect(
    database_url: str, column: str
) -> None:
    """No image has a generated column, so a caller that depends on one must be loaded again.

    Until its client has reconnected it receives nothing, and its position stays.
    """
    rule = SIGNED_IN + {"verified": "@request.auth.verified = true", "email": "id != ''"}[column]
    made = {
        "verified": "ADD verified bool GENERATED ALWAYS AS (role <> 'banned') STORED",
        "email": "DROP email, ADD email text GENERATED ALWAYS AS (role || '@x') STORED",
    }[column]
    case = Case(rule=f"id ~ 'public%' || ({rule})", place="posts.list_rule")
    schema = f"{SCHEMA}; ALTER TABLE users {made};"
    async with world_of(database_url, schema, configured(case)) as world:
        await world.listen(GOOD, case.topic, await world.user(GOOD), "")
        await world.stream(await event_of(world, case, "p1"))
        assert received(world, GOOD, "p1") == "all"
        row = {name: value for name, value in user(GOOD, role="banned").items() if name != column}
        changed = Update(USERS, row, WholeRow(row))
        statement = f"UPDATE users SET role = 'banned' WHERE id = '{GOOD}'"
        await world.stream(await world.write(statement, changed), await event_of(world, case, "p2"))
        await world.stream(await event_of(world, case, "public 1"))
        assert received(world, GOOD, "p2") == received(world, GOOD, "public 1") == ""
        assert [connection.close_reason for connection in world.hub.connections] == ["caller_lost"]
        position = world.sinks[GOOD].events()[-1][0]
        await world.listen("again", case.topic, await world.user(GOOD), position)
        await world.stream(await event_of(world, case, "p3"))
        await world.stream(await event_of(world, case, "public 2"))
        await world.sinks["again"].wait_for_bytes(b'"public 2"')
        names = [name for name in ("p2", "public 1", "p3") if received(world, "again", name)]
        assert names == (["p2", "public 1", "p3"] if column == "email" else ["public 1"])
