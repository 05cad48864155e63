"""Tables, rules and filters of random histories, each rule in three forms that must agree.

The program has the text, PostgreSQL evaluates the SQL, and the ledger calls the function.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from pgrealtime.config.model import Config
from tests.config_values import parse_config

Values: TypeAlias = Mapping[str, Any]
Identity: TypeAlias = Literal["default", "index", "full"]

SECRET = "a secret of the histories, of more than thirty-two bytes"
IDENTITIES: tuple[Identity, ...] = ("default", "index", "full")
DOCS = tuple(f"docs_{identity}" for identity in IDENTITIES)
LIKES = {docs: f"likes_{docs}" for docs in DOCS}
FILLER = "x" * 2100
"""A text long enough to be TOASTed."""


@dataclass(frozen=True, slots=True)
class CallerState:
    """A caller's identity at one moment: a guest has no id."""

    id: str = ""
    role: str = ""
    is_superuser: bool = False


class At(Protocol):
    """The tables at one moment, as rules read them."""

    def is_member(self, team: str, user: str) -> bool:
        """Whether the user is a member of the team."""
        ...

    def is_open(self, team: str) -> bool:
        """Whether the team exists and is open."""
        ...

    def likes(self, docs: str, record_id: str) -> frozenset[str]:
        """Return the users that like the record."""
        ...

    def is_there(self, user: str) -> bool:
        """Whether the user exists."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A condition on a row of a collection ``docs``."""

    text: str
    sql: str
    """With ``r`` for the row, ``p`` for the user and ``{likes}`` for the junction table."""
    reads: frozenset[str]
    admits: Callable[[str, Values, CallerState, At], bool]
    """Takes the collection's name, the row, the identity and the tables."""


def _rule(
    text: str, sql: str, reads: str, admits: Callable[[str, Values, CallerState, At], bool]
) -> Rule:
    return Rule(text=text, sql=sql, reads=frozenset(reads.split()), admits=admits)


RULES = {
    "public": _rule("public = true", "r.public", "public", lambda _d, r, _w, _a: r["public"]),
    "mine": _rule(
        'public = true || (@request.auth.id != "" && owner = @request.auth.id)',
        "r.public OR (p.id <> '' AND r.owner = p.id)",
        "public owner",
        lambda _d, r, w, _a: r["public"] or (w.id != "" and r["owner"] == w.id),
    ),
    "body": _rule(
        'body !~ "secret"',
        "r.body NOT LIKE '%secret%'",
        "body",
        lambda _d, r, _w, _a: "secret" not in r["body"],
    ),
    "two bodies": _rule(
        'extra ~ "open" || (body ~ "open" && owner = @request.auth.id && owner != "")',
        "r.extra LIKE '%open%' OR (r.body LIKE '%open%' AND r.owner = p.id AND r.owner <> '')",
        "extra body owner",
        lambda _d, r, w, _a: (
            "open" in r["extra"] or ("open" in r["body"] and r["owner"] == w.id != "")
        ),
    ),
    "generated": _rule(
        "is_open = true", "r.is_open", "is_open", lambda _d, r, _w, _a: r["is_open"]
    ),
    "member": _rule(
        '@request.auth.id != "" && team.members_via_team.usr ?= @request.auth.id',
        "p.id <> '' AND EXISTS (SELECT FROM members m JOIN teams t ON t.id = m.team"
        " WHERE m.team = r.team AND m.usr = p.id)",
        "team",
        lambda _d, r, w, a: w.id != "" and a.is_member(r["team"], w.id),
    ),
    "liked": _rule(
        'public = true || (@request.auth.id != "" && liked_by.id ?= @request.auth.id)',
        "r.public OR EXISTS (SELECT FROM {likes} l WHERE l.doc = r.id AND l.usr = p.id)",
        "public id",
        lambda d, r, w, a: r["public"] or (w.id in a.likes(d, r["id"]) and a.is_there(w.id)),
    ),
    "role": _rule(
        'public = true || @request.auth.role = "admin"',
        "r.public OR p.role = 'admin'",
        "public",
        lambda _d, r, w, _a: r["public"] or w.role == "admin",
    ),
    "hidden": _rule(
        'public = true || note = "seen"',
        "r.public OR r.note = 'seen'",
        "public note",
        lambda _d, r, _w, _a: r["public"] or r["note"] == "seen",
    ),
    "team": _rule(
        "team.open = true",
        "EXISTS (SELECT FROM teams t WHERE t.id = r.team AND t.open)",
        "team",
        lambda _d, r, _w, a: a.is_open(r["team"]),
    ),
    "mixed": _rule(
        'public = true || (body ~ "open" && @request.auth.role = "admin")',
        "r.public OR (r.body LIKE '%open%' AND p.role = 'admin')",
        "public body",
        lambda _d, r, w, _a: r["public"] or ("open" in r["body"] and w.role == "admin"),
    ),
}

