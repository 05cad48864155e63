"""Lists through PgBouncer in transaction mode, also those that are cancelled."""

from __future__ import annotations

import asyncio

from tests.attacks.reading import reading
from tests.attacks.test_reads_slow import COLLECTIONS, SCHEMA, ask
from tests.pgbouncer import pgbouncer


async def test_lists_through_a_pooler_share_its_few_sessions(
    database_url: str,
) -> None:
    """Small pages, streamed ones, refused ones and cancelled ones, with two sessions for all."""
    with pgbouncer(database_url, sessions=2) as pooled:
        database = {"url": database_url, "query_url": pooled}
        reads = {"statement_timeout": 2.0, "max_answer_size": 4_000_000}
        async with reading(
            database_url, SCHEMA, COLLECTIONS, database=database, reads=reads
        ) as reader:
            for _ in range(3):
                for path in ("slow/records", "pages/records?perPage=1000"):
                    (await ask(reader.port, path)).close()
                small = [reader.ids("pages", perPage="5", filter="html != ''") for _ in range(20)]
                streamed = [reader.ids("pages", perPage="150", fields="id") for _ in range(5)]
                refused = [reader.get("pages/records", perPage="500") for _ in range(5)]
                slow = reader.get("slow/records")
                lists = await asyncio.gather(*small, *streamed)
                statuses = [status for status, _ in await asyncio.gather(*refused, slow)]

    assert [len(ids) for ids in lists] == [5] * 20 + [150] * 5
    assert statuses == [400] * 6
