"""Which subscriptions may receive an event: those of groups whose rule admits its row.

A group is all subscriptions that ask the same with the same values: judged once. Groups are found
through the index of ``rules``, so an event costs what matches it and not what is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Collection as Sized
from datetime import datetime
from itertools import takewhile
from typing import TypeAlias

from pgrealtime.auth.principal import Principal
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.errors import SubscriptionLimitError
from pgrealtime.hub.connections.batch import Batch
from pgrealtime.hub.connections.connection import Connection, Receives, Subscription
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import Xid
from pgrealtime.protocol.topic import Topic
from pgrealtime.rule_queries.filter_trials import FilterTrials
from pgrealtime.rules.engine.batch_query import Inquiry
from pgrealtime.rules.engine.before_state import Pasts, tables_of
from pgrealtime.rules.engine.evaluation import Case, Deciding, Testing
from pgrealtime.rules.engine.formula import Facts, Moment
from pgrealtime.rules.engine.index import Entries, Index
from pgrealtime.rules.engine.plan import Bound, Planner, Variant, moment
from pgrealtime.rules.language.request import Request
from pgrealtime.rules.memory.compare import Scalar
from pgrealtime.rules.sql.reference import Nobody

TRIED_PER_CONNECTION = 50
"""Different filters that no index serves: each costs something at each event, 2 us and more."""
TRIED_PER_ADDRESS = 1000
"""Of all connections from one address (IPv6: one /64) together. Rules aren't counted: they are the
operator's, and whoever asks the same by them is one group."""
COSTLY_PER_CONNECTION = 50
"""Subscriptions of one connection whose filters take questions to Postgres beyond their rules':
each of those may take the whole ``statement_timeout``."""
FILTERS_PER_CONNECTION = 32 * 1024
"""Characters of one connection's different filters. Compiling takes up to 50 ms for a thousand,
and all of it is done anew when rules or the caller change."""
VIEWS_PER_CONNECTION = 100
"""Different ``fields`` and ``expand`` of one connection: each is a record to be made for it at each
event, which may take several milliseconds, and everybody's next event waits for that."""
_Question: TypeAlias = tuple[
    str, str | None, Principal, Mapping[str, str], Mapping[str, str], Row | None
]
"""Collection, rule, who asks, with which query and headers, and their own row."""


class Audience:
    """Subscriptions of one group that receive the same bytes. A single one is kept as it is.

    Attributes:
        receives: What decides about the bytes: the topic as submitted, what is seen of records.
        batch: What the slice being delivered has for them; None between slices.
        portion: Which portion that is of.
    """

    __slots__ = ("_owners", "_subscriptions", "batch", "portion", "receives")

    def __init__(self, subscription: Subscription) -> None:
        self.receives = subscription.receives
        self.batch: Batch | None = None
        self.portion: object = None
        self._subscriptions: Subscription | dict[Subscription, None] = subscription
        self._owners: dict[str, dict[Subscription, None]] | None = None

    def __iter__(self) -> Iterator[Subscription]:
        if isinstance(self._subscriptions, dict):
            return iter(self._subscriptions)
        return iter((self._subscriptions,))

    def owners(self, record_id: str) -> Iterable[Subscription]:
        """Those whose own record it is, and who so see its email."""
        if self._owners is not None:
            return self._owners.get(record_id, ())
        return [one for one in self if one.own_id == record_id]

    def add(self, subscription: Subscription) -> None:
        """Let it receive what the others do."""
        if not isinstance(self._subscriptions, dict):
            first, self._subscriptions, self._owners = self._subscriptions, {}, {}
            self.add(first)
        self._subscriptions[subscription] = None
        if subscription.own_id and self._owners is not None:
            self._owners.setdefault(subscription.own_id, {})[subscription] = None

    def remove(self, subscription: Subscription) -> bool:
        """Take it out; return whether it was the last one."""
        if not isinstance(self._subscriptions, dict):
            return True
        del self._subscriptions[subscription]
        if subscription.own_id and self._owners is not None:
            owners = self._owners[subscription.own_id]
            del owners[subscription]
            if not owners:
                del self._owners[subscription.own_id]
        return not self._subscriptions


