"""Conditions about a row image, decided in the process where that is exact. Beside lower.py.

What a comparison means comes from ``ir.traits`` and ``ir.equality``, as for SQL; what is not proved
to come out as Postgres has it (the tests ask a server, type by type) is left to Postgres: then
``compiled`` returns None, or a test raises ``UndecidedError`` for the odd value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import TypeAlias, TypeVar

from pgrealtime.catalog.model import Type, TypeKind
from pgrealtime.changes import Row
from pgrealtime.collections.model import Field, FieldKind
from pgrealtime.rules.language.comparison import Affinity, Equality, Traits, equality, traits
from pgrealtime.rules.language.parameters import (
    CallerColumn,
    LiteralParameter,
    Macro,
    Parameter,
    ParameterClass,
    RequestValue,
    Scalar,
    SqlForm,
    exact_number,
    to_sql_value,
)
from pgrealtime.rules.language.predicate import (
    CallerRow,
    Comparison,
    Condition,
    Conjunction,
    Disjunction,
    EachTerm,
    EachValue,
    FieldValue,
    JsonValue,
    Keyword,
    Modifier,
    NestedRule,
    ParameterTerm,
    RowPath,
    ScopeRow,
    SecretTerm,
    Term,
    is_double,
    is_multiple,
)
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.memory.compare import (
    WORK_BUDGET,
    SqliteValue,
    UndecidedError,
    ascii_lower,
    compare_order,
    equals,
    float_text,
    is_blank,
    is_not_distinct,
    like_matcher,
    nearest_double,
    number_if_numeric,
    number_text,
    parse_numeric,
    trim_numeric_text,
)
from pgrealtime.rules.sql.operands import INT64_END, PASSWORD_HASH_PREFIX
from pgrealtime.text_forms import Element, parse_array

Arguments: TypeAlias = Sequence[Scalar]
"""The values of a condition's parameters, literals of a rule aside, in the order given."""
CompiledCondition: TypeAlias = Callable[[Row, Arguments], bool]
"""Whether the condition is true. A row must have the columns that are read."""
ValueReader: TypeAlias = Callable[[Row, Arguments, "_ItemCombination"], SqliteValue]

_ItemCombination: TypeAlias = tuple[str | None, ...]
"""The item of each list that the moment's combination is about."""
_VerdictFunction: TypeAlias = Callable[[Row, Arguments, _ItemCombination], bool | None]
_ItemsReader: TypeAlias = Callable[[Row, Arguments], Sequence[str | None]]
_ColumnReader: TypeAlias = Callable[[Row, Arguments], str | None]
"""Reads a column's text form, of the judged row or of the subscriber's own."""


class _NotInProcessError(Exception):
    """The construct is not decided in the process; ends the compiling of a condition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileContext:
    """What the compiling of a condition may know beforehand."""

    parameter_classes: Mapping[Parameter, ParameterClass]
    """The class of each parameter."""
    argument_index: Mapping[Parameter | CallerColumn, int]
    """Where its value is among the arguments; literals of the text need none."""
    is_utf8: bool = True
    """Whether the database's bytes are in the order of code points."""


def compile_condition(condition: Condition, context: CompileContext) -> CompiledCondition | None:
    """Return what decides a condition about the judged row, or None if only Postgres can."""
    lists: dict[RowPath, _ItemsReader] = {}
    checks: list[_ForAll] = []
    try:
        where = _compile_verdict(condition, _ListScope(context, lists, checks))
    except _NotInProcessError:
        return None
    if not lists and not checks:
        return lambda row, args: where(row, args, ()) is True
    readers = tuple(lists.values())
    size = sum(_UNITS_PER_COMPARISON for _ in _compared_terms(condition)) / 2

    def exists(row: Row, args: Arguments) -> bool:
        for check in checks:
            check.verdict = None
        for chosen in _combinations(readers, row, args):
            WORK_BUDGET.spend(size)
            if where(row, args, chosen) is True:
                return True
        return False

    return exists


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
    lists: dict[RowPath, _ItemsReader] = {}
    scope = _ListScope(context, lists)
    try:
        made = _key_readers(
            op, *(_Side(t, scope, traits(t, context.parameter_classes)) for t in (left, right))
        )
    except _NotInProcessError:
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
    read: ValueReader, lists: Sequence[_ItemsReader]
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
        one, other = _align_precision(own, _operand_of_side(right))
        return (
            _empty_text_for_null(one),
            _empty_text_for_null(other),
            "filled" + _double_suffix(own, one),
        )
    is_equality = op in {Op.EQ, Op.NE}
    if is_equality and not right.traits.is_nonempty:
        return None
    own = _operand_of_side(left)
    one, other = _make_comparable(own, _operand_of_side(right))
    if one.only_type is not other.only_type and not (is_equality and one.only_type is None):
        return None
    if not is_equality and one.only_type is str and not left.scope.context.is_utf8:
        return None
    is_kept = one.read_value is own.read_value
    conversion = "as it is" if is_kept else "shown" if one.only_type is str else "number"
    return one.read_value, other.read_value, conversion + _double_suffix(own, one)


