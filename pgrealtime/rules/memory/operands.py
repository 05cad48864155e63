"""Compiles an operand to functions that read its value from a row image and arguments.

Called by ``conditions`` and ``engine.index_keys``, once per test. Only operands of the row image,
of the caller's row and of parameters are compiled, and only of types whose SQL value is exact here.
Any other raises ``NotInProcessError``, and PostgreSQL evaluates the condition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeAlias, TypeVar

from pgrealtime.catalog.model import Type, TypeKind
from pgrealtime.changes import Row
from pgrealtime.collections.model import Field, FieldKind
from pgrealtime.rules.language.comparison import Conversion, PlannedOperand
from pgrealtime.rules.language.parameters import (
    CallerColumn,
    LiteralParameter,
    Parameter,
    ParameterClass,
    SqlForm,
    to_sql_value,
)
from pgrealtime.rules.language.predicate import (
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
    PASSWORD_HASH_PREFIX,
    Scalar,
    ascii_lower,
    exact_number,
    json_in_jsonb_order,
)
from pgrealtime.rules.memory.compare import (
    WORK_BUDGET,
    SqliteValue,
    UndecidedError,
    is_blank,
    nearest_double,
    number_if_numeric,
)
from pgrealtime.rules.memory.text_values import (
    DATE_CONVERTERS,
    array_items,
    array_json_converter,
    json_at_path,
    json_string,
    number_text,
    parse_bool,
    parse_double,
    parse_numeric,
    trim_numeric_text,
)

Arguments: TypeAlias = Sequence[Scalar]
"""The values of a condition's parameters but literals, ordered as in ``argument_index``."""
ItemCombination: TypeAlias = tuple[str | None, ...]
"""One item of each list that is read, in text form."""
ValueReader: TypeAlias = Callable[[Row, Arguments, ItemCombination], SqliteValue]
ItemsReader: TypeAlias = Callable[[Row, Arguments], Sequence[str | None]]
_ColumnReader: TypeAlias = Callable[[Row, Arguments], str | None]
"""Reads a column's text form, of the row image or of the caller's row."""

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
    """Return the text form converted.

    Raises:
        UndecidedError: It is of another type.
    """
    try:
        return convert(text)
    except (ValueError, IndexError, AssertionError):
        raise UndecidedError from None


@dataclass(frozen=True, slots=True)
class ListScope:
    """The lists whose items the comparisons of a condition share, as joins are shared in SQL."""

    compile_context: CompileContext
    list_readers: dict[RowPath, ItemsReader] = field(default_factory=dict)
    first_item_index: int = 0

    def item_index(self, path: RowPath, read: ItemsReader) -> int:
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
    def of_text(cls, read: ValueReader) -> MemoryOperand:
        """Return an operand that is a text in every row."""
        return cls(read_value=read, read_text=read, only_type=str)


def constant_reader(value: SqliteValue) -> ValueReader:
    """Return a function that reads the same value from any row."""
    return lambda _row, _args, _items: value


def empty_text_for_null(read: ValueReader) -> ValueReader:
    """Return a function that reads '' where the value is NULL."""

    def filled(row: Row, args: Arguments, items: ItemCombination) -> SqliteValue:
        value = read(row, args, items)
        return "" if value is None else value

    return filled


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
    return _convert_to_double(operand) if planned.is_made_double else operand