class Group:
    """Subscriptions that are judged together; a member of the index.

    Attributes:
        variant: What they ask.
        values: What they ask it with.
        record_id: Of a record topic; None for the whole collection.
        shared: How many of its subscriptions are evaluated for all: those without a filter, and
            those whose connections aren't isolated. Events find a group that has any.
    """

    __slots__ = ("_audiences", "record_id", "shared", "values", "variant")

    def __init__(self, bound: Bound, record_id: str | None) -> None:
        self.variant = bound.variant
        self.values = bound.values
        self.record_id = record_id
        self.shared = 0
        self._audiences: Audience | dict[Receives, Audience] | None = None

    @property
    def is_tried(self) -> bool:
        """Whether each change of the collection costs something for its filter."""
        return self.record_id is None and self.variant.is_scan

    @property
    def audiences(self) -> Iterable[Audience]:
        """By what they receive."""
        match self._audiences:
            case None:
                return ()
            case Audience() as only:
                return (only,)
            case several:
                return several.values()

    def add(self, subscription: Subscription) -> None:
        """Put a subscription into its audience."""
        place = subscription.receives
        match self._audiences:
            case None:
                self._audiences = Audience(subscription)
            case Audience(receives=receives) as only if receives == place:
                only.add(subscription)
            case Audience(receives=receives) as only:
                self._audiences = {receives: only, place: Audience(subscription)}
            case several if place in several:
                several[place].add(subscription)
            case several:
                several[place] = Audience(subscription)

    def remove(self, subscription: Subscription) -> bool:
        """Take a subscription out; return whether it was the last one."""
        if isinstance(self._audiences, dict):
            place = subscription.receives
            if self._audiences[place].remove(subscription):
                del self._audiences[place]
            return not self._audiences
        assert self._audiences is not None
        return self._audiences.remove(subscription)

    def concerns(self, event: Event) -> bool:
        """Whether the event is about what its topic points to."""
        return self.variant.collection.name == event.collection.name and (
            self.record_id in {None, event.record_id}
        )


class _Groups:
    """Groups of one collection, or of one record of it that has several.

    Attributes:
        index: Those of topics about the whole.
        by_record: Those of a record's own topics. A single one is kept as it is.
    """

    __slots__ = ("_all", "by_record", "index")

    def __init__(self) -> None:
        self.index: Index[Group] = Index()
        self.by_record: dict[str, Group | _Groups] = {}
        self._all: dict[Variant, dict[tuple[Scalar, ...], Group]] = {}

    def __bool__(self) -> bool:
        return bool(self._all or self.by_record)

    def find(self, bound: Bound, record_id: str | None) -> Group | None:
        """Return the group of what was bound, if it is here."""
        if record_id is None:
            return self._all.get(bound.variant, {}).get(bound.values)
        there = self.by_record.get(record_id)
        if isinstance(there, _Groups):
            return there.find(bound, None)
        if there is not None and (there.variant, there.values) == (bound.variant, bound.values):
            return there
        return None

    def add(self, group: Group) -> None:
        """Put a new group here; events find it once it has a subscription to be found for."""
        if group.record_id is None:
            self._add(group)
            return
        there = self.by_record.get(group.record_id)
        if there is None:
            self.by_record[group.record_id] = group
        elif isinstance(there, _Groups):
            there._add(group)  # noqa: SLF001 (of this class)
        else:
            self.by_record[group.record_id] = several = _Groups()
            several._add(there)
            several._add(group)

    def _add(self, group: Group) -> None:
        self._all.setdefault(group.variant, {})[group.values] = group
        if group.shared:
            self.index.add(group)

    def remove(self, group: Group) -> None:
        """Take a group out, and what was there for it alone."""
        if group.record_id is None:
            self._remove(group)
            return
        found = self.by_record[group.record_id]
        if isinstance(found, _Groups):
            found._remove(group)  # noqa: SLF001 (of this class)
        if found is group or not found:
            del self.by_record[group.record_id]

    def share(self, group: Group) -> None:
        """Count a subscription for which events find a group that is here."""
        group.shared += 1
        if group.shared == 1 and (there := self._indexing(group)) is not None:
            there.index.add(group)

    def unshare(self, group: Group) -> None:
        """Take back what ``share`` did."""
        group.shared -= 1
        if not group.shared and (there := self._indexing(group)) is not None:
            there.index.remove(group)

    def _indexing(self, group: Group) -> _Groups | None:
        there = self if group.record_id is None else self.by_record[group.record_id]
        return there if isinstance(there, _Groups) else None

    def _remove(self, group: Group) -> None:
        there = self._all[group.variant]
        del there[group.values]
        if not there:
            del self._all[group.variant]


