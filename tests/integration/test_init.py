"""``pgrealtime init`` makes of any schema a locked configuration that ``check`` accepts."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgrealtime.cli.check.check import run_check
from pgrealtime.cli.init.init import write_config
from pgrealtime.config.load import read_config
from pgrealtime.config.model import CollectionConfig
from tests.integration.test_check import Operator

PASSWORD = "sesame-4711"  # the server requires none, and accepts any

SECRETS = {"APP_JWT_SECRET": "x" * 32, "LOGIN_SECRET": "y" * 32}

NASTY = """
CREATE TABLE users (
  id uuid PRIMARY KEY, email text UNIQUE, password_hash text, reset_token text, verified timestamptz
);
CREATE TABLE posts (
  id bigint PRIMARY KEY, author_id uuid REFERENCES users, approved_by uuid REFERENCES users,
  published bool, api_key text, token_count int
);
CREATE TABLE tags (id int PRIMARY KEY);
CREATE TABLE post_tags (
  post_id bigint REFERENCES posts, tag_id int REFERENCES tags, PRIMARY KEY (post_id, tag_id)
);
CREATE TABLE follows (
  follower uuid REFERENCES users, followee uuid REFERENCES users, since date,
  PRIMARY KEY (follower, followee)
);
CREATE TABLE "Order Items" (
  id int PRIMARY KEY, "a b" int, a_b text, expand text, "ünï" int, "日本" int, x_via_y int, "on" int
);
CREATE TABLE "on" (id int PRIMARY KEY);
CREATE TABLE "null" (id int PRIMARY KEY);
CREATE TABLE "2024" (id int PRIMARY KEY);
CREATE TABLE "0x10" (id int PRIMARY KEY);
CREATE TABLE "<<" (id int PRIMARY KEY);
CREATE TABLE "Users" (id int PRIMARY KEY);
CREATE TABLE "we""ird.${name}" ("i d" int PRIMARY KEY, "${c}_secret" text, id int);
CREATE TABLE "line
break" (id int PRIMARY KEY, "new
line" int);
CREATE TABLE keyless (a int);
CREATE TABLE keyless_unique (email text UNIQUE);
CREATE TABLE no_columns ();
CREATE TABLE nameless (id int PRIMARY KEY);
ALTER TABLE nameless REPLICA IDENTITY NOTHING;
CREATE UNLOGGED TABLE fast (id int PRIMARY KEY);
CREATE TABLE composite (tenant int, n int, PRIMARY KEY (tenant, n));
CREATE TABLE composite_id (tenant int, id int, PRIMARY KEY (tenant, id));
CREATE TABLE composite_unique (tenant int, n int, u uuid NOT NULL UNIQUE, PRIMARY KEY (tenant, n));
CREATE TABLE composite_full (tenant int, n int, u uuid NOT NULL UNIQUE, PRIMARY KEY (tenant, n));
ALTER TABLE composite_full REPLICA IDENTITY FULL;
CREATE TABLE keyless_logged (a int NOT NULL UNIQUE, b int NOT NULL UNIQUE);
ALTER TABLE keyless_logged REPLICA IDENTITY USING INDEX keyless_logged_b_key;
CREATE TABLE parts (id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10);
CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (10) TO (20);
CREATE TABLE days (day date PRIMARY KEY);
CREATE TABLE per_day (id int PRIMARY KEY, day date REFERENCES days);
CREATE TABLE two_ways (id int PRIMARY KEY, x int REFERENCES tags, FOREIGN KEY (x) REFERENCES "on");
CREATE VIEW seen AS SELECT 1 AS id;
CREATE MATERIALIZED VIEW stored AS SELECT 1 AS id, 'x' AS api_key, 2 AS user_id;
CREATE VIEW idless AS SELECT 1 AS n;
CREATE FOREIGN DATA WRAPPER nowhere;
CREATE SERVER away FOREIGN DATA WRAPPER nowhere;
CREATE FOREIGN TABLE remote (id text NOT NULL, "a b" int) SERVER away;
CREATE TABLE of_extension (id int PRIMARY KEY);
ALTER EXTENSION plpgsql ADD TABLE of_extension;
CREATE SCHEMA "My CRM";
CREATE TABLE "My CRM".users (id int PRIMARY KEY, email text, password text);
CREATE TABLE "My CRM".customers (id int PRIMARY KEY, owner int NOT NULL REFERENCES "My CRM".users);
INSERT INTO tags SELECT n FROM generate_series(1, 1234) n;
ANALYZE tags;
"""

_UNSERVED = {
    *("keyless", "keyless_unique", "no_columns", "nameless", "fast"),
}


def with_password(url: str) -> str:
    return url.replace("postgres@", f"postgres:{PASSWORD}@")


def operator_of(url: str, folder: Path, schema: str) -> Operator:
    with psycopg.connect(url) as connection:
        connection.execute(schema.encode())
    return Operator(folder / "pgrealtime.yaml", with_password(url))


@pytest.fixture
def operator(database_url: str, tmp_path: Path) -> Operator:
    return operator_of(database_url, tmp_path, NASTY)


BOTH = ("--schema", "public", "--schema", "My CRM")


def unlocked(text: str) -> str:
    """Return the file with every suggestion accepted."""
    return re.sub(r"^( *)#(?=[^ #\n])", r"\1", text, flags=re.MULTILINE)


def mending(text: str) -> list[str]:
    """Return the statements that the remarks contain."""
    return re.findall(r"^ *# +((?:ALTER|GRANT) .*;)$", text, re.MULTILINE)


def collections_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text)["collections"]
    return found


def initiated(operator: Operator, *options: str) -> str:
    outcome = operator.run("init", *options)
    assert (outcome.code, outcome.err) == (0, "")
    return operator.file.read_text(encoding="utf-8")


# -- any schema


def test_the_file_is_accepted_at_once_and_all_is_locked(operator: Operator) -> None:
    text = initiated(operator, *BOTH)
    outcome = operator.run("check")

    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("ok\n")
    made = [CollectionConfig(**one) for one in collections_of(text).values()]
    assert {(one.list_rule, one.view_rule, one.manage_rule) for one in made} == {(None, None, None)}


def test_it_holds_neither_the_url_nor_its_password(operator: Operator) -> None:
    text = initiated(operator, *BOTH)

    assert PASSWORD not in text
    assert operator.url.rpartition("/")[2] not in text
    assert yaml.safe_load(text)["database"] == {
        "url": "${DATABASE_URL}",
        "schemas": ["public", "My CRM"],
    }


def test_each_table_is_a_collection_or_is_said_to_be_none(operator: Operator) -> None:
    text = initiated(operator, *BOTH)
    left_out = text.partition("# Left out:")[2]

    assert set(collections_of(text)) == {
        *("users", "posts", "tags", "Order_Items", "on", "null", "2024", "0x10", "table"),
        *("public_Users", "we_ird_name", "line_break", "composite_full", "parts", "days"),
        *("composite", "composite_id", "composite_unique", "follows"),
        *("per_day", "two_ways", "My_CRM_users", "customers", "keyless_logged"),
        *("seen", "stored", "remote"),
    }
    assert set(collections_of(unlocked(text))) == {*collections_of(text), *_UNSERVED}
    assert re.findall(r"#   (\S+): (.*)", left_out) == [
        ("public.idless", "a view without a column id"),
        ("public.of_extension", "belongs to the extension plpgsql"),
        ("public.post_tags", "its pairs are shown as posts.tags"),
    ]


def test_what_names_and_keys_need_is_written(operator: Operator) -> None:
    made = collections_of(initiated(operator, *BOTH))

    assert made["Order_Items"]["fields"]["rename"] == {
        "a b": "a_b_2",
        "expand": "expand_2",
        "ünï": "uni",
        "日本": "column",
        "x_via_y": "x_by_y",
    }
    assert made["we_ird_name"] == {
        "table": 'public."we""ird.$${name}"',
        "fields": {"hide": ["c_secret"], "rename": {"${c}_secret": "c_secret", "id": "id_2"}},
    }
    assert made["composite_full"]["id"] == "u"
    assert made["keyless_logged"]["id"] == "b"
    assert made["composite_id"]["fields"] == {"rename": {"id": "id_2"}}
    assert made["users"]["relations"]["follows"]["through"] == "public.follows"
    assert made["per_day"]["fields"] == {"include": ["id"]}
    assert made["two_ways"]["relations"] == {"x": {"collection": "on"}}
    assert made["posts"]["relations"]["tags"] == {
        "collection": "tags",
        "through": "public.post_tags",
        "source": "post_id",
        "target": "tag_id",
    }


def test_user_tables_are_found_and_secrets_hidden(operator: Operator) -> None:
    made = collections_of(initiated(operator, *BOTH))

    assert {name for name, one in made.items() if one.get("type") == "auth"} == {
        "users",
        "My_CRM_users",
    }
    assert made["users"]["login"] == {"identity": ["email"], "password_hash": "password_hash"}
    assert made["users"]["fields"] == {
        "hide": ["reset_token"],
        "rename": {"verified": "verified_2"},
    }
    assert made["posts"]["fields"] == {"hide": ["api_key"]}


def test_what_sends_no_changes_can_be_read(operator: Operator) -> None:
    """It has no rules, not even suggested ones, and a key that nobody guarantees."""
    text = unlocked(initiated(operator, *BOTH))
    made = collections_of(text)

    assert {name: one for name, one in made.items() if one.get("stream") is False} == {
        "remote": {
            "table": "public.remote",
            "id": "id",
            "stream": False,
            "fields": {"rename": {"a b": "a_b"}},
        },
        "seen": {"table": "public.seen", "id": "id", "stream": False},
        "stored": {
            "table": "public.stored",
            "id": "id",
            "stream": False,
            "fields": {"hide": ["api_key"]},
        },
    }
    assert "# public.seen: a view, which sends no changes and can only be read.\n" in text


def test_every_table_is_described(operator: Operator) -> None:
    text = initiated(operator, *BOTH)

    assert "# public.tags: about 1,234 rows, primary key id." in text
    assert "# public.parts: not analyzed yet, primary key id, 2 partitions." in text
    assert re.search(r"# public\.composite_full: .*, REPLICA IDENTITY FULL\.", text)


def test_what_is_true_of_many_tables_is_said_once(operator: Operator) -> None:
    remarks = [line for line in initiated(operator, *BOTH).splitlines() if re.match(" *# ", line)]
    repeated = {line for line in remarks if remarks.count(line) > 1} - {"  # Not served:"}

    # Only reasons of tables that aren't served, which have the table's own SQL below them.
    assert [line for line in repeated if not line.startswith("  #   ")] == []
    assert sum("REPLICA IDENTITY FULL a delete" in line for line in remarks) == 1


def test_mended_and_unlocked_it_is_accepted_too(operator: Operator) -> None:
    """The SQL in the remarks removes their cause, and the suggested rules are valid."""
    text = initiated(operator, *BOTH)
    with psycopg.connect(operator.url, autocommit=True) as connection:
        for statement in mending(text):
            if "\\n" not in statement:  # a remark can't contain a line break
                connection.execute(statement.encode())
        connection.execute(LOG_WHOLE_ROWS.encode())
    outcome = operator.check(unlocked(text), **SECRETS)

    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"ok\n{27 + len(_UNSERVED)} collections, ")
    assert "\nread only: remote, seen, stored\n" in outcome.out
    # Which indexes are lacking depends on the tables; nothing else is left to say.
    assert [
        warning
        for warning in outcome.err.splitlines()
        if not re.search("each change reads the whole table|finds the rows of a list", warning)
    ] == []


LOG_WHOLE_ROWS = """
DO $$
DECLARE name text;
BEGIN
  FOR name IN
    SELECT format('%I.%I', nspname, relname) FROM pg_class c JOIN pg_namespace n
    ON n.oid = relnamespace WHERE nspname IN ('public', 'My CRM') AND relkind IN ('r', 'p')
  LOOP
    EXECUTE 'ALTER TABLE ' || name || ' REPLICA IDENTITY FULL';
  END LOOP;
