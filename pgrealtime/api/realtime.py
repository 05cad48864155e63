"""``/api/realtime``: GET opens the stream, POST says what is to be heard on it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import Final

from aiohttp import web

from pgrealtime.api.address import client_address
from pgrealtime.api.body import SubscribeCall, faults_of, read_call
from pgrealtime.api.problems import Problem, RefusedError, invalid, limit_fault
from pgrealtime.api.stream import ClientStream, EventStream, client_stream, hand_over
from pgrealtime.api.uploads import UPLOADS
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.auth.principal import Caller, Guest
from pgrealtime.config.model import RealtimeConfig, ServerConfig
from pgrealtime.errors import SubscriptionLimitError
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.hub import Hub

RUNNER: Final = web.AppKey("runner", web.AppRunner)
"""What serves the application: it takes connections back when their streams end."""

SHUTDOWN_SECONDS: Final = 5
"""For what is still being answered or sent when the hub has ended its connections."""

_LONGEST_POSITION: Final = 128
"""Characters that are looked at; ours are shorter, and one that was cut is not ours."""


OUTCOME: Final = "X-Pgrealtime-Outcome"
"""Header of a subscribe call that asks what came of it, and of the answer: whether the caller is
``known`` or a ``guest``, and the places of the topics that can bring nothing, as in
``caller=guest; mute=0,2``. It doesn't tell a collection that isn't there from one that the caller
may not see."""


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
        self._streams: set[ClientStream] = set()
        self._idle = asyncio.Event()

    async def connect(self, request: web.Request) -> web.StreamResponse:
        """Send the head and let go; what follows is between the hub and the socket.

        Raises:
            CancelledError: Always: to aiohttp it is a client that has gone.
        """
        response = EventStream(stall_timeout=self._stall_timeout)
        await response.prepare(request)
        stream = client_stream(
            request,
            response,
            stall_timeout=self._stall_timeout,
            then=request.app[RUNNER].server,
        )
        connection = self._hub.open(
            stream,
            address=client_address(request, self._trusted),
            last_event_id=_capped(request.headers.get("Last-Event-ID")),
            position=_capped(request.query.get("lastEventId")),
        )
        self._streams.add(stream)
        stream.over = partial(self._forget, stream, connection)
        hand_over(request, stream)
        raise asyncio.CancelledError

    def _forget(self, stream: ClientStream, connection: Connection) -> None:
        self._hub.close(connection)
        self._streams.discard(stream)
        if not self._streams:
            self._idle.set()

    async def finish(self, _app: web.Application) -> None:
        """Let streams that were ended send what they have, and drop the others."""
        for stream in list(self._streams):
            stream.then = None  # aiohttp has closed what it knew of, and looks no more
            if not stream.is_ending:
                stream.abort()
        with suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_SECONDS):
                while self._streams:
                    self._idle.clear()
                    await self._idle.wait()
        for stream in self._streams:
            stream.abort()

    async def subscribe(self, request: web.Request) -> web.StreamResponse:
        """Check in PocketBase's order: body, its members, client, address, authorization.

        Where guests aren't allowed they are told so once the body can be read.
        """
        address = client_address(request, self._trusted)
        call = SubscribeCall()
        if request.body_exists and request.content_length != 0:
            call = await request.app[UPLOADS].read(request, address, read_call)
        if faults := faults_of(call):
            raise RefusedError(invalid(faults))
        caller = await self._authenticator.admit(request.headers.get("Authorization"))
        try:
            await self._hub.subscribe(call.client_id, call.subscriptions, caller, address)
        except SubscriptionLimitError as error:
            raise RefusedError(_beyond(error, call)) from error
        headers = self._outcome(call, caller) if OUTCOME in request.headers else {}
        return web.Response(status=204, headers=headers)

    def _outcome(self, call: SubscribeCall, caller: Caller) -> dict[str, str]:
        """Return what a 204 of PocketBase's leaves unsaid, for whoever asks for it."""
        mute = self._hub.mute_topics(call.client_id)
        places = [str(n) for n, name in enumerate(call.subscriptions) if name in mute]
        kind = "guest" if isinstance(caller.principal, Guest) else "known"
        return {OUTCOME: f"caller={kind}; mute={','.join(places)}"}


def _beyond(error: SubscriptionLimitError, call: SubscribeCall) -> Problem:
    """Return the refusal of a call for the first of its topics that is too many."""
    at = call.subscriptions.index(error.topic)
    return invalid({"subscriptions": {str(at): limit_fault(error.limit, error.most)}})


def _capped(text: str | None) -> str | None:
    return None if text is None else text[:_LONGEST_POSITION]
