"""Suggests a rule for each collection from its relations: who owns a row, and who shares it.

Pure; called by ``drafts``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pgrealtime.collections.model import Collection, Collections, Field, FieldKind
from pgrealtime.errors import RuleError
from pgrealtime.rules.sql.reference import check_rule

SIGNED_IN_RULE = '@request.auth.id != ""'
"""True for everyone but guests, whose id is empty."""

_ACTOR_WORDS = {
    *("updated", "modified", "changed", "edited", "deleted", "approved", "reviewed", "verified"),
    *("invited", "banned", "cancelled", "canceled", "rejected", "resolved", "closed", "locked"),
}
"""Words in names of columns that refer to an account which acted on a row without owning it."""

_SHARING_WORDS = {
    *("member", "members", "memberships", "membership", "participant", "participants", "users"),
    *("collaborator", "collaborators", "user", "assignee", "assignees", "viewers", "editors"),
    *("access", "permissions", "shares", "people", "attendees", "students", "guests"),
}
"""Words in names of tables whose rows give accounts access."""

_PUBLIC_FIELDS = ("published", "is_published", "public", "is_public", "isPublished", "isPublic")
_OWNER_COLUMNS = (
    *("user_id", "userId", "user", "owner_id", "ownerId", "owner", "author_id", "authorId"),
    *("author", "account_id", "accountId", "customer_id", "customerId", "created_by", "createdBy"),
)
"""Columns that refer to accounts even without a foreign key."""

_MAX_RELATION_STEPS = 3
"""Relations followed from a row to an account."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_RULE_FIELD_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
"""Field names that a rule's path can begin with."""


def split_words(name: str) -> list[str]:
    """Return the words of a name in snake or camel case, in lower case."""
    return [word.lower() for word in _WORD.findall(name)]


@dataclass(frozen=True, slots=True)
class _OwnerPath:
    """A path from a row to the account that owns it."""

    path: str
    auth_collection: str
    """The account's collection."""
    is_never_empty: bool = False
    """Whether there is always an account; otherwise guests, whose id is empty, would match."""
    is_multiple: bool = False
    """Whether it leads to several accounts."""

    def via_relation(self, relation: Field) -> _OwnerPath:
        """Return the path from a row whose relation leads to the row where this path begins."""
        is_filled = relation.column is not None and relation.column.not_null
        path = f"{relation.name}.{self.path}"
        return replace(self, path=path, is_never_empty=self.is_never_empty and is_filled)

    def __str__(self) -> str:
        return f"{self.path} {'?=' if self.is_multiple else '='} @request.auth.id"


