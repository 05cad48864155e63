"""``pgrealtime listen`` and ``token``: a subscriber in the terminal."""

from __future__ import annotations

import asyncio
import json
import random
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pgrealtime.cli.listen import ServerSentEvent, parse_events
from tests.conformance.pgrealtime_server import command
from tests.conformance.process import free_port
from tests.e2e.breaker import breaker
from tests.e2e.numbered import OPEN, fresh_seed, write_numbered
from tests.e2e.service import Service, service

SECONDS = 60.0


@asynccontextmanager
async def listening(directory: Path, *arguments: str) -> AsyncIterator[Process]:
    """Run it with the service's configuration; it is connected once it says so, and ended after."""
    program = [command(), "listen", "-c", str(directory / "pgrealtime.yaml"), *arguments]
    process = await asyncio.create_subprocess_exec(*program, stdout=PIPE, stderr=PIPE)
    try:
        await until_printed(process, "listening to")
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def until_printed(process: Process, text: str) -> str:
    """Wait for a line about the connection."""
    assert process.stderr is not None
    async with asyncio.timeout(SECONDS):
        while line := (await process.stderr.readline()).decode():
            if text in line:
                return line
    raise AssertionError(f"it never said: {text}")


async def received(process: Process) -> list[tuple[str, str, dict[str, object]]]:
    """Return topic, action and record of all events, once it has ended by itself."""
    async with asyncio.timeout(SECONDS):
        output, _ = await process.communicate()
    assert process.returncode == 0
    parts = [line.split(" ", 2) for line in output.decode().splitlines()]
    return [(topic, action, json.loads(record)) for topic, action, record in parts]


async def run(*arguments: str) -> tuple[int | None, str, str]:
    """Run a command to its end; return its exit code and output."""
    process = await asyncio.create_subprocess_exec(command(), *arguments, stdout=PIPE, stderr=PIPE)
    async with asyncio.timeout(SECONDS):
        output, errors = await process.communicate()
    return process.returncode, output.decode(), errors.decode()


async def write(running: Service, *ids: str, author: str) -> None:
    for one in ids:
        insert = "INSERT INTO posts (id, title, author) VALUES (%s, %s, %s)"
        await running.write.execute(insert, [one, 'a "quoted" }', author])


async def test_a_refused_token_and_topics_that_bring_nothing_are_said(
    database_url: str, tmp_path: Path
) -> None:
    """The service answers them with 204, as PocketBase does.

    The command warns that no events will come.
    """
    collections = {"posts": {"table": "posts", "list_rule": ""}}
    async with service(database_url, tmp_path, collections=collections):
        program = [command(), "listen", "-c", str(tmp_path / "pgrealtime.yaml")]
        topics = ["posts/*", "psots/*", "posts/1", "--token", "nonsense"]
        process = await asyncio.create_subprocess_exec(*program, *topics, stdout=PIPE, stderr=PIPE)
        try:
            said = [await until_printed(process, text) for text in ("listening", "token", "psots")]
            said.append(await until_printed(process, "posts/1"))
        finally:
            process.kill()
            await process.wait()
    assert [line.partition(" ")[0] for line in said] == ["listening", "the", "psots/*", "posts/1"]


async def test_the_terminal_receives_what_its_user_may_see(
    database_url: str, tmp_path: Path
) -> None:
    async with (
        service(database_url, tmp_path) as running,
        listening(tmp_path, "posts/*", "posts/b1", "--user", "users/bob", "--count", "3") as bob,
    ):
        await write(running, "a1", author="ann")
        await write(running, "b1", "b2", author="bob")
        events = await received(bob)
    assert [(topic, action, record["id"]) for topic, action, record in events] == [
        ("posts/*", "create", "b1"),
        ("posts/b1", "create", "b1"),
        ("posts/*", "create", "b2"),
    ]
    assert events[0][2]["title"] == 'a "quoted" }'


