"""Puts subscriptions into groups, and starts the evaluation of events against them.

A group is all subscriptions with the same predicate and values: it is evaluated once. Candidates
for an event come from the index of ``rules.engine``, so that an event costs what it concerns, not
what is subscribed. A generation has one matcher; ``bind_subscription`` writes it, the evaluator and
the enricher read it. It asks nothing of PostgreSQL: an ``Evaluation`` says what must be asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection as Sized
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Literal, TypeAlias

from pgrealtime.auth.principal import Principal
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.collections.streamed_tables import reachable_tables
from pgrealtime.hub.connections.connection import Connection, Group, Subscription
from pgrealtime.hub.connections.group import MemberGroup
from pgrealtime.hub.evaluation.concerns import Concerns
from pgrealtime.hub.evaluation.filter_limits import (
    FilterTrials,
    UnindexedFilters,
    check_remote_filters,
    check_topic,
)
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.events.links import LinkUpdates
from pgrealtime.protocol.topic import Topic
from pgrealtime.rules.engine.before_state import BeforeStates
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.index import PredicateIndex
from pgrealtime.rules.engine.plan import BoundPredicate, Specialization
from pgrealtime.rules.engine.row_evaluation import RowEvaluation
from pgrealtime.rules.engine.work_budget import FilterWorkBudget
from pgrealtime.rules.language.parameters import MacroValues
from pgrealtime.rules.language.predicate import DenyAll
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.sqlite_values import Scalar

_BindKey: TypeAlias = tuple[
    str, str | None, Principal, Mapping[str, str], Mapping[str, str], Row | None
]
"""Collection, rule, principal, query, headers, the caller's row."""


