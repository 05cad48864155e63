"""A worker's feed and bus: the frames that the main process sends, and what it is asked."""

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from typing import cast

from pgrealtime.bus.base import Answerer, draw_tag
from pgrealtime.changes import TableName
from pgrealtime.errors import (
    HolderGoneError,
    HolderSilentError,
    PgRealtimeError,
    StreamInterruptedError,
    WorkerGoneError,
)
from pgrealtime.feed.base import FeedStatus, WantedTables
from pgrealtime.feed.frames import AwayFrame, EraFrame, FrameIntake
from pgrealtime.feed.intake import Intake
from pgrealtime.feed.wire import FrameDecoder
from pgrealtime.lsn import LSN
from pgrealtime.workers.link import Link, MessageSplitter
from pgrealtime.workers.messages import (
    AskForGap,
    Bytes,
    Call,
    Done,
    MayListen,
    Wait,
    Waited,
    Want,
)

_EXPIRE_SECONDS = 1.0
_POLL_SECONDS = 0.003
"""Interval at which the changelog is polled for what was waited for."""
_WAIT_SECONDS = 1.0
_ERA_SECONDS = 5.0
"""How long the changelog may be behind a stream that was switched. Events may wait meanwhile."""
_CATCH_UP_SECONDS = 10.0
"""How long connections wait for a worker to read the window. After that it serves them, and those
that resume wait for it."""
_CALL_SECONDS = 15.0
"""The barrier's ten, and a margin."""
_LARGE_FRAME_BYTES = 1024 * 1024
"""A larger frame, which is one large transaction, is decoded in a thread: at 64 MiB connections
would hear nothing for a third of a second."""
_MAX_UNREAD_BYTES = 1024 * 1024
"""Of frames that wait to be applied; then the rest stays in the socket."""


class FrameReceiver(asyncio.Protocol):
    """Takes frames from the socket, as many as are applied."""

    def __init__(self) -> None:
        self._splitter = MessageSplitter()
        self._frames: deque[bytes] = deque()
        self._unread_bytes = 0
        self._arrived = asyncio.Event()
        self._transport: asyncio.ReadTransport | None = None
        self._is_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.ReadTransport, transport)

    def data_received(self, data: bytes) -> None:
        """Take frames."""
        frames = self._splitter.feed(data)
        self._frames.extend(frames)
        self._unread_bytes += sum(map(len, frames))
        if self._unread_bytes > _MAX_UNREAD_BYTES and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        if frames:
            self._arrived.set()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (the protocol's)
        """Nothing more comes: the link says so, too."""
        self._transport = None

    async def receive(self) -> bytes:
        """Return the next frame."""
        while not self._frames:
            if self._is_paused and self._transport is not None:
                self._is_paused = False
                self._transport.resume_reading()
            self._arrived.clear()
            await self._arrived.wait()
        frame = self._frames.popleft()
        self._unread_bytes -= len(frame)
        return frame

    @property
    def has_more(self) -> bool:
        """Whether another frame is there already."""
        return bool(self._frames)


class WorkerFeed:
    """Fills the changelog of a worker; a ``Feed``."""

    def __init__(self, receiver: FrameReceiver, link: Link, intake: Intake) -> None:
        self._receiver = receiver
        self._link = link
        self._intake = intake
        self._is_connected = False

    @property
    def status(self) -> FeedStatus:
        """How the stream fares; the main process reads it, and knows the rest."""
        return FeedStatus(
            is_connected=self._is_connected,
            changes_received=self._intake.changes_received,
            breaks={},
        )

    async def run(self) -> None:
        """Apply frames, and remove what is old, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._apply_frames())
            group.create_task(self._expire_periodically())

    async def _apply_frames(self) -> None:
        decoder, intake = FrameDecoder(), FrameIntake(self._intake)
        while True:
            data = await self._receiver.receive()
            if len(data) > _LARGE_FRAME_BYTES:
                frame = await asyncio.to_thread(decoder.decode, data)
            else:
                frame = decoder.decode(data)
            await intake.apply(frame)
            if isinstance(frame, EraFrame | AwayFrame):
                self._is_connected = isinstance(frame, EraFrame)
            if self._receiver.has_more:
                await asyncio.sleep(0)  # the loop is shared with delivery and HTTP

    async def _expire_periodically(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRE_SECONDS)
            self._intake.expire(time.monotonic())

    async def catch_up(self) -> None:
        """Return when the changelog has what the main process's window had, or after a while.

        And when the workers that start together are all so far.
        """
        waited = await self._link.ask(Wait(LSN(0)), Waited)
        await self._wait_until_read(waited.end_lsn, time.monotonic() + _CATCH_UP_SECONDS)
        await self._link.ask(MayListen(), Done)

    async def wait_for_changelog(self, lsn: LSN) -> bool:
        """Wait until the changelog has all commits up to an LSN; return whether it does."""
        if lsn <= self._intake.end_lsn:
            return True
        deadline = time.monotonic() + _WAIT_SECONDS
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                waited = await self._link.ask(Wait(lsn), Waited)
        except (TimeoutError, WorkerGoneError):
            return False
        return waited.is_complete and await self._wait_until_read(waited.end_lsn, deadline)

    async def _wait_until_read(self, end_lsn: LSN, deadline: float) -> bool:
        while self._intake.end_lsn < end_lsn:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True

    async def want(self, wanted: WantedTables) -> None:
        """Have these tables streamed; return when the changelog has an era of them.

        Raises:
            PgRealtimeError: They can't be streamed, or the changelog is far behind the stream.
        """
        keys = wanted.record_keys.items()
        want = Want(
            tables=list(wanted.tables),
            record_keys=[(*table, list(columns)) for table, columns in keys],
        )
        await self._link.ask(want, Done)
        deadline = time.monotonic() + _ERA_SECONDS
        # Before the first era nobody can subscribe, so that nobody needs the tables yet.
        while (era := self._intake.era) is not None and not wanted.tables.keys() <= {*era.tables}:
            if time.monotonic() >= deadline:
                raise StreamInterruptedError(
                    "the changelog is behind the stream",
                    detail="It hasn't come to where the stream has the tables.",
                )
            await asyncio.sleep(_POLL_SECONDS)

    def append_gap(self, reason: str, tables: frozenset[TableName]) -> None:
        """Have the main process append a gap of the tables."""
        self._link.tell(AskForGap(reason, sorted(tables)))

    async def check_publication(self) -> None:
        """Do nothing: the main process does."""


class WorkerBus:
    """Passes subscribe calls on by way of the main process; a ``Bus``."""

    def __init__(self, link: Link) -> None:
        self.tag = draw_tag()
        self.ignored: Mapping[str, int] = {}
        self._link = link
        self._answer: Answerer | None = None

    def serve(self, answer: Answerer) -> None:
        """Answer requests of the other workers from now on."""
        self._answer = answer

    async def answer(self, request: bytes) -> bytes:
        """Carry out a request of another worker."""
        assert self._answer is not None
        return await self._answer(request)

    async def call(self, tag: str, request: bytes) -> bytes:
        """Have the worker with the tag answer; return its answer.

        Raises:
            HolderGoneError: No worker has the tag, or it ended meanwhile.
            HolderSilentError: It doesn't answer.
        """
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                return (await self._link.ask(Call(tag, request), Bytes)).data
        except TimeoutError:
            raise HolderSilentError("the worker that holds the connection is silent") from None
        except PgRealtimeError as error:
            if error.error_code in (HolderGoneError.code, WorkerGoneError.code):
                raise HolderGoneError(tag) from error
            raise HolderSilentError(error.message) from error
