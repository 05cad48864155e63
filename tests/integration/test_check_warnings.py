"""``pgrealtime check`` warns of what works but is hardly intended, and names a remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from tests.integration.test_check import Operator
from tests.program import Outcome

_SCHEMA = """
    CREATE TABLE users (id uuid PRIMARY KEY, team int, email text);
    CREATE TABLE posts (
      id bigint PRIMARY KEY, title text NOT NULL, open bool NOT NULL, author uuid REFERENCES users,
      owner uuid NOT NULL REFERENCES users, team int, reviewers uuid[], meta jsonb
    );
    CREATE INDEX ON posts (author, id); CREATE INDEX ON posts (owner, id);
    CREATE TABLE members (
      id bigint PRIMARY KEY, post bigint NOT NULL REFERENCES posts,
      person uuid NOT NULL REFERENCES users, role text, helpers uuid[]
    );
    CREATE TABLE likes (
      post_id bigint REFERENCES posts, user_id uuid REFERENCES users, PRIMARY KEY (post_id, user_id)
    );
    CREATE TABLE parts (id int PRIMARY KEY, t text) PARTITION BY LIST (id);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);
    CREATE TABLE parts_2 PARTITION OF parts FOR VALUES IN (2);
"""
_FULL = "".join(f"ALTER TABLE {t} REPLICA IDENTITY FULL;" for t in ("users", "posts", "members"))

_WARNING = re.compile(r"warning: .*?/pgrealtime\.yaml(?::\d+)?: ([\w.]+): (.*?) \((.*)\)")


@pytest.fixture
def operator(database_url: str, tmp_path: Path) -> Operator:
    with psycopg.connect(database_url) as connection:
        connection.execute(_SCHEMA.encode())
        connection.execute(_FULL.encode())
    return Operator(tmp_path / "pgrealtime.yaml", database_url)


def collections(rule: str = "", **of_posts: Any) -> dict[str, Any]:
    return {
        "users": {"table": "users", "type": "auth"},
        "posts": {
            "table": "posts",
            "list_rule": rule,
            "relations": {
                "reviewers": {"collection": "users"},
                "fans": {"collection": "users", "through": "likes"},
            },
            **of_posts,
        },
        "members": {"table": "members", "relations": {"helpers": {"collection": "users"}}},
    }


def check(operator: Operator, configured: dict[str, Any], **sections: Any) -> Outcome:
    return operator.check(yaml.safe_dump({"collections": configured, **sections}, width=10_000))


def warnings(outcome: Outcome) -> list[tuple[str, str, str]]:
    """Return path, message and remedy of each warning; the check passes in any case."""
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("ok\n")
    found = [match.groups() for match in map(_WARNING.fullmatch, outcome.err.splitlines()) if match]
    assert len(found) == len(outcome.err.splitlines()), outcome.err
    return [(path, message, mend) for path, message, mend in found]


def test_a_file_that_serves_nothing_is_a_warning(operator: Operator) -> None:
    """An empty file, or one in which init could put no table, is no error."""
    assert warnings(operator.check("")) == [
        (
            "collections",
            "there are none: no subscriber receives anything",
            "pgrealtime init writes them from the existing tables",
        )
    ]


def mended_rule(operator: Operator, rule: str) -> str:
    """Return the rule that the only warning about its text suggests.

    That rule causes no warning.
    """
    found = warnings(check(operator, collections(rule)))
    assert {path for path, _, _ in found} == {"collections.posts.list_rule"}
    (mended,) = [mend.removeprefix("write: ") for _, _, mend in found if mend.startswith("write: ")]
    assert warnings(check(operator, collections(mended))) == []
    return mended


def run(operator: Operator, statement: str) -> None:
    with psycopg.connect(operator.url, autocommit=True) as connection:
        connection.execute(statement.encode())


# -- guests


MINE = "@request.auth.id"
SOMEBODY = '@request.auth.id != ""'


@pytest.mark.parametrize(
    ("rule", "mended"),
    [
        (f"author = {MINE}", f"({SOMEBODY} && author = {MINE})"),
        (f"{MINE} = author", f"({SOMEBODY} && {MINE} = author)"),
        (f"author != {MINE}", f"({SOMEBODY} && author != {MINE})"),
        (f"open = true && author = {MINE}", f"open = true && ({SOMEBODY} && author = {MINE})"),
        (f"open = true || author = {MINE}", f"open = true || ({SOMEBODY} && author = {MINE})"),
        (f"reviewers.id ?= {MINE}", f"({SOMEBODY} && reviewers.id ?= {MINE})"),
        ("team = @request.auth.team", f"({SOMEBODY} && team = @request.auth.team)"),
        (f"author.team = {MINE}", f"({SOMEBODY} && author.team = {MINE})"),
        (
            "author = @request.query.who",
            '(@request.query.who != "" && author = @request.query.who)',
        ),
        (
            f"author = {MINE} || team = @request.auth.team",
            f"({SOMEBODY} && author = {MINE}) || ({SOMEBODY} && team = @request.auth.team)",
        ),
    ],
)
def test_a_rule_that_guests_match_for_want_of_an_owner(
    operator: Operator, rule: str, mended: str
) -> None:
    """Rules, section 10.3: the guest's id is empty, and so is the owner of what has none."""
    assert mended_rule(operator, rule) == mended


