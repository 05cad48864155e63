"""Users loaded from a real database.

By a key of any type, through its index, in one query at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from uuid import UUID

import jwt
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.pq.abc import PGresult

from pgrealtime.auth.account import AccountLoader, UserCollection
from pgrealtime.auth.authenticator import Authenticator
from pgrealtime.auth.principal import GUEST, AuthRecord, Caller, Superuser
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.catalog.model import Table
from pgrealtime.changes import TableName
from pgrealtime.collections.model import Collection, Collections, Field, FieldKind
from pgrealtime.config.model import AuthConfig, IssuerConfig
from pgrealtime.errors import DatabaseUnreachableError, SetupError
from pgrealtime.lsn import Xid, parse_lsn
from pgrealtime.postgres.pool import QueryPool
from pgrealtime.postgres.rows import rows_by_key_statement
from pgrealtime.snapshot import ReadPoint

SECRET = "a-secret-of-thirty-two-characters"
ISSUER = IssuerConfig(name="app", secret=SECRET)
NAMES = {"email_visible": "emailVisibility"}


def collection_of(table: Table) -> Collection:
    """The collection "users" over a table; ``email_visible`` is its ``emailVisibility``."""
    fields = tuple(
        Field(
            name=NAMES.get(column.name, column.name),
            column=column,
            kind=FieldKind.BOOL if column.type.base.name == "bool" else FieldKind.TEXT,
            type=column.type,
        )
        for column in table.columns
    )
    key = table.find_column(table.primary_key[0])
    assert key is not None
    return Collection(
        name="users", id="_pb_users_auth_", type="auth", table=table, key=key, fields=fields
    )


async def users_of(url: str, ddl: str) -> UserCollection:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(sql.SQL(ddl))
        name = TableName("public", "Users")
        catalog = await read_catalog(connection, names=[name])
    return UserCollection(collection=collection_of(catalog.tables[name]))


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[QueryPool]:
    async with QueryPool(database_url, timeout=5) as pool:
        yield pool


FULL = """
CREATE TABLE public."Users" (
  id text PRIMARY KEY, email text, email_visible boolean, verified boolean NOT NULL, name text);
INSERT INTO public."Users" VALUES
  ('u1', 'ann@example.com', true, true, 'Ann'), ('u2', NULL, NULL, false, 'Bob');
