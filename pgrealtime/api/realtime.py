"""The route ``/api/realtime``: GET opens an SSE response, POST submits its topics."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from aiohttp import web

from pgrealtime.api.address import client_address
from pgrealtime.api.body_reader import BODY_READER_KEY
from pgrealtime.api.call_router import CallRouter
from pgrealtime.api.cors import Headers
from pgrealtime.api.error_responses import RequestRefusedError, invalid_members, limit_reached
from pgrealtime.api.no_content import NoContentResponse
from pgrealtime.api.sse_transport import (
    EventStreamResponse,
    SseTransport,
    make_sse_transport,
    take_over_connection,
)
from pgrealtime.api.subscribe_body import SubscribeBody, find_call_faults, parse_subscribe_body
from pgrealtime.bus.calls import SubscribeCall
from pgrealtime.config.model import RealtimeConfig, ServerConfig
from pgrealtime.errors import SubscriptionLimitError
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.hub import Hub

RUNNER_KEY: Final = web.AppKey("runner", web.AppRunner)
"""The runner that serves the application; it serves a connection again after its SSE response."""

SHUTDOWN_SECONDS: Final = 5
"""For responses and send buffers that are unfinished when the hub has closed its connections."""

_MAX_POSITION_CHARACTERS: Final = 128
"""Submitted positions are cut to this; a valid one is shorter, and a cut one never parses."""

OUTCOME_HEADER: Final = "X-Pgrealtime-Outcome"
"""A subscribe call with this header gets it in the response: whether the caller is ``known`` or a
``guest``, and the indexes of the topics that can match nothing, as in ``caller=guest; mute=0,2``.
It must not distinguish a collection that doesn't exist from one that the caller may not see."""


class RealtimeRoutes:
    """The two handlers."""

    def __init__(
        self,
        hub: Hub,
        calls: CallRouter,
        server: ServerConfig,
        config: RealtimeConfig,
        fields_of: Callable[[web.Request], Headers],
    ) -> None:
        self._hub = hub
        self._calls = calls
        self._trusted_proxies = server.trusted_proxies
        self._stall_timeout = config.stall_timeout
        self._fields_of = fields_of
        self._transports: set[SseTransport] = set()
        self._all_closed = asyncio.Event()

    async def handle_connect(self, request: web.Request) -> web.StreamResponse:
        """Send the head, open a connection of the hub and detach the socket from aiohttp.

        Raises:
            CancelledError: Always: aiohttp then forgets the request, as after a disconnect.
        """
        response = EventStreamResponse(stall_timeout=self._stall_timeout)
        await response.prepare(request)
        transport = make_sse_transport(
            request,
            response,
            stall_timeout=self._stall_timeout,
            next_protocol=request.app[RUNNER_KEY].server,
        )
        connection = self._hub.open_connection(
            transport,
            address=client_address(request, self._trusted_proxies),
            last_event_id=_truncate_position(request.headers.get("Last-Event-ID")),
            position=_truncate_position(request.query.get("lastEventId")),
        )
        self._transports.add(transport)
        transport.on_closed = partial(self._on_closed, transport, connection)
        # No await from here to the end: the socket must not get data that nobody owns.
        take_over_connection(request, transport)
        raise asyncio.CancelledError

    def _on_closed(self, transport: SseTransport, connection: Connection) -> None:
        self._hub.remove_connection(connection)
        self._transports.discard(transport)
        if not self._transports:
            self._all_closed.set()

    async def close_streams(self, _app: web.Application) -> None:
        """Let closed transports send their buffers, within a time limit; abort the others."""
        for transport in list(self._transports):
            # aiohttp has closed the connections that it had, and would not close a returned one.
            transport.next_protocol = None
            if not transport.is_ended:
                transport.abort()
        with suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_SECONDS):
                while self._transports:
                    self._all_closed.clear()
                    await self._all_closed.wait()
        for transport in self._transports:
            transport.abort()

    async def handle_subscribe(self, request: web.Request) -> web.StreamResponse:
        """Check a subscribe call and have it carried out.

        Errors have PocketBase's order: body, its members, client id, address, authorization.
        Guests, where they aren't allowed, are refused after the body was checked.
        """
        address = client_address(request, self._trusted_proxies)
        reader = request.app[BODY_READER_KEY]
        body = await reader.read(request, address, parse_subscribe_body) or SubscribeBody()
        if faults := find_call_faults(body):
            raise RequestRefusedError(invalid_members(faults))
        call = SubscribeCall(
            client_id=body.client_id,
            address=address,
            authorization=request.headers.get("Authorization"),
            topic_texts=body.topic_texts,
            wants_outcome=OUTCOME_HEADER in request.headers,
        )
        try:
            outcome = await self._calls.submit(call)
        except SubscriptionLimitError as error:
            index = str(call.topic_texts.index(error.topic))
            fault = limit_reached(error.limit_name, error.maximum)
            refusal = invalid_members({"subscriptions": {index: fault}})
            raise RequestRefusedError(refusal) from error
        if outcome:
            return web.Response(status=204, headers={OUTCOME_HEADER: outcome})
        return NoContentResponse(self._fields_of(request))


def _truncate_position(text: str | None) -> str | None:
    return None if text is None else text[:_MAX_POSITION_CHARACTERS]
