"""Columns of PostGIS' types, shown as GeoJSON just as PostGIS writes it, and read by rules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgrealtime.changes import Insert, TableName
from pgrealtime.collections.model import Collections
from pgrealtime.errors import RuleUnsupportedError
from pgrealtime.observe.redact import message_without_values
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.sql.reference import ReferenceQuery, check_rule, reference_query
from pgrealtime.wal.stream import _translate_error
from tests.lacking import lacking
from tests.one_row import Table
from tests.stream_reading import PLUGINS, Plugin, changes_of, reading, writer

SHAPES = [
    "POINT(12.5 -3)",
    "POINT EMPTY",
    "POINT Z (1 2 3)",
    "POINT M (1 2 3)",
    "POINT ZM (1 2 3 4)",
    "POINT(0.1234567894 123456.1234567895)",
    "POINT(-0 -7.5)",
    "POINT(0.1234567896 7.0000125005)",
    "POINT(67108864.572265625 123456789012345.67)",
    "LINESTRING(0 0,1 1)",
    "LINESTRING ZM (0 0 1 2,1 1 3 4)",
    "LINESTRING EMPTY",
    "POLYGON((0 0,0 1,1 1,0 0),(0.1 0.1,0.1 0.2,0.2 0.2,0.1 0.1))",
    "POLYGON EMPTY",
    "MULTIPOINT((1 2),(3 4))",
    "MULTIPOINT(EMPTY,(1 2))",
    "MULTIPOINT EMPTY",
    "MULTILINESTRING((0 0,1 1),EMPTY)",
    "MULTIPOLYGON(EMPTY,((0 0,0 1,1 1,0 0)))",
    "MULTIPOLYGON Z (((0 0 7,0 1 7,1 1 7,0 0 7)))",
    "GEOMETRYCOLLECTION(POINT(1 2),LINESTRING(0 0,1 1),MULTIPOINT((1 2)))",
    "GEOMETRYCOLLECTION EMPTY",
    "TRIANGLE((0 0,0 1,1 1,0 0))",
    "TIN(((0 0 0,0 1 0,1 1 0,0 0 0)),((0 0 0,0 1 0,1 1 1,0 0 0)))",
    "SRID=4326;POINT(1 2)",
    "SRID=3857;GEOMETRYCOLLECTION(POINT(1 2),MULTILINESTRING((0 0,1 1)))",
    "SRID=102003;POINT(1 2)",
]
WITHOUT_GEOJSON = [
    "CIRCULARSTRING(0 0,1 1,2 0)",
    "COMPOUNDCURVE(CIRCULARSTRING(0 0,1 1,2 0),(2 0,3 3))",
    "CURVEPOLYGON((0 0,1 1,2 0,0 0))",
    "MULTICURVE((0 0,1 1))",
    "POLYHEDRALSURFACE(((0 0 0,0 1 0,1 1 0,0 0 0)))",
    "GEOMETRYCOLLECTION(POINT(1 2),CIRCULARSTRING(0 0,1 1,2 0))",
]


@pytest.fixture
def postgis_url(database_url: str) -> str:
    """A database with PostGIS in a schema that is in no default search_path."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        there = connection.execute("SELECT FROM pg_available_extensions WHERE name = 'postgis'")
        if there.fetchone() is None:
            lacking("no PostGIS on the server: install postgresql-17-postgis-3")
        connection.execute("CREATE SCHEMA gis; CREATE EXTENSION postgis SCHEMA gis")
    return database_url


@pytest.fixture
def table(postgis_url: str) -> Iterator[Table]:
    """A table with a geometry of any kind in ``v``."""
    with closing(Table(postgis_url, "v gis.geometry")) as one:
        yield one


def test_geometry_is_what_postgis_says(table: Table) -> None:
    """Every kind of shape in GeoJSON, with and without height, measure and SRID."""
    for shape in SHAPES:
        table.insert("%s", [shape])
        assert table.member() == table.execute("SELECT gis.ST_AsGeoJSON(v) FROM t")[0][0], shape


def test_exponents_are_written_as_everywhere_in_a_record(table: Table) -> None:
    """Numbers are PostGIS', in ECMAScript's notation."""
    table.insert("'POINT ZM (1e-7 1e-9 -1e20 0)'")
    assert table.member() == '{"type":"Point","coordinates":[1e-7,1e-9,-100000000000000000000]}'
    [(expected,)] = table.execute("SELECT gis.ST_AsGeoJSON(v) FROM t")
    assert json.loads(table.member()) == json.loads(expected)


def test_any_big_endian_geometry_is_read(table: Table) -> None:
    """The server writes its machine's byte order, so big-endian input is made by hand."""
    for shape in SHAPES:
        table.insert("%s", [shape])
        [(text, expected)] = table.execute(
            "SELECT encode(gis.ST_AsEWKB(v, 'XDR'), 'hex'), gis.ST_AsGeoJSON(v) FROM t"
        )
        assert table.shown({"id": "1", "v": text}) == expected


