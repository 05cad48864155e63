"""What is asked of Postgres, many rows and subscribers at once. After formula and access.

Two questions: which of some pairs of a row and a subscriber's values make an atom true, and, the
other way round, which values do for a row. Both know no driver; ``split`` is for whoever has one
and was told of an error: it takes over what each part brought before it yields the next.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import TypeAlias

from sqlglot import exp

from pgrealtime.caches import kept_with
from pgrealtime.changes import Row, TableName
from pgrealtime.collections.model import Collection
from pgrealtime.rules.engine.formula import Atom, Moment
from pgrealtime.rules.engine.index_paths import RemoteSource
from pgrealtime.rules.language.parameters import Binding, Form, Literal, Macro, render
from pgrealtime.rules.memory.compare import Comparable, Scalar
from pgrealtime.rules.memory.conditions import Args
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.conditions import ROW, LoweredValues, lower_values
from pgrealtime.rules.sql.nodes import Sql, all_of
from pgrealtime.rules.sql.reference import Question
from pgrealtime.rules.sql.row_images import (
    Judged,
    Overlay,
    before,
    columns_of,
    free_name,
    images,
    numbers,
    unnested,
)

Cells: TypeAlias = tuple[str | None, ...]
"""The columns that are read of a row, in text form."""


@dataclass(slots=True, kw_only=True)
class Pairs:
    """Which of some (row, arguments) make an atom true."""

    atom: Atom
    asked: Sequence[tuple[Cells, Args]]
    """Distinct; rows by the columns that ``atom.lowered`` reads."""
    overlays: Sequence[Overlay] = ()
    """Related tables that the rows' transaction touched, for rows that it deleted."""
    admitted: set[int] = field(default_factory=set)
    """The answer: places in ``asked``."""
    is_left: bool = False
    """Whether nobody waited for the answer: what depends on it is undecided and not denied."""

    @property
    def collection(self) -> str:
        """Whose rows it is about."""
        return self.atom.collection.name

    @property
    def about(self) -> Atom:
        """What is the same in all inquiries of the kind."""
        return self.atom

    def question(self) -> Question | None:
        """Return the statement, whose rows are places in ``asked``; None if it can't be made."""
        atom = self.atom
        places, rows = _distinct([cells for cells, _ in self.asked])
        params = _columns(rows)
        free = _free(atom)
        for name, binding in atom.lowered.bindings.items():
            if name in free:
                at = free[name]
                params[name] = [render(args[at], binding.form) for _, args in self.asked]
            else:
                params[name] = self._fixed(binding)
        if free:
            params |= {"n": list(range(len(places))), "at": places}
        if not self.overlays:
            return Question(_statement(atom), params)
        judged = Judged(columns_of(atom.collection.table, atom.lowered.columns), rows)
        made = before([atom.lowered.condition], self.overlays, params, judged)
        if made is None:
            return None
        (condition,), views = made
        return Question(_print(_pairs(atom, condition), views), params)

    def _fixed(self, binding: Binding) -> Scalar:
        match binding.parameter:
            case Literal(constant):
                return render(constant, binding.form)
            case Macro() as macro:
                _, args = self.asked[0]
                at = len(self.atom.free) + self.atom.macros.index(macro)
                return render(args[at], binding.form)
            case _:
                raise AssertionError("any other parameter is free")

    def take(self, rows: Sequence[tuple[object, ...]]) -> None:
        """Note the statement's result."""
        self.admitted.update(int(str(place)) for (place,) in rows)

    def split(self) -> Iterator[Pairs]:
        """Yield the questions that this one is made of, by row, or by pair if it is of one row."""
        by_row: defaultdict[Cells, list[int]] = defaultdict(list)
        for place, (cells, _) in enumerate(self.asked):
            by_row[cells].append(place)
        parts = list(by_row.values()) if len(by_row) > 1 else [[n] for n in range(len(self.asked))]
        if len(parts) == 1:
            return
        for places in parts:
            asked = [self.asked[place] for place in places]
            part = Pairs(atom=self.atom, asked=asked, overlays=self.overlays)
            yield part
            self.admitted.update(places[place] for place in part.admitted)