class Matcher:
    """The groups of one generation's collections."""

    def __init__(self, collections: Collections) -> None:
        self._collections = collections
        self.compiler = RuleCompiler(collections)
        self.trials = FilterTrials()
        """Which filters that ask PostgreSQL may be evaluated for all connections."""
        self._before_states = BeforeStates(reachable_tables(collections))
        self._tables: dict[str, GroupTable] = {}
        """By name of the collection; no table is empty."""
        self._remote_filter_tables: dict[str, GroupTable] = {}
        """The same for groups whose filters ask PostgreSQL more than their rules do: these are
        evaluated after the others, within a budget."""
        self._mirror_tables: dict[str, GroupTable] = {}
        self._remote_filter_mirror_tables: dict[str, GroupTable] = {}
        """The same two for groups of mirrors: nobody else is evaluated before a change as well."""
        self.links = LinkUpdates(collections)
        """Which rows of junction tables update records."""
        self.concerns = Concerns(collections, self.links)
        """Which mirrors a change of related rows concerns."""
        self._mirror_columns: dict[str, MirrorColumns] = {}
        """By collection, what its mirrors read of a row."""
        self._unindexed_filters = UnindexedFilters()
        self._last_bound: tuple[_BindKey, BoundPredicate | DenyAll] | None = None

    def add(
        self, subscription: Subscription, principal: Principal, caller_row: Row | None = None
    ) -> str:
        """Put the subscription into its group; return why nothing can match, or ``""``.

        ``caller_row`` has columns of the caller's own row, if it has one that is known. Raises
        ``RuleError`` if the collection's rule can't be compiled, ``SubscriptionLimitError`` if the
        connection or its network asks for too much.
        """
        topic = subscription.topic
        collection = self._collections.find_streamed(topic.collection_name_or_id)
        if collection is None:
            return ""
        check_topic(subscription)
        bound = self.bind_topic(collection, topic, principal, caller_row)
        if isinstance(bound, DenyAll):
            return bound.reason
        check_remote_filters(subscription, bound.specialization)
        is_mirror = subscription.mirror is not None
        tables = self._tables_for(bound.specialization, is_mirror=is_mirror)
        table = tables.get(collection.name) or GroupTable()
        known_group = table.find(bound, topic.record_id)
        group: Group = known_group or MemberGroup(bound, topic.record_id, is_mirror=is_mirror)
        if group.is_unindexed:
            self._unindexed_filters.add(subscription, group)
        if known_group is None:
            table.add(group)
            tables[collection.name] = table
            if is_mirror:
                self.concerns.add(group)
                self._mirror_columns.setdefault(collection.name, MirrorColumns()).add(group)
        group.add(subscription)
        subscription.set_group(group)
        if not _is_evaluated_alone(subscription.connection, group):
            self._count_shared(table, group, 1)
        return ""

    def remove(self, subscription: Subscription) -> None:
        """Take the subscription out of its group, if it has one; drop the group if it is empty."""
        group = subscription.group
        subscription.set_group(None)
        if group is None:
            return
        if group.is_unindexed:
            self._unindexed_filters.remove(subscription, group)
        name = group.specialization.collection.name
        tables = self._tables_of(group)
        table = tables[name]
        if not _is_evaluated_alone(subscription.connection, group):
            self._count_shared(table, group, -1)
        if group.remove(subscription):
            table.remove(group)
            if group.is_mirror:
                self.concerns.remove(group)
                self._mirror_columns[name].remove(group)
            if not table:
                del tables[name]

    def set_isolated(self, connection: Connection, *, is_isolated: bool) -> None:
        """Evaluate a connection's filters for it alone, or with those of others again."""
        if connection.is_isolated == is_isolated:
            return
        connection.set_isolated(is_isolated=is_isolated)
        for subscription in connection.subscriptions.values():
            group = subscription.group
            if group is not None and group.specialization.filter_tests:
                table = self._tables_of(group)[group.specialization.collection.name]
                self._count_shared(table, group, -1 if is_isolated else 1)

    def _count_shared(self, table: GroupTable, group: Group, change: Literal[1, -1]) -> None:
        was_shared = bool(group.shared_subscription_count)
        group.shared_subscription_count += change
        if bool(group.shared_subscription_count) == was_shared:
            return
        index = table.index_for(group)
        if index is not None:
            (index.remove if was_shared else index.add)(group)
        if group.specialization.has_remote_filter:
            (self.trials.remove if was_shared else self.trials.add)(group)

    def _tables_of(self, group: Group) -> dict[str, GroupTable]:
        return self._tables_for(group.specialization, is_mirror=group.is_mirror)

    def _tables_for(
        self, specialization: Specialization, *, is_mirror: bool
    ) -> dict[str, GroupTable]:
        return self._tables_with(
            has_remote_filter=specialization.has_remote_filter, of_mirrors=is_mirror
        )

    def _tables_with(self, *, has_remote_filter: bool, of_mirrors: bool) -> dict[str, GroupTable]:
        if of_mirrors:
            return self._remote_filter_mirror_tables if has_remote_filter else self._mirror_tables
        return self._remote_filter_tables if has_remote_filter else self._tables

    def bind_topic(
        self, collection: Collection, topic: Topic, principal: Principal, caller_row: Row | None
    ) -> BoundPredicate | DenyAll:
        """Return a topic's predicate for a caller; raises ``RuleError`` for an invalid rule.

        A mirror's is what a list shows.
        """
        # The last result is kept: the topics of one call mostly differ in the record alone.
        rule = collection.list_rule if topic.record_id is None else collection.view_rule
        key = (collection.name, rule, principal, topic.query, topic.headers, caller_row)
        if self._last_bound is None or self._last_bound[0] != key:
            request = RuleRequest(principal=principal, query=topic.query, headers=topic.headers)
            is_listed = collection.is_mirrored(asks=topic.asks_for_mirror)
            bound = self.compiler.bind_caller(
                collection, rule, request, caller_row, is_listed=is_listed
            )
            self._last_bound = key, bound
        return self._last_bound[1]

    @property
    def has_remote_filters(self) -> bool:
        """Whether any group's filter asks PostgreSQL more than its rule does."""
        return bool(self._remote_filter_tables or self._remote_filter_mirror_tables)

    @property
    def has_mirrors(self) -> bool:
        """Whether any group's subscriptions are mirrors."""
        return bool(self._mirror_tables or self._remote_filter_mirror_tables)

    def has_mirrors_of(self, collection: Collection) -> bool:
        """Whether any mirror is of the collection."""
        name = collection.name
        return name in self._mirror_tables or name in self._remote_filter_mirror_tables

    def columns_of_mirrors(self, collection_name: str) -> frozenset[str] | None:
        """Return the columns that decide about mirrors; None if other rows do as well."""
        return self._mirror_columns[collection_name].names()

    def mirror_groups(self, collection_name: str) -> Iterator[Group]:
        """Yield the groups of the collection's mirrors."""
        for tables in (self._mirror_tables, self._remote_filter_mirror_tables):
            if collection_name in tables:
                yield from tables[collection_name].groups()

    def has_subscriptions(self, collection: Collection) -> bool:
        """Whether any group subscribes to the collection."""
        name = collection.name
        return (
            name in self._tables
            or name in self._remote_filter_tables
            or self.has_mirrors_of(collection)
        )

    def has_subscriptions_to(self, collection: Collection, record_id: str) -> bool:
        """Whether any group subscribes to the whole collection, or to the record."""
        every = (
            self._tables,
            self._remote_filter_tables,
            self._mirror_tables,
            self._remote_filter_mirror_tables,
        )
        found = (tables.get(collection.name) for tables in every)
        return any(table is not None and table.has_groups_of(record_id) for table in found)

    def start_evaluation(
        self,
        events: Sequence[Event],
        now: datetime,
        only_groups: Sized[Group] | None = None,
        *,
        has_remote_filter: bool = False,
        of_mirrors: bool = False,
        work_budget: FilterWorkBudget[Group] | None = None,
        deferred_groups: Mapping[int, Sized[Group]] | None = None,
    ) -> Evaluation[int, Group]:
        """Return an evaluation of a slice's events by their indexes, of which no step is done yet.

        It is of all groups, or ``only_groups``: either those whose filters ask PostgreSQL more than
        their rules do (``has_remote_filter``), or the others; either mirrors, or the others. A
        column that the old row of a mirror lacks is unknown. ``work_budget`` bounds what filters
        do in the process. ``deferred_groups`` are those that an earlier evaluation deferred, by
        index, to evaluate as well; None makes this one defer groups, if it has a budget.
        """
        evaluation: Evaluation[int, Group] = Evaluation(MacroValues(now))
        if only_groups is not None:
            only_groups = [
                g
                for g in only_groups
                if g.is_mirror == of_mirrors
                and g.specialization.has_remote_filter == has_remote_filter
            ]
        tables = self._tables_with(has_remote_filter=has_remote_filter, of_mirrors=of_mirrors)
        self._before_states.begin_batch()

        def steps() -> Iterator[None]:
            for index, event in enumerate(events):
                table = tables.get(event.collection.name)
                deferred = () if deferred_groups is None else deferred_groups.get(index, ())
                if table is None and not deferred:
                    continue
                row = self._start_row(
                    event, evaluation.macro_values, work_budget, of_mirrors=of_mirrors
                )
                if deferred_groups is None and work_budget is not None:
                    row.deferred_members = {}
                evaluation.rows[index] = row
                evaluation.xids.add(event.xid)
                if deferred:
                    row.add_untested(deferred)
                if only_groups is not None:
                    row.add_untested([group for group in only_groups if group.covers(event)])
                elif table is not None:
                    table.add_candidates(row, event)
                if not row.is_fully_tested:
                    yield from row.test_in_steps()
                yield

        evaluation.steps = steps()
        return evaluation

    def _start_row(
        self,
        event: Event,
        macro_values: MacroValues,
        work_budget: FilterWorkBudget[Group] | None,
        *,
        of_mirrors: bool,
    ) -> RowEvaluation[Group]:
        """Return the evaluation of an event's row, without any group yet.

        A delete may hold the replica identity alone: rules that read other columns deny it (the
        command check warns of that), and no connection is notified of a gap. Mirrors are: what
        they may have had of the row is unknown.
        """
        row, missing, is_delete = event.row, event.missing_columns, event.action == "delete"
        before = self._before_states.state_before(event.transaction_changes) if is_delete else None
        return RowEvaluation(
            row,
            missing,
            macro_values,
            before,
            work_budget,
            is_missing_column_unknown=of_mirrors or not is_delete,
        )

    def start_evaluation_of_pairs(
        self,
        rows: Sequence[tuple[Event, Iterable[Group]]],
        now: datetime,
        work_budget: FilterWorkBudget[Group],
    ) -> Evaluation[int, Group]:
        """Return an evaluation of rows, each an event with its groups, without the index.

        The result is by position. Groups whose filters ask PostgreSQL more than their rules do
        never match. The callers are those of the event, though the row may be later: code that
        delivers by it checks them.
        """
        evaluation: Evaluation[int, Group] = Evaluation(MacroValues(now))

        def steps() -> Iterator[None]:
            for index, (event, groups) in enumerate(rows):
                row: RowEvaluation[Group] = RowEvaluation(
                    event.row, event.missing_columns, evaluation.macro_values, None, work_budget
                )
                row.deferred_members = {}
                evaluation.rows[index] = row
                evaluation.xids.add(event.xid)
                row.add_untested(
                    group for group in groups if not group.specialization.has_remote_filter
                )
                yield from row.test_in_steps()

        evaluation.steps = steps()
        return evaluation


