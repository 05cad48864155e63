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

from pgrealtime.caches import cached_per_object
from pgrealtime.changes import Row, TableName
from pgrealtime.collections.model import Collection
from pgrealtime.rules.engine.formula import MacroValues, Test
from pgrealtime.rules.engine.index_paths import RemoteKey
from pgrealtime.rules.language.parameter_values import to_sql_value
from pgrealtime.rules.language.parameters import Binding, LiteralParameter, Macro, SqlForm
from pgrealtime.rules.language.sqlite_values import Scalar
from pgrealtime.rules.memory.compare import SqliteValue
from pgrealtime.rules.memory.operands import Arguments
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.conditions import SqlValues, translate_key_values
from pgrealtime.rules.sql.nodes import ROW_ALIAS, Sql, all_of
from pgrealtime.rules.sql.reference import SqlQuery
from pgrealtime.rules.sql.row_images import (
    Overlay,
    RowImages,
    find_columns,
    images_table,
    integer_array,
    unnest_arrays,
    unused_column_name,
    with_overlays,
)

ColumnTexts: TypeAlias = tuple[str | None, ...]
"""The columns that are read of a row, in text form."""


@dataclass(slots=True, kw_only=True)
class PairQuestion:
    """Which of some (row, arguments) make an atom true."""

    test: Test
    pairs: Sequence[tuple[ColumnTexts, Arguments]]
    """Distinct; rows by the columns that ``atom.lowered`` reads."""
    overlays: Sequence[Overlay] = ()
    """Related tables that the rows' transaction touched, for rows that it deleted."""
    matching_positions: set[int] = field(default_factory=set)
    """The answer: places in ``asked``."""
    is_postponed: bool = False
    """Whether nobody waited for the answer: what depends on it is undecided and not denied."""

    @property
    def collection_name(self) -> str:
        """Whose rows it is about."""
        return self.test.collection.name

    @property
    def subject(self) -> Test:
        """What is the same in all inquiries of the kind."""
        return self.test

    def sql_query(self) -> SqlQuery | None:
        """Return the statement, whose rows are places in ``asked``; None if it can't be made."""
        atom = self.test
        places, rows = _number_distinct_rows([cells for cells, _ in self.pairs])
        params = _column_params(rows)
        free = _pair_placeholders(atom)
        for name, binding in atom.sql_predicate.bindings.items():
            if name in free:
                at = free[name]
                params[name] = [to_sql_value(args[at], binding.form) for _, args in self.pairs]
            else:
                params[name] = self._shared_value(binding)
        if free:
            params |= {"n": list(range(len(places))), "at": places}
        if not self.overlays:
            return SqlQuery(_matching_pairs_sql(atom), params)
        judged = RowImages(find_columns(atom.collection.table, atom.sql_predicate.columns), rows)
        made = with_overlays([atom.sql_predicate.condition], self.overlays, params, judged)
        if made is None:
            return None
        (condition,), views = made
        return SqlQuery(_to_sql_text(_matching_pairs_select(atom, condition), views), params)

    def _shared_value(self, binding: Binding) -> Scalar:
        match binding.parameter:
            case LiteralParameter(constant):
                return to_sql_value(constant, binding.form)
            case Macro() as macro:
                _, args = self.pairs[0]
                at = len(self.test.caller_parameters) + self.test.macros.index(macro)
                return to_sql_value(args[at], binding.form)
            case _:
                raise AssertionError("any other parameter is free")

    def accept(self, rows: Sequence[tuple[object, ...]]) -> None:
        """Note the statement's result."""
        self.matching_positions.update(int(str(place)) for (place,) in rows)

    def split(self) -> Iterator[PairQuestion]:
        """Yield the questions that this one is made of, by row, or by pair if it is of one row."""
        by_row: defaultdict[ColumnTexts, list[int]] = defaultdict(list)
        for place, (cells, _) in enumerate(self.pairs):
            by_row[cells].append(place)
        parts = list(by_row.values()) if len(by_row) > 1 else [[n] for n in range(len(self.pairs))]
        if len(parts) == 1:
            return
        for places in parts:
            asked = [self.pairs[place] for place in places]
            part = PairQuestion(test=self.test, pairs=asked, overlays=self.overlays)
            yield part
            self.matching_positions.update(places[place] for place in part.matching_positions)


