"""What subscriptions want to see of related records, and how it is put together (protocol, 5.6).

Between the option's text (``records.expand``) and who fetches the records (``hub.expand``). Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias
from weakref import WeakValueDictionary

from pgrealtime.auth.principal import AuthRecord, Superuser
from pgrealtime.changelog.row_history import LookupColumn
from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, Collections, Field
from pgrealtime.config.model import HiddenFieldsMode
from pgrealtime.errors import RuleError
from pgrealtime.protocol.expand_option import ExpandNames, parse_expand
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.language.predicate import DenyAll
from pgrealtime.rules.language.request import RuleRequest

_BACK_RELATION = re.compile(r"(\w+)_via_(\w+)", re.ASCII)
_MAX_PLANS = 4096

RelationKey: TypeAlias = tuple[str, str, bool]
"""A relation in one of its directions: collection that has the field, field, whether backwards."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RelationHop:
    """From the records of one collection to those that a relation leads to."""

    name: str
    """As the client wrote it: the field, or ``COLLECTION_via_FIELD``."""
    field: Field
    owner: Collection
    """Whose field it is: of the way there the source, of the way back the target."""
    source: Collection
    target: Collection
    is_back: bool = False

    @property
    def relation_key(self) -> RelationKey:
        """What is the same whoever asks."""
        return self.owner.name, self.field.name, self.is_back

    @property
    def is_in_row(self) -> bool:
        """Whether the source's row holds the ids."""
        return not self.is_back and self.field.column is not None

    @property
    def is_list(self) -> bool:
        """Whether it is shown as a list, even of one."""
        column = self.field.column
        if self.is_back:
            return column is None or (column.name,) not in self.owner.table.unique_keys
        return self.field.is_multiple


@dataclass(frozen=True, slots=True, eq=False)
class ExpandBranch:
    """A step that somebody wants, with those from the records it leads to."""

    hop: RelationHop
    branches: Mapping[str, ExpandBranch]


@dataclass(frozen=True, slots=True, eq=False)
class ExpandPath:
    """A path that was asked for, as far as there are relations of these names."""

    hops: tuple[RelationHop, ...]
    has_unknown_name: bool
    """Another name follows, which nothing answers to: where a record is reached that it would be
    looked for in, the whole path adds nothing."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ExpandPlan:
    """The option ``expand`` of a collection."""

    paths: tuple[ExpandPath, ...]
    branches: Mapping[str, ExpandBranch]
    """All routes together."""
    targets: tuple[Collection, ...]
    depends_on_caller: bool = False
    """Whether a rule of a related collection asks who the subscriber is.

    It may do so without a value of the caller's being bound: a guest is denied at once.
    """
    lookup_columns: frozenset[LookupColumn] = frozenset()
    """The tables that the related records are read from."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class ExpandViewer:
    """Subscriptions that see the same related records in the same way; compared by identity."""

    plan: ExpandPlan
    sees_hidden: bool
    own_record: tuple[str, str] | None
    """Collection and id of the viewer's record, if it can be among the related ones."""
    view_predicates: Mapping[str, BoundPredicate | None]
    """By collection, which records are seen, None being none. Those that aren't here may not even
    be looked at: they are locked, or their rule can't be asked."""
    manage_predicates: Mapping[str, BoundPredicate]
    """By auth collection, of which records an address is seen that isn't public."""


