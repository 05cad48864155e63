"""Rules that read the caller's own row follow its changes, without a query."""

from __future__ import annotations

from dataclasses import replace

from pgrealtime.auth.principal import AuthRecord, Caller
from pgrealtime.changes import Row, Update, WholeRow
from pgrealtime.collections.model import Collections
from tests.unit.hub.harness import COLLECTIONS, LOGINS, PEOPLE, HubHarness, insert, open_harness

RULE = "@request.auth.email:lower = 'boss@x' && title != 'secret'"
"""With ``:lower`` PocketBase reads the row; without it, the value of the authenticated record."""


def collections() -> Collections:
    posts = replace(COLLECTIONS["posts"], list_rule=RULE)
    return Collections(tuple(posts if c.name == "posts" else c for c in COLLECTIONS.values()))


def caller(email: str) -> Caller:
    record = AuthRecord(collection_id="pbc_people", collection_name="people", id="ann", email=email)
    return Caller(record, row_values=(("email", email),))


def row(email: str) -> Row:
    return {"id": "ann", "email": email, "key": "k1"}


def changed(before: str, after: str) -> Update:
    return Update(PEOPLE, row(after), WholeRow(row(before)))


async def titles(harness: HubHarness, email: str) -> list[str]:
    """Return the titles of posts that Ann receives. They say whether she should."""
    made = collections()
    await harness.hub.replace_generation(made, lambda one: one, logins=LOGINS)
    connection, sink = harness.connect()
    await harness.subscribe(connection, "posts/*", caller=caller(email))
    harness.commit(insert("a", "before"), insert("b", "secret"))
    harness.commit(changed(email, "BOSS@x"), insert("c", "promoted"), insert("d", "secret"))
    harness.commit(changed("BOSS@x", "ann@x"), insert("e", "demoted"))
    await harness.until_delivered()
    return [event[2].split('"title":"')[1].partition('"')[0] for event in sink.events()[1:]]


async def test_a_caller_receives_events_once_its_row_satisfies_the_rule() -> None:
    """While the rule denies her, her subscription is in no index."""
    async with open_harness() as harness:
        assert await titles(harness, "ann@x") == ["promoted"]
        assert harness.hub._progress.generation.matcher._tables == {}


async def test_a_caller_receives_events_until_its_row_stops_satisfying_the_rule() -> None:
    """From the change of her row on, the rule denies her."""
    async with open_harness() as harness:
        assert await titles(harness, "Boss@X") == ["before", "promoted"]
