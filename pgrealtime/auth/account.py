"""The rows of users tables: one indexed query however many callers ask at the same moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql
from psycopg_pool import PoolTimeout

from pgrealtime.auth.principal import AuthRecord, ReadPointText
from pgrealtime.auth.record import auth_record_of, token_key_of
from pgrealtime.catalog.keys import canonical_id, native_key_type
from pgrealtime.catalog.model import Column
from pgrealtime.catalog.naming import identifier
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection
from pgrealtime.config.model import CollectionLoginConfig
from pgrealtime.errors import DatabaseUnreachableError, SetupError
from pgrealtime.observe.redact import message_without_values
from pgrealtime.postgres.pool import QueryPool

_BATCH_IDS = 500
"""Ids per query. A herd of reconnecting clients makes queries of this size, not one each."""

_SAMPLED_HASHES = 1000
"""Rows that are read to learn what most hashes of a table are like."""

_PLAIN_FIELDS = ("email", "emailVisibility", "verified")

_NO_LOGIN = CollectionLoginConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class UserCollection:
    """A collection that tokens may name, and how its people log in, if they do."""

    collection: Collection
    login: CollectionLoginConfig = _NO_LOGIN
    rule_columns: tuple[str, ...] = ()
    """Columns that rules ask for, beside those that make the user."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read of a row to know its user: the key first, each column once."""
        fields = (self.collection.fields_by_name.get(name) for name in _PLAIN_FIELDS)
        plain = (f.column.name for f in fields if f is not None and f.column is not None)
        names = (self.collection.key.name, *plain, *self.login.secret_columns, *self.rule_columns)
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A user as the database has it."""

    users: UserCollection
    record: AuthRecord
    row: Row = field(repr=False)
    """In the stream's text forms. Secrets are among the columns, so it is never printed."""
    read_point: ReadPointText | None = None
    """When the row was read; None if it wasn't asked for by id."""

    @property
    def password_hash(self) -> str | None:
        """The stored hash, None where there is none to log in with."""
        return self.row.get(self.users.login.password_hash) or None

    @property
    def token_key(self) -> str | None:
        """The user's own part of the key that signs login tokens; None: no token is the user's."""
        return token_key_of(self.users.login, self.row)


class _AccountBatch:
    """Ids that will be asked for together, and the answer to come."""

    def __init__(self, users: UserCollection) -> None:
        self.users = users
        self.ids: set[str] = set()
        self.task: asyncio.Task[Mapping[str, Account]] | None = None