@pytest.mark.parametrize(
    "rule",
    [
        f"{SOMEBODY} && author = {MINE}",
        f"{MINE} != null && author = {MINE}",
        f'author != "" && author = {MINE}',
        f"({SOMEBODY} && (author = {MINE} || team = @request.auth.team)) || open = true",
        f"owner = {MINE}",
        f"owner.id = {MINE}",
        "@request.query.who:isset = true && author = @request.query.who",
        'author = "x"',
        '@request.auth.team = "3"',
        "title ~ @request.auth.email",
    ],
)
def test_a_rule_that_no_guest_matches_so_causes_no_warning(operator: Operator, rule: str) -> None:
    assert warnings(check(operator, collections(rule))) == []


# -- @collection


def test_a_collection_without_a_question_mark(operator: Operator) -> None:
    rule = f'{SOMEBODY} && @collection.members.role = "a" && @collection.members.person = {MINE}'
    run(operator, "CREATE INDEX ON members (person); CREATE INDEX ON members (role)")

    mended = mended_rule(operator, rule)

    assert mended == rule.replace('role = "a"', 'role ?= "a"').replace("person =", "person ?=")


def test_that_no_row_of_a_collection_is_equal_may_be_meant(operator: Operator) -> None:
    run(operator, "CREATE INDEX ON members (person)")
    rule = f"{SOMEBODY} && @collection.members.person != {MINE}"
    found = warnings(check(operator, collections(rule)))
    assert not any("every row" in message for _, message, _ in found)


def test_a_question_mark_is_asked_for_without_a_database_too(operator: Operator) -> None:
    text = yaml.safe_dump({"collections": collections('@collection.members.role = "a"')})
    outcome = operator.check(text, "--no-database")
    assert outcome.code == 0
    assert 'write: @collection.members.role ?= "a"' in outcome.err


# -- indexes


@pytest.mark.parametrize(
    ("rule", "table", "index"),
    [
        (
            f"{SOMEBODY} && members_via_post.person ?= {MINE}",
            "members",
            'CREATE INDEX ON "public"."members" ("post");',
        ),
        (
            f"{SOMEBODY} && author.members_via_helpers.role ?= 'x'",
            "members",
            'CREATE INDEX ON "public"."members" USING gin ("helpers");',
        ),
        (
            f"{SOMEBODY} && author.posts_via_fans.open ?= true",
            "likes",
            'CREATE INDEX ON "public"."likes" ("user_id");',
        ),
        (
            f"{SOMEBODY} && @collection.members.person ?= {MINE}",
            "members",
            'CREATE INDEX ON "public"."members" ("person");',
        ),
    ],
)
def test_a_rule_that_reads_a_whole_table_for_every_change(
    operator: Operator, rule: str, table: str, index: str
) -> None:
    """Creating the index that it names ends the warning."""
    ((path, message, mend),) = warnings(check(operator, collections(rule)))
    assert path == "collections.posts.list_rule"
    assert message == f'each change reads the whole table "public.{table}"'
    assert mend == index
    run(operator, mend)
    assert warnings(check(operator, collections(rule))) == []


