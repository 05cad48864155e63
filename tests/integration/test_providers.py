"""Of a hosted server ``check`` and ``sql`` say what its provider calls a setting.

Providers are recognized by roles, which this server gets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from pgrealtime.cli.check.check import run_check
from pgrealtime.cli.sql.steps import role_steps
from pgrealtime.config.load import read_config
from pgrealtime.config.model import ReplicationConfig, SlotConfig
from pgrealtime.errors import PgRealtimeError
from pgrealtime.wal.stream import open_stream
from tests.own_server import OwnServer, own_server
from tests.stream_reading import writer

WORDS = {
    "rds_superuser": ("Amazon RDS", "rds.logical_replication to 1"),
    "alloydbsuperuser": ("AlloyDB", "alloydb.logical_decoding to on"),
    "cloudsqlsuperuser": ("Google Cloud SQL", "cloudsql.logical_decoding to on"),
    "azure_pg_admin": ("Azure Database for PostgreSQL", "server parameter wal_level to logical"),
    "supabase_admin": ("Supabase", "--config wal_level=logical"),
    "neon_superuser": ("Neon", "Enable logical replication in the project's settings"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[OwnServer]:
    with own_server() as made:
        yield made


@contextmanager
def roles(server: OwnServer, *names: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(server.url, autocommit=True) as connection:
        for name in names:
            connection.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(name)))
        try:
            yield connection
        finally:
            for name in names:
                connection.execute(SQL("DROP ROLE {}").format(Identifier(name)))


async def refusal(url: str, config: ReplicationConfig | None = None) -> PgRealtimeError:
    with pytest.raises(PgRealtimeError) as refused:
        async with open_stream(url, config or ReplicationConfig(), (), max_transaction_bytes=1):
            pass
    return refused.value


async def test_each_has_its_own_words_for_logical_wal(server: OwnServer) -> None:
    server.configure(wal_level="replica")
    said = {}
    try:
        for role in WORDS:
            with roles(server, role):
                error = await refusal(server.url)
            said[role] = (error.error_code, error.detail, error.hint)
        plain = await refusal(server.url)
    finally:
        server.configure()

    assert {code for code, _, _ in said.values()} == {"wal_level"}
    for role, (name, words) in WORDS.items():
        assert said[role][1] == f"The server is hosted by {name}."
        assert words in said[role][2]
    assert "ALTER SYSTEM" in plain.hint


async def test_a_role_of_the_provider_gives_replication(server: OwnServer) -> None:
    """RDS knows no attribute. What ``sql`` prints is what the error says, and it is enough there.

    This server still refuses the stream, but no more for want of the right.
    """
    with roles(server, "rds_superuser", "rds_replication", "Reader") as connection:
        before = await refusal(server.url_of("Reader"))
        async with writer(server.url) as reading:
            (step,) = [s async for s in role_steps(reading, "Reader", "Reader")]
            connection.execute(step.apply.encode())
            after = await refusal(server.url_of("Reader"))
            assert [s async for s in role_steps(reading, "Reader", "Reader")] == []

    assert before.error_code == "replication_attribute_missing"
    assert before.hint == 'Run as the master user: GRANT rds_replication TO "Reader";'
    assert step.apply == 'GRANT rds_replication TO "Reader";'
    assert step.undo == 'REVOKE rds_replication FROM "Reader";'
    assert after.error_code == "replication_refused"


async def test_a_limit_is_set_where_the_provider_has_it(server: OwnServer) -> None:
    durable = ReplicationConfig(slot=SlotConfig(durable=True))
    with roles(server, "azure_pg_admin"):
        error = await refusal(server.url, durable)

    assert error.error_code == "wal_unlimited"
    assert error.hint.startswith("Set the server parameter max_slot_wal_keep_size. Such as 10GB.")


async def test_check_names_the_provider_and_what_is_special_there(
    server: OwnServer, tmp_path: Path
) -> None:
    file = tmp_path / "pgrealtime.yaml"
    file.write_text("collections: {tasks: {table: provided_tasks}}\n")
    with roles(server, "neon_superuser") as connection:
        connection.execute("CREATE TABLE provided_tasks (id int PRIMARY KEY)")
        parsed = read_config(file, {"DATABASE_URL": server.url})
        result = await run_check(parsed, with_database=True)

    assert result.errors == ()
    assert " of Neon (take the direct URL, without -pooler; slots" in result.summary_lines[1]
