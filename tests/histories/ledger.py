"""The ledger of the writer: every version of every row, in commit order, and who may see it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, TypeAlias

from pgrealtime.lsn import Cursor
from tests.histories.scene import DOCS, LIKES, CallerState, Rule, Scene, Values, sees_user

Action: TypeAlias = Literal["create", "update", "delete", "truncate"]
HappeningKind: TypeAlias = Literal[
    "queries", "walsender", "decoder", "lock", "alter", "truncate", "open"
]
Person: TypeAlias = str
"""A user's id; ``""`` is a guest, ``root`` a superuser."""

ROOT = "root"
_LIKES_OF = {likes: docs for docs, likes in LIKES.items()}
_GENERATED = frozenset({"gen", "is_open"})
_TOASTED = frozenset({"body", "extra", "bio"})
_KEYS = {"default": frozenset({"id"}), "index": frozenset({"id", "kind"})}


@dataclass(eq=False, slots=True)
class Version:
    """The state that one statement gave one row.

    Attributes:
        values: The row; the last state of a deleted one.
        in_wal: The columns that the stream has of it.
        commit: The commit's number; 0 while the transaction is open.
        is_last: Whether it is the row's state at the end of the transaction.
        cursor: The event's cursor, if it is known.
        is_rename: Whether it is the delete of a changed key: the next version is of the same
            change.
    """

    table: str
    record_id: str
    action: Action
    values: Values
    in_wal: frozenset[str]
    commit: int = 0
    order: int = 0
    is_last: bool = True
    cursor: Cursor | None = None
    is_rename: bool = False

    def __str__(self) -> str:
        mark = self.values.get("mark", "")
        return f"{self.action} {self.table}/{self.record_id} {mark} (commit {self.commit})"


@dataclass(slots=True)
class Happening:
    """A cause of gaps or missing proofs other than changes of rows.

    Attributes:
        since: The last commit sent before it began.
        upto: The last commit sent before it was over; None while it goes on.
    """

    kind: HappeningKind
    table: str
    since: int
    upto: int | None = None


@dataclass(slots=True)
class Ledger:
    """All that was written.

    Attributes:
        begun: The number of the last commit that was sent.
        done: The number of the last commit that was acknowledged.
    """

    scene: Scene
    begun: int = 0
    done: int = 0
    marks: int = 0
    rows: dict[tuple[str, str], list[Version]] = field(default_factory=lambda: defaultdict(list))
    by_mark: dict[str, Version] = field(default_factory=dict)
    log: list[Version] = field(default_factory=list)
    """All versions in order."""
    happenings: list[Happening] = field(default_factory=list)
    likers: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    """The users that ever liked a record."""
    _touched: dict[int, set[tuple[str, str]]] = field(default_factory=lambda: defaultdict(set))
    _states: dict[tuple[int, int], State] = field(default_factory=dict)

    def mark(self) -> str:
        """Return a new unique text."""
        self.marks += 1
        return f"v{self.marks}"

    def begin_commit(self, versions: Iterable[Version]) -> int:
        """Record a transaction whose COMMIT is about to be sent; return its number."""
        self.begun += 1
        last: dict[tuple[str, str], Version] = {}
        for order, version in enumerate(versions):
            key = version.table, version.record_id
            if key in last:
                last[key].is_last = False
            last[key] = version
            version.commit, version.order = self.begun, order
            self.rows[key].append(version)
            self._touched[self.begun].add(key)
            self.log.append(version)
            if version.action in ("create", "update") and "mark" in version.values:
                self.by_mark[version.values["mark"]] = version
            if version.table in _LIKES_OF:
                doc, _, user = version.record_id.partition("|")
                self.likers[_LIKES_OF[version.table], doc].add(user)
        return self.begun

    def happens(self, kind: HappeningKind, table: str = "") -> Happening:
        """Record the beginning of a possible cause of gaps."""
        happening = Happening(kind, table, self.begun)
        self.happenings.append(happening)
        return happening

    def is_touched(self, table: str, record_id: str, commit: int) -> bool:
        """Return whether the commit wrote the row."""
        return (table, record_id) in self._touched.get(commit, ())

    def version(self, table: str, record_id: str, commit: int, without: int = 0) -> Version | None:
        """Return the row's last version at a commit.

        Args:
            table: The table.
            record_id: The row's id.
            commit: The moment.
            without: A commit whose changes of the row, and all later ones, don't count.
        """
        upto = commit
        if without and without <= commit and self.is_touched(table, record_id, without):
            upto = without - 1
        found = None
        for version in self.rows.get((table, record_id), ()):
            if version.commit > upto:
                break
            found = version
        return found

    def likes_at(self, version: Version) -> frozenset[str]:
        """Return the users that liked a record at one of its versions, within its transaction.

        Links that are made before the transaction's next change of the record belong to the
        version.
        """
        versions = self.rows[version.table, version.record_id]
        later = (one for one in versions if one.commit == version.commit)
        next_order = min((one.order for one in later if one.order > version.order), default=None)
        place = version.commit, version.order if next_order is None else next_order
        found = set()
        for user in self.likers.get((version.table, version.record_id), ()):
            link = LIKES[version.table], f"{version.record_id}|{user}"
            before = [one for one in self.rows[link] if (one.commit, one.order) <= place]
            if before and before[-1].action == "create":
                found.add(user)
        return frozenset(found)

    def is_untouched_since(self, version: Version, commit: int) -> bool:
        """Return whether neither the record nor its likes were written after a version."""
        place = version.commit, version.order
        keys = [(version.table, version.record_id)] + [
            (LIKES[version.table], f"{version.record_id}|{user}")
            for user in self.likers.get((version.table, version.record_id), ())
        ]
        return not any(
            place < (one.commit, one.order) and one.commit <= commit
            for key in keys
            for one in self.rows[key]
        )

    def row(self, table: str, record_id: str, commit: int, without: int = 0) -> Values | None:
        """Return the row as it was at a commit; None if there was none."""
        found = self.version(table, record_id, commit, without)
        return None if found is None or found.action in ("delete", "truncate") else found.values

    def at(self, commit: int, without: int = 0) -> State:
        """Return the tables as they were right after a commit."""
        key = commit, without
        if key not in self._states:
            self._states[key] = State(self, commit, without)
        return self._states[key]

    def caller_at(self, person: Person, commit: int) -> CallerState:
        """Return the user's identity at a commit."""
        if person == ROOT:
            return CallerState(ROOT, "", is_superuser=True)
        row = self.row("users", person, commit) if person else None
        return CallerState() if row is None else CallerState(person, row["role"])

    def callers_between(self, person: Person, first: int, last: int) -> set[CallerState]:
        """Return every identity that the user had from one commit to another.

        A commit that changes the user does so at one of its changes, and may do so more than once.
        """
        start = first - 1 if self.is_touched("users", person, first) else first
        callers = {self.caller_at(person, commit) for commit in range(start, last + 1)}
        if person and person != ROOT:
            callers.update(
                CallerState() if one.action == "delete" else CallerState(person, one.values["role"])
                for one in self.rows.get(("users", person), ())
                if first <= one.commit <= last
            )
        return callers

    def columns_in_wal(self, table: str, action: Action, changed: Iterable[str]) -> frozenset[str]:
        """Return the columns that the stream brings of a change.

        Args:
            table: The table.
            action: What is done.
            changed: What an update sets.
        """
        scene, columns = self.scene, COLUMNS.get(table, frozenset())
        identity = scene.identity(table)
        known = columns - (_GENERATED if scene.plugin == "pgoutput" else frozenset())
        if action == "delete":
            return known if identity == "full" else _KEYS[identity]
        if action == "update" and identity != "full":
            return known - (_TOASTED - frozenset(changed))
        return known


