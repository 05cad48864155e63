"""Replicas of one log as their clients and operators see them, without faults."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import psycopg
import pytest
import yaml

from pgrealtime.config.model import LogConfig
from pgrealtime.feed.frames import EraFrame
from pgrealtime.feed.wire import encode_frame
from pgrealtime.history import SystemIdentity, make_era
from pgrealtime.log.beat import Beat, encode
from pgrealtime.log.connection import LogNames, connect
from pgrealtime.log.jetstream import LogStream, stream_config
from pgrealtime.log.message import WIRE_VERSION, Chain, Kind
from pgrealtime.lsn import LSN
from tests.conformance.process import ServerDiedError
from tests.conftest import MakeDatabase
from tests.log_world import (
    Cluster,
    Listener,
    NatsServer,
    Replica,
    cluster,
    drop_slot,
    everyone_has,
    nats_server,
)
from tests.realtime import open_stream, subscribe

SECONDS = 20.0


@asynccontextmanager
async def replicas(
    url: str, folder: Path, *, count: int = 2, starts: bool = True, **given: Any
) -> AsyncIterator[tuple[Cluster, NatsServer]]:
    name = f"log_{uuid4().hex[:8]}"
    slot = {"name": name, "durable": True, "allow_unlimited_wal": True}
    sections = {"replication": {"slot": slot}} | given.pop("sections", {})
    async with nats_server() as nats:
        try:
            async with cluster(
                url, [nats], folder, count=count, sections=sections, starts=starts, **given
            ) as made:
                yield made, nats
        finally:
            await drop_slot(url, name)


async def insert(url: str, first: int, last: int, table: str = "numbers") -> None:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(
            f"INSERT INTO {table} SELECT i, 'x' FROM generate_series(%s::int8, %s) i".encode(),
            [first, last],
        )


async def until_ready(replica: Replica) -> None:
    async with asyncio.timeout(SECONDS):
        while "not_ready" in (said := await replica.ready()) or "ready" not in said:
            await asyncio.sleep(0.05)


async def until_reason(replica: Replica, reason: str) -> None:
    async with asyncio.timeout(SECONDS):
        while reason not in await replica.ready():
            await asyncio.sleep(0.05)


async def test_a_call_may_arrive_at_any_replica(database_url: str, tmp_path: Path) -> None:
    async with replicas(database_url, tmp_path) as (made, _):
        one, other = made.replicas
        await until_ready(other)
        stream, client_id = await open_stream(one.address)
        status = await subscribe(other.address, client_id, "numbers/*")
        unknown = await subscribe(other.address, "Zz" + client_id[2:], "numbers/*")
        await insert(database_url, 1, 1)
        (message,) = await stream.take(1, SECONDS)
        counts = await other.metrics()
        await stream.close()
    assert (status, unknown) == (204, 404)
    assert b'"id":"1"' in message
    assert counts['pgrealtime_calls_forwarded_total{result="ok"}'] == 1.0


async def test_one_replica_owns_the_log_and_says_so(database_url: str, tmp_path: Path) -> None:
    async with replicas(database_url, tmp_path) as (made, _):
        for replica in made.replicas:
            await until_ready(replica)
        await insert(database_url, 1, 100)
        await asyncio.sleep(1.5)
        metrics = [await replica.metrics() for replica in made.replicas]
    assert sorted(each["pgrealtime_owner"] for each in metrics) == [0.0, 1.0]
    assert {each["pgrealtime_log_term"] for each in metrics} == {1.0}
    assert {each["pgrealtime_log_lag_messages"] for each in metrics} == {0.0}
    assert {each["pgrealtime_replication_changes_total"] for each in metrics} == {100.0}
    for each in metrics:
        digests = {n: v for n, v in each.items() if n.startswith("pgrealtime_replicas{")}
        assert list(digests.values()) == [2.0]


async def test_a_replica_that_starts_later_has_the_window_of_the_others(
    database_url: str, tmp_path: Path
) -> None:
    """A client resumes there from before it was started, and receives every row once."""
    async with replicas(database_url, tmp_path, starts=False) as (made, _):
        first, late = made.replicas
        await first.start()
        early = Listener("early", [first.address])
        task = asyncio.create_task(early.listen())
        async with asyncio.timeout(SECONDS):
            while not early._position:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        position = early._position
        for n in range(40):
            await insert(database_url, n * 50 + 1, n * 50 + 50)
        await everyone_has([early], 2000)
        await late.start()
        await until_ready(late)
        resumed = Listener("resumed", [late.address])
        resumed._position = position
        other = asyncio.create_task(resumed.listen())
        await everyone_has([resumed], 2000)
        for one in (task, other):
            one.cancel()
        await asyncio.wait([task, other])
    assert (resumed.faults, resumed.resyncs) == ([], [])
    assert list(resumed.arrived) == list(range(1, 2001))


@pytest.mark.parametrize(
    "count",
    [
        6,
        pytest.param(
            12,
            marks=pytest.mark.skipif(
                os.environ.get("PGREALTIME_TEST_LOG") != "all",
                reason="60 MB, of the changelog's 64 MiB: PGREALTIME_TEST_LOG=all runs it",
            ),
        ),
    ],
)
async def test_a_transaction_larger_than_a_message_comes_whole(
    count: int, database_url: str, tmp_path: Path
) -> None:
    """It is cut into parts, within a row as well."""
    async with replicas(database_url, tmp_path) as (made, _):
        await until_ready(made.replicas[1])
        follower = made.replicas[1]
        stream, client_id = await open_stream(follower.address)
        assert await subscribe(follower.address, client_id, "numbers/*") == 204
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
            await other.execute(
                "INSERT INTO numbers SELECT i, repeat(chr(64 + i), 5000000)"
                " FROM generate_series(1, %s) i",
                [count],
            )
        taken = [message for _ in range(count) for message in await stream.take(1, SECONDS)]
        await stream.close()
    assert [chr(64 + n).encode() * 5_000_000 in m for n, m in enumerate(taken, start=1)] == (
        [True] * count
    )


LETTERS = {"letters": {"table": "letters", "list_rule": "", "view_rule": ""}}


async def test_the_owner_streams_what_any_replica_wants(database_url: str, tmp_path: Path) -> None:
    """While a roll-out lasts a replica has a table that the owner's configuration doesn't have."""
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute("CREATE TABLE letters (id bigint PRIMARY KEY, text text)")
    async with replicas(database_url, tmp_path, starts=False) as (made, _):
        owner, newer = made.replicas
        await owner.start()
        await until_ready(owner)
        listening = Listener("numbers", [owner.address])
        task = asyncio.create_task(listening.listen())
        add_collections(newer, LETTERS)
        await newer.start()
        await until_ready(newer)
        stream, client_id = await open_stream(newer.address)
        assert await subscribe(newer.address, client_id, "letters/*") == 204
        await insert(database_url, 1, 1, "letters")
        # What the owner streams already goes past that row.
        await insert(database_url, 1, 10)
        (message,) = await stream.take(1, SECONDS)
        await everyone_has([listening], 10)
        task.cancel()
        await asyncio.wait([task])
        await stream.close()
    assert b'"letters"' in message
    assert (listening.faults, listening.resyncs) == ([], [])


async def test_a_reload_gets_its_table_from_the_owner_or_the_owners_error(
    database_url: str, tmp_path: Path
) -> None:
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute("CREATE TABLE letters (id bigint PRIMARY KEY, text text)")
        await connection.execute("CREATE UNLOGGED TABLE fleeting (id bigint PRIMARY KEY, t text)")
    async with replicas(database_url, tmp_path) as (made, _):
        owner = await made.owner()
        (other,) = (replica for replica in made.replicas if replica is not owner)
        await until_ready(other)
        assert other.process is not None
        unlogged = {"fleeting": {"table": "fleeting", "list_rule": ""}}
        before = other.config.read_text()
        add_collections(other, unlogged)
        refused = await other.process.reload()
        other.config.write_text(before)
        add_collections(other, LETTERS)
        accepted = await other.process.reload()
        stream, client_id = await open_stream(other.address)
        assert await subscribe(other.address, client_id, "letters/*") == 204
        await insert(database_url, 1, 1, "letters")
        (message,) = await stream.take(1, SECONDS)
        await stream.close()
    assert (refused, accepted) == (False, True)
    assert b'"letters"' in message


def add_collections(replica: Replica, collections: Mapping[str, Any]) -> None:
    settings = yaml.safe_load(replica.config.read_text())
    settings["collections"] |= collections
    replica.config.write_text(yaml.safe_dump(settings, sort_keys=False))


# -- bad input


async def test_a_replica_with_another_window_is_refused(database_url: str, tmp_path: Path) -> None:
    """Its clients would find another window than those of the others, or the log too short."""
    async with replicas(database_url, tmp_path, starts=False) as (made, _):
        first, other = made.replicas
        await first.start()
        await until_ready(first)
        settings = yaml.safe_load(other.config.read_text()) | {"changelog": {"max_size": "16MiB"}}
        other.config.write_text(yaml.safe_dump(settings))
        with suppress(ServerDiedError):
            await other.start()
        assert other.process is not None
        async with asyncio.timeout(SECONDS):
            assert await other.process._process.wait() != 0
        assert "log_unfit" in other.process.output()
        assert "changelog and log sections" in other.process.output()
        await until_ready(first)


async def test_another_databases_log_under_this_name_is_not_followed(
    make_database: MakeDatabase, tmp_path: Path
) -> None:
    """Nothing of it is delivered, and its owner isn't disturbed."""
    one, other = make_database(), make_database()
    (tmp_path / "other").mkdir()
    async with replicas(one, tmp_path, count=1) as (made, nats):
        (owner,) = made.replicas
        await until_ready(owner)
        slot = {"name": "log_other", "durable": True, "allow_unlimited_wal": True}
        async with cluster(
            other,
            [nats],
            tmp_path / "other",
            count=1,
            sections={"replication": {"slot": slot}},
        ) as strangers:
            (stranger,) = strangers.replicas
            await until_reason(stranger, "log_foreign")
            await insert(one, 1, 5)
            await asyncio.sleep(1.0)
            assert (await stranger.metrics())["pgrealtime_replication_changes_total"] == 0.0
            assert stranger.logged("log.foreign")
            assert stranger.logged("owner.taken") == []
            assert "ready" in await owner.ready()
            assert owner.logged("owner.stopped") == []


