"""Which tables can be published, and the SQL for it. Integration tests run it on a server."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pgrealtime.catalog.model import ReplicaIdentity, Table, TableKind
from pgrealtime.changes import TableName
from pgrealtime.errors import SetupError
from pgrealtime.wal.publication import (
    Publication,
    check_publication,
    check_tables,
    publication_sql,
    tables_not_fully_published,
)
from tests.unit.wal.tables import table

POSTS = table("posts", "id t")
PARTS = table("parts", "id t", leaves=("parts_1", "parts_2"))
GENERATED = replace(POSTS, columns=(POSTS.columns[0], replace(POSTS.columns[1], is_generated=True)))


@pytest.mark.parametrize(
    ("name", "tables", "version", "sql"),
    [
        pytest.param(
            "pgrealtime",
            [POSTS, PARTS],
            170_000,
            'CREATE PUBLICATION "pgrealtime" FOR TABLE "public"."parts", ONLY "public"."posts";',
            id="table by table, without inheritance children",
        ),
        pytest.param(
            'a "b"',
            [table('T "x"', "id")],
            170_000,
            'CREATE PUBLICATION "a ""b""" FOR TABLE ONLY "public"."T ""x""";',
            id="quoted",
        ),
        pytest.param(
            "p",
            [GENERATED],
            180_000,
            'CREATE PUBLICATION "p" FOR TABLE ONLY "public"."posts"'
            " WITH (publish_generated_columns = stored);",
            id="generated columns where they can be published",
        ),
        pytest.param(
            "p",
            [GENERATED],
            170_000,
            'CREATE PUBLICATION "p" FOR TABLE ONLY "public"."posts";',
            id="generated columns before that",
        ),
    ],
)
def test_publication_names_its_tables(
    name: str, tables: list[Table], version: int, sql: str
) -> None:
    """FOR TABLE for each table, so that the publication has no table created later."""
    assert publication_sql(name, tables, version) == sql


@pytest.mark.parametrize(
    ("bad", "hint"),
    [
        pytest.param(
            replace(POSTS, replica_identity=ReplicaIdentity.NOTHING),
            'ALTER TABLE "public"."posts" REPLICA IDENTITY FULL;',
            id="identity nothing",
        ),
        pytest.param(
            replace(POSTS, replica_identity_columns=()),
            'ALTER TABLE "public"."posts" REPLICA IDENTITY FULL;',
            id="no primary key",
        ),
        pytest.param(
            replace(PARTS, replica_identity_columns=()),
            'ALTER TABLE "public"."parts_1" REPLICA IDENTITY FULL;\n'
            'ALTER TABLE "public"."parts_2" REPLICA IDENTITY FULL;',
            id="leaves have identities of their own",
        ),
        pytest.param(
            replace(POSTS, is_unlogged=True),
            'ALTER TABLE "public"."posts" SET LOGGED;',
            id="unlogged",
        ),
        pytest.param(
            replace(POSTS, kind=TableKind.VIEW), "Take them out of the configuration.", id="view"
        ),
        pytest.param(
            replace(POSTS, kind=TableKind.FOREIGN),
            "Take them out of the configuration.",
            id="foreign",
        ),
        pytest.param(
            replace(POSTS, partition_of=PARTS.name),
            "Take them out of the configuration.",
            id="a partition and its root",
        ),
    ],
)
def test_table_that_would_lose_changes_is_refused_with_what_mends_it(bad: Table, hint: str) -> None:
    """The error names the bad tables only, and its hint is the SQL that makes them fit."""
    good = replace(PARTS) if bad.name != PARTS.name else POSTS
    with pytest.raises(SetupError) as caught:
        check_tables([good, bad])

    assert caught.value.error_code == "table_not_streamable"
    assert f'"{bad.name}"' in caught.value.detail
    assert f'"{good.name}" ' not in caught.value.detail
    assert caught.value.hint == hint


def test_good_tables_pass() -> None:
    """A table without a primary key may have REPLICA IDENTITY FULL."""
    check_tables([POSTS, PARTS, table("whole", "a b", key="", identity=ReplicaIdentity.FULL)])


