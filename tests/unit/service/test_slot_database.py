"""An owner that can't reach the database tries again; nothing else ends for it."""

from typing import NoReturn, cast

import psycopg
import pytest

from pgrealtime.changes import TableName
from pgrealtime.config.model import Config
from pgrealtime.errors import DatabaseUnreachableError
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.service.slot_database import SlotDatabase


class _AwayPool:
    """A pool whose server doesn't answer."""

    def connection(self, timeout: float | None = None) -> NoReturn:
        raise psycopg.OperationalError(f"no answer in {timeout} s")


def database() -> SlotDatabase:
    config = Config.model_validate({"database": {"url": "postgresql://x@127.0.0.1:1/x"}})
    return SlotDatabase(config, cast("QueryPool", _AwayPool()))


async def test_what_cannot_be_asked_can_be_asked_again() -> None:
    away = database()
    with pytest.raises(DatabaseUnreachableError) as catalog:
        await away.read_tables(frozenset({TableName("public", "posts")}))
    with pytest.raises(DatabaseUnreachableError):
        await away.slot_position()
    with pytest.raises(DatabaseUnreachableError):
        await away.end_walsender()
    assert catalog.value.error_code == "catalog"
    assert (await away.timeline(), await away.is_answering(1.0)) == (0, False)
    assert await away.read_tables(frozenset()) == {}
