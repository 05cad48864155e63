"""Whose connections they are, and what the stream tells of those people's rows (protocol, 8).

A connection's caller is as its row was when the subscribe call came, and from then on as the stream
says at the connection's own position. Calls are answered later than their callers were looked
up, so what the stream told meanwhile is kept here for a while.
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
from pgrealtime.hub.events.event import Event, account_of_event
from pgrealtime.lsn import LSN, Cursor
from pgrealtime.snapshot import ReadPoint

_MAX_REMEMBERED_CHANGES = 4096
"""Changes of rows of people that are remembered. Each call needs those of its own few
milliseconds; who was looked up before the oldest is looked up again."""
_MAX_REMEMBERED_CHARACTERS = 4 * 1024 * 1024
"""Characters of those rows, the newest aside."""

_NO_LOGIN = CollectionLoginConfig()


class CallerTracker:
    """The connections by person, and the latest changes of people's rows.

    Args:
        logins: How people log in, by collection name.
        allows_guests: Whether guests may have topics.
    """

    def __init__(
        self, logins: Mapping[str, CollectionLoginConfig], *, allows_guests: bool = True
    ) -> None:
        self._logins = logins
        self._allows_guests = allows_guests
        self._revalidate: Callable[[Caller], Caller] | None = None
        self._connections_by_account: dict[AccountKey, dict[Connection, None]] = {}
        self._recent_changes: dict[AccountKey, deque[Event]] = {}
        self._change_order: deque[tuple[AccountKey, int]] = deque()
        """Whose change each was, and its size."""
        self._remembered_characters = 0
        self._forgotten_upto = LSN(0)

    def add(self, connection: Connection) -> None:
        """Count the connection among its caller's."""
        person = account_of(connection.caller)
        if person is not None:
            self._connections_by_account.setdefault(person, {})[connection] = None

    def remove(self, connection: Connection) -> None:
        """Take it out, before its caller becomes another. Idempotent."""
        person = account_of(connection.caller)
        theirs = self._connections_by_account.get(person) if person is not None else None
        if person is not None and theirs is not None:
            theirs.pop(connection, None)
            if not theirs:
                del self._connections_by_account[person]

    def set_caller(self, connection: Connection, caller: Caller) -> None:
        """Make the caller the connection's."""
        self.remove(connection)
        connection.set_caller(caller)
        if not connection.is_closed():
            self.add(connection)

    def replace_settings(
        self,
        logins: Mapping[str, CollectionLoginConfig],
        revalidate: Callable[[Caller], Caller],
        *,
        allows_guests: bool,
    ) -> None:
        """Replace what the configuration says of callers.

        Args:
            logins: As for the class.
            revalidate: Returns a known caller by the configuration: the same, changed, or a guest.
            allows_guests: As for the class.
        """
        self._logins, self._revalidate, self._allows_guests = logins, revalidate, allows_guests

    def revalidate(self, caller: Caller) -> Caller:
        """Return what the configuration in force makes of a known caller."""
        return caller if self._revalidate is None else self._revalidate(caller)

    def may_keep_topics(self, connection: Connection) -> bool:
        """Whether the connection may have the topics that it has."""
        is_guest = isinstance(connection.caller.principal, Guest)
        return self._allows_guests or not is_guest or not connection.subscriptions

    def changes_a_caller(self, event: Event) -> bool:
        """Whether the event changes the caller of any connection."""
        return any(
            self.caller_after(event, one.caller, one.caller_read_point) is not one.caller
            for one in self.connections_of(event)
        )

    def connections_of(self, event: Event) -> Sized[Connection]:
        """The connections whose caller is the record that the event is about."""
        return self._connections_by_account.get(account_of_event(event), {}).keys()

    def caller_after(self, event: Event, caller: Caller, read_point: ReadPoint | None) -> Caller:
        """Return what the event makes of the caller; the same object if nothing changes.

        Args:
            event: Of the caller's row or of any other.
            caller: As it was before.
            read_point: What was visible when its row was read: older news would undo newer.
        """
        if account_of(caller) != account_of_event(event):
            return caller
        if read_point is not None and not read_point.predates(event.xid, event.cursor.lsn):
            return caller
        if event.action == "delete":
            return Caller()
        after = self.caller_from_row(caller, event.collection, event.row)
        return caller if after == caller else after

    def caller_from_row(self, caller: Caller, collection: Collection, row: Row | None) -> Caller:
        """Return the caller, who is a record of the collection, as its row makes it.

        Args:
            caller: As it was before.
            collection: Of the record.
            row: Of the record; None if there is none any more.
        """
        if row is None:
            return Caller()
        return update_caller(caller, collection, self._logins.get(collection.name, _NO_LOGIN), row)

    # --- between the look-up of a caller and the answer to its call

    def remember_change(self, event: Event) -> None:
        """Remember the event for calls whose callers were looked up before it."""
        person = account_of_event(event)
        size = sum(len(value) for value in event.row.values() if value is not None)
        # Without all that its transaction changed, which the changelog may let go of meanwhile.
        self._recent_changes.setdefault(person, deque()).append(
            replace(event, transaction_changes=())
        )
        self._change_order.append((person, size))
        self._remembered_characters += size
        while len(self._change_order) > _MAX_REMEMBERED_CHANGES or (
            self._remembered_characters > _MAX_REMEMBERED_CHARACTERS and len(self._change_order) > 1
        ):
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        oldest, size = self._change_order.popleft()
        self._remembered_characters -= size
        theirs = self._recent_changes[oldest]
        self._forgotten_upto = max(self._forgotten_upto, theirs.popleft().cursor.lsn)
        if not theirs:
            del self._recent_changes[oldest]

    def forget_changes_upto(self, upto: LSN) -> None:
        """Take note that changes up to there were never told: a gap, or another history."""
        self._recent_changes.clear()
        self._change_order.clear()
        self._remembered_characters = 0
        self._forgotten_upto = upto

    def caller_at(self, caller: Caller, read_point: ReadPoint | None, cursor: Cursor) -> Caller:
        """Return the caller as it is at a position of the stream.

        Args:
            caller: As it was looked up.
            read_point: What was visible then; None if there was no row.
            cursor: Where its connection stands. What comes later it hears itself.

        Raises:
            LookupError: That look-up is too old to say, or what followed doesn't tell enough.
        """
        if read_point is None:
            return caller
        if read_point.insert_lsn < self._forgotten_upto:
            raise LookupError("the caller was looked up too long ago")
        for event in self._recent_changes.get(account_of(caller) or ("", ""), ()):
            if event.cursor <= cursor:
                caller = self.caller_after(event, caller, read_point)
        if caller.is_stale:
            raise LookupError("the caller's row changed in what the stream doesn't have")
        return caller
