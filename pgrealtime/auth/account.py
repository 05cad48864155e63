"""Reads the rows of users tables; simultaneous reads of one table share one indexed query.

Used by ``auth.authenticator`` (by id) and ``auth.login`` (by identity).
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import psycopg
from psycopg import sql
from psycopg_pool import PoolTimeout

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.auth.record import auth_record_of, token_key_of
from pgrealtime.catalog.model import Column, canonical_id
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection
from pgrealtime.config.model import CollectionLoginConfig
from pgrealtime.errors import DatabaseUnreachableError, SetupError
from pgrealtime.fairness import wait_while_growing
from pgrealtime.observe.redact import message_without_values
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.postgres.rows import (
    TextRow,
    identifier,
    row_source,
    rows_by_key_statement,
    texts_of,
)
from pgrealtime.snapshot import ReadPoint

_BATCH_IDS = 500
"""Ids per query. Clients that all reconnect at once cause queries of this size."""

_SAMPLED_HASHES = 1000
"""Rows read to find the commonest scheme and cost of a table's hashes."""

_PLAIN_FIELDS = ("email", "emailVisibility", "verified")

_NO_LOGIN = CollectionLoginConfig()


@dataclass(frozen=True, kw_only=True)
class UserCollection:
    """A collection whose records tokens may name, and how its users log in."""

    collection: Collection
    login: CollectionLoginConfig = _NO_LOGIN
    rule_columns: tuple[str, ...] = ()
    admission_columns: tuple[str, ...] = ()
    """Those that the ``auth_rule`` reads."""

    @cached_property
    def column_names(self) -> tuple[str, ...]:
        """The columns that are read to make a caller: the key first, each once."""
        columns = (self.collection.column_of(name) for name in _PLAIN_FIELDS)
        plain = (column.name for column in columns if column is not None)
        read = (*self.login.secret_columns, *self.rule_columns, *self.admission_columns)
        return tuple(dict.fromkeys((self.collection.key.name, *plain, *read)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A user's row and auth record."""

    users: UserCollection
    record: AuthRecord
    row: Row = field(repr=False)
    """In the stream's text forms. Has secrets, so it is never printed."""
    read_point: ReadPoint | None = None
    """When the row was read; None if it was read by identity."""

    @property
    def password_hash(self) -> str | None:
        """The stored hash; None if the user has none."""
        return self.row.get(self.users.login.password_hash) or None

    @property
    def token_key(self) -> str | None:
        """See ``auth.record.token_key_of``."""
        return token_key_of(self.users.login, self.row)


@dataclass(slots=True, eq=False)
class _AccountBatch:
    """Ids that one query will read, and the task of that query."""

    users: UserCollection
    ids: set[str] = field(default_factory=set)
    task: asyncio.Task[Mapping[str, Account]] | None = None


class AccountLoader:
    """Reads users' rows.

    ``on_schema_mismatch`` is called when PostgreSQL refuses a query as if the schema had changed.
    """

    def __init__(
        self, pool: QueryPool, *, on_schema_mismatch: Callable[[], None] = lambda: None
    ) -> None:
        self._pool = pool
        self._on_schema_mismatch = on_schema_mismatch
        self._open_batches: dict[int, _AccountBatch] = {}
        self._query_locks: dict[int, asyncio.Lock] = {}

    async def load(self, users: UserCollection, record_id: str) -> Account | None:
        """Return the user with that id and ``UserCollection.column_names``, None if there is none.

        Raises:
            DatabaseUnreachableError: No connection, or no answer in time.
            SetupError: The table can't be read as configured.
        """
        key = canonical_id(record_id, users.collection.key.type)
        if key is None:
            return None
        # Joins a query that has yet to be sent, never a running one: that may have read the row
        # before a change which the caller relies on seeing. All loads during a query share the next
        # one.
        batch = self._join_batch(users, key)
        assert batch.task is not None
        # Shielded: a cancelled caller must not cancel the query that others await.
        return (await asyncio.shield(batch.task)).get(key)

    async def load_whole_row(self, users: UserCollection, record_id: str) -> Account | None:
        """As ``load``, with the whole row, in a separate query."""
        columns = tuple([column.name for column in users.collection.table.columns])
        key = canonical_id(record_id, users.collection.key.type)
        return None if key is None else (await self._select_by_id(users, [key], columns)).get(key)

    async def find_by_value(
        self, users: UserCollection, column: Column, value: str
    ) -> Account | None:
        """Return the user with that value and its whole row; None unless exactly one has it.

        Case matters, unless the column's type or its unique index ignores it. Raises as ``load``.
        """
        columns = [column.name for column in users.collection.table.columns]
        parameters = {"table": users.collection.table.oid, "column": column.name}
        try:
            # Without a unique index "lower" could find several users, and would read the whole
            # table.
            _, folds = await self._select(users, _FOLDS_CASE_QUERY, parameters)
            statement = statement_by_value(users, columns, column, folds_case=bool(folds))
            _, rows = await self._select(users, statement, {"value": value})
        except (psycopg.DataError, UnicodeEncodeError):
            return None
        if len(rows) != 1:
            return None
        return _account_of_row(users, dict(zip(columns, rows[0], strict=True)))

    async def sample_password_hashes(self, users: UserCollection) -> list[str]:
        """Return some of the stored password hashes; none if they can't be read now."""
        name = users.login.password_hash
        statement = sql.SQL("SELECT {column} FROM {table} LIMIT {most}").format(
            column=identifier(name),
            table=row_source(users.collection.table),
            most=sql.Literal(_SAMPLED_HASHES),
        )
        try:
            _, rows = await self._select(users, statement.as_string(), {})
        except (DatabaseUnreachableError, SetupError, psycopg.DataError):
            return []
        return [text for (text,) in rows if text]

    def _join_batch(self, users: UserCollection, record_id: str) -> _AccountBatch:
        # Keyed by id(): hashing a collection hashes its whole table. The batch keeps the object
        # alive, so the id isn't reused while it is a key.
        key = id(users)
        batch = self._open_batches.get(key)
        if batch is None or len(batch.ids) >= _BATCH_IDS:
            batch = self._open_batches[key] = _AccountBatch(users)
            batch.task = asyncio.create_task(self._run_batch(key, batch), name="auth.accounts")
            batch.task.add_done_callback(_retrieve_exception)
        batch.ids.add(record_id)
        return batch

    async def _run_batch(self, users_id: int, batch: _AccountBatch) -> Mapping[str, Account]:
        # While the lock is waited for, the batch takes further ids; once it is held, the batch is
        # closed.
        async with self._query_locks.setdefault(users_id, asyncio.Lock()):
            await wait_while_growing(lambda: len(batch.ids))
            if self._open_batches.get(users_id) is batch:
                del self._open_batches[users_id]
            return await self._select_by_id(batch.users, [*batch.ids], batch.users.column_names)

    async def _select_by_id(
        self, users: UserCollection, ids: Sequence[str], columns: tuple[str, ...]
    ) -> dict[str, Account]:
        table, key = users.collection.table, users.collection.key
        statement = rows_by_key_statement(table.name, key, columns)
        try:
            read_point, rows = await self._select(users, statement, {"ids": ids})
        except (psycopg.DataError, UnicodeEncodeError):
            # One of the ids can't be encoded in the database's encoding. It has no row; the other
            # ids must be read all the same.
            found: dict[str, Account] = {}
            for record_id in ids if len(ids) > 1 else ():
                found |= await self._select_by_id(users, [record_id], columns)
            return found
        accounts = [
            _account_of_row(users, dict(zip(columns, row, strict=True)), read_point) for row in rows
        ]
        return {account.record.id: account for account in accounts}

    async def _select(
        self,
        users: UserCollection,
        statement: str,
        values: Mapping[str, Any],
    ) -> tuple[ReadPoint, list[TextRow]]:
        try:
            read_point, result = await self._pool.fetch(statement, values)
        except psycopg.DataError:
            raise
        except (psycopg.OperationalError, PoolTimeout) as error:
            raise DatabaseUnreachableError("users can't be looked up now") from error
        except psycopg.Error as error:
            self._on_schema_mismatch()
            raise SetupError(
                f'table "{users.collection.table.name}" can\'t be read as users',
                detail=message_without_values(error),
            ) from error
        return read_point, await texts_of(result)


def _account_of_row(
    users: UserCollection, row: Row, read_point: ReadPoint | None = None
) -> Account:
    record = auth_record_of(users.collection, row)
    return Account(users=users, record=record, row=row, read_point=read_point)


def _retrieve_exception(task: asyncio.Task[Mapping[str, Account]]) -> None:
    # Otherwise asyncio logs it if every waiting caller was cancelled.
    if not task.cancelled():
        task.exception()


_FOLDS_CASE_QUERY = """
SELECT 't' FROM pg_catalog.pg_index i
WHERE i.indrelid = %(table)s AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1
  AND i.indpred IS NULL AND pg_catalog.pg_get_indexdef(i.indexrelid, 1, true)
    IN (pg_catalog.format('lower(%%I)', %(column)s::pg_catalog.text),
        pg_catalog.format('lower(%%I::text)', %(column)s::pg_catalog.text))
LIMIT 1
"""
"""Whether a unique index on ``lower(column)`` makes values equal that differ in case."""


def statement_by_value(
    users: UserCollection, columns: Sequence[str], column: Column, *, folds_case: bool = False
) -> str:
    """Return the query for up to two users with a value; its parameter ``value`` is a text.

    String types are compared by their own equality, so citext ignores case; others as text.
    ``folds_case`` compares ``lower`` of both, as the unique index does.
    """
    own = column.type.base
    # The operator is qualified with the type's schema, or with pg_catalog: no other "=" can be put
    # before it.
    is_own = own.category == "S" and not folds_case
    schema, type_ = (own.schema, own.name) if is_own else ("pg_catalog", "text")
    shape = "pg_catalog.lower({})" if folds_case else "{}"
    name = sql.SQL("{}" if is_own else "{}::pg_catalog.text").format(identifier(column.name))
    value = sql.SQL("%(value)s::{}").format(identifier(schema, type_))
    statement = sql.SQL(
        "SELECT {columns} FROM {table} WHERE {name} OPERATOR({schema}.=) {value} LIMIT 2"
    ).format(
        columns=sql.SQL(", ").join(map(identifier, columns)),
        table=row_source(users.collection.table),
        name=sql.SQL(shape).format(name),
        schema=identifier(schema),
        value=sql.SQL(shape).format(value),
    )
    return statement.as_string()
