"""A record on its way through expand: its row, its state and the related records found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

from pgrealtime.changes import Change, Row
from pgrealtime.collections.model import Collection
from pgrealtime.expand.plan import (
    RelationHop,
    RelationKey,
)
from pgrealtime.rules.engine.before_state import BeforeState
from pgrealtime.text_forms import parse_array

LaterLinkChanges: TypeAlias = Mapping[RelationKey, Sequence[Change] | None]


_NO_LATER_LINK_CHANGES: LaterLinkChanges = MappingProxyType({})


class RecordNode:
    """A record with the related ones that one viewer sees of it.

    Attributes:
        junction_ids: Ids by field name, of relations through junction tables.
        children: By step, in order; None where they may not or could not be looked for.
        before_state: What related tables were like; None is as they are.
        later_link_changes: By relation through a junction table, later changes of its links that
            are taken back; None where they aren't known.
    """

    __slots__ = (
        "before_state",
        "children",
        "collection",
        "junction_ids",
        "later_link_changes",
        "record_id",
        "row",
        "sees_email",
    )

    def __init__(
        self,
        collection: Collection,
        record_id: str,
        row: Row,
        *,
        before_state: BeforeState | None = None,
        later_link_changes: LaterLinkChanges = _NO_LATER_LINK_CHANGES,
    ) -> None:
        self.collection = collection
        self.record_id = record_id
        self.row = row
        self.before_state = before_state
        self.later_link_changes = later_link_changes
        self.sees_email = False
        self.junction_ids: Mapping[str, Sequence[str]] = {}
        self.children: dict[str, list[RecordNode] | None] = {}

    @property
    def version(self) -> tuple[str, str, int]:
        """Its collection, its id and the state it is seen in."""
        return self.collection.name, self.record_id, id(self.before_state)


def ids_in_row(hop: RelationHop, row: Row) -> list[str]:
    """Return the ids that a row holds, none empty, none twice."""
    assert hop.field.column is not None
    text = row.get(hop.field.column.name)
    if not text:
        return []
    return ids_in_array(text) if hop.field.is_multiple else [text]


def ids_in_array(text: str) -> list[str]:
    """Return the ids of an array in text form, none empty, none twice."""
    return list(dict.fromkeys(item for item in parse_array(text) if isinstance(item, str) and item))


def _state_key(node: RecordNode) -> int:
    """Return what tells apart for which event a record is read; 0 if that doesn't matter."""
    if node.before_state is not None:
        return id(node.before_state)
    return id(node.later_link_changes) if node.later_link_changes else 0
