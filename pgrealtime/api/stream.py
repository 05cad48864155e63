"""One SSE response: PocketBase's head by aiohttp, and then the socket without it.

What aiohttp keeps for a request under way is 13 KB: parser, tasks, request, response. None of it is
of use once the head is out, so ``hand_over`` makes a ``ClientStream`` the transport's protocol and
lets aiohttp forget the connection, as if the client had gone. At the body's end the connection goes
back to aiohttp, which serves the client's next request on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp_sse import EventSourceResponse

_MOST_EARLY: Final = 64 * 1024
"""Bytes kept of requests that a client sends while its stream goes on."""


class EventStream(EventSourceResponse):
    """The response, with the head PocketBase sends and no events of its own.

    Args:
        stall_timeout: Seconds after which the kernel drops a client that acknowledges nothing.
    """

    def __init__(self, *, stall_timeout: float) -> None:
        # HEAD runs the same handler (protocol, 2.10).
        super().__init__(send_timeout=stall_timeout, allow_all_methods=True)
        self.headers["Cache-Control"] = "no-store"
        del self.headers["Connection"]

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send the head at once. The library's pings are stopped before the first.

        What keeps a connection alive is the hub's to say, and one timer for all of them costs a
        fraction of a task each.
        """
        writer = await super().prepare(request)
        self.stop_streaming()
        return writer


class ClientStream(asyncio.Protocol):
    """The body of a response whose head is out: the hub's sink, and the transport's protocol.

    One call to ``write`` is one chunk, so a client that takes each read for a message is right
    as often as with PocketBase.

    Args:
        transport: Of the connection.
        is_chunked: Whether the body has the chunked coding.
        has_body: False for HEAD.
        stall_timeout: Seconds that the client has to take the end of the body.
        then: See below.

    Attributes:
        then: Makes the protocol that serves the connection after the body; None closes it.
        over: Called once when the body's end was taken or the connection is gone.
    """

    __slots__ = (
        "_deadline",
        "_early",
        "_has_body",
        "_is_chunked",
        "_is_over",
        "_room",
        "_stall_timeout",
        "_transport",
        "over",
        "then",
    )

    def __init__(
        self,
        transport: asyncio.Transport,
        *,
        is_chunked: bool,
        has_body: bool,
        stall_timeout: float,
        then: Callable[[], asyncio.BaseProtocol] | None,
    ) -> None:
        self._transport = transport
        self._is_chunked = is_chunked
        self._has_body = has_body
        self._stall_timeout = stall_timeout
        self.then = then
        self._is_over = False
        self._early = b""
        self._room: asyncio.Event | None = None
        """While the buffer is full: set when it isn't any more."""
        self._deadline: asyncio.TimerHandle | None = None
        self.over: Callable[[], None] = _tell_nobody

    @property
    def is_ending(self) -> bool:
        """Whether nothing more is taken."""
        return self._is_over

    # --- the hub's side ---------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send bytes; after the end, and to a client that has gone, they are dropped."""
        if self._is_over or not self._has_body or not data or self._transport.is_closing():
            return
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)

    def buffered(self) -> int:
        """Bytes the kernel hasn't taken yet."""
        return self._transport.get_write_buffer_size()

    async def drain(self) -> None:
        """Wait until the buffer is low or the client gone."""
        if self._room is not None:
            await self._room.wait()

    def end(self) -> None:
        """End the body after everything before it, dropping a client that doesn't take it."""
        if self._is_over:
            return
        if self._is_chunked and self._has_body and not self._transport.is_closing():
            self._transport.set_write_buffer_limits(high=0)
            self._transport.write(b"0\r\n\r\n")
        self._is_over = True
        if self.buffered():
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(self._stall_timeout, self._transport.abort)
        else:
            self._finish()

    def abort(self) -> None:
        """Drop the connection and what is buffered."""
        self._is_over = True
        self._transport.abort()

    # --- the transport's side ---------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Keep the client's next requests for later."""
        self._early += data
        if len(self._early) > _MOST_EARLY:
            self._transport.abort()

    def pause_writing(self) -> None:
        """Be told that the buffer is full."""
        self._room = asyncio.Event()

    def resume_writing(self) -> None:
        """Be told that the buffer is low; after the end, that it is empty."""
        self._release()
        if self._is_over:
            self._finish()

    def connection_lost(self, _error: Exception | None) -> None:
        """Be told that the connection is gone."""
        self._is_over = True
        self._release()
        self._tell()

    def _tell(self) -> None:
        over, self.over = self.over, _tell_nobody
        over()

    def _release(self) -> None:
        if self._room is not None:
            self._room.set()
            self._room = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _finish(self) -> None:
        self._tell()
        if self.then is None or self._transport.is_closing():
            self._transport.close()
            return
        self._transport.set_write_buffer_limits()
        following = self.then()
        self._transport.set_protocol(following)
        following.connection_made(self._transport)
        if self._early and isinstance(following, asyncio.Protocol):
            following.data_received(self._early)


def _tell_nobody() -> None:
    """Stand for nobody who wants to know."""


def client_stream(
    request: web.Request,
    response: EventStream,
    *,
    stall_timeout: float,
    then: Callable[[], asyncio.BaseProtocol] | None,
) -> ClientStream:
    """Return the stream of a response whose head is out, for ``hand_over``.

    Args:
        request: What is answered.
        response: Its head is out.
        stall_timeout: Seconds that the client has to take the end of the body.
        then: Makes the protocol that serves the client's next request.

    Raises:
        ConnectionResetError: The client has gone.
    """
    if request.transport is None:
        raise ConnectionResetError("the client went away before the head was out")
    is_reusable = bool(response.keep_alive) and request.content.at_eof()
    return ClientStream(
        request.transport,
        is_chunked=request.version >= HttpVersion11,
        has_body=request.method != "HEAD",
        stall_timeout=stall_timeout,
        then=then if is_reusable else None,
    )


def hand_over(request: web.Request, stream: ClientStream) -> None:
    """Make the stream the transport's protocol; aiohttp cancels and forgets the handler.

    By the interfaces of asyncio: ``set_protocol``, and ``connection_lost`` on the protocol that
    has the transport no more.
    """
    protocol, transport = request.protocol, request.transport
    assert transport is not None
    transport.set_protocol(stream)
    protocol.transport = None
    protocol.connection_lost(None)
    if not transport.is_reading():  # a client sent more than aiohttp wanted to read
        transport.resume_reading()
