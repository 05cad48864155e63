"""``pgrealtime check`` reports each fault with one clear message, and all faults in one run."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.e2e.service import service
from tests.own_server import own_server
from tests.pgbouncer import pgbouncer
from tests.program import Outcome, clean_environ, run_program

_ROOT = Path(__file__).parents[2]

_SCHEMA = """
    CREATE TABLE users (
      id uuid PRIMARY KEY, email text, email_visibility bool, verified bool, password_hash text
    );
    CREATE TABLE posts (
      id bigint PRIMARY KEY, title text, published bool, author_id uuid REFERENCES users,
      reviewers uuid[], internal_note text, place jsonb
    );
    CREATE TABLE likes (
      post_id bigint REFERENCES posts, user_id uuid REFERENCES users,
      PRIMARY KEY (post_id, user_id)
    );
    CREATE TABLE keyless (a int);
    ALTER TABLE users REPLICA IDENTITY FULL;
    ALTER TABLE posts REPLICA IDENTITY FULL;
"""

_POSTS = """\
collections:
  posts:
    table: public.posts
    list_rule: published = true
    view_rule: published = true
"""


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator's configuration file and the commands run with it."""

    file: Path
    url: str

    def check(self, text: str = _POSTS, *options: str, **environ: str) -> Outcome:
        self.file.write_text(text, encoding="utf-8")
        return self.run("check", "-c", str(self.file), *options, **environ)

    def run(self, *command: str, **environ: str) -> Outcome:
        environ = {"DATABASE_URL": self.url, **environ}
        return run_program(*command, cwd=self.file.parent, **environ)


@pytest.fixture
def operator(database_url: str, tmp_path: Path) -> Operator:
    with psycopg.connect(database_url) as connection:
        connection.execute(_SCHEMA)
    return Operator(tmp_path / "pgrealtime.yaml", database_url)


