"""Loads related records for a batch of nodes, level by level, in one snapshot.

One query loads what all viewers and records need of one relation, another the rows of one
collection, and a rule is evaluated once for all viewers for which it is the same. ``load`` makes
the nodes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias

from pgrealtime.changes import Row
from pgrealtime.collections.model import Collection, FieldKind, unpadded_id
from pgrealtime.expand import undo
from pgrealtime.expand.node import RecordNode, RecordVersion, ids_in_row
from pgrealtime.expand.plan import (
    MAX_EXPAND_DEPTH,
    ExpandBranch,
    ExpandViewer,
    JunctionHops,
    RelationHop,
    RelationKey,
)
from pgrealtime.expand.relation_sql import relation_query
from pgrealtime.fairness import YieldTimer
from pgrealtime.postgres.rows import RowsTooLargeError
from pgrealtime.rule_queries.session import ReadSession, fetch_rows_by_id
from pgrealtime.rules.engine.before_state import BeforeState
from pgrealtime.rules.engine.evaluation import Evaluation
from pgrealtime.rules.engine.plan import BoundPredicate
from pgrealtime.rules.language.parameters import MacroValues

_MAX_ROWS = 20_000
"""Related rows of one batch; further ones are left out."""
_MAX_LINKS = 100_000
"""Links of one batch that are followed, at some ten microseconds each; further ones are left out. A
row counts once, however many records lead to it by however many paths."""
_MAX_UNSTREAMED_ROWS = 100
"""With a limit of characters more rows are read one by one, so that they can be given up."""
_PAIR_CHARACTERS = 128
"""As so many counts an id that a relation leads to, with the id that it leads from."""

Ids: TypeAlias = list[str]


@dataclass(slots=True, eq=False)
class _Traversal:
    """One branch of one viewer's plan, followed from one record."""

    node: RecordNode
    viewer: ExpandViewer
    branch: ExpandBranch
    ids: Ids | None = None
    """Of the records that it leads to; None if they aren't known."""
    children: list[RecordNode] | None = None
    first: _Traversal | None = None
    """An earlier one of the same branch that leads to the same records: its children are shared."""

    @property
    def target(self) -> Collection:
        return self.branch.hop.target

    @property
    def may_see_target(self) -> bool:
        """Whether the viewer may see any record there."""
        return self.viewer.view_predicates.get(self.target.name) is not None

    @property
    def predicates(self) -> list[BoundPredicate]:
        """The view and the manage predicate of the records there."""
        name, viewer = self.target.name, self.viewer
        bound = (viewer.view_predicates.get(name), viewer.manage_predicates.get(name))
        return [predicate for predicate in bound if predicate is not None]


_Level: TypeAlias = list[tuple[RecordNode, ExpandViewer, Mapping[str, ExpandBranch]]]
"""Records with the branches that a viewer follows from them."""
_Evaluation: TypeAlias = Evaluation[RecordVersion, BoundPredicate]
_VisibleNodes: TypeAlias = dict[tuple[ExpandViewer, ExpandBranch, RecordVersion], RecordNode]
"""A record that a branch leads to is one node, however many records lead to it."""


