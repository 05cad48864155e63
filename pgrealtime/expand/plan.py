"""What subscriptions want to see of related records, and how it is put together (protocol, 5.6).

Between the option's text (``records.expand``) and who fetches the records (``hub.expand``). Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TypeAlias
from weakref import WeakValueDictionary

import msgspec
from msgspec import Raw

from pgrealtime.auth.principal import AuthRecord, Superuser
from pgrealtime.changes import Change, Row
from pgrealtime.collections.model import Collection, Collections, Field
from pgrealtime.config.model import HiddenFields
from pgrealtime.errors import RuleError
from pgrealtime.hub.live_reads.row_history import Lookup, key_lookup
from pgrealtime.protocol.expand_option import Path, parse_expand
from pgrealtime.records.encode import View
from pgrealtime.rules.engine.before_state import Past
from pgrealtime.rules.engine.plan import Bound, Planner
from pgrealtime.rules.language.request import Request
from pgrealtime.rules.sql.reference import Nobody
from pgrealtime.text_forms import parse_array

_BACK = re.compile(r"(\w+)_via_(\w+)", re.ASCII)
_PLANS = 4096

Link: TypeAlias = tuple[str, str, bool]
"""A relation in one of its directions: collection that has the field, field, whether backwards."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
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
    def link(self) -> Link:
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
            return column is None or (column.name,) not in self.owner.table.unique
        return self.field.is_multiple


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """A step that somebody wants, with those from the records it leads to."""

    step: Step
    branches: Mapping[str, Branch]


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """A path that was asked for, as far as there are relations of these names."""

    steps: tuple[Step, ...]
    is_broken: bool
    """Another name follows, which nothing answers to: where a record is reached that it would be
    looked for in, the whole path adds nothing."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Plan:
    """The option ``expand`` of a collection."""

    routes: tuple[Route, ...]
    branches: Mapping[str, Branch]
    """All routes together."""
    targets: tuple[Collection, ...]
    asks_caller: bool = False
    """Whether a rule of a related collection asks who the subscriber is.

    It may do so without a value of the caller's being bound: a guest is denied at once.
    """
    lookups: frozenset[Lookup] = frozenset()
    """The tables that the related records are read from."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Viewer:
    """Subscriptions that see the same related records in the same way; compared by identity."""

    plan: Plan
    sees_hidden: bool
    own: tuple[str, str] | None
    """Collection and id of the viewer's record, if it can be among the related ones."""
    seen: Mapping[str, Bound | None]
    """By collection, which records are seen, None being none. Those that aren't here may not even
    be looked at: they are locked, or their rule can't be asked."""
    managed: Mapping[str, Bound]
    """By auth collection, of which records an address is seen that isn't public."""


