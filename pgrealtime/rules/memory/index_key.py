"""Reads index keys from a row and from a caller's values. Called by ``engine.index_paths``.

A comparison of what a row has with what a caller has need not be evaluated for each caller: the
row's value is looked up among the callers' values.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from pgrealtime.changes import Row
from pgrealtime.rules.language.comparison import (
    ComparisonKind,
    ValueComparison,
    is_multiple,
    plan_values,
    traits,
)
from pgrealtime.rules.language.parameters import Macro
from pgrealtime.rules.language.predicate import (
    Comparison,
    FieldValue,
    JsonValue,
    ParameterTerm,
    ScopeRow,
    Term,
    columns_read,
    row_path_of,
)
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.memory.compare import SqliteValue
from pgrealtime.rules.memory.operands import (
    Arguments,
    CompileContext,
    ItemsReader,
    ListScope,
    NotInProcessError,
    ValueReader,
    compile_planned,
    empty_text_for_null,
    is_caller_row,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyComparison:
    """An equality or an order between what a row has and what a caller has.

    Values of both sides are hashable and stand in Python's ``==`` and ``<`` as they do in SQL.
    """

    reader_identity: Hashable
    """Equal for comparisons whose ``read_row_keys`` is the same."""
    read_row_keys: Callable[[Row], Sequence[SqliteValue]]
    """Reads the row's values, of which one must match; None matches nothing."""
    read_caller_key: Callable[[Arguments], SqliteValue]
    op: Op
    """``row op caller``: EQ, NE, or an order."""
    is_exact: bool
    """The comparison is true if and only if a value matches; else it is only not true if none
    does."""
    column_names: frozenset[str]
    """Columns of the row that are read."""


def key_comparison(comparison: Comparison, context: CompileContext) -> KeyComparison | None:
    """Return how an index can serve the comparison, or None if it can't."""
    op, left, right = comparison.op, comparison.left, comparison.right
    if _is_caller_value(left, context) and not _is_caller_value(right, context):
        op, left, right = _MIRRORED_OPERATORS.get(op, op), right, left
    path = row_path_of(left)
    if path is None or not isinstance(path.root, ScopeRow):
        return None
    if not _is_caller_value(right, context):
        return None
    if op is not Op.EQ and (is_multiple(left) or not isinstance(right, ParameterTerm)):
        return None
    plan = plan_values(op, left, right, context.parameter_classes)
    if not _is_indexable(plan, context):
        return None
    scope = ListScope(context)
    try:
        readers = _key_readers(plan, scope)
    except NotInProcessError:
        return None
    if readers is None or len(scope.list_readers) > 1:
        return None
    read_row_key, read_caller_key = readers
    return KeyComparison(
        reader_identity=(plan.left, plan.kind is ComparisonKind.COALESCED),
        read_row_keys=_row_keys_reader(read_row_key, list(scope.list_readers.values())),
        read_caller_key=lambda args: _as_hash_key(read_caller_key({}, args, ())),
        op=op,
        is_exact=isinstance(right, ParameterTerm) and (comparison.is_any or not is_multiple(left)),
        column_names=columns_read(comparison),
    )


_MIRRORED_OPERATORS = {Op.LT: Op.GT, Op.LE: Op.GE, Op.GT: Op.LT, Op.GE: Op.LE}


def _is_caller_value(term: Term, context: CompileContext) -> bool:
    """Return whether it depends on the caller alone."""
    match term:
        case ParameterTerm(parameter):
            return parameter in context.argument_index and not isinstance(parameter, Macro)
        case FieldValue(row_path=path) | JsonValue(row_path=path):
            return is_caller_row(path)
        case _:
            return False


def _is_indexable(plan: ValueComparison, context: CompileContext) -> bool:
    """Return whether values that compare as equal can be equal keys.

    Where the caller's value may be NULL or empty, ``IS`` and ``=`` treat NULL as no key can.
    """
    match plan.kind:
        case ComparisonKind.ORDER | ComparisonKind.COALESCED:
            return True
        case ComparisonKind.EQUAL | ComparisonKind.NOT_DISTINCT:
            return traits(plan.right.term, context.parameter_classes).is_nonempty
        case _:
            return False


def _key_readers(plan: ValueComparison, scope: ListScope) -> tuple[ValueReader, ValueReader] | None:
    """Return what reads either side's key; None if values of different types could be equal."""
    left, right = compile_planned(plan.left, scope), compile_planned(plan.right, scope)
    if plan.kind is ComparisonKind.COALESCED:
        return empty_text_for_null(left.read_value), empty_text_for_null(right.read_value)
    is_order = plan.kind is ComparisonKind.ORDER
    if left.only_type is not right.only_type and (is_order or left.only_type is not None):
        return None
    if is_order and left.only_type is str and not scope.compile_context.is_utf8:
        return None
    return left.read_value, right.read_value


def _row_keys_reader(
    read: ValueReader, lists: Sequence[ItemsReader]
) -> Callable[[Row], Sequence[SqliteValue]]:
    if not lists:
        return lambda row: (_as_hash_key(read(row, (), ())),)
    (items,) = lists
    return lambda row: [_as_hash_key(read(row, (), (item,))) for item in items(row, ())]


def _as_hash_key(value: SqliteValue) -> SqliteValue:
    return _NAN if value != value else value  # noqa: PLR0124 (NaN)


_NAN = float("nan")
"""One object for all NaN: a dictionary finds it by identity, so that it equals itself as in SQL."""
