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
from pgrealtime.rules.language.parameters import (
    AuthColumn,
    Literal,
    Parameter,
    RequestValue,
    Scalar,
    render,
    shape,
    value,
)
from pgrealtime.rules.language.predicate import (
    Comparison,
    Constant,
    FieldValue,
    GeoDistance,
    Hidden,
    JsonValue,
    Keyword,
    NoItem,
    Part,
    Strftime,
    Term,
    ToItem,
    comparisons,
    parameters,
    place_of,
)
from pgrealtime.rules.language.request import Request
from pgrealtime.rules.language.resolve import resolve_filter, resolve_rule
from pgrealtime.rules.language.syntax import (
    And,
    Call,
    Cmp,
    Expression,
    Lit,
    Op,
    Operand,
    Or,
    Path,
    parse,
)
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.conditions import LoweredValues, lower_shown
from pgrealtime.rules.sql.reference import Question, Reference, alone, auth_collection
from pgrealtime.rules.sql.row_images import columns_of, free_name, images

MOST_VALUES = 5
"""Of one side that are told; one more is asked for, to see that there are more."""


@dataclass(frozen=True, slots=True)
class Clause:
    """One comparison. Comments are left out."""

    left: str
    operator: str
    right: str

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.left} {self.operator} {self.right}"

    @property
    def rule(self) -> str:
        """No longer than what it was made of: filters have a limit."""
        return f"{self.left}{self.operator}{self.right}"


@dataclass(frozen=True, slots=True)
class Joined:
    """Parts of which all, or any, must be true; two at least, in the text's order."""

    is_all: bool
    parts: tuple[Piece, ...]

    @property
    def text(self) -> str:
        """For people."""
        sign = " && " if self.is_all else " || "
        return sign.join(f"({p.text})" if isinstance(p, Joined) else p.text for p in self.parts)

    @property
    def rule(self) -> str:
        """No longer than what it was made of: ``&&`` binds stronger and needs no brackets."""
        if not self.is_all:
            return "||".join(part.rule for part in self.parts)
        return "&&".join(f"({p.rule})" if isinstance(p, Joined) else p.rule for p in self.parts)


Piece: TypeAlias = Clause | Joined


def split(text: str) -> Piece:
    """Return the parts of a rule or filter.

    Raises:
        RuleError: It is not of the language.
    """
    return _piece(parse(text), text)


def _piece(expression: Expression, text: str) -> Piece:
    match expression:
        case Cmp(left, op, is_any, right):
            sign = f"?{op.value}" if is_any else op.value
            return Clause(_operand(left, text), sign, _operand(right, text))
        case And(parts):
            return Joined(True, tuple(_piece(part, text) for part in parts))
        case Or(parts):
            return Joined(False, tuple(_piece(part, text) for part in parts))


def _operand(operand: Operand, text: str) -> str:
    match operand:
        case Lit() | Path():
            return text[operand.start : operand.end]
        case Call(name, args):
            return f"{name}({','.join(_operand(arg, text) for arg in args)})"


# --- what a part means


@dataclass(frozen=True, slots=True)
class Told:
    """A value that needs no look at any row."""

    value: Scalar


@dataclass(frozen=True, slots=True)
class Masked:
    """The value of a field that records don't show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of a comparison whose text doesn't say its value."""

    text: str
    value: Told | Masked | Question
    """A question's result has a row for each related row: the text, and whether it is a number."""
    is_flag: bool = False
    """1 and 0 stand for true and false."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A part, ready to be asked."""

    reference: Reference
    sides: tuple[Side, ...]
    """Of a comparison; of a join none."""