@asynccontextmanager
async def strange_owner(nats: NatsServer) -> AsyncIterator[LogStream]:
    """A connection that may write whatever an owner may."""
    config, names = LogConfig(nats=f"nats://127.0.0.1:{nats.port}"), LogNames(name="test")
    limits = stream_config(names, config, max_age=300.0, max_bytes=64 << 20)
    async with connect(config, names, client_name="strange") as client:
        stream = LogStream(client, names, limits)
        await stream.open()
        yield stream


async def test_a_later_versions_log_is_left_to_later_versions(
    database_url: str, tmp_path: Path
) -> None:
    """A replica that can't read the log isn't ready, and takes nothing over while it is owned.

    Once nobody owns it any more, as after a roll-back, it goes on by the slot.
    """
    async with (
        replicas(database_url, tmp_path, count=1, starts=False) as (made, nats),
        strange_owner(nats) as stream,
    ):
        chain = Chain(1, 0, salt=1, max_payload=1000)
        for after, payload in chain.messages(Kind.FENCE, b""):
            await (await stream.append(bytes([WIRE_VERSION + 1]) + payload[1:], after))
        beating = asyncio.create_task(beat_for_ever(stream, term=1, salt=1))
        (replica,) = made.replicas
        await replica.start()
        await until_reason(replica, "log_newer")
        async with asyncio.timeout(SECONDS):
            while "owner_away" in await replica.ready():
                await asyncio.sleep(0.05)
        assert replica.logged("owner.taken") == []
        beating.cancel()
        await asyncio.wait([beating])
        await until_ready(replica)
        assert [taken["term"] for taken in replica.logged("owner.taken")] == [2]


