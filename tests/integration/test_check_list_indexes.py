"""``pgrealtime check`` names the index that a list rule and the default order need together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.cli.check.list_indexes import list_index_warnings
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.model import Collections
from pgrealtime.config.model import Config
from pgrealtime.reads.compiler import ListCompiler
from pgrealtime.rules.language.request import RuleRequest
from tests.integration.test_check import Operator
from tests.integration.test_check_warnings import check, warnings

_SCHEMA = """
    CREATE TABLE users (id text PRIMARY KEY, team int);
    CREATE TABLE tasks (
      id uuid PRIMARY KEY DEFAULT gen_random_uuid(), owner text REFERENCES users, tag text,
      created timestamptz NOT NULL, due date, open bool NOT NULL, rank int NOT NULL
    );
    CREATE TABLE logs (id bigint PRIMARY KEY, owner text, number int, at timestamptz NOT NULL);
    INSERT INTO users SELECT 'u' || n, n FROM generate_series(1, 20) n;
    INSERT INTO tasks (owner, tag, created, due, open, rank)
      SELECT 'u' || 1 + n % 20, 'tag', now() - n * interval '1 minute', now(), n % 2 = 0, n % 50
      FROM generate_series(1, 20000) n ORDER BY random();
    INSERT INTO logs SELECT n, 'u' || 1 + n % 20, n % 500, now() FROM generate_series(1, 20000) n;
    ANALYZE users, tasks, logs;
    ALTER TABLE tasks REPLICA IDENTITY FULL; ALTER TABLE logs REPLICA IDENTITY FULL;
"""

ME = "@request.auth.id"
SOMEBODY = f'{ME} != ""'
MINE = f"{SOMEBODY} && owner = {ME}"


@pytest.fixture
def operator(database_url: str, tmp_path: Path) -> Operator:
    with psycopg.connect(database_url) as connection:
        connection.execute(_SCHEMA.encode())
    return Operator(tmp_path / "pgrealtime.yaml", database_url)


def configured(table: str, rule: str | None, order: list[str]) -> dict[str, Any]:
    served = {"table": table, "list_rule": rule, "order": order}
    return {"users": {"table": "users", "type": "auth"}, table: served}


def run(operator: Operator, statement: str) -> None:
    with psycopg.connect(operator.url, autocommit=True) as connection:
        connection.execute(statement.encode())


async def built(url: str, collections: dict[str, Any]) -> Collections:
    config = Config.model_validate({"collections": collections})
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        catalog = await read_catalog(connection, schemas=["public"])
    return build_collections(config.collections, catalog)


async def lacking(operator: Operator, collections: dict[str, Any]) -> list[str]:
    """Return the indexes that are named; each is about a list."""
    resolved = await built(operator.url, collections)
    async with await psycopg.AsyncConnection.connect(operator.url, autocommit=True) as connection:
        found = [w async for w in list_index_warnings(connection, resolved)]
    assert all(one.path.endswith(".list_rule") for one in found)
    return [one.hint for one in found]


async def scans_and_sorts(url: str, name: str, collections: dict[str, Any]) -> set[str]:
    """Return the kinds of nodes by which PostgreSQL reads a first page, as it likes best."""
    resolved = await built(url, collections)
    users, collection = resolved["users"], resolved[name]
    caller = AuthRecord(collection_id=users.id, collection_name="users", id="u7")
    request = RuleRequest(principal=caller, context="default")
    compiler = ListCompiler(resolved)
    bound = await compiler.bind(collection, collection.list_rule or "", request)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        explained = await connection.execute(
            f"EXPLAIN (FORMAT JSON) {bound.sql.page}".encode(),
            {**bound.params, "limit": 30, "offset": 0},
        )
        ((plan,),) = await explained.fetchall()
    return {*_kinds(plan[0]["Plan"])}


def _kinds(node: dict[str, Any]) -> Iterator[str]:
    """Yield the kind of each node; of a scan also if it drops rows of other owners."""
    yield node["Node Type"]
    if "owner" in node.get("Filter", ""):
        yield "others' rows"
    for below in node.get("Plans", ()):
        yield from _kinds(below)


TASKS, LOGS = 'CREATE INDEX ON "public"."tasks"', 'CREATE INDEX ON "public"."logs"'


@pytest.mark.parametrize(
    ("table", "rule", "order", "index"),
    [
        ("tasks", MINE, [], f'{TASKS} ("owner", "created", "id");'),
        ("tasks", "", [], f'{TASKS} ("created", "id");'),
        ("tasks", "open = true", [], f'{TASKS} ("created", "id");'),
        ("tasks", f"open = true || ({MINE})", [], f'{TASKS} ("created", "id");'),
        ("tasks", "owner.team > 3", [], f'{TASKS} ("created", "id");'),
        ("tasks", f"{ME} = owner && {SOMEBODY}", [], f'{TASKS} ("owner", "created", "id");'),
        ("tasks", MINE, ["-created"], f'{TASKS} ("owner", "created" DESC, "id");'),
        ("tasks", MINE, ["due", "id"], f'{TASKS} ("owner", "due" NULLS FIRST, "id");'),
        ("tasks", MINE, ["-due"], f'{TASKS} ("owner", "due" DESC NULLS LAST, "id");'),
        ("tasks", MINE, ["owner", "rank"], f'{TASKS} ("owner", "rank", "id");'),
        ("tasks", "", ["tag"], f'{TASKS} ("tag" NULLS FIRST, "id");'),
    ],
)
async def test_the_index_ends_the_sort_and_the_warning(
    operator: Operator, table: str, rule: str, order: list[str], index: str
) -> None:
    """PostgreSQL decides: without the index it sorts or reads the table, with it neither."""
    collections = configured(table, rule, order)
    before = await scans_and_sorts(operator.url, table, collections)
    assert {"Sort", "Seq Scan"} & before
    assert await lacking(operator, collections) == [index]

    run(operator, index)

    after = await scans_and_sorts(operator.url, table, collections)
    assert "Index Scan" in after
    assert not {"Sort", "Seq Scan"} & after
    assert await lacking(operator, collections) == []


async def test_the_order_of_the_key_alone_reads_the_rows_of_others(operator: Operator) -> None:
    """The primary key gives the order, and no owner's rows."""
    collections = configured("logs", MINE, [])
    assert "others' rows" in await scans_and_sorts(operator.url, "logs", collections)
    (index,) = await lacking(operator, collections)
    assert index == f'{LOGS} ("owner", "id");'

    run(operator, index)

    after = await scans_and_sorts(operator.url, "logs", collections)
    assert "Index Scan" in after
    assert not {"Sort", "Seq Scan", "others' rows"} & after
    assert await lacking(operator, collections) == []


