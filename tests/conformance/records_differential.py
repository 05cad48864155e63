"""Sends random list and view requests to PocketBase and to the program, and compares the answers.

Both have the data of a ``RandomWorld``: PocketBase in its own tables, the program in tables of the
world's ``Shape``.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.model import Collections
from pgrealtime.config.model import (
    CollectionConfig,
    Config,
    DatabaseConfig,
    FieldsConfig,
    ReadsConfig,
    RecordsConfig,
    RelationConfig,
    ServerConfig,
)
from pgrealtime.errors import RuleError, RuleUnsupportedError
from pgrealtime.rules.sql.reference import check_rule
from pgrealtime.service.build import run_service
from tests.conformance.fixtures import FixtureField, SuperuserAccount
from tests.conformance.http_client import Address, Answer, Request, send
from tests.conformance.issuers import auth_config, signed_token
from tests.conformance.natural_schema import AUTH_FIELDS
from tests.conformance.pocketbase_server import (
    PocketBaseApi,
    PocketBaseServer,
    field_definition,
    pocketbase_binary,
)
from tests.conformance.process import free_port, run
from tests.conformance.random_records import (
    GUEST,
    SUPERUSER,
    RandomCollection,
    RandomWorld,
    ReadRequest,
    RowData,
    Rules,
    Shape,
    ViewColumn,
)
from tests.conformance.records_corpus import difference_of
from tests.conformance.target import RefusedError

ROOT = SuperuserAccount(email="root@example.com", password="1234567890")

_ID_FIELD = {
    "name": "id",
    "type": "text",
    "system": True,
    "primaryKey": True,
    "required": True,
    "pattern": "^[a-z0-9-]+$",
    "autogeneratePattern": "[a-z0-9]{15}",
    "min": 0,
    "max": 0,
}
POCKETBASE_TIMEOUT = 30.0
"""Seconds after which PocketBase ends a query."""
_MAX_CANDIDATES = 50
"""Random rules tried until both servers accept one."""


@dataclass(slots=True)
class Report:
    """Results of a run."""

    alike: int = 0
    excused: Counter[str] = field(default_factory=Counter)
    """Requests that differ, by the reason that is listed."""
    differing: list[str] = field(default_factory=list)
    shown: int = 0
    """Answers with at least one record."""
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        """How many requests were compared."""
        return self.alike + self.excused.total() + len(self.differing)

    def __str__(self) -> str:
        return (
            f"{self.count} requests: {self.alike} alike ({self.shown} with records, statuses "
            f"{dict(self.statuses)}), excused {dict(self.excused)}, {len(self.differing)} differing"
        )


# --- PocketBase


@asynccontextmanager
async def running_pocketbase(world: RandomWorld, directory: Path) -> AsyncIterator[PocketBaseApi]:
    """Run a PocketBase with the world's data in an empty directory."""
    data = directory / "data"
    await run(
        [pocketbase_binary(), "superuser", "upsert", ROOT.email, ROOT.password, f"--dir={data}"]
    )
    server = PocketBaseServer(directory, free_port())
    await server.start()
    try:
        await server.authenticate(ROOT)
        await _create_collections(server.api, world)
        _insert_rows(data / "data.db", world)
        yield server.api
    finally:
        await server.stop()


async def _create_collections(api: PocketBaseApi, world: RandomWorld) -> None:
    await api.call("DELETE", "/api/collections/users")
    tables = [one for one in world.collections.values() if one.type != "view"]
    for with_relations in (False, True):  # a relation needs its target to be there
        described = [_table_definition(one, with_relations=with_relations) for one in tables]
        body = {"collections": described, "deleteMissing": False}
        await api.call("PUT", "/api/collections/import", body)
    for one in world.collections.values():
        if one.type == "view":
            body = {"id": one.id, "name": one.name, "type": "view", "viewQuery": _view_query(one)}
            await api.call("POST", "/api/collections", body)


