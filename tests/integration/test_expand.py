"""Related records loaded from ordinary tables: any key type, arrays, junctions, and failures."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from collections.abc import Collection as Sized
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

from pgrealtime import fairness
from pgrealtime.auth.principal import GUEST, AuthRecord, Principal, Superuser
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.changelog.memory import Changelog
from pgrealtime.changelog.row_history import RowHistory
from pgrealtime.changes import (
    Action,
    Change,
    Delete,
    Insert,
    Key,
    TableName,
    Transaction,
    Truncate,
    Update,
    WholeRow,
)
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.collections.names import configured_table_names
from pgrealtime.config.model import CollectionConfig
from pgrealtime.expand import batch, link_history
from pgrealtime.expand import load as loading
from pgrealtime.expand.load import RelatedRecordLoader
from pgrealtime.expand.node import RecordNode
from pgrealtime.expand.plan import ExpandCompiler, ExpandViewer
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.records.encode import View, compile_encoder
from pgrealtime.rule_queries.executor import QueryExecutor
from pgrealtime.rule_queries.rounds import PendingEvaluation
from pgrealtime.rule_queries.session import ReadSession
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.snapshot import Snapshot

SCHEMA = """
CREATE TABLE people (
  id uuid PRIMARY KEY, email text, "emailVisibility" boolean DEFAULT false, verified boolean,
  name text, boss uuid REFERENCES people, "share%" int);
CREATE DOMAIN person AS uuid;
CREATE TABLE teams (id int PRIMARY KEY, name text, members person[]);
CREATE TABLE tags (id char(4) PRIMARY KEY, label text);
CREATE TABLE books (
  id bigint PRIMARY KEY, title text, author uuid REFERENCES people, team smallint, editors uuid[],
  loose text, numbers int[], tag char(4) REFERENCES tags);
CREATE TABLE book_tags (book bigint, tag char(4), PRIMARY KEY (book, tag));
CREATE TABLE notes (id text PRIMARY KEY, book bigint REFERENCES books, body text);
CREATE TABLE covers (id text PRIMARY KEY, book bigint UNIQUE REFERENCES books);
INSERT INTO people (id, name, email, boss) VALUES
  ('00000000-0000-0000-0000-00000000000a', 'Ann', 'ann@x', NULL),
  ('00000000-0000-0000-0000-00000000000b', 'Bob', 'bob@x', '00000000-0000-0000-0000-00000000000a');
INSERT INTO teams VALUES (1, 'one', ARRAY['00000000-0000-0000-0000-00000000000a']::uuid[]),
  (2, 'two', ARRAY['00000000-0000-0000-0000-00000000000b', '00000000-0000-0000-0000-00000000000a',
                   '00000000-0000-0000-0000-0000000000ff']::uuid[]);
INSERT INTO tags VALUES ('ab', 'padded'), ('abcd', 'whole');
INSERT INTO books VALUES
  (10, 'Ten', '00000000-0000-0000-0000-00000000000b', 2,
   ARRAY['00000000-0000-0000-0000-00000000000b', NULL, '00000000-0000-0000-0000-00000000000a',
         '00000000-0000-0000-0000-00000000000b']::uuid[], '1', '{2,1,7}', 'ab'),
  (11, 'Eleven', NULL, 99, '{}', 'no number', NULL, NULL);