async def test_the_index_of_a_number_is_named(operator: Operator) -> None:
    """A caller's id that is a number is compared with it as one."""
    collections = configured("logs", f"{SOMEBODY} && number = {ME}", [])

    assert await lacking(operator, collections) == [f'{LOGS} ("number", "id");']

    run(operator, f'{LOGS} ("number", "id")')

    assert await lacking(operator, collections) == []


@pytest.mark.parametrize(
    ("table", "rule", "order"),
    [
        ("tasks", None, []),
        ("logs", "", []),
        ("logs", f"at > '2020' || ({MINE})", []),
        ("logs", f"{SOMEBODY} && id = {ME}", ["at"]),
        ("logs", f"{SOMEBODY} && number:lower = {ME}", []),
        ("tasks", MINE, ["rank"]),
        ("tasks", f"open = true && {MINE}", ["-rank"]),
    ],
    ids=["locked", "key", "or", "one row", "compared as text", "index", "backwards"],
)
async def test_what_an_index_serves_is_not_reported(
    operator: Operator, table: str, rule: str | None, order: list[str]
) -> None:
    """Whatever its columns are called: rows with equal ranks are sorted, as few as they are."""
    run(operator, "CREATE INDEX ON tasks (owner, rank DESC)")

    assert await lacking(operator, configured(table, rule, order)) == []


@pytest.mark.parametrize("index", ["(owner)", "(created, id)", "(owner, created, id) WHERE open"])
async def test_an_index_of_half_of_it_is_not_enough(operator: Operator, index: str) -> None:
    """The rows of one owner among all, or all rows of an owner to be sorted."""
    run(operator, f"CREATE INDEX ON tasks {index}")

    assert await lacking(operator, configured("tasks", MINE, [])) == [
        f'{TASKS} ("owner", "created", "id");'
    ]


async def test_a_table_without_rows_needs_the_same(operator: Operator) -> None:
    """A configuration is checked before there are any."""
    run(operator, "TRUNCATE tasks")
    run(operator, "VACUUM ANALYZE tasks")
    collections = configured("tasks", MINE, [])
    (index,) = await lacking(operator, collections)
    run(operator, index)

    assert await lacking(operator, collections) == []


def test_the_command_names_it_once_unless_there_are_no_lists(operator: Operator) -> None:
    """For callers of each kind it is one index."""
    collections = configured("tasks", MINE, [])

    assert warnings(check(operator, collections)) == [
        (
            "collections.tasks.list_rule",
            'no index of "public.tasks" finds the rows of a list in order',
            f'{TASKS} ("owner", "created", "id");',
        )
    ]
    assert warnings(check(operator, collections, reads={"enabled": False})) == []


async def test_views_have_no_indexes_but_stored_ones_and_partitions_have(
    operator: Operator,
) -> None:
    run(
        operator,
        """
        CREATE VIEW seen AS SELECT * FROM tasks; CREATE MATERIALIZED VIEW kept AS TABLE tasks;
        CREATE TABLE parts (id int PRIMARY KEY, at date NOT NULL) PARTITION BY RANGE (id);
        CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10);
        CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (10) TO (20);
        """,
    )
    read_only = {"id": "id", "stream": False, "list_rule": "", "order": ["created"]}
    collections = {
        "seen": {"table": "seen", **read_only},
        "kept": {"table": "kept", **read_only},
        "parts": {"table": "parts", "list_rule": "", "order": ["at"]},
    }
    needed = await lacking(operator, collections)

    assert needed == [
        'CREATE INDEX ON "public"."kept" ("created" NULLS FIRST, "id" NULLS FIRST);',
        'CREATE INDEX ON "public"."parts" ("at", "id");',
    ]
    for index in needed:
        run(operator, index)
    assert await lacking(operator, collections) == []


@pytest.mark.parametrize("type_", ["uuid", "smallint", "bigint", "varchar(40)"])
async def test_an_owner_of_any_type_of_key(operator: Operator, type_: str) -> None:
    """The caller's id is compared in the key's own type, which an index has."""
    run(
        operator,
        f"""
        CREATE TABLE people (id {type_} PRIMARY KEY);
        CREATE TABLE notes (id int PRIMARY KEY, owner {type_} REFERENCES people);
        """,
    )
    collections = {
        "people": {"table": "people", "type": "auth"},
        "notes": {"table": "notes", "list_rule": MINE},
    }
    (index,) = await lacking(operator, collections)
    assert index == 'CREATE INDEX ON "public"."notes" ("owner", "id");'
    run(operator, index)

    assert await lacking(operator, collections) == []
