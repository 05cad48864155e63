"""Ids that no constraint of their own keeps unique: of partitioned tables, of tables without a key.

Both decoders name what they send by the partition; clients know the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import pytest
import yaml

from tests.e2e.listener import Listener, listener
from tests.e2e.service import Service, service
from tests.program import run_program

SCHEMA = """
CREATE TABLE events (id bigint GENERATED ALWAYS AS IDENTITY, at date, what text,
                     PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE events_2024 PARTITION OF events FOR VALUES FROM ('2024-01-01') TO ('2025-01-01')
  PARTITION BY RANGE (at);
CREATE TABLE events_2024_a PARTITION OF events_2024
  FOR VALUES FROM ('2024-01-01') TO ('2024-07-01');
CREATE TABLE events_2024_b PARTITION OF events_2024
  FOR VALUES FROM ('2024-07-01') TO ('2025-01-01');
CREATE TABLE events_rest PARTITION OF events DEFAULT;
CREATE TABLE places (country text, n int, PRIMARY KEY (country, n)) PARTITION BY LIST (country);
CREATE TABLE places_de PARTITION OF places FOR VALUES IN ('de') PARTITION BY HASH (n);
CREATE TABLE places_de_0 PARTITION OF places_de FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE places_de_1 PARTITION OF places_de FOR VALUES WITH (MODULUS 2, REMAINDER 1);
CREATE TABLE places_fr PARTITION OF places FOR VALUES IN ('fr');
CREATE TABLE audit (at timestamptz, who text, "100%" jsonb, n int,
                    twice int GENERATED ALWAYS AS (n * 2) STORED);
"""
OPEN = {"list_rule": "", "view_rule": ""}
COLLECTIONS: dict[str, dict[str, Any]] = {
    "events": {"table": "events", "id": "id", **OPEN},
    "places": {"table": "places", **OPEN},
    "audit": {"table": "audit", "id": "*", **OPEN, "fields": {"include": ["at", "who", "n"]}},
}
PUBLICATION = "CREATE PUBLICATION pgrealtime FOR TABLE events, places, audit;"


def reads(plugin: str) -> str:
    """Return the schema; a published table without a key refuses its writers' deletes."""
    whole = f"ALTER TABLE audit REPLICA IDENTITY FULL; {PUBLICATION}"
    return SCHEMA + (whole if plugin == "pgoutput" else "")


async def received(from_: Listener, count: int) -> list[tuple[str, str]]:
    """Return action and id of the next events."""
    return [(m.data["action"], m.data["record"]["id"]) for m in await from_.take(count)]


async def get(running: Service, path: str, **params: str) -> Any:
    """Return what a read answers."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{running.url}/api/collections/{path}", params=params) as response,
    ):
        assert response.status == 200, await response.text()
        return await response.json()


@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
async def test_partitions_are_one_table_and_a_row_without_a_key_has_a_stable_id(
    database_url: str, tmp_path: Path, plugin: str
) -> None:
    sections = {"replication": {"plugin": plugin}}
    async with (
        service(
            database_url, tmp_path, collections=COLLECTIONS, sections=sections, schema=reads(plugin)
        ) as running,
        listener(running.address, "events/*") as events,
        listener(running.address, "events/1", "places/de~7") as single,
        listener(running.address, "places/*") as places,
        listener(running.address, "audit/*") as audit,
    ):
        write = running.write
        await write.execute("INSERT INTO events (at, what) VALUES ('2024-02-01', 'a')")
        await write.execute("INSERT INTO events (at, what) VALUES ('1999-01-01', 'b')")
        for day in ("2024-08-01", "2030-01-01", "2024-03-01"):
            await write.execute(f"UPDATE events SET at = '{day}' WHERE what = 'a'".encode())
        await write.execute("DELETE FROM events WHERE what = 'a'")
        moved = [("update", "1")] * 3
        assert await received(events, 6) == [
            ("create", "1"), ("create", "2"), *moved, ("delete", "1"),
        ]  # fmt: skip
        assert await received(single, 5) == [("create", "1"), *moved, ("delete", "1")]

        await write.execute("INSERT INTO places SELECT 'de', n FROM generate_series(7, 8) n")
        await write.execute("UPDATE places SET country = 'fr' WHERE n = 7")
        assert await received(places, 4) == [
            ("create", "de~7"), ("create", "de~8"), ("delete", "de~7"), ("create", "fr~7"),
        ]  # fmt: skip
        assert await received(single, 2) == [("create", "de~7"), ("delete", "de~7")]

        listed = await get(running, "events/records")
        assert (listed["totalItems"], [one["id"] for one in listed["items"]]) == (1, ["2"])
        assert (await get(running, "events/records/2"))["what"] == "b"

        await write.execute(
            """INSERT INTO audit VALUES ('2024-01-01 10:00+02', 'ann', '{"a": "~ü"}', 1),
               (NULL, NULL, NULL, NULL), ('2024-01-01 10:00+02', 'ann', '{"a": "~ü"}', 2)"""
        )
        created = [m.data["record"] for m in await audit.take(3)]
        assert len({record["id"] for record in created}) == 3
        for record in created:
            assert await get(running, f"audit/records/{record['id']}") == record
        by_id = await get(running, "audit/records", filter=f'id = "{created[0]["id"]}"')
        assert by_id["items"] == created[:1]
        # What isn't shown is no part of it: by an id that has it, it could be guessed.
        await write.execute("INSERT INTO audit VALUES ('2024-01-01 10:00+02', 'ann', '1', 2)")
        assert await received(audit, 1) == [("create", created[2]["id"])]
        await write.execute("DELETE FROM audit WHERE n = 1")
        await write.execute("ALTER TABLE audit ADD COLUMN later text")
        await write.execute("INSERT INTO audit (n) VALUES (3)")
        if plugin == "pgoutput":
            assert await received(audit, 1) == [("delete", created[0]["id"])]
        ((action, _),) = await received(audit, 1)
        assert action == "create"
        assert (await get(running, f"audit/records/{created[2]['id']}"))["n"] == 2


def test_check_says_what_such_ids_rest_on(database_url: str, tmp_path: Path) -> None:
    """Also why pgoutput can't: the server would refuse the updates and deletes of writers."""
    with psycopg.connect(database_url) as connection:
        connection.execute((SCHEMA + PUBLICATION).encode())
    file = tmp_path / "pgrealtime.yaml"
    settings = {"database": {"url": database_url}, "collections": COLLECTIONS}
    file.write_text(yaml.safe_dump({**settings, "replication": {"plugin": "wal2json"}}))

    outcome = run_program("check", "-c", str(file))

    assert outcome.code == 0, outcome.err
    assert 'collections.events.id: "id" is unique only together with "at"' in outcome.err
    assert 'collections.audit.id: "public.audit" has no key: only creates are sent' in outcome.err
    assert outcome.err.count("ALTER TABLE") == 1

    file.write_text(yaml.safe_dump({**settings, "replication": {"plugin": "pgoutput"}}))
    refused = run_program("check", "-c", str(file))

    assert refused.code == 2, refused
    assert 'pgoutput can\'t send the creates alone of "public.audit"' in refused.err


@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
async def test_partitions_come_and_go_while_it_runs(
    database_url: str, tmp_path: Path, plugin: str
) -> None:
    """Each time a gap of the table is told: its rows may have come or gone without an event."""
    sections = {"replication": {"plugin": plugin}}
    collections = {"events": COLLECTIONS["events"]}
    schema = SCHEMA + "CREATE PUBLICATION pgrealtime FOR TABLE events;"
    async with (
        service(
            database_url, tmp_path, collections=collections, sections=sections, schema=schema
        ) as running,
        listener(running.address, "events/*", "PB_RESYNC") as guest,
    ):

        async def received_after(*statements: str) -> list[tuple[str, str]]:
            """Return what is told of statements, and of a row that follows them."""
            for statement in statements:
                await running.write.execute(statement.encode())
            assert await running.process.reload()
            await running.write.execute("INSERT INTO events (at) VALUES ('1999-01-01')")
            told: list[tuple[str, str]] = []
            while not told or told[-1] != ("create", "1999-01-01"):
                (message,) = await guest.take(1)
                if message.event == "PB_RESYNC":
                    told.append((message.data["reason"], ",".join(message.data["collections"])))
                else:
                    told.append((message.data["action"], message.data["record"]["at"][:10]))
            return told

        last = ("create", "1999-01-01")
        gap = ("schema", "events")
        assert await received_after() == [last]
        year = "FROM ('2025-01-01') TO ('2026-01-01')"
        new = (
            "CREATE TABLE events_2025 (LIKE events INCLUDING ALL EXCLUDING IDENTITY)",
            "INSERT INTO events_2025 (id, at) VALUES (1000, '2025-01-01')",
            f"ALTER TABLE events ATTACH PARTITION events_2025 FOR VALUES {year}",
        )
        assert await received_after(*new) == [gap, last]
        assert await received_after("UPDATE events SET at = '2025-02-01' WHERE id = 1000") == [
            ("update", "2025-02-01"),
            last,
        ]
        assert await received_after("ALTER TABLE events DETACH PARTITION events_2025") == [
            gap,
            last,
        ]
        assert await received_after("UPDATE events_2025 SET what = 'x'") == [last]
        assert await received_after("DROP TABLE events_2024_a") == [gap, last]