def test_a_relation_whose_pairs_are_all_read_for_every_change(operator: Operator) -> None:
    """Records show a relation's ids, so this holds whatever the rules read."""
    run(operator, "ALTER TABLE likes DROP CONSTRAINT likes_pkey")
    run(operator, "ALTER TABLE likes ADD PRIMARY KEY (user_id, post_id)")
    rule = f"{SOMEBODY} && fans.id ?= {MINE}"
    ((path, message, mend),) = warnings(check(operator, collections(rule)))
    assert path == "collections.posts.relations.fans"
    assert message == 'each change reads the whole table "public.likes"'
    run(operator, mend)
    assert warnings(check(operator, collections(rule))) == []


@pytest.mark.parametrize(
    "rule",
    ["@collection.members.post ?= id", f"(open = true || @collection.members.person ?= {MINE})"],
    ids=["rows among themselves", "within an or"],
)
def test_an_index_that_does_not_serve_a_rule_ends_no_warning(operator: Operator, rule: str) -> None:
    """Also if PostgreSQL scans the whole table through that index or a bitmap of it."""
    run(operator, "CREATE INDEX ON members (post); CREATE INDEX ON members (person)")
    ((_, message, mend),) = warnings(check(operator, collections(f"{SOMEBODY} && {rule}")))
    assert message == 'each change reads the whole table "public.members"'
    assert mend == "no index can serve this rule: use a relation instead of @collection"


def test_rows_that_are_found_by_their_keys_cause_no_warning(operator: Operator) -> None:
    rule = f"{SOMEBODY} && author.team = 3 && reviewers.team ?= 4 && @request.auth.team = 5"
    assert warnings(check(operator, collections(rule))) == []


# -- deletes


def test_a_rule_that_reads_what_a_deleted_row_lacks(operator: Operator) -> None:
    run(operator, "ALTER TABLE posts REPLICA IDENTITY DEFAULT")
    configured = collections("open = true && title != 'x' && id != '7'")
    ((path, message, mend),) = warnings(check(operator, configured))
    assert path == "collections.posts.list_rule"
    assert message == (
        'no subscriber receives deletes: the old row of "public.posts" lacks "title", "open";'
        ' an update that leaves a long "title" unchanged may be reported as a gap if other changes'
        " follow at once"
    )
    run(operator, mend)
    assert warnings(check(operator, configured)) == []


def test_a_junction_table_that_does_not_say_whose_link_goes(operator: Operator) -> None:
    """A key of its own is all that a deleted row of it logs."""
    configured = collections()
    relations = configured["posts"]["relations"]
    relations["people"] = {"collection": "users", "through": "members"}
    with psycopg.connect(operator.url) as connection:
        connection.execute("CREATE INDEX ON members (post)")
    assert warnings(check(operator, configured)) == []
    with psycopg.connect(operator.url) as connection:
        connection.execute("ALTER TABLE members REPLICA IDENTITY DEFAULT")
    full = 'ALTER TABLE "public"."members" REPLICA IDENTITY FULL;'
    message = 'no subscriber hears of ids that go: the old row of "public.members" lacks "post"'
    path = "collections.posts.relations.people"
    (warning,) = warnings(check(operator, configured))
    assert warning == (path, message, f"{full} or updates: false")
    relations["people"]["updates"] = False
    assert warnings(check(operator, configured)) == []


