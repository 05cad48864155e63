"""The rows of users tables: one indexed query however many callers ask at the same moment."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import tuple_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.auth.record import auth_record
from pgrealtime.catalog.model import Type
from pgrealtime.changes import Row
from pgrealtime.collections import Collection
from pgrealtime.errors import DatabaseUnreachableError, SetupError

_BATCH = 500
"""Ids per query. A herd of reconnecting clients makes queries of this size, not one each."""

_PLAIN_FIELDS = ("email", "emailVisibility", "verified")
_INTEGER_BITS = {"int2": 16, "int4": 32, "int8": 64}
_ANY_TEXT = frozenset({"text", "varchar", "bpchar", "name"})
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Users:
    """An auth collection, with what of its table serves logging in and is in no record."""

    collection: Collection
    secrets: tuple[str, ...] = ()
    """Columns read besides the plain fields: password hash, token key."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read, the key first, each once."""
        fields = (self.collection.by_name.get(name) for name in _PLAIN_FIELDS)
        plain = (f.column.name for f in fields if f is not None and f.column is not None)
        return tuple(dict.fromkeys((self.collection.key.name, *plain, *self.secrets)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A user as the database has it."""

    record: AuthRecord
    row: Row = field(repr=False)
    """The columns of ``Users.columns``; the secrets among them, so never printed."""


def canonical_id(text: str, key: Type) -> str | None:
    """The id as the key's type prints it, or None if no row can have it.

    Ids are texts in rules and tokens (rules, section 17). Asking a uuid column for "12" would be
    an error in Postgres; here it is an id that nobody has. So is "007" for an integer.
    """
    base = key.base
    if bits := _INTEGER_BITS.get(base.name):
        fits = (
            _INTEGER.fullmatch(text) is not None and -(1 << bits - 1) <= int(text) < 1 << bits - 1
        )
        return text if fits else None
    if base.name == "uuid":
        return text.lower() if _UUID.fullmatch(text) else None
    # Postgres has no U+0000 in texts.
    return None if "\x00" in text else text


class _Batch:
    """Ids that will be asked for together, and the answer to come."""

    def __init__(self, users: Users) -> None:
        self.users = users
        self.ids: set[str] = set()
        self.task: asyncio.Task[Mapping[str, Account]] | None = None


class Accounts:
    """Loads users by id.

    A load is answered by a query sent *after* it was called, never by one already under way: that
    one may have read the row before a change which the caller counts on being seen. So while a
    query runs, all who come meanwhile share the next one.

    Args:
        pool: Connections that may read the users tables.
    """

    def __init__(self, pool: AsyncConnectionPool[Any]) -> None:
        self._pool = pool
        self._gathering: dict[int, _Batch] = {}
        self._turns: dict[int, asyncio.Lock] = {}

    async def load(self, users: Users, record_id: str) -> Account | None:
        """The user of that id, or None if the table has none.

        Raises:
            DatabaseUnreachableError: No connection, or no answer in time.
            SetupError: The table can't be read as configured.
        """
        wanted = canonical_id(record_id, users.collection.key.type)
        if wanted is None:
            return None
        batch = self._join(users, wanted)
        assert batch.task is not None
        # Shielded: one caller going away must not take the answer from the others.
        return (await asyncio.shield(batch.task)).get(wanted)

    def _join(self, users: Users, wanted: str) -> _Batch:
        # By identity: hashing a collection means hashing its whole table. The batch keeps the
        # object alive, so the number can't pass to another one meanwhile.
        place = id(users)
        batch = self._gathering.get(place)
        if batch is None or len(batch.ids) >= _BATCH:
            batch = self._gathering[place] = _Batch(users)
            batch.task = asyncio.create_task(self._answer(place, batch), name="auth.accounts")
            batch.task.add_done_callback(_retrieve)
        batch.ids.add(wanted)
        return batch

    async def _answer(self, place: int, batch: _Batch) -> Mapping[str, Account]:
        async with self._turns.setdefault(place, asyncio.Lock()):
            if self._gathering.get(place) is batch:
                del self._gathering[place]
            try:
                return await self._query(batch.users, batch.ids)
            except (psycopg.DataError, UnicodeEncodeError):
                # An id that the database's encoding can't hold. Alone it has no row; in company
                # it must not spoil the others' answer.
                return await self._query_singly(batch.users, batch.ids)

    async def _query_singly(self, users: Users, ids: Iterable[str]) -> Mapping[str, Account]:
        found: dict[str, Account] = {}
        for one in ids:
            try:
                found |= await self._query(users, [one])
            except (psycopg.DataError, UnicodeEncodeError):
                continue
        return found

    async def _query(self, users: Users, ids: Iterable[str]) -> dict[str, Account]:
        statement = statement_by_id(users)
        try:
            async with self._pool.connection() as connection:
                cursor = connection.cursor(row_factory=tuple_row)
                await cursor.execute(statement, {"ids": list(ids)})
                rows = await cursor.fetchall()
        except psycopg.DataError:
            raise
        except (psycopg.OperationalError, PoolTimeout) as error:
            raise DatabaseUnreachableError("users can't be looked up now") from error
        except psycopg.Error as error:
            raise SetupError(
                f'table "{users.collection.table.name}" can\'t be read as users',
                detail=str(error).partition("\n")[0],
            ) from error
        return {account.record.id: account for account in _accounts(users, rows)}


def _accounts(users: Users, rows: Iterable[tuple[str | None, ...]]) -> Iterable[Account]:
    for values in rows:
        row = dict(zip(users.columns, values, strict=True))
        yield Account(record=auth_record(users.collection, row), row=row)


def _retrieve(task: asyncio.Task[Mapping[str, Account]]) -> None:
    """Take note of the outcome, in case everybody who waited for it has gone."""
    if not task.cancelled():
        task.exception()


def statement_by_id(users: Users) -> sql.Composed:
    """The query for users by id; its parameter ``ids`` is a list of canonical texts.

    Every value comes as text, as the stream has it. Key types that can be asked in their own type
    use the primary key's index; a key of another type (a domain over text counts as text, citext
    and enum don't) is compared as text, exactly but without the index.
    """
    collection = users.collection
    key = sql.Identifier(collection.key.name)
    name = collection.key.type.base.name
    is_native = name in _INTEGER_BITS or name in _ANY_TEXT or name == "uuid"
    return sql.SQL(
        "SELECT {columns} FROM {table} WHERE {key} OPERATOR(pg_catalog.=) ANY (%(ids)s::{type}[])"
    ).format(
        columns=sql.SQL(", ").join(
            sql.SQL("{}::pg_catalog.text").format(sql.Identifier(c)) for c in users.columns
        ),
        table=sql.Identifier(*collection.table.name),
        key=key if is_native else sql.SQL("{}::pg_catalog.text").format(key),
        type=sql.Identifier("pg_catalog", name if is_native else "text"),
    )
