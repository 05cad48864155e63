"""The connections of each account, how events change their callers, and a check for newer rows.

A connection's caller has the values that its row had when the subscribe call was authenticated, and
from then on those of the stream at the connection's own cursor. A call ends later than it was
authenticated, so recent changes of accounts' rows are kept here and applied at its end. The
dispatcher and catching up check callers against the database before they show rows read live.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Collection as Sized
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from msgspec.structs import replace

from pgrealtime.auth.principal import AccountKey, AuthRecord, Caller, Guest, account_of
from pgrealtime.auth.record import update_caller
from pgrealtime.changelog.row_history import LookupColumn, RowHistory
from pgrealtime.changes import Change, Row, Update, WholeRow
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.model import CollectionLoginConfig
from pgrealtime.expand.plan import ExpandViewer
from pgrealtime.fairness import YieldTimer
from pgrealtime.hub.connections.connection import Connection, Group
from pgrealtime.hub.events.event import Event
from pgrealtime.hub.state.generation import Generation
from pgrealtime.lsn import LSN, Cursor
from pgrealtime.rule_queries.session import ReadSession, fetch_rows_by_id
from pgrealtime.rules.engine.admission import AdmissionRules
from pgrealtime.snapshot import ReadPoint

_MAX_REMEMBERED_CHANGES = 4096
"""Changes of accounts' rows that are kept. A call needs those of the milliseconds that it takes; a
call whose caller was read before the oldest one is refused, and its client repeats it."""
_MAX_REMEMBERED_CHARACTERS = 4 * 1024 * 1024
"""Characters of the values of these rows; the newest change is kept whatever its size."""

_NO_LOGIN = CollectionLoginConfig()


class CallerTracker:
    """The connections by account, and the latest changes of accounts' rows."""

    def __init__(
        self, logins: Mapping[str, CollectionLoginConfig], *, allows_guests: bool = True
    ) -> None:
        self._logins = logins
        self.admission = AdmissionRules(Collections(()))
        """Whom the ``auth_rule`` of the generation in force admits."""
        self._allows_guests = allows_guests
        self._revalidate: Callable[[Caller], Caller] | None = None
        self._connections_by_account: dict[AccountKey, dict[Connection, None]] = {}
        self._recent_changes: dict[AccountKey, deque[Event]] = {}
        self._change_order: deque[tuple[AccountKey, int]] = deque()
        """The account and the size of each change kept, oldest first."""
        self._remembered_characters = 0
        self._forgotten_upto = LSN(0)

    def remove(self, connection: Connection) -> None:
        """Remove the connection from its caller's account. Idempotent."""
        account = account_of(connection.caller)
        own = self._connections_by_account.get(account) if account is not None else None
        if account is not None and own is not None:
            own.pop(connection, None)
            if not own:
                del self._connections_by_account[account]

    def set_caller(self, connection: Connection, caller: Caller) -> None:
        """Set the connection's caller."""
        self.remove(connection)
        connection.set_caller(caller)
        account = account_of(caller)
        if account is not None and not connection.is_closed():
            self._connections_by_account.setdefault(account, {})[connection] = None

    def replace_settings(
        self,
        logins: Mapping[str, CollectionLoginConfig],
        revalidate: Callable[[Caller], Caller],
        *,
        allows_guests: bool,
    ) -> None:
        """Apply the configuration of the next generation.

        ``revalidate`` returns a known caller as that has it: the same, changed, or a guest.
        """
        self._logins, self._revalidate, self._allows_guests = logins, revalidate, allows_guests

    def revalidate(self, caller: Caller) -> Caller:
        """Return a known caller as the configuration in force has it, perhaps a guest."""
        return caller if self._revalidate is None else self._revalidate(caller)

    def may_keep_topics(self, connection: Connection) -> bool:
        """Whether the connection's caller may have topics, if it has any."""
        is_guest = isinstance(connection.caller.principal, Guest)
        return self._allows_guests or not is_guest or not connection.subscriptions

    def changes_a_caller(self, event: Event) -> bool:
        """Whether the event changes the caller of any connection."""
        return any(
            self.caller_after(event, one.caller, one.caller_read_point) is not one.caller
            for one in self.connections_of(event)
        )

    def connections_of(self, event: Event) -> Sized[Connection]:
        """Return the connections whose caller's row the event changes."""
        return self._connections_by_account.get(event.account_key, {}).keys()

    def caller_after(self, event: Event, caller: Caller, read_point: ReadPoint | None) -> Caller:
        """Return the caller after an event; the same object if the event doesn't change it."""
        if account_of(caller) != event.account_key:
            return caller
        # What was visible when its row was read changes nothing: the row may be newer.
        if read_point is not None and not read_point.predates(event.xid, event.cursor.lsn):
            return caller
        if event.action == "delete":
            return Caller()
        after = self.caller_from_row(caller, event.collection, event.row, _change_of(event))
        return caller if after == caller else after

    def caller_before(self, event: Event, caller: Caller) -> Caller | None:
        """Return the caller before an update of its row; None if the WAL doesn't say."""
        match event.transaction_changes[event.cursor.ordinal - 1]:
            case Update(old=WholeRow(row=row)):
                return self.caller_from_row(caller, event.collection, row)
            case _:
                return None

    def caller_from_row(
        self, caller: Caller, collection: Collection, row: Row | None, change: Change | None = None
    ) -> Caller:
        """Return the caller with the values of its row; a guest if the row was deleted.

        It is a guest too if the row no longer satisfies the ``auth_rule``, and stale if that can't
        be decided from the row. ``change`` is what left the row so, if it is known.
        """
        if row is None:
            return Caller()
        login = self._logins.get(collection.name, _NO_LOGIN)
        after = update_caller(caller, collection, login, row)
        if not self.admission.has_rule(collection) or not isinstance(after.principal, AuthRecord):
            return after
        match self.admission.verdict(collection, row):
            case None if change is None or not self.admission.is_unaffected(collection, change):
                return Caller(is_stale=True)
            case False:
                return Caller()
            case _:
                return after

    # --- Changes between the authentication of a call and its end

    def remember_change(self, event: Event) -> None:
        """Keep an event of an account's row, for calls whose callers were read before it."""
        account = event.account_key
        size = sum(len(value) for value in event.row.values() if value is not None)
        # Without its transaction's changes, which would outlive the changelog's here.
        self._recent_changes.setdefault(account, deque()).append(
            replace(event, transaction_changes=())
        )
        self._change_order.append((account, size))
        self._remembered_characters += size
        while len(self._change_order) > _MAX_REMEMBERED_CHANGES or (
            self._remembered_characters > _MAX_REMEMBERED_CHARACTERS and len(self._change_order) > 1
        ):
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        oldest, size = self._change_order.popleft()
        self._remembered_characters -= size
        own = self._recent_changes[oldest]
        self._forgotten_upto = max(self._forgotten_upto, own.popleft().cursor.lsn)
        if not own:
            del self._recent_changes[oldest]

    def forget_changes_upto(self, upto: LSN) -> None:
        """Discard what is kept; changes up to an LSN aren't known: a gap, or another history."""
        self._recent_changes.clear()
        self._change_order.clear()
        self._remembered_characters = 0
        self._forgotten_upto = upto

    def caller_at(self, caller: Caller, cursor: Cursor) -> Caller:
        """Return the caller as of its connection's cursor.

        Raises ``LookupError`` if its row was read before the oldest change kept, or a change since
        then lacks columns.
        """
        read_point = caller.read_point
        if read_point is None:
            return caller
        if read_point.insert_lsn < self._forgotten_upto:
            raise LookupError("the caller's row was read too long ago")
        for event in self._recent_changes.get(account_of(caller) or ("", ""), ()):
            # Later ones are applied as the connection reads them.
            if event.cursor <= cursor:
                caller = self.caller_after(event, caller, read_point)
        if caller.is_stale:
            raise LookupError("the caller's row may have changed in a gap")
        return caller