def compile_operand(term: Term, scope: ListScope) -> MemoryOperand:
    """Return the operand compiled.

    Raises:
        NotInProcessError: Only PostgreSQL can evaluate it.
    """
    match term:
        case ParameterTerm(parameter):
            return _parameter_operand(parameter, scope.compile_context)
        case Keyword(flag):
            if flag is None:
                return MemoryOperand.of_text(constant_reader(None))
            number, text = constant_reader(int(flag)), constant_reader(str(int(flag)))
            return MemoryOperand(read_value=number, read_text=text, only_type=float)
        case FieldValue(path, field_, modifier):
            columns = _ColumnReaders(path, scope.compile_context)
            return _field_with_modifier(columns, field_, modifier)
        case SecretTerm(path, _) if path.is_scope_row:  # lower case already
            return MemoryOperand.of_text(constant_reader(PASSWORD_HASH_PREFIX))
        case JsonValue(path, field_, keys, is_lower):
            return _json_operand(
                _ColumnReaders(path, scope.compile_context), field_, keys, is_lower=is_lower
            )
        case EachTerm(path):
            index = scope.item_index(path, _items_reader(path, scope.compile_context))
            if index >= MAX_SHARED_LISTS and scope.first_item_index == 0:
                raise NotInProcessError
            if term.kind is FieldKind.NUMBER:
                return _number_operand(*(_item_reader(index, convert) for convert in (int, str)))
            return MemoryOperand.of_text(_item_reader(index, str))
        case _:
            raise NotInProcessError


def _item_reader(index: int, convert: Callable[[str], SqliteValue]) -> ValueReader:
    def read(_row: Row, _args: Arguments, items: ItemCombination) -> SqliteValue:
        text = items[index]
        return None if text is None else _convert_text_form(convert, text)

    return read


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
        read_value=lambda row, args, items: number_if_numeric(read(row, args, items)),
        only_type=None,
    )


def _convert_to_double(operand: MemoryOperand) -> MemoryOperand:
    if operand.only_type is str:
        return operand
    read = operand.read_value
    return replace(
        operand, read_value=lambda row, args, items: nearest_double(read(row, args, items))
    )


def _parameter_operand(parameter: Parameter, context: CompileContext) -> MemoryOperand:
    parameter_class = context.parameter_classes[parameter]
    if parameter_class is ParameterClass.ABSENT:
        return MemoryOperand.of_text(constant_reader(None))
    read_text = argument_reader(parameter, SqlForm.TEXT, context)
    number = argument_reader(parameter, SqlForm.NUMBER, context)
    if parameter_class.is_number:
        return MemoryOperand(
            read_value=number, read_text=read_text, only_type=float, parameter=parameter
        )
    return replace(
        MemoryOperand.of_text(read_text),
        parameter=parameter,
        read_number=number if parameter_class is ParameterClass.NUMERIC_TEXT else None,
    )


def argument_reader(parameter: Parameter, form: SqlForm, context: CompileContext) -> ValueReader:
    """Return the function that reads a parameter's value in a form."""
    if isinstance(parameter, LiteralParameter):
        if form is not SqlForm.NUMBER:
            return constant_reader(to_sql_value(parameter.value, form))
        parameter_class = context.parameter_classes[parameter]
        is_number = parameter_class.is_number or parameter_class is ParameterClass.NUMERIC_TEXT
        return constant_reader(exact_number(parameter.value) if is_number else None)
    index = context.argument_index[parameter]
    if form is SqlForm.NUMBER:
        return lambda _row, args, _items: (
            None if (content := args[index]) is None else exact_number(content)
        )
    if form is SqlForm.TEXT:
        return lambda _row, args, _items: (
            value if isinstance(value := args[index], str) else to_sql_value(value, form)
        )
    if form is SqlForm.JSON:
        return lambda _row, args, _items: (
            _json_argument(value)
            if isinstance(value := args[index], str)
            else to_sql_value(value, form)
        )
    return lambda _row, args, _items: to_sql_value(args[index], form)


def _json_argument(text: str) -> str:
    """Return a text as ``SqlForm.JSON``: once, not for every row and combination of list items."""
    if text[:1] not in {"{", "["}:
        return text
    if len(text) > _MAX_CACHED_JSON_CHARACTERS:
        return _ordered_json(text)
    return _cached_ordered_json(text)


_MAX_CACHED_JSON_CHARACTERS = 4096
"""A client's filter is no longer; of other texts the cache would hold too much."""
_JSON_CHARACTERS_PER_UNIT = 8
"""Characters parsed and written again in one unit of ``WORK_BUDGET``."""


def _ordered_json(text: str) -> str:
    WORK_BUDGET.spend(len(text) / _JSON_CHARACTERS_PER_UNIT)
    return json_in_jsonb_order(text)


