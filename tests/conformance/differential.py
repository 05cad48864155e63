"""Runs one scenario on two servers at once and compares what their clients receive."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import assert_never

from tests.conformance.fixtures import Fixtures
from tests.conformance.http_client import EventStream, Request, send
from tests.conformance.scenarios import (
    BEACON,
    BEACON_ID,
    CREATED,
    PEOPLE,
    Action,
    Reconnect,
    Scenario,
    Subscribe,
    person_id,
)
from tests.conformance.target import Target
from tests.conformance.transcript import Write
from tests.realtime import open_stream

_CREATED = re.compile(f'"{CREATED.name}": ?"[^"]*"')
"""Each server has its own clock."""

EVENT_SECONDS = 10.0
"""How long the beacon may take."""

STRAY_SECONDS = 0.3
"""How long to wait for stray events: PocketBase doesn't promise that they precede the beacon."""


class DifferenceError(AssertionError):
    """The clients of the two servers received different events."""


@dataclass(slots=True)
class Side:
    """One of the servers with its clients."""

    name: str
    target: Target
    fixtures: Fixtures
    tokens: dict[str, str] = field(default_factory=dict)
    """By account; an account that isn't there has no valid token."""
    streams: dict[str, EventStream] = field(default_factory=dict)
    client_ids: dict[str, str] = field(default_factory=dict)

    @classmethod
    async def of(cls, name: str, target: Target, fixtures: Fixtures) -> Side:
        """Log every account in."""
        side = cls(name, target, fixtures)
        for account in fixtures.accounts:
            await side.login(account)
        return side

    async def login(self, account: str) -> None:
        """Get a new token for the account."""
        self.tokens[account] = await self.target.login(self.fixtures.accounts[account], None)

    async def write(self, write: Write) -> None:
        """Commit a change; after a new password get new tokens."""
        await self.target.write(write)
        if write.op == "set_password":
            await self.login(next(name for name in PEOPLE if person_id(name) == write.id))

    async def open(self, conn: str) -> None:
        """Open a connection, replacing the one of that name if there is one."""
        if conn in self.streams:
            await self.streams.pop(conn).close()
        stream, client_id = await open_stream(self.target.address, f"{self.name} {conn}")
        self.streams[conn], self.client_ids[conn] = stream, client_id

    async def subscribe(self, action: Subscribe) -> tuple[int, bytes]:
        """Return the status and body of the answer."""
        headers = {"Content-Type": "application/json"}
        if action.account is not None:
            headers["Authorization"] = self.tokens.get(action.account, "no.token.atall")
        body = {"clientId": self.client_ids[action.conn], "subscriptions": list(action.topics)}
        request = Request(
            method="POST", path="/api/realtime", headers=headers, body=json.dumps(body).encode()
        )
        answer = await send(request, self.target.address)
        return answer.head.status, answer.body

    async def received(self, beacon: int) -> dict[str, Counter[str]]:
        """Write the beacon; return what each connection received before it."""
        await self.target.write(
            Write(op="update", collection=BEACON, id=BEACON_ID, data={"count": beacon})
        )
        return {conn: await self._received(conn, beacon) for conn in self.streams}

    async def _received(self, conn: str, beacon: int) -> Counter[str]:
        events: Counter[str] = Counter()
        while True:
            messages = await self.streams[conn].take(1, EVENT_SECONDS)
            if not messages:
                raise DifferenceError(f"{self.name}: {conn} never received beacon {beacon}")
            event = self._comparable(conn, messages[0])
            if event.startswith(f"event:{BEACON}/*\n"):
                assert f'"count":{beacon},' in event, event
                return events
            events[event] += 1

    async def strays(self, conn: str) -> Counter[str]:
        """Return what came after the beacon."""
        await self.streams[conn].wait_messages(1_000_000, STRAY_SECONDS)
        messages = await self.streams[conn].take(len(self.streams[conn].waiting), 0)
        return Counter(self._comparable(conn, message) for message in messages)

    def _comparable(self, conn: str, message: bytes) -> str:
        head, event, data = message.decode().split("\n", 2)
        assert head == f"id:{self.client_ids[conn]}", message
        if "fields" in event:  # the order of picked members is random in PocketBase 0.40
            picked = json.loads(data.removeprefix("data:"))
            data = f"data:{json.dumps(picked, sort_keys=True, ensure_ascii=False)}"
        return f"{event}\n{_CREATED.sub('', data.strip())}"

    async def close(self) -> None:
        """End all connections."""
        for stream in self.streams.values():
            await stream.close()
        self.streams.clear()


class Duel:
    """Two servers with the same data."""

    def __init__(self, original: Side, ours: Side) -> None:
        self._sides = (original, ours)
        self._beacon = 0

    async def run(self, scenario: Scenario) -> int:
        """Apply every action to both; return how many events both sent, not counting beacons.

        Raises:
            DifferenceError: Names the last action, and what each connection received from which
                server.
        """
        events = 0
        try:
            for side in self._sides:
                for conn in scenario.connections:
                    await side.open(conn)
            for action in scenario.actions:
                events += await self._do(action)
        finally:
            for side in self._sides:
                await side.close()
        return events

    async def _do(self, action: Action) -> int:
        original, ours = self._sides
        match action:
            case Reconnect(conn=conn):
                await original.open(conn)
                await ours.open(conn)
                return 0
            case Subscribe():
                answers = await original.subscribe(action), await ours.subscribe(action)
                if answers[0] != answers[1]:
                    raise DifferenceError(f"{action}: {answers[0]}, ours: {answers[1]}")
                return 0
            case Write():
                await original.write(action)
                await ours.write(action)
                return await self._compare(action)
            case _:
                assert_never(action)

    async def _compare(self, action: Write) -> int:
        self._beacon += 1
        original, ours = self._sides
        wanted, found = await original.received(self._beacon), await ours.received(self._beacon)
        for conn in wanted:
            if wanted[conn] != found[conn]:
                wanted[conn] += await original.strays(conn)
                found[conn] += await ours.strays(conn)
            if wanted[conn] != found[conn]:
                raise DifferenceError(
                    f"{action}\n{conn} lacks: {[*(wanted[conn] - found[conn]).elements()]}"
                    f"\n{conn} has too much: {[*(found[conn] - wanted[conn]).elements()]}"
                )
        return sum(events.total() for events in wanted.values())
