"""Encodes SSE messages, except for their ``id:`` line.

A message is ``id:``, the id, and a tail. Only the id differs between connections, so a tail is
encoded once for all that receive it: the end of the id line, event line, data line, empty line.
"""

import json
from collections.abc import Iterable, Mapping

from pgrealtime.changes import Action

HEARTBEAT = b":\n"
"""A comment, without an empty line after it: some clients would take that for a message."""


def event_tail(topic: bytes, record: bytes, action: Action) -> bytes:
    """Return the tail of a record's message; ``topic`` exactly as submitted, ``record`` JSON."""
    # No blank after the colons, as PocketBase writes it (HTML standard, "Server-sent events": one
    # blank would be ignored). Neither part can have a line break: ``parse_topic`` refuses it, JSON
    # escapes it.
    return b'\nevent:%b\ndata:{"record":%b,"action":"%b"}\n\n' % (topic, record, action.encode())


def connect_tail(client_id: str) -> bytes:
    """Return the tail of PB_CONNECT."""
    return b'\nevent:PB_CONNECT\ndata:{"clientId":"%b"}\n\n' % client_id.encode()


def cursor_tail(event_id: bytes) -> bytes:
    """Return the tail of PB_CURSOR."""
    # The id as data, for clients that can't read the ids of messages.
    return b'\nevent:PB_CURSOR\ndata:{"id":"%b"}\n\n' % event_id


def mirror_resync_tail(
    topic: bytes, collection_id: str, collection_name: str, reason: str
) -> bytes:
    """Return the tail that tells a mirror's client to load its list anew."""
    members = {"action": "resync", "reason": reason}
    return _mirror_tail(topic, collection_id, collection_name, members)


def mirror_ready_tail(topic: bytes, collection_id: str, collection_name: str) -> bytes:
    """Return the tail that ends the list which follows a resync, if its client asked for that."""
    return _mirror_tail(topic, collection_id, collection_name, {"action": "ready"})


def _mirror_tail(
    topic: bytes, collection_id: str, collection_name: str, more: Mapping[str, str]
) -> bytes:
    record = {"collectionId": collection_id, "collectionName": collection_name, "id": ""}
    members = {"record": record, **more}
    data = json.dumps(members, separators=(",", ":"), ensure_ascii=False)
    return b"\nevent:%b\ndata:%b\n\n" % (topic, data.encode())


def resync_tail(collections: Iterable[str], reason: str) -> bytes:
    """Return the tail of PB_RESYNC: the collections to load anew; none means all."""
    members = {"collections": sorted(collections), "reason": reason}
    data = json.dumps(members, separators=(",", ":"), ensure_ascii=False)
    return b"\nevent:PB_RESYNC\ndata:%b\n\n" % data.encode()
