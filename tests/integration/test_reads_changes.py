"""Lists while the configuration and the schema change under them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.attacks.reading import configured, reading

SCHEMA = """
CREATE TABLE pages (id text PRIMARY KEY, n int NOT NULL, note text);
INSERT INTO pages SELECT i, i, 'x' FROM generate_series(1, 5) i;
CREATE VIEW counts AS SELECT id, n FROM pages;
CREATE VIEW slow AS SELECT id, pg_sleep(30)::text AS waited FROM pages WHERE id = '1';
"""
SLOW = {"table": "slow", "id": "id", "stream": False, "list_rule": ""}
PAGES = {"table": "pages", "list_rule": "", "view_rule": ""}
COUNTS = {"table": "counts", "id": "id", "stream": False, "list_rule": ""}
COLLECTIONS: dict[str, Any] = {"slow": SLOW, "pages": PAGES, "counts": COUNTS}

CHANGES: dict[str, tuple[dict[str, Any], int]] = {
    "removed": ({"slow": SLOW}, 404),
    "locked": ({"slow": SLOW, "pages": {**PAGES, "list_rule": None, "view_rule": None}}, 403),
    "narrowed": ({"slow": SLOW, "pages": {**PAGES, "fields": {"include": ["id"]}}}, 200),
}


@pytest.mark.parametrize("path", ["pages/records", "pages/records/1"])
@pytest.mark.parametrize("change", CHANGES)
async def test_a_request_that_waited_is_answered_by_the_configuration_in_force(
    database_url: str, change: str, path: str
) -> None:
    """It waits for a connection while the configuration is replaced."""
    collections, expected = CHANGES[change]
    reads = {"statement_timeout": 2.0, "pool_size": 1}
    async with reading(database_url, SCHEMA, COLLECTIONS, reads=reads) as reader:
        slow = asyncio.create_task(reader.get("slow/records"))
        await asyncio.sleep(0.3)
        waiting = asyncio.create_task(reader.get(path))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        await reader.reload(configured(database_url, collections, reads=reads))
        status, body = await waiting
        await slow

    assert status == expected
    if change == "narrowed":
        record = body["items"][0] if "items" in body else body
        assert set(record) == {"collectionId", "collectionName", "id"}


ALTERATIONS = {
    "column added": "ALTER TABLE pages ADD COLUMN more text",
    "column dropped": "ALTER TABLE pages DROP COLUMN note",
    "column renamed": "ALTER TABLE pages RENAME COLUMN note TO text",
    "type changed": "ALTER TABLE pages ALTER COLUMN note TYPE varchar(9)",
    "number to text": "DROP VIEW counts; ALTER TABLE pages ALTER COLUMN n TYPE text;"
    " CREATE VIEW counts AS SELECT id, n FROM pages",
    "table replaced": "ALTER TABLE pages RENAME TO old;"
    " CREATE TABLE pages (id text PRIMARY KEY, note text); INSERT INTO pages SELECT id FROM old",
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
async def test_lists_outlive_a_change_of_the_schema_without_a_write(
    database_url: str, alteration: str
) -> None:
    """No change is streamed that would tell of it: a list that fails has the schema read anew."""
    async with reading(database_url, SCHEMA, COLLECTIONS) as reader:
        for _ in range(8):  # prepared by then
            await reader.ids("pages", filter="n > 0")
            await reader.ids("counts", sort="-n")
        await reader.write.execute(ALTERATIONS[alteration].encode())
        await _until_200(reader.get, "pages/records")
        await _until_200(reader.get, "pages/records/1")
        await _until_200(reader.get, "counts/records")
        # By each connection of the pool.
        answers = await asyncio.gather(*(reader.get("pages/records") for _ in range(20)))

    assert {status for status, _ in answers} == {200}
    assert len(answers[0][1]["items"]) == 5


async def _until_200(get: Any, path: str) -> None:
    async with asyncio.timeout(10):
        while (await get(path))[0] != 200:
            await asyncio.sleep(0.1)
