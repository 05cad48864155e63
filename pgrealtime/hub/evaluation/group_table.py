"""The groups of one collection, by where their topics point."""

from __future__ import annotations

from pgrealtime.hub.connections.connection import Group
from pgrealtime.hub.events.event import Event
from pgrealtime.rules.engine.index import PredicateIndex
from pgrealtime.rules.engine.plan import BoundPredicate, Specialization
from pgrealtime.rules.engine.row_evaluation import RowEvaluation
from pgrealtime.rules.language.sqlite_values import Scalar


class GroupTable:
    """The groups of one collection, or of one of its records that has several groups.

    The matcher writes it. A group is found for events while any of its subscriptions is shared,
    that is evaluated for all connections at once.

    Attributes:
        index: The shared groups of topics about the whole collection.
        by_record_id: The groups of topics about one record. Most records have one, which then
            stands here without a table: tens of thousands of such topics are usual.
    """

    __slots__ = ("_by_specialization", "by_record_id", "index")

    def __init__(self) -> None:
        self.index: PredicateIndex[Group] = PredicateIndex()
        self.by_record_id: dict[str, Group | GroupTable] = {}
        self._by_specialization: dict[Specialization, dict[tuple[Scalar, ...], Group]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_specialization or self.by_record_id)

    def find(self, bound: BoundPredicate, record_id: str | None) -> Group | None:
        """Return the group with that predicate and record, if there is one."""
        if record_id is None:
            return self._by_specialization.get(bound.specialization, {}).get(bound.values)
        found = self.by_record_id.get(record_id)
        if isinstance(found, GroupTable):
            return found.find(bound, None)
        if found is not None and (found.specialization, found.values) == (
            bound.specialization,
            bound.values,
        ):
            return found
        return None

    def add(self, group: Group) -> None:
        """Add a new group, of which no subscription is shared yet."""
        if group.record_id is None:
            self._insert(group)
            return
        found = self.by_record_id.get(group.record_id)
        if found is None:
            self.by_record_id[group.record_id] = group
        elif isinstance(found, GroupTable):
            found._insert(group)  # noqa: SLF001 (of this class)
        else:
            self.by_record_id[group.record_id] = table = GroupTable()
            table._insert(found)
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
        found = self.by_record_id[group.record_id]
        if isinstance(found, GroupTable):
            found._delete(group)  # noqa: SLF001 (of this class)
        if found is group or not found:
            del self.by_record_id[group.record_id]

    def _delete(self, group: Group) -> None:
        groups = self._by_specialization[group.specialization]
        del groups[group.values]
        if not groups:
            del self._by_specialization[group.specialization]

    def increment_shared(self, group: Group) -> None:
        """Count one more shared subscription of a group that is in this table."""
        group.shared_subscription_count += 1
        table = self._table_indexing(group)
        if group.shared_subscription_count == 1 and table is not None:
            table.index.add(group)

    def decrement_shared(self, group: Group) -> None:
        """Count one shared subscription less."""
        group.shared_subscription_count -= 1
        table = self._table_indexing(group)
        if not group.shared_subscription_count and table is not None:
            table.index.remove(group)

    def _table_indexing(self, group: Group) -> GroupTable | None:
        """Return the table whose index holds the group; None if it is a record's only one."""
        found = self if group.record_id is None else self.by_record_id[group.record_id]
        return found if isinstance(found, GroupTable) else None

    def add_candidates(self, row: RowEvaluation[Group], event: Event) -> None:
        """Give the evaluation of an event's row the groups that it may concern."""
        row.add_candidates(self.index)
        found = self.by_record_id.get(event.record_id)
        if isinstance(found, GroupTable):
            row.add_candidates(found.index)
        elif found is not None and found.shared_subscription_count:
            row.add_untested((found,))
