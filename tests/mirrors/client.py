"""A client that keeps a list by a mirror topic over SSE, as the README says."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import aiohttp

from tests.attacks.reading import Reader, bearer
from tests.conformance.http_client import EventStream, ProtocolError, Request, send
from tests.topics import topic

SECONDS = 20.0
_RETRY_SECONDS = 0.02
FENCE = "fence"
"""A collection that everybody may see; a row of it says that all before it has come."""

Record = dict[str, Any]


@dataclass(eq=False)
class MirrorClient:
    """One person's list of a collection, or of one record of it.

    Attributes:
        rows: The list, by id.
        log: The actions that came for it, with the ids.
        resyncs: Those among them, by reason.
        is_loaded: Whether it asks for its lists to be sent.
    """

    reader: Reader
    collection: str
    person: str = ""
    filter: str = ""
    record_id: str = ""
    is_resumable: bool = False
    is_loaded: bool = False
    rows: dict[str, Record] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)
    bodies: list[Record] = field(default_factory=list)
    resyncs: Counter[str] = field(default_factory=Counter)
    fences: set[str] = field(default_factory=set)
    position: str = ""
    """Of the last message, with the client id before it."""
    options: dict[str, str] = field(default_factory=dict)
    _subscribed: asyncio.Event = field(default_factory=asyncio.Event)
    _reading: asyncio.Task[None] | None = None
    _loading: asyncio.Task[None] | None = None
    _held: list[tuple[str, Record]] | None = None
    _filling: dict[str, Record] | None = None
    """The list that is being sent."""
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def topic(self) -> str:
        query = {"mode": "mirror", **self.options}
        if self.is_loaded:
            query["load"] = "true"
        if self.filter:
            query["filter"] = self.filter
        return topic(f"{self.collection}/{self.record_id or '*'}", **query)

    # --- the connection

    async def connect(self) -> None:
        """Connect, and again whenever the connection ends; return once subscribed."""
        self._subscribed.clear()
        self._reading = asyncio.create_task(self._stay_connected())
        async with asyncio.timeout(SECONDS):
            await self._subscribed.wait()

    async def disconnect(self) -> None:
        """Break off, perhaps amid a message."""
        for task in (self._reading, self._loading):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._forget_load()

    def _forget_load(self) -> None:
        # Of a list that was sent in part the position says so.
        self._filling = None
        if self._held is not None:
            # Its load was under way: a client that goes on from there has to load all the same.
            self.position, self._held = "", None
        if self._loading is not None:
            self._loading.cancel()
            self._loading = None

    async def _stay_connected(self) -> None:
        while True:
            path = "/api/realtime"
            if self.is_resumable:
                path += f"?lastEventId={quote(self.position)}"
            request = Request(method="GET", path=path, headers={})
            try:
                stream = await EventStream.open(request, self.reader.address, self.person)
            except (OSError, ProtocolError):
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            try:
                if first := await stream.take(1, SECONDS):
                    await self._read(stream, json.loads(_lines(first[0])["data"])["clientId"])
            finally:
                await stream.close()
            self._forget_load()
            await asyncio.sleep(_RETRY_SECONDS)

    async def _read(self, stream: EventStream, client_id: str) -> None:
        """Subscribe, and read to the end."""
        body = {"clientId": client_id, "subscriptions": [self.topic, f"{FENCE}/*"]}
        call = Request(
            method="POST",
            path="/api/realtime",
            headers={"Content-Type": "application/json", **bearer(self.person)},
            body=json.dumps(body).encode(),
        )
        calling = asyncio.create_task(self._call(call))
        try:
            while messages := await stream.take(1, SECONDS * 10):
                self._take(_lines(messages[0]))
        finally:
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)

    async def _call(self, call: Request) -> None:
        # After some of the other answers the connection is ended.
        while True:
            with suppress(OSError, ProtocolError):
                if (await send(call, self.reader.address)).head.status == 204:
                    self._subscribed.set()
                    return
            await asyncio.sleep(_RETRY_SECONDS)

    # --- the list

    def _take(self, message: dict[str, str]) -> None:
        self.position = message["id"]
        if message["event"] == self.topic:
            data = json.loads(message["data"])
            self.log.append((data["action"], data["record"]["id"]))
            self.bodies.append(data["record"])
            if data["action"] == "resync":
                self.resyncs[data["reason"]] += 1
                if self.is_loaded and data["reason"] != "wide":
                    self._filling = {}
                else:
                    self._load()
            elif data["action"] == "ready":
                assert self._filling is not None, self.log[-10:]
                self.rows, self._filling = self._filling, None
            elif self._filling is not None:
                assert data["action"] == "create", self.log[-10:]
                self._filling[data["record"]["id"]] = data["record"]
            elif self._held is not None:
                self._held.append((data["action"], data["record"]))
            else:
                self._apply(data["action"], data["record"])
        elif message["event"].startswith(FENCE):
            self.fences.add(json.loads(message["data"])["record"]["id"])
        self._news.set()

    def _apply(self, action: str, record: Record) -> None:
        if action == "delete":
            self.rows.pop(record["id"], None)
        else:
            self.rows[record["id"]] = record

    def _load(self) -> None:
        """Load anew; what has come before is in what will be loaded."""
        if self._loading is not None:
            self._loading.cancel()
        self._held = []
        self._loading = asyncio.create_task(self._loaded())

    async def _loaded(self) -> None:
        rows = await self.fetch_list()
        held, self._held, self._loading = self._held or [], None, None
        self.rows = rows
        for action, record in held:
            self._apply(action, record)
        self._news.set()

    async def fetch_list(self) -> dict[str, Record]:
        """Return what a list gives now: what this one ought to be."""
        path = f"{self.collection}/records"
        if self.record_id:
            status, body = await self._get(f"{path}/{self.record_id}")
            return {body["id"]: body} if status == 200 else {}
        return await self._page(path, self.filter)

    async def _page(self, path: str, filter_: str) -> dict[str, Record]:
        query = {"perPage": "1000", "skipTotal": "1"}
        if filter_:
            query["filter"] = filter_
        status, body = await self._get(path, **query)
        assert status == 200, (path, query, body)
        return {one["id"]: one for one in body["items"]}

    async def _get(self, path: str, **query: str) -> tuple[int, Any]:
        """Ask again as long as the database doesn't answer."""
        while True:
            with suppress(aiohttp.ClientError):
                status, body = await self.reader.get(path, self.person, **query)
                if status in {200, 403, 404}:
                    return status, body
            await asyncio.sleep(_RETRY_SECONDS)

    # --- waiting

    async def wait_for_fence(self, fence: str) -> None:
        """Return once all before a row of the fence has come, and no load is under way."""
        while fence not in self.fences or self._loading is not None or self._filling is not None:
            self._news.clear()
            await self._news.wait()


def _lines(message: bytes) -> dict[str, str]:
    lines = message.decode().strip().split("\n")
    return {name: text for name, _, text in (line.partition(":") for line in lines)}
