"""Replicas that share a log: their servers, the links between them, and clients that count rows."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
import yaml

from tests.conformance.http_client import Address, EventStream, ProtocolError, Request, send
from tests.conformance.pgrealtime_server import command
from tests.conformance.process import ServerDiedError, ServerProcess, free_port
from tests.e2e.listener import parse
from tests.lacking import lacking
from tests.realtime import subscribe

SECRET = "a secret that the replicas of a cluster share"
SCHEMA = "CREATE TABLE numbers (id bigint PRIMARY KEY, filler text)"


def nats_program() -> str:
    """Return the path of nats-server; Debian has it in /usr/sbin."""
    program = shutil.which("nats-server", path=f"{os.environ.get('PATH')}:/usr/sbin")
    if program is None:
        lacking("no nats-server")
    return program


async def drop_slot(url: str, name: str) -> None:
    """Drop a slot, if it is there, once nobody reads it."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        for _ in range(50):
            with suppress(psycopg.errors.ObjectInUse):
                await connection.execute(
                    "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
                    " WHERE slot_name = %s",
                    (name,),
                )
                return
            await asyncio.sleep(0.1)


class NatsServer:
    """A nats-server with JetStream in a folder; one of a cluster if it has ``routes``."""

    def __init__(self, folder: Path, *, name: str = "n1", extra: str = "") -> None:
        self.folder = folder
        self.port = free_port()
        self.name = name
        self.extra = extra
        self._process: ServerProcess | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    async def start(self) -> None:
        config = self.folder / "nats.conf"
        config.write_text(
            f"server_name: {self.name}\nlisten: 127.0.0.1:{self.port}\n"
            f'jetstream {{ store_dir: "{self.store}" }}\n{self.extra}'
        )
        self._process = await ServerProcess.start(
            [nats_program(), "-c", str(config)], self.folder / "nats.log"
        )
        async with asyncio.timeout(10):
            while True:
                with suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.close()
                    return
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        if self._process is not None:
            await self._process.stop()

    async def kill(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGKILL)
        await self._process._process.wait()

    async def wipe(self) -> None:
        """Come back with nothing."""
        await self.kill()
        shutil.rmtree(self.store)
        await self.start()

    async def set_back(self, seconds: float) -> None:
        """Come back as it was on its disk so many seconds before it was killed."""
        copy = self.folder / "copy"
        shutil.copytree(self.store, copy)
        await asyncio.sleep(seconds)
        await self.kill()
        shutil.rmtree(self.store)
        copy.rename(self.store)
        await self.start()


@asynccontextmanager
async def nats_cluster() -> AsyncIterator[list[NatsServer]]:
    """Start three servers that hold copies of each stream."""
    with TemporaryDirectory(prefix="pgrealtime-nats.") as folder:
        ports = [free_port() for _ in range(3)]
        routes = ", ".join(f"nats://127.0.0.1:{port}" for port in ports)
        servers = []
        for n, port in enumerate(ports):
            (place := Path(folder) / str(n)).mkdir()
            extra = f"cluster {{ name: c, listen: 127.0.0.1:{port}, routes: [{routes}] }}\n"
            servers.append(NatsServer(place, name=f"n{n}", extra=extra))
        try:
            for server in servers:
                await server.start()
            yield servers
        finally:
            for server in servers:
                await server.stop()


@asynccontextmanager
async def nats_server() -> AsyncIterator[NatsServer]:
    with TemporaryDirectory(prefix="pgrealtime-nats.") as folder:
        server = NatsServer(Path(folder))
        await server.start()
        try:
            yield server
        finally:
            await server.stop()


class Link:
    """A TCP port that forwards to another, until it is cut: then it holds both ends and drops."""

    def __init__(self, port: int) -> None:
        self.port = 0
        self._target = port
        self._mended = asyncio.Event()
        self._mended.set()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        self._mended.clear()

    def lead_to(self, port: int) -> None:
        """Forward to another server; connections to the one before are reset."""
        self._target = port
        self.mend()

    def mend(self) -> None:
        """Forward again; connections of before the cut are reset."""
        for writer in self._writers:
            writer.transport.abort()
        self._mended.set()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.mend()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._mended.wait()
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers.add(to_writer)
            try:
                await asyncio.gather(self._pump(reader, to_writer), self._pump(to_reader, writer))
            finally:
                self._writers.discard(to_writer)
                to_writer.transport.abort()
        except OSError:
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            await self._mended.wait()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError


