"""Finds, checks, lists, advances and drops durable replication slots.

Used by ``wal.slot`` and the command ``slot``. A durable slot outlives the process, and the server
keeps all WAL that was not read from it; so one is created only where the server limits that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import AsyncConnection
from psycopg import errors as pg

from pgrealtime.config.model import ReplicationConfig
from pgrealtime.errors import SetupError, SlotBusyError
from pgrealtime.lsn import LSN, parse_lsn

_FAILOVER_VERSION = 170000

_SLOTS_QUERY = """
SELECT slot_name, coalesce(plugin, ''), coalesce(database, ''), temporary, active_pid,
       wal_status, coalesce(confirmed_flush_lsn, '0/0')::text,
       coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0)::bigint,
       coalesce((to_jsonb(s) ->> 'failover')::boolean, false),
       coalesce(to_jsonb(s) ->> 'invalidation_reason', '')
FROM pg_replication_slots s
"""
_SLOT_BY_NAME_QUERY = _SLOTS_QUERY + "WHERE slot_name = %s"
_OWN_SLOTS_QUERY = (
    _SLOTS_QUERY + "WHERE slot_name = %s OR starts_with(slot_name, %s) ORDER BY slot_name"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotStatus:
    """A row of ``pg_replication_slots``."""

    name: str
    plugin: str
    """Empty for a physical slot."""
    database_name: str
    is_temporary: bool
    active_pid: int | None
    """Of the walsender that reads it; None if none does."""
    wal_status: str
    confirmed_flush_lsn: LSN
    retained_bytes: int
    has_failover: bool
    invalidation_reason: str

    @property
    def is_lost(self) -> bool:
        """Whether it was invalidated and can't be read any more."""
        return self.wal_status == "lost" or bool(self.invalidation_reason)


def _slot_status(row: Sequence[Any]) -> SlotStatus:
    name, plugin, database, temporary, pid, status, flushed, retained, failover, reason = row
    return SlotStatus(
        name=name,
        plugin=plugin,
        database_name=database,
        is_temporary=temporary,
        active_pid=pid,
        wal_status=status or "",
        confirmed_flush_lsn=parse_lsn(flushed),
        retained_bytes=retained,
        has_failover=failover,
        invalidation_reason=reason,
    )


async def find_slot(connection: AsyncConnection[Any], name: str) -> SlotStatus | None:
    """Return the slot of that name, None if there is none."""
    row = await (await connection.execute(_SLOT_BY_NAME_QUERY.encode(), (name,))).fetchone()
    return None if row is None else _slot_status(row)


async def list_own_slots(connection: AsyncConnection[Any], name: str) -> list[SlotStatus]:
    """Return the slots that a process with this configured slot name may have created."""
    rows = await (
        await connection.execute(_OWN_SLOTS_QUERY.encode(), (name, f"{name}_"))
    ).fetchall()
    return [_slot_status(row) for row in rows]


def check_slot(
    config: ReplicationConfig,
    status: SlotStatus | None,
    *,
    database: str,
    server_version: int,
    max_slot_wal_keep_mb: int,
) -> None:
    """Check that a durable slot may be created, or the existing one (``status``) be read.

    Raises:
        SetupError: Why not.
    """
    if max_slot_wal_keep_mb < 0 and not config.slot.allow_unlimited_wal:
        raise SetupError(
            "a durable slot could fill the server's disk",
            detail="The server retains the WAL that the slot has not sent yet, also while no"
            " process reads it, and max_slot_wal_keep_size sets no limit.",
            hint="Run as a superuser: ALTER SYSTEM SET max_slot_wal_keep_size = '10GB'; SELECT"
            " pg_reload_conf(); or set replication.slot.allow_unlimited_wal: true.",
            code="wal_unlimited",
        )
    if config.slot.failover and server_version < _FAILOVER_VERSION:
        raise SetupError(
            "slots for failover need PostgreSQL 17",
            hint="Set replication.slot.failover: false.",
            code="failover_unsupported",
        )
    if status is not None:
        _check_readable(config, status, database)


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


async def enable_failover(connection: AsyncConnection[Any], status: SlotStatus) -> None:
    """Make the slot one that is synchronized to standbys (PostgreSQL 17)."""
    await connection.execute(f'ALTER_REPLICATION_SLOT "{status.name}" (FAILOVER true)'.encode())


async def advance_slot(connection: AsyncConnection[Any], name: str) -> None:
    """Advance the slot to the end of the WAL, without decoding the transactions before it.

    Raises:
        psycopg.Error: It is being read, or was dropped.
    """
    await connection.execute(
        "SELECT pg_replication_slot_advance(%s, pg_current_wal_insert_lsn())", (name,)
    )


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