@pytest.fixture
def role(operator: Operator) -> Iterator[str]:
    """A login role without privileges."""
    name = f"role_{uuid4().hex[:12]}"
    with psycopg.connect(operator.url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
        yield name
        for command in ("DROP OWNED BY {}", "DROP ROLE {}"):
            connection.execute(sql.SQL(command).format(sql.Identifier(name)))


def execute(operator: Operator, command: str, **names: str) -> None:
    identifiers = {key: sql.Identifier(name) for key, name in names.items()}
    with psycopg.connect(operator.url, autocommit=True) as connection:
        connection.execute(sql.SQL(command).format(**identifiers))


def database_of(operator: Operator) -> str:
    return operator.url.rpartition("/")[2]


# -- what is fine


def test_a_sound_set_up_is_ok(operator: Operator) -> None:
    outcome = operator.check()
    assert (outcome.code, outcome.err) == (0, "")
    verdict, counts, server, *_mirrors = outcome.out.splitlines()
    assert (verdict, counts) == ("ok", "1 collection, 7 fields, 2 rules")
    assert server.startswith("PostgreSQL ")
    assert server.endswith(f'database "{database_of(operator)}", wal2json')


_CLUSTER = "cluster: {bus: postgres, secret: a secret of more than thirty-two characters}\n"


def test_a_bus_is_tried_and_the_room_for_processes_is_said(operator: Operator) -> None:
    outcome = operator.check(_CLUSTER + _POSTS)
    assert (outcome.code, outcome.err) == (0, "")
    assert re.fullmatch(
        r'bus "app": works; 0 processes of it are running,'
        r" replication slots and walsenders for \d+ more",
        outcome.out.splitlines()[-1],
    )


def test_a_bus_through_a_pooler_is_an_error(operator: Operator) -> None:
    """Before anything else would say so: the stream needs a direct connection too."""
    with pgbouncer(operator.url) as pooled:
        outcome = operator.check(_CLUSTER + _POSTS, DATABASE_URL=pooled)
    assert outcome.code != 0
    assert outcome.err.startswith(("bus_needs_direct_connection: ", "replication_refused: "))


@pytest.mark.parametrize("name", ["pgrealtime.yaml", "minimal.yaml"])
def test_the_examples_are_ok(operator: Operator, name: str) -> None:
    """The users that their rule tests name have keys of another type here."""
    text = (_ROOT / "config" / name).read_text(encoding="utf-8")
    for user in ("ann", "bob"):
        key = str(uuid4())
        execute(operator, f"INSERT INTO users (id) VALUES ('{key}')")
        text = re.sub(rf"(users/|author: ){user}\b", rf"\g<1>{key}", text)
    outcome = operator.check(text, APP_JWT_SECRET="x" * 32)
    assert (outcome.code, outcome.err) == (0, "")


def test_a_check_leaves_nothing_behind(operator: Operator) -> None:
    """In particular no slot, which would retain WAL."""
    operator.check()
    with psycopg.connect(operator.url) as connection:
        slots = connection.execute(
            "SELECT slot_name FROM pg_replication_slots WHERE database = current_database()"
        )
        assert slots.fetchall() == []


def test_without_the_database_only_the_configuration_is_looked_at(operator: Operator) -> None:
    outcome = operator.check(
        _POSTS, "--no-database", DATABASE_URL="postgresql://postgres@127.0.0.1:1/none"
    )
    assert outcome == Outcome(0, "ok\n1 collection, 2 rules\n", "")


def test_the_file_is_looked_for_where_we_are_or_where_the_environment_says(
    operator: Operator,
) -> None:
    assert operator.run("check").code == 78
    operator.file.write_text(_POSTS)
    assert operator.run("check").code == 0
    elsewhere = operator.file.parent / "other.yaml"
    operator.file.rename(elsewhere)
    assert operator.run("check", PGREALTIME_CONFIG=str(elsewhere)).code == 0


def test_libpqs_variables_are_honoured(operator: Operator) -> None:
    given = conninfo_to_dict(operator.url)
    variables = {
        "PGHOST": str(given["host"]),
        "PGPORT": str(given["port"]),
        "PGUSER": str(given["user"]),
        "PGDATABASE": str(given["dbname"]),
    }
    outcome = operator.check(_POSTS, DATABASE_URL="", **variables)
    assert (outcome.code, outcome.err) == (0, "")


def test_the_version_is_printed(operator: Operator) -> None:
    outcome = operator.run("--version")
    assert outcome.code == 0
    assert outcome.out.startswith("pgrealtime ")


def test_a_wrong_command_line_is_a_usage_error(operator: Operator) -> None:
    assert operator.run("chekc").code == 2
    assert operator.run("check", "--no-such-option").code == 2


# -- one fault, one error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "server:\n  prot: 1\n" + _POSTS,
            ':2: server.prot: unknown key "prot" (perhaps you meant "port")',
        ),
        (
            _POSTS.replace("published = true", "published = && true", 1),
            (
                ":4: collections.posts.list_rule: expected an identifier, text, number or"
                " function\n"
                "    published = && true\n"
                "                ^^"
            ),
        ),
        (
            _POSTS.replace("published = true", "publisht = true", 1),
            (
                ':4: collections.posts.list_rule: there is no field "publisht"'
                ' (perhaps you meant "published")\n'
                "    publisht = true\n"
                "    ^^^^^^^^"
            ),
        ),
        (
            _POSTS.replace("public.posts", "public.post"),
            (
                ':3: collections.posts.table: there is no table "public.post"'
                ' (perhaps you meant "public.posts")'
            ),
        ),
        (
            _POSTS + "    fields: {include: [published, titel]}\n",
            (
                ':6: collections.posts.fields.include: there is no column "titel" in "public.posts"'
                ' (perhaps you meant "title")'
            ),
        ),
        (
            "collections:\n  keyless:\n    table: keyless\n",
            (
                ':3: collections.keyless.table: "public.keyless" has no primary key: its updates'
                ' and deletes name no row (id: "*" sends its creates alone)'
                ' (ALTER TABLE "public"."keyless" ADD COLUMN "id" bigint'
                " GENERATED ALWAYS AS IDENTITY PRIMARY KEY;)"
            ),
        ),
        (
            "auth: {issuers: [{name: app, public_key: none}]}\n" + _POSTS,
            ":1: auth.issuers.0.public_key: not a public key in PEM form",
        ),
    ],
    ids=["key", "rule syntax", "rule name", "table", "column", "primary key", "public key"],
)
def test_a_fault_of_the_configuration_is_reported_with_its_position(
    operator: Operator, text: str, expected: str
) -> None:
    assert operator.check(text) == Outcome(
        78,
        "",
        f"config_invalid: {operator.file} has 1 problem\nDETAIL: {operator.file}{expected}\n",
    )