def _double_suffix(own: _Operand, read: _Operand) -> str:
    return " as double" if read.is_double and not own.is_double else ""


def _is_caller_value(term: Term, context: CompileContext) -> bool:
    """Whether it depends on the subscriber alone."""
    match term:
        case ParameterTerm(parameter):
            return parameter in context.argument_index and not isinstance(parameter, Macro)
        case FieldValue(row_path=place) | JsonValue(row_path=place):
            return _is_caller_row(place)
        case _:
            return False


def _is_caller_row(path: RowPath) -> bool:
    return isinstance(path.root, CallerRow) and not path.steps


def _as_hash_key(value: SqliteValue) -> SqliteValue:
    return _NAN if value != value else value  # noqa: PLR0124 (NaN)


_NAN = float("nan")
"""Equal to itself in a dictionary, as in Postgres: the same object."""


def columns_read(condition: Condition) -> frozenset[str]:
    """Return the columns of the row image that the condition may read, as ``SqlPredicate`` does."""
    found: set[str] = set()
    for term in _compared_terms(condition):
        place = _row_path(term)
        field_ = getattr(term, "field", None)
        if place is None or not isinstance(place.root, ScopeRow):
            continue
        if place.is_scope_row and isinstance(field_, Field) and field_.column is not None:
            found.add(field_.column.name)
        if place.steps and isinstance(place.steps[0], EachValue):
            column = place.steps[0].field.column
            if column is not None:
                found.add(column.name)
    return frozenset(found)


def _compared_terms(condition: Condition) -> Iterator[Term]:
    match condition:
        case Comparison(left, _, _, right):
            yield from (left, right)
        case Conjunction(parts) | Disjunction(parts):
            for part in parts:
                yield from _compared_terms(part)
        case NestedRule():
            return


def _row_path(term: Term) -> RowPath | None:
    match term:
        case (
            FieldValue(row_path=place)
            | EachTerm(place)
            | JsonValue(row_path=place)
            | SecretTerm(row_path=place)
        ):
            return place
        case _:
            return None


# --- conditions


@dataclass(frozen=True, slots=True)
class _ListScope:
    """The lists that a condition's leaves share the items of."""

    context: CompileContext
    list_readers: dict[RowPath, _ItemsReader]
    for_all_checks: list[_ForAll] = field(default_factory=list)
    """What is searched for counter-examples."""
    first_item_index: int = 0

    def item_index(self, path: RowPath, read: _ItemsReader) -> int:
        """Return which of the chosen items is one of that place's list."""
        self.list_readers.setdefault(path, read)
        return self.first_item_index + list(self.list_readers).index(path)


def _compile_verdict(condition: Condition, scope: _ListScope) -> _VerdictFunction:
    match condition:
        case Comparison():
            return _compile_comparison(condition, scope)
        case Conjunction(parts):
            leaves = [_compile_verdict(part, scope) for part in parts]
            return lambda row, args, chosen: all(leaf(row, args, chosen) is True for leaf in leaves)
        case Disjunction(parts):
            leaves = [_compile_verdict(part, scope) for part in parts]
            return lambda row, args, chosen: any(leaf(row, args, chosen) is True for leaf in leaves)
        case NestedRule():
            raise _NotInProcessError


@dataclass(frozen=True, slots=True)
class _Side:
    term: Term
    scope: _ListScope
    traits: Traits


def _compile_comparison(comparison: Comparison, scope: _ListScope) -> _VerdictFunction:
    shapes = scope.context.parameter_classes
    left, right = (
        _Side(term, scope, traits(term, shapes)) for term in (comparison.left, comparison.right)
    )
    leaf = _compile_operator(comparison.op, left, right)
    if comparison.is_any or not (is_multiple(left.term) or is_multiple(right.term)):
        return leaf
    return _for_all(comparison.op, left, right, leaf)


