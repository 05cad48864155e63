"""Reads index keys from a row and from a caller's values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from pgrealtime.changes import Row
from pgrealtime.rules.language.comparison import (
    Equality,
    equality,
    is_multiple,
    traits,
)
from pgrealtime.rules.language.parameters import (
    Macro,
)
from pgrealtime.rules.language.predicate import (
    Comparison,
    FieldValue,
    JsonValue,
    ParameterTerm,
    RowPath,
    ScopeRow,
    Term,
)
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.memory.compare import SqliteValue
from pgrealtime.rules.memory.conditions import (
    _empty_text_for_null,
    _operand_of_side,
    _row_path,
    _Side,
    columns_read,
    is_isset,
)
from pgrealtime.rules.memory.operands import (
    Arguments,
    CompileContext,
    ItemsReader,
    ListScope,
    MemoryOperand,
    NotInProcessError,
    ValueReader,
    align_precision,
    is_caller_row,
    make_comparable,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyComparison:
    """An equality or an order between what a row has and what a subscriber has.

    Values of both sides are hashable and stand in Python's ``==`` and ``<`` as they do in SQL.
    """

    reader_identity: Hashable
    """Equal for keys whose ``of_row`` is the same."""
    read_row_keys: Callable[[Row], Sequence[SqliteValue]]
    """The row's values, of which one must fit; None fits nothing."""
    read_caller_key: Callable[[Arguments], SqliteValue]
    """The subscriber's."""
    op: Op
    """``row op args``: EQ, NE, or an order."""
    is_exact: bool
    """The comparison is true if and only if one fits; else it is not true if none does."""
    columns: frozenset[str]


def key_comparison(comparison: Comparison, context: CompileContext) -> KeyComparison | None:
    """Return how an index may serve the comparison, or None if it can't."""
    op, left, right = comparison.op, comparison.left, comparison.right
    if op in {Op.LIKE, Op.NOT_LIKE}:
        return None
    if _is_caller_value(left, context) and not _is_caller_value(right, context):
        op, left, right = _MIRRORED_OPERATORS.get(op, op), right, left
    place = _row_path(left)
    if place is None or not isinstance(place.root, ScopeRow):
        return None
    if not _is_caller_value(right, context) or is_isset(right):
        return None
    multiple = is_multiple(left)
    if op is not Op.EQ and (multiple or not isinstance(right, ParameterTerm)):
        return None
    lists: dict[RowPath, ItemsReader] = {}
    scope = ListScope(context, lists)
    try:
        made = _key_readers(
            op, *(_Side(t, scope, traits(t, context.parameter_classes)) for t in (left, right))
        )
    except NotInProcessError:
        return None
    if made is None or len(lists) > 1:
        return None
    row_side, args_side, conversion = made
    return KeyComparison(
        reader_identity=(left, conversion),
        read_row_keys=_row_reader(row_side, list(lists.values())),
        read_caller_key=lambda args: _as_hash_key(args_side({}, args, ())),
        op=op,
        is_exact=isinstance(right, ParameterTerm) and (comparison.is_any or not multiple),
        columns=columns_read(comparison),
    )


_MIRRORED_OPERATORS = {Op.LT: Op.GT, Op.LE: Op.GE, Op.GT: Op.LT, Op.GE: Op.LE}


def _row_reader(
    read: ValueReader, lists: Sequence[ItemsReader]
) -> Callable[[Row], Sequence[SqliteValue]]:
    if not lists:
        return lambda row: (_as_hash_key(read(row, (), ())),)
    (items,) = lists
    return lambda row: [_as_hash_key(read(row, (), (item,))) for item in items(row, ())]


def _key_readers(op: Op, left: _Side, right: _Side) -> tuple[ValueReader, ValueReader, str] | None:
    """Return what reads either side so that equal values are equal, and the way it does."""
    case = equality(left.traits, right.traits)
    if op in {Op.EQ, Op.NE} and case is Equality.COALESCED:
        own = _operand_of_side(left)
        one, other = align_precision(own, _operand_of_side(right))
        return (
            _empty_text_for_null(one),
            _empty_text_for_null(other),
            "filled" + _double_suffix(own, one),
        )
    is_equality = op in {Op.EQ, Op.NE}
    if is_equality and not right.traits.is_nonempty:
        return None
    own = _operand_of_side(left)
    one, other = make_comparable(own, _operand_of_side(right))
    if one.only_type is not other.only_type and not (is_equality and one.only_type is None):
        return None
    if not is_equality and one.only_type is str and not left.scope.context.is_utf8:
        return None
    is_kept = one.read_value is own.read_value
    conversion = "as it is" if is_kept else "shown" if one.only_type is str else "number"
    return one.read_value, other.read_value, conversion + _double_suffix(own, one)


def _double_suffix(own: MemoryOperand, read: MemoryOperand) -> str:
    return " as double" if read.is_double and not own.is_double else ""


def _is_caller_value(term: Term, context: CompileContext) -> bool:
    """Whether it depends on the subscriber alone."""
    match term:
        case ParameterTerm(parameter):
            return parameter in context.argument_index and not isinstance(parameter, Macro)
        case FieldValue(row_path=place) | JsonValue(row_path=place):
            return is_caller_row(place)
        case _:
            return False


def _as_hash_key(value: SqliteValue) -> SqliteValue:
    return _NAN if value != value else value  # noqa: PLR0124 (NaN)


_NAN = float("nan")
"""Equal to itself in a dictionary, as in Postgres: the same object."""
