"""Rows that don't fit the catalogue: it is read again once, then what doesn't fit is a gap."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pgrealtime.catalog.model import Column
from pgrealtime.changes import RowShape, TableName, Transaction, Truncate
from pgrealtime.collections.model import Collections, Field, FieldKind, Junction, Relation
from pgrealtime.hub.events.event import TruncatedCollections, transaction_events
from pgrealtime.hub.events.links import LinkUpdates
from pgrealtime.hub.events.row_shapes import ShapeChecker
from pgrealtime.lsn import LSN, Xid
from tests.unit.hub.harness import (
    COLLECTIONS,
    NOTES,
    POSTS,
    HubHarness,
    MemorySink,
    at,
    insert,
    open_harness,
)

TYPE = COLLECTIONS["posts"].table.columns[0].type
OID = TYPE.oid
OTHER = OID + 1
LEAF = TableName("public", "posts_1")
LINKS = TableName("public", "links")


def shape(leaf: TableName | None = None, described: int = 0, **types: int) -> RowShape:
    return RowShape(POSTS, leaf, tuple(types.items()), described)


def links(**types: int) -> RowShape:
    return RowShape(LINKS, None, tuple(types.items()))


AS_READ = shape(id=OID, title=OID)
ALTERED = shape(id=OID, title=OTHER)


def of(*shapes: RowShape) -> Transaction:
    return Transaction(Xid(7), LSN(32), 0, (insert("1"),), 100, shapes)


def collections(title: int = OID, *, leaves: tuple[TableName, ...] = ()) -> Collections:
    """Return posts whose title is of a type, with a relation through a junction table."""
    columns = (
        Column(name="id", attribute_number=1, type=TYPE),
        Column(name="title", attribute_number=2, type=replace(TYPE, oid=title)),
        Column(name="size", attribute_number=3, type=TYPE, is_generated=True),
    )
    posts = COLLECTIONS["posts"]
    table = replace(posts.table, columns=columns, leaves=leaves)
    ends = (
        Column(name=name, attribute_number=n, type=TYPE)
        for n, name in enumerate(("post", "note"), 1)
    )
    links = replace(posts.table, name=LINKS, columns=tuple(ends))
    notes = Field(
        name="notes",
        column=None,
        kind=FieldKind.RELATION,
        type=TYPE,
        is_multiple=True,
        relation=Relation(
            collection_name="notes",
            junction=Junction(table=links, source_column="post", target_column="note"),
        ),
    )
    fields = (*posts.fields, notes)
    return Collections((replace(posts, table=table, fields=fields), COLLECTIONS["notes"]))


@pytest.mark.parametrize(
    ("found", "fits"),
    [
        pytest.param(shape(id=OID, title=OID), True, id="as read, but for generated columns"),
        pytest.param(shape(id=OID, title=OID, more=OTHER), True, id="a column is new"),
        pytest.param(shape(id=OID), True, id="a column is new in the catalogue, or TOASTed"),
        pytest.param(shape(id=OID, title=OTHER), False, id="another type"),
        pytest.param(shape(id=OID, headline=OID), False, id="renamed"),
        pytest.param(shape(leaf=LEAF, id=OID, title=OID), False, id="partition detached"),
        pytest.param(links(post=OID, note=OID), True, id="a junction as read"),
        pytest.param(links(post=OID, note=OTHER), False, id="a junction of another type"),
        pytest.param(links(post=OID, remark=OID), False, id="a junction renamed"),
        pytest.param(RowShape(TableName("public", "x"), None, (("a", 1),)), True, id="not shown"),
    ],
)
def test_rows_fit_unless_a_value_may_be_taken_for_another(found: RowShape, *, fits: bool) -> None:
    """Columns may be new on either side; types, names and partitions must be the catalogue's."""
    shapes = ShapeChecker(collections(), lambda: 0.0)

    assert shapes.fits(of(found)) is fits
    assert shapes.needs_catalog_read(of(found)) is not fits
    assert shapes.fits(of(AS_READ, found)) is fits


@pytest.mark.parametrize("is_read", [True, False])
def test_a_shape_that_the_catalogue_was_read_for_causes_no_other_read(*, is_read: bool) -> None:
    """A shape that doesn't fit causes one read of the catalogue."""
    shapes = ShapeChecker(collections(), lambda: 0.0)
    shapes.decide_without_waiting(of(ALTERED), is_catalog_read=is_read)

    assert not shapes.needs_catalog_read(of(ALTERED))
    assert not shapes.fits(of(ALTERED))


