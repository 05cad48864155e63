"""Splits a rule into its comparisons for ``explain``, with a query for each and for its operands.

Nothing is evaluated here: a fragment is a rule of its own, and its verdict is that of the reference
query. The verdict of a group may differ from what those of its comparisons suggest, because ``?``
comparisons over one path are about one and the same row.

It doesn't share the engine's split of a predicate, for exactness' sake: the engine splits by joins
and lifts literals, while a person wants the comparisons as they were written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias

from sqlglot import exp

from pgrealtime.auth.principal import Superuser
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections, Field, FieldKind
from pgrealtime.rules.language.parameters import (
    LiteralParameter,
    Parameter,
    ParameterClass,
    RequestValue,
    parameter_class,
    parameter_value,
)
from pgrealtime.rules.language.predicate import (
    AbsentEach,
    Comparison,
    FieldValue,
    GeoDistance,
    JsonValue,
    Keyword,
    Modifier,
    ParameterTerm,
    SecretTerm,
    Strftime,
    Term,
    ToEach,
    comparisons,
    condition_parameters,
    row_path_of,
)
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.resolve import resolve_filter, resolve_rule
from pgrealtime.rules.language.sqlite_values import Scalar
from pgrealtime.rules.language.syntax import (
    AndNode,
    CallNode,
    ComparisonNode,
    ExpressionNode,
    IdentifierNode,
    LiteralNode,
    Op,
    OperandNode,
    OrNode,
    parse_expression,
)
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.conditions import SqlValues
from pgrealtime.rules.sql.joins import Scope, Translation
from pgrealtime.rules.sql.operands import translate_operand
from pgrealtime.rules.sql.reference import (
    ReferenceQuery,
    SqlQuery,
    auth_collection_of,
    query_of_predicate,
    sql_params,
)
from pgrealtime.rules.sql.row_images import image_params, images_table

MAX_SHOWN_VALUES = 5
"""Values shown of one operand; one more is fetched, to see whether there are more."""


@dataclass(frozen=True, slots=True)
class Clause:
    """One comparison, without its comments."""

    left: str
    operator: str
    right: str

    @property
    def display_text(self) -> str:
        """The text to print."""
        return f"{self.left} {self.operator} {self.right}"

    @property
    def rule_text(self) -> str:
        """The text to resolve, no longer than the original: the length of filters is limited."""
        return f"{self.left}{self.operator}{self.right}"


@dataclass(frozen=True, slots=True)
class ClauseGroup:
    """Fragments of which all, or any, must be true; at least two, in the text's order."""

    is_conjunction: bool
    fragments: tuple[RuleFragment, ...]

    @property
    def display_text(self) -> str:
        """The text to print."""
        sign = " && " if self.is_conjunction else " || "
        return sign.join(
            f"({p.display_text})" if isinstance(p, ClauseGroup) else p.display_text
            for p in self.fragments
        )

    @property
    def rule_text(self) -> str:
        """The text to resolve, no longer than the original: ``&&`` needs no brackets in ``||``."""
        if not self.is_conjunction:
            return "||".join(part.rule_text for part in self.fragments)
        return "&&".join(
            f"({p.rule_text})" if isinstance(p, ClauseGroup) else p.rule_text
            for p in self.fragments
        )


RuleFragment: TypeAlias = Clause | ClauseGroup


def split_rule(text: str) -> RuleFragment:
    """Return the fragments of a rule or filter.

    Raises:
        RuleError: It is not of the language.
    """
    return _fragment(parse_expression(text), text)


def _fragment(expression: ExpressionNode, text: str) -> RuleFragment:
    match expression:
        case ComparisonNode(left, op, is_any, right):
            sign = f"?{op.value}" if is_any else op.value
            return Clause(_operand_text(left, text), sign, _operand_text(right, text))
        case AndNode(parts):
            return ClauseGroup(True, tuple(_fragment(part, text) for part in parts))
        case OrNode(parts):
            return ClauseGroup(False, tuple(_fragment(part, text) for part in parts))


