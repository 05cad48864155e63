"""Splits a rule into its comparisons for ``explain``, with a query for each and for its operands.

Nothing is evaluated here: a fragment is a rule of its own, and its verdict is that of the reference
query. The verdict of a group may differ from what those of its comparisons suggest, because ``?``
comparisons over one path are about one and the same row.

It doesn't share the engine's split of a predicate, for exactness' sake: the engine splits by joins
and lifts literals, while a person wants the comparisons as they were written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias

from pgrealtime.auth.principal import Superuser
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections, FieldKind
from pgrealtime.rules.language import predicate, syntax
from pgrealtime.rules.language.parameters import (
    LiteralParameter,
    Parameter,
    RequestValue,
    parameter_class,
    parameter_value,
)
from pgrealtime.rules.language.predicate import Term
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.resolve import resolve_filter, resolve_rule
from pgrealtime.rules.language.sqlite_values import Scalar
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.conditions import SqlValues
from pgrealtime.rules.sql.joins import Scope, Translation
from pgrealtime.rules.sql.operands import translate_operand
from pgrealtime.rules.sql.reference import (
    ReferenceQuery,
    SqlQuery,
    auth_collection_of,
    query_of_predicates,
    sql_params,
)
from pgrealtime.rules.sql.row_images import distinct_values, image_params, images_table

MAX_SHOWN_VALUES = 5
"""Values shown of one operand; one more is fetched, to see whether there are more."""


@dataclass(frozen=True, slots=True)
class Clause:
    """One comparison, without its comments."""

    left: str
    operator: str
    right: str

    def text(self, space: str) -> str:
        """Return its text, with ``space`` about operators."""
        return space.join((self.left, self.operator, self.right))


@dataclass(frozen=True, slots=True)
class ClauseGroup:
    """Fragments of which all, or any, must be true; at least two, in the text's order."""

    is_conjunction: bool
    fragments: tuple[RuleFragment, ...]

    def text(self, space: str) -> str:
        """Return its text, with ``space`` about operators.

        To be resolved it has none, and is no longer than the original: the length of filters is
        limited, and ``&&`` needs no brackets in ``||``. To be printed it has those too.
        """
        is_bracketed = bool(space) or self.is_conjunction
        return f"{space}{'&&' if self.is_conjunction else '||'}{space}".join(
            f"({part.text(space)})"
            if is_bracketed and isinstance(part, ClauseGroup)
            else part.text(space)
            for part in self.fragments
        )


RuleFragment: TypeAlias = Clause | ClauseGroup


def split_rule(text: str) -> RuleFragment:
    """Return the fragments of a rule or filter.

    Raises:
        RuleError: It is not of the language.
    """
    return _fragment(syntax.parse_expression(text), text)


def _fragment(expression: syntax.ExpressionNode, text: str) -> RuleFragment:
    match expression:
        case syntax.ComparisonNode(left, op, is_any, right):
            sign = f"?{op.value}" if is_any else op.value
            return Clause(_operand_text(left, text), sign, _operand_text(right, text))
        case syntax.AndNode(parts):
            return ClauseGroup(True, tuple(_fragment(part, text) for part in parts))
        case syntax.OrNode(parts):
            return ClauseGroup(False, tuple(_fragment(part, text) for part in parts))


def _operand_text(operand: syntax.OperandNode, text: str) -> str:
    match operand:
        case syntax.LiteralNode() | syntax.IdentifierNode():
            return text[operand.start : operand.end]
        case syntax.CallNode(name, args):
            return f"{name}({','.join(_operand_text(arg, text) for arg in args)})"


# --- what a fragment means


@dataclass(frozen=True, slots=True)
class KnownValue:
    """A value that is known without reading a row."""

    value: Scalar


