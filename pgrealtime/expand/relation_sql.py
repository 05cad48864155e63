"""The SQL that finds the ids of one relation, for many records at once.

``batch`` runs it where a record's row doesn't hold the ids: for relations through junction tables
and for back relations.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from psycopg import sql

from pgrealtime.catalog.model import Column, Table, canonical_id, native_key_type
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, unpadded_id
from pgrealtime.expand.node import ids_in_array
from pgrealtime.expand.plan import RelationHop
from pgrealtime.postgres.rows import identifier, row_source
from pgrealtime.rules.sql.row_images import find_columns

_BACK_LIMIT = 1000
"""Records that point to one record (protocol, 5.6)."""
_FORWARD_LIMIT = 10_000
"""Ids in a junction table for one record, so that a large junction doesn't fill the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelationQuery:
    """Finds the ids that a relation leads to from other records' ids, in a table."""

    table: Table
    match_column: Column
    """Holds the id of the source record, perhaps in an array."""
    result_column: Column
    source: Collection
    is_collection_table: bool
    """Whether the table is a collection's and ``result_column`` its key; else it is a junction."""
    limit: int

    def source_ids(self, row: Row) -> list[str]:
        """Return the source ids that a row of the table matches."""
        text = row.get(self.match_column.name)
        if text and self.match_column.type.base.element is None:
            return [unpadded_id(self.source, text)]
        return ids_in_array(text) if text else []

    def valid_ids(self, ids: Iterable[str]) -> list[str]:
        """Return the ids that can be cast to the column's type without an error."""
        type_ = self.match_column.type.base.element or self.match_column.type
        return [text for text in ids if canonical_id(text, type_) is not None]

    @property
    def statement(self) -> str:
        """Return the query; its parameter ``ids`` are source ids, its rows source and target."""
        element = self.match_column.type.base.element
        type_ = element or self.match_column.type
        native = native_key_type(type_)
        match: sql.Composable = identifier("t", self.match_column.name)
        source_id = sql.SQL("k.id::pg_catalog.{}").format(identifier(native or "text"))
        if not self.match_column.is_deterministic:  # its collation would match other ids too
            source_id = sql.SQL('{} COLLATE pg_catalog."C"').format(source_id)
        if element is None:
            shape = "{match} OPERATOR(pg_catalog.=) {source_id}"
        elif native and element.domain_of is None and self.match_column.is_deterministic:
            # No operator has arrays of both a domain and its base.
            shape = "{match} OPERATOR(pg_catalog.@>) ARRAY[{source_id}]"
        else:
            shape = "{source_id} OPERATOR(pg_catalog.=) ANY ({match})"
        if native is None:
            match = sql.SQL("{}::pg_catalog.text{}").format(match, sql.SQL("[]" if element else ""))
        statement = sql.SQL(
            "SELECT k.id, l.id FROM pg_catalog.unnest(%(ids)s::pg_catalog.text[]) k(id)"
            " CROSS JOIN LATERAL"
            " (SELECT {result} AS id FROM {table} t WHERE {condition} LIMIT {limit}) l"
        ).format(
            result=identifier("t", self.result_column.name),
            table=row_source(self.table),
            condition=sql.SQL(shape).format(match=match, source_id=source_id),
            limit=sql.Literal(self.limit),
        )
        return statement.as_string()


def relation_query(hop: RelationHop) -> RelationQuery:
    """Return the query for the ids that a hop leads to; not for one that ``is_in_row``."""
    assert hop.field.relation is not None
    junction = hop.field.relation.junction
    if junction is None:
        table, result = hop.owner.table, hop.owner.key
        assert hop.field.column is not None
        match = hop.field.column
    else:
        table = junction.table
        match, result = find_columns(table, (junction.source_column, junction.target_column))
        if hop.is_back:
            match, result = result, match
    return RelationQuery(
        table=table,
        match_column=match,
        result_column=result,
        source=hop.source,
        is_collection_table=junction is None,
        limit=_BACK_LIMIT if hop.is_back else _FORWARD_LIMIT,
    )
