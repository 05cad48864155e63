"""What a server may lack, and the remedy that the operator reads: once applied, it works."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import psycopg
import pytest

from pgrealtime.catalog.model import Table
from pgrealtime.config.model import ReplicationConfig, SlotConfig
from pgrealtime.errors import DatabaseUnreachableError, PgRealtimeError, SetupError, SlotBusyError
from pgrealtime.wal.slot import SlotWait
from pgrealtime.wal.stream import WalStream, open_stream
from tests.own_server import OwnServer, own_server
from tests.stream_reading import (
    DEADLINE_SECONDS,
    PLUGINS,
    Plugin,
    changes_of,
    read_tables,
    reading,
    until_true,
    writer,
)

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def server() -> Iterator[OwnServer]:
    with own_server() as made:
        yield made


@pytest.fixture
def plain(server: OwnServer) -> OwnServer:
    """The server with its default settings, whatever the test before set."""
    if (server.folder / "data" / "standby.signal").exists():
        (server.folder / "data" / "standby.signal").unlink()
    server.configure()
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
        connection.execute("CREATE TABLE posts (id int PRIMARY KEY)")
    return server


@asynccontextmanager
async def opened(
    url: str, config: ReplicationConfig | None = None, *, superuser: str | None = None
) -> AsyncIterator[WalStream]:
    """A stream of everything in schema public."""
    async with writer(superuser or url) as connection:
        tables = await read_tables(connection)
    async with open_stream(
        url, config or ReplicationConfig(), tables, max_transaction_bytes=1000
    ) as stream:
        yield stream


async def refusal(
    url: str, config: ReplicationConfig | None = None, *, superuser: str | None = None
) -> PgRealtimeError:
    """Return the error that opening a stream raises."""
    with pytest.raises(PgRealtimeError) as caught:
        async with opened(url, config, superuser=superuser):
            pass
    return caught.value


def _needs_refusal(server: OwnServer) -> None:
    if not server.allows_choosing_decoders:
        pytest.skip("this minor release lets everybody use every decoder")


async def test_refused_wal2json_is_reported_with_the_setting_that_permits_it(
    plain: OwnServer,
) -> None:
    """The minor releases since August 2026 refuse it by default."""
    _needs_refusal(plain)
    plain.configure(output_plugin_libraries="pgoutput, test_decoding")
    error = await refusal(plain.url, ReplicationConfig(plugin="wal2json"))

    assert isinstance(error, SetupError)
    assert error.error_code == "plugin_refused"
    sql = error.hint.removeprefix("Run as a superuser: ")
    with psycopg.connect(plain.url, autocommit=True) as connection:
        for statement in sql.split(";"):
            if statement.strip():
                connection.execute(statement.strip().encode())
    async with opened(plain.url, ReplicationConfig(plugin="wal2json")) as stream:
        assert stream.slot.plugin == "wal2json"
    with psycopg.connect(plain.url, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM RESET output_plugin_libraries")


@pytest.mark.parametrize("plugin", PLUGINS)
async def test_a_slot_goes_with_its_connection_unless_it_shall_stay(
    plain: OwnServer, plugin: Plugin
) -> None:
    """A slot that outlives a dead process would retain WAL without a reader."""
    found = "SELECT slot_name, temporary FROM pg_replication_slots"
    async with writer(plain.url) as connection, reading(plain.url, connection, plugin) as stream:
        slots = await (await connection.execute(found)).fetchall()
        assert slots == [(stream.slot.name, True)]
        await connection.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
        )
        await until_true(connection, "SELECT count(*) = 0 FROM pg_replication_slots")


async def test_auto_takes_wal2json_where_it_can(plain: OwnServer) -> None:
    async with opened(plain.url) as stream:
        assert (stream.slot.plugin, stream.slot.plugin_reason) == ("wal2json", "")


async def test_auto_falls_back_to_pgoutput_and_says_why(plain: OwnServer) -> None:
    _needs_refusal(plain)
    plain.configure(output_plugin_libraries="pgoutput")
    error = await refusal(plain.url)
    assert error.error_code == "plugin_refused"
    assert "output_plugin_libraries = pgoutput, test_decoding, wal2json" in error.hint

    _, _, create = error.hint.rpartition("superuser: ")
    with psycopg.connect(plain.url, autocommit=True) as connection:
        connection.execute(create.encode())
    async with opened(plain.url) as stream:
        assert stream.slot.plugin == "pgoutput"
        assert stream.slot.plugin_reason == 'the server refuses the decoder "wal2json"'
    with psycopg.connect(plain.url, autocommit=True) as connection:
        connection.execute("DROP PUBLICATION pgrealtime")


async def test_a_missing_decoder_is_reported(plain: OwnServer) -> None:
    """58P01, as if the package weren't installed: this server looks for it in an empty folder."""
    plain.configure(
        dynamic_library_path="/nowhere",
        **(
            {"output_plugin_libraries": "pgoutput, wal2json"}
            if plain.allows_choosing_decoders
            else {}
        ),
    )
    error = await refusal(plain.url, ReplicationConfig(plugin="wal2json"))

    assert isinstance(error, SetupError)
    assert error.error_code == "plugin_missing"