class AccountLoader:
    """Finds users.

    A load is answered by a query sent *after* it was called, never by one already under way: that
    one may have read the row before a change which the caller counts on being seen. So while a
    query runs, all who come meanwhile share the next one.

    Args:
        pool: Connections that may read the users tables.
        on_schema_mismatch: Told when Postgres refuses a query as if the schema were another.
    """

    def __init__(
        self, pool: QueryPool, *, on_schema_mismatch: Callable[[], None] = lambda: None
    ) -> None:
        self._pool = pool
        self._on_schema_mismatch = on_schema_mismatch
        self._open_batches: dict[int, _AccountBatch] = {}
        self._query_locks: dict[int, asyncio.Lock] = {}

    async def load(self, users: UserCollection, record_id: str) -> Account | None:
        """The user of that id, with ``UserCollection.columns``; None if the table has none.

        Raises:
            DatabaseUnreachableError: No connection, or no answer in time.
            SetupError: The table can't be read as configured.
        """
        wanted = canonical_id(record_id, users.collection.key.type)
        if wanted is None:
            return None
        batch = self._join_batch(users, wanted)
        assert batch.task is not None
        # Shielded: one caller going away must not take the answer from the others.
        return (await asyncio.shield(batch.task)).get(wanted)

    async def load_whole_row(self, users: UserCollection, record_id: str) -> Account | None:
        """As ``load``, with the whole row and a query of its own."""
        columns = [column.name for column in users.collection.table.columns]
        wanted = canonical_id(record_id, users.collection.key.type)
        try:
            found = {} if wanted is None else await self._select_by_id(users, [wanted], columns)
        except (psycopg.DataError, UnicodeEncodeError):
            return None
        return found.get(wanted or "")

    async def find_by_value(
        self, users: UserCollection, column: Column, value: str
    ) -> Account | None:
        """The one user with that value, with the whole row; None if none or several have it.

        Case counts, unless the column's type or the index that keeps it unique says otherwise.

        Raises:
            DatabaseUnreachableError: No connection, or no answer in time.
            SetupError: The table can't be read as configured.
        """
        table = users.collection.table
        columns = [column.name for column in table.columns]
        place = {"table": table.oid, "column": column.name}
        try:
            folds = await self._select(users, _FOLDS_CASE_QUERY, place, ["is_unique"])
            statement = statement_by_value(users, columns, column, folds_case=bool(folds))
            rows = await self._select(users, statement, {"value": value}, columns)
        except (psycopg.DataError, UnicodeEncodeError):
            return None
        return _account_of_row(users, rows[0]) if len(rows) == 1 else None

    async def sample_password_hashes(self, users: UserCollection) -> list[str]:
        """Return some of the stored password hashes; none if they can't be had now."""
        name = users.login.password_hash
        statement = sql.SQL("SELECT {column} FROM {table} LIMIT {most}").format(
            column=identifier(name),
            table=identifier(*users.collection.table.name),
            most=sql.Literal(_SAMPLED_HASHES),
        )
        try:
            rows = await self._select(users, statement, {}, [name])
        except (DatabaseUnreachableError, SetupError, psycopg.DataError):
            return []
        return [text for row in rows if (text := row[name])]

    def _join_batch(self, users: UserCollection, record_id: str) -> _AccountBatch:
        # By identity: hashing a collection means hashing its whole table. The batch keeps the
        # object alive, so the number can't pass to another one meanwhile.
        place = id(users)
        batch = self._open_batches.get(place)
        if batch is None or len(batch.ids) >= _BATCH_IDS:
            batch = self._open_batches[place] = _AccountBatch(users)
            batch.task = asyncio.create_task(self._run_batch(place, batch), name="auth.accounts")
            batch.task.add_done_callback(_retrieve_exception)
        batch.ids.add(record_id)
        return batch

    async def _run_batch(self, users_id: int, batch: _AccountBatch) -> Mapping[str, Account]:
        async with self._query_locks.setdefault(users_id, asyncio.Lock()):
            if self._open_batches.get(users_id) is batch:
                del self._open_batches[users_id]
            try:
                return await self._select_by_id(batch.users, batch.ids, batch.users.columns)
            except (psycopg.DataError, UnicodeEncodeError):
                # An id that the database's encoding can't hold. Alone it has no row; in company
                # it must not spoil the others' answer.
                return await self._select_one_by_one(batch.users, batch.ids)

    async def _select_one_by_one(
        self, users: UserCollection, ids: Iterable[str]
    ) -> Mapping[str, Account]:
        found: dict[str, Account] = {}
        for one in ids:
            try:
                found |= await self._select_by_id(users, [one], users.columns)
            except (psycopg.DataError, UnicodeEncodeError):
                continue
        return found

    async def _select_by_id(
        self, users: UserCollection, ids: Iterable[str], columns: Sequence[str]
    ) -> dict[str, Account]:
        statement = statement_by_id(users, columns)
        names = [*columns, _SNAPSHOT_KEY, _INSERT_LSN_KEY]
        rows = await self._select(users, statement, {"ids": list(ids)}, names)
        accounts = [_account_with_read_point(users, row) for row in rows]
        return {account.record.id: account for account in accounts}

    async def _select(
        self,
        users: UserCollection,
        statement: sql.SQL | sql.Composed,
        values: Mapping[str, Any],
        names: Sequence[str],
    ) -> list[Row]:
        try:
            async with self._pool.connection() as connection:
                cursor = await connection.execute(statement, values)
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
        result = cursor.pgresult
        assert result is not None  # an executed query has one
        # Raw text: the forms of the stream, whatever the columns' types.
        encoding = connection.info.encoding
        return [
            {
                name: None if value is None else value.decode(encoding)
                for n, name in enumerate(names)
                for value in (result.get_value(place, n),)
            }
            for place in range(result.ntuples)
        ]