@dataclass(slots=True, kw_only=True)
class Values:
    """Which values of a subscriber satisfy a condition on some rows."""

    source: RemoteSource
    rows: Sequence[Cells]
    """Distinct."""
    moment: Moment
    limit: int
    """Texts of one row that are fetched at most; numbers are all fetched."""
    wanted: Sequence[str] | None = None
    """The only values that matter; None is all."""
    overlays: Sequence[Overlay] = ()
    found: list[set[Comparable]] = field(default_factory=list)
    """The answer, by row."""
    is_left: bool = False
    """Whether nobody waited for the answer: what depends on it is undecided and not denied."""

    def __post_init__(self) -> None:
        self.found = [set() for _ in self.rows]

    @property
    def collection(self) -> str:
        """Whose rows it is about."""
        return self.source.whole.collection

    @property
    def about(self) -> RemoteSource:
        """What is the same in all inquiries of the kind."""
        return self.source

    @property
    def _is_limited(self) -> bool:
        return self.wanted is None and not self.source.is_number

    def is_cut(self, found: Sized) -> bool:
        """Whether a row has more values than were found."""
        return self._is_limited and len(found) > self.limit

    def question(self) -> Question | None:
        """Return the statement: places in ``rows``, and values. None if it can't be made."""
        lowered = values_of(self.source)
        params = _columns(self.rows)
        for name, binding in lowered.bindings.items():
            match binding.parameter:
                case Literal(constant):
                    params[name] = render(constant, binding.form)
                case Macro() as macro:
                    params[name] = render(self.moment[macro], binding.form)
                case _:
                    raise AssertionError("a source has no free parameters")
        params["limit"] = self.limit + 1 if self._is_limited else None
        params["wanted"] = self.wanted
        if not self.overlays:
            statement = _values_of_all if self.wanted is None else _values_of_some
            return Question(statement(self.source), params)
        collection = self.source.collections[self.source.whole.collection]
        judged = Judged(columns_of(collection.table, lowered.columns), self.rows)
        made = before([lowered.select], self.overlays, params, judged)
        if made is None:
            return None
        (select,), views = made
        return Question(
            _print(_values(self.source, select, is_wanted=self.wanted is not None), views), params
        )

    def take(self, rows: Sequence[tuple[object, ...]]) -> None:
        """Note the statement's result."""
        for place, text in rows:
            self.found[int(str(place))].add(self.source.key(str(text)))

    def split(self) -> Iterator[Values]:
        """Yield the questions that this one is made of, by row."""
        if len(self.rows) == 1:
            return
        for place, cells in enumerate(self.rows):
            part = Values(
                source=self.source,
                rows=[cells],
                moment=self.moment,
                limit=self.limit,
                wanted=self.wanted,
                overlays=self.overlays,
            )
            yield part
            self.found[place] = part.found[0]


Inquiry: TypeAlias = Pairs | Values


def tables_of(inquiry: Inquiry) -> frozenset[TableName]:
    """Return what a question reads beside the rows."""
    match inquiry:
        case Pairs(atom=atom):
            return atom.lowered.tables
        case Values(source=source):
            return values_of(source).tables


@kept_with
def values_of(source: RemoteSource) -> LoweredValues:
    """Return the SELECT of a source's values.

    Raises:
        RuleUnsupportedError: It can't be decided exactly.
    """
    return lower_values(source.term, source.where, source.collections, source.shapes)


def cells_of(row: Row, columns: Sequence[str]) -> Cells:
    """Return the columns of a row image, which must be there."""
    return tuple([row[name] for name in columns])


# --- statements


def _distinct(rows: Sequence[Cells]) -> tuple[list[int], list[Cells]]:
    """Return the distinct rows, and for each given one its place among them."""
    known: dict[Cells, int] = {}
    return [known.setdefault(cells, len(known)) for cells in rows], list(known)


def _columns(rows: Sequence[Cells]) -> dict[str, object]:
    params: dict[str, object] = {"i": list(range(len(rows)))}
    for at, column in enumerate(zip(*rows, strict=True)):
        params[f"c{at}"] = list(column)
    return params


