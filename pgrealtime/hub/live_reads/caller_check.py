"""Whether subscribers may be shown rows that were read live, though they may be others by now.

An event shows its own record as it was, but related records, and columns that the WAL left out, as
they are when it is delivered. By then the database may be ahead of the stream: a user was banned,
then a row was written that banned users may not see. So wherever such rows may have been written
after the event, the subscribers' own rows are read in the same snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Collection as Sized
from typing import NamedTuple, TypeAlias

from pgrealtime.auth.principal import Caller
from pgrealtime.collections.model import Collection
from pgrealtime.expand.load import Reading, rows_by_id
from pgrealtime.expand.plan import Viewer
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.evaluation.matcher import Group
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.live_reads.row_history import Lookup, RowHistory, key_lookup
from pgrealtime.hub.state.callers import Identities, Person, person_of
from pgrealtime.hub.state.generation import Meaning
from pgrealtime.lsn import LSN
from pgrealtime.turns import Turn

FindConnections: TypeAlias = Callable[[Sized[Viewer], Sized[Group]], Iterable[Connection]]
"""Returns those to be checked that have one of the viewers or are in one of the groups."""


class Checked(NamedTuple):
    """What a check found out about a slice.

    Attributes:
        commit: The end of the commit of the slice's first event.
        is_complete: Whether the changelog has all that the snapshot sees.
    """

    commit: LSN
    is_complete: bool


class CallerCheck:
    """Finds the connections of one slice whose callers have changed before rows were read for them.

    Called once for each snapshot that rows are read in, before it ends. Most often it asks the
    database nothing: the changelog says that since the slice's first event nothing was written to
    the tables that were read, or no row of a user.

    Args:
        identities: Makes callers of rows.
        meaning: The collections in force; says who a caller is to related records.
        history: Says what was written after the events, once the stream has told all that the
            snapshot sees; for a second it waits for that.
        events: The slice's.
        connections: Finds those to be checked.

    Attributes:
        outdated: The connections found, each with those of its viewers for whom nothing may be
            expanded. It is empty where only columns are to be withheld.
        checked: None if nothing read depends on who a subscriber is by now.
    """

    def __init__(
        self,
        identities: Identities,
        meaning: Meaning,
        history: RowHistory,
        *,
        events: Sequence[Event],
        connections: FindConnections,
    ) -> None:
        self._identities = identities
        self._meaning = meaning
        self._history = history
        self._events = events
        self._connections = connections
        self.outdated: dict[Connection, frozenset[Viewer]] = {}
        self.checked: Checked | None = None

    async def __call__(
        self, reading: Reading, viewers: Iterable[Viewer], groups: Iterable[Group]
    ) -> frozenset[Group]:
        """Check those for whom rows were read.

        Args:
            reading: The snapshot that they were read in.
            viewers: For whom related records were read.
            groups: To whom columns of live rows of the events' records would be shown.

        Returns:
            Those of the groups, if any, of which every connection was found. Of the others the
            connections found must be served apart.
        """
        asking = {one for one in viewers if one.plan.asks_caller or one.own is not None}
        asking_groups = frozenset(group for group in groups if _asks_caller(group))
        if not (asking or asking_groups) or not self._events:
            return frozenset()
        commit = self._events[0].cursor.lsn
        is_complete = await self._history.reaches(reading.reach)
        if is_complete and not asking_groups and not await self._are_written(asking, commit):
            return frozenset()
        was_complete = self.checked is None or self.checked.is_complete
        self.checked = Checked(commit, is_complete and was_complete)
        changed = await self._changed(reading, asking, asking_groups, is_complete=is_complete)
        for connection, now in changed.items():
            viewers_lost = frozenset(
                one.viewer
                for one in connection.subscriptions.values()
                if one.viewer in asking
                and (now is None or one.viewer is not self._meaning.viewer(one.topic, now))
            )
            if viewers_lost or asking_groups:
                known = self.outdated.get(connection, frozenset())
                self.outdated[connection] = known | viewers_lost
        left = (one for one in self._connections((), asking_groups) if one not in changed)
        if not changed or next(iter(left), None) is not None:
            return frozenset()
        return asking_groups

    async def _are_written(self, viewers: Iterable[Viewer], after: LSN) -> bool:
        """Whether what viewers are shown may have been written in commits after an LSN."""
        lookups = frozenset[Lookup]().union(*(one.lookups for one in {v.plan for v in viewers}))
        for lookup in lookups:
            history = await self._history.of(*lookup, after)
            if history is None or history.is_written(after):
                return True
        return False

    async def _changed(
        self, reading: Reading, viewers: Sized[Viewer], groups: Sized[Group], *, is_complete: bool
    ) -> dict[Connection, Caller | None]:
        """Return the connections whose callers are others in the snapshot, each with that caller.

        It is None where it could not be read.
        """
        # Writes of the first event's own commit count as well: what was read may be later than it,
        # and a LIVE connection's caller is what a deletion makes of it only after the slice.
        before = LSN(self._events[0].cursor.lsn - 1)
        changed: dict[Connection, Caller | None] = {}
        for collection in self._meaning.collections.values():
            if collection.type != "auth":
                continue
            history = await self._history.of(*key_lookup(collection), before)
            if history is None:
                is_complete = False
                self.checked = Checked(self._events[0].cursor.lsn, is_complete=False)
            elif is_complete and not history.is_written(before):
                continue
            people: dict[Person, list[Connection]] = {}
            turn = Turn()
            for connection in self._connections(viewers, groups):
                person = person_of(connection.caller)
                if person is None or person[0] != collection.name:
                    continue
                if not is_complete or may_have_changed(self._history, collection, person, before):
                    people.setdefault(person, []).append(connection)
                if turn.is_over():
                    await turn.pause()
            changed |= await self._changed_of(reading, collection, people)
        return changed

    async def _changed_of(
        self,
        reading: Reading,
        collection: Collection,
        people: Mapping[Person, Sequence[Connection]],
    ) -> dict[Connection, Caller | None]:
        """Return the same of the connections of some people of one collection."""
        if not people:
            return {}
        rows = await rows_by_id(reading, collection, (record_id for _, record_id in people))
        changed: dict[Connection, Caller | None] = {}
        turn = Turn()
        for person, connections in people.items():
            row = None if rows is None else rows.get(person[1])
            for connection in connections:
                now = None
                if rows is not None and person_of(connection.caller) == person:
                    now = self._identities.caller_of_row(connection.caller, collection, row)
                if now is None or now != connection.caller:
                    changed[connection] = now
            if turn.is_over():
                await turn.pause()
        return changed


def _asks_caller(group: Group) -> bool:
    """Whether who may see a record depends on who asks.

    A guest may be denied without a value of the caller's being asked for, hence the texts.
    """
    collection = group.variant.collection
    rules = (collection.list_rule, collection.view_rule)
    return group.variant.asks_caller or any("@request.auth" in rule for rule in rules if rule)


def may_have_changed(
    history: RowHistory, collection: Collection, person: Person, after: LSN
) -> bool:
    """Whether a user's row may have been written in commits that end after an LSN.

    Args:
        history: Has been asked for the collection's table since then.
        collection: Of the user.
        person: Who it is.
        after: The LSN.
    """
    if collection.key.type.base.name == "bpchar":
        return True  # rows hold the id with its padding
    return history.may_have_written(key_lookup(collection), person[1], after)
