"""Rules that fit what tables have, to begin with: whose a row is, and who shares it. Pure."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pgrealtime.collections.model import Collection, Collections, Field, FieldKind
from pgrealtime.errors import RuleError
from pgrealtime.rules.sql.reference import validate

SIGNED_IN = '@request.auth.id != ""'
"""Whoever is no guest: guests' ids are empty."""

_HANDLERS = {
    *("updated", "modified", "changed", "edited", "deleted", "approved", "reviewed", "verified"),
    *("invited", "banned", "cancelled", "canceled", "rejected", "resolved", "closed", "locked"),
}
"""Words of columns that name somebody who did something to a row without owning it."""

_SHARING = {
    *("member", "members", "memberships", "membership", "participant", "participants", "users"),
    *("collaborator", "collaborators", "user", "assignee", "assignees", "viewers", "editors"),
    *("access", "permissions", "shares", "people", "attendees", "students", "guests"),
}
"""Words of tables whose rows let people in."""

_PUBLIC = ("published", "is_published", "public", "is_public", "isPublished", "isPublic")
_OWNERS = (
    *("user_id", "userId", "user", "owner_id", "ownerId", "owner", "author_id", "authorId"),
    *("author", "account_id", "accountId", "customer_id", "customerId", "created_by", "createdBy"),
)
"""Columns that name people also where no foreign key says so."""

_FARTHEST = 3
"""Relations that are followed to somebody."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_SAYABLE = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
"""Fields that rules can begin with."""


def words(name: str) -> list[str]:
    """Return the words of a name in snake or camel case, in lower case."""
    return [word.lower() for word in _WORD.findall(name)]


@dataclass(frozen=True, slots=True)
class _Way:
    """A path from a row to the person it belongs to."""

    path: str
    auth: str
    """The person's collection."""
    is_certain: bool = False
    """Whether there always is somebody: otherwise guests, whose id is empty, would match."""
    is_any: bool = False
    """Whether it leads to several."""

    def after(self, step: Field) -> _Way:
        """The same, of a row that points to the one it begins at."""
        is_certain = self.is_certain and step.column is not None and step.column.not_null
        return _Way(f"{step.name}.{self.path}", self.auth, is_certain, self.is_any)

    def __str__(self) -> str:
        return f"{self.path} {'?=' if self.is_any else '='} @request.auth.id"