class LoadBatch:
    """What was loaded for one batch.

    With ``max_characters`` related rows and ids of more raise ``RowsTooLargeError``, and the
    session has ended then.

    Attributes:
        unknown_states: By ``RecordNode.state_key``, the viewers that were to be shown records whose
            state isn't known.
        has_left_out_rows: Whether more rows, or links to them, were wanted than a batch may have.
    """

    def __init__(
        self,
        session: ReadSession,
        junction_hops: JunctionHops,
        *,
        max_characters: int | None = None,
    ) -> None:
        self._session = session
        self._junction_hops = junction_hops
        self._characters_left = max_characters
        self._macro_values = MacroValues(datetime.now(UTC))
        self._ids_by_relation: dict[RelationKey, dict[str, Ids | None]] = defaultdict(dict)
        """By relation and source record, present ids; None if they couldn't be loaded."""
        self._rows: dict[str, dict[str, Row]] = defaultdict(dict)
        self._rows_before: dict[tuple[int, str], dict[str, Row | None]] = {}
        """By before state and collection, the rows that were changed since."""
        self.unknown_states: set[tuple[int, ExpandViewer]] = set()
        self._row_count = self._link_count = 0
        self.has_left_out_rows = False

    async def load_junction_ids(self, nodes: Iterable[RecordNode]) -> None:
        """Set the ids of the nodes' relations through junction tables."""
        yield_timer = YieldTimer()
        linked = [(node, hops) for node in nodes if (hops := self._hops(node))]
        await self._load_relation_ids((hop, node) for node, hops in linked for hop in hops)
        for node, hops in linked:
            ids = {hop.name: self._target_ids(hop, node) for hop in hops}
            node.junction_ids = {name: known for name, known in ids.items() if known is not None}
            if yield_timer.is_due():
                await yield_timer.pause()

    def live_junction_ids(self, node: RecordNode) -> Mapping[str, Ids]:
        """Return the present ids by field, if some of those at the event aren't known; else {}."""
        hops = self._hops(node)
        if all(hop.name in node.junction_ids for hop in hops):
            return {}
        ids = {hop.name: self._live_target_ids(hop, node) for hop in hops}
        return {name: known for name, known in ids.items() if known is not None}

    async def load_expands(self, roots: Iterable[tuple[RecordNode, ExpandViewer]]) -> None:
        """Set the children of the nodes, and theirs, as the viewers' plans lead to them."""
        visible_nodes: _VisibleNodes = {}
        level: _Level = [(node, viewer, viewer.plan.branches) for node, viewer in roots]
        for _ in range(MAX_EXPAND_DEPTH):
            if level:
                level = await self._load_level(level, visible_nodes)

    async def _load_level(self, level: _Level, visible_nodes: _VisibleNodes) -> _Level:
        """Set the children of a level's records; return the children that lead further."""
        yield_timer = YieldTimer()
        traversals: list[_Traversal] = []
        for node, viewer, branches in level:
            if not self._may_follow(len(branches)):
                break
            traversals += [_Traversal(node, viewer, branch) for branch in branches.values()]
            if yield_timer.is_due():
                await yield_timer.pause()
        queryable = [t for t in traversals if t.target.name in t.viewer.view_predicates]
        await self._load_targets(queryable)
        evaluation = await self._evaluate(traversals)
        new_nodes: _Level = []
        for traversal in traversals:
            if traversal.first is None:
                new_nodes += _attach_visible_children(traversal, evaluation, visible_nodes)
            else:
                name = traversal.branch.hop.name
                traversal.node.children[name] = traversal.first.node.children[name]
            if yield_timer.is_due():
                await yield_timer.pause()
        await self.load_junction_ids(node for node, _, _ in new_nodes)
        return [new_node for new_node in new_nodes if new_node[2]]

    async def _evaluate(self, traversals: Iterable[_Traversal]) -> _Evaluation:
        """Return which of the children the viewers see, and of which the e-mail address."""
        evaluation: _Evaluation = Evaluation(self._macro_values)
        yield_timer = YieldTimer()
        for traversal in traversals:
            if traversal.first is not None:
                continue
            bound = traversal.predicates
            for child in traversal.children or ():
                version, row = child.record_version, child.row
                evaluation.add(version, child.collection, row, bound, child.before_state)
                if yield_timer.is_due():
                    await yield_timer.pause()
        while not evaluation.run_in_process(yield_timer.is_due):
            await yield_timer.pause()
        await self._session.answer_questions(evaluation)
        return evaluation

    async def _load_targets(self, traversals: Sequence[_Traversal]) -> None:
        """Set ids and children of traversals, also children that the viewer doesn't see."""
        permitted = [traversal for traversal in traversals if traversal.may_see_target]
        await self._load_relation_ids(
            (t.branch.hop, t.node) for t in permitted if not t.branch.hop.is_in_row
        )
        yield_timer = YieldTimer()
        for traversal in traversals:
            hop, node = traversal.branch.hop, traversal.node
            traversal.ids = self._target_ids(hop, node) if traversal.may_see_target else []
            if traversal.ids is None and self._live_target_ids(hop, node) is not None:
                self._record_unknown_state(traversal)
            if yield_timer.is_due():
                await yield_timer.pause()
        await self._load_rows(permitted)
        firsts: dict[tuple[ExpandViewer, ExpandBranch, int, tuple[str, ...]], _Traversal] = {}
        for traversal in traversals:
            if traversal.ids is not None:
                ids = traversal.ids if self._may_follow(len(traversal.ids)) else []
                # A page often leads to few records: its author, their team.
                key = traversal.viewer, traversal.branch, traversal.node.state_key, (*ids,)
                first = firsts.setdefault(key, traversal)
                if first is traversal:
                    traversal.children = self._child_nodes(traversal, ids)
                else:
                    traversal.first = first
            if yield_timer.is_due():
                await yield_timer.pause()

    def _may_follow(self, link_count: int) -> bool:
        """Count links; return whether they may be followed."""
        self._link_count += link_count
        self.has_left_out_rows |= self._link_count > _MAX_LINKS
        return self._link_count <= _MAX_LINKS

    def _child_nodes(self, traversal: _Traversal, ids: Ids) -> list[RecordNode]:
        """Return the records of these ids, without those of which only the key is known."""
        target, before_state = traversal.target, traversal.node.before_state
        children: list[RecordNode] = []
        for record_id in (unpadded_id(target, related_id) for related_id in ids):
            row, is_known = self._row_in_state(target, record_id, before_state)
            if not is_known:
                self._record_unknown_state(traversal)
            elif row is not None:
                children.append(RecordNode(target, record_id, row, before_state=before_state))
        if traversal.branch.hop.is_back:
            children.sort(key=lambda child: creation_sort_key(child.collection, child.row))
        return children

    def _record_unknown_state(self, traversal: _Traversal) -> None:
        self.unknown_states.add((traversal.node.state_key, traversal.viewer))

    # --- ids and rows in the state that a node is read in

    def _hops(self, node: RecordNode) -> Sequence[RelationHop]:
        return self._junction_hops[node.collection.name]

    def _live_target_ids(self, hop: RelationHop, node: RecordNode) -> Ids | None:
        return self._ids_by_relation[hop.relation_key].get(node.record_id)

    def _target_ids(self, hop: RelationHop, node: RecordNode) -> Ids | None:
        """Return the ids that a hop leads to in the node's state; None if they aren't known."""
        if hop.is_in_row:
            return ids_in_row(hop, node.row)
        ids = self._live_target_ids(hop, node)
        query = relation_query(hop)
        # First later transactions are undone, then the node's own from its delete on.
        if ids is not None and hop.relation_key in node.later_link_changes:
            changes = node.later_link_changes[hop.relation_key]
            if changes is None:
                return None
            ids = _sorted_ids(undo.ids_before_changes(query, changes, node.record_id, ids))
        if ids is None or node.before_state is None:
            return ids
        before: set[str] | None = set(ids)
        for overlay in node.before_state.overlays([query.table.name]):
            if before is not None:
                before = undo.ids_before_overlay(query, overlay, node.record_id, before)
        return _sorted_ids(before)

    def _row_in_state(
        self, collection: Collection, record_id: str, before_state: BeforeState | None
    ) -> tuple[Row | None, bool]:
        """Return a record's row, None if there is none, and whether that is known."""
        live = self._rows[collection.name].get(record_id)
        if before_state is None:
            return live, True
        overlays = before_state.overlays([collection.table.name])
        key = id(before_state), collection.name
        if key not in self._rows_before:
            rows: dict[str, Row | None] = {}
            for overlay in overlays:
                rows |= undo.rows_before_overlay(collection, overlay)
            self._rows_before[key] = rows
        row = self._rows_before[key].get(record_id, live)
        if row is None or row is live:
            return row, not any(overlay.was_truncated for overlay in overlays)
        return row, undo.is_whole_row(collection.table, row)

    # --- queries

    async def _load_relation_ids(self, hops: Iterable[tuple[RelationHop, RecordNode]]) -> None:
        wanted: dict[RelationKey, tuple[RelationHop, dict[str, None]]] = {}
        yield_timer = YieldTimer()
        for hop, node in hops:
            key = hop.relation_key
            if node.record_id not in self._ids_by_relation[key]:
                wanted.setdefault(key, (hop, {}))[1][node.record_id] = None
            if yield_timer.is_due():
                await yield_timer.pause()
        for key, (hop, ids) in wanted.items():
            self._ids_by_relation[key] |= await self._query_relation_ids(hop, list(ids))

    async def _query_relation_ids(self, hop: RelationHop, sources: Ids) -> Mapping[str, Ids | None]:
        query = relation_query(hop)
        values = {"ids": query.valid_ids(sources)}
        statement = query.statement
        if self._characters_left is not None:
            too_many = self._characters_left // _PAIR_CHARACTERS + 1
            statement += f" LIMIT {too_many}"
        pairs = await self._session.fetch_texts(statement, values)
        if pairs is None:
            return dict.fromkeys(sources)
        self._spend(_PAIR_CHARACTERS * len(pairs))
        targets_of: dict[str, set[str]] = {source: set() for source in sources}
        yield_timer = YieldTimer()
        for source, target in pairs:
            if source and target:
                targets_of[source].add(target)
            if yield_timer.is_due():
                await yield_timer.pause()
        ids_of: dict[str, Ids | None] = {}
        for source, targets in targets_of.items():
            ids_of[source] = _sorted_ids(targets)
            if yield_timer.is_due():
                await yield_timer.pause()
        return ids_of

    async def _load_rows(self, traversals: Iterable[_Traversal]) -> None:
        wanted: dict[str, tuple[Collection, dict[str, None]]] = {}
        yield_timer = YieldTimer()
        for traversal in traversals:
            name, known = traversal.target.name, self._rows[traversal.target.name]
            _, ids = wanted.setdefault(name, (traversal.target, {}))
            ids |= dict.fromkeys(found for found in traversal.ids or () if found not in known)
            if yield_timer.is_due():
                await yield_timer.pause()
        for name, (collection, ids) in wanted.items():
            chunk = [*ids][: max(0, _MAX_ROWS - self._row_count)]
            self.has_left_out_rows |= len(chunk) < len(ids)
            self._row_count += len(chunk)
            if chunk:
                self._rows[name] |= await self._fetch_rows(collection, chunk)

    async def _fetch_rows(self, collection: Collection, ids: Ids) -> Mapping[str, Row]:
        # Few rows are fetched at once, and counted after that.
        streamed = self._characters_left if len(ids) > _MAX_UNSTREAMED_ROWS else None
        rows = await fetch_rows_by_id(self._session, collection, ids, max_characters=streamed)
        yield_timer = YieldTimer()
        for row in () if rows is None or self._characters_left is None else rows.values():
            self._spend(sum([len(text) for text in row.values() if text is not None]))
            if yield_timer.is_due():
                await yield_timer.pause()
        return rows or {}

    def _spend(self, characters: int) -> None:
        """Count what was read; raise ``RowsTooLargeError`` if that is too much."""
        if self._characters_left is not None:
            self._characters_left -= characters
            if self._characters_left < 0:
                raise RowsTooLargeError