@dataclass
class Replica:
    """One process, with links of its own to PostgreSQL and NATS."""

    name: str
    config: Path
    address: Address
    admin_port: int
    database: Link
    nats: Link
    process: ServerProcess | None = None

    async def start(self) -> None:
        self.process = await ServerProcess.start(
            [command(), "run", "-c", str(self.config)], self.config.with_suffix(".log")
        )
        await self.process.wait_healthy(self.address)

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.process is not None
        await self.process._process.wait()

    async def stop(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)
            await self.process.stop()

    def logged(self, event: str) -> list[dict[str, Any]]:
        assert self.process is not None
        return self.process.logged(event)

    async def ready(self) -> str:
        """Return the answer of /ready."""
        request = Request(method="GET", path="/ready", headers={})
        address = Address(host="127.0.0.1", port=self.admin_port)
        with suppress(OSError, ProtocolError):
            return (await send(request, address)).body.decode()
        return "no answer"

    async def metrics(self) -> dict[str, float]:
        request = Request(method="GET", path="/metrics", headers={})
        answer = await send(request, Address(host="127.0.0.1", port=self.admin_port))
        lines = (line.rpartition(" ") for line in answer.body.decode().splitlines())
        return {name: float(value) for name, _, value in lines if not name.startswith("#")}


@dataclass
class Cluster:
    """Replicas on one database and one log."""

    database_url: str
    nats: Sequence[NatsServer]
    replicas: list[Replica] = field(default_factory=list)

    async def owner(self, *, but: Replica | None = None, seconds: float = 20.0) -> Replica:
        """Return the replica that took over last, once one has that isn't ``but``."""
        async with asyncio.timeout(seconds):
            while True:
                taken = [
                    (said["term"], replica.name, replica)
                    for replica in self.replicas
                    for said in replica.logged("owner.taken")
                ]
                if taken and (found := max(taken)[2]) is not but:
                    return found
                await asyncio.sleep(0.02)


@asynccontextmanager
async def cluster(
    database_url: str,
    nats: Sequence[NatsServer],
    folder: Path,
    *,
    count: int = 3,
    sections: Mapping[str, Mapping[str, Any]] | None = None,
    log: Mapping[str, Any] | None = None,
    starts: bool = True,
) -> AsyncIterator[Cluster]:
    """Make the table, and start the replicas."""
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute(SCHEMA.encode())
    made = Cluster(database_url, nats)
    address = psycopg.conninfo.conninfo_to_dict(database_url)
    try:
        for n in range(count):
            made.replicas.append(
                await _make_replica(
                    f"r{n}", address, nats, folder, sections=sections or {}, log=log or {}
                )
            )
        if starts:
            await asyncio.gather(*(replica.start() for replica in made.replicas))
        yield made
    finally:
        for replica in made.replicas:
            replica.database.mend()
            replica.nats.mend()
        stopped = await asyncio.gather(*(r.stop() for r in made.replicas), return_exceptions=True)
        for replica in made.replicas:
            await replica.database.close()
            await replica.nats.close()
        for error in stopped:
            if isinstance(error, ServerDiedError):
                raise error  # one that ignores SIGTERM


async def _make_replica(
    name: str,
    address: Mapping[str, Any],
    nats: Sequence[NatsServer],
    folder: Path,
    *,
    sections: Mapping[str, Mapping[str, Any]],
    log: Mapping[str, Any],
) -> Replica:
    database = Link(int(address["port"]))
    link = Link(nats[int(name[1:]) % len(nats)].port)
    await database.open()
    await link.open()
    port, admin_port = free_port(), free_port()
    servers = [f"nats://127.0.0.1:{link.port}"]
    user = address.get("user", "postgres")
    settings: dict[str, Any] = {
        "version": 1,
        "database": {"url": f"postgresql://{user}@127.0.0.1:{database.port}/{address['dbname']}"},
        "replication": {"slot": {"durable": True, "allow_unlimited_wal": True}},
        "server": {"host": "127.0.0.1", "port": port},
        "admin": {"port": admin_port},
        "cluster": {"bus": "nats", "name": "test", "secret": SECRET},
        "log": {"nats": ",".join(servers), **log},
        "logging": {"format": "json"},
        "auth": {"allow_guests": True},
        "collections": {"numbers": {"table": "numbers", "list_rule": "", "view_rule": ""}},
    }
    for section, keys in sections.items():
        settings[section] = {**settings.get(section, {}), **keys}
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    public = Address(host="127.0.0.1", port=port)
    return Replica(name, config, public, admin_port, database, link)