END $$
"""
"""What ``pgrealtime sql`` prints for the tables whose rules need it."""

NAMES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
    st.sampled_from(
        ["id", "on", "1e3", "~", "?", "- a", "a: b", "#", "a_via_b", "expand", "*", "users", "é"]
    ),
).filter(
    lambda name: (
        len(name.encode()) < 60 and name not in {"ctid", "xmin", "xmax", "cmin", "cmax", "tableoid"}
    )
)
TYPES = st.sampled_from(["int", "text", "bool", "timestamptz", "jsonb", "uuid[]", "bytea"])
TABLE = st.tuples(
    NAMES, st.dictionaries(NAMES, TYPES, max_size=4), st.integers(0, 5), st.booleans()
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables=st.lists(TABLE, min_size=1, max_size=4, unique_by=lambda table: table[0]))
def test_any_names_will_do(
    database_url: str, tmp_path: Path, tables: list[tuple[str, dict[str, str], int, bool]]
) -> None:
    """Names of tables and columns are arbitrary.

    Keys are anywhere among them, foreign keys in any direction.
    """
    with psycopg.connect(database_url) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        last: tuple[str, str] | None = None
        for name, types, place, is_linked in tables:
            columns = list(types.items())
            key = next(n for n in ("id", "key", "k1", "k2", "k3", "k4") if n not in types)
            columns.insert(place, (key, "int PRIMARY KEY"))
            link = next(n for n in ("user", "l1", "l2", "l3", "l4") if n not in types)
            parts = [
                sql.SQL("{} {}").format(sql.Identifier(column), sql.SQL(spec))
                for column, spec in columns
            ]
            if is_linked and last is not None:
                to = [sql.Identifier(one) for one in (link, *last)]
                parts.append(sql.SQL("{} int REFERENCES {} ({})").format(*to))
            table = sql.Identifier(name)
            connection.execute(
                sql.SQL("CREATE TABLE {} ({})").format(table, sql.SQL(", ").join(parts))
            )
            last = (name, key)
    file = tmp_path / "fuzzed.yaml"
    file.unlink(missing_ok=True)
    environ = {"DATABASE_URL": database_url, **SECRETS}
    asyncio.run(write_config(str(file), database_url, ["public"]))
    locked = asyncio.run(run_check(read_config(file, environ), with_database=True))
    made = file.read_text(encoding="utf-8")
    file.write_text(unlocked(made), encoding="utf-8")
    opened = asyncio.run(run_check(read_config(file, environ), with_database=True))

    assert (locked.errors, locked.warnings, opened.errors) == ((), (), ()), made
    assert locked.summary_lines[0].startswith(f"{len(tables)} collection"), made


# -- what is suggested

SHARED = """
CREATE TABLE people (id int PRIMARY KEY, name text);
CREATE TABLE notes (id int PRIMARY KEY, owner int NOT NULL REFERENCES people);
CREATE TABLE posts (id int PRIMARY KEY, author int REFERENCES people, is_public bool NOT NULL);
CREATE TABLE comments (id int PRIMARY KEY, post int NOT NULL REFERENCES posts);
CREATE TABLE lines (id int PRIMARY KEY, note int NOT NULL REFERENCES notes);
CREATE TABLE marks (id int PRIMARY KEY, note int REFERENCES notes);
CREATE TABLE messages (
  id int PRIMARY KEY, sender int NOT NULL REFERENCES people,
  recipient int NOT NULL REFERENCES people, deleted_by int REFERENCES people
);
CREATE TABLE settings (person int PRIMARY KEY REFERENCES people);
CREATE TABLE projects (id int PRIMARY KEY);
CREATE TABLE project_members (
  project int REFERENCES projects, person int REFERENCES people, PRIMARY KEY (project, person)
);
CREATE TABLE tasks (id int PRIMARY KEY, project int NOT NULL REFERENCES projects);
CREATE TABLE rooms (id int PRIMARY KEY);
CREATE TABLE memberships (
  id int PRIMARY KEY, room int NOT NULL REFERENCES rooms, person int NOT NULL REFERENCES people
);
CREATE TABLE drafts (id int PRIMARY KEY, user_id int);
CREATE TABLE countries (id int PRIMARY KEY);
CREATE TABLE news (id int PRIMARY KEY, published bool);
"""

IN = '@request.auth.id != ""'
SUGGESTED = {
    "people": "id = @request.auth.id",
    "notes": "owner = @request.auth.id",
    "posts": f"is_public = true || ({IN} && author = @request.auth.id)",
    "comments": f"{IN} && post.author = @request.auth.id",
    "lines": "note.owner = @request.auth.id",
    "marks": f"{IN} && note.owner = @request.auth.id",
    "messages": "sender = @request.auth.id || recipient = @request.auth.id",
    "settings": "id = @request.auth.id",
    "projects": f"{IN} && members ?= @request.auth.id",
    "tasks": f"{IN} && project.members ?= @request.auth.id",
    "rooms": f"{IN} && memberships_via_room.person ?= @request.auth.id",
    "memberships": "person = @request.auth.id",
    "drafts": f"{IN} && user_id = @request.auth.id",
    "countries": IN,
    "news": "published = true",
}


def test_each_table_gets_a_rule_that_fits_what_it_has(database_url: str, tmp_path: Path) -> None:
    operator = operator_of(database_url, tmp_path, SHARED)
    text = initiated(operator)
    made = collections_of(unlocked(text))
    with psycopg.connect(operator.url, autocommit=True) as connection:
        for statement in mending(text):
            connection.execute(statement.encode())
        connection.execute(LOG_WHOLE_ROWS.encode())
    outcome = operator.check(unlocked(text), **SECRETS)

    assert {name: one["list_rule"] for name, one in made.items()} == SUGGESTED
    assert {name: one["view_rule"] for name, one in made.items()} == SUGGESTED
    assert made["drafts"]["relations"] == {"user_id": {"collection": "people"}}
    assert outcome.code == 0, outcome.err
    # Indexes would help; no guest may see what has no owner.
    assert outcome.err.count('each change reads the whole table "public.memberships"') == 2
    lists = re.findall('no index of "public.(.*?)" finds the rows of a list in order', outcome.err)
    assert lists == ["drafts", "memberships", "notes"]
    assert outcome.err.count("warning: ") == 2 + len(lists)


def test_users_of_two_tables_are_distinguished(operator: Operator) -> None:
    """Users of two tables may have the same ids."""
    made = collections_of(unlocked(initiated(operator, *BOTH)))

    assert made["customers"]["list_rule"] == (
        '@request.auth.collectionName = "My_CRM_users" && owner = @request.auth.id'
    )


def test_names_that_speak_of_secrets(database_url: str, tmp_path: Path) -> None:
    secret = ["api_key", "apiKey", "authtoken", "totp_secret", "pwd", "userPassword", "salt"]
    others = ["key", "secretary", "tokenized", "passport", "salted_by"]
    columns = ", ".join(f'"{name}" text' for name in [*others, *secret])
    about = "has_password bool, password_changed_at timestamptz, token_count int"
    schema = f"CREATE TABLE held (id int PRIMARY KEY, {columns}, {about})"
    made = collections_of(initiated(operator_of(database_url, tmp_path, schema)))
    assert made["held"]["fields"] == {"hide": secret}


def test_no_table_becomes_pocketbase_s_superusers(database_url: str, tmp_path: Path) -> None:
    """Also in a database into which a PocketBase was moved with all its tables."""
    schema = "CREATE TABLE _superusers (id text PRIMARY KEY, email text, password text)"
    made = collections_of(initiated(operator_of(database_url, tmp_path, schema)))
    assert list(made) == ["public__superusers"]


def test_without_a_password_the_table_s_name_identifies_users(
    database_url: str, tmp_path: Path
) -> None:
    schema = "CREATE TABLE customers (id int PRIMARY KEY); CREATE TABLE users (id int PRIMARY KEY)"
    text = initiated(operator_of(database_url, tmp_path, schema))
    assert list(collections_of(text)) == ["users", "customers"]
    assert collections_of(text)["users"] == {"table": "public.users", "type": "auth"}


def test_an_address_of_another_name_is_guarded_as_one(database_url: str, tmp_path: Path) -> None:
    """Other users' addresses are visible only if public.

    PocketBase decides that by the name ``email``.
    """
    columns = "id int PRIMARY KEY, email_address text UNIQUE, encrypted_password text"
    operator = operator_of(database_url, tmp_path, f"CREATE TABLE users ({columns})")
    made = collections_of(initiated(operator))["users"]
    assert made["fields"] == {"rename": {"email_address": "email"}}
    assert made["login"] == {"identity": ["email"], "password_hash": "encrypted_password"}


DJANGO = """
CREATE TABLE auth_user (
  id int PRIMARY KEY, username text NOT NULL UNIQUE, email text NOT NULL, password text NOT NULL,
  is_active boolean NOT NULL, is_staff boolean NOT NULL
);
CREATE TABLE django_session (session_key text PRIMARY KEY, session_data text NOT NULL);
CREATE TABLE authtoken_token (key text PRIMARY KEY, user_id int NOT NULL REFERENCES auth_user);
CREATE TABLE posts (slug text PRIMARY KEY);
CREATE TABLE visits (id int PRIMARY KEY, user_id int);
"""


def test_a_signed_in_user_does_not_see_sessions_of_others(
    database_url: str, tmp_path: Path
) -> None:
    """A session's primary key is its cookie's value, and an id can't be hidden."""
    text = unlocked(initiated(operator_of(database_url, tmp_path, DJANGO)))
    made = collections_of(text)
    assert made["django_session"] == {"table": "public.django_session"}
    assert "its ids are credentials" in text
    assert made["authtoken_token"]["list_rule"] == "user_id = @request.auth.id"
    assert made["posts"]["list_rule"] == '@request.auth.id != ""'