def _operand_text(operand: OperandNode, text: str) -> str:
    match operand:
        case LiteralNode() | IdentifierNode():
            return text[operand.start : operand.end]
        case CallNode(name, args):
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
    text = fragment.rule_text
    if is_filter:
        is_superuser = isinstance(request.principal, Superuser)
        predicate = resolve_filter(text, collections, collection, auth, is_superuser=is_superuser)
    else:
        predicate = resolve_rule(text, collections, collection, auth)
    operands: tuple[OperandValue, ...] = ()
    if isinstance(fragment, Clause):
        values = _OperandValues(collections, collection, request, row, now)
        # The conditions that a filter adds by itself follow its own.
        first = comparisons(predicate.where)[0]
        operands = (
            *values.operand_value(fragment.left, first.left),
            *values.operand_value(fragment.right, first.right),
        )
    return FragmentQueries(
        reference_query=query_of_predicate(collections, collection, predicate, request),
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
            case ParameterTerm(LiteralParameter()):
                return
            case Keyword() if text.lower() in {"true", "false", "null"}:
                return
            case Keyword(keyword):
                value = KnownValue(keyword)
            case AbsentEach():
                value = KnownValue(None)
            case ParameterTerm(RequestValue(is_isset=True) as parameter):
                value = KnownValue(bool(self._parameter_value(parameter)))
            case ParameterTerm(parameter):
                value = KnownValue(self._parameter_value(parameter))
            case _ if _is_hidden(term):
                value = HiddenValue()
            case _:
                value = self._values_query(term)
                is_boolean = (
                    isinstance(term, FieldValue)
                    and term.field.kind is FieldKind.BOOL
                    and not term.field.is_multiple
                    and term.modifier is Modifier.WHOLE
                )
        yield OperandValue(text=text, value=value, is_boolean=is_boolean)

    def _parameter_value(self, parameter: Parameter) -> Scalar:
        return parameter_value(parameter, self.request, self.now)

    def _values_query(self, term: Term) -> SqlQuery:
        """Return the query for the values, at most ``MAX_SHOWN_VALUES`` and one more."""
        parameters = condition_parameters(Comparison(term, Op.EQ, True, Keyword(None)))
        classes = {
            parameter: parameter_class(self._parameter_value(parameter)) for parameter in parameters
        }
        values = _translate_values(term, self.collections, classes)
        params = image_params([[self.row[column] for column in values.column_names]])
        params |= sql_params(values.bindings, self.request, self.now)
        return SqlQuery(_shown_values_sql(values, self.collection), params)


def _translate_values(
    term: Term, collections: Collections, parameter_classes: Mapping[Parameter, ParameterClass]
) -> SqlValues:
    """Return the values of an operand, NULL included: the text, and whether it is a number."""
    translation = Translation(collections=collections, parameter_classes=parameter_classes)
    scope = Scope(translation, nodes.ROW_ALIAS, is_row_image=True)
    operand = translate_operand(term, scope, is_strict=False)
    is_number = (
        nodes.boolean(False) if operand.number is None else nodes.is_not_null(operand.number)
    )
    values = SqlValues.of_scope(scope, operand.as_text, nodes.boolean(True))
    values.select.append("expressions", nodes.copy_if_attached(is_number))
    return values


def _shown_values_sql(values: SqlValues, collection: Collection) -> str:
    values.select.set("distinct", exp.Distinct())
    values.select.set("limit", exp.Limit(expression=nodes.number(MAX_SHOWN_VALUES + 1)))
    shown = "value", "is_number"
    found = exp.Lateral(
        this=exp.Subquery(this=values.select), alias=nodes.row_alias("found", *shown)
    )
    rows, _ = images_table(collection.table, values.column_names)
    columns = [nodes.column("found", name) for name in shown]
    return nodes.to_text(nodes.select(columns, rows, joins=[exp.Join(this=found, kind="CROSS")]))


def _is_hidden(term: Term) -> bool:
    """Return whether the value is made of a field that records hide, or reached through one."""
    match term:
        case SecretTerm():
            return True
        case GeoDistance(args):
            return any(_is_hidden(arg) for arg in args)
        case Strftime(time=time):
            return time is not None and _is_hidden(time)
        case _:
            return any(field.is_hidden or field.is_secret for field in _fields_read(term))


def _fields_read(term: Term) -> Iterator[Field]:
    if isinstance(term, FieldValue | JsonValue):
        yield term.field
    path = row_path_of(term)
    for step in () if path is None else path.steps:
        if not isinstance(step, ToEach):
            yield step.field
