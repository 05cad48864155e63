"""Derives the default order of a collection's lists, which ``order`` configures.

Always total, because pages of an order with ties would repeat and lose rows: PostgreSQL returns
ties in any order, another for each page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pgrealtime.catalog.model import Column
from pgrealtime.collections.model import Field, FieldKind, OrderColumn
from pgrealtime.collections.tables import ResolvedTable
from pgrealtime.collections.validate import unknown_field_problem
from pgrealtime.errors import ConfigProblem

_NUMBERED_TYPES = frozenset({"int2", "int4", "int8"})
_CREATION_TIMES = ("created", "created_at", "inserted_at", "createdAt", "insertedAt")


def default_order(resolved: ResolvedTable, fields: Sequence[Field]) -> tuple[OrderColumn, ...]:
    """Return the configured order, or: a numbered key; a creation time and the key; the key.

    A configured name that is no field of one column is left out; ``order_problems`` reports it.
    """
    # By the columns of a computed id, which an index serves.
    sources = map(resolved.table.find_column, resolved.key.id_sources)
    is_joined = bool(resolved.key.type.id_parts)
    known = [column for column in sources if column is not None] if is_joined else [resolved.key]
    key = tuple(map(OrderColumn, known))
    if resolved.config.order:
        columns = {field.name: field.column for field in fields}
        order = [
            OrderColumn(column, is_descending=text.startswith("-"))
            for text in resolved.config.order
            if (column := columns.get(text.lstrip("-+"))) is not None
        ]
        return tuple(order) if any(one.column == resolved.key for one in order) else (*order, *key)
    if resolved.key.type.base.name in _NUMBERED_TYPES:
        return key
    created = _creation_time(fields)
    return key if created is None else (OrderColumn(created), *key)


def order_problems(resolved: ResolvedTable, fields: Sequence[Field]) -> Iterator[ConfigProblem]:
    """Yield each name in ``order`` that is no field with a column of one value."""
    by_name = {field.name: field for field in fields}
    for text in resolved.config.order:
        field = by_name.get(text.lstrip("-+"))
        if field is None:
            yield unknown_field_problem(resolved, "order", text.lstrip("-+"), by_name)
        elif field.column is None or field.is_multiple or field.kind is FieldKind.JSON:
            yield resolved.problem("order", f'"{field.name}" has no order', "name another field")


def _creation_time(fields: Sequence[Field]) -> Column | None:
    by_column = {field.column.name: field for field in fields if field.column is not None}
    for name in _CREATION_TIMES:
        field = by_column.get(name)
        if field is not None and field.kind is FieldKind.DATE and not field.is_multiple:
            assert field.column is not None
            if field.column.not_null:
                return field.column
    return None