def test_where_addresses_may_be_shared_a_name_that_is_not_signs_in(
    database_url: str, tmp_path: Path
) -> None:
    """Only active users sign in, as in the application itself."""
    made = collections_of(initiated(operator_of(database_url, tmp_path, DJANGO)))
    assert made["auth_user"]["login"]["identity"] == ["username"]
    assert made["auth_user"]["auth_rule"] == "is_active = true"


def test_without_anything_unique_there_is_no_login_and_the_file_says_why(
    database_url: str, tmp_path: Path
) -> None:
    schema = "CREATE TABLE users (id int PRIMARY KEY, email text, password text, banned boolean)"
    text = initiated(operator_of(database_url, tmp_path, schema))
    assert collections_of(text)["users"] == {"table": "public.users", "type": "auth"}
    assert "no unique column identifies a user" in text


def test_each_suggestion_can_be_taken_without_the_others(database_url: str, tmp_path: Path) -> None:
    """No suggested line needs another one elsewhere in the file."""
    operator = operator_of(database_url, tmp_path, DJANGO)
    lines = initiated(operator).splitlines()
    places = [n for n, line in enumerate(lines) if re.match(r" +#\S", line)]
    taken = []
    for place in places:
        text = "\n".join(
            line.replace("#", "", 1) if n == place else line for n, line in enumerate(lines)
        )
        operator.file.write_text(text, encoding="utf-8")
        secrets = {"APP_JWT_SECRET": "s" * 40, "LOGIN_SECRET": "s" * 40, "DATABASE_URL": "x"}
        assert read_config(operator.file, secrets).problems == (), lines[place]
        assert yaml.safe_load(text) != yaml.safe_load("\n".join(lines)), lines[place]
        taken.append(lines[place].strip().partition(":")[0])
    assert set(taken) == {"#issuers", "#login", "#relations", "#list_rule", "#view_rule"}


