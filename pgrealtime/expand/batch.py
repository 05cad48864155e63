"""Loads related records for one batch, level by level, in one snapshot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias

from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, unpadded_id
from pgrealtime.expand.node import RecordNode, RecordVersion, ids_in_row
from pgrealtime.expand.plan import (
    ExpandBranch,
    ExpandViewer,
    RelationHop,
    RelationKey,
)
from pgrealtime.expand.relation_sql import (
    creation_sort_key,
    id_sort_key,
    relation_query,
)
from pgrealtime.expand.undo import (
    ids_before_changes,
    ids_before_overlay,
    is_whole_row,
    rows_before_overlay,
)
from pgrealtime.fairness import YieldTimer
from pgrealtime.protocol.expand_option import MAX_EXPAND_DEPTH
from pgrealtime.rule_queries.session import ReadSession, fetch_rows_by_id
from pgrealtime.rules.engine.before_state import BeforeState
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.language.parameter_values import macro_values_at

_MAX_ROWS = 20_000
"""Related rows of one batch: what goes beyond is left out."""


Ids: TypeAlias = list[str]


@dataclass(slots=True, eq=False)
class _Traversal:
    """From a record to those that one branch leads one viewer to."""

    node: RecordNode
    viewer: ExpandViewer
    branch: ExpandBranch
    ids: Ids | None = None
    """Where it leads; None if that can't be said."""
    children: list[RecordNode] | None = None

    @property
    def target(self) -> Collection:
        return self.branch.hop.target

    @property
    def may_query_target(self) -> bool:
        """Whether the viewer may look there at all."""
        return self.target.name in self.viewer.view_predicates

    @property
    def may_see_target(self) -> bool:
        """Whether the viewer may see anything there."""
        return self.viewer.view_predicates.get(self.target.name) is not None

    @property
    def predicates(self) -> list[BoundPredicate]:
        """What is asked of the records there."""
        name = self.target.name
        bounds = [self.viewer.view_predicates.get(name), self.viewer.manage_predicates.get(name)]
        return [bound for bound in bounds if bound is not None]


_Level: TypeAlias = list[tuple[RecordNode, ExpandViewer, Mapping[str, ExpandBranch]]]


_NodesByTraversal: TypeAlias = dict[tuple[ExpandViewer, ExpandBranch, RecordVersion], RecordNode]
"""Records on the same way are the same, however many others lead to them."""