async def test_a_made_token_authenticates_the_user_it_names(
    database_url: str, tmp_path: Path
) -> None:
    async with service(database_url, tmp_path) as running:
        made = ["token", "make", "-c", str(tmp_path / "pgrealtime.yaml"), "users/ann"]
        code, token, _ = await run(*made, "--lifetime", "5m")
        assert code == 0
        async with listening(
            tmp_path, "posts/*", "--token", token.strip(), "--url", running.url, "--count", "1"
        ) as ann:
            await write(running, "b1", author="bob")
            await write(running, "a1", author="ann")
            assert [record["id"] for _, _, record in await received(ann)] == ["a1"]


async def test_token_is_made_only_where_a_secret_is_known(tmp_path: Path) -> None:
    config = tmp_path / "pgrealtime.yaml"
    config.write_text(
        "version: 1\nauth:\n  issuers:\n"
        "    - {name: app, jwks_url: 'http://127.0.0.1:1/keys', collection: users}\n"
        "    - {name: own, secret: a secret of more than thirty-two bytes, collection: members}\n"
    )
    code, output, errors = await run("token", "make", "-c", str(config), "users/ann")
    assert (code, output) == (2, "")
    assert "token_unsigned" in errors
    code, _, errors = await run("token", "make", "-c", str(config), "member/ann")
    assert code == 2
    assert 'Perhaps you meant "members".' in errors


async def test_nothing_is_missed_over_lost_connections(database_url: str, tmp_path: Path) -> None:
    """Cut at random bytes; each event comes once, in order."""
    seed = fresh_seed()
    async with (
        service(database_url, tmp_path, collections=OPEN) as running,
        breaker(running.address, random.Random(seed)) as proxy,
        listening(tmp_path, "posts/*", "--url", proxy.url, "--count", "202") as client,
    ):
        proxy.longest = 12_000
        last = await write_numbered(running, 202, 0.02)
        proxy.longest = 0
        events = await received(client)
        breaks = proxy.breaks
    assert breaks >= 1
    assert [record["n"] for _, _, record in events] == list(range(1, 203))
    assert last >= 202


async def test_a_gap_is_reported(database_url: str, tmp_path: Path) -> None:
    """The service's changelog ends with the process: a client that resumes is notified of a gap."""
    async with (
        service(database_url, tmp_path, collections=OPEN) as running,
        listening(tmp_path, "posts/*", "--count", "1") as client,
    ):
        await running.stop()
        await running.write.execute("INSERT INTO posts (id, title) VALUES ('missed', 'x')")
        await running.start()
        line = await until_printed(client, "gap")
        await running.write.execute("INSERT INTO posts (id, title) VALUES ('heard', 'x')")
        assert [record["id"] for _, _, record in await received(client)] == ["heard"]
    assert line == "gap (expired): reload everything\n"


@pytest.mark.parametrize(
    ("topic", "path", "said"),
    [
        ("posts/*", ":1", "service_unreachable"),
        ("posts/*", "/elsewhere", "answered with status 404"),
        ("x" * 2501, "", "answered with status 400"),
    ],
)
async def test_refusals_are_reported(
    database_url: str, tmp_path: Path, topic: str, path: str, said: str
) -> None:
    async with service(database_url, tmp_path) as running:
        url = f"http://127.0.0.1:{free_port()}" if path == ":1" else running.url + path
        code, output, errors = await run("listen", "--url", url, topic)
    assert (code, output) == (1, "")
    assert said in errors


async def test_events_are_read_wherever_the_bytes_are_cut() -> None:
    stream = (
        b'id:c1\nevent:PB_CONNECT\ndata:{"clientId":"c1"}\n\n:\n\n'
        b"event: a\ndata: 1\ndata:2\n\nretry:5\n\nid:x\n\nevent:\xc3\xa9\ndata:\n\nid:half\n"
    )
    expected = [
        ServerSentEvent(id="c1", event="PB_CONNECT", data='{"clientId":"c1"}'),
        ServerSentEvent(event="a", data="1\n2"),
        ServerSentEvent(id="x"),
        ServerSentEvent(event="é"),
    ]

    async def pieces(size: int) -> AsyncIterator[bytes]:
        for start in range(0, len(stream), size):
            yield stream[start : start + size]

    for size in range(1, len(stream) + 1):
        assert [frame async for frame in parse_events(pieces(size))] == expected
