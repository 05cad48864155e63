"""The stream of the log in a real nats-server, and the rule of reading on what it stores."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pgrealtime.config.model import Config, LogConfig
from pgrealtime.errors import LogAwayError, LogError
from pgrealtime.log.connection import LogNames, connect
from pgrealtime.log.jetstream import AppendRefusedError, LogStream, StoredMessage, stream_config
from pgrealtime.log.message import HEAD_BYTES, Chain, Kind
from pgrealtime.log.probe import probe_log
from pgrealtime.log.reading import LogReading, Verdict
from tests.log_world import NatsServer, nats_server

NAMES = LogNames(name="test")
SECONDS = 5.0


@pytest.fixture
async def server() -> AsyncIterator[NatsServer]:
    async with nats_server() as running:
        yield running


@asynccontextmanager
async def log_stream(server: NatsServer, **changed: Any) -> AsyncIterator[LogStream]:
    config = LogConfig(nats=f"nats://127.0.0.1:{server.port}")
    limits = stream_config(NAMES, config, max_age=300.0, max_bytes=1 << 20) | changed
    async with connect(config, NAMES, client_name="test") as client:
        stream = LogStream(client, NAMES, limits)
        await stream.open()
        yield stream


async def append(stream: LogStream, message: tuple[int, bytes]) -> int:
    after, payload = message
    async with asyncio.timeout(SECONDS):
        return await (await stream.append(payload, after))


def messages(chain: Chain, *bodies: bytes) -> Sequence[tuple[int, bytes]]:
    return [one for body in bodies for one in chain.messages(Kind.ENTRIES, body)]


async def read(stream: LogStream, *, obeys: bool) -> list[bytes]:
    """Return the bodies that a reader applies, by the rule or without it."""
    reading, bodies = LogReading(max_bytes=1000), []
    for sequence in range(1, (await stream.state()).last + 1):
        message = await stream.get(sequence)
        assert message is not None
        taken = reading.take(sequence, message.payload)
        if taken.body:
            bodies.append(taken.body)
        elif taken.verdict is Verdict.VOID and not obeys:
            bodies.append(message.payload[HEAD_BYTES:])
    return bodies


async def two_owners(stream: LogStream) -> None:
    """An old owner has two messages under way, and a new one's fence arrives before them."""
    old = Chain(1, 0, salt=1, max_payload=1000)
    await append(stream, old.messages(Kind.FENCE, b"")[0])
    await append(stream, messages(old, b"1")[0])
    second, third = messages(old, b"2", b"3")

    new = Chain(2, 2, salt=2, max_payload=1000)
    await append(stream, new.messages(Kind.FENCE, b"")[0])
    with pytest.raises(AppendRefusedError):
        await append(stream, second)
    # It expects the sequence that "2" would have had, and the fence has.
    assert await append(stream, third) == 4
    # The new owner goes on at the head of what it has read: entries end in LSN order, so who
    # applied "3" would skip "2".
    with pytest.raises(AppendRefusedError):
        await append(stream, messages(new, b"2")[0])
    newer = Chain(3, 4, salt=3, max_payload=1000)
    await append(stream, newer.messages(Kind.FENCE, b"")[0])
    for message in messages(newer, b"2", b"3"):
        await append(stream, message)


@pytest.mark.parametrize(("obeys", "head"), [(True, [b"1", b"2", b"3"]), (False, [b"1", b"3"])])
async def test_the_expected_sequence_alone_lets_a_hole_through(
    server: NatsServer, *, obeys: bool, head: list[bytes]
) -> None:
    """The server stores what an old owner sent after a message that it refused."""
    async with log_stream(server) as stream:
        await two_owners(stream)
        applied: list[bytes] = []
        for body in await read(stream, obeys=obeys):
            if not applied or body > applied[-1]:  # what ends at or before the head is skipped
                applied.append(body)
    assert applied == head


async def test_messages_come_once_they_are_stored_and_name_the_one_before(
    server: NatsServer,
) -> None:
    heard: asyncio.Queue[StoredMessage] = asyncio.Queue()
    async with log_stream(server) as one, log_stream(server) as other:
        await other.follow(heard.put)
        await other.client.flush()
        chain = Chain(1, 0, salt=1, max_payload=1000)
        await append(one, chain.messages(Kind.FENCE, b"")[0])
        with pytest.raises(AppendRefusedError):
            await append(one, (0, b"refused"))
        await append(one, messages(chain, b"a")[0])
        async with asyncio.timeout(SECONDS):
            live = [await heard.get() for _ in range(2)]
        fetched = await other.get_all([1, 2, 3])
    assert [(m.sequence, m.before) for m in live] == [(1, 0), (2, 1)]
    assert [m and (m.payload, m.stored_at) for m in fetched] == [
        *((m.payload, m.stored_at) for m in live),
        None,
    ]
    assert live[1].payload[HEAD_BYTES:] == b"a"


