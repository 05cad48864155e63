"""Each change of a row is judged by the row as that change left it, if one commit makes several."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.listener import listener
from tests.e2e.service import service

SCHEMA = """
CREATE TABLE docs (
  id text PRIMARY KEY, title text NOT NULL, body text NOT NULL,
  is_open boolean GENERATED ALWAYS AS (left(body, 6) = 'public') STORED
);
ALTER TABLE docs ALTER body SET STORAGE EXTERNAL;
INSERT INTO docs VALUES ('a', 'one', repeat('secret', 2000));
DO $$ BEGIN
  EXECUTE 'CREATE PUBLICATION pgrealtime FOR TABLE ONLY docs' || CASE
    WHEN current_setting('server_version_num')::int < 180000 THEN ''
    ELSE ' WITH (publish_generated_columns = stored)' END;
END $$;
"""


@pytest.mark.parametrize("plugin", ["wal2json", "pgoutput"])
@pytest.mark.parametrize("rule", ["body !~ 'secret'", "is_open = true"])
async def test_what_the_wal_left_out_is_not_taken_from_a_later_version(
    database_url: str, tmp_path: Path, rule: str, plugin: str
) -> None:
    """An unchanged TOASTed value and a generated column are in the table, of the last version."""
    collections = {"docs": {"table": "docs", "list_rule": rule}}
    sections = {"replication": {"plugin": plugin}}
    async with (
        service(
            database_url, tmp_path, collections=collections, sections=sections, schema=SCHEMA
        ) as running,
        listener(running.address, "docs/*") as guest,
    ):
        async with running.write.transaction():
            await running.write.execute("UPDATE docs SET title = 'two, still secret'")
            await running.write.execute(
                "UPDATE docs SET title = 'three', body = repeat('public', 2000)"
            )
            await running.write.execute("INSERT INTO docs VALUES ('b', 'end', 'public')")

        heard = [m.data["record"]["title"] for m in await guest.take(2)]
        assert heard == ["three", "end"]
