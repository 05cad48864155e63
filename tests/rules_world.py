"""A small database with relations of every kind, random rules over it and random subscribers.

The engine's verdicts there are compared with the reference query of each subscriber.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import psycopg
from psycopg import sql

from pgrealtime.auth.principal import GUEST, AuthRecord, Principal, Superuser
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.catalog.model import Table
from pgrealtime.changes import Change, Delete, Insert, Row, Truncate, Update, WholeRow
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.model import Collections
from pgrealtime.collections.streamed_tables import reachable_tables
from pgrealtime.config.model import CollectionConfig, RelationConfig

SCHEMA = """
CREATE TABLE teams (id text PRIMARY KEY, name text, open boolean);
CREATE TABLE users (
  id text PRIMARY KEY, name text, email text, "emailVisibility" boolean, level int, role text,
  team text, badges text[]
);
CREATE TABLE projects (id text PRIMARY KEY, name text, owner text, status text, budget numeric);
CREATE TABLE members (
  id text PRIMARY KEY, project text, "user" text COLLATE "und-x-icu", role text, score float8
);
CREATE INDEX ON members (project);
CREATE TABLE labels (id text PRIMARY KEY, name text);
CREATE TABLE post_labels (post text, label text, PRIMARY KEY (post, label));
CREATE TABLE posts (
  id text PRIMARY KEY, author text, reviewer text, project text, status text,
  title text COLLATE "und-x-icu", views int, rating float8, public boolean,
  created timestamptz, reviewers text[], tags text[], doc jsonb
);
"""

USERS = [f"u{n}" for n in range(6)]
TEAMS = ["t0", "t1", "t2"]
PROJECTS = ["p0", "p1", "p2", "p3"]
LABELS = ["l0", "l1", "l2"]
STATUSES = ["pub", "draft", "Pub", "", "gone"]
TITLES = ["Hello", "hello world", "a_b", "100%", "5", "", "É", "x\\y", "u1"]


def configuration() -> dict[str, CollectionConfig]:
    """Return the tables as collections; all are listable."""

    def table(name: str, **relations: RelationConfig) -> CollectionConfig:
        return CollectionConfig(table=f"public.{name}", list_rule="", relations=relations)

    def to(name: str) -> RelationConfig:
        return RelationConfig(collection=name)

    users = CollectionConfig(
        table="public.users", type="auth", list_rule="", relations={"team": to("teams")}
    )
    labels = RelationConfig(
        collection="labels", through="public.post_labels", source="post", target="label"
    )
    return {
        "teams": table("teams"),
        "users": users,
        "projects": table("projects", owner=to("users")),
        "members": table("members", project=to("projects"), user=to("users")),
        "labels": table("labels"),
        "posts": table(
            "posts",
            author=to("users"),
            reviewer=to("users"),
            project=to("projects"),
            reviewers=to("users"),
            labels=labels,
        ),
    }


async def read_collections(url: str) -> Collections:
    """Return the collections as the service would build them."""
    async with await psycopg.AsyncConnection.connect(url) as connection:
        catalog = await read_catalog(connection, schemas=["public"])
    return build_collections(configuration(), catalog)


class World:
    """The database, filled at random; ``chance`` decides all content."""

    def __init__(self, url: str, chance: Random) -> None:
        self.url = url
        self.chance = chance
        pins = "-c DateStyle=ISO -c TimeZone=UTC -c extra_float_digits=1 -c search_path=pg_catalog"
        with psycopg.connect(url, autocommit=True) as setup:
            setup.execute(SCHEMA.encode())
            self._fill(setup)
        self.connection = psycopg.connect(url, autocommit=True, options=pins)
        self.collections = asyncio.run(read_collections(url))

    def _fill(self, setup: psycopg.Connection) -> None:
        chance = self.chance
        cursor = setup.cursor()
        cursor.executemany(
            "INSERT INTO teams VALUES (%s, %s, %s)",
            [
                (team, chance.choice([*TITLES, None]), chance.choice([True, False, None]))
                for team in TEAMS
            ],
        )
        cursor.executemany(
            "INSERT INTO users VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
            [
                (
                    *(user, chance.choice([*TITLES, None]), f"{user}@example.com"),
                    *(chance.random() < 0.5, chance.choice([0, 1, 5, None])),
                    *(chance.choice(["admin", "editor", "", None]), self.maybe([*TEAMS, "none"])),
                    self.some(["gold", "red", ""]),
                )
                for user in USERS[:-1]  # the last one has no row
            ],
        )
        cursor.executemany(
            "INSERT INTO projects VALUES (%s, %s, %s, %s, %s)",
            [
                (
                    *(project, chance.choice(TITLES), self.maybe(USERS), self.maybe(STATUSES)),
                    chance.choice(["0", "1.50", "1000", None]),
                )
                for project in PROJECTS[:-1]
            ],
        )
        cursor.executemany(
            "INSERT INTO members VALUES (%s, %s, %s, %s, %s)",
            [
                (
                    *(f"m{n}", self.maybe(PROJECTS), self.maybe(USERS)),
                    *(self.maybe(["admin", "editor", ""]), chance.choice([0.0, 1.0, 5.5, None])),
                )
                for n in range(14)
            ],
        )
        cursor.executemany(
            "INSERT INTO labels VALUES (%s, %s)", [(one, chance.choice(TITLES)) for one in LABELS]
        )
        cursor.executemany(
            "INSERT INTO post_labels VALUES (%s, %s)",
            [(f"r{n}", one) for n in range(8) for one in LABELS if chance.random() < 0.4],
        )

    def maybe(self, values: Sequence[str]) -> str | None:
        """Return one of the values, the empty text or NULL."""
        return self.chance.choice([*values, *values, "", None])

    def some(self, values: Sequence[str]) -> list[str] | None:
        """Return a list of some of the values."""
        count = self.chance.randint(0, 3)
        return None if self.chance.random() < 0.1 else self.chance.choices(values, k=count)

    def post(self) -> Row:
        """Return a row image of ``posts``, as the stream has it."""
        chance = self.chance
        return {
            "id": f"r{chance.randint(0, 9)}",
            "author": self.maybe(USERS),
            "reviewer": self.maybe(USERS),
            "project": self.maybe(PROJECTS),
            "status": self.maybe(STATUSES),
            "title": chance.choice([*TITLES, None]),
            "views": chance.choice(["0", "1", "5", "10", "-3", None]),
            "rating": chance.choice(["0", "1.5", "5", "NaN", "Infinity", None]),
            "public": chance.choice(["t", "f", None]),
            "created": chance.choice(
                ["2024-01-02 03:04:05.678901+00", "2025-01-01 00:00:00+00", "infinity", None]
            ),
            "reviewers": _array(self.some(USERS)),
            "tags": _array(self.some(["news", "u1", "", "5"])),
            "doc": chance.choice(['{"a": 1}', '{"a": "u1", "b": {"c": true}}', "[]", None]),
        }

    def principal(self) -> Principal:
        """Return a principal; a user without a row is not authenticated."""
        user = self.chance.choice([*USERS[:-1], *USERS[:-1], "guest", "super"])
        if user == "guest":
            return GUEST
        if user == "super":
            return Superuser("root")
        return AuthRecord(
            collection_id=self.collections["users"].id,
            collection_name="users",
            id=user,
            email=f"{user}@example.com",
            verified=user in {"u1", "u3"},
        )

    def own_row(self, principal: Principal) -> Row | None:
        """Return the principal's own row, if it has one."""
        if not isinstance(principal, AuthRecord):
            return None
        rows = self.rows(self.collections["users"].table)
        return next((row for row in rows if row["id"] == principal.id), None)

    def rows(self, table: Table) -> list[Row]:
        """Return all rows of a table, in the text forms of the stream."""
        names = [column.name for column in table.columns]
        query = sql.SQL("SELECT {} FROM {}").format(
            sql.SQL(", ").join(map(sql.Identifier, names)), sql.Identifier(*table.name)
        )
        result = self.connection.execute(query).pgresult
        assert result is not None
        return [
            {
                name: None if (raw := result.get_value(place, n)) is None else raw.decode()
                for n, name in enumerate(names)
            }
            for place in range(result.ntuples)
        ]

    def refill(self) -> None:
        """Replace the rows of the related tables."""
        with psycopg.connect(self.url, autocommit=True) as setup:
            setup.execute("TRUNCATE teams, users, projects, members, labels, post_labels")
            self._fill(setup)

    def transaction(self) -> list[Change]:
        """Change related rows at random, in one commit; return what the stream would bring."""
        changes: list[Change] = []
        tables = [
            table
            for name, table in reachable_tables(self.collections).items()
            if name.name != "posts"
        ]
        with psycopg.connect(self.url) as writing:
            for _ in range(self.chance.randint(3, 12)):
                changes += self._change(writing, self.chance.choice(tables), changes)
        return changes

    def _change(
        self, writing: psycopg.Connection, table: Table, before: Sequence[Change]
    ) -> Iterator[Change]:
        chance = self.chance
        rows = self._rows_now(table, before)
        if not rows or chance.random() < 0.2:
            return
        key, old_row = chance.choice(list(rows.items()))
        where = sql.SQL(" AND ").join(
            sql.SQL("{} = %s").format(sql.Identifier(name)) for name in table.primary_key
        )
        name = sql.Identifier(*table.name)
        drawn = chance.random()
        if drawn < 0.5:
            writing.execute(sql.SQL("DELETE FROM {} WHERE {}").format(name, where), key)
            yield Delete(table.name, WholeRow(old_row))
            if drawn < 0.1:
                yield self._insert(writing, table, old_row)
            return
        other = chance.choice(list(rows.values()))
        free = [one.name for one in table.columns if one.name not in table.primary_key]
        if not free:
            return
        new = {**old_row, **{one: other[one] for one in free if chance.random() < 0.7}}
        given = sql.SQL(", ").join(sql.SQL("{} = %s").format(sql.Identifier(one)) for one in free)
        writing.execute(
            sql.SQL("UPDATE {} SET {} WHERE {}").format(name, given, where),
            [*(new[one] for one in free), *key],
        )
        yield Update(table.name, new, WholeRow(old_row))
        if drawn > 0.9 and table.name.name in {"members", "projects"}:
            yield self._insert(writing, table, {**new, "id": f"n{chance.randrange(10**9)}"})

    def _rows_now(
        self, table: Table, before: Sequence[Change]
    ) -> dict[tuple[str | None, ...], Row]:
        """Return the table's rows as the transaction itself has them by now."""
        rows = {self._key(table, row): row for row in self.rows(table)}
        for change in before:
            if change.table == table.name:
                match change:
                    case Delete(old=old):
                        rows.pop(self._key(table, old.row), None)
                    case Update(new=new) | Insert(new=new):
                        rows[self._key(table, new)] = new
                    case Truncate():
                        rows.clear()
        return rows

    def _insert(self, writing: psycopg.Connection, table: Table, row: Row) -> Insert:
        holes = sql.SQL(", ").join(sql.SQL("%s") for _ in row)
        writing.execute(
            sql.SQL("INSERT INTO {} VALUES ({})").format(sql.Identifier(*table.name), holes),
            list(row.values()),
        )
        return Insert(table.name, row)

    def _key(self, table: Table, row: Row) -> tuple[str | None, ...]:
        return tuple(row[name] for name in table.primary_key)

    def rule(self, *, related: float = 0.3, depth: int = 3) -> str:
        """Return a random rule.

        Args:
            related: How many of its comparisons read related rows.
            depth: Maximum nesting of brackets.
        """
        return _Rules(self.chance, is_filter=False, related=related).expression(depth)

    def filter(self) -> str:
        """Return a random client filter, whose literals vary more than its form."""
        return _Rules(self.chance, is_filter=True).expression(2)


