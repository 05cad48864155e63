"""The routes ``/api/collections/COLL/records…``: lists and single records, which are read only.

Errors have PocketBase's order: the collection, the address's limit, the body; then those of
``reads``. The routes that write answer as PocketBase's do under rules that admit superusers only.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

from aiohttp import web

from pgrealtime.api.address import client_address
from pgrealtime.api.body_reader import BODY_READER_KEY
from pgrealtime.api.error_responses import (
    COLLECTION_INVALID,
    COLLECTION_NOT_FOUND,
    SUPERUSERS_ONLY,
    TOO_MANY_REQUESTS,
    ErrorResponse,
    RequestRefusedError,
)
from pgrealtime.api.json_response import headers_for_rules, query_values
from pgrealtime.api.large_responses import LARGE_RESPONSE_BYTES, LargeResponses, send_large
from pgrealtime.api.read_body import parse_read_body
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.auth.login import RateLimiter
from pgrealtime.auth.principal import Caller, Superuser
from pgrealtime.collections.model import Collection
from pgrealtime.config.model import ReadsConfig, ServerConfig
from pgrealtime.fairness import FairPermits, client_network
from pgrealtime.reads.reader import Answer, RecordReader
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.snapshot import ReadPoint

POSITION_HEADER: Final = "Realtime-Position"
_MAX_BODY_BYTES: Final = 256 * 1024
"""Of a read. It is held while the request waits, and many may wait."""
_MAX_ANSWERS: Final = 4
"""So many of the maximum size may be held for clients that read slowly."""


class BegunRead(Protocol):
    """A read whose snapshot is yet to be taken."""

    async def position_of(self, read_point: ReadPoint) -> str | None:
        """Return up to where its snapshot saw every commit; None if that can't be told."""


class Stream(Protocol):
    """What joins reads to events; the hub."""

    async def wait_for_delivered(self) -> None:
        """Return once new snapshots see every event delivered before, or after a few seconds."""

    def begin_read(self) -> BegunRead:
        """Note what is delivered, before a read takes its snapshot."""


_UNSUPPORTED_TYPE: Final = ErrorResponse(400, "Unsupported collection type.", "不支持的集合类型。")


class RecordRoutes:
    """The handlers."""

    def __init__(
        self,
        reader: RecordReader,
        authenticator: Authenticator,
        server: ServerConfig,
        reads: ReadsConfig,
        stream: Stream,
    ) -> None:
        self._reader = reader
        self._authenticator = authenticator
        self._server = server
        self._max_waiting = reads.max_waiting
        self._stream = stream
        self._permits = FairPermits(reads.pool_size)
        self._limiter = (
            RateLimiter(reads.requests_per_minute) if reads.requests_per_minute else None
        )
        self._large_responses = LargeResponses(_MAX_ANSWERS * reads.max_answer_size)

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add the routes."""
        records = f"{self._server.base_path}/api/collections/{{collection}}/records"
        router.add_get(records, self.list_records)
        router.add_post(records, self.refuse_write)
        router.add_get(f"{records}/{{id}}", self.view_record)
        router.add_patch(f"{records}/{{id}}", self.refuse_write)
        router.add_delete(f"{records}/{{id}}", self.refuse_write)

    async def list_records(self, request: web.Request) -> web.StreamResponse:
        """Respond with a page of records."""
        collection, address = self._requested_collection(request), self._address(request)
        caller, rule_request = await self._open_request(request, address)
        await self._stream.wait_for_delivered()
        network = client_network(address)
        async with self._permit(network):
            read = self._stream.begin_read()
            answer = await self._reader.list_records(
                collection, caller, rule_request, network=network
            )
        if self._is_guess(collection, rule_request, answer):
            await asyncio.sleep(
                self._reader.guesses.delay_seconds(network, collection.name, time.monotonic())
            )
        return await self._respond(request, address, read, answer)

    async def view_record(self, request: web.Request) -> web.StreamResponse:
        """Respond with one record."""
        collection, address = self._requested_collection(request), self._address(request)
        caller, rule_request = await self._open_request(request, address)
        record_id = request.match_info["id"]
        await self._stream.wait_for_delivered()
        async with self._permit(client_network(address)):
            read = self._stream.begin_read()
            answer = await self._reader.view_record(collection, record_id, caller, rule_request)
        return await self._respond(request, address, read, answer)

    async def refuse_write(self, request: web.Request) -> web.Response:
        """Refuse to write."""
        collection = self._reader.find_collection(request.match_info["collection"])
        if collection is None:
            is_delete = request.method == "DELETE"
            raise RequestRefusedError(COLLECTION_NOT_FOUND if is_delete else COLLECTION_INVALID)
        if collection.is_view:
            raise RequestRefusedError(_UNSUPPORTED_TYPE)
        raise RequestRefusedError(SUPERUSERS_ONLY)

    def _requested_collection(self, request: web.Request) -> Collection:
        collection = self._reader.find_collection(request.match_info["collection"])
        if collection is None:
            raise RequestRefusedError(COLLECTION_NOT_FOUND)
        return collection

    def _address(self, request: web.Request) -> str:
        return client_address(request, self._server.trusted_proxies)

    async def _open_request(self, request: web.Request, address: str) -> tuple[Caller, RuleRequest]:
        """Return the caller and what rules see of the request."""
        caller = await self._authenticator.authenticate_subscriber(
            request.headers.get("Authorization")
        )
        if self._limiter is not None and not isinstance(caller.principal, Superuser):
            key = (client_network(address),)
            if not self._limiter.try_acquire(key, time.monotonic()):
                raise RequestRefusedError(TOO_MANY_REQUESTS)
        body = await request.app[BODY_READER_KEY].read(
            request, address, parse_read_body, max_bytes=_MAX_BODY_BYTES
        )
        rule_request = RuleRequest(
            principal=caller.principal,
            query=query_values(request),
            headers=headers_for_rules(request),
            context="default",
            method=request.method,
            body=body,
        )
        return caller, rule_request

    def _permit(self, network: str) -> AbstractAsyncContextManager[None]:
        if self._permits.count_waiting(network) >= self._max_waiting:
            raise RequestRefusedError(TOO_MANY_REQUESTS)
        return self._permits.acquire(network)

    def _is_guess(self, collection: Collection, request: RuleRequest, answer: Answer) -> bool:
        return (
            not answer.item_count
            and bool(collection.list_rule)
            and bool(request.query.get("filter"))
            and not isinstance(request.principal, Superuser)
        )

    async def _respond(
        self, request: web.Request, address: str, read: BegunRead, answer: Answer
    ) -> web.StreamResponse:
        with self._large_responses.holding(client_network(address), len(answer.body)):
            return await self._send(request, read, answer)

    async def _send(
        self, request: web.Request, read: BegunRead, answer: Answer
    ) -> web.StreamResponse:
        headers = {"Cache-Control": "no-store"}
        position = await read.position_of(answer.read_point)
        if position is not None:
            headers |= {
                POSITION_HEADER: position,
                "Access-Control-Expose-Headers": POSITION_HEADER,
            }
        if request.method == "HEAD" or len(answer.body) < LARGE_RESPONSE_BYTES:
            return web.Response(body=answer.body, content_type="application/json", headers=headers)
        response = web.StreamResponse(headers=headers)
        response.content_type = "application/json"
        await send_large(request, response, answer.body)
        return response
