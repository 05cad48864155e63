"""Compiles the option ``expand`` and who may see what it leads to (protocol, 5.6).

``expand.load`` and ``expand.batch`` load the records that a plan leads to. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias
from weakref import WeakValueDictionary

from pgrealtime.auth.principal import AuthRecord, Superuser
from pgrealtime.caches import WeightedCache
from pgrealtime.changelog.row_history import LookupColumn
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections, Field
from pgrealtime.config.model import HiddenFieldsMode
from pgrealtime.errors import RuleError
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.language.predicate import DenyAll
from pgrealtime.rules.language.request import RuleRequest

_BACK_RELATION = re.compile(r"(\w+)_via_(\w+)|(\w+)\((\w+)\)", re.ASCII)
"""``posts_via_author``, or in PocketBase's older spelling ``posts(author)``."""
_MAX_PLAN_CHARACTERS = 256 * 1024
"""Length together of the option texts whose plans are cached: a URL may have one of 32 KB, which
takes a hundred times as much once compiled."""
_MIN_PLAN_CHARACTERS = 64
"""As so many a shorter text counts."""
MAX_EXPAND_DEPTH: Final = 6

ExpandNames: TypeAlias = tuple[str, ...]
"""Names of relations, from the record outwards."""

RelationKey: TypeAlias = tuple[str, str, bool]
"""A relation in one of its directions: collection that has the field, field, whether backward."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RelationHop:
    """The step from one collection's records to those that a relation leads to."""

    name: str
    """As the client wrote it: the field, or ``COLLECTION_via_FIELD``."""
    field: Field
    owner: Collection
    """Has the field: the source of a forward hop, the target of a back relation."""
    source: Collection
    target: Collection
    is_back: bool = False

    @property
    def relation_key(self) -> RelationKey:
        """The relation, the same under each name that clients may give it."""
        return self.owner.name, self.field.name, self.is_back

    @property
    def is_in_row(self) -> bool:
        """Whether the source's row holds the ids."""
        return not self.is_back and self.field.column is not None

    @property
    def is_list(self) -> bool:
        """Whether it is shown as a list, even of one record."""
        column = self.field.column
        if self.is_back:
            return column is None or (column.name,) not in self.owner.table.unique_keys
        return self.field.is_multiple


@dataclass(frozen=True, slots=True, eq=False)
class ExpandBranch:
    """A hop that a plan takes, and the hops from the records that it leads to."""

    hop: RelationHop
    branches: Mapping[str, ExpandBranch]


@dataclass(frozen=True, slots=True, eq=False)
class ExpandPath:
    """One path of the option, as far as its names are relations."""

    hops: tuple[RelationHop, ...]
    has_unknown_name: bool
    """Whether a name follows that is no relation. Where a record is reached that would have it, the
    whole path adds nothing."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ExpandPlan:
    """The compiled option ``expand`` of a collection."""

    paths: tuple[ExpandPath, ...]
    branches: Mapping[str, ExpandBranch]
    targets: tuple[Collection, ...]
    depends_on_caller: bool = False
    """Whether a rule of a related collection names the caller. Such a rule need not bind a value of
    the caller's: a guest is denied at once."""
    lookup_columns: frozenset[LookupColumn] = frozenset()
    """The tables that the related records are read from, for ``RowHistory``."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class ExpandViewer:
    """What a subscriber may see of related records; equal subscribers share one object.

    Compared by identity, because records are loaded and rendered once per viewer.
    """

    plan: ExpandPlan
    sees_hidden: bool
    own_record: tuple[str, str] | None
    """Collection and id of the subscriber's record, if it can be among the related ones."""
    view_predicates: Mapping[str, BoundPredicate | None]
    """By collection, the predicate of the records that are seen; None if none are. A collection
    that is missing may not even be queried: it is locked, or its rule can't be used."""
    manage_predicates: Mapping[str, BoundPredicate]
    """By auth collection, the predicate of records whose e-mail address is seen in any case."""


