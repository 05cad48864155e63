"""A follower of the changelog for tests, which has always delivered everything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pgrealtime.changelog.memory import Changelog
from pgrealtime.lsn import Cursor


class Follower:
    """Records the calls of the intake and the reader, and never makes them wait.

    Args:
        changelog: Written by the intake.
        deadline: Maximum of seconds that ``until`` waits.

    Attributes:
        said: The streams' starts, continuations and losses, in order, with their epochs.
    """

    def __init__(self, changelog: Changelog, deadline: float) -> None:
        self._changelog = changelog
        self._deadline = deadline
        self.progressed = asyncio.Event()
        self.said: list[str] = []
        self._called = asyncio.Event()

    @property
    def head(self) -> Cursor:
        return self._changelog.end_cursor

    def wake(self) -> None:
        self._called.set()

    def stream_started(self, epoch: str) -> None:
        self._say(f"started {epoch}")

    def stream_continued(self, epoch: str) -> None:
        self._say(f"continued {epoch}")

    def stream_lost(self) -> None:
        self._say("lost")

    def _say(self, word: str) -> None:
        self.said.append(word)
        self._called.set()

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until the condition holds; it is checked after each call."""
        async with asyncio.timeout(self._deadline):
            while not is_so():
                self._called.clear()
                await self._called.wait()
