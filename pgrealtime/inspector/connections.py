"""Lists the open connections: who they are, and why one is not live."""

import time
from collections.abc import Iterable
from itertools import islice

from pgrealtime.changelog.memory import Changelog
from pgrealtime.fairness import YieldTimer
from pgrealtime.hub.connections.connection import LIVE, Connection, ConnectionState
from pgrealtime.hub.hub import Hub
from pgrealtime.inspector.answers import ConnectionRow, Connections
from pgrealtime.inspector.shown import caller_name, ref_of, topic_text

_SHOWN_TOPICS = 3


async def list_connections(
    hub: Hub, changelog: Changelog, *, search: str, state: str, limit: int
) -> Connections:
    """Return the first connections that the search finds, yielding to the loop.

    The search is a part of a ref, an account, an address or a topic.
    """
    timer = YieldTimer()
    found: list[tuple[tuple[bool, int, float], int, Connection]] = []
    wanted = search.casefold()
    everyone = list(hub.connections)
    for number, connection in enumerate(everyone):
        if timer.is_due():
            await timer.pause()
        if connection.is_closed() or (state and connection.state.value != state):
            continue
        if wanted and not _matches(connection, wanted):
            continue
        waiting = connection.writer.buffered_bytes()
        key = (connection.state is LIVE, -waiting, -connection.opened_at)
        found.append((key, number, connection))
    found.sort()
    await timer.pause()
    rows: list[ConnectionRow] = []
    for _, _, connection in found[:limit]:
        rows.append(_row(hub, changelog, connection))
        if timer.is_due():
            await timer.pause()
    return Connections(total=len(everyone), matching=len(found), rows=rows)


def find_connection(connections: Iterable[Connection], ref: str) -> Connection | None:
    """Return the connection of a ref."""
    return next((one for one in connections if ref and ref_of(one.id) == ref), None)


def _matches(connection: Connection, wanted: str) -> bool:
    return (
        wanted in caller_name(connection.caller).casefold()
        or wanted in connection.address
        or ref_of(connection.id).casefold().startswith(wanted)
        or any(wanted in name.casefold() for name in connection.subscriptions)
    )


def _row(hub: Hub, changelog: Changelog, connection: Connection) -> ConnectionRow:
    now, unix_now = time.monotonic(), time.time()
    state, waiting = connection.state, connection.writer.buffered_bytes()
    is_reading = state in {ConnectionState.CATCHING_UP, ConnectionState.SUBSCRIBING}
    subscriptions = connection.subscriptions.values()
    is_first = not connection.events_sent
    return ConnectionRow(
        ref=ref_of(connection.id),
        state=state.value,
        why=why_not_live(connection, waiting, is_stream_up=hub.is_stream_up),
        caller=caller_name(connection.caller),
        token_expires_at=connection.caller.expires_at,
        address=connection.address,
        opened_at=unix_now - (now - connection.opened_at),
        last_event_at=None if is_first else unix_now - (now - connection.idle_since),
        topics=[topic_text(one.topic) for one in islice(subscriptions, _SHOWN_TOPICS)],
        topic_count=len(connection.subscriptions),
        behind_bytes=changelog.bytes_after(connection.cursor) if is_reading else 0,
        waiting_bytes=waiting,
        events_sent=connection.events_sent,
    )


def why_not_live(connection: Connection, waiting_bytes: int, *, is_stream_up: bool) -> str:
    """Return why a connection receives nothing with the others; empty if it does."""
    closing = f"is about to be closed: {connection.close_reason}" if connection.close_reason else ""
    match connection.state:
        case ConnectionState.CONNECTING if not is_stream_up:
            return "waits for the stream from PostgreSQL"
        case ConnectionState.CONNECTING:
            return "refused: realtime.max_connections are open, or the service is stopping"
        case ConnectionState.UNSUBSCRIBED if connection.is_resuming:
            return "came back with a position, and has not subscribed again yet"
        case ConnectionState.UNSUBSCRIBED:
            return closing or "has not subscribed to anything"
        case ConnectionState.SUBSCRIBING:
            return "a subscribe call is in progress"
        case ConnectionState.CALLER_INVALID:
            return closing or "its account is gone or has changed"
        case ConnectionState.CATCHING_UP if connection.is_isolated:
            return "its filter is slow: it is evaluated for this connection alone"
        case ConnectionState.CATCHING_UP if waiting_bytes:
            return "its client reads more slowly than events come"
        case ConnectionState.CATCHING_UP:
            return "reads what came before and during its last call, or since its last position"
        case _:
            return closing
