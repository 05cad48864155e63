"""The keys of index entries: read from a row and a caller's values, or named by PostgreSQL.

A comparison of what a row has with what a caller has need not be evaluated for each caller: the
row's value is looked up among the callers' values. ``index_paths`` makes keys of a rule's
comparisons, ``index`` keeps members by them, ``batch_query`` asks PostgreSQL for the keys that only
it can name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from itertools import count
from weakref import WeakValueDictionary

from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.rules.engine.formula import Test
from pgrealtime.rules.language import predicate
from pgrealtime.rules.language.comparison import (
    ComparisonKind,
    ValueComparison,
    is_double,
    plan_values,
    traits,
)
from pgrealtime.rules.language.parameters import Macro, Parameter, ParameterClass
from pgrealtime.rules.language.predicate import Comparison, Condition, ParameterTerm, Term
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.memory import operands
from pgrealtime.rules.memory.compare import SqliteValue
from pgrealtime.rules.memory.operands import Arguments, CompileContext, ListScope, ValueReader
from pgrealtime.rules.memory.text_values import parse_numeric
from pgrealtime.rules.sql.conditions import SqlValues, translate_key_values


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
    has_single_key: bool
    """Whether every row has exactly one value."""
    column_names: frozenset[str]
    """Columns of the row that are read."""


def key_comparison(comparison: Comparison, context: CompileContext) -> KeyComparison | None:
    """Return how an index can serve the comparison, or None if it can't."""
    op, left, right = comparison.op, comparison.left, comparison.right
    if _is_caller_value(left, context) and not _is_caller_value(right, context):
        op, left, right = _MIRRORED_OPERATORS.get(op, op), right, left
    path = predicate.row_path_of(left)
    is_of_row = path is not None and isinstance(path.root, predicate.ScopeRow)
    if path is None or not is_of_row or not _is_caller_value(right, context):
        return None
    is_list, is_parameter = path.is_multiple, isinstance(right, ParameterTerm)
    if op is not Op.EQ and (is_list or not is_parameter):
        return None
    plan = plan_values(op, left, right, context.parameter_classes)
    if not _is_indexable(plan, context):
        return None
    scope = ListScope(context)
    try:
        readers = _key_readers(plan, scope)
    except operands.NotInProcessError:
        return None
    if readers is None or len(scope.list_readers) > 1:
        return None
    read_row_key, read_caller_key = readers
    return KeyComparison(
        reader_identity=(plan.left, plan.kind is ComparisonKind.COALESCED),
        read_row_keys=_row_keys_reader(read_row_key, list(scope.list_readers.values())),
        read_caller_key=lambda args: _as_hash_key(read_caller_key({}, args, ())),
        op=op,
        is_exact=is_parameter and (comparison.is_any or not is_list),
        has_single_key=not is_list,
        column_names=predicate.columns_read(comparison),
    )


_MIRRORED_OPERATORS = {Op.LT: Op.GT, Op.LE: Op.GE, Op.GT: Op.LT, Op.GE: Op.LE}


def _is_caller_value(term: Term, context: CompileContext) -> bool:
    """Return whether it depends on the caller alone."""
    match term:
        case ParameterTerm(parameter):
            return parameter in context.argument_index and not isinstance(parameter, Macro)
        case predicate.FieldValue(row_path=path) | predicate.JsonValue(row_path=path):
            return path.is_caller_row
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
    left, right = (operands.compile_planned(side, scope) for side in (plan.left, plan.right))
    if plan.kind is ComparisonKind.COALESCED:
        for_null = operands.empty_text_for_null
        return for_null(left.read_value), for_null(right.read_value)
    is_order = plan.kind is ComparisonKind.ORDER
    if left.only_type is not right.only_type and (is_order or left.only_type is not None):
        return None
    if is_order and left.only_type is str and not scope.compile_context.is_utf8:
        return None
    return left.read_value, right.read_value


def _row_keys_reader(
    read: ValueReader, lists: Sequence[operands.ItemsReader]
) -> Callable[[Row], Sequence[SqliteValue]]:
    if not lists:
        return lambda row: (_as_hash_key(read(row, (), ())),)
    (items,) = lists
    return lambda row: [_as_hash_key(read(row, (), (item,))) for item in items(row, ())]


def _as_hash_key(value: SqliteValue) -> SqliteValue:
    return _NAN if value != value else value  # noqa: PLR0124 (NaN)


_NAN = float("nan")
"""One object for all NaN: a dictionary finds it by identity, so that it equals itself as in SQL."""


# --- keys shared by all rules


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class RowKeyReader:
    """Reads the keys of a row that index entries are found by; NULL is None."""

    read_keys: Callable[[Row], Sequence[SqliteValue]]
    columns: frozenset[str]
    """Those that it reads."""
    has_single_key: bool
    serial: int
    """Puts readers in an order that does not depend on any rule."""


@dataclass(frozen=True, eq=False)
class RemoteKey:
    """A key of a row that PostgreSQL names: the values of a term on related rows.

    It comes from a test ``where && term = value`` with joins of its own. ``where`` has no caller's
    values; None is true. The values are numbers if ``is_numeric``, else texts.
    """

    collections: Collections
    collection: Collection
    term: Term
    where: Condition | None
    parameter_classes: Mapping[Parameter, ParameterClass]
    _: KW_ONLY
    is_numeric: bool

    @cached_property
    def sql_values(self) -> SqlValues:
        """The SELECT of the key's values for a row, translated when it is first used.

        Raises:
            RuleUnsupportedError: PostgreSQL can't evaluate it exactly.
        """
        return translate_key_values(self.term, self.where, self.collections, self.parameter_classes)

    def parse_key(self, text: str) -> SqliteValue:
        """Return the key of index entries for a value in PostgreSQL's text form."""
        if not self.is_numeric:
            return text
        return float(text) if is_double(self.term) else parse_numeric(text)


class KeyRegistry:
    """Makes each key once for all rules that use it, so that these share index entries."""

    def __init__(self) -> None:
        self._row_key_readers: WeakValueDictionary[Hashable, RowKeyReader] = WeakValueDictionary()
        self._remote_keys: WeakValueDictionary[Hashable, RemoteKey] = WeakValueDictionary()
        self._serials = count()

    def row_key_reader(self, test: Test, key: KeyComparison) -> RowKeyReader:
        """Return the reader of a key that one of the test's comparisons reads from rows."""
        identity = (test.collection.name, key.reader_identity)
        reader = self._row_key_readers.get(identity)
        if reader is None:
            serial = next(self._serials)
            reader = RowKeyReader(key.read_row_keys, key.column_names, key.has_single_key, serial)
            self._row_key_readers[identity] = reader
        return reader

    def remote_key(
        self, test: Test, term: Term, where: Condition | None, *, is_numeric: bool
    ) -> RemoteKey:
        """Return the key that PostgreSQL names for a term of the test."""
        parameters = () if where is None else predicate.condition_parameters(where)
        classes = {parameter: test.parameter_classes[parameter] for parameter in parameters}
        identity = (test.collection.name, term, where, tuple(classes.items()), is_numeric)
        remote_key = self._remote_keys.get(identity)
        if remote_key is None:
            remote_key = RemoteKey(
                test.collections, test.collection, term, where, classes, is_numeric=is_numeric
            )
            self._remote_keys[identity] = remote_key
        return remote_key
