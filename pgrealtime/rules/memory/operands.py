"""Compiles an operand to functions that read its value from a row image and arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from pgrealtime.catalog.model import Type, TypeKind
from pgrealtime.changes import Row
from pgrealtime.collections.model import Field, FieldKind
from pgrealtime.rules.language.comparison import Conversion, PlannedOperand
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
    PASSWORD_HASH_PREFIX,
    Scalar,
    ascii_lower,
    exact_number,
)
from pgrealtime.rules.memory.compare import (
    SqliteValue,
    is_blank,
    nearest_double,
    number_if_numeric,
)
from pgrealtime.rules.memory.text_values import (
    DATE_CONVERTERS,
    array_items,
    array_json_converter,
    convert_text_form,
    json_at_path,
    json_string,
    number_text,
    parse_bool,
    parse_double,
    parse_numeric,
    trim_numeric_text,
)

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
    """The lists whose items the comparisons of a condition share, as joins are shared in SQL."""

    context: CompileContext
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
        spelled = argument_reader(operand.parameter, SqlForm.JSON, scope.context)
        operand = replace(operand, read_value=spelled)
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
            return _parameter_operand(parameter, scope.context)
        case Keyword(flag):
            if flag is None:
                return MemoryOperand.of_text(constant_reader(None))
            number, text = constant_reader(int(flag)), constant_reader(str(int(flag)))
            return MemoryOperand(read_value=number, read_text=text, only_type=float)
        case FieldValue(place, field_, part):
            cells = _ColumnReaders(place, scope.context)
            return _field_with_modifier(cells, field_, part)
        case SecretTerm(path, _) if path.is_scope_row:  # lower case already
            return MemoryOperand.of_text(constant_reader(PASSWORD_HASH_PREFIX))
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
            return MemoryOperand.of_text(_item_reader(at, str))
        case _:
            raise NotInProcessError


def _item_reader(index: int, convert: Callable[[str], SqliteValue]) -> ValueReader:
    def read(_row: Row, _args: Arguments, items: ItemCombination) -> SqliteValue:
        text = items[index]
        return None if text is None else convert_text_form(convert, text)

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
        operand,
        read_value=lambda row, args, items: nearest_double(read(row, args, items)),
    )


def _parameter_operand(parameter: Parameter, context: CompileContext) -> MemoryOperand:
    shape = context.parameter_classes[parameter]
    if shape is ParameterClass.ABSENT:
        return MemoryOperand.of_text(constant_reader(None))
    shown = argument_reader(parameter, SqlForm.TEXT, context)
    number = argument_reader(parameter, SqlForm.NUMBER, context)
    if shape.is_number:
        return MemoryOperand(
            read_value=number,
            read_text=shown,
            only_type=float,
            parameter=parameter,
        )
    return replace(
        MemoryOperand.of_text(shown),
        parameter=parameter,
        read_number=number if shape is ParameterClass.NUMERIC_TEXT else None,
    )


def argument_reader(parameter: Parameter, form: SqlForm, context: CompileContext) -> ValueReader:
    """Return the function that reads a parameter's value in a form."""
    if isinstance(parameter, LiteralParameter):
        if form is not SqlForm.NUMBER:
            return constant_reader(to_sql_value(parameter.value, form))
        shape = context.parameter_classes[parameter]
        is_number = shape.is_number or shape is ParameterClass.NUMERIC_TEXT
        return constant_reader(exact_number(parameter.value) if is_number else None)
    at = context.argument_index[parameter]
    if form is SqlForm.NUMBER:
        return lambda _row, args, _items: (
            None if (content := args[at]) is None else exact_number(content)
        )
    if form is SqlForm.TEXT:
        return lambda _row, args, _items: (
            value if isinstance(value := args[at], str) else to_sql_value(value, form)
        )
    return lambda _row, args, _items: to_sql_value(args[at], form)


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

        def read(row: Row, args: Arguments, _items: ItemCombination) -> SqliteValue:
            text = cell(row, args)
            if text is not None:
                return convert_text_form(convert, text)
            if not reads_null_as_empty or (present is not None and args[present] is None):
                return None
            return ""

        return read


def _require_text_form(value: Scalar) -> str | None:
    assert value is None or isinstance(value, str)
    return value


