"""``pgrealtime sql`` prints what a database lacks; run twice it is enough, and it can be undone."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import yaml
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.lacking import lacking
from tests.program import Outcome, run_program

_SCHEMA = """
    CREATE SCHEMA "My App";
    CREATE TABLE "My App"."Users" (id uuid PRIMARY KEY, "Email" text, team int);
    CREATE TABLE posts (
      id bigint PRIMARY KEY, open bool NOT NULL, owner uuid NOT NULL REFERENCES "My App"."Users"
    );
    CREATE TABLE likes (
      post_id bigint REFERENCES posts, user_id uuid REFERENCES "My App"."Users",
      PRIMARY KEY (post_id, user_id)
    );
    CREATE TABLE events (id int PRIMARY KEY, kind text NOT NULL) PARTITION BY RANGE (id);
    CREATE TABLE early PARTITION OF events FOR VALUES FROM (0) TO (10);
    CREATE TABLE late PARTITION OF events FOR VALUES FROM (10) TO (20);
    CREATE TABLE coded (id int PRIMARY KEY, code int NOT NULL UNIQUE, open bool NOT NULL);
    ALTER TABLE coded REPLICA IDENTITY USING INDEX coded_code_key;
    CREATE TABLE unnamed (id int PRIMARY KEY);
    ALTER TABLE unnamed REPLICA IDENTITY NOTHING;
    CREATE TABLE secured (id int PRIMARY KEY);
    ALTER TABLE secured ENABLE ROW LEVEL SECURITY;
    CREATE TABLE plain (id int PRIMARY KEY, title text);
    CREATE VIEW shown AS SELECT id, title FROM plain;
"""
_COLLECTIONS: dict[str, Any] = {
    "users": {"table": '"My App"."Users"', "type": "auth", "list_rule": "id = @request.auth.id"},
    "posts": {
        "table": "posts",
        "list_rule": "owner = @request.auth.id",
        "view_rule": 'open = true || (@request.auth.id != "" && liked_by.id ?= @request.auth.id)',
        "relations": {"liked_by": {"collection": "users", "through": "likes"}},
    },
    "events": {"table": "events", "list_rule": 'kind = "x"'},
    "coded": {"table": "coded", "list_rule": "open = true"},
    "unnamed": {"table": "unnamed", "list_rule": ""},
    "secured": {"table": "secured", "list_rule": ""},
    "plain": {"table": "plain", "list_rule": ""},
    "shown": {"table": "shown", "stream": False, "id": "id", "list_rule": ""},
}

_STATE = """
SELECT 'role', pg_catalog.concat_ws(' ', rolname, rolcanlogin, rolreplication, rolbypassrls)
FROM pg_roles WHERE rolname !~ '^pg_'
UNION ALL SELECT 'identity', concat_ws(' ', relname, relreplident::text, (
  SELECT indexrelid::regclass FROM pg_index WHERE indrelid = c.oid AND indisreplident))
FROM pg_class c WHERE relkind IN ('r', 'p') AND relnamespace::regnamespace::text !~ '^(pg_|inf)'
UNION ALL SELECT 'index', pg_get_indexdef(indexrelid) FROM pg_index
WHERE indexrelid::regclass::text !~ '^pg_'
UNION ALL SELECT 'publication', pubname FROM pg_publication
UNION ALL SELECT 'policy', concat_ws(' ', polname, polrelid::regclass) FROM pg_policy
UNION ALL SELECT 'table', concat_ws(' ', c.oid::regclass, acl) FROM pg_class c,
  aclexplode(coalesce(relacl, acldefault('r', relowner))) acl WHERE relkind IN ('r', 'p', 'v')
UNION ALL SELECT 'schema', concat_ws(' ', nspname, acl) FROM pg_namespace,
  aclexplode(coalesce(nspacl, acldefault('n', nspowner))) acl
UNION ALL SELECT 'database', acl::text FROM pg_database,
  aclexplode(coalesce(datacl, acldefault('d', datdba))) acl WHERE datname = current_database()
