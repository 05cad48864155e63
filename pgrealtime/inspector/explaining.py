"""Explains why a connection, or anybody, receives a change or a record, or doesn't."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from pgrealtime.auth.principal import GUEST, Caller, Guest, Superuser
from pgrealtime.changes import Row, Transaction
from pgrealtime.collections.model import Collection, Collections, unpadded_id
from pgrealtime.config.model import Config
from pgrealtime.errors import LookError
from pgrealtime.explain.caller import CallerSpec, NamedUser, resolve_caller
from pgrealtime.explain.running import explain_for_caller
from pgrealtime.hub.connections.connection import LIVE, Connection, Subscription
from pgrealtime.hub.hub import Hub
from pgrealtime.inspector.answers import Explained
from pgrealtime.inspector.connections import why_not_live
from pgrealtime.inspector.shown import caller_name, topic_text, without_option_values
from pgrealtime.lsn import Cursor
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.protocol.topic import Topic, parse_topic

_MAX_EXPLAINED_TOPICS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is asked about: a record as it is now, or as a change wrote it."""

    collection: Collection
    record_id: str
    image: Row | None = None
    transaction: Transaction | None = None
    cursor: Cursor | None = None


def record_subject(collections: Collections, text: str) -> Subject:
    """Return the subject that ``collection/id`` names.

    Raises:
        LookError: There is no such collection.
    """
    name, _, record_id = text.partition("/")
    collection = collections.find(name)
    if collection is None or not record_id:
        raise LookError("a record is named by collection and id", hint="For example: posts/p1")
    return Subject(collection=collection, record_id=record_id)


async def explain_for_connection(
    hub: Hub, pool: QueryPool, connection: Connection, subject: Subject
) -> Explained:
    """Explain with a connection's caller, for each of its topics that could match."""
    lines = [f"{'time':<10}{line}" for line in _timing(hub, connection, subject)]
    topics = [
        subscription
        for subscription in connection.subscriptions.values()
        if _may_concern(hub, subscription, subject)
    ]
    if not topics:
        name = f"{subject.collection.name}/{subject.record_id}"
        lines.append(
            f"not delivered: none of its {len(connection.subscriptions)} topics is of {name}"
        )
        return Explained(is_delivered=False, lines=lines)
    is_delivered = False
    for subscription in topics[:_MAX_EXPLAINED_TOPICS]:
        explained = await _explain(
            hub.progress.generation.collections,
            pool,
            connection.caller,
            subscription.topic,
            subject,
        )
        if lines:
            lines.append("")
        lines += [f"{'topic':<10}{topic_text(subscription.topic)}", *explained.lines]
        is_delivered = is_delivered or explained.is_delivered
    if len(topics) > _MAX_EXPLAINED_TOPICS:
        lines.append(f"and {len(topics) - _MAX_EXPLAINED_TOPICS} more of its topics could match")
    return Explained(is_delivered=is_delivered, lines=lines)


async def explain_for_anybody(
    hub: Hub, pool: QueryPool, config: Config, subject: Subject, *, caller: str, topic: str
) -> Explained:
    """Explain for ``guest``, ``superuser`` or ``collection/id``, who need not be connected.

    Raises:
        AuthError: There is no such account.
    """
    collections = hub.progress.generation.collections
    resolved, _ = await resolve_caller(config, collections, pool, _caller_spec(caller))
    parsed = parse_topic(topic or f"{subject.collection.name}/*")
    if isinstance(resolved.principal, Guest) and not config.auth.allow_guests:
        line = "not delivered: guests may not subscribe (auth.allow_guests)"
        return Explained(is_delivered=False, lines=[line])
    return await _explain(collections, pool, resolved, parsed, subject)


def _caller_spec(text: str) -> CallerSpec:
    if text == "guest":
        return GUEST
    if text == "superuser":
        return Superuser("")
    collection, _, record_id = text.partition("/")
    if not (collection and record_id):
        raise LookError(
            "a caller is guest, superuser, or collection and id", hint="For example: users/ann"
        )
    return NamedUser(collection, record_id)


async def _explain(
    collections: Collections, pool: QueryPool, caller: Caller, topic: Topic, subject: Subject
) -> Explained:
    collection, wanted = collections.find(topic.collection_name_or_id), subject.collection
    if collection is not None and collection is not wanted:
        line = f'not delivered: the topic is of "{collection.name}", not of "{wanted.name}"'
        return Explained(is_delivered=False, lines=[line])
    found = await explain_for_caller(
        pool,
        collections,
        caller,
        topic,
        subject.record_id,
        caller_name=caller_name(caller),
        image=subject.image,
    )
    lines = [without_option_values(line, topic) for line in found.lines]
    return Explained(is_delivered=found.is_delivered, lines=lines)


def _may_concern(hub: Hub, subscription: Subscription, subject: Subject) -> bool:
    topic = subscription.topic
    collection = hub.progress.generation.collections.find(topic.collection_name_or_id)
    wanted = unpadded_id(subject.collection, subject.record_id)
    return collection is not None and (
        collection.name == subject.collection.name
        and topic.record_id in {None, subject.record_id, wanted}
    )


def _timing(hub: Hub, connection: Connection, subject: Subject) -> Iterator[str]:
    """Yield why the connection has not received the change yet, whatever its rules say."""
    waiting = connection.writer.buffered_bytes()
    why = why_not_live(connection, waiting, is_stream_up=hub.is_stream_up)
    if subject.transaction is None or subject.cursor is None:
        if why:
            yield f"the connection {why}"
        return
    opened_at = time.time() - (time.monotonic() - connection.opened_at)
    late = opened_at - subject.transaction.commit_time_us / 1e6
    position = hub.head if connection.state is LIVE else connection.cursor
    if late > 0:
        yield f"the connection was opened {late:.1f} s after the commit: its client loads that"
    elif position < subject.cursor:
        yield f"the connection has not come so far yet: {why or 'the change is being delivered'}"
