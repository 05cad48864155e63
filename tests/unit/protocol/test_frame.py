"""The bytes of messages, as PocketBase frames them."""

from __future__ import annotations

from pgrealtime.protocol.frame import HEARTBEAT, connect_tail, cursor_tail, event_tail, resync_tail


def test_a_message_is_framed_as_recorded() -> None:
    """Record before action, no blank after a colon, single LFs (protocol 2.5, 6.1)."""
    tail = event_tail(b"projects/*?options=%7B%7D", b'{"id":"a"}', "update")

    assert b"id:CLIENT" + tail == (
        b"id:CLIENT\nevent:projects/*?options=%7B%7D\n"
        b'data:{"record":{"id":"a"},"action":"update"}\n\n'
    )


def test_the_first_message_names_the_client_twice() -> None:
    assert b"id:abc" + connect_tail("abc") == (
        b'id:abc\nevent:PB_CONNECT\ndata:{"clientId":"abc"}\n\n'
    )


def test_positions_and_gaps_are_told_in_one_line_of_json() -> None:
    assert cursor_tail(b"abc.1-2-3") == b'\nevent:PB_CURSOR\ndata:{"id":"abc.1-2-3"}\n\n'
    assert resync_tail({"b", "a"}, "truncate") == (
        b'\nevent:PB_RESYNC\ndata:{"collections":["a","b"],"reason":"truncate"}\n\n'
    )


def test_a_heartbeat_is_a_comment_without_an_empty_line() -> None:
    """Several clients deliver an empty message at every empty line."""
    assert HEARTBEAT == b":\n"