def test_an_auth_rule_about_the_login(operator: Operator) -> None:
    """Whom it refuses later keeps the token."""
    configured = collections()
    configured["users"]["auth_rule"] = "@request.context = 'password' && team > 1"
    ((path, message, _),) = warnings(check(operator, configured))
    assert path == "collections.users.auth_rule"
    assert message == "a rule that reads @request is about logins: it makes no token invalid"
    configured["users"]["auth_rule"] = "team > 1"
    assert warnings(check(operator, configured)) == []


def test_what_can_only_be_read_has_no_deletes_and_is_listed(operator: Operator) -> None:
    """Nor does a change of it read another table."""
    run(operator, "CREATE VIEW seen AS SELECT id::text, title, author FROM posts")
    rule = f"{SOMEBODY} && author.posts_via_fans.open ?= true && title != ''"
    seen = {"table": "seen", "id": "id", "stream": False, "list_rule": rule}
    seen["relations"] = {"author": {"collection": "users"}}
    outcome = check(operator, collections() | {"seen": seen})

    assert warnings(outcome) == []
    assert outcome.out.splitlines()[2] == "read only: seen"
    assert "read only" not in check(operator, collections()).out


def test_partitions_have_replica_identities_of_their_own(operator: Operator) -> None:
    """Replica identity is set per partition: ALTER TABLE on the root doesn't change it."""
    parts = {"parts": {"table": "parts", "list_rule": "t = 'x'"}}
    ((_, _, mend),) = warnings(check(operator, parts))
    run(operator, mend)
    assert warnings(check(operator, parts)) == []


@pytest.mark.parametrize("rule", ["id = '7'", "", None])
def test_a_rule_on_the_key_needs_no_more_of_a_deleted_row(
    operator: Operator, rule: str | None
) -> None:
    run(operator, "ALTER TABLE posts REPLICA IDENTITY DEFAULT")
    assert warnings(check(operator, collections(rule or "", list_rule=rule))) == []


# -- numbers


@pytest.mark.parametrize(
    ("rule", "column"),
    [
        (f"{SOMEBODY} && score = {MINE}", "score"),
        ("score > budget", "score"),
        ("budget != score", "score"),
        (f"{SOMEBODY} && scores:each ?= {MINE}", "scores"),
        ("members_via_post.weight ?< id && members_via_post.weight ?< budget", "weight"),
        ("score > 4.5 && score = weight && budget = size", None),
        (f"{SOMEBODY} && size = {MINE} && budget > 7 && score > @request.query.low", None),
    ],
)
def test_a_comparison_of_doubles_with_wider_numbers(
    operator: Operator, rule: str, column: str | None
) -> None:
    """Integers and numerics compare exactly with each other.

    A double can't represent all of them.
    """
    run(
        operator,
        """
        ALTER TABLE posts ADD score float8, ADD weight real, ADD size int8, ADD budget numeric,
          ADD scores float4[];
        ALTER TABLE members ADD weight float8;
        CREATE INDEX ON members (post);
        """,
    )
    found = warnings(check(operator, collections(rule)))
    table = "members" if "members" in rule else "posts"
    type_ = "numeric[]" if column == "scores" else "numeric"
    assert found == (
        []
        if column is None
        else [
            (
                "collections.posts.list_rule",
                f'"{column}" is a float: different numbers beyond 2^53 may equal it',
                f'ALTER TABLE "public"."{table}" ALTER COLUMN "{column}" TYPE {type_};',
            )
        ]
    )


def test_a_number_with_more_digits_than_its_literal_keeps(operator: Operator) -> None:
    """Integer columns keep all digits, and texts do."""
    run(operator, "ALTER TABLE posts ADD budget numeric")
    rule = "budget = 0.12345678901234567890 || budget = 9007199254740993 || budget = '0.1234567890'"
    assert warnings(check(operator, collections(rule))) == [
        (
            "collections.posts.list_rule",
            "0.12345678901234567890 has more digits than double precision can hold",
            'write it as text: "0.12345678901234567890"',
        )
    ]


# -- issuers


ROWLESS = (
    'there is no collection "{}": callers are identified by their tokens alone, also after their'
    " records are changed or deleted"
)


