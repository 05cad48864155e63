"""Large bodies are read in small pieces, so that many at once don't occupy the event loop."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

from aiohttp import web

from pgrealtime.api.body_reader import LARGE_BODY_BYTES, BodyReader

_BODIES = 20
_PIECES = 30
_FIRST = 4
"""Pieces of a body until it counts as large."""


class Loop:
    """Counts the iterations of the event loop."""

    def __init__(self) -> None:
        self.iterations = 0

    async def run(self) -> None:
        while True:
            self.iterations += 1
            await asyncio.sleep(0)


def request(loop: Loop, pieces_by_iteration: Counter[int]) -> web.Request:
    """Return a request whose body has been received completely."""

    async def pieces() -> AsyncIterator[bytes]:
        for n in range(_PIECES):
            if n > _FIRST:
                pieces_by_iteration[loop.iterations] += 1
            yield b"x" * (LARGE_BODY_BYTES // _FIRST + 1)

    made: Any = SimpleNamespace(
        body_exists=True,
        content_length=None,
        headers={},
        rel_url=SimpleNamespace(raw_query_string=""),
        content=SimpleNamespace(iter_any=pieces),
    )
    return cast(web.Request, made)


async def test_of_many_large_bodies_one_piece_is_read_in_each_loop_iteration() -> None:
    """However many large bodies are read at once."""
    loop, pieces_by_iteration = Loop(), Counter[int]()
    body_reader = BodyReader()
    counting = asyncio.create_task(loop.run())

    def size(_type: str, body: bytes, _query: bytes) -> int:
        return len(body)

    sizes = await asyncio.gather(
        *(
            body_reader.read(request(loop, pieces_by_iteration), f"10.0.0.{n}", size)
            for n in range(_BODIES)
        )
    )
    counting.cancel()

    assert sizes == [_PIECES * (LARGE_BODY_BYTES // _FIRST + 1)] * _BODIES
    assert max(pieces_by_iteration.values()) <= 2