_ordinate = st.integers(-180, 180) | st.one_of(st.floats(-1e9, 1e9), st.floats(-180, 180)).filter(
    lambda number: abs(number) > 1e-5
)


def _points(dimensions: int, minimum: int) -> st.SearchStrategy[str]:
    point = st.tuples(*[_ordinate] * dimensions).map(lambda p: " ".join(map(repr, p)))
    return st.lists(point, min_size=minimum, max_size=5).map(", ".join)


def _shape(dimensions: int) -> st.SearchStrategy[str]:
    line = _points(dimensions, 2).map(lambda points: f"({points})")
    ring = st.lists(_points(dimensions, 1), min_size=1, max_size=3).map(
        lambda all_points: ", ".join(f"({_closed(points)})" for points in all_points)
    )
    simple = st.one_of(
        _points(dimensions, 1).map(lambda points: f"POINT({points.partition(',')[0]})"),
        line.map("LINESTRING{}".format),
        ring.map("POLYGON({})".format),
        _points(dimensions, 1).map("MULTIPOINT({})".format),
        st.lists(line, min_size=1, max_size=3).map(
            lambda lines: f"MULTILINESTRING({', '.join(lines)})"
        ),
        st.lists(ring.map("({})".format), min_size=1, max_size=3).map(
            lambda rings: f"MULTIPOLYGON({', '.join(rings)})"
        ),
    )
    several = st.lists(simple, max_size=3).map(
        lambda shapes: f"GEOMETRYCOLLECTION({', '.join(shapes)})" if shapes else "POINT EMPTY"
    )
    return simple | several


def _closed(points: str) -> str:
    """Return a closed ring of at least four points."""
    first = points.partition(", ")[0]
    return f"{points}, {first}, {first}, {first}"


def test_any_geometry_is_what_postgis_says(table: Table) -> None:
    shapes = st.tuples(
        st.sampled_from(["", "SRID=4326;", "SRID=25832;"]), st.integers(2, 4).flatmap(_shape)
    ).map("".join)

    @settings(
        max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(shapes)
    def holds(shape: str) -> None:
        table.insert("%s", [shape])
        assert table.member() == table.execute("SELECT gis.ST_AsGeoJSON(v) FROM t")[0][0]

    holds()


def test_shape_that_geojson_does_not_have_stays_text(table: Table) -> None:
    """PostGIS raises an error for it; the record still shows PostgreSQL's text."""
    for shape in WITHOUT_GEOJSON:
        table.insert("%s", [shape])
        with pytest.raises(psycopg.errors.InternalError_):
            table.execute("SELECT gis.ST_AsGeoJSON(v) FROM t")
        assert json.loads(table.member()) == table.row()["v"], shape


def test_what_is_no_number_is_null_and_collections_nest(table: Table) -> None:
    """Both are valid GeoJSON; PostGIS writes NaN, which is no JSON, or raises an error."""
    table.insert("gis.ST_MakePoint('Infinity', 1)")
    assert json.loads(table.member()) == {"type": "Point", "coordinates": [None, 1]}
    table.insert("'GEOMETRYCOLLECTION(GEOMETRYCOLLECTION(POINT(1 2)))'")
    assert json.loads(table.member())["geometries"][0]["geometries"] == [
        {"type": "Point", "coordinates": [1, 2]}
    ]


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("gis.geography", "'POINT(1 2)'", "gis.ST_AsGeoJSON(v)"),
        ("gis.geography(PointZ, 4326)", "'POINT Z (1 2 3)'", "gis.ST_AsGeoJSON(v)"),
        ("gis.geometry(Point, 3857)", "'SRID=3857;POINT(1 2)'", "gis.ST_AsGeoJSON(v)"),
        ("place", "'POINT(1 2)'", "gis.ST_AsGeoJSON(v)"),
        (
            "gis.geometry[]",
            "ARRAY['POINT(1 2)', NULL, 'LINESTRING(0 0,1 1)']::gis.geometry[]",
            "to_json(v)::text",
        ),
        (
            "gis.geometry[]",
            "ARRAY[ARRAY['POINT(1 2)'], ARRAY['POINT(3 4)']]::gis.geometry[]",
            "to_json(v)::text",
        ),
        ("stop", "ROW('central', 'POINT(1 2)')", "to_json(v)::text"),
        ("gis.box2d", "'BOX(1 2,3 4)'", "to_json(v::text)::text"),
    ],
)
def test_columns_of_every_form_hold_it(
    postgis_url: str, column: str, value: str, shown: str
) -> None:
    """geography, typed columns, domains, arrays (their elements are separated by colons), rows."""
    setup = "CREATE DOMAIN place AS gis.geometry; CREATE TYPE stop AS (name text, at gis.geometry)"
    with closing(Table(postgis_url, f"v {column}", setup)) as table:
        table.execute("SET search_path = public, gis")  # to_json looks its cast's function up
        table.insert(value)
        [(expected,)] = table.execute(f"SELECT {shown} FROM t")
        assert json.loads(table.member()) == json.loads(expected)


