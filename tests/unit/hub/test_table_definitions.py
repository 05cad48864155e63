"""What the stream doesn't describe is confirmed by the catalogue before rows are delivered."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from pgrealtime.catalog.assumptions import CatalogAssumptions
from pgrealtime.catalog.model import Column, Type, TypeKind
from pgrealtime.changelog.memory import Watermark
from pgrealtime.changes import NEVER_DESCRIBED, RowShape, TableName, Transaction
from pgrealtime.collections.model import Collections
from pgrealtime.hub import entry_checks
from pgrealtime.hub.events.row_shapes import TableDefinitions
from pgrealtime.lsn import LSN, Xid
from tests.unit.hub.harness import COLLECTIONS, NOTES, POSTS, HubHarness, insert, open_harness
from tests.unit.hub.test_table_shapes import received

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
    """Return posts with partitions, and notes with a column of a type."""
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


def test_partitions_are_confirmed_where_the_decoder_does_not_describe_them() -> None:
    """Only then may a leaf have been detached without a message of the decoder."""
    definitions = TableDefinitions(collections(leaves=(LEAF, OTHER_LEAF)))

    assert definitions.assumptions_for([Watermark(LSN(9)), of(UNDESCRIBED)]) == CatalogAssumptions(
        {LEAF: 7}, {}
    )
    assert definitions.assumptions_for([of(shape(POSTS, LEAF))]) is None
    assert definitions.assumptions_for([of(shape(NOTES))]) is None
    assert TableDefinitions(collections()).assumptions_for([of(UNDESCRIBED)]) is None


def test_composite_types_are_confirmed_however_deep_they_are() -> None:
    """Inside of domains, arrays and other composite types as well."""
    definitions = TableDefinitions(collections(of=ARRAY))

    assert definitions.assumptions_for([of(shape(NOTES))]) == CatalogAssumptions(
        {}, {901: ("b", "c"), 900: ("a",)}
    )
    assert definitions.assumptions_for([of(shape(POSTS))]) is None


@pytest.mark.parametrize(
    ("roots", "attributes", "is_confirmed"),
    [
        ([7], ["900 a", "901 b", "901 c"], True),
        ([None], ["900 a", "901 b", "901 c"], False),
        ([7], ["900 a", "901 b"], False),
        ([7], ["900 a", "901 c", "901 b"], False),
    ],
)
def test_every_assumption_must_hold(
    roots: list[int | None], attributes: list[str], *, is_confirmed: bool
) -> None:
    """Another root, or a missing, additional or reordered attribute, refutes it."""
    assumptions = CatalogAssumptions({LEAF: 7}, {901: ("b", "c"), 900: ("a",)})

    assert assumptions.is_confirmed_by(roots, attributes) is is_confirmed


async def replace_collections(harness: HubHarness, found: Collections) -> None:
    await harness.hub.replace_generation(found, lambda caller: caller)


async def test_the_schema_is_read_again_where_an_assumption_does_not_hold() -> None:
    """Rows that fit the schema just read are delivered; others are a gap."""

    async def read() -> bool:
        if not harness.database.confirms_assumptions:
            harness.database.confirms_assumptions = True
            await replace_collections(harness, collections(leaves=(OTHER_LEAF,)))
        return True

    async with open_harness(read_schema=read) as harness:
        await replace_collections(harness, collections(leaves=(LEAF, OTHER_LEAF)))
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*", "PB_RESYNC")
        harness.commit(insert("1"), shapes=(UNDESCRIBED,))
        await harness.until_delivered()
        harness.database.confirms_assumptions = False
        harness.commit(insert("2"), shapes=(UNDESCRIBED,))
        harness.commit(insert("3"), shapes=(shape(POSTS, OTHER_LEAF, NEVER_DESCRIBED),))
        await harness.until_delivered()

    assert received(sink) == ["1", "schema ['posts']", "3"]


async def test_rows_are_a_gap_where_the_schema_can_not_be_read_then() -> None:
    """There is no other schema to decode them by."""
    async with open_harness() as harness:
        await replace_collections(harness, collections(leaves=(LEAF,)))
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*", "PB_RESYNC")
        harness.database.confirms_assumptions = False
        harness.commit(insert("1"), shapes=(UNDESCRIBED,))
        await harness.until_delivered()

    assert received(sink) == ["schema ['posts']"]


async def test_nothing_is_delivered_before_the_catalogue_has_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the database is unreachable, events wait."""
    monkeypatch.setattr(entry_checks, "_CATALOG_RETRY_SECONDS", 0.01)
    async with open_harness() as harness:
        await replace_collections(harness, collections(leaves=(LEAF,)))
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*")
        harness.database.is_unreachable = True
        harness.commit(insert("1"), shapes=(UNDESCRIBED,))
        await asyncio.sleep(0.1)
        assert received(sink) == []
        harness.database.is_unreachable = False
        await harness.until_delivered()

    assert received(sink) == ["1"]
