"""CPU time per change by the number of subscriptions: `python -m tests.bench.rules`.

Microseconds per change at 1,000 to 1,000,000 subscriptions of which about as many match at every
size, and bytes per subscription. The relation rule needs a server (PGREALTIME_TEST_PG_PORT).

Fails where a gate isn't met: 100,000 subscriptions cost at most 1.5 times what 1,000 do; a change
under the relation rule at most a third of one round trip; a subscription takes at most 400 bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import platform
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from random import Random
from statistics import median

import psycopg

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.catalog.model import Column, ReplicaIdentity, Table, TableKind
from pgrealtime.changes import Row, TableName
from pgrealtime.collections.model import Collection, Collections, Field, FieldKind, Relation
from pgrealtime.hub.connections.connection import Connection, Subscription
from pgrealtime.hub.evaluation.matcher import Matcher
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import LSN, Cursor, Xid
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.protocol.topic import Topic
from pgrealtime.records.encode import View
from pgrealtime.rule_queries.executor import QueryExecutor
from tests.column_types import TEXT, TEXTS
from tests.engine_driving import evaluate_in_process

MATCHES = 10
"""Subscribers that a change matches at each size, for rules with an index path."""
BATCH = 100
SIZES = (1_000, 10_000, 100_000, 1_000_000)
GATE, MEMORY = 1.5, 400

COLUMNS = {
    "posts": {
        **dict.fromkeys(("id", "author", "reviewer", "project", "status", "title"), TEXT),
        "members": TEXTS,
    },
    "projects": dict.fromkeys(("id", "name"), TEXT),
    "members": dict.fromkeys(("id", "project", "user"), TEXT),
    "users": dict.fromkeys(("id", "name"), TEXT),
}
RELATIONS = {
    ("posts", "author"): "users",
    ("posts", "project"): "projects",
    ("members", "project"): "projects",
    ("members", "user"): "users",
}


def collection(name: str, rule: str) -> Collection:
    """A collection over a table in the schema ``bench``."""
    columns = tuple(
        Column(name=column, attribute_number=n, type=type_)
        for n, (column, type_) in enumerate(COLUMNS[name].items(), 1)
    )
    table = Table(
        oid=1,
        name=TableName("bench", name),
        kind=TableKind.TABLE,
        columns=columns,
        primary_key=("id",),
        replica_identity=ReplicaIdentity.FULL,
    )
    fields = tuple(
        Field(
            name=column.name,
            column=column,
            kind=FieldKind.RELATION if (name, column.name) in RELATIONS else FieldKind.TEXT,
            type=column.type,
            is_multiple=column.type is TEXTS,
            is_select=column.type is TEXTS,
            relation=(
                Relation(collection_name=RELATIONS[name, column.name])
                if (name, column.name) in RELATIONS
                else None
            ),
        )
        for column in columns
    )
    return Collection(
        name=name,
        id=f"pbc_{name}",
        type="auth" if name == "users" else "base",
        table=table,
        key=columns[0],
        fields=fields,
        list_rule=rule if name == "posts" else "",
        view_rule="",
    )


@dataclass(frozen=True)
class Case:
    """A rule, its subscribers and the changes."""

    name: str
    rule: str
    filter: Callable[[int, int], str]
    """The filter of the n-th of so many subscribers."""
    has_path: bool = True
    is_counted: bool = True
    """Whether there are few templates, so that the bytes are the subscriptions' own."""
    matches: int = MATCHES
    """Subscribers with the same values."""


def nothing(_n: int, _size: int) -> str:
    return ""


def literal(n: int, size: int) -> str:
    return f"title = 't{n % max(1, size // MATCHES)}'"


FIELDS = ("status", "title", "reviewer", "project")
SIGNS = ("!=", "!~", ">", ">=", "?!=", "?>")