async def test_a_role_without_replication_is_reported_with_the_remedy(plain: OwnServer) -> None:
    with psycopg.connect(plain.url, autocommit=True) as connection:
        connection.execute('CREATE ROLE "Reader" LOGIN')
    url = plain.url_of("Reader")
    error = await refusal(url, superuser=plain.url)

    assert isinstance(error, SetupError)
    assert error.error_code == "replication_attribute_missing"
    with psycopg.connect(plain.url, autocommit=True) as connection:
        connection.execute(error.hint.removeprefix("Run as a superuser: ").encode())
        async with opened(url, superuser=plain.url) as stream:
            assert stream.system.database_name == "postgres"
        connection.execute('DROP ROLE "Reader"')


async def test_a_server_without_logical_wal_is_reported(plain: OwnServer) -> None:
    plain.configure(wal_level="replica")
    error = await refusal(plain.url)

    assert isinstance(error, SetupError)
    assert error.error_code == "wal_level"


async def test_a_server_without_any_replication_is_reported(plain: OwnServer) -> None:
    """With wal_level = minimal the server refuses the connection itself."""
    plain.configure(wal_level="minimal", max_wal_senders="0")
    error = await refusal(plain.url)

    assert isinstance(error, SetupError)
    assert error.error_code == "wal_level"


async def test_standby_is_refused(plain: OwnServer) -> None:
    """Its snapshots omit running transactions, so no subscription could start without a gap."""
    async with writer(plain.url) as connection:
        tables = await read_tables(connection)
    (plain.folder / "data" / "standby.signal").touch()
    plain.configure()
    with pytest.raises(SetupError) as caught:
        async with open_stream(plain.url, ReplicationConfig(), tables, max_transaction_bytes=1000):
            pass

    assert caught.value.error_code == "standby"


async def test_no_free_slot_is_a_retryable_error(plain: OwnServer) -> None:
    plain.configure(max_replication_slots="1")
    async with opened(plain.url):
        error = await refusal(plain.url)
        assert isinstance(error, SlotBusyError)
        assert (error.error_code, error.retryable) == ("slots_exhausted", True)


async def test_no_free_walsender_is_a_retryable_error(plain: OwnServer) -> None:
    plain.configure(max_wal_senders="1")
    async with opened(plain.url):
        error = await refusal(plain.url)
        assert isinstance(error, SlotBusyError)
        assert (error.error_code, error.retryable) == ("walsenders_exhausted", True)


async def test_an_unreachable_server_is_a_retryable_error(plain: OwnServer) -> None:
    async with writer(plain.url) as connection:
        tables = await read_tables(connection)
    plain.control("stop", "--mode=fast")
    with pytest.raises(DatabaseUnreachableError) as caught:
        async with open_stream(plain.url, ReplicationConfig(), tables, max_transaction_bytes=1000):
            pass

    assert caught.value.retryable


