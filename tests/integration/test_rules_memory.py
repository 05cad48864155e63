"""Verdicts in the process are those of PostgreSQL, for all types and collations.

The oracle is the reference query over the same row images, on a real server.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from random import Random
from typing import Self, TypeAlias

import psycopg
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from psycopg import sql

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.changes import Row
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.model import CollectionConfig, FieldsConfig, RelationConfig
from pgrealtime.rules.language.parameters import (
    CallerColumn,
    LiteralParameter,
    Parameter,
    parameter_class,
    parameter_value,
)
from pgrealtime.rules.language.predicate import condition_parameters
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.resolve import resolve_rule
from pgrealtime.rules.memory.compare import UndecidedError
from pgrealtime.rules.memory.conditions import CompiledCondition, compile_condition
from pgrealtime.rules.memory.operands import Arguments, CompileContext
from pgrealtime.rules.sql.reference import ReferenceQuery, reference_query
from tests.conftest import drop_database

SETUP = """
CREATE TYPE mood AS ENUM ('sad', 'Ok', 'happy', '');
CREATE COLLATION nd (provider = icu, locale = 'und-u-ks-level1', deterministic = false);
CREATE DOMAIN short AS varchar(30);
CREATE TABLE users (id text PRIMARY KEY, name text, email text);
CREATE TABLE t (
  id text PRIMARY KEY,
  text_c text COLLATE "C", text_icu text COLLATE "und-x-icu", text_tr text COLLATE "tr-x-icu",
  text_nd text COLLATE nd, code varchar(40), dom short, u uuid, feeling mood, feelings mood[],
  small int2, whole int4, big int8, double float8, single real, exact numeric,
  flag bool, moment timestamptz, local timestamp, day date,
  owner text COLLATE "tr-x-icu", team uuid, tags text[], codes varchar(40)[], ids uuid[],
  numbers int[], flags bool[], members text[], boxes box[], doc jsonb
);
"""

LETTERS = "aAbBéÉiIİı%_\\5. \n"  # noqa: RUF001 (Turkish letters are the point)
TEXTS = [
    *(
        "",
        "a",
        "A",
        "abc",
        "ABC",
        "aBc",
        "b",
        "B",
        "é",
        "É",
        "e",
        "i",
        "I",
        *LETTERS[8:10],
        "ß",
        "SS",
    ),
    *("5", "5.0", " 5 ", "05", "1e1", "1e100", "-3", "0.5", ".5", "5.", "0", "-0", "Infinity"),
    *("a_b", "a%b", "a\\b", "a\\", "\\", "%", "_", "a%", "%a", "x_b%", "\\%", "a\\%", "%\\%"),
    *("2024", "2024-01-02", "2024-01-02 03:04:05.678Z", "2024-01-02T03:04:05.678Z", "9999"),
    *("true", "1", "[]", '["a"]', '["a","b"]', '["a\\"b"]', "[1,2]", '{"k":1}', "null"),
    *('{"bb":1,"a":[2]}', '{"a":[2],"bb":1}'),
    *("00000000-0000-0000-0000-00000000000a", "u1", "u2", "sad", "Ok", "\n", "a\nb", "\U0001f600"),
    *("1234567890123456789", "9007199254740993", "0.1", "0.30000000000000004", "x" * 210),
]
SHORT = [text for text in TEXTS if len(text) <= 30]
NUMBERS = ["0", "1", "5", "-3", "0.5", "10", "32767", "9007199254740993", "1234567890123456789"]
DOUBLES = [*NUMBERS, "NaN", "Infinity", "-Infinity", "1e15", "1e-5", "0.30000000000000004", "-0"]
DATES = [
    *("2024-01-02 03:04:05.678901", "2024-01-02 03:04:05", "2024-01-02", "0044-03-15 BC"),
    *("infinity", "-infinity", "12024-01-01", "9999-12-31 23:59:59.999999", "0001-01-01"),
]
ARRAYS = [
    *("{}", "{a}", "{a,b}", '{"a\\"b",NULL}', "{NULL}", '{"",5}', "{{a,b},{c,d}}", "[2:3]={a,é}")
]
DOCUMENTS = [
    *("null", "1", "5.0", "0.5", '"a"', "true", "[]", "{}", '{"a": 1}', '{"a": "5", "b": [1, 2]}'),
    *('{"a": {"0": "x", "b": true}}', '["a", 5, null, {"a": 1.50}]', '{"a": "É\\n\\u0001\\""}'),
    '{"a": [2], "bb": 1}',
    *('{"a": null}', '{"a": 1e400}', '{"a": 12345678901234567890}', '{"a": [{"b": "x y: , z"}]}'),
]
VALUES: dict[str, list[str]] = {
    **dict.fromkeys(("text_c", "text_icu", "text_tr", "text_nd", "owner"), TEXTS),
    **dict.fromkeys(("code", "dom"), SHORT),
    "u": ["00000000-0000-0000-0000-00000000000a", "ffffffff-ffff-ffff-ffff-ffffffffffff"],
    "team": ["00000000-0000-0000-0000-00000000000a"],
    "feeling": ["sad", "Ok", "happy", ""],
    "feelings": ["{}", "{sad}", '{Ok,"",NULL}'],
    "small": ["0", "1", "5", "-3", "10", "32767"],
    "whole": ["0", "1", "5", "-3", "10", "2147483647"],
    "big": [number for number in NUMBERS if "." not in number],
    "double": DOUBLES,
    "single": DOUBLES,
    "exact": [*DOUBLES, "1.50", "1e-400", "1e400", "0.10"],
    "flag": ["t", "f"],
    **dict.fromkeys(("moment", "local", "day"), DATES),
    **dict.fromkeys(("tags", "codes", "members"), ARRAYS),
    "ids": ["{}", "{00000000-0000-0000-0000-00000000000a,NULL}"],
    "numbers": ["{}", "{1,5,NULL}", "{{1,2},{3,4}}"],
    "flags": ["{}", "{t,f,NULL}"],
    "doc": DOCUMENTS,
}

FIELDS = [
    *("id", *VALUES),
    *(f"{name}:lower" for name in VALUES if name not in {"doc", "flags", "numbers"}),
    *(f"{name}:length" for name in ("tags", "members", "feeling", "owner", "feelings", "ids")),
    *(f"{name}:each" for name in ("tags", "members", "codes", "feelings", "owner", "ids")),
    "numbers:each",
    *("doc.a", "doc.b", "doc.a.0", "doc.a.b", "doc.0", "doc.3.a", "doc.b.1", "doc.a.0.b"),
    *("owner.id", "doc:lower"),
]
OPERATORS = [*("=", "!=", "<", "<=", ">", ">=", "~", "!~")]
CONSTANTS = [
    *("null", "true", "false", "@now", "@year", "@request.query.q", "@request.query.missing"),
    *("@request.auth.id", "@request.auth.verified", "@request.query.q:lower", "@request.method"),
    *("@request.query.q:isset", "@request.auth.email"),
]

Images: TypeAlias = list[Row]


def quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


any_text = st.one_of(st.sampled_from(TEXTS), st.text(LETTERS, max_size=6))
literals = st.one_of(
    any_text.map(quoted),
    st.sampled_from(["0", "1", "5", "-3", "0.5", "10", "9007199254740993", "10000000000"]),
)
operands = st.one_of(
    st.sampled_from(FIELDS), st.sampled_from(FIELDS), literals, literals, st.sampled_from(CONSTANTS)
)
comparisons = st.builds(
    lambda left, any_, op, right: f"{left} {any_}{op} {right}",
    operands,
    st.sampled_from(["", "?"]),
    st.sampled_from(OPERATORS),
    operands,
)
rules = st.recursive(
    comparisons,
    lambda inner: st.builds(
        lambda parts, join: "(" + join.join(parts) + ")",
        st.lists(inner, min_size=2, max_size=3),
        st.sampled_from([" && ", " || "]),
    ),
    max_leaves=4,
)
unlike = st.one_of(st.none(), st.text(LETTERS, max_size=6))


def rows(names: Sequence[str]) -> st.SearchStrategy[dict[str, str | None]]:
    """Return rows with values of interest in the columns ``names``."""
    free = {"text_c", "text_icu", "text_tr", "text_nd", "code", "owner"}
    fixed: dict[str, st.SearchStrategy[str | None]] = {
        name: st.one_of(st.none(), st.sampled_from(VALUES[name]), *([unlike] * (name in free)))
        for name in names
    }
    return st.fixed_dictionaries({"id": st.sampled_from(["r1", "u1", "5", "É"]), **fixed})


class Evaluators:
    """A table of many types, with both evaluations of rules about its rows."""

    def __init__(self, url: str) -> None:
        pins = "-c DateStyle=ISO -c TimeZone=UTC -c extra_float_digits=1 -c search_path=pg_catalog"
        with psycopg.connect(url, autocommit=True) as setup:
            setup.execute(SETUP.encode())
        self.connection = psycopg.connect(url, autocommit=True, options=pins)
        self.collections = asyncio.run(_collections(url))
        self.collection: Collection = self.collections["t"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.connection.close()

    def images(self, given: Sequence[dict[str, str | None]]) -> Images:
        """Return the rows in the text forms in which the stream has them."""
        columns = {
            name: column
            for name in given[0]
            if (column := self.collection.table.find_column(name)) is not None
        }
        casts = sql.SQL(", ").join(
            sql.SQL("{}::{}").format(
                sql.Identifier(name), sql.Identifier(column.type.schema, column.type.name)
            )
            for name, column in columns.items()
        )
        arrays = sql.SQL(", ").join(sql.SQL("%s::text[]") for _ in columns)
        names = sql.SQL(", ").join(map(sql.Identifier, columns))
        query = sql.SQL("SELECT {} FROM unnest({}) AS x({})").format(casts, arrays, names)
        values = [[row[name] for row in given] for name in columns]
        result = self.connection.execute(query, values).pgresult
        assert result is not None
        rest: Row = {column.name: None for column in self.collection.table.columns}
        return [
            rest
            | {
                name: None if (raw := result.get_value(number, n)) is None else raw.decode()
                for n, name in enumerate(columns)
            }
            for number in range(result.ntuples)
        ]

    def by_postgres(
        self, rule: str, request: RuleRequest, images: Images, now: datetime
    ) -> set[int] | None:
        """Return the numbers of the rows that PostgreSQL admits, None if the rule denies all."""
        made = reference_query(self.collections, self.collection, rule, request)
        if not isinstance(made, ReferenceQuery):
            return None
        question = made.sql_query(images, now)
        found = self.connection.execute(question.sql.encode(), question.params).fetchall()
        return {index for (index,) in found}

    def in_process(
        self, rule: str, request: RuleRequest, images: Images, now: datetime
    ) -> list[bool | None] | None:
        """Return the verdicts of the process; None where it leaves the verdict to PostgreSQL."""
        auth = self.collections["users"]
        where = resolve_rule(rule, self.collections, self.collection, auth).where
        found = condition_parameters(where)
        free: list[Parameter] = [p for p in found if not isinstance(p, LiteralParameter)]
        order: dict[Parameter | CallerColumn, int] = {p: n for n, p in enumerate(free)}
        classes = {p: parameter_class(parameter_value(p, request, now)) for p in found}
        test = compile_condition(
            where, CompileContext(parameter_classes=classes, argument_index=order)
        )
        if test is None:
            return None
        args = [parameter_value(p, request, now) for p in free]
        return [_ask(test, row, args) for row in images]


def _ask(test: CompiledCondition, row: Row, args: Arguments) -> bool | None:
    try:
        return test(row, args)
    except UndecidedError:
        return None


async def _collections(url: str) -> Collections:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        catalog = await read_catalog(connection, schemas=["public"])
    configured = {
        "users": CollectionConfig(table="public.users", type="auth", list_rule=""),
        "t": CollectionConfig(
            table="public.t",
            list_rule="",
            fields=FieldsConfig(types={"feeling": "select"}),
            relations={
                "owner": RelationConfig(collection="users"),
                "members": RelationConfig(collection="users"),
            },
        ),
    }
    return build_collections(configured, catalog)


@pytest.fixture(params=["the server's locale", "Turkish"])
def evaluators(database_url: str, request: pytest.FixtureRequest) -> Iterator[Evaluators]:
    """Evaluators in a database of the server's collation, and of one that folds I differently."""
    if request.param == "Turkish":
        with turkish(database_url) as url, Evaluators(url) as made:
            yield made
    else:
        with Evaluators(database_url) as made:
            yield made


