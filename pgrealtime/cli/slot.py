"""``pgrealtime slot``: the slots that a configuration may have left on its server."""

from __future__ import annotations

from pgrealtime.config.model import Config
from pgrealtime.errors import SetupError
from pgrealtime.postgres.connect import connect_once
from pgrealtime.spelling import nearest_name
from pgrealtime.wal import slot_status


async def list_slots(config: Config) -> list[str]:
    """Return a line per slot.

    Raises:
        PgRealtimeError: The server can't be asked.
    """
    async with connect_once(config.database.url) as connection:
        standing = await slot_status.list_own_slots(connection, config.replication.slot.name)
    return [_slot_line(slot) for slot in standing]


def _slot_line(slot: slot_status.SlotStatus) -> str:
    reader = "nobody reads it" if slot.active_pid is None else f"read by pid {slot.active_pid}"
    state = f"lost ({slot.invalidation_reason or 'its WAL is gone'})" if slot.is_lost else reader
    kind = "temporary" if slot.is_temporary else "durable"
    mebibytes = slot.retained_bytes / (1 << 20)
    return (
        f'{slot.name}: {kind}, {slot.plugin or "physical"}, database "{slot.database}", {state},'
        f" {mebibytes:,.1f} MiB of WAL retained"
    )


async def drop_slot(config: Config, name: str) -> None:
    """Drop one of the slots that ``list_slots`` tells of.

    Raises:
        SetupError: There is none of that name.
        SlotBusyError: Somebody reads from it.
        PgRealtimeError: The server can't be asked.
    """
    async with connect_once(config.database.url) as connection:
        standing = await slot_status.list_own_slots(connection, config.replication.slot.name)
        for slot in standing:
            if slot.name == name:
                await slot_status.drop_slot(connection, slot)
                return
    meant = nearest_name(name, [slot.name for slot in standing])
    raise SetupError(
        f'there is no slot "{name}" of this configuration',
        detail=f'Its slots are named "{config.replication.slot.name}", with or without a suffix.',
        hint="" if meant is None else f'Perhaps you meant "{meant}".',
        code="slot_unknown",
    )