async def test_an_invalid_url_is_reported_without_its_password() -> None:
    with pytest.raises(SetupError) as caught:
        async with open_stream(
            "host=x pass word=s3cret", ReplicationConfig(), [], max_transaction_bytes=1000
        ):
            pass

    assert caught.value.error_code == "database_url_invalid"
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("prepared", [False, True])
async def test_the_wait_for_an_open_transaction_is_logged(
    database_url: str,
    prepared: bool,  # noqa: FBT001 (a parameter of the test)
) -> None:
    """Creating a slot waits for all open transactions that have written; the log names them."""
    waits: asyncio.Queue[SlotWait] = asyncio.Queue()
    async with writer(database_url) as connection, asyncio.TaskGroup() as group:
        tables = await read_tables(connection)
        other = await psycopg.AsyncConnection.connect(database_url)
        await other.execute("CREATE TABLE held (id int)")
        pid = other.info.backend_pid
        if prepared:
            await other.execute("PREPARE TRANSACTION 'held'")
            await other.close()

        async def open_it() -> str:
            async with open_stream(
                database_url,
                ReplicationConfig(),
                tables,
                max_transaction_bytes=1000,
                on_wait=waits.put_nowait,
            ) as stream:
                return stream.slot.name

        opening = group.create_task(open_it(), name="opening")
        wait = await asyncio.wait_for(waits.get(), DEADLINE_SECONDS)
        if prepared:
            assert wait.pids == ()
            assert "held" in wait.prepared
            await connection.execute("ROLLBACK PREPARED 'held'")
        else:
            assert wait == SlotWait(pids=(pid,), prepared=())
            await other.close()
        assert (await asyncio.wait_for(opening, DEADLINE_SECONDS)).startswith("pgrealtime_")


async def test_wait_is_given_up_and_leaves_nothing(database_url: str) -> None:
    config = ReplicationConfig(slot=SlotConfig(name="impatient", create_timeout=0.2))
    async with writer(database_url) as connection:
        tables = await read_tables(connection)
        async with await psycopg.AsyncConnection.connect(database_url) as other:
            await other.execute("CREATE TABLE held (id int)")
            with pytest.raises(SlotBusyError) as caught:
                async with open_stream(database_url, config, tables, max_transaction_bytes=1000):
                    pass
        assert caught.value.error_code == "slot_create_timeout"
        left = await connection.execute(
            "SELECT slot_name FROM pg_replication_slots WHERE slot_name LIKE 'impatient%'"
        )
        assert await left.fetchall() == []


async def test_a_server_that_disconnects_during_set_up_is_a_retryable_error(
    database_url: str,
) -> None:
    """The error must be retryable, unlike a fault in the program."""
    seen = asyncio.Event()

    async def open_it(tables: list[Table]) -> None:
        async with open_stream(
            database_url,
            ReplicationConfig(slot=SlotConfig(name="cut_off")),
            tables,
            max_transaction_bytes=1000,
            on_wait=lambda _: seen.set(),
        ):
            pass

    async with (
        writer(database_url) as connection,
        await psycopg.AsyncConnection.connect(database_url) as other,
    ):
        tables = await read_tables(connection)
        await other.execute("CREATE TABLE held (id int)")
        opening = asyncio.create_task(open_it(tables), name="opening")
        await asyncio.wait_for(seen.wait(), DEADLINE_SECONDS)
        await connection.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
            " WHERE slot_name LIKE 'cut_off%'"
        )
        with pytest.raises(DatabaseUnreachableError):
            await asyncio.wait_for(opening, DEADLINE_SECONDS)


async def test_slot_goes_with_the_stream(database_url: str) -> None:
    """A slot without a reader would retain the server's WAL."""
    async with writer(database_url) as connection:
        async with reading(database_url, connection, "wal2json") as stream:
            found = await connection.execute(
                "SELECT temporary FROM pg_replication_slots WHERE slot_name = %s",
                (stream.slot.name,),
            )
            assert await found.fetchall() == [(True,)]
        await until_true(
            connection,
            "SELECT NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = %s)",
            stream.slot.name,
        )