def _for_all(
    op: Op, left: _Side, right: _Side, compare_shared: _VerdictFunction
) -> _VerdictFunction:
    """Add to a leaf that no item, or no pair of two, makes it false.

    Each side that is searched has its items to itself; the leaf before speaks of the shared ones.
    """
    # Far beyond the shared ones, whose number isn't known before everything is compiled.
    fresh: list[dict[RowPath, _ItemsReader]] = []
    sides: list[_Side] = []
    for side in (left, right):
        if is_multiple(side.term):
            lists: dict[RowPath, _ItemsReader] = {}
            scope = _ListScope(
                side.scope.context, lists, [], first_item_index=_MAX_SHARED_LISTS + len(fresh)
            )
            fresh.append(lists)
            sides.append(replace(side, scope=scope))
        else:
            sides.append(replace(side, traits=side.traits.for_counterexample()))
    counter = _compile_operator(op, *sides)
    check = _ForAll(counter, [read for lists in fresh for read in lists.values()])
    left.scope.for_all_checks.append(check)
    return lambda row, args, chosen: (
        compare_shared(row, args, chosen) is True and check.holds(row, args)
    )


class _ForAll:
    """That no item, or no pair of two, makes a leaf false.

    That doesn't depend on the shared items: it is found out once for all their combinations.

    Attributes:
        verdict: Of the evaluation under way; None if it isn't known yet.
    """

    __slots__ = ("_compare", "_list_readers", "verdict")

    def __init__(self, counter: _VerdictFunction, readers: Sequence[_ItemsReader]) -> None:
        self._compare = counter
        self._list_readers = readers
        self.verdict: bool | None = None

    def holds(self, row: Row, args: Arguments) -> bool:
        """Whether there is no counter-example."""
        if self.verdict is None:
            combinations = _combinations(self._list_readers, row, args)
            self.verdict = not any(
                self._is_counterexample(row, args, items) for items in combinations
            )
        return self.verdict

    def _is_counterexample(self, row: Row, args: Arguments, items: _ItemCombination) -> bool:
        WORK_BUDGET.spend(_UNITS_PER_COMPARISON)
        return self._compare(row, args, _NO_SHARED_ITEMS + items) is False


_MAX_SHARED_LISTS = 8
"""Lists that one condition may share."""
_NO_SHARED_ITEMS: _ItemCombination = (None,) * _MAX_SHARED_LISTS
_UNITS_PER_COMPARISON = 0.5
"""What it costs to compare two values, in units of ``WORK_BUDGET``."""
_MAX_COMBINATIONS = 10_000
"""Combinations of items that are gone through here; more of them take Postgres less time."""


def _combinations(
    readers: Sequence[_ItemsReader], row: Row, args: Arguments
) -> Iterator[_ItemCombination]:
    lists = [read(row, args) for read in readers]
    if prod(map(len, lists)) > _MAX_COMBINATIONS:
        raise UndecidedError
    return product(*lists)


def _compile_operator(op: Op, left: _Side, right: _Side) -> _VerdictFunction:
    match op:
        case Op.LIKE | Op.NOT_LIKE:
            return _compile_like(op, left, right)
        case Op.EQ | Op.NE:
            return _compile_equality(op, left, right)
        case _:
            return _compile_order(op, left, right)


def _compile_order(op: Op, left: _Side, right: _Side) -> _VerdictFunction:
    one, other = _make_comparable(_operand_of_side(left), _operand_of_side(right))
    if not left.scope.context.is_utf8 and float not in {one.only_type, other.only_type}:
        raise _NotInProcessError
    a, b = one.read_value, other.read_value
    return lambda row, args, chosen: compare_order(op, a(row, args, chosen), b(row, args, chosen))


def _compile_equality(op: Op, left: _Side, right: _Side) -> _VerdictFunction:
    is_equal = op is Op.EQ
    case = equality(left.traits, right.traits)
    if is_isset(right.term) and case in {Equality.NULL_SAFE, Equality.PLAIN}:
        raise _NotInProcessError  # SQLite asks for truth there, a meaning of its own
    match case:
        case Equality.CONSTANT:
            return lambda _row, _args, _chosen: is_equal
        case Equality.EMPTY:
            blank = _operand_of_side(right if left.traits.is_empty else left).read_value
            return lambda row, args, chosen: is_blank(blank(row, args, chosen)) is is_equal
        case Equality.COALESCED:
            one, other = _align_precision(_operand_of_side(left), _operand_of_side(right))
            return _equality_function(
                is_not_distinct, is_equal, _empty_text_for_null(one), _empty_text_for_null(other)
            )
        case Equality.NULL_SAFE:
            one, other = _make_comparable(_operand_of_side(left), _operand_of_side(right))
            return _equality_function(is_not_distinct, is_equal, one.read_value, other.read_value)
        case Equality.PLAIN:
            one, other = _make_comparable(
                *(
                    _EMPTY_TEXT if side.traits.is_empty else _operand_of_side(side)
                    for side in (left, right)
                )
            )
            return _equality_function(
                equals if is_equal else is_not_distinct, is_equal, one.read_value, other.read_value
            )


