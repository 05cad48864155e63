"""The state of a connection and of its subscriptions is changed by their own methods only."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest

import pgrealtime
from pgrealtime.hub.connections.connection import Connection, ConnectionState, Subscription
from pgrealtime.hub.connections.output import ConnectionOutput
from pgrealtime.lsn import LSN, Cursor
from pgrealtime.protocol.topic import parse_topic
from pgrealtime.records.encode import View
from tests.unit.hub.harness import MemorySink

PACKAGE = Path(pgrealtime.__file__).parent
FIELDS = {
    name for owner in (ConnectionOutput, Connection, Subscription) for name in owner.__slots__
} - {"__weakref__"}
MUTABLE = {"subscriptions"}
"""Fields whose value is changed in place."""
OTHERS = {"builder.subscriptions"}
"""Attributes of such a name of other classes: the submitted topics in ``api.subscribe_body``."""
MUTATORS = {"clear", "pop", "popitem", "setdefault", "update"}
"""Methods that change a dict in place."""


def _targets(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that a statement assigns or deletes, with those inside them."""
    match node:
        case ast.Assign(targets=targets) | ast.Delete(targets=targets):
            yield from chain.from_iterable(map(ast.walk, targets))
        case ast.AugAssign(target=target) | ast.AnnAssign(target=target):
            yield from ast.walk(target)
        case ast.For(target=target) | ast.AsyncFor(target=target):
            yield from ast.walk(target)
        case _:
            pass


def _is_of_another(node: ast.AST, fields: set[str]) -> bool:
    """Whether a node is one of the fields, of an object other than ``self``."""
    return (
        isinstance(node, ast.Attribute)
        and node.attr in fields
        and ast.unparse(node) not in OTHERS
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    )


def assignments(text: str) -> list[str]:
    """Return where code assigns a field of another object, or changes one in place."""
    found = []
    for node in ast.walk(ast.parse(text)):
        for target in _targets(node):
            match target:
                case ast.Attribute(ctx=ast.Store() | ast.Del()):
                    is_one = _is_of_another(target, FIELDS)
                case ast.Subscript(ctx=ast.Store() | ast.Del(), value=of):
                    is_one = _is_of_another(of, MUTABLE)
                case _:
                    continue
            if is_one:
                found.append(f"{target.lineno} {ast.unparse(target)}")
        match node:
            case ast.Call(
                func=ast.Name(id="setattr" | "delattr"), args=[_, ast.Constant(value=name), *_]
            ) if name in FIELDS:
                found.append(f"{node.lineno} {ast.unparse(node)}")
            case ast.Call(func=ast.Attribute(attr=name, value=of)) if name in MUTATORS:
                if _is_of_another(of, MUTABLE):
                    found.append(f"{node.lineno} {ast.unparse(node)}")
            case _:
                pass
    return found


def test_nothing_outside_of_their_classes_assigns_their_fields() -> None:
    """So every change of a connection's state is one of its transitions."""
    found = {
        str(path.relative_to(PACKAGE)): assignments(path.read_text())
        for path in PACKAGE.rglob("*.py")
    }
    assert {file_name: lines for file_name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "text",
    [
        "connection.state = LIVE",
        "self.connection.state = LIVE",
        "connection.cursor, other = head, 1",
        "connection.events_sent += 1",
        "one.connection.caller: Caller = GUEST",
        "del connection.subscriptions",
        "connection.subscriptions['posts'] = one",
        "del connection.subscriptions['posts']",
        "connection.subscriptions.pop('posts')",
        "for subscription.group in groups: pass",
        "setattr(connection, 'state', LIVE)",
    ],
)
def test_every_form_of_assignment_is_found(text: str) -> None:
    """The search above misses no form that Python has."""
    assert len(assignments(text)) == 1


@pytest.mark.parametrize(
    "text", ["self.state = 1", "state = connection.state", "connection.subscriptions.values()"]
)
def test_reading_is_not_assigning(text: str) -> None:
    """The search above reports no use that changes nothing."""
    assert assignments(text) == []


CONNECTING, UNSUBSCRIBED, SUBSCRIBING, CATCHING_UP, LIVE, CALLER_INVALID, CLOSED = ConnectionState
HEAD = Cursor(LSN(9), 0)

