"""Which subscriptions may receive an event: those of groups whose rule admits its row.

A group is all subscriptions with the same rule, filter and ``@request``: judged once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection as Sized
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from msgspec import Struct

from pgrealtime.auth.principal import Principal
from pgrealtime.collections import Collection, Collections
from pgrealtime.hub.batch import Batch
from pgrealtime.hub.connection import Subscription
from pgrealtime.hub.event import Event
from pgrealtime.hub.topic import Topic
from pgrealtime.records.encode import View
from pgrealtime.rules.reference import Everyone, Nobody, Reference, reference
from pgrealtime.rules.request import Request

Place: TypeAlias = tuple[str, str | None]
"""Collection name, and the record id of a record topic or None for the whole collection."""

_GroupKey: TypeAlias = tuple[
    str, str | None, Principal, tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]
]


class Audience:
    """Subscriptions of one group that receive the same bytes.

    Attributes:
        name: The topic as submitted.
        owners: By the id of their own record, whose email they see: the subscriptions concerned.
        batch: What the slice being delivered has for them; None between slices.
    """

    __slots__ = ("batch", "name", "owners", "subscriptions", "view")

    def __init__(self, name: bytes, view: View) -> None:
        self.name = name
        self.view = view
        self.subscriptions: dict[Subscription, None] = {}
        self.owners: dict[str, dict[Subscription, None]] = {}
        self.batch: Batch | None = None

    def add(self, subscription: Subscription) -> None:
        """Let it receive what the others do."""
        self.subscriptions[subscription] = None
        if subscription.own_id:
            self.owners.setdefault(subscription.own_id, {})[subscription] = None

    def remove(self, subscription: Subscription) -> None:
        """Take it out."""
        del self.subscriptions[subscription]
        if subscription.own_id:
            owners = self.owners[subscription.own_id]
            del owners[subscription]
            if not owners:
                del self.owners[subscription.own_id]


class Group:
    """Subscriptions that are judged together.

    Attributes:
        audiences: By what they receive, topic as submitted and view.
    """

    __slots__ = ("audiences", "collection", "key", "place", "predicate", "size")

    def __init__(
        self, key: _GroupKey, place: Place, collection: Collection, predicate: Everyone | Reference
    ) -> None:
        self.key = key
        self.place = place
        self.collection = collection
        self.predicate = predicate
        self.audiences: dict[tuple[bytes, View], Audience] = {}
        self.size = 0


class Question(Struct, frozen=True):
    """A group's rule to be asked of Postgres for some events; places index the batch."""

    group: Group
    places: tuple[int, ...]


class Matcher:
    """The groups, by where their topics point. Synchronous, one writer."""

    def __init__(self, collections: Collections) -> None:
        self._collections = collections
        self._groups: dict[_GroupKey, Group] = {}
        self._by_place: defaultdict[Place, dict[Group, None]] = defaultdict(dict)

    def add(self, subscription: Subscription, principal: Principal) -> str:
        """Put the subscription into its group; return why nothing can match, or ``""``."""
        topic = subscription.topic
        collection = self._collections.find(topic.collection)
        if collection is None:
            return ""
        key = _key(collection, topic, principal)
        group = self._groups.get(key)
        if group is None:
            predicate = self._predicate(collection, topic, principal)
            if isinstance(predicate, Nobody):
                return predicate.reason
            place = (collection.name, topic.record_id)
            group = self._groups[key] = Group(key, place, collection, predicate)
            self._by_place[place][group] = None
        receives = (subscription.name, subscription.view)
        audience = group.audiences.get(receives)
        if audience is None:
            audience = group.audiences[receives] = Audience(*receives)
        audience.add(subscription)
        group.size += 1
        subscription.group = group
        return ""

    def remove(self, subscription: Subscription) -> None:
        """Take the subscription out; its group goes with its last one."""
        group, subscription.group = subscription.group, None
        if group is None:
            return
        audience = group.audiences[subscription.name, subscription.view]
        audience.remove(subscription)
        if not audience.subscriptions:
            del group.audiences[subscription.name, subscription.view]
        group.size -= 1
        if not group.size:
            del self._groups[group.key]
            there = self._by_place[group.place]
            del there[group]
            if not there:
                del self._by_place[group.place]

    def _predicate(
        self, collection: Collection, topic: Topic, principal: Principal
    ) -> Everyone | Nobody | Reference:
        rule = collection.list_rule if topic.record_id is None else collection.view_rule
        request = Request(principal=principal, query=topic.query, headers=topic.headers)
        return reference(self._collections, collection, rule, request)

    def match(
        self, events: Sequence[Event], among: Sized[Group] | None = None
    ) -> tuple[list[list[Group]], list[Question]]:
        """Return, per event, the groups that surely may receive it, and what Postgres must say.

        Args:
            events: A batch in stream order.
            among: The only groups to consider; None is all.
        """
        sure: list[list[Group]] = [[] for _ in events]
        asked: defaultdict[Group, list[int]] = defaultdict(list)
        for place, event in enumerate(events):
            for group in self._candidates(event, among):
                if isinstance(group.predicate, Everyone):
                    sure[place].append(group)
                else:
                    asked[group].append(place)
        return sure, [Question(group, tuple(places)) for group, places in asked.items()]

    def _candidates(self, event: Event, among: Iterable[Group] | None) -> Iterator[Group]:
        whole, single = (event.collection.name, None), (event.collection.name, event.record_id)
        if among is not None:
            yield from (group for group in among if group.place in (whole, single))
            return
        yield from self._by_place.get(whole, ())
        yield from self._by_place.get(single, ())


def _key(collection: Collection, topic: Topic, principal: Principal) -> _GroupKey:
    return (
        collection.name,
        topic.record_id,
        principal,
        tuple(sorted(topic.query.items())),
        tuple(sorted(topic.headers.items())),
    )
