"""One SSE response: aiohttp sends the head, ``SseTransport`` writes the body to the socket.

aiohttp keeps 13 KB for a request in progress: parser, tasks, request, response. None of it is used
after the head, so ``take_over_connection`` makes an ``SseTransport`` the protocol of the socket and
lets aiohttp forget the request as after a disconnect. At the end of the body the connection is
returned to aiohttp, which serves the client's next request on it.

Backpressure: ``write`` never waits. What the kernel doesn't accept stays in asyncio's buffer, whose
size the hub reads (``buffered_bytes``) to decide what to queue and when to close a slow client.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp_sse import EventSourceResponse

_MAX_PIPELINED_BYTES: Final = 64 * 1024
"""Bytes kept of requests that a client pipelines behind its SSE response; more aborts it."""


class EventStreamResponse(EventSourceResponse):
    """A response with PocketBase's head, whose body an ``SseTransport`` writes."""

    def __init__(self, *, stall_timeout: float) -> None:
        # ``send_timeout`` is TCP_USER_TIMEOUT: the kernel closes the connection when the client has
        # acknowledged nothing for so long.
        # HEAD has the same handler (protocol, 2.10).
        super().__init__(send_timeout=stall_timeout, allow_all_methods=True)
        self.headers["Cache-Control"] = "no-store"
        # The library's; PocketBase sends none (protocol, 2.1).
        del self.headers["Connection"]

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send the head at once, without the library's pings."""
        writer = await super().prepare(request)
        # The hub sends heartbeats from one timer for all connections: a ping task of each would
        # cost many times as much.
        self.stop_streaming()
        return writer


class SseTransport(asyncio.Protocol):
    """The body of a response whose head was sent: the hub's transport, and asyncio's protocol.

    States: open; ended (``close``: the end of the body may still be in the buffer); closed (the
    connection was returned or is lost, and ``on_closed`` was called).

    Attributes:
        is_ended: Whether the body has ended: writes are ignored.
        next_protocol: Makes the protocol that serves the connection afterwards; None closes it.
        on_closed: Called once, when the end of the body was sent or the connection is lost.
    """

    # Slots, because there is one of these for each of many thousand connections.
    __slots__ = (
        "_abort_timer",
        "_has_body",
        "_is_chunked",
        "_pipelined",
        "_stall_timeout",
        "_transport",
        "_writable",
        "is_ended",
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
        self.is_ended = False
        self._pipelined = b""
        self._writable: asyncio.Event | None = None
        """Exists while the buffer is above its high-water mark; set when it is low again."""
        self._abort_timer: asyncio.TimerHandle | None = None
        self.on_closed: Callable[[], None] = _do_nothing

    # --- called by the hub ------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Write bytes without waiting; drop them after the end or a lost connection."""
        if self.is_ended or not self._has_body or not data or self._transport.is_closing():
            return
        # One call is one HTTP chunk (RFC 9112, section 7.1: length in hex, CRLF, data, CRLF). Some
        # clients take each chunk for a message, and PocketBase writes a message at a time.
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)

    def buffered_bytes(self) -> int:
        """Return the bytes written that the kernel hasn't accepted yet."""
        return self._transport.get_write_buffer_size()

    async def drain(self) -> None:
        """Wait until the buffer is below its low-water mark or the connection is lost."""
        if self._writable is not None:
            await self._writable.wait()

    def close(self) -> None:
        """End the body after what was written; abort if the client doesn't receive it in time."""
        if self.is_ended:
            return
        if self._is_chunked and self._has_body and not self._transport.is_closing():
            # With a high-water mark of 0, resume_writing means that the buffer is empty.
            self._transport.set_write_buffer_limits(high=0)
            # The last chunk and no trailers.
            self._transport.write(b"0\r\n\r\n")
        self.is_ended = True
        if self.buffered_bytes():
            loop = asyncio.get_running_loop()
            # TCP_USER_TIMEOUT alone would not do: each byte that a client reads starts it anew.
            self._abort_timer = loop.call_later(self._stall_timeout, self._transport.abort)
        else:
            self._return_connection()

    def abort(self) -> None:
        """Close the connection at once and drop the buffer."""
        self.is_ended = True
        self._transport.abort()

    # --- called by asyncio (asyncio.Protocol) -----------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Keep pipelined requests for the next protocol."""
        self._pipelined += data
        if len(self._pipelined) > _MAX_PIPELINED_BYTES:
            self._transport.abort()

    def pause_writing(self) -> None:
        """Make ``drain`` wait: the buffer is above its high-water mark."""
        self._writable = asyncio.Event()

    def resume_writing(self) -> None:
        """End ``drain``; after the end of the body, which is sent now, return the connection."""
        self._stop_waiting()
        if self.is_ended:
            self._return_connection()

    def connection_lost(self, _error: Exception | None) -> None:
        """Close: the connection is lost."""
        self.is_ended = True
        self._stop_waiting()
        self._notify_closed()

    def _notify_closed(self) -> None:
        # Once only: an abort is followed by ``connection_lost``. And no reference to the hub's
        # connection is kept.
        on_closed, self.on_closed = self.on_closed, _do_nothing
        on_closed()

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
        # The default: ``close`` may have set it to 0.
        self._transport.set_write_buffer_limits()
        protocol = self.next_protocol()
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        if self._pipelined and isinstance(protocol, asyncio.Protocol):
            protocol.data_received(self._pipelined)


def _do_nothing() -> None:
    pass


def make_sse_transport(
    request: web.Request,
    response: EventStreamResponse,
    *,
    stall_timeout: float,
    next_protocol: Callable[[], asyncio.BaseProtocol] | None,
) -> SseTransport:
    """Return the transport for the body of a response whose head was sent.

    Raises:
        ConnectionResetError: The client has disconnected.
    """
    if request.transport is None:
        raise ConnectionResetError("the client disconnected before the head was sent")
    # An unread request body would be taken for the next request.
    is_reusable = bool(response.keep_alive) and request.content.at_eof()
    return SseTransport(
        request.transport,
        is_chunked=request.version >= HttpVersion11,
        has_body=request.method != "HEAD",
        stall_timeout=stall_timeout,
        next_protocol=next_protocol if is_reusable else None,
    )


def take_over_connection(request: web.Request, sse_transport: SseTransport) -> None:
    """Make the SSE transport the socket's protocol; aiohttp cancels and forgets the handler.

    Uses asyncio's interfaces only: ``set_protocol``, then ``connection_lost`` on aiohttp's
    protocol, whose transport is taken away first so that it can't close it.
    """
    protocol, transport = request.protocol, request.transport
    assert transport is not None
    transport.set_protocol(sse_transport)
    protocol.transport = None
    protocol.connection_lost(None)
    if not transport.is_reading():  # aiohttp paused reading because of pipelined requests
        transport.resume_reading()
