"""A rule taken apart for people: its comparisons, each a rule of its own, and what they compare.

What a part means is asked of the reference query, never worked out here. That of a join may differ
from what its parts say one by one: ``?`` comparisons of one path speak of one and the same row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias

from sqlglot import exp

from pgrealtime.auth.principal import Superuser
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections, Field, FieldKind
from pgrealtime.rules.language.parameter_values import parameter_value, to_sql_value
from pgrealtime.rules.language.parameters import (
    CallerColumn,
    LiteralParameter,
    Parameter,
    RequestValue,
    parameter_class,
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
from pgrealtime.rules.sql.conditions import SqlValues, translate_explained_values
from pgrealtime.rules.sql.reference import (
    ReferenceQuery,
    SqlQuery,
    auth_collection_of,
    query_of_predicate,
)
from pgrealtime.rules.sql.row_images import find_columns, images_table, unused_column_name

MAX_SHOWN_VALUES = 5
"""Of one side that are told; one more is asked for, to see that there are more."""


@dataclass(frozen=True, slots=True)
class Clause:
    """One comparison. Comments are left out."""

    left: str
    operator: str
    right: str

    @property
    def display_text(self) -> str:
        """For people."""
        return f"{self.left} {self.operator} {self.right}"

    @property
    def rule_text(self) -> str:
        """No longer than what it was made of: filters have a limit."""
        return f"{self.left}{self.operator}{self.right}"


@dataclass(frozen=True, slots=True)
class ClauseGroup:
    """Parts of which all, or any, must be true; two at least, in the text's order."""

    is_conjunction: bool
    fragments: tuple[RuleFragment, ...]

    @property
    def display_text(self) -> str:
        """For people."""
        sign = " && " if self.is_conjunction else " || "
        return sign.join(
            f"({p.display_text})" if isinstance(p, ClauseGroup) else p.display_text
            for p in self.fragments
        )

    @property
    def rule_text(self) -> str:
        """No longer than what it was made of: ``&&`` binds stronger and needs no brackets."""
        if not self.is_conjunction:
            return "||".join(part.rule_text for part in self.fragments)
        return "&&".join(
            f"({p.rule_text})" if isinstance(p, ClauseGroup) else p.rule_text
            for p in self.fragments
        )


RuleFragment: TypeAlias = Clause | ClauseGroup


