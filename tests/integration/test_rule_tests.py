"""``pgrealtime check`` decides the rule tests of the configuration, as the service would."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from pgrealtime.cli.check.check import CheckResult, run_check
from pgrealtime.config.load import read_config
from tests.program import run_program

_SCHEMA = """
CREATE TYPE state AS ENUM ('draft', 'shown');
CREATE TABLE users (id text PRIMARY KEY, name text, role text);
CREATE TABLE projects (id bigint PRIMARY KEY, title text);
CREATE TABLE members (
  id bigint PRIMARY KEY, project bigint REFERENCES projects, "user" text REFERENCES users
);
CREATE TABLE tasks (
  id bigint PRIMARY KEY, project bigint REFERENCES projects, done bool NOT NULL DEFAULT false,
  state state, tags text[], due date, author text REFERENCES users
);
INSERT INTO users VALUES ('ann', 'Ann', 'editor'), ('bob', 'Bob', 'reader');
INSERT INTO projects VALUES (1, 'Garden'), (2, 'House');
INSERT INTO members VALUES (1, 1, 'ann');
INSERT INTO tasks VALUES (7, 1, false, 'shown', '{a}', '2026-01-31', 'bob');
"""

_CONFIG = """\
database: {{url: "${{DATABASE_URL}}", pool_size: 1}}
auth:
  issuers:
    - {{name: app, secret: a secret of more than thirty-two characters, claims: {{tenant: org}}}}
    - {{name: other, secret: another one of more than thirty-two characters, collection: robots}}
collections:
  users: {{table: users, type: auth, fields: {{rename: {{name: title}}}}}}
  projects: {{table: projects}}
  members: {{table: members}}
  tasks:
    table: tasks
    list_rule: {rule}
    view_rule: {rule}
tests:
{tests}
"""

_MEMBERS = "'@request.auth.id != \"\" && project.members_via_project.user ?= @request.auth.id'"


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator with a configuration of one rule and its tests."""

    file: Path
    url: str

    def write(self, rule: str, *tests: str) -> None:
        lines = "\n".join(f"  - {test}" for test in tests)
        self.file.write_text(_CONFIG.format(rule=rule, tests=lines), encoding="utf-8")

    async def check(self, rule: str, *tests: str) -> CheckResult:
        self.write(rule, *tests)
        parsed = read_config(self.file, {"DATABASE_URL": self.url})
        return await run_check(parsed, with_database=True)


@pytest.fixture
def operator(database_url: str, tmp_path: Path) -> Operator:
    with psycopg.connect(database_url) as connection:
        connection.execute(_SCHEMA.encode())
    return Operator(tmp_path / "pgrealtime.yaml", database_url)


async def test_records_that_need_not_exist_are_decided_with_related_rows_that_do(
    operator: Operator,
) -> None:
    result = await operator.check(
        _MEMBERS,
        "{collection: tasks, record: {project: 1}, allow: [users/ann, superuser],"
        " deny: [guest, users/bob]}",
        "{collection: tasks, record: {project: 2}, deny: [users/ann], rule: list_rule}",
        "{collection: tasks, id: 7, allow: [users/ann], deny: [users/bob]}",
    )

    assert (result.errors, result.summary_lines[-1]) == ((), "13 rule tests")
    with psycopg.connect(operator.url) as connection:
        assert connection.execute("SELECT count(*) FROM tasks").fetchone() == (1,)


async def test_values_have_the_forms_of_json_and_dates_those_of_yaml(operator: Operator) -> None:
    result = await operator.check(
        '\'state = "shown" && tags ~ "b" && due = "2026-01-31 00:00:00.000Z" && done = true\'',
        "{collection: tasks, allow: [guest],"
        " record: {state: shown, tags: [a, b], due: 2026-01-31, done: true}}",
    )

    assert (*map(str, result.errors), result.summary_lines[-1]) == ("2 rule tests",)


async def test_claims_are_those_of_a_token(operator: Operator) -> None:
    """A user without a row is known by its token alone."""
    result = await operator.check(
        "'@request.auth.tenant = 7 || @request.auth.collectionName = \"robots\"'",
        "{collection: tasks, id: 7, allow: [{user: users/bob, claims: {tenant: 7}}, robots/r2],"
        " deny: [users/bob, {user: users/bob, claims: {tenant: 8}}, guest]}",
    )

    assert (result.errors, result.summary_lines[-1]) == ((), "10 rule tests")