INSERT INTO book_tags VALUES (10, 'ab'), (10, 'abcd'), (11, 'zz');
INSERT INTO notes VALUES ('n1', 10, 'first'), ('n2', 10, 'second'), ('n3', 11, 'third');
INSERT INTO covers VALUES ('c1', 10);
"""

ANN = "00000000-0000-0000-0000-00000000000a"
BOB = "00000000-0000-0000-0000-00000000000b"


def _configured() -> dict[str, CollectionConfig]:
    raw: dict[str, dict[str, Any]] = {
        "people": {"type": "auth", "fields": {"rename": {"share%": "share"}}},
        "teams": {"relations": {"members": {"collection": "people"}}},
        "tags": {},
        "books": {
            "relations": {
                "team": {"collection": "teams"},
                "editors": {"collection": "people"},
                "loose": {"collection": "teams"},
                "numbers": {"collection": "teams"},
                "labels": {
                    "collection": "tags",
                    "through": "public.book_tags",
                    "source": "book",
                    "target": "tag",
                },
            }
        },
        "notes": {},
        "covers": {},
    }
    return {
        name: CollectionConfig.model_validate(
            {"table": f"public.{name}", "list_rule": "", "view_rule": "", **more}
        )
        for name, more in raw.items()
    }


class CountingSession(ReadSession):
    """Counts the queries for links and rows."""

    def __init__(self, reading: ReadSession, counts: list[int]) -> None:
        self._reading = reading
        self._counts = counts

    @property
    def snapshot(self) -> Snapshot:
        return self._reading.snapshot

    @property
    def insert_lsn(self) -> LSN:
        return self._reading.insert_lsn

    @property
    def has_failed(self) -> bool:
        return self._reading.has_failed

    async def fetch_texts(
        self, statement: str, params: Mapping[str, object]
    ) -> list[tuple[str | None, ...]] | None:
        self._counts[-1] += 1
        return await self._reading.fetch_texts(statement, params)

    async def answer_questions(self, evaluation: PendingEvaluation) -> None:
        await self._reading.answer_questions(evaluation)


@dataclass
class World:
    """The tables as collections, and a caller that fetches from them."""

    connection: psycopg.AsyncConnection[Any]
    executor: QueryExecutor
    collections: Collections
    queries: list[int] = field(default_factory=lambda: [0])

    @asynccontextmanager
    async def read_session(
        self, xids: Sized[Xid], max_seconds: float | None = None
    ) -> AsyncIterator[ReadSession]:
        async with self.executor.read_session(xids, max_seconds) as reading:
            yield CountingSession(reading, self.queries)

    @property
    def expander(self) -> RelatedRecordLoader:
        return RelatedRecordLoader(self, self.collections, self._show)

    def _show(self, node: RecordNode, view: View, expand: bytes | None) -> bytes:
        make = compile_encoder(self.collections[node.collection.name], nulls="zero", view=view)
        return make(node.row, node.junction_ids, expand)

    def viewer(self, collection: str, expand: str, principal: Principal = GUEST) -> ExpandViewer:
        viewers = ExpandCompiler(self.collections, RuleCompiler(self.collections))
        request = RuleRequest(principal=principal, query={"expand": expand})
        found = viewers.compile_expand(self.collections[collection], request)
        assert found is not None
        return found

    async def event(
        self,
        collection: str,
        record_id: str,
        action: Action = "update",
        changes: Sequence[Change] = (),
    ) -> Event:
        """Return an event with the row as it is; the last of the changes is its own."""
        found = self.collections[collection]
        cursor = Cursor(LSN(1), max(len(changes), 1))
        event = Event(found, action, record_id, {}, cursor, Xid(3), tuple(changes))
        live, _ = await self.executor.fetch_live_rows([event])
        event.row = live[collection, record_id].row
        return event

    async def expand(
        self, collection: str, record_id: str, expand: str, principal: Principal = GUEST
    ) -> Any:
        """Return what the record shows as ``expand``, or None if it has no such member."""
        event = await self.event(collection, record_id)
        return await self.expand_event(event, expand, principal)

    async def expand_event(self, event: Event, expand: str, principal: Principal = GUEST) -> Any:
        viewer = self.viewer(event.collection.name, expand, principal)
        related = await self.expander.load_for_events([event], [], [(0, viewer)])
        found = related.expand_json.get((0, viewer))
        return None if found is None else json.loads(found)

    async def run(self, statement: LiteralString) -> None:
        await self.connection.execute(statement)


def replaced(collections: Collections, name: str, **more: Any) -> Collections:
    """Return the collections, one of them with other rules."""
    return Collections(
        tuple(replace(one, **more) if one.name == name else one for one in collections.values())
    )


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    async with (
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection,
        QueryPool(database_url, statement_timeout=1.0, max_size=2, timeout=5) as pool,
    ):
        await connection.execute(sql.SQL(SCHEMA))
        configured = _configured()
        names = configured_table_names(configured, ["public"])
        catalog = await read_catalog(connection, schemas=["public"], names=names)
        yield World(connection, QueryExecutor(pool), build_collections(configured, catalog))


def names(records: Any) -> Any:
    """Return the ids of records in the same nesting, without the padding of char(n)."""
    if isinstance(records, list):
        return [names(record) for record in records]
    return records["id"].rstrip()


RELATIONS = {
    "author": BOB,
    "team": "2",
    "editors": [BOB, ANN],
    "loose": "1",
    "numbers": ["2", "1"],
    "tag": "ab",
    "labels": ["ab", "abcd"],
    "notes_via_book": ["n1", "n2"],
    "covers_via_book": "c1",
}
"""Of book 10; a unique column leads back to one record, any other to a list."""


async def test_relations_of_every_kind_are_followed(world: World) -> None:
    """By uuid, integers of different sizes, padded char, arrays and junctions, forward and back."""
    expand = await world.expand("books", "10", ",".join(RELATIONS))

    assert {name: names(found) for name, found in expand.items()} == RELATIONS


@pytest.mark.parametrize("name", ["author", "team", "loose", "labels", "notes_via_book"])
async def test_what_leads_nowhere_leaves_an_empty_expand(world: World, name: str) -> None:
    """NULL, a dangling id and a text that is no number give ``{}``.

    The relation exists and is empty.
    """
    await world.run("DELETE FROM public.notes")

    assert await world.expand("books", "11", name) == {}


async def test_ways_back_through_arrays_and_junctions(world: World) -> None:
    people = await world.expand(
        "people", ANN, "teams_via_members,books_via_editors,people_via_boss"
    )
    assert {name: names(found) for name, found in people.items()} == {
        "teams_via_members": ["1", "2"],
        "books_via_editors": ["10"],
        "people_via_boss": [BOB],
    }
    tags = await world.expand("tags", "abcd", "books_via_labels,books_via_tag")
    assert {name: names(found) for name, found in tags.items()} == {"books_via_labels": ["10"]}


async def test_several_levels_in_one_record(world: World) -> None:
    expand = await world.expand("notes", "n1", "book.author.boss,book.labels,book.team.members")

    book = expand["book"]["expand"]
    assert sorted(book) == ["author", "labels", "team"]
    assert book["author"]["expand"]["boss"]["name"] == "Ann"
    assert names(book["team"]["expand"]["members"]) == [BOB, ANN]
    assert "expand" not in book["labels"][0]
    assert [one.rstrip() for one in expand["book"]["labels"]] == ["ab", "abcd"]


async def test_records_that_lead_to_the_same_share_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of one author's notes evaluates and writes the author once."""
    made: Counter[str] = Counter()

    class CountedNode(RecordNode):
        def __init__(self, collection: Collection, *rest: Any, **more: Any) -> None:
            made[collection.name] += 1
            super().__init__(collection, *rest, **more)

    monkeypatch.setattr(batch, "RecordNode", CountedNode)
    events = [await world.event("notes", record_id) for record_id in ("n1", "n2", "n3")]
    viewers = [world.viewer("notes", "book.author.boss", who) for who in (GUEST, Superuser("s"))]
    requests = [(index, viewer) for viewer in viewers for index in range(3)]

    related = await world.expander.load_for_events(events, [], requests)

    assert made == {"books": 4, "people": 4}
    shown = [json.loads(related.expand_json[request] or b"")["book"] for request in requests]
    assert [book["id"] for book in shown] == ["10", "10", "11"] * 2
    assert shown[0] == shown[1]
    assert shown[0]["expand"]["author"]["expand"]["boss"]["name"] == "Ann"
    emails = ["email" in book["expand"]["author"] for book in (shown[1], shown[4])]
    assert emails == [False, True]
    assert shown[2]["expand"] == {}


