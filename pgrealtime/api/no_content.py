"""The 204 that answers a subscribe call, its head written as one text.

After a restart there are as many calls as connections, and what aiohttp does to make a head from a
dictionary takes a tenth of each.
"""

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import HttpVersion11

from pgrealtime.api.cors import Headers


class NoContentResponse(web.StreamResponse):
    """A 204 with a date and these header fields; ``on_response_prepare`` isn't sent for it."""

    def __init__(self, fields: Headers) -> None:
        super().__init__(status=204)
        self._fields = fields
        self._is_sent = False

    @property
    def keep_alive(self) -> bool | None:
        """Whether the connection stays open after it."""
        return self._is_sent or super().keep_alive

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send it; if the connection is to be closed, as aiohttp does, which then says so."""
        if not request.keep_alive or request.version != HttpVersion11:
            return await super().prepare(request)
        fields = "".join([f"{name}: {value}\r\n" for name, value in self._fields])
        head = f"HTTP/1.1 204 No Content\r\nDate: {rfc822_formatted_time()}\r\n{fields}\r\n"
        await request.writer.write(head.encode(errors="surrogateescape"))
        self._is_sent = True
        return request.writer

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing more, if it was sent."""
        if not self._is_sent:
            await super().write_eof(data)