class ExpandCompiler:
    """Compiles who sees what; who sees the same is the same viewer, as long as it is kept.

    Args:
        collections: All there are.
        compiler: Compiles rules.
        hidden: Who may expand a hidden relation.
        max_plans: Texts of ``expand`` that are kept.
    """

    def __init__(
        self,
        collections: Collections,
        compiler: RuleCompiler,
        *,
        hidden: HiddenFieldsMode = "strict",
        max_plans: int = _MAX_PLANS,
    ) -> None:
        self._collections = collections
        self._compiler = compiler
        self._is_strict = hidden == "strict"
        self._by_folded_name = {name.casefold(): one for name, one in collections.items()}
        self._cached_plan = lru_cache(maxsize=max_plans)(self._compile_plan)
        self._viewers: WeakValueDictionary[object, ExpandViewer] = WeakValueDictionary()

    def compile_expand(
        self, collection: Collection, request: RuleRequest, own_row: Row | None = None
    ) -> ExpandViewer | None:
        """Return who the subscriber is to related records; None if it wants none.

        Args:
            collection: That the topic is about.
            request: The subscriber.
            own_row: Columns of its own row, as ``RuleCompiler.bind`` has them.
        """
        is_superuser = isinstance(request.principal, Superuser)
        follows_hidden = is_superuser or not self._is_strict
        plan = self._cached_plan(collection.name, request.query.get("expand", ""), follows_hidden)
        if plan is None:
            return None
        asked = replace(request, context="expand")
        seen: dict[str, BoundPredicate | None] = {}
        managed: dict[str, BoundPredicate] = {}
        for target in plan.targets:
            bound = self._try_bind(target, target.view_rule, asked, own_row)
            if isinstance(bound, BoundPredicate):
                seen[target.name] = bound
            elif bound is not None and not bound.reason:
                seen[target.name] = None
            if target.type == "auth" and target.manage_rule is not None and not is_superuser:
                manager = self._try_bind(target, target.manage_rule, asked, own_row)
                if isinstance(manager, BoundPredicate):
                    managed[target.name] = manager
        record = None
        match request.principal:
            case AuthRecord(collection_name=name, id=record_id) if name in seen:
                record = name, record_id
        identity = (plan, is_superuser, record, tuple(seen.items()), tuple(managed.items()))
        viewer = self._viewers.get(identity)
        if viewer is None:
            viewer = self._viewers[identity] = ExpandViewer(
                plan=plan,
                sees_hidden=is_superuser,
                own_record=record,
                view_predicates=seen,
                manage_predicates=managed,
            )
        return viewer

    def _try_bind(
        self, target: Collection, rule: str | None, request: RuleRequest, own_row: Row | None
    ) -> BoundPredicate | DenyAll | None:
        """Return what decides; Nobody without a reason if the rule is false whatever the record.

        The client's filter is about the topic's own records.
        """
        try:
            return self._compiler.bind_caller(target, rule, request, own_row, is_filtered=False)
        except RuleError:
            return None

    def _compile_plan(
        self,
        collection_name: str,
        expand_option: str,
        follows_hidden: bool,  # noqa: FBT001 (cached)
    ) -> ExpandPlan | None:
        collection = self._collections[collection_name]
        paths = parse_expand(expand_option)
        routes = [
            self._resolve_path(collection, path, follows_hidden=follows_hidden) for path in paths
        ]
        # A path whose first name is unknown adds nothing to any record.
        kept = tuple(route for route in routes if route.hops)
        if not kept:
            return None
        steps = [step for route in kept for step in route.hops]
        targets = tuple({step.target.name: step.target for step in steps}.values())
        rules = [one.view_rule or "" for one in targets] + [
            one.manage_rule or "" for one in targets
        ]
        return ExpandPlan(
            paths=kept,
            branches=_merge_paths([route.hops for route in kept]),
            targets=targets,
            depends_on_caller=any("@request.auth" in rule for rule in rules),
            lookup_columns=frozenset(
                lookup
                for one in (*targets, *(step.owner for step in steps))
                for lookup in _lookup_columns(one)
            ),
        )

    def _resolve_path(
        self, collection: Collection, names: ExpandNames, *, follows_hidden: bool
    ) -> ExpandPath:
        steps: list[RelationHop] = []
        for name in names:
            step = self._resolve_hop(collection, name)
            if step is None or (step.field.is_hidden and not follows_hidden):
                return ExpandPath(tuple(steps), has_unknown_name=True)
            steps.append(step)
            collection = step.target
        return ExpandPath(tuple(steps), has_unknown_name=False)

    def _resolve_hop(self, source: Collection, name: str) -> RelationHop | None:
        if back := _BACK_RELATION.fullmatch(name):
            # Unlike in topics and rules the case of its name doesn't matter here.
            folded = self._by_folded_name.get(back[1].casefold())
            owner = self._collections.find(back[1]) or folded
            field = None if owner is None else owner.fields_by_name.get(back[2])
            if owner is None or field is None or field.relation is None:
                return None
            if field.relation.collection != source.name:
                return None
            return RelationHop(
                name=name, field=field, owner=owner, source=source, target=owner, is_back=True
            )
        field = source.fields_by_name.get(name)
        if field is None or field.relation is None:
            return None
        return _forward_hop(self._collections, source, field)


def _forward_hop(collections: Collections, source: Collection, field: Field) -> RelationHop:
    assert field.relation is not None
    target = collections[field.relation.collection]
    return RelationHop(name=field.name, field=field, owner=source, source=source, target=target)


def junction_hops(collections: Collections, collection: Collection) -> tuple[RelationHop, ...]:
    """Return the collection's relations through junction tables."""
    return tuple(
        _forward_hop(collections, collection, field)
        for field in collection.fields
        if field.relation is not None and field.relation.junction is not None
    )


def _lookup_columns(collection: Collection) -> Iterator[LookupColumn]:
    """Yield the collection's table and the junction tables of its relations."""
    yield collection.id_lookup_column
    for field in collection.fields:
        junction = None if field.relation is None else field.relation.junction
        if junction is not None:
            yield junction.table.name, junction.source_column


def _merge_paths(paths: Sequence[Sequence[RelationHop]]) -> Mapping[str, ExpandBranch]:
    by_first: dict[str, list[Sequence[RelationHop]]] = {}
    for steps in paths:
        if steps:
            by_first.setdefault(steps[0].name, []).append(steps)
    return {
        name: ExpandBranch(below[0][0], _merge_paths([steps[1:] for steps in below]))
        for name, below in by_first.items()
    }