async def test_ids_in_a_junction_table_are_part_of_the_record(world: World) -> None:
    """Rows don't hold these ids: they are loaded for records that some subscriber receives."""
    events = [await world.event("books", "10"), await world.event("books", "11")]

    related = await world.expander.load_for_events(events, [0, 1], [])

    found = {place: ids["labels"] for place, ids in related.junction_ids.items()}
    assert {place: [one.rstrip() for one in ids] for place, ids in found.items()} == {
        0: ["ab", "abcd"],
        1: ["zz"],
    }


async def test_at_most_a_thousand_records_point_to_one(world: World) -> None:
    await world.run(
        "INSERT INTO public.notes SELECT 'x' || n, 11, '' FROM generate_series(1, 1500) n"
    )

    expand = await world.expand("books", "11", "notes_via_book")

    assert len(expand["notes_via_book"]) == 1000


async def test_back_relations_are_in_the_order_of_creation(world: World) -> None:
    """SQLite keeps the order of creation, so PocketBase does.

    Tables that don't record it are ordered by id.
    """
    await world.run(
        "CREATE TABLE replies (id text PRIMARY KEY, note text, created timestamptz, created_at int)"
    )
    await world.run(
        "INSERT INTO replies VALUES ('z', 'n1', '2024-05-06 10:00Z', 9),"
        " ('a', 'n1', '2024-05-06 10:00:00.5Z', 8), ('m', 'n1', '2024-05-06 10:00:00.25+01', 7),"
        " ('c', 'n1', NULL, 6), ('b', 'n1', NULL, 5), ('10', 'n1', '2024-05-06 10:00Z', 4)"
    )
    replies = {"table": "public.replies", "list_rule": "", "view_rule": ""}
    relations = {"note": {"collection": "notes"}}
    configured = _configured() | {
        "replies": CollectionConfig.model_validate({**replies, "relations": relations})
    }
    catalog = await read_catalog(
        world.connection, schemas=["public"], names=configured_table_names(configured, ["public"])
    )
    world.collections = build_collections(configured, catalog)
    expand = await world.expand("notes", "n1", "replies_via_note")
    assert names(expand["replies_via_note"]) == ["b", "c", "m", "10", "z", "a"]