_SNAPSHOT_KEY, _INSERT_LSN_KEY = "\0snapshot", "\0insert_lsn"
"""Keys in a row for when it was read; no column has such a name."""


def _account_with_read_point(users: UserCollection, row: Row) -> Account:
    reading = ReadPointText(row.pop(_SNAPSHOT_KEY) or "", row.pop(_INSERT_LSN_KEY) or "")
    return Account(
        users=users, record=auth_record_of(users.collection, row), row=row, read_point=reading
    )


def _account_of_row(users: UserCollection, row: Row) -> Account:
    return Account(users=users, record=auth_record_of(users.collection, row), row=row)


def _retrieve_exception(task: asyncio.Task[Mapping[str, Account]]) -> None:
    """Take note of the outcome, in case everybody who waited for it has gone."""
    if not task.cancelled():
        task.exception()


def statement_by_id(users: UserCollection, columns: Sequence[str]) -> sql.Composed:
    """The query for users by id; its parameter ``ids`` is a list of canonical texts.

    After the columns come the statement's snapshot and the end of the WAL (``Reading``).

    Key types that can be asked in their own type use the primary key's index; a key of another
    type (a domain over text counts as text, citext and enum don't) is compared as text, exactly
    but without the index.
    """
    collection = users.collection
    key = identifier(collection.key.name)
    native = native_key_type(collection.key.type)
    return sql.SQL(
        "SELECT {columns}, pg_catalog.pg_current_snapshot(), pg_catalog.pg_current_wal_insert_lsn()"
        " FROM {table} WHERE {key} OPERATOR(pg_catalog.=) ANY (%(ids)s::{type}[])"
    ).format(
        columns=_column_list(columns),
        table=identifier(*collection.table.name),
        key=key if native else sql.SQL("{}::pg_catalog.text").format(key),
        type=identifier("pg_catalog", native or "text"),
    )


_FOLDS_CASE_QUERY = sql.SQL("""
SELECT 't' FROM pg_catalog.pg_index i
WHERE i.indrelid = %(table)s AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1
  AND i.indpred IS NULL AND pg_catalog.pg_get_indexdef(i.indexrelid, 1, true)
    IN (pg_catalog.format('lower(%%I)', %(column)s::pg_catalog.text),
        pg_catalog.format('lower(%%I::text)', %(column)s::pg_catalog.text))
LIMIT 1
""")
"""Whether a unique index on lower(column) makes values that differ in case the same."""


def statement_by_value(
    users: UserCollection, columns: Sequence[str], column: Column, *, folds_case: bool = False
) -> sql.Composed:
    """The query for the users that have a value; its parameter ``value`` is a text.

    Texts are compared by their own type's equality: citext without case, as its owner wants it.
    Anything else is compared as text. Two rows are enough to see that there isn't just one.

    Args:
        users: Where to look.
        columns: To be read.
        column: That has the value.
        folds_case: Compare ``lower`` of both, as the index does.
    """
    own = column.type.base
    is_own = own.category == "S" and not folds_case
    schema, type_ = (own.schema, own.name) if is_own else ("pg_catalog", "text")
    shape = "pg_catalog.lower({})" if folds_case else "{}"
    name = sql.SQL("{}" if is_own else "{}::pg_catalog.text").format(identifier(column.name))
    value = sql.SQL("%(value)s::{}").format(identifier(schema, type_))
    return sql.SQL(
        "SELECT {columns} FROM {table} WHERE {name} OPERATOR({schema}.=) {value} LIMIT 2"
    ).format(
        columns=_column_list(columns),
        table=identifier(*users.collection.table.name),
        name=sql.SQL(shape).format(name),
        schema=identifier(schema),
        value=sql.SQL(shape).format(value),
    )


def _column_list(columns: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(identifier, columns))