@contextmanager
def turkish(url: str) -> Iterator[str]:
    """Create a database with a Turkish collation; drop it at the end."""
    name = f"{url.rpartition('/')[2]}_tr"
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(
            sql.SQL(
                "CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'"
                " LOCALE_PROVIDER icu ICU_LOCALE 'tr-TR'"
            ).format(sql.Identifier(name))
        )
        try:
            yield f"{url}_tr"
        finally:
            drop_database(admin, name)


requests = st.builds(
    lambda q, verified, email: RuleRequest(
        principal=AuthRecord(
            collection_id="x", collection_name="users", id="u1", email=email, verified=verified
        ),
        query={} if q is None else {"q": q},
    ),
    st.one_of(st.none(), any_text),
    st.booleans(),
    any_text,
)


def compare(evaluators: Evaluators, rule: str, request: RuleRequest, images: Images) -> str:
    """Fail if the two evaluations differ; return how much was evaluated in the process."""
    now = datetime.now(UTC)
    decided = evaluators.in_process(rule, request, images, now)
    if decided is None:
        return "left to Postgres"
    try:
        query = evaluators.by_postgres(rule, request, images, now)
    except psycopg.Error:
        query = set()
        for index, image in enumerate(images):
            try:
                if evaluators.by_postgres(rule, request, [image], now):
                    query.add(index)
            except psycopg.Error:
                decided[index] = decided[index] or None
                assert decided[index] is None, f"Postgres fails at {image}, we don't"
    assert query is not None
    for index, verdict in enumerate(decided):
        if verdict is not None:
            shown = {name: value for name, value in images[index].items() if value is not None}
            assert verdict == (index in query), f"{rule} on {shown}: Postgres says {not verdict}"
    return "decided" if None not in decided else "partly decided"