def test_type_of_that_name_that_is_not_postgis_is_text(database_url: str) -> None:
    setup = "CREATE TYPE geometry AS ENUM ('line', 'circle')"
    with closing(Table(database_url, "v geometry", setup)) as table:
        table.insert("'line'")
        assert table.member() == '"line"'


@pytest.mark.parametrize("plugin", PLUGINS)
async def test_stream_brings_what_is_shown(postgis_url: str, plugin: Plugin) -> None:
    """Both decoders write a geometry as the server's output function does."""
    async with writer(postgis_url) as connection:
        await connection.execute(
            "CREATE TABLE t (id int PRIMARY KEY, v gis.geometry, w gis.geography[])"
        )
        async with reading(postgis_url, connection, plugin) as stream:
            await connection.execute(
                "INSERT INTO t VALUES (1, 'SRID=3857;POINT(1 2)',"
                " ARRAY['POINT(1 2)', NULL]::gis.geography[])"
            )
            changes = await changes_of(connection, stream)
        [stored] = await (
            await connection.execute("SELECT id::text, v::text, w::text FROM t")
        ).fetchall()
    assert changes == [
        Insert(TableName("public", "t"), dict(zip(["id", "v", "w"], stored, strict=True)))
    ]


# --- as PocketBase's geoPoint


AS_PLACE: dict[str, Any] = {"fields": {"types": {"v": "geoPoint"}}}


PLACES = {
    "POINT(12.5 -42.123456789012)": {"lon": 12.5, "lat": -42.123456789012},
    "POINT ZM (1 2 3 4)": {"lon": 1, "lat": 2},
    "POINT EMPTY": {"lon": 0, "lat": 0},
    "LINESTRING(1 1,2 2)": {"lon": 0, "lat": 0},
}

both = pytest.mark.parametrize("column", ["gis.geometry", "gis.geography"])


@both
def test_point_may_be_shown_as_a_geo_point(postgis_url: str, column: str) -> None:
    with closing(Table(postgis_url, f"v {column}", **AS_PLACE)) as table:
        for shape, shown in PLACES.items():
            table.insert("%s", [shape])
            assert json.loads(table.member()) == shown


RULES = {
    "v.lon = 12.5 && v.lat = -42": True,
    "v.lon > 13": False,
    "v.alt = null": True,
    "v.lon.x = null && id != ''": True,
    """v = '{"lon":12.5,"lat":-42}'""": True,
    "geoDistance(v.lon, v.lat, 12.5, -42) < 1": True,
    "geoDistance(v.lon, v.lat, 0, 0) < 1": False,
}


@both
def test_rules_read_the_geo_point(postgis_url: str, column: str) -> None:
    with closing(Table(postgis_url, f"v {column}", **AS_PLACE)) as table:
        table.insert("'POINT(12.5 -42)'")
        assert {rule: _is_admitted(postgis_url, table, rule) for rule in RULES} == RULES


def test_rules_find_no_coordinates_in_other_shapes(postgis_url: str) -> None:
    """ST_X would raise an error for them."""
    with closing(Table(postgis_url, "v gis.geometry", **AS_PLACE)) as table:
        table.insert("'LINESTRING(1 1,2 2)'")
        assert _is_admitted(postgis_url, table, "v.lon = null && v.lat = null")
        assert not _is_admitted(postgis_url, table, "v.lon = 1")


def test_rules_are_refused_a_geometry_that_is_no_geo_point(table: Table) -> None:
    """The error is raised when the rule is set, with a remedy."""
    all_of_them = Collections((table.collection,))
    with pytest.raises(RuleUnsupportedError, match="geometry") as refused:
        check_rule(all_of_them, table.collection, "id = 1 && v ~ 2")
    assert (refused.value.start, refused.value.end) == (10, 11)
    assert "geoPoint" in str(refused.value)


def _is_admitted(url: str, table: Table, rule: str) -> bool:
    decided = reference_query(
        Collections((table.collection,)), table.collection, rule, RuleRequest()
    )
    assert isinstance(decided, ReferenceQuery)
    question = decided.sql_query([table.row()], datetime.now(UTC))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET search_path = pg_catalog")
        found = connection.execute(question.sql.encode(), question.params).fetchall()
    return found == [(0,)]


CROSSED = """
SELECT gis.ST_Difference('POLYGON((0 0,5 5,5 0,0 5,0 0))'::gis.geometry,
                         'POLYGON((0 0,77 78,79 0,0 79,0 0))'::gis.geometry)
"""


def test_coordinates_in_an_error_message_are_not_logged(postgis_url: str) -> None:
    """PostGIS raises internal errors, whose text is withheld as that of the decoder's errors is."""
    with psycopg.connect(postgis_url) as connection, pytest.raises(psycopg.Error) as raised:
        connection.execute(CROSSED)
    assert "at 39.24" in str(raised.value)

    assert message_without_values(raised.value) == "SQLSTATE XX000"
    assert _translate_error(raised.value).detail == "SQLSTATE XX000"
