"""Queries join the caller's own row by its key, whatever the key's type."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.catalog.introspect import read_catalog
from pgrealtime.collections.build import build_collections
from pgrealtime.collections.model import Collections
from pgrealtime.config.model import CollectionConfig
from pgrealtime.rules.engine.batch_query import PairQuestion
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.formula import each_test_call
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.language.request import RuleRequest
from pgrealtime.rules.sql.reference import SqlQuery

SCHEMA = """
CREATE EXTENSION citext;
CREATE DOMAIN short AS varchar(40);
CREATE TYPE mood AS ENUM ('m1', 'm2');
CREATE TABLE users (id {type} PRIMARY KEY, level int);
INSERT INTO users SELECT {value}, 1 FROM generate_series(1, {count}) n;
CREATE TABLE bans (id int PRIMARY KEY, person {type});
CREATE TABLE posts (id int PRIMARY KEY, title text);
ANALYZE;
"""
RULE = "@collection.bans.person != @request.auth.id"

KEYS = {
    "uuid": "md5(n::text)::uuid",
    "bigint": "n",
    "smallint": "n",
    "text": "'u' || n",
    "varchar(30)": "'u' || n",
    "char(26)": "'u' || n",
    "public.short": "'u' || n",
    "public.citext": "'u' || n",
    "numeric": "n",
    "public.mood": "('m' || n)::public.mood",
}


async def collections_of(url: str, ddl: str) -> Collections:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(sql.SQL(ddl))
        return build_collections(
            {
                name: CollectionConfig.model_validate(
                    {
                        "table": f"public.{name}",
                        "type": "auth" if name == "users" else "base",
                        "list_rule": RULE if name == "posts" else "",
                    }
                )
                for name in ("users", "bans", "posts")
            },
            await read_catalog(connection, schemas=["public"]),
        )


def asked(collections: Collections, *ids: str) -> SqlQuery:
    """Return the statement about one post and the callers of these ids."""
    users, posts = collections["users"], collections["posts"]
    principal = AuthRecord(collection_id=users.id, collection_name="users", id=ids[0])
    bound = RuleCompiler(collections).bind_caller(posts, RULE, RuleRequest(principal=principal))
    assert isinstance(bound, BoundPredicate)
    (leaf,) = each_test_call(bound.specialization.formula)
    question = PairQuestion(test=leaf.test, pairs=[((), (one,)) for one in ids]).sql_query()
    assert question is not None
    return question


@pytest.mark.parametrize("key_type", KEYS)
async def test_a_caller_is_there_or_nothing_is_asked_about_it(
    database_url: str, key_type: str
) -> None:
    """The lookup uses the key's own type and index.

    A scan of all users for each caller would take far too long.
    """
    count = 2 if key_type == "public.mood" else 20_000
    ddl = SCHEMA.format(type=key_type, value=KEYS[key_type], count=count)
    collections = await collections_of(database_url, ddl)
    with psycopg.connect(
        database_url, autocommit=True, options="-c search_path=pg_catalog"
    ) as connection:
        found = connection.execute("SELECT id::text FROM public.users LIMIT 2").fetchall()
        there, gone = (str(one).rstrip() for (one,) in found)
        connection.execute(
            sql.SQL("DELETE FROM public.users WHERE id::text = {}").format(sql.Literal(gone))
        )
        question = asked(collections, there, gone)
        admitted = connection.execute(question.sql.encode(), question.params).fetchall()
        plan = connection.execute(f"EXPLAIN {question.sql}".encode(), question.params).fetchall()

    assert admitted == [(0,)]
    text = "\n".join(line for (line,) in plan)
    assert count == 2 or "Seq Scan on users" not in text
