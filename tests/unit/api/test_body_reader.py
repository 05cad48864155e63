"""Large bodies, however many come at once, leave the event loop to others."""

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
"""Pieces of a body before it is a large one."""


class Loop:
    """Counts how often the event loop has come round."""

    def __init__(self) -> None:
        self.rounds = 0

    async def run(self) -> None:
        while True:
            self.rounds += 1
            await asyncio.sleep(0)


def request(loop: Loop, taken: Counter[int]) -> web.Request:
    """A body all of whose pieces are there already."""

    async def pieces() -> AsyncIterator[bytes]:
        for n in range(_PIECES):
            if n > _FIRST:
                taken[loop.rounds] += 1
            yield b"x" * (LARGE_BODY_BYTES // _FIRST + 1)

    made: Any = SimpleNamespace(
        body_exists=True,
        content_length=None,
        headers={},
        rel_url=SimpleNamespace(raw_query_string=""),
        content=SimpleNamespace(iter_any=pieces),
    )
    return cast(web.Request, made)


async def test_of_many_large_bodies_one_piece_is_taken_each_time_round() -> None:
    loop, taken = Loop(), Counter[int]()
    body_reader = BodyReader()
    counting = asyncio.create_task(loop.run())

    def size(_type: str, body: bytes, _query: bytes) -> int:
        return len(body)

    sizes = await asyncio.gather(
        *(body_reader.read(request(loop, taken), f"10.0.0.{n}", size) for n in range(_BODIES))
    )
    counting.cancel()

    assert sizes == [_PIECES * (LARGE_BODY_BYTES // _FIRST + 1)] * _BODIES
    assert max(taken.values()) <= 2
