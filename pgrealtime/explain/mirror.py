"""Explains what a caller's mirror is told of an update of a record. ``explain`` calls it.

The row before the update is given, as far as it differed. Both rows are evaluated, the one before
without the columns that PostgreSQL doesn't log of old rows, as in the service.
"""

from collections.abc import Mapping
from typing import NamedTuple

from pgrealtime.auth.principal import Caller
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.explain import text
from pgrealtime.explain.delivery import DeliveryExplainer
from pgrealtime.explain.session import ExplainSession
from pgrealtime.explain.text import ConditionVerdict
from pgrealtime.protocol.topic import Topic
from pgrealtime.rules.sql.reference import ReferenceQuery, reference_query
from pgrealtime.spelling import nearest_name


class _Image(NamedTuple):
    """Whether a row is visible to the caller; None if that isn't known; and why it isn't."""

    is_visible: bool | None
    reason: str


_NO_ROW = _Image(is_visible=False, reason="it is gone")


class MirrorExplainer(DeliveryExplainer):
    """Explains what the caller's mirror is told of an update, or of a deletion."""

    def __init__(
        self,
        session: ExplainSession,
        collections: Collections,
        caller: Caller,
        topic: Topic,
        lines: list[str],
        *,
        with_sql: bool,
        before: Mapping[str, object],
    ) -> None:
        super().__init__(session, collections, caller, topic, lines, with_sql=with_sql)
        self._before = before

    def _collection_refusal(self, collection: Collection) -> str:
        if refusal := super()._collection_refusal(collection):
            return refusal
        if collection.mirrors == "off":
            return f'"{collection.name}" has no mirrors (mirrors: off)'
        if collection.mirrors != "always" and not self._topic.asks_for_mirror:
            return 'the topic is no mirror: its options have no query.mode of "mirror"'
        return ""

    async def _explain_row(self, collection: Collection, row: Row, record_id: str) -> str:
        del record_id
        given = await self._given_columns(collection)
        if isinstance(given, str):
            return given
        old_key = given.get(collection.key.name, row[collection.key.name])
        if old_key != row[collection.key.name]:
            return "an update of the id is a deletion and a new record: explain each"
        before = await self._explain_before(collection, row | given)
        after = _Image(*await self.explain_image(collection, row, "record"))
        return self._told(before, after)

    async def _explain_no_row(self, collection: Collection, record_id: str) -> str:
        given = await self._given_columns(collection)
        if isinstance(given, str):
            return given
        rule = collection.list_rule if self._topic.record_id is None else collection.view_rule
        made = reference_query(self._collections, collection, rule, self._request)
        row = dict.fromkeys(collection.column_names) | {collection.key.name: record_id} | given
        read = made.column_names if isinstance(made, ReferenceQuery) else ()
        if missing := [name for name in read if name not in {*given, collection.key.name}]:
            listed = ", ".join(missing)
            return f"there is no such record now: name all of {listed} in --before"
        self._parts.add_lines("record", f"{collection.name}/{record_id} is gone")
        return self._told(await self._explain_before(collection, row), _NO_ROW)

    async def _given_columns(self, collection: Collection) -> Row | str:
        """Return the given values by column, or why they aren't of the table."""
        fields = {field.name: field.column.name for field in collection.fields if field.column}
        columns = {name: name for name in collection.column_names} | fields
        values: dict[str, object] = {}
        for name, value in self._before.items():
            if name not in columns:
                suggestion = nearest_name(name, columns)
                perhaps = f'; perhaps "{suggestion}"' if suggestion else ""
                return f'"{collection.name}" has no column "{name}"{perhaps}'
            values[columns[name]] = value
        found = await self._session.text_forms(collection, values) if values else {}
        if isinstance(found, ConditionVerdict):
            return f"the row before can't be in the table: {found.failure}"
        return found

    async def _explain_before(self, collection: Collection, row: Row) -> _Image:
        logged = frozenset(collection.table.replica_identity_columns)
        unknown = collection.column_names - logged - {collection.key.name}
        is_visible, reason = await self.explain_image(collection, row, "before", unknown)
        if is_visible is None and not logged.issuperset(collection.column_names):
            listed = ", ".join(sorted(logged)) or "nothing"
            reason = f"of old rows only {listed} is logged (pgrealtime check says what helps)"
        return _Image(is_visible, reason)

    def _told(self, before: _Image, after: _Image) -> str:
        """Set what the mirror is told; return why it is told nothing, or empty."""
        self._parts.add_lines("note", text.MIRROR_CAVEAT)
        match before.is_visible, after.is_visible:
            case _, None:
                self.outcome = f": resync, its client loads the list anew: {after.reason}"
            case True | None, True:
                self.outcome = ": update"
            case False, True:
                self.outcome = ": create, the row enters"
            case None, False:
                self.outcome = f": resync, its client loads the list anew: {before.reason}"
            case True, False:
                self.outcome = f": delete, the row leaves: {after.reason}"
            case _:
                return f"before: {before.reason}; now: {after.reason}"
        return ""
