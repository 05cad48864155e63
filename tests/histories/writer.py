"""Random transactions, recorded in the ledger when they commit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import psycopg

from tests.histories.ledger import Ledger, Version
from tests.histories.scene import DOCS, FILLER, LIKES, Values

Connection: TypeAlias = psycopg.AsyncConnection[tuple[Any, ...]]

LETTERS = "ab"
KINDS = ("open", "plain", "secret")


@dataclass(eq=False)
class Draft:
    """A transaction that is being written."""

    statements: list[str] = field(default_factory=list)
    versions: list[Version] = field(default_factory=list)
    rows: dict[tuple[str, str], Values | None] = field(default_factory=dict)
    """The rows that the transaction changed, in their current state."""
    truncated: list[str] = field(default_factory=list)
    sent: int = 0
    """Statements that were executed."""


class Writer:
    """Writes the rows of one history.

    Args:
        ledger: Records what is written.
        connections: Two: one for a transaction that stays open, one for all others.
        rng: Source of randomness.
        prefix: Begins all ids of the history.
    """

    def __init__(
        self, ledger: Ledger, connections: Sequence[Connection], rng: random.Random, prefix: str
    ) -> None:
        self.ledger, self.rng, self.prefix = ledger, rng, prefix
        self.users = [f"{prefix}u{n}" for n in range(3)]
        self.teams = [f"{prefix}t{n}" for n in range(2)]
        self.docs: dict[str, list[str]] = {docs: [] for docs in DOCS}
        self.locked: set[str] = set()
        """Tables that another connection has locked."""
        self.commits = 0
        self._connections = connections
        self._open: Draft | None = None
        self._number = 0

    # --- transactions

    async def prepare(self) -> None:
        """Write the rows that a history begins with."""
        draft = Draft()
        for user in self.users:
            self._insert_user(draft, user)
        for team in self.teams:
            self._insert_team(draft, team)
        for docs in DOCS:
            for _ in range(2):
                self.insert_doc(draft, docs)
        self._change_member(draft)
        self._change_member(draft)
        await self._run(lambda: draft)

    async def write(self, count: int = 1) -> None:
        """Commit transactions one right after another, in a single round trip if several."""
        await self._run(*[self._draft] * count)

    async def commit(self, *changes: Callable[[Draft], None]) -> None:
        """Commit one transaction of given changes."""
        draft = Draft()
        for change in changes:
            change(draft)
        await self._run(lambda: draft)

    async def write_slowly(self) -> None:
        """Begin a transaction that stays open, or commit the one that is open."""
        if self._open is not None:
            await self.finish()
            return
        draft = self._draft(may_truncate=False)
        self._open = draft
        self.ledger.happens("open")
        await self._connections[1].execute("BEGIN")
        for statement in draft.statements:
            await self._connections[1].execute(statement.encode())

    async def finish(self) -> None:
        """Commit the transaction that is open, if any."""
        draft, self._open = self._open, None
        if draft is None:
            return
        commit = self._note(draft)
        for happening in self.ledger.happenings:
            if happening.kind == "open" and happening.upto is None:
                happening.upto = commit
        await self._connections[1].execute(f"INSERT INTO ledger VALUES ({commit}); COMMIT".encode())
        self.ledger.done = commit
        self.commits += 1

    async def fence(self, name: str) -> Version:
        """Write the row whose event marks that all before it has arrived."""
        draft = Draft()
        self._put(draft, f"INSERT INTO fence VALUES ('{name}')", "fence", {"id": name})
        await self._run(lambda: draft)
        return draft.versions[0]

    async def run(self, statement: str) -> None:
        """Execute a statement that changes no row."""
        await self._connections[0].execute(statement.encode())

    @property
    def is_open(self) -> bool:
        """Whether a transaction is open."""
        return self._open is not None

    async def _run(self, *drafts: Callable[[], Draft]) -> None:
        text: list[str] = []
        commit = self.ledger.begun
        for make in drafts:
            draft = make()
            commit = self._note(draft)
            text += ["BEGIN", *draft.statements, f"INSERT INTO ledger VALUES ({commit})", "COMMIT"]
        connection = self._connections[0]
        if len(drafts) > 1 or self.rng.random() < 0.5:
            await connection.execute(";".join(text).encode())
        else:
            for statement in text:
                await connection.execute(statement.encode())
        self.ledger.done = commit
        for happening in self.ledger.happenings:
            if happening.kind == "truncate" and happening.upto is None:
                happening.upto = commit
        self.commits += len(drafts)

    def _note(self, draft: Draft) -> int:
        for table in draft.truncated:
            happening = self.ledger.happens("truncate", table)
            happening.since += 1
        return self.ledger.begin_commit(draft.versions)

    # --- statements

    def _draft(self, *, may_truncate: bool = True) -> Draft:
        draft = Draft()
        for _ in range(self.rng.choice([1, 1, 1, 2, 2, 3, 5])):
            kept = len(draft.statements), len(draft.versions), dict(draft.rows)
            is_nested = self.rng.random() < 0.3
            if is_nested:
                draft.statements.append("SAVEPOINT s")
            for _ in range(self.rng.choice([1, 1, 2]) if is_nested else 1):
                self._change(draft)
            if is_nested and self.rng.random() < 0.3:
                draft.statements.append("ROLLBACK TO s")
                del draft.versions[kept[1] :]
                draft.rows = kept[2]
            elif is_nested and self.rng.random() < 0.7:
                draft.statements.append("RELEASE s")
        if may_truncate and self._open is None and self.rng.random() < 0.02:
            self.truncate(draft, self.rng.choice(DOCS))
        return draft

    def _change(self, draft: Draft) -> None:
        makers: list[tuple[float, Callable[[Draft], None]]] = [
            (12, self._update_doc),
            (2, self._update_doc_often),
            (2, lambda draft: self.insert_doc(draft, self.rng.choice(DOCS))),
            (1.5, self._delete_doc),
            (0.5, self._rename_doc),
            (1.5, self._change_like),
            (1.5, self._change_member),
            (1.2, self._update_team),
            (1.5, self._update_user),
            (0.15, self._delete_user),
        ]
        ((_, maker),) = self.rng.choices(makers, [weight for weight, _ in makers])
        maker(draft)

    def _row(self, draft: Draft, table: str, record_id: str) -> Values | None:
        key = table, record_id
        if key in draft.rows:
            return draft.rows[key]
        return self.ledger.row(table, record_id, self.ledger.begun)

    def _is_free(self, draft: Draft, table: str, record_id: str) -> bool:
        is_busy = self._open is not None and any(
            (version.table, version.record_id) == (table, record_id)
            for version in self._open.versions
        )
        return (not is_busy or draft is self._open) and table not in self.locked

    def _pick(self, draft: Draft, table: str, ids: Iterable[str]) -> str | None:
        found = [
            one
            for one in ids
            if self._is_free(draft, table, one) and self._row(draft, table, one) is not None
        ]
        return self.rng.choice(found) if found else None

    def _put(self, draft: Draft, statement: str, table: str, values: Values) -> None:
        """Record a statement that inserts a row."""
        wal = self.ledger.columns_in_wal(table, "create", ())
        self._note_version(draft, Version(table, values["id"], "create", values, wal))
        draft.statements.append(statement)

    def _remove(self, draft: Draft, statement: str, table: str, values: Values) -> None:
        """Record a statement that deletes a row."""
        wal = self.ledger.columns_in_wal(table, "delete", ())
        self._note_version(draft, Version(table, values["id"], "delete", values, wal))
        draft.statements.append(statement)

    def _note_version(self, draft: Draft, version: Version) -> None:
        draft.versions.append(version)
        is_gone = version.action in ("delete", "truncate")
        draft.rows[version.table, version.record_id] = None if is_gone else version.values

    def update(self, draft: Draft, table: str, record_id: str, sets: Values) -> None:
        """Record a statement that changes a row's columns; it always sets another mark."""
        row = self._row(draft, table, record_id)
        assert row is not None
        sets = {"mark": self.ledger.mark(), **sets}
        values = _generated({**row, **sets})
        wal = self.ledger.columns_in_wal(table, "update", sets)
        draft.statements.append(_update(table, record_id, sets))
        if values["id"] == record_id:
            self._note_version(draft, Version(table, record_id, "update", values, wal))
            return
        # For a client one record was deleted and another created.
        old = self.ledger.columns_in_wal(table, "delete", ())
        self._note_version(draft, Version(table, record_id, "delete", row, old, is_rename=True))
        self._note_version(draft, Version(table, values["id"], "create", values, wal))

    def _next(self, letter: str) -> str:
        self._number += 1
        return f"{self.prefix}{letter}{self._number}"

    def _toasted(self, mark: str) -> str:
        return f"{self.rng.choice(KINDS)}-{mark}-{FILLER}"

    def insert_doc(self, draft: Draft, docs: str) -> None:
        """Record a statement that creates a document."""
        if docs in self.locked:
            return
        mark, rng = self.ledger.mark(), self.rng
        values = _generated(
            {
                "id": self._next("d"),
                "kind": rng.choice(["k", "l"]),
                "mark": mark,
                "owner": rng.choice(["", *self.users]),
                "public": rng.random() < 0.5,
                "team": rng.choice(["", *self.teams]),
                "title": f"{rng.choice(LETTERS)}-{mark}",
                "body": self._toasted(mark),
                "extra": self._toasted(mark),
                "note": f"{rng.choice(['seen', 'not'])}",
                "n": rng.randrange(10),
            }
        )
        self.docs[docs].append(values["id"])
        self._put(draft, _insert(docs, values), docs, values)

    def _update_doc(self, draft: Draft, docs: str = "", record_id: str | None = None) -> None:
        docs = docs or self.rng.choice(DOCS)
        record_id = record_id or self._pick(draft, docs, self.docs[docs])
        row = self._row(draft, docs, record_id or "")
        if record_id is None or row is None:
            return
        mark, rng = self.ledger.mark(), self.rng
        possible: dict[str, Callable[[], object]] = {
            "title": lambda: f"{rng.choice(LETTERS)}-{mark}",
            "body": lambda: self._toasted(mark),
            "extra": lambda: self._toasted(mark),
            "public": lambda: not row["public"],
            "owner": lambda: rng.choice(["", *self.users]),
            "team": lambda: rng.choice(["", *self.teams]),
            "note": lambda: rng.choice(["seen", "not"]),
            "n": lambda: rng.randrange(10),
            "kind": lambda: rng.choice(["k", "l"]),
        }
        weights = [6, 3, 2, 4, 1, 1, 1, 2, 0.5]
        names = set(rng.choices(list(possible), weights, k=rng.choice([1, 1, 2, 3])))
        self.update(draft, docs, record_id, {name: possible[name]() for name in sorted(names)})

    def _update_doc_often(self, draft: Draft) -> None:
        """One row, one version after another."""
        docs = self.rng.choice(DOCS)
        record_id = self._pick(draft, docs, self.docs[docs])
        for _ in range(self.rng.choice([2, 3]) if record_id else 0):
            self._update_doc(draft, docs, record_id)

    def _rename_doc(self, draft: Draft) -> None:
        """Change a primary key: for a client one record is deleted and another created."""
        docs = self.rng.choice(DOCS)
        record_id = self._pick(draft, docs, self.docs[docs])
        row = self._row(draft, docs, record_id or "")
        if record_id is None or row is None:
            return
        name = self._next("d")
        self.docs[docs].append(name)
        self.update(draft, docs, record_id, {"id": name})

    def _delete_doc(self, draft: Draft) -> None:
        docs = self.rng.choice(DOCS)
        self._delete(draft, docs, self._pick(draft, docs, self.docs[docs]))

    def _delete(self, draft: Draft, table: str, record_id: str | None) -> None:
        row = self._row(draft, table, record_id or "")
        if record_id is None or row is None:
            return
        self._remove(draft, f"DELETE FROM {table} WHERE id = '{record_id}'", table, row)

    def truncate(self, draft: Draft, docs: str) -> None:
        """Record a statement that empties a collection."""
        if docs in self.locked:
            return
        for (table, record_id), versions in self.ledger.rows.items():
            if table == docs and versions[-1].action not in ("delete", "truncate"):
                draft.rows.setdefault((table, record_id), versions[-1].values)
        for (table, record_id), values in list(draft.rows.items()):
            if table == docs and values is not None:
                self._note_version(draft, Version(docs, record_id, "truncate", values, frozenset()))
        draft.truncated.append(docs)
        draft.statements.append(f"TRUNCATE {docs}")

    def _change_like(self, draft: Draft) -> None:
        docs = self.rng.choice(DOCS)
        table, user = LIKES[docs], self.rng.choice(self.users)
        doc = self._pick(draft, docs, self.docs[docs])
        if doc is None:
            return
        record_id = f"{doc}|{user}"
        if not self._is_free(draft, table, record_id):
            return
        values = {"id": record_id, "doc": doc, "usr": user}
        if self._row(draft, table, record_id) is None:
            statement = f"INSERT INTO {table} VALUES ('{doc}', '{user}')"
            self._put(draft, statement, table, values)
        else:
            statement = f"DELETE FROM {table} WHERE doc = '{doc}' AND usr = '{user}'"
            self._remove(draft, statement, table, values)

    def _change_member(self, draft: Draft) -> None:
        team, user = self.rng.choice(self.teams), self.rng.choice(self.users)
        record_id = f"{team}-{user}"
        if not self._is_free(draft, "members", record_id):
            return
        if self._row(draft, "members", record_id) is not None:
            self._delete(draft, "members", record_id)
            return
        values = {"id": record_id, "mark": self.ledger.mark(), "team": team, "usr": user}
        self._put(draft, _insert("members", values), "members", values)

    def _insert_team(self, draft: Draft, team: str) -> None:
        values = {"id": team, "mark": self.ledger.mark(), "open": self.rng.random() < 0.5}
        self._put(draft, _insert("teams", values), "teams", values)

    def _update_team(self, draft: Draft) -> None:
        team = self._pick(draft, "teams", self.teams)
        row = self._row(draft, "teams", team or "")
        if team is None or row is None:
            return
        self.update(draft, "teams", team, {"open": not row["open"]})

    def _insert_user(self, draft: Draft, user: str) -> None:
        mark, rng = self.ledger.mark(), self.rng
        values = {
            "id": user,
            "mark": mark,
            "name": f"name-{mark}",
            "email": f"{mark}@x.example",
            "emailVisibility": rng.random() < 0.5,
            "role": rng.choice(["", "admin"]),
            "shown": rng.random() < 0.6,
            "bio": self._toasted(mark),
        }
        self._put(draft, _insert("users", values), "users", values)

    def _update_user(self, draft: Draft) -> None:
        user = self._pick(draft, "users", self.users)
        row = self._row(draft, "users", user or "")
        if user is None or row is None:
            return
        mark, rng = self.ledger.mark(), self.rng
        possible: dict[str, Callable[[], object]] = {
            "name": lambda: f"name-{mark}",
            "email": lambda: f"{mark}@x.example",
            "emailVisibility": lambda: not row["emailVisibility"],
            "role": lambda: "" if row["role"] else "admin",
            "shown": lambda: not row["shown"],
            "bio": lambda: self._toasted(mark),
        }
        names = set(rng.choices(list(possible), k=rng.choice([1, 2])))
        self.update(draft, "users", user, {name: possible[name]() for name in sorted(names)})

    def _delete_user(self, draft: Draft) -> None:
        self._delete(draft, "users", self._pick(draft, "users", self.users))


def _generated(row: dict[str, Any]) -> Values:
    """Compute the generated columns as PostgreSQL does."""
    if "body" not in row:
        return row
    return {**row, "gen": row["body"].split("-")[1], "is_open": row["body"].startswith("open")}


def _literal(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str() if value.endswith(FILLER):
            return f"'{value.removesuffix(FILLER)}' || repeat('x', {len(FILLER)})"
        case str():
            return f"'{value}'"
        case _:
            return str(value)


def _insert(table: str, values: Values) -> str:
    stored = {name: value for name, value in values.items() if name not in ("gen", "is_open")}
    names = ", ".join(f'"{name}"' for name in stored)
    return f"INSERT INTO {table} ({names}) VALUES ({', '.join(map(_literal, stored.values()))})"


def _update(table: str, record_id: str, sets: Values) -> str:
    assigned = ", ".join(f'"{name}" = {_literal(value)}' for name, value in sets.items())
    return f"UPDATE {table} SET {assigned} WHERE id = '{record_id}'"