def test_a_user_s_id_is_of_users_where_there_are_admins_too(
    database_url: str, tmp_path: Path
) -> None:
    people = "(id int PRIMARY KEY, email text, password_hash text)"
    schema = f"CREATE TABLE admins {people}; CREATE TABLE users {people};"
    schema += "CREATE TABLE notes (id int PRIMARY KEY, user_id int)"
    made = collections_of(unlocked(initiated(operator_of(database_url, tmp_path, schema))))
    assert list(made) == ["users", "admins", "notes"]
    assert made["notes"]["relations"] == {"user_id": {"collection": "users"}}


# -- what there may be besides


@pytest.fixture
def role(operator: Operator) -> Iterator[str]:
    name = f"role_{uuid4().hex[:12]}"
    with psycopg.connect(operator.url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN REPLICATION".encode())
        yield name
        connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}".encode())


def test_what_the_role_may_not_read_is_not_served(operator: Operator, role: str) -> None:
    with psycopg.connect(operator.url) as connection:
        connection.execute(f"GRANT SELECT ON users, posts, tags TO {role}".encode())
        connection.execute("ALTER TABLE tags ENABLE ROW LEVEL SECURITY")
    own = Operator(operator.file, make_conninfo(operator.url, user=role))
    text = initiated(own)

    assert own.run("check").code == 0
    assert set(collections_of(text)) == {"users", "posts"}
    assert f'GRANT SELECT ON "public"."post_tags" TO "{role}";' in mending(text)
    assert f'ALTER ROLE "{role}" BYPASSRLS;' in text