"""


def make_authenticator(
    users: UserCollection, accounts: AccountLoader, *issuers: IssuerConfig
) -> Authenticator:
    auth = AuthConfig(issuers=issuers or (ISSUER,))
    return Authenticator(auth, Collections((users.collection,)), accounts)


async def test_the_row_says_what_the_token_does_not(database_url: str, pool: QueryPool) -> None:
    """The plain fields come from the database, whatever a token claims about them."""
    users = await users_of(database_url, FULL)
    authenticator = make_authenticator(users, AccountLoader(pool))
    claims = {"sub": "u1", "exp": 4_000_000_000, "email": "x@y", "verified": False}

    assert await authenticator.authenticate(jwt.encode(claims, SECRET)) == Caller(
        AuthRecord(
            collection_id="_pb_users_auth_",
            collection_name="users",
            id="u1",
            email="ann@example.com",
            email_visibility=True,
            verified=True,
        ),
        expires_at=4_000_000_000,
    )
    assert await authenticator.authenticate(
        "Bearer " + jwt.encode({"sub": "u2"}, SECRET)
    ) == Caller(AuthRecord(collection_id="_pb_users_auth_", collection_name="users", id="u2"))


async def test_a_table_of_ids_alone_is_enough(database_url: str, pool: QueryPool) -> None:
    users = await users_of(
        database_url,
        'CREATE TABLE public."Users" (id text PRIMARY KEY);'
        """INSERT INTO public."Users" VALUES ('u1')""",
    )

    account = await AccountLoader(pool).load(users, "u1")

    assert account is not None
    assert account.record == AuthRecord(
        collection_id="_pb_users_auth_", collection_name="users", id="u1"
    )


async def test_a_deleted_user_is_a_guest(database_url: str, pool: QueryPool) -> None:
    """A deleted row makes its open connections guests (protocol, 8).

    Its token must not undo that.
    """
    users = await users_of(database_url, FULL)
    authenticator = make_authenticator(users, AccountLoader(pool))
    token = jwt.encode({"sub": "u1"}, SECRET)
    assert (await authenticator.authenticate(token)).principal != GUEST

    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
        await other.execute('DELETE FROM public."Users"')

    assert await authenticator.authenticate(token) == Caller()


async def test_a_superuser_needs_no_row(database_url: str, pool: QueryPool) -> None:
    users = await users_of(database_url, FULL)
    issuer = ISSUER.model_copy(update={"superuser_when": {"role": "service_role"}})
    authenticator = make_authenticator(users, AccountLoader(pool), issuer)

    named = jwt.encode({"sub": "s1", "role": "service_role"}, SECRET)
    nameless = jwt.encode({"role": "service_role"}, SECRET)

    assert (await authenticator.authenticate(named)).principal == Superuser("s1")
    assert (await authenticator.authenticate(nameless)).principal == Superuser("")


@pytest.mark.parametrize(
    ("key_type", "stored", "found", "absent"),
    [
        ("uuid", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
         ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"],
         ["12", "", "a0eebc999c0b4ef8bb6d6bb9bd380a11", "{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11}"]),
        ("integer", "7", ["7"], ["07", "+7", " 7", "7.0", "0x7", "\u0667", "2147483648",
                            "9" * 4000, "u1"]),
        ("bigint", "-9223372036854775808", ["-9223372036854775808"],
         ["9223372036854775808", "-9223372036854775809", "-0"]),
        ("smallint", "0", ["0"], ["32768", "-0", "00"]),
        ("varchar(20)", "u1", ["u1"], ["u1 ", "U1", "u1\x00", "'; --"]),
        ("char(4)", "u1", ["u1"], ["u2"]),
        ("public.key", "u1", ["u1"], ["u2", "\x00"]),
        ("public.mood", "sad", ["sad"], ["glad", "u1"]),
        ("numeric", "1.50", ["1.50"], ["1.5", "x"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
async def test_an_id_that_does_not_fit_the_key_matches_no_user(
    database_url: str,
    pool: QueryPool,
    *,
    key_type: str,
    stored: str,
    found: list[str],
    absent: list[str],
) -> None:
    """Ids are texts (rules, section 17): the comparison is false, never an error."""
    users = await users_of(
        database_url,
        "CREATE DOMAIN public.key AS text; CREATE TYPE public.mood AS ENUM ('sad');"
        f'CREATE TABLE public."Users" (id {key_type} PRIMARY KEY);'
        f"""INSERT INTO public."Users" VALUES ('{stored}')""",
    )
    accounts = AccountLoader(pool)

    there = [await accounts.load(users, one) for one in found]

    assert [account and account.record.id for account in there] == [stored] * len(found)
    assert [await accounts.load(users, one) for one in absent] == [None] * len(absent)


@pytest.mark.parametrize(
    "key_type", ["uuid", "integer", "bigint", "text", "varchar(40)", "public.key"]
)
async def test_a_lookup_reads_the_index(database_url: str, pool: QueryPool, key_type: str) -> None:
    """A login must not cost a scan of the whole table of users."""
    series = "md5(n::text)::uuid" if key_type == "uuid" else "n"
    users = await users_of(
        database_url,
        "CREATE DOMAIN public.key AS text;"
        f'CREATE TABLE public."Users" (id {key_type} PRIMARY KEY);'
        f'INSERT INTO public."Users" SELECT {series} FROM generate_series(1, 20000) n;'
        'ANALYZE public."Users"',
    )
    one = str(UUID(int=1)) if key_type == "uuid" else "17"
    statement = rows_by_key_statement(
        users.collection.table.name, users.collection.key, users.column_names
    )
    async with pool.connection() as connection:
        cursor = await connection.execute(
            f"EXPLAIN {statement}".encode(),
            {"ids": [one]},
        )
        plan = "\n".join(line for (line,) in await cursor.fetchall())

    assert "Index" in plan
    assert "Seq Scan" not in plan


async def test_loads_at_the_same_time_share_a_query(database_url: str, pool: QueryPool) -> None:
    """Clients that reconnect together after a restart cause a few queries, not one each."""
    users = await users_of(
        database_url,
        'CREATE TABLE public."Users" (id integer PRIMARY KEY);'
        'INSERT INTO public."Users" SELECT generate_series(1, 900)',
    )
    accounts = AccountLoader(pool)
    asked = pool.get_stats().get("requests_num", 0)

    answers = await asyncio.gather(*(accounts.load(users, str(n)) for n in range(1, 1001)))

    assert [a and a.record.id for a in answers] == [
        str(n) if n <= 900 else None for n in range(1, 1001)
    ]
    assert pool.get_stats()["requests_num"] - asked == 2


@pytest.mark.parametrize(
    "odd",
    ["null", "NULL", "it's", 'a"b', "a\\b", "a,b", "{}", "", " ", "%s", "%(ids)s", "\u00e9", "a;b"],
)
async def test_any_id_is_found_among_others(database_url: str, pool: QueryPool, odd: str) -> None:
    """Whatever an array's text form would have to quote."""
    users = await users_of(database_url, 'CREATE TABLE public."Users" (id text PRIMARY KEY);')
    ids = [odd, "u1", "ann@example.com", "2f1-a.b:c+d_e"]
    with psycopg.connect(database_url, autocommit=True) as writer:
        for one in ids:
            writer.execute('INSERT INTO public."Users" VALUES (%s)', [one])
    accounts = AccountLoader(pool)

    alone = await accounts.load(users, odd)
    together = await asyncio.gather(*(accounts.load(users, one) for one in [*ids, "nobody"]))

    assert alone is not None
    assert alone.record.id == odd
    assert [a and a.record.id for a in together] == [*ids, None]
    assert len({account.read_point for account in together if account}) == 1