def is_isset(term: Term) -> bool:
    """Whether it is ``:isset``, which SQLite sees as the word TRUE or FALSE."""
    match term:
        case ParameterTerm(RequestValue(is_isset=is_set)):
            return is_set
        case _:
            return False


def _equality_function(
    comparison: Callable[[SqliteValue, SqliteValue], bool | None],
    is_equal: bool,  # noqa: FBT001 (an operator or its opposite)
    a: ValueReader,
    b: ValueReader,
) -> _VerdictFunction:
    if is_equal:
        return lambda row, args, chosen: comparison(a(row, args, chosen), b(row, args, chosen))
    return lambda row, args, chosen: not comparison(a(row, args, chosen), b(row, args, chosen))


def _empty_text_for_null(operand: _Operand) -> ValueReader:
    read = operand.read_value

    def filled(row: Row, args: Arguments, chosen: _ItemCombination) -> SqliteValue:
        value = read(row, args, chosen)
        return "" if value is None else value

    return filled


def _compile_like(op: Op, left: _Side, right: _Side) -> _VerdictFunction:
    shown = _operand_of_side(left).read_text
    is_like = op is Op.LIKE
    if _class_of_side(right) is ParameterClass.DANGLING_ESCAPE:
        return lambda row, args, chosen: None if shown(row, args, chosen) is None else not is_like
    made = _pattern_reader(right)

    def matches(row: Row, args: Arguments, chosen: _ItemCombination) -> bool | None:
        text, pattern = shown(row, args, chosen), made(row, args, chosen)
        if text is None or pattern is None:
            return None
        assert isinstance(text, str)
        assert isinstance(pattern, str)
        return like_matcher(pattern)(text) is is_like

    return matches


def _class_of_side(side: _Side) -> ParameterClass | None:
    match side.term:
        case ParameterTerm(parameter):
            return side.scope.context.parameter_classes[parameter]
        case _:
            return None


def _pattern_reader(side: _Side) -> ValueReader:
    match side.term:
        case ParameterTerm(parameter):
            return _argument_reader(parameter, SqlForm.PATTERN, side.scope.context)
        case _:
            shown = _operand_of_side(side).read_text

            def wrapped(row: Row, args: Arguments, chosen: _ItemCombination) -> SqliteValue:
                text = shown(row, args, chosen)
                return None if text is None else f"%{text}%"

            return wrapped


# --- operands


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operand:
    affinity: Affinity
    read_value: ValueReader
    read_text: ValueReader
    """The same as text."""
    only_type: type[str | float] | None
    """The only class of its values beside NULL; None if there are both."""
    is_double: bool = False
    """Its numbers are double precision, and what is compared with them becomes that too."""
    parameter: Parameter | None = None
    read_number: ValueReader | None = None
    """Of a constant: the number, if it is a text that looks like one."""


def _operand_of_side(side: _Side) -> _Operand:
    return replace(_compile_operand(side.term, side.scope), is_double=is_double(side.term))


def _text_operand(rank: Affinity, read: ValueReader) -> _Operand:
    return _Operand(affinity=rank, read_value=read, read_text=read, only_type=str)


def _constant_reader(value: SqliteValue) -> ValueReader:
    return lambda _row, _args, _chosen: value


_EMPTY_TEXT = _text_operand(Affinity.NONE, _constant_reader(""))


def _compile_operand(term: Term, scope: _ListScope) -> _Operand:
    match term:
        case ParameterTerm(parameter):
            return _parameter_operand(parameter, scope.context)
        case Keyword(flag):
            if flag is None:
                return _text_operand(Affinity.NONE, _constant_reader(None))
            number, text = _constant_reader(int(flag)), _constant_reader(str(int(flag)))
            return _Operand(
                affinity=Affinity.NONE, read_value=number, read_text=text, only_type=float
            )
        case FieldValue(place, field_, part):
            cells = _ColumnReaders(place, scope.context)
            return replace(
                _field_with_modifier(cells, field_, part), affinity=traits(term, {}).affinity
            )
        case SecretTerm(place, part) if place.is_scope_row:
            return _text_operand(
                traits(term, {}).affinity,
                _constant_reader(
                    ascii_lower(PASSWORD_HASH_PREFIX)
                    if part is Modifier.LOWER
                    else PASSWORD_HASH_PREFIX
                ),
            )
        case JsonValue(place, field_, keys, is_lower):
            return _json_operand(
                _ColumnReaders(place, scope.context), field_, keys, is_lower=is_lower
            )
        case EachTerm(place):
            at = scope.item_index(place, _items_reader(place, scope.context))
            if at >= _MAX_SHARED_LISTS and scope.first_item_index == 0:
                raise _NotInProcessError
            if term.kind is FieldKind.NUMBER:
                return _number_operand(*(_item_reader(at, convert) for convert in (int, str)))
            return _text_operand(Affinity.NONE, _item_reader(at, str))
        case _:
            raise _NotInProcessError


