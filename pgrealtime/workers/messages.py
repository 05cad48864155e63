"""What the main process and a worker say to each other, besides frames. Pure.

Every message is one of these; ``link`` numbers those that are answered.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import msgspec
from msgspec import Struct

from pgrealtime.changes import TableName
from pgrealtime.errors import PgRealtimeError
from pgrealtime.lsn import LSN
from pgrealtime.observe.metrics import MetricValues, Sample

BEAT_SECONDS = 1.0
"""Between two beats of a worker."""

# --- from the main process


class Hello(Struct, frozen=True, tag=True):
    """The first message: what the worker is to serve."""

    number: int
    """1 is the first worker."""
    config: str
    """The configuration as JSON, secrets included."""
    port: int
    """Where to listen, with ``SO_REUSEPORT``."""


class Answer(Struct, frozen=True, tag=True):
    """A subscribe call that another worker received, to be carried out; answered by ``Bytes``."""

    request: bytes


class Prepare(Struct, frozen=True, tag=True):
    """Check another configuration and hold it ready; answered by ``Done`` or ``Failed``."""

    config: str


class Apply(Struct, frozen=True, tag=True):
    """Answer requests by the prepared configuration from now on, or drop it.

    Answered by ``Done`` or ``Failed``.
    """

    is_accepted: bool


class Deliver(Struct, frozen=True, tag=True):
    """Deliver events by the configuration of ``Apply``; answered by ``Done`` or ``Failed``."""


class ReadCounts(Struct, frozen=True, tag=True):
    """Answered by ``Counts``."""


class Look(Struct, frozen=True, tag=True):
    """An operator looks: answered by ``Bytes``, a ``View`` as JSON, or ``Failed``."""

    view: str
    query: Mapping[str, str]


class RefreshSchema(Struct, frozen=True, tag=True):
    """Another worker has found the schema changed. Not answered."""


class Stop(Struct, frozen=True, tag=True):
    """End the connections in small groups, then the process. Not answered."""


# --- from a worker


class MayListen(Struct, frozen=True, tag=True):
    """The worker could listen; answered by ``Done`` when all that start together could.

    Else the first one would get all connections.
    """


class Ready(Struct, frozen=True, tag=True):
    """The worker serves its port. Not answered."""

    tag: str
    """The first characters of its client ids."""


class Beat(Struct, frozen=True, tag=True):
    """The worker's event loop runs: said once a second. Not answered."""

    connection_count: int


class StartFailed(Struct, frozen=True, tag=True):
    """The worker can't start, or can't continue. Not answered; it ends."""

    error: "Failed"


class Want(Struct, frozen=True, tag=True):
    """Stream at least these tables; answered by ``Done`` or ``Failed``."""

    tables: Sequence[tuple[str, str]]
    """Schemas and names."""
    record_keys: Sequence[tuple[str, str, Sequence[str]]]
    """Schema, name, and the columns that name a record."""


class Wait(Struct, frozen=True, tag=True):
    """Wait until the window has all commits up to an LSN; answered by ``Waited``."""

    lsn: LSN


class AskForGap(Struct, frozen=True, tag=True):
    """Append a gap of the tables. Not answered."""

    reason: str
    tables: Sequence[tuple[str, str]]


class Call(Struct, frozen=True, tag=True):
    """Have the worker with the tag answer; answered by ``Bytes`` or ``Failed``."""

    tag: str
    request: bytes


# --- answers


class Done(Struct, frozen=True, tag=True):
    """What was asked for is done."""


class Failed(Struct, frozen=True, tag=True):
    """What was asked for can't be done."""

    code: str
    message: str
    detail: str = ""
    hint: str = ""

    @classmethod
    def of(cls, error: PgRealtimeError) -> "Failed":
        """Return the error as a message."""
        return cls(error.error_code, error.message, error.detail, error.hint)

    def as_error(self) -> PgRealtimeError:
        """Return the error, without its class."""
        return PgRealtimeError(self.message, detail=self.detail, hint=self.hint, code=self.code)


class Waited(Struct, frozen=True, tag=True):
    """The window has all commits up to the LSN when the worker has read up to ``end_lsn``."""

    is_complete: bool
    end_lsn: LSN


class Bytes(Struct, frozen=True, tag=True):
    """The answer to a subscribe call, or to a look."""

    data: bytes


class Counts(Struct, frozen=True, tag=True):
    """The worker's own metrics, and why it isn't ready."""

    values: MetricValues
    samples: Sequence[Sample]
    not_ready_reasons: Sequence[str]


Message: TypeAlias = (
    Hello
    | Answer
    | Prepare
    | Apply
    | Deliver
    | ReadCounts
    | Look
    | RefreshSchema
    | Stop
    | MayListen
    | Ready
    | Beat
    | StartFailed
    | Want
    | Wait
    | AskForGap
    | Call
    | Done
    | Failed
    | Waited
    | Bytes
    | Counts
)


class Envelope(Struct, frozen=True, array_like=True):
    """A message with the number under which it is answered."""

    message: Message
    question: int = 0
    """The sender's number of it; 0 if no answer is expected."""
    answers: int = 0
    """The receiver's number that this answers; 0 if it answers none."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)


def encode_envelope(envelope: Envelope) -> bytes:
    """Return the envelope's bytes."""
    return _encoder.encode(envelope)


def decode_envelope(data: bytes) -> Envelope:
    """Return the envelope of the bytes; both processes are of the same program."""
    return _decoder.decode(data)


def named_tables(pairs: Sequence[tuple[str, str]]) -> frozenset[TableName]:
    """Return the names of tables."""
    return frozenset(TableName(*pair) for pair in pairs)
