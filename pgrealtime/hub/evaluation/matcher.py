"""Which subscriptions may receive an event: those of groups whose rule admits its row.

A group is all subscriptions that ask the same with the same values: judged once. Groups are found
through the index of ``rules``, so an event costs what matches it and not what is there.
"""

from __future__ import annotations

from collections.abc import Collection as Sized
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TypeAlias

from pgrealtime.auth.principal import Principal
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.collections.streamed_tables import reachable_tables
from pgrealtime.hub.connections.connection import Connection, Group, Subscription
from pgrealtime.hub.evaluation.filter_trials import FilterTrials
from pgrealtime.hub.evaluation.quotas import UnindexedFilters, check_remote_filters, check_topic
from pgrealtime.hub.events.event import Event
from pgrealtime.protocol.topic import Topic
from pgrealtime.rules.engine.before_state import BeforeStates
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.index import PredicateIndex
from pgrealtime.rules.engine.plan import BoundPredicate, Specialization
from pgrealtime.rules.engine.row_evaluation import RowEvaluation
from pgrealtime.rules.engine.work_budget import FilterWorkBudget
from pgrealtime.rules.language.parameter_values import macro_values_at
from pgrealtime.rules.language.predicate import DenyAll
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.sqlite_values import Scalar

_BindKey: TypeAlias = tuple[
    str, str | None, Principal, Mapping[str, str], Mapping[str, str], Row | None
]
"""Collection, rule, who asks, with which query and headers, and their own row."""


class _GroupTable:
    """Groups of one collection, or of one record of it that has several.

    Attributes:
        index: Those of topics about the whole.
        by_record_id: Those of a record's own topics. A single one is kept as it is.
    """

    __slots__ = ("_by_specialization", "by_record_id", "index")

    def __init__(self) -> None:
        self.index: PredicateIndex[Group] = PredicateIndex()
        self.by_record_id: dict[str, Group | _GroupTable] = {}
        self._by_specialization: dict[Specialization, dict[tuple[Scalar, ...], Group]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_specialization or self.by_record_id)

    def find(self, bound: BoundPredicate, record_id: str | None) -> Group | None:
        """Return the group of what was bound, if it is here."""
        if record_id is None:
            return self._by_specialization.get(bound.specialization, {}).get(bound.values)
        there = self.by_record_id.get(record_id)
        if isinstance(there, _GroupTable):
            return there.find(bound, None)
        if there is not None and (there.specialization, there.values) == (
            bound.specialization,
            bound.values,
        ):
            return there
        return None

    def add(self, group: Group) -> None:
        """Put a new group here; events find it once it has a subscription to be found for."""
        if group.record_id is None:
            self._insert(group)
            return
        there = self.by_record_id.get(group.record_id)
        if there is None:
            self.by_record_id[group.record_id] = group
        elif isinstance(there, _GroupTable):
            there._insert(group)  # noqa: SLF001 (of this class)
        else:
            self.by_record_id[group.record_id] = several = _GroupTable()
            several._insert(there)
            several._insert(group)

    def _insert(self, group: Group) -> None:
        self._by_specialization.setdefault(group.specialization, {})[group.values] = group
        if group.shared_subscription_count:
            self.index.add(group)

    def remove(self, group: Group) -> None:
        """Take a group out, and what was there for it alone."""
        if group.record_id is None:
            self._delete(group)
            return
        found = self.by_record_id[group.record_id]
        if isinstance(found, _GroupTable):
            found._delete(group)  # noqa: SLF001 (of this class)
        if found is group or not found:
            del self.by_record_id[group.record_id]

    def increment_shared(self, group: Group) -> None:
        """Count a subscription for which events find a group that is here."""
        group.shared_subscription_count += 1
        if (
            group.shared_subscription_count == 1
            and (there := self._table_indexing(group)) is not None
        ):
            there.index.add(group)

    def decrement_shared(self, group: Group) -> None:
        """Take back what ``share`` did."""
        group.shared_subscription_count -= 1
        if (
            not group.shared_subscription_count
            and (there := self._table_indexing(group)) is not None
        ):
            there.index.remove(group)

    def _table_indexing(self, group: Group) -> _GroupTable | None:
        there = self if group.record_id is None else self.by_record_id[group.record_id]
        return there if isinstance(there, _GroupTable) else None

    def _delete(self, group: Group) -> None:
        there = self._by_specialization[group.specialization]
        del there[group.values]
        if not there:
            del self._by_specialization[group.specialization]