EXACT = Publication(
    tables=frozenset({POSTS.name, *PARTS.leaves}),
    partial_tables=frozenset(),
    includes_future_tables=False,
    is_via_root=False,
    publishes_all_actions=True,
    has_generated_columns=False,
)


@pytest.mark.parametrize(
    ("found", "detail"),
    [
        pytest.param(
            replace(EXACT, tables=frozenset({POSTS.name, PARTS.leaves[0]})),
            'It lacks "public.parts_2".',
            id="lacks one",
        ),
        pytest.param(
            replace(EXACT, tables=EXACT.tables | {TableName("public", "more")}),
            'It has "public.more", which the configuration doesn\'t have.',
            id="has one more",
        ),
        pytest.param(
            replace(EXACT, partial_tables=frozenset({POSTS.name})),
            'It leaves out rows or columns of "public.posts".',
            id="row filter or column list",
        ),
        pytest.param(
            replace(EXACT, includes_future_tables=True), "for all tables", id="for all tables"
        ),
        pytest.param(replace(EXACT, is_via_root=True), "publish_via_partition_root", id="via root"),
        pytest.param(
            replace(EXACT, publishes_all_actions=False), "insert, update, delete", id="no deletes"
        ),
    ],
)
def test_publication_that_is_not_exact_is_refused_with_what_mends_it(
    found: Publication, detail: str
) -> None:
    """Each deviation is named, and the hint creates the publication again."""
    with pytest.raises(SetupError) as caught:
        check_publication("p", found, [POSTS, PARTS], 170_000)

    assert caught.value.error_code == "publication_mismatch"
    assert detail in caught.value.detail
    assert 'DROP PUBLICATION "p"; CREATE PUBLICATION "p" FOR TABLE' in caught.value.hint


def test_missing_publication_is_answered_with_the_sql_that_makes_it() -> None:
    """The hint can be pasted."""
    with pytest.raises(SetupError) as caught:
        check_publication("p", None, [POSTS], 170_000)

    assert caught.value.error_code == "publication_missing"
    assert caught.value.hint.endswith(publication_sql("p", [POSTS], 170_000))


def test_exact_publication_passes() -> None:
    """A publication names a partitioned table by its leaves in the catalogue."""
    check_publication("p", EXACT, [POSTS, PARTS], 170_000)


@pytest.mark.parametrize(
    ("found", "missing"),
    [
        pytest.param(EXACT, (), id="none"),
        pytest.param(None, (POSTS, PARTS), id="dropped"),
        pytest.param(
            replace(EXACT, tables=EXACT.tables - {PARTS.leaves[1]}), (PARTS,), id="a partition"
        ),
        pytest.param(
            replace(EXACT, partial_tables=frozenset({POSTS.name})), (POSTS,), id="narrowed"
        ),
        pytest.param(replace(EXACT, publishes_all_actions=False), (POSTS, PARTS), id="no deletes"),
        pytest.param(
            replace(
                EXACT,
                tables=EXACT.tables | {TableName("public", "more")},
                includes_future_tables=True,
            ),
            (),
            id="more than is needed",
        ),
    ],
)
def test_what_is_not_published_is_missed(
    found: Publication | None, missing: tuple[Table, ...]
) -> None:
    """Of a running stream, only tables whose changes are missing are reported."""
    assert tables_not_fully_published(found, [POSTS, PARTS]) == {table.name for table in missing}


def test_whole_rows_need_their_generated_columns_published() -> None:
    """From version 18 on the server otherwise refuses UPDATE on such a table."""
    whole = replace(GENERATED, replica_identity=ReplicaIdentity.FULL)
    found = replace(EXACT, tables=frozenset({whole.name}))

    with pytest.raises(SetupError, match="does not match the configured tables"):
        check_publication("p", found, [whole], 180_000)
    check_publication("p", found, [whole], 170_000)
    check_publication("p", replace(found, has_generated_columns=True), [whole], 180_000)
