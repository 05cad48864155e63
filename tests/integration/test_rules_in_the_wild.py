"""Rules over the schemas of existing applications: their keys, types and junction tables.

The oracle is hand-written: each case states the ids that the rule's plain meaning gives for the few
rows below.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import TypeAlias

import psycopg
import pytest
import pytest_asyncio

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.changes import Row
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.model import Collections
from pgrealtime.config.model import CollectionConfig, FieldsConfig, RelationConfig
from pgrealtime.errors import RuleUnsupportedError
from pgrealtime.rules.language.predicate import AdmitAll, DenyAll
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.sql.reference import ReferenceQuery, SqlQuery, check_rule, reference_query
from pgrealtime.rules.sql.row_images import Overlay
from tests.engine_driving import query_before

_SCHEMA = """
CREATE EXTENSION citext SCHEMA public;
CREATE SCHEMA app;
CREATE TYPE app.mood AS ENUM ('zealous', 'calm', 'Angry');
CREATE DOMAIN app.tag AS text CHECK (VALUE <> 'no');
CREATE DOMAIN app.feeling AS app.mood;
CREATE DOMAIN app.person AS uuid;
CREATE COLLATION app.loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
CREATE TABLE app.people (
  id uuid PRIMARY KEY, handle citext, mood app.mood, "full%name" text COLLATE app.loose,
  boss uuid REFERENCES app.people);
CREATE TABLE app.kinds (name citext PRIMARY KEY, title text);
CREATE TABLE app.days (feeling app.feeling PRIMARY KEY, note text);
CREATE TABLE app."Docs" (
  id bigint PRIMARY KEY, owner uuid REFERENCES app.people, code char(4), tag app.tag,
  price numeric, ratio real, "createdAt" timestamp, due date, at timestamptz, place point,
  labels app.mood[], numbers int[], done boolean, secret bytea, parent int,
  kind citext REFERENCES app.kinds, ip inet, ips inet[], day app.feeling,
  seen app.person[], dues date[], flags boolean[], prices numeric[], era date);
CREATE TABLE app.doc_readers (doc bigint REFERENCES app."Docs", person uuid REFERENCES app.people);
INSERT INTO app.people VALUES
  ('00000000-0000-0000-0000-00000000000a', 'Ann', 'calm', 'Ann', NULL),
  ('00000000-0000-0000-0000-00000000000b', 'bob', 'zealous', 'BOB',
   '00000000-0000-0000-0000-00000000000a');
INSERT INTO app.kinds VALUES ('Memo', 'a memo');
INSERT INTO app."Docs" VALUES
  (1, '00000000-0000-0000-0000-00000000000a', 'ab', 'x', 1.50, 0.1, '2024-01-01 00:00:00.1239',
   '2024-01-01', '2024-01-01 01:00:00+01', '(23.32,42.69)', '{calm,zealous}', '{1,2}', true,
   '\\xff', NULL, 'MEMO'),
  (2, '00000000-0000-0000-0000-00000000000b', 'abcd', NULL, 10000000000, 2, NULL, 'infinity', NULL,
   '(180,-7)', NULL, NULL, false, NULL, 1, NULL),
  (3, NULL, NULL, '', 'NaN', NULL, 'infinity', NULL, '-infinity', NULL, '{}', '{}', NULL, NULL, 1,
   NULL);
INSERT INTO app.days VALUES ('calm', 'quiet');
UPDATE app."Docs" SET ip = '10.0.0.1', ips = '{10.0.0.1,10.0.0.0/8}', day = 'calm',
  seen = '{00000000-0000-0000-0000-00000000000a}', dues = '{2024-01-31}', flags = '{t}',
  prices = '{1.50,20}', era = '0044-03-15 BC' WHERE id = 1;
INSERT INTO app.doc_readers VALUES
  (1, '00000000-0000-0000-0000-00000000000b'), (1, '00000000-0000-0000-0000-00000000000a'),
  (2, '00000000-0000-0000-0000-00000000000a');