@dataclass(slots=True, kw_only=True)
class KeyQuestion:
    """Which values of a subscriber satisfy a condition on some rows."""

    remote_key: RemoteKey
    rows: Sequence[ColumnTexts]
    """Distinct."""
    macro_values: MacroValues
    max_texts_per_row: int
    """Texts of one row that are fetched at most; numbers are all fetched."""
    wanted_keys: Sequence[str] | None = None
    """The only values that matter; None is all."""
    overlays: Sequence[Overlay] = ()
    keys_by_row: list[set[SqliteValue]] = field(default_factory=list)
    """The answer, by row."""
    is_postponed: bool = False
    """Whether nobody waited for the answer: what depends on it is undecided and not denied."""

    def __post_init__(self) -> None:
        self.keys_by_row = [set() for _ in self.rows]

    @property
    def collection_name(self) -> str:
        """Whose rows it is about."""
        return self.remote_key.predicate.collection

    @property
    def subject(self) -> RemoteKey:
        """What is the same in all inquiries of the kind."""
        return self.remote_key

    @property
    def _has_limit(self) -> bool:
        return self.wanted_keys is None and not self.remote_key.is_numeric

    def is_truncated(self, keys: Sized) -> bool:
        """Whether a row has more values than were found."""
        return self._has_limit and len(keys) > self.max_texts_per_row

    def sql_query(self) -> SqlQuery | None:
        """Return the statement: places in ``rows``, and values. None if it can't be made."""
        lowered = sql_values_of(self.remote_key)
        params = _column_params(self.rows)
        for name, binding in lowered.bindings.items():
            match binding.parameter:
                case LiteralParameter(constant):
                    params[name] = to_sql_value(constant, binding.form)
                case Macro() as macro:
                    params[name] = to_sql_value(self.macro_values[macro], binding.form)
                case _:
                    raise AssertionError("a source has no free parameters")
        params["limit"] = self.max_texts_per_row + 1 if self._has_limit else None
        params["wanted"] = self.wanted_keys
        if not self.overlays:
            statement = _all_keys_sql if self.wanted_keys is None else _wanted_keys_sql
            return SqlQuery(statement(self.remote_key), params)
        collection = self.remote_key.collections[self.remote_key.predicate.collection]
        judged = RowImages(find_columns(collection.table, lowered.columns), self.rows)
        made = with_overlays([lowered.select], self.overlays, params, judged)
        if made is None:
            return None
        (select,), views = made
        return SqlQuery(
            _to_sql_text(
                _keys_select(self.remote_key, select, has_wanted_keys=self.wanted_keys is not None),
                views,
            ),
            params,
        )

    def accept(self, rows: Sequence[tuple[object, ...]]) -> None:
        """Note the statement's result."""
        for place, text in rows:
            self.keys_by_row[int(str(place))].add(self.remote_key.parse_key(str(text)))

    def split(self) -> Iterator[KeyQuestion]:
        """Yield the questions that this one is made of, by row."""
        if len(self.rows) == 1:
            return
        for place, cells in enumerate(self.rows):
            part = KeyQuestion(
                remote_key=self.remote_key,
                rows=[cells],
                macro_values=self.macro_values,
                max_texts_per_row=self.max_texts_per_row,
                wanted_keys=self.wanted_keys,
                overlays=self.overlays,
            )
            yield part
            self.keys_by_row[place] = part.keys_by_row[0]


Question: TypeAlias = PairQuestion | KeyQuestion


def tables_read(question: Question) -> frozenset[TableName]:
    """Return what a question reads beside the rows."""
    match question:
        case PairQuestion(test=atom):
            return atom.sql_predicate.tables
        case KeyQuestion(remote_key=source):
            return sql_values_of(source).tables


@cached_per_object
def sql_values_of(remote_key: RemoteKey) -> SqlValues:
    """Return the SELECT of a source's values.

    Raises:
        RuleUnsupportedError: It can't be decided exactly.
    """
    return translate_key_values(
        remote_key.term, remote_key.where, remote_key.collections, remote_key.parameter_classes
    )


def column_texts(row: Row, columns: Sequence[str]) -> ColumnTexts:
    """Return the columns of a row image, which must be there."""
    return tuple([row[name] for name in columns])


# --- statements


def _number_distinct_rows(rows: Sequence[ColumnTexts]) -> tuple[list[int], list[ColumnTexts]]:
    """Return the distinct rows, and for each given one its place among them."""
    known: dict[ColumnTexts, int] = {}
    return [known.setdefault(cells, len(known)) for cells in rows], list(known)


def _column_params(rows: Sequence[ColumnTexts]) -> dict[str, object]:
    params: dict[str, object] = {"i": list(range(len(rows)))}
    for at, column in enumerate(zip(*rows, strict=True)):
        params[f"c{at}"] = list(column)
    return params