class MirrorColumns:
    """The columns that the mirrors of one collection read."""

    def __init__(self) -> None:
        self._counts: Counter[Specialization] = Counter()
        self._names: frozenset[str] | None = None
        self._is_known = False

    def add(self, group: Group) -> None:
        """Add a new group of mirrors."""
        self._is_known = self._is_known and group.specialization in self._counts
        self._counts[group.specialization] += 1

    def remove(self, group: Group) -> None:
        """Remove a group that was added."""
        self._counts[group.specialization] -= 1
        if not self._counts[group.specialization]:
            del self._counts[group.specialization]
            self._is_known = False

    def names(self) -> frozenset[str] | None:
        """Return the columns; None if a verdict depends on other rows too."""
        if not self._is_known:
            of_each = [one.column_names for one in self._counts]
            is_own = not any(one.reads_other_rows for one in self._counts)
            self._names = frozenset[str]().union(*of_each) if is_own else None
            self._is_known = True
        return self._names


def _is_evaluated_alone(connection: Connection, group: Group) -> bool:
    return connection.is_isolated and bool(group.specialization.filter_tests)


class GroupTable:
    """The groups of one collection, or of one of its records that has several groups.

    The matcher writes it. A group is found for events while any of its subscriptions is shared,
    that is evaluated for all connections at once.
    """

    __slots__ = ("_by_specialization", "by_record_id", "index")

    def __init__(self) -> None:
        self.index: PredicateIndex[Group] = PredicateIndex()
        """The shared groups of topics about the whole collection."""
        self.by_record_id: dict[str, Group | GroupTable] = {}
        """The groups of topics about one record. Most records have one, which then stands here
        without a table: tens of thousands of such topics are usual."""
        self._by_specialization: dict[Specialization, dict[tuple[Scalar, ...], Group]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_specialization or self.by_record_id)

    def has_groups_of(self, record_id: str) -> bool:
        """Whether there are groups of the whole collection, or of the record."""
        return bool(self._by_specialization) or record_id in self.by_record_id

    def find(self, bound: BoundPredicate, record_id: str | None) -> Group | None:
        """Return the group with that predicate and record, if there is one."""
        if record_id is None:
            return self._by_specialization.get(bound.specialization, {}).get(bound.values)
        entry = self.by_record_id.get(record_id)
        if isinstance(entry, GroupTable):
            return entry.find(bound, None)
        key = bound.specialization, bound.values
        return entry if entry is not None and (entry.specialization, entry.values) == key else None

    def add(self, group: Group) -> None:
        """Add a new group, of which no subscription is shared yet."""
        if group.record_id is None:
            self._insert(group)
            return
        entry = self.by_record_id.get(group.record_id)
        if entry is None:
            self.by_record_id[group.record_id] = group
        elif isinstance(entry, GroupTable):
            entry._insert(group)  # noqa: SLF001 (of this class)
        else:
            self.by_record_id[group.record_id] = table = GroupTable()
            table._insert(entry)
            table._insert(group)

    def _insert(self, group: Group) -> None:
        self._by_specialization.setdefault(group.specialization, {})[group.values] = group
        if group.shared_subscription_count:
            self.index.add(group)

    def remove(self, group: Group) -> None:
        """Remove a group without subscriptions."""
        if group.record_id is None:
            self._delete(group)
            return
        entry = self.by_record_id[group.record_id]
        if isinstance(entry, GroupTable):
            entry._delete(group)  # noqa: SLF001 (of this class)
        if entry is group or not entry:
            del self.by_record_id[group.record_id]

    def _delete(self, group: Group) -> None:
        groups = self._by_specialization[group.specialization]
        del groups[group.values]
        if not groups:
            del self._by_specialization[group.specialization]

    def groups(self) -> Iterator[Group]:
        """Yield all groups."""
        for of_specialization in self._by_specialization.values():
            yield from of_specialization.values()
        for entry in self.by_record_id.values():
            if isinstance(entry, GroupTable):
                yield from entry.groups()
            else:
                yield entry

    def index_for(self, group: Group) -> PredicateIndex[Group] | None:
        """Return the index of a group in this table while it is shared; None if it needs none."""
        table = self if group.record_id is None else self.by_record_id[group.record_id]
        return table.index if isinstance(table, GroupTable) else None

    def add_candidates(self, row: RowEvaluation[Group], event: Event) -> None:
        """Give the evaluation of an event's row the groups that it may concern."""
        row.add_candidates(self.index)
        entry = self.by_record_id.get(event.record_id)
        if isinstance(entry, GroupTable):
            row.add_candidates(entry.index)
        elif entry is not None and entry.shared_subscription_count:
            row.add_untested((entry,))