class Viewers:
    """Compiles who sees what; who sees the same is the same viewer, as long as it is kept.

    Args:
        collections: All there are.
        planner: Compiles rules.
        hidden: Who may expand a hidden relation.
        plans: Texts of ``expand`` that are kept.
    """

    def __init__(
        self,
        collections: Collections,
        planner: Planner,
        *,
        hidden: HiddenFields = "strict",
        plans: int = _PLANS,
    ) -> None:
        self._collections = collections
        self._planner = planner
        self._is_strict = hidden == "strict"
        self._by_folded_name = {name.casefold(): one for name, one in collections.items()}
        self._plan = lru_cache(maxsize=plans)(self._make_plan)
        self._known: WeakValueDictionary[object, Viewer] = WeakValueDictionary()

    def viewer(
        self, collection: Collection, request: Request, own: Row | None = None
    ) -> Viewer | None:
        """Return who the subscriber is to related records; None if it wants none.

        Args:
            collection: That the topic is about.
            request: The subscriber.
            own: Columns of its own row, as ``Planner.bind`` has them.
        """
        is_superuser = isinstance(request.principal, Superuser)
        follows_hidden = is_superuser or not self._is_strict
        plan = self._plan(collection.name, request.query.get("expand", ""), follows_hidden)
        if plan is None:
            return None
        asked = replace(request, context="expand")
        seen: dict[str, Bound | None] = {}
        managed: dict[str, Bound] = {}
        for target in plan.targets:
            bound = self._bind(target, target.view_rule, asked, own)
            if isinstance(bound, Bound):
                seen[target.name] = bound
            elif bound is not None and not bound.reason:
                seen[target.name] = None
            if target.type == "auth" and target.manage_rule is not None and not is_superuser:
                manager = self._bind(target, target.manage_rule, asked, own)
                if isinstance(manager, Bound):
                    managed[target.name] = manager
        record = None
        match request.principal:
            case AuthRecord(collection_name=name, id=record_id) if name in seen:
                record = name, record_id
        identity = (plan, is_superuser, record, tuple(seen.items()), tuple(managed.items()))
        viewer = self._known.get(identity)
        if viewer is None:
            viewer = self._known[identity] = Viewer(
                plan=plan, sees_hidden=is_superuser, own=record, seen=seen, managed=managed
            )
        return viewer

    def _bind(
        self, target: Collection, rule: str | None, request: Request, own: Row | None
    ) -> Bound | Nobody | None:
        """Return what decides; Nobody without a reason if the rule is false whatever the record.

        The client's filter is about the topic's own records.
        """
        try:
            return self._planner.bind(target, rule, request, own, is_filtered=False)
        except RuleError:
            return None

    def _make_plan(
        self,
        name: str,
        text: str,
        follows_hidden: bool,  # noqa: FBT001 (cached)
    ) -> Plan | None:
        collection = self._collections[name]
        paths = parse_expand(text)
        routes = [self._route(collection, path, follows_hidden=follows_hidden) for path in paths]
        # A path whose first name is unknown adds nothing to any record.
        kept = tuple(route for route in routes if route.steps)
        if not kept:
            return None
        steps = [step for route in kept for step in route.steps]
        targets = tuple({step.target.name: step.target for step in steps}.values())
        rules = [one.view_rule or "" for one in targets] + [
            one.manage_rule or "" for one in targets
        ]
        return Plan(
            routes=kept,
            branches=_branches([route.steps for route in kept]),
            targets=targets,
            asks_caller=any("@request.auth" in rule for rule in rules),
            lookups=frozenset(
                lookup
                for one in (*targets, *(step.owner for step in steps))
                for lookup in _lookups(one)
            ),
        )

    def _route(self, collection: Collection, path: Path, *, follows_hidden: bool) -> Route:
        steps: list[Step] = []
        for name in path:
            step = self._step(collection, name)
            if step is None or (step.field.is_hidden and not follows_hidden):
                return Route(tuple(steps), is_broken=True)
            steps.append(step)
            collection = step.target
        return Route(tuple(steps), is_broken=False)

    def _step(self, source: Collection, name: str) -> Step | None:
        if back := _BACK.fullmatch(name):
            # Unlike in topics and rules the case of its name doesn't matter here.
            folded = self._by_folded_name.get(back[1].casefold())
            owner = self._collections.find(back[1]) or folded
            field = None if owner is None else owner.by_name.get(back[2])
            if owner is None or field is None or field.relation is None:
                return None
            if field.relation.collection != source.name:
                return None
            return Step(
                name=name, field=field, owner=owner, source=source, target=owner, is_back=True
            )
        field = source.by_name.get(name)
        if field is None or field.relation is None:
            return None
        return _forward(self._collections, source, field)


def _forward(collections: Collections, source: Collection, field: Field) -> Step:
    assert field.relation is not None
    target = collections[field.relation.collection]
    return Step(name=field.name, field=field, owner=source, source=source, target=target)


def junction_steps(collections: Collections, collection: Collection) -> tuple[Step, ...]:
    """Return the collection's relations through junction tables."""
    return tuple(
        _forward(collections, collection, field)
        for field in collection.fields
        if field.relation is not None and field.relation.junction is not None
    )


def _lookups(collection: Collection) -> Iterator[Lookup]:
    """Yield the collection's table and the junction tables of its relations."""
    yield key_lookup(collection)
    for field in collection.fields:
        junction = None if field.relation is None else field.relation.junction
        if junction is not None:
            yield junction.table.name, junction.source


def _branches(routes: Sequence[Sequence[Step]]) -> Mapping[str, Branch]:
    by_first: dict[str, list[Sequence[Step]]] = {}
    for steps in routes:
        if steps:
            by_first.setdefault(steps[0].name, []).append(steps)
    return {
        name: Branch(below[0][0], _branches([steps[1:] for steps in below]))
        for name, below in by_first.items()
    }


# --- records as they are found


Undone: TypeAlias = Mapping[Link, Sequence[Change] | None]
_NOTHING_UNDONE: Undone = MappingProxyType({})