class HeldUp(QueryPool):
    """A pool that delays its answers until the test releases them."""

    def __init__(self, url: str) -> None:
        super().__init__(url, min_size=2)
        self.gate = asyncio.Event()
        self.answered = asyncio.Event()

    async def fetch(
        self, statement: str, params: Mapping[str, object]
    ) -> tuple[ReadPoint, PGresult]:
        result = await super().fetch(statement, params)
        self.answered.set()
        await self.gate.wait()
        return result


async def test_a_load_is_answered_by_a_query_sent_after_it(database_url: str) -> None:
    """A load never shares a query that was sent before it.

    Its answer would show the user as of before the call. A user that the query didn't ask for would
    be missing in it, so a valid token would make a guest.
    """
    users = await users_of(
        database_url,
        'CREATE TABLE public."Users" (id text PRIMARY KEY, email text);'
        """INSERT INTO public."Users" VALUES ('u1', 'old'), ('u2', 'two')""",
    )
    async with HeldUp(database_url) as pool:
        accounts = AccountLoader(pool)
        early = asyncio.create_task(accounts.load(users, "u1"))
        await asyncio.wait_for(pool.answered.wait(), 10)
        with psycopg.connect(database_url, autocommit=True) as writer:
            writer.execute("""UPDATE public."Users" SET email = 'new'""")
            writer.execute("""INSERT INTO public."Users" VALUES ('u3', 'three')""")
        late = [asyncio.create_task(accounts.load(users, name)) for name in ("u1", "u2", "u3")]
        await asyncio.sleep(0.01)
        pool.gate.set()
        answers = await asyncio.wait_for(asyncio.gather(early, *late), 10)

    assert [answer and answer.record.email for answer in answers] == ["old", "new", "new", "three"]


async def test_a_cancelled_load_leaves_the_answer_to_the_others(
    database_url: str, pool: QueryPool
) -> None:
    users = await users_of(database_url, FULL)
    accounts = AccountLoader(pool)
    first = asyncio.create_task(accounts.load(users, "u1"))
    second = asyncio.create_task(accounts.load(users, "u1"))
    await asyncio.sleep(0)

    first.cancel()

    account = await asyncio.wait_for(second, 5)
    assert account is not None
    assert account.record.id == "u1"
    with pytest.raises(asyncio.CancelledError):
        await first