def _change_of(event: Event) -> Change | None:
    """Return the change that an event is made of; None where it isn't kept."""
    changes = event.transaction_changes
    return changes[event.cursor.ordinal - 1] if changes else None


FindConnections: TypeAlias = Callable[[Sized[ExpandViewer], Sized[Group]], Iterable[Connection]]
"""Returns the connections to check that have one of the viewers or are in one of the groups."""


class CallerCheckResult(NamedTuple):
    """What the check of a slice was based on."""

    commit_lsn: LSN
    """The end of the commit of the slice's first event."""
    is_changelog_complete: bool
    """Whether the changelog holds everything that the snapshot sees."""


@dataclass(eq=False)
class CallerCheck:
    """Finds the connections of one slice whose callers changed before rows were read for them.

    An event carries its own record as of its change, but related records, and columns that the WAL
    left out, are read on delivery. By then the database may be ahead of the stream: a user was
    banned, then a row was written that banned users may not see. So wherever such rows may have
    been written after the event, the callers' own rows are read in the same snapshot.

    Called once for each snapshot in which rows are read, before it ends. It sends no query where
    the changelog shows no write, since the slice's first event, to the tables that were read or to
    the accounts' rows: the usual case.
    """

    caller_tracker: CallerTracker
    generation: Generation
    events: Sequence[Event]
    find_connections: FindConnections
    outdated_connections: dict[Connection, frozenset[ExpandViewer]] = field(default_factory=dict)
    """Each with those of its viewers for whom nothing may be expanded; none if only columns are to
    be withheld."""
    result: CallerCheckResult | None = None
    """None if nothing that was read depends on the caller."""

    async def __call__(
        self, session: ReadSession, viewers: Iterable[ExpandViewer], groups: Iterable[Group]
    ) -> frozenset[Group]:
        """Check the callers for whom rows were read in a session's snapshot.

        Related records were read for the viewers; the groups would be sent columns of live rows of
        the events' own records. Returns the groups of which every connection is outdated. The
        outdated connections of other groups must be served separately.
        """
        asking = {v for v in viewers if v.plan.depends_on_caller or v.own_record is not None}
        asking_groups = frozenset(group for group in groups if _depends_on_caller(group))
        if not (asking or asking_groups) or not self.events:
            return frozenset()
        commit = self.events[0].cursor.lsn
        # Up to a second for the stream to reach the snapshot: then the changelog has all writes
        # that the snapshot sees, and only accounts that were written need be queried.
        is_complete = await self.generation.row_history.wait_for_lsn(session.insert_lsn)
        if is_complete and not asking_groups and not await self._may_be_written(asking, commit):
            return frozenset()
        was_complete = self.result is None or self.result.is_changelog_complete
        self.result = CallerCheckResult(commit, is_complete and was_complete)
        changed = await self._find_changed(session, asking, asking_groups, is_complete=is_complete)
        for connection, caller in changed.items():
            viewers_lost = self._viewers_lost(connection, caller, asking)
            if viewers_lost or asking_groups:
                known = self.outdated_connections.get(connection, frozenset())
                self.outdated_connections[connection] = known | viewers_lost
        receivers = self.find_connections((), asking_groups)
        is_all_changed = bool(changed) and all(connection in changed for connection in receivers)
        return asking_groups if is_all_changed else frozenset()

    def _viewers_lost(
        self, connection: Connection, caller: Caller | None, viewers: set[ExpandViewer]
    ) -> frozenset[ExpandViewer]:
        """Return those of the viewers that the connection's changed caller no longer is."""
        compile_viewer = self.generation.compile_expand_viewer
        return frozenset(
            viewer
            for subscription in connection.subscriptions.values()
            if (viewer := subscription.expand_viewer) in viewers
            and (caller is None or viewer is not compile_viewer(subscription.topic, caller))
        )

    async def _may_be_written(self, viewers: Iterable[ExpandViewer], after: LSN) -> bool:
        """Whether rows expanded for the viewers may have been written in commits after an LSN."""
        lookups = frozenset[LookupColumn]().union(
            *(plan.lookup_columns for plan in {viewer.plan for viewer in viewers})
        )
        for lookup in lookups:
            history = await self.generation.row_history.table_history(*lookup, after)
            if history is None or history.has_writes(after):
                return True
        return False

    async def _find_changed(
        self,
        session: ReadSession,
        viewers: Sized[ExpandViewer],
        groups: Sized[Group],
        *,
        is_complete: bool,
    ) -> dict[Connection, Caller | None]:
        """Return the connections with changed callers, and these; None if the row wasn't read."""
        # Include writes of the first event's own commit: what was read may be later than it, and a
        # deletion changes the caller of a LIVE connection only after the slice.
        row_history, commit = self.generation.row_history, self.events[0].cursor.lsn
        before = LSN(commit - 1)
        changed: dict[Connection, Caller | None] = {}
        for collection in self.generation.collections.values():
            if collection.type != "auth":
                continue
            history = await row_history.table_history(*collection.id_lookup_column, before)
            if history is None:
                is_complete = False
                self.result = CallerCheckResult(commit, is_changelog_complete=False)
            elif is_complete and not history.has_writes(before):
                continue
            accounts: dict[AccountKey, list[Connection]] = {}
            yield_timer = YieldTimer()
            for connection in self.find_connections(viewers, groups):
                account = account_of(connection.caller)
                if account is None or account[0] != collection.name:
                    continue
                if not is_complete or may_account_have_changed(
                    row_history, collection, account, before
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
                    now = self.caller_tracker.caller_from_row(connection.caller, collection, row)
                if now is None or now != connection.caller:
                    changed[connection] = now
            if yield_timer.is_due():
                await yield_timer.pause()
        return changed


def _depends_on_caller(group: Group) -> bool:
    """Whether the rules of the group's collection depend on the caller.

    The text of the rules is searched as well: a rule that denies guests may be specialized without
    reading any other value of the caller.
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
        return True  # rows hold the id padded with blanks, the account without
    return row_history.may_be_written(collection.id_lookup_column, account[1], after)
