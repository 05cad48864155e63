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
from pgrealtime.rules.language.comparison import Equality, Rank, Traits, equality, traits
from pgrealtime.rules.language.parameters import (
    AuthColumn,
    Form,
    Literal,
    Macro,
    Parameter,
    RequestValue,
    Scalar,
    Shape,
    number_of,
    render,
)
from pgrealtime.rules.language.predicate import (
    AuthRow,
    Comparison,
    Condition,
    Conjunction,
    Constant,
    Disjunction,
    FieldValue,
    Here,
    Hidden,
    Item,
    Items,
    JsonValue,
    Keyword,
    Nested,
    Part,
    Place,
    Term,
    is_double,
    is_multiple,
)
from pgrealtime.rules.language.syntax import Op
from pgrealtime.rules.memory.compare import (
    WORK,
    Comparable,
    UndecidedError,
    as_double,
    equal,
    exact,
    exact_text,
    float_text,
    is_blank,
    like,
    lower,
    number_text,
    ordered,
    same,
    to_number,
)
from pgrealtime.rules.sql.operands import END_OF_INTEGERS, HASH
from pgrealtime.text_forms import Element, parse_array

Args: TypeAlias = Sequence[Scalar]
"""The values of a condition's parameters, literals of a rule aside, in the order given."""
Test: TypeAlias = Callable[[Row, Args], bool]
"""Whether the condition is true. A row must have the columns that are read."""
Read: TypeAlias = Callable[[Row, Args, "_Chosen"], Comparable]

_Chosen: TypeAlias = tuple[str | None, ...]
"""The item of each list that the moment's combination is about."""
_Leaf: TypeAlias = Callable[[Row, Args, _Chosen], bool | None]
_List: TypeAlias = Callable[[Row, Args], Sequence[str | None]]
_Cell: TypeAlias = Callable[[Row, Args], str | None]
"""Reads a column's text form, of the judged row or of the subscriber's own."""


class _NotHereError(Exception):
    """The construct is not decided in the process; ends the compiling of a condition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What the compiling of a condition may know beforehand."""

    shapes: Mapping[Parameter, Shape]
    """The class of each parameter."""
    order: Mapping[Parameter | AuthColumn, int]
    """Where its value is among the arguments; literals of the text need none."""
    is_utf8: bool = True
    """Whether the database's bytes are in the order of code points."""


def compiled(condition: Condition, ground: Ground) -> Test | None:
    """Return what decides a condition about the judged row, or None if only Postgres can."""
    lists: dict[Place, _List] = {}
    checks: list[_ForAll] = []
    try:
        where = _condition(condition, _Scope(ground, lists, checks))
    except _NotHereError:
        return None
    if not lists and not checks:
        return lambda row, args: where(row, args, ()) is True
    readers = tuple(lists.values())
    size = sum(_PER_LEAF for _ in _terms(condition)) / 2

    def exists(row: Row, args: Args) -> bool:
        for check in checks:
            check.verdict = None
        for chosen in _combinations(readers, row, args):
            WORK.spend(size)
            if where(row, args, chosen) is True:
                return True
        return False

    return exists


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An equality or an order between what a row has and what a subscriber has.

    Values of both sides are hashable and stand in Python's ``==`` and ``<`` as they do in SQL.
    """

    identity: Hashable
    """Equal for keys whose ``of_row`` is the same."""
    of_row: Callable[[Row], Sequence[Comparable]]
    """The row's values, of which one must fit; None fits nothing."""
    of_args: Callable[[Args], Comparable]
    """The subscriber's."""
    op: Op
    """``row op args``: EQ, NE, or an order."""
    is_exact: bool
    """The comparison is true if and only if one fits; else it is not true if none does."""
    columns: frozenset[str]


