"""Rules about the subscriber's own row follow the row, without Postgres being asked."""

from __future__ import annotations

from dataclasses import replace

from pgrealtime.auth.principal import AuthRecord, Caller
from pgrealtime.changes import Row, Update, WholeRow
from pgrealtime.collections.model import Collections
from tests.unit.hub.room import COLLECTIONS, LOGINS, PEOPLE, Room, insert, open_room

RULE = "@request.auth.email:lower = 'boss@x' && title != 'secret'"
"""Not the plain field: ``email:lower`` is a look-up of the row in PocketBase."""


def collections() -> Collections:
    posts = replace(COLLECTIONS["posts"], list_rule=RULE)
    return Collections(tuple(posts if c.name == "posts" else c for c in COLLECTIONS.values()))


def caller(email: str) -> Caller:
    record = AuthRecord(collection_id="pbc_people", collection_name="people", id="ann", email=email)
    return Caller(record, row_values=(("email", email),))


def row(email: str) -> Row:
    return {"id": "ann", "email": email, "key": "k1"}


def became(before: str, after: str) -> Update:
    return Update(PEOPLE, row(after), WholeRow(row(before)))


async def titles(room: Room, email: str) -> list[str]:
    """What Ann hears of posts, whose titles say whether she should."""
    made = collections()
    await room.hub.replace_generation(made, lambda one: one, logins=LOGINS)
    connection, sink = room.connect()
    await room.subscribe(connection, "posts/*", caller=caller(email))
    room.commit(insert("a", "before"), insert("b", "secret"))
    room.commit(became(email, "BOSS@x"), insert("c", "promoted"), insert("d", "secret"))
    room.commit(became("BOSS@x", "ann@x"), insert("e", "demoted"))
    await room.settled()
    return [event[2].split('"title":"')[1].partition('"')[0] for event in sink.events()[1:]]


async def test_who_becomes_something_hears_what_that_may_hear() -> None:
    """Nothing was in the index for her before, and nothing is after."""
    async with open_room() as room:
        assert await titles(room, "ann@x") == ["promoted"]
        assert room.hub._progress.generation.matcher._tables == {}


async def test_who_is_something_hears_until_it_changes() -> None:
    async with open_room() as room:
        assert await titles(room, "Boss@X") == ["before", "promoted"]
