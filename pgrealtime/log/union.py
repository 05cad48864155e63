"""The tables that any replica wanted lately: the owner streams them all. Pure."""

from collections.abc import Iterable, Mapping

from pgrealtime.changes import TableName

KEEP_SECONDS = 300.0
"""A table is streamed for so long after the last replica that wanted it."""


class WantedUnion:
    """What replicas want, each as it said last."""

    def __init__(self) -> None:
        self._wanted: dict[TableName, float] = {}
        """When each was last wanted, in monotonic seconds."""
        self._keys: dict[TableName, tuple[str, ...]] = {}

    def add(
        self,
        tables: Iterable[TableName],
        now: float,
        record_keys: Iterable[tuple[TableName, tuple[str, ...]]] = (),
    ) -> None:
        """Record that somebody wants the tables."""
        self._wanted.update(dict.fromkeys(tables, now))
        self._keys.update(record_keys)

    def tables(self, now: float) -> frozenset[TableName]:
        """Return what was wanted lately."""
        return frozenset(t for t, at in self._wanted.items() if now - at < KEEP_SECONDS)

    def record_keys(self, tables: Iterable[TableName]) -> Mapping[TableName, tuple[str, ...]]:
        """Return the columns that name a record of the tables, where they aren't the key."""
        return {table: self._keys[table] for table in tables if table in self._keys}