JunctionHops: TypeAlias = Mapping[str, Sequence[RelationHop]]
"""By collection name, its relations through junction tables."""


class ExpandCompiler:
    """Compiles the option for subscribers; equal ones get the same viewer while it is in use.

    ``hidden`` says whether clients may expand a hidden relation.
    """

    def __init__(
        self,
        collections: Collections,
        compiler: RuleCompiler,
        *,
        hidden: HiddenFieldsMode = "strict",
    ) -> None:
        self._collections = collections
        self._compiler = compiler
        self._is_strict = hidden == "strict"
        self._plans: WeightedCache[tuple[str, str, bool], ExpandPlan | None] = WeightedCache(
            _MAX_PLAN_CHARACTERS
        )
        self._viewers: WeakValueDictionary[object, ExpandViewer] = WeakValueDictionary()

    def compile_expand(
        self, collection: Collection, request: RuleRequest, own_row: Row | None = None
    ) -> ExpandViewer | None:
        """Return what a subscriber sees of related records; None if it expands none.

        ``own_row`` has columns of the subscriber's row, as for ``RuleCompiler.bind_caller``.
        """
        is_superuser = isinstance(request.principal, Superuser)
        follows_hidden = is_superuser or not self._is_strict
        plan = self._cached_plan(collection.name, request.query.get("expand", ""), follows_hidden)
        if plan is None:
            return None
        rule_request = replace(request, context="expand")
        view: dict[str, BoundPredicate | None] = {}
        manage: dict[str, BoundPredicate] = {}
        for target in plan.targets:
            bound = self._try_bind(target, target.view_rule, rule_request, own_row)
            if isinstance(bound, BoundPredicate):
                view[target.name] = bound
            elif bound is not None and not bound.reason:
                view[target.name] = None
            if target.type == "auth" and target.manage_rule is not None and not is_superuser:
                manager = self._try_bind(target, target.manage_rule, rule_request, own_row)
                if isinstance(manager, BoundPredicate):
                    manage[target.name] = manager
        own_record = None
        match request.principal:
            case AuthRecord(collection_name=name, id=record_id) if name in view:
                own_record = name, record_id
        key = (plan, is_superuser, own_record, tuple(view.items()), tuple(manage.items()))
        viewer = self._viewers.get(key)
        if viewer is None:
            viewer = self._viewers[key] = ExpandViewer(
                plan=plan,
                sees_hidden=is_superuser,
                own_record=own_record,
                view_predicates=view,
                manage_predicates=manage,
            )
        return viewer

    def _try_bind(
        self, target: Collection, rule: str | None, request: RuleRequest, own_row: Row | None
    ) -> BoundPredicate | DenyAll | None:
        """Return a related collection's rule for the subscriber; None if it can't be used.

        A ``DenyAll`` without a reason is a rule that is false for every record.
        """
        try:
            # The client's filter is about the topic's own records.
            return self._compiler.bind_caller(target, rule, request, own_row, is_filtered=False)
        except RuleError:
            return None

    def _cached_plan(
        self,
        collection_name: str,
        expand_option: str,
        follows_hidden: bool,  # noqa: FBT001 (cached)
    ) -> ExpandPlan | None:
        def make() -> tuple[ExpandPlan | None, int]:
            plan = self._compile_plan(collection_name, expand_option, follows_hidden=follows_hidden)
            return plan, max(len(expand_option), _MIN_PLAN_CHARACTERS)

        return self._plans.get((collection_name, expand_option, follows_hidden), make)

    def _compile_plan(
        self, collection_name: str, expand_option: str, *, follows_hidden: bool
    ) -> ExpandPlan | None:
        collection = self._collections[collection_name]
        resolved = [
            self._resolve_path(collection, names, follows_hidden=follows_hidden)
            for names in parse_expand(expand_option)
        ]
        # A path whose first name is no relation adds nothing to any record.
        if not (paths := tuple(path for path in resolved if path.hops)):
            return None
        hops = [hop for path in paths for hop in path.hops]
        targets = tuple({hop.target.name: hop.target for hop in hops}.values())
        rules = (rule for target in targets for rule in (target.view_rule, target.manage_rule))
        sources = (*targets, *(hop.owner for hop in hops))
        return ExpandPlan(
            paths=paths,
            branches=merge_paths([path.hops for path in paths]),
            targets=targets,
            depends_on_caller=any("@request.auth" in (rule or "") for rule in rules),
            lookup_columns=frozenset(c for source in sources for c in _lookup_columns(source)),
        )

    def _resolve_path(
        self, collection: Collection, names: ExpandNames, *, follows_hidden: bool
    ) -> ExpandPath:
        hops: list[RelationHop] = []
        for name in names:
            hop = self._resolve_hop(collection, name)
            if hop is None or (hop.field.is_hidden and not follows_hidden):
                return ExpandPath(tuple(hops), has_unknown_name=True)
            hops.append(hop)
            collection = hop.target
        return ExpandPath(tuple(hops), has_unknown_name=False)

    def _resolve_hop(self, source: Collection, name: str) -> RelationHop | None:
        if back := _BACK_RELATION.fullmatch(name):
            of, field_name = back[1] or back[3], back[2] or back[4]
            owner = self._collections.find_ignoring_case(of)
            field = None if owner is None else owner.fields_by_name.get(field_name)
            if owner is None or field is None or field.relation is None:
                return None
            if field.relation.collection_name != source.name:
                return None
            return RelationHop(
                name=name, field=field, owner=owner, source=source, target=owner, is_back=True
            )
        field = source.fields_by_name.get(name)
        return None if field is None else _forward_hop(self._collections, source, field)