"""

_CONFIG = {
    "people": CollectionConfig(
        table="app.people", type="auth", fields=FieldsConfig(rename={"full%name": "name"})
    ),
    "kinds": CollectionConfig(table="app.kinds"),
    "days": CollectionConfig(table="app.days"),
    "docs": CollectionConfig(
        table='app."Docs"',
        fields=FieldsConfig(rename={"createdAt": "created"}),
        relations={
            "readers": RelationConfig(
                collection="people", through="app.doc_readers", source="doc", target="person"
            ),
            "kind": RelationConfig(collection="kinds"),
            "parent": RelationConfig(collection="docs"),
            "day": RelationConfig(collection="days"),
            "seen": RelationConfig(collection="people"),
        },
    ),
}

_ANN = "00000000-0000-0000-0000-00000000000a"
_BOB = "00000000-0000-0000-0000-00000000000b"

Ask: TypeAlias = Callable[[str], str]
"""Returns the ids of the docs that a rule shows to Ann, separated by blanks."""


@pytest_asyncio.fixture
async def collections(database_url: str) -> AsyncIterator[Collections]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(_SCHEMA.encode())
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        yield build_collections(_CONFIG, await read_catalog(connection, schemas=["app"]))


@pytest.fixture
def asking(database_url: str) -> Iterable[psycopg.Connection]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("SET search_path = pg_catalog")
        connection.execute("SET default_transaction_read_only = on")
        yield connection


@pytest.fixture
def ask(collections: Collections, asking: psycopg.Connection) -> Ask:
    def shown(rule: str) -> str:
        match _decided(collections, rule):
            case AdmitAll():
                return "1 2 3"
            case DenyAll(reason):
                return reason
            case ReferenceQuery() as query:
                rows = _docs(asking)
                return _answer(asking, query.sql_query(rows, datetime.now(UTC)), rows)

    return shown


def _decided(collections: Collections, rule: str) -> AdmitAll | DenyAll | ReferenceQuery:
    people = collections["people"]
    ann = AuthRecord(collection_id=people.id, collection_name="people", id=_ANN)
    return reference_query(collections, collections["docs"], rule, RuleRequest(principal=ann))


def _docs(connection: psycopg.Connection) -> list[Row]:
    columns = [
        name
        for (name,) in connection.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = 'app.\"Docs\"'::regclass"
            " AND attnum > 0 ORDER BY attnum"
        )
    ]
    shown = psycopg.sql.SQL(", ").join(
        psycopg.sql.SQL("{}::text").format(psycopg.sql.Identifier(name)) for name in columns
    )
    query = psycopg.sql.SQL('SELECT {} FROM app."Docs" ORDER BY id').format(shown)
    return [dict(zip(columns, row, strict=True)) for row in connection.execute(query)]


def _answer(connection: psycopg.Connection, question: SqlQuery, rows: Sequence[Row]) -> str:
    found = connection.execute(question.sql.encode(), question.params).fetchall()
    return " ".join(sorted(rows[index]["id"] or "" for (index,) in found))


@pytest.mark.parametrize(
    ("rule", "ids"),
    [
        # ids are texts, whatever their type; a text that is no id matches nothing and is no error
        ("owner = @request.auth.id", "1"),
        ("owner != @request.auth.id", "2 3"),
        ("owner = 'nonsense'", ""),
        ("owner != 'nonsense'", "1 2 3"),
        ("owner = '00000000-0000-0000-0000-00000000000A'", ""),
        ("owner = ''", "3"),
        ("id = '2'", "2"),
        ("id = 2", ""),
        ("id = '02'", ""),
        ("id = '99999999999999999999'", ""),
        ("id > '1'", "2 3"),
        ("parent = '1'", "2 3"),
        ("kind.title = 'a memo'", "1"),
        ("kind = 'MEMO'", "1"),
        ("kind = 'memo'", ""),
        ("kind.docs_via_kind.id ?= '1'", "1"),
        ("parent.owner.handle = 'Ann'", "2 3"),
        ("owner.boss = @request.auth.id", "2"),
        ("owner.boss.handle = 'Ann'", "2"),
        ("@request.auth.handle = owner.handle", "1"),
        # text is text: no case folding by citext, no padding, no order of an enum's labels
        ("owner.handle = 'ann'", ""),
        ("owner.handle ~ 'ANN'", "1"),
        ("owner.mood > 'a'", "1 2"),
        ("owner.mood = 'gone'", ""),
        ("owner.mood:length = 1", "1 2"),
        # neither a collation that knows no case nor a % in the column's name does harm
        ("owner.name = 'bob'", ""),
        ("owner.name = 'BOB'", "2"),
        ("owner.name != 'bob'", "1 2 3"),
        ("owner.name > 'B'", "2"),
        ("owner.name = @request.auth.name", "1"),
        ("code = 'ab'", "1"),
        ("code = 'ab  '", ""),
        ("code ~ 'ab'", "1 2"),
        ("tag = ''", "2 3"),
        ("tag = null", "2 3"),
        ("tag != 'x'", "2 3"),
        ("tag !~ 'x'", "3"),
        # an address is what Postgres shows of it, and what the record shows
        ("ip = '10.0.0.1'", "1"),
        ("ips:each ?= '10.0.0.1' && ips = '[\"10.0.0.1\",\"10.0.0.0/8\"]'", "1"),
        # a year before 1 is what the record shows of it
        ("era = '-0043-03-15 00:00:00.000Z'", "1"),
        ("era < '0001' && era != ''", "1"),
        # domains over what has no operators of its own
        ("day.note = 'quiet'", "1"),
        ("day.docs_via_day.id ?= '1'", "1"),
        ("seen.handle ?= 'Ann'", "1"),
        ("@request.auth.docs_via_seen.id ?= '1' && id = '2'", "2"),
        # numbers
        ("price = 1.5", "1"),
        ("price ~ '1.5'", "1"),
        ("price ~ '10000000000'", "2"),
        ("price = '10000000000.0'", "2"),
        ("ratio = 0.1", "1"),
        ("ratio ~ '0.1'", "1"),
        ("ratio = null", "3"),
        # moments
        ("created = '2024-01-01 00:00:00.123Z'", "1"),
        ("created = ''", "2"),
        ("created > '9'", "3"),
        ("due = '2024-01-01 00:00:00.000Z'", "1"),
        ("due > '2024-01-01'", "1 2"),
        ("at = '2024-01-01 00:00:00.000Z'", "1"),
        ("at < '1'", "2 3"),
        ("strftime('%Y', due) = '2024'", "1"),
        # points
        ("place.lon = 23.32", "1"),
        ('place = \'{"lon":23.32,"lat":42.69}\'', "1"),
        ("place.nope = null", "1 2 3"),
        ("'from 180 on' ~ place.lon", "2"),
        ("place.lat ~ '%7'", "2"),
        ("geoDistance(place.lon, place.lat, 23.32, 42.69) < 1", "1"),
        # several values
        ("labels:each ?= 'calm'", "1"),
        ("labels:length = 2", "1"),
        ('labels = \'["calm","zealous"]\'', "1"),
        ("numbers ~ '[1,2]'", "1"),
        # each of several values is what it would be alone
        ("numbers:each ?= '2'", "1"),
        ("numbers:each ?= 2", "1"),
        ("numbers:each ?> 1", "1"),
        ("numbers:each ?> 2", ""),
        ("numbers:each <= 2", "1"),
        ("prices:each ?= 1.5 && prices:each ?~ '1.5'", "1"),
        ("prices:each ?> 20", ""),
        ("flags:each ?= true", "1"),
        ("dues:each ?= '2024-01-31 00:00:00.000Z'", "1"),
        ("dues:each ?>= '2024-01-31 00:00:00.000Z'", "1"),
        ("done = true", "1"),
        ("done = null", "3"),
        # junction tables
        ("readers.handle ?= 'bob'", "1"),
        ("readers.handle = 'Ann'", "2"),
        ("readers.id ?= @request.auth.id", "1 2"),
        ("readers:each ?= @request.auth.id && readers.handle ?= 'bob'", ""),
        ("readers:each = @request.auth.id", "2"),
        ("readers:length = 2", "1"),
        ("readers = '[]'", "3"),
        (f"readers = '[\"{_ANN}\"]'", "2"),
        # a row that isn't there has no list, and not an empty one
        ("parent.readers = ''", "1"),
        ("parent.readers = '[]'", ""),
        ("parent.readers !~ 'x'", "2 3"),
        ("owner.docs_via_readers.id ?= '1'", "1 2"),
        ("docs_via_parent.id ?= '3'", "1"),
        ("owner.docs_via_owner.id = id", "1 2"),
        ("@collection.people.handle ?= 'bob' && @collection.people.id ?= owner", "2"),
    ],
)
def test_rule_means_the_same_whatever_the_type(ask: Ask, rule: str, ids: str) -> None:
    """Values of uuid, bigint, enum, citext, char(n), domain and timestamp compare by text."""
    assert ask(rule) == ids


def test_bytes_are_refused_when_the_rule_is_set(collections: Collections) -> None:
    """A type that the language can't compare is reported at start, with its position."""
    with pytest.raises(RuleUnsupportedError, match="bytea") as refused:
        check_rule(collections, collections["docs"], "id = '1' || secret = 'x'")
    assert (refused.value.start, refused.value.end) == (12, 18)