def _pair_placeholders(test: Test) -> dict[str, int]:
    """Return the placeholders that differ per pair, and which argument each is."""
    return {
        name: test.caller_parameters.index(binding.parameter)
        for name, binding in test.sql_predicate.bindings.items()
        if not isinstance(binding.parameter, (LiteralParameter, Macro))
    }


_ARRAY_TYPES = {
    SqlForm.TEXT: "text[]",
    SqlForm.NUMBER: "text[]",
    SqlForm.PATTERN: "text[]",
    SqlForm.UUID: "uuid[]",
    SqlForm.INTEGER: "bigint[]",
    SqlForm.JSON: "text[]",
}


@cached_per_object
def _matching_pairs_sql(test: Test) -> str:
    return _to_sql_text(_matching_pairs_select(test, test.sql_predicate.condition), [])


def _matching_pairs_select(test: Test, condition: Sql) -> exp.Select:
    """Return the SELECT of the pairs that meet the condition; of rows if nothing else differs."""
    rows, ordinal = _row_images_table(test.collection, test.sql_predicate.columns)
    free = _pair_placeholders(test)
    if not free:
        return exp.Select(
            expressions=[nodes.column(ROW_ALIAS, ordinal)],
            from_=exp.From(this=rows),
            where=exp.Where(this=nodes.copy_if_attached(condition)),
        )
    bindings = test.sql_predicate.bindings
    arrays = [
        nodes.cast(nodes.placeholder(name), _ARRAY_TYPES[bindings[name].form]) for name in free
    ]
    pairs = unnest_arrays(
        "q", ["n", "at", *free], [integer_array("n"), integer_array("at"), *arrays]
    )
    is_row = nodes.binary(exp.EQ, nodes.column(ROW_ALIAS, ordinal), nodes.column("q", "at"))
    return exp.Select(
        expressions=[nodes.column("q", "n")],
        from_=exp.From(this=pairs),
        joins=[exp.Join(this=rows, on=is_row)],
        where=exp.Where(this=_correlated(condition, free)),
    )


def _correlated(condition: Sql, placeholders: Mapping[str, int]) -> Sql:
    """Return the condition reading the pair's values in place of parameters."""

    def replaced(node: exp.Expr) -> exp.Expr:
        if isinstance(node, exp.Placeholder) and node.name in placeholders:
            return nodes.column("q", node.name)
        return node

    return condition.copy().transform(replaced)


@cached_per_object
def _all_keys_sql(remote_key: RemoteKey) -> str:
    return _to_sql_text(
        _keys_select(remote_key, sql_values_of(remote_key).select, has_wanted_keys=False), []
    )


@cached_per_object
def _wanted_keys_sql(remote_key: RemoteKey) -> str:
    return _to_sql_text(
        _keys_select(remote_key, sql_values_of(remote_key).select, has_wanted_keys=True), []
    )


def _keys_select(remote_key: RemoteKey, select: Sql, *, has_wanted_keys: bool) -> exp.Select:
    """Return the SELECT of places of rows and the distinct values of each."""
    lowered = sql_values_of(remote_key)
    collection = remote_key.collections[remote_key.predicate.collection]
    rows, ordinal = _row_images_table(collection, lowered.columns)
    inner = select.copy()
    assert isinstance(inner, exp.Select)
    if has_wanted_keys:
        (text,) = inner.expressions
        wanted = exp.Any(this=exp.Paren(this=nodes.cast(nodes.placeholder("wanted"), "text[]")))
        is_one = exp.EQ(this=nodes.collate_c(text), expression=wanted)
        inner.set("where", exp.Where(this=all_of(inner.args["where"].this, is_one)))
    inner.set("distinct", exp.Distinct())
    inner.set("limit", exp.Limit(expression=nodes.cast(nodes.placeholder("limit"), nodes.BIGINT)))
    found = exp.Lateral(
        this=exp.Subquery(this=inner),
        alias=exp.TableAlias(this=nodes.quoted_name("found"), columns=[nodes.quoted_name("value")]),
    )
    return exp.Select(
        expressions=[nodes.column(ROW_ALIAS, ordinal), nodes.column("found", "value")],
        from_=exp.From(this=rows),
        joins=[exp.Join(this=found, kind="CROSS")],
    )


def _row_images_table(collection: Collection, names: Sequence[str]) -> tuple[Sql, str]:
    ordinal = unused_column_name(names)
    return images_table(find_columns(collection.table, names), ordinal), ordinal


def _to_sql_text(select: exp.Select, overlay_ctes: Sequence[exp.CTE]) -> str:
    if overlay_ctes:
        select.set("with_", exp.With(expressions=list(overlay_ctes)))
    return select.sql(dialect="postgres", copy=False)
