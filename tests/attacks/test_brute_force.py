"""Password guessing: other spellings of an identity permit no more attempts.

Times reveal nothing.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import bcrypt
import psycopg
import pytest
from psycopg import sql
from structlog.testing import capture_logs

from pgrealtime.auth.account import AccountLoader, UserCollection
from pgrealtime.auth.login import LoginAttempt, LoginService
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.collections.build import build_collections
from pgrealtime.config.model import CollectionConfig, LoginConfig
from pgrealtime.errors import AuthError
from pgrealtime.postgres.pool import QueryPool

LIMIT = 5
HASH = bcrypt.hashpw(b"right", bcrypt.gensalt(4)).decode()
COLLATION = "CREATE COLLATION loose (provider = icu, locale = 'und', deterministic = false);"
FIRST_LEVEL = (
    "CREATE COLLATION loose"
    " (provider = icu, locale = 'und-u-ka-shifted-ks-level1', deterministic = false);"
)
TABLE = "CREATE TABLE people (id int PRIMARY KEY, nick {} UNIQUE, password_hash text);"
INSERT = "INSERT INTO people VALUES (1, 'ann', %s), (2, 'bob', %s)"


@asynccontextmanager
async def logging_in(
    url: str, ddl: str, *hashes: str, **login: Any
) -> AsyncIterator[tuple[LoginService, UserCollection]]:
    """Yield a login for users with the names ann and bob."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(sql.SQL(ddl))
        await connection.execute(INSERT, hashes or (HASH, HASH))
        given = {"identity": ["nick"], "password_hash": "password_hash"}
        configured = CollectionConfig.model_validate(
            {"table": "public.people", "type": "auth", "login": given}
        )
        collections = build_collections(
            {"people": configured}, await read_catalog(connection, schemas=["public"])
        )
    users = UserCollection(collection=collections["people"], login=configured.login)
    config = LoginConfig(enabled=True, secret="s" * 40, attempts_per_minute=LIMIT, **login)
    async with QueryPool(url) as pool:
        made = LoginService(config, AccountLoader(pool), monotonic_clock=lambda: 0.0)
        try:
            yield made, users
        finally:
            made.close()


async def outcome(
    login: LoginService,
    users: UserCollection,
    identity: str,
    password: str,
    address: str = "10.0.0.1",
) -> str:
    """Return ``right``, or the code of the refusal."""
    try:
        await login.log_in(users, LoginAttempt(identity=identity, password=password), address)
    except AuthError as error:
        return error.error_code
    return "right"


SPELLINGS: list[tuple[str, Callable[[int], str]]] = [
    (TABLE.format("char(40)"), lambda n: "ann" + " " * n),
    (COLLATION + TABLE.format("text COLLATE loose"), lambda n: "ann" + "\u00ad" * n),
    (COLLATION + TABLE.format("text COLLATE loose"), lambda n: "a" + "\u200d" * n + "nn"),
    (FIRST_LEVEL + TABLE.format("text COLLATE loose"), lambda n: "an" + "-" * n + "ń"),
]


@pytest.mark.parametrize(
    ("ddl", "spelled"), SPELLINGS, ids=["blanks", "soft hyphens", "joiners", "punctuation"]
)
async def test_other_spellings_of_a_name_bring_no_more_guesses(
    database_url: str, ddl: str, spelled: Callable[[int], str]
) -> None:
    """Spellings that the column's type takes for equal are attempts at the same account.

    Attempts beyond the limit fail as a wrong password does: anything else would show that the new
    spelling belongs to an account.
    """
    async with logging_in(database_url, ddl) as (login, users):
        assert await outcome(login, users, spelled(1), "right") == "right"
        guesses = [await outcome(login, users, spelled(n), "wrong") for n in range(20)]
        late = await outcome(login, users, spelled(21), "right")
        unknown = [await outcome(login, users, f"eve{' ' * n}", "wrong") for n in range(20)]
        others = await outcome(login, users, "bob", "right")

    assert Counter(guesses) == Counter(unknown) == {"login_failed": 20}
    assert late == "login_failed"
    assert others == "right"


async def test_the_right_password_gives_all_attempts_back(database_url: str) -> None:
    async with logging_in(database_url, TABLE.format("char(40)")) as (login, users):
        for _ in range(3):
            guesses = [await outcome(login, users, "ann" + " " * n, "wrong") for n in range(4)]
            assert guesses == ["login_failed"] * 4
            assert await outcome(login, users, "ann", "right") == "right"


async def test_the_owner_of_an_ipv6_network_has_the_attempts_of_one_address(
    database_url: str,
) -> None:
    """An IPv6 client controls all addresses of its /64; the next network is another client's."""
    async with logging_in(database_url, TABLE.format("text")) as (login, users):
        there = [f"2001:0db8:0000:0001:0000:0000:0000:{n:04x}" for n in range(1, LIMIT + 2)]
        guesses = [await outcome(login, users, "ann", "wrong", one) for one in there]
        neighbour = "2001:0db8:0000:0002:0000:0000:0000:0001"
        owner = await outcome(login, users, "ann", "right", neighbour)

    assert guesses == ["login_failed"] * LIMIT + ["login_refused"]
    assert owner == "right"


SLOW = "pbkdf2_sha256$1200000$salt$" + "A" * 43 + "="


@pytest.mark.parametrize("hashes", [(SLOW, SLOW), (HASH, HASH)], ids=["dear", "cheap"])
async def test_the_very_first_attempt_takes_an_unknown_user_as_long_as_a_known_one(
    database_url: str, hashes: tuple[str, str]
) -> None:
    """Before any successful login another scheme's dummy hash would show which accounts exist."""
    spent: dict[str, list[float]] = {"ann": [], "eve": []}
    with psycopg.connect(database_url, autocommit=True) as connection:
        for _ in range(3):
            for name, times in spent.items():
                connection.execute("DROP TABLE IF EXISTS people")
                async with logging_in(database_url, TABLE.format("text"), *hashes) as (one, users):
                    started = time.process_time()
                    assert await outcome(one, users, name, "wrong") == "login_failed"
                    times.append(time.process_time() - started)

    known, unknown = (statistics.median(times) for times in spent.values())
    assert known / 2 < unknown < known * 2


async def test_a_login_does_not_change_how_long_an_unknown_user_takes(database_url: str) -> None:
    """Otherwise a user with an uncommon hash could find out which accounts exist."""

    async def spent(login: LoginService, users: UserCollection, name: str) -> float:
        started = time.process_time()
        assert await outcome(login, users, name, "wrong") == "login_failed"
        return time.process_time() - started

    async with logging_in(database_url, TABLE.format("text"), SLOW, HASH) as (login, users):
        usual = await spent(login, users, "ann")
        assert await outcome(login, users, "bob", "right") == "right"
        assert await spent(login, users, "eve") > usual / 2


async def test_a_hash_that_cannot_be_read_is_logged_once_and_not_shown(database_url: str) -> None:
    """The operator must learn why the login fails; the log must not contain the hash."""
    hashes = ("md5$salt$5f4dcc3b5aa765d61d8327deb882cf99", "!unusable")
    with capture_logs() as lines:
        async with logging_in(database_url, TABLE.format("text"), *hashes) as (login, users):
            for name in ("ann", "bob", "eve", "ann"):
                assert await outcome(login, users, name, "right") == "login_failed"

    logged = [line for line in lines if line["event"] == "login.hash_unreadable"]
    assert logged == [
        {
            "event": "login.hash_unreadable",
            "log_level": "warning",
            "collection": "people",
            "scheme": "md5",
        }
    ]
    assert "5f4dcc3b" not in str(lines)
