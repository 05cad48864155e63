"""Compiles an operand to functions that read its value from a row image and arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias, TypeVar

from pgrealtime.catalog.model import Type, TypeKind
from pgrealtime.changes import Row
from pgrealtime.collections.model import Field, FieldKind
from pgrealtime.rules.language.comparison import (
    Affinity,
    traits,
)
from pgrealtime.rules.language.parameter_values import to_sql_value
from pgrealtime.rules.language.parameters import (
    CallerColumn,
    LiteralParameter,
    Parameter,
    ParameterClass,
    SqlForm,
)
from pgrealtime.rules.language.predicate import (
    CallerRow,
    EachTerm,
    EachValue,
    FieldValue,
    JsonValue,
    Keyword,
    Modifier,
    ParameterTerm,
    RowPath,
    SecretTerm,
    Term,
)
from pgrealtime.rules.language.sqlite_values import (
    INT64_END,
    PASSWORD_HASH_PREFIX,
    Scalar,
    ascii_lower,
    exact_number,
)
from pgrealtime.rules.memory.compare import (
    WORK_BUDGET,
    SqliteValue,
    UndecidedError,
    float_text,
    is_blank,
    nearest_double,
    number_if_numeric,
    number_text,
    parse_numeric,
    trim_numeric_text,
)
from pgrealtime.text_forms import Element, parse_array

Arguments: TypeAlias = Sequence[Scalar]
"""The values of a condition's parameters, literals of a rule aside, in the order given."""


ValueReader: TypeAlias = Callable[[Row, Arguments, "ItemCombination"], SqliteValue]


ItemCombination: TypeAlias = tuple[str | None, ...]
"""The item of each list that the moment's combination is about."""


ItemsReader: TypeAlias = Callable[[Row, Arguments], Sequence[str | None]]


_ColumnReader: TypeAlias = Callable[[Row, Arguments], str | None]
"""Reads a column's text form, of the judged row or of the subscriber's own."""


MAX_SHARED_LISTS = 8
"""Lists whose items the comparisons of one condition may share."""


class NotInProcessError(Exception):
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


def is_caller_row(path: RowPath) -> bool:
    """Return whether the path is the caller's own row, without a join."""
    return isinstance(path.root, CallerRow) and not path.steps