def test_the_sql_that_a_refusal_prints_mends_it(operator: Operator) -> None:
    text = "collections: {keyless: {table: keyless}}\n"
    outcome = operator.check(text)
    execute(operator, outcome.err.partition("(ALTER")[2].join(["ALTER", ""]).rstrip(")\n"))
    assert operator.check(text).code == 0


def test_an_unreachable_server_is_reported(operator: Operator) -> None:
    outcome = operator.check(DATABASE_URL="postgresql://postgres@127.0.0.1:1/none")
    assert (outcome.code, outcome.out) == (69, "")
    assert outcome.err.startswith(
        "database_unreachable: the database can't be reached\nDETAIL: connection failed:"
    )
    assert "\nHINT: Check database.url (DATABASE_URL), or the PG* variables if" in outcome.err

    nowhere = "postgresql://postgres@127.0.0.1:1/none"
    outcome = operator.check(PGREALTIME_DATABASE__QUERY_URL=nowhere)
    assert outcome.err.endswith("\nHINT: Check database.query_url.\n")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql//me:hunter2@host/app",
        "postgresql://me:some@hunter2@host/app",
        "postgresql://me:hunter2@host/app?connect_timeout=5s",
    ],
    ids=["no scheme", "an at sign in the password", "no number"],
)
@pytest.mark.parametrize("command", ["check", "run"])
def test_an_invalid_url_is_reported_without_printing_it(
    operator: Operator, command: str, url: str
) -> None:
    operator.file.write_text(_POSTS, encoding="utf-8")
    outcome = operator.run(command, DATABASE_URL=url)
    assert outcome.code == 78
    assert outcome.err.startswith("database_url_invalid: the database URL can't be understood\n")
    assert "hunter2" not in outcome.err


def test_a_role_without_replication_gets_the_statement_to_run(
    operator: Operator, role: str
) -> None:
    execute(operator, "GRANT SELECT ON posts TO {role}", role=role)
    url = make_conninfo(operator.url, user=role)
    assert operator.check(DATABASE_URL=url) == Outcome(
        77,
        "",
        f'replication_attribute_missing: role "{role}" may not read the replication stream\n'
        "DETAIL: It lacks the REPLICATION attribute.\n"
        f'HINT: Run as a superuser: ALTER ROLE "{role}" REPLICATION;\n',
    )
    execute(operator, "ALTER ROLE {role} REPLICATION", role=role)
    assert operator.check(DATABASE_URL=url).code == 0


def test_a_query_role_without_privileges_gets_the_statement_to_run(
    operator: Operator, role: str
) -> None:
    query_url = make_conninfo(operator.url, user=role)
    outcome = operator.check(PGREALTIME_DATABASE__QUERY_URL=query_url)
    grant = (
        f'GRANT USAGE ON SCHEMA "public" TO "{role}"; GRANT SELECT ON "public"."posts" TO "{role}";'
    )
    assert outcome == Outcome(
        77, "", f'select_not_granted: role "{role}" may not read "public.posts"\nHINT: {grant}\n'
    )
    execute(operator, grant)
    assert operator.check(PGREALTIME_DATABASE__QUERY_URL=query_url).code == 0


def test_row_security_that_would_hide_rows_from_rules_is_reported(
    operator: Operator, role: str
) -> None:
    execute(
        operator,
        "GRANT SELECT ON posts TO {role}; ALTER TABLE posts ENABLE ROW LEVEL SECURITY",
        role=role,
    )
    query_url = make_conninfo(operator.url, user=role)
    outcome = operator.check(PGREALTIME_DATABASE__QUERY_URL=query_url)
    assert outcome.code == 2
    assert outcome.err.startswith(
        f'row_security: row security hides rows of "public.posts" from role "{role}"\n'
    )
    execute(operator, "ALTER ROLE {role} BYPASSRLS", role=role)
    assert operator.check(PGREALTIME_DATABASE__QUERY_URL=query_url).code == 0


