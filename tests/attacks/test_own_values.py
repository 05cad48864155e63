"""Values that a user writes into the own row end neither the process nor a connection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.listener import listener
from tests.e2e.service import service, token

SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY, until timestamptz, day date, level numeric, tags text[]);
CREATE TABLE posts (id text PRIMARY KEY, until timestamptz, day date, level numeric, tags text[]);
CREATE TABLE notes (id text PRIMARY KEY);
ALTER TABLE users REPLICA IDENTITY FULL;
ALTER TABLE posts REPLICA IDENTITY FULL;
INSERT INTO users VALUES ('ann', '2026-01-01 00:00Z', '2026-01-01', 5);
"""
VALUES = [
    pytest.param("until", "infinity", id="infinity"),
    pytest.param("until", "-infinity", id="minus-infinity"),
    pytest.param("until", "4000-01-01 00:00Z BC", id="before-christ"),
    pytest.param("day", "infinity", id="day"),
    pytest.param("day", "99999-01-01", id="far-day"),
    pytest.param("level", "1" + "0" * 400, id="beyond-a-double"),
    pytest.param("level", "0." + "0" * 400 + "1", id="below-a-double"),
    pytest.param("level", "NaN", id="nan"),
    pytest.param("level", "-Infinity", id="infinite-number"),
]


@pytest.mark.parametrize(("column", "value"), VALUES)
async def test_a_value_that_no_index_can_hold_concerns_its_owner_alone(
    database_url: str, tmp_path: Path, column: str, value: str
) -> None:
    """While connected and before.

    The rule is evaluated for that one user, and others are unaffected.
    """
    collections: dict[str, dict[str, Any]] = {
        "users": {"table": "users", "type": "auth"},
        "posts": {"table": "posts", "list_rule": f"{column} = @request.auth.{column}"},
        "notes": {"table": "notes", "list_rule": ""},
    }
    update = f"UPDATE users SET {column} = %s WHERE id = 'ann'"
    plain = "2026-01-01" if column != "level" else "5"
    async with (
        service(database_url, tmp_path, schema=SCHEMA, collections=collections) as running,
        listener(running.address, "notes/*") as other,
        listener(running.address, "posts/*", token=token("ann")) as ann,
    ):

        async def post(name: str, content: str) -> None:
            insert = f"INSERT INTO posts (id, {column}) VALUES (%s, %s)".encode()
            await running.write.execute(insert, [name, content])
            await running.write.execute("INSERT INTO notes VALUES (%s)", [name])
            (note,) = await other.take(1)
            assert note.data["record"]["id"] == name

        await running.write.execute(update.encode(), [value])
        await post("away", plain)
        await post("while", value)
        async with listener(running.address, "posts/*", token=token("ann")) as late:
            await running.write.execute(update.encode(), [plain])
            await post("back", plain)
            received = [m.data["record"]["id"] for m in await late.take(1)]
        first = await ann.take(1)
        if first[0].data["record"]["id"] == "while":  # Postgres says which are equal
            first = await ann.take(1)

        assert received == [first[0].data["record"]["id"]] == ["back"]