TRANSITIONS: dict[str, Callable[[Connection], object]] = {
    "connect": lambda one: one.connect("abcdef", HEAD, None, 1.0),
    "begin_call": lambda one: one.begin_call(HEAD),
    "accept_call": lambda one: one.accept_call({}, None),
    "end_call": lambda one: one.end_call(HEAD),
    "advance": lambda one: one.advance(HEAD),
    "go_live": lambda one: one.go_live(),
    "fall_behind": lambda one: one.fall_behind(HEAD),
    "invalidate_caller": lambda one: one.invalidate_caller(HEAD),
    "restart": lambda one: one.restart("ghijkl", HEAD),
    "close": lambda one: one.close(),
}
PATHS = {
    CONNECTING: (),
    UNSUBSCRIBED: ("connect",),
    SUBSCRIBING: ("connect", "subscribe", "end_call", "begin_call"),
    CATCHING_UP: ("connect", "subscribe", "end_call"),
    LIVE: ("connect", "subscribe", "end_call", "go_live"),
    CALLER_INVALID: ("connect", "invalidate_caller"),
    CLOSED: ("close",),
}
"""By state, the transitions that lead a new connection into it."""
TABLE = {
    "connect": {CONNECTING: UNSUBSCRIBED},
    "begin_call": {
        CONNECTING: CONNECTING,
        UNSUBSCRIBED: UNSUBSCRIBED,
        CATCHING_UP: SUBSCRIBING,
        LIVE: SUBSCRIBING,
        CALLER_INVALID: CALLER_INVALID,
    },
    "accept_call": {
        CONNECTING: CONNECTING,
        UNSUBSCRIBED: UNSUBSCRIBED,
        SUBSCRIBING: SUBSCRIBING,
        CALLER_INVALID: SUBSCRIBING,
    },
    "end_call": {
        CONNECTING: CONNECTING,
        UNSUBSCRIBED: UNSUBSCRIBED,
        SUBSCRIBING: CATCHING_UP,
        CALLER_INVALID: CALLER_INVALID,
        CLOSED: CLOSED,
    },
    "advance": {CATCHING_UP: CATCHING_UP, CALLER_INVALID: CALLER_INVALID},
    "go_live": {CATCHING_UP: LIVE},
    "fall_behind": {LIVE: CATCHING_UP},
    "invalidate_caller": {state: CALLER_INVALID for state in ConnectionState if state != CLOSED},
    "restart": {state: state for state in ConnectionState},
    "close": dict.fromkeys(ConnectionState, CLOSED),
}
"""By transition, the state after it by the state before it; from any other state it raises."""


def connection_in(state: ConnectionState) -> Connection:
    """Return a connection in a state."""
    made = Connection("id", MemorySink(), address="127.0.0.1", epoch="abcdef", cursor=HEAD, now=0.0)
    for step in PATHS[state]:
        if step == "subscribe":
            topic = parse_topic("posts/*")
            made.add_subscription("posts/*", Subscription(made, topic, View(), ""))
        else:
            TRANSITIONS[step](made)
    assert made.state is state
    return made


@pytest.mark.parametrize("state", ConnectionState)
@pytest.mark.parametrize("name", TRANSITIONS)
def test_a_transition_leads_where_the_table_says_or_raises(
    name: str, state: ConnectionState
) -> None:
    """A transition that the table doesn't have raises and leaves the state as it is."""
    connection = connection_in(state)
    if (to := TABLE[name].get(state)) is not None:
        TRANSITIONS[name](connection)
        assert connection.state is to
        return
    with pytest.raises(RuntimeError, match="no such transition"):
        TRANSITIONS[name](connection)
    assert connection.state is state


def test_a_call_that_leaves_no_topics_ends_unsubscribed() -> None:
    """Nothing is to be caught up with: it is at the head."""
    connection = connection_in(SUBSCRIBING)
    connection.take_subscriptions()
    ahead = Cursor(LSN(17), 0)
    connection.end_call(ahead)
    assert (connection.state, connection.cursor) == (UNSUBSCRIBED, ahead)