"""


def _psql() -> str:
    folder = os.environ.get("PGREALTIME_TEST_PG_BIN", "")
    return shutil.which("psql", path=folder or None) or lacking("there is no psql")


class Operator:
    """An operator with an administrator's URL, a file, and two logins that don't exist yet."""

    def __init__(self, url: str, folder: Path) -> None:
        suffix = uuid4().hex[:8]
        self.url = url
        self.stream_role = f'Stream "{suffix}'
        self.query_role = f"query_{suffix}"
        self.folder = folder
        self.file = folder / "pgrealtime.yaml"
        self.configure()

    def configure(self, **collections: Any) -> None:
        urls = {
            key: make_conninfo(self.url, user=role)
            for key, role in (("url", self.stream_role), ("query_url", self.query_role))
        }
        settings = {
            "database": urls,
            "replication": {"plugin": "pgoutput", "publication": "Ours"},
            "collections": collections or _COLLECTIONS,
        }
        self.file.write_text(yaml.safe_dump(settings))

    def run(self, *arguments: str) -> Outcome:
        return run_program(*arguments, "-c", str(self.file))

    def printed(self, *options: str) -> str:
        outcome = self.run("sql", "--url", self.url, *options)
        assert (outcome.code, outcome.err) == (0, "")
        return outcome.out

    def psql(self, script: str) -> None:
        done = subprocess.run(
            [_psql(), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", self.url],
            check=False,
            input=script,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    def execute(self, *statements: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def state(self) -> set[tuple[str, str]]:
        """Return all that the script may change."""
        with psycopg.connect(self.url) as connection:
            return set(connection.execute(_STATE).fetchall())


@pytest.fixture
def operator(database_url: str, tmp_path: Path) -> Iterator[Operator]:
    made = Operator(database_url, tmp_path)
    made.execute(_SCHEMA)
    yield made
    with psycopg.connect(database_url, autocommit=True) as connection:
        for role in (made.stream_role, made.query_role):
            known = connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [role])
            for command in ("DROP OWNED BY {}", "DROP ROLE {}") if known.fetchone() else ():
                connection.execute(sql.SQL(command).format(sql.Identifier(role)))


def test_run_twice_it_is_enough_for_check(operator: Operator) -> None:
    """From two logins that don't exist to a service that could start."""
    script = operator.printed()
    operator.psql(script)
    after = operator.state()
    operator.psql(script)
    assert operator.state() == after

    outcome = operator.run("check")
    assert (outcome.code, outcome.err) == (0, "")
    # Now the logins of the configuration can look for themselves.
    outcome = operator.run("sql")
    database = conninfo_to_dict(operator.url)["dbname"]
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == (
        f'-- Database "{database}" lacks nothing of what the configuration needs.\n'
    )


def test_only_what_is_needed_is_changed(operator: Operator) -> None:
    """The key is enough for most deletes; a whole old row costs WAL."""
    before = operator.state()
    operator.psql(operator.printed())
    whole = {text for kind, text in operator.state() - before if kind == "identity"}
    assert whole == {f"{name} f" for name in ("posts", "early", "late", "coded", "unnamed")}
    with psycopg.connect(operator.url) as connection:
        roles = connection.execute(
            "SELECT rolname, rolcanlogin, rolreplication, rolsuper, rolconfig FROM pg_roles"
            " WHERE rolname = ANY (%s) ORDER BY rolreplication",
            [[operator.stream_role, operator.query_role]],
        ).fetchall()
    assert roles == [
        (operator.query_role, True, False, False, ["default_transaction_read_only=on"]),
        (operator.stream_role, True, True, False, None),
    ]


def test_the_undo_leaves_everything_as_it_was(operator: Operator) -> None:
    """It may be run twice as well, and stands as comments at the end of the script."""
    before = operator.state()
    script, undo = operator.printed(), operator.printed("--undo")
    commented = script.partition("\n-- Undo\n")[2].splitlines()
    assert [line.removeprefix("-- ") for line in commented] == undo.splitlines()[1:]
    operator.psql(script)
    assert operator.state() != before
    for _ in range(2):
        operator.psql(undo)
        assert operator.state() == before


def test_what_is_there_is_neither_made_nor_undone(operator: Operator) -> None:
    """Another program may need it."""
    operator.execute(
        f"CREATE ROLE {operator.query_role} LOGIN",
        f"GRANT SELECT ON plain TO {operator.query_role}",
        "ALTER TABLE posts REPLICA IDENTITY FULL",
    )
    undo = operator.printed("--undo")
    assert f'DROP ROLE "{operator.query_role}"' not in undo
    assert '"plain"' not in undo
    assert '"posts" REPLICA IDENTITY' not in undo


def test_a_publication_of_other_tables_is_replaced(operator: Operator) -> None:
    """Which tables it had before isn't known to the undo, which says so."""
    operator.execute('CREATE PUBLICATION "Ours" FOR TABLE plain')
    script, undo = operator.printed(), operator.printed("--undo")
    operator.psql(script)
    assert operator.run("check").code == 0
    assert "-- not undone" in undo
    assert "DROP PUBLICATION" not in undo


def test_an_index_that_could_not_be_built_is_built_again(operator: Operator) -> None:
    """IF NOT EXISTS alone would leave what a failed attempt leaves: an index of no use."""
    operator.psql(operator.printed())
    operator.execute(
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid::regclass::text ~ 'pgrealtime_'"
    )
    again = operator.printed()
    assert "-- left by an attempt that failed" in again
    operator.psql(again)
    assert operator.run("check").err == ""


def test_a_restrictive_policy_needs_a_role_that_bypasses_them(operator: Operator) -> None:
    operator.execute("CREATE POLICY less ON secured AS RESTRICTIVE USING (id < 10)")
    before = operator.state()
    script, undo = operator.printed(), operator.printed("--undo")
    operator.psql(script)
    assert operator.run("check").err == ""
    operator.psql(undo)
    assert operator.state() == before


def test_a_configuration_that_does_not_fit_is_refused_with_its_lines(operator: Operator) -> None:
    operator.configure(nothing={"table": "nothing", "list_rule": ""})
    outcome = operator.run("sql", "--url", operator.url)
    assert (outcome.code, outcome.out) == (78, "")
    assert "pgrealtime.yaml:" in outcome.err
    assert "collections.nothing.table" in outcome.err