def _table_definition(table: RandomCollection, *, with_relations: bool) -> dict[str, Any]:
    fields = [
        field_definition(one) | _target_of(one)
        for one in table.fields
        if with_relations or one.type != "relation"
    ]
    return {
        "id": table.id,
        "name": table.name,
        "type": table.type,
        "fields": [_ID_FIELD, *fields],
        "indexes": [_unique_index(table)] if table.unique and with_relations else [],
    }


def _unique_index(table: RandomCollection) -> str:
    name, column = table.name, table.unique
    return f"CREATE UNIQUE INDEX `{name}_{column}` ON `{name}` (`{column}`) WHERE `{column}` <> ''"


def _target_of(one: FixtureField) -> dict[str, Any]:
    if one.type != "relation":
        return {}
    return {"collectionId": f"pbc_{one.collection_id}".ljust(15, "0")}


_CASTS = {"text": "TEXT", "number": "NUMERIC", "bool": "BOOL"}
_ZEROS = {"text": "''", "number": "0", "bool": "FALSE"}


def _view_query(view: RandomCollection) -> str:
    columns = [f'{_view_value(one)} AS "{one.field.name}"' for one in view.columns]
    return f"SELECT s.id AS id, {', '.join(columns)} FROM {_view_tables(view)}"


def _view_value(column: ViewColumn) -> str:
    kind = column.field.type
    match column.form:
        case "plain":
            return f's."{column.source}"'
        case "nullable":
            return f'CAST(NULLIF(s."{column.source}", {_ZEROS[kind]}) AS {_CASTS[kind]})'
        case "joined":
            return f'CAST(o."{column.source}" AS {_CASTS[kind]})'
        case "count":
            # Only a cast has an affinity in SQLite, as a column of a table has.
            return "CAST(count(c.id) AS INT)"


def _view_tables(view: RandomCollection) -> str:
    text = f'"{view.view_of}" s'
    grouped = "s.id"
    relation, other = view.joined
    if relation:
        text += f' LEFT JOIN "{other}" o ON o.id = s."{relation}"'
        grouped += ", o.id"
    counted, by = view.counted
    if counted:
        text += f' LEFT JOIN "{counted}" c ON c."{by}" = s.id'
        text += f" GROUP BY {grouped}"
    return text


def _insert_rows(database: Path, world: RandomWorld) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        for name, rows in world.rows.items():
            for row in rows:
                stored = {column: _stored(value) for column, value in row.items()}
                if world.collections[name].type == "auth":
                    stored |= {"password": "-", "tokenKey": secrets.token_hex(25)}
                columns = ", ".join(f'"{column}"' for column in stored)
                marks = ", ".join("?" for _ in stored)
                statement = f'INSERT INTO "{name}" ({columns}) VALUES ({marks})'
                connection.execute(statement, [*stored.values()])


def _stored(value: Any) -> Any:
    if isinstance(value, dict | list):
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return value


# --- the program


def create_tables(connection: psycopg.Connection, world: RandomWorld) -> None:
    """Load the world's data into an empty database."""
    connection.execute(
        "CREATE COLLATION caseless"
        " (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
    )
    tables = [one for one in world.collections.values() if one.type != "view"]
    for table in tables:
        _create_table(connection, table, world.shape)
    for table in tables:
        for row in world.rows[table.name]:
            _insert_row(connection, table, row, world.shape)
    for table in tables:
        for one in table.fields:
            _link(connection, table, one, world)
    for view in world.collections.values():
        if view.type == "view":
            _create_view(connection, view, world.shape)
    if world.shape.has_other_names:
        connection.execute("CREATE SCHEMA app")
        for collection in world.collections.values():
            _rename(connection, collection, world.shape)