def key(comparison: Comparison, ground: Ground) -> Key | None:
    """Return how an index may serve the comparison, or None if it can't."""
    op, left, right = comparison.op, comparison.left, comparison.right
    if op in {Op.LIKE, Op.NOT_LIKE}:
        return None
    if _is_args(left, ground) and not _is_args(right, ground):
        op, left, right = _TURNED.get(op, op), right, left
    place = _place(left)
    if place is None or not isinstance(place.origin, Here):
        return None
    if not _is_args(right, ground) or is_flag(right):
        return None
    multiple = is_multiple(left)
    if op is not Op.EQ and (multiple or not isinstance(right, Constant)):
        return None
    lists: dict[Place, _List] = {}
    scope = _Scope(ground, lists)
    try:
        made = _key_sides(op, *(_Side(t, scope, traits(t, ground.shapes)) for t in (left, right)))
    except _NotHereError:
        return None
    if made is None or len(lists) > 1:
        return None
    row_side, args_side, conversion = made
    return Key(
        identity=(left, conversion),
        of_row=_row_reader(row_side, list(lists.values())),
        of_args=lambda args: _as_key(args_side({}, args, ())),
        op=op,
        is_exact=isinstance(right, Constant) and (comparison.is_any or not multiple),
        columns=columns_read(comparison),
    )


_TURNED = {Op.LT: Op.GT, Op.LE: Op.GE, Op.GT: Op.LT, Op.GE: Op.LE}


def _row_reader(read: Read, lists: Sequence[_List]) -> Callable[[Row], Sequence[Comparable]]:
    if not lists:
        return lambda row: (_as_key(read(row, (), ())),)
    (items,) = lists
    return lambda row: [_as_key(read(row, (), (item,))) for item in items(row, ())]


def _key_sides(op: Op, left: _Side, right: _Side) -> tuple[Read, Read, str] | None:
    """Return what reads either side so that equal values are equal, and the way it does."""
    case = equality(left.traits, right.traits)
    if op in {Op.EQ, Op.NE} and case is Equality.COALESCED:
        own = _of(left)
        one, other = _alike(own, _of(right))
        return _filled(one), _filled(other), "filled" + _doubled(own, one)
    is_equality = op in {Op.EQ, Op.NE}
    if is_equality and not right.traits.is_filled:
        return None
    own = _of(left)
    one, other = _converted(own, _of(right))
    if one.holds is not other.holds and not (is_equality and one.holds is None):
        return None
    if not is_equality and one.holds is str and not left.scope.ground.is_utf8:
        return None
    is_kept = one.read is own.read
    conversion = "as it is" if is_kept else "shown" if one.holds is str else "number"
    return one.read, other.read, conversion + _doubled(own, one)


def _doubled(own: _Operand, read: _Operand) -> str:
    return " as double" if read.is_double and not own.is_double else ""


def _is_args(term: Term, ground: Ground) -> bool:
    """Whether it depends on the subscriber alone."""
    match term:
        case Constant(parameter):
            return parameter in ground.order and not isinstance(parameter, Macro)
        case FieldValue(place=place) | JsonValue(place=place):
            return _is_auth(place)
        case _:
            return False


def _is_auth(place: Place) -> bool:
    return isinstance(place.origin, AuthRow) and not place.steps


def _as_key(value: Comparable) -> Comparable:
    return _NAN if value != value else value  # noqa: PLR0124 (NaN)


_NAN = float("nan")
"""Equal to itself in a dictionary, as in Postgres: the same object."""


def columns_read(condition: Condition) -> frozenset[str]:
    """Return the columns of the judged row that the condition may read, as ``Lowered`` has them."""
    found: set[str] = set()
    for term in _terms(condition):
        place = _place(term)
        field_ = getattr(term, "field", None)
        if place is None or not isinstance(place.origin, Here):
            continue
        if place.is_here and isinstance(field_, Field) and field_.column is not None:
            found.add(field_.column.name)
        if place.steps and isinstance(place.steps[0], Items):
            column = place.steps[0].field.column
            if column is not None:
                found.add(column.name)
    return frozenset(found)


def _terms(condition: Condition) -> Iterator[Term]:
    match condition:
        case Comparison(left, _, _, right):
            yield from (left, right)
        case Conjunction(parts) | Disjunction(parts):
            for part in parts:
                yield from _terms(part)
        case Nested():
            return


def _place(term: Term) -> Place | None:
    match term:
        case FieldValue(place=place) | Item(place) | JsonValue(place=place) | Hidden(place=place):
            return place
        case _:
            return None


# --- conditions