class _LoadBatch:
    """What was fetched for one batch.

    Args:
        session: Where to ask.
        junction_hops: By collection, its relations through junction tables.
    """

    def __init__(
        self, session: ReadSession, junction_hops: Mapping[str, Sequence[RelationHop]]
    ) -> None:
        self._session = session
        self._junction_hops = junction_hops
        self._macro_values = macro_values_at(datetime.now(UTC))
        self._ids_by_relation: dict[RelationKey, dict[str, Ids | None]] = defaultdict(dict)
        """By relation and record: ids; None if they couldn't be found."""
        self._rows: dict[str, dict[str, Row]] = defaultdict(dict)
        self._rows_before: dict[tuple[int, str], dict[str, Row | None]] = {}
        """By state of the past and collection: rows that were touched since."""
        self.unknown_states: set[tuple[int, ExpandViewer]] = set()
        """By ``_state_key``: who was to be shown records of which that state isn't known."""
        self._row_count = 0

    async def load_junction_ids(self, nodes: Iterable[RecordNode]) -> None:
        """Find the ids of relations through junction tables."""
        nodes = [node for node in nodes if self._junction_hops[node.collection.name]]
        await self._load_relation_ids(
            (step, node) for node in nodes for step in self._junction_hops[node.collection.name]
        )
        turn = YieldTimer()
        for node in nodes:
            steps = self._junction_hops[node.collection.name]
            ids = {step.name: self._target_ids(step, node) for step in steps}
            node.junction_ids = {name: found for name, found in ids.items() if found is not None}
            if turn.is_due():
                await turn.pause()

    async def load_expands(self, roots: Iterable[tuple[RecordNode, ExpandViewer]]) -> None:
        """Find the records that the viewers' plans lead to."""
        made: _NodesByTraversal = {}
        level = [(node, viewer, viewer.plan.branches) for node, viewer in roots]
        for _ in range(MAX_EXPAND_DEPTH):
            if level:
                level = await self._load_level(level, made)

    async def _load_level(self, level: _Level, visible_nodes: _NodesByTraversal) -> _Level:
        """Give the records of a level their related ones; return those that lead further."""
        ways = [
            _Traversal(node, viewer, branch)
            for node, viewer, branches in level
            for branch in branches.values()
        ]
        await self._load_targets([way for way in ways if way.may_query_target])
        looking: Evaluation[RecordVersion, BoundPredicate] = Evaluation(self._macro_values)
        turn = YieldTimer()
        for way in ways:
            bounds = way.predicates
            for child in way.children or ():
                looking.add(child.version, child.collection, child.row, bounds, child.before_state)
                if turn.is_due():
                    await turn.pause()
        await self._session.answer_questions(looking)
        fresh: _Level = []
        for way in ways:
            fresh += _attach_visible_children(way, looking, visible_nodes)
            if turn.is_due():
                await turn.pause()
        await self.load_junction_ids(node for node, _, _ in fresh)
        return [one for one in fresh if one[2]]

    async def _load_targets(self, traversals: Sequence[_Traversal]) -> None:
        """Find the records that the ways lead to, seen or not."""
        sighted = [way for way in traversals if way.may_see_target]
        await self._load_relation_ids((way.branch.hop, way.node) for way in sighted)
        turn = YieldTimer()
        for way in traversals:
            way.ids = self._target_ids(way.branch.hop, way.node) if way.may_see_target else []
            if way.ids is None and self._live_target_ids(way.branch.hop, way.node) is not None:
                self._record_unknown_state(way)
            if turn.is_due():
                await turn.pause()
        await self._load_rows(sighted)
        for way in traversals:
            if way.ids is not None:
                way.children = self._child_nodes(way, way.ids)
                if way.branch.hop.is_back:
                    way.children.sort(
                        key=lambda child: creation_sort_key(child.collection, child.row)
                    )

    def _child_nodes(self, traversal: _Traversal, ids: Ids) -> list[RecordNode]:
        """Return the records of these ids, without those of which only the key is known."""
        target, past = traversal.target, traversal.node.before_state
        children: list[RecordNode] = []
        for one in (unpadded_id(target, given) for given in ids):
            row, is_sure = self._row_in_state(target, one, past)
            if not is_sure:
                self._record_unknown_state(traversal)
            elif row is not None:
                children.append(RecordNode(target, one, row, before_state=past))
        return children

    def _record_unknown_state(self, traversal: _Traversal) -> None:
        self.unknown_states.add((traversal.node.state_key, traversal.viewer))

    def live_junction_ids(self, node: RecordNode) -> Mapping[str, Ids]:
        """Return, by field, where a record leads now, if some of where it led isn't known."""
        steps = self._junction_hops[node.collection.name]
        if all(step.name in node.junction_ids for step in steps):
            return {}
        ids = {step.name: self._live_target_ids(step, node) for step in steps}
        return {name: found for name, found in ids.items() if found is not None}

    def _live_target_ids(self, hop: RelationHop, node: RecordNode) -> Ids | None:
        return self._ids_by_relation[hop.relation_key].get(node.record_id)

    def _target_ids(self, hop: RelationHop, node: RecordNode) -> Ids | None:
        if hop.is_in_row:
            return ids_in_row(hop, node.row)
        ids = self._live_target_ids(hop, node)
        linking = relation_query(hop)
        if ids is not None and hop.relation_key in node.later_link_changes:
            undone = node.later_link_changes[hop.relation_key]
            before = None
            if undone is not None:
                before = ids_before_changes(linking, undone, node.record_id, ids)
            ids = None if before is None else sorted(before, key=id_sort_key)
        if ids is None or node.before_state is None:
            return ids
        found = set(ids)
        for overlay in node.before_state.overlays([linking.table.name]):
            then = ids_before_overlay(linking, overlay, node.record_id, found)
            if then is None:
                return None
            found = then
        return sorted(found, key=id_sort_key)

    def _row_in_state(
        self, collection: Collection, record_id: str, before_state: BeforeState | None
    ) -> tuple[Row | None, bool]:
        """Return a record's row, None if there is none, and whether that is sure."""
        live = self._rows[collection.name].get(record_id)
        if before_state is None:
            return live, True
        overlays = before_state.overlays([collection.table.name])
        place = id(before_state), collection.name
        if place not in self._rows_before:
            rows: dict[str, Row | None] = {}
            for overlay in overlays:
                rows |= rows_before_overlay(collection, overlay)
            self._rows_before[place] = rows
        row = self._rows_before[place].get(record_id, live)
        if row is None or row is live:
            return row, not any(overlay.was_truncated for overlay in overlays)
        return row, is_whole_row(collection.table, row)

    # --- asking

    async def _load_relation_ids(self, hops: Iterable[tuple[RelationHop, RecordNode]]) -> None:
        asked: dict[RelationKey, tuple[RelationHop, dict[str, None]]] = {}
        for step, node in hops:
            if (
                not step.is_in_row
                and node.record_id not in self._ids_by_relation[step.relation_key]
            ):
                asked.setdefault(step.relation_key, (step, {}))[1][node.record_id] = None
        for link, (step, ids) in asked.items():
            self._ids_by_relation[link] |= await self._query_relation_ids(step, list(ids))

    async def _query_relation_ids(
        self, hop: RelationHop, source_ids: Ids
    ) -> Mapping[str, Ids | None]:
        linking = relation_query(hop)
        pairs = await self._session.fetch_texts(
            linking.statement, {"ids": linking.valid_ids(source_ids)}
        )
        if pairs is None:
            return dict.fromkeys(source_ids)
        found: dict[str, set[str]] = {one: set() for one in source_ids}
        for source, target in pairs:
            if source and target:
                found[source].add(target)
        return {one: sorted(targets, key=id_sort_key) for one, targets in found.items()}

    async def _load_rows(self, traversals: Iterable[_Traversal]) -> None:
        wanted: dict[str, tuple[Collection, dict[str, None]]] = {}
        for way in traversals:
            known = self._rows[way.target.name]
            _, ids = wanted.setdefault(way.target.name, (way.target, {}))
            ids.update((one, None) for one in way.ids or () if one not in known)
        for collection, ids in wanted.values():
            asked = [*ids][: max(0, _MAX_ROWS - self._row_count)]
            self._row_count += len(asked)
            if asked:
                await self._fetch_rows(collection, asked)

    async def _fetch_rows(self, collection: Collection, ids: Ids) -> None:
        self._rows[collection.name] |= await fetch_rows_by_id(self._session, collection, ids) or {}


def _attach_visible_children(
    traversal: _Traversal,
    evaluation: Evaluation[RecordVersion, BoundPredicate],
    visible_nodes: _NodesByTraversal,
) -> _Level:
    """Let a record have those of its related records that the viewer sees; return new ones."""
    name, viewer, branch = traversal.target.name, traversal.viewer, traversal.branch
    if traversal.children is None:
        traversal.node.children[branch.hop.name] = None
        return []
    seen, managed = viewer.view_predicates[name], viewer.manage_predicates.get(name)
    shown: list[RecordNode] = []
    fresh: _Level = []
    for child in traversal.children:
        admitted = evaluation.hits(child.version)
        if seen not in admitted:
            continue
        place = viewer, branch, child.version
        if place not in visible_nodes:
            visible_nodes[place] = child
            child.sees_email = (
                viewer.sees_hidden
                or viewer.own_record == (name, child.record_id)
                or managed in admitted
            )
            fresh.append((child, viewer, branch.branches))
        shown.append(visible_nodes[place])
    traversal.node.children[branch.hop.name] = shown
    return fresh
