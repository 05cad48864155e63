"""Sums up what is subscribed to, by what a change costs for it.

``found_by`` says how a change finds the callers it concerns:

* ``record``: by the record's id;
* ``once``: the rule says the same for all callers, so one test serves all;
* ``everyone``: the rule admits every caller, so all receive it;
* ``index``: by a value of the row, whatever their number;
* ``PostgreSQL``: it names them, in one query for many changes;
* ``each``: every group is tested for every change of the collection;
* ``nothing``: no event can match.
"""

from pgrealtime.collections.model import Collections
from pgrealtime.fairness import YieldTimer
from pgrealtime.hub.connections.connection import Group, Subscription
from pgrealtime.hub.hub import Hub
from pgrealtime.inspector.answers import TopicRow, Topics
from pgrealtime.inspector.shown import filter_form, option_names
from pgrealtime.protocol.topic import Topic
from pgrealtime.rules.engine.formula import tests_of
from pgrealtime.rules.engine.index_paths import LookupKind
from pgrealtime.rules.engine.plan import Specialization


class _Sum:
    """The subscriptions of one row."""

    __slots__ = ("count", "groups", "isolated")

    def __init__(self) -> None:
        self.count = self.isolated = 0
        self.groups: set[int] = set()


_Key = tuple[str, bool, str, tuple[str, ...], bool, str, bool, str]


async def list_topics(hub: Hub, *, limit: int) -> Topics:
    """Return what is subscribed to, yielding to the loop."""
    timer = YieldTimer()
    describe = _Describer(hub.progress.generation.collections)
    sums: dict[_Key, _Sum] = {}
    for connection in list(hub.connections):
        for subscription in list(connection.subscriptions.values()):
            if subscription.topic.collection_name_or_id.startswith("PB_"):
                continue
            key = describe.key(subscription)
            total = sums.get(key)
            if total is None:
                total = sums[key] = _Sum()
            total.count += 1
            total.isolated += connection.is_isolated
            if subscription.group is not None:
                total.groups.add(id(subscription.group))
            if timer.is_due():
                await timer.pause()
    ordered = sorted(sums.items(), key=lambda item: -item[1].count)
    rest = ordered[limit:]
    return Topics(
        rows=[_row(key, total) for key, total in ordered[:limit]],
        other_rows=len(rest),
        other_subscriptions=sum(total.count for _, total in rest),
    )


def _row(key: _Key, total: _Sum) -> TopicRow:
    collection, is_record, filter_, options, is_mirror, found_by, asks_postgres, why_none = key
    return TopicRow(
        collection=collection,
        is_record=is_record,
        filter=filter_,
        options=options,
        is_mirror=is_mirror,
        subscriptions=total.count,
        groups=len(total.groups),
        found_by=found_by,
        asks_postgres=asks_postgres,
        isolated=total.isolated,
        why_none=why_none,
    )


class _Describer:
    """Describes subscriptions; what many of them share it works out once."""

    def __init__(self, collections: Collections) -> None:
        self._collections = collections
        self._costs: dict[Specialization, tuple[str, bool]] = {}
        self._options: dict[str, tuple[str, tuple[str, ...]]] = {}
        """By the text after the path, form of the filter and names of the other options."""

    def key(self, subscription: Subscription) -> _Key:
        """Return what the row of a subscription says of it."""
        topic, group = subscription.topic, subscription.group
        form, options = self._describe_options(topic)
        is_record = topic.record_id is not None
        if group is None:
            name, why = self._why_none(topic)
            return name, is_record, form, options, False, "nothing", False, why
        found_by, asks_postgres = self._cost(group)
        name = group.specialization.collection.name
        return name, is_record, form, options, group.is_mirror, found_by, asks_postgres, ""

    def _describe_options(self, topic: Topic) -> tuple[str, tuple[str, ...]]:
        if not (topic.query or topic.headers):
            return "", ()
        text = topic.text.partition("?")[2]
        known = self._options.get(text)
        if known is None:
            made = filter_form(topic.query.get("filter", "")), tuple(option_names(topic))
            known = self._options[text] = made
        return known

    def _cost(self, group: Group) -> tuple[str, bool]:
        specialization = group.specialization
        cost = self._costs.get(specialization)
        if cost is None:
            cost = self._costs[specialization] = cost_of(specialization)
        return ("record", cost[1]) if group.record_id is not None else cost

    def _why_none(self, topic: Topic) -> tuple[str, str]:
        collection = self._collections.find(topic.collection_name_or_id)
        if collection is None:
            return "", "there is no such collection"
        if not collection.is_streamed:
            return collection.name, "the collection can only be read (stream: false)"
        rule = collection.list_rule if topic.record_id is None else collection.view_rule
        if rule is None:
            return collection.name, "the rule is missing or locked: superusers only"
        return collection.name, "rule or filter admit nothing to these callers"


def cost_of(specialization: Specialization) -> tuple[str, bool]:
    """Return how a change finds the callers, and whether PostgreSQL may be asked."""
    tests = tests_of(specialization.formula)
    asks_postgres = any(test.in_process is None for test in tests)
    kinds = {path.kind for path in specialization.paths}
    if specialization.formula is True:
        return "everyone", False
    if not specialization.value_positions:
        return "once", asks_postgres
    if any(path.is_scan for path in specialization.paths):
        return "each", asks_postgres
    if LookupKind.REMOTE in kinds:
        return "PostgreSQL", asks_postgres
    if LookupKind.ALL in kinds and len(kinds) == 1:
        return "everyone", asks_postgres
    return "index", asks_postgres
