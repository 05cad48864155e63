"""Every kind of value that PostgreSQL can hold, as records show it.

The expected values are PostgreSQL's own (``to_json``, ``trim_scale``, ``encode``), or those of a
JavaScript engine where ECMAScript's notation of numbers is promised.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from random import Random
from typing import Any, NamedTuple, TypeAlias

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.lacking import lacking
from tests.one_row import Table

Member = str
"""The JSON of one member, byte for byte."""

MakeTable: TypeAlias = Callable[..., Table]


@pytest.fixture
def make_table(database_url: str) -> Iterator[MakeTable]:
    """Make the table, once."""
    with ExitStack() as stack:

        def make(columns: str, setup: str = "", **config: Any) -> Table:
            table = Table(database_url, columns, setup, **config)
            stack.callback(table.close)
            return table

        yield make


TO_JSON = "to_json(v)::text"


class Case(NamedTuple):
    """A type, a value of it, and the SQL expression of its representation in a record."""

    type: str
    value: str
    oracle: str = TO_JSON


DATE = (
    "to_json(to_char(date_trunc('milliseconds', v::timestamp),"
    """ 'YYYY-MM-DD HH24:MI:SS.MS"Z"'))::text"""
)
BYTEA = "to_json(replace(encode(v, 'base64'), E'\\n', ''))::text"
NUMERIC = "trim_scale(v)::text"

CASES = [
    Case("text", r"""E'a"\\/\b\f\n\r\t\x01\x1f\x7f é   <>&'"""),
    Case("text", "''"),
    Case("varchar(9)", "'abc'"),
    Case("char(5)", "'abc'"),
    Case("name", "'n'"),
    Case("""\"char\"""", "'c'"),
    Case("int2", "'-32768'"),
    Case("int4", "2147483647"),
    Case("int8", "9223372036854775807"),
    Case("numeric", "'12345678901234567890123456789.12345678901234567890'", NUMERIC),
    Case("numeric(10,4)", "1.5", NUMERIC),
    Case("numeric(10,4)", "100", NUMERIC),
    Case("numeric", "1e30", NUMERIC),
    Case("numeric", "0.000", NUMERIC),
    Case("numeric", "'NaN'", "'null'"),
    Case("numeric", "'-Infinity'", "'null'"),
    Case("numeric", "repeat('9', 6000)::numeric", NUMERIC),
    Case("float4", "0.1"),
    Case("float4", "16777216", "'16777216'"),
    Case("float4", "1e21", "'1e+21'"),
    Case("float4", "1e-7", "'1e-7'"),
    Case("float8", "12.5"),
    Case("float8", "'NaN'", "'null'"),
    Case("float8", "'Infinity'", "'null'"),
    Case("float8", "'-Infinity'", "'null'"),
    Case("float8", "'-0'", "'-0'"),
    Case("bool", "true"),
    Case("bool", "false"),
    Case("uuid", "'6f1c24a4-3d3c-4f5e-9d7e-2f0b8f5f3c11'"),
    Case("timestamptz", "'2024-02-03 04:05:06.789999+02'", DATE),
    Case("timestamptz", "'2024-02-03 04:05:06'", DATE),
    Case("timestamptz", "'2024-02-03 04:05:06.7'", DATE),
    Case("timestamptz", "'2024-02-03 04:05:06.000001'", DATE),
    Case("timestamptz", "'12024-02-03 04:05:06.123456'", DATE),
    Case("timestamptz", "'0001-01-01'", DATE),
    Case("timestamptz", "'infinity'", """'""'"""),
    Case("timestamptz", "'-infinity'", """'""'"""),
    Case("timestamptz", "'0044-03-15 12:00:00.5 BC'", """'"-0043-03-15 12:00:00.500Z"'"""),
    Case("timestamptz", "'0001-01-01 BC'", """'"0000-01-01 00:00:00.000Z"'"""),
    Case("timestamp", "'2024-02-03 04:05:06.789999'", DATE),
    Case("timestamp", "'2024-02-03 04:05:06'", DATE),
    Case("timestamp", "'12024-02-03 04:05:06.123456'", DATE),
    Case("date", "'2024-02-29'", DATE),
    Case("date", "'12024-02-29'", DATE),
    Case("date", "'0044-03-15 BC'", """'"-0043-03-15 00:00:00.000Z"'"""),
    Case("date", "'infinity'", """'""'"""),
    Case("time", "'04:05:06.789'"),
    Case("timetz", "'04:05:06+02'"),
    Case("interval", "'1 year 2 mons 3 days 04:05:06.7'"),
    Case("bytea", r"'\x00ff10'", BYTEA),
    Case("bytea", "''", BYTEA),
    Case("bytea", r"decode(repeat('fb', 100), 'hex')", BYTEA),
    Case("inet", "'10.0.0.1/8'"),
    Case("cidr", "'10.0.0.0/8'"),
    Case("macaddr", "'08:00:2b:01:02:03'"),
    Case("money", "'12.34'"),
    Case("bit(3)", "B'101'"),
    Case("xml", "'<a b=\"c\"/>'"),
    Case("tsvector", "'a fat:2 cat'"),
    Case("int4range", "'[1,5)'"),
    Case("tstzrange", "'[2024-01-01,2024-02-01)'"),
    Case("int4multirange", "'{[1,3),[5,8)}'"),
    Case("box", "'(1,2),(3,4)'"),
    Case("oid", "42", "to_json(v::text)::text"),
    Case("mood", "'sad one'"),
    Case("positive", "5"),
    Case("address", "1.50", NUMERIC),
    Case("point", "'(12.34,-56.78)'", """'{"lon":12.34,"lat":-56.78}'"""),
    Case("point", "'(1e21,1e-7)'", """'{"lon":1e+21,"lat":1e-7}'"""),
    Case("text[]", r"""ARRAY['a', 'b c', '', NULL, 'NULL', '"', E'\\', '{', ',', E'\n']"""),
    Case("text[]", "'{}'"),
    Case("text[]", "'[0:1]={a,b}'"),
    Case("text[]", "'{{a,b},{c,NULL}}'"),
    Case("int4[]", "'[2:3][-1:0]={{1,2},{3,NULL}}'"),
    Case("bool[]", "'{t,f,NULL}'"),
    Case("uuid[]", "'{6f1c24a4-3d3c-4f5e-9d7e-2f0b8f5f3c11,NULL}'"),
    Case("numeric[]", "'{1.50,NaN,NULL}'", "'[1.5,null,null]'"),
    Case("float8[]", "'{1e21,-Infinity,0.1}'", "'[1e+21,null,0.1]'"),
    Case("timestamptz[]", "'{2024-02-03,NULL}'", """'["2024-02-03 00:00:00.000Z",null]'"""),
    Case("bytea[]", r"""ARRAY['\x00ff'::bytea]""", """'["AP8="]'"""),
    Case("point[]", "'{\"(1,2)\"}'", """'[{"lon":1,"lat":2}]'"""),
    Case("box[]", "'{(1,2),(3,4);(0,0),(3,4);NULL}'"),
    Case("jsonb[]", """ARRAY['{"a": [1, "x y"]}', 'null']::jsonb[]""",
         """'[{"a":[1,"x y"]},null]'"""),
    Case("mood[]", "'{\"sad one\",ok,\"sad one\"}'"),
    Case("positive[]", "'{1,2}'"),
    Case("pair_list", "ARRAY[ROW(1, 'x')::pair, NULL]::pair_list"),
    Case("int2vector", "'1 2 3'"),
    Case("pair", "ROW(NULL, '')::pair"),
    Case("pair", "ROW(NULL, NULL)::pair"),
    Case("pair", r"""ROW(7, E'q"uo\\te, (b)\n')::pair"""),
    Case("nested", """ROW(ROW(1, 'a "b"'), ARRAY[ROW(2, NULL)::pair, NULL], '{"k": 1}', 't',
         ARRAY[ARRAY['x', 'y z']])::nested"""),
    Case("empty", "ROW()::empty"),
    Case("json", "' {\"b\" : 1.50, \"a\":[ 1E400 , -0, {} ], \"b\":\"x  y\"} '",
         """'{"b":1.50,"a":[1E400,-0,{}],"b":"x  y"}'"""),
    Case("json", r"""'"\u00e9\/\u2028\u007f\u0001\ud83d\ude00 \\u0041"'""",
         r"""E'"\u00e9/\u2028\u007f\\u0001\U0001f600 \\\\u0041"'"""),
    Case("json", "' 12 '", "'12'"),
    Case("json", "'null'", "'null'"),
    Case("json", "'{\"a \" : [ ] }'", "'{\"a \":[]}'"),
    Case("jsonb", """'{"b": 1.50, "a": [1, 2.0, true, null, "x: y, z"]}'""",
         """'{"a":[1,2.0,true,null,"x: y, z"],"b":1.50}'"""),
    Case("jsonb", r"""'"tab\t quote\" slash\\ \u00e9 \u001f"'""",
         r"""E'"tab\\t quote\\" slash\\\\ \u00e9 \\u001f"'"""),
    Case("jsonb", "'1.10'", "'1.10'"),
]  # fmt: skip