def _create_table(connection: psycopg.Connection, table: RandomCollection, shape: Shape) -> None:
    columns = [sql.SQL("id {} PRIMARY KEY").format(sql.SQL(shape.ids))]
    for one in _own_fields(table):
        if one.type == "select" and shape.select == "enum":
            labels = sql.SQL(", ").join(["", *one.values])
            name = sql.Identifier(_enum_name(table, one))
            connection.execute(sql.SQL("CREATE TYPE {} AS ENUM ({})").format(name, labels))
        if not _has_junction(one, shape):
            type_ = _type(table, one, shape) + sql.SQL(_collation(one, shape))
            unique = sql.SQL(" UNIQUE" if one.name == table.unique else "")
            columns.append(sql.SQL("{} {}").format(sql.Identifier(one.name), type_) + unique)
    create = sql.SQL("CREATE TABLE {} ({})")
    connection.execute(create.format(sql.Identifier(table.name), sql.SQL(", ").join(columns)))
    full = sql.SQL("ALTER TABLE {} REPLICA IDENTITY FULL")
    connection.execute(full.format(sql.Identifier(table.name)))


_TEXT_TYPES = ("text", "editor", "url", "email", "file")


def _collation(one: FixtureField, shape: Shape) -> str:
    if one.type not in _TEXT_TYPES or one.is_multiple:
        return ""
    return {"icu": ' COLLATE "und-x-icu"', "caseless": " COLLATE caseless"}.get(shape.text, "")


def _own_fields(table: RandomCollection) -> tuple[FixtureField, ...]:
    return (AUTH_FIELDS if table.type == "auth" else ()) + table.fields


def _has_junction(one: FixtureField, shape: Shape) -> bool:
    return one.type == "relation" and one.is_multiple and shape.lists == "junction"


def _junction_name(table: str, one: FixtureField) -> str:
    return f"{table}_{one.name}"


def _enum_name(table: RandomCollection, one: FixtureField) -> str:
    return f"{table.name}_{one.name}_option"


def _type(table: RandomCollection, one: FixtureField, shape: Shape) -> sql.Composable:
    single: sql.Composable
    match one.type:
        case "number":
            single = sql.SQL(shape.number)
        case "bool":
            single = sql.SQL("boolean")
        case "date":
            single = sql.SQL(shape.date)
        case "json":
            single = sql.SQL(shape.json)
        case "geoPoint":
            single = sql.SQL(shape.geo)
        case "relation":
            single = sql.SQL(shape.ids)
        case "select" if shape.select == "enum":
            single = sql.Identifier(_enum_name(table, one))
        case _:
            single = sql.SQL("varchar" if shape.text == "varchar" else "text")
    return single + sql.SQL("[]") if one.is_multiple else single


def _insert_row(
    connection: psycopg.Connection, table: RandomCollection, row: RowData, shape: Shape
) -> None:
    fields = [one for one in _own_fields(table) if not _has_junction(one, shape)]
    names = [sql.Identifier("id"), *(sql.Identifier(one.name) for one in fields)]
    casts = [sql.SQL(shape.ids), *(_type(table, one, shape) for one in fields)]
    values = [row["id"], *(_sent(one, row[one.name], shape) for one in fields)]
    connection.execute(
        sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
            sql.Identifier(table.name),
            sql.SQL(", ").join(names),
            sql.SQL(", ").join([sql.SQL("%s::{}").format(cast) for cast in casts]),
        ),
        values,
    )


def _sent(one: FixtureField, value: Any, shape: Shape) -> Any:
    match one.type:
        case "geoPoint" if shape.geo == "point":
            return f"({value['lon']},{value['lat']})"
        case "geoPoint":
            return json.dumps(value)
        case "date" | "relation" if value == "":
            return None
        case _:
            return value


def _link(
    connection: psycopg.Connection, table: RandomCollection, one: FixtureField, world: RandomWorld
) -> None:
    """Create a relation's junction table, or its foreign key."""
    if one.type != "relation":
        return
    target = sql.Identifier(one.collection_id)
    if _has_junction(one, world.shape):
        junction = sql.Identifier(_junction_name(table.name, one))
        connection.execute(
            sql.SQL(
                "CREATE TABLE {0} (source {1} REFERENCES {2}, target {1} REFERENCES {3},"
                " PRIMARY KEY (source, target))"
            ).format(junction, sql.SQL(world.shape.ids), sql.Identifier(table.name), target)
        )
        insert = sql.SQL("INSERT INTO {0} VALUES (%s::{1}, %s::{1})")
        statement = insert.format(junction, sql.SQL(world.shape.ids))
        for row in world.rows[table.name]:
            for related in row[one.name]:
                connection.execute(statement, [row["id"], related])
    elif not one.is_multiple and world.shape.has_foreign_keys:
        connection.execute(
            sql.SQL("ALTER TABLE {} ADD FOREIGN KEY ({}) REFERENCES {}").format(
                sql.Identifier(table.name), sql.Identifier(one.name), target
            )
        )


