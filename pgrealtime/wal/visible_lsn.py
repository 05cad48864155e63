"""Reports up to which LSN all commits are visible; with synchronous standbys it limits the slot.

A commit that waits for synchronous standbys is in the WAL, and decoded, before it is visible. If
``synchronous_standby_names`` matches this process, advancing the slot past the commit would end its
wait: the server would count it as safe here, where nothing is on disk. Used by ``wal.stream``.
"""

import asyncio
from collections.abc import Callable
from typing import Any, NoReturn

import psycopg
from psycopg import AsyncConnection

from pgrealtime.lsn import LSN, parse_lsn
from pgrealtime.wal.server import fetch_row, open_ordinary_connection

_POLL_SECONDS = 1.0


def may_match_standby_names(synchronous_standby_names: str, application_name: str) -> bool:
    """Whether a setting of ``synchronous_standby_names`` may match a walsender of that name."""
    # Anywhere in the setting, not parsed: a false match costs a query per second only.
    return (
        "*" in synchronous_standby_names
        or application_name.lower() in synchronous_standby_names.lower()
    )


async def watch_visible_lsn(url: str, notify: Callable[[LSN], None]) -> NoReturn:
    """Call ``notify`` with increasing LSNs up to which every commit is visible, until cancelled.

    Queries on its own connection, and reconnects. While that fails, the slot isn't advanced.
    """
    while True:
        try:
            async with await open_ordinary_connection(url) as connection:
                while True:
                    notify(await _next_visible_lsn(connection))
        except psycopg.Error:
            await asyncio.sleep(_POLL_SECONDS)


async def _next_visible_lsn(connection: AsyncConnection[Any]) -> LSN:
    """Return the present WAL insert LSN, once all commits before it are visible."""
    # A transaction with a commit record before that LSN already had its id, so its id is below the
    # next id to be assigned, which is read afterwards. (The snapshot's xmax would not do: it is
    # the successor of the last *completed* id.) Once xmin reaches that id, all below are visible.
    (insert_lsn,) = await fetch_row(connection, "SELECT pg_current_wal_insert_lsn()::text")
    (beyond,) = await fetch_row(
        connection,
        "SELECT (xmax::text::bigint + age(xmax::xid))::text"
        # age() counts from the next id to be assigned, in 32 bits; added to xmax it gives that id
        # with its epoch.
        " FROM pg_snapshot_xmax(pg_current_snapshot()) xmax",
    )
    is_visible = "SELECT pg_snapshot_xmin(pg_current_snapshot()) >= %s::text::xid8"
    while True:
        await asyncio.sleep(_POLL_SECONDS)
        if await fetch_row(connection, is_visible, beyond) == (True,):
            return parse_lsn(insert_lsn)