@dataclass(frozen=True, slots=True)
class _Scope:
    """The lists that a condition's leaves share the items of."""

    ground: Ground
    lists: dict[Place, _List]
    checks: list[_ForAll] = field(default_factory=list)
    """What is searched for counter-examples."""
    offset: int = 0

    def item(self, place: Place, read: _List) -> int:
        """Return which of the chosen items is one of that place's list."""
        self.lists.setdefault(place, read)
        return self.offset + list(self.lists).index(place)


def _condition(condition: Condition, scope: _Scope) -> _Leaf:
    match condition:
        case Comparison():
            return _comparison(condition, scope)
        case Conjunction(parts):
            leaves = [_condition(part, scope) for part in parts]
            return lambda row, args, chosen: all(leaf(row, args, chosen) is True for leaf in leaves)
        case Disjunction(parts):
            leaves = [_condition(part, scope) for part in parts]
            return lambda row, args, chosen: any(leaf(row, args, chosen) is True for leaf in leaves)
        case Nested():
            raise _NotHereError


@dataclass(frozen=True, slots=True)
class _Side:
    term: Term
    scope: _Scope
    traits: Traits


def _comparison(comparison: Comparison, scope: _Scope) -> _Leaf:
    shapes = scope.ground.shapes
    left, right = (
        _Side(term, scope, traits(term, shapes)) for term in (comparison.left, comparison.right)
    )
    leaf = _leaf(comparison.op, left, right)
    if comparison.is_any or not (is_multiple(left.term) or is_multiple(right.term)):
        return leaf
    return _for_all(comparison.op, left, right, leaf)


def _for_all(op: Op, left: _Side, right: _Side, leaf: _Leaf) -> _Leaf:
    """Add to a leaf that no item, or no pair of two, makes it false.

    Each side that is searched has its items to itself; the leaf before speaks of the shared ones.
    """
    # Far beyond the shared ones, whose number isn't known before everything is compiled.
    fresh: list[dict[Place, _List]] = []
    sides: list[_Side] = []
    for side in (left, right):
        if is_multiple(side.term):
            lists: dict[Place, _List] = {}
            scope = _Scope(side.scope.ground, lists, [], offset=_FRESH + len(fresh))
            fresh.append(lists)
            sides.append(replace(side, scope=scope))
        else:
            sides.append(replace(side, traits=side.traits.opposed()))
    counter = _leaf(op, *sides)
    check = _ForAll(counter, [read for lists in fresh for read in lists.values()])
    left.scope.checks.append(check)
    return lambda row, args, chosen: leaf(row, args, chosen) is True and check.holds(row, args)


class _ForAll:
    """That no item, or no pair of two, makes a leaf false.

    That doesn't depend on the shared items: it is found out once for all their combinations.

    Attributes:
        verdict: Of the evaluation under way; None if it isn't known yet.
    """

    __slots__ = ("_counter", "_readers", "verdict")

    def __init__(self, counter: _Leaf, readers: Sequence[_List]) -> None:
        self._counter = counter
        self._readers = readers
        self.verdict: bool | None = None

    def holds(self, row: Row, args: Args) -> bool:
        """Whether there is no counter-example."""
        if self.verdict is None:
            combinations = _combinations(self._readers, row, args)
            self.verdict = not any(self._is_counter(row, args, items) for items in combinations)
        return self.verdict

    def _is_counter(self, row: Row, args: Args, items: _Chosen) -> bool:
        WORK.spend(_PER_LEAF)
        return self._counter(row, args, _NOT_SHARED + items) is False


_FRESH = 8
"""Lists that one condition may share."""
_NOT_SHARED: _Chosen = (None,) * _FRESH
_PER_LEAF = 0.5
"""What it costs to compare two values, in units of ``WORK``."""
_MANY = 10_000
"""Combinations of items that are gone through here; more of them take Postgres less time."""


def _combinations(readers: Sequence[_List], row: Row, args: Args) -> Iterator[_Chosen]:
    lists = [read(row, args) for read in readers]
    if prod(map(len, lists)) > _MANY:
        raise UndecidedError
    return product(*lists)


def _leaf(op: Op, left: _Side, right: _Side) -> _Leaf:
    match op:
        case Op.LIKE | Op.NOT_LIKE:
            return _like(op, left, right)
        case Op.EQ | Op.NE:
            return _equality(op, left, right)
        case _:
            return _order(op, left, right)


