"""Compiles an operand to functions that read its value from a row image and arguments.

Called by ``conditions`` and ``engine.index_keys``, once per test. Only operands of the row image,
of the caller's row and of parameters are compiled, and only of types whose SQL value is exact here.
Any other raises ``NotInProcessError``, and PostgreSQL evaluates the condition.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Self, TypeAlias, TypeVar

from pgrealtime.catalog.model import Type, TypeKind
from pgrealtime.changes import Row
from pgrealtime.collections.model import Field, FieldKind
from pgrealtime.rules.language import predicate, sqlite_values
from pgrealtime.rules.language.comparison import Conversion, PlannedOperand
from pgrealtime.rules.language.parameters import (
    CallerColumn,
    LiteralParameter,
    Parameter,
    ParameterClass,
    SqlForm,
    to_sql_value,
)
from pgrealtime.rules.language.sqlite_values import Scalar
from pgrealtime.rules.memory import compare, text_values
from pgrealtime.rules.memory.compare import SqliteValue
from pgrealtime.rules.memory.text_values import array_items, json_at_path

Arguments: TypeAlias = Sequence[Scalar]
"""The values of a condition's parameters but literals, ordered as in ``argument_index``."""
ItemCombination: TypeAlias = tuple[str | None, ...]
"""One item of each list that is read, in text form."""
ValueReader: TypeAlias = Callable[[Row, Arguments, ItemCombination], SqliteValue]
ItemsReader: TypeAlias = Callable[[Row, Arguments], Sequence[str | None]]
_ColumnReader: TypeAlias = Callable[[Row, Arguments], str | None]
"""Reads a column's text form, of the row image or of the caller's row."""
_Converter: TypeAlias = Callable[[str], SqliteValue]
"""Converts a text form."""

MAX_SHARED_LISTS = 8
"""Lists whose items the comparisons of one condition may share."""


class NotInProcessError(Exception):
    """The condition has an operand that only PostgreSQL can evaluate; ends its compilation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileContext:
    """What is known of a condition when it is compiled."""

    parameter_classes: Mapping[Parameter, ParameterClass]
    argument_index: Mapping[Parameter | CallerColumn, int]
    """Where a parameter's value is among the arguments; literals have none."""
    is_utf8: bool = True
    """Whether the database's encoding is UTF-8, whose bytes have the order of code points."""


_T = TypeVar("_T")


def _convert_text_form(convert: Callable[[str], _T], text: str) -> _T:
    try:
        return convert(text)
    except (ValueError, IndexError, AssertionError):  # it is of another type
        raise compare.UndecidedError from None


