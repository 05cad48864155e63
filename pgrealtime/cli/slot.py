"""``pgrealtime slot``: lists and drops the slots that a configuration has left on its server."""

import asyncio

import click

from pgrealtime.cli.options import config_option
from pgrealtime.cli.report import report_errors
from pgrealtime.config.load import load_config
from pgrealtime.config.model import Config
from pgrealtime.errors import SetupError
from pgrealtime.postgres.connect import connect_once
from pgrealtime.spelling import nearest_name
from pgrealtime.wal import slot_status


@click.group()
def slot() -> None:
    """List or drop the replication slots of this configuration."""


@slot.command("list")
@config_option
def list_(path: str) -> None:
    """Print a line per slot: its state, and how much WAL it retains."""
    with report_errors():
        lines = asyncio.run(_list_slots(load_config(path)))
    click.echo("\n".join(lines) or "there are no slots")


@slot.command()
@config_option
@click.argument("name")
def drop(path: str, *, name: str) -> None:
    """Drop a slot. Changes that it has not sent yet are lost to subscribers."""
    with report_errors():
        asyncio.run(_drop_slot(load_config(path), name))
    click.echo(f"dropped {name}")


async def _list_slots(config: Config) -> list[str]:
    async with connect_once(config.database.url) as connection:
        statuses = await slot_status.list_own_slots(connection, config.replication.slot.name)
    return [_slot_line(status) for status in statuses]


def _slot_line(slot: slot_status.SlotStatus) -> str:
    reader = "inactive" if slot.active_pid is None else f"active for PID {slot.active_pid}"
    reason = slot.invalidation_reason or "its WAL was removed"
    state = f"lost ({reason})" if slot.is_lost else reader
    kind = "temporary" if slot.is_temporary else "durable"
    mebibytes = slot.retained_bytes / (1 << 20)
    return (
        f'{slot.name}: {kind}, {slot.plugin or "physical"}, database "{slot.database_name}",'
        f" {state}, {mebibytes:,.1f} MiB of WAL retained"
    )


async def _drop_slot(config: Config, name: str) -> None:
    async with connect_once(config.database.url) as connection:
        statuses = await slot_status.list_own_slots(connection, config.replication.slot.name)
        for status in statuses:
            if status.name == name:
                await slot_status.drop_slot(connection, status)
                return
    suggestion = nearest_name(name, [status.name for status in statuses])
    raise SetupError(
        f'there is no slot "{name}" of this configuration',
        detail=f'Its slots are named "{config.replication.slot.name}", with or without a suffix.',
        hint="" if suggestion is None else f'Perhaps you meant "{suggestion}".',
        code="slot_unknown",
    )
