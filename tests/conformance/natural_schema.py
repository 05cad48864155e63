"""The fixtures as PostgreSQL tables, designed without PocketBase in mind.

Pure: it returns SQL to be executed. Table and column names are PocketBase's except for
``email_visibility``, ``password_hash`` and ``token_key``.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from psycopg import sql

from tests.conformance.fixtures import FixtureCollection, FixtureField, Fixtures
from tests.conformance.transcript import Write

Statement: TypeAlias = tuple[sql.Composed, dict[str, Any]]
"""SQL and its parameters."""

AUTH_FIELDS = (
    FixtureField(name="email", type="email"),
    FixtureField(name="emailVisibility", type="bool"),
    FixtureField(name="verified", type="bool"),
)
"""The fields of every auth collection in addition to its own, without its secrets."""

HASH_ROUNDS = 4
"""bcrypt's lowest cost, since these passwords are printed in the fixtures."""

_TYPES = {
    "number": "double precision",
    "bool": "boolean",
    "date": "timestamptz",
    "autodate": "timestamptz",
    "geoPoint": "point",
}
"""Of single values; all others are text, and several values are an array of text."""

_ZEROS: dict[str, Any] = {"number": 0, "bool": False, "geoPoint": {"lon": 0, "lat": 0}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """Options in which operators' schemas differ."""

    empty: Literal["null", "zero"]
    """The representation of a value not given.

    Dates, single relations and JSON are NULL in any case.
    """
    json_type: Literal["json", "jsonb"]
    """``jsonb`` reorders members and respells numbers, ``json`` keeps the text."""


class NaturalSchema:
    """Tables for the fixtures, and the SQL that writes to them."""

    def __init__(self, fixtures: Fixtures, style: Style) -> None:
        self._fixtures = fixtures
        self._style = style

    def create(self) -> Iterator[Statement]:
        """Return the SQL of the tables and rows.

        Foreign keys last, so that the order of rows is free.
        """
        yield sql.SQL("CREATE EXTENSION pgcrypto").format(), {}
        for collection in self._fixtures.collections:
            yield self._create_table(collection), {}
            replica = sql.SQL("ALTER TABLE {} REPLICA IDENTITY FULL")
            yield replica.format(sql.Identifier(collection.name)), {}
        for row in self._fixtures.rows:
            collection = self._fixtures.collection(row.collection)
            yield self._insert(collection, str(row.data["id"]), row.data)
        for collection in self._fixtures.collections:
            for field in collection.fields:
                if field.type == "relation" and not field.is_multiple:
                    yield self._foreign_key(collection, field), {}

    def write(self, write: Write) -> Statement:
        """Return the SQL of one change."""
        collection = self._fixtures.collection(write.collection)
        match write.op:
            case "create":
                return self._insert(collection, write.id, write.data)
            case "update":
                return self._update(collection, write.id, write.data)
            case "set_password":
                password = write.password or write.data.get("password") or secrets.token_hex(8)
                return self._update(collection, write.id, {"password": password})
            case "delete":
                statement = sql.SQL("DELETE FROM {} WHERE id = %(id)s")
                return statement.format(sql.Identifier(collection.name)), {"id": write.id}

    def _create_table(self, collection: FixtureCollection) -> sql.Composed:
        columns = [sql.SQL("id text PRIMARY KEY").format()]
        columns += [
            sql.SQL("{} {}").format(sql.Identifier(column_name(field)), self._type(field))
            for field in fields_of(collection)
        ]
        if collection.type == "auth":
            columns.append(sql.SQL("password_hash text, token_key text").format())
        return sql.SQL("CREATE TABLE {} ({})").format(
            sql.Identifier(collection.name), sql.SQL(", ").join(columns)
        )

    def _foreign_key(self, collection: FixtureCollection, field: FixtureField) -> sql.Composed:
        action = "CASCADE" if field.cascade_delete else "SET NULL"
        target = self._fixtures.collection(field.collection_id)
        statement = sql.SQL("ALTER TABLE {} ADD FOREIGN KEY ({}) REFERENCES {} (id) ON DELETE {}")
        return statement.format(
            sql.Identifier(collection.name),
            sql.Identifier(column_name(field)),
            sql.Identifier(target.name),
            sql.SQL(action),
        )

    def _type(self, field: FixtureField) -> sql.SQL:
        if field.is_multiple:
            return sql.SQL("text[]")
        if field.type == "json":
            return sql.SQL(self._style.json_type)
        return sql.SQL(_TYPES.get(field.type, "text"))

    def _insert(
        self, collection: FixtureCollection, record_id: str, data: Mapping[str, Any]
    ) -> Statement:
        columns, values, parameters = self._assignments(
            collection, self._with_empty_values(collection, data), is_new=True
        )
        statement = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
            sql.Identifier(collection.name),
            sql.SQL(", ").join([sql.Identifier("id"), *columns]),
            sql.SQL(", ").join([sql.Placeholder("id"), *values]),
        )
        return statement, {"id": record_id, **parameters}

    def _update(
        self, collection: FixtureCollection, record_id: str, data: Mapping[str, Any]
    ) -> Statement:
        columns, values, parameters = self._assignments(collection, data, is_new=False)
        pairs = [sql.SQL("{} = {}").format(c, v) for c, v in zip(columns, values, strict=True)] or [
            sql.SQL("id = id").format()
        ]
        statement = sql.SQL("UPDATE {} SET {} WHERE id = %(id)s").format(
            sql.Identifier(collection.name), sql.SQL(", ").join(pairs)
        )
        return statement, {"id": record_id, **parameters}

    def _with_empty_values(
        self, collection: FixtureCollection, data: Mapping[str, Any]
    ) -> dict[str, Any]:
        given = {name: value for name, value in data.items() if name != "id"}
        if self._style.empty == "null":
            return given
        empty = {
            field.name: [] if field.is_multiple else _ZEROS.get(field.type, "")
            for field in fields_of(collection)
            if field.type not in ("json", "autodate")
        }
        return empty | given

    def _assignments(
        self, collection: FixtureCollection, data: Mapping[str, Any], *, is_new: bool
    ) -> tuple[list[sql.Identifier], list[sql.Composable], dict[str, Any]]:
        columns: list[sql.Identifier] = []
        values: list[sql.Composable] = []
        parameters: dict[str, Any] = {}
        for field in fields_of(collection):
            if field.type == "autodate":
                if field.on_create if is_new else field.on_update:
                    columns.append(sql.Identifier(column_name(field)))
                    values.append(sql.SQL("clock_timestamp()"))
            elif field.name in data:
                columns.append(sql.Identifier(column_name(field)))
                cast = sql.SQL("{}::{}")
                values.append(cast.format(sql.Placeholder(field.name), self._type(field)))
                parameters[field.name] = _parameter(field, data[field.name])
        if "password" in data:
            columns += [sql.Identifier("password_hash"), sql.Identifier("token_key")]
            hashed = sql.SQL("crypt({}, gen_salt('bf', {}))")
            values.append(hashed.format(sql.Placeholder("password"), sql.Literal(HASH_ROUNDS)))
            values.append(sql.Placeholder("token_key"))
            parameters |= {"password": data["password"], "token_key": secrets.token_hex(25)}
        return columns, values, parameters


def fields_of(collection: FixtureCollection) -> tuple[FixtureField, ...]:
    """Return the fields without id and secrets, including an auth collection's given ones."""
    return (AUTH_FIELDS if collection.type == "auth" else ()) + collection.fields


def column_name(field: FixtureField) -> str:
    """Return the column of a field."""
    return "email_visibility" if field.name == "emailVisibility" else field.name


def _parameter(field: FixtureField, value: Any) -> Any:
    """Return the value as psycopg sends it: text, or a list of texts; the statement casts it."""
    match field.type:
        case "json":
            return None if value is None else json.dumps(value, separators=(",", ":"))
        case "geoPoint":
            return f"({value['lon']},{value['lat']})" if value else None
        case "date" | "relation" if value == "":
            return None  # neither timestamptz nor a foreign key takes an empty text
        case _:
            return value
