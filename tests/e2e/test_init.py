"""From a database to the first event in three commands: ``init``, ``check``, ``run``."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psycopg

from tests.conformance.http_client import Address
from tests.conformance.pgrealtime_server import command
from tests.conformance.process import ServerProcess, free_port
from tests.e2e.listener import listener
from tests.e2e.service import environ_of, token
from tests.integration.test_init import unlocked
from tests.program import run_program

SCHEMA = """
CREATE TABLE users (id text PRIMARY KEY, email text, password_hash text);
CREATE TABLE posts (id int PRIMARY KEY, author text NOT NULL REFERENCES users);
CREATE TABLE "Order Items" (id int PRIMARY KEY, "the price" int);
INSERT INTO users VALUES ('ann'), ('bob');
"""
WRITES = """
INSERT INTO posts VALUES (1, 'bob');
INSERT INTO posts VALUES (2, 'ann');
INSERT INTO "Order Items" VALUES (3, 4);
"""


async def test_a_new_user_receives_the_first_event(database_url: str, tmp_path: Path) -> None:
    """With the suggestions unchanged Ann receives her post and not Bob's."""
    file = tmp_path / "pgrealtime.yaml"
    address = Address(host="127.0.0.1", port=free_port())
    environment = environ_of(database_url, file, address)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as write:
        await write.execute(SCHEMA.encode())
        await _run("init", environment)
        await _run("check", environment)
        file.write_text(unlocked(file.read_text(encoding="utf-8")), encoding="utf-8")
        await _run("check", environment)
        process = await ServerProcess.start([command(), "run"], tmp_path / "log", environment)
        try:
            await process.wait_healthy(address)
            topics = ("posts/*", "Order_Items/*")
            async with listener(address, *topics, token=token("ann")) as ann:
                await write.execute(WRITES.encode())
                post, item = await ann.take(2)
        finally:
            await process.stop()

    assert (post.data["record"]["id"], post.data["record"]["author"]) == ("2", "ann")
    assert (item.data["record"]["id"], item.data["record"]["the_price"]) == ("3", 4)


async def _run(name: str, environment: dict[str, str]) -> None:
    outcome = await asyncio.to_thread(run_program, name, cwd=None, **environment)
    assert outcome.code == 0, outcome.err