class Judging:
    """A batch of events being judged: what is sure, and what Postgres must be asked."""

    def __init__(
        self,
        events: Sequence[Event],
        cases: dict[int, Case[Group]],
        at: Moment,
        steps: Iterator[None],
    ) -> None:
        self._events = events
        self._cases = cases
        self._at = at
        self._steps = steps
        self._deciding: Deciding[Group] = Deciding([], at)

    def go_on(self, is_over: Callable[[], bool]) -> bool:
        """Go on with what needs no Postgres; before anything is asked, and until all is done.

        Args:
            is_over: Says when others are to have their turn.

        Returns:
            Whether all is done.
        """
        for _ in self._steps:
            if is_over():
                return False
        self._deciding = Deciding(list(self._cases.values()), self._at)
        return True

    @property
    def deferred(self) -> dict[int, dict[Group, None]]:
        """By event, the groups whose filters only Postgres can decide for it."""
        return {place: case.deferred for place, case in self._cases.items() if case.deferred}

    @property
    def undecided(self) -> frozenset[Group]:
        """The groups of which it isn't known whether they may receive all that they are to."""
        return frozenset(group for case in self._cases.values() for group in case.undecided)

    def unprovable(self) -> tuple[list[int], frozenset[Group]]:
        """Return the events that some may miss whose rules read what isn't known of the rows.

        Returns:
            Their places, and the groups.
        """
        places: list[int] = []
        found: set[Group] = set()
        unreached: dict[int, Entries[Group]] = {}
        for place, case in self._cases.items():
            groups = case.unprovable
            if groups or case.unreached:
                places.append(place)
                found.update(groups)
                unreached.update((id(entries), entries) for entries in case.unreached)
        return places, frozenset(found.union(*(one.all() for one in unreached.values())))

    @property
    def hits(self) -> list[Iterable[Group]]:
        """Per event, the groups that may receive it; complete when nothing is left to ask."""
        return [
            () if (case := self._cases.get(place)) is None else case.hits
            for place in range(len(self._events))
        ]

    @property
    def xids(self) -> frozenset[Xid]:
        """The transactions that must be visible to whoever answers."""
        return frozenset(self._events[place].xid for place in self._cases)

    def inquiries(self) -> list[Inquiry]:
        """Return what Postgres must be asked now; nothing if all is judged."""
        return self._deciding.inquiries()

    def resume(self) -> None:
        """Go on when the inquiries have been put; what has no answer is denied."""
        self._deciding.resume()