def _array(items: list[str] | None) -> str | None:
    if items is None:
        return None
    return "{" + ",".join(f'"{item}"' for item in items) + "}"


OWN = [
    *("author", "author", "author", "reviewer", "status", "title", "views", "rating", "public"),
    *("created", "reviewers", "tags", "doc.a", "doc.b.c", "project", "id", "title:lower"),
    *("tags:each", "reviewers:each", "tags:length", "author.id", "project.id"),
]
RELATED = [
    *("author.name", "author.level", "author.team", "author.team.name", "reviewer.role"),
    *("project.status", "project.owner", "project.budget", "project.owner.team.open"),
    *("reviewers.name", "reviewers.level", "reviewers.id", "labels", "labels.name", "labels.id"),
    *("project.members_via_project.user", "project.members_via_project.role"),
    *("project.members_via_project.score", "project.members_via_project.user.team"),
    *("labels:each", "labels:length", "reviewers.badges:each"),
    *("@collection.members.user", "@collection.members.project", "@collection.members.role"),
]
REQUESTED = [
    *("@request.auth.id", "@request.auth.id", "@request.auth.id", "@request.auth.verified"),
    *("@request.auth.email", "@request.query.q", "@request.query.q", "@request.query.missing"),
    *("@request.auth.role", "@request.auth.team", "@request.auth.level", "@request.auth.name"),
    *("@request.auth.team.name", "@request.auth.badges:each", "@request.auth.collectionName"),
    *("@request.headers.x_key", "@now", "@year"),
]
LITERALS = [
    *("'pub'", "'u1'", "''", "'hel'", "'5'", "5", "0", "1", "true", "false", "null", "'t1'"),
    *("'%l%'", "'2024-06'", "'editor'", "1.5", "-3", "'a_b'", "'[\"u1\"]'"),
]
OPERATORS = ["=", "=", "=", "=", "!=", "~", "!~", "<", ">=", ">", "<="]


