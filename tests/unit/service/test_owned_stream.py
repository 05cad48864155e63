"""Gaps that the owner of a log appends for all replicas: each one once, and none left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from pgrealtime.changelog.memory import Changelog, Gap
from pgrealtime.changes import TableName
from pgrealtime.feed.base import WantedTables
from pgrealtime.feed.intake import Intake
from pgrealtime.log.union import WantedUnion
from pgrealtime.lsn import LSN
from pgrealtime.service.owned_stream import OwnedStream
from tests.feed_follower import Follower

POSTS = frozenset({TableName("public", "posts")})


class Publication:
    """One that has stopped, or begun, to send a table each time that it is asked."""

    async def find_tables_with_gap(self, _tables: object) -> frozenset[TableName]:
        return POSTS


def owned() -> tuple[OwnedStream, Changelog]:
    changelog = Changelog(LSN(0), max_bytes=1 << 20, max_age_seconds=1e9)
    intake = Intake(changelog, Follower(changelog, 5.0), max_size=1 << 20)
    nothing = cast("Any", None)
    stream = OwnedStream(
        nothing,
        intake,
        cast("Any", Publication()),
        nothing,
        WantedUnion(),
        wanted=WantedTables(tables={}),
    )
    stream._appended = intake
    reader = SimpleNamespace(stream=SimpleNamespace(slot=SimpleNamespace(plugin="pgoutput")))
    stream.owner = cast("Any", SimpleNamespace(reader=reader))
    return stream, changelog


def gaps(changelog: Changelog) -> int:
    entries = changelog.read(changelog.floor, changelog.end_cursor, 1 << 20)
    return sum(isinstance(entry, Gap) for entry in entries)


def test_what_every_replica_asks_for_is_one_gap() -> None:
    stream, changelog = owned()
    for _ in range(3):
        stream._append_gap_once("schema", POSTS)

    assert gaps(changelog) == 1


async def test_a_publication_that_changes_twice_is_two_gaps() -> None:
    """The first when it sends a table no longer, the second when it does again."""
    stream, changelog = owned()
    await stream.check_publication()
    await stream.check_publication()

    assert gaps(changelog) == 2
