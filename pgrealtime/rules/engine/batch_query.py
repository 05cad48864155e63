"""The two questions put to PostgreSQL: which pairs match, and which keys match. Many rows at once.

``Evaluation`` makes them; ``rule_queries`` runs ``sql_query`` and calls ``accept`` with the result.
The rows are arrays of their columns' text forms, and what differs per pair is one too.
If the statement fails, it asks the parts that ``split`` yields, so that one row or value that
PostgreSQL can't process denies nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

from sqlglot import exp

from pgrealtime.caches import cached_per_object
from pgrealtime.rules.engine.formula import Test
from pgrealtime.rules.engine.index_keys import RemoteKey
from pgrealtime.rules.language.parameters import (
    Binding,
    LiteralParameter,
    Macro,
    MacroValues,
    to_sql_value,
)
from pgrealtime.rules.language.sqlite_values import Scalar
from pgrealtime.rules.memory.compare import SqliteValue
from pgrealtime.rules.memory.operands import Arguments
from pgrealtime.rules.sql import nodes, row_images
from pgrealtime.rules.sql.joins import FORM_TYPES
from pgrealtime.rules.sql.nodes import ROW_ALIAS, Sql
from pgrealtime.rules.sql.reference import SqlQuery
from pgrealtime.rules.sql.row_images import Overlay, RowImages

ColumnTexts: TypeAlias = tuple[str | None, ...]
"""The text forms of the columns that are read of a row."""


@dataclass(slots=True, kw_only=True)
class PairQuestion:
    """Which of some pairs of a row and arguments make a test true."""

    test: Test
    pairs: Sequence[tuple[ColumnTexts, Arguments]]
    """Distinct; of the row, the columns that the test's SQL reads."""
    overlays: Sequence[Overlay] = ()
    """Related tables before the rows' transaction, for rows that it deleted."""
    matching_positions: set[int] = field(default_factory=set)
    """The answer: positions in ``pairs``."""
    is_postponed: bool = False
    """Whether it was not asked for lack of time. What depends on it stays open, it isn't denied."""

    @property
    def subject(self) -> Test:
        """What all questions of its kind share: circuit breakers and costs are kept by it."""
        return self.test

    def sql_query(self) -> SqlQuery | None:
        """Return the statement, whose result are positions in ``pairs``.

        None if an overlay lacks a column that it reads: then nothing matches.
        """
        predicate, table = self.test.sql_predicate, self.test.collection.table
        number_of: dict[ColumnTexts, int] = {}
        row_numbers = [number_of.setdefault(row, len(number_of)) for row, _ in self.pairs]
        rows = list(number_of)
        argument_of = _pair_parameters(self.test)
        _, arguments = self.pairs[0]
        own_count = len(self.test.caller_parameters)
        macro_values = dict(zip(self.test.macros, arguments[own_count:], strict=True))
        params = row_images.image_params(rows)
        for name, binding in predicate.bindings.items():
            if name in argument_of:
                i = argument_of[name]
                params[name] = [to_sql_value(args[i], binding.form) for _, args in self.pairs]
            else:
                params[name] = _shared_value(binding, macro_values)
        if argument_of:
            params |= {"n": list(range(len(self.pairs))), "at": row_numbers}
        if not self.overlays:
            return SqlQuery(_plain_pairs_sql(self.test), params)
        images = RowImages(row_images.find_columns(table, predicate.column_names), rows)
        replaced = row_images.with_overlays([predicate.condition], self.overlays, params, images)
        if replaced is None:
            return None
        (condition,), ctes = replaced
        return SqlQuery(_pairs_sql(self.test, condition, ctes), params)

    def accept(self, rows: Sequence[tuple[object, ...]]) -> None:
        """Take the statement's result."""
        self.matching_positions.update(int(str(position)) for (position,) in rows)

    def split(self) -> Iterator[PairQuestion]:
        """Yield a question for each row, or for each pair if there is one row.

        A part's answer is taken over when the next part is asked for. A single pair has no parts.
        """
        by_row: defaultdict[ColumnTexts, list[int]] = defaultdict(list)
        for position, (row, _) in enumerate(self.pairs):
            by_row[row].append(position)
        parts = list(by_row.values()) if len(by_row) > 1 else [[n] for n in range(len(self.pairs))]
        if len(parts) == 1:
            return
        for positions in parts:
            pairs = [self.pairs[position] for position in positions]
            part = PairQuestion(test=self.test, pairs=pairs, overlays=self.overlays)
            yield part
            self.matching_positions.update(positions[i] for i in part.matching_positions)