@pytest.mark.parametrize("is_read", [True, False])
def test_a_partition_that_is_described_again_causes_a_catalogue_read(*, is_read: bool) -> None:
    """It may have been detached; if the catalogue can't be read, its rows are a gap."""
    shapes = ShapeChecker(collections(leaves=(LEAF,)), lambda: 0.0)
    described_again = of(shape(leaf=LEAF, described=1, id=OID, title=OID))
    assert shapes.needs_catalog_read(described_again)
    shapes.decide_without_waiting(described_again, is_catalog_read=is_read)

    assert not shapes.needs_catalog_read(described_again)
    assert shapes.fits(described_again) is is_read


def test_a_failed_catalogue_read_for_a_partition_is_repeated_later() -> None:
    """After each failure the catalogue is read again later; meanwhile its rows are a gap."""
    now = [0.0]
    shapes = ShapeChecker(collections(leaves=(LEAF,)), clock=lambda: now[0])
    described_again = of(shape(leaf=LEAF, described=1, id=OID, title=OID))
    for _ in range(2):
        shapes.decide_without_waiting(described_again, is_catalog_read=False)
        assert not shapes.needs_catalog_read(described_again)
        now[0] += 5
        assert shapes.needs_catalog_read(described_again)
        assert not shapes.fits(described_again)
    shapes.decide_without_waiting(described_again, is_catalog_read=True)

    assert shapes.fits(described_again)
    assert not shapes.needs_catalog_read(described_again)


class Schema:
    """A schema that is read when a row doesn't fit."""

    def __init__(self, title: int) -> None:
        self._title = title
        self.harness: HubHarness | None = None
        self.times = 0

    async def read(self) -> bool:
        assert self.harness is not None
        self.times += 1
        if self.times == 1:
            found = collections(self._title)
            await self.harness.hub.replace_generation(found, lambda caller: caller)
        return True


def received(sink: MemorySink) -> list[str]:
    """Return ids of records, and reason and collections of gaps, in the order received."""
    messages = [json.loads(data) for _, name, data in sink.events() if name != "PB_CONNECT"]
    return [
        one["record"]["id"] if "record" in one else f"{one['reason']} {one['collections']}"
        for one in messages
    ]


async def test_the_schema_is_read_before_a_row_that_does_not_fit_is_evaluated() -> None:
    """Once for all such rows. Events before them aren't delayed."""
    schema = Schema(OTHER)
    async with open_harness(read_schema=schema.read) as harness:
        schema.harness = harness
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*", "PB_RESYNC")
        harness.commit(insert("1"), shapes=(AS_READ,))
        harness.commit(insert("2"), shapes=(ALTERED,))
        harness.commit(insert("3"), shapes=(ALTERED,))
        await harness.until_delivered()

    assert received(sink) == ["1", "2", "3"]
    assert schema.times == 1


async def test_rows_that_still_do_not_fit_are_a_gap() -> None:
    """Of all tables that the transaction changed, and of no others.

    Also if the schema can't be read.
    """
    async with open_harness() as harness:
        connection, sink = harness.connect()
        await harness.subscribe(connection, "posts/*", "notes/*", "PB_RESYNC")
        harness.commit(insert("1"), insert("n", table=NOTES), shapes=(ALTERED,))
        harness.commit(insert("2"), shapes=(ALTERED,))
        harness.commit(insert("3"), shapes=(AS_READ,))
        await harness.until_delivered()

    assert received(sink) == ["schema ['notes', 'posts']", "schema ['posts']", "3"]


async def test_resuming_from_before_rows_of_an_earlier_schema_is_notified_of_a_gap() -> None:
    """Also from a position within their transaction; events after it are received."""
    schema = Schema(OTHER)
    async with open_harness(read_schema=schema.read) as harness:
        schema.harness = harness
        before = harness.commit(insert("1"), insert("2"), shapes=(AS_READ,))
        await harness.until_delivered()
        harness.commit(insert("3"), shapes=(ALTERED,))
        await harness.until_delivered()
        connection, sink = harness.connect(last_event_id=at(before, 1))
        await harness.subscribe(connection, "posts/*", "PB_RESYNC")
        await sink.wait_for(3)

    assert received(sink) == ["schema ['posts']", "3"]


def test_a_truncated_junction_is_one_gap_of_all_that_show_its_links() -> None:
    """A reader that stops behind the change has been told of all."""
    of_posts = collections()
    posts = of_posts["posts"]
    (shown,) = (one for one in posts.fields if one.name == "notes")
    notes = of_posts["notes"]
    both = Collections((posts, replace(notes, fields=(*notes.fields, shown))))
    truncated = Transaction(Xid(7), LSN(32), 0, (Truncate(LINKS),), 100)
    (event,) = transaction_events(truncated, both, links=LinkUpdates(both))

    assert isinstance(event, TruncatedCollections)
    assert [one.name for one in event.collections] == ["posts", "notes"]
