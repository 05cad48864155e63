"""One SSE response: PocketBase's head by aiohttp, and then the socket without it.

What aiohttp keeps for a request under way is 13 KB: parser, tasks, request, response. None of it is
of use once the head is out, so ``hand_over`` makes a ``SseTransport`` the transport's protocol and
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

_MAX_PIPELINED_BYTES: Final = 64 * 1024
"""Bytes kept of requests that a client sends while its stream goes on."""


class EventStreamResponse(EventSourceResponse):
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


class SseTransport(asyncio.Protocol):
    """The body of a response whose head is out: the hub's sink, and the transport's protocol.

    One call to ``write`` is one chunk, so a client that takes each read for a message is right
    as often as with PocketBase.

    Args:
        transport: Of the connection.
        is_chunked: Whether the body has the chunked coding.
        has_body: False for HEAD.
        stall_timeout: Seconds that the client has to take the end of the body.
        next_protocol: See below.

    Attributes:
        next_protocol: Makes the protocol that serves the connection after the body; None closes it.
        on_closed: Called once when the body's end was taken or the connection is gone.
    """

    __slots__ = (
        "_abort_timer",
        "_has_body",
        "_is_chunked",
        "_is_ended",
        "_pipelined",
        "_stall_timeout",
        "_transport",
        "_writable",
        "next_protocol",
        "on_closed",
    )

    def __init__(
        self,
        transport: asyncio.Transport,
        *,
        is_chunked: bool,
        has_body: bool,
        stall_timeout: float,
        next_protocol: Callable[[], asyncio.BaseProtocol] | None,
    ) -> None:
        self._transport = transport
        self._is_chunked = is_chunked
        self._has_body = has_body
        self._stall_timeout = stall_timeout
        self.next_protocol = next_protocol
        self._is_ended = False
        self._pipelined = b""
        self._writable: asyncio.Event | None = None
        """While the buffer is full: set when it isn't any more."""
        self._abort_timer: asyncio.TimerHandle | None = None
        self.on_closed: Callable[[], None] = _do_nothing

    @property
    def is_ended(self) -> bool:
        """Whether nothing more is taken."""
        return self._is_ended

    # --- the hub's side ---------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send bytes; after the end, and to a client that has gone, they are dropped."""
        if self._is_ended or not self._has_body or not data or self._transport.is_closing():
            return
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)

    def buffered_bytes(self) -> int:
        """Bytes the kernel hasn't taken yet."""
        return self._transport.get_write_buffer_size()

    async def drain(self) -> None:
        """Wait until the buffer is low or the client gone."""
        if self._writable is not None:
            await self._writable.wait()

    def close(self) -> None:
        """End the body after everything before it, dropping a client that doesn't take it."""
        if self._is_ended:
            return
        if self._is_chunked and self._has_body and not self._transport.is_closing():
            self._transport.set_write_buffer_limits(high=0)
            self._transport.write(b"0\r\n\r\n")
        self._is_ended = True
        if self.buffered_bytes():
            loop = asyncio.get_running_loop()
            self._abort_timer = loop.call_later(self._stall_timeout, self._transport.abort)
        else:
            self._return_connection()

    def abort(self) -> None:
        """Drop the connection and what is buffered."""
        self._is_ended = True
        self._transport.abort()

    # --- the transport's side ---------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Keep the client's next requests for later."""
        self._pipelined += data
        if len(self._pipelined) > _MAX_PIPELINED_BYTES:
            self._transport.abort()

    def pause_writing(self) -> None:
        """Be told that the buffer is full."""
        self._writable = asyncio.Event()

    def resume_writing(self) -> None:
        """Be told that the buffer is low; after the end, that it is empty."""
        self._stop_waiting()
        if self._is_ended:
            self._return_connection()

    def connection_lost(self, _error: Exception | None) -> None:
        """Be told that the connection is gone."""
        self._is_ended = True
        self._stop_waiting()
        self._notify_closed()

    def _notify_closed(self) -> None:
        over, self.on_closed = self.on_closed, _do_nothing
        over()

    def _stop_waiting(self) -> None:
        if self._writable is not None:
            self._writable.set()
            self._writable = None
        if self._abort_timer is not None:
            self._abort_timer.cancel()
            self._abort_timer = None

    def _return_connection(self) -> None:
        self._notify_closed()
        if self.next_protocol is None or self._transport.is_closing():
            self._transport.close()
            return
        self._transport.set_write_buffer_limits()
        following = self.next_protocol()
        self._transport.set_protocol(following)
        following.connection_made(self._transport)
        if self._pipelined and isinstance(following, asyncio.Protocol):
            following.data_received(self._pipelined)


def _do_nothing() -> None:
    """Stand for nobody who wants to know."""


def make_sse_transport(
    request: web.Request,
    response: EventStreamResponse,
    *,
    stall_timeout: float,
    next_protocol: Callable[[], asyncio.BaseProtocol] | None,
) -> SseTransport:
    """Return the stream of a response whose head is out, for ``hand_over``.

    Args:
        request: What is answered.
        response: Its head is out.
        stall_timeout: Seconds that the client has to take the end of the body.
        next_protocol: Makes the protocol that serves the client's next request.

    Raises:
        ConnectionResetError: The client has gone.
    """
    if request.transport is None:
        raise ConnectionResetError("the client went away before the head was out")
    is_reusable = bool(response.keep_alive) and request.content.at_eof()
    return SseTransport(
        request.transport,
        is_chunked=request.version >= HttpVersion11,
        has_body=request.method != "HEAD",
        stall_timeout=stall_timeout,
        next_protocol=next_protocol if is_reusable else None,
    )


def take_over_connection(request: web.Request, sse_transport: SseTransport) -> None:
    """Make the stream the transport's protocol; aiohttp cancels and forgets the handler.

    By the interfaces of asyncio: ``set_protocol``, and ``connection_lost`` on the protocol that
    has the transport no more.
    """
    protocol, transport = request.protocol, request.transport
    assert transport is not None
    transport.set_protocol(sse_transport)
    protocol.transport = None
    protocol.connection_lost(None)
    if not transport.is_reading():  # a client sent more than aiohttp wanted to read
        transport.resume_reading()