def test_the_login_that_rules_are_asked_with_is_the_one_that_has_to_read(
    operator: Operator, role: str
) -> None:
    """The stream's role reads no table, and needs no privilege for it."""
    own = Operator(operator.file, make_conninfo(operator.url, user=role))
    initiated_by_both = own.run("init", PGREALTIME_DATABASE__QUERY_URL=operator.url)
    assert initiated_by_both.code == 0
    text = operator.file.read_text(encoding="utf-8")

    assert 'url: "${DATABASE_URL}"' in text
    assert "may not read" not in text
    assert own.run("check", PGREALTIME_DATABASE__QUERY_URL=operator.url).code == 0


def test_a_partitioned_table_is_known_by_what_is_its_key_apart_from_partitions(
    database_url: str, tmp_path: Path
) -> None:
    """PostgreSQL permits no unique constraint on it without the partition key."""
    schema = "CREATE TABLE events (id int, at date, PRIMARY KEY (id, at)) PARTITION BY RANGE (at)"
    operator = operator_of(database_url, tmp_path, schema)
    text = initiated(operator)

    assert operator.run("check").code == 0
    assert collections_of(text) == {"events": {"table": "public.events", "id": "id"}}


@pytest.mark.parametrize("schema", ["", "CREATE TABLE keyless (a int)"])
def test_a_schema_without_anything_to_serve(database_url: str, tmp_path: Path, schema: str) -> None:
    operator = operator_of(database_url, tmp_path, schema or "SELECT 1")
    text = initiated(operator)

    assert operator.run("check").code == 0
    for statement in mending(text):
        with psycopg.connect(operator.url) as connection:
            connection.execute(statement.encode())
    assert operator.check(unlocked(text), **SECRETS).code == 0