@dataclass(frozen=True, slots=True)
class RuleSuggestions:
    """Suggestions for collections, which may refer to each other."""

    collections: Collections
    _sharing_collections: Mapping[str, list[tuple[Collection, Field]]] = field(init=False)
    """Collection -> collections whose rows give access to it, with their relation to it."""

    def __post_init__(self) -> None:
        sharing = defaultdict(list)
        for other in self.collections.values():
            if other.type != "auth" and not _SHARING_WORDS.isdisjoint(split_words(other.name)):
                for field_, target in _single_relations(other):
                    sharing[target].append((other, field_))
        object.__setattr__(self, "_sharing_collections", sharing)

    def suggest_rule(self, name: str) -> str:
        """Return a valid rule; ``SIGNED_IN_RULE`` if nothing better is found."""
        collection = self.collections[name]
        rule = self._build_rule(collection)
        try:
            check_rule(self.collections, collection, rule)
        except RuleError:
            return SIGNED_IN_RULE
        return rule

    def _build_rule(self, collection: Collection) -> str:
        paths = self._owner_paths(collection)
        public = _public_field(collection)
        if not paths:
            return f"{public} = true" if public else SIGNED_IN_RULE
        owned = " || ".join(map(str, paths))
        guard = self._guard(paths)
        if guard:
            owned = f"{guard} && ({owned})" if len(paths) > 1 else f"{guard} && {owned}"
        if public:
            return f"{public} = true || ({owned})" if guard else f"{public} = true || {owned}"
        return owned

    def _guard(self, owner_paths: Sequence[_OwnerPath]) -> str:
        """Return the condition that excludes guests, and accounts of other auth collections."""
        if sum(collection.type == "auth" for collection in self.collections.values()) > 1:
            return f'@request.auth.collectionName = "{owner_paths[0].auth_collection}"'
        return "" if all(path.is_never_empty for path in owner_paths) else SIGNED_IN_RULE

    def _owner_paths(self, collection: Collection) -> list[_OwnerPath]:
        """Return the shortest paths to accounts, all of one auth collection."""
        paths = self._nearest_owner_paths(collection)
        return [path for path in paths if path.auth_collection == paths[0].auth_collection]

    def _nearest_owner_paths(self, collection: Collection) -> list[_OwnerPath]:
        visited = {collection.name}
        frontier: list[tuple[Collection, tuple[Field, ...]]] = [(collection, ())]
        for _ in range(_MAX_RELATION_STEPS):
            for current, steps in frontier:
                paths = list(self._direct_owner_paths(current))
                for step in reversed(steps):
                    paths = [path.via_relation(step) for path in paths]
                if paths:
                    return paths
            next_frontier = [(self._parents(current), steps) for current, steps in frontier]
            frontier = []
            for parents, steps in next_frontier:
                for step, parent in parents:
                    if parent.name not in visited:
                        visited.add(parent.name)
                        frontier.append((parent, (*steps, step)))
        return []

    def _parents(self, collection: Collection) -> list[tuple[Field, Collection]]:
        """Return the collections that rows refer to, those of NOT NULL columns first."""
        relations = _single_relations(collection)
        parents = [(field_, self.collections[target]) for field_, target in relations]
        return sorted(parents, key=lambda p: not (p[0].column and p[0].column.not_null))

    def _direct_owner_paths(self, collection: Collection) -> Iterator[_OwnerPath]:
        """Yield the paths to the account itself, to owners, and to those the row is shared with."""
        if collection.type == "auth":
            yield _OwnerPath("id", collection.name, is_never_empty=True)
            return
        yield from self._key_owner_paths(collection)
        yield from self._field_owner_paths(collection)
        yield from self._junction_owner_paths(collection)
        yield from self._membership_owner_paths(collection)

    def _key_owner_paths(self, collection: Collection) -> Iterator[_OwnerPath]:
        """Yield the key itself if it is also an account's, as of profiles and settings."""
        for key in collection.table.foreign_keys:
            other = self.collections.find_by_table(key.target)
            if other is None or key.column_names != (collection.key.name,) or other.type != "auth":
                continue
            if key.target_column_names == (other.key.name,):
                yield _OwnerPath("id", other.name, is_never_empty=True)

    def _field_owner_paths(self, collection: Collection) -> list[_OwnerPath]:
        paths = [
            _OwnerPath(f.name, target, is_never_empty=f.column is not None and f.column.not_null)
            for f, target in _single_relations(collection)
            if self.collections[target].type == "auth"
        ]
        return [p for p in paths if _ACTOR_WORDS.isdisjoint(split_words(p.path))] or paths

    def _junction_owner_paths(self, collection: Collection) -> Iterator[_OwnerPath]:
        """Yield the accounts that a junction table gives access."""
        for field_ in collection.fields:
            if field_.relation is None or field_.relation.junction is None:
                continue
            name, target = field_.name, field_.relation.collection_name
            is_shared = not _SHARING_WORDS.isdisjoint(split_words(name))
            is_usable = _RULE_FIELD_PATTERN.fullmatch(name) is not None
            if is_shared and is_usable and self.collections[target].type == "auth":
                yield _OwnerPath(name, target, is_multiple=True)

    def _membership_owner_paths(self, collection: Collection) -> Iterator[_OwnerPath]:
        """Yield the accounts in rows of other collections that give access, such as memberships."""
        for other, field_ in self._sharing_collections.get(collection.name, ()):
            for owner in self._field_owner_paths(other):
                path = f"{other.name}_via_{field_.name}.{owner.path}"
                yield _OwnerPath(path, owner.auth_collection, is_multiple=True)

    def guess_owner_fields(self) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yield collection, (field, auth collection) where a field seems to refer to accounts.

        Only for collections without any path to their owners.
        """
        auths = [c for c in self.collections.values() if c.type == "auth"]
        for collection in self.collections.values() if auths else ():
            if self._owner_paths(collection):
                continue
            by_column = {f.column.name: f for f in collection.fields if f.column}
            for name in _OWNER_COLUMNS:
                field_ = by_column.get(name)
                if field_ and _may_hold_id(field_) and field_.type.base == auths[0].key.type.base:
                    yield collection.name, (field_.name, auths[0].name)
                    break


def _single_relations(collection: Collection) -> Iterator[tuple[Field, str]]:
    """Yield the relations to one record, under names that rules can use, with their targets."""
    for field_ in collection.fields:
        # A key that is a relation is suggested as the id.
        is_key = field_.column == collection.key
        if (
            field_.relation
            and field_.column
            and not is_key
            and _RULE_FIELD_PATTERN.fullmatch(field_.name)
        ):
            yield field_, field_.relation.collection_name


def _may_hold_id(field_: Field) -> bool:
    is_id = field_.kind in (FieldKind.TEXT, FieldKind.NUMBER) and not field_.is_multiple
    return is_id and field_.name != "id" and _RULE_FIELD_PATTERN.fullmatch(field_.name) is not None


def _public_field(collection: Collection) -> str:
    """Return the name of the field that makes a row public; empty if there is none."""
    flags = {
        field_.name
        for field_ in collection.fields
        if field_.kind is FieldKind.BOOL and not field_.is_multiple and collection.type != "auth"
    }
    return next((name for name in _PUBLIC_FIELDS if name in flags), "")