def asked(
    piece: Piece,
    collections: Collections,
    collection: Collection,
    *,
    request: Request,
    row: Row,
    now: datetime,
    is_filter: bool,
) -> Asked:
    """Return how to ask what a part of a rule or of a client's filter means by itself.

    Args:
        piece: The part.
        collections: All there are.
        collection: The one whose row is judged.
        request: The subscriber.
        row: The judged row, whole.
        now: What macros mean; with its zone.
        is_filter: It is part of the filter: held to what its sender may see.

    Raises:
        RuleError: The part can't be used by this subscriber.
    """
    auth = auth_collection(collections, request)
    if is_filter:
        is_superuser = isinstance(request.principal, Superuser)
        predicate = resolve_filter(
            piece.rule, collections, collection, auth, is_superuser=is_superuser
        )
    else:
        predicate = resolve_rule(piece.rule, collections, collection, auth)
    sides: tuple[Side, ...] = ()
    if isinstance(piece, Clause):
        looking = _Looking(collections, collection, request, row, now)
        # What a filter is held to comes behind what it says.
        first = next(comparisons(predicate.where))
        texts = (piece.left, first.left), (piece.right, first.right)
        sides = tuple(side for text, term in texts for side in looking.side(text, term))
    return Asked(reference=alone(collections, collection, predicate, request), sides=sides)


@dataclass(frozen=True, slots=True)
class _Looking:
    collections: Collections
    collection: Collection
    request: Request
    row: Row
    now: datetime

    def side(self, text: str, term: Term) -> Iterator[Side]:
        """Yield the side, unless its text says it all."""
        match term:
            case Constant(Literal()):
                return
            case Keyword() if text.lower() in {"true", "false", "null"}:
                return
            case Keyword(flag):
                yield Side(text=text, value=Told(flag))
            case NoItem():
                yield Side(text=text, value=Told(None))
            case Constant(RequestValue(is_set=True) as parameter):
                yield Side(text=text, value=Told(bool(self._value(parameter))))
            case Constant(parameter):
                yield Side(text=text, value=Told(self._value(parameter)))
            case _ if _is_hidden(term):
                yield Side(text=text, value=Masked())
            case FieldValue(field=Field(kind=FieldKind.BOOL, is_multiple=False), part=Part.WHOLE):
                yield Side(text=text, value=self._question(term), is_flag=True)
            case _:
                yield Side(text=text, value=self._question(term))

    def _value(self, parameter: Parameter) -> Scalar:
        return value(parameter, self.request, self.now)

    def _question(self, term: Term) -> Question:
        """Return the query for the values, at most ``MOST_VALUES`` and one more."""
        found = parameters(Comparison(term, Op.EQ, True, Keyword(None)))
        shapes = {parameter: shape(self._value(parameter)) for parameter in found}
        lowered = lower_shown(term, self.collections, shapes)
        params: dict[str, object] = {"i": [0]}
        for at, column in enumerate(lowered.columns):
            params[f"c{at}"] = [self.row[column]]
        for key, binding in lowered.bindings.items():
            assert not isinstance(binding.parameter, AuthColumn)  # its own row is read
            params[key] = render(self._value(binding.parameter), binding.form)
        return Question(_print(lowered, self.collection), params)


def _print(lowered: LoweredValues, collection: Collection) -> str:
    lowered.select.set("distinct", exp.Distinct())
    lowered.select.set("limit", exp.Limit(expression=nodes.number(MOST_VALUES + 1)))
    columns = columns_of(collection.table, lowered.columns)
    names = [nodes.name("value"), nodes.name("is_number")]
    found = exp.Lateral(
        this=exp.Subquery(this=lowered.select),
        alias=exp.TableAlias(this=nodes.name("found"), columns=names),
    )
    select = exp.Select(
        expressions=[nodes.column("found", "value"), nodes.column("found", "is_number")],
        from_=exp.From(this=images(columns, free_name(lowered.columns))),
        joins=[exp.Join(this=found, kind="CROSS")],
    )
    return select.sql(dialect="postgres", copy=False)


def _is_hidden(term: Term) -> bool:
    """Whether it is made of what not everybody is shown, or found by way of it."""
    match term:
        case Hidden():
            return True
        case GeoDistance(args):
            return any(_is_hidden(arg) for arg in args)
        case Strftime(time=time):
            return time is not None and _is_hidden(time)
        case _:
            return any(field.is_hidden or field.is_secret for field in _fields(term))


def _fields(term: Term) -> Iterator[Field]:
    if isinstance(term, FieldValue | JsonValue):
        yield term.field
    place = place_of(term)
    for step in () if place is None else place.steps:
        if not isinstance(step, ToItem):
            yield step.field