def test_with_libpq_s_variables_the_file_leaves_the_url_to_them(operator: Operator) -> None:
    parts = conninfo_to_dict(operator.url)
    environ = {
        "DATABASE_URL": "",
        "PGHOST": str(parts["host"]),
        "PGPORT": str(parts["port"]),
        "PGUSER": str(parts["user"]),
        "PGDATABASE": str(parts["dbname"]),
    }
    made = operator.run("init", **environ)

    assert made.code == 0, made.err
    assert operator.run("check", **environ).code == 0
    assert "DATABASE_URL" not in made.out


# -- the command


def test_it_says_what_to_do_next(operator: Operator) -> None:
    assert operator.run("init", "-c", "my file.yaml").out.splitlines() == [
        "1. Unlock rules in my file.yaml: read a suggestion, change it, remove its #.",
        "2. pgrealtime check -c 'my file.yaml'",
        "   pgrealtime sql prints what the database lacks.",
        "3. pgrealtime run -c 'my file.yaml'",
    ]


def test_a_url_of_the_command_line_is_to_be_put_where_the_file_looks(operator: Operator) -> None:
    outcome = operator.run("init", "--url", operator.url, DATABASE_URL="")
    assert outcome.code == 0, outcome.err
    assert "Set DATABASE_URL to the URL" in outcome.out
    assert operator.run("check").code == 0