_ALL = "CREATE POLICY a ON posts USING (true)"


@pytest.mark.parametrize(
    ("policies", "code"),
    [
        ("CREATE POLICY a ON posts FOR SELECT TO {role} USING (true)", 0),
        (_ALL, 0),
        ("CREATE POLICY a ON posts USING (published); CREATE POLICY b ON posts USING (true)", 0),
        ("CREATE POLICY a ON posts USING (published)", 2),
        ("CREATE POLICY a ON posts FOR UPDATE USING (true)", 2),
        ("CREATE POLICY a ON posts TO pg_monitor USING (true)", 2),
        (f"{_ALL};CREATE POLICY b ON posts AS RESTRICTIVE USING (published)", 2),
        (f"{_ALL};CREATE POLICY b ON posts AS RESTRICTIVE TO pg_monitor USING (published)", 0),
    ],
)
def test_a_policy_that_shows_every_row_is_as_good_as_bypassing_all(
    operator: Operator, role: str, policies: str, code: int
) -> None:
    execute(
        operator,
        "GRANT SELECT ON posts TO {role}; ALTER TABLE posts ENABLE ROW LEVEL SECURITY;" + policies,
        role=role,
    )
    query_url = make_conninfo(operator.url, user=role)
    assert operator.check(PGREALTIME_DATABASE__QUERY_URL=query_url).code == code


def test_a_server_that_refuses_wal2json_is_reported(operator: Operator) -> None:
    execute(
        operator,
        "ALTER DATABASE {database} SET output_plugin_libraries = 'pgoutput'",
        database=database_of(operator),
    )
    outcome = operator.check("replication: {plugin: wal2json}\n" + _POSTS)
    assert (outcome.code, outcome.out) == (77, "")
    assert outcome.err.startswith('plugin_refused: the server refuses the decoder "wal2json"\n')
    assert "HINT: Run as a superuser: ALTER SYSTEM SET output_plugin_libraries" in outcome.err


def test_a_server_with_neither_decoder_ready_gets_advice_on_both(operator: Operator) -> None:
    execute(
        operator,
        "ALTER DATABASE {database} SET output_plugin_libraries = 'pgoutput'",
        database=database_of(operator),
    )
    outcome = operator.check()
    assert "neither wal2json nor pgoutput can be used" in outcome.err
    assert "publication" in outcome.err
    assert outcome.code == 77


async def test_the_publication_that_check_asks_for_is_the_one_that_run_takes(
    operator: Operator, tmp_path: Path
) -> None:
    """A relation through a junction table needs the changes of that table too."""
    liked_by = {
        "through": "public.likes",
        "source": "post_id",
        "target": "user_id",
        "collection": "users",
    }
    collections: dict[str, dict[str, Any]] = {
        "users": {"table": "public.users", "type": "auth"},
        "posts": {
            "table": "public.posts",
            "list_rule": "liked_by.id ?= @request.auth.id",
            "relations": {"liked_by": liked_by},
        },
    }
    replication = {"plugin": "pgoutput"}
    text = json.dumps({"collections": collections, "replication": replication})  # which is YAML
    refused = operator.check(text)
    found = re.search("CREATE PUBLICATION .*;", refused.err)
    assert found is not None, refused
    execute(operator, found[0].replace("{", "{{"))
    accepted = operator.check(text)
    assert accepted.code == 0, accepted

    async with service(
        operator.url,
        tmp_path,
        collections=collections,
        sections={"replication": replication},
        schema="",
    ) as running:
        assert running.process.logged("server.started")


