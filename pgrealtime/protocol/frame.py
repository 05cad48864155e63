"""The text of messages. Made once per group; a connection adds its own ``id:`` line in front."""

from __future__ import annotations

import json
from collections.abc import Iterable

from pgrealtime.changes import Action

# A message is b"id:" + id + tail, the tail being everything after the id, which is all that
# differs between connections: the end of the id line, the event line, the data line, the blank.

HEARTBEAT = b":\n"
"""A comment without an empty line after it: some clients take that for a message."""


def event_tail(topic: bytes, record: bytes, action: Action) -> bytes:
    """Return the tail of a record's message; ``topic`` is the subscription exactly as submitted."""
    return b'\nevent:%b\ndata:{"record":%b,"action":"%b"}\n\n' % (topic, record, action.encode())


def connect_tail(client_id: str) -> bytes:
    """Return the tail of PB_CONNECT, which names the bare client id."""
    return b'\nevent:PB_CONNECT\ndata:{"clientId":"%b"}\n\n' % client_id.encode()


def cursor_tail(event_id: bytes) -> bytes:
    """Return the tail of PB_CURSOR: the id once more, for clients that don't see ids."""
    return b'\nevent:PB_CURSOR\ndata:{"id":"%b"}\n\n' % event_id


def resync_tail(collections: Iterable[str], reason: str) -> bytes:
    """Return the tail of PB_RESYNC: what must be loaded anew; no collections means all."""
    data = json.dumps(
        {"collections": sorted(collections), "reason": reason},
        separators=(",", ":"),
        ensure_ascii=False,
    )
    return b"\nevent:PB_RESYNC\ndata:%b\n\n" % data.encode()