EDITED = """\
# ours
version: 1
database: {url: "${DATABASE_URL}"}
collections:
    people:   # renamed
        table: public.users
        type: auth
        list_rule: >-
          id =
          @request.auth.id
        # a remark of ours

    tags: {table: tags}

    # posts:
    #     table: posts

# what follows
admin: {port: 0}
"""


async def test_a_second_run_adds_tables_and_keeps_what_was_edited(
    database_url: str, tmp_path: Path
) -> None:
    """What is commented out stays so. New collections have the names and the indentation there."""
    operator = operator_of(
        database_url,
        tmp_path,
        """
        CREATE TABLE users (id int PRIMARY KEY, email text);
        CREATE TABLE posts (id int PRIMARY KEY, author int REFERENCES users);
        CREATE TABLE people (id int PRIMARY KEY, account int NOT NULL REFERENCES users);
        CREATE TABLE keyless (a int);
        CREATE TABLE tags (id int PRIMARY KEY);
        CREATE TABLE user_tags (
          "user" int REFERENCES users, tag int REFERENCES tags, PRIMARY KEY ("user", tag)
        );
        """,
    )
    operator.file.write_text(EDITED, encoding="utf-8")
    added = await write_config(str(operator.file), operator.url, ())
    text = operator.file.read_text(encoding="utf-8")
    again = await write_config(str(operator.file), operator.url, ())
    parsed = read_config(operator.file, {"DATABASE_URL": operator.url})

    assert added is not None
    assert list(added.names) == ["keyless", "public_people"]
    assert "no primary key" in added.names["keyless"]
    ((collection, relation),) = added.relations
    assert (collection, "through: public.user_tags" in relation) == ("tags", True)
    before, after = EDITED.split("\n\n# what follows")
    assert text.startswith(f"{before}\n\n    # public.keyless: ")
    assert text.endswith(f"\n\n# what follows{after}")
    assert set(collections_of(text)) == {"people", "public_people", "tags"}
    assert "#list_rule: account = @request.auth.id" in text
    assert (await run_check(parsed, with_database=True)).errors == ()
    assert again is not None
    assert not again.names
    assert operator.file.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("version: 1\n", "version: 1\n\ncollections:\n  # public.tags: "),
        ("collections: {}\nversion: 1\n", "collections:\n  # public.tags: "),
        ("#collections:\n  # mine\n", "collections:\n  # mine\n\n  # public.tags: "),
        ("collections:\nversion: 1\n", "collections:\n  # public.tags: "),
    ],
)
async def test_a_file_without_collections_gets_them(
    database_url: str, tmp_path: Path, before: str, after: str
) -> None:
    operator = operator_of(database_url, tmp_path, "CREATE TABLE tags (id int PRIMARY KEY)")
    operator.file.write_text(before, encoding="utf-8")
    await write_config(str(operator.file), operator.url, ())

    text = operator.file.read_text(encoding="utf-8")
    assert text.startswith(after)
    assert set(collections_of(text)) == {"tags"}


