"""A task that should never end fails: the program ends, logs why, and closes its connections."""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from pgrealtime.feed.intake import Intake
from pgrealtime.hub.dispatcher import Dispatcher
from pgrealtime.service.build import run_service
from tests.config_values import parse_config
from tests.conformance.http_client import Address, End
from tests.e2e.listener import listener


class UnforeseenError(Exception):
    """An error that no code expects."""


async def fail(*_: object) -> None:
    raise UnforeseenError


@pytest.mark.parametrize(
    ("of", "name"),
    [
        pytest.param(Dispatcher, "_dispatch", id="delivery"),
        pytest.param(Intake, "append", id="reading"),
    ],
)
async def test_a_part_that_fails_ends_the_program_and_its_connections_in_an_orderly_way(
    database_url: str, monkeypatch: pytest.MonkeyPatch, of: type, name: str
) -> None:
    """Without the failed task the program would be silent.

    A program that hangs is never restarted.
    """
    monkeypatch.setattr(of, name, fail)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as write:
        await write.execute("CREATE TABLE posts (id text PRIMARY KEY)")
        config = parse_config(
            {
                "version": 1,
                "database": {"url": database_url},
                "server": {"host": "127.0.0.1", "port": 0},
                "collections": {"posts": {"table": "posts", "list_rule": ""}},
            }
        )
        clients: list[asyncio.Task[End | None]] = []

        async def serve() -> None:
            async with run_service(config) as service:
                clients.append(asyncio.create_task(follow(service.port)))
                await asyncio.Event().wait()

        async def follow(port: int) -> End | None:
            async with listener(Address(host="127.0.0.1", port=port), "posts/*") as received:
                await write.execute("INSERT INTO posts VALUES ('a')")
                return await received.stream.wait_end(20)

        async with asyncio.timeout(30):
            with pytest.raises(ExceptionGroup) as failed:
                await serve()
            (client,) = clients
            assert await client is End.ORDERLY

    assert failed.group_contains(UnforeseenError)
