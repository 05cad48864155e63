"""The records that ``expand`` starts from and leads to, each in the state that it is shown in.

``load`` makes a node of each event's record, ``batch`` adds the related ones, ``render`` writes
them. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from pgrealtime.changes import Action, Change, Row
from pgrealtime.collections.model import Collection
from pgrealtime.expand.plan import RelationHop, RelationKey
from pgrealtime.lsn import Cursor, Xid
from pgrealtime.rules.engine.before_state import BeforeState
from pgrealtime.text_forms import parse_array

LaterLinkChanges: TypeAlias = Mapping[RelationKey, Sequence[Change] | None]
"""By relation through a junction table, changes of a record's links that are later than its event
and must be undone; None where they aren't known."""

RecordVersion: TypeAlias = tuple[str, str, int]
"""Collection, id and the identity of the state that a related record is read in."""


class ChangedRecord(Protocol):
    """A record as a change left it, or found it: an event of the hub."""

    collection: Collection
    record_id: str
    """Its key, as the stream has it."""
    row: Row
    """The row image that it is shown with: the old one of a delete, else the new one."""
    action: Action
    cursor: Cursor
    xid: Xid
    transaction_changes: tuple[Change, ...]
    """All changes of the transaction; that at ``cursor.ordinal``, from 1, is the record's."""


@dataclass(slots=True, eq=False, repr=False)
class RecordNode:
    """A record with the related records that one viewer sees of it."""

    collection: Collection
    record_id: str
    row: Row
    before_state: BeforeState | None = None
    """The state that related tables are read in; None is their present one."""
    later_link_changes: LaterLinkChanges = field(default_factory=dict)
    """Changes of its links that are undone."""
    sees_email: bool = False
    junction_ids: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Ids by field name, of relations through junction tables."""
    children: dict[str, list[RecordNode] | None] = field(default_factory=dict)
    """Related records by the name of their ``RelationHop``, in order; None if they may not be
    looked for, or could not be found."""

    @property
    def record_version(self) -> RecordVersion:
        """See ``RecordVersion``."""
        return self.collection.name, self.record_id, id(self.before_state)

    @property
    def state_key(self) -> int:
        """What distinguishes the events for which a record is read; 0 if it is read as it is."""
        if self.before_state is not None:
            return id(self.before_state)
        return id(self.later_link_changes) if self.later_link_changes else 0


def ids_in_row(hop: RelationHop, row: Row) -> list[str]:
    """Return the ids that a row holds for a relation, none empty, none twice."""
    assert hop.field.column is not None
    text = row.get(hop.field.column.name)
    if not text:
        return []
    return ids_in_array(text) if hop.field.is_multiple else [text]


def ids_in_array(text: str) -> list[str]:
    """Return the ids of an array in text form, none empty, none twice."""
    return list(dict.fromkeys(item for item in parse_array(text) if isinstance(item, str) and item))