async def test_a_message_that_does_not_decode_is_a_gap_and_reported(
    database_url: str, tmp_path: Path
) -> None:
    """The owner's message counts, and nobody knows what it said: clients are told."""
    async with (
        replicas(database_url, tmp_path, count=1, starts=False) as (made, nats),
        strange_owner(nats) as stream,
    ):
        async with await psycopg.AsyncConnection.connect(database_url) as connection:
            cursor = await connection.execute(
                "SELECT system_identifier::text FROM pg_control_system()"
            )
            row = await cursor.fetchone()
            assert row is not None
        name = str(psycopg.conninfo.conninfo_to_dict(database_url)["dbname"])
        system = SystemIdentity(system_id=row[0], timeline=1, database_name=name)
        era = EraFrame(make_era(system, [("public", "numbers")]), LSN(100))  # type: ignore[list-item]
        chain = Chain(1, 0, salt=1, max_payload=100_000)
        said = [(Kind.FENCE, b""), (Kind.ERA, encode_frame(era))]
        for kind, body in said:
            for after, payload in chain.messages(kind, body):
                await (await stream.append(payload, after))
        beating = asyncio.create_task(beat_for_ever(stream, term=1, salt=1))
        (replica,) = made.replicas
        await replica.start()
        listener = Listener("one", [replica.address])
        task = asyncio.create_task(listener.listen())
        async with asyncio.timeout(SECONDS):
            while not listener._position:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        for after, payload in chain.messages(Kind.ENTRIES, msgspec.msgpack.encode([9, "what"])):
            await (await stream.append(payload, after))
        async with asyncio.timeout(SECONDS):
            while not listener.resyncs:
                await asyncio.sleep(0.05)
        assert "slot_lost" in listener.resyncs[0]
        assert [said["code"] for said in replica.logged("log.unreadable")] == ["log_unreadable"]
        for one in (task, beating):
            one.cancel()
        await asyncio.wait([task, beating])


async def beat_for_ever(stream: LogStream, *, term: int, salt: int) -> None:
    while True:
        beat = Beat(
            term=term,
            salt=salt,
            tag="strange",
            sequence=1,
            head_lsn=LSN(0),
            wal_end=LSN(0),
            deaf_seconds=0.0,
            is_streaming=True,
        )
        await stream.client.publish(stream.names.subject("beat"), encode(beat))
        await asyncio.sleep(0.1)
