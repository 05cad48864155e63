"""What the stream doesn't say of tables is asked before their rows are handed out."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from pgrealtime.catalog.assumptions import CatalogAssumptions
from pgrealtime.catalog.model import Column, Type, TypeKind
from pgrealtime.changelog.base import Watermark
from pgrealtime.changes import NEVER_DESCRIBED, RowShape, TableName, Transaction
from pgrealtime.collections.model import Collections
from pgrealtime.hub import entry_checks
from pgrealtime.hub.events.row_shapes import TableDefinitions
from pgrealtime.lsn import LSN, Xid
from tests.unit.hub.room import COLLECTIONS, NOTES, POSTS, Room, insert, open_room
from tests.unit.hub.test_table_shapes import heard

TEXT = COLLECTIONS["posts"].table.columns[0].type
LEAF, OTHER_LEAF = TableName("public", "posts_1"), TableName("public", "posts_2")
INNER = Type(
    oid=900,
    schema="public",
    name="i",
    kind=TypeKind.COMPOSITE,
    category="C",
    attributes=(("a", TEXT),),
)
OUTER = replace(INNER, oid=901, attributes=(("b", TEXT), ("c", INNER)))
DOMAIN = replace(TEXT, oid=902, kind=TypeKind.DOMAIN, domain_of=OUTER)
ARRAY = replace(TEXT, oid=903, kind=TypeKind.ARRAY, element=DOMAIN)


def collections(*, leaves: tuple[TableName, ...] = (), of: Type = TEXT) -> Collections:
    """Posts in partitions, and notes with a title of a type."""
    posts, notes = COLLECTIONS["posts"], COLLECTIONS["notes"]
    columns = (*notes.table.columns[:1], Column(name="place", attribute_number=9, type=of))
    return Collections(
        (
            replace(posts, table=replace(posts.table, oid=7, leaves=leaves)),
            replace(notes, table=replace(notes.table, columns=columns)),
        )
    )


def shape(table: TableName, leaf: TableName | None = None, described: int = 0) -> RowShape:
    return RowShape(table, leaf, (("id", TEXT.oid),), described)


def of(*shapes: RowShape) -> Transaction:
    return Transaction(Xid(7), LSN(32), 0, (), 100, shapes)


UNDESCRIBED = shape(POSTS, LEAF, NEVER_DESCRIBED)


def test_partitions_are_asked_about_where_the_decoder_does_not_describe_them() -> None:
    definitions = TableDefinitions(collections(leaves=(LEAF, OTHER_LEAF)))

    assert definitions.assumptions_for([Watermark(LSN(9)), of(UNDESCRIBED)]) == CatalogAssumptions(
        {LEAF: 7}, {}
    )
    assert definitions.assumptions_for([of(shape(POSTS, LEAF))]) is None
    assert definitions.assumptions_for([of(shape(NOTES))]) is None
    assert TableDefinitions(collections()).assumptions_for([of(UNDESCRIBED)]) is None


def test_composites_are_asked_about_however_deep_they_are() -> None:
    definitions = TableDefinitions(collections(of=ARRAY))

    assert definitions.assumptions_for([of(shape(NOTES))]) == CatalogAssumptions(
        {}, {901: ("b", "c"), 900: ("a",)}
    )
    assert definitions.assumptions_for([of(shape(POSTS))]) is None


@pytest.mark.parametrize(
    ("roots", "attributes", "is_so"),
    [
        ([7], ["900 a", "901 b", "901 c"], True),
        ([None], ["900 a", "901 b", "901 c"], False),
        ([7], ["900 a", "901 b"], False),
        ([7], ["900 a", "901 c", "901 b"], False),
    ],
)
def test_all_of_a_belief_must_be_so(
    roots: list[int | None], attributes: list[str], *, is_so: bool
) -> None:
    belief = CatalogAssumptions({LEAF: 7}, {901: ("b", "c"), 900: ("a",)})

    assert belief.is_confirmed_by(roots, attributes) is is_so


async def use(room: Room, found: Collections) -> None:
    await room.hub.replace_generation(found, lambda caller: caller)


async def test_the_schema_is_read_where_the_catalogue_says_something_else() -> None:
    """And judged by what was read; what fits it then isn't a gap."""

    async def read() -> bool:
        if not room.database.is_borne_out:
            room.database.is_borne_out = True
            await use(room, collections(leaves=(OTHER_LEAF,)))
        return True

    async with open_room(read_schema=read) as room:
        await use(room, collections(leaves=(LEAF, OTHER_LEAF)))
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*", "PB_RESYNC")
        room.commit(insert("1"), shapes=(UNDESCRIBED,))
        await room.settled()
        room.database.is_borne_out = False
        room.commit(insert("2"), shapes=(UNDESCRIBED,))
        room.commit(insert("3"), shapes=(shape(POSTS, OTHER_LEAF, NEVER_DESCRIBED),))
        await room.settled()

    assert heard(sink) == ["1", "schema ['posts']", "3"]


async def test_rows_are_a_gap_where_the_schema_can_not_be_read_then() -> None:
    async with open_room() as room:
        await use(room, collections(leaves=(LEAF,)))
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*", "PB_RESYNC")
        room.database.is_borne_out = False
        room.commit(insert("1"), shapes=(UNDESCRIBED,))
        await room.settled()

    assert heard(sink) == ["schema ['posts']"]


async def test_nothing_is_handed_out_before_the_catalogue_has_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(entry_checks, "_CATALOG_RETRY_SECONDS", 0.01)
    async with open_room() as room:
        await use(room, collections(leaves=(LEAF,)))
        connection, sink = room.connect()
        await room.subscribe(connection, "posts/*")
        room.database.is_away = True
        room.commit(insert("1"), shapes=(UNDESCRIBED,))
        await asyncio.sleep(0.1)
        assert heard(sink) == []
        room.database.is_away = False
        await room.settled()

    assert heard(sink) == ["1"]
