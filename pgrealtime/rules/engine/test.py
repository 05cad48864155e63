"""One condition on a row that is evaluated by itself, in the process or by PostgreSQL.

``RuleCompiler`` splits rules and filters into such conditions and makes one ``Test`` of equal ones,
so that filters that differ in literals share it and a row's verdict is computed once for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from pgrealtime.collections.model import Collection, Collections, Field
from pgrealtime.rules.language.parameters import (
    CallerColumn,
    LiteralParameter,
    Macro,
    Parameter,
    ParameterClass,
)
from pgrealtime.rules.language.predicate import (
    CallerRow,
    Condition,
    EachValue,
    FieldValue,
    JsonValue,
    Predicate,
    RowPath,
    Strftime,
    Term,
    ToOne,
    columns_read,
    condition_parameters,
    row_path_of,
    row_paths,
    terms,
)
from pgrealtime.rules.memory.conditions import CompiledCondition, compile_condition
from pgrealtime.rules.memory.operands import CompileContext
from pgrealtime.rules.sql.conditions import SqlPredicate, translate_predicate
from pgrealtime.rules.sql.joins import CALLER_ID_PARAMETER


class Test:
    """A condition on one row of a collection, compiled for parameters of given classes.

    It has three uses: ``in_process`` evaluates it here; ``sql_predicate`` is the same in SQL;
    ``index_paths`` makes index keys of its comparisons. It is compared by identity, and verdicts
    are kept by it.

    Attributes:
        caller_parameters: Its parameters that differ per caller. Its arguments are their values, in
            this order, followed by those of ``macros``.
        macros: Its parameters that differ per batch.
        memory_context: The parameter classes and argument order of ``in_process``.
        in_process: Evaluates it here; None if only PostgreSQL can.
        column_names: The columns of the row that it reads.

    Args:
        collections: All collections.
        collection: The row's collection.
        condition: The condition, with joins of its own.
        parameter_classes: The class of each of its parameters.
        auth_collection: The collection of the caller's own row; None if there is no such row.
        is_caller_row_bound: Whether the columns that it reads of the caller's row are parameters.
            Else PostgreSQL reads them.
        is_utf8: Whether the server's encoding is UTF-8, as ``CompileContext`` has it.
    """

    def __init__(
        self,
        collections: Collections,
        collection: Collection,
        condition: Condition,
        parameter_classes: Mapping[Parameter, ParameterClass],
        *,
        auth_collection: Collection | None = None,
        is_caller_row_bound: bool = False,
        is_utf8: bool = True,
    ) -> None:
        self.collections = collections
        self.collection = collection
        self.condition = condition
        self.parameter_classes = parameter_classes
        self._auth_collection = auth_collection
        self._is_caller_row_bound = is_caller_row_bound
        self.macros = _macros_read(condition)
        self.caller_parameters = tuple(
            _caller_parameters(condition, is_caller_row_bound=is_caller_row_bound)
        )
        arguments = (*self.caller_parameters, *self.macros)
        self.memory_context = CompileContext(
            parameter_classes=parameter_classes,
            argument_index={parameter: index for index, parameter in enumerate(arguments)},
            is_utf8=is_utf8,
        )
        self.in_process: CompiledCondition | None = compile_condition(
            condition, self.memory_context
        )
        self.column_names = (
            frozenset(self.sql_predicate.column_names)
            if self.in_process is None
            else columns_read(condition)
        )

    @cached_property
    def sql_predicate(self) -> SqlPredicate:
        """The condition in SQL, translated when it is first used.

        Raises:
            RuleUnsupportedError: PostgreSQL can't evaluate it exactly either.
        """
        return translate_predicate(
            Predicate(collection_name=self.collection.name, where=self.condition),
            self.collections,
            self.parameter_classes,
            auth_collection=self._auth_collection,
            is_caller_row_bound=self._is_caller_row_bound,
        )

    @property
    def is_row_independent(self) -> bool:
        """Whether the verdict depends on the caller alone, not on the row nor on the time."""
        return self.in_process is not None and not self.column_names and not self.macros


def _caller_parameters(
    condition: Condition, *, is_caller_row_bound: bool
) -> Iterator[Parameter | CallerColumn]:
    """Yield the parameters of a condition that differ per caller."""
    parameters = [
        parameter
        for parameter in condition_parameters(condition)
        if not isinstance(parameter, (LiteralParameter, Macro))
    ]
    yield from parameters
    if reads_caller_row(condition) and CALLER_ID_PARAMETER not in parameters:
        yield CALLER_ID_PARAMETER
    if is_caller_row_bound:
        yield from caller_columns(condition)


def _macros_read(condition: Condition) -> tuple[Macro, ...]:
    """Return the macros of a condition; ``strftime`` without a time reads ``@now``."""
    macros = [p for p in condition_parameters(condition) if isinstance(p, Macro)]
    if Macro.NOW not in macros and any(isinstance(term, Strftime) for term in terms(condition)):
        macros.append(Macro.NOW)
    return tuple(macros)


# --- the caller's own row


def reads_caller_row(condition: Condition) -> bool:
    """Whether it reads the caller's own row, or anything reached from it."""
    return any(isinstance(path.root, CallerRow) for path in row_paths(condition))


def caller_columns(condition: Condition) -> Sequence[CallerColumn]:
    """Return the columns that it reads of the caller's own row.

    The first stands for whether there is such a row (its name is empty), the others are sorted.
    """
    names = {
        field.column.name
        for term in terms(condition)
        if (path := row_path_of(term)) is not None and isinstance(path.root, CallerRow)
        for field in _root_fields_read(term, path)
        if field.column is not None
    }
    return [CallerColumn(name) for name in ("", *sorted(names))] if names else []


def _root_fields_read(term: Term, path: RowPath) -> Iterator[Field]:
    """Yield the field that a term reads of the row where its path begins, if any."""
    match path.steps, term:
        case (), (FieldValue(field=field) | JsonValue(field=field)):
            yield field
        case ((ToOne(field) | EachValue(field)), *_), _:
            yield field
        case _:
            return
