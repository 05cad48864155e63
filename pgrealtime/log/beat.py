"""What owner and replicas say of themselves, over core NATS. Pure.

Each is a msgpack array that begins with the version of the wire. Later versions only add to its
end, which earlier ones leave out: they have to hear that there is an owner, whatever it writes.
"""

from typing import TypeVar

import msgspec
from msgspec import Struct

from pgrealtime.changes import TableName
from pgrealtime.errors import LogMessageError
from pgrealtime.log.message import WIRE_VERSION
from pgrealtime.lsn import LSN

PRESENCE_SECONDS = 1.0
GONE_SECONDS = 3.0
"""Without presence for so long a replica is gone."""
BEAT_SECONDS = 0.2
VACANT_SECONDS = 0.8
"""Without a beat for so long there is no owner."""
CHANCE_SECONDS = 0.2
"""Up to so much longer a candidate waits, so that not all begin at once."""
AWAY_SECONDS = 2.0
"""Without a beat for so long the stream is away: an ordinary take-over is faster."""
DEAF_SECONDS = 10.0
"""An owner that hasn't heard the database for so long is none."""


class Beat(Struct, frozen=True, array_like=True, kw_only=True):
    """Says that there is an owner."""

    version: int = WIRE_VERSION
    term: int
    salt: int
    tag: str
    """Of the owner's process."""
    sequence: int
    """Of the last message that it knows to be stored."""
    head_lsn: LSN
    """Where the last entry in that message ends."""
    wal_end: LSN
    deaf_seconds: float
    """Since the database was last heard."""
    is_streaming: bool
    """Whether the replication stream is open."""

    def is_valid(self, term: int) -> bool:
        """Whether it shows an owner to those who have read the log up to a term."""
        return self.term >= term and self.deaf_seconds < DEAF_SECONDS


class Presence(Struct, frozen=True, array_like=True, kw_only=True):
    """Says that there is a replica; once a second."""

    version: int = WIRE_VERSION
    tag: str
    program: str
    digest: str
    """Of configuration and wanted tables: replicas with the same one do the same."""
    connections: int
    head_lsn: LSN
    tables: tuple[TableName, ...] | None = None
    """What it wants to be streamed; None: as it said before."""
    record_keys: tuple[tuple[TableName, tuple[str, ...]], ...] = ()


_T = TypeVar("_T", bound=Struct)


def encode(message: Struct) -> bytes:
    """Return the message's bytes."""
    return msgspec.msgpack.encode(message)


def decode(payload: bytes, type_: type[_T]) -> _T:
    """Return the message.

    Raises:
        LogMessageError: It isn't one of this type.
    """
    try:
        return msgspec.msgpack.decode(payload, type=type_)
    except msgspec.DecodeError as error:
        raise LogMessageError(f"a {type_.__name__.lower()} can't be read") from error