@pytest.mark.parametrize(
    "text", ["mine", "a: [", "collections: {a: {table: a}}\n", "collections: [a]\n"]
)
def test_what_can_not_be_extended_stays_as_it_is(operator: Operator, text: str) -> None:
    operator.file.write_text(text, encoding="utf-8")
    outcome = operator.run("init")

    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("file_not_extended: tables can't be added to ")
    assert operator.file.read_text(encoding="utf-8") == text


def test_a_dash_prints_what_would_be_written(operator: Operator) -> None:
    printed = operator.run("init", "-c", "-")

    assert printed.code == 0
    assert printed.out == initiated(operator)
    assert "pgrealtime check -c FILE" in printed.err


def test_a_folder_that_is_not_there(operator: Operator) -> None:
    outcome = operator.run("init", "-c", "nowhere/pgrealtime.yaml")
    assert outcome.code == 2
    assert outcome.err.startswith('file_not_written: "nowhere/pgrealtime.yaml" can\'t be written\n')


def test_a_schema_that_is_not_there(operator: Operator) -> None:
    outcome = operator.run("init", "--schema", "My CMR")
    assert outcome.code == 2
    assert outcome.err == (
        'schema_missing: there is no schema "My CMR"\nHINT: Perhaps you meant "My CRM".\n'
    )
    assert not operator.file.exists()


def test_a_database_out_of_reach(operator: Operator) -> None:
    url = f"postgresql://postgres:{PASSWORD}@127.0.0.1:1/none"
    outcome = operator.run("init", DATABASE_URL=url)
    assert outcome.code == 69
    assert outcome.err.startswith("database_unreachable: ")
    assert PASSWORD not in outcome.err


_CHOICE = """
    CREATE TABLE posts (id int PRIMARY KEY); CREATE TABLE auth_group (id int PRIMARY KEY);
    CREATE TABLE auth_user (id int PRIMARY KEY, email text);
    CREATE SCHEMA app; CREATE TABLE app.posts (id int PRIMARY KEY);
    CREATE TABLE app.events (id int PRIMARY KEY) PARTITION BY RANGE (id);
    CREATE TABLE app.events_1 PARTITION OF app.events FOR VALUES FROM (0) TO (10);
"""


@pytest.mark.parametrize(
    ("options", "tables"),
    [
        ("", "public.posts public.auth_group public.auth_user app.posts app.events"),
        ("--table posts", "public.posts app.posts"),
        ("--table app.posts --table auth_u*", "app.posts public.auth_user"),
        ("--exclude auth_* --exclude app.*", "public.posts"),
        ("--table app.* --exclude posts", "app.events"),
        ("--exclude events", "public.posts public.auth_group public.auth_user app.posts"),
    ],
)
def test_tables_are_chosen_by_name(
    database_url: str, tmp_path: Path, options: str, tables: str
) -> None:
    """A partitioned table comes or goes with its partitions."""
    operator = Operator(tmp_path / "pgrealtime.yaml", database_url)
    with psycopg.connect(database_url) as connection:
        connection.execute(_CHOICE)
    schemas = ("--schema", "public", "--schema", "app")
    outcome = operator.run("init", "-c", "-", *schemas, *options.split())
    assert outcome.code == 0, outcome.err
    written = yaml.safe_load(outcome.out)["collections"]
    assert {one["table"] for one in written.values()} == set(tables.split())
    if "events" not in tables:
        assert "events" not in outcome.out


def test_a_pattern_that_no_table_matches_is_refused(database_url: str, tmp_path: Path) -> None:
    """It is a misspelling; a file without that table would hide it."""
    operator = Operator(tmp_path / "pgrealtime.yaml", database_url)
    with psycopg.connect(database_url) as connection:
        connection.execute("CREATE TABLE posts (id int PRIMARY KEY)")
    for option in ("--table", "--exclude"):
        outcome = operator.run("init", "-c", str(operator.file), option, "post")
        assert outcome.code == 2
        assert outcome.err == (
            'table_missing: no table matches "post"\nHINT: Perhaps you meant "posts".\n'
        )
    assert not operator.file.exists()