def test_what_is_waited_for_is_said(operator: Operator) -> None:
    """Creating a slot waits for all open transactions that have written, in any database."""
    operator.file.write_text(_POSTS, encoding="utf-8")
    with psycopg.connect(operator.url) as writer:
        writer.execute("CREATE TABLE of_an_open_transaction ()")
        pid = writer.info.backend_pid
        with subprocess.Popen(
            [sys.executable, "-m", "pgrealtime", "check", "-c", str(operator.file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environ() | {"DATABASE_URL": operator.url},
        ) as checking:
            assert checking.stderr is not None
            assert checking.stdout is not None
            said = checking.stderr.readline()
            writer.rollback()
            assert checking.stdout.readline() == "ok\n"
    assert said.startswith("waiting for the open transaction of process ")
    assert str(pid) in said


def test_a_database_without_an_encoding_is_reported(operator: Operator) -> None:
    """The error is no traceback.

    For such a database the driver returns bytes unless it is given an encoding.
    """
    name = f"ascii_{uuid4().hex[:12]}"
    execute(
        operator,
        "CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'",
        name=name,
    )
    url = make_conninfo(operator.url, dbname=name)
    try:
        with psycopg.connect(url, client_encoding="utf8") as connection:
            connection.execute(_SCHEMA)
        outcome = operator.check(DATABASE_URL=url)
    finally:
        execute(operator, "DROP DATABASE {name}", name=name)
    assert outcome == Outcome(
        2,
        "",
        "encoding_unsupported: neither wal2json nor pgoutput can be used\n"
        'DETAIL: wal2json: wal2json can\'t be used with a database in encoding "SQL_ASCII".\n'
        'pgoutput: pgoutput can\'t be used with a database in encoding "SQL_ASCII".\n'
        "HINT: Move the data to a database with ENCODING 'UTF8'.\n",
    )


@pytest.fixture(scope="module")
def replica_server() -> Iterator[str]:
    """The URL of a server with its default settings: wal_level = replica."""
    with own_server() as server:
        server.configure(wal_level="replica")
        with psycopg.connect(server.url) as connection:
            connection.execute(_SCHEMA)
        yield server.url


def test_a_server_that_does_not_write_logical_wal_is_reported(
    replica_server: str, operator: Operator
) -> None:
    assert operator.check(DATABASE_URL=replica_server) == Outcome(
        2,
        "",
        'wal_level: wal_level is "replica" and has to be "logical"\n'
        "HINT: Run as a superuser: ALTER SYSTEM SET wal_level = logical; and restart the server.\n",
    )


def test_a_query_url_to_another_server_is_reported(replica_server: str, operator: Operator) -> None:
    """Rules would be evaluated with rows that are not those of the stream."""
    outcome = operator.check(PGREALTIME_DATABASE__QUERY_URL=replica_server)
    assert outcome.code == 2
    assert outcome.err.startswith(
        "different_servers: database.url and database.query_url connect to different servers\n"
    )


def test_a_query_url_to_a_standby_is_reported(operator: Operator) -> None:
    """Rules would be evaluated with rows that a standby doesn't have yet."""
    with own_server() as primary:
        with psycopg.connect(primary.url) as connection:
            connection.execute(_SCHEMA)
        with primary.standby() as standby:
            urls = {
                "DATABASE_URL": f"{primary.url}?target_session_attrs=read-write",
                "PGREALTIME_DATABASE__QUERY_URL": standby.url,
            }
            outcome = operator.check(**urls)
            urls["PGREALTIME_DATABASE__QUERY_URL"] = primary.url
            assert operator.check(**urls).code == 0

    assert outcome == Outcome(
        2,
        "",
        "standby: database.query_url connects to a standby\n"
        "DETAIL: Rules would be evaluated on rows that the standby has not received yet.\n"
        "HINT: Connect to the primary, for example with all hosts and"
        " target_session_attrs=primary.\n",
    )


def test_a_table_is_refused_once(operator: Operator) -> None:
    """Creating the slot doesn't report the same table a second time."""
    execute(operator, "ALTER TABLE posts REPLICA IDENTITY NOTHING")
    outcome = operator.check()
    assert outcome.code == 78
    assert outcome.err.count("posts REPLICA IDENTITY") + outcome.err.count("NOTHING") == 1


# -- all at once


def test_all_faults_are_reported_in_one_run(operator: Operator, role: str) -> None:
    """Faults of the file, tables, rules, privileges and server are reported together."""
    text = """\
server: {prot: 1}
realtime: {heartbeat: 25}
collections:
  posts:
    table: public.posts
    fields: {hide: [internal_notes]}
    list_rule: published =
    view_rule: publisht = true
  users: {table: public.user}
"""
    outcome = operator.check(text, DATABASE_URL=make_conninfo(operator.url, user=role))
    assert outcome.code == 78
    found = [line for line in outcome.err.splitlines() if not line.startswith("    ")]
    file = operator.file
    assert found[:6] == [
        f"config_invalid: {file} has 5 problems",
        f'DETAIL: {file}:1: server.prot: unknown key "prot" (perhaps you meant "port")',
        f"{file}:2: realtime.heartbeat: not a duration; write it as 500ms, 25s, 5m, 1h or 5d",
        (
            f'{file}:6: collections.posts.fields.hide: there is no field "internal_notes"'
            ' (perhaps you meant "internal_note")'
        ),
        f"{file}:7: collections.posts.list_rule: incomplete expression",
        (
            f'{file}:9: collections.users.table: there is no table "public.user"'
            ' (perhaps you meant "public.users")'
        ),
    ]
    codes = [line.partition(":")[0] for line in found[6:] if line[:1].islower()]
    assert codes == ["select_not_granted", "replication_attribute_missing"]


def test_run_refuses_what_check_refuses(operator: Operator) -> None:
    """``run`` reports the same messages and codes, without a traceback."""
    operator.file.write_text("server: {prot: 1}\n" + _POSTS)
    outcome = operator.run("run", "-c", str(operator.file))
    assert outcome.code == 78
    assert f"{operator.file}:1: server.prot" in outcome.err

    operator.file.write_text(_POSTS.replace("public.posts", "public.post"))
    outcome = operator.run("run", "-c", str(operator.file))
    assert outcome.code == 78
    assert f"{operator.file}:3: collections.posts.table" in outcome.err

    operator.file.write_text("database: {wait_for: 0}\n" + _POSTS)
    unreachable: Mapping[str, str] = {"DATABASE_URL": "postgresql://postgres@127.0.0.1:1/none"}
    assert operator.run("run", "-c", str(operator.file), **unreachable).code == 69


def test_run_says_at_once_for_what_it_waits(operator: Operator, role: str) -> None:
    """``run`` waits a minute by default.

    It reports the cause, such as a wrong password, at once.
    """
    operator.file.write_text("database: {wait_for: 2s}\nlogging: {format: json}\n" + _POSTS)
    execute(operator, "ALTER ROLE {role} CONNECTION LIMIT 0", role=role)
    query_url = make_conninfo(operator.url, user=role)
    outcome = operator.run(
        *("run", "-c", str(operator.file)), PGREALTIME_DATABASE__QUERY_URL=query_url
    )
    said, *error = outcome.err.splitlines()
    logged = json.loads(said)
    assert (logged["event"], logged["wait_for"]) == ("database.waiting", 2.0)
    assert "too many connections" in logged["detail"]
    assert (outcome.code, error[0], error[-1]) == (
        69,
        "database_unreachable: the database can't be reached",
        "HINT: Check database.query_url; it has to lead to the primary.",
    )


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_run_ends_on_a_signal_while_it_waits(operator: Operator, end: signal.Signals) -> None:
    """Ctrl-C and "docker stop", which kills after ten seconds, end it in time."""
    operator.file.write_text("database: {wait_for: 1m}\n" + _POSTS)
    environ = {"DATABASE_URL": "postgresql://postgres@127.0.0.1:1/none"}
    with subprocess.Popen(
        [sys.executable, "-m", "pgrealtime", "run", "-c", str(operator.file)],
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environ() | environ,
    ) as process:
        assert process.stderr is not None
        assert "database.waiting" in process.stderr.readline()
        began = time.monotonic()
        process.send_signal(end)
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == ""
    assert time.monotonic() - began < 5.0