def test_a_test_that_fails_says_which_part_of_the_rule_decided(operator: Operator) -> None:
    operator.write(
        _MEMBERS,
        "{name: bob has left, collection: tasks, id: 7, deny: [users/ann], rule: view_rule}",
        "{collection: tasks, record: {id: 9, project: 2}, allow: [users/ann], rule: list_rule}",
    )

    outcome = run_program("check", "-c", str(operator.file), DATABASE_URL=operator.url)
    place, member = operator.file, "project.members_via_project.user ?= @request.auth.id"
    second = f"{place}:16: tests.1.allow.0: tasks/9: by list_rule users/ann may not see tasks/9"
    assert outcome.code == 78
    assert outcome.err.splitlines() == [
        "rule_test_failed: 2 of 2 rule tests failed",
        f"DETAIL: {place}:15: tests.0.deny.0: bob has left: by view_rule users/ann may see tasks/7",
        '    values    project is "1"',
        "    view_rule " + _MEMBERS.strip("'"),
        "      true     all of:",
        '        true     @request.auth.id != ""',
        '                 @request.auth.id is "ann"',
        "        true     project.members_via_project.user ?= @request.auth.id",
        '                 project.members_via_project.user is "ann"; @request.auth.id is "ann"',
        f"{second} ({member})",
        '    values    project is "2"',
        "    list_rule " + _MEMBERS.strip("'"),
        "      false    all of:",
        '        true     @request.auth.id != ""',
        '                 @request.auth.id is "ann"',
        "        false    project.members_via_project.user ?= @request.auth.id",
        '                 project.members_via_project.user is null; @request.auth.id is "ann"',
        "HINT: Change the rules, or what the tests expect.",
    ]


async def test_what_a_test_names_must_be_there(operator: Operator) -> None:
    """All of it is said in one run, with the place in the file."""
    faults = {
        "{collection: task, id: 7, deny: [guest]}": 'collection: there is no collection "task"'
        ' (perhaps you meant "tasks")',
        "{collection: tasks, id: 8, deny: [guest]}": 'id: "tasks" has no record "8"'
        " (or give the fields of a record instead of id)",
        "{collection: tasks, record: {projet: 1}, deny: [guest]}": "record.projet:"
        ' "tasks" has no field "projet" (perhaps you meant "project")',
        "{collection: tasks, record: {id: 1, state: gone}, deny: [guest]}": "record.state:"
        " PostgreSQL takes this for no value of type state",
        "{collection: tasks, record: {project: 1}, allow: [guest]}": 'record: the rule reads "done"'
        ", which is never NULL: give it a value",
        "{collection: tasks, id: 7, deny: [users/eve]}": 'deny.0: "users" has no record "eve"',
        "{collection: tasks, id: 7, deny: [people/ann]}": "deny.0:"
        ' there is no auth collection "people"',
        "{collection: tasks, id: 7, allow: [{user: users/ann, claims: {tenent: 1}}]}": "allow.0"
        '.claims.tenent: no issuer of "users" has "tenent" among its claims'
        ' (perhaps you meant "tenant")',
        "{collection: tasks, id: 7, deny: [{user: guest, claims: {a: 1}}]}": "deny.0.claims:"
        " guest has no claims",
    }
    result = await operator.check("done = false", *faults)

    (error,) = result.errors
    first, *problems = str(error).splitlines()
    assert first.endswith(f" has {len(faults)} problems")
    assert [problem.removeprefix("DETAIL: ") for problem in problems] == [
        f"{operator.file}:{15 + n}: tests.{n}.{message}"
        for n, message in enumerate(faults.values())
    ]


def test_a_record_of_a_table_with_a_composite_key_is_made_up_as_any(
    database_url: str, tmp_path: Path
) -> None:
    """Its id is no column of the table."""
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "CREATE TABLE items (a int, b text, note text, PRIMARY KEY (a, b));"
            "ALTER TABLE items REPLICA IDENTITY FULL"
        )
    text = """
version: 1
database: {url: "${DATABASE_URL}"}
collections: {items: {table: items, list_rule: note = "x" && a > 1, view_rule: null}}
tests:
  - {collection: items, record: {a: 2, b: c, note: x}, allow: [guest], rule: list_rule}
  - {collection: items, record: {a: 1, b: c, note: x}, deny: [guest]}
"""
    file = tmp_path / "pgrealtime.yaml"
    file.write_text(text, encoding="utf-8")
    outcome = run_program("check", "-c", str(file), DATABASE_URL=database_url)

    assert (outcome.code, outcome.err) == (0, "")