def _item_reader(index: int, convert: Callable[[str], SqliteValue]) -> ValueReader:
    def read(_row: Row, _args: Arguments, chosen: _ItemCombination) -> SqliteValue:
        text = chosen[index]
        return None if text is None else _convert_text_form(convert, text)

    return read


def _make_comparable(one: _Operand, other: _Operand) -> tuple[_Operand, _Operand]:
    return _align_precision(*_apply_affinity(one, other))


def _apply_affinity(one: _Operand, other: _Operand) -> tuple[_Operand, _Operand]:
    match one.affinity, other.affinity:
        case Affinity.NUMERIC, Affinity.NUMERIC:
            return one, other
        case Affinity.NUMERIC, _:
            return one, _convert_to_number(other)
        case _, Affinity.NUMERIC:
            return _convert_to_number(one), other
        case Affinity.TEXT, Affinity.NONE:
            return one, _convert_to_text(other)
        case Affinity.NONE, Affinity.TEXT:
            return _convert_to_text(one), other
        case _:
            return one, other


def _convert_to_number(operand: _Operand) -> _Operand:
    if operand.only_type is float:
        return operand
    if operand.parameter is not None:
        if operand.read_number is None:
            return operand
        return replace(operand, read_value=operand.read_number, only_type=float)
    read = operand.read_value
    return replace(
        operand,
        read_value=lambda row, args, chosen: number_if_numeric(read(row, args, chosen)),
        only_type=None,
    )


def _convert_to_text(operand: _Operand) -> _Operand:
    return replace(operand, read_value=operand.read_text, only_type=str, is_double=False)


def _align_precision(one: _Operand, other: _Operand) -> tuple[_Operand, _Operand]:
    """Return both with numbers that can be compared: exact ones, unless one is a double."""
    if one.is_double is other.is_double:
        return one, other
    return _convert_to_double(one), _convert_to_double(other)


def _convert_to_double(operand: _Operand) -> _Operand:
    if operand.is_double or operand.only_type is str:
        return operand
    read = operand.read_value
    return replace(
        operand,
        read_value=lambda row, args, chosen: nearest_double(read(row, args, chosen)),
        is_double=True,
    )


# --- constants


def _parameter_operand(parameter: Parameter, context: CompileContext) -> _Operand:
    shape = context.parameter_classes[parameter]
    if shape is ParameterClass.ABSENT:
        return _text_operand(Affinity.NONE, _constant_reader(None))
    shown = _argument_reader(parameter, SqlForm.TEXT, context)
    number = _argument_reader(parameter, SqlForm.NUMBER, context)
    if shape.is_number:
        return _Operand(
            affinity=Affinity.NONE,
            read_value=number,
            read_text=shown,
            only_type=float,
            parameter=parameter,
        )
    return replace(
        _text_operand(Affinity.NONE, shown),
        parameter=parameter,
        read_number=number if shape is ParameterClass.NUMERIC_TEXT else None,
    )


def _argument_reader(parameter: Parameter, form: SqlForm, context: CompileContext) -> ValueReader:
    if isinstance(parameter, LiteralParameter):
        if form is not SqlForm.NUMBER:
            return _constant_reader(to_sql_value(parameter.value, form))
        shape = context.parameter_classes[parameter]
        is_number = shape.is_number or shape is ParameterClass.NUMERIC_TEXT
        return _constant_reader(exact_number(parameter.value) if is_number else None)
    at = context.argument_index[parameter]
    if form is SqlForm.NUMBER:
        return lambda _row, args, _chosen: (
            None if (content := args[at]) is None else exact_number(content)
        )
    if form is SqlForm.TEXT:
        return lambda _row, args, _chosen: (
            value if isinstance(value := args[at], str) else to_sql_value(value, form)
        )
    return lambda _row, args, _chosen: to_sql_value(args[at], form)


# --- fields


