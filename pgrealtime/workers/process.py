"""One worker as the main process has it: its process, its sockets, and whether it answers."""

import asyncio
import os
import site
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import structlog

import pgrealtime
from pgrealtime.errors import PgRealtimeError
from pgrealtime.feed.broadcast import Broadcaster, FrameSender
from pgrealtime.workers.link import Answering, Link
from pgrealtime.workers.messages import (
    BEAT_SECONDS,
    Beat,
    Counts,
    Failed,
    Hello,
    Message,
    ReadCounts,
    Ready,
    StartFailed,
    Stop,
)

log = structlog.get_logger(__name__)

_SILENT_BEATS = 3
"""Missed beats after which nothing is expected of a worker soon."""
_STUCK_BEATS = 15
"""Missed beats after which a worker is killed."""
_START_BEATS = 120
"""The same before the first one: modules are loaded, perhaps by a slow machine."""
_COUNTS_SECONDS = 1.0


class WorkerProcess:
    """A worker from its start to its end.

    ``answer`` is called with the worker and what it asks.
    """

    def __init__(
        self,
        hello: Hello,
        broadcaster: Broadcaster,
        answer: "Callable[[WorkerProcess, Message], Answering]",
    ) -> None:
        self.number = hello.number
        self.tag = ""
        """Empty until it serves."""
        self.counts: Counts | None = None
        """The last ones it sent."""
        self.connection_count = 0
        self.ready = asyncio.Event()
        self._hello = hello
        self._broadcaster = broadcaster
        self._answer_of_main = answer
        self._missed_beats = 0
        self._allowed_beats = _START_BEATS
        self._failure: Failed | None = None
        self._is_killed = False
        self._process: asyncio.subprocess.Process | None = None
        self._sender: FrameSender | None = None
        self.link = Link(self._answer)

    @property
    def is_silent(self) -> bool:
        """Whether it is stopped, or its event loop hangs."""
        return self._missed_beats >= _SILENT_BEATS

    @property
    def is_serving(self) -> bool:
        """Whether it accepts connections."""
        return self.ready.is_set() and not self.link.closed.is_set()

    async def run(self) -> Failed | None:
        """Run the process to its end; return why it failed, if it said so."""
        loop = asyncio.get_running_loop()
        frames, their_frames = socket.socketpair()
        messages, their_messages = socket.socketpair()
        with their_frames, their_messages:
            numbers = their_frames.fileno(), their_messages.fileno()
            # -P: the directory that the operator is in is no place for modules.
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "pgrealtime", "worker", *map(str, numbers)),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=numbers,
                env=_environ(),
            )
        log.debug("worker.started", worker=self.number, pid=process.pid)
        if self._is_killed:
            process.kill()
        self._sender = self._broadcaster.add_sender()
        watch = asyncio.create_task(self._watch_beats(process), name="beats")
        try:
            await loop.create_unix_connection(lambda: self.link, sock=messages)
            self.link.tell(self._hello)
            sender = self._sender
            await loop.create_unix_connection(lambda: sender, sock=frames)
            await process.wait()
        finally:
            watch.cancel()
            if process.returncode is None:
                process.kill()
                await process.wait()
            self._broadcaster.remove_sender(self._sender)
            self._sender.close()
        # What it told last may still be in the socket, which ends with the process.
        await self.link.closed.wait()
        return self._failure

    @property
    def exit_code(self) -> int | None:
        """As ``subprocess`` has it: negative is a signal's number."""
        return None if self._process is None else self._process.returncode

    @property
    def pid(self) -> int | None:
        """Its process id."""
        return None if self._process is None else self._process.pid

    def stop(self) -> None:
        """Let it end its connections in small groups, then itself."""
        self.link.tell(Stop())

    def kill(self) -> None:
        """End it at once; if it is being started, right after that."""
        self._is_killed = True
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def _watch_beats(self, process: asyncio.subprocess.Process) -> None:
        """Kill it when it is stuck. Counted in beats, not seconds: all may have been stopped."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            self._missed_beats += 1
            if self.is_silent:
                self.link.give_up()
            if self._missed_beats == self._allowed_beats and process.returncode is None:
                log.error("worker.stuck", worker=self.number, pid=process.pid)
                process.kill()

    def _answer(self, message: Message) -> Answering:
        match message:
            case Beat(connection_count=count):
                self._missed_beats, self._allowed_beats = 0, _STUCK_BEATS
                self.connection_count = count
            case Ready(tag=tag):
                self.tag = tag
                self.ready.set()
            case StartFailed(error=error):
                self._failure = error
            case _:
                return self._answer_of_main(self, message)
        return None

    async def read_counts(self) -> Counts | None:
        """Return its metrics, the last ones if it doesn't answer in time; None if it never did.

        A silent one isn't asked.
        """
        if self.is_silent:
            return self.counts
        try:
            async with asyncio.timeout(_COUNTS_SECONDS):
                self.counts = await self.link.ask(ReadCounts(), Counts)
        except (TimeoutError, PgRealtimeError):
            pass
        return self.counts


def _environ() -> dict[str, str]:
    """Return the environment in which the worker finds this very program."""
    own = str(Path(pgrealtime.__file__).parent.parent)
    if own in (*site.getsitepackages(), site.getusersitepackages()):
        return dict(os.environ)  # named there it would come before the standard library
    paths = [own, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
