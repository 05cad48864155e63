"""Feeds other processes from the encoded window, each at its own pace, over its own socket.

The follower of the main process: it delivers nothing by itself. A process that reads slowly is
waited for, so that a flood of changes holds up the stream, as it does in one process; one that
reads nothing at all is not.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import cast

from pgrealtime.feed.window import EncodedWindow
from pgrealtime.lsn import Cursor

MAX_BUFFERED_BYTES = 8 * 1024 * 1024
"""Bytes handed to a socket that the process hasn't read; it reads the rest when it has."""
_IDLE_CHECKS = 3
"""Checks in a row without progress after which a process is not waited for."""
LENGTH_BYTES = 4
"""Of the length before each frame: unsigned, big endian."""


class FrameSender(asyncio.Protocol):
    """Sends the frames of the window to one process."""

    def __init__(self, window: EncodedWindow, on_progress: Callable[[], None]) -> None:
        self._window = window
        self._on_progress = on_progress
        self._transport: asyncio.WriteTransport | None = None
        self._next: int | None = None
        """The number of the frame to send next; None before the first."""
        self._is_full = False
        self._seen, self._idle_checks = (0, 0), 0
        self.is_stalled = False
        """Whether the process reads nothing although frames wait for it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send what the window holds."""
        self._transport = cast(asyncio.WriteTransport, transport)
        self._transport.set_write_buffer_limits(high=MAX_BUFFERED_BYTES)
        self.send()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (the protocol's)
        """Send no more."""
        self._transport = None
        self.is_stalled = True
        self._on_progress()

    def pause_writing(self) -> None:
        """Wait until the process has read some of what was sent."""
        self._is_full = True

    def resume_writing(self) -> None:
        """Send on."""
        self._is_full = False
        self.send()
        self._on_progress()

    def close(self) -> None:
        """Close the socket; what the process hasn't read is dropped."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def sent_upto(self) -> Cursor:
        """The end of what was handed to the socket."""
        window = self._window
        return window.floor if self._next is None else window.end_before(self._next)

    def send(self) -> None:
        """Send the frames that the process doesn't have, as far as the socket takes them."""
        window, transport = self._window, self._transport
        if transport is None:
            return
        while not self._is_full:
            if self._next is None or self._next < window.first_number:
                frames = window.opening_frames(self._next)
                self._next = window.first_number
            elif self._next < window.end_number:
                frames = (window.frame(self._next),)
                self._next += 1
            else:
                return
            for frame in frames:
                transport.writelines((len(frame).to_bytes(LENGTH_BYTES), frame))

    def check_progress(self) -> None:
        """Note whether the process has read anything since the last check."""
        if self._transport is None:
            return
        seen = (self._next or 0, self._transport.get_write_buffer_size())
        is_idle = self._is_full and seen == self._seen
        self._seen, self._idle_checks = seen, self._idle_checks + 1 if is_idle else 0
        self.is_stalled = self._idle_checks >= _IDLE_CHECKS


class Broadcaster:
    """Tells the processes of the streams and sends them the window; a ``Follower``.

    A process that reads nothing while frames wait for it is waited for ``patience_seconds`` at most
    (three quarters of them at least). If the window has moved on when it reads again, it is sent a
    gap.
    """

    def __init__(
        self,
        window: EncodedWindow,
        *,
        patience_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._window = window
        self._patience_seconds = patience_seconds
        self._clock = clock
        self._senders: list[FrameSender] = []
        self.progressed = asyncio.Event()

    def add_sender(self) -> FrameSender:
        """Return the protocol for the socket of one more process."""
        sender = FrameSender(self._window, self.progressed.set)
        self._senders.append(sender)
        return sender

    def remove_sender(self, sender: FrameSender) -> None:
        """Send to a process no more; it has ended."""
        self._senders.remove(sender)
        self.progressed.set()

    @property
    def head(self) -> Cursor:
        """The end of what was sent to every process that reads."""
        return min(self._positions(), default=self._window.end_cursor)

    def _positions(self) -> Iterable[Cursor]:
        return (sender.sent_upto for sender in self._senders if not sender.is_stalled)

    def wake(self) -> None:
        """Send what was appended to the window."""
        before = self.head
        self._window.flush()
        self._send()
        if self.head != before:
            self.progressed.set()

    def stream_started(self, epoch: str) -> None:  # noqa: ARG002 (the window has the era)
        """Tell that a stream is being read."""
        self._window.add_era(self._clock())
        self._send()

    def stream_continued(self, epoch: str) -> None:  # noqa: ARG002 (the window has the era)
        """Tell that another stream continues exactly where the last one ended."""
        self._window.add_era(self._clock(), is_continuation=True)
        self._send()

    def stream_lost(self) -> None:
        """Tell that no stream is being read."""
        self._window.add_away(self._clock())
        self._send()

    def _send(self) -> None:
        for sender in self._senders:
            sender.send()

    async def watch(self) -> None:
        """Find out which processes read nothing, for ever."""
        while True:
            # One more than are counted: it may have read last just after a check.
            await asyncio.sleep(self._patience_seconds / (_IDLE_CHECKS + 1))
            for sender in self._senders:
                sender.check_progress()
            self.progressed.set()
