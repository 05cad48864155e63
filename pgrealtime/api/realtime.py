"""``/api/realtime``: GET opens the stream, POST says what is to be heard on it."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web

from pgrealtime.api.address import client_address
from pgrealtime.api.body import SubscribeCall, faults_of, read_call
from pgrealtime.api.problems import TOO_LARGE, TOO_SLOW, UNREADABLE, RefusedError, invalid
from pgrealtime.api.stream import EventStream, TransportSink, finish
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.config import RealtimeConfig, ServerConfig
from pgrealtime.hub.dispatch import Hub

LARGEST_BODY: Final = 32 * 1024 * 1024
"""Bytes; a body that declares more is refused before it is read (protocol, 1.7)."""

_BODY_SECONDS: Final = 60.0
"""How long a client may take to send its body."""

_LARGE_BODY: Final = 64 * 1024
"""Bytes above which a body is taken apart in a thread, so that nobody else waits for it."""

_LONGEST_POSITION: Final = 128
"""Characters that are looked at; ours are shorter, and one that was cut is not ours."""


class Realtime:
    """The two handlers.

    Args:
        hub: Delivers.
        authenticator: Knows the callers.
        server: Whose proxies are believed.
        limits: How long a client may take no byte.
    """

    def __init__(
        self,
        hub: Hub,
        authenticator: Authenticator,
        server: ServerConfig,
        limits: RealtimeConfig,
    ) -> None:
        self._hub = hub
        self._authenticator = authenticator
        self._trusted = server.trusted_proxies
        self._stall_timeout = limits.stall_timeout

    async def connect(self, request: web.Request) -> web.StreamResponse:
        """Stream until the hub ends it or the client goes away, which cancels this."""
        response = EventStream(stall_timeout=self._stall_timeout)
        writer = await response.prepare(request)
        assert writer is not None  # only a response that was sent before has none
        sink = TransportSink(request, writer)
        connection = self._hub.open(
            sink,
            address=client_address(request, self._trusted),
            last_event_id=_capped(request.headers.get("Last-Event-ID")),
            position=_capped(request.query.get("lastEventId")),
        )
        try:
            await connection.wait_ended()
        finally:
            self._hub.close(connection)
        await finish(response, sink, stall_timeout=self._stall_timeout)
        return response

    async def subscribe(self, request: web.Request) -> web.StreamResponse:
        """Check in PocketBase's order: body, its members, client, address, authorization."""
        call = await _read(request)
        if faults := faults_of(call):
            raise RefusedError(invalid(faults))
        await self._hub.subscribe(
            call.client_id,
            call.subscriptions,
            await self._authenticator.authenticate(request.headers.get("Authorization")),
            client_address(request, self._trusted),
        )
        return web.Response(status=204)


def _capped(text: str | None) -> str | None:
    return None if text is None else text[:_LONGEST_POSITION]


async def _read(request: web.Request) -> SubscribeCall:
    if not request.body_exists or request.content_length == 0:
        return SubscribeCall()
    body = await _read_body(request)
    content_type = request.headers.get("Content-Type", "")
    query = request.rel_url.raw_query_string.encode()
    if len(body) <= _LARGE_BODY:
        return read_call(content_type, body, query)
    return await asyncio.to_thread(read_call, content_type, body, query)


async def _read_body(request: web.Request) -> bytes:
    """Return all of the body.

    Raises:
        RefusedError: It is larger than it may be, broken, or too slow in coming.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.content.iter_any():
                body += piece
                if len(body) > LARGEST_BODY:
                    raise RefusedError(TOO_LARGE)
    except TimeoutError as error:
        raise RefusedError(TOO_SLOW) from error
    except web.RequestPayloadError as error:
        raise RefusedError(UNREADABLE) from error
    return bytes(body)
