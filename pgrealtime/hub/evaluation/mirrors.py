"""Makes the events of mirrors: a row enters what their callers may see, stays in it, or leaves it.

The evaluator asks who may see the old and who the new image of each changed row, as for a delete
and for a create. From the pair of verdicts follow an update, a create, or a delete that names the
id alone; nothing is remembered of a row. Where a verdict isn't known the group is told to load its
list anew.
"""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from msgspec.structs import replace

from pgrealtime.changes import Row, Update
from pgrealtime.hub.connections.connection import Group
from pgrealtime.hub.events.event import Event
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.index import KeyEntries

_NO_GROUPS: AbstractSet[Group] = frozenset()


class RowImages(NamedTuple):
    """Old and new images of changed rows, each as the event that rules are evaluated on."""

    events: list[Event]
    before: dict[int, int]
    """By index of the change's event, that of its old image in ``events``."""
    after: dict[int, int]
    """The same for its new image."""


def row_images(
    events: Sequence[Event], columns_by_name: Mapping[str, frozenset[str] | None]
) -> RowImages:
    """Return the images of the rows of collections that have mirrors; rows are completed before.

    ``columns_by_name`` has the columns that decide about a collection's mirrors, None if other rows
    do as well. If an update leaves them alone, its new image stands for the old one.
    """
    images = RowImages([], {}, {})
    found = images.events
    for index, event in enumerate(events):
        name = event.collection.name
        if name not in columns_by_name or event.is_unread:
            continue
        match event.action:
            case "create":
                images.after[index] = len(found)
                found.append(event)
            case "delete":
                images.before[index] = len(found)
                found.append(event)
            case "update":
                images.before[index] = images.after[index] = len(found)
                found.append(event)
                columns = columns_by_name[name]
                if event.is_relinked:
                    # Its own columns are unchanged; before the transaction it had other links.
                    old_row = event.row if columns is None else None
                else:
                    change = event.transaction_changes[event.cursor.ordinal - 1]
                    assert isinstance(change, Update)
                    is_unchanged = columns is not None and _is_unchanged(event, change, columns)
                    old_row = None if is_unchanged else _old_row(event, change)
                if old_row is not None:
                    images.before[index] = len(found)
                    found.append(replace(event, action="delete", row=old_row))
    return images


def _is_unchanged(event: Event, update: Update, columns: frozenset[str]) -> bool:
    """Whether an update certainly leaves the columns alone."""
    new, old = update.new, update.old.row
    for name in columns:
        if name in new:
            if name not in old or old[name] != new[name]:
                return False
        elif name in event.collection.generated_columns:
            return False
    return True


def _old_row(event: Event, update: Update) -> Row:
    """Return the row before an update, as far as the WAL has it."""
    old = update.old.row
    if len(old) == len(event.row):
        return old
    # What the change doesn't carry is a TOASTed value that it left alone, or a generated column.
    unchanged = event.row.keys() - update.new.keys() - event.collection.generated_columns
    return {name: event.row[name] for name in unchanged} | old


class ImageVerdicts:
    """The groups of mirrors that may see each image, and those for which that isn't known.

    ``hits`` are by index of the image, ``evaluations`` those that found them.
    """

    def __init__(
        self,
        hits: Sequence[Iterable[Group]],
        evaluations: Iterable[Evaluation[int, Group]],
    ) -> None:
        self._hits = hits
        self._unknown: dict[int, AbstractSet[Group]] = {}
        self._unreached: dict[int, KeyEntries[Group]] = {}
        for evaluation in evaluations:
            for index, row in evaluation.rows.items():
                if members := row.members_missing_columns:
                    self._unknown[index] = self._unknown.get(index, _NO_GROUPS) | members
                self._unreached.update((id(entries), entries) for entries in row.unreached_entries)

    def hits(self, image: int | None) -> AbstractSet[Group]:
        """Return the groups that may see an image; none if there is no such image."""
        hits = () if image is None else self._hits[image]
        return frozenset(hits) if hits else _NO_GROUPS

    def unknown(self, image: int | None) -> AbstractSet[Group]:
        """Return the groups of which it isn't known, except ``unreached``."""
        return _NO_GROUPS if image is None else self._unknown.get(image, _NO_GROUPS)

    @property
    def unreached(self) -> set[Group]:
        """The groups of which it isn't known for some image, where there are too many to tell."""
        return {group for entries in self._unreached.values() for group in entries.all()}


class MirrorEvents(NamedTuple):
    """The events of a slice with those of mirrors."""

    events: list[Event]
    hits: list[Iterable[Group]]
    """Of each event."""
    new_indexes: list[int]
    """Of each event that was there before, its index now."""
    copied_indexes: dict[int, int]
    """Events for those whom a row enters, by index; and the updates that they repeat."""
    undecided: set[Group]
    """Groups that must load their lists anew."""
    unproven: dict[int, AbstractSet[Group]]
    """By index of the event, groups of which it isn't known whether they may see the new image."""


def with_mirror_events(
    events: Sequence[Event],
    hits: Sequence[Iterable[Group]],
    images: RowImages,
    verdicts: ImageVerdicts,
) -> MirrorEvents:
    """Return a slice's events and their receivers, with those that mirrors receive."""
    result = MirrorEvents([], [], [], {}, verdicts.unreached, {})
    for index, event in enumerate(events):
        result.new_indexes.append(len(result.events))
        result.events.append(event)
        result.hits.append(hits[index])
        before, after = images.before.get(index), images.after.get(index)
        if before is None and after is None:
            continue
        sees, may_see = verdicts.hits(after), verdicts.unknown(after)
        saw, may_have_seen = sees, may_see
        if before != after:
            saw, may_have_seen = verdicts.hits(before), verdicts.unknown(before)
        if may_see or may_have_seen:
            # Who sees it now is sent the whole row, and what it had of that doesn't matter.
            result.undecided.update(may_see, may_have_seen - sees)
            result.unproven[result.new_indexes[-1]] = may_see
        stays = sees & (saw | may_have_seen) if event.action == "update" else sees
        if stays:
            result.hits[-1] = (*hits[index], *stays)
        if enters := sees - stays:
            result.copied_indexes[len(result.events)] = result.new_indexes[-1]
            result.events.append(replace(event, action="create"))
            result.hits.append(tuple(enters))
        if leaves := saw - sees - may_see:
            row: Row = {event.collection.key.name: event.record_id}
            result.events.append(replace(event, action="delete", row=row, is_departure=True))
            result.hits.append(tuple(leaves))
    return result