def test_an_issuer_of_users_without_a_collection(operator: Operator) -> None:
    def with_issuer(collection: str, **more: Any) -> list[tuple[str, str, str]]:
        issuer = {"name": "app", "secret": "x" * 32, "collection": collection}
        return warnings(check(operator, {**collections(), **more}, auth={"issuers": [issuer]}))

    assert with_issuer("users") == []
    assert with_issuer("user") == [
        ("auth.issuers.0.collection", ROWLESS.format("user"), 'perhaps you meant "users"')
    ]
    ((_, _, mend),) = with_issuer("people")
    assert mend.endswith("collections: {people: {table: SCHEMA.TABLE, type: auth}}")
    ((_, _, mend),) = with_issuer("members")
    assert mend == "set type: auth of collections.members"


def test_warnings_give_way_to_errors(operator: Operator) -> None:
    """Errors must not have to be searched for among warnings."""
    outcome = check(operator, collections(f"author = {MINE}", view_rule="titel = 1"))
    assert outcome.code == 78
    assert "warning:" not in outcome.err


# -- keys and time-outs


def test_keys_that_are_short_or_come_over_http_are_a_warning(operator: Operator) -> None:
    jwks = (
        *("http://keys.example/jwks", "https://keys.example/jwks"),
        *("http://127.0.0.1:1/jwks", "http://localhost:1/jwks", "http://[::1]:1/jwks"),
        "http://[keys/jwks",
    )
    issuers = [
        {"name": "short", "secret": "s" * 31, "previous_secret": "p" * 8},
        {"name": "long", "secret": "s" * 32},
        *({"name": f"jwks{n}", "jwks_url": url} for n, url in enumerate(jwks)),
    ]
    auth = {"issuers": issuers, "login": {"enabled": True, "secret": "s"}}
    found = warnings(check(operator, collections(), auth=auth))
    assert {path: message.partition(":")[0] for path, message, _ in found} == {
        "auth.issuers.0.secret": "it is shorter than 32 bytes",
        "auth.issuers.0.previous_secret": "it is shorter than 32 bytes",
        "auth.login.secret": "it is shorter than 32 bytes",
        "auth.issuers.2.jwks_url": "keys fetched over plain http can be replaced in transit",
        "auth.issuers.7.jwks_url": "keys fetched over plain http can be replaced in transit",
    }
    assert {path: hint.rpartition("; ")[2] for path, _, hint in found} == {
        "auth.issuers.0.secret": "previous_secret keeps old tokens valid",
        "auth.issuers.0.previous_secret": "remove it once the old tokens have expired",
        "auth.login.secret": "all tokens become invalid",
        "auth.issuers.2.jwks_url": "https",
        "auth.issuers.7.jwks_url": "https",
    }


def test_a_time_out_of_the_role_or_the_database_is_a_warning(operator: Operator) -> None:
    """Transactions set their own time-out, but begin under that one."""
    name = operator.url.rpartition("/")[2]
    with psycopg.connect(operator.url, autocommit=True) as connection:
        connection.execute(f'ALTER DATABASE "{name}" SET statement_timeout = 1500'.encode())
        connection.execute(
            f'ALTER DATABASE "{name}" SET idle_in_transaction_session_timeout = 60000'.encode()
        )
    ((path, message, mend),) = warnings(check(operator, collections()))
    assert path == "database.statement_timeout"
    assert "statement_timeout = 1500 ms" in message
    assert "RESET statement_timeout" in mend


def test_processes_that_share_a_durable_slot_are_a_warning(operator: Operator) -> None:
    cluster = {"bus": "postgres", "secret": "x" * 32}
    slot = {"durable": True, "allow_unlimited_wal": True}
    outcome = check(operator, collections(), cluster=cluster, replication={"slot": slot})
    [(path, message, mend)] = warnings(outcome)
    assert path == "replication.slot.durable"
    assert message.startswith("every process of the cluster needs a durable slot of its own: ")
    assert mend == "set PGREALTIME_REPLICATION__SLOT__NAME for each, or durable: false"