class Matcher:
    """The groups, by where their topics point. Synchronous, one writer.

    Args:
        collections: All there are.

    Attributes:
        trials: Knows which filters that ask Postgres may be evaluated for all.
    """

    def __init__(self, collections: Collections) -> None:
        self._collections = collections
        self.planner = Planner(collections)
        self.trials = FilterTrials()
        self._pasts = Pasts(tables_of(collections))
        self._groups: dict[str, _Groups] = {}
        self._costly: dict[str, _Groups] = {}
        """Those whose filters take questions to Postgres beyond their rules'."""
        self._tried: dict[str, Counter[Group]] = {}
        """By network, the groups that no index serves for a filter's sake, and how often."""
        self._last: tuple[_Question, Bound | Nobody] | None = None

    def add(self, subscription: Subscription, principal: Principal, own: Row | None = None) -> str:
        """Put the subscription into its group; return why nothing can match, or ``""``.

        Args:
            subscription: In no group.
            principal: Whose it is.
            own: Columns of an auth record's row; None if there is none, or it isn't known.

        Raises:
            RuleError: The collection's rule is bad for everybody.
            SubscriptionLimitError: It is one too many for its connection, or its network.
        """
        topic = subscription.topic
        collection = self._collections.find(topic.collection)
        if collection is None:
            return ""
        if _wanted(topic) != _WHOLE and _views_before(subscription) >= VIEWS_PER_CONNECTION:
            raise _limit(subscription, "views", VIEWS_PER_CONNECTION)
        if "filter" in topic.query and _filters_upto(subscription) > FILTERS_PER_CONNECTION:
            raise _limit(subscription, "filter_characters", FILTERS_PER_CONNECTION)
        bound = self.bind(collection, topic, principal, own)
        if isinstance(bound, Nobody):
            return bound.reason
        if bound.variant.is_costly and _costly_before(subscription) >= COSTLY_PER_CONNECTION:
            raise _limit(subscription, "asking_filters", COSTLY_PER_CONNECTION)
        by_collection = self._place_of(bound.variant)
        there = by_collection.get(collection.name) or _Groups()
        found = there.find(bound, topic.record_id)
        group = found or Group(bound, topic.record_id)
        if group.is_tried:
            self._count_tried(subscription, group)
        if found is None:
            there.add(group)
            by_collection[collection.name] = there
        group.add(subscription)
        subscription.group = group
        if not _is_apart(subscription.connection, group):
            self._share(there, group)
        return ""

    def _share(self, there: _Groups, group: Group) -> None:
        there.share(group)
        if group.shared == 1 and group.variant.is_costly:
            self.trials.add(group)

    def _unshare(self, there: _Groups, group: Group) -> None:
        there.unshare(group)
        if not group.shared and group.variant.is_costly:
            self.trials.remove(group)

    def _place_of(self, variant: Variant) -> dict[str, _Groups]:
        return self._costly if variant.is_costly else self._groups

    def isolate(self, connection: Connection, *, is_isolated: bool) -> None:
        """Let events find the groups of the connection's filters for its sake, or not any more."""
        if connection.is_isolated == is_isolated:
            return
        connection.is_isolated = is_isolated
        for subscription in connection.subscriptions.values():
            group = subscription.group
            if group is not None and group.variant.filtered:
                there = self._place_of(group.variant)[group.variant.collection.name]
                (self._unshare if is_isolated else self._share)(there, group)

    def bind(
        self, collection: Collection, topic: Topic, principal: Principal, own: Row | None
    ) -> Bound | Nobody:
        """Compile what decides about a topic; the next time it is there already.

        A call's topics mostly ask the same of other records, so the last answer is kept.

        Raises:
            RuleError: The collection's rule is bad for everybody.
        """
        rule = collection.list_rule if topic.record_id is None else collection.view_rule
        question = (collection.name, rule, principal, topic.query, topic.headers, own)
        if self._last is None or self._last[0] != question:
            request = Request(principal=principal, query=topic.query, headers=topic.headers)
            self._last = question, self.planner.bind(collection, rule, request, own)
        return self._last[1]

    def _count_tried(self, subscription: Subscription, group: Group) -> None:
        """Count a subscription among its network's that no index serves.

        Raises:
            SubscriptionLimitError: It is one too many.
        """
        mine = {one.group for one in _before(subscription) if one.group and one.group.is_tried}
        if group not in mine and len(mine) >= TRIED_PER_CONNECTION:
            raise _limit(subscription, "unindexed_filters", TRIED_PER_CONNECTION)
        theirs = self._tried.setdefault(subscription.connection.network, Counter())
        if group not in theirs and len(theirs) >= TRIED_PER_ADDRESS:
            raise _limit(subscription, "unindexed_filters_of_address", TRIED_PER_ADDRESS)
        theirs[group] += 1

    def _uncount_tried(self, subscription: Subscription, group: Group) -> None:
        network = subscription.connection.network
        theirs = self._tried[network]
        theirs[group] -= 1
        if not theirs[group]:
            del theirs[group]
        if not theirs:
            del self._tried[network]

    def remove(self, subscription: Subscription) -> None:
        """Take the subscription out; its group goes with its last one."""
        group, subscription.group = subscription.group, None
        if group is None:
            return
        if group.is_tried:
            self._uncount_tried(subscription, group)
        name, by_collection = group.variant.collection.name, self._place_of(group.variant)
        there = by_collection[name]
        if not _is_apart(subscription.connection, group):
            self._unshare(there, group)
        if not group.remove(subscription):
            return
        there.remove(group)
        if not there:
            del by_collection[name]

    @property
    def has_costly(self) -> bool:
        """Whether anybody's filter takes questions to Postgres beyond its rule's."""
        return bool(self._costly)

    def is_heard(self, collection: Collection) -> bool:
        """Whether anybody subscribes to the collection."""
        return collection.name in self._groups or collection.name in self._costly

    def matching_given(
        self,
        rows: Sequence[tuple[Event, Iterable[Group]]],
        now: datetime,
        testing: Testing[Group],
    ) -> Judging:
        """Return what given groups make of a row each, as ``matching`` does.

        Those whose filters Postgres would have to be asked for aren't admitted. Who the subscriber
        is counts as of the event, though the row may be later: the caller checks that.

        Args:
            rows: Each as an event, with those who are asked.
            now: What macros mean; with its zone.
            testing: What filters may take in the process.
        """
        at = moment(now)
        cases: dict[int, Case[Group]] = {}

        def steps() -> Iterator[None]:
            for place, (event, groups) in enumerate(rows):
                case = cases[place] = Case(Facts(event.row, event.missing, at), testing=testing)
                case.deferred = {}
                case.put_off(group for group in groups if not group.variant.is_costly)
                yield from case.testing()

        return Judging([event for event, _ in rows], cases, at, steps())

    def match(
        self,
        events: Sequence[Event],
        now: datetime,
        among: Sized[Group] | None = None,
        *,
        costly: bool = False,
    ) -> Judging:
        """Return what the groups make of events, as far as it can be said without Postgres."""
        judging = self.matching(events, now, among, costly=costly)
        judging.go_on(lambda: False)
        return judging

    def matching(
        self,
        events: Sequence[Event],
        now: datetime,
        among: Sized[Group] | None = None,
        *,
        costly: bool = False,
        testing: Testing[Group] | None = None,
        deferred: Mapping[int, Sized[Group]] | None = None,
    ) -> Judging:
        """Return what says so bit by bit.

        Args:
            events: A batch in stream order.
            now: What macros mean; with its zone.
            among: The only groups to consider; None is all.
            costly: Whether those are considered whose filters take questions to Postgres beyond
                their rules', and no others; else it is the others.
            testing: What filters may take in the process; None is no bound.
            deferred: By event, groups to consider as well, which others have left over; None is
                that groups are left over for others.
        """
        at = moment(now)
        cases: dict[int, Case[Group]] = {}
        if among is not None:
            among = [group for group in among if group.variant.is_costly == costly]
        by_collection = self._costly if costly else self._groups
        self._pasts.begin_batch()

        def steps() -> Iterator[None]:
            for place, event in enumerate(events):
                there = by_collection.get(event.collection.name)
                more = () if deferred is None else deferred.get(place, ())
                if there is None and not more:
                    continue
                # Of deletes only the replica identity may be known: check warns of that.
                is_delete = event.action == "delete"
                facts = Facts(event.row, event.missing, at, is_missing_unknown=not is_delete)
                past = self._pasts.of(event.changes) if is_delete else None
                case: Case[Group] = Case(facts, past, testing)
                case.deferred = {} if deferred is None and testing is not None else None
                cases[place] = case
                if more:
                    case.put_off(more)
                if among is not None:
                    case.put_off([group for group in among if group.concerns(event)])
                elif there is not None:
                    _find(case, there, event)
                if not case.is_tested:
                    yield from case.testing()
                yield

        return Judging(events, cases, at, steps())