_cached_ordered_json = lru_cache(maxsize=1024)(_ordered_json)


_INTEGERS = frozenset({"int2", "int4", "int8"})
_FLOATS = frozenset({"float4", "float8"})
_CAST_LIKE_OUTPUT_TYPES = frozenset({"text", "varchar", "uuid", *_INTEGERS})
"""Built-in types whose text form is the result of a cast to text."""


def _has_cast_like_output(base: Type) -> bool:
    return base.kind is TypeKind.ENUM or (
        base.schema == "pg_catalog" and base.name in _CAST_LIKE_OUTPUT_TYPES
    )


class _ColumnReaders:
    """Makes functions that read columns of the row at a path.

    Raises:
        NotInProcessError: The row must be joined.
    """

    def __init__(self, path: RowPath, context: CompileContext) -> None:
        self._is_scope_row = path.is_scope_row
        self._argument_index = context.argument_index
        if not (
            self._is_scope_row
            or (path.is_caller_row and CallerColumn("") in context.argument_index)
        ):
            raise NotInProcessError

    def column_reader(self, field_: Field) -> _ColumnReader:
        """Return a function that reads the text form of the field's column."""
        if field_.column is None:
            raise NotInProcessError
        name = field_.column.name
        if self._is_scope_row:
            return lambda row, _args: row[name]
        index = self._argument_index[CallerColumn(name)]

        def read_caller_column(_row: Row, args: Arguments) -> str | None:
            text = args[index]
            assert text is None or isinstance(text, str)
            return text

        return read_caller_column

    def value_reader(
        self,
        field_: Field,
        convert: Callable[[str], SqliteValue],
        *,
        reads_null_as_empty: bool = False,
    ) -> ValueReader:
        """Return a function that reads the field's value: the text form converted, or NULL.

        With ``reads_null_as_empty`` NULL is read as the empty text, if there is a row.
        """
        read_column = self.column_reader(field_)
        row_exists = None if self._is_scope_row else self._argument_index[CallerColumn("")]

        def read(row: Row, args: Arguments, _items: ItemCombination) -> SqliteValue:
            text = read_column(row, args)
            if text is not None:
                return _convert_text_form(convert, text)
            if not reads_null_as_empty or (row_exists is not None and args[row_exists] is None):
                return None
            return ""

        return read


def _field_with_modifier(
    columns: _ColumnReaders, field_: Field, modifier: Modifier
) -> MemoryOperand:
    match modifier:
        case Modifier.WHOLE | Modifier.EACH:
            return _whole_field(columns, field_)
        case Modifier.LOWER:
            return MemoryOperand.of_text(_lower_reader(_whole_field(columns, field_).read_text))
        case Modifier.LENGTH:
            return _length_operand(columns, field_)


def _lower_reader(read_text: ValueReader) -> ValueReader:
    def lowered(row: Row, args: Arguments, items: ItemCombination) -> SqliteValue:
        text = read_text(row, args, items)
        return ascii_lower(text) if isinstance(text, str) else None

    return lowered


def _whole_field(columns: _ColumnReaders, field_: Field) -> MemoryOperand:
    base = field_.type.base
    if field_.is_multiple:
        return MemoryOperand.of_text(columns.value_reader(field_, _list_text_converter(field_)))
    match field_.kind:
        case FieldKind.NUMBER if base.name in _INTEGERS:
            return _number_operand(
                columns.value_reader(field_, int), columns.value_reader(field_, str)
            )
        case FieldKind.NUMBER if base.name == "numeric":
            return _number_operand(
                columns.value_reader(field_, parse_numeric),
                columns.value_reader(field_, trim_numeric_text),
            )
        case FieldKind.NUMBER if base.name in _FLOATS:
            read_text = columns.value_reader(field_, lambda text: number_text(parse_double(text)))
            return _number_operand(columns.value_reader(field_, parse_double), read_text)
        case FieldKind.BOOL:
            read_text = columns.value_reader(field_, lambda text: str(parse_bool(text)))
            return _number_operand(columns.value_reader(field_, parse_bool), read_text)
        case FieldKind.DATE if base.name in DATE_CONVERTERS:
            return MemoryOperand.of_text(
                columns.value_reader(field_, DATE_CONVERTERS[base.name], reads_null_as_empty=True)
            )
        case FieldKind.RELATION if _has_cast_like_output(base):
            return MemoryOperand.of_text(
                columns.value_reader(field_, str, reads_null_as_empty=True)
            )
        case FieldKind.TEXT | FieldKind.FILE if _has_cast_like_output(base):
            return MemoryOperand.of_text(columns.value_reader(field_, str))
        case _:
            raise NotInProcessError