def _order(op: Op, left: _Side, right: _Side) -> _Leaf:
    one, other = _converted(_of(left), _of(right))
    if not left.scope.ground.is_utf8 and float not in {one.holds, other.holds}:
        raise _NotHereError
    a, b = one.read, other.read
    return lambda row, args, chosen: ordered(op, a(row, args, chosen), b(row, args, chosen))


def _equality(op: Op, left: _Side, right: _Side) -> _Leaf:
    is_equal = op is Op.EQ
    case = equality(left.traits, right.traits)
    if is_flag(right.term) and case in {Equality.NULL_SAFE, Equality.PLAIN}:
        raise _NotHereError  # SQLite asks for truth there, a meaning of its own
    match case:
        case Equality.CONSTANT:
            return lambda _row, _args, _chosen: is_equal
        case Equality.EMPTY:
            blank = _of(right if left.traits.is_empty else left).read
            return lambda row, args, chosen: is_blank(blank(row, args, chosen)) is is_equal
        case Equality.COALESCED:
            one, other = _alike(_of(left), _of(right))
            return _compared(same, is_equal, _filled(one), _filled(other))
        case Equality.NULL_SAFE:
            one, other = _converted(_of(left), _of(right))
            return _compared(same, is_equal, one.read, other.read)
        case Equality.PLAIN:
            one, other = _converted(
                *(_EMPTY if side.traits.is_empty else _of(side) for side in (left, right))
            )
            return _compared(equal if is_equal else same, is_equal, one.read, other.read)


def is_flag(term: Term) -> bool:
    """Whether it is ``:isset``, which SQLite sees as the word TRUE or FALSE."""
    match term:
        case Constant(RequestValue(is_set=is_set)):
            return is_set
        case _:
            return False


def _compared(
    comparison: Callable[[Comparable, Comparable], bool | None],
    is_equal: bool,  # noqa: FBT001 (an operator or its opposite)
    a: Read,
    b: Read,
) -> _Leaf:
    if is_equal:
        return lambda row, args, chosen: comparison(a(row, args, chosen), b(row, args, chosen))
    return lambda row, args, chosen: not comparison(a(row, args, chosen), b(row, args, chosen))


def _filled(operand: _Operand) -> Read:
    read = operand.read

    def filled(row: Row, args: Args, chosen: _Chosen) -> Comparable:
        value = read(row, args, chosen)
        return "" if value is None else value

    return filled


def _like(op: Op, left: _Side, right: _Side) -> _Leaf:
    shown = _of(left).shown
    is_like = op is Op.LIKE
    if _shape(right) is Shape.DANGLING:
        return lambda row, args, chosen: None if shown(row, args, chosen) is None else not is_like
    made = _pattern(right)

    def matches(row: Row, args: Args, chosen: _Chosen) -> bool | None:
        text, pattern = shown(row, args, chosen), made(row, args, chosen)
        if text is None or pattern is None:
            return None
        assert isinstance(text, str)
        assert isinstance(pattern, str)
        return like(pattern)(text) is is_like

    return matches


def _shape(side: _Side) -> Shape | None:
    match side.term:
        case Constant(parameter):
            return side.scope.ground.shapes[parameter]
        case _:
            return None


def _pattern(side: _Side) -> Read:
    match side.term:
        case Constant(parameter):
            return _argument(parameter, Form.PATTERN, side.scope.ground)
        case _:
            shown = _of(side).shown

            def wrapped(row: Row, args: Args, chosen: _Chosen) -> Comparable:
                text = shown(row, args, chosen)
                return None if text is None else f"%{text}%"

            return wrapped


# --- operands


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operand:
    rank: Rank
    read: Read
    shown: Read
    """The same as text."""
    holds: type[str | float] | None
    """The only class of its values beside NULL; None if there are both."""
    is_double: bool = False
    """Its numbers are double precision, and what is compared with them becomes that too."""
    parameter: Parameter | None = None
    as_number: Read | None = None
    """Of a constant: the number, if it is a text that looks like one."""


def _of(side: _Side) -> _Operand:
    return replace(_operand(side.term, side.scope), is_double=is_double(side.term))