@settings(
    max_examples=250,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_rule_is_decided_as_postgres_does(evaluators: Evaluators, data: st.DataObject) -> None:
    """For all types, operators, parameter classes and collations."""
    rule = data.draw(rules)
    names = [name for name in VALUES if name in rule] or ["text_c"]
    given_rows = data.draw(st.lists(rows(names), min_size=1, max_size=20))
    images = evaluators.images(given_rows)

    event(compare(evaluators, rule, data.draw(requests), images))


def test_each_field_is_compared_as_postgres_does(evaluators: Evaluators) -> None:
    """Each operator, with some constants of all kinds, for every value of the field's pool."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # noqa: T201 (shown if it fails)
    chance = Random(seed)
    constants = [
        *(quoted(text) for text in ("", "5", "a", "É", "a_b", "%b%", "2024-01-02", '["a"]', "u1")),
        *("0", "5", "0.5", "null", "true", "false", "@request.query.q", "@now"),
    ]
    request = RuleRequest(query={"q": "a"})
    for name, pool in VALUES.items():
        images = evaluators.images([{"id": "r1", name: value} for value in [None, *pool]])
        for path in (one for one in FIELDS if re.split("[:.]", one)[0] == name):
            signs = [*OPERATORS, *(f"?{op}" for op in OPERATORS if ":each" in path)]
            wholes = [f"{path} {op} {one}" for op in signs for one in chance.sample(constants, 3)]
            went = {compare(evaluators, rule, request, images) for rule in wholes}
            assert "left to Postgres" not in went, path


def test_an_array_is_counted_by_its_own_delimiter(evaluators: Evaluators) -> None:
    """The text form of a box contains commas."""
    boxes = (None, "{}", "{(1,1),(0,0)}", "{(1,1),(0,0);NULL}")
    images = evaluators.images([{"id": "r1", "boxes": value} for value in boxes])
    went = {compare(evaluators, f"boxes:length = {n}", RuleRequest(), images) for n in range(4)}
    assert "left to Postgres" not in went


def test_json_is_compared_whatever_the_order_of_its_keys(evaluators: Evaluators) -> None:
    """Jsonb orders the keys of an object its own way; the text of a rule has its author's."""
    images = evaluators.images([{"id": "r1", "doc": value} for value in VALUES["doc"]])
    given = '{"bb":1,"a":[2]}'
    request = RuleRequest(query={"q": given})
    for rule in (
        f"doc {op} {one}" for op in ("=", "!=") for one in (f"'{given}'", "@request.query.q")
    ):
        assert compare(evaluators, rule, request, images) == "decided"