def _number_operand(read_value: ValueReader, read_text: ValueReader) -> MemoryOperand:
    return MemoryOperand(read_value=read_value, read_text=read_text, only_type=float)


def _length_operand(columns: _ColumnReaders, field_: Field) -> MemoryOperand:
    read = (
        _item_count_reader(columns, field_)
        if field_.is_multiple
        else _presence_reader(_whole_field(columns, field_).read_text)
    )
    return MemoryOperand(
        read_value=read,
        read_text=lambda row, args, items: str(read(row, args, items)),
        only_type=float,
    )


def _item_count_reader(columns: _ColumnReaders, field_: Field) -> ValueReader:
    element = field_.type.base.element
    if element is None:
        raise NotInProcessError
    read_column, delimiter = columns.column_reader(field_), element.base.delimiter

    def count(row: Row, args: Arguments, _items: ItemCombination) -> int:
        text = read_column(row, args)
        if text is None:
            return 0
        return len(_convert_text_form(lambda array_text: array_items(array_text, delimiter), text))

    return count


def _presence_reader(read_text: ValueReader) -> ValueReader:
    return lambda row, args, items: int(not is_blank(read_text(row, args, items)))


def _items_reader(path: RowPath, context: CompileContext) -> ItemsReader:
    """Return a function that reads the items of a list; one that is NULL if there are none."""
    match path.steps:
        case (EachValue(field_),):
            element = field_.type.base.element
            if element is None or not _has_cast_like_output(element.base):
                raise NotInProcessError
            read_column = _ColumnReaders(RowPath(path.root), context).column_reader(field_)
        case _:
            raise NotInProcessError

    def read(row: Row, args: Arguments) -> Sequence[str | None]:
        text = read_column(row, args)
        return (() if text is None else _convert_text_form(array_items, text)) or (None,)

    return read


def _list_text_converter(field_: Field) -> Callable[[str], SqliteValue]:
    """Return what converts an array's text form to JSON, for element types where that is exact."""
    element = field_.type.base.element
    if element is None:
        raise NotInProcessError
    base = element.base
    match field_.kind, base.name:
        case FieldKind.BOOL, _:
            return array_json_converter(lambda text: "true" if text.startswith("t") else "false")
        case FieldKind.NUMBER, name if name in _INTEGERS:
            return array_json_converter(str)
        case (FieldKind.TEXT | FieldKind.RELATION | FieldKind.FILE, _) if _has_cast_like_output(
            base
        ):
            return array_json_converter(json_string)
        case _:
            raise NotInProcessError


def _json_operand(
    columns: _ColumnReaders, field_: Field, keys: Sequence[str], *, is_lower: bool
) -> MemoryOperand:
    if field_.kind is not FieldKind.JSON or field_.type.base.name != "jsonb":
        raise NotInProcessError
    read_column, path = columns.column_reader(field_), tuple(keys)

    def read_text(row: Row, args: Arguments, _items: ItemCombination) -> SqliteValue:
        return json_at_path(read_column(row, args), path, is_as_text=True)

    if is_lower:
        return MemoryOperand.of_text(_lower_reader(read_text))

    def read_value(row: Row, args: Arguments, _items: ItemCombination) -> SqliteValue:
        return json_at_path(read_column(row, args), path, is_as_text=False)

    return MemoryOperand(read_value=read_value, read_text=read_text, only_type=None)