BACK_AND_FORTH = "author.books_via_author.author.books_via_author.author.books_via_author"


async def test_a_path_back_and_forth_is_left_out_where_it_shows_too_much(world: World) -> None:
    """Six steps over twenty books give 8,000 records, which are shown.

    A thousand books would give a billion.
    """
    await world.run(
        f"INSERT INTO public.books (id, author) SELECT n, '{ANN}' FROM generate_series(100, 119) n"
    )
    twenty = await world.expand("books", "100", BACK_AND_FORTH)
    await world.run(
        f"INSERT INTO public.books (id, author) SELECT n, '{ANN}' FROM generate_series(200, 1200) n"
    )
    event = await world.event("books", "100")
    bombs = [
        (0, world.viewer("books", f"{BACK_AND_FORTH},{other}"))
        for other in (*RELATIONS, "notes_via_book.book", "covers_via_book.book")
    ]
    modest = (0, world.viewer("books", "author"))

    began = time.monotonic()
    related = await world.expander.load_for_events([event], [], [*bombs, modest])
    took = time.monotonic() - began

    shown = twenty["author"]["expand"]["books_via_author"][0]["expand"]["author"]
    assert len(shown["expand"]["books_via_author"]) == 20
    assert [related.expand_json.get(bomb) for bomb in bombs] == [None] * len(bombs)
    assert related.expand_json[modest] is not None
    assert took < 5


