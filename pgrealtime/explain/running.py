"""Explains for the running service: its collections, a live connection's caller, a change's row.

``inspector`` calls it. The command makes its own of all of these (``explain.explain``).
"""

from pgrealtime.auth.principal import Caller
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.explain import text
from pgrealtime.explain.delivery import DeliveryExplainer
from pgrealtime.explain.explain import Explanation
from pgrealtime.explain.parts import labelled_lines
from pgrealtime.explain.session import ExplainSession, open_explain_session
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.protocol.topic import Topic


async def explain_for_caller(
    pool: QueryPool,
    collections: Collections,
    caller: Caller,
    topic: Topic,
    record_id: str,
    *,
    caller_name: str,
    image: Row | None = None,
) -> Explanation:
    """Evaluate a record for a caller's topic: as a change wrote it (``image``), or as it is now.

    Raises:
        DatabaseUnreachableError: The database doesn't answer.
        SetupError: The table can't be read.
    """
    lines = [*labelled_lines("caller", caller_name)]
    async with open_explain_session(pool) as session:
        explainer = _RunningExplainer(session, collections, caller, topic, lines, image=image)
        reason = await explainer.explain_record(record_id)
    verdict = f"not delivered: {reason}" if reason else "delivered"
    return Explanation(not reason, tuple(map(text.escape_unprintable, (*lines, verdict))))


class _RunningExplainer(DeliveryExplainer):
    """Explains about the row that a change wrote, if it has one."""

    def __init__(
        self,
        session: ExplainSession,
        collections: Collections,
        caller: Caller,
        topic: Topic,
        lines: list[str],
        *,
        image: Row | None,
    ) -> None:
        super().__init__(session, collections, caller, topic, lines, with_sql=False)
        self._image = image
        self._unknown_columns: frozenset[str] = frozenset()

    async def _find_row(self, collection: Collection, record_id: str) -> Row | None:
        """Return the image; what the WAL left out of it is as it is in the table now."""
        if self._image is None:
            return await super()._find_row(collection, record_id)
        missing = collection.column_names.difference(self._image)
        if not missing:
            return self._image
        now = await super()._find_row(collection, record_id)
        if now is None:
            self._unknown_columns = missing
        else:
            names = ", ".join(sorted(missing))
            self._parts.add_lines(
                "row", f"as it is now, since the change doesn't carry it: {names}"
            )
        return {**dict.fromkeys(missing), **(now or {}), **self._image}

    async def _explain_row(self, collection: Collection, row: Row, record_id: str) -> str:
        if self._image is None:
            return await super()._explain_row(collection, row, record_id)
        is_visible, reason = await self.explain_image(collection, row, "row", self._unknown_columns)
        self._parts.add_lines("note", text.IMAGE_CAVEAT)
        if is_visible is None:
            return "the change doesn't carry all that the rule reads"
        return "" if is_visible else reason