def split_rule(text: str) -> RuleFragment:
    """Return the parts of a rule or filter.

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


# --- what a part means


@dataclass(frozen=True, slots=True)
class KnownValue:
    """A value that needs no look at any row."""

    value: Scalar


@dataclass(frozen=True, slots=True)
class HiddenValue:
    """The value of a field that records don't show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperandValue:
    """One side of a comparison whose text doesn't say its value."""

    text: str
    value: KnownValue | HiddenValue | SqlQuery
    """A question's result has a row for each related row: the text, and whether it is a number."""
    is_boolean: bool = False
    """1 and 0 stand for true and false."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentQueries:
    """A part, ready to be asked."""

    reference_query: ReferenceQuery
    operand_values: tuple[OperandValue, ...]
    """Of a comparison; of a join none."""


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
    """Return how to ask what a part of a rule or of a client's filter means by itself.

    Args:
        fragment: The part.
        collections: All there are.
        collection: The one whose row is judged.
        request: The subscriber.
        row: The judged row, whole.
        now: What macros mean; with its zone.
        is_filter: It is part of the filter: held to what its sender may see.

    Raises:
        RuleError: The part can't be used by this subscriber.
    """
    auth = auth_collection_of(collections, request)
    if is_filter:
        is_superuser = isinstance(request.principal, Superuser)
        predicate = resolve_filter(
            fragment.rule_text, collections, collection, auth, is_superuser=is_superuser
        )
    else:
        predicate = resolve_rule(fragment.rule_text, collections, collection, auth)
    sides: tuple[OperandValue, ...] = ()
    if isinstance(fragment, Clause):
        looking = _OperandValues(collections, collection, request, row, now)
        # What a filter is held to comes behind what it says.
        first = next(comparisons(predicate.where))
        texts = (fragment.left, first.left), (fragment.right, first.right)
        sides = tuple(side for text, term in texts for side in looking.operand_value(text, term))
    return FragmentQueries(
        reference_query=query_of_predicate(collections, collection, predicate, request),
        operand_values=sides,
    )


@dataclass(frozen=True, slots=True)
class _OperandValues:
    collections: Collections
    collection: Collection
    request: RuleRequest
    row: Row
    now: datetime

    def operand_value(self, text: str, term: Term) -> Iterator[OperandValue]:
        """Yield the side, unless its text says it all."""
        match term:
            case ParameterTerm(LiteralParameter()):
                return
            case Keyword() if text.lower() in {"true", "false", "null"}:
                return
            case Keyword(flag):
                yield OperandValue(text=text, value=KnownValue(flag))
            case AbsentEach():
                yield OperandValue(text=text, value=KnownValue(None))
            case ParameterTerm(RequestValue(is_isset=True) as parameter):
                yield OperandValue(
                    text=text, value=KnownValue(bool(self._parameter_value(parameter)))
                )
            case ParameterTerm(parameter):
                yield OperandValue(text=text, value=KnownValue(self._parameter_value(parameter)))
            case _ if _is_hidden(term):
                yield OperandValue(text=text, value=HiddenValue())
            case FieldValue(
                field=Field(kind=FieldKind.BOOL, is_multiple=False), modifier=Modifier.WHOLE
            ):
                yield OperandValue(text=text, value=self._values_query(term), is_boolean=True)
            case _:
                yield OperandValue(text=text, value=self._values_query(term))

    def _parameter_value(self, parameter: Parameter) -> Scalar:
        return parameter_value(parameter, self.request, self.now)

    def _values_query(self, term: Term) -> SqlQuery:
        """Return the query for the values, at most ``MAX_SHOWN_VALUES`` and one more."""
        found = condition_parameters(Comparison(term, Op.EQ, True, Keyword(None)))
        shapes = {
            parameter: parameter_class(self._parameter_value(parameter)) for parameter in found
        }
        lowered = translate_explained_values(term, self.collections, shapes)
        params: dict[str, object] = {"i": [0]}
        for at, column in enumerate(lowered.columns):
            params[f"c{at}"] = [self.row[column]]
        for key, binding in lowered.bindings.items():
            assert not isinstance(binding.parameter, CallerColumn)  # its own row is read
            params[key] = to_sql_value(self._parameter_value(binding.parameter), binding.form)
        return SqlQuery(_shown_values_sql(lowered, self.collection), params)


def _shown_values_sql(lowered: SqlValues, collection: Collection) -> str:
    lowered.select.set("distinct", exp.Distinct())
    lowered.select.set("limit", exp.Limit(expression=nodes.number(MAX_SHOWN_VALUES + 1)))
    columns = find_columns(collection.table, lowered.columns)
    names = [nodes.quoted_name("value"), nodes.quoted_name("is_number")]
    found = exp.Lateral(
        this=exp.Subquery(this=lowered.select),
        alias=exp.TableAlias(this=nodes.quoted_name("found"), columns=names),
    )
    select = exp.Select(
        expressions=[nodes.column("found", "value"), nodes.column("found", "is_number")],
        from_=exp.From(this=images_table(columns, unused_column_name(lowered.columns))),
        joins=[exp.Join(this=found, kind="CROSS")],
    )
    return select.sql(dialect="postgres", copy=False)


def _is_hidden(term: Term) -> bool:
    """Whether it is made of what not everybody is shown, or found by way of it."""
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
    place = row_path_of(term)
    for step in () if place is None else place.steps:
        if not isinstance(step, ToEach):
            yield step.field
