"""Compiles a list request to its statements, and binds the values of one request.

Both steps are cached: the resolved query by its texts, the statements by the query without its
literals and by the classes of its parameters. They take a few milliseconds for most lists, and up
to half a second for the longest filters: those are compiled in a thread, one at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple, TypeAlias, TypeVar

from pgrealtime.auth.principal import Superuser
from pgrealtime.caches import WeightedCache
from pgrealtime.collections.model import Collection, Collections
from pgrealtime.fairness import FairLock
from pgrealtime.rules.language.list_query import ListQuery, Literals, resolve_list
from pgrealtime.rules.language.parameters import (
    CallerColumn,
    Parameter,
    ParameterClass,
    parameter_class,
    parameter_value,
    to_sql_value,
)
from pgrealtime.rules.language.predicate import (
    GeoDistance,
    JsonValue,
    Strftime,
    comparisons,
    condition_parameters,
    paths_read,
    row_path_of,
)
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.language.sqlite_values import Scalar
from pgrealtime.rules.sql.list_query import ListSql, translate_list
from pgrealtime.rules.sql.reference import auth_collection_of

_MAX_RESOLVED_CHARACTERS = 512 * 1024
"""Length together of the texts whose queries are cached, at some dozen bytes a character."""
_MAX_STATEMENT_CHARACTERS = 8 * 1024 * 1024
"""Length together of the cached statements. Of one filter they can have 300 KB."""
_RESOLVED_ON_LOOP = 1000
"""Characters of texts that are resolved on the event loop, in 4 ms at most; longer in a thread."""
_TRANSLATED_ON_LOOP = 10
"""Comparisons and joins of queries whose statements are made on the loop, at 0.4 to 0.8 ms each."""
_WORK_OF_FUNCTION = 20
_WORK_OF_JSON = 8
"""Comparisons that take as long to translate."""

_Made = TypeVar("_Made")


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

    @property
    def length(self) -> int:
        """Characters of the texts."""
        return len(self.rule) + len(self.filter_text) + len(self.sort_text)


class _HashedQuery:
    """A query that is hashed once: that takes longer than all else for a query seen before."""

    __slots__ = ("_hash", "query")

    def __init__(self, query: ListQuery) -> None:
        self.query = query
        self._hash = hash(query)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _HashedQuery) and self.query == other.query


@dataclass(frozen=True, slots=True, eq=False)
class _Resolved:
    query: _HashedQuery
    literals: Literals
    parameters: tuple[Parameter, ...]


_StatementKey: TypeAlias = tuple[_HashedQuery, tuple[ParameterClass, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class BoundList:
    """The statements of a list with the values of one request."""

    sql: ListSql
    params: Mapping[str, Scalar]
    column_names: tuple[str, ...]
    """The columns of the rows that ``sql.page`` and ``sql.row`` read."""


class ListCompiler:
    """Compiles lists of one generation's collections."""

    def __init__(self, collections: Collections) -> None:
        self._collections = collections
        self._resolved: WeightedCache[_Texts, _Resolved] = WeightedCache(_MAX_RESOLVED_CHARACTERS)
        self._statements: WeightedCache[_StatementKey, ListSql] = WeightedCache(
            _MAX_STATEMENT_CHARACTERS
        )
        self._thread_lock = FairLock()
        """Held while a thread compiles: several would compete for the interpreter's lock."""

    async def bind(
        self,
        collection: Collection,
        rule: str,
        request: RuleRequest,
        *,
        filter_text: str = "",
        sort_text: str = "",
        network: str = "",
    ) -> BoundList:
        """Return the statements for a request. The rule is not asked for superusers.

        Networks take turns at what is compiled in a thread.

        Raises:
            RuleError: Rule, filter or sort can't be used.
        """
        is_superuser = isinstance(request.principal, Superuser)
        auth = auth_collection_of(self._collections, request)
        texts = _Texts(
            collection_name=collection.name,
            auth_name="" if auth is None else auth.name,
            rule="" if is_superuser else rule,
            filter_text=filter_text,
            sort_text=sort_text,
            is_superuser=is_superuser,
            has_body=request.body is not None,
        )
        resolved = self._resolved.find(texts)
        if resolved is None:
            resolve = partial(self._resolve, texts)
            is_short = texts.length <= _RESOLVED_ON_LOOP
            resolved = resolve() if is_short else await self._run_in_thread(resolve, network)
            self._resolved.put(texts, resolved, texts.length)
        now = datetime.now(UTC)
        values = {
            parameter: parameter_value(parameter, request, now, resolved.literals)
            for parameter in resolved.parameters
        }
        classes = tuple([parameter_class(value) for value in values.values()])
        key = resolved.query, classes
        sql = self._statements.find(key)
        if sql is None:
            query = resolved.query.query
            translate = partial(self._translate, query, resolved.parameters, classes)
            is_short = _translation_work(query) <= _TRANSLATED_ON_LOOP
            sql = translate() if is_short else await self._run_in_thread(translate, network)
            self._statements.put(key, sql, sql.length)
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

    async def _run_in_thread(self, make: Callable[[], _Made], network: str) -> _Made:
        # Half of the time only: the thread competes with the loop for the interpreter's lock.
        async with self._thread_lock.acquire_for_loop_work(network):
            making = asyncio.create_task(asyncio.to_thread(make))
            try:
                return await asyncio.shield(making)
            finally:
                # A thread can't be cancelled: the lock is held until it ends.
                await asyncio.wait([making])

    def _resolve(self, texts: _Texts) -> _Resolved:
        query, literals = resolve_list(
            self._collections,
            self._collections[texts.collection_name],
            self._collections.get(texts.auth_name),
            rule=texts.rule,
            filter_text=texts.filter_text,
            sort_text=texts.sort_text,
            is_superuser=texts.is_superuser,
            has_body=texts.has_body,
        )
        return _Resolved(_HashedQuery(query), literals, condition_parameters(query.where))

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


def _translation_work(query: ListQuery) -> int:
    """Return the comparisons of a query and the joins that they need, with those searched."""
    paths = frozenset(paths_read(query.where, is_nested_included=True))
    work = len(query.sort) + sum(len(path.steps) for path in paths)
    for comparison in comparisons(query.where):
        work += 1
        for term in (comparison.left, comparison.right):
            path = row_path_of(term)
            if path is not None and path.is_multiple and not comparison.is_any:
                work += 2 + len(path.steps)
            match term:
                case Strftime() | GeoDistance():
                    work += _WORK_OF_FUNCTION
                case JsonValue():
                    work += _WORK_OF_JSON
                case _:
                    pass
    return work


def _column_names(collection: Collection) -> tuple[str, ...]:
    return tuple(column.name for column in collection.table.columns)