@dataclass(frozen=True, slots=True)
class ListScope:
    """The lists that a condition's leaves share the items of."""

    context: CompileContext
    list_readers: dict[RowPath, ItemsReader]
    first_item_index: int = 0

    def item_index(self, path: RowPath, read: ItemsReader) -> int:
        """Return which of the chosen items is one of that place's list."""
        self.list_readers.setdefault(path, read)
        return self.first_item_index + list(self.list_readers).index(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOperand:
    """An operand, as functions that read its value and its text."""

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


def _text_operand(rank: Affinity, read: ValueReader) -> MemoryOperand:
    return MemoryOperand(affinity=rank, read_value=read, read_text=read, only_type=str)


def _constant_reader(value: SqliteValue) -> ValueReader:
    return lambda _row, _args, _chosen: value


EMPTY_TEXT = _text_operand(Affinity.NONE, _constant_reader(""))


def compile_operand(term: Term, scope: ListScope) -> MemoryOperand:
    """Return the operand compiled.

    Raises:
        NotInProcessError: Only PostgreSQL can evaluate it.
    """
    match term:
        case ParameterTerm(parameter):
            return _parameter_operand(parameter, scope.context)
        case Keyword(flag):
            if flag is None:
                return _text_operand(Affinity.NONE, _constant_reader(None))
            number, text = _constant_reader(int(flag)), _constant_reader(str(int(flag)))
            return MemoryOperand(
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
            if at >= MAX_SHARED_LISTS and scope.first_item_index == 0:
                raise NotInProcessError
            if term.kind is FieldKind.NUMBER:
                return _number_operand(*(_item_reader(at, convert) for convert in (int, str)))
            return _text_operand(Affinity.NONE, _item_reader(at, str))
        case _:
            raise NotInProcessError


def _item_reader(index: int, convert: Callable[[str], SqliteValue]) -> ValueReader:
    def read(_row: Row, _args: Arguments, chosen: ItemCombination) -> SqliteValue:
        text = chosen[index]
        return None if text is None else _convert_text_form(convert, text)

    return read


def make_comparable(
    one: MemoryOperand, other: MemoryOperand
) -> tuple[MemoryOperand, MemoryOperand]:
    """Return both operands with SQLite's affinities applied and numbers of one precision."""
    return align_precision(*_apply_affinity(one, other))


def _apply_affinity(
    one: MemoryOperand, other: MemoryOperand
) -> tuple[MemoryOperand, MemoryOperand]:
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


def _convert_to_number(operand: MemoryOperand) -> MemoryOperand:
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


def _convert_to_text(operand: MemoryOperand) -> MemoryOperand:
    return replace(operand, read_value=operand.read_text, only_type=str, is_double=False)


def align_precision(
    one: MemoryOperand, other: MemoryOperand
) -> tuple[MemoryOperand, MemoryOperand]:
    """Return both with numbers that can be compared: exact ones, unless one is a double."""
    if one.is_double is other.is_double:
        return one, other
    return _convert_to_double(one), _convert_to_double(other)


def _convert_to_double(operand: MemoryOperand) -> MemoryOperand:
    if operand.is_double or operand.only_type is str:
        return operand
    read = operand.read_value
    return replace(
        operand,
        read_value=lambda row, args, chosen: nearest_double(read(row, args, chosen)),
        is_double=True,
    )


def _parameter_operand(parameter: Parameter, context: CompileContext) -> MemoryOperand:
    shape = context.parameter_classes[parameter]
    if shape is ParameterClass.ABSENT:
        return _text_operand(Affinity.NONE, _constant_reader(None))
    shown = argument_reader(parameter, SqlForm.TEXT, context)
    number = argument_reader(parameter, SqlForm.NUMBER, context)
    if shape.is_number:
        return MemoryOperand(
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


def argument_reader(parameter: Parameter, form: SqlForm, context: CompileContext) -> ValueReader:
    """Return the function that reads a parameter's value in a form."""
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
        NotInProcessError: It does.
    """

    def __init__(self, path: RowPath, context: CompileContext) -> None:
        self._is_scope_row = path.is_scope_row
        self._argument_index = context.argument_index
        if not (
            self._is_scope_row
            or (is_caller_row(path) and CallerColumn("") in context.argument_index)
        ):
            raise NotInProcessError

    def column_reader(self, field_: Field) -> _ColumnReader:
        """Return what reads the field's column."""
        if field_.column is None:
            raise NotInProcessError
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

        def read(row: Row, args: Arguments, _chosen: ItemCombination) -> SqliteValue:
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


def _field_with_modifier(cells: _ColumnReaders, field_: Field, modifier: Modifier) -> MemoryOperand:
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
    def lowered(row: Row, args: Arguments, chosen: ItemCombination) -> SqliteValue:
        text = shown(row, args, chosen)
        return ascii_lower(text) if isinstance(text, str) else None

    return lowered


def _whole_field(cells: _ColumnReaders, field_: Field) -> MemoryOperand:
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
            raise NotInProcessError


def _parse_bool(text: str) -> int:
    return int(text.startswith("t"))


def _number_operand(read: ValueReader, shown: ValueReader) -> MemoryOperand:
    return MemoryOperand(
        affinity=Affinity.NUMERIC, read_value=read, read_text=shown, only_type=float
    )


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


def _flatten(items: Sequence[Element]) -> Iterator[str | None]:
    for item in items:
        if isinstance(item, list):
            yield from _flatten(item)
        else:
            yield item


def _length_operand(cells: _ColumnReaders, field_: Field) -> MemoryOperand:
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
    return MemoryOperand(
        affinity=Affinity.NONE, read_value=read, read_text=as_text, only_type=float
    )


def _delimiter(field_: Field) -> str:
    element = field_.type.base.element
    if element is None:
        raise NotInProcessError
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


def _items_reader(path: RowPath, context: CompileContext) -> ItemsReader:
    """Return what reads the values of a list of a row at hand; NULL where there are none."""
    match path.steps:
        case (EachValue(field_),):
            element = field_.type.base.element
            if element is None or not _has_cast_like_output(element):
                raise NotInProcessError
            cell = _ColumnReaders(RowPath(path.root), context).column_reader(field_)
        case _:
            raise NotInProcessError

    def read(row: Row, args: Arguments) -> Sequence[str | None]:
        text = cell(row, args)
        return (() if text is None else _convert_text_form(_array_items, text)) or (None,)

    return read


def _list_text_converter(field_: Field) -> Callable[[str], SqliteValue]:
    """Return what makes of an array the JSON text that ``array_to_json`` makes."""
    element = field_.type.base.element
    if element is None:
        raise NotInProcessError
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
            raise NotInProcessError

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
) -> MemoryOperand:
    if field_.kind is not FieldKind.JSON or field_.type.base.name != "jsonb":
        raise NotInProcessError
    cell, path = cells.column_reader(field_), tuple(keys)

    def shown(row: Row, args: Arguments, _chosen: ItemCombination) -> SqliteValue:
        return _json_at_path(cell(row, args), path, is_as_text=True)

    if is_lower:
        return _text_operand(Affinity.NONE, _lower_reader(shown))

    def read(row: Row, args: Arguments, _chosen: ItemCombination) -> SqliteValue:
        return _json_at_path(cell(row, args), path, is_as_text=False)

    return MemoryOperand(affinity=Affinity.NONE, read_value=read, read_text=shown, only_type=None)


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