FILTERS = {
    "number": _rule("n >= 5", "r.n >= 5", "n", lambda _d, r, _w, _a: r["n"] >= 5),
    "text": _rule(
        'title ~ "a"', "r.title LIKE '%a%'", "title", lambda _d, r, _w, _a: "a" in r["title"]
    ),
    "toasted": _rule(
        'extra ~ "open"',
        "r.extra LIKE '%open%'",
        "extra",
        lambda _d, r, _w, _a: "open" in r["extra"],
    ),
    "generated": _rule(
        "is_open = true", "r.is_open", "is_open", lambda _d, r, _w, _a: r["is_open"]
    ),
    "related": _rule(
        "team.open = true",
        "EXISTS (SELECT FROM teams t WHERE t.id = r.team AND t.open)",
        "team",
        lambda _d, r, _w, a: a.is_open(r["team"]),
    ),
}
"""The filters that clients may submit."""

USERS_RULE = 'shown = true || (@request.auth.id != "" && id = @request.auth.id)'
TEAMS_RULE = "open = true"


def sees_user(row: Values, caller: CallerState) -> bool:
    """Return whether USERS_RULE admits the row."""
    return bool(row["shown"]) or (caller.id != "" and row["id"] == caller.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What histories of one world share: schema, rules and configuration.

    Attributes:
        rules: By collection, the names of the list rule and the view rule.
    """

    plugin: Literal["wal2json", "pgoutput"]
    is_durable: bool
    rules: Mapping[str, tuple[str, str]]
    users_identity: Identity
    send_buffer: int

    def rule(self, collection: str, *, is_list: bool) -> Rule:
        """The rule of a collection ``docs``."""
        return RULES[self.rules[collection][0 if is_list else 1]]

    def identity(self, table: str) -> Identity:
        """Return the replica identity of the table."""
        return self.users_identity if table == "users" else _IDENTITY.get(table, "full")


_IDENTITY: Mapping[str, Identity] = dict(zip(DOCS, IDENTITIES, strict=True))


def random_scene(rng: random.Random) -> Scene:
    """Return a random scene."""
    names = list(RULES)
    rules = {}
    for docs in DOCS:
        first = rng.choice(names)
        rules[docs] = (first, first if rng.random() < 0.5 else rng.choice(names))
    return Scene(
        plugin=rng.choice(["wal2json", "pgoutput"]),
        is_durable=rng.random() < 0.4,
        rules=rules,
        users_identity=rng.choice(["default", "full"]),
        send_buffer=rng.choice([300, 6000, 1 << 20]),
    )


TABLES = ("users", "teams", "members", "fence", *DOCS, *LIKES.values())
"""All streamed tables."""


def schema(scene: Scene) -> str:
    """The tables as SQL."""
    docs = "".join(_docs(name, scene.identity(name)) for name in DOCS)
    publication = ", ".join(TABLES)
    users_identity = "FULL" if scene.users_identity == "full" else "DEFAULT"
    return f"""
CREATE TABLE ledger (n bigint PRIMARY KEY);
CREATE TABLE fence (id text PRIMARY KEY);
CREATE TABLE users (id text PRIMARY KEY, mark text NOT NULL, name text NOT NULL,
  email text NOT NULL, "emailVisibility" boolean NOT NULL, role text NOT NULL,
  shown boolean NOT NULL, bio text NOT NULL);
ALTER TABLE users ALTER bio SET STORAGE EXTERNAL;
ALTER TABLE users REPLICA IDENTITY {users_identity};
CREATE TABLE teams (id text PRIMARY KEY, mark text NOT NULL, open boolean NOT NULL);
ALTER TABLE teams REPLICA IDENTITY FULL;
CREATE TABLE members (id text PRIMARY KEY, mark text NOT NULL, team text NOT NULL,
  usr text NOT NULL);
ALTER TABLE members REPLICA IDENTITY FULL;
{docs}
CREATE PUBLICATION pgrealtime FOR TABLE ONLY {publication.replace(", ", ", ONLY ")};
"""


def _docs(name: str, identity: Identity) -> str:
    how = {"default": "DEFAULT", "full": "FULL", "index": f"USING INDEX {name}_kind"}[identity]
    return f"""
CREATE TABLE {name} (id text PRIMARY KEY, kind text NOT NULL, mark text NOT NULL,
  owner text NOT NULL, public boolean NOT NULL, team text NOT NULL, title text NOT NULL,
  body text NOT NULL, extra text NOT NULL, note text NOT NULL, n int NOT NULL,
  gen text GENERATED ALWAYS AS (split_part(body, '-', 2)) STORED,
  is_open boolean GENERATED ALWAYS AS (left(body, 4) = 'open') STORED);
CREATE UNIQUE INDEX {name}_kind ON {name} (kind, id);
ALTER TABLE {name} ALTER body SET STORAGE EXTERNAL, ALTER extra SET STORAGE EXTERNAL;
ALTER TABLE {name} REPLICA IDENTITY {how};
CREATE TABLE {LIKES[name]} (doc text NOT NULL, usr text NOT NULL, PRIMARY KEY (doc, usr));
"""


def configuration(scene: Scene, url: str, slot: str) -> Config:
    """Return the program's configuration."""
    collections: dict[str, Any] = {
        "users": {
            "table": "users",
            "type": "auth",
            "list_rule": USERS_RULE,
            "view_rule": USERS_RULE,
            "manage_rule": '@request.auth.role = "admin"',
        },
        "teams": {"table": "teams", "list_rule": TEAMS_RULE, "view_rule": TEAMS_RULE},
        "members": {
            "table": "members",
            "relations": {"team": {"collection": "teams"}, "usr": {"collection": "users"}},
        },
        "fence": {"table": "fence", "list_rule": "", "view_rule": ""},
    }
    for docs in DOCS:
        collections[docs] = {
            "table": docs,
            "fields": {"hide": ["note"]},
            "relations": {
                "owner": {"collection": "users"},
                "team": {"collection": "teams"},
                "liked_by": {
                    "collection": "users",
                    "through": LIKES[docs],
                    "source": "doc",
                    "target": "usr",
                    # The ledger knows the events by the versions of rows that were written.
                    "updates": False,
                },
            },
            "list_rule": scene.rule(docs, is_list=True).text,
            "view_rule": scene.rule(docs, is_list=False).text,
        }
    return parse_config(
        {
            "version": 1,
            "database": {"url": url, "statement_timeout": "500ms"},
            "replication": {
                "plugin": scene.plugin,
                "slot": {
                    "name": slot,
                    "durable": scene.is_durable,
                    "allow_unlimited_wal": scene.is_durable,
                },
            },
            "server": {"host": "127.0.0.1", "port": 0, "shutdown_grace": "1s"},
            "realtime": {"send_buffer": scene.send_buffer, "idle_timeout": "1h"},
            "auth": {
                "issuers": [{"name": "app", "secret": SECRET, "superuser_when": {"role": "root"}}]
            },
            "collections": collections,
            "logging": {"level": "error"},
        }
    )