def _field_with_modifier(cells: _ColumnReaders, field_: Field, modifier: Modifier) -> MemoryOperand:
    match modifier:
        case Modifier.WHOLE | Modifier.EACH:
            return _whole_field(cells, field_)
        case Modifier.LOWER:
            return MemoryOperand.of_text(_lower_reader(_whole_field(cells, field_).read_text))
        case Modifier.LENGTH:
            return _length_operand(cells, field_)


def _lower_reader(shown: ValueReader) -> ValueReader:
    def lowered(row: Row, args: Arguments, items: ItemCombination) -> SqliteValue:
        text = shown(row, args, items)
        return ascii_lower(text) if isinstance(text, str) else None

    return lowered


def _whole_field(cells: _ColumnReaders, field_: Field) -> MemoryOperand:
    base = field_.type.base
    if field_.is_multiple:
        return MemoryOperand.of_text(cells.value_reader(field_, _list_text_converter(field_)))
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
            shown = cells.value_reader(field_, lambda text: str(parse_bool(text)))
            return _number_operand(cells.value_reader(field_, parse_bool), shown)
        case FieldKind.DATE if base.name in DATE_CONVERTERS:
            return MemoryOperand.of_text(
                cells.value_reader(field_, DATE_CONVERTERS[base.name], reads_null_as_empty=True),
            )
        case FieldKind.RELATION if _has_cast_like_output(base):
            return MemoryOperand.of_text(cells.value_reader(field_, str, reads_null_as_empty=True))
        case FieldKind.TEXT | FieldKind.FILE if _has_cast_like_output(base):
            return MemoryOperand.of_text(cells.value_reader(field_, str))
        case _:
            raise NotInProcessError


def _number_operand(read: ValueReader, shown: ValueReader) -> MemoryOperand:
    return MemoryOperand(read_value=read, read_text=shown, only_type=float)


def _length_operand(cells: _ColumnReaders, field_: Field) -> MemoryOperand:
    read: ValueReader
    if field_.is_multiple:
        cell, delimiter = cells.column_reader(field_), _delimiter(field_)
        read = lambda row, args, _items: _count_items(  # noqa: E731 (one expression)
            cell(row, args), delimiter
        )
    else:
        shown = _whole_field(cells, field_).read_text
        read = lambda row, args, items: int(  # noqa: E731 (likewise)
            not is_blank(shown(row, args, items))
        )
    as_text: ValueReader = lambda row, args, items: str(read(row, args, items))  # noqa: E731
    return MemoryOperand(read_value=read, read_text=as_text, only_type=float)


def _count_items(text: str | None, delimiter: str) -> int:
    if text is None:
        return 0
    return len(convert_text_form(lambda given: array_items(given, delimiter), text))


def _delimiter(field_: Field) -> str:
    element = field_.type.base.element
    if element is None:
        raise NotInProcessError
    return element.base.delimiter


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
        return (() if text is None else convert_text_form(array_items, text)) or (None,)

    return read


def _list_text_converter(field_: Field) -> Callable[[str], SqliteValue]:
    """Return what converts an array's text form to JSON, for element types where that is exact."""
    element = field_.type.base.element
    if element is None:
        raise NotInProcessError
    match field_.kind, element.base.name:
        case FieldKind.BOOL, _:
            return array_json_converter(lambda text: "true" if text.startswith("t") else "false")
        case FieldKind.NUMBER, name if name in _INTEGERS:
            return array_json_converter(str)
        case ((FieldKind.TEXT | FieldKind.RELATION | FieldKind.FILE), _) if _has_cast_like_output(
            element
        ):
            return array_json_converter(json_string)
        case _:
            raise NotInProcessError


def _json_operand(
    cells: _ColumnReaders, field_: Field, keys: Sequence[str], *, is_lower: bool
) -> MemoryOperand:
    if field_.kind is not FieldKind.JSON or field_.type.base.name != "jsonb":
        raise NotInProcessError
    cell, path = cells.column_reader(field_), tuple(keys)

    def shown(row: Row, args: Arguments, _items: ItemCombination) -> SqliteValue:
        return json_at_path(cell(row, args), path, is_as_text=True)

    if is_lower:
        return MemoryOperand.of_text(_lower_reader(shown))

    def read(row: Row, args: Arguments, _items: ItemCombination) -> SqliteValue:
        return json_at_path(cell(row, args), path, is_as_text=False)

    return MemoryOperand(read_value=read, read_text=shown, only_type=None)
