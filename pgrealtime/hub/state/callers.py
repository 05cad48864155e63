"""The connections by account, and how the stream changes their callers.

A connection's caller has the values that its row had when the subscribe call was authenticated, and
from then on those of the stream at the connection's own cursor. A call is carried out later than it
was authenticated, so recent changes of accounts' rows are remembered here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Collection as Sized

from msgspec.structs import replace

from pgrealtime.auth.principal import AccountKey, Caller, Guest, account_of
from pgrealtime.auth.record import update_caller
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection
from pgrealtime.config.model import CollectionLoginConfig
from pgrealtime.hub.connections.connection import Connection
from pgrealtime.hub.events.event import Event
from pgrealtime.lsn import LSN, Cursor
from pgrealtime.snapshot import ReadPoint

_MAX_REMEMBERED_CHANGES = 4096
"""Changes of accounts' rows that are remembered. A call needs those of its own few milliseconds;
one whose caller was read before the oldest is refused, and its client calls again."""
_MAX_REMEMBERED_CHARACTERS = 4 * 1024 * 1024
"""Characters of those rows, except the newest."""

_NO_LOGIN = CollectionLoginConfig()


class CallerTracker:
    """The connections by account, and the latest changes of accounts' rows."""

    def __init__(
        self, logins: Mapping[str, CollectionLoginConfig], *, allows_guests: bool = True
    ) -> None:
        self._logins = logins
        self._allows_guests = allows_guests
        self._revalidate: Callable[[Caller], Caller] | None = None
        self._connections_by_account: dict[AccountKey, dict[Connection, None]] = {}
        self._recent_changes: dict[AccountKey, deque[Event]] = {}
        self._change_order: deque[tuple[AccountKey, int]] = deque()
        """The account and the size of each change."""
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
        """Replace what the configuration says of callers.

        ``revalidate`` returns a known caller by the configuration: the same, changed, or a guest.
        """
        self._logins, self._revalidate, self._allows_guests = logins, revalidate, allows_guests

    def revalidate(self, caller: Caller) -> Caller:
        """Return a known caller as the configuration in force resolves it."""
        return caller if self._revalidate is None else self._revalidate(caller)

    def may_keep_topics(self, connection: Connection) -> bool:
        """Whether the connection's caller may have topics, if it has any."""
        is_guest = isinstance(connection.caller.principal, Guest)
        return self._allows_guests or not is_guest or not connection.subscriptions

    def changes_a_caller(self, event: Event) -> bool:
        """Whether the event changes the caller of any connection."""
        return any(
            self.caller_after(event, connection.caller, connection.caller_read_point)
            is not connection.caller
            for connection in self.connections_of(event)
        )

    def connections_of(self, event: Event) -> Sized[Connection]:
        """Return the connections whose caller's row the event is about."""
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
        after = self.caller_from_row(caller, event.collection, event.row)
        return caller if after == caller else after

    def caller_from_row(self, caller: Caller, collection: Collection, row: Row | None) -> Caller:
        """Return the caller with the values of its row; a guest if the row was deleted."""
        if row is None:
            return Caller()
        return update_caller(caller, collection, self._logins.get(collection.name, _NO_LOGIN), row)

    # --- between the authentication of a call and its end

    def remember_change(self, event: Event) -> None:
        """Remember the event for calls whose callers were read before it."""
        account = event.account_key
        size = sum(len(value) for value in event.row.values() if value is not None)
        # Without its transaction's changes: the changelog may have discarded those.
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
        """Note that changes up to there are not known: a gap, or another history."""
        self._recent_changes.clear()
        self._change_order.clear()
        self._remembered_characters = 0
        self._forgotten_upto = upto

    def caller_at(self, caller: Caller, cursor: Cursor) -> Caller:
        """Return the caller as of its connection's cursor.

        Raises ``LookupError`` if its row was read too long ago, or a change since lacks columns.
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