def _create_view(connection: psycopg.Connection, view: RandomCollection, shape: Shape) -> None:
    columns = [
        f'{_view_sql(one)} AS "{one.field.name}"'
        for one in view.columns
        if not _has_junction(one.field, shape)
    ]
    query = f"SELECT s.id AS id, {', '.join(columns) or '1 AS one'} FROM {_view_tables(view)}"
    kind = {"view": "VIEW", "materialized": "MATERIALIZED VIEW", "table": "TABLE"}[shape.views]
    connection.execute(f"CREATE {kind} {view.name} AS {query}".encode())
    if shape.views == "materialized":
        connection.execute(f"CREATE UNIQUE INDEX ON {view.name} (id)".encode())
    if shape.views == "table":
        connection.execute(f"ALTER TABLE {view.name} ADD PRIMARY KEY (id)".encode())


def _view_sql(column: ViewColumn) -> str:
    match column.form:
        case "nullable":
            return f'NULLIF(s."{column.source}", {_ZEROS[column.field.type]})'
        case "joined":
            return f'o."{column.source}"'
        case _:
            return _view_value(column)


def _rename(connection: psycopg.Connection, one: RandomCollection, shape: Shape) -> None:
    table, renamed = sql.Identifier(one.name), sql.Identifier(_table_name(one, shape)[1])
    column_names = {_key_name(shape): "id", **_renamed_columns(one, shape)}
    for column, field_name in column_names.items():
        rename = sql.SQL("ALTER TABLE {} RENAME COLUMN {} TO {}")
        connection.execute(rename.format(table, sql.Identifier(field_name), sql.Identifier(column)))
    connection.execute(sql.SQL("ALTER TABLE {} RENAME TO {}").format(table, renamed))
    connection.execute(sql.SQL("ALTER TABLE {} SET SCHEMA app").format(renamed))


def _table_name(one: RandomCollection, shape: Shape) -> tuple[str, str]:
    return ("app", f"{one.name}_rows") if shape.has_other_names else ("public", one.name)


def _key_name(shape: Shape) -> str:
    return "Key" if shape.has_other_names else "id"


def _renamed_columns(one: RandomCollection, shape: Shape) -> dict[str, str]:
    """Return the fields by columns that are called otherwise."""
    if not shape.has_other_names:
        return {}
    return {f"{own.name}_c": own.name for own in one.fields if not _has_junction(own, shape)}


def configured(
    world: RandomWorld, rules: Mapping[str, Rules] | None = None
) -> dict[str, CollectionConfig]:
    """Return the configuration of the world's collections; without rules all is readable."""
    public = Rules(list="", view="", manage=None)
    return {
        name: _configured(one, world.shape, public if rules is None else rules[name])
        for name, one in world.collections.items()
    }


def _configured(one: RandomCollection, shape: Shape, rules: Rules) -> CollectionConfig:
    return CollectionConfig(
        table=".".join(_table_name(one, shape)),
        type="auth" if one.type == "auth" else "base",
        id=_key_name(shape),
        stream=one.type != "view",
        collection_id=one.id,
        fields=FieldsConfig(
            rename=_renamed_columns(one, shape),
            hide=tuple(own.name for own in one.fields if own.hidden),
            types={
                own.name: own.type
                for own in one.fields
                if own.type in ("geoPoint", "file")
                or (own.type == "select" and not own.is_multiple)
            },
        ),
        relations={
            own.name: _relation(one, own, shape) for own in one.fields if own.type == "relation"
        },
        list_rule=rules.list,
        view_rule=rules.view,
        manage_rule=rules.manage,
    )


