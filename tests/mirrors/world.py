"""Random rules, people, filters and transactions, and what SQL says that each person's list is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

SCHEMA = """
CREATE TABLE projects (id text PRIMARY KEY, public boolean NOT NULL, status text NOT NULL);
CREATE TABLE users (id text PRIMARY KEY, team text, role text NOT NULL, home text);
CREATE TABLE members (
  id text PRIMARY KEY,
  project text NOT NULL REFERENCES projects ON DELETE CASCADE,
  usr text NOT NULL,
  rank int NOT NULL
);
CREATE TABLE tags (id text PRIMARY KEY, name text NOT NULL);
CREATE TABLE tasks (
  id text PRIMARY KEY,
  owner text NOT NULL,
  team text NOT NULL,
  done boolean NOT NULL,
  level int NOT NULL,
  note text,
  project text REFERENCES projects ON DELETE SET NULL
);
CREATE TABLE task_tags (
  task text REFERENCES tasks ON DELETE CASCADE ON UPDATE CASCADE,
  tag text REFERENCES tags ON DELETE CASCADE,
  PRIMARY KEY (task, tag)
);
ALTER TABLE users REPLICA IDENTITY FULL;
INSERT INTO projects VALUES ('p0', true, 'pub'), ('p1', false, 'pub'), ('p2', false, 'draft');
INSERT INTO tags VALUES ('g0', 'hot'), ('g1', 'cold');
INSERT INTO users VALUES
  ('ann', 'red', '', 'p0'), ('bob', 'red', '', 'p1'), ('cid', 'blue', '', NULL),
  ('dot', 'blue', 'admin', 'p2');
INSERT INTO members VALUES ('m0', 'p0', 'ann', 1), ('m1', 'p1', 'bob', 3);
"""
Identity = Literal["full", "index", "default"]
IDENTITIES: dict[Identity, str] = {
    "full": "ALTER TABLE tasks REPLICA IDENTITY FULL",
    "index": "CREATE UNIQUE INDEX covering ON tasks (id, owner, team, done, level);"
    " ALTER TABLE tasks REPLICA IDENTITY USING INDEX covering",
    "default": "ALTER TABLE tasks REPLICA IDENTITY DEFAULT",
}
PEOPLE = ("ann", "bob", "cid", "dot", "")
TEAMS = ("red", "blue", "green")
PROJECTS = ("p0", "p1", "p2")
IDS = tuple(f"t{number}" for number in range(8))


@dataclass(frozen=True, slots=True)
class Condition:
    """A rule or a filter, and the same in SQL.

    ``{me}`` is the person as a literal, ``{team}`` and ``{role}`` the values of that user's row.
    """

    text: str
    sql: str = ""
    """Empty if it reads related rows: the list alone says what is expected."""


RULES = (
    Condition("", "true"),
    Condition("owner = @request.auth.id", "owner = {me}"),
    Condition("team = @request.auth.team", "team = {team}"),
    Condition("done = false", "NOT done"),
    Condition("level > 2", "level > 2"),
    Condition("owner = @request.auth.id || done = true", "(owner = {me} OR done)"),
    Condition("owner != @request.auth.id", "owner <> {me}"),
    Condition("team = @request.auth.team && level >= 2", "(team = {team} AND level >= 2)"),
    Condition(
        '@request.auth.role = "admin" || team = @request.auth.team',
        "({role} = 'admin' OR team = {team})",
    ),
    Condition('@request.auth.id != "" && note ~ "a"', "({me} <> '' AND note LIKE '%a%')"),
)
RELATED_RULES = tuple(
    Condition(text)
    for text in (
        "project.public = true",
        "project.members_via_project.usr ?= @request.auth.id",
        "done = false && project.members_via_project.usr ?= @request.auth.id",
        'project.status = "pub" && owner.role = "admin"',
        "owner = @request.auth.id || project.members_via_project.usr ?= @request.auth.id",
        '@request.auth.id != "" && project.members_via_project.usr != @request.auth.id',
        (
            "project.members_via_project.usr ?= @request.auth.id"
            " && project.members_via_project.rank ?> 2"
        ),
        (
            "project.members_via_project.usr ?= @request.auth.id"
            " && project.members_via_project.rank > 1"
        ),
        "@collection.members.usr ?= @request.auth.id && @collection.members.project ?= project",
        "@collection.members.usr ?= @request.auth.id && level > 1",
        'tags.name ?= "hot"',
        "tags:length > 1 && owner = @request.auth.id",
        "@request.auth.home.public = true",
        "project.members_via_project.usr.team ?= @request.auth.team",
    )
)
RELATED_FILTERS = tuple(
    Condition(text)
    for text in (
        "",
        "",
        "done = true",
        'project.status = "pub"',
        'project.members_via_project.usr ?= "bob"',
        'tags.name ?= "cold" || level > 3',
    )
)
FILTERS = (
    Condition("", "true"),
    Condition("", "true"),
    Condition("done = true", "done"),
    Condition("level > 2", "level > 2"),
    Condition('note ~ "a"', "note LIKE '%a%'"),
    Condition('owner = "ann" || level < 2', "(owner = 'ann' OR level < 2)"),
    Condition('note = ""', "coalesce(note, '') = ''"),
    Condition('owner != "bob" && team = "red"', "(owner <> 'bob' AND team = 'red')"),
)


def expected_ids(person: str, *conditions: Condition) -> str:
    """Return the statement for the ids of a person's list."""
    me = f"'{person}'"
    values = {
        "me": me,
        "team": f"coalesce((SELECT team FROM users u WHERE u.id = {me}), '')",
        "role": f"coalesce((SELECT role FROM users u WHERE u.id = {me}), '')",
    }
    where = " AND ".join(one.sql.format(**values) for one in conditions)
    return f"SELECT id FROM tasks WHERE {where}"


