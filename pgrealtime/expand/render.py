"""Writes loaded related records as the JSON of the member ``expand``, within a size limit.

``load`` calls it once the snapshot has ended. Pure.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, TypeAlias

import msgspec
from msgspec import Raw

from pgrealtime.expand.node import RecordNode
from pgrealtime.expand.plan import (
    ExpandBranch,
    ExpandNames,
    ExpandPath,
    ExpandViewer,
    RelationHop,
    merge_paths,
)
from pgrealtime.records.encode import View

RenderRecord: TypeAlias = Callable[[RecordNode, View, bytes | None], bytes]
"""Makes the JSON of a node's record; takes the JSON of its own ``expand``, if it has one."""

_MAX_KEPT_BYTES: Final = 4096
_encode_json = msgspec.json.Encoder().encode


class ExpandTooLargeError(Exception):
    """A record's ``expand`` has more bytes than it may have."""


def render_expand(
    root: RecordNode, viewer: ExpandViewer, render_record: RenderRecord, *, max_bytes: int
) -> bytes | None:
    """Return the JSON of the member ``expand`` for a viewer; None for a record without one.

    Raises:
        ExpandTooLargeError: It has more than ``max_bytes``.
        ValueError: A related row can't be encoded.
        LookupError: Likewise.
    """
    renderer = ExpandRenderer([root], viewer, render_record, max_bytes=max_bytes)
    deque(renderer.find_paths(), maxlen=0)
    return renderer.render(root)


class ExpandRenderer:
    """Writes the member ``expand`` of records that are shown together, for one viewer.

    A path of the option is followed for all of them at once: where it is refused for one, it adds
    nothing to any. ``max_bytes`` bounds each record's member.

    ``find_paths``, and where there are many records ``write_related``, come before ``render``. They
    yield after each short step, so that the event loop can run other tasks in between.
    """

    def __init__(
        self,
        roots: Sequence[RecordNode],
        viewer: ExpandViewer,
        render_record: RenderRecord,
        *,
        max_bytes: int,
    ) -> None:
        self._roots = roots
        self._paths = viewer.plan.paths
        self._max_bytes = max_bytes
        self._branches: Mapping[str, ExpandBranch] = {}
        self._writer = _ExpandWriter(viewer, render_record, max_bytes)

    def find_paths(self) -> Iterator[None]:
        """Find the paths that add something: those on which no record was refused."""
        levels: _Levels = {(): dict.fromkeys(self._roots)}
        visible: list[Sequence[RelationHop]] = []
        for path in self._paths:
            yield from _follow_path(path, levels)
            if _is_path_visible(path, levels):
                visible.append(path.hops)
        self._branches = merge_paths(visible)

    def write_related(self) -> Iterator[None]:
        """Write the related records, those first that others contain.

        Raises:
            ExpandTooLargeError: The members of all records together have more than ``max_bytes``.
        """
        levels: list[dict[RecordNode, ExpandBranch]] = []
        parents = [(root, self._branches) for root in self._roots]
        while parents:
            level: dict[RecordNode, ExpandBranch] = {}
            for parent, branches in parents:
                for name, branch in branches.items():
                    level.update(dict.fromkeys(parent.children.get(name) or (), branch))
                yield
            levels.append(level)
            parents = [
                (child, branch.branches) for child, branch in level.items() if branch.branches
            ]
        for level in reversed(levels):
            size = 0
            for child, branch in level.items():
                size += self._writer.write_child(child, branch)
                if size > self._max_bytes:  # each is in at least one that contains it
                    raise ExpandTooLargeError
                yield

    def render(self, root: RecordNode) -> bytes | None:
        """Return the JSON for one of the records, or raise as ``render_expand``."""
        return self._writer.write_members(root, self._branches) if self._branches else None


_Levels: TypeAlias = dict[ExpandNames, dict[RecordNode, None] | None]
"""By the names that lead to them, records that were found; None if one was refused."""


def _follow_path(path: ExpandPath, levels: _Levels) -> Iterator[None]:
    """Add the levels of a path. Paths with the same beginning share it."""
    names: ExpandNames = ()
    for hop in path.hops:
        level, names = levels[names], (*names, hop.name)
        if names in levels:
            continue
        next_level: dict[RecordNode, None] | None = None if level is None else {}
        for node in level or ():
            children = node.children.get(hop.name)
            if children is None or next_level is None:
                next_level = None
                break
            next_level.update(dict.fromkeys(children))
            yield
        levels[names] = next_level
        yield


def _is_path_visible(path: ExpandPath, levels: _Levels) -> bool:
    """Whether no record on the path was refused: a path with one refusal adds nothing at all."""
    last = levels[tuple(hop.name for hop in path.hops)]
    return last is not None and not (path.has_unknown_name and last)


class _ExpandWriter:
    """Writes related records; one that is shown several times is encoded once."""

    def __init__(self, viewer: ExpandViewer, render_record: RenderRecord, max_bytes: int) -> None:
        self._viewer = viewer
        self._render_record = render_record
        self._max_bytes = max_bytes
        self._written_records: dict[RecordNode, Raw] = {}
        """A node belongs to one branch of the plan, so its children are the same each time."""
        self._written_members: dict[tuple[int, ...], bytes] = {}
        """Small ones by the identity of branches and lists of children: records share these."""

    def write_members(self, node: RecordNode, branches: Mapping[str, ExpandBranch]) -> bytes:
        """Return the JSON of a record's ``expand``, its names sorted by their bytes."""
        key = id(branches), *[id(node.children.get(name)) for name in branches]
        written = self._written_members.get(key)
        if written is None:
            written = self._write_members(node, branches)
            if len(written) <= _MAX_KEPT_BYTES:
                self._written_members[key] = written
        return written

    def _write_members(self, node: RecordNode, branches: Mapping[str, ExpandBranch]) -> bytes:
        members: dict[str, Raw | list[Raw]] = {}
        size = 0
        for name in sorted(branches, key=str.encode):
            records: list[Raw] = []
            for child in node.children.get(name) or ():
                record = self._write_record(child, branches[name])
                size += len(record)
                if size > self._max_bytes:
                    raise ExpandTooLargeError
                records.append(record)
            if records:
                members[name] = records if branches[name].hop.is_list else records[0]
        return _encode_json(members)

    def write_child(self, child: RecordNode, branch: ExpandBranch) -> int:
        """Write a related record; return its size."""
        return len(self._write_record(child, branch))

    def _write_record(self, child: RecordNode, branch: ExpandBranch) -> Raw:
        record = self._written_records.get(child)
        if record is None:
            below = self.write_members(child, branch.branches) if branch.branches else None
            view = View(sees_hidden=self._viewer.sees_hidden, sees_email=child.sees_email)
            record = self._written_records[child] = Raw(self._render_record(child, view, below))
        return record