class Listener:
    """A client that resumes at whatever replica answers, and counts rows in commit order."""

    def __init__(self, name: str, addresses: Sequence[Address], first: int = 0) -> None:
        self.name = name
        self.last = 0
        self.arrived: dict[int, float] = {}
        """When each row came."""
        self.resyncs: list[str] = []
        self.breaks = 0
        self.faults: list[str] = []
        self._addresses = addresses
        self._home = self._turn = first
        self._position = ""
        self._has_received = False

    @property
    def address(self) -> Address:
        """Where it is connected, or tries to be."""
        return self._addresses[self._turn % len(self._addresses)]

    async def listen(self) -> None:
        while True:
            with suppress(OSError, ProtocolError, asyncio.IncompleteReadError, TimeoutError):
                await self._connect(self.address)
            self.breaks += 1
            # To its own replica first, so that listeners stay spread over all of them.
            self._turn = self._home if self._has_received else self._turn + 1
            self._has_received = False
            await asyncio.sleep(0.05)

    async def _connect(self, address: Address) -> None:
        query = f"?lastEventId={self._position}"
        request = Request(method="GET", path=f"/api/realtime{query}", headers={})
        async with asyncio.timeout(5):
            stream = await EventStream.open(request, address, self.name)
        try:
            for raw in await stream.take(1, 5):
                message = parse(raw)
                async with asyncio.timeout(15):
                    status = await subscribe(address, message.data["clientId"], "numbers/*")
                if status != 204:
                    return
                self._note(message.id)
            while taken := await stream.take(1, 120):
                message = parse(taken[0])
                if message.event == "PB_RESYNC":
                    self.resyncs.append(str(message.data))
                elif message.event == "numbers/*":
                    self._receive(int(message.data["record"]["id"]))
                self._note(message.id)
        finally:
            await stream.close()

    def _note(self, position: str) -> None:
        self._position = position or self._position

    def _receive(self, number: int) -> None:
        self._has_received = True
        if number in self.arrived:
            self.faults.append(f"{number} again after {self.last}")
        elif number != self.last + 1 and not self.resyncs:
            self.faults.append(f"{number} after {self.last}")
        self.arrived.setdefault(number, time.monotonic())
        self.last = number


@dataclass
class Writer:
    """Commits numbered rows, some large, without end; notes when each was committed."""

    url: str
    pause: float = 0.005
    filler: int = 100
    """Bytes of most rows."""
    committed: dict[int, float] = field(default_factory=dict)
    last: int = 0
    """Known to be committed."""
    _connection: psycopg.AsyncConnection[Any] | None = None

    async def write(self) -> None:
        while True:
            with suppress(psycopg.OperationalError):
                async with await psycopg.AsyncConnection.connect(
                    self.url, autocommit=True, application_name="writer", connect_timeout=2
                ) as connection:
                    self._connection = connection
                    cursor = await connection.execute("SELECT coalesce(max(id), 0) FROM numbers")
                    row = await cursor.fetchone()
                    assert row is not None
                    self.last = row[0]
                    while True:
                        await self._commit(connection)
                        await asyncio.sleep(self.pause)
            await asyncio.sleep(0.05)

    async def reconnect(self) -> None:
        """Go on at the server that ``url`` names now."""
        if self._connection is not None:
            await self._connection.close()

    async def _commit(self, connection: psycopg.AsyncConnection[Any]) -> None:
        first = self.last + 1
        last = first if first % 10 else first + 20
        size = 3_000_000 if first % 1500 == 1499 else self.filler
        await connection.execute(
            "INSERT INTO numbers SELECT i, repeat('x', %s) FROM generate_series(%s::int8, %s) i",
            [size, first, last],
        )
        now = time.monotonic()
        self.committed.update(dict.fromkeys(range(first, last + 1), now))
        self.last = last


async def everyone_has(listeners: Sequence[Listener], last: int, seconds: float = 60.0) -> None:
    """Return once each listener has the row, and so those before."""
    async with asyncio.timeout(seconds):
        while any(listener.last < last for listener in listeners):
            await asyncio.sleep(0.05)


def longest_delay(listener: Listener, writer: Writer, since: float = 0.0) -> float:
    """Return the most seconds between a row's commit and its arrival."""
    return max(
        (
            at - writer.committed[number]
            for number, at in listener.arrived.items()
            if number in writer.committed and writer.committed[number] >= since
        ),
        default=0.0,
    )


def longest_silence(listener: Listener, since: float) -> float:
    """Return the most seconds between two arrivals."""
    times = [since, *(at for at in listener.arrived.values() if at > since)]
    return max((b - a for a, b in pairwise(times)), default=0.0)


@contextmanager
def printed(name: str) -> Iterator[dict[str, Any]]:
    """Print what a test measured, which pytest shows with -s or a failure."""
    figures: dict[str, Any] = {}
    yield figures
    print(name, figures)  # noqa: T201