_INTEGERS = frozenset({"int2", "int4", "int8"})
_FLOATS = frozenset({"float4", "float8"})
_CAST_LIKE_OUTPUT_TYPES = frozenset({"text", "varchar", "uuid", *_INTEGERS})
"""Built-in types whose output is what a cast to text gives."""


def _has_cast_like_output(type_: Type) -> bool:
    base = type_.base
    return base.kind is TypeKind.ENUM or (
        base.schema == "pg_catalog" and base.name in _CAST_LIKE_OUTPUT_TYPES
    )


class _ColumnReaders:
    """Reads columns of the row at a place, which needs no join.

    Raises:
        _NotInProcessError: It does.
    """

    def __init__(self, path: RowPath, context: CompileContext) -> None:
        self._is_scope_row = path.is_scope_row
        self._argument_index = context.argument_index
        if not (
            self._is_scope_row
            or (_is_caller_row(path) and CallerColumn("") in context.argument_index)
        ):
            raise _NotInProcessError

    def column_reader(self, field_: Field) -> _ColumnReader:
        """Return what reads the field's column."""
        if field_.column is None:
            raise _NotInProcessError
        name = field_.column.name
        if self._is_scope_row:
            return lambda row, _args: row[name]
        at = self._argument_index[CallerColumn(name)]
        return lambda _row, args: _require_text_form(args[at])

    def value_reader(
        self,
        field_: Field,
        convert: Callable[[str], SqliteValue],
        *,
        reads_null_as_empty: bool = False,
    ) -> ValueReader:
        """Return what reads a value: the text form converted, or NULL.

        Args:
            field_: Whose column is read.
            convert: What makes a value of the text form.
            reads_null_as_empty: NULL counts as the empty text if there is a row.
        """
        cell = self.column_reader(field_)
        present = None if self._is_scope_row else self._argument_index[CallerColumn("")]

        def read(row: Row, args: Arguments, _chosen: _ItemCombination) -> SqliteValue:
            text = cell(row, args)
            if text is not None:
                return _convert_text_form(convert, text)
            if not reads_null_as_empty or (present is not None and args[present] is None):
                return None
            return ""

        return read


_T = TypeVar("_T")


def _convert_text_form(convert: Callable[[str], _T], text: str) -> _T:
    """Convert a text form that may be of another type: the catalogue can be behind the stream."""
    try:
        return convert(text)
    except (ValueError, IndexError, AssertionError):
        raise UndecidedError from None


def _require_text_form(value: Scalar) -> str | None:
    assert value is None or isinstance(value, str)
    return value


def _field_with_modifier(cells: _ColumnReaders, field_: Field, modifier: Modifier) -> _Operand:
    match modifier:
        case Modifier.WHOLE | Modifier.EACH:
            return _whole_field(cells, field_)
        case Modifier.LOWER:
            return _text_operand(
                Affinity.NONE, _lower_reader(_whole_field(cells, field_).read_text)
            )
        case Modifier.LENGTH:
            return _length_operand(cells, field_)


def _lower_reader(shown: ValueReader) -> ValueReader:
    def lowered(row: Row, args: Arguments, chosen: _ItemCombination) -> SqliteValue:
        text = shown(row, args, chosen)
        return ascii_lower(text) if isinstance(text, str) else None

    return lowered


def _whole_field(cells: _ColumnReaders, field_: Field) -> _Operand:
    base = field_.type.base
    if field_.is_multiple:
        return _text_operand(
            Affinity.NUMERIC, cells.value_reader(field_, _list_text_converter(field_))
        )
    match field_.kind:
        case FieldKind.NUMBER if base.name in _INTEGERS:
            return _number_operand(cells.value_reader(field_, int), cells.value_reader(field_, str))
        case FieldKind.NUMBER if base.name == "numeric":
            return _number_operand(
                cells.value_reader(field_, parse_numeric),
                cells.value_reader(field_, trim_numeric_text),
            )
        case FieldKind.NUMBER if base.name in _FLOATS:
            shown = cells.value_reader(field_, lambda text: number_text(parse_double(text)))
            return _number_operand(cells.value_reader(field_, parse_double), shown)
        case FieldKind.BOOL:
            shown = cells.value_reader(field_, lambda text: str(_parse_bool(text)))
            return _number_operand(cells.value_reader(field_, _parse_bool), shown)
        case FieldKind.DATE if base.name in _DATE_CONVERTERS:
            return _text_operand(
                Affinity.TEXT,
                cells.value_reader(field_, _DATE_CONVERTERS[base.name], reads_null_as_empty=True),
            )
        case FieldKind.RELATION if _has_cast_like_output(base):
            return _text_operand(
                Affinity.TEXT, cells.value_reader(field_, str, reads_null_as_empty=True)
            )
        case FieldKind.TEXT | FieldKind.FILE if _has_cast_like_output(base):
            return _text_operand(Affinity.TEXT, cells.value_reader(field_, str))
        case _:
            raise _NotInProcessError


