"""A bus over ``LISTEN`` and ``NOTIFY`` of the database that is streamed anyway.

Each process listens on a channel named after its tag, and holds an advisory lock that says that it
is there; both on one connection, so what can't be reached isn't there. ``service.build`` opens it.
"""

import asyncio
import base64
import binascii
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import psycopg
import structlog
from psycopg import AsyncConnection
from psycopg.sql import SQL, Identifier

from pgrealtime.bus.base import draw_tag
from pgrealtime.bus.seal import Envelope, Kind
from pgrealtime.bus.sealed import GONE_SECONDS, SILENCE_SECONDS, PendingCall, SealedBus
from pgrealtime.errors import (
    DatabaseUnreachableError,
    HolderGoneError,
    HolderSilentError,
    SetupError,
)
from pgrealtime.observe.redact import message_without_values
from pgrealtime.postgres.url import DEAD_NETWORK_SETTINGS, parse_database_url

log = structlog.get_logger(__name__)

_PROBE_SECONDS: Final = 5.0
_CHECK_SECONDS: Final = 1.0
"""Between two looks at the locks while answers are waited for."""
_RECONNECT_SECONDS: Final = 0.5
_PART_BYTES: Final = 5250
"""7,000 bytes in base64; a notification has less than 8,000 (``NOTIFY`` in PostgreSQL's docs)."""
_PARTS_WITHOUT_YIELD: Final = 64
"""Parts that are opened at once; each takes 15 us."""
_BATCH_PARTS: Final = 200
"""Parts sent in one statement, or all of one message."""
_TURNS_BEFORE_SENDING: Final = 3
"""Turns of the event loop. A client may cancel its call and at once make another, which reaches
another process. A loop that was busy meanwhile learns in these turns that the first was cancelled,
and doesn't send what would arrive after the second."""

_SETTINGS: Final = {
    "application_name": "pgrealtime bus",
    "client_encoding": "utf8",
    **DEAD_NETWORK_SETTINGS,
}

_SESSION_SQL: Final = (
    # So that the lock of a machine that vanished is gone after 11 s, not after two hours.
    "SET tcp_keepalives_idle TO 5; SET tcp_keepalives_interval TO 2; SET tcp_keepalives_count TO 3;"
    " SET tcp_user_timeout TO 10000; SET search_path TO pg_catalog;"
    # Nothing here runs for long, and the connection is idle most of the time.
    " SET statement_timeout TO 10000; SET idle_session_timeout TO 0;"
    # A notification is a commit: without this it would wait for the disk, and for standbys.
    " SET synchronous_commit TO off"
)

_FACTS_QUERY: Final = "SELECT pg_catalog.pg_backend_pid(), pg_catalog.pg_is_in_recovery()"

_SERVER_MS_SQL: Final = "(extract(epoch FROM pg_catalog.clock_timestamp()) * 1000)::int8"

_PRESENT_SQL: Final = """
SELECT DISTINCT objid::int8 AS present FROM pg_catalog.pg_locks
WHERE locktype = 'advisory' AND granted AND objsubid = 2 AND classid::int8 = %(cluster)s
  AND database = (
    SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
"""

_NOTIFY_SQL: Final = f"""
WITH holders AS MATERIALIZED ({_PRESENT_SQL})
SELECT part.message, {_SERVER_MS_SQL}, pg_catalog.pg_notify(part.channel, part.payload)
FROM unnest(%(messages)s::int4[], %(locks)s::int8[], %(channels)s::text[], %(payloads)s::text[])
  AS part(message, lock, channel, payload)
WHERE part.lock IN (SELECT present FROM holders)
"""  # noqa: S608 (text of ours)

_ROOM_QUERY: Final = """
SELECT current_setting('max_replication_slots')::int
         - (SELECT count(*) FROM pg_catalog.pg_replication_slots),
       current_setting('max_wal_senders')::int
         - (SELECT count(*) FROM pg_catalog.pg_stat_get_wal_senders())
"""


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """A message that waits to be sent."""

    recipient: str
    payloads: list[str]
    call: PendingCall | None
    """Of a request."""