BAD_PUBLICATIONS = {
    "lacks a table": "FOR TABLE ONLY posts",
    "has another table": 'FOR TABLE ONLY posts, tags, other, "finish line".crossed',
    "for all tables": "FOR ALL TABLES",
    "with an inheritance child": 'FOR TABLE posts, tags, "finish line".crossed',
    "with a row filter": 'FOR TABLE ONLY posts WHERE (id > 0), tags, "finish line".crossed',
    "with a column list": 'FOR TABLE ONLY posts (id), tags, "finish line".crossed',
    "without deletes": 'FOR TABLE ONLY posts, tags, "finish line".crossed WITH (publish=insert)',
}


@pytest.mark.parametrize("definition", BAD_PUBLICATIONS.values(), ids=BAD_PUBLICATIONS)
async def test_the_reported_sql_repairs_the_publication(database_url: str, definition: str) -> None:
    config = ReplicationConfig(plugin="pgoutput")
    async with writer(database_url) as connection:
        await connection.execute(
            "CREATE TABLE posts (id int PRIMARY KEY, t text);"
            "CREATE TABLE tags (id int, place int, PRIMARY KEY (id, place))"
            "  PARTITION BY LIST (place);"
            "CREATE TABLE tags_1 PARTITION OF tags FOR VALUES IN (1);"
            "CREATE TABLE other (id int PRIMARY KEY)"
        )
        tables = [t for t in await read_tables(connection) if t.name.name != "other"]
        if "child" in definition or definition == BAD_PUBLICATIONS["with an inheritance child"]:
            await connection.execute("CREATE TABLE child () INHERITS (posts)")
        await connection.execute(f"CREATE PUBLICATION pgrealtime {definition}".encode())
        with pytest.raises(SetupError) as caught:
            async with open_stream(database_url, config, tables, max_transaction_bytes=1 << 20):
                pass
        assert caught.value.error_code == "publication_mismatch"
        await connection.execute(caught.value.hint.partition("superuser: ")[2].encode())
        async with open_stream(
            database_url, config, tables, max_transaction_bytes=1 << 20
        ) as stream:
            await connection.execute("INSERT INTO posts VALUES (1); INSERT INTO tags VALUES (1, 1)")
            await connection.execute("UPDATE posts SET t = 'x'; DELETE FROM tags")
            assert len(await changes_of(connection, stream)) == 4


@pytest.mark.parametrize("plugin", PLUGINS)
async def test_table_that_would_lose_changes_is_refused(database_url: str, plugin: Plugin) -> None:
    config = ReplicationConfig.model_validate({"plugin": plugin})
    async with writer(database_url) as connection:
        await connection.execute("CREATE TABLE no_key (a int); CREATE UNLOGGED TABLE u (a int)")
        tables = await read_tables(connection)
        with pytest.raises(SetupError) as caught:
            async with open_stream(database_url, config, tables, max_transaction_bytes=1000):
                pass
        assert caught.value.error_code == "table_not_streamable"
        await connection.execute(caught.value.hint.encode())
        await connection.execute("ALTER TABLE u REPLICA IDENTITY FULL")
        async with reading(database_url, connection, plugin) as stream:
            await connection.execute("INSERT INTO no_key VALUES (1); INSERT INTO u VALUES (1)")
            await connection.execute("DELETE FROM no_key; DELETE FROM u")
            assert len(await changes_of(connection, stream)) == 4


async def test_database_in_another_encoding_is_read_by_pgoutput_only(plain: OwnServer) -> None:
    """wal2json writes the database's encoding, whatever the client's."""
    url = plain.url.removesuffix("/postgres") + "/latin"
    with psycopg.connect(plain.url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
    async with writer(url) as writing:
        await writing.execute("CREATE TABLE posts (id int PRIMARY KEY, t text)")
        error = await refusal(url, ReplicationConfig(plugin="wal2json"))
        assert error.error_code == "encoding_unsupported"
        assert error.hint == "Set replication.plugin to pgoutput."
        async with reading(url, writing, "pgoutput") as stream:
            await writing.execute("INSERT INTO posts VALUES (1, 'é')")
            (change,) = await changes_of(writing, stream)
            assert change.new == {"id": "1", "t": "é"}  # type: ignore[union-attr]  # an Insert, or it fails
