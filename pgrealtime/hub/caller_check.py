"""Whether callers are still who the stream says, when rows are read live for them.

An event shows its own record as it was, and what is read live as it is when the event is delivered:
related records, and columns that the WAL left out. By then the database may be ahead of the stream:
a user was banned, then a row was written that banned users may not see. So the callers' own rows
are read in the snapshot that the live rows were read in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Collection as Sized
from typing import TypeAlias

from pgrealtime.auth.principal import Caller
from pgrealtime.collections import Collection
from pgrealtime.hub.connection import Connection
from pgrealtime.hub.expand import Reading, rows_by_id
from pgrealtime.hub.expansion import Viewer
from pgrealtime.hub.identity import Identities, Person, person_of
from pgrealtime.hub.match import Group
from pgrealtime.hub.meaning import Meaning
from pgrealtime.hub.snapshot import Snapshot
from pgrealtime.lsn import LSN, Cursor

IsTold: TypeAlias = Callable[[LSN], bool]
"""Whether the stream has told all that commits up to an LSN, and nothing of it changes a caller of
those that are checked."""

Connections: TypeAlias = Callable[
    [Sized[Viewer], Sized[Group]], Iterable[tuple[Connection, Cursor]]
]
"""Returns those of the connections to be checked that have one of the viewers or are in one of the
groups, each with the position that its caller belongs to."""


class CallerCheck:
    """Finds the connections whose callers have changed in what the stream has yet to tell.

    One is made for each slice, and called in each snapshot that live rows are read in for it.

    Args:
        identities: Makes callers of rows, and knows what the stream has told of them.
        meaning: Says who a caller is to related records.
        is_told: Saves the question to the database.
        connections: The connections to be checked.
        commit: The end of the commit that the slice's first event is of. A right that was lost up
            to there is no reason to withhold anything: nobody could read what a commit changed
            before that commit.

    Attributes:
        outdated: The connections found, with those of their viewers as which nothing may be shown
            to them that was read live.
        reach: Where the WAL ended when the latest snapshot was taken in which related records were
            read by rules that ask who the subscriber is; 0 if there was none.
    """

    def __init__(
        self,
        identities: Identities,
        meaning: Meaning,
        *,
        is_told: IsTold,
        connections: Connections,
        commit: LSN,
    ) -> None:
        self._identities = identities
        self._meaning = meaning
        self._is_told = is_told
        self._connections = connections
        self._commit = commit
        self.outdated: dict[Connection, frozenset[Viewer]] = {}
        self.reach = LSN(0)

    async def check_viewers(self, reading: Reading, viewers: Iterable[Viewer]) -> None:
        """Check those for whom related records were read.

        Args:
            reading: The snapshot that they were read in.
            viewers: For whom.
        """
        asking = frozenset(viewer for viewer in viewers if viewer.plan.asks_caller)
        if not asking:
            return
        self.reach = max(self.reach, reading.reach)
        for connection, now in (await self._changed(reading, asking, ())).items():
            outdated = frozenset(
                one.viewer
                for one in connection.subscriptions.values()
                if one.viewer in asking
                and (now is None or one.viewer is not self._meaning.viewer(one.topic, now))
            )
            if outdated:
                known = self.outdated.get(connection, frozenset())
                self.outdated[connection] = known | outdated

    async def check_groups(self, reading: Reading, groups: Iterable[Group]) -> frozenset[Group]:
        """Check those to whom columns of live rows would be shown.

        Args:
            reading: The snapshot that these were read in.
            groups: Who may see the live rows.

        Returns:
            The groups whose rules ask who the subscriber is, if each connection in one of them was
            found; else none.
        """
        asking = frozenset(group for group in groups if _asks_caller(group))
        changed = await self._changed(reading, (), asking) if asking else {}
        for connection in changed:
            self.outdated.setdefault(connection, frozenset())
        if not changed or any(
            connection not in changed for connection, _ in self._connections((), asking)
        ):
            return frozenset()
        return asking

    async def _changed(
        self, reading: Reading, viewers: Sized[Viewer], groups: Sized[Group]
    ) -> dict[Connection, Caller | None]:
        """Return the connections whose callers are others in the snapshot, each with that caller.

        It is None where it could not be read.
        """
        if self._is_told(reading.reach):
            return {}
        people: dict[Person, list[tuple[Connection, Cursor]]] = {}
        for connection, position in self._connections(viewers, groups):
            person = person_of(connection.caller)
            if person is not None:
                people.setdefault(person, []).append((connection, position))
        changed: dict[Connection, Caller | None] = {}
        for name in dict.fromkeys(name for name, _ in people):
            collection = self._meaning.collections.get(name)
            if collection is None:
                continue  # a token's user whose row nobody reads, here or in the stream
            theirs = {person[1]: found for person, found in people.items() if person[0] == name}
            changed |= await self._changed_of(reading, collection, theirs)
        return changed

    async def _changed_of(
        self,
        reading: Reading,
        collection: Collection,
        people: Mapping[str, Sequence[tuple[Connection, Cursor]]],
    ) -> dict[Connection, Caller | None]:
        """Return the same of the connections of one collection's people, by their ids."""
        rows = await rows_by_id(reading, collection, people)
        changed: dict[Connection, Caller | None] = {}
        for record_id, connections in people.items():
            for connection, position in connections:
                if rows is None:
                    changed[connection] = None
                    continue
                row = rows.get(record_id)
                now = self._identities.caller_of_row(connection.caller, collection, row)
                if not self._is_known(connection, position, now, reading.snapshot):
                    changed[connection] = now
        return changed

    def _is_known(
        self, connection: Connection, position: Cursor, now: Caller, snapshot: Snapshot
    ) -> bool:
        """Whether the stream has told that the connection's caller is what the snapshot shows."""
        if now == connection.caller:
            return True
        told = self._identities.caller_upto(connection, position, self._commit, snapshot)
        return told is None or now == told


def _asks_caller(group: Group) -> bool:
    collection = group.variant.collection
    rules = (collection.list_rule, collection.view_rule)
    return group.variant.asks_caller or any("@request.auth" in rule for rule in rules if rule)