class Matcher:
    """The groups, by where their topics point. Synchronous, one writer.

    Args:
        collections: All there are.

    Attributes:
        trials: Knows which filters that ask Postgres may be evaluated for all.
    """

    def __init__(self, collections: Collections) -> None:
        self._collections = collections
        self.compiler = RuleCompiler(collections)
        self.trials: FilterTrials[Group] = FilterTrials()
        self._before_states = BeforeStates(reachable_tables(collections))
        self._tables: dict[str, _GroupTable] = {}
        self._remote_filter_tables: dict[str, _GroupTable] = {}
        """Those whose filters take questions to Postgres beyond their rules'."""
        self._unindexed_filters = UnindexedFilters()
        self._last_bound: tuple[_BindKey, BoundPredicate | DenyAll] | None = None

    def add(
        self, subscription: Subscription, principal: Principal, caller_row: Row | None = None
    ) -> str:
        """Put the subscription into its group; return why nothing can match, or ``""``.

        Args:
            subscription: In no group.
            principal: Whose it is.
            caller_row: Columns of an auth record's row; None if there is none, or it isn't known.

        Raises:
            RuleError: The collection's rule is bad for everybody.
            SubscriptionLimitError: It is one too many for its connection, or its network.
        """
        topic = subscription.topic
        collection = self._collections.find(topic.collection)
        if collection is None:
            return ""
        check_topic(subscription)
        bound = self.bind_topic(collection, topic, principal, caller_row)
        if isinstance(bound, DenyAll):
            return bound.reason
        check_remote_filters(subscription, bound.specialization)
        by_collection = self._tables_for(bound.specialization)
        there = by_collection.get(collection.name) or _GroupTable()
        found = there.find(bound, topic.record_id)
        group = found or Group(bound, topic.record_id)
        if group.is_unindexed:
            self._unindexed_filters.add(subscription, group)
        if found is None:
            there.add(group)
            by_collection[collection.name] = there
        group.add(subscription)
        subscription.set_group(group)
        if not _is_evaluated_alone(subscription.connection, group):
            self._increment_shared(there, group)
        return ""

    def _increment_shared(self, table: _GroupTable, group: Group) -> None:
        table.increment_shared(group)
        if group.shared_subscription_count == 1 and group.specialization.has_remote_filter:
            self.trials.add(group)

    def _decrement_shared(self, table: _GroupTable, group: Group) -> None:
        table.decrement_shared(group)
        if not group.shared_subscription_count and group.specialization.has_remote_filter:
            self.trials.remove(group)

    def _tables_for(self, specialization: Specialization) -> dict[str, _GroupTable]:
        return self._remote_filter_tables if specialization.has_remote_filter else self._tables

    def set_isolated(self, connection: Connection, *, is_isolated: bool) -> None:
        """Let events find the groups of the connection's filters for its sake, or not any more."""
        if connection.is_isolated == is_isolated:
            return
        connection.set_isolated(is_isolated=is_isolated)
        for subscription in connection.subscriptions.values():
            group = subscription.group
            if group is not None and group.specialization.filter_tests:
                there = self._tables_for(group.specialization)[group.specialization.collection.name]
                (self._decrement_shared if is_isolated else self._increment_shared)(there, group)

    def bind_topic(
        self, collection: Collection, topic: Topic, principal: Principal, caller_row: Row | None
    ) -> BoundPredicate | DenyAll:
        """Compile what decides about a topic; the next time it is there already.

        A call's topics mostly ask the same of other records, so the last answer is kept.

        Raises:
            RuleError: The collection's rule is bad for everybody.
        """
        rule = collection.list_rule if topic.record_id is None else collection.view_rule
        question = (collection.name, rule, principal, topic.query, topic.headers, caller_row)
        if self._last_bound is None or self._last_bound[0] != question:
            request = RuleRequest(principal=principal, query=topic.query, headers=topic.headers)
            self._last_bound = (
                question,
                self.compiler.bind_caller(collection, rule, request, caller_row),
            )
        return self._last_bound[1]

    def remove(self, subscription: Subscription) -> None:
        """Take the subscription out; its group goes with its last one."""
        group = subscription.group
        subscription.set_group(None)
        if group is None:
            return
        if group.is_unindexed:
            self._unindexed_filters.remove(subscription, group)
        name, by_collection = (
            group.specialization.collection.name,
            self._tables_for(group.specialization),
        )
        there = by_collection[name]
        if not _is_evaluated_alone(subscription.connection, group):
            self._decrement_shared(there, group)
        if not group.remove(subscription):
            return
        there.remove(group)
        if not there:
            del by_collection[name]

    @property
    def has_remote_filters(self) -> bool:
        """Whether anybody's filter takes questions to Postgres beyond its rule's."""
        return bool(self._remote_filter_tables)

    def has_subscriptions(self, collection: Collection) -> bool:
        """Whether anybody subscribes to the collection."""
        return collection.name in self._tables or collection.name in self._remote_filter_tables

    def start_evaluation_of_pairs(
        self,
        rows: Sequence[tuple[Event, Iterable[Group]]],
        now: datetime,
        work_budget: FilterWorkBudget[Group],
    ) -> Evaluation[int, Group]:
        """Return what given groups make of a row each, as ``matching`` does.

        Those whose filters Postgres would have to be asked for aren't admitted. Who the subscriber
        is counts as of the event, though the row may be later: the caller checks that.

        Args:
            rows: Each as an event, with those who are asked.
            now: What macros mean; with its zone.
            work_budget: What filters may take in the process.
        """
        evaluation: Evaluation[int, Group] = Evaluation(macro_values_at(now))

        def steps() -> Iterator[None]:
            for index, (event, groups) in enumerate(rows):
                row: RowEvaluation[Group] = RowEvaluation(
                    event.row,
                    event.missing_columns,
                    evaluation.macro_values,
                    work_budget=work_budget,
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

    def evaluate_in_process(
        self,
        events: Sequence[Event],
        now: datetime,
        only_groups: Sized[Group] | None = None,
        *,
        has_remote_filter: bool = False,
    ) -> Evaluation[int, Group]:
        """Return what the groups make of events, as far as it can be said without Postgres."""
        evaluation = self.start_evaluation(
            events, now, only_groups, has_remote_filter=has_remote_filter
        )
        evaluation.run_in_process(lambda: False)
        return evaluation

    def start_evaluation(
        self,
        events: Sequence[Event],
        now: datetime,
        only_groups: Sized[Group] | None = None,
        *,
        has_remote_filter: bool = False,
        work_budget: FilterWorkBudget[Group] | None = None,
        deferred_groups: Mapping[int, Sized[Group]] | None = None,
    ) -> Evaluation[int, Group]:
        """Return what says so bit by bit.

        Args:
            events: A batch in stream order.
            now: What macros mean; with its zone.
            only_groups: The only groups to consider; None is all.
            has_remote_filter: Whether those are considered whose filters take questions to Postgres
                beyond their rules', and no others; else it is the others.
            work_budget: What filters may take in the process; None is no bound.
            deferred_groups: By event, groups to consider as well, which others have left over;
                None is that groups are left over for others.
        """
        evaluation: Evaluation[int, Group] = Evaluation(macro_values_at(now))
        if only_groups is not None:
            only_groups = [
                group
                for group in only_groups
                if group.specialization.has_remote_filter == has_remote_filter
            ]
        by_collection = self._remote_filter_tables if has_remote_filter else self._tables
        self._before_states.begin_batch()

        def steps() -> Iterator[None]:
            for index, event in enumerate(events):
                table = by_collection.get(event.collection.name)
                deferred = () if deferred_groups is None else deferred_groups.get(index, ())
                if table is None and not deferred:
                    continue
                # Of deletes only the replica identity may be known: check warns of that.
                is_delete = event.action == "delete"
                row: RowEvaluation[Group] = RowEvaluation(
                    event.row,
                    event.missing_columns,
                    evaluation.macro_values,
                    self._before_states.state_before(event.transaction_changes)
                    if is_delete
                    else None,
                    work_budget,
                    is_missing_column_unknown=not is_delete,
                )
                row.deferred_members = (
                    {} if deferred_groups is None and work_budget is not None else None
                )
                evaluation.rows[index] = row
                evaluation.xids.add(event.xid)
                if deferred:
                    row.add_untested(deferred)
                if only_groups is not None:
                    row.add_untested([group for group in only_groups if group.covers(event)])
                elif table is not None:
                    _find_groups(row, table, event)
                if not row.is_fully_tested:
                    yield from row.test_in_steps()
                yield

        evaluation.steps = steps()
        return evaluation


def _is_evaluated_alone(connection: Connection, group: Group) -> bool:
    """Whether a subscription of the group is evaluated for its connection alone."""
    return connection.is_isolated and bool(group.specialization.filter_tests)


def _find_groups(row_evaluation: RowEvaluation[Group], table: _GroupTable, event: Event) -> None:
    """Find the groups that an event may concern."""
    row_evaluation.add_candidates(table.index)
    found = table.by_record_id.get(event.record_id)
    if isinstance(found, _GroupTable):
        row_evaluation.add_candidates(found.index)
    elif found is not None and found.shared_subscription_count:
        row_evaluation.add_untested((found,))