def _attach_visible_children(
    traversal: _Traversal, evaluation: _Evaluation, visible_nodes: _VisibleNodes
) -> _Level:
    """Attach to a record the children that the viewer sees; return those that are new."""
    name, viewer, branch = traversal.target.name, traversal.viewer, traversal.branch
    if traversal.children is None:
        traversal.node.children[branch.hop.name] = None
        return []
    view, manage = viewer.view_predicates[name], viewer.manage_predicates.get(name)
    visible: list[RecordNode] = []
    new_nodes: _Level = []
    for child in traversal.children:
        satisfied = evaluation.hits(child.record_version)
        if view not in satisfied:
            continue
        key = viewer, branch, child.record_version
        if key not in visible_nodes:
            visible_nodes[key] = child
            is_own = viewer.own_record == (name, child.record_id)
            child.sees_email = viewer.sees_hidden or is_own or manage in satisfied
            new_nodes.append((child, viewer, branch.branches))
        visible.append(visible_nodes[key])
    traversal.node.children[branch.hop.name] = visible
    return new_nodes


def _sorted_ids(ids: Iterable[str] | None) -> Ids | None:
    return None if ids is None else sorted(ids, key=id_sort_key)


def id_sort_key(text: str) -> tuple[bool, int, str, str]:
    """Return what sorts ids: numbers by value, before texts. A table has no order of its own."""
    is_number = text.isascii() and text.isdigit()
    # Not by ``int``, which refuses thousands of digits: a relation may hold any text.
    digits = text.lstrip("0") if is_number else ""
    return not is_number, len(digits), digits, text


def creation_sort_key(collection: Collection, row: Row) -> str:
    """Return what sorts a collection's rows by creation; the same for all if no column tells.

    PocketBase shows back relations in that order, which SQLite keeps and PostgreSQL doesn't.
    """
    for name in _CREATION_FIELDS:
        field = collection.fields_by_name.get(name)
        if field is not None and field.kind is FieldKind.DATE and field.column is not None:
            return row.get(field.column.name) or ""
    return ""


_CREATION_FIELDS = ("created", "created_at", "createdAt", "inserted_at")
"""PocketBase's name for it, and what other frameworks call it."""
