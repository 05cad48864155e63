"""Finds, checks, lists, advances and drops durable replication slots.

Used by ``wal.slot`` and the command ``slot``. A durable slot outlives the process, and the server
keeps all WAL that was not read from it; so one is created only where the server limits that.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

from psycopg import AsyncConnection
from psycopg import errors as pg

from pgrealtime.config.model import ReplicationConfig
from pgrealtime.config.units import format_size
from pgrealtime.errors import SetupError, SlotBusyError
from pgrealtime.lsn import LSN, parse_lsn
from pgrealtime.wal.provider import read_provider
from pgrealtime.wal.server import ServerFacts

_FAILOVER_VERSION = 170000
_END_POLLS = 100
_END_POLL_SECONDS = 0.01

_SLOTS_QUERY = """
SELECT coalesce(confirmed_flush_lsn, '0/0')::text,
       slot_name, coalesce(plugin, ''), coalesce(database, ''), temporary, active_pid,
       coalesce(wal_status, ''),
       coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0)::bigint,
       coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn), 0)::bigint,
       coalesce((to_jsonb(s) ->> 'failover')::boolean, false),
       coalesce(to_jsonb(s) ->> 'invalidation_reason', '')
FROM pg_replication_slots s
WHERE slot_name = %s OR starts_with(slot_name, %s) ORDER BY slot_name
"""


@dataclass(frozen=True, slots=True)
class SlotStatus:
    """A row of ``pg_replication_slots``, in the order of the query above."""

    confirmed_flush_lsn: LSN
    name: str
    plugin: str
    """Empty for a physical slot."""
    database_name: str
    is_temporary: bool
    active_pid: int | None
    """Of the walsender that reads it; None if none does."""
    wal_status: str
    retained_bytes: int
    unconfirmed_bytes: int
    """WAL that was written since what its reader confirmed. The slot retains more than that while
    a transaction that began before is open, or was when the server last noted (every 15 s)."""
    has_failover: bool
    invalidation_reason: str

    @property
    def is_lost(self) -> bool:
        """Whether it was invalidated and can't be read any more."""
        return self.wal_status == "lost" or bool(self.invalidation_reason)

    def reason_to_replace(self, max_retained_wal: int) -> str:
        """Return why the slot is to be dropped and made anew; empty if it can be read.

        ``max_retained_wal`` is in bytes; 0 is no limit.
        """
        if self.is_lost:
            return f"the server invalidated it ({self.invalidation_reason or 'wal_removed'})"
        if 0 < max_retained_wal < self.retained_bytes:
            return (
                f"it retained {format_size(self.retained_bytes)} of WAL, more than"
                f" replication.slot.max_retained_wal, {format_size(max_retained_wal)}"
            )
        return ""


async def list_own_slots(connection: AsyncConnection[Any], name: str) -> list[SlotStatus]:
    """Return the slots that a process with this configured slot name may have created."""
    cursor = await connection.execute(_SLOTS_QUERY, (name, f"{name}_"))
    return [SlotStatus(parse_lsn(flushed), *others) async for flushed, *others in cursor]


async def find_durable_slot(
    connection: AsyncConnection[Any], config: ReplicationConfig, facts: ServerFacts
) -> SlotStatus | None:
    """Return the slot with the configured name, None if there is none.

    Raises:
        SetupError: A durable slot may not be created, or the existing one can't be read.
    """
    if facts.max_slot_wal_keep_mb < 0 and not config.slot.allow_unlimited_wal:
        provider = await read_provider(connection)
        limit = (
            provider.setting_hint("max_slot_wal_keep_size", "10GB")
            if provider
            else "Run as a superuser: ALTER SYSTEM SET max_slot_wal_keep_size = '10GB'; SELECT"
            " pg_reload_conf();"
        )
        raise SetupError(
            "a durable slot could fill the server's disk",
            detail="The server retains the WAL that the slot has not sent yet, also while no"
            " process reads it, and max_slot_wal_keep_size sets no limit.",
            hint=f"{limit} Or set replication.slot.allow_unlimited_wal: true.",
            code="wal_unlimited",
        )
    if config.slot.failover and facts.version < _FAILOVER_VERSION:
        raise SetupError(
            "slots for failover need PostgreSQL 17",
            hint="Set replication.slot.failover: false.",
            code="failover_unsupported",
        )
    for status in await list_own_slots(connection, config.slot.name):
        if status.name == config.slot.name:
            _check_readable(config, status, connection.info.dbname)
            return status
    return None


def _check_readable(config: ReplicationConfig, status: SlotStatus, database: str) -> None:
    wanted = ("wal2json", "pgoutput") if config.plugin == "auto" else (config.plugin,)
    if status.plugin in wanted and status.database_name == database and not status.is_temporary:
        return
    kind = f"of {status.plugin}" if status.plugin else "a physical slot"
    raise SetupError(
        f'slot "{status.name}" can\'t be used',
        detail=f"It is {kind}"
        f"{f' in database {status.database_name}' if status.database_name else ''}"
        f"{', and temporary' if status.is_temporary else ''}.",
        hint="Give replication.slot.name another name; or, if that slot is not needed, drop it:"
        f" pgrealtime slot drop {status.name}",
        code="slot_unfit",
    )


async def advance_slot(connection: AsyncConnection[Any], name: str) -> None:
    """Advance the slot to the end of the WAL, without decoding the transactions before it.

    Raises:
        psycopg.Error: It is being read, or was dropped.
    """
    await connection.execute(
        "SELECT pg_replication_slot_advance(%s, pg_current_wal_insert_lsn())", (name,)
    )


async def end_walsender(connection: AsyncConnection[Any], name: str) -> bool:
    """End the walsender that reads the slot; return whether the slot is free afterwards.

    A role may end its own walsenders. One whose client is paused, or behind a network that drops
    packets, would hold the slot for wal_sender_timeout, by default a minute.

    Raises:
        SlotBusyError: Another role's walsender reads it.
    """
    for _ in range(_END_POLLS):
        try:
            cursor = await connection.execute(
                "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
                " WHERE slot_name = %s AND active_pid IS NOT NULL",
                (name,),
            )
        except pg.InsufficientPrivilege as error:
            raise SlotBusyError(
                f'slot "{name}" is being read by another role',
                detail=str(error).strip(),
                hint="Let all replicas log in with one role.",
            ) from error
        if await cursor.fetchone() is None:
            return True
        await asyncio.sleep(_END_POLL_SECONDS)
    return False


async def drop_slot(connection: AsyncConnection[Any], status: SlotStatus) -> None:
    """Drop the slot; the server may then remove the WAL that it kept for it.

    Raises:
        SlotBusyError: It is being read.
    """
    try:
        await connection.execute("SELECT pg_drop_replication_slot(%s)", (status.name,))
    except pg.ObjectInUse as error:
        raise SlotBusyError(
            f'slot "{status.name}" is being read',
            detail=str(error).strip(),
            hint="End the process that reads it first.",
        ) from error