def test_row_without_a_column_that_is_read_is_not_admitted(
    collections: Collections, asking: psycopg.Connection
) -> None:
    """A column that the WAL left out is unknown, and unknown is denied.

    Other columns don't matter.
    """
    query = _decided(collections, "code != 'zz'")
    assert isinstance(query, ReferenceQuery)
    whole, unread, lacking = _docs(asking)
    del unread["price"], lacking["code"]

    question = query.sql_query([lacking, unread, whole], datetime.now(UTC))
    found = asking.execute(question.sql.encode(), question.params).fetchall()

    assert sorted(found) == [(1,), (2,)]


def test_delete_is_evaluated_with_related_rows_as_they_were(
    collections: Collections, asking: psycopg.Connection
) -> None:
    """Rows that the transaction changed or deleted count as before.

    Those that it inserted don't count.
    """
    people = collections["people"].table
    docs = _docs(asking)
    query = _decided(collections, "owner.handle = 'before' || owner.people_via_boss.id ?!= ''")
    assert isinstance(query, ReferenceQuery)
    before: Row = {"id": _BOB, "handle": "before", "mood": None, "full%name": None, "boss": None}
    overlay = Overlay(table=people, old_images=[before], changed_rows=[{"id": _BOB}])

    question = query_before(query, docs, datetime.now(UTC), [overlay])

    assert question is not None
    assert _answer(asking, question, docs) == "2"
    assert query.sql_query(docs, datetime.now(UTC)) != question


def test_delete_is_undecidable_without_the_old_image(
    collections: Collections, asking: psycopg.Connection
) -> None:
    """Without REPLICA IDENTITY FULL a changed related row is unknown: nothing is admitted."""
    query = _decided(collections, "owner.handle != 'x'")
    assert isinstance(query, ReferenceQuery)
    overlay = Overlay(
        table=collections["people"].table, old_images=[{"id": _BOB}], changed_rows=[{"id": _BOB}]
    )

    assert query_before(query, _docs(asking), datetime.now(UTC), [overlay]) is None