def collections(list_rule: Condition, view_rule: Condition) -> dict[str, Any]:
    """Return the configuration of the tables."""
    tags = {"collection": "tags", "through": "task_tags", "source": "task", "target": "tag"}
    everyone = {"list_rule": "", "view_rule": ""}
    return {
        "users": {
            "table": "users",
            "type": "auth",
            "relations": {"home": {"collection": "projects"}},
        },
        "projects": {"table": "projects", **everyone},
        "tags": {"table": "tags", **everyone},
        "members": {"table": "members", "relations": {"usr": {"collection": "users"}}, **everyone},
        "tasks": {
            "table": "tasks",
            "relations": {"owner": {"collection": "users"}, "tags": tags},
            "list_rule": list_rule.text,
            "view_rule": view_rule.text,
        },
    }


def transaction(chance: random.Random, *, of_related: bool = False) -> Iterator[str]:
    """Yield the statements of a random transaction, of related rows too if these are read."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        is_related = of_related and chance.random() < 0.5
        yield _related_statement(chance) if is_related else _statement(chance)


def _related_statement(chance: random.Random) -> str:
    project, member = chance.choice(PROJECTS), f"m{chance.randrange(5)}"
    person, tag, task = chance.choice(PEOPLE[:4]), chance.choice(("g0", "g1")), chance.choice(IDS)
    flag, status, rank = chance.choice(("true", "false")), chance.choice("ab"), chance.randrange(5)
    return chance.choice(
        (
            f"INSERT INTO projects VALUES ('{project}', {flag}, 'pub') ON CONFLICT DO NOTHING",
            f"DELETE FROM projects WHERE id = '{project}'",
            f"UPDATE projects SET public = {flag} WHERE id = '{project}'",
            (
                f"UPDATE projects SET status = '{'pub' if status == 'a' else 'draft'}'"
                f" WHERE id = '{project}'"
            ),
            (
                f"INSERT INTO members SELECT '{member}', id, '{person}', {rank} FROM projects"
                f" WHERE id = '{project}' ON CONFLICT DO NOTHING"
            ),
            (
                f"INSERT INTO members SELECT '{member}', id, '{person}', {rank} FROM projects"
                f" WHERE id = '{project}' ON CONFLICT (id) DO UPDATE SET project = EXCLUDED.project"
            ),
            f"DELETE FROM members WHERE id = '{member}'",
            f"UPDATE members SET usr = '{person}' WHERE id = '{member}'",
            f"UPDATE members SET rank = {rank} WHERE id = '{member}'",
            (
                f"UPDATE tasks SET project = (SELECT id FROM projects WHERE id = '{project}')"
                f" WHERE id = '{task}'"
            ),
            (
                f"INSERT INTO task_tags SELECT t.id, g.id FROM tasks t, tags g"
                f" WHERE t.id = '{task}'"
                f" AND g.id = '{tag}' ON CONFLICT DO NOTHING"
            ),
            f"DELETE FROM task_tags WHERE task = '{task}' AND tag = '{tag}'",
            f"UPDATE tags SET name = '{'hot' if status == 'a' else 'cold'}' WHERE id = '{tag}'",
            f"UPDATE users SET home = '{project}' WHERE id = '{person}'",
        )
    )


def _statement(chance: random.Random) -> str:
    row, other = chance.sample(IDS, 2)
    match chance.randrange(20):
        case 0 | 1 | 2 | 3:
            values = ", ".join(
                map(_value, ("owner", "team", "done", "level", "note"), [chance] * 5)
            )
            project = f"(SELECT min(id) FROM projects WHERE id >= '{chance.choice(PROJECTS)}')"
            return f"INSERT INTO tasks SELECT '{row}', {values}, {project} ON CONFLICT DO NOTHING"
        case 4 | 5:
            return f"DELETE FROM tasks WHERE id = '{row}'"
        case 6:
            return f"UPDATE tasks SET id = 'x' WHERE id = '{row}'; DELETE FROM tasks WHERE id = 'x'"
        case 7:
            return (
                f"UPDATE tasks SET id = '{other}' WHERE id = '{row}'"
                f" AND NOT EXISTS (SELECT FROM tasks WHERE id = '{other}')"
            )
        case 8:
            column = chance.choice(("team", "role"))
            value = _value("team", chance) if column == "team" else chance.choice(("''", "'admin'"))
            person = chance.choice(PEOPLE[:4])
            return f"UPDATE users SET {column} = {value} WHERE id = '{person}'"
        case 9:
            column = chance.choice(("done", "level", "owner"))
            return f"UPDATE tasks SET {column} = {_value(column, chance)}"
        case _:
            columns = chance.sample(
                ("owner", "team", "done", "level", "note"), chance.choice((1, 2))
            )
            values = ", ".join(f"{column} = {_value(column, chance)}" for column in columns)
            return f"UPDATE tasks SET {values} WHERE id = '{row}'"


def _value(column: str, chance: random.Random) -> str:
    match column:
        case "owner":
            return f"'{chance.choice(PEOPLE[:4])}'"
        case "team":
            return f"'{chance.choice(TEAMS)}'"
        case "done":
            return chance.choice(("true", "false"))
        case "level":
            return str(chance.randrange(6))
        case _:
            # The last is stored apart from its row, and left out of the WAL where it stays.
            texts = (
                "NULL",
                "'a'",
                "'b'",
                f"'{'a' * 10}'",
                "(SELECT string_agg(md5(random()::text || i), 'a') FROM generate_series(1, 200) i)",
            )
            return chance.choice(texts)