def _text(rank: Rank, read: Read) -> _Operand:
    return _Operand(rank=rank, read=read, shown=read, holds=str)


def _fixed(value: Comparable) -> Read:
    return lambda _row, _args, _chosen: value


_EMPTY = _text(Rank.NONE, _fixed(""))


def _operand(term: Term, scope: _Scope) -> _Operand:
    match term:
        case Constant(parameter):
            return _constant(parameter, scope.ground)
        case Keyword(flag):
            if flag is None:
                return _text(Rank.NONE, _fixed(None))
            number, text = _fixed(int(flag)), _fixed(str(int(flag)))
            return _Operand(rank=Rank.NONE, read=number, shown=text, holds=float)
        case FieldValue(place, field_, part):
            cells = _Cells(place, scope.ground)
            return replace(_part(cells, field_, part), rank=traits(term, {}).rank)
        case Hidden(place, part) if place.is_here:
            return _text(traits(term, {}).rank, _fixed(lower(HASH) if part is Part.LOWER else HASH))
        case JsonValue(place, field_, keys, is_lower):
            return _json(_Cells(place, scope.ground), field_, keys, is_lower=is_lower)
        case Item(place):
            at = scope.item(place, _items(place, scope.ground))
            if at >= _FRESH and scope.offset == 0:
                raise _NotHereError
            if term.kind is FieldKind.NUMBER:
                return _number(*(_of_item(at, convert) for convert in (int, str)))
            return _text(Rank.NONE, _of_item(at, str))
        case _:
            raise _NotHereError


def _of_item(at: int, convert: Callable[[str], Comparable]) -> Read:
    def read(_row: Row, _args: Args, chosen: _Chosen) -> Comparable:
        text = chosen[at]
        return None if text is None else _converted_text(convert, text)

    return read


def _converted(one: _Operand, other: _Operand) -> tuple[_Operand, _Operand]:
    return _alike(*_of_affinity(one, other))


def _of_affinity(one: _Operand, other: _Operand) -> tuple[_Operand, _Operand]:
    match one.rank, other.rank:
        case Rank.NUMERIC, Rank.NUMERIC:
            return one, other
        case Rank.NUMERIC, _:
            return one, _as_number(other)
        case _, Rank.NUMERIC:
            return _as_number(one), other
        case Rank.TEXT, Rank.NONE:
            return one, _as_text(other)
        case Rank.NONE, Rank.TEXT:
            return _as_text(one), other
        case _:
            return one, other


def _as_number(operand: _Operand) -> _Operand:
    if operand.holds is float:
        return operand
    if operand.parameter is not None:
        if operand.as_number is None:
            return operand
        return replace(operand, read=operand.as_number, holds=float)
    read = operand.read
    return replace(
        operand, read=lambda row, args, chosen: to_number(read(row, args, chosen)), holds=None
    )


def _as_text(operand: _Operand) -> _Operand:
    return replace(operand, read=operand.shown, holds=str, is_double=False)


def _alike(one: _Operand, other: _Operand) -> tuple[_Operand, _Operand]:
    """Return both with numbers that can be compared: exact ones, unless one is a double."""
    if one.is_double is other.is_double:
        return one, other
    return _as_double(one), _as_double(other)


def _as_double(operand: _Operand) -> _Operand:
    if operand.is_double or operand.holds is str:
        return operand
    read = operand.read
    return replace(
        operand, read=lambda row, args, chosen: as_double(read(row, args, chosen)), is_double=True
    )


# --- constants


def _constant(parameter: Parameter, ground: Ground) -> _Operand:
    shape = ground.shapes[parameter]
    if shape is Shape.ABSENT:
        return _text(Rank.NONE, _fixed(None))
    shown = _argument(parameter, Form.TEXT, ground)
    number = _argument(parameter, Form.NUMBER, ground)
    if shape.is_number:
        return _Operand(rank=Rank.NONE, read=number, shown=shown, holds=float, parameter=parameter)
    return replace(
        _text(Rank.NONE, shown),
        parameter=parameter,
        as_number=number if shape is Shape.NUMERIC else None,
    )