@dataclass(frozen=True)
class _Rules:
    chance: Random
    is_filter: bool
    related: float = 0.3

    def expression(self, depth: int) -> str:
        chance = self.chance
        if depth == 0 or chance.random() < 0.35:
            return self._comparison()
        join = chance.choice([" && ", " && ", " || "])
        parts = [self.expression(depth - 1) for _ in range(chance.randint(2, 3))]
        return "(" + join.join(parts) + ")"

    def _comparison(self) -> str:
        chance = self.chance
        path, is_multiple = self._path()
        sign = "?" if is_multiple and chance.random() < 0.7 else ""
        op = chance.choice(OPERATORS)
        left, right = path, self._other()
        if chance.random() < 0.1:
            left, right = right, left
        return f"{left} {sign}{op} {right}"

    def _path(self) -> tuple[str, bool]:
        chance = self.chance
        if chance.random() < 0.1 and not self.is_filter:
            path = chance.choice(REQUESTED)
        elif chance.random() < self.related:
            path = chance.choice(RELATED)
        else:
            path = chance.choice(OWN)
        if self.is_filter and path.startswith("@"):
            path = "title"
        marks = ("members", "labels", "reviewers.", "each")
        return path, any(mark in path for mark in marks)

    def _other(self) -> str:
        chance = self.chance
        drawn = chance.random()
        if drawn < 0.5 and not self.is_filter:
            return chance.choice(REQUESTED)
        if drawn < 0.1:
            return chance.choice(OWN)
        return chance.choice(LITERALS)
