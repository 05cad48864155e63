"""A caller is told at once what became of its call, also if it can't be answered."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence

import pytest
from structlog.testing import capture_logs

from pgrealtime.bus import sealed
from pgrealtime.bus.seal import LARGE_BYTES, Envelope, Kind, unpack
from pgrealtime.bus.sealed import SealedBus
from pgrealtime.errors import BusError, HolderSilentError

SECRET = "a secret of more than thirty-two characters"
LARGE = bytes(LARGE_BYTES)
"""Is compressed."""


class MemoryBus(SealedBus):
    """A process on a bus that carries parts within this one."""

    def __init__(self, others: dict[str, MemoryBus], tag: str) -> None:
        super().__init__(name="app", secret=SECRET, tag=tag, silence_seconds=5, gone_seconds=5)
        self.is_of_another_version = False
        self._others = others
        others[tag] = self

    def _now_ms(self) -> int:
        return 1_800_000_000_000

    def _part_bytes(self) -> int:
        return 500

    async def _send(self, kind: Kind, message_id: bytes, recipient: str, data: bytes) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if self.is_of_another_version:
                patch.setattr("pgrealtime.bus.seal._PLAIN", b"\x07")
            await super()._send(kind, message_id, recipient, data)

    async def _transmit(self, envelope: Envelope, parts: Sequence[bytes]) -> None:
        for part in parts:
            asyncio.get_running_loop().call_soon(self._others[envelope.recipient]._receive, part)


@pytest.fixture
def two() -> tuple[MemoryBus, MemoryBus]:
    """Two processes, of which the second answers with what it is asked."""
    others: dict[str, MemoryBus] = {}
    caller, holder = MemoryBus(others, "caller"), MemoryBus(others, "holder")

    async def echo(request: bytes) -> bytes:
        return request

    holder.serve(echo)
    return caller, holder


async def ask(caller: MemoryBus, request: bytes) -> bytes:
    """Ask the holder; that it is not answered in time isn't what any test waits for."""
    async with asyncio.timeout(2):
        return await caller.call("holder", request)


@pytest.mark.parametrize("request_", [b"x", LARGE], ids=["plain", "compressed"])
async def test_a_call_beyond_what_is_carried_out_at_once_is_refused(
    two: tuple[MemoryBus, MemoryBus], request_: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is told to come again, and the operator that it is too much for this process."""
    caller, holder = two
    monkeypatch.setattr(sealed, "_MAX_SERVED_BYTES", 2 * LARGE_BYTES)
    may_end = asyncio.Event()

    async def answer(request: bytes) -> bytes:
        await may_end.wait()
        return request

    holder.serve(answer)
    under_way = [asyncio.create_task(ask(caller, LARGE)) for _ in range(2)]
    while holder._served_bytes < 2 * LARGE_BYTES:
        await asyncio.sleep(0.001)
    with (
        capture_logs() as logged,
        pytest.raises(HolderSilentError, match="the holder refuses to answer more calls"),
    ):
        await ask(caller, request_)
    may_end.set()

    assert await asyncio.gather(*under_way) == [LARGE, LARGE]
    assert await ask(caller, request_) == request_
    assert holder.ignored == {"call_refused": 1}
    assert [entry["hint"] for entry in logged] == [
        "Other processes pass on more calls than this one can carry out."
    ]
    assert holder._served_bytes == 0


async def test_what_is_too_much_is_not_unpacked(
    two: tuple[MemoryBus, MemoryBus], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call may become a thousand times as large as it came."""
    unpacked: list[bytes] = []

    def note(content: bytes) -> bytes:
        unpacked.append(content)
        return unpack(content)

    monkeypatch.setattr(sealed, "unpack", note)
    monkeypatch.setattr(sealed, "_MAX_SERVED_BYTES", len(zlib.compress(LARGE, 1)))
    with pytest.raises(HolderSilentError):
        await ask(two[0], LARGE)
    assert unpacked == []


async def test_a_process_that_does_not_answer_yet_refuses(two: tuple[MemoryBus, MemoryBus]) -> None:
    caller, holder = two
    MemoryBus(holder._others, "holder")
    with pytest.raises(HolderSilentError):
        await ask(caller, b"x")


@pytest.mark.parametrize("strange", ["caller", "holder"])
async def test_a_message_of_another_version_ends_the_call(
    two: tuple[MemoryBus, MemoryBus], strange: str
) -> None:
    """Whichever of the two can't read what the other one says."""
    caller, holder = two
    one, other = (caller, holder) if strange == "caller" else (holder, caller)
    one.is_of_another_version = True
    with pytest.raises(BusError):
        await ask(caller, b"x")
    assert other.ignored == {"call_malformed": 1}
