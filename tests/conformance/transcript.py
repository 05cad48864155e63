"""The recordings as typed values: read strictly, so that no member is silently ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class RecordedRequest(_Part, frozen=True, kw_only=True):
    """What a client sends."""

    method: str
    path: str
    headers: dict[str, str] = {}
    body: str = ""
    source_ip: str | None = None
    """Local address to send from."""
    incomplete: bool = False
    """The declared length is larger than the body; nothing more is sent."""
    held: bool = False
    """The head of the answer comes, and the server keeps the connection open."""


class RecordedAnswer(_Part, frozen=True, kw_only=True):
    """What the server answered."""

    status: int
    headers: dict[str, str] = {}
    """Must be present with these values; others are free."""
    body: str | None = None
    match: Literal["bytes", "json"] = "bytes"


class _Step(_Part, tag_field="do", frozen=True, kw_only=True):
    note: str = ""


class Login(_Step, tag="login", frozen=True, kw_only=True):
    """Obtain a token and remember it."""

    account: str
    variable: str = msgspec.field(name="as")
    lifetime_s: float | None = None


class SseOpen(_Step, tag="sse_open", frozen=True, kw_only=True):
    """Open the stream ``conn``."""

    conn: str
    request: RecordedRequest
    response: RecordedAnswer


class SseClose(_Step, tag="sse_close", frozen=True, kw_only=True):
    """The client closes ``conn``."""

    conn: str


class Exchange(_Step, tag="request", frozen=True, kw_only=True):
    """Send a request, compare the answer."""

    request: RecordedRequest
    response: RecordedAnswer


class Expect(_Step, tag="expect", frozen=True, kw_only=True):
    """The next messages on ``conn``."""

    conn: str
    messages: tuple[str, ...]
    order: Literal["given", "any"] = "given"
    match: Literal["bytes", "json"] = "bytes"


class ExpectSilence(_Step, tag="expect_silence", frozen=True, kw_only=True):
    """Nothing arrives on ``conn``, which stays open."""

    conn: str
    ms: float


class ExpectClosed(_Step, tag="expect_closed", frozen=True, kw_only=True):
    """The server ends ``conn``."""

    conn: str
    after_ms: tuple[float, float] = (0, 5000)
    """Permitted range, counted from this step."""
    how: str = "end of chunked body"


class Write(_Step, tag="write", frozen=True, kw_only=True):
    """Commit one change."""

    op: Literal["create", "update", "delete", "set_password"]
    collection: str
    id: str
    data: dict[str, Any] = {}
    """Members by name; an update changes only these."""
    password: str = ""
    """The new password of ``set_password``; invented if neither here nor in ``data``."""


class Transaction(_Step, tag="transaction", frozen=True, kw_only=True):
    """Several writes in one database transaction."""

    writes: tuple[Write, ...]
    commit: bool = True


class AlterCollection(_Step, tag="alter_collection", frozen=True, kw_only=True):
    """Change members of a collection's definition."""

    collection: str
    patch: dict[str, Any]


class DropCollection(_Step, tag="drop_collection", frozen=True, kw_only=True):
    """Remove a collection."""

    collection: str


class ResetTokenSecret(_Step, tag="reset_token_secret", frozen=True, kw_only=True):
    """Replace the secret that a collection's tokens are signed with."""

    collection: str


class RestartServer(_Step, tag="restart_server", frozen=True, kw_only=True):
    """Orderly stop and start on the same data."""


class Wait(_Step, tag="wait", frozen=True, kw_only=True):
    """Let time pass."""

    ms: float


Step: TypeAlias = (
    Login
    | SseOpen
    | SseClose
    | Exchange
    | Expect
    | ExpectSilence
    | ExpectClosed
    | Write
    | Transaction
    | AlterCollection
    | DropCollection
    | ResetTokenSecret
    | RestartServer
    | Wait
)


class Conversation(_Part, frozen=True, kw_only=True):
    """One recording."""

    name: str
    title: str
    steps: tuple[Step, ...]
    recorded_from: str = ""
    tags: frozenset[str] = frozenset()
    notes: str = ""


def load_conversation(path: Path) -> Conversation:
    """Return the recording in a file.

    Raises:
        msgspec.ValidationError: A member is missing, unknown or of the wrong type.
    """
    return msgspec.json.decode(path.read_bytes(), type=Conversation)
