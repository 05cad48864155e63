"""The reference query, one per caller: the oracle that tests compare each faster evaluation with.

One statement: the rule and the filter about row images, which are bound as arrays of texts. It
takes the whole predicate, unsplit, so that it shares no code with the engine's split. Also used to
check rules and by ``explain``. It knows no driver: the caller runs the ``SqlQuery``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pgrealtime.auth.principal import AuthRecord, Superuser
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.errors import RuleError, RuleUnsupportedError
from pgrealtime.rules.language.parameters import (
    Binding,
    CallerColumn,
    parameter_class,
    parameter_value,
    to_sql_value,
)
from pgrealtime.rules.language.predicate import AdmitAll, DenyAll, Predicate, condition_parameters
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.resolve import filter_text, resolve_filter, resolve_rule
from pgrealtime.rules.sql import nodes
from pgrealtime.rules.sql.conditions import SqlPredicate, translate_predicate
from pgrealtime.rules.sql.nodes import all_of
from pgrealtime.rules.sql.row_images import images_table, matching_rows_sql

_ANY_TIME = datetime(1970, 1, 1, tzinfo=UTC)
"""Any time: the class of a macro is the same at all times."""


@dataclass(frozen=True, slots=True)
class SqlQuery:
    """A statement to run read-only with ``search_path`` set to pg_catalog."""

    sql: str
    """With placeholders in psycopg's style, ``%(name)s``."""
    params: dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceQuery:
    """The query for the rows of one collection that one caller may see."""

    collection: Collection
    request: RuleRequest
    sql_predicates: tuple[SqlPredicate, ...]
    """The rule and the filter, each a scope of its own; at least one of them."""
    sql: str
    """The text of ``sql_query``, printed once."""

    @property
    def column_names(self) -> tuple[str, ...]:
        """The columns of a row image that it reads."""
        return _columns_of(self.sql_predicates)

    def sql_query(self, rows: Sequence[Row], now: datetime) -> SqlQuery:
        """Return the query for the 0-based numbers of the admitted row images, in no order.

        A row that lacks a column that is read isn't admitted. ``now`` is the time of macros, with
        its zone.
        """
        return SqlQuery(self.sql, self._params(rows, now))

    def truth_query(self, row: Row, now: datetime) -> SqlQuery:
        """Return the query for the verdict on one row, which must have all columns.

        Its result is one value: TRUE, FALSE, or NULL, which admits no more than FALSE.
        """
        condition = all_of(*(part.condition for part in self.sql_predicates))
        rows, _ = images_table(self.collection.table, self.column_names)
        return SqlQuery(nodes.to_text(nodes.select([condition], rows)), self._params([row], now))

    def _params(self, rows: Sequence[Row], now: datetime) -> dict[str, object]:
        columns = self.column_names
        known = [(i, row) for i, row in enumerate(rows) if all(name in row for name in columns)]
        params: dict[str, object] = {"i": [index for index, _ in known]}
        for i, column in enumerate(columns):
            params[f"c{i}"] = [row[column] for _, row in known]
        for part in self.sql_predicates:
            params |= sql_params(part.bindings, self.request, now)
        return params


def reference_query(
    collections: Collections, collection: Collection, rule: str | None, request: RuleRequest
) -> AdmitAll | DenyAll | ReferenceQuery:
    """Return the query for the rows of a collection that a caller may see.

    The rule is the collection's for the topic; None is for superusers only. The filter is
    ``request.query["filter"]``.

    Raises:
        RuleError: The rule is invalid for every caller. A rule that is invalid only for callers of
            this auth collection, and an invalid filter, deny all.
    """
    predicates: list[Predicate] = []
    auth = auth_collection_of(collections, request)
    is_superuser = isinstance(request.principal, Superuser)
    if not is_superuser:
        if rule is None:
            return DenyAll("the rule is for superusers only")
        if rule:
            try:
                predicates.append(resolve_rule(rule, collections, collection, auth))
            except RuleError as error:
                check_rule(collections, collection, rule)
                return DenyAll(f"the rule can't be evaluated for this caller: {error}")
    text = request.query.get("filter", "")
    try:
        if filter_text(request.query, is_superuser=is_superuser):
            predicates.append(
                resolve_filter(text, collections, collection, auth, is_superuser=is_superuser)
            )
        if not predicates:
            return AdmitAll()
        return query_of_predicates(collections, collection, predicates, request)
    except RuleError as error:
        return DenyAll(f"the filter is refused: {error}" if text else str(error))


def check_rule(collections: Collections, collection: Collection, rule: str) -> None:
    """Check that a rule can be used, for callers of every auth collection.

    What PocketBase refuses for some of these only denies them, and is no error.

    Raises:
        RuleError: It can't; with its place in the text.
    """
    if not rule:
        return
    callers = [auth for auth in collections.values() if auth.type == "auth"]
    for auth in (None, *(callers if "@request.auth." in rule else ())):
        try:
            checked = resolve_rule(rule, collections, collection, auth)
            query_of_predicates(collections, collection, [checked], RuleRequest())
        except RuleUnsupportedError:
            raise
        except RuleError:
            if auth is None:
                raise


def query_of_predicates(
    collections: Collections,
    collection: Collection,
    predicates: Sequence[Predicate],
    request: RuleRequest,
) -> ReferenceQuery:
    """Return the query for one or two predicates, without any rule of the collection or filter.

    Raises:
        RuleUnsupportedError: It can't be evaluated exactly.
    """
    translated = []
    for prefix, predicate in zip("pf", predicates, strict=False):
        classes = {
            parameter: parameter_class(parameter_value(parameter, request, _ANY_TIME))
            for parameter in condition_parameters(predicate.where)
        }
        translated.append(
            translate_predicate(predicate, collections, classes, placeholder_prefix=prefix)
        )
    condition = all_of(*(part.condition for part in translated))
    return ReferenceQuery(
        collection=collection,
        request=request,
        sql_predicates=tuple(translated),
        sql=matching_rows_sql(collection.table, _columns_of(translated), condition),
    )


def auth_collection_of(collections: Collections, request: RuleRequest) -> Collection | None:
    """Return the collection of the caller's record; None for others, or if there is none."""
    record = request.principal
    if not isinstance(record, AuthRecord):
        return None
    return collections.find(record.collection_name) or collections.find(record.collection_id)


def sql_params(
    bindings: Mapping[str, Binding], request: RuleRequest, now: datetime
) -> dict[str, object]:
    """Return what placeholders stand for, in a query that reads the caller's row itself."""
    params: dict[str, object] = {}
    for key, binding in bindings.items():
        assert not isinstance(binding.parameter, CallerColumn)  # the caller's row is read
        params[key] = to_sql_value(parameter_value(binding.parameter, request, now), binding.form)
    return params


def _columns_of(predicates: Sequence[SqlPredicate]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for predicate in predicates for name in predicate.column_names))
