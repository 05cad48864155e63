"""One SSE response: PocketBase's head, and bytes straight to the socket."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp_sse import EventSourceResponse


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


class TransportSink:
    """The hub's way to the socket, past aiohttp's writer: 0.5 us a message instead of 9.

    One call to ``write`` is one chunk, so a client that takes each read for a message is right
    as often as with PocketBase.

    Args:
        request: Its response's head is out.
        writer: Of that response; knows when the transport's buffer is low.
    """

    __slots__ = ("_is_chunked", "_is_over", "_transport", "_writer")

    def __init__(self, request: web.Request, writer: AbstractStreamWriter) -> None:
        if request.transport is None:
            raise ConnectionResetError("the client went away before the head was out")
        self._transport = request.transport
        self._writer = writer
        self._is_chunked = request.version >= HttpVersion11
        self._is_over = request.method == "HEAD"

    def write(self, data: bytes) -> None:
        """Send bytes; after the end, and to a client that has gone, they are dropped."""
        if self._is_over or not data or self._transport.is_closing():
            return
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)

    def buffered(self) -> int:
        """Bytes the kernel hasn't taken yet."""
        return self._transport.get_write_buffer_size()

    async def drain(self) -> None:
        """Wait until the buffer is low or the client gone."""
        with suppress(ConnectionError):
            await self._writer.drain()

    def end(self) -> None:
        """Take nothing more. The body's end is written by the handler, which wakes up now."""
        self._is_over = True

    def abort(self) -> None:
        """Drop the connection and what is buffered; the handler is cancelled by that."""
        self._is_over = True
        self._transport.abort()


async def finish(response: EventStream, sink: TransportSink, *, stall_timeout: float) -> None:
    """Write the end of the body after everything before it, dropping who doesn't take it."""
    try:
        async with asyncio.timeout(stall_timeout):
            await response.write_eof()
    except TimeoutError:
        sink.abort()