TYPES = """
CREATE TYPE mood AS ENUM ('ok', 'sad one');
CREATE DOMAIN positive AS int CHECK (value > 0);
CREATE DOMAIN address_base AS numeric;
CREATE DOMAIN address AS address_base;
CREATE TYPE pair AS (a int, "b c" text);
CREATE DOMAIN pair_list AS pair[];
CREATE TYPE nested AS (p pair, ps pair[], j jsonb, f bool, t text[]);
CREATE TYPE empty AS ();
"""


def compact(value: Any) -> Member:
    """Return JSON without blanks, with strings escaped as protocol, 6.7, requires.

    Python's writer does the same.
    """
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def test_every_type_is_shown_as_promised(make_table: MakeTable) -> None:
    """One wide row with a value of each; see ``CASES``."""
    columns = ", ".join(f"v{number} {case.type}" for number, case in enumerate(CASES))
    table = make_table(columns, TYPES)
    table.insert(", ".join(case.value for case in CASES))
    record = msgspec.json.decode(table.record(), type=dict[str, msgspec.Raw])
    shown = {case: bytes(record[f"v{number}"]).decode() for number, case in enumerate(CASES)}
    expected = {
        case: table.execute(f"SELECT {case.oracle} FROM (SELECT v{number} AS v FROM t) AS t")[0][0]
        for number, case in enumerate(CASES)
    }
    assert shown == {
        case: compact(json.loads(text)) if case.oracle == TO_JSON else text
        for case, text in expected.items()
    }