def _argument(parameter: Parameter, form: Form, ground: Ground) -> Read:
    if isinstance(parameter, Literal):
        if form is not Form.NUMBER:
            return _fixed(render(parameter.value, form))
        shape = ground.shapes[parameter]
        is_number = shape.is_number or shape is Shape.NUMERIC
        return _fixed(number_of(parameter.value) if is_number else None)
    at = ground.order[parameter]
    if form is Form.NUMBER:
        return lambda _row, args, _chosen: (
            None if (content := args[at]) is None else number_of(content)
        )
    if form is Form.TEXT:
        return lambda _row, args, _chosen: (
            value if isinstance(value := args[at], str) else render(value, form)
        )
    return lambda _row, args, _chosen: render(args[at], form)


# --- fields


_INTEGERS = frozenset({"int2", "int4", "int8"})
_FLOATS = frozenset({"float4", "float8"})
_PLAIN = frozenset({"text", "varchar", "uuid", *_INTEGERS})
"""Built-in types whose output is what a cast to text gives."""


def _is_plain(type_: Type) -> bool:
    base = type_.base
    return base.kind is TypeKind.ENUM or (base.schema == "pg_catalog" and base.name in _PLAIN)


class _Cells:
    """Reads columns of the row at a place, which needs no join.

    Raises:
        _NotHereError: It does.
    """

    def __init__(self, place: Place, ground: Ground) -> None:
        self._is_here = place.is_here
        self._order = ground.order
        if not (self._is_here or (_is_auth(place) and AuthColumn("") in ground.order)):
            raise _NotHereError

    def cell(self, field_: Field) -> _Cell:
        """Return what reads the field's column."""
        if field_.column is None:
            raise _NotHereError
        name = field_.column.name
        if self._is_here:
            return lambda row, _args: row[name]
        at = self._order[AuthColumn(name)]
        return lambda _row, args: _as_text_form(args[at])

    def read(
        self, field_: Field, convert: Callable[[str], Comparable], *, is_filled: bool = False
    ) -> Read:
        """Return what reads a value: the text form converted, or NULL.

        Args:
            field_: Whose column is read.
            convert: What makes a value of the text form.
            is_filled: NULL counts as the empty text if there is a row.
        """
        cell = self.cell(field_)
        present = None if self._is_here else self._order[AuthColumn("")]

        def read(row: Row, args: Args, _chosen: _Chosen) -> Comparable:
            text = cell(row, args)
            if text is not None:
                return _converted_text(convert, text)
            if not is_filled or (present is not None and args[present] is None):
                return None
            return ""

        return read


_T = TypeVar("_T")


def _converted_text(convert: Callable[[str], _T], text: str) -> _T:
    """Convert a text form that may be of another type: the catalogue can be behind the stream."""
    try:
        return convert(text)
    except (ValueError, IndexError, AssertionError):
        raise UndecidedError from None


def _as_text_form(value: Scalar) -> str | None:
    assert value is None or isinstance(value, str)
    return value


def _part(cells: _Cells, field_: Field, part: Part) -> _Operand:
    match part:
        case Part.WHOLE | Part.EACH:
            return _whole(cells, field_)
        case Part.LOWER:
            return _text(Rank.NONE, _lowered(_whole(cells, field_).shown))
        case Part.LENGTH:
            return _length(cells, field_)


def _lowered(shown: Read) -> Read:
    def lowered(row: Row, args: Args, chosen: _Chosen) -> Comparable:
        text = shown(row, args, chosen)
        return lower(text) if isinstance(text, str) else None

    return lowered


def _whole(cells: _Cells, field_: Field) -> _Operand:
    base = field_.type.base
    if field_.is_multiple:
        return _text(Rank.NUMERIC, cells.read(field_, _list_text(field_)))
    match field_.kind:
        case FieldKind.NUMBER if base.name in _INTEGERS:
            return _number(cells.read(field_, int), cells.read(field_, str))
        case FieldKind.NUMBER if base.name == "numeric":
            return _number(cells.read(field_, exact), cells.read(field_, exact_text))
        case FieldKind.NUMBER if base.name in _FLOATS:
            shown = cells.read(field_, lambda text: number_text(double(text)))
            return _number(cells.read(field_, double), shown)
        case FieldKind.BOOL:
            shown = cells.read(field_, lambda text: str(_flag(text)))
            return _number(cells.read(field_, _flag), shown)
        case FieldKind.DATE if base.name in _DATES:
            return _text(Rank.TEXT, cells.read(field_, _DATES[base.name], is_filled=True))
        case FieldKind.RELATION if _is_plain(base):
            return _text(Rank.TEXT, cells.read(field_, str, is_filled=True))
        case FieldKind.TEXT | FieldKind.FILE if _is_plain(base):
            return _text(Rank.TEXT, cells.read(field_, str))
        case _:
            raise _NotHereError