def _relation(one: RandomCollection, own: FixtureField, shape: Shape) -> RelationConfig:
    if not _has_junction(own, shape):
        return RelationConfig(collection=own.collection_id)
    return RelationConfig(
        collection=own.collection_id,
        through=f"public.{_junction_name(one.view_of or one.name, own)}",
        source="source",
        target="target",
    )


@asynccontextmanager
async def serving(
    world: RandomWorld, database_url: str, rules: Mapping[str, Rules]
) -> AsyncIterator[Address]:
    """Run the program with these rules."""
    config = Config(
        database=DatabaseConfig(url=database_url),
        server=ServerConfig(host="127.0.0.1", port=0),
        records=RecordsConfig(nulls="zero", hidden="pocketbase"),
        reads=ReadsConfig(statement_timeout=POCKETBASE_TIMEOUT),
        auth=auth_config(name for name, one in world.collections.items() if one.type == "auth"),
        collections=configured(world, rules),
    )
    async with run_service(config) as service:
        yield Address(host="127.0.0.1", port=service.port)


def _token_here(caller: str) -> str:
    if caller == SUPERUSER:
        return signed_token("people", "root", role="admin")
    return signed_token(*caller.split("/"))


# --- both


class RecordsDuel:
    """Both servers with the same data."""

    def __init__(
        self, world: RandomWorld, api: PocketBaseApi, database_url: str, collections: Collections
    ) -> None:
        self._world = world
        self._api = api
        self._database_url = database_url
        self._collections = collections
        self._tokens = {SUPERUSER: api.token}
        self._sent = 0
        self.report = Report()

    async def compare(self, count: int) -> None:
        """Draw rules, and compare the answers to so many requests under them."""
        self._world.begin_rules()
        rules = {name: await self._draw_rules(name) for name in self._world.collections}
        async with serving(self._world, self._database_url, rules) as address:
            for _ in range(count):
                await self._compare_request(self._world.request(), address, rules)

    async def _draw_rules(self, name: str) -> Rules:
        world, is_auth = self._world, self._world.collections[name].type == "auth"
        return Rules(
            list=await self._draw_rule(name, "listRule", world.rule),
            view=await self._draw_rule(name, "viewRule", world.view_rule),
            manage=await self._draw_rule(name, "manageRule", world.manage_rule)
            if is_auth
            else None,
        )

    async def _draw_rule(
        self, name: str, kind: str, draw: Callable[[str], str | None]
    ) -> str | None:
        """Set a random rule in PocketBase that both accept; return it."""
        for _ in range(_MAX_CANDIDATES):
            rule = draw(name)
            try:
                await self._api.call("PATCH", f"/api/collections/{name}", {kind: rule})
                is_accepted = True
            except RefusedError:
                is_accepted = False
            error = self._refusal(name, rule)
            if is_accepted and error is None:
                return rule
            if is_accepted == (error is None) or isinstance(error, RuleUnsupportedError):
                continue
            self.report.differing.append(
                f"{name}.{kind} = {rule!r}: accepted {is_accepted}, here {error!r}"
            )
        raise AssertionError("no random rule is accepted")

    def _refusal(self, name: str, rule: str | None) -> RuleError | None:
        try:
            if rule:
                check_rule(self._collections, self._collections[name], rule)
        except RuleError as error:
            return error
        return None

    async def _compare_request(
        self, asked: ReadRequest, address: Address, rules: Mapping[str, Rules]
    ) -> None:
        request = await self._request(asked, self._token_there)
        began = time.monotonic()
        theirs = await send(request, self._api.address)
        seconds = time.monotonic() - began
        ours = await send(await self._request(asked, self._own_token), address)
        self._sent += 1
        difference = _difference(asked, theirs, ours)
        if difference is None:
            self.report.alike += 1
            self.report.statuses[ours.head.status] += 1
            self.report.shown += b'"id":' in ours.body
        elif (reason := _excuse(_Exchange(asked, theirs, ours, seconds))) is not None:
            self.report.excused[reason] += 1
        else:
            self.report.differing.append(
                f"{asked.caller} {asked.method} {asked.collection} {asked.record_id} "
                f"{dict(asked.query)} {dict(asked.headers)} {asked.body!r}\n"
                f"  {dict(rules)}\n  {difference}"
            )

    async def _request(self, asked: ReadRequest, token_of: Callable[[str], Any]) -> Request:
        token = await token_of(asked.caller) if asked.caller != GUEST else ""
        headers = dict(asked.headers)
        if token:
            headers["Authorization"] = token
        if asked.body:
            headers["Content-Type"] = "application/json"
        # Lists without items are delayed, by address.
        source = f"127.1.{self._sent // 250 % 250}.{self._sent % 250 + 1}"
        return Request(
            method=asked.method,
            path=asked.path,
            headers=headers,
            body=asked.body,
            source_ip=source,
        )

    async def _token_there(self, caller: str) -> str:
        if caller not in self._tokens:
            name, record_id = caller.split("/")
            self._tokens[caller] = await self._api.impersonate(name, record_id, 3600)
        return self._tokens[caller]

    async def _own_token(self, caller: str) -> str:
        return _token_here(caller)