@pytest.mark.parametrize("type_name", ["json", "jsonb"])
def test_json_may_be_nested_as_deep_as_postgres_lets_it(
    type_name: str, make_table: MakeTable
) -> None:
    """That is deeper than Python's own parsers accept."""
    table = make_table(f"v {type_name}")
    deep = "[" * 3000 + '{"a b":1}' + "]" * 3000
    table.insert(f"%s::{type_name}", [deep.replace(":", " : ")])
    assert table.record() == b'{"collectionId":"%b","collectionName":"t","id":"1","v":%b}' % (
        table.collection.id.encode(),
        deep.encode(),
    )


ZEROS = """
n int, f float8, b bool, d timestamptz, s text, u uuid, g point, j json, jb jsonb, a text[],
bs bytea, p pair, m mood
"""


def test_null_is_null_or_the_zero_value_of_the_kind(make_table: MakeTable) -> None:
    table = make_table(ZEROS, TYPES)
    table.execute("INSERT INTO t (id) VALUES (1)")
    names = [name.split()[0] for name in ZEROS.split(",")]
    with_null = json.loads(table.record("null"))
    assert {name: with_null[name] for name in names} == dict.fromkeys(names)

    with_zero = json.loads(table.record("zero"))
    assert {name: with_zero[name] for name in names} == {
        "n": 0, "f": 0, "b": False, "d": "", "s": "", "u": "", "g": {"lon": 0, "lat": 0},
        "j": None, "jb": None, "a": [], "bs": "", "p": None, "m": "",
    }  # fmt: skip


def test_places_in_json_have_two_numbers_whatever_is_stored(make_table: MakeTable) -> None:
    """A missing or unreadable coordinate becomes 0."""
    table = make_table("v jsonb", fields={"types": {"v": "geoPoint"}})
    for stored, shown in [
        ('{"lat": -56.78, "lon": 12.34, "alt": 3}', '{"lon":12.34,"lat":-56.78}'),
        ('{"lon": 1e21, "lat": 100.0}', '{"lon":1e+21,"lat":100}'),
        ('{"lon": "1", "lat": true}', '{"lon":0,"lat":0}'),
        ("[1, 2]", '{"lon":0,"lat":0}'),
        ('{"lon": 1e400, "lat": 5}', '{"lon":0,"lat":5}'),
    ]:
        table.insert("%s::jsonb", [stored])
        assert table.member() == shown


def test_ids_are_strings_and_lists_of_ids_and_options_name_none_twice(
    make_table: MakeTable,
) -> None:
    """As in PocketBase's relations and selects of several; other arrays are shown as stored."""
    table = make_table(
        "parent int REFERENCES t (id), others int[], tags text[], moods mood[], numbers int[],"
        " words text[], feelings mood[]",
        "CREATE TYPE mood AS ENUM ('sad', 'ok')",
        relations={"others": {"collection": "t"}},
        fields={"types": {"tags": "select", "moods": "select"}},
    )
    table.insert(
        "1, '{3,1,NULL,3}', '{a,b,NULL,a}', '{ok,sad,ok}', '{1,2,1}', '{a,b,NULL,a}', '{ok,sad,ok}'"
    )
    record = json.loads(table.record())
    assert record["id"] == "1"
    assert record["parent"] == "1"
    assert record["others"] == ["3", "1"]
    assert record["tags"] == ["a", "b", None]
    assert record["moods"] == ["ok", "sad"]
    assert record["numbers"] == [1, 2, 1]
    assert record["words"] == ["a", "b", None, "a"]
    assert record["feelings"] == ["ok", "sad", "ok"]