@dataclass(frozen=True, slots=True)
class HiddenValue:
    """A value made of a field that records don't show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperandValue:
    """An operand of a comparison whose text isn't its value."""

    text: str
    value: KnownValue | HiddenValue | SqlQuery
    """A query's result has a row for each related row: the text, and whether it is a number."""
    is_boolean: bool = False
    """Whether 1 and 0 mean true and false."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentQueries:
    """The queries that evaluate a fragment and its operands."""

    reference_query: ReferenceQuery
    operand_values: tuple[OperandValue, ...]
    """Of a comparison; none of a group."""


def fragment_queries(
    fragment: RuleFragment,
    collections: Collections,
    collection: Collection,
    *,
    request: RuleRequest,
    row: Row,
    now: datetime,
    is_filter: bool,
) -> FragmentQueries:
    """Return the queries for a fragment of a rule or filter, on a row with all columns.

    ``now`` is the time of macros, with its zone. With ``is_filter`` the fragment can read no more
    than its sender may see.

    Raises:
        RuleError: The fragment can't be used by this caller.
    """
    auth = auth_collection_of(collections, request)
    text = fragment.text("")
    if is_filter:
        is_superuser = isinstance(request.principal, Superuser)
        resolved = resolve_filter(text, collections, collection, auth, is_superuser=is_superuser)
    else:
        resolved = resolve_rule(text, collections, collection, auth)
    operands: tuple[OperandValue, ...] = ()
    if isinstance(fragment, Clause):
        values = _OperandValues(collections, collection, request, row, now)
        # The conditions that a filter adds by itself follow its own.
        first = predicate.comparisons(resolved.where)[0]
        operands = (
            *values.operand_value(fragment.left, first.left),
            *values.operand_value(fragment.right, first.right),
        )
    return FragmentQueries(
        reference_query=query_of_predicates(collections, collection, [resolved], request),
        operand_values=operands,
    )


@dataclass(frozen=True, slots=True)
class _OperandValues:
    collections: Collections
    collection: Collection
    request: RuleRequest
    row: Row
    now: datetime

    def operand_value(self, text: str, term: Term) -> Iterator[OperandValue]:
        """Yield the operand's value, unless its text is the value."""
        value: KnownValue | HiddenValue | SqlQuery
        is_boolean = False
        match term:
            case predicate.ParameterTerm(LiteralParameter()):
                return
            case predicate.Keyword() if text.lower() in {"true", "false", "null"}:
                return
            case predicate.Keyword(keyword):
                value = KnownValue(keyword)
            case predicate.AbsentEach():
                value = KnownValue(None)
            case predicate.ParameterTerm(RequestValue(is_isset=True) as parameter):
                value = KnownValue(bool(self._parameter_value(parameter)))
            case predicate.ParameterTerm(parameter):
                value = KnownValue(self._parameter_value(parameter))
            case _ if _is_hidden(term):
                value = HiddenValue()
            case _:
                value = self._values_query(term)
                is_boolean = (
                    isinstance(term, predicate.FieldValue)
                    and term.field.kind is FieldKind.BOOL
                    and not term.field.is_multiple
                    and term.modifier is predicate.Modifier.WHOLE
                )
        yield OperandValue(text=text, value=value, is_boolean=is_boolean)

    def _parameter_value(self, parameter: Parameter) -> Scalar:
        return parameter_value(parameter, self.request, self.now)

    def _values_query(self, term: Term) -> SqlQuery:
        """Return the query for the values: texts, and whether they are numbers."""
        condition = predicate.Comparison(term, syntax.Op.EQ, True, predicate.Keyword(None))
        classes = {
            parameter: parameter_class(self._parameter_value(parameter))
            for parameter in predicate.condition_parameters(condition)
        }
        translation = Translation(collections=self.collections, parameter_classes=classes)
        scope = Scope(translation, nodes.ROW_ALIAS, is_row_image=True)
        operand = translate_operand(term, scope, is_strict=False)
        number = operand.number
        is_number = nodes.boolean(False) if number is None else nodes.is_not_null(number)
        values = SqlValues.of_scope(scope, operand.as_text, nodes.boolean(True))  # NULL included
        values.select.append("expressions", nodes.copy_if_attached(is_number))
        params = image_params([[self.row[column] for column in values.column_names]])
        params |= sql_params(values.bindings, self.request, self.now)
        rows, _ = images_table(self.collection.table, values.column_names)
        limit = nodes.number(MAX_SHOWN_VALUES + 1)
        shown = distinct_values(values.select, limit, ("value", "is_number"), rows)
        return SqlQuery(nodes.to_text(shown), params)


def _is_hidden(term: Term) -> bool:
    """Return whether the value is made of a field that records hide, or reached through one."""
    match term:
        case predicate.SecretTerm():
            return True
        case predicate.GeoDistance(args):
            return any(_is_hidden(arg) for arg in args)
        case predicate.Strftime(time=time):
            return time is not None and _is_hidden(time)
        case _:
            path = predicate.row_path_of(term)
            steps = () if path is None else path.steps
            fields = [step.field for step in steps if not isinstance(step, predicate.ToEach)]
            if isinstance(term, predicate.FieldValue | predicate.JsonValue):
                fields.append(term.field)
            return any(field.is_hidden or field.is_secret for field in fields)