def _is_apart(connection: Connection, group: Group) -> bool:
    """Whether a subscription of the group is evaluated for its connection alone."""
    return connection.is_isolated and bool(group.variant.filtered)


def _find(case: Case[Group], there: _Groups, event: Event) -> None:
    """Find the groups that an event may concern."""
    case.find(there.index)
    match there.by_record.get(event.record_id):
        case Group() as only if only.shared:
            case.put_off((only,))
        case _Groups(index=index):
            case.find(index)
        case _:
            pass


def _limit(subscription: Subscription, limit: str, most: int) -> SubscriptionLimitError:
    topic = subscription.topic.text
    return SubscriptionLimitError(f"more than {most} {limit}", topic=topic, limit=limit, most=most)


def _before(subscription: Subscription) -> Iterator[Subscription]:
    """Yield the connection's subscriptions that were submitted before this one.

    Only those count, so that topics mean the same whether they are new or bound again.
    """
    theirs = subscription.connection.subscriptions.values()
    return takewhile(lambda one: one is not subscription, theirs)


def _costly_before(subscription: Subscription) -> int:
    return sum(
        one.group is not None and one.group.variant.is_costly for one in _before(subscription)
    )


def _filters_upto(subscription: Subscription) -> int:
    texts = {one.topic.query.get("filter", "") for one in _before(subscription)}
    texts.add(subscription.topic.query["filter"])
    return sum(map(len, texts))


def _views_before(subscription: Subscription) -> int:
    """Return how many other views than its own were submitted before the first of its own."""
    own, others = _wanted(subscription.topic), {_WHOLE}
    for one in _before(subscription):
        view = _wanted(one.topic)
        if view == own or len(others) > VIEWS_PER_CONNECTION:
            break
        others.add(view)
    return len(others) - 1


def _wanted(topic: Topic) -> tuple[str, str]:
    return topic.query.get("fields", ""), topic.query.get("expand", "")


_WHOLE = ("", "")
"""The record as it is."""