def _parse_bool(text: str) -> int:
    return int(text.startswith("t"))


def _number_operand(read: ValueReader, shown: ValueReader) -> _Operand:
    return _Operand(affinity=Affinity.NUMERIC, read_value=read, read_text=shown, only_type=float)


def parse_double(text: str) -> float:
    """Return the double of a number's text form.

    Raises:
        UndecidedError: There is none: Postgres reports an error.
    """
    number = float(text)
    if number == 0 or number in _INFINITIES:
        digits = text.partition("e")[0]
        if number != 0 and digits[-1].isdigit():
            raise UndecidedError
        if number == 0 and digits.strip("-0."):
            raise UndecidedError
    return number


_INFINITIES = (float("inf"), float("-inf"))


_DATE_TEXT = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_TIMESTAMP_TEXT = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.(\d{1,6}))?", re.ASCII)


def _convert_date(text: str) -> str:
    if _DATE_TEXT.fullmatch(text) is None:
        raise UndecidedError
    return f"{text} 00:00:00.000Z"


def _convert_timestamp(text: str) -> str:
    found = _TIMESTAMP_TEXT.fullmatch(text)
    if found is None:
        raise UndecidedError
    return f"{found[1]}.{found[2] or '':0<3.3}Z"


def _convert_timestamptz(text: str) -> str:
    if not text.endswith("+00"):
        raise UndecidedError
    return _convert_timestamp(text[:-3])


_DATE_CONVERTERS: Mapping[str, Callable[[str], str]] = {
    "date": _convert_date,
    "timestamp": _convert_timestamp,
    "timestamptz": _convert_timestamptz,
}


# --- lists


def _flatten(items: Sequence[Element]) -> Iterator[str | None]:
    for item in items:
        if isinstance(item, list):
            yield from _flatten(item)
        else:
            yield item


def _length_operand(cells: _ColumnReaders, field_: Field) -> _Operand:
    read: ValueReader
    if field_.is_multiple:
        cell, delimiter = cells.column_reader(field_), _delimiter(field_)
        read = lambda row, args, _chosen: _count_items(  # noqa: E731 (one expression)
            cell(row, args), delimiter
        )
    else:
        shown = _whole_field(cells, field_).read_text
        read = lambda row, args, chosen: int(  # noqa: E731 (likewise)
            not is_blank(shown(row, args, chosen))
        )
    as_text: ValueReader = lambda row, args, chosen: str(read(row, args, chosen))  # noqa: E731
    return _Operand(affinity=Affinity.NONE, read_value=read, read_text=as_text, only_type=float)


def _delimiter(field_: Field) -> str:
    element = field_.type.base.element
    if element is None:
        raise _NotInProcessError
    return element.base.delimiter


def _count_items(text: str | None, delimiter: str) -> int:
    if text is None:
        return 0
    return len(_convert_text_form(lambda given: _array_items(given, delimiter), text))


def _array_items(text: str, delimiter: str = ",") -> tuple[str | None, ...]:
    """Return the items of an array; of a long one that is found out once for many filters."""
    if len(text) < _MIN_CACHED_LENGTH:
        return tuple(_flatten(parse_array(text, delimiter)))
    WORK_BUDGET.spend(len(text) / 512)
    return _cached_array_items(text, delimiter)


_MIN_CACHED_LENGTH = 128
"""Characters from which on it is worth keeping what was made of a text."""


@lru_cache(maxsize=16)
def _cached_array_items(text: str, delimiter: str) -> tuple[str | None, ...]:
    return tuple(_flatten(parse_array(text, delimiter)))


def _items_reader(path: RowPath, context: CompileContext) -> _ItemsReader:
    """Return what reads the values of a list of a row at hand; NULL where there are none."""
    match path.steps:
        case (EachValue(field_),):
            element = field_.type.base.element
            if element is None or not _has_cast_like_output(element):
                raise _NotInProcessError
            cell = _ColumnReaders(RowPath(path.root), context).column_reader(field_)
        case _:
            raise _NotInProcessError

    def read(row: Row, args: Arguments) -> Sequence[str | None]:
        text = cell(row, args)
        return (() if text is None else _convert_text_form(_array_items, text)) or (None,)

    return read