COLUMNS: Mapping[str, frozenset[str]] = {
    "users": frozenset(["id", "mark", "name", "email", "emailVisibility", "role", "shown", "bio"]),
    "teams": frozenset(["id", "mark", "open"]),
    "members": frozenset(["id", "mark", "team", "usr"]),
    "fence": frozenset(["id"]),
    **dict.fromkeys(
        DOCS,
        frozenset(
            [
                "id",
                "kind",
                "mark",
                "owner",
                "public",
                "team",
                "title",
                "body",
                "extra",
                "note",
                "n",
                "gen",
                "is_open",
            ]
        ),
    ),
}


@dataclass(slots=True)
class State:
    """The tables at one moment, as rules read them."""

    ledger: Ledger
    commit: int
    without: int

    def is_member(self, team: str, user: str) -> bool:
        """Whether the user is a member of the team."""
        is_team = self.ledger.row("teams", team, self.commit, self.without) is not None
        record_id = f"{team}-{user}"
        return (
            is_team and self.ledger.row("members", record_id, self.commit, self.without) is not None
        )

    def is_open(self, team: str) -> bool:
        """Whether the team exists and is open."""
        row = self.ledger.row("teams", team, self.commit, self.without)
        return row is not None and bool(row["open"])

    def likes(self, docs: str, record_id: str) -> frozenset[str]:
        """Return the users that like the record."""
        return frozenset(
            user
            for user in self.ledger.likers.get((docs, record_id), ())
            if self.ledger.row(LIKES[docs], f"{record_id}|{user}", self.commit, self.without)
            is not None
        )

    def is_there(self, user: str) -> bool:
        """Whether the user exists."""
        return self.ledger.row("users", user, self.commit, self.without) is not None


Condition: TypeAlias = Callable[[str, Values, CallerState, State], bool]


@lru_cache(maxsize=64)
def condition(table: str, rule: Rule | None, filter_: Rule | None) -> Condition:
    """Return the condition for a user to receive an event of the table."""

    def holds(docs: str, row: Values, caller: CallerState, at: State) -> bool:
        if filter_ is not None and not filter_.admits(docs, row, caller, at):
            return False
        if caller.is_superuser:
            return True
        if table == "users":
            return sees_user(row, caller)
        if table == "teams":
            return bool(row["open"])
        return table == "fence" or (rule is not None and rule.admits(docs, row, caller, at))

    return holds


def outcomes(
    ledger: Ledger, holds: Condition, version: Version, person: Person, last: int
) -> set[bool]:
    """Return all verdicts that a version may get from its commit to another.

    The row is evaluated as that version left it (before its delete, if it is one); the caller and
    related rows as of the commit or of any later moment.
    """
    callers = ledger.callers_between(person, version.commit, max(last, version.commit))
    return {
        holds(version.table, version.values, caller, at)
        for at in moments(ledger, version, last)
        for caller in callers
    }


def moments(ledger: Ledger, version: Version, last: int) -> Iterator[State]:
    """Yield the moments at which rows related to a version may be read."""
    if version.action != "delete":
        for commit in range(version.commit, max(last, version.commit) + 1):
            yield ledger.at(commit)
        return
    # The state before the transaction: its own changes don't count.
    yield ledger.at(version.commit - 1)
    for commit in range(version.commit, max(last, version.commit) + 1):
        yield ledger.at(commit, version.commit)