def _forward_hop(collections: Collections, source: Collection, field: Field) -> RelationHop | None:
    if field.relation is None:
        return None
    target = collections[field.relation.collection_name]
    return RelationHop(name=field.name, field=field, owner=source, source=source, target=target)


def junction_hops(collections: Collections, collection: Collection) -> tuple[RelationHop, ...]:
    """Return the collection's relations through junction tables."""
    hops = (_forward_hop(collections, collection, field) for field in collection.fields)
    return tuple(hop for hop in hops if hop is not None and not hop.is_in_row)


def _lookup_columns(collection: Collection) -> Iterator[LookupColumn]:
    """Yield the collection's table and the junction tables of its relations."""
    yield collection.id_lookup_column
    for field in collection.fields:
        junction = None if field.relation is None else field.relation.junction
        if junction is not None:
            yield junction.table.name, junction.source_column


def merge_paths(paths: Iterable[Sequence[RelationHop]]) -> Mapping[str, ExpandBranch]:
    """Return paths as a tree: by the name of the first hop, that hop and what follows it."""
    by_first: dict[str, list[Sequence[RelationHop]]] = {}
    for hops in paths:
        if hops:
            by_first.setdefault(hops[0].name, []).append(hops)
    return {
        name: ExpandBranch(rest[0][0], merge_paths(hops[1:] for hops in rest))
        for name, rest in by_first.items()
    }


def parse_expand(text: str) -> tuple[ExpandNames, ...]:
    """Return the paths of the option, without those that are the beginning of another.

    Spaces are ignored everywhere, dots at both ends of a path. Paths are cut after six names.
    As observed with PocketBase 0.40.6, a path with a name that isn't a relation adds nothing, not
    even its valid beginning: ``author.zzz`` and ``author.zzz,author`` leave a record without
    ``expand``, while ``author.zzz,author.team`` is ``author.team``. So whole paths are returned.
    """
    items = (item.strip(".") for item in text.replace(" ", "").split(","))
    paths = dict.fromkeys(tuple(item.split(".")[:MAX_EXPAND_DEPTH]) for item in items if item)
    beginnings = {path[:length] for path in paths for length in range(1, len(path))}
    return tuple(path for path in paths if path not in beginnings)