def _flag(text: str) -> int:
    return int(text.startswith("t"))


def _number(read: Read, shown: Read) -> _Operand:
    return _Operand(rank=Rank.NUMERIC, read=read, shown=shown, holds=float)


def double(text: str) -> float:
    """Return the double of a number's text form.

    Raises:
        UndecidedError: There is none: Postgres reports an error.
    """
    number = float(text)
    if number == 0 or number in _INFINITE:
        digits = text.partition("e")[0]
        if number != 0 and digits[-1].isdigit():
            raise UndecidedError
        if number == 0 and digits.strip("-0."):
            raise UndecidedError
    return number


_INFINITE = (float("inf"), float("-inf"))


_DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_MOMENT = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.(\d{1,6}))?", re.ASCII)


def _day(text: str) -> str:
    if _DAY.fullmatch(text) is None:
        raise UndecidedError
    return f"{text} 00:00:00.000Z"


def _timestamp(text: str) -> str:
    found = _MOMENT.fullmatch(text)
    if found is None:
        raise UndecidedError
    return f"{found[1]}.{found[2] or '':0<3.3}Z"


def _timestamptz(text: str) -> str:
    if not text.endswith("+00"):
        raise UndecidedError
    return _timestamp(text[:-3])


_DATES: Mapping[str, Callable[[str], str]] = {
    "date": _day,
    "timestamp": _timestamp,
    "timestamptz": _timestamptz,
}


# --- lists


def _flat(items: Sequence[Element]) -> Iterator[str | None]:
    for item in items:
        if isinstance(item, list):
            yield from _flat(item)
        else:
            yield item


def _length(cells: _Cells, field_: Field) -> _Operand:
    read: Read
    if field_.is_multiple:
        cell, delimiter = cells.cell(field_), _delimiter(field_)
        read = lambda row, args, _chosen: _count(  # noqa: E731 (one expression)
            cell(row, args), delimiter
        )
    else:
        shown = _whole(cells, field_).shown
        read = lambda row, args, chosen: int(  # noqa: E731 (likewise)
            not is_blank(shown(row, args, chosen))
        )
    as_text: Read = lambda row, args, chosen: str(read(row, args, chosen))  # noqa: E731
    return _Operand(rank=Rank.NONE, read=read, shown=as_text, holds=float)


def _delimiter(field_: Field) -> str:
    element = field_.type.base.element
    if element is None:
        raise _NotHereError
    return element.base.delimiter


def _count(text: str | None, delimiter: str) -> int:
    if text is None:
        return 0
    return len(_converted_text(lambda given: _items_of(given, delimiter), text))


def _items_of(text: str, delimiter: str = ",") -> tuple[str | None, ...]:
    """Return the items of an array; of a long one that is found out once for many filters."""
    if len(text) < _LONG:
        return tuple(_flat(parse_array(text, delimiter)))
    WORK.spend(len(text) / 512)
    return _items_before(text, delimiter)


_LONG = 128
"""Characters from which on it is worth keeping what was made of a text."""


@lru_cache(maxsize=16)
def _items_before(text: str, delimiter: str) -> tuple[str | None, ...]:
    return tuple(_flat(parse_array(text, delimiter)))


def _items(place: Place, ground: Ground) -> _List:
    """Return what reads the values of a list of a row at hand; NULL where there are none."""
    match place.steps:
        case (Items(field_),):
            element = field_.type.base.element
            if element is None or not _is_plain(element):
                raise _NotHereError
            cell = _Cells(Place(place.origin), ground).cell(field_)
        case _:
            raise _NotHereError

    def read(row: Row, args: Args) -> Sequence[str | None]:
        text = cell(row, args)
        return (() if text is None else _converted_text(_items_of, text)) or (None,)

    return read