def many(n: int, size: int) -> str:
    """Return one of 10,000 forms, true for every change; neighbours share one."""
    parts = []
    form = n * FORMS // size
    for _ in range(3):
        form, choice = divmod(form, len(FIELDS) * len(SIGNS))
        sign, field = SIGNS[choice % len(SIGNS)], FIELDS[choice // len(SIGNS)]
        literal = "''" if ">" in sign else "'none'"
        parts.append(f"{field} {sign} {literal}")
    return " && ".join(parts)


FORMS = 10_000


CASES = (
    Case("author = A", "author = @request.auth.id", nothing),
    Case("author = A, everybody another", "author = @request.auth.id", nothing, matches=1),
    Case(
        "author = A or reviewer = A",
        "author = @request.auth.id || reviewer = @request.auth.id",
        nothing,
    ),
    Case(
        '(author = A or A in members) and status ~ "pub"',
        "(author = @request.auth.id || members:each ?= @request.auth.id) && status ~ 'pub'",
        nothing,
    ),
    Case("client filter, a literal each", "", literal),
    Case(
        "10,000 different rules and author = A", "author = @request.auth.id", many, is_counted=False
    ),
    Case(
        "title ~ A (tried one by one)",
        "title ~ @request.auth.id",
        nothing,
        has_path=False,
        matches=1,
    ),
)
RELATION = Case(
    "relation: a member of the project",
    "status ~ 'pub' && project.members_via_project.user ?= @request.auth.id",
    nothing,
)


class Nowhere:
    """A sink of connections that are never written to."""

    def write(self, data: bytes) -> None:
        """Nothing is written."""

    def buffered_bytes(self) -> int:
        """Nothing is."""
        return 0

    async def drain(self) -> None:
        """Nothing is to be waited for."""

    def close(self) -> None:
        """Nothing ends."""

    def abort(self) -> None:
        """Nothing ends."""


VIEW = View(sees_hidden=False, sees_email=False, fields=None)


def subscriptions(case: Case, size: int) -> Iterator[tuple[Subscription, AuthRecord]]:
    """Return subscribers of whom about ``MATCHES`` share each value."""
    users = max(1, size // case.matches)
    connection = Connection("c", Nowhere(), address="", epoch="", cursor=Cursor(LSN(0), 0), now=0.0)
    for n in range(size):
        query = {"n": str(n // users)}
        if text := case.filter(n, size):
            query["filter"] = text
        topic = Topic(
            text="posts/*", collection_name_or_id="posts", record_id=None, query=query, headers={}
        )
        person = AuthRecord(collection_id="pbc_users", collection_name="users", id=f"u{n % users}")
        yield Subscription(connection, topic, VIEW, ""), person


def events(users: int, chance: Random, count: int) -> list[Event]:
    """Return changes whose author, reviewer and members are among so many users."""
    posts = collection("posts", "")

    def random_user() -> str:
        return f"u{chance.randrange(users)}"

    rows: list[Row] = [
        {
            "id": f"r{n}",
            "author": random_user(),
            "reviewer": random_user(),
            "project": f"p{chance.randrange(1000)}",
            "status": "published",
            "title": f"t{chance.randrange(users)}",
            "members": "{" + ",".join(random_user() for _ in range(3)) + "}",
        }
        for n in range(count)
    ]
    return [
        Event(posts, "update", row["id"] or "", row, Cursor(LSN(n), 1), Xid(3))
        for n, row in enumerate(rows)
    ]


def filled(case: Case, size: int) -> tuple[Matcher, float]:
    """Return the matcher with all subscribers, and its bytes per subscription.

    Bytes are counted up to 100,000 subscriptions: counting takes longer than adding.
    """
    matcher = Matcher(Collections(tuple(collection(name, case.rule) for name in COLUMNS)))
    given = list(subscriptions(case, size))
    gc.collect()
    is_counted = size <= COUNTED
    if is_counted:
        tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for subscription, person in given:
        matcher.add(subscription, person)
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    gc.freeze()
    KEPT.append(given)
    return matcher, taken / size if is_counted else float("nan")


COUNTED = 100_000


KEPT: list[object] = []


def timed(matcher: Matcher, case: Case, size: int) -> tuple[float, float]:
    """Return microseconds per change, best of some runs, and hits per change."""
    chance = Random(7)
    changes = events(max(1, size // case.matches), chance, BATCH * 5)
    now = datetime.now(UTC)
    best, hits = float("inf"), 0
    runs = 7 if case.has_path else 1
    changes = changes if case.has_path else changes[:5]
    for _ in range(runs):
        hits = 0
        start = time.perf_counter()
        for at in range(0, len(changes), BATCH):
            evaluation = evaluate_in_process(matcher, changes[at : at + BATCH], now)
            hits += sum(len(row.hits) for row in evaluation.rows.values())
        best = min(best, time.perf_counter() - start)
    return best / len(changes) * 1e6, hits / len(changes)


def measure(sizes: Sequence[int]) -> Iterator[str]:
    """Print a line per rule; yield the gates that aren't met."""
    for case in CASES:
        shown: list[str] = []
        times: dict[int, float] = {}
        for size in sizes if case.has_path else sizes[:1]:
            matcher, memory = filled(case, size)
            times[size], hits = timed(matcher, case, size)
            shown.append(f"{times[size]:8.1f} us {hits:5.1f} hits {memory:4.0f} B")
            if memory > MEMORY and size >= 10_000 and case.is_counted:
                yield f"{case.name}: {memory:.0f} bytes per subscription at {size}"
            KEPT.clear()
            gc.unfreeze()
            del matcher
            gc.collect()
        print(f"{case.name:50}", " | ".join(shown), flush=True)
        if case.has_path and {1_000, 100_000} <= times.keys():
            ratio = times[100_000] / times[1_000]
            if ratio > GATE:
                yield f"{case.name}: {ratio:.2f} times the cost at 100 times the subscriptions"


SCHEMA = """
DROP SCHEMA IF EXISTS bench CASCADE;
CREATE SCHEMA bench;
CREATE TABLE bench.projects (id text PRIMARY KEY, name text);
CREATE TABLE bench.users (id text PRIMARY KEY, name text);
CREATE TABLE bench.members (id text PRIMARY KEY, project text, "user" text);
INSERT INTO bench.projects SELECT 'p' || n, 'x' FROM generate_series(0, 999) n;
INSERT INTO bench.members SELECT n, 'p' || n % 1000, 'u' || n % 100
  FROM generate_series(1, 5000) n;
CREATE INDEX ON bench.members (project);
ANALYZE bench.members, bench.projects;
"""


async def relations(url: str, sizes: Sequence[int]) -> list[str]:
    """Measure the relation rule against a round trip; return the gates that aren't met."""
    faults: list[str] = []
    async with QueryPool(url, max_size=1) as pool:
        shown: list[str] = []
        for size in sizes:
            matcher, _ = filled(RELATION, size)
            executor = QueryExecutor(pool)
            changes = events(size // MATCHES, Random(7), BATCH)
            trips: list[float] = []
            costs: list[float] = []
            hits = 0
            for _ in range(30):
                trips.append(await round_trip(pool))
                start = time.perf_counter()
                evaluation = evaluate_in_process(matcher, changes, datetime.now(UTC))
                await executor.answer_questions(evaluation)
                costs.append((time.perf_counter() - start) / len(changes) * 1e6)
                hits = sum(len(row.hits) for row in evaluation.rows.values())
            assert not executor.unanswered_counts
            cost, trip = median(costs), median(trips)
            shown.append(f"{cost:8.1f} us {hits / len(changes):5.1f} hits, SELECT 1 {trip:.0f} us")
            if cost > trip / 3:
                faults.append(f"{RELATION.name}: {cost:.1f} us at {size}, a round trip {trip:.0f}")
            KEPT.clear()
            gc.unfreeze()
    print(f"{RELATION.name:50}", " | ".join(shown))
    return faults


async def round_trip(pool: QueryPool) -> float:
    """Return microseconds of one ``SELECT 1``, the mean of a few."""
    async with pool.connection() as connection:
        start = time.perf_counter()
        for _ in range(5):
            cursor = await connection.execute("SELECT 1")
            await cursor.fetchone()
        return (time.perf_counter() - start) / 5 * 1e6


def main() -> None:
    """Measure everything, print it, and fail if a gate isn't met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="subscriptions at most")
    sizes = [size for size in SIZES if size <= parser.parse_args().largest]
    print(
        f"Python {platform.python_version()}, sqlglot {version('sqlglot')}, {os.cpu_count()} CPUs,"
        f" {platform.machine()}; sizes {sizes}"
    )
    faults = list(measure(sizes))
    if port := os.environ.get("PGREALTIME_TEST_PG_PORT"):
        url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        with psycopg.connect(url, autocommit=True) as setup:
            setup.execute(SCHEMA.encode())
        faults += asyncio.run(relations(url, sizes))
        with psycopg.connect(url, autocommit=True) as setup:
            setup.execute("DROP SCHEMA bench CASCADE")
    else:
        print("relation rule: no PGREALTIME_TEST_PG_PORT, not measured")
    sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