def _list_text_converter(field_: Field) -> Callable[[str], SqliteValue]:
    """Return what makes of an array the JSON text that ``array_to_json`` makes."""
    element = field_.type.base.element
    if element is None:
        raise _NotInProcessError
    show: Callable[[str], str]
    match field_.kind, element.base.name:
        case FieldKind.BOOL, _:
            show = lambda text: "true" if text.startswith("t") else "false"  # noqa: E731
        case FieldKind.NUMBER, name if name in _INTEGERS:
            show = str
        case ((FieldKind.TEXT | FieldKind.RELATION | FieldKind.FILE), _) if _has_cast_like_output(
            element
        ):
            show = _json_string
        case _:
            raise _NotInProcessError

    def dump(items: Sequence[Element]) -> str:
        shown = (
            dump(item) if isinstance(item, list) else "null" if item is None else show(item)
            for item in items
        )
        return f"[{','.join(shown)}]"

    dumped = lru_cache(maxsize=4)(lambda text: dump(parse_array(text)))

    def shown(text: str) -> str:
        WORK_BUDGET.spend(len(text) / 512)
        return dumped(text)

    return shown


def _json_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# --- json


class _NumberToken(str):
    """A number of a JSON text, as written there."""

    __slots__ = ()


@lru_cache(maxsize=64)
def _parsed_json(text: str) -> object:
    """Several comparisons look at one document."""
    try:
        return json.loads(text, parse_int=_NumberToken, parse_float=_NumberToken)
    except (ValueError, RecursionError):
        raise UndecidedError from None


def _json_operand(
    cells: _ColumnReaders, field_: Field, keys: Sequence[str], *, is_lower: bool
) -> _Operand:
    if field_.kind is not FieldKind.JSON or field_.type.base.name != "jsonb":
        raise _NotInProcessError
    cell, path = cells.column_reader(field_), tuple(keys)

    def shown(row: Row, args: Arguments, _chosen: _ItemCombination) -> SqliteValue:
        return _json_at_path(cell(row, args), path, is_as_text=True)

    if is_lower:
        return _text_operand(Affinity.NONE, _lower_reader(shown))

    def read(row: Row, args: Arguments, _chosen: _ItemCombination) -> SqliteValue:
        return _json_at_path(cell(row, args), path, is_as_text=False)

    return _Operand(affinity=Affinity.NONE, read_value=read, read_text=shown, only_type=None)


def _json_at_path(text: str | None, path: tuple[str, ...], *, is_as_text: bool) -> SqliteValue:
    """Return what is at the path; of a long document that is found out once for many filters."""
    if text is None:
        return None
    if len(text) < _MIN_CACHED_LENGTH:
        return _follow_json_path(text, path, is_as_text)
    WORK_BUDGET.spend(len(text) / 512)
    return _cached_follow_json_path(text, path, is_as_text)


def _follow_json_path(text: str, path: tuple[str, ...], is_as_text: bool) -> SqliteValue:  # noqa: FBT001 (cached)
    node = _parsed_json(text)
    for key in path:
        node = _json_member(node, key)
    return _json_as_text(node) if is_as_text else _json_value(node)


_cached_follow_json_path = lru_cache(maxsize=64)(_follow_json_path)
_MAX_INDEX_DIGITS = 9


def _json_member(node: object, key: str) -> object:
    if not key.isdigit():
        return node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, list) or len(key) > _MAX_INDEX_DIGITS or int(key) >= len(node):
        return None
    return node[int(key)]


def _json_value(node: object) -> SqliteValue:
    match node:
        case None:
            return None
        case bool():
            return int(node)
        case _NumberToken():
            return parse_numeric(node)
        case str():
            return node
        case _:
            return _compact_json(node)


def _json_as_text(node: object) -> SqliteValue:
    match node:
        case bool():
            return str(int(node))
        case _NumberToken():
            return _json_number_text(node)
        case _:
            return _json_value(node)


def _json_number_text(digits: str) -> str:
    """Return a number without a point as it is, if SQLite has it as an integer."""
    if "." not in digits and -INT64_END < parse_numeric(digits) < INT64_END:
        return digits
    return float_text(parse_double(digits))


def _compact_json(node: object) -> str:
    match node:
        case _NumberToken():
            return node
        case dict():
            members = (f"{_json_string(name)}:{_compact_json(item)}" for name, item in node.items())
            return "{" + ",".join(members) + "}"
        case list():
            return "[" + ",".join(map(_compact_json, node)) + "]"
        case _:
            return json.dumps(node, ensure_ascii=False)
