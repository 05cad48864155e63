"""Checks whether callers have changed in the database when rows are read live for them.

An event shows its own record as of its change, but related records, and columns that the WAL left
out, as they are on delivery. The database may then be ahead of the stream: a user was banned, then
a row was written that banned users may not see. So wherever such rows may have been written after
the event, the callers' own rows are read in the same snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Collection as Sized
from typing import NamedTuple, TypeAlias

from pgrealtime.auth.principal import AccountKey, Caller, account_of
from pgrealtime.changelog.row_history import LookupColumn, RowHistory
from pgrealtime.collections.model import Collection
from pgrealtime.expand.plan import ExpandViewer
from pgrealtime.fairness import YieldTimer
from pgrealtime.hub.connections.connection import Connection, Group
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.state.callers import CallerTracker
from pgrealtime.hub.state.generation import Generation
from pgrealtime.lsn import LSN
from pgrealtime.rule_queries.session import ReadSession, fetch_rows_by_id

FindConnections: TypeAlias = Callable[[Sized[ExpandViewer], Sized[Group]], Iterable[Connection]]
"""Returns the connections to check that have one of the viewers or are in one of the groups."""


class CallerCheckResult(NamedTuple):
    """The result of checking a slice."""

    commit_lsn: LSN
    """The end of the commit of the slice's first event."""
    is_changelog_complete: bool
    """Whether the changelog holds everything that the snapshot sees."""