@dataclass(frozen=True, slots=True)
class Suggestions:
    """What suits the collections as they are, all of them together."""

    collections: Collections
    _doors: Mapping[str, list[tuple[Collection, Field]]] = field(init=False)
    """By collection: those whose rows let people in to it, and the relation by which they do."""

    def __post_init__(self) -> None:
        doors = defaultdict(list)
        for other in self.collections.values():
            if other.type != "auth" and not _SHARING.isdisjoint(words(other.name)):
                for one in other.fields:
                    if one.relation is not None and _is_one(one):
                        doors[one.relation.collection].append((other, one))
        object.__setattr__(self, "_doors", doors)

    def rule(self, name: str) -> str:
        """Return a rule that can be used; who is signed in, if nothing tells more."""
        collection = self.collections[name]
        rule = self._rule(collection)
        try:
            validate(self.collections, collection, rule)
        except RuleError:
            return SIGNED_IN
        return rule

    def _rule(self, collection: Collection) -> str:
        ways = self._ways(collection)
        public = _public(collection)
        if not ways:
            return f"{public} = true" if public else SIGNED_IN
        mine = " || ".join(map(str, ways))
        guard = self._guard(ways)
        if guard:
            mine = f"{guard} && {_bracketed(mine) if len(ways) > 1 else mine}"
        if public:
            return f"{public} = true || {_bracketed(mine) if guard else mine}"
        return mine

    def _guard(self, ways: Sequence[_Way]) -> str:
        """Return what keeps out those who would match for want of an id, or by another's."""
        if sum(one.type == "auth" for one in self.collections.values()) > 1:
            return f'@request.auth.collectionName = "{ways[0].auth}"'
        return "" if all(way.is_certain for way in ways) else SIGNED_IN

    def _ways(self, collection: Collection) -> list[_Way]:
        """Return the shortest ways to people, all to those of one collection."""
        found = self._far_ways(collection)
        return [way for way in found if way.auth == found[0].auth]

    def _far_ways(self, collection: Collection) -> list[_Way]:
        reached = {collection.name}
        at: list[tuple[Collection, tuple[Field, ...]]] = [(collection, ())]
        for _ in range(_FARTHEST):
            for here, steps in at:
                ways = list(self._near_ways(here))
                for step in reversed(steps):
                    ways = [way.after(step) for way in ways]
                if ways:
                    return ways
            further = [(self._parents(here), steps) for here, steps in at]
            at = []
            for parents, steps in further:
                for step, parent in parents:
                    if parent.name not in reached:
                        reached.add(parent.name)
                        at.append((parent, (*steps, step)))
        return []

    def _parents(self, collection: Collection) -> list[tuple[Field, Collection]]:
        """Return what the rows point to; what they always do first."""
        parents = [
            (one, self.collections[one.relation.collection])
            for one in collection.fields
            if one.relation is not None and _is_one(one)
        ]
        return sorted(parents, key=lambda found: not (found[0].column and found[0].column.not_null))

    def _near_ways(self, collection: Collection) -> Iterator[_Way]:
        """Yield who the row is, or owns it, or shares it."""
        if collection.type == "auth":
            yield _Way("id", collection.name, is_certain=True)
            return
        yield from self._as_key(collection)
        yield from self._owners(collection)
        yield from self._shared(collection)
        yield from self._through_rows(collection)

    def _as_key(self, collection: Collection) -> Iterator[_Way]:
        """Yield the key itself where it is somebody's: a profile, settings."""
        for key in collection.table.foreign_keys:
            other = self.collections.of_table(key.target)
            if other is None or key.columns != (collection.key.name,) or other.type != "auth":
                continue
            if key.target_columns == (other.key.name,):
                yield _Way("id", other.name, is_certain=True)

    def _owners(self, collection: Collection) -> list[_Way]:
        people = [
            one
            for one in collection.fields
            if one.relation is not None
            and _is_one(one)
            and self.collections[one.relation.collection].type == "auth"
        ]
        owners = [one for one in people if _HANDLERS.isdisjoint(words(one.name))]
        return [
            _Way(
                one.name,
                one.relation.collection,
                is_certain=one.column is not None and one.column.not_null,
            )
            for one in owners or people
            if one.relation is not None
        ]

    def _shared(self, collection: Collection) -> Iterator[_Way]:
        """Yield the people that a table of pairs lets in."""
        for one in collection.fields:
            if one.relation is None or one.relation.junction is None:
                continue
            is_shared = not _SHARING.isdisjoint(words(one.name)) and _SAYABLE.fullmatch(one.name)
            if is_shared and self.collections[one.relation.collection].type == "auth":
                yield _Way(one.name, one.relation.collection, is_any=True)

    def _through_rows(self, collection: Collection) -> Iterator[_Way]:
        """Yield who is named in rows that let people in, such as memberships."""
        for other, one in self._doors.get(collection.name, ()):
            for way in self._owners(other):
                path = f"{other.name}_via_{one.name}.{way.path}"
                yield _Way(path, way.auth, is_any=True)

    def guesses(self) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yield collection, field and the people it seems to name, where no foreign key does.

        Only where nothing else tells whose the rows are.
        """
        auths = [one for one in self.collections.values() if one.type == "auth"]
        for collection in self.collections.values() if auths else ():
            if self._ways(collection):
                continue
            by_column = {one.column.name: one for one in collection.fields if one.column}
            for name in _OWNERS:
                one = by_column.get(name)
                if one and _is_plain(one) and one.type.base == auths[0].key.type.base:
                    yield collection.name, (one.name, auths[0].name)
                    break


def _is_one(one: Field) -> bool:
    """Whether it leads to one record, and rules can say so."""
    is_sayable = _SAYABLE.fullmatch(one.name) is not None
    return one.relation is not None and one.column is not None and is_sayable


def _is_plain(one: Field) -> bool:
    is_id = one.kind in (FieldKind.TEXT, FieldKind.NUMBER) and not one.is_multiple
    return is_id and one.name != "id" and _SAYABLE.fullmatch(one.name) is not None


def _public(collection: Collection) -> str:
    """Return the field that says that everybody may see the row; empty if there is none."""
    flags = {
        one.name
        for one in collection.fields
        if one.kind is FieldKind.BOOL and not one.is_multiple and collection.type != "auth"
    }
    return next((name for name in _PUBLIC if name in flags), "")


def _bracketed(text: str) -> str:
    return f"({text})"