def doubles() -> Iterator[float]:
    """Return doubles of every magnitude, and those where the printed form changes."""
    random = Random(20240203)
    edges = [1e21, 1e-7, 1e-6, 999999999999999900000.0, 1e15, 1e16, 123456789012345680000.0]
    for edge in [
        *edges,
        5e-324,
        1.7976931348623157e308,
        2.2250738585072014e-308,
        9007199254740994.0,
    ]:
        yield from (edge, -edge, edge / 3, edge * 1.1 if edge < 1e300 else edge)
    for power in range(-30, 30):
        yield from (10.0**power, 2.0**power, random.random() * 10.0**power)
    for _ in range(20_000):
        (value,) = struct.unpack("d", random.randbytes(8))
        if value == value and abs(value) != float("inf"):  # noqa: PLR0124 (NaN isn't itself)
            yield value


def test_floats_are_printed_as_a_javascript_engine_prints_them(make_table: MakeTable) -> None:
    node = shutil.which("node")
    if node is None:
        lacking("no JavaScript engine: node isn't installed")
    values = list(doubles())
    table = make_table("v float8[]")
    table.insert("%s", [values])
    ours = table.member()
    script = "process.stdout.write(JSON.stringify(JSON.parse(require('fs').readFileSync(0))))"
    theirs = subprocess.run(
        [node, "-e", script], input=json.dumps(values).encode(), stdout=subprocess.PIPE, check=True
    ).stdout.decode()
    assert ours.split(",") == theirs.split(",")


TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    | st.sampled_from('"\\{}(), \n\tN'),
    max_size=8,
) | st.sampled_from(["NULL", "null", "", '""', "\\", "(,)", "{}"])

ONCE = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_any_array_of_texts_is_what_to_json_says(make_table: MakeTable) -> None:
    """With quotes, backslashes, braces, NULL next to the text "NULL", and two dimensions."""
    table = make_table("v text[]")
    element = st.none() | TEXTS
    flat = st.lists(element, max_size=6)
    square = st.integers(1, 3).flatmap(
        lambda width: st.lists(
            st.lists(element, min_size=width, max_size=width), min_size=1, max_size=3
        )
    )

    @ONCE
    @given(flat | square)
    def holds(value: list[Any]) -> None:
        table.insert("%s::text[]", [value])
        assert json.loads(table.member()) == value

    holds()


def test_any_composite_is_what_to_json_says(make_table: MakeTable) -> None:
    """Composites in arrays in composites: each level quotes the one below."""
    table = make_table(
        "v outer_type",
        "CREATE TYPE inner_type AS (a text, b text, c text[]);"
        "CREATE TYPE outer_type AS (x inner_type, y inner_type[], z text)",
    )
    texts = st.none() | TEXTS
    inner = st.none() | st.fixed_dictionaries(
        {"a": texts, "b": texts, "c": st.none() | st.lists(texts, min_size=1, max_size=3)}
    )
    outer = st.fixed_dictionaries({"x": inner, "y": st.none() | st.lists(inner), "z": texts})

    @ONCE
    @given(outer)
    def holds(value: dict[str, Any]) -> None:
        table.insert(
            "(SELECT jsonb_populate_record(NULL::outer_type, %s::jsonb))", [json.dumps(value)]
        )
        [(expected,)] = table.execute("SELECT to_json(v)::text FROM t")
        assert json.loads(table.member()) == json.loads(expected)

    holds()


class Spelling(str):
    """A number in its original notation."""

    __slots__ = ()


def written(value: Any) -> Member:
    """Return JSON as ``compact`` does, with each number in its original notation."""
    match value:
        case Spelling():
            return str(value)
        case list():
            return f"[{','.join(map(written, value))}]"
        case dict():
            return f"{{{','.join(f'{compact(k)}:{written(v)}' for k, v in value.items())}}}"
        case _:
            return compact(value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@pytest.mark.parametrize("type_name", ["json", "jsonb"])
def test_any_json_means_the_same_without_blanks(type_name: str, make_table: MakeTable) -> None:
    """Strings as protocol, 6.7, requires, no blanks between tokens, the value unchanged."""
    table = make_table(f"v {type_name}")

    @ONCE
    @given(JSON_VALUES, st.booleans(), st.sampled_from([None, 1]))
    def holds(value: Any, escaped: bool, indent: int | None) -> None:  # noqa: FBT001 (drawn)
        table.insert(f"%s::{type_name}", [json.dumps(value, ensure_ascii=escaped, indent=indent)])
        [(stored,)] = table.execute("SELECT v::text FROM t")
        as_read = json.loads(stored, parse_int=Spelling, parse_float=Spelling)
        assert table.member() == written(as_read)

    holds()
