"""Up to where all commits are visible: what bounds the slot beside synchronous standbys.

A commit that waits for synchronous standbys is in the WAL, and decoded, before anybody sees it. If
``synchronous_standby_names`` matches us, moving the slot past it would end its wait: it would count
as safe with us, who keep nothing on disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn

import psycopg

from pgrealtime.lsn import LSN, parse_lsn
from pgrealtime.wal.server import DatabaseConnection, open_ordinary_connection

_POLL_SECONDS = 1.0
"""Between questions."""


def may_match_standby_names(synchronous_standby_names: str, application_name: str) -> bool:
    """Whether a setting of ``synchronous_standby_names`` may match a walsender of that name.

    It looks for the name anywhere in the setting: a match too many costs a question a second.
    """
    return (
        "*" in synchronous_standby_names
        or application_name.lower() in synchronous_standby_names.lower()
    )


async def watch_visible_lsn(url: str, notify: Callable[[LSN], None]) -> NoReturn:
    """Tell again and again up to where every commit is visible.

    Asks on a connection of its own, anew where that fails: without an answer the slot stays.
    """
    while True:
        try:
            async with await open_ordinary_connection(url) as connection:
                while True:
                    notify(await _next_visible_lsn(connection))
        except psycopg.Error:
            await asyncio.sleep(_POLL_SECONDS)


async def _next_visible_lsn(connection: DatabaseConnection) -> LSN:
    """Return a position of now, once nothing is open any more that could have ended before it."""
    # A transaction whose commit record lies before the position had its id by then: it is below the
    # next id to be given out, asked for afterwards. (Not the snapshot's xmax, which is only the
    # last completed one's successor.) Once xmin is there, all below are visible.
    row = await (await connection.execute("SELECT pg_current_wal_insert_lsn()::text")).fetchone()
    assert row is not None
    position = parse_lsn(row[0])
    row = await (
        await connection.execute(
            "SELECT (xmax::text::bigint + age(xmax::xid))::text"
            " FROM pg_snapshot_xmax(pg_current_snapshot()) xmax"
        )
    ).fetchone()
    assert row is not None
    beyond = row[0]
    while True:
        await asyncio.sleep(_POLL_SECONDS)
        cursor = await connection.execute(
            "SELECT pg_snapshot_xmin(pg_current_snapshot()) >= %s::text::xid8", (beyond,)
        )
        if await cursor.fetchone() == (True,):
            return position