@dataclass(slots=True, kw_only=True)
class KeyQuestion:
    """Which values of a caller make a comparison true for some rows."""

    remote_key: RemoteKey
    rows: Sequence[ColumnTexts]
    """Distinct; the columns that the key's SQL reads."""
    macro_values: MacroValues
    max_texts_per_row: int
    """How many texts of one row are fetched at most; numbers are all fetched."""
    wanted_keys: Sequence[str] | None = None
    """The only keys that matter; None if all do."""
    overlays: Sequence[Overlay] = ()
    """Related tables before the rows' transaction, for rows that it deleted."""
    keys_by_row: list[set[SqliteValue]] = field(default_factory=list)
    """The answer, for each row."""
    is_postponed: bool = False
    """Whether it was not asked for lack of time. What depends on it stays open, it isn't denied."""

    def __post_init__(self) -> None:
        self.keys_by_row = [set() for _ in self.rows]

    @property
    def subject(self) -> RemoteKey:
        """What all questions of its kind share: circuit breakers and costs are kept by it."""
        return self.remote_key

    @property
    def _has_limit(self) -> bool:
        return self.wanted_keys is None and not self.remote_key.is_numeric

    def is_truncated(self, keys: Sized) -> bool:
        """Whether a row has more keys than these, which are its answer."""
        return self._has_limit and len(keys) > self.max_texts_per_row

    def sql_query(self) -> SqlQuery | None:
        """Return the statement, whose result are positions in ``rows``, and keys.

        None if an overlay lacks a column that it reads: then nothing matches.
        """
        values, table = self.remote_key.sql_values, self.remote_key.collection.table
        has_wanted_keys = self.wanted_keys is not None
        params = row_images.image_params(self.rows)
        for name, binding in values.bindings.items():
            params[name] = _shared_value(binding, self.macro_values)
        params["limit"] = self.max_texts_per_row + 1 if self._has_limit else None
        params["wanted"] = self.wanted_keys
        if not self.overlays:
            plain_sql = _plain_wanted_keys_sql if has_wanted_keys else _plain_keys_sql
            return SqlQuery(plain_sql(self.remote_key), params)
        images = RowImages(row_images.find_columns(table, values.column_names), self.rows)
        replaced = row_images.with_overlays([values.select], self.overlays, params, images)
        if replaced is None:
            return None
        (select,), ctes = replaced
        sql = _keys_sql(self.remote_key, select, ctes, has_wanted_keys=has_wanted_keys)
        return SqlQuery(sql, params)

    def accept(self, rows: Sequence[tuple[object, ...]]) -> None:
        """Take the statement's result."""
        for position, text in rows:
            self.keys_by_row[int(str(position))].add(self.remote_key.parse_key(str(text)))

    def split(self) -> Iterator[KeyQuestion]:
        """Yield a question for each row, unless there is only one.

        A part's answer is taken over when the next part is asked for.
        """
        if len(self.rows) == 1:
            return
        for position, row in enumerate(self.rows):
            part = replace(self, rows=[row], is_postponed=False)
            yield part
            self.keys_by_row[position] = part.keys_by_row[0]


Question: TypeAlias = PairQuestion | KeyQuestion