def _list_text(field_: Field) -> Callable[[str], Comparable]:
    """Return what makes of an array the JSON text that ``array_to_json`` makes."""
    element = field_.type.base.element
    if element is None:
        raise _NotHereError
    show: Callable[[str], str]
    match field_.kind, element.base.name:
        case FieldKind.BOOL, _:
            show = lambda text: "true" if text.startswith("t") else "false"  # noqa: E731
        case FieldKind.NUMBER, name if name in _INTEGERS:
            show = str
        case ((FieldKind.TEXT | FieldKind.RELATION | FieldKind.FILE), _) if _is_plain(element):
            show = _json_string
        case _:
            raise _NotHereError

    def dump(items: Sequence[Element]) -> str:
        shown = (
            dump(item) if isinstance(item, list) else "null" if item is None else show(item)
            for item in items
        )
        return f"[{','.join(shown)}]"

    dumped = lru_cache(maxsize=4)(lambda text: dump(parse_array(text)))

    def shown(text: str) -> str:
        WORK.spend(len(text) / 512)
        return dumped(text)

    return shown


def _json_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# --- json


class _Digits(str):
    """A number of a JSON text, as written there."""

    __slots__ = ()


@lru_cache(maxsize=64)
def _parsed(text: str) -> object:
    """Several comparisons look at one document."""
    try:
        return json.loads(text, parse_int=_Digits, parse_float=_Digits)
    except (ValueError, RecursionError):
        raise UndecidedError from None


def _json(cells: _Cells, field_: Field, keys: Sequence[str], *, is_lower: bool) -> _Operand:
    if field_.kind is not FieldKind.JSON or field_.type.base.name != "jsonb":
        raise _NotHereError
    cell, path = cells.cell(field_), tuple(keys)

    def shown(row: Row, args: Args, _chosen: _Chosen) -> Comparable:
        return _of_json(cell(row, args), path, is_shown=True)

    if is_lower:
        return _text(Rank.NONE, _lowered(shown))

    def read(row: Row, args: Args, _chosen: _Chosen) -> Comparable:
        return _of_json(cell(row, args), path, is_shown=False)

    return _Operand(rank=Rank.NONE, read=read, shown=shown, holds=None)


def _of_json(text: str | None, path: tuple[str, ...], *, is_shown: bool) -> Comparable:
    """Return what is at the path; of a long document that is found out once for many filters."""
    if text is None:
        return None
    if len(text) < _LONG:
        return _reached(text, path, is_shown)
    WORK.spend(len(text) / 512)
    return _reached_before(text, path, is_shown)


def _reached(text: str, path: tuple[str, ...], is_shown: bool) -> Comparable:  # noqa: FBT001 (cached)
    node = _parsed(text)
    for key in path:
        node = _member(node, key)
    return _json_shown(node) if is_shown else _json_value(node)


_reached_before = lru_cache(maxsize=64)(_reached)
_LONGEST_INDEX = 9


def _member(node: object, key: str) -> object:
    if not key.isdigit():
        return node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, list) or len(key) > _LONGEST_INDEX or int(key) >= len(node):
        return None
    return node[int(key)]


def _json_value(node: object) -> Comparable:
    match node:
        case None:
            return None
        case bool():
            return int(node)
        case _Digits():
            return exact(node)
        case str():
            return node
        case _:
            return _compact(node)


def _json_shown(node: object) -> Comparable:
    match node:
        case bool():
            return str(int(node))
        case _Digits():
            return _number_shown(node)
        case _:
            return _json_value(node)


def _number_shown(digits: str) -> str:
    """Return a number without a point as it is, if SQLite has it as an integer."""
    if "." not in digits and -END_OF_INTEGERS < exact(digits) < END_OF_INTEGERS:
        return digits
    return float_text(double(digits))


def _compact(node: object) -> str:
    match node:
        case _Digits():
            return node
        case dict():
            members = (f"{_json_string(name)}:{_compact(item)}" for name, item in node.items())
            return "{" + ",".join(members) + "}"
        case list():
            return "[" + ",".join(map(_compact, node)) + "]"
        case _:
            return json.dumps(node, ensure_ascii=False)
