"""A process that was stopped, while the server went on writing and kept all of it for the slot."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psycopg

from tests.e2e.listener import listener
from tests.e2e.service import service
from tests.own_server import OwnServer

_RETAINED = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) FROM pg_replication_slots"


async def test_the_slot_is_given_up_and_its_clients_are_notified(
    server: OwnServer, tmp_path: Path
) -> None:
    """Their connections stay; after the notice everything is delivered again."""
    slot = {"durable": True, "allow_unlimited_wal": True, "max_retained_wal": "64MiB"}
    async with (
        service(
            server.url,
            tmp_path,
            collections={"numbers": {"table": "numbers", "list_rule": ""}},
            schema="CREATE TABLE numbers (id int PRIMARY KEY)",
            sections={"replication": {"slot": slot}},
        ) as running,
        listener(running.address, "numbers/*", "PB_RESYNC") as client,
    ):
        await running.write.execute("INSERT INTO numbers VALUES (1)")
        (first,) = await client.take(1)
        os.kill(running.process.pid, signal.SIGSTOP)
        try:
            for _ in range(8):
                await running.write.execute(
                    "SELECT pg_logical_emit_message(false, 'x', 'y'), pg_switch_wal()"
                )
        finally:
            os.kill(running.process.pid, signal.SIGCONT)
        (notice,) = await client.take(1)
        await running.write.execute("INSERT INTO numbers VALUES (2)")
        (second,) = await client.take(1)
        with psycopg.connect(server.url) as connection:
            retained = connection.execute(_RETAINED).fetchall()

    assert (first.event, first.data["record"]["id"]) == ("numbers/*", "1")
    assert (notice.event, notice.data["reason"]) == ("PB_RESYNC", "slot_lost")
    assert (second.event, second.data["record"]["id"]) == ("numbers/*", "2")
    assert [size < 32 << 20 for (size,) in retained] == [True]
