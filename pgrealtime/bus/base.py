"""What a bus is: it passes a subscribe call on to the process that holds the connection.

``api.call_router`` calls it; ``service.build`` chooses one. A client id says which process holds
its connection: the first characters are the *tag* of the process that made it.
"""

import re
import secrets
import string
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol, TypeAlias

from pgrealtime.errors import HolderGoneError

TAG_LENGTH: Final = 6
_LETTERS: Final = string.ascii_letters + string.digits
_CLIENT_ID: Final = re.compile(r"([A-Za-z0-9]{6})[A-Za-z0-9]{34}(?:\..*)?", re.DOTALL | re.ASCII)

Answerer: TypeAlias = Callable[[bytes], Awaitable[bytes]]
"""Carries out a request and returns the answer. Doesn't raise."""


def draw_tag() -> str:
    """Return a tag for a process that starts; no other process, earlier or later, has it."""
    return "".join(secrets.choice(_LETTERS) for _ in range(TAG_LENGTH))


def tag_of(client_id: str) -> str | None:
    """Return the tag in a client id, with or without a position after a dot.

    None if no process makes such an id, so that nothing else than a tag is ever asked for.
    """
    match = _CLIENT_ID.fullmatch(client_id)
    return None if match is None else match[1]


class Bus(Protocol):
    """Reaches the other processes of a cluster by their tags."""

    @property
    def tag(self) -> str:
        """The tag of this process."""

    @property
    def ignored(self) -> Mapping[str, int]:
        """Numbers of messages that were ignored, by the error's code."""

    async def call(self, tag: str, request: bytes) -> bytes:
        """Have another process answer a request; return its answer.

        Raises:
            HolderGoneError: No process has the tag, or it ended meanwhile.
            HolderSilentError: It is there and doesn't answer, or the bus itself doesn't.
        """

    def serve(self, answer: Answerer) -> None:
        """Answer requests of the other processes from now on."""


class NoBus:
    """The bus of a process that is alone: there is no other one."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.ignored: Mapping[str, int] = {}

    async def call(self, tag: str, request: bytes) -> bytes:  # noqa: ARG002 (the protocol's)
        """Raise ``HolderGoneError``."""
        raise HolderGoneError(tag)

    def serve(self, answer: Answerer) -> None:
        """Do nothing: nobody calls."""