@dataclass(frozen=True, slots=True)
class ListScope:
    """The lists whose items the comparisons of a condition share, as joins are shared in SQL."""

    compile_context: CompileContext
    list_readers: dict[predicate.RowPath, ItemsReader] = field(default_factory=dict)
    first_item_index: int = 0

    def item_index(self, path: predicate.RowPath, read: ItemsReader) -> int:
        """Return where a combination of items holds the item of the path's list."""
        self.list_readers.setdefault(path, read)
        return self.first_item_index + list(self.list_readers).index(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOperand:
    """An operand, as functions that read its value and its text."""

    read_value: ValueReader
    read_text: ValueReader
    """The same as text."""
    only_type: type[str | float] | None
    """The only type of its values beside NULL; None if there are both."""
    parameter: Parameter | None = None
    read_number: ValueReader | None = None
    """Of a constant: the number, if it is a text that looks like one."""

    @classmethod
    def of_text(cls, read: ValueReader) -> Self:
        """Return an operand that is a text in every row."""
        return cls(read_value=read, read_text=read, only_type=str)

    @classmethod
    def of_number(cls, read_value: ValueReader, read_text: ValueReader) -> Self:
        """Return an operand that is a number in every row."""
        return cls(read_value=read_value, read_text=read_text, only_type=float)


def constant_reader(value: SqliteValue) -> ValueReader:
    """Return a function that reads the same value from any row."""
    return lambda _row, _args, _items: value


def empty_text_for_null(read: ValueReader) -> ValueReader:
    """Return a function that reads '' where the value is NULL."""
    return lambda row, args, items: "" if (value := read(row, args, items)) is None else value


def compile_planned(planned: PlannedOperand, scope: ListScope) -> MemoryOperand:
    """Return one side of a comparison compiled, with the conversions that are planned.

    Raises:
        NotInProcessError: Only PostgreSQL can evaluate it.
    """
    if planned.is_empty_text:
        return MemoryOperand.of_text(constant_reader(""))
    operand = compile_operand(planned.term, scope)
    if planned.is_json_text:
        assert operand.parameter is not None
        json_reader = argument_reader(operand.parameter, SqlForm.JSON, scope.compile_context)
        operand = replace(operand, read_value=json_reader)
    match planned.conversion:
        case Conversion.NUMBER:
            operand = _convert_to_number(operand)
        case Conversion.TEXT:
            operand = replace(operand, read_value=operand.read_text, only_type=str)
        case Conversion.NONE:
            pass
    if planned.is_made_double and operand.only_type is not str:
        return replace(operand, read_value=_converted(operand.read_value, compare.nearest_double))
    return operand


def compile_operand(term: predicate.Term, scope: ListScope) -> MemoryOperand:
    """Return the operand compiled, without conversions. Raises as ``compile_planned``."""
    match term:
        case predicate.ParameterTerm(parameter):
            return _parameter_operand(parameter, scope.compile_context)
        case predicate.Keyword(flag):
            if flag is None:
                return MemoryOperand.of_text(constant_reader(None))
            number = int(flag)
            return MemoryOperand.of_number(constant_reader(number), constant_reader(str(number)))
        case predicate.FieldValue(path, field_, modifier):
            return _field_operand(_FieldColumn(path, field_, scope.compile_context), modifier)
        case predicate.SecretTerm(path, _) if path.is_scope_row:  # lower case already
            return MemoryOperand.of_text(constant_reader(sqlite_values.PASSWORD_HASH_PREFIX))
        case predicate.JsonValue(path, field_, keys, is_lower):
            column = _FieldColumn(path, field_, scope.compile_context)
            return _json_operand(column, keys, is_lower=is_lower)
        case predicate.EachTerm(path):
            index = scope.item_index(path, _items_reader(path, scope.compile_context))
            if index >= MAX_SHARED_LISTS and scope.first_item_index == 0:
                raise NotInProcessError
            if term.kind is FieldKind.NUMBER:
                return MemoryOperand.of_number(_item_reader(index, int), _item_reader(index, str))
            return MemoryOperand.of_text(_item_reader(index, str))
        case _:
            raise NotInProcessError


def _item_reader(index: int, convert: _Converter) -> ValueReader:
    return lambda _row, _args, items: (
        None if (text := items[index]) is None else _convert_text_form(convert, text)
    )


def _convert_to_number(operand: MemoryOperand) -> MemoryOperand:
    if operand.read_number is not None:
        return replace(operand, read_value=operand.read_number, only_type=float)
    if operand.only_type is float or operand.parameter is not None:
        return operand
    read_value = _converted(operand.read_value, compare.number_if_numeric)
    return replace(operand, read_value=read_value, only_type=None)


def _converted(read: ValueReader, convert: Callable[[SqliteValue], SqliteValue]) -> ValueReader:
    return lambda row, args, items: convert(read(row, args, items))


def _parameter_operand(parameter: Parameter, context: CompileContext) -> MemoryOperand:
    parameter_class = context.parameter_classes[parameter]
    if parameter_class is ParameterClass.ABSENT:
        return MemoryOperand.of_text(constant_reader(None))
    text = argument_reader(parameter, SqlForm.TEXT, context)
    number = argument_reader(parameter, SqlForm.NUMBER, context)
    if parameter_class.is_number:
        return replace(MemoryOperand.of_number(number, text), parameter=parameter)
    read_number = number if parameter_class is ParameterClass.NUMERIC_TEXT else None
    return replace(MemoryOperand.of_text(text), parameter=parameter, read_number=read_number)


def argument_reader(parameter: Parameter, form: SqlForm, context: CompileContext) -> ValueReader:
    """Return the function that reads a parameter's value in a form."""
    if isinstance(parameter, LiteralParameter):
        if form is not SqlForm.NUMBER:
            return constant_reader(to_sql_value(parameter.value, form))
        parameter_class = context.parameter_classes[parameter]
        is_number = parameter_class.is_number or parameter_class is ParameterClass.NUMERIC_TEXT
        return constant_reader(sqlite_values.exact_number(parameter.value) if is_number else None)
    index = context.argument_index[parameter]
    if form is SqlForm.NUMBER:
        return lambda _row, args, _items: (
            None if (content := args[index]) is None else sqlite_values.exact_number(content)
        )
    if form is SqlForm.TEXT:
        return lambda _row, args, _items: (
            value if isinstance(value := args[index], str) else to_sql_value(value, form)
        )
    if form is SqlForm.JSON:
        return lambda _row, args, _items: _json_argument(args[index])
    return lambda _row, args, _items: to_sql_value(args[index], form)


def _json_argument(value: Scalar) -> Scalar:
    """Return a value as ``SqlForm.JSON``: once, not for every row and combination of list items."""
    if not isinstance(value, str):
        return to_sql_value(value, SqlForm.JSON)
    if value[:1] not in {"{", "["}:
        return value
    is_cached = len(value) <= _MAX_CACHED_JSON_CHARACTERS
    return _cached_ordered_json(value) if is_cached else _ordered_json(value)


_MAX_CACHED_JSON_CHARACTERS = 4096
"""A client's filter is no longer; of other texts the cache would hold too much."""
_JSON_CHARACTERS_PER_UNIT = 8
"""Characters parsed and written again in one unit of ``WORK_BUDGET``."""


def _ordered_json(text: str) -> str:
    compare.WORK_BUDGET.spend(len(text) / _JSON_CHARACTERS_PER_UNIT)
    return sqlite_values.json_in_jsonb_order(text)


_cached_ordered_json = lru_cache(maxsize=1024)(_ordered_json)


_INTEGERS = frozenset({"int2", "int4", "int8"})
_FLOATS = frozenset({"float4", "float8"})
_CAST_LIKE_OUTPUT_TYPES = frozenset({"text", "varchar", "uuid", *_INTEGERS})
"""Built-in types whose text form is the result of a cast to text."""


def _has_cast_like_output(base: Type) -> bool:
    return base.kind is TypeKind.ENUM or (
        base.schema == "pg_catalog" and base.name in _CAST_LIKE_OUTPUT_TYPES
    )


def _element_type(field_: Field) -> Type:
    element = field_.type.base.element
    if element is None:
        raise NotInProcessError
    return element.base


@dataclass(frozen=True, slots=True)
class _FieldColumn:
    """Makes functions and operands that read the column of a field, in the row at a path.

    Raises:
        NotInProcessError: By every method: the row must be joined, or there is no column.
    """

    path: predicate.RowPath
    field: Field
    context: CompileContext

    def reader(self) -> _ColumnReader:
        """Return a function that reads the text form."""
        arguments = self.context.argument_index
        is_bound = self.path.is_caller_row and CallerColumn("") in arguments
        if self.field.column is None or not (self.path.is_scope_row or is_bound):
            raise NotInProcessError
        name = self.field.column.name
        if self.path.is_scope_row:
            return lambda row, _args: row[name]
        index = arguments[CallerColumn(name)]

        def read_caller_column(_row: Row, args: Arguments) -> str | None:
            text = args[index]
            assert text is None or isinstance(text, str)
            return text

        return read_caller_column

    def converted(self, convert: _Converter, *, reads_null_as_empty: bool = False) -> ValueReader:
        """Return a function that reads the text form converted, or NULL.

        With ``reads_null_as_empty`` NULL is read as the empty text, if there is a row.
        """
        read_column = self.reader()
        is_argument = not self.path.is_scope_row
        row_exists = self.context.argument_index[CallerColumn("")] if is_argument else None

        def read(row: Row, args: Arguments, _items: ItemCombination) -> SqliteValue:
            text = read_column(row, args)
            if text is not None:
                return _convert_text_form(convert, text)
            if not reads_null_as_empty or (row_exists is not None and args[row_exists] is None):
                return None
            return ""

        return read

    def number(self, to_number: _Converter, to_text: _Converter) -> MemoryOperand:
        return MemoryOperand.of_number(self.converted(to_number), self.converted(to_text))

    def text(self, convert: _Converter, *, reads_null_as_empty: bool = False) -> MemoryOperand:
        read = self.converted(convert, reads_null_as_empty=reads_null_as_empty)
        return MemoryOperand.of_text(read)


def _lower_operand(read_text: ValueReader) -> MemoryOperand:
    def lowered(row: Row, args: Arguments, items: ItemCombination) -> SqliteValue:
        text = read_text(row, args, items)
        return sqlite_values.ascii_lower(text) if isinstance(text, str) else None

    return MemoryOperand.of_text(lowered)


def _field_operand(column: _FieldColumn, modifier: predicate.Modifier) -> MemoryOperand:
    match modifier:
        case predicate.Modifier.WHOLE | predicate.Modifier.EACH:
            return _whole_field(column)
        case predicate.Modifier.LOWER:
            return _lower_operand(_whole_field(column).read_text)
        case predicate.Modifier.LENGTH:
            read = _length_reader(column)
            return MemoryOperand.of_number(read, _converted(read, str))


def _whole_field(column: _FieldColumn) -> MemoryOperand:
    base = column.field.type.base
    if column.field.is_multiple:
        return column.text(_list_text_converter(column.field))
    match column.field.kind:
        case FieldKind.NUMBER if base.name in _INTEGERS:
            return column.number(int, str)
        case FieldKind.NUMBER if base.name == "numeric":
            return column.number(text_values.parse_numeric, text_values.trim_numeric_text)
        case FieldKind.NUMBER if base.name in _FLOATS:
            return column.number(
                text_values.parse_double,
                lambda text: text_values.number_text(text_values.parse_double(text)),
            )
        case FieldKind.BOOL:
            return column.number(
                text_values.parse_bool, lambda text: str(text_values.parse_bool(text))
            )
        case FieldKind.DATE if base.name in text_values.DATE_CONVERTERS:
            return column.text(text_values.DATE_CONVERTERS[base.name], reads_null_as_empty=True)
        case FieldKind.RELATION if _has_cast_like_output(base):
            return column.text(str, reads_null_as_empty=True)
        case FieldKind.TEXT | FieldKind.FILE if _has_cast_like_output(base):
            return column.text(str)
        case _:
            raise NotInProcessError


def _length_reader(column: _FieldColumn) -> ValueReader:
    if not column.field.is_multiple:
        read_text = _whole_field(column).read_text
        return lambda row, args, items: int(not compare.is_blank(read_text(row, args, items)))
    delimiter, read_column = _element_type(column.field).delimiter, column.reader()

    def count(row: Row, args: Arguments, _items: ItemCombination) -> int:
        text = read_column(row, args)
        if text is None:
            return 0
        return len(_convert_text_form(lambda array_text: array_items(array_text, delimiter), text))

    return count


def _items_reader(path: predicate.RowPath, context: CompileContext) -> ItemsReader:
    """Return a function that reads the items of a list; one that is NULL if there are none."""
    match path.steps:
        case (predicate.EachValue(field_),) if _has_cast_like_output(_element_type(field_)):
            read_column = _FieldColumn(predicate.RowPath(path.root), field_, context).reader()
        case _:
            raise NotInProcessError

    def read(row: Row, args: Arguments) -> Sequence[str | None]:
        text = read_column(row, args)
        return (() if text is None else _convert_text_form(array_items, text)) or (None,)

    return read


def _list_text_converter(field_: Field) -> _Converter:
    """Return what converts an array's text form to JSON, for element types where that is exact."""
    base = _element_type(field_)
    match field_.kind:
        case FieldKind.BOOL:
            return text_values.array_json_converter(
                lambda text: "true" if text.startswith("t") else "false"
            )
        case FieldKind.NUMBER if base.name in _INTEGERS:
            return text_values.array_json_converter(str)
        case FieldKind.TEXT | FieldKind.RELATION | FieldKind.FILE if _has_cast_like_output(base):
            return text_values.array_json_converter(sqlite_values.compact_json)
        case _:
            raise NotInProcessError


def _json_operand(column: _FieldColumn, keys: tuple[str, ...], *, is_lower: bool) -> MemoryOperand:
    if column.field.kind is not FieldKind.JSON or column.field.type.base.name != "jsonb":
        raise NotInProcessError
    read = column.reader()

    def at_path(*, is_as_text: bool) -> ValueReader:
        return lambda row, args, _items: json_at_path(read(row, args), keys, is_as_text=is_as_text)

    value, text = at_path(is_as_text=False), at_path(is_as_text=True)
    whole = MemoryOperand(read_value=value, read_text=text, only_type=None)
    return _lower_operand(text) if is_lower else whole