class Node:
    """A record with the related ones that one viewer sees of it.

    Attributes:
        related: Ids by field name, of relations through junction tables.
        children: By step, in order; None where they may not or could not be looked for.
        past: What related tables were like; None is as they are.
        undone: By relation through a junction table, later changes of its links that are taken
            back; None where they aren't known.
    """

    __slots__ = (
        "children",
        "collection",
        "past",
        "record_id",
        "related",
        "row",
        "sees_email",
        "undone",
    )

    def __init__(
        self,
        collection: Collection,
        record_id: str,
        row: Row,
        *,
        past: Past | None = None,
        undone: Undone = _NOTHING_UNDONE,
    ) -> None:
        self.collection = collection
        self.record_id = record_id
        self.row = row
        self.past = past
        self.undone = undone
        self.sees_email = False
        self.related: Mapping[str, Sequence[str]] = {}
        self.children: dict[str, list[Node] | None] = {}

    @property
    def place(self) -> tuple[str, str, int]:
        """Its collection, its id and the state it is seen in."""
        return self.collection.name, self.record_id, id(self.past)


def ids_in_row(step: Step, row: Row) -> list[str]:
    """Return the ids that a row holds, none empty, none twice."""
    assert step.field.column is not None
    text = row.get(step.field.column.name)
    if not text:
        return []
    return ids_in_array(text) if step.field.is_multiple else [text]


def ids_in_array(text: str) -> list[str]:
    """Return the ids of an array in text form, none empty, none twice."""
    return list(dict.fromkeys(item for item in parse_array(text) if isinstance(item, str) and item))


Show: TypeAlias = Callable[[Node, View, bytes | None], bytes]
"""Makes the record of a node, given what it shows as ``expand``."""

_write = msgspec.json.Encoder().encode


class TooLargeError(Exception):
    """What a record would show as ``expand`` is larger than it may be."""


def expanded(root: Node, viewer: Viewer, show: Show, *, most: int) -> bytes | None:
    """Return the JSON of the member ``expand``; None for a record without one.

    Args:
        root: The record.
        viewer: Who sees it.
        show: Makes the related ones.
        most: Bytes that it may have.

    Raises:
        TooLargeError: It has more. Few rows make many bytes: a path that leads back and forth
            shows them again and again, a hundred posts of one author a million times in six steps.
        ValueError: A related row can't be shown.
        LookupError: Likewise.
    """
    whole = [route.steps for route in viewer.plan.routes if _is_whole(root, route)]
    branches = _branches(whole)
    return _Writing(viewer, show, most).members(root, branches) if branches else None


def _is_whole(root: Node, route: Route) -> bool:
    """Whether nothing on the way was refused: one refusal and the path adds nothing at all."""
    level: Iterable[Node] = [root]
    for step in route.steps:
        following: dict[Node, None] = {}
        for node in level:
            children = node.children.get(step.name)
            if children is None:
                return False
            following.update(dict.fromkeys(children))
        level = following
    return not (route.is_broken and any(level))


class _Writing:
    """Writes related records, each once however often it is shown.

    Args:
        viewer: Who sees them.
        show: Makes records.
        most: Bytes that those beside each other may have.
    """

    def __init__(self, viewer: Viewer, show: Show, most: int) -> None:
        self._viewer = viewer
        self._show = show
        self._most = most
        self._made: dict[Node, Raw] = {}
        """A node stands for a record at one place of the plan, so the same is below it."""

    def members(self, node: Node, branches: Mapping[str, Branch]) -> bytes:
        """Return the JSON of ``expand``.

        Raises:
            TooLargeError: It has more bytes than it may.
        """
        members: dict[str, Raw | list[Raw]] = {}
        size = 0
        for name in sorted(branches, key=str.encode):
            records: list[Raw] = []
            for child in node.children.get(name) or ():
                record = self._record(child, branches[name])
                size += len(record)
                if size > self._most:
                    raise TooLargeError
                records.append(record)
            if records:
                members[name] = records if branches[name].step.is_list else records[0]
        return _write(members)

    def _record(self, child: Node, branch: Branch) -> Raw:
        record = self._made.get(child)
        if record is None:
            below = self.members(child, branch.branches) if branch.branches else None
            view = View(sees_hidden=self._viewer.sees_hidden, sees_email=child.sees_email)
            record = self._made[child] = Raw(self._show(child, view, below))
        return record