def _free(atom: Atom) -> dict[str, int]:
    """Return the placeholders that differ per pair, and which argument each is."""
    return {
        name: atom.free.index(binding.parameter)
        for name, binding in atom.lowered.bindings.items()
        if not isinstance(binding.parameter, (Literal, Macro))
    }


_ARRAYS = {
    Form.TEXT: "text[]",
    Form.NUMBER: "text[]",
    Form.PATTERN: "text[]",
    Form.UUID: "uuid[]",
    Form.INTEGER: "bigint[]",
    Form.JSON: "text[]",
}


@kept_with
def _statement(atom: Atom) -> str:
    return _print(_pairs(atom, atom.lowered.condition), [])


def _pairs(atom: Atom, condition: Sql) -> exp.Select:
    """Return the SELECT of the pairs that meet the condition; of rows if nothing else differs."""
    rows, ordinal = _images(atom.collection, atom.lowered.columns)
    free = _free(atom)
    if not free:
        return exp.Select(
            expressions=[nodes.column(ROW, ordinal)],
            from_=exp.From(this=rows),
            where=exp.Where(this=nodes.own(condition)),
        )
    bindings = atom.lowered.bindings
    arrays = [nodes.cast(nodes.placeholder(name), _ARRAYS[bindings[name].form]) for name in free]
    pairs = unnested("q", ["n", "at", *free], [numbers("n"), numbers("at"), *arrays])
    is_row = nodes.binary(exp.EQ, nodes.column(ROW, ordinal), nodes.column("q", "at"))
    return exp.Select(
        expressions=[nodes.column("q", "n")],
        from_=exp.From(this=pairs),
        joins=[exp.Join(this=rows, on=is_row)],
        where=exp.Where(this=_correlated(condition, free)),
    )


def _correlated(condition: Sql, free: Mapping[str, int]) -> Sql:
    """Return the condition reading the pair's values in place of parameters."""

    def replaced(node: exp.Expr) -> exp.Expr:
        if isinstance(node, exp.Placeholder) and node.name in free:
            return nodes.column("q", node.name)
        return node

    return condition.copy().transform(replaced)


@kept_with
def _values_of_all(source: RemoteSource) -> str:
    return _print(_values(source, values_of(source).select, is_wanted=False), [])


@kept_with
def _values_of_some(source: RemoteSource) -> str:
    return _print(_values(source, values_of(source).select, is_wanted=True), [])


def _values(source: RemoteSource, select: Sql, *, is_wanted: bool) -> exp.Select:
    """Return the SELECT of places of rows and the distinct values of each."""
    lowered = values_of(source)
    collection = source.collections[source.whole.collection]
    rows, ordinal = _images(collection, lowered.columns)
    inner = select.copy()
    assert isinstance(inner, exp.Select)
    if is_wanted:
        (text,) = inner.expressions
        wanted = exp.Any(this=exp.Paren(this=nodes.cast(nodes.placeholder("wanted"), "text[]")))
        is_one = exp.EQ(this=nodes.collated(text), expression=wanted)
        inner.set("where", exp.Where(this=all_of(inner.args["where"].this, is_one)))
    inner.set("distinct", exp.Distinct())
    inner.set("limit", exp.Limit(expression=nodes.cast(nodes.placeholder("limit"), nodes.INTEGER)))
    found = exp.Lateral(
        this=exp.Subquery(this=inner),
        alias=exp.TableAlias(this=nodes.name("found"), columns=[nodes.name("value")]),
    )
    return exp.Select(
        expressions=[nodes.column(ROW, ordinal), nodes.column("found", "value")],
        from_=exp.From(this=rows),
        joins=[exp.Join(this=found, kind="CROSS")],
    )


def _images(collection: Collection, names: Sequence[str]) -> tuple[Sql, str]:
    ordinal = free_name(names)
    return images(columns_of(collection.table, names), ordinal), ordinal


def _print(select: exp.Select, views: Sequence[exp.CTE]) -> str:
    if views:
        select.set("with_", exp.With(expressions=list(views)))
    return select.sql(dialect="postgres", copy=False)