async def test_what_a_batch_shows_in_all_is_bounded_and_what_is_small_is_always_shown(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each record may be as large as its own limit; all of a batch together have a lower one."""
    small = len("x" * 1000)
    monkeypatch.setattr(loading, "_GUARANTEED_RECORD_BYTES", 2 * small)
    monkeypatch.setattr(loading, "_MAX_BATCH_BYTES", 50 * small)
    await world.run(
        f"UPDATE public.people SET name = repeat('x', {10 * small}) WHERE id = '{ANN}';"
        f"INSERT INTO public.books (id, author) SELECT n, '{ANN}' FROM generate_series(100, 119) n;"
        f"INSERT INTO public.books (id, author) VALUES (120, '{BOB}')"
    )
    events = [await world.event("books", str(n)) for n in range(100, 121)]
    viewer = world.viewer("books", "author")
    related = await world.expander.load_for_events(events, [], [(at, viewer) for at in range(21)])
    shown = [at for at in range(21) if related.expand_json.get((at, viewer))]

    assert shown == [0, 1, 2, 3, 20]


async def test_a_batch_is_one_query_per_relation_and_level(world: World) -> None:
    """Whatever the number of events and subscribers."""
    await world.run(
        "INSERT INTO public.books (id, author, team)"
        f" SELECT n, '{ANN}', 1 FROM generate_series(100, 149) n"
    )
    events = [await world.event("books", str(n)) for n in range(100, 150)]
    viewers = [
        world.viewer("books", "author.boss,team.members,notes_via_book", principal)
        for principal in (GUEST, Superuser("s"), principal_of(ANN), principal_of(BOB))
    ]
    wanted = [(place, viewer) for place in range(50) for viewer in viewers]

    related = await world.expander.load_for_events(events, [], wanted)

    assert len(related.expand_json) == 200
    # notes' ids; people, teams | no row's boss; members are people that are loaded already
    assert world.queries == [3]


def principal_of(record_id: str) -> AuthRecord:
    return AuthRecord(collection_id="pbc_people", collection_name="people", id=record_id)


async def test_callers_that_see_the_same_share_records(world: World) -> None:
    """Callers that see the same share encoded records."""
    viewers = ExpandCompiler(world.collections, RuleCompiler(world.collections))

    def viewer(
        collection: str, expand: str, principal: Principal, **query: str
    ) -> ExpandViewer | None:
        request = RuleRequest(principal=principal, query={"expand": expand, **query})
        return viewers.compile_expand(world.collections[collection], request)

    one = viewer("books", "team", principal_of(ANN))
    assert viewer("books", "team", principal_of(BOB), q="x", filter="id = 1") is one
    assert viewer("books", "team", Superuser("s")) is not one
    assert viewer("books", "author", principal_of(ANN)) is not viewer(
        "books", "author", principal_of(BOB)
    )
    assert viewer("books", "nope", GUEST) is None


async def test_addresses_are_shown_to_their_owners_and_managers(world: World) -> None:
    """Expanded records obey protocol, 6.5, too."""
    world.collections = replaced(
        world.collections, "people", manage_rule=f'@request.auth.id = "{BOB}" && name = "Bob"'
    )
    seen = {}
    for principal in (GUEST, principal_of(ANN), principal_of(BOB), Superuser("s")):
        expand = await world.expand("books", "10", "editors", principal)
        seen[type(principal).__name__, getattr(principal, "id", "")] = [
            record.get("email") for record in expand["editors"]
        ]

    assert seen == {
        ("Guest", ""): [None, None],
        ("AuthRecord", ANN): [None, "ann@x"],
        ("AuthRecord", BOB): ["bob@x", None],
        ("Superuser", "s"): ["bob@x", "ann@x"],
    }


async def test_the_view_rule_is_asked_in_the_context_expand(world: World) -> None:
    rule = '@request.context = "expand" && @request.auth.id != "" && members.id ?= @request.auth.id'
    world.collections = replaced(world.collections, "teams", view_rule=rule)

    assert names((await world.expand("books", "10", "team", principal_of(ANN)))["team"]) == "2"
    assert await world.expand("books", "10", "team") == {}


async def test_a_locked_collection_adds_nothing(world: World) -> None:
    """It adds no empty member either, nor anything on the path to it; superusers see it."""
    world.collections = replaced(world.collections, "people", view_rule=None)

    assert await world.expand("books", "10", "author") is None
    assert await world.expand("books", "10", "team.members") is None
    assert await world.expand("books", "11", "team.members") == {}
    assert await world.expand("books", "10", "team,team.members") is None
    assert names((await world.expand("books", "10", "author", Superuser("s")))["author"]) == BOB


# What goes wrong


async def test_a_table_that_can_not_be_read_is_left_out(world: World) -> None:
    """The other members stay."""
    await world.run("ALTER TABLE public.notes RENAME TO gone")

    expand = await world.expand("books", "10", "author,notes_via_book,covers_via_book")

    assert sorted(expand) == ["author", "covers_via_book"]


async def test_a_relation_that_waits_for_a_lock_is_left_out(
    world: World, database_url: str
) -> None:
    async with await psycopg.AsyncConnection.connect(database_url) as other:
        await other.execute("LOCK TABLE public.notes")
        began = time.monotonic()
        async with asyncio.timeout(10):
            expand = await world.expand("books", "10", "author,notes_via_book")

    assert sorted(expand) == ["author"]
    assert time.monotonic() - began < 5


async def test_without_a_database_records_go_without(world: World) -> None:
    event = await world.event("books", "10")
    viewer = world.viewer("books", "author")
    async with QueryPool("host=127.0.0.1 port=1", min_size=0, max_size=1, timeout=0.3) as pool:
        world.executor = QueryExecutor(pool)
        related = await world.expander.load_for_events([event], [0], [(0, viewer)])

    assert related.expand_json == {}
    assert related.junction_ids == {}


# Deleted records


async def test_a_deleted_record_shows_what_was_there_when_it_went(world: World) -> None:
    """Rows that its transaction deleted later are shown, rows deleted earlier are not."""
    note = Delete(
        TableName("public", "notes"), WholeRow({"id": "n1", "book": "10", "body": "first"})
    )
    link = Delete(TableName("public", "book_tags"), WholeRow({"book": "10", "tag": "ab  "}))
    event = await world.event("books", "10", "delete")
    book = Delete(TableName("public", "books"), WholeRow(dict(event.row)))
    await world.run(
        "DELETE FROM public.notes WHERE id = 'n1';"
        "DELETE FROM public.book_tags WHERE tag = 'ab'; DELETE FROM public.covers;"
        "DELETE FROM public.notes WHERE book = 10; DELETE FROM public.books WHERE id = 10"
    )

    event.transaction_changes = (book, note, link)
    event.cursor = Cursor(LSN(1), 1)
    first = await world.expand_event(event, "notes_via_book,labels,author")
    event.transaction_changes = (note, link, book)
    event.cursor = Cursor(LSN(1), 3)
    last = await world.expand_event(event, "notes_via_book,labels,author")

    assert names(first["notes_via_book"]) == ["n1"]
    assert names(first["labels"]) == ["ab", "abcd"]
    assert "notes_via_book" not in last
    assert names(last["labels"]) == ["abcd"]
    assert names(last["author"]) == BOB


NOTES, TAGS = TableName("public", "notes"), TableName("public", "book_tags")
HIDING: dict[str, tuple[str, Change]] = {
    "a record that was led to": ("author", Truncate(TableName("public", "people"))),
    "records that led there": ("notes_via_book", Truncate(NOTES)),
    "links": ("labels", Truncate(TAGS)),
    "a record that went, of which the key is known": (
        "notes_via_book",
        Delete(NOTES, Key({"id": "n1"})),
    ),
    "a record that leads elsewhere": (
        "notes_via_book",
        Update(NOTES, {"id": "n1", "book": "11", "body": "first"}, Key({"id": "n1"})),
    ),
    "a link of which it isn't known whose it was": ("labels", Delete(TAGS, Key({}))),
}


@pytest.mark.parametrize("name", HIDING)
async def test_what_a_delete_s_transaction_hides_of_related_records_is_said(
    world: World, name: str
) -> None:
    """The related rows existed when the record was deleted, and can't be loaded any more."""
    path, change = HIDING[name]
    event = await world.event("books", "10", "delete")
    event.transaction_changes = (
        Delete(TableName("public", "books"), WholeRow(dict(event.row))),
        change,
    )
    event.cursor = Cursor(LSN(1), 1)
    viewer = world.viewer("books", path)
    related = await world.expander.load_for_events([event], [], [(0, viewer)])

    assert (0, viewer) in related.failed


@pytest.mark.parametrize("change", [Truncate(TAGS), Delete(TAGS, Key({}))])
async def test_ids_that_a_delete_s_transaction_hides_are_left_out(
    world: World, change: Change
) -> None:
    """An empty list would be wrong: the links existed when the record was deleted."""
    event = await world.event("books", "10", "delete")
    event.transaction_changes = (
        Delete(TableName("public", "books"), WholeRow(dict(event.row))),
        change,
    )
    event.cursor = Cursor(LSN(1), 1)
    related = await world.expander.load_for_events([event], [0], [])

    assert (related.junction_ids, 0 in related.live_junction_ids) == ({0: {}}, True)


async def test_lost_links_of_an_event_are_reported_as_missing(world: World) -> None:
    """The reading transaction sees that they were truncated since; other paths are unaffected."""
    changelog = Changelog(LSN(1), max_bytes=1000, max_age_seconds=300)
    changelog.append(Transaction(Xid(4), LSN(2), 0, (Truncate(TAGS),), 10))

    async def reach(_lsn: LSN) -> bool:
        return True

    event = await world.event("books", "10")
    labels, author = world.viewer("books", "labels"), world.viewer("books", "author")
    expander = RelatedRecordLoader(
        world, world.collections, world._show, RowHistory(changelog, reach)
    )
    related = await expander.load_for_events([event], [0], [(0, labels), (0, author)])

    assert related.failed == {(0, labels)}
    assert related.expand_json[0, author] is not None


@pytest.mark.parametrize("is_shared", [True, False])
async def test_what_is_expanded_over_links_are_those_of_the_event(
    world: World, *, is_shared: bool
) -> None:
    """A link of a later transaction may lead to a row that the event's subscribers may not see."""
    changelog = Changelog(LSN(1), max_bytes=1000, max_age_seconds=300)
    later = Insert(TAGS, {"book": "10", "tag": "abcd"})
    changelog.append(Transaction(Xid(4), LSN(2), 0, (later,), 10))

    async def reach(_lsn: LSN) -> bool:
        return True

    event, viewer = await world.event("books", "10"), world.viewer("books", "labels")
    expander = RelatedRecordLoader(
        world, world.collections, world._show, RowHistory(changelog, reach)
    )
    wanted = [(0, viewer)]
    if is_shared:
        related = await expander.load_for_events([event], [0], wanted)
    else:
        found = await expander.load_expands_within(5, [event], wanted, [])
        assert found is not None
        related = found

    shown = json.loads(related.expand_json[0, viewer] or b"")
    assert names(shown["labels"]) == ["ab"]


async def test_taking_back_later_links_lets_others_have_their_turns(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reverting a record's later links, thousands for each event, must not block the event loop."""
    pauses: Counter[str] = Counter()

    def count_pauses(module: ModuleType) -> None:
        class Turn(fairness.YieldTimer):
            def is_due(self) -> bool:
                return True

            async def pause(self) -> None:
                pauses[module.__name__] += 1

        monkeypatch.setattr(module, "YieldTimer", Turn)

    count_pauses(batch)
    count_pauses(link_history)
    changelog = Changelog(LSN(1), max_bytes=1000, max_age_seconds=300)
    changelog.append(Transaction(Xid(4), LSN(2), 0, (Delete(TAGS, Key({})),), 10))

    async def reach(_lsn: LSN) -> bool:
        return True

    event = await world.event("books", "10")
    expander = RelatedRecordLoader(
        world, world.collections, world._show, RowHistory(changelog, reach)
    )
    await expander.load_for_events([event] * 20, range(20), [])

    assert pauses == {batch.__name__: 43, link_history.__name__: 20}