async def test_a_stream_with_other_limits_is_refused(server: NatsServer) -> None:
    """Another configuration, or another program under this name."""
    async with log_stream(server):
        with pytest.raises(LogError) as raised:
            async with log_stream(server, max_bytes=1 << 22):
                pass
    assert raised.value.error_code == "log_unfit"
    assert "max_bytes is 2097152 instead of 4194304" in raised.value.detail
    assert not raised.value.retryable


async def test_copies_need_a_cluster(server: NatsServer) -> None:
    with pytest.raises(LogError, match="keeps no copies") as raised:
        async with log_stream(server, num_replicas=3):
            pass
    assert not raised.value.retryable


async def test_acknowledgements_end_with_the_connection(server: NatsServer) -> None:
    """Whether the message was stored is not known then; only the log says it."""
    config = LogConfig(nats=f"nats://127.0.0.1:{server.port}")
    limits = stream_config(NAMES, config, max_age=300.0, max_bytes=1 << 20)
    opened: list[LogStream] = []

    def disconnected() -> None:
        for stream in opened:
            stream.disconnected()

    async with connect(
        config,
        NAMES,
        client_name="test",
        on_disconnected=disconnected,
    ) as client:
        opened.append(stream := LogStream(client, NAMES, limits))
        await stream.open()
        future = asyncio.get_running_loop().create_future()
        stream._acknowledgements["x"] = future
        await server.kill()
        with pytest.raises(LogAwayError):
            async with asyncio.timeout(SECONDS):
                await future


# -- permissions


def user(permissions: str) -> str:
    return (
        f"authorization {{ users: [{{user: u, password: p, permissions: {{ {permissions} }}}}] }}"
    )


def config_for(server: NatsServer, login: str = "u:p") -> Config:
    return Config.model_validate(
        {
            "replication": {"slot": {"durable": True}},
            "cluster": {"bus": "nats", "name": "test", "secret": "x" * 32},
            "log": {"nats": f"nats://{login}@127.0.0.1:{server.port}"},
        }
    )


async def test_the_permissions_that_check_prints_are_enough_and_needed(
    server: NatsServer,
) -> None:
    await server.stop()
    server.extra = user(NAMES.permissions)
    await server.start()
    first = await probe_log(config_for(server))
    assert first[0].endswith("the stream will be made")
    assert NAMES.permissions in first[1]
    async with (
        connect(config_for(server).log, NAMES, client_name="test") as client,
    ):
        changelog = config_for(server).changelog
        stream = LogStream(
            client,
            NAMES,
            stream_config(
                NAMES,
                config_for(server).log,
                max_age=changelog.max_age,
                max_bytes=changelog.max_size,
            ),
        )
        await stream.open()
        await append(stream, Chain(1, 0, salt=1, max_payload=99).messages(Kind.FENCE, b"")[0])
    assert (await probe_log(config_for(server)))[0].endswith("is there")

    for missing, replaced in (
        ('"pgrt.test.>", ', ""),
        ("STREAM.INFO", "STREAM.NAMES"),
        ("DIRECT.GET", "DIRECT.SET"),
    ):
        await server.stop()
        server.extra = user(NAMES.permissions.replace(missing, replaced, 1))
        await server.start()
        with pytest.raises(LogError) as raised:
            await probe_log(config_for(server))
        assert raised.value.error_code == "log_denied", missing
        assert NAMES.permissions in raised.value.hint


async def test_a_login_that_is_refused_is_named(server: NatsServer) -> None:
    await server.stop()
    server.extra = user(NAMES.permissions)
    await server.start()
    with pytest.raises(LogError) as raised:
        await probe_log(config_for(server, "u:wrong"))
    assert raised.value.error_code == "log_denied"
    assert "wrong" not in str(raised.value)


async def test_nothing_at_the_address_is_named(server: NatsServer) -> None:
    await server.stop()
    with pytest.raises(LogAwayError, match="NATS doesn't answer"):
        await probe_log(config_for(server))


async def test_credentials_that_cannot_be_read_are_named() -> None:
    config = LogConfig(nats="nats://127.0.0.1:1", credentials_file="/nowhere/x.creds")
    with pytest.raises(LogError) as raised:
        async with connect(config, NAMES, client_name="test"):
            pass
    assert raised.value.error_code == "log_credentials"
