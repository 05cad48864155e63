"""``/api/realtime``: GET opens the stream, POST says what is to be heard on it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import Final

from aiohttp import web

from pgrealtime.api.address import client_address
from pgrealtime.api.body_reader import BODY_READER_KEY
from pgrealtime.api.error_responses import (
    ErrorResponse,
    RequestRefusedError,
    invalid_members,
    limit_reached,
)
from pgrealtime.api.sse_transport import (
    EventStreamResponse,
    SseTransport,
    make_sse_transport,
    take_over_connection,
)
from pgrealtime.api.subscribe_body import SubscribeCall, find_call_faults, parse_subscribe_call
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.auth.principal import Caller, Guest
from pgrealtime.config.model import RealtimeConfig, ServerConfig
from pgrealtime.errors import SubscriptionLimitError
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.hub import Hub

RUNNER_KEY: Final = web.AppKey("runner", web.AppRunner)
"""What serves the application: it takes connections back when their streams end."""

SHUTDOWN_SECONDS: Final = 5
"""For what is still being answered or sent when the hub has ended its connections."""

_MAX_POSITION_CHARACTERS: Final = 128
"""Characters that are looked at; ours are shorter, and one that was cut is not ours."""


OUTCOME_HEADER: Final = "X-Pgrealtime-Outcome"
"""Header of a subscribe call that asks what came of it, and of the answer: whether the caller is
``known`` or a ``guest``, and the places of the topics that can bring nothing, as in
``caller=guest; mute=0,2``. It doesn't tell a collection that isn't there from one that the caller
may not see."""


class RealtimeRoutes:
    """The two handlers.

    Args:
        hub: Delivers.
        authenticator: Knows the callers.
        server: Whose proxies are believed.
        config: How long a client may take no byte.
    """

    def __init__(
        self,
        hub: Hub,
        authenticator: Authenticator,
        server: ServerConfig,
        config: RealtimeConfig,
    ) -> None:
        self._hub = hub
        self._authenticator = authenticator
        self._trusted_proxies = server.trusted_proxies
        self._stall_timeout = config.stall_timeout
        self._transports: set[SseTransport] = set()
        self._all_closed = asyncio.Event()

    async def connect(self, request: web.Request) -> web.StreamResponse:
        """Send the head and let go; what follows is between the hub and the socket.

        Raises:
            CancelledError: Always: to aiohttp it is a client that has gone.
        """
        response = EventStreamResponse(stall_timeout=self._stall_timeout)
        await response.prepare(request)
        stream = make_sse_transport(
            request,
            response,
            stall_timeout=self._stall_timeout,
            next_protocol=request.app[RUNNER_KEY].server,
        )
        connection = self._hub.open_connection(
            stream,
            address=client_address(request, self._trusted_proxies),
            last_event_id=_truncate_position(request.headers.get("Last-Event-ID")),
            position=_truncate_position(request.query.get("lastEventId")),
        )
        self._transports.add(stream)
        stream.on_closed = partial(self._on_closed, stream, connection)
        take_over_connection(request, stream)
        raise asyncio.CancelledError

    def _on_closed(self, transport: SseTransport, connection: Connection) -> None:
        self._hub.remove_connection(connection)
        self._transports.discard(transport)
        if not self._transports:
            self._all_closed.set()

    async def close_streams(self, _app: web.Application) -> None:
        """Let streams that were ended send what they have, and drop the others."""
        for stream in list(self._transports):
            stream.next_protocol = None  # aiohttp has closed what it knew of, and looks no more
            if not stream.is_ended:
                stream.abort()
        with suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_SECONDS):
                while self._transports:
                    self._all_closed.clear()
                    await self._all_closed.wait()
        for stream in self._transports:
            stream.abort()

    async def subscribe(self, request: web.Request) -> web.StreamResponse:
        """Check in PocketBase's order: body, its members, client, address, authorization.

        Where guests aren't allowed they are told so once the body can be read.
        """
        address = client_address(request, self._trusted_proxies)
        call = SubscribeCall()
        if request.body_exists and request.content_length != 0:
            call = await request.app[BODY_READER_KEY].read(request, address, parse_subscribe_call)
        if faults := find_call_faults(call):
            raise RequestRefusedError(invalid_members(faults))
        caller = await self._authenticator.authenticate_subscriber(
            request.headers.get("Authorization")
        )
        try:
            await self._hub.subscribe(call.client_id, call.subscriptions, caller, address)
        except SubscriptionLimitError as error:
            raise RequestRefusedError(_limit_response(error, call)) from error
        headers = self._outcome_header(call, caller) if OUTCOME_HEADER in request.headers else {}
        return web.Response(status=204, headers=headers)

    def _outcome_header(self, call: SubscribeCall, caller: Caller) -> dict[str, str]:
        """Return what a 204 of PocketBase's leaves unsaid, for whoever asks for it."""
        mute = self._hub.unmatchable_topics(call.client_id)
        places = [str(n) for n, name in enumerate(call.subscriptions) if name in mute]
        kind = "guest" if isinstance(caller.principal, Guest) else "known"
        return {OUTCOME_HEADER: f"caller={kind}; mute={','.join(places)}"}


def _limit_response(error: SubscriptionLimitError, call: SubscribeCall) -> ErrorResponse:
    """Return the refusal of a call for the first of its topics that is too many."""
    at = call.subscriptions.index(error.topic)
    return invalid_members(
        {"subscriptions": {str(at): limit_reached(error.limit_name, error.maximum)}}
    )


def _truncate_position(text: str | None) -> str | None:
    return None if text is None else text[:_MAX_POSITION_CHARACTERS]