def _difference(
    asked: ReadRequest, theirs: Answer, ours: Answer, *, order: str | None = None
) -> str | None:
    order = order or asked.order
    case = {
        "response": {"status": theirs.head.status, "body": theirs.body.decode()},
        "order": None if order == "total" else order,
    }
    return difference_of(case, ours)


@dataclass(frozen=True, slots=True)
class _Exchange:
    """A request and its two answers."""

    asked: ReadRequest
    theirs: Answer
    ours: Answer
    seconds: float
    """That PocketBase took."""


def _sorts_by_unordered_rows(exchange: _Exchange) -> bool:
    asked, theirs, ours = exchange.asked, exchange.theirs, exchange.ours
    sort = asked.query.get("sort", "")
    if "_via_" not in sort and "@collection." not in sort:
        return False
    if theirs.head.status != HTTPStatus.OK or ours.head.status != HTTPStatus.OK:
        return False
    if _difference(asked, theirs, ours, order="any") is None:
        return True
    pages = [json.loads(answer.body) for answer in (theirs, ours)]
    sizes = [len(page.pop("items")) for page in pages]
    is_part = pages[0]["totalItems"] < 0 or sizes[0] < pages[0]["totalItems"]
    return is_part and sizes[0] == sizes[1] and pages[0] == pages[1]


def _took_too_long(exchange: _Exchange) -> bool:
    is_refused = exchange.theirs.head.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND)
    return is_refused and exchange.seconds > POCKETBASE_TIMEOUT


EXCUSES: Mapping[str, Callable[[_Exchange], bool]] = {
    # SQLite makes an index while it joins, and so takes the row whose columns come first; here it
    # is the first row in the collection's default order. A whole list must still have the same
    # records, a page as many of them.
    "which of several rows is the first of a back relation is up to SQLite's plan": (
        _sorts_by_unordered_rows
    ),
    "PocketBase ended its query, which took too long": _took_too_long,
}
"""Why answers may differ, and which."""


def _excuse(exchange: _Exchange) -> str | None:
    return next((why for why, is_so in EXCUSES.items() if is_so(exchange)), None)


@asynccontextmanager
async def duelling(
    world: RandomWorld, database_url: str, directory: Path
) -> AsyncIterator[RecordsDuel]:
    """Start PocketBase with the world's data, and load it into an empty database."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        create_tables(connection, world)
    async with await psycopg.AsyncConnection.connect(database_url) as reading:
        catalog = await read_catalog(reading, schemas=["public", "app"])
    collections = build_collections(configured(world), catalog)
    async with running_pocketbase(world, directory) as api:
        yield RecordsDuel(world, api, database_url, collections)