@pytest.fixture
def latin1_url(database_url: str) -> Iterator[str]:
    """A database of the test's own whose encoding lacks most of Unicode."""
    name = f"{psycopg.conninfo.conninfo_to_dict(database_url)['dbname']}_latin1"
    with psycopg.connect(database_url, autocommit=True) as admin:
        admin.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'").format(
                sql.Identifier(name)
            )
        )
        yield f"{database_url}_latin1"
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.mark.parametrize("client_encoding", ["UTF8", "LATIN1"])
async def test_an_id_that_the_database_cannot_hold_fails_no_other_load(
    latin1_url: str, client_encoding: str
) -> None:
    """In a LATIN1 database a kanji is an error of the server or the driver, not a missing row."""
    users = await users_of(latin1_url, FULL)
    async with QueryPool(make_conninfo(latin1_url, client_encoding=client_encoding)) as pool:
        accounts = AccountLoader(pool)
        answers = await asyncio.gather(
            *(accounts.load(users, one) for one in ("u1", "\u65e5", "u2"))
        )

    assert [a and a.record.id for a in answers] == ["u1", None, "u2"]


async def test_a_database_away_is_not_the_tokens_fault(database_url: str, pool: QueryPool) -> None:
    """Answering "guest" would sign all users out whenever the database restarts."""
    users = await users_of(database_url, FULL)
    await pool.close()
    authenticator = make_authenticator(users, AccountLoader(pool))

    with pytest.raises(DatabaseUnreachableError):
        await authenticator.authenticate(jwt.encode({"sub": "u1"}, SECRET))
    assert await authenticator.authenticate("nonsense") == Caller()


async def test_a_users_table_that_cannot_be_read_says_so(
    database_url: str, pool: QueryPool
) -> None:
    users = await users_of(database_url, FULL)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
        await other.execute('ALTER TABLE public."Users" RENAME email TO mail')

    with pytest.raises(SetupError, match=r"public\.Users"):
        await AccountLoader(pool).load(users, "u1")


async def test_tokens_that_hold_nowhere_ask_the_database_nothing(
    database_url: str, pool: QueryPool
) -> None:
    """Callers without a valid token must not be able to load the database."""
    users = await users_of(database_url, FULL)
    authenticator = make_authenticator(users, AccountLoader(pool))
    asked = pool.get_stats().get("requests_num", 0)

    for token in (
        None,
        "nonsense",
        jwt.encode({"sub": "u1"}, "another-secret-of-enough-characters"),
        jwt.encode({"sub": "u1", "exp": 1}, SECRET),
        jwt.encode({}, SECRET),
    ):
        assert await authenticator.authenticate(token) == Caller()

    assert pool.get_stats().get("requests_num", 0) == asked


async def test_a_user_is_loaded_with_the_snapshot_that_orders_its_changes(
    database_url: str, pool: QueryPool
) -> None:
    """The stream may still bring changes that the loaded row contains.

    They must not undo later ones.
    """
    users = await users_of(database_url, FULL)
    change = "UPDATE public.\"Users\" SET name = %s WHERE id = 'u1' RETURNING pg_current_xact_id()"
    async with (
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection,
        await psycopg.AsyncConnection.connect(database_url) as other,
    ):
        before = await (await connection.execute(change, ["Before"])).fetchone()
        during = await (
            await other.execute("SELECT pg_current_xact_id(), pg_current_wal_insert_lsn()::text")
        ).fetchone()
        account = await AccountLoader(pool).load(users, "u1")
        await other.commit()
        after = await (await connection.execute(change, ["After"])).fetchone()
    assert before is not None
    assert during is not None
    assert after is not None
    assert account is not None
    assert account.read_point is not None

    known = account.read_point
    seen, unseen, lsn = Xid(int(before[0])), [Xid(int(during[0])), Xid(int(after[0]))], during[1]
    assert known.insert_lsn >= parse_lsn(lsn)
    assert not known.predates(seen, known.insert_lsn)
    assert [known.predates(xid, known.insert_lsn) for xid in unseen] == [True, True]