def _pair_parameters(test: Test) -> dict[str, int]:
    """Return the names of the test's SQL parameters that differ per pair, and their arguments."""
    return {
        name: test.caller_parameters.index(binding.parameter)
        for name, binding in test.sql_predicate.bindings.items()
        if not isinstance(binding.parameter, (LiteralParameter, Macro))
    }


def _shared_value(binding: Binding, macro_values: Mapping[Macro, Scalar]) -> Scalar:
    """Return the value of an SQL parameter that is the same for all pairs, or rows."""
    match binding.parameter:
        case LiteralParameter(constant):
            return to_sql_value(constant, binding.form)
        case Macro() as macro:
            return to_sql_value(macro_values[macro], binding.form)
        case _:
            raise AssertionError("a caller's parameter differs per pair")


# --- statements


def _pairs_sql(
    test: Test, condition: Sql | None = None, overlay_ctes: Sequence[exp.CTE] = ()
) -> str:
    """Return the statement for the numbers of the pairs of a row and arguments that match.

    What differs per pair is given as arrays, as are ``n``, the pairs' numbers, and ``at``, the
    rows' numbers; if nothing does, rows are numbered. ``condition`` is the test's, reading
    ``overlay_ctes`` in place of tables.
    """
    predicate, table, names = test.sql_predicate, test.collection.table, _pair_parameters(test)
    condition = predicate.condition if condition is None else condition
    if not names:
        return row_images.matching_rows_sql(table, predicate.column_names, condition, overlay_ctes)
    rows, ordinal = row_images.images_table(table, predicate.column_names)
    is_row = nodes.binary(exp.EQ, nodes.column(ROW_ALIAS, ordinal), nodes.column("q", "at"))
    types = {name: FORM_TYPES[predicate.bindings[name].form] for name in names}

    def read_pair(node: exp.Expr) -> exp.Expr:
        is_of_pair = isinstance(node, exp.Placeholder) and node.name in names
        return nodes.column("q", node.name) if is_of_pair else node

    select = nodes.select(
        [nodes.column("q", "n")],
        row_images.unnest_arrays("q", {"n": "int", "at": "int", **types}),
        joins=[exp.Join(this=rows, on=is_row)],
        where=condition.copy().transform(read_pair),
    )
    return nodes.to_text(select, overlay_ctes)


def _keys_sql(
    remote_key: RemoteKey,
    select: Sql | None = None,
    overlay_ctes: Sequence[exp.CTE] = (),
    *,
    has_wanted_keys: bool,
) -> str:
    """Return the statement for the numbers of rows, and the distinct keys of each.

    ``select`` is that of the key's values, reading ``overlay_ctes`` in place of tables. With
    ``has_wanted_keys`` only the keys in the array ``wanted`` are returned. ``limit`` bounds how
    many of one row are.
    """
    values = remote_key.sql_values
    inner = (values.select if select is None else select).copy()
    assert isinstance(inner, exp.Select)
    if has_wanted_keys:
        (text,) = inner.expressions
        wanted = exp.Any(this=exp.Paren(this=nodes.cast(nodes.placeholder("wanted"), "text[]")))
        is_wanted = exp.EQ(this=nodes.collate_c(text), expression=wanted)
        inner.set("where", exp.Where(this=nodes.all_of(inner.args["where"].this, is_wanted)))
    limit = nodes.cast(nodes.placeholder("limit"), nodes.BIGINT)
    rows, ordinal = row_images.images_table(remote_key.collection.table, values.column_names)
    numbers = [nodes.column(ROW_ALIAS, ordinal)]
    keys = row_images.distinct_values(inner, limit, ["value"], rows, numbers)
    return nodes.to_text(keys, overlay_ctes)


_plain_pairs_sql = cached_per_object(_pairs_sql)
_plain_keys_sql = cached_per_object(partial(_keys_sql, has_wanted_keys=False))
_plain_wanted_keys_sql = cached_per_object(partial(_keys_sql, has_wanted_keys=True))
"""Without overlays."""