class CallerCheck:
    """Finds the connections of one slice whose callers have changed before rows were read for them.

    Called once for each snapshot that rows are read in, before it ends. Most often it queries
    nothing: by the changelog nothing was written since the slice's first event to the tables that
    were read, or to no account's row.
    """

    def __init__(
        self,
        caller_tracker: CallerTracker,
        generation: Generation,
        *,
        events: Sequence[Event],
        find_connections: FindConnections,
    ) -> None:
        self._caller_tracker = caller_tracker
        self._generation = generation
        self._row_history = generation.row_history
        self._events = events
        self._find_connections = find_connections
        self.outdated_connections: dict[Connection, frozenset[ExpandViewer]] = {}
        """Each with those of its viewers for whom nothing may be expanded; none if only columns
        are to be withheld."""
        self.result: CallerCheckResult | None = None
        """None if nothing that was read depends on the caller."""

    async def __call__(
        self, session: ReadSession, viewers: Iterable[ExpandViewer], groups: Iterable[Group]
    ) -> frozenset[Group]:
        """Check the callers for whom rows were read in a session's snapshot.

        Related records were read for the viewers; the groups would be sent columns of live rows of
        the events' own records. Returns the groups of which every connection is outdated. The
        outdated connections of other groups must be served separately.
        """
        asking = {
            viewer
            for viewer in viewers
            if viewer.plan.depends_on_caller or viewer.own_record is not None
        }
        asking_groups = frozenset(group for group in groups if _depends_on_caller(group))
        if not (asking or asking_groups) or not self._events:
            return frozenset()
        commit = self._events[0].cursor.lsn
        # Up to a second for the stream to reach the snapshot: then the changelog has all writes
        # that the snapshot sees, and only accounts that were written need be queried.
        is_complete = await self._row_history.wait_for_lsn(session.insert_lsn)
        if is_complete and not asking_groups and not await self._may_be_written(asking, commit):
            return frozenset()
        was_complete = self.result is None or self.result.is_changelog_complete
        self.result = CallerCheckResult(commit, is_complete and was_complete)
        changed = await self._find_changed(
            session, asking, asking_groups, is_changelog_complete=is_complete
        )
        for connection, caller in changed.items():
            viewers_lost = self._viewers_lost(connection, caller, asking)
            if viewers_lost or asking_groups:
                known = self.outdated_connections.get(connection, frozenset())
                self.outdated_connections[connection] = known | viewers_lost
        receivers = self._find_connections((), asking_groups)
        is_all_changed = bool(changed) and all(connection in changed for connection in receivers)
        return asking_groups if is_all_changed else frozenset()

    def _viewers_lost(
        self, connection: Connection, caller: Caller | None, viewers: set[ExpandViewer]
    ) -> frozenset[ExpandViewer]:
        """Return those of the viewers that the connection's changed caller no longer is."""
        return frozenset(
            subscription.expand_viewer
            for subscription in connection.subscriptions.values()
            if subscription.expand_viewer in viewers
            and (
                caller is None
                or subscription.expand_viewer
                is not self._generation.compile_expand_viewer(subscription.topic, caller)
            )
        )

    async def _may_be_written(self, viewers: Iterable[ExpandViewer], after: LSN) -> bool:
        """Whether rows that viewers are shown may have been written in commits after an LSN."""
        lookups = frozenset[LookupColumn]().union(
            *(plan.lookup_columns for plan in {viewer.plan for viewer in viewers})
        )
        for lookup in lookups:
            history = await self._row_history.table_history(*lookup, after)
            if history is None or history.has_writes(after):
                return True
        return False

    async def _find_changed(
        self,
        session: ReadSession,
        viewers: Sized[ExpandViewer],
        groups: Sized[Group],
        *,
        is_changelog_complete: bool,
    ) -> dict[Connection, Caller | None]:
        """Return the connections whose callers have changed in the snapshot, with the new callers.

        A caller is None if its row could not be read.
        """
        # Writes of the first event's own commit count as well: what was read may be later than it,
        # and a deletion changes a LIVE connection's caller only after the slice.
        before = LSN(self._events[0].cursor.lsn - 1)
        changed: dict[Connection, Caller | None] = {}
        for collection in self._generation.collections.values():
            if collection.type != "auth":
                continue
            history = await self._row_history.table_history(*collection.id_lookup_column, before)
            if history is None:
                is_changelog_complete = False
                self.result = CallerCheckResult(
                    self._events[0].cursor.lsn, is_changelog_complete=False
                )
            elif is_changelog_complete and not history.has_writes(before):
                continue
            accounts: dict[AccountKey, list[Connection]] = {}
            yield_timer = YieldTimer()
            for connection in self._find_connections(viewers, groups):
                account = account_of(connection.caller)
                if account is None or account[0] != collection.name:
                    continue
                if not is_changelog_complete or may_account_have_changed(
                    self._row_history, collection, account, before
                ):
                    accounts.setdefault(account, []).append(connection)
                if yield_timer.is_due():
                    await yield_timer.pause()
            changed |= await self._find_changed_accounts(session, collection, accounts)
        return changed

    async def _find_changed_accounts(
        self,
        session: ReadSession,
        collection: Collection,
        connections_by_account: Mapping[AccountKey, Sequence[Connection]],
    ) -> dict[Connection, Caller | None]:
        if not connections_by_account:
            return {}
        rows = await fetch_rows_by_id(
            session, collection, (record_id for _, record_id in connections_by_account)
        )
        changed: dict[Connection, Caller | None] = {}
        yield_timer = YieldTimer()
        for account, connections in connections_by_account.items():
            row = None if rows is None else rows.get(account[1])
            for connection in connections:
                now = None
                if rows is not None and account_of(connection.caller) == account:
                    now = self._caller_tracker.caller_from_row(connection.caller, collection, row)
                if now is None or now != connection.caller:
                    changed[connection] = now
            if yield_timer.is_due():
                await yield_timer.pause()
        return changed


def _depends_on_caller(group: Group) -> bool:
    """Whether the rules of the group's collection depend on the caller.

    A rule that denies guests may be specialized without reading a value of the caller, hence its
    text is searched too.
    """
    collection = group.specialization.collection
    rules = (collection.list_rule, collection.view_rule)
    return group.specialization.reads_caller or any(
        "@request.auth" in rule for rule in rules if rule
    )


def may_account_have_changed(
    row_history: RowHistory, collection: Collection, account: AccountKey, after: LSN
) -> bool:
    """Whether an account's row may have been written in commits that end after an LSN.

    The row history must have read the collection's table since then.
    """
    if collection.key.type.base.name == "bpchar":
        return True  # rows hold the id with its padding
    return row_history.may_be_written(collection.id_lookup_column, account[1], after)
