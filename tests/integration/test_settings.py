"""Settings of a database or a role don't change what a rule means."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.listener import listener
from tests.e2e.service import service

SCHEMA = """
CREATE TABLE docs (id text PRIMARY KEY, title text, note text);
ALTER TABLE docs REPLICA IDENTITY FULL;
DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET {} = off', current_database()); END $$;
"""

RULE = "@collection.docs.note ?= note && strftime('%Y', title) = null"
"""Reads a related table, with a NULL of the row itself and a text that looks like no number."""


@pytest.mark.parametrize("setting", ["standard_conforming_strings", "array_nulls"])
async def test_how_texts_are_read_is_not_left_to_the_database(
    database_url: str, tmp_path: Path, setting: str
) -> None:
    """Covers backslashes in statements, and NULLs in the arrays that pass row images."""
    collections = {"docs": {"table": "docs", "list_rule": RULE}}
    schema = SCHEMA.format(setting)
    async with (
        service(database_url, tmp_path, collections=collections, schema=schema) as running,
        listener(running.address, "docs/*") as guest,
    ):
        await running.write.execute("INSERT INTO docs VALUES ('a', '5x', NULL)")

        (message,) = await guest.take(1)
        assert message.data["record"]["id"] == "a"
