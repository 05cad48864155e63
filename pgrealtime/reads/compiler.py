"""Compiles a list request to its statements, and binds the values of one request.

Resolving a text and making SQL of it takes milliseconds, so both are cached: the resolved query by
its texts, the statements by the query without its literals and by the classes of its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple

from pgrealtime.auth.principal import Superuser
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.config.model import HiddenFieldsMode
from pgrealtime.rules.language.list_query import ListQuery, Literals, resolve_list
from pgrealtime.rules.language.parameters import (
    CallerColumn,
    Parameter,
    ParameterClass,
    parameter_class,
    parameter_value,
    to_sql_value,
)
from pgrealtime.rules.language.predicate import condition_parameters
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.sqlite_values import Scalar
from pgrealtime.rules.sql.list_query import ListSql, translate_list
from pgrealtime.rules.sql.reference import auth_collection_of

_MAX_RESOLVED = 1024
"""Texts of filter and sort whose queries are cached; a text is at most some kilobytes."""
_MAX_STATEMENTS = 1024


class _Texts(NamedTuple):
    """What a query is resolved from."""

    collection_name: str
    auth_name: str
    """The caller's auth collection, empty for guests and superusers."""
    rule: str
    filter_text: str
    sort_text: str
    is_superuser: bool
    has_body: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Resolved:
    query: ListQuery
    literals: Literals
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True, slots=True, eq=False)
class BoundList:
    """The statements of a list with the values of one request."""

    sql: ListSql
    params: Mapping[str, Scalar]
    column_names: tuple[str, ...]
    """The columns of the rows that ``sql.page`` and ``sql.row`` read."""


class ListCompiler:
    """Compiles lists of one generation's collections."""

    def __init__(self, collections: Collections, *, hidden: HiddenFieldsMode) -> None:
        self._collections = collections
        self._hides_addresses = hidden == "strict"
        self._resolved = lru_cache(_MAX_RESOLVED)(self._resolve)
        self._translated = lru_cache(_MAX_STATEMENTS)(self._translate)

    def bind(
        self,
        collection: Collection,
        rule: str,
        request: RuleRequest,
        *,
        filter_text: str = "",
        sort_text: str = "",
    ) -> BoundList:
        """Return the statements for a request. The rule is not asked for superusers.

        Raises:
            RuleError: Rule, filter or sort can't be used.
        """
        is_superuser = isinstance(request.principal, Superuser)
        auth = auth_collection_of(self._collections, request)
        resolved = self._resolved(
            _Texts(
                collection_name=collection.name,
                auth_name="" if auth is None else auth.name,
                rule="" if is_superuser else rule,
                filter_text=filter_text,
                sort_text=sort_text,
                is_superuser=is_superuser,
                has_body=request.body is not None,
            )
        )
        now = datetime.now(UTC)
        values = {
            parameter: parameter_value(parameter, request, now, resolved.literals)
            for parameter in resolved.parameters
        }
        classes = tuple([parameter_class(value) for value in values.values()])
        sql = self._translated(resolved.query, resolved.parameters, classes)
        params: dict[str, Scalar] = {}
        for name, binding in sql.bindings.items():
            parameter = binding.parameter
            assert not isinstance(parameter, CallerColumn)  # the caller's row is read
            # A path in the SQL binds a parameter of its own: the caller's id, keys of JSON.
            if parameter not in values:
                values[parameter] = parameter_value(parameter, request, now, resolved.literals)
            value = values[parameter]
            params[name] = to_sql_value(value, binding.form)
        return BoundList(sql, params, _column_names(collection))

    def _resolve(self, texts: _Texts) -> _Resolved:
        query, literals = resolve_list(
            self._collections,
            self._collections[texts.collection_name],
            self._collections.get(texts.auth_name),
            rule=texts.rule,
            filter_text=texts.filter_text,
            sort_text=texts.sort_text,
            is_superuser=texts.is_superuser,
            hides_addresses=self._hides_addresses,
            has_body=texts.has_body,
        )
        return _Resolved(query, literals, condition_parameters(query.where))

    def _translate(
        self,
        query: ListQuery,
        parameters: tuple[Parameter, ...],
        classes: tuple[ParameterClass, ...],
    ) -> ListSql:
        return translate_list(
            query,
            self._collections,
            dict(zip(parameters, classes, strict=True)),
            _column_names(self._collections[query.collection_name]),
        )


def _column_names(collection: Collection) -> tuple[str, ...]:
    return tuple(column.name for column in collection.table.columns)
