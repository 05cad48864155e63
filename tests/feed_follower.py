"""A follower of the relay for tests: it has read everything at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pgrealtime.changelog.memory import MemoryChangelog
from pgrealtime.lsn import Cursor


class Follower:
    """Notes what the relay tells it, and never holds the relay up.

    Args:
        changelog: What the relay fills.
        deadline: Seconds that ``until`` waits at most.

    Attributes:
        said: What it was told of streams, in order, with their epochs.
    """

    def __init__(self, changelog: MemoryChangelog, deadline: float) -> None:
        self._changelog = changelog
        self._deadline = deadline
        self.progressed = asyncio.Event()
        self.said: list[str] = []
        self._heard = asyncio.Event()

    @property
    def head(self) -> Cursor:
        return self._changelog.head

    def wake(self) -> None:
        self._heard.set()

    def stream_started(self, epoch: str) -> None:
        self._say(f"started {epoch}")

    def stream_continued(self, epoch: str) -> None:
        self._say(f"continued {epoch}")

    def stream_lost(self) -> None:
        self._say("lost")

    def _say(self, word: str) -> None:
        self.said.append(word)
        self._heard.set()

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until that is so, after anything that it is told."""
        async with asyncio.timeout(self._deadline):
            while not is_so():
                self._heard.clear()
                await self._heard.wait()