class PostgresBus(SealedBus):
    """A process on the bus, for the duration of ``running``.

    Args:
        url: A direct connection to the database.
        name: As for ``SealedBus``, like all others.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        secret: str,
        tag: str,
        silence_seconds: float = SILENCE_SECONDS,
        gone_seconds: float = GONE_SECONDS,
    ) -> None:
        super().__init__(
            name=name,
            secret=secret,
            tag=tag,
            silence_seconds=silence_seconds,
            gone_seconds=gone_seconds,
        )
        self._url = url
        self._name = name
        self._outgoing: deque[_Outgoing] = deque()
        self._incoming: deque[str] = deque()
        self._wakeup = asyncio.Event()
        self._connection: AsyncConnection[Any] | None = None
        self._clock_offset_ms = 0
        """Of the server's clock, which all processes share, to this one's monotonic one. Read with
        each message that is sent: clocks drift, and a machine that was paused has lost time."""
        self._is_clock_doubtful = False
        self._away_reason = ""
        """Why it couldn't connect the last time."""

    def _now_ms(self) -> int:
        return round(time.monotonic() * 1000) + self._clock_offset_ms

    def _part_bytes(self) -> int:
        return _PART_BYTES

    async def _transmit(self, envelope: Envelope, parts: Sequence[bytes]) -> None:
        if self._connection is None:
            raise HolderSilentError("the bus is not connected to the database")
        payloads = [base64.b64encode(part).decode() for part in parts]
        is_request = envelope.kind is Kind.REQUEST
        call = self._calls[envelope.message_id] if is_request else None
        self._outgoing.append(_Outgoing(envelope.recipient, payloads, call))
        self._wakeup.set()

    # -- the connection

    async def connect(self) -> None:
        """Connect, listen, and take the lock.

        Raises:
            DatabaseUnreachableError: The server doesn't answer.
            SetupError: Codes ``bus_needs_direct_connection``, ``bus_refused``.
        """
        settings = parse_database_url(self._url) | _SETTINGS
        try:
            connection = await AsyncConnection.connect("", autocommit=True, **settings)
        except psycopg.OperationalError as error:
            raise DatabaseUnreachableError(
                "the bus can't reach the database", detail=str(error).strip()
            ) from error
        try:
            await self._set_up(connection)
        except BaseException as error:
            await connection.close()
            if isinstance(error, psycopg.OperationalError):
                raise DatabaseUnreachableError(
                    "the bus lost the database", detail=message_without_values(error)
                ) from error
            if isinstance(error, psycopg.Error):
                raise SetupError(
                    "the database refuses what the bus needs",
                    detail=message_without_values(error),
                    code="bus_refused",
                ) from error
            raise
        self._connection = connection

    async def _set_up(self, connection: AsyncConnection[Any]) -> None:
        pid, is_standby = await _fetch_row(connection, _FACTS_QUERY)
        if pid != connection.info.backend_pid:
            # A pooler makes up the process id that it gives its client.
            raise SetupError(
                "the bus needs a direct connection to the database",
                detail="database.url leads through a pooler. There what a session listens to and"
                " the locks that it holds stay with a session of the server that others use.",
                hint="Set database.url to the server itself; database.query_url may be a pooler.",
                code="bus_needs_direct_connection",
            )
        if is_standby:
            raise SetupError("the bus needs the primary", code="standby")
        await self._read_clock(connection)
        await connection.execute(_SESSION_SQL)
        connection.add_notify_handler(
            lambda notification: self._incoming.append(notification.payload)
        )
        await connection.execute(SQL("LISTEN {}").format(Identifier(self._channel(self.tag))))
        (is_locked,) = await _fetch_row(
            connection,
            # Shared: after a break the server may not have noticed yet that the last session ended.
            "SELECT pg_try_advisory_lock_shared(%s::int4, %s::int4)",
            *(_signed(number) for number in (_cluster_lock(self._name), _lock_of(self.tag))),
        )
        if not is_locked:
            raise SetupError(
                "another session holds the advisory lock of this process", code="bus_refused"
            )

    async def _read_clock(self, connection: AsyncConnection[Any]) -> None:
        self._is_clock_doubtful = False
        (server_ms,) = await _fetch_row(connection, f"SELECT {_SERVER_MS_SQL}")
        self._set_clock(server_ms)

    def _set_clock(self, server_ms: int) -> None:
        self._clock_offset_ms = server_ms - round(time.monotonic() * 1000)

    def _channel(self, tag: str) -> str:
        return f"pgrealtime_{self._name}_{tag}"

    async def run(self) -> None:
        """Send and receive until cancelled; connect again whenever the connection is lost."""
        try:
            while True:
                if self._connection is not None:
                    await self._run_connected(self._connection)
                await asyncio.sleep(_RECONNECT_SECONDS)
                await self._reconnect()
        finally:
            self._cancel_served()
            await self._disconnect()

    async def _reconnect(self) -> None:
        try:
            await self.connect()
        except (DatabaseUnreachableError, SetupError) as error:
            reason = error.detail or error.message
            if reason != self._away_reason:
                log.warning("bus.away", code=error.error_code, reason=reason)
            self._away_reason = reason
            return
        self._away_reason = ""
        self._settled_at = time.monotonic() + self._gone_seconds
        log.info("bus.connected", tag=self.tag)

    async def _run_connected(self, connection: AsyncConnection[Any]) -> None:
        try:
            await self._exchange(connection)
        except psycopg.Error as error:
            log.warning("bus.lost", reason=message_without_values(error))
        await self._disconnect()

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        self._outgoing.clear()
        self._incoming.clear()
        self._fail_calls("the bus lost its connection to the database")
        if connection is not None:
            await connection.close()

    async def _exchange(self, connection: AsyncConnection[Any]) -> None:
        checked_at = time.monotonic()
        while True:
            if self._outgoing:
                await self._send_outgoing(connection)
            checked_before = time.monotonic() - _CHECK_SECONDS
            if self._oldest_seen_at() <= checked_before and checked_at <= checked_before:
                checked_at = time.monotonic()
                await self._check_holders(connection)
            if self._is_clock_doubtful:
                await self._read_clock(connection)
            if not self._outgoing and not self._incoming:
                await self._wait(connection)
            self._read(connection)
            for n, payload in enumerate(_drain(self._incoming), start=1):
                self._receive_payload(payload)
                if not n % _PARTS_WITHOUT_YIELD:
                    await asyncio.sleep(0)

    def _oldest_seen_at(self) -> float:
        oldest = next(iter(self._calls.values()), None)
        return float("inf") if oldest is None else oldest.seen_at

    async def _wait(self, connection: AsyncConnection[Any]) -> None:
        """Wait for a message to send, one to read, or the next check."""
        loop, socket = asyncio.get_running_loop(), connection.fileno()
        loop.add_reader(socket, self._wakeup.set)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CHECK_SECONDS if self._calls else None):
                    await self._wakeup.wait()
        finally:
            loop.remove_reader(socket)
        self._wakeup.clear()

    def _read(self, connection: AsyncConnection[Any]) -> None:
        pgconn = connection.pgconn
        pgconn.consume_input()
        while notification := pgconn.notifies():
            self._incoming.append(notification.extra.decode())

    async def _send_outgoing(self, connection: AsyncConnection[Any]) -> None:
        for _ in range(_TURNS_BEFORE_SENDING):
            await asyncio.sleep(0)
        batch: list[_Outgoing] = []
        parts = 0
        while self._outgoing and parts < _BATCH_PARTS:
            message = self._outgoing.popleft()
            if message.call is None or not message.call.answer.done():
                batch.append(message)
                parts += len(message.payloads)
        if not batch:
            return
        numbered = [(n, m, payload) for n, m in enumerate(batch) for payload in m.payloads]
        cursor = await connection.execute(
            _NOTIFY_SQL.encode(),
            {
                "cluster": _cluster_lock(self._name),
                "messages": [n for n, _, _ in numbered],
                "locks": [_lock_of(m.recipient) for _, m, _ in numbered],
                "channels": [self._channel(m.recipient) for _, m, _ in numbered],
                "payloads": [payload for _, _, payload in numbered],
            },
        )
        sent = set()
        for number, server_ms, _ in await cursor.fetchall():
            sent.add(number)
            self._set_clock(server_ms)
        for number, message in enumerate(batch):
            if number not in sent and message.call is not None:
                message.call.fail(HolderGoneError(message.recipient))

    async def _check_holders(self, connection: AsyncConnection[Any]) -> None:
        cursor = await connection.execute(
            _PRESENT_SQL.encode(), {"cluster": _cluster_lock(self._name)}
        )
        present = {lock for (lock,) in await cursor.fetchall()}
        now = time.monotonic()
        for call in self._calls.values():
            if _lock_of(call.tag) in present:
                call.seen_at = now
        self._fail_unseen_calls()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Connect, and run for the duration of the block; see ``connect``."""
        await self.connect()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.run(), name="bus")
            yield
            task.cancel()

    def _receive_payload(self, payload: str) -> None:
        try:
            part = base64.b64decode(payload, validate=True)
        except (binascii.Error, ValueError):
            self._ignore("call_malformed")
            return
        # One that was sent just now is stale if one of the clocks is wrong.
        self._is_clock_doubtful |= self._receive(part) == "call_stale"


@dataclass(frozen=True, slots=True, kw_only=True)
class BusReport:
    """What a probe found."""

    replicas: int
    """Processes of the cluster that are running."""
    room: int
    """Replication slots and walsenders that are free, whichever are fewer: each needs one."""


async def probe_postgres_bus(url: str, *, name: str, secret: str) -> None:
    """Pass a message from one connection to another, as two processes would.

    Raises:
        DatabaseUnreachableError: As ``PostgresBus.connect``.
        SetupError: As ``PostgresBus.connect``.
        BusError: No answer came.
    """
    asking, answering = (
        PostgresBus(url, name=name, secret=secret, tag=draw_tag(), silence_seconds=_PROBE_SECONDS)
        for _ in range(2)
    )

    async def echo(request: bytes) -> bytes:
        return request

    answering.serve(echo)
    async with answering.running(), asking.running():
        await asking.call(answering.tag, b"probe")


async def read_bus_report(connection: AsyncConnection[Any], name: str) -> BusReport:
    """Return what the server says of a cluster."""
    present = await connection.execute(_PRESENT_SQL.encode(), {"cluster": _cluster_lock(name)})
    slots, walsenders = await _fetch_row(connection, _ROOM_QUERY)
    return BusReport(replicas=len(await present.fetchall()), room=min(slots, walsenders))


def _drain(payloads: deque[str]) -> Iterator[str]:
    while payloads:
        yield payloads.popleft()


def _lock_of(text: str) -> int:
    """Return one of the two numbers of an advisory lock, as ``pg_locks`` shows it."""
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "big")


def _cluster_lock(name: str) -> int:
    return _lock_of(f"pgrealtime {name}")


def _signed(number: int) -> int:
    return number - (1 << 32) if number >= 1 << 31 else number


async def _fetch_row(
    connection: AsyncConnection[Any], query: str, *params: object
) -> tuple[Any, ...]:
    cursor = await connection.execute(query.encode(), params or None)
    row: tuple[Any, ...] | None = await cursor.fetchone()
    assert row is not None
    return row
